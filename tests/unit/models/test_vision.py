"""Every classification model of torchvision, without its classifier."""

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

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
    size = pipeline.crop
    if isinstance(model, torchvision.models.VisionTransformer):
        size = (model.image_size, model.image_size)
    with torch.no_grad():
        features = model.eval()(torch.zeros(2, 3, *size, device="meta"))
    assert features.shape == (2, width)
