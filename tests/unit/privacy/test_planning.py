"""The least noise within a budget."""

import math

import pytest

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent, PoissonEvent
from fedhead.common.privacy.planning import noise_multiplier_for


@pytest.mark.parametrize("target", [1e-3, 0.1, 3.0, 50.0])
@pytest.mark.parametrize("steps", [1, 60, 100_000])
def test_full_batch_is_exact(target, steps):
    noise = noise_multiplier_for(target, 1e-5, "full-batch", steps)
    spent = epsilon([GaussianEvent(noise, 1.0, steps)], 1e-5).epsilon
    assert target * (1 - 1e-6) <= spent <= target
    assert epsilon([GaussianEvent(noise * 0.999, 1.0, steps)], 1e-5).epsilon > target


def test_full_batch_over_rounds_is_within_the_budget():
    noise = noise_multiplier_for(3.0, 1e-5, "full-batch", 60)
    assert epsilon([GaussianEvent(noise, 1.0, 1)] * 60, 1e-5).epsilon == pytest.approx(3.0, rel=1e-9)
    assert epsilon([GaussianEvent(noise, 1.0, 1)] * 60, 1e-5).epsilon <= 3.0


@pytest.mark.parametrize(
    ("target", "delta", "steps", "rate"),
    [
        (1.0, 1e-5, 60, 0.05),
        (3.0, 1e-5, 300, 0.02),
        (0.1, 1e-6, 60, 0.05),
        (8.0, 1e-6, 20_000, 0.01),
        (3, 1e-5, 9, 0.99),
    ],
)
def test_poisson_stays_just_below(target, delta, steps, rate):
    noise = noise_multiplier_for(target, delta, "poisson", steps, rate)
    spent = epsilon([PoissonEvent(noise, 1.0, rate, steps)], delta).epsilon
    assert target * (1 - 1e-3) <= spent <= target


def test_sampling_needs_less_noise_and_rate_one_the_same():
    full = noise_multiplier_for(2.0, 1e-5, "full-batch", 60)
    assert noise_multiplier_for(2.0, 1e-5, "poisson", 60, 0.1) < full / 3
    assert noise_multiplier_for(2.0, 1e-5, "poisson", 60, 1.0) == full


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.0, 1e-5, "full-batch", 1), "epsilon"),
        ((math.nan, 1e-5, "full-batch", 1), "epsilon"),
        ((1.0, 0.0, "full-batch", 1), "delta"),
        ((1.0, 1e-5, "full-batch", 0), "steps"),
        ((1.0, 1e-5, "poisson", 1), "sample_rate"),
        ((1.0, 1e-5, "poisson", 1, 1.5), "sample_rate"),
    ],
)
def test_bad_values_are_named(arguments, named):
    with pytest.raises(InputError, match=f"^{named} is "):
        noise_multiplier_for(*arguments)
