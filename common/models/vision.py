"""Backbones of torchvision: every image classification model, without its classifier.

The cut, counted from the end:

- ResNets (resnet, resnext, wide_resnet): residual blocks, through layer4, layer3 and so on.
- VGGs: layers with weights, each with the activation, dropout and pooling that follow it: first the two linear layers
  left of the classifier, then the convolutions.
- Vision transformers (vit_b_16 and its kin): encoder blocks; the final norm trains along.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VGG, DenseNet, ResNet, VisionTransformer

from fedhead.common.config.schema import ModelSettings
from fedhead.common.errors import ModelError
from fedhead.common.models.cut import Chain, Frozen, Tail, cut_chain, no_cut
from fedhead.common.models.images import ImagePipeline
from fedhead.common.models.network import Network
from fedhead.common.models.weights import check_pin, hub_file, load_into, read_state, renamed, resolve

CUTTABLE = "torchvision's ResNets, VGGs and vision transformers"
# Arguments that make a model what its weights were trained as, without the auxiliary classifiers.
ARGUMENTS: dict[str, Any] = {"aux_logits": False, "transform_input": True, "init_weights": False}
AUXILIARY = ("aux", "AuxLogits")
# The published DenseNets are older than the rule that a module's name holds no dot: norm.1 there is norm1 here.
DENSE = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))")


def classification_models() -> list[str]:
    """Names of every image classification model that torchvision has."""
    return list(torchvision.models.list_models(module=torchvision.models))


def build(name: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model of torchvision with random weights, its classifier still on.

    Parameters
    ----------
    name : str
    state : mapping, optional
        The weights that it is to take: a vision transformer is built for as many patches as they have. Default: for
        those of its default weights.
    """
    builder = torchvision.models.get_model_builder(name)
    # googlenet and inception_v3 hand these through **kwargs to the class, where the arguments show.
    cls = {"googlenet": torchvision.models.GoogLeNet, "inception_v3": torchvision.models.Inception3}.get(name)
    accepted = inspect.signature(cls).parameters if cls is not None else {}
    arguments = {key: value for key, value in ARGUMENTS.items() if key in accepted}
    if name.startswith("vit_"):
        arguments["image_size"] = _side(name, state or {})
    model: nn.Module = builder(weights=None, **arguments)
    return model


def _side(name: str, state: Mapping[str, Tensor]) -> int:
    """Pixels a side of the images that a vision transformer's weights were trained on."""
    positions = state.get("encoder.pos_embedding")  # (1, 1 + patches, H)
    if positions is not None and positions.ndim == 3 and positions.shape[1] > 1:
        return math.isqrt(positions.shape[1] - 1) * int(name.rpartition("_")[2])  # vit_h_14: patches of 14 pixels
    size: int = torchvision.models.get_model_weights(name).DEFAULT.meta["min_size"][0]
    return size


def remove_classifier(model: nn.Module) -> str:
    """Replace the last layer, which gives the classes, by the identity: (B, classes) becomes (B, D).

    Returns
    -------
    name : str
        Of the layer that was removed; its tensors in a state dict start with it.
    """
    layers: list[str] = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    name = layers[-1]
    model.set_submodule(name, nn.Identity())
    return name


def load_torchvision(settings: ModelSettings, base: Path, vector_size: int | None) -> Network:
    """The network behind ``torchvision:NAME``; see `load_backbone`."""
    name = settings.backbone.partition(":")[2]
    if name not in classification_models():
        raise ModelError(
            f'model.backbone is "{settings.backbone}": torchvision has no image classification model "{name}". '
            "Name one of torchvision.models.list_models(module=torchvision.models)."
        )
    default = torchvision.models.get_model_weights(name).DEFAULT
    if settings.weights is None:
        path, shown = hub_file(default.url, settings.backbone), f'model.backbone is "{settings.backbone}"'
    else:
        path, shown = resolve(settings.weights, base), f'model.weights is "{settings.weights}"'
        if path.is_dir():
            raise ModelError(f"{shown}: torchvision's weights are one file, not a folder. Name the file in it.")
    check_pin(path, settings.sha256)
    state = read_state(path)
    model = build(name, state)
    removed = remove_classifier(model)
    if isinstance(model, DenseNet):
        state = renamed(state, DENSE)
    load_into(model, state, shown, removed=(f"{removed}.", *AUXILIARY))
    pipeline = default_pipeline(default.transforms()).override(settings.image)
    return as_network(model, f"torchvision:{name}", pipeline)


def default_pipeline(preset: Any) -> ImagePipeline:
    """The preprocessing that comes with a model's weights."""
    return ImagePipeline(
        resize=tuple(preset.resize_size),
        crop=(preset.crop_size[0], preset.crop_size[-1]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def as_network(model: nn.Module, name: str, pipeline: ImagePipeline) -> Network:
    """A model of torchvision without classifier, ready to be cut."""

    def cut(unfreeze: int) -> tuple[Frozen, Tail]:
        for family, chain in CHAINS.items():
            if isinstance(model, family):
                return cut_chain(chain(model), unfreeze)
        raise no_cut(name, unfreeze, CUTTABLE)

    return Network(kind="image", body=model, pipeline=pipeline, architecture=name, cut=cut)


def _resnet(model: Any) -> Chain:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    return Chain(stem, tuple(blocks), nn.Sequential(model.avgpool, nn.Flatten(1)))


def _vgg(model: Any) -> Chain:
    layers = [*model.features, model.avgpool, nn.Flatten(1), *model.classifier]
    blocks: list[list[nn.Module]] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            blocks.append([])
        blocks[-1].append(layer)
    return Chain(nn.Identity(), tuple(nn.Sequential(*block) for block in blocks), nn.Identity())


class _Patches(nn.Module):
    """Images (B, 3, S, S) -> class token and patches with their positions (B, T, H)."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.projection = model.conv_proj
        self.class_token = model.class_token
        self.positions = model.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.projection(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        values: Tensor = tokens + self.positions
        return values


class _ClassToken(nn.Module):
    """(B, T, H) -> (B, H)."""

    def forward(self, values: Tensor) -> Tensor:
        return values[:, 0]


def _vit(model: Any) -> Chain:
    # Norms work token by token, so the class token may be taken before or after; after keeps torchvision's bits.
    return Chain(
        _Patches(model), tuple(model.encoder.layers), nn.Sequential(model.encoder.ln, _ClassToken(), model.heads)
    )


CHAINS: dict[type[nn.Module], Callable[[Any], Chain]] = {ResNet: _resnet, VGG: _vgg, VisionTransformer: _vit}
