"""Every classification model of torchvision, without its classifier."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import DenseNet, MNASNet, VisionTransformer

from fedhead.common.config.schema import ModelSettings
from fedhead.common.errors import ModelError
from fedhead.common.models import vision


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters get no memory, while constructors that compute with tensors (RegNet, Swin) still can."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def test_there_are_models():
    names = vision.classification_models()
    assert {"resnet18", "resnet50", "vgg16", "vit_b_16"} <= set(names)
    assert len(names) > 70


@pytest.mark.parametrize("name", vision.classification_models())
def test_every_classification_model_gives_feature_vectors(name):
    """On the meta device: shapes only, no memory."""
    with _EmptyOnMeta():
        model = vision.build(name).to("meta")
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    classes = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    width = last.in_features if isinstance(last, nn.Linear) else last.in_channels
    assert classes == 1000  # the layer that goes is the classifier
    for layer_name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            model.set_submodule(layer_name, nn.Identity())  # changes no shape, and takes most of the time on meta
    removed = vision.remove_classifier(model)
    assert isinstance(model.get_submodule(removed), nn.Identity)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    pipeline = vision.default_pipeline(weights.transforms())
    with torch.no_grad():
        features = model.eval()(torch.zeros(2, 3, *pipeline.crop, device="meta"))
    assert features.shape == (2, width)


def small_densenet(weights=None):
    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=1)


def small_vit(weights=None, image_size=224):
    return VisionTransformer(image_size, patch_size=14, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)


PUBLISHED = {
    "densenet121": (small_densenet, small_densenet),
    "mnasnet0_5": (lambda weights=None: MNASNet(0.1), lambda: MNASNet(0.1)),
    "vit_h_14": (small_vit, lambda: small_vit(image_size=518)),  # SWAG, end to end: images of 518 pixels
}


def load(name: str, builder, path: Path, monkeypatch) -> nn.Module:
    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda _: builder)
    settings = ModelSettings(backbone=f"torchvision:{name}", weights=path.name)
    return vision.load_torchvision(settings, path.parent, None).body


def assert_loaded(body: nn.Module, model: nn.Module) -> None:
    found, expected = body.state_dict(), model.state_dict()
    assert found
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key.removeprefix("body.")], rtol=0, atol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_load_as_they_are_published(name, tmp_path, monkeypatch):
    """Small networks of the families whose files differ from what their class gives today, or from its defaults."""
    builder, original = PUBLISHED[name]
    torch.manual_seed(3)
    model = original()
    state = model.state_dict()
    if name.startswith("densenet"):  # their files are of 2017: norm.1 where the class has norm1
        for key in list(state):
            if key.endswith("num_batches_tracked"):
                del state[key]
                continue
            state[re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key)] = state.pop(key)
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "net.pth")
    assert_loaded(load(name, builder, tmp_path / "net.pth", monkeypatch), model)


def test_a_vision_transformer_has_the_size_of_its_weights(tmp_path, monkeypatch):
    """Other published weights than the default ones are of other sizes."""
    model = small_vit(image_size=224)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    assert_loaded(load("vit_h_14", small_vit, tmp_path / "net.pth", monkeypatch), model)


def test_weights_without_a_version_where_one_is_needed(tmp_path, monkeypatch):
    torch.save(dict(MNASNet(0.1).state_dict()), tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r'^model\.weights is "net\.pth": .* no version .* as they were') as error:
        load("mnasnet0_5", lambda weights=None: MNASNet(0.1), tmp_path / "net.pth", monkeypatch)
    assert "\n" not in str(error.value)
