"""Gradient paths for any head, on Opacus's hooks: ghost clipping, and per-record gradients to compare with.

Shapes: B records, T positions of a sequence, D features, K outputs. A person's records are such a sequence.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Container
from typing import Any, Final

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedhead.client.gradients import Features, GradientPath, of_persons, without_unusable
from fedhead.client.probing import check_own_gradients, has_own_code
from fedhead.common.errors import ModelError
from fedhead.common.models.memory import at_once, held_a_record
from fedhead.common.privacy.clipping import LARGEST, clip_factors, finite_records
from fedhead.common.privacy.summing import CANCEL

_NORM_ELEMENTS: Final = 2**22  # most numbers inside one layer's norm
_FIRING: Final = "Full backward hook is firing"  # features ask for no gradient, and torch says so for every first layer


def row_norms(x: Tensor) -> Tensor:
    """L2 norms over the last dimension, in double: in float32 they lose up to 1e-4, and tiny squares are nothing.

    Parameters
    ----------
    x : Tensor, shape (..., D)

    Returns
    -------
    norms : Tensor, float64, shape (...)
    """
    rows = x.flatten(0, -2)
    parts = torch.split(rows, max(1, _NORM_ELEMENTS // max(1, rows.shape[1])))
    found = [torch.linalg.vector_norm(part.double(), dim=1) for part in parts]
    return torch.cat(found).view(x.shape[:-1])


def linear_norms(layer: nn.Linear, activations: Tensor, backprops: Tensor) -> dict[Tensor, Tensor]:
    """Norm of each record's gradient of a linear layer, the cheaper way for its shape.

    Parameters
    ----------
    layer : nn.Linear, D to K
    activations : Tensor, shape (B, ..., D)
    backprops : Tensor, shape (B, ..., K)
        Gradient of the record's loss with respect to the layer's output.

    Returns
    -------
    norms : parameter -> Tensor, float64, shape (B,)
        Of the trained ones; inf or NaN where something isn't finite, or an activation is longer than `LARGEST`.

    Notes
    -----
    One position a record: the norm of an outer product. A sequence of T: the T x T Gram matrices of activations and
    backprops where T^2 <= D K, else the (K, D) gradient of one record after the other. The Gram sum cancels, so it is
    taken in double: in float32 a norm could come out too small, and the clip would not hold. Beyond that, a sequence's
    norm counts as at least `CANCEL` of the sum of its positions' norms: what rounds in the sum of the clipped gradients
    is as large as they are.
    Reference: Li et al. (2022), arXiv:2110.05679, for the Gram form.
    """
    a, g = activations, backprops
    norms: dict[Tensor, Tensor] = {}
    sizes = row_norms(g)
    if layer.weight.requires_grad:
        inputs = row_norms(a)
        # a shorter scaled backprop would lie where numbers have few digits
        norms[layer.weight] = sizes * inputs.masked_fill_(inputs > LARGEST, torch.inf)
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = sizes
    if g.dim() == 2:
        return norms
    floors = {p: CANCEL * found.flatten(1).sum(1) for p, found in norms.items()}
    a, g = a.flatten(1, -2), g.flatten(1, -2)  # (B, T, D), (B, T, K)
    if layer.weight in norms:
        norms[layer.weight] = _sequence_norms(a, g)
    if layer.bias in norms:
        norms[layer.bias] = torch.linalg.vector_norm(g.sum(1), dim=1, dtype=torch.float64)
    return {p: torch.maximum(found, floors[p]) for p, found in norms.items()}  # NaN stays NaN


def _sequence_norms(a: Tensor, g: Tensor) -> Tensor:
    """Norms (B,), float64, of the sums over T of the outer products of g (B, T, K) and a (B, T, D)."""
    t, numbers = a.shape[1], a.shape[2] * g.shape[2]
    gram = t * t <= numbers
    at_once = max(1, _NORM_ELEMENTS // (t * t if gram else numbers))
    pieces = [
        _gram_norms(a_part, g_part)
        if gram
        else torch.linalg.vector_norm(g_part.mT.bmm(a_part), dim=(1, 2), dtype=torch.float64)
        for a_part, g_part in zip(torch.split(a, at_once), torch.split(g, at_once), strict=True)
    ]
    return torch.cat(pieces)


def _gram_norms(a: Tensor, g: Tensor) -> Tensor:
    a64, g64 = a.double(), g.double()
    squares = a64.bmm(a64.mT).mul_(g64.bmm(g64.mT)).sum((1, 2))
    # NaN must stay NaN: it is what marks a broken record
    return squares.clamp(min=0).sqrt_()


class _GhostHooks(GradSampleHooks):  # type: ignore[misc]  # Opacus has no types
    """Opacus's hooks, but of linear layers what enters and the gradient of what leaves, not a gradient a record.

    Attributes
    ----------
    kept : list of (layer, activations (B, ..., D), backprops (B, ..., K))
        Of the linear layers, in the order of the backward pass. Of other layers, Opacus keeps ``p.grad_sample``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.kept: list[tuple[nn.Linear, Tensor, Tensor]] = []
        super().__init__(module, loss_reduction="sum")

    def capture_backprops_hook(
        self, module: nn.Module, given: Any, gradients: Any, loss_reduction: str, batch_first: bool
    ) -> None:
        if not self.hooks_enabled or type(module) is not nn.Linear:
            super().capture_backprops_hook(module, given, gradients, loss_reduction, batch_first)
            return
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=gradients[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        self.kept.append((module, activations[0].to(backprops.dtype), backprops))
        del module.max_batch_len


class _Hooked(GradientPath):
    """A path that hangs Opacus's hooks on the module for the time of a round."""

    hooks: Any = None
    _tried = False

    @abstractmethod
    def _hang(self) -> Any:
        """Hang the hooks and return them."""

    def begin(self, features: Features, targets: Tensor, clipping_norm: float) -> None:
        """Start a round: hang the hooks; before the first one, try code of a user's own on made-up records."""
        super().begin(features, targets, clipping_norm)
        self.hooks = self._hang()
        if not self._tried and len(features) and has_own_code(self.trainable, self.task):
            try:
                self._try(features)
            except BaseException:
                self.end()
                raise
            self._tried = True

    def _try(self, features: Features) -> None:
        def clipped_sum(values: Tensor, lengths: Tensor | None, targets: Tensor, norm: float) -> list[Tensor]:
            asked, self.clipping_norm = self.clipping_norm, norm
            self.hooks.enable_hooks()
            try:
                self.add(values, lengths, targets)
                return [p.summed_grad for p in self.parameters]
            finally:
                self.clipping_norm = asked
                for p in self.parameters:
                    p.summed_grad = None

        values, lengths = features.batch(slice(0, 1))
        self.hooks.disable_hooks()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_FIRING)
            check_own_gradients(
                self.trainable, self._losses, clipped_sum, values, lengths is not None, of_persons(self.targets)
            )
        self.hooks.enable_hooks()

    def end(self) -> None:
        """End the round: take the hooks and all they left on the parameters away."""
        super().end()
        self.hooks.cleanup()
        self.hooks = None

    def records_at_once(self, chunk: int) -> int:
        """How many of `chunk` records fit in memory, each as long as the longest; changes memory, not the result."""
        number, persons = int(self.parameters[0].element_size()), of_persons(self.targets)
        # `add_rows` cuts persons by their numbers of records
        return at_once(self.features, self._held_a_record, chunk, number, persons=persons)

    @abstractmethod
    def _held_a_record(self, positions: int) -> int:
        """Numbers held for each record of so many positions until its factor is known."""

    def add(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add records, without those that aren't finite: they never enter the forward pass."""
        if of_persons(targets):
            values, targets = without_unusable(values, targets)
            self._add_kept(values, lengths, targets, (targets >= 0).any(1))
        else:
            self._add_kept(values, lengths, targets, finite_records(values, lengths))

    def _add_kept(self, values: Tensor, lengths: Tensor | None, targets: Tensor, keep: Tensor) -> None:
        if not bool(keep.all()):
            values, targets = values[keep], targets[keep]
            lengths = None if lengths is None else lengths[keep]
        if len(targets):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=_FIRING)
                self._add_finite(values, lengths, targets)

    @abstractmethod
    def _add_finite(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        """Add one or more records with finite values."""

    def _missing(self, found: Container[int]) -> None:
        for name, p in self.trainable.trained().items():
            if id(p) not in found:
                raise ModelError(
                    f"model.head or model.unfreeze trains {name}: no gradient of one record reaches it. Use every "
                    "trained layer in the forward pass, in train mode, and share none."
                )


class Ghost(_Hooked):
    """One backward pass; of linear layers the norms, and then the weighted sum, from what it brought to them.

    Notes
    -----
    Norms and sum come of the same numbers. A second backward pass of weighted losses would round differently, and where
    a gradient cancels inside the network, that could be many clipping norms. However wrong what the pass brought, what
    is added of a record is at most the clipping norm. Rounding that remains: of norms, factors and products, which
    `SHRINK` covers; of the sum, whose terms are up to 1 / `CANCEL` clipping norms a record where it has positions; and
    of other records' gradients, whose last bits may differ with the batch: weights can be chosen to carry that up.

    Memory: beside the graph, a chunk's backprops of all linear layers and the per-record gradients of all others; the
    activations are those of the graph.
    """

    def _hang(self) -> Any:
        modules = list(self.trainable.modules())
        users = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
        for layer in modules:
            if type(layer) is nn.Linear and any(users[id(p)] > 1 for p in layer.parameters()):
                raise _measured_in_parts()
        # where the bias's is asked for, the pass reaches the layer without its weight's gradient, which takes long
        spared = {id(m.weight) for m in modules if type(m) is nn.Linear and m.bias is not None and m.bias.requires_grad}
        self._reached = [p for p in self.parameters if id(p) not in spared]
        return _GhostHooks(self.trainable)

    def _held_a_record(self, positions: int) -> int:
        return held_a_record(self.trainable, positions)

    def _add_finite(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        kept = self.hooks.kept
        kept.clear()
        for p in self.parameters:
            p.grad_sample = None
        losses = self._losses(values, lengths, targets)
        torch.autograd.grad(losses.sum(), self._reached, allow_unused=True)
        norms = self._norms()
        self._missing(norms)
        factors = clip_factors(torch.linalg.vector_norm(torch.stack(list(norms.values())), dim=0), self.clipping_norm)
        factors = factors.to(losses.dtype)
        # below, factors have few digits
        factors = factors.masked_fill(~losses.detach().isfinite() | (factors < torch.finfo(factors.dtype).tiny), 0.0)
        self._accumulate(self._weighted(factors))

    def _norms(self) -> dict[int, Tensor]:
        """Norms (B,), float64, of the records' gradients of each parameter, by its id."""
        norms = {id(p): row_norms(p.grad_sample.flatten(1)) for p in self.parameters if p.grad_sample is not None}
        for layer, activations, backprops in self.hooks.kept:
            for p, found in linear_norms(layer, activations, backprops).items():
                if id(p) in norms:
                    raise _measured_in_parts()
                norms[id(p)] = found
        return norms

    def _weighted(self, factors: Tensor) -> list[Tensor]:
        """Sums of the records' gradients times factors (B,), and lets go of what was kept."""
        # a factor of 0 would not do: rows may hold inf or NaN, and 0 times those is NaN
        left_out = factors == 0
        broken = left_out if bool(left_out.any()) else None
        sums: dict[int, Tensor] = {}
        while self.hooks.kept:
            layer, a, g = self.hooks.kept.pop()
            g = _without(g * factors.view(-1, *[1] * (g.dim() - 1)), broken).flatten(0, -2)
            if layer.weight.requires_grad:
                sums[id(layer.weight)] = g.t().mm(_without(a, broken).flatten(0, -2))
            if layer.bias is not None and layer.bias.requires_grad:
                sums[id(layer.bias)] = g.sum(0)
        for p in self.parameters:
            if id(p) not in sums:
                sums[id(p)] = (factors @ _without(p.grad_sample.flatten(1), broken)).view_as(p)
                p.grad_sample = None
        return [sums[id(p)] for p in self.parameters]


def _without(rows: Tensor, broken: Tensor | None) -> Tensor:
    """Rows (B, ...) with zeros in place of those that are broken (B,)."""
    return rows if broken is None else rows.masked_fill(broken.view(-1, *[1] * (rows.dim() - 1)), 0.0)


def _measured_in_parts() -> ModelError:
    return ModelError(
        "model.head or model.unfreeze uses a trained linear layer, or its weights, more than once: norms would be "
        "measured in parts. Use every trained layer once, and share none."
    )


class Hooks(_Hooked):
    """Per-record gradients of all layers in memory, from Opacus's hooks."""

    def _hang(self) -> Any:
        return GradSampleHooks(self.trainable, loss_reduction="sum")

    def _held_a_record(self, positions: int) -> int:
        return int(sum(p.numel() for p in self.parameters))

    def _add_finite(self, values: Tensor, lengths: Tensor | None, targets: Tensor) -> None:
        for p in self.parameters:
            p.grad_sample = None
        losses = self._losses(values, lengths, targets)
        torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
        self._missing({id(p) for p in self.parameters if p.grad_sample is not None})
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
