"""A trained model as a folder that can travel: head.safetensors and model.json.

    head.safetensors   every trained parameter by name
    model.json         which backbone (by settings and by digest), head, task, preprocessing; sha256 of the other file

The backbone itself isn't copied. It is loaded again from its settings, and must have the digest that the head was
trained on. A folder from elsewhere can't run code: tensors are safetensors, and `module:` names are resolved only for
the backbones of fedhead's own recipes, unless the caller allows more.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedhead import __version__
from fedhead.common.config import RunConfig
from fedhead.common.config.places import path_from
from fedhead.common.config.schema import ModelSettings
from fedhead.common.data.inputs import to_rgb
from fedhead.common.errors import DataError, ModelError
from fedhead.common.models.backbones import Backbone, load_backbone
from fedhead.common.models.card import CARD, HEAD, SCHEMA, read_card, read_head
from fedhead.common.models.heads import make_head
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task, make_task
from fedhead.common.writing import write_aside

ELSEWHERE: Final = (
    "Name the weights of the run: with --weights PATH of fedhead predict, or in Python fedhead.load(..., weights=PATH)."
)
OWN: Final = "module:fedhead.simulations.backbones:"  # factories of the built-in recipes


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model, ready to predict. B inputs, K labels, D features.

    Attributes
    ----------
    backbone : Backbone
    trainable : Trainable
        In eval mode.
    task : Task
    labels : tuple of str
        In the order of the probabilities.
    settings : ModelSettings
        The recipe's `[model]`.
    """

    backbone: Backbone
    trainable: Trainable
    task: Task
    labels: tuple[str, ...]
    settings: ModelSettings

    def __repr__(self) -> str:
        return f"Model({self.backbone.name!r}, {self.backbone.kind}, {len(self.labels)} labels)"

    def predict(self, inputs: Sequence[Any], batch_size: int = 64) -> tuple[list[str], np.ndarray]:
        """Labels and probabilities.

        Parameters
        ----------
        inputs : sequence of str, PIL.Image or arrays of shape (D,)
            As the backbone's kind asks for.
        batch_size : int, >= 1
            Inputs in one batch; changes speed and memory, not the answer beyond rounding.

        Returns
        -------
        labels : list of str, length N
            The most probable label; "" where the probabilities are not finite.
        probabilities : float64 array, shape (N, K)
            In the order of `labels` of this model.

        Raises
        ------
        DataError
            When an input is no text, image or vector, or a vector of another length. Never shows the input.
        """
        inputs = self._checked(inputs)
        labels: list[str] = [""] * len(inputs)
        probabilities = np.zeros((len(inputs), len(self.labels)))
        # Inputs of about the same length go together, so that little is padded; the answers keep the given order.
        cost = self.backbone.cost(inputs) if inputs else None
        order = np.arange(len(inputs)) if cost is None else np.argsort(np.asarray(cost), kind="stable")
        for start in range(0, len(inputs), max(1, batch_size)):
            rows = order[start : start + max(1, batch_size)].tolist()
            with torch.inference_mode():
                values, lengths = self.backbone.forward(self.backbone.collate([inputs[row] for row in rows]))
            found, probabilities[rows] = self.predict_features(values, lengths)
            for row, label in zip(rows, found, strict=True):
                labels[row] = label
        return labels, probabilities

    def predict_features(self, values: Tensor, lengths: Tensor | None = None) -> tuple[list[str], np.ndarray]:
        """The same from values at the cut: (B, *shape), and lengths (B,) for texts at a cut."""
        self.trainable.eval()
        with torch.inference_mode():
            labels, probabilities = self.task.predict(self.trainable(values, lengths))
        finite = np.isfinite(probabilities).all(1)
        return [label if good else "" for label, good in zip(labels, finite, strict=True)], probabilities

    def _checked(self, inputs: Sequence[Any]) -> list[Any]:
        kind = self.backbone.kind
        if isinstance(inputs, str | bytes | Mapping | Image.Image):
            raise DataError(f"inputs is one {type(inputs).__name__}: it must be a list of {kind}s. Put it in a list.")
        expected: dict[str, Any] = {"text": str, "image": Image.Image, "vector": np.ndarray | list | tuple}
        found = []
        for number, given in enumerate(inputs):
            if not isinstance(given, expected[kind]):
                raise DataError(
                    f"inputs[{number}] is of type {type(given).__name__}: this model takes {kind}s. "
                    f"Give {'PIL images' if kind == 'image' else 'str' if kind == 'text' else 'arrays of shape (D,)'}."
                )
            one = to_rgb(given) if kind == "image" else given
            if one is None:
                raise DataError(
                    f"inputs[{number}] has numbers of no known range (mode {given.mode}). Give 8 or 16 bits a colour."
                )
            found.append(self._vector(number, one) if kind == "vector" else one)
        return found

    def _vector(self, number: int, given: Any) -> np.ndarray:
        size = vector_size(self.backbone)
        try:
            found = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(
                f"inputs[{number}] is no vector: it must hold numbers alone. Give an array of shape (D,)."
            ) from None
        if size is not None and found.size != size:
            raise DataError(
                f"inputs[{number}] is a vector of length {found.size}: this model takes vectors of length {size}. "
                f"Give arrays of shape ({size},)."
            )
        return found


def save_model(
    folder: str | Path, trainable: Trainable, config: RunConfig, backbone: Backbone, task: Task | None = None
) -> Path:
    """Write a trained model into a folder, which is made.

    Parameters
    ----------
    folder : path
    trainable : Trainable
        Its trained parameters are written by name, in float32 and on the CPU.
    config : RunConfig
        `[model]`, `[task]` and the seed are kept.
    backbone : Backbone
        Only its digest and preprocessing are written.

    Returns
    -------
    Path
        The folder.

    Notes
    -----
    Each file is written aside and renamed. model.json is last and holds the digest of the other, so that a kill between
    the two is noticed when the model is loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in trainable.trained().items()}
    content = save_tensors(state)
    preprocessing: dict[str, Any] = json.loads(backbone.preprocessing)
    card = {
        "schema": SCHEMA,
        "fedhead": __version__,
        "backbone": backbone.name,
        "digest": backbone.digest,
        "preprocessing": preprocessing,
        "task": config.task.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "base": _relative(config.base, folder),
        "vector_size": vector_size(backbone),
        "seed": config.run.seed,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_aside(folder / HEAD, content)
    write_aside(folder / CARD, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    return folder


def load_model(
    folder: str | Path, *, weights: str | None = None, base: Path | None = None, allow_modules: bool = False
) -> Model:
    """Load a model that `save_model` wrote, here or on another machine.

    Parameters
    ----------
    folder : path
        The folder `model/` of a run, or the run's folder.
    weights : str, optional
        Where the backbone's weights are on this machine; default: as in the recipe.
    base : path, optional
        Where relative paths in the recipe start; default: the recipe's folder as seen from the model's.
    allow_modules : bool
        Also resolve other `module:` names than those of the built-in recipes. That runs code which the
        folder names: for folders you trust.

    Raises
    ------
    ModelError
        In one line: no model there, a file that was changed, a backbone that can't be loaded, or one whose digest or
        preprocessing isn't the one that the head was trained on.

    Notes
    -----
    Guarantee: a model either predicts with the very backbone that its head was trained on, or isn't loaded.
    """
    folder = path_from(str(folder), Path())
    if not (folder / CARD).exists() and (folder / "model" / CARD).exists():
        folder = folder / "model"
    shown = f'MODEL_DIR is "{folder}"'
    card = read_card(folder, shown)
    named = [name for name in (card.model.backbone, card.model.head.kind, card.task.kind) if name.startswith("module:")]
    foreign = [name for name in named if not name.startswith(OWN)]
    if foreign and not allow_modules:
        raise ModelError(
            f'{shown}: it names code outside fedhead, "{foreign[0]}", which loading would run. '
            "If you trust the folder, load it with --allow-modules, or allow_modules=True in Python."
        )
    state = read_head(folder, card, shown)
    settings = card.model if weights is None else card.model.model_copy(update={"weights": weights, "sha256": None})
    root = (folder / card.base).resolve() if base is None else base
    theirs = card.model.weights
    if weights is None and theirs and not theirs.startswith("pkg://") and not path_from(theirs, root).exists():
        raise ModelError(
            f'{shown}: there is no such file or folder here as its backbone\'s weights, "{theirs}". {ELSEWHERE}'
        )
    backbone = load_backbone(settings, root, vector_size=card.vector_size)
    if backbone.digest != card.digest:
        raise ModelError(
            f'{shown}: its head was trained on a backbone with digest {card.digest[:12]}, but "{card.backbone}" loads '
            f"here with {backbone.digest[:12]}. {ELSEWHERE}"
        )
    if json.loads(backbone.preprocessing) != card.preprocessing:
        raise ModelError(
            f"{shown}: this installation prepares inputs in another way than when its head was trained "
            f"(fedhead {card.fedhead}). Install the versions of fedhead, transformers and torchvision that trained it."
        )
    task = make_task(card.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(card.seed)  # parts of a head that aren't trained start, and stay, as in the run
        head = make_head(card.model.head, backbone.dim, task.outputs)
    trainable = Trainable(tail=copy.deepcopy(backbone.tail), normalize=card.model.features.normalize, head=head)
    _fill(trainable, state, shown)
    trainable.eval()
    return Model(backbone, trainable, task, tuple(card.task.labels), card.model)


def _fill(trainable: Trainable, state: Mapping[str, Tensor], shown: str) -> None:
    """Put the trained parameters in; names and shapes must be exactly those of the model."""
    expected = trainable.trained()
    fits = set(state) == set(expected) and all(state[name].shape == value.shape for name, value in expected.items())
    if not fits:
        raise ModelError(f"{shown}: {HEAD} doesn't fit the model that {CARD} describes. Restore the folder.")
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(state[name])


def vector_size(backbone: Backbone) -> int | None:
    """Length of the vectors that a backbone takes; None where it takes no vectors."""
    size = json.loads(backbone.preprocessing).get("input", {}).get("size") if backbone.kind == "vector" else None
    return size if isinstance(size, int) else None


def _relative(base: Path, folder: Path) -> str:
    """The recipe's folder as seen from the model's, so that both may move together."""
    try:
        return os.path.relpath(base.resolve(), folder.resolve())
    except ValueError:  # two drives
        return "."
