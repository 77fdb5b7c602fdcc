"""Adding or removing one record moves the clipped sum by at most the clipping norm, whatever is in the record."""

from pathlib import Path
from runpy import run_path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedhead.client.gradients import ClosedForm
from fedhead.client.paths import make_path
from fedhead.common.privacy.clipping import LARGEST, clip_factors, finite_records, linear_softmax_clipped_sum

SUMS = run_path(str(Path(__file__).with_name("bounded_sums.py")))
D, K, RECORDS, TASK, trainable = (SUMS[name] for name in ("D", "K", "RECORDS", "TASK", "trainable"))
ROWS = st.lists(RECORDS, min_size=1, max_size=5)


class Wide:
    """Features in double, so that the bound is seen without the rounding of float32 sums."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def batch(self, index):
        return self.values[index], None


def clipped_sum(path, values, targets, c):
    return SUMS["clipped_sum"](path, Wide(values), targets, c)


def largest_move(path, rows, c, dtype):
    """Most that leaving out one of the rows moves the sum."""

    def sum_of(kept):
        values = torch.tensor([row for row, _ in kept], dtype=dtype).reshape(-1, D)
        return clipped_sum(path, values, torch.tensor([label for _, label in kept], dtype=torch.int64), c)

    return SUMS["largest_move"](rows, sum_of)


@pytest.mark.parametrize(
    ("head", "path"),
    [
        ("linear", "closed-form"),
        ("no bias", "closed-form"),
        ("linear", "ghost"),
        ("linear", "hooks"),
        ("mlp", "ghost"),
        ("mlp", "hooks"),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(head, path, normalize):
    made = {dtype: make_path(trainable(head, normalize, dtype), TASK, path) for dtype in (torch.float64, torch.float32)}

    @given(ROWS, st.sampled_from([1e-3, 0.5, 20.0]))
    @settings(max_examples=30, deadline=None, derandomize=True)
    def check(rows, c):
        assert largest_move(made[torch.float64], rows, c, torch.float64) <= c
        assert largest_move(made[torch.float32], rows, c, torch.float32) <= c * (1 + 1e-5)

    check()


class OneAndAHalf(ClosedForm):
    """Twin: clips at 1.5 C."""

    def begin(self, features, targets, clipping_norm):
        super().begin(features, targets, 1.5 * clipping_norm)


class Unmasked(ClosedForm):
    """Twin: multiplies a broken record by 0 instead of leaving it out."""

    def begin(self, features, targets, clipping_norm):
        super().begin(features, targets, clipping_norm)
        self._broken = None


def test_twins_break_the_bound():
    far = [([9.0, 9.0, -9.0, 9.0], 0), ([8.0, -9.0, 9.0, 9.0], 1)]
    made = trainable("linear", False, torch.float64)
    assert largest_move(ClosedForm(made, TASK), far, 0.5, torch.float64) <= 0.5
    assert largest_move(OneAndAHalf(made, TASK), far, 0.5, torch.float64) > 0.5 * 1.4
    values = torch.tensor([[1.0, float("nan"), 0.0, 0.0]], dtype=torch.float64)
    assert clipped_sum(Unmasked(made, TASK), values, torch.tensor([0]), 0.5).isnan().any()
    assert (clipped_sum(ClosedForm(made, TASK), values, torch.tensor([0]), 0.5) == 0).all()


@given(
    st.lists(st.one_of(st.floats(0, 2.0**127, width=32), st.sampled_from([float("nan"), float("inf")])), min_size=1),
    st.floats(1e-6, 1e6),
)
@settings(derandomize=True)
def test_factors(norms, c):
    norms = torch.tensor(norms)
    factors = clip_factors(norms, c)
    assert ((factors >= 0) & (factors <= 1)).all()
    finite = norms.isfinite()
    assert (factors[~finite] == 0).all()
    assert (factors[finite].double() * norms[finite].double() <= c).all()
    assert (factors[finite & (norms < c * 0.999)] == 1).all()


@given(ROWS, st.sampled_from([0.1, 1.0]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_pure_function_equals_single_records(rows, c):
    """The closed form against autograd on one record at a time."""
    torch.manual_seed(0)
    weight, bias = torch.randn(K, D, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    x = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    y = torch.tensor([label for _, label in rows])
    found = torch.cat(
        [part.flatten() for part in linear_softmax_clipped_sum(x, y, weight, bias, c) if part is not None]
    )
    expected = torch.zeros_like(found)
    for row, label in zip(x, y, strict=True):
        if not row.norm() <= LARGEST:
            continue
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = nn.functional.cross_entropy(nn.functional.linear(row, w, b), label)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [w, b])])
        norm = gradient.double().norm()
        if norm.isfinite():
            expected += gradient * min(1.0, c / max(norm.item(), 1e-300))
    assert torch.allclose(found, expected, atol=1e-5 * c, rtol=1e-5)


def test_finite_records_ignore_padding():
    values = torch.zeros(4, 3, 2)
    values[0, 2, 0] = float("nan")  # behind its end
    values[1, 1, 1] = float("inf")
    values[2, 2, 1] = float("nan")
    assert finite_records(values, torch.tensor([2, 2, 3, 0])).tolist() == [True, False, False, True]
    assert finite_records(values).tolist() == [False, False, False, True]


def test_ghost_leaves_out_a_record_whose_gradient_alone_is_broken():
    """A finite record whose norm overflows: the others must come through unharmed."""
    made = trainable("mlp", False, torch.float32)
    good = torch.randn(3, D)
    bad = torch.cat([good[:1], torch.full((1, D), 3e38), good[1:]])
    path = make_path(made, TASK, "ghost")
    alone = clipped_sum(path, good, torch.tensor([0, 1, 2]), 0.5)
    both = clipped_sum(path, bad, torch.tensor([0, 2, 1, 2]), 0.5)
    assert both.isfinite().all()
    assert (both - alone).norm() <= 0.5
