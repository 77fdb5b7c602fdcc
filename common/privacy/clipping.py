"""Clipping, record by record: what bounds the effect of one record on a released sum.

Shapes: B records, D features, K outputs, T positions of a sequence.
"""

from __future__ import annotations

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
    norms = torch.linalg.vector_norm(g, dim=1).add_(_UNSEEN).mul_(reach)
    # a factor of NaN makes its row NaN, and a factor of 0 may meet NaN there: such rows must be 0
    g.mul_(_factors(norms.div_(clipping_norm * SHRINK)).unsqueeze(1)).nan_to_num_(nan=0.0)
    grad_bias = None if bias is None else g.sum(0)
    if scale is not None:
        g.mul_(column)
    return g.t().mm(x), grad_bias
