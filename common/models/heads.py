"""The heads: what is trained on the features.

A head maps features to outputs over the last dimension, (B, D) -> (B, K) or (B, T, D) -> (B, T, K), and starts with
outputs at or near zero: at the start no label is favoured, and the loss of a record doesn't depend on the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedhead.common.config.schema import Head, LinearHead, MLPHead, ModuleHead
from fedhead.common.errors import ModelError
from fedhead.common.loading import load_reference

NEAR_ZERO = (
    0.01  # share of the usual scale of an mlp's last layer: small outputs, yet gradients reach the hidden layers
)


def _linear(settings: LinearHead, features: int, outputs: int) -> nn.Module:
    # Made without values: zeros are written anyway, and a linear head then takes nothing from the random stream.
    layer = nn.Linear(features, outputs, bias=settings.bias, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def _mlp(settings: MLPHead, features: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    width = features
    for hidden in settings.hidden:
        layers += [nn.Linear(width, hidden), ACTIVATIONS[settings.activation]()]
        if settings.dropout > 0:
            layers.append(nn.Dropout(settings.dropout))
        width = hidden
    last = nn.Linear(width, outputs)
    with torch.no_grad():
        last.weight.mul_(NEAR_ZERO)
        last.bias.zero_()
    return nn.Sequential(*layers, last)


@dataclass(frozen=True)
class HeadKind:
    """A row of the heads table: `make(settings, features, outputs)` gives the module."""

    summary: str
    make: Callable[[Any, int, int], nn.Module]


HEADS: Mapping[str, HeadKind] = {
    "linear": HeadKind("one linear layer, initialised to zero", _linear),
    "mlp": HeadKind("a multi-layer perceptron", _mlp),
}


def make_head(settings: Head, features: int, outputs: int) -> nn.Module:
    """A new head.

    Parameters
    ----------
    settings : Head
        ``model.head`` of the recipe.
    features : int
        D, length of a feature vector.
    outputs : int
        K, what the task asks for.

    Returns
    -------
    head : nn.Module
        (..., D) -> (..., K). Hidden layers are drawn from torch's global generator: the same seed, the same head.

    Raises
    ------
    ModelError
        When a ``module:`` head can't be made, or does not give K outputs.
    """
    if not isinstance(settings, ModuleHead):
        return HEADS[settings.kind].make(settings, features, outputs)
    factory = load_reference(settings.kind, "model.head.kind")
    shown = f'model.head.kind is "{settings.kind}"'
    try:
        head = factory(features, outputs, **settings.options)
    except TypeError as error:
        raise ModelError(
            f"{shown}: it must take (features, outputs) and model.head.options. Change its arguments or the options."
        ) from error
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{shown}: it must return a torch.nn.Module, not {type(head).__name__}. Change what it returns."
        )
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise ModelError(f"{shown}: it has nothing to train. Give it parameters that require gradients.")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in head.modules()):
        raise ModelError(
            f"{shown}: it has a BatchNorm, which mixes records, so no record's gradient is its own. Use LayerNorm."
        )
    mode = head.training
    head.eval()
    try:
        with torch.no_grad():
            shape = tuple(head(torch.zeros(2, features)).shape)
    except RuntimeError as error:
        raise ModelError(f"{shown}: it must take features of shape (B, {features}). Change the head.") from error
    head.train(mode)
    if shape != (2, outputs):
        raise ModelError(f"{shown}: it must map (B, {features}) to (B, {outputs}). Change its last layer.")
    return head
