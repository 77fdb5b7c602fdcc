"""The least noise, or the most rounds, within a budget."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent
from fedhead.common.privacy.filters import Totals, admits, charge_of
from fedhead.common.privacy.planning import MOST_ROUNDS, cost, noise_multiplier_for, rounds_for
from fedhead.common.privacy.terms import Terms


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


@pytest.mark.parametrize(
    ("noise", "local_steps"), [(5.0, 1), (30.0, 1), (30.0, 7), (200.0, 1), (1.5, 1), (399.99, 1), (700.01, 3)]
)
def test_rounds_are_the_most_that_fit(noise, local_steps):
    found = rounds_for(3.0, 1e-5, noise, local_steps)
    assert epsilon([GaussianEvent(noise, 1.0, found * local_steps)], 1e-5).epsilon <= 3.0
    assert epsilon([GaussianEvent(noise, 1.0, (found + 1) * local_steps)], 1e-5).epsilon > 3.0


@pytest.mark.parametrize(("noise", "rate"), [(2.0, 0.05), pytest.param(1.2, 0.02, marks=pytest.mark.slow)])
def test_sampled_rounds_are_the_most_that_fit(noise, rate):
    found = rounds_for(1.0, 1e-5, noise, 2, rate)
    assert epsilon([PoissonEvent(noise, 1.0, rate, 2 * found)], 1e-5).epsilon <= 1.0
    assert epsilon([PoissonEvent(noise, 1.0, rate, 2 * found + 2)], 1e-5).epsilon > 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0.01, 50), st.floats(1e-9, 1e-2), st.integers(1, MOST_ROUNDS), st.integers(1, 20))
def test_rounds_and_noise_undo_each_other(target, delta, rounds, local_steps):
    noise = noise_multiplier_for(target, delta, "full-batch", rounds * local_steps)
    assert rounds_for(target, delta, noise, local_steps) == rounds


def test_rounds_end_where_recipes_do():
    assert rounds_for(3.0, 1e-5, 1e6) == MOST_ROUNDS
    assert rounds_for(3.0, 1e-5, 1e3, 1, 0.001) == MOST_ROUNDS


def test_no_round_at_all_is_said():
    with pytest.raises(InputError, match=r"^epsilon is 0.1: .*not even one round fits"):
        rounds_for(0.1, 1e-5, 1.0)
    with pytest.raises(InputError, match=r"^noise_multiplier is 0"):
        rounds_for(3.0, 1e-5, 0.0)


@pytest.mark.parametrize(("mechanism", "rate"), [("full-batch", None), ("poisson", 0.1)])
def test_noised_counts_are_part_of_the_plan(mechanism, rate):
    noise = noise_multiplier_for(2.0, 1e-5, mechanism, 20, rate, other=5 / 10.0**2)
    step = GaussianEvent(noise, 1.0, 20) if rate is None else PoissonEvent(noise, 1.0, rate, 20)
    assert 2 * (1 - 1e-3) <= epsilon([step, CountEvent(10.0, 1.0, 5)], 1e-5).epsilon <= 2
    assert cost(noise, 1e-5, 20, rate, 5 / 10.0**2).epsilon <= 2
    assert noise > 1.01 * noise_multiplier_for(2.0, 1e-5, mechanism, 20, rate)
    with pytest.raises(InputError, match="the noised counts of the run alone cost as much"):
        noise_multiplier_for(2.0, 1e-5, mechanism, 20, rate, other=5.0)


@pytest.mark.parametrize(("target", "delta"), [(1.0, 1e-5), (0.1, 1e-6), (8.0, 1e-5)])
@pytest.mark.parametrize("rounds", [1, 60, 5000])
def test_a_plan_for_all_of_a_budget_is_admitted_round_by_round(target, delta, rounds):
    """The filter rounds every sum upwards; the plan leaves room for that, and for nothing like a round more."""
    terms, total = Terms(target, delta), Totals()
    charge = charge_of(GaussianEvent(noise_multiplier_for(target, delta, "full-batch", rounds), 1.0, 1))
    for _ in range(rounds):
        total = total.plus(charge)
        assert admits(terms, total, total) is None
    assert admits(terms, total.plus(charge), total.plus(charge)) == "budget"
