"""All that is trained, as one module: the part of the backbone behind the cut, the normalisation, the head.

Shapes: B records, D features, K outputs, values (B, *shape) at the cut.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedhead.common.errors import ModelError

SUPPORTED = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.GroupNorm)
"""Leaves whose gradient of one record Opacus knows in closed form. Types are compared exactly, as Opacus does."""


def unsupported_leaves(module: nn.Module) -> list[str]:
    """Names of the leaves whose trainable parameters Opacus has no per-record gradient for.

    Returns
    -------
    names : list of str
        ``"name (Type)"``, in the module's order; empty when all of them are supported.
    """
    return [
        f"{name or 'the head'} ({type(leaf).__name__})"
        for name, leaf in module.named_modules()
        if _owns_trainable(leaf) and type(leaf) not in SUPPORTED
    ]


def check_supported(module: nn.Module) -> None:
    """Refuse a module that can't be trained privately.

    Raises
    ------
    ModelError
        One line that names the first unsupported leaves.
    """
    names = unsupported_leaves(module)
    if names:
        known = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise ModelError(
            f"model.head or model.unfreeze trains {', '.join(names[:3])}: private training takes {known}. "
            "Use those layers, or unfreeze fewer blocks."
        )


def _owns_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Opacus 1.6 unfolds a convolution's input by strides that hold for the contiguous layout only: on a channels-last
    input, which an image turned from (H, W, 3) easily is, its per-record gradients and norms are silently wrong."""
    return tuple(value.contiguous() for value in inputs)


class Trainable(nn.Module):
    """Tail, normalisation and head.

    Parameters
    ----------
    tail : nn.Module or None
        What lies behind the cut, (values, lengths) -> (B, D); None when the features themselves are cached.
    normalize : bool
        Scale each feature vector to L2 norm 1, record by record.
    head : nn.Module
        (B, D) -> (B, K), or (B, T, D) -> (B, T, K).

    Notes
    -----
    Guarantee: in train mode only the leaves that own trainable parameters and the head's dropout are in train mode.
    Everything else stays in eval, BatchNorm's running statistics above all: no record's output depends on another.
    """

    def __init__(self, tail: nn.Module | None, normalize: bool, head: nn.Module) -> None:
        super().__init__()
        self.tail = tail
        self.normalize = normalize
        self.head = head
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_contiguous)
        self.train()

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Outputs of B records: values (B, *shape) and, for texts at a cut, lengths (B,) -> (B, K)."""
        features = values if self.tail is None else self.tail(values, lengths)
        if self.normalize:
            features = F.normalize(features, dim=-1)
        outputs: Tensor = self.head(features)
        return outputs

    def train(self, mode: bool = True) -> Trainable:
        """Switch the trained leaves and the head's dropout; the rest stays in eval."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if (
                module is not self
                and _owns_trainable(module)
                and not isinstance(module, nn.modules.batchnorm._BatchNorm)
            ):
                module.training = mode
        for module in self.head.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = mode
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """What travels: name -> parameter, in the module's order, only what is trained."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
