"""Clipping, record by record: what bounds the effect of one record on a released sum.

Shapes: B records, D features, K outputs, T positions of a sequence, H data holders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

SHRINK: Final = 1 - 2.0**-20
"""Factors aim this share of the clipping norm, so that rounding in norms, factors and products (a few 2^-23 in
float32) can't carry a record over it."""


LARGEST: Final = 1e18
"""Feature vectors longer than this count as not finite: float32 has no room for their squares, nor for the inverse of
their norm times a factor."""


UNSEEN: Final = 1e-20
"""More than the norm of softmax gradients whose squares are lost below the least float32: a feature vector near
`LARGEST` would carry such a gradient over a small clipping norm. Lost in rounding beside any norm above 1e-13."""

# as a tensor, because a number of Python takes half the time of a small operation
_UNSEEN: Final = torch.tensor(UNSEEN, dtype=torch.float64)


def clip_factors(norms: Tensor, clipping_norm: float) -> Tensor:
    """What to scale each record's gradient by, so that its L2 norm is at most the clipping norm.

    Parameters
    ----------
    norms : Tensor, shape (B,)
        L2 norm of each record's gradient, over all trained parameters together.
    clipping_norm : float, > 0
        Sensitivity of the sum, in gradient units.

    Returns
    -------
    factors : Tensor, shape (B,), in [0, 1]
        1 for a norm below the clipping norm; 0 for a norm that is inf or NaN.

    Notes
    -----
    Guarantee: ``factors[i] * norms[i] <= clipping_norm`` for every finite norm, in floating point. A record with
    factor 0 must be left out of the sum, not multiplied: 0 times NaN is NaN.
    Reference: Abadi et al. (2016), arXiv:1607.00133, Algorithm 1.
    """
    return _factors(norms / (clipping_norm * SHRINK)).nan_to_num_(nan=0.0)


def _factors(shares: Tensor) -> Tensor:
    """Factors in place of norms over the bound: inf gives 0, NaN stays NaN."""
    return shares.clamp_(min=1).reciprocal_()


def _softmax_factors(norms: Tensor, reach: Tensor, clipping_norm: float) -> Tensor:
    """Factors of records from the norms of their softmax gradients, whose place they take, and from their reach."""
    return _factors(norms.add_(_UNSEEN).mul_(reach).div_(clipping_norm * SHRINK))


def finite_records(values: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Which records hold finite numbers only.

    Parameters
    ----------
    values : Tensor, shape (B, *shape), or (B, T, ...) with lengths
    lengths : Tensor, int, shape (B,), optional
        Positions that belong to each record; what lies behind them is padding and isn't looked at.

    Returns
    -------
    finite : Tensor, bool, shape (B,)
    """
    good = values.isfinite()
    if lengths is not None:
        padding = torch.arange(values.shape[1], device=values.device) >= lengths[:, None]  # (B, T)
        good = good | padding.reshape(*padding.shape, *([1] * (values.dim() - 2)))
    return good.flatten(1).all(1)


def feature_reach(x: Tensor, *, bias: bool, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """What the closed form needs of each feature vector; it never changes over steps and rounds.

    Parameters
    ----------
    x : Tensor, shape (B, D)
        Features as cached.
    bias : bool
        Whether the layer has a bias, that is a further feature of constant 1.
    normalize : bool
        Whether the layer sees x / max(||x||, 1e-12) rather than x.

    Returns
    -------
    reach : Tensor, shape (B,)
        L2 norm of what the layer sees, with the constant 1; inf for one that isn't finite: factor 0.
    scale : Tensor, shape (B,), or None
        What to multiply x by to normalise it; None without `normalize`.
    """
    # double: float32 loses up to 1e-4 of a norm over 25,000 features, and its squares overflow from 1e19
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    finite = norms <= LARGEST  # False for NaN
    scale = norms.clamp(min=1e-12).reciprocal_() if normalize else None
    seen = norms if scale is None else norms * scale
    reach = (seen.square() + 1).sqrt_() if bias else seen
    reach = reach.masked_fill(~finite, torch.inf)
    return reach.to(x.dtype), None if scale is None else scale.masked_fill_(~finite, 0.0).to(x.dtype)


def linear_softmax_clipped_sum(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clipping_norm: float,
    *,
    reach: Tensor | None = None,
    scale: Tensor | None = None,
    hot: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the clipped gradients of the records, for cross-entropy on a linear layer, without a gradient a record.

    Parameters
    ----------
    x : Tensor, shape (B, D)
        Features; with `reach` given, rows must be finite (zeros in place of what is not).
    y : Tensor, int64, shape (B,)
        Labels in [0, K).
    weight : Tensor, shape (K, D)
    bias : Tensor, shape (K,), or None
    clipping_norm : float, > 0
        Bound on each record's part of the sum: L2 norm over weight and bias together.
    reach, scale : Tensor, shape (B,), optional
        From `feature_reach`, when it was computed before; with `scale` the layer sees ``x * scale[:, None]``.
    hot : Tensor, shape (B, K), optional
        Labels as one-hot rows, when they were computed before; `y` is then not read.

    Returns
    -------
    grad_weight : Tensor, shape (K, D)
    grad_bias : Tensor, shape (K,), or None

    Notes
    -----
    Guarantee: adding or removing one row moves the result by at most clipping_norm, inf and NaN included (their factor
    is 0); the rounding of the sum over rows comes on top.

    With G = softmax(x W^T + b) - onehot(y), the gradient of row i is the outer product G_i [x_i, 1], so its norm is
    ||G_i|| sqrt(||x_i||^2 + 1), and the clipped sum is (c G)^T [x, 1] with c_i = min(1, C / norm_i).
    Reference: Goodfellow (2015), arXiv:1510.01799, for the norm of an outer product.
    """
    if reach is None:
        reach, _ = feature_reach(x, bias=bias is not None, normalize=False)
        x = x.masked_fill(~reach.isfinite()[:, None], 0.0)
    if scale is None:
        logits = x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())  # (B, K)
    else:
        column = scale.unsqueeze(1)
        logits = x.mm(weight.t()).mul_(column)
        if bias is not None:
            logits.add_(bias)
    g = logits.softmax(1)
    if hot is None:
        g.scatter_add_(1, y.unsqueeze(1), g.new_full((1, 1), -1.0).expand(y.shape[0], 1))
    else:
        g.sub_(hot)
    factors = _softmax_factors(torch.linalg.vector_norm(g, dim=1), reach, clipping_norm)
    # a factor of NaN makes its row NaN, and a factor of 0 may meet NaN there: such rows must be 0
    g.mul_(factors.unsqueeze(1)).nan_to_num_(nan=0.0)
    grad_bias = None if bias is None else g.sum(0)
    if scale is not None:
        g.mul_(column)
    return g.t().mm(x), grad_bias


def linear_softmax_clipped_sums(
    xs: Sequence[Tensor],
    y: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    clipping_norm: float,
    *,
    reach: Tensor,
    scale: Tensor | None,
    owner: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`linear_softmax_clipped_sum` for the records of several data holders, each with a linear layer of its own.

    Parameters
    ----------
    xs : sequence of H Tensors, shape (B_h, D)
        Each holder's features; rows must be finite (zeros in place of what is not). B_h may be 0.
    y : Tensor, int64, shape (B,)
        Labels in [0, K) of all B records, holder after holder.
    weights : Tensor, shape (H, K, D)
    biases : Tensor, shape (H, K), or None
    clipping_norm : float, > 0
        Bound on each record's part of its holder's sum: L2 norm over weight and bias together.
    reach, scale : Tensor, shape (B,)
        From `feature_reach`; with `scale` the layers see ``x * scale[:, None]``.
    owner : Tensor, int64, shape (B,)
        The place in `xs` of each record's holder, rising.

    Returns
    -------
    grad_weights : Tensor, shape (H, K, D)
    grad_biases : Tensor, shape (H, K), or None

    Notes
    -----
    Guarantee: adding or removing one record moves its holder's sum by at most clipping_norm and the sums of the others
    not at all, inf and NaN included (their factor is 0); the rounding of the sum comes on top. Each matrix product
    reads one holder's rows and layer alone, so that weights which overflow at one holder stay with it.

    Records lie in columns, (K, B): rows that are no one's, to make holders equally long, are not needed, and the
    operations between the products are taken for all holders at once.
    """
    sizes = [x.shape[0] for x in xs]
    logits = weights.new_empty(weights.shape[1], y.shape[0])  # (K, B)
    for x, weight, part in zip(xs, weights.unbind(), torch.split(logits, sizes, 1), strict=True):
        torch.mm(weight, x.t(), out=part)
    if scale is not None:
        logits.mul_(scale)
    if biases is not None:
        logits.add_(biases.index_select(0, owner).t())
    g = logits.softmax(0)
    g.scatter_add_(0, y.unsqueeze(0), g.new_full((1, 1), -1.0).expand(1, y.shape[0]))
    # along columns this takes a tenth of the time of vector_norm
    factors = _softmax_factors(g.square().sum(0).sqrt_(), reach, clipping_norm)
    g.mul_(factors).nan_to_num_(nan=0.0)  # NaN: as in linear_softmax_clipped_sum
    grad_biases = None if biases is None else g.new_zeros(g.shape[0], len(xs)).index_add_(1, owner, g).t()
    if scale is not None:
        g.mul_(scale)
    grad_weights = torch.empty_like(weights)
    for x, part, total in zip(xs, torch.split(g, sizes, 1), grad_weights.unbind(), strict=True):
        torch.mm(part, x, out=total)
    return grad_weights, grad_biases
