import hashlib
import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedhead.common.config.schema import ModelSettings
from fedhead.common.errors import ModelError
from fedhead.common.models import weights
from fedhead.common.models.backbones import load_backbone


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported."""
    folder = tmp_path / "site" / "holds_weights"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('was imported')")
    (folder / "model" / "net.pth").write_bytes(b"bytes")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    return folder


def test_paths_start_from_the_recipe(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"")
    assert weights.resolve("net.pth", tmp_path) == tmp_path / "net.pth"
    assert weights.resolve(str(tmp_path / "net.pth"), Path("/nowhere")) == tmp_path / "net.pth"
    with pytest.raises(ModelError) as error:
        weights.resolve("missing.pth", tmp_path)
    assert one_line(error).startswith('model.weights is "missing.pth": there is no such file or folder.')


def test_packages_are_found_and_never_imported(package):
    assert weights.resolve("pkg://holds_weights/model/net.pth", Path()) == package / "model" / "net.pth"
    assert weights.resolve("pkg://holds_weights/model", Path()) == package / "model"
    assert "holds_weights" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pkg://not_installed/model", 'no package "not_installed" is installed'),
        ("pkg://holds_weights/other.pth", "has no such file"),
        ("pkg://holds_weights", "has no such file"),
        ("pkg://holds_weights/../secret", "a file in the package"),
        ("pkg://holds_weights.model/net.pth", "a file in the package"),
        ("pkg://json.decoder/x", "a file in the package"),
    ],
)
def test_packages_that_are_none(package, name, message):
    with pytest.raises(ModelError, match=message) as error:
        weights.resolve(name, Path())
    assert one_line(error).startswith(f'model.weights is "{name}"')
    assert "holds_weights" not in sys.modules


class Bomb:
    """Unpickled by torch.load without weights_only, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, plain):
    target, path = tmp_path / "exploded", tmp_path / "net.pth"
    if plain:
        path.write_bytes(pickle.dumps({"weight": Bomb(target)}))
    else:
        torch.save({"weight": Bomb(target)}, path)
    with pytest.raises(ModelError) as error:
        weights.read_state(path)
    assert not target.exists()
    assert "never unpickled" in one_line(error)
    # The twin: the same file does explode where nothing protects.
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()


def test_a_pickle_with_code_is_refused_by_every_kind_of_backbone(tmp_path):
    target = tmp_path / "exploded"
    torch.save({"weight": Bomb(target)}, tmp_path / "net.pth")
    for backbone in ("torchvision:resnet18", "module:torch.nn:Identity"):
        with pytest.raises(ModelError):
            load_backbone(ModelSettings(backbone=backbone, weights="net.pth"), tmp_path, vector_size=3)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}')
    torch.save({"weight": Bomb(target)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        load_backbone(ModelSettings(backbone="transformers:x", weights="folder"), tmp_path)
    one_line(error)
    assert not target.exists()


def test_states_are_read(tmp_path):
    state = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    for name in ("net.safetensors", "net.pth", "checkpoint.pth"):
        read = weights.read_state(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_files_that_are_no_states(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.pth").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "noise.safetensors").write_bytes(b"not safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    for path in tmp_path.iterdir():
        with pytest.raises(ModelError, match=r"model\.weights is") as error:
            weights.read_state(path)
        one_line(error)


def test_pin(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    weights.check_pin(path, None)
    weights.check_pin(path, right)
    weights.check_pin(tmp_path, right)  # of a folder, its weights file counts
    with pytest.raises(ModelError) as error:
        weights.check_pin(path, "0" * 64)
    assert one_line(error).startswith(f'model.sha256 is "{"0" * 64}": model.safetensors has {right}.')
    path.unlink()
    with pytest.raises(ModelError, match=r"must hold model\.safetensors or pytorch_model\.bin"):
        weights.check_pin(tmp_path, right)


@pytest.mark.parametrize("backbone", ["torchvision:resnet18", "module:torch.nn:Identity", "transformers:x"])
def test_the_pin_is_checked_before_anything_is_loaded(tmp_path, monkeypatch, backbone):
    def never(*args, **kwargs):
        raise AssertionError("loaded before the pin was checked")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", never)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"something else")
    name = "." if backbone == "transformers:x" else "pytorch_model.bin"
    with pytest.raises(ModelError, match=r"model\.sha256 is"):
        load_backbone(ModelSettings(backbone=backbone, weights=name, sha256="0" * 64), tmp_path, vector_size=3)


def test_a_pin_without_weights():
    with pytest.raises(ModelError, match="there are no weights to check"):
        load_backbone(ModelSettings(backbone="module:torch.nn:Identity", sha256="0" * 64), Path(), vector_size=3)


def test_load_into_wants_all_of_it():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {key: torch.ones_like(value) for key, value in net.state_dict().items()}
    weights.load_into(net, {**state, "fc.weight": torch.zeros(9, 9)}, "x", removed=("fc.",))
    assert (net[0].weight == 1).all()
    for wrong, message in [
        ({**state, "fc.weight": torch.zeros(1)}, "0 tensors are missing and 1 are not"),
        ({key: value for key, value in state.items() if key != "0.weight"}, "1 tensors are missing"),
        ({**state, "0.weight": torch.zeros(2, 4)}, "other shapes"),
    ]:
        with pytest.raises(ModelError, match=message) as error:
            weights.load_into(net, wrong, 'model.weights is "net.pth"')
        one_line(error)


def test_versions_of_layers_come_along_and_nothing_else(tmp_path):
    state = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
    state._metadata["0"] = {"version": "2", "assign_to_params_buffers": True}
    state._metadata["1"]["more"] = [1]
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    read = weights.read_state(tmp_path / "net.pth")
    assert read._metadata == {"": {"version": 1}, "1": {"version": 2}}
    weights.load_into(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), read, "x")
    state._metadata = ["nothing"]
    torch.save(state, tmp_path / "net.pth")
    assert weights.read_state(tmp_path / "net.pth")._metadata == {}


def test_hub_files(tmp_path, monkeypatch):
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ModelError, match=r"can't be downloaded\. Connect .* or set model\.weights") as error:
        weights.hub_file(f"https://example.org/{name}", "torchvision:net")
    one_line(error)

    source = tmp_path / "served.pth"
    source.write_bytes(content)
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    served = tmp_path / name
    source.rename(served)
    path = weights.hub_file(served.as_uri(), "torchvision:net")  # torch's own downloader, from a file: URL
    assert path == tmp_path / "checkpoints" / name
    assert path.read_bytes() == content

    path.write_bytes(b"damaged")
    with pytest.raises(ModelError, match="damaged"):
        weights.hub_file(served.as_uri(), "torchvision:net")
    path.unlink()
    served.write_bytes(b"something else")
    with pytest.raises(ModelError, match="not what its name promises"):
        weights.hub_file(served.as_uri(), "torchvision:net")
    assert not path.exists()


def test_a_hub_file_is_not_downloaded_where_models_are_not_to_be(tmp_path, monkeypatch):
    """A holder that has joined: what a server names would be fetched at its word."""
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("it was downloaded"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE says .*\. Fetch it once .* or set model\.weights") as error:
        weights.hub_file(f"https://example.org/{name}", "torchvision:net")
    one_line(error)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).write_bytes(content)  # once it is there, it is used
    assert weights.hub_file(f"https://example.org/{name}", "torchvision:net") == tmp_path / "checkpoints" / name


@pytest.mark.parametrize(("variable", "value", "found"), [
    ("HF_HUB_OFFLINE", "1", True), ("HF_HUB_OFFLINE", "0", False), ("TRANSFORMERS_OFFLINE", "1", True),
])  # fmt: skip
def test_what_a_process_is_started_with_says_whether_models_are_downloaded(variable, value, found):
    code = "from fedhead.common.models.weights import offline; print(offline())"
    environment = {name: text for name, text in os.environ.items() if not name.endswith("_OFFLINE")} | {variable: value}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == f"{found}\n"


def test_digest_names_architecture_and_every_tensor():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    first = weights.state_digest("a", net)
    assert first == weights.state_digest("a", nn.Sequential(*net))
    assert first != weights.state_digest("b", net)
    net[1].running_mean[0] += 1e-7
    assert first != weights.state_digest("a", net)
    net[1].running_mean[0] = 0.0
    assert first == weights.state_digest("a", net)
    assert first != weights.state_digest("a", net.half())


def test_digest_is_the_same_on_every_machine():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    expected = hashlib.sha256(
        b"3:net\nbias torch.float32 (1,)\n" + bytes.fromhex("0000003f")
        + b"\nweight torch.float32 (1, 2)\n" + bytes.fromhex("0000803f000000c0")
    )  # fmt: skip
    assert weights.state_digest("net", layer) == expected.hexdigest()
