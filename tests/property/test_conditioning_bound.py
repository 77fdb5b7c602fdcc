"""What rounding moves in a record's clipped gradient stays within its room, at the limit of the check on weights.

An inner product is built whose roundings all go one way in one order, and cancel in another: what a matrix product of
another shape may do. No order of the same sum is worse by much.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.errors import InputError
from fedhead.common.privacy.clipping import feature_reach, linear_softmax_clipped_sum
from fedhead.common.privacy.conditioning import ALL, LONGEST_WEIGHTS, check_weights, longest_weights, moved
from fedhead.common.privacy.lattice import MOST_RECORDS
from fedhead.common.privacy.sequences import group, linear_softmax_summed

EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)
NORM = 2.0  # above the gradients below: clipping would take off what is to be seen


def rounded_up(size, count, total=0.0):
    """Terms of about a size whose running sum is rounded up by nearly half a unit in the last place, every time."""
    found = []
    for _ in range(count):
        unit = math.ulp(total + size)
        steps = math.floor(Fraction(total + size) / Fraction(unit)) + Fraction(51, 100)
        found.append(float(steps * Fraction(unit) - Fraction(total)))
        total += found[-1]
    return found, total


def one_after_the_other(terms):
    total = 0.0
    for term in terms:
        total += term
    return total


def gradient(output, features):
    """The clipped gradient of a record whose two outputs are +-output, by production code, in its two residuals."""
    weight = torch.tensor([[output], [-output]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    reach = torch.full((1,), math.sqrt(2), dtype=torch.float64)
    found, _ = linear_softmax_clipped_sum(one, torch.tensor([0]), weight, None, NORM, reach=reach)
    return found.flatten() * math.sqrt(2)  # length of [x, 1]


def worst(length, features):
    """How far two orders of one inner product move that gradient; weights (2, D) of a length, x with all equal."""
    each = length / math.sqrt(2) / features  # of w_i x_i, with x_i = 1 / sqrt(D)
    up, top = rounded_up(each, features // 2)
    down, _ = rounded_up(-each, features // 2, top)
    in_turn = [term for pair in zip(up, down, strict=True) for term in pair]
    a, b = one_after_the_other([*up, *down]), one_after_the_other(in_turn)
    return float((gradient(a, features) - gradient(b, features)).norm())


@pytest.mark.parametrize("records", [2**10, 2**17, MOST_RECORDS])
@pytest.mark.parametrize("features", [64, 512, 4096])
def test_at_the_limit_all_records_together_stay_within_their_room(features, records):
    """However few records a holder has promised: the fewer, the longer the weights."""
    limit = longest_weights(features, 2, NORM, records=records)
    assert 0 < records * worst(limit, features) <= 2.0**-11 * NORM
    assert worst(limit, features) <= moved(limit, features, 2, NORM) <= ALL / records * NORM * (1 + 1e-12)


@pytest.mark.parametrize("features", [512, 4096])
def test_a_limit_without_the_number_of_features_is_seen(features):
    """Twin: 2^20 clipping norms whatever D is, as it was once."""
    twin = LONGEST_WEIGHTS * NORM
    assert MOST_RECORDS * worst(twin, features) > 2.0**-11 * NORM
    assert worst(twin, features) <= moved(twin, features, 2, NORM)
    wide = torch.zeros(2, features, dtype=torch.float64)
    wide[0, 0] = twin * (1 - 1e-9)
    check_weights([wide], NORM)
    with pytest.raises(InputError, match=r"^the head's weights are longer than"):
        check_weights([wide], NORM, linear=True)


def head(drawn, features, outputs, length):
    weight = torch.randn(outputs, features + 1, generator=drawn, dtype=torch.float64)
    weight *= length / weight.norm()
    return weight[:, :-1].contiguous(), weight[:, -1].contiguous()


SHAPES = {
    "most": st.sampled_from([2**10, 2**17, MOST_RECORDS]),
    "seed": st.integers(0, 2**31),
    "features": st.sampled_from([3, 40, 700]),
    "outputs": st.sampled_from([2, 11]),
    "norm": st.sampled_from([0.01, 0.1, 1.0, 30.0]),
}


@EXAMPLES
@given(**SHAPES, read=st.booleans())
def test_a_record_alone_and_among_others(seed, features, outputs, norm, most, read):
    """Through production code, with what it does to features that are read together."""
    drawn = torch.Generator().manual_seed(seed)
    weight, bias = head(drawn, features, outputs, longest_weights(features, outputs, norm, records=most))
    x = torch.randn(50, features, generator=drawn).double()
    y = torch.randint(outputs, (50,), generator=drawn)

    def total(rows):
        reach, scale = feature_reach(x[rows], bias=True, normalize=True)
        values, scale = (x[rows] * scale[:, None], None) if read else (x[rows], scale)
        found = linear_softmax_clipped_sum(values, y[rows], weight, bias, norm, reach=reach, scale=scale)
        return torch.cat([part.flatten() for part in found])

    among = total(slice(0, 50)) - sum(total(slice(i, i + 1)) for i in range(50))
    assert float(among.norm()) <= 50 * ALL / most * norm + 2 * 50 * 50 * 2.0**-53 * norm  # and the additions


@EXAMPLES
@given(**SHAPES)
def test_a_person_alone_and_among_others(seed, features, outputs, norm, most):
    drawn = torch.Generator().manual_seed(seed)
    weight, bias = head(drawn, features, outputs, longest_weights(features, outputs, norm, persons=True, records=most))
    lengths = torch.randint(1, 9, (12,), generator=drawn)
    ends, count = lengths.cumsum(0), int(lengths.sum())
    x = torch.randn(count, features, generator=drawn).double()
    y = torch.randint(outputs, (count,), generator=drawn)

    def total(persons):
        rows = slice(int(ends[persons.start] - lengths[persons.start]), int(ends[persons.stop - 1]))
        reach, scale = feature_reach(x[rows], bias=True, normalize=True)
        found = linear_softmax_summed(
            x[rows], y[rows], group(lengths[persons], features, outputs), weight, bias, norm, reach=reach, scale=scale
        )
        return torch.cat([part.flatten() for part in found])

    among = total(slice(0, 12)) - sum(total(slice(i, i + 1)) for i in range(12))
    assert float(among.norm()) <= count * ALL / most * norm + 2 * count * 12 * 32 * 2.0**-53 * norm
