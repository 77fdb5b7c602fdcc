"""Which weights a deployed holder trains from: the proved limit of linear heads, the coarse one of others."""

import math

import pytest
import torch

from fedhead.common.config.limits import Limits
from fedhead.common.errors import InputError
from fedhead.common.privacy.conditioning import ALL, check_weights, longest_weights, moved
from fedhead.common.privacy.lattice import MOST_RECORDS

WORSE = r"^the head's weights are longer than "


@pytest.mark.parametrize("persons", [False, True])
@pytest.mark.parametrize("features", [512, 1024, 2048])
@pytest.mark.parametrize("outputs", [2, 10, 1000])
def test_usual_heads_pass(features, outputs, persons):
    weight = torch.zeros(outputs, features, dtype=torch.float64)
    weight[0] = 50 / math.sqrt(features)
    check_weights([weight, weight[:, 0] * 0], 0.1, linear=True, persons=persons)
    check_weights([weight], 1.0, linear=True, persons=persons)


@pytest.mark.parametrize("persons", [False, True])
def test_the_limit_is_where_the_room_ends(persons):
    limit = longest_weights(300, 7, 0.4, persons=persons)
    assert moved(limit, 300, 7, 0.4, persons=persons) == pytest.approx(ALL / MOST_RECORDS * 0.4, rel=1e-12)
    weight, bias = torch.zeros(7, 300, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    weight[3, 5] = bias[2] = limit / math.sqrt(2) * (1 - 1e-9)
    check_weights([weight, bias], 0.4, linear=True, persons=persons)
    for wrong in (limit, 1e10, math.inf, math.nan, 1e200):
        bias[2] = wrong
        with pytest.raises(InputError, match=WORSE):
            check_weights([weight, bias], 0.4, linear=True, persons=persons)


def test_the_bound_grows_with_all_that_rounds():
    least = moved(10.0, 100, 5, 0.1)
    for more in ((11.0, 100, 5, 0.1), (10.0, 101, 5, 0.1), (10.0, 100, 6, 0.1), (10.0, 100, 5, 0.2)):
        assert moved(*more) > least
    assert moved(10.0, 100, 5, 0.1, persons=True) > least
    # 1.5 D u ||W|| is less than what was proved once, for D ||W|| <= 2^20 C
    assert least > 1.5 * 100 * 2.0**-53 * 10.0


def test_a_clipping_norm_below_the_rounding_of_softmax_is_refused():
    zeros = torch.zeros(10, 64, dtype=torch.float64)
    check_weights([zeros], 1e-3, linear=True)
    with pytest.raises(InputError, match=r"^clipping_norm is 1e-09: .* Take a larger"):
        check_weights([zeros], 1e-9, linear=True)


def test_other_heads_keep_the_coarse_limit():
    half = torch.full((4,), 0.5, dtype=torch.float64) * 2**20 * 0.7 / math.sqrt(2)
    check_weights([half, half.clone()], 0.7 * (1 + 1e-12))
    check_weights([], 0.7)
    for wrong in (half * 1.001, half * 1e10, half * math.nan, half * math.inf, half * 1e200):
        with pytest.raises(InputError, match=WORSE):
            check_weights([half, wrong], 0.7)


@pytest.mark.parametrize("persons", [False, True])
def test_fewer_records_leave_room_for_longer_weights(persons):
    """What all records have together stays the same: 2^-11 clipping norms."""
    for records in (1, 2**10, 2**17, 2**20):
        limit = longest_weights(300, 7, 0.4, persons=persons, records=records)
        assert records * moved(limit, 300, 7, 0.4, persons=persons) == pytest.approx(2.0**-11 * 0.4, rel=1e-12)
        weight = torch.zeros(7, 300, dtype=torch.float64)
        weight[0, 0] = limit * (1 - 1e-9)
        check_weights([weight], 0.4, linear=True, persons=persons, records=records)
        with pytest.raises(InputError, match=r"limits\.most_records"):
            check_weights([weight * (1 + 1e-6)], 0.4, linear=True, persons=persons, records=records)


def test_the_weights_of_the_built_in_recipes_fit():
    """Noise makes weights long: 198 in `digits`, with 1,280 features and ten labels at epsilon 3."""
    assert longest_weights(1280, 10, 0.3, records=Limits().most_records) > 10 * 198
