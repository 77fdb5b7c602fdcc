"""Backbones: a pre-trained network, frozen up to the cut, named by the digest of its weights.

Shapes: B records, D features, T tokens, H width of a token vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedhead.common.config.schema import ModelSettings
from fedhead.common.errors import ModelError
from fedhead.common.models.cut import Frozen
from fedhead.common.models.network import Network, Pipeline
from fedhead.common.models.trainable import check_supported
from fedhead.common.models.weights import state_digest

Loader = Callable[[ModelSettings, Path, int | None], Network]


@dataclass(frozen=True)
class Backbone:
    """A network cut in two.

    Attributes
    ----------
    name : str
        As in the recipe.
    kind : str
        What goes in.
    frozen : nn.Module
        Everything before the cut; in eval mode whatever it is told, and without gradients.
    tail : nn.Module or None
        What lies behind the cut: (values, lengths) -> (B, D). None when nothing is unfrozen.
    dim : int
        D.
    digest : str
        sha256 over architecture and weights; doesn't depend on the cut or on where the weights came from.
    preprocessing : str
        Canonical JSON of all that turns a raw input into cached values besides the weights, the cut included.
    """

    name: str
    kind: Literal["text", "image", "vector"]
    frozen: nn.Module
    tail: nn.Module | None
    dim: int
    digest: str
    preprocessing: str
    pipeline: Pipeline = field(repr=False)

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """B raw inputs -> a batch for `forward`."""
        return self.pipeline.collate(inputs)

    def cost(self, inputs: list[Any]) -> list[int] | None:
        """A cheap proxy of each input's length, for sorting texts into even batches; None when all cost the same."""
        return self.pipeline.cost(inputs)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Run the frozen part under inference mode.

        Returns
        -------
        values : Tensor
            (B, D) when nothing is unfrozen; (B, *shape) at a cut, for texts (B, T, H), of which only the first
            `lengths` token vectors of a record mean anything. An ordinary tensor: autograd may use it.
        lengths : Tensor or None
            int64 (B,), tokens of each text at a cut; otherwise None.
        """
        with torch.inference_mode():
            values, lengths = self.frozen(batch)
        return values.clone(memory_format=torch.contiguous_format), None if lengths is None else lengths.clone()


@dataclass(frozen=True)
class BackboneKind:
    """A row of the backbones table; `load` imports what it needs only when it is used."""

    summary: str
    load: Callable[[], Loader]


def _torchvision() -> Loader:
    from fedhead.common.models.vision import load_torchvision

    return load_torchvision


def _transformers() -> Loader:
    from fedhead.common.models.encoders import load_transformers

    return load_transformers


def _module() -> Loader:
    from fedhead.common.models.modules import load_module

    return load_module


BACKBONES: Mapping[str, BackboneKind] = {
    "torchvision": BackboneKind("an image classification model of torchvision, by name", _torchvision),
    "transformers": BackboneKind("a text or image encoder of transformers, by hub id or folder", _transformers),
    "module": BackboneKind("any nn.Module, by a factory without arguments", _module),
}


def load_backbone(settings: ModelSettings, base: Path, *, vector_size: int | None = None) -> Backbone:
    """Load, pin, freeze and cut a backbone.

    Parameters
    ----------
    settings : ModelSettings
        ``[model]`` of the recipe.
    base : Path
        The recipe's folder.
    vector_size : int, optional
        Length of the records' vectors, for ``module:`` backbones on vectors that can't tell it.

    Raises
    ------
    ModelError
        In one line: an unknown backbone, weights that are missing, don't fit or aren't the pinned ones, a cut that
        can't be made, or an image size that the network can't take.

    Notes
    -----
    Guarantee: `frozen` stays in eval mode and takes no gradient; no code from a weights file runs; the pin is checked
    before a tensor is read. Torch's global random stream is left as it was.
    """
    kind = settings.backbone.partition(":")[0]
    if kind not in BACKBONES or not settings.backbone.partition(":")[2]:
        known = ", ".join(f"{name}:..." for name in BACKBONES)
        raise ModelError(f'model.backbone is "{settings.backbone}": it must be one of {known}. Name one of those.')
    with torch.random.fork_rng(devices=[]):
        network = BACKBONES[kind].load()(settings, base, vector_size)
    return assemble(network, settings)


def assemble(network: Network, settings: ModelSettings) -> Backbone:
    """Freeze and cut an uncut network; see `load_backbone`."""
    network.body.eval()
    digest = state_digest(network.architecture, network.body)
    tail = None
    if settings.unfreeze == 0:
        frozen = Frozen(network.body)
    else:
        frozen, tail = network.cut(settings.unfreeze)
        check_supported(tail)
    preprocessing = {
        "cut": settings.unfreeze,
        "input": network.pipeline.describe(),
        "kind": network.kind,
        **network.features,
    }
    backbone = Backbone(
        name=settings.backbone,
        kind=network.kind,
        frozen=frozen,
        tail=tail,
        dim=0,
        digest=digest,
        preprocessing=json.dumps(preprocessing, sort_keys=True, separators=(",", ":")),
        pipeline=network.pipeline,
    )
    return _with_dim(backbone)


def _with_dim(backbone: Backbone) -> Backbone:
    """Try the network on one made-up input: its features must be one vector, whose length is D."""
    try:
        values, lengths = backbone.forward(backbone.pipeline.probe())
        with torch.no_grad():
            features = values if backbone.tail is None else backbone.tail(values, lengths)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        what = f"model.image and the records must suit it ({type(error).__name__} on a made-up {backbone.kind})"
        remedy = "Set model.image.size to one that it takes" if backbone.kind == "image" else "Check what it takes"
        raise ModelError(f'model.backbone is "{backbone.name}": {what}. {remedy}.') from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(
            f'model.backbone is "{backbone.name}": it must give one feature vector a record, (B, D), not {shape}. '
            "Pool what it gives."
        )
    return Backbone(**{**backbone.__dict__, "dim": features.shape[1]})
