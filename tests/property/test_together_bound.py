"""Holders side by side: one record moves its own holder's sum by at most the clipping norm, and no other's at all."""

from pathlib import Path
from runpy import run_path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.privacy.clipping import feature_reach, linear_softmax_clipped_sum, linear_softmax_clipped_sums

SUMS = run_path(str(Path(__file__).with_name("bounded_sums.py")))
D, K, RECORDS = (SUMS[name] for name in ("D", "K", "RECORDS"))
HOLDERS = st.lists(st.lists(RECORDS, max_size=4), min_size=1, max_size=4)
NORMS = st.sampled_from([1e-3, 0.5, 20.0])
ODD = [0.0, float("nan"), float("inf"), 1e30]


def heads(count, bias, dtype, odd=0.0):
    """Weights (H, K, D) and biases (H, K); `odd` stands in the last holder's."""
    g = torch.Generator().manual_seed(5)
    weights, biases = 2 * torch.randn(count, K, D, generator=g), torch.randn(count, K, generator=g)
    weights[-1, 0, 0] += odd
    return weights.to(dtype), biases.to(dtype) if bias else None


def prepared(rows, bias, normalize, dtype):
    """x without what isn't finite, y, reach, scale of one holder's records."""
    x = torch.tensor([values for values, _ in rows], dtype=dtype).reshape(-1, D)
    reach, scale = feature_reach(x, bias=bias, normalize=normalize)
    y = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return x.masked_fill(~reach.isfinite()[:, None], 0.0), y, reach, scale


def sums(holders, c, bias, normalize, dtype, odd=0.0):
    """Each holder's clipped sum as a vector: (H, P)."""
    xs, ys, reaches, scales = zip(*(prepared(rows, bias, normalize, dtype) for rows in holders), strict=True)
    weight, shift = linear_softmax_clipped_sums(
        list(xs), torch.cat(ys), *heads(len(holders), bias, dtype, odd), c,
        reach=torch.cat(reaches), scale=torch.cat(scales) if normalize else None,
        owner=torch.arange(len(holders)).repeat_interleave(torch.tensor([len(rows) for rows in holders])),
    )  # fmt: skip
    return torch.cat([part.flatten(1) for part in (weight, shift) if part is not None], 1)


def moves(holders, c, *settings):
    """For every record: how far its holder's sum moves without it, and how far the others' do."""
    whole = sums(holders, c, *settings)
    assert whole.isfinite().all()
    for h, rows in enumerate(holders):
        for i in range(len(rows)):
            fewer = [*holders[:h], rows[:i] + rows[i + 1 :], *holders[h + 1 :]]
            distance = (whole - sums(fewer, c, *settings)).norm(dim=1)
            yield float(distance[h]), float(torch.cat([distance[:h], distance[h + 1 :]]).sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_one_record_moves_its_own_holders_sum_by_at_most_the_clipping_norm(bias, normalize):
    @given(HOLDERS, NORMS, st.sampled_from(ODD))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(holders, c, odd):
        for dtype, room in ((torch.float64, 1.0), (torch.float32, 1 + 1e-5)):
            for own, others in moves(holders, c, bias, normalize, dtype, odd):
                assert own <= c * room
                assert others <= 1e-6 * c * len(holders)  # rounding: products of other shapes

    check()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_sums_are_those_of_each_holder_alone(bias, normalize):
    @given(HOLDERS, NORMS)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(holders, c):
        weights, biases = heads(len(holders), bias, torch.float64)
        found = sums(holders, c, bias, normalize, torch.float64)
        for h, rows in enumerate(holders):
            x, y, reach, scale = prepared(rows, bias, normalize, torch.float64)
            shift = None if biases is None else biases[h]
            parts = linear_softmax_clipped_sum(x, y, weights[h], shift, c, reach=reach, scale=scale)
            alone = torch.cat([part.flatten() for part in parts if part is not None])
            assert torch.allclose(found[h], alone, rtol=0, atol=1e-9 * c)

    check()


def test_a_record_over_the_clipping_norm_is_told_apart():
    """The bound is not met by chance: without factors, and with the reach of a shorter record, it is broken."""
    holders = [[([3.0, 4.0, 0.0, 0.0], 0)], [([0.1, 0.0, 0.0, 0.0], 1)]]
    x, y, reach, _ = zip(*(prepared(rows, True, False, torch.float64) for rows in holders), strict=True)
    arguments = list(x), torch.cat(y), *heads(2, True, torch.float64), 0.5
    owner = torch.arange(2)
    for wrong in (torch.zeros(2, dtype=torch.float64), torch.cat(reach).flip(0)):
        weight, bias = linear_softmax_clipped_sums(*arguments, reach=wrong, scale=None, owner=owner)
        assert float(torch.cat([weight[0].flatten(), bias[0]]).norm()) > 0.5
    weight, bias = linear_softmax_clipped_sums(*arguments, reach=torch.cat(reach), scale=None, owner=owner)
    assert 0.49 < float(torch.cat([weight[0].flatten(), bias[0]]).norm()) <= 0.5
