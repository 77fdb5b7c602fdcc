"""Gradient paths for any head, on Opacus's hooks: ghost clipping, and per-record gradients to compare with.

Shapes: B records, T positions of a sequence, D features, K outputs. A person's records are such a sequence.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Final

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from fedhead.client.gradients import Features, GradientPath, of_persons, without_unusable
from fedhead.client.probing import check_own_gradients, has_own_code
from fedhead.common.errors import ModelError
from fedhead.common.privacy.clipping import clip_factors, finite_records
from fedhead.common.privacy.sequences import CANCEL

_BYTES: Final = 2**28  # most memory that values or per-record gradients of one chunk may take
_NORM_ELEMENTS: Final = 2**22  # most numbers inside one layer's norm
_FIRING: Final = "Full backward hook is firing"  # features ask for no gradient, and torch says so for every first layer


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


def person_norms(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """`linear_norms` of persons, each at least `CANCEL` of the sum of their records' norms, see there.

    Parameters
    ----------
    activations : list of one Tensor, shape (B, T, D)
    backprops : Tensor, shape (B, T, K)
    """
    norms = linear_norms(layer, activations, backprops)
    sizes = torch.linalg.vector_norm(backprops, dim=2)  # (B, T)
    if layer.weight in norms:
        inputs = torch.linalg.vector_norm(activations[0].to(backprops.dtype), dim=2)
        norms[layer.weight] = torch.maximum(norms[layer.weight], CANCEL * (sizes * inputs).sum(1))
    if layer.bias is not None and layer.bias in norms:
        norms[layer.bias] = torch.maximum(norms[layer.bias], CANCEL * sizes.sum(1))
    return norms


class _GhostHooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus's norm hooks with `linear_norms` in place of its Gram matrices."""

    NORM_SAMPLERS = {**GradSampleHooksFastGradientClipping.NORM_SAMPLERS, nn.Linear: linear_norms}  # noqa: RUF012


class _PersonHooks(_GhostHooks):
    """The same for persons."""

    NORM_SAMPLERS = {**_GhostHooks.NORM_SAMPLERS, nn.Linear: person_norms}  # noqa: RUF012


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
        size = self._held_a_record()
        if len(self.features):
            values, lengths = self.features.batch(slice(0, 1))
            offsets = getattr(self.features, "offsets", None)
            longest = values.shape[1] if lengths is None or offsets is None else int(offsets.diff().max())
            longest = 1 if of_persons(self.targets) else longest  # `add_rows` cuts persons by their numbers of records
            size = max(size, values[0, :1].numel() * longest)
        return max(1, min(chunk, _BYTES // max(1, size * int(self.parameters[0].element_size()))))

    @abstractmethod
    def _held_a_record(self) -> int:
        """Numbers held for each record in the worst layer."""

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
        hooks = _PersonHooks if of_persons(self.targets) else _GhostHooks
        return hooks(self.trainable, loss_reduction="sum", max_grad_norm=self.clipping_norm)

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
