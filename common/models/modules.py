"""Backbones of the user's own: ``module:package.module:factory``, any nn.Module from a factory without arguments.

The module maps a batch to features (B, D). What it may say about itself, as attributes:

================  ==================================================================================================
input_kind        "text", "image" or "vector". Default: "image" if ``[model.image]`` is given or a layer has
                  convolution weights (4-d), else "vector".
image_size        Side in pixels: images are resized so that the shorter side has it, then cropped. Default 224.
mean, std         Red, green, blue, on the scale [0, 1]. Default: ImageNet's.
feature_dim       Length of the vectors that go in, when neither the records nor a linear layer tell it.
collate           Texts only, and needed there: a list of B texts -> tensors by name, handed to forward as keywords.
classifier_keys   Prefixes of keys in the weights file that belong to a classifier that the module has dropped.
blocks            Modules for the cut, in order, each mapping one tensor to one tensor; the last k train with
                  ``unfreeze = k``. A plain nn.Sequential needs none: its members are its blocks.
stem, top         What comes before and after the blocks. Default: nothing.
================  ==================================================================================================
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fedhead.common.config.schema import ModelSettings
from fedhead.common.errors import ModelError
from fedhead.common.loading import load_reference
from fedhead.common.models.cut import VALUES, Chain, Frozen, Tail, cut_chain, no_cut
from fedhead.common.models.images import IMAGENET_MEAN, IMAGENET_STD, ImagePipeline, VectorPipeline
from fedhead.common.models.network import Kind, Network, Pipeline
from fedhead.common.models.weights import check_pin, load_into, read_state, resolve, weights_file

TOLERANCE = 1e-4  # between the module's own features and those of stem, blocks and top


def load_module(settings: ModelSettings, base: Path, vector_size: int | None) -> Network:
    """The network behind ``module:package.module:factory``; see `load_backbone`."""
    shown = f'model.backbone is "{settings.backbone}"'
    try:
        module = load_reference(settings.backbone, "model.backbone")()
    except TypeError as error:
        raise ModelError(f"{shown}: it must be callable without arguments. Name a factory that is.") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{shown}: it must give a torch.nn.Module, not {type(module).__name__}. Change the factory.")
    if settings.weights is not None:
        path = weights_file(resolve(settings.weights, base))
        check_pin(path, settings.sha256)
        removed = tuple(getattr(module, "classifier_keys", ()))
        load_into(module, read_state(path), f'model.weights is "{settings.weights}"', removed=removed)
    elif settings.sha256 is not None:
        raise ModelError(
            f'model.sha256 is "{settings.sha256}": there are no weights to check. Set model.weights, or drop the pin.'
        )
    module.eval()
    kind = _kind(module, settings, shown)
    pipeline = _pipeline(module, kind, settings, vector_size, shown)
    _check_apart(module, pipeline, shown)
    return as_network(module, settings.backbone, kind, pipeline)


def _check_apart(module: nn.Module, pipeline: Pipeline, shown: str) -> None:
    """Refuse a module that gives a record other features alone than in a batch: clipping would bound nothing then.

    Raises
    ------
    ModelError
    """
    try:
        both = _pair(pipeline)
        with torch.inference_mode():
            together, alone = _run(module, both), _run(module, {name: value[:1] for name, value in both.items()})
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError, IndexError):
        return  # what can't be run at all is told by `assemble`, with what to do
    if len(together) == 2 and not torch.allclose(together[:1], alone, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True):
        raise ModelError(
            f"{shown}: a record's features must be the same alone and in a batch. Take out what mixes records, such as "
            "a BatchNorm without running statistics or a mean over the batch."
        )


def _pair(pipeline: Pipeline) -> dict[str, Tensor]:
    """A batch of two made-up inputs that differ."""
    probe = pipeline.probe()
    if probe.keys() != {VALUES}:
        return pipeline.collate(["a", "b c d"])
    values = probe[VALUES]
    return {VALUES: torch.cat([values, values + torch.randn(values.shape, generator=torch.Generator().manual_seed(0))])}


def _run(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    features: Tensor = module(batch[VALUES]) if batch.keys() == {VALUES} else module(**batch)
    return features


def _source(module: nn.Module, reference: str) -> str:
    """Digest of the files that the module's classes stand in: another code may give other features from equal weights.

    Left out: PyTorch and its models, and fedhead itself, whose features have a version of their own.
    """
    names = {reference.split(":")[1], *(type(part).__module__ for part in module.modules())}
    digest = hashlib.sha256()
    for name in sorted(names):
        if name.partition(".")[0] in ("torch", "torchvision", "transformers", "fedhead"):
            continue
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None and Path(path).is_file():  # none in a notebook: there only the name and the weights count
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def as_network(module: nn.Module, name: str, kind: Kind, pipeline: Pipeline) -> Network:
    """A module of the user's own, ready to be cut."""

    def cut(unfreeze: int) -> tuple[Frozen, Tail]:
        chain = _chain(module)
        if chain is None:
            raise no_cut(name, unfreeze, "an nn.Sequential, or a module with the attribute `blocks`")
        values = pipeline.probe().get(VALUES)
        if values is None:
            raise no_cut(name, unfreeze, "modules on images and vectors")
        with torch.inference_mode():
            whole = module(values)
            parts = chain.top(nn.Sequential(*chain.blocks)(chain.stem(values)))
        if whole.shape != parts.shape or not torch.allclose(whole, parts, atol=TOLERANCE, rtol=TOLERANCE):
            raise ModelError(
                f'model.backbone is "{name}": stem, blocks and top must give what its forward gives. Change them, '
                "or set model.unfreeze = 0."
            )
        return cut_chain(chain, unfreeze)

    architecture = f"{name} {_source(module, name)}"
    return Network(kind=kind, body=module, pipeline=pipeline, architecture=architecture, cut=cut)


def _chain(module: nn.Module) -> Chain | None:
    if type(module) is nn.Sequential:
        return Chain(nn.Identity(), tuple(module), nn.Identity())
    blocks = getattr(module, "blocks", None)
    if blocks is None:
        return None
    return Chain(getattr(module, "stem", nn.Identity()), tuple(blocks), getattr(module, "top", nn.Identity()))


def _kind(module: nn.Module, settings: ModelSettings, shown: str) -> Kind:
    kind: Kind | None = getattr(module, "input_kind", None)
    if kind is None:
        described = any(value is not None for value in settings.image.model_dump().values())
        convolves = any(parameter.ndim == 4 for parameter in module.parameters())
        return "image" if described or convolves else "vector"
    if kind not in get_args(Kind):
        raise ModelError(f'{shown}: its input_kind is "{kind}", not text, image or vector. Change the attribute.')
    return kind


def _pipeline(module: nn.Module, kind: Kind, settings: ModelSettings, vector_size: int | None, shown: str) -> Pipeline:
    if kind == "image":
        size = int(getattr(module, "image_size", 224))
        mean, std = tuple(getattr(module, "mean", IMAGENET_MEAN)), tuple(getattr(module, "std", IMAGENET_STD))
        return ImagePipeline((size,), (size, size), mean, std).override(settings.image)
    if kind == "text":
        collate = getattr(module, "collate", None)
        if collate is None:
            raise ModelError(f"{shown}: a module on texts must have a method `collate`. Add it, see docs/models.md.")
        return _OwnTexts(collate)
    linear = next((layer.in_features for layer in module.modules() if isinstance(layer, nn.Linear)), None)
    size_or_none = vector_size or linear or getattr(module, "feature_dim", None)
    if size_or_none is None:
        raise ModelError(
            f"{shown}: the length of its vectors is not known. Give the module an attribute `feature_dim`."
        )
    return VectorPipeline(int(size_or_none))


@dataclass(frozen=True)
class _OwnTexts:
    """Texts through the module's own `collate`."""

    own: Callable[[list[str]], dict[str, Tensor]]

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        return dict(self.own([str(text) for text in inputs]))

    def cost(self, inputs: list[Any]) -> list[int] | None:
        return [len(text) for text in inputs]

    def describe(self) -> dict[str, Any]:
        return {"collate": f"{self.own.__module__}.{self.own.__qualname__}"}

    def probe(self) -> dict[str, Tensor]:
        return self.collate(["a"])
