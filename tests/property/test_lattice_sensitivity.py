"""Neighbouring data sets have rounded sums at most C (1 + ETA) apart, checked in rational arithmetic.

Records are clipped by production code, summed in float64 in many orders, and rounded to the lattice. The distance is
then computed in integers and fractions, without any rounding.
"""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.privacy.clipping import SHRINK, clip_factors, feature_reach, linear_softmax_clipped_sum
from fedhead.common.privacy.lattice import ETA, from_lattice, lattice_step, sensitivity, to_lattice

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def contributions(seed, records, width, norm):
    """Clipped by production code: (N, P) float64. Sizes from far below the clipping norm to far above, many aligned."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(records, width, generator=g, dtype=torch.float64)
    aligned = torch.rand(records, 1, generator=g, dtype=torch.float64) < 0.5
    rows = torch.where(aligned, rows[:1] * (1 + 1e-9 * rows), rows)  # these add up, and lose the most bits
    rows *= norm * 10 ** (8 * torch.rand(records, 1, generator=g, dtype=torch.float64) - 4)
    return rows * clip_factors(torch.linalg.vector_norm(rows, dim=1), norm)[:, None]


def one_by_one(values):
    return torch.from_numpy(np.add.accumulate(values.numpy(), axis=0)[-1]) if len(values) else values.sum(0)


def backwards(values):
    return one_by_one(values.flip(0).contiguous())


def by_matrix(values):
    return values.t().mm(values.new_ones(len(values), 1)).flatten()


def in_chunks(values):
    total = values.new_zeros(values.shape[1])
    for part in torch.split(values, 37):
        total += part.sum(0)
    return total


def largest_first(values):
    return one_by_one(values[values.norm(dim=1).argsort(descending=True)])


ORDERS = [one_by_one, backwards, by_matrix, in_chunks, largest_first, lambda values: values.sum(0)]


def squared_distance(a, b, norm):
    """Of two rounded sums, in units of gradients, exactly."""
    step = lattice_step(norm)
    steps = sum(int(d) ** 2 for d in (to_lattice(a, step) - to_lattice(b, step)).tolist())
    return steps * Fraction(step) ** 2


def holds(a, b, norm, eta=ETA):
    return squared_distance(a, b, norm) <= (Fraction(norm) * (1 + Fraction(eta))) ** 2


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    records=st.integers(1, 3000),
    width=st.integers(1, 6),
    norm=st.sampled_from([1.0, 0.7, 1.9999999, 3e-5, 2.0**-499, 2.0**300, 1e6]),
    gone=st.integers(0, 10**6),
)
def test_neighbours_are_within_the_widened_sensitivity_in_any_order(seed, records, width, norm, gone):
    values = contributions(seed, records, width, norm)
    gone %= records
    without = torch.cat([values[:gone], values[gone + 1 :]])
    for a in ORDERS:
        for b in ORDERS:
            assert holds(a(values), b(without), norm)


@EXAMPLES
@given(seed=st.integers(0, 2**31), norm=st.sampled_from([1.0, 0.7, 1.9999999, 3e-5, 1e6]))
def test_no_clipped_record_is_longer_than_the_clipping_norm(seed, norm):
    """The 1 in 1 + ETA, in rational arithmetic."""
    for row in contributions(seed, 200, 5, norm):
        assert sum(Fraction(x) ** 2 for x in row.tolist()) <= Fraction(norm) ** 2


@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    records=st.integers(1, 200),
    norm=st.sampled_from([1.0, 0.3]),
    size=st.sampled_from([1e-3, 1.0, 1e6]),
    normalize=st.booleans(),
)
def test_the_closed_form_is_within_the_widened_sensitivity(seed, records, norm, size, normalize):
    """Through production code, where batches of different shape also compute a record's own gradient differently."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(records, 7, generator=g, dtype=torch.float64) * size
    y = torch.randint(3, (records,), generator=g)
    weight, bias = torch.randn(3, 7, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)

    def total(keep):
        reach, scale = feature_reach(x[keep], bias=True, normalize=normalize)
        found = linear_softmax_clipped_sum(x[keep], y[keep], weight, bias, norm, reach=reach, scale=scale)
        return torch.cat([part.flatten() for part in found])

    everything = torch.arange(records)
    gone = int(torch.randint(records, (), generator=g))
    assert holds(total(everything), total(everything[everything != gone]), norm)
    assert holds(total(everything), total(everything.flip(0)[1:]), norm)


@EXAMPLES
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.sampled_from([1.0, 0.7, 3.0]))
def test_rounding_moves_a_coordinate_by_half_a_step_at_most(values, norm):
    step = lattice_step(norm)
    total = torch.tensor(values, dtype=torch.float64)
    back = from_lattice(to_lattice(total, step), step)
    for before, after in zip(values, back.tolist(), strict=True):
        assert abs(Fraction(before) - Fraction(after)) <= Fraction(step) / 2
        assert (Fraction(after) / Fraction(step)).denominator == 1


def test_the_widened_sensitivity_is_not_below_its_formula():
    for norm in (1.0, 0.7, 1e-9, 12345.678):
        assert Fraction(sensitivity(norm)) >= Fraction(norm) * (1 + Fraction(ETA)) * (1 - Fraction(2) ** -52)


# ---- twins that must break the bound ----


def many(records=1_000_000):
    """Records of norm C with sums that grow: what summation loses the most on."""
    g = torch.Generator().manual_seed(3)
    values = 1 - 0.3 * torch.rand(records, 1, generator=g, dtype=torch.float64)
    return values.clamp(max=SHRINK)


def test_the_largest_sums_hold_in_float64_and_not_in_float32():
    """A million records: float32 loses whole records, float64 stays within the bound."""
    values = many()
    assert holds(one_by_one(values), backwards(values[1:]), 1.0)
    assert holds(values.sum(0), one_by_one(values[1:]), 1.0)
    narrow = values.float()
    assert not holds(one_by_one(narrow).double(), backwards(narrow[1:]).double(), 1.0)


def test_without_widening_rounding_breaks_the_bound():
    """One record takes 2^23 coordinates across the middle between two lattice points, all at once."""
    width, step = 2**23, lattice_step(1.0)
    before, record = (0.5 - 2.0**-9) * step, (370_727 + 2.0**-8) * step  # the same in every coordinate
    assert Fraction(record) ** 2 * width <= Fraction(SHRINK) ** 2
    sums = torch.tensor([before, before + record], dtype=torch.float64)
    low, high = to_lattice(sums, step).tolist()
    squared = (Fraction(high - low) * Fraction(step)) ** 2 * width
    assert squared > 1  # further apart than C: noise for C alone would not be enough
    assert squared <= (1 + Fraction(ETA)) ** 2


@pytest.mark.parametrize("factor", [1.0, 1.002])
def test_a_record_over_the_clipping_norm_is_seen(factor):
    values = torch.full((500, 1), SHRINK * factor, dtype=torch.float64)
    assert holds(values.sum(0), values[1:].sum(0), 1.0) == (factor == 1.0)


def test_a_coarse_lattice_is_seen(monkeypatch):
    """Twin: a step of C / 4 takes the record further than its norm."""
    values = torch.tensor([[1 / 3 * SHRINK] * 9, [0.1] * 9], dtype=torch.float64)
    assert holds(values.sum(0), values[1:].sum(0), 1.0)
    monkeypatch.setattr(sys.modules[__name__], "lattice_step", lambda norm: 2.0**-2 * norm)
    assert not holds(values.sum(0), values[1:].sum(0), 1.0)
