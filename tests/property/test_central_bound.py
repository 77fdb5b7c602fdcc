"""One data holder's update moves the noiseless sum by at most the clipping norm, whatever is in it."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedhead.server.central import clipped_sum

PARTS = [4, 2]  # coordinates of the trained parameters, flattened one after the other
P = sum(PARTS)
EDGES = [0.0, -0.0, 1e-320, 1e-160, 1e160, 1.7e308, -1.7e308, math.inf, -math.inf, math.nan]
values = st.one_of(st.sampled_from(EDGES), st.floats(-1e3, 1e3), st.floats(allow_nan=True, allow_infinity=True))
update = st.lists(values, min_size=P, max_size=P).map(lambda found: torch.tensor(found, dtype=torch.float64))
moderate = st.lists(st.floats(-1e3, 1e3), min_size=P, max_size=P).map(lambda found: torch.tensor(found).double())
norms = st.floats(1e-6, 1e3)


def most_moved(sums, others, one, norm):
    """How far one more update moves the result, in clipping norms."""
    place = len(others) // 2
    with_one = sums([*others[:place], one, *others[place:]], norm, P)
    return float((with_one - sums(others, norm, P)).norm()) / norm


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(update, max_size=4), update, norms)
def test_one_update_moves_the_sum_by_at_most_the_clipping_norm(others, one, norm):
    found = clipped_sum([*others, one], norm, P)
    assert found.isfinite().all()
    assert found.shape == (P,)
    assert most_moved(clipped_sum, others, one, norm) <= 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(update, norms)
def test_small_updates_are_summed_as_they_are_and_others_keep_their_direction(one, norm):
    found = clipped_sum([one], norm, P)
    length = math.hypot(*one.tolist())
    if not one.isfinite().all():
        assert not found.any()
    elif length <= norm * (1 - 1e-5):
        assert torch.equal(found, one + 0.0)
    elif length < math.inf:
        assert float(found.norm()) == pytest.approx(norm, rel=1e-5)
        assert torch.allclose(found / norm, one / length, rtol=1e-5, atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(update, max_size=4), norms)
def test_it_is_the_sum_that_plain_python_gives(updates, norm):
    """A second implementation, with Python's own numbers."""
    total = [0.0] * P
    for one in updates:
        numbers = one.tolist()
        if all(map(math.isfinite, numbers)):
            largest = max(map(abs, numbers)) or 1.0
            length = math.hypot(*(number / largest for number in numbers))
            factor = min(1.0, norm / length / largest) if length else 1.0
            total = [a + b * factor for a, b in zip(total, numbers, strict=True)]
    found = clipped_sum(updates, norm, P)
    assert torch.allclose(found, torch.tensor(total, dtype=torch.float64), rtol=1e-5, atol=1e-5 * norm)


def by_replies(updates, norm, coordinates):
    """Divides by how many replied, so that one more holder changes what all others count."""
    return clipped_sum(updates, norm, coordinates) * 10 / max(1, len(updates))


def by_tensor(updates, norm, coordinates):
    """Clips each parameter tensor by itself: the norm of the whole is up to sqrt(tensors) times too large."""
    parts = [part for one in updates for part in [one.split(PARTS)]]
    return torch.cat([clipped_sum([part[i] for part in parts], norm, size) for i, size in enumerate(PARTS)])


def by_records(updates, norm, coordinates):
    """Weights holders by how many records they have."""
    weighted = [clipped_sum([one], norm, coordinates) * (1 + i) for i, one in enumerate(updates)]
    return sum(weighted, torch.zeros(coordinates, dtype=torch.float64))


def by_float_norm(updates, norm, coordinates):
    """Multiplies by the factor without leaving out what isn't finite."""
    total = torch.zeros(coordinates, dtype=torch.float64)
    for one in updates:
        total = total + one * torch.clamp(norm / one.norm(), max=1).nan_to_num(0.0)
    return total


@pytest.mark.parametrize("twin", [by_replies, by_tensor, by_records, by_float_norm])
def test_wrong_twins_are_rejected(twin):
    @settings(max_examples=300, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.lists(moderate, min_size=1, max_size=4), st.one_of(moderate, update), norms)
    def bounded(others, one, norm):
        moved = most_moved(twin, others, one, norm)
        assert moved <= 1

    with pytest.raises(AssertionError):
        bounded()
