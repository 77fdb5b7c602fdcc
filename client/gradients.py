"""Gradient paths: three ways to the same clipped sum of per-record gradients.

    closed-form   a linear head with cross-entropy: no gradient a record, about the cost of plain training
    ghost         any head: norms from Opacus's hooks, then a second backward pass with weighted losses
    hooks         Opacus's per-record gradients, held in memory; slow and simple, to compare with

Each adds to ``p.summed_grad`` of the trained parameters. Shapes: B records, D features, K outputs.
"""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from typing import Any, Final, Literal, Protocol

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from fedhead.common.errors import InputError, ModelError
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import (
    clip_factors,
    feature_reach,
    finite_records,
    linear_softmax_clipped_sum,
)
from fedhead.common.tasks import Task

PathName = Literal["closed-form", "ghost", "hooks"]
Index = Tensor | slice

_ELEMENTS: Final = 2**26  # most numbers that values or per-record gradients of one chunk may have: 256 MB in float32
_NORM_ELEMENTS: Final = 2**22  # the same, inside one layer's norm


class Features(Protocol):
    """What a path needs of a holder's features; `fedhead.common.features.FeatureSet` is one."""

    def __len__(self) -> int:
        """N, the holder's true count."""

    def batch(self, index: Index) -> tuple[Tensor, Tensor | None]:
        """Values (B, *shape) and lengths (B,) or None."""


def _take(values: Tensor, index: Index) -> Tensor:
    # twice as fast as indexing with a tensor
    return values[index] if isinstance(index, slice) else values.index_select(0, index)


class GradientPath(ABC):
    """Adds clipped gradients of records to ``p.summed_grad``.

    Parameters
    ----------
    trainable : Trainable
    task : Task

    Notes
    -----
    Guarantee: one record moves the sum by at most the clipping norm (L2, over all trained parameters together), a
    record with inf or NaN in it, in its loss or in its gradient by nothing; rounding of the sum comes on top.
    """

    def __init__(self, trainable: Trainable, task: Task) -> None:
        self.trainable = trainable
        self.task = task
        self.parameters: list[Any] = list(trainable.trained().values())
        for p in self.parameters:
            p.summed_grad = None

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round on a holder's features (N records) and targets (N,)."""
        self.features, self.targets, self.clipping_norm = features, targets, clipping_norm

    def end(self) -> None:
        """End the round: let go of the holder's data."""
        del self.features, self.targets

    def records_at_once(self, chunk: int) -> int:
        """How many of `chunk` records fit in memory; depends on shapes only, never on the data."""
        return chunk

    def add_rows(self, index: Index) -> None:
        """Add the records at `index` of the round's features."""
        first = self.parameters[0]
        values, lengths = self.features.batch(index)
        if lengths is not None:
            lengths = lengths.to(first.device)
        self.add(values.to(first.device, first.dtype), lengths, self.targets[index].to(first.device))

    @abstractmethod
    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records: values (B, *shape), lengths (B,) or None, targets (B,)."""

    def _accumulate(self, sums: list[Tensor]) -> None:
        for p, total in zip(self.parameters, sums, strict=True):
            p.summed_grad = total if p.summed_grad is None else p.summed_grad.add_(total)

    def _losses(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """The loss of each record, (B,). Any other shape would clip something else than records, without a sign."""
        losses = self.task.losses(self.trainable(values, lengths), targets)
        if losses.shape != (len(targets),):
            raise InputError(
                f"task.losses is of shape {tuple(losses.shape)}: it must be ({len(targets)},), one loss a record. Sum "
                "or average over what belongs to a record, and nothing else."
            )
        return losses


class ClosedForm(GradientPath):
    """A linear head on one feature vector a record, with cross-entropy."""

    def __init__(self, trainable: Trainable, task: Task) -> None:
        super().__init__(trainable, task)
        self.head: Any = trainable.head
        # norms of features never change: kept for as long as the features live, one pair of numbers a record
        self._known: dict[int, tuple[weakref.ref[Any], tuple[Tensor, Tensor | None, Tensor | None]]] = {}

    @staticmethod
    def fits(trainable: Trainable, task: Task) -> bool:
        """Whether the closed form is the gradient of this head and task."""
        head = trainable.head
        trained = trainable.trained().values()
        return (
            task.closed_form == "cross-entropy"
            and trainable.tail is None
            and type(head) is nn.Linear
            and len(trained) == len(list(head.parameters()))
        )

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round; norms of features that were seen before are not computed again."""
        super().begin(features, targets, clipping_norm)
        known = self._known.get(id(features))
        if known is None or known[0]() is not features:
            key = id(features)
            known = weakref.ref(features, lambda _: self._known.pop(key, None)), self._measure(features)
            self._known[key] = known
        self._reach, self._scale, self._broken = known[1]

    @torch.no_grad()
    def _measure(self, features: Features) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = self.head.weight, self.head.bias is not None
        at_once = max(1, _NORM_ELEMENTS // weight.shape[1])
        parts = []
        for start in range(0, len(features), at_once):
            values, _ = features.batch(slice(start, min(start + at_once, len(features))))
            values = values.to(weight.device, weight.dtype)
            parts.append(feature_reach(values, bias=bias, normalize=self.trainable.normalize))
        reach = torch.cat([part[0] for part in parts]) if parts else weight.new_zeros(0)
        scale = torch.cat([s for _, s in parts if s is not None]) if parts and self.trainable.normalize else None
        broken = ~reach.isfinite()
        return reach, scale, broken if bool(broken.any()) else None

    @torch.no_grad()
    def add_rows(self, index: Index) -> None:
        """Add the records at `index`, with the norms known from before."""
        weight = self.head.weight
        x, _ = self.features.batch(index)
        x = x.to(weight.device, weight.dtype)
        if self._broken is not None:
            x = x.masked_fill(_take(self._broken, index)[:, None], 0.0)
        scale = None if self._scale is None else _take(self._scale, index)
        self._add(x, _take(self.targets, index).to(weight.device), _take(self._reach, index), scale)

    @torch.no_grad()
    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records: values (B, D), targets (B,)."""
        reach, scale = feature_reach(values, bias=self.head.bias is not None, normalize=self.trainable.normalize)
        self._add(values.masked_fill(~reach.isfinite()[:, None], 0.0), targets, reach, scale)

    def _add(self, x: Tensor, y: Tensor, reach: Tensor, scale: Tensor | None) -> None:
        weight, bias = linear_softmax_clipped_sum(
            x, y, self.head.weight, self.head.bias, self.clipping_norm, reach=reach, scale=scale
        )
        self._accumulate([weight] if bias is None else [weight, bias])


def linear_norms(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Norm of each record's gradient of a linear layer, the cheaper way for its shape.

    Parameters
    ----------
    layer : nn.Linear, D to K
    activations : list of one Tensor, shape (B, ..., D)
    backprops : Tensor, shape (B, ..., K)
        Gradient of the record's loss with respect to the layer's output.

    Returns
    -------
    norms : parameter -> Tensor, shape (B,)

    Notes
    -----
    One position a record: the norm of an outer product. A sequence of T: the T x T Gram matrices of activations and
    backprops where T^2 <= D K, else the (K, D) gradient of one record after the other. The Gram sum cancels, so it is
    taken in double: in float32 a norm could come out too small, and the clip would not hold.
    Reference: Li et al. (2022), arXiv:2110.05679, for the Gram form.
    """
    a, g = activations[0].to(backprops.dtype), backprops
    norms: dict[Tensor, Tensor] = {}
    if g.dim() == 2:
        length = torch.linalg.vector_norm(g, dim=1)
        if layer.weight.requires_grad:
            norms[layer.weight] = length * torch.linalg.vector_norm(a, dim=1)
        if layer.bias is not None and layer.bias.requires_grad:
            norms[layer.bias] = length
        return norms
    a, g = a.flatten(1, -2), g.flatten(1, -2)  # (B, T, D), (B, T, K)
    if layer.weight.requires_grad:
        t, gram = a.shape[1], a.shape[1] ** 2 <= a.shape[2] * g.shape[2]
        at_once = max(1, _NORM_ELEMENTS // (t * t if gram else a.shape[2] * g.shape[2]))
        pieces = [
            _gram_norms(a_part, g_part) if gram else torch.linalg.vector_norm(g_part.mT.bmm(a_part), dim=(1, 2))
            for a_part, g_part in zip(torch.split(a, at_once), torch.split(g, at_once), strict=True)
        ]
        norms[layer.weight] = torch.cat(pieces)
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = torch.linalg.vector_norm(g.sum(1), dim=1)
    return norms


def _gram_norms(a: Tensor, g: Tensor) -> Tensor:
    a64, g64 = a.double(), g.double()
    squares = a64.bmm(a64.mT).mul_(g64.bmm(g64.mT)).sum((1, 2))
    # NaN must stay NaN: it is what marks a broken record
    return squares.clamp(min=0).sqrt_().to(g.dtype)


class _GhostHooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus's norm hooks with `linear_norms` in place of its Gram matrices."""

    NORM_SAMPLERS = {**GradSampleHooksFastGradientClipping.NORM_SAMPLERS, nn.Linear: linear_norms}  # noqa: RUF012


class _Hooked(GradientPath):
    """A path that hangs Opacus's hooks on the module for the time of a round."""

    hooks: Any = None

    @abstractmethod
    def _hang(self) -> Any:
        """Hang the hooks and return them."""

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round: hang the hooks."""
        super().begin(features, targets, clipping_norm)
        self._values: int | None = None
        self.hooks = self._hang()

    def end(self) -> None:
        """End the round: take the hooks and all they left on the parameters away."""
        super().end()
        self.hooks.cleanup()
        self.hooks = None

    def records_at_once(self, chunk: int) -> int:
        """How many of `chunk` records fit in memory."""
        size = self._held_a_record()
        if len(self.features):
            size = max(size, self.features.batch(slice(0, 1))[0].numel())
        return max(1, min(chunk, _ELEMENTS // max(1, size)))

    @abstractmethod
    def _held_a_record(self) -> int:
        """Numbers held for each record in the worst layer."""

    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records, without those that aren't finite: they never enter the forward pass."""
        self._add_kept(values, lengths, targets, finite_records(values, lengths))

    def _add_kept(self, values: Tensor, lengths: Tensor | None, targets: Tensor, keep: Tensor) -> None:
        if not bool(keep.all()):
            values, targets = values[keep], targets[keep]
            lengths = None if lengths is None else lengths[keep]
        if len(targets):
            with warnings.catch_warnings():
                # features ask for no gradient, and torch says so for every first layer
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                self._add_finite(values, lengths, targets)

    @abstractmethod
    def _add_finite(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add one or more records with finite values."""

    def _missing(self, attribute: str) -> None:
        for name, p in self.trainable.trained().items():
            if getattr(p, attribute, None) is None:
                raise ModelError(
                    f"model.head or model.unfreeze trains {name}: no gradient of one record reaches it. Use every "
                    "trained layer in the forward pass, in train mode, and share none."
                )


class Ghost(_Hooked):
    """Norms first, then the gradient of the weighted losses: never a gradient a record for linear layers."""

    def _hang(self) -> Any:
        return _GhostHooks(self.trainable, loss_reduction="sum", max_grad_norm=self.clipping_norm)

    def _held_a_record(self) -> int:
        return max(
            (
                sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad)
                for layer in self.trainable.modules()
                if type(layer) is not nn.Linear
            ),
            default=1,
        )

    def _add_finite(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        for p in self.parameters:
            p._norm_sample = None
        self.hooks.enable_hooks()
        losses = self._losses(values, lengths, targets)
        torch.autograd.grad(losses.sum(), self.parameters, retain_graph=True, allow_unused=True)
        self.hooks.disable_hooks()
        self._missing("_norm_sample")
        norms = torch.stack([p._norm_sample for p in self.parameters])  # (P, B)
        norms = torch.linalg.vector_norm(norms, dim=0)
        good = norms.isfinite() & losses.detach().isfinite()
        if not bool(good.all()):
            # a factor of 0 would not do: their rows hold inf or NaN, and 0 times those is NaN. Once more without them,
            # norms included, because dropout draws anew.
            del losses
            self._add_kept(values, lengths, targets, good)
            return
        weighted = losses @ clip_factors(norms, self.clipping_norm)
        self._accumulate(list(torch.autograd.grad(weighted, self.parameters)))


class Hooks(_Hooked):
    """Per-record gradients of all layers in memory, from Opacus's hooks."""

    def _hang(self) -> Any:
        return GradSampleHooks(self.trainable, loss_reduction="sum")

    def _held_a_record(self) -> int:
        return int(sum(p.numel() for p in self.parameters))

    def _add_finite(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        for p in self.parameters:
            p.grad_sample = None
        losses = self._losses(values, lengths, targets)
        torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
        self._missing("grad_sample")
        gradients = [p.grad_sample.flatten(1) for p in self.parameters]  # (B, size of p)
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients]).norm(dim=0)
        factors = clip_factors(norms, self.clipping_norm)
        factors = factors.masked_fill(~losses.detach().isfinite(), 0.0)
        left_out = (factors == 0)[:, None]
        self._accumulate(
            [
                (factors @ g.masked_fill(left_out, 0.0)).view_as(p)
                for g, p in zip(gradients, self.parameters, strict=True)
            ]
        )
        for p in self.parameters:
            p.grad_sample = None


PATHS: Final[dict[PathName, type[GradientPath]]] = {"closed-form": ClosedForm, "ghost": Ghost, "hooks": Hooks}


def make_path(trainable: Trainable, task: Task, name: str | None = None) -> GradientPath:
    """The gradient path of a head and task.

    Parameters
    ----------
    trainable : Trainable
    task : Task
    name : "closed-form", "ghost", "hooks" or None
        None: closed form where it is the gradient, else ghost.

    Raises
    ------
    InputError
        An unknown name, or the closed form for a head or loss it is not made for.
    """
    fits = ClosedForm.fits(trainable, task)
    if name is None:
        name = "closed-form" if fits else "ghost"
    if name not in PATHS:
        raise InputError(f"path is {name!r}: it must be one of {', '.join(PATHS)}. Leave it out for the quickest.")
    if name == "closed-form" and not fits:
        raise InputError(
            "path is 'closed-form': it needs a linear head with nothing else trained and a cross-entropy task. Use "
            "'ghost'."
        )
    return PATHS[name](trainable, task)
