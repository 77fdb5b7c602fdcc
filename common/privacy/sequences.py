"""Clipping of a person, who is a sequence of records: gradients are summed over the records before they are clipped.

Shapes: P persons, R records of all of them (person after person), T records of one person, D features, K outputs.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fedhead.common.privacy.clipping import LARGEST, UNSEEN, clip_factors
from fedhead.common.privacy.summing import CANCEL

ELEMENTS: Final = 2**22
"""Most numbers of a block of persons, or of its Gram matrices or gradients."""


class Block(NamedTuple):
    """Persons with about the same number of records, at least two.

    Attributes
    ----------
    persons : Tensor, int64, shape (b,)
        Which persons of the batch.
    rows : Tensor, int64, shape (b, T)
        Their records; R behind a person's last one.
    gram : Tensor, float64, shape (b, T, T), or None
        Inner products of the feature vectors as the layer sees them, with the constant 1 of a bias. They never change,
        so that full-batch steps keep them.
    """

    persons: Tensor
    rows: Tensor
    gram: Tensor | None = None


class Grouping(NamedTuple):
    """Whose record is whose, in a batch.

    Attributes
    ----------
    lengths : Tensor, int64, shape (P,)
        Records of each person.
    owner : Tensor, int64, shape (R,)
        Each record's person.
    blocks : tuple of Block
        All persons with two records or more.
    """

    lengths: Tensor
    owner: Tensor
    blocks: tuple[Block, ...]


def similar_lengths(lengths: Tensor) -> list[Tensor]:
    """Positions in groups whose lengths differ by less than a factor of two: padding never doubles the work.

    Parameters
    ----------
    lengths : Tensor, int64, shape (P,)

    Returns
    -------
    list of int64 tensors
        Disjoint, together all positions.
    """
    bucket = _bucket(lengths)
    return [(bucket == which).nonzero().flatten() for which in bucket.bincount().nonzero().flatten().tolist()]


def _bucket(lengths: Tensor) -> Tensor:
    """0 and 1; 2; 3 and 4; 5 to 8; ..."""
    return torch.bucketize(lengths, 2 ** torch.arange(32, device=lengths.device))


def pieces_of(lengths: Tensor, most: int) -> list[slice]:
    """Cut persons into pieces, in their order, of at most so many records; somebody with more is a piece alone.

    Parameters
    ----------
    lengths : Tensor, int64, shape (P,)
    most : int, >= 1
    """
    ends = lengths.cumsum(0)
    if not len(ends) or int(ends[-1]) <= most:
        return [slice(0, len(ends))]
    found, start, done = [], 0, 0
    while start < len(ends):
        stop = max(start + 1, int(torch.searchsorted(ends, done + most, right=True)))
        found.append(slice(start, stop))
        start, done = stop, int(ends[stop - 1])
    return found


def group(lengths: Tensor, features: int, outputs: int) -> Grouping:
    """Arrange a batch for `linear_softmax_summed`.

    Parameters
    ----------
    lengths : Tensor, int64, shape (P,)
    features, outputs : int
        D and K: blocks are cut so that a block's features, Gram matrices and gradients have at most `ELEMENTS` numbers
        each, or are one person's.
    """
    starts, total = lengths.cumsum(0) - lengths, int(lengths.sum())
    blocks = []
    for members in similar_lengths(lengths):
        t = int(lengths[members].max())
        if t < 2:
            continue
        places = torch.arange(t, device=lengths.device)
        for persons in torch.split(members, max(1, ELEMENTS // max(t * t, t * features, outputs * features))):
            rows = starts[persons, None] + places  # (b, T)
            blocks.append(Block(persons, rows.masked_fill(places >= lengths[persons, None], total)))
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return Grouping(lengths, owner, tuple(blocks))


def with_grams(grouping: Grouping, x: Tensor, scale: Tensor | None, *, bias: bool, most: int) -> Grouping:
    """The same grouping with Gram matrices to keep, for blocks of at most D records a person.

    Parameters
    ----------
    x : Tensor, shape (R, D)
        Finite.
    scale : Tensor, shape (R,), or None
        From `feature_reach`.
    bias : bool
        Whether the layer has a bias.
    most : int
        Numbers that may be kept in all; blocks beyond it are left as they are.
    """
    blocks = []
    for block in grouping.blocks:
        b, t = block.rows.shape
        size = b * t * t
        keep = t <= x.shape[1] and size <= most
        most -= size if keep else 0
        blocks.append(block._replace(gram=_gram(_seen(block, x, scale), bias)) if keep else block)
    return grouping._replace(blocks=tuple(blocks))


class Grams(NamedTuple):
    """Gram matrices of all persons of a holder, for samples of them.

    Attributes
    ----------
    slots : Tensor, int64, shape (N,)
        Where a person's matrix is among those of similar length.
    kept : dict of int to Tensor, float64, shape (n, T, T)
        By similar length; those that are missing are formed anew in every step.
    """

    slots: Tensor
    kept: dict[int, Tensor]


def keep_grams(lengths: Tensor, x: Tensor, scale: Tensor | None, outputs: int, *, bias: bool, most: int) -> Grams:
    """Gram matrices of all persons, of at most D records each and at most so many numbers in all; see `with_grams`."""
    found: dict[int, list[Tensor]] = {}
    for members in similar_lengths(lengths):
        t = int(lengths[members].max())
        size = len(members) * t * t
        if 2 <= t <= x.shape[1] and size <= most:
            most -= size
            found[int(_bucket(lengths[members[:1]]))] = []
    slots, used = torch.zeros_like(lengths), dict.fromkeys(found, 0)
    for block in group(lengths, x.shape[1], outputs).blocks:
        which, count = int(_bucket(lengths[block.persons[:1]])), len(block.persons)
        if which in found:
            gram = _gram(_seen(block, x, scale), bias)
            found[which].append(gram)
            slots[block.persons] = torch.arange(used[which], used[which] + count, device=slots.device)
            used[which] += count
    return Grams(slots, {which: torch.cat(grams) for which, grams in found.items()})


def with_kept(grouping: Grouping, persons: Tensor, grams: Grams) -> Grouping:
    """The grouping of a sample with the matrices that are kept: persons int64, shape (P,), of those in `grams`."""
    blocks = []
    for block in grouping.blocks:
        kept, t = grams.kept.get(int(_bucket(grouping.lengths[block.persons[:1]]))), block.rows.shape[1]
        slots = grams.slots[persons[block.persons]]
        blocks.append(block if kept is None else block._replace(gram=kept[slots, :t, :t]))
    return grouping._replace(blocks=tuple(blocks))


def linear_softmax_summed(
    x: Tensor,
    y: Tensor,
    grouping: Grouping,
    weight: Tensor,
    bias: Tensor | None,
    clipping_norm: float,
    *,
    reach: Tensor,
    scale: Tensor | None = None,
    gone: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the clipped gradients of persons, for cross-entropy summed over each person's records on a linear layer.

    Parameters
    ----------
    x : Tensor, shape (R, D)
        Features of all records, person after person; finite (zeros in place of what is not).
    y : Tensor, int64, shape (R,)
        Labels in [0, K).
    grouping : Grouping
        From `group`.
    weight : Tensor, shape (K, D)
    bias : Tensor, shape (K,), or None
    clipping_norm : float, > 0
        Bound on each person's part of the sum: L2 norm over weight and bias together.
    reach, scale : Tensor, shape (R,)
        From `feature_reach`, `reach` with 0 for records that are gone; with `scale` the layer sees ``x * scale``.
    gone : Tensor, bool, shape (R,), optional
        Records that are left out: their features are not finite. The person's others count.

    Returns
    -------
    grad_weight : Tensor, shape (K, D)
    grad_bias : Tensor, shape (K,), or None

    Notes
    -----
    Guarantee: adding or removing one person, with any number of records of any content, moves the result by at most
    clipping_norm; the rounding of the sum over records comes on top. A person whose gradient is not finite has factor
    0.

    With G = softmax(x W^T + b) - onehot(y), a person's gradient is the sum over their records of G_t [x_t, 1], and its
    squared norm the sum over pairs of records of (G_s G_t) (x_s x_t + 1): the sum of the product of two T x T Gram
    matrices. Those of x are kept where T <= D; else the cheaper of both Gram matrices and of the (K, D) gradient
    itself is formed, in blocks. All of it in double, because such sums cancel, and a norm that comes out too small
    would break the bound.
    Reference: Goodfellow (2015), arXiv:1510.01799; Li et al. (2022), arXiv:2110.05679, for the Gram form.
    """
    logits = x.mm(weight.t())
    if scale is not None:
        column = scale.unsqueeze(1)
        logits.mul_(column)
    if bias is not None:
        logits.add_(bias)
    g = logits.softmax(1)
    g.scatter_add_(1, y.unsqueeze(1), g.new_full((1, 1), -1.0).expand(len(y), 1))
    if gone is not None:
        g.masked_fill_(gone.unsqueeze(1), 0.0)
    norms = _norms(g, x, grouping, reach, scale, bias is not None)
    factors = clip_factors(norms.to(g.dtype), clipping_norm).repeat_interleave(grouping.lengths)
    # where the factor is 0 because g is NaN, the product is NaN as well: that row must be 0
    g.mul_(factors.unsqueeze(1)).nan_to_num_(nan=0.0)
    grad_bias = None if bias is None else g.sum(0)
    if scale is not None:
        g.mul_(column)
    return g.t().mm(x), grad_bias


def _norms(g: Tensor, x: Tensor, grouping: Grouping, reach: Tensor, scale: Tensor | None, bias: bool) -> Tensor:
    """L2 norm of each person's gradient, (P,), double; at least `CANCEL` of the sum of their records' norms."""
    sizes = torch.linalg.vector_norm(g, dim=1).add_(UNSEEN).mul_(reach).double()  # (R,)
    total: Tensor = sizes.new_zeros(len(grouping.lengths)).index_add_(0, grouping.owner, sizes)
    if not grouping.blocks:
        return total
    norms = torch.where(grouping.lengths > 1, CANCEL * total, total)
    padded = torch.cat([g, g.new_zeros(1, g.shape[1])]).double()
    for block in grouping.blocks:
        mine = padded[block.rows]  # (b, T, K), zeros where there is no record
        found = _block_norms(mine, block, x, scale, bias)
        norms[block.persons] = torch.maximum(norms[block.persons], found)  # NaN stays NaN
    return norms


def _block_norms(g: Tensor, block: Block, x: Tensor, scale: Tensor | None, bias: bool) -> Tensor:
    """Norms (b,) of a block whose residuals are g, (b, T, K)."""
    t, k, d = g.shape[1], g.shape[2], x.shape[1]
    gram = block.gram
    if gram is None and t * (d + k) <= d * k:  # T^2 (D + K) operations against T D K
        gram = _gram(_seen(block, x, scale), bias)
    if gram is not None:
        squares = g.bmm(g.mT).mul_(gram).sum(2).sum(1)  # in two steps: 2 T roundings, in any order, rather than T^2
        clamped: Tensor = squares.clamp(min=0)
        return clamped.sqrt_()
    norms: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(g.mT.bmm(_seen(block, x, scale)), dim=2), dim=1)
    return torch.hypot(norms, torch.linalg.vector_norm(g.sum(1), dim=1)) if bias else norms


def _seen(block: Block, x: Tensor, scale: Tensor | None) -> Tensor:
    """What the layer sees of a block's records, (b, T, D), double; behind a person's last record anything finite."""
    rows = block.rows.clamp(max=len(x) - 1)
    seen = x[rows].double()
    return seen if scale is None else seen.mul_(scale[rows].double().unsqueeze(2))


def _gram(seen: Tensor, bias: bool) -> Tensor:
    gram = seen.bmm(seen.mT)
    return gram.add_(1) if bias else gram


def unusable(values: Tensor) -> Tensor:
    """Which feature vectors are left out: those with inf or NaN, or longer than `LARGEST`.

    Parameters
    ----------
    values : Tensor, shape (..., D)

    Returns
    -------
    gone : Tensor, bool, shape (...)
    """
    reached: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64) <= LARGEST
    return ~reached  # NaN reaches nothing
