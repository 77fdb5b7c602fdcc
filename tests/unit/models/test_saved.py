"""A saved model: the same answers after loading, or a one-line refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedhead.common.config import RunConfig, make_config
from fedhead.common.errors import DataError, ModelError
from fedhead.common.models.backbones import load_backbone
from fedhead.common.models.heads import make_head
from fedhead.common.models.saved import load_model, save_model
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import make_task

NETS = """
import torch
from torch import nn


def _seeded(layer):
    torch.manual_seed(3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


class Texts(nn.Module):
    input_kind = "text"

    def __init__(self):
        super().__init__()
        self.table = _seeded(nn.Embedding(257, 6))

    def collate(self, texts):
        width = max(1, max(map(len, texts)))
        rows = [[min(ord(c), 255) + 1 for c in text] + [0] * (width - len(text)) for text in texts]
        return {"ids": torch.tensor(rows)}

    def forward(self, ids):
        mask = (ids > 0).float()[..., None]
        return (self.table(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)


class Vectors(nn.Sequential):
    input_kind = "vector"

    def __init__(self):
        super().__init__(_seeded(nn.Linear(4, 6)), nn.Tanh())


class Images(nn.Sequential):
    input_kind = "image"
    image_size = 16

    def __init__(self):
        super().__init__(_seeded(nn.Conv2d(3, 6, 4, stride=4)), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class HalfFrozen(nn.Module):
    def __init__(self, features, outputs):
        super().__init__()
        self.fixed = nn.Linear(features, 8).requires_grad_(False)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.fixed(x))
"""
TEXTS = ["good", "bad and long", "", "so so", "ünï ✓"]
LABELS = ["negative", "positive", "neither"]


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "saved_nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "module:saved_nets:"


def recipe(backbone: str, base: Path, **model: Any) -> RunConfig:
    raw = {
        "task": {"labels": LABELS},
        "model": {"backbone": backbone, **model},
        "data": {"source": "csv:x.csv"},
        "privacy": {"epsilon": 1.0},
        "run": {"seed": 5},
    }
    return make_config(raw, base=base)


def train(config: RunConfig, folder: Path) -> Trainable:
    """Save a head whose values no initialisation would give."""
    backbone, task = load_backbone(config.model, config.base), make_task(config.task)
    torch.manual_seed(config.run.seed)
    head = make_head(config.model.head, backbone.dim, task.outputs)
    trainable = Trainable(tail=backbone.tail, normalize=config.model.features.normalize, head=head)
    torch.manual_seed(11)
    with torch.no_grad():
        for value in trainable.trained().values():
            value.copy_(torch.randn_like(value))
    save_model(folder, trainable, config, backbone, task)
    return trainable


def expected(config: RunConfig, trainable: Trainable, inputs: list[Any]) -> np.ndarray:
    """Probabilities of each input alone, without the code under test."""
    backbone = load_backbone(config.model, config.base)
    trainable.eval()
    with torch.no_grad():
        rows = [trainable(*backbone.forward(backbone.collate([one])))[0].double().softmax(0) for one in inputs]
    return torch.stack(rows).numpy()


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["Texts", "Vectors", "Images"])
@pytest.mark.parametrize("head", [{"kind": "linear"}, {"kind": "mlp", "hidden": [7], "dropout": 0.5}])
def test_a_loaded_model_answers_as_the_trained_one(nets: str, tmp_path: Path, kind: str, head: dict[str, Any]) -> None:
    config = recipe(nets + kind, tmp_path, head=head)
    trainable = train(config, tmp_path / "model")
    vectors: list[Any] = list(np.random.default_rng(1).normal(size=(5, 4)))
    inputs: list[Any] = {"Texts": TEXTS, "Vectors": vectors, "Images": images(5)}[kind]
    model = load_model(tmp_path / "model", allow_modules=True)
    for batch in (1, 2, 64):
        labels, probabilities = model.predict(inputs, batch_size=batch)
        np.testing.assert_allclose(probabilities, expected(config, trainable, inputs), atol=1e-5)
        assert labels == [LABELS[i] for i in probabilities.argmax(1)]
    assert len({tuple(row) for row in probabilities.round(4).tolist()}) > 1


def test_nothing_in_gives_nothing_out(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Texts", tmp_path), tmp_path / "model")
    labels, probabilities = load_model(tmp_path / "model", allow_modules=True).predict([])
    assert labels == []
    assert probabilities.shape == (0, 3)


def test_the_folder_holds_the_agreed_parts(nets: str, tmp_path: Path) -> None:
    trainable = train(recipe(nets + "Texts", tmp_path, max_length=32), tmp_path / "run" / "model")
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text(encoding="utf-8"))
    assert card["schema"] == 1
    assert card["task"] == {"kind": "classification", "labels": LABELS}
    assert card["model"]["max_length"] == 32
    assert card["model"]["features"]["normalize"] is True
    assert len(card["digest"]) == len(card["sha256"]) == 64
    assert card["base"] == "../.."
    assert str(tmp_path) not in json.dumps(card)
    state = load_file(tmp_path / "run" / "model" / "head.safetensors")
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in trainable.trained().items()
    }
    assert sorted(file.name for file in (tmp_path / "run" / "model").iterdir()) == ["head.safetensors", "model.json"]


def test_the_folder_of_the_run_will_do(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Texts", tmp_path), tmp_path / "run" / "model")
    assert load_model(tmp_path / "run", allow_modules=True).labels == tuple(LABELS)


def test_weights_are_found_again_when_folders_move_together(nets: str, tmp_path: Path) -> None:
    place = tmp_path / "here"
    (place / "recipes").mkdir(parents=True)
    backbone = load_backbone(recipe(nets + "Vectors", place).model, place)
    state = {name.removeprefix("body."): value + 1 for name, value in backbone.frozen.state_dict().items()}
    save_file(state, place / "recipes" / "w.safetensors")
    config = recipe(nets + "Vectors", place / "recipes", weights="w.safetensors")
    trainable = train(config, place / "run" / "model")
    answers = expected(config, trainable, [np.ones(4)])
    place.rename(tmp_path / "there")
    model = load_model(tmp_path / "there" / "run" / "model", allow_modules=True)
    np.testing.assert_allclose(model.predict([np.ones(4)])[1], answers, atol=1e-6)

    shutil.move(tmp_path / "there" / "recipes", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "there" / "run", allow_modules=True)
    weights = str(tmp_path / "elsewhere" / "w.safetensors")
    model = load_model(tmp_path / "there" / "run", weights=weights, allow_modules=True)
    np.testing.assert_allclose(model.predict([np.ones(4)])[1], answers, atol=1e-6)


def test_parts_of_a_head_that_are_not_trained_come_back(nets: str, tmp_path: Path) -> None:
    config = recipe(nets + "Vectors", tmp_path, head={"kind": "module:saved_nets:HalfFrozen"})
    trainable = train(config, tmp_path / "model")
    torch.manual_seed(99)
    model = load_model(tmp_path / "model", allow_modules=True)
    inputs = [np.arange(4.0)]
    np.testing.assert_allclose(model.predict(inputs)[1], expected(config, trainable, inputs), atol=1e-6)


def test_loading_leaves_the_random_stream_alone(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Vectors", tmp_path, head={"kind": "mlp", "hidden": [7]}), tmp_path / "model")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_model(tmp_path / "model", allow_modules=True)
    assert torch.equal(before, torch.get_rng_state())


def test_another_backbone_is_refused_with_both_digests(
    nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(nets + "Vectors", tmp_path), tmp_path / "model")
    card = json.loads((tmp_path / "model" / "model.json").read_text(encoding="utf-8"))
    card["digest"] = "0123456789ab" + card["digest"][12:]
    actual = load_backbone(recipe(nets + "Vectors", tmp_path).model, tmp_path).digest
    (tmp_path / "model" / "model.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(ModelError) as refused:
        load_model(tmp_path / "model", allow_modules=True)
    message = str(refused.value)
    assert "0123456789ab" in message
    assert actual[:12] in message
    assert "\n" not in message


def test_another_preprocessing_is_refused(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Images", tmp_path), tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["model"]["image"]["mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(ModelError, match="prepares inputs in another way"):
        load_model(tmp_path / "model", allow_modules=True)


def test_a_tampered_head_is_refused(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Vectors", tmp_path), tmp_path / "model")
    path = tmp_path / "model" / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="was changed") as refused:
        load_model(tmp_path / "model", allow_modules=True)
    assert "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(ModelError, match="is missing"):
        load_model(tmp_path / "model", allow_modules=True)


def test_a_head_of_another_shape_is_refused_even_with_its_digest(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Vectors", tmp_path), tmp_path / "a")
    train(recipe(nets + "Vectors", tmp_path, head={"kind": "mlp", "hidden": [7]}), tmp_path / "b")
    card = json.loads((tmp_path / "a" / "model.json").read_text(encoding="utf-8"))
    card["sha256"] = json.loads((tmp_path / "b" / "model.json").read_text(encoding="utf-8"))["sha256"]
    (tmp_path / "a" / "model.json").write_text(json.dumps(card), encoding="utf-8")
    shutil.copy(tmp_path / "b" / "head.safetensors", tmp_path / "a")
    with pytest.raises(ModelError, match="doesn't fit"):
        load_model(tmp_path / "a", allow_modules=True)


def test_code_that_a_folder_names_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved_nets.py").write_text(NETS, encoding="utf-8")
    (tmp_path / "evil_nets.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    train(recipe("module:saved_nets:Vectors", tmp_path), tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    for change in (
        {"model": {**card["model"], "backbone": "module:evil_nets:x"}},
        {"model": {**card["model"], "backbone": "torchvision:resnet18", "head": {"kind": "module:evil_nets:x"}}},
        {
            "model": {**card["model"], "backbone": "torchvision:resnet18"},
            "task": {**card["task"], "kind": "module:evil_nets:x"},
        },
    ):
        path.write_text(json.dumps({**card, **change}), encoding="utf-8")
        with pytest.raises(ModelError, match="allow_modules"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no model.json"),
        ("{", "can't be read"),
        ("[]", "schema"),
        ('{"schema": 9}', "schema"),
        ('{"schema": 1}', "valid"),
    ],
)
def test_a_missing_or_broken_card_is_refused_in_one_line(tmp_path: Path, content: str | None, word: str) -> None:
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    with pytest.raises(ModelError, match=word) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_inputs_of_another_kind_are_refused_without_being_shown(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Texts", tmp_path), tmp_path / "model")
    model = load_model(tmp_path / "model", allow_modules=True)
    with pytest.raises(DataError, match=r"inputs\[1\] is of type int"):
        model.predict(["a", 31337])
    with pytest.raises(DataError, match="must be a list") as refused:
        model.predict("secret")
    assert "secret" not in str(refused.value)


def test_an_input_without_finite_features_has_no_label(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Vectors", tmp_path), tmp_path / "model")
    labels, _ = load_model(tmp_path / "model", allow_modules=True).predict([np.full(4, np.nan), np.ones(4)])
    assert labels[0] == ""
    assert labels[1] in LABELS


def test_grey_images_are_taken_as_coloured_ones(nets: str, tmp_path: Path) -> None:
    train(recipe(nets + "Images", tmp_path), tmp_path / "model")
    model = load_model(tmp_path / "model", allow_modules=True)
    grey = images(1)[0].convert("L")
    np.testing.assert_array_equal(model.predict([grey])[1], model.predict([grey.convert("RGB")])[1])
