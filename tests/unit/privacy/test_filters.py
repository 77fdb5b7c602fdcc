"""Terms, charges, totals and the filter: every rule, every rounding, every edge."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import CountEvent, GaussianEvent, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.filters import Charge, Totals, admits, charge_of, left, spent
from fedhead.common.privacy.gaussian import gdp_delta, gdp_epsilon, mu_for
from fedhead.common.privacy.planning import noise_multiplier_for
from fedhead.common.privacy.rounding import above, below, difference_below, root_above, sum_above
from fedhead.common.privacy.terms import Terms

FINITE = st.floats(0, 1e300)
BUDGETS = st.builds(Terms, st.floats(1e-3, 200), st.floats(1e-12, 0.4), st.floats(0, 1))
ONE = Terms(1.0, 1e-5)


# Rounding


@given(FINITE, FINITE)
def test_sums_are_the_least_float_above(a, b):
    total = sum_above(a, b)
    exact = Fraction(a) + Fraction(b)
    assert Fraction(total) >= exact > Fraction(math.nextafter(total, -math.inf))


@given(FINITE, FINITE)
def test_differences_are_the_largest_float_below(a, b):
    exact = max(Fraction(0), Fraction(a) - Fraction(b))
    found = difference_below(a, b)
    assert Fraction(found) <= exact < Fraction(math.nextafter(found, math.inf))


@given(st.fractions(0, 10**9), FINITE)
def test_fractions_and_roots_round_to_their_side(exact, square):
    assert Fraction(below(exact)) <= exact <= Fraction(above(exact))
    assert math.nextafter(below(exact), math.inf) >= above(exact)
    assert Fraction(root_above(square)) ** 2 >= Fraction(square)


def test_infinite_sums():
    assert sum_above(math.inf, 1.0) == sum_above(1e308, 1.7e308) == above(Fraction(10) ** 400) == math.inf
    assert difference_below(1.0, math.inf) == 0


# Terms


@given(BUDGETS)
@settings(deadline=None, max_examples=60)
def test_terms_round_trip_and_parts(terms):
    assert Terms.from_json(terms.to_json()) == terms
    nothing = left(terms, Totals())
    assert nothing.mu_squared == terms.mu_squared
    assert Fraction(nothing.poisson_epsilon) + Fraction(nothing.epsilon) <= Fraction(terms.epsilon)
    assert Fraction(nothing.poisson_delta) + Fraction(nothing.delta) <= Fraction(terms.delta)
    if terms.mu_squared:
        epsilon_0 = below((1 - Fraction(terms.poisson_share)) * Fraction(terms.epsilon))
        assert gdp_epsilon(math.sqrt(terms.mu_squared), nothing.delta) <= epsilon_0
        assert gdp_delta(math.sqrt(terms.mu_squared) * (1 + 1e-6), epsilon_0) > nothing.delta


def test_canonical_text():
    text = '{"delta":1e-05,"epsilon":1.0,"poisson_share":0.0,"run_delta":null,"run_epsilon":null,"schema":1}'
    assert Terms(1, 1e-5).to_json() == text
    for other in (
        "",
        "[]",
        text.replace(":", ": "),
        text.replace("1.0", "1"),
        text.replace("1.0", "NaN"),
        text.replace('"schema":1', '"schema":2'),
        text.replace("run_delta", "run_gamma"),
        json.dumps({"schema": 1}),
    ):
        with pytest.raises(InputError):
            Terms.from_json(other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epsilon", bad) for bad in (0, -1.0, math.inf, math.nan, True, "1", None, 10**400)),
        pytest.param("epsilon", 10**5000, id="huge"),
        *(("delta", bad) for bad in (0.0, 1.0, -1e-5, math.nan, False, "x", None)),
        *(("poisson_share", bad) for bad in (-0.1, 1.1, math.nan, True, None, "x")),
        *(("run_epsilon", bad) for bad in (0.0, 2.1, math.inf, math.nan, True, "x")),
        *(("run_delta", bad) for bad in (0.0, 1.1e-5, math.nan, True, "x")),
    ],
)
def test_terms_are_checked(name, value):
    fields = {"epsilon": 2.0, "delta": 1e-5, "poisson_share": 0.5, "run_epsilon": 1.0, "run_delta": 1e-6}
    with pytest.raises(InputError, match=rf"^{name} is [^\n]*: it must be [^\n]*$"):
        Terms(**{**fields, name: value})


def test_run_delta_needs_run_epsilon():
    with pytest.raises(InputError, match=r"^run_delta is "):
        Terms(1.0, 1e-5, run_delta=1e-6)


def test_anchor_of_the_mu_part():
    assert math.sqrt(ONE.mu_squared) == pytest.approx(0.268, abs=6e-4)


def test_a_share_that_underflows_leaves_nothing():
    terms = Terms(1.0, 5e-324, 0.5)
    assert terms.mu_squared == 0
    assert admits(terms, Totals(5e-324), Totals(5e-324)) == "budget"


# Charges


@given(st.floats(5e-324, 1.7e308), st.integers(1, 2**53))
def test_gaussians_are_charged_the_least_float_above(noise, steps):
    exact = Fraction(steps) / Fraction(noise) ** 2
    for event in (GaussianEvent(noise, 1.0, steps), CountEvent(noise, 3.0, steps)):
        charge = charge_of(event)
        assert (charge.epsilon, charge.delta) == (0, 0)
        assert charge.mu_squared == above(exact) > 0
        assert math.isinf(charge.mu_squared) or Fraction(charge.mu_squared) >= exact


def test_a_plan_is_charged_whole_at_its_own_delta():
    plan = PoissonEvent(2.0, 1.0, 0.05, 60)
    assert charge_of(plan, 1e-6) == Charge(0.0, epsilon([plan], 1e-6).epsilon, 1e-6)
    for bad in (None, 0.0, 1.0, math.nan):
        with pytest.raises(InputError):
            charge_of(plan, bad)


def test_no_privacy_is_admitted_by_no_terms():
    charge = charge_of(NoPrivacyEvent(1))
    assert charge.mu_squared == charge.epsilon == math.inf
    after = Totals().plus(charge)
    for share in (0.0, 0.5, 1.0):
        assert admits(Terms(1e300, 0.9, share), after, after) == "budget"
    assert spent(None, after.plus(charge), 1e-5).epsilon == math.inf
    assert spent(ONE, after).accountant == "none"
    assert left(ONE, after).mu_squared == 0


# The filter


@pytest.mark.parametrize("steps", [1, 60, 3000])
@pytest.mark.parametrize("target", [0.01, 1.0, 8.0, 200.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_a_plan_at_the_whole_budget_fits_to_its_last_round(target, delta, steps):
    """Totals are rounded upwards every round: the plan leaves room for it."""
    noise = noise_multiplier_for(target, delta, "full-batch", steps)
    charge, totals, terms = charge_of(GaussianEvent(noise, 1.0, 1)), Totals(), Terms(target, delta)
    for _ in range(steps):
        totals = totals.plus(charge)
    assert admits(terms, totals, totals) is None
    after = totals.plus(charge_of(GaussianEvent(noise * 100, 1.0, 1)))
    assert admits(terms, after, after) == "budget"
    assert spent(terms, totals).epsilon == pytest.approx(target, rel=1e-6)
    assert spent(terms, totals).epsilon <= target


def test_parts_do_not_borrow_from_each_other():
    plan = Charge(0.0, 0.4, 4e-6)
    terms = Terms(1.0, 1e-5, 0.4)
    one, two = Totals().plus(plan), Totals().plus(plan).plus(plan)
    assert admits(terms, one, one) is None
    assert admits(terms, two, two) == "budget"
    assert admits(Terms(1.0, 1e-5, 0.0), one, one) == "budget"  # no share, no plan, even where it costs no epsilon
    assert admits(Terms(1.0, 1e-5, 0.0), Totals(0.0, 0.0, 1e-9), Totals()) == "budget"
    full = Totals(terms.mu_squared, 0.4, 4e-6)
    assert admits(terms, full, full) is None
    assert admits(terms, Totals(math.nextafter(terms.mu_squared, 1), 0.4, 4e-6), full) == "budget"
    assert admits(Terms(1.0, 1e-5, 1.0), Totals(5e-324), Totals()) == "budget"


def test_the_limit_of_a_run():
    terms = Terms(8.0, 1e-5, 0.25, run_epsilon=2.0)
    assert terms.run == Terms(2.0, 1e-5, 0.25)
    assert Terms(8.0, 1e-5, 0.25, 2.0, 1e-6).run == Terms(2.0, 1e-6, 0.25)
    assert ONE.run is None
    whole = Totals(terms.run.mu_squared, 0.5, 2.5e-6)
    assert admits(terms, whole, whole) is None
    for more in (Charge(1e-12, 0, 0), Charge(0, 1e-12, 0), Charge(0, 0, 1e-12)):
        assert admits(terms, Totals(), whole.plus(more)) == "run"
        assert admits(terms, Totals().plus(more), Totals().plus(more)) is None
    assert admits(terms, Totals(1e9), Totals(1e9)) == "budget"  # which limit is said first


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_totals_that_are_no_totals_are_refused(bad):
    for totals in (Totals(bad), Totals(0.0, bad), Totals(0.0, 0.0, bad)):
        assert admits(Terms(1.0, 1e-5, 0.5), totals, Totals()) == "budget"
        assert admits(Terms(1.0, 1e-5, 0.5, 1.0), Totals(), totals) == "run"


def test_one_limit_on_the_sum_would_be_exceeded():
    """Why a run's limit is split: gdp(mu) + sum epsilon_i <= E is no filter, found by integrating over the outcomes.

    First a Gaussian with room for randomized response at epsilon 6 beside it. Then, by the outcome, either that, or as
    much more Gaussian as the limit allows: each alone costs at most delta, the choice between them nearly twice it.
    """
    whole, plan, delta = 8.0, 6.0, 1e-5
    first, full = mu_for(whole - plan, delta), mu_for(whole, delta)
    loss = np.linspace(-10, 20, 200_001)
    density = np.exp(-((loss - first**2 / 2) ** 2) / 2 / first**2) / first / math.sqrt(2 * math.pi)
    likely = 1 / (1 + math.exp(-plan))
    response = sum(
        p * np.maximum(0, 1 - np.exp(np.minimum(0, whole - loss - x))) for p, x in ((likely, plan), (1 - likely, -plan))
    )
    mu, rest = math.sqrt(full**2 - first**2), whole - loss
    more = ndtr(mu / 2 - rest / mu) - np.exp(np.minimum(rest, 100)) * ndtr(-mu / 2 - rest / mu)
    cost = [float(np.trapezoid(what * density, loss)) for what in (response, more, np.maximum(response, more))]
    assert cost[0] <= delta
    assert cost[1] == pytest.approx(delta, rel=1e-4)
    assert cost[2] > 1.9 * delta
    # whatever the share, a limit that is split never leaves both ways open
    for share in np.linspace(0, 1, 21):
        terms = Terms(2 * whole, 3 * delta, float(share), run_epsilon=whole, run_delta=delta)
        ways = [Totals(first**2 * 0.999, plan, 0.0), Totals(full**2 * 0.999)]
        assert "run" in [admits(terms, Totals(), way) for way in ways]
    # share 0 leaves one of them, so the loop above does not refuse everything
    assert admits(Terms(2 * whole, 3 * delta, 0.0, whole, delta), Totals(), Totals(full**2 * 0.999)) is None


# What is shown


def test_spent_as_one_pair():
    totals = Totals().plus(charge_of(GaussianEvent(10.0, 1.0, 5))).plus(charge_of(CountEvent(20.0, 1.0, 1)))
    events = [GaussianEvent(10.0, 1.0, 5), CountEvent(20.0, 1.0, 1)]
    assert spent(None, totals, 1e-5).epsilon == pytest.approx(epsilon(events, 1e-5).epsilon, rel=1e-12)
    assert spent(None, totals, 1e-5).accountant == "gdp"
    both = totals.plus(Charge(0.0, 0.25, 2e-6))
    terms = Terms(4.0, 1e-5, 0.5)
    found = spent(terms, both)
    assert (found.delta, found.accountant) == (1e-5, "sum")
    assert found.epsilon == pytest.approx(gdp_epsilon(math.sqrt(totals.mu_squared), 5e-6) + 0.25, rel=1e-12)
    assert spent(terms, both, 1e-5).epsilon == pytest.approx(
        gdp_epsilon(math.sqrt(totals.mu_squared), 8e-6) + 0.25, rel=1e-12
    )
    assert spent(None, both, 1e-6).epsilon == math.inf  # the plan alone has a larger delta
    assert spent(None, both, 2e-6).epsilon == math.inf
    assert spent(None, Totals(0.0, 0.25, 2e-6), 2e-6).epsilon == 0.25
    assert spent(ONE, Totals()).epsilon == 0
    with pytest.raises(InputError, match=r"^delta is missing"):
        spent(None, totals)
    with pytest.raises(InputError, match=r"^delta is "):
        spent(None, totals, 1.0)


@given(BUDGETS, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_left_is_what_still_fits(terms, a, b):
    whole = left(terms, Totals())
    gone = Totals(a * whole.mu_squared, b * whole.poisson_epsilon, b * whole.poisson_delta)
    assert admits(terms, gone, gone) is None
    rest = left(terms, gone)
    last = gone.plus(Charge(rest.mu_squared, rest.poisson_epsilon, rest.poisson_delta))
    assert admits(terms, last, last) is None
    # the root that epsilon is found by is good to a few ulps, so a hair less mu may show a hair more epsilon
    assert rest.epsilon <= whole.epsilon * (1 + 1e-12)
    assert max(rest.epsilon, whole.epsilon) <= terms.epsilon
    assert left(terms, last).mu_squared <= terms.mu_squared * 1e-15


@given(BUDGETS, st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
@settings(deadline=None, max_examples=200)
def test_nothing_is_left_where_nothing_is_admitted(terms, a, b, c):
    """One part may be overspent under other terms: what the other has left is then of no use."""
    whole = left(terms, Totals())
    gone = Totals(a * whole.mu_squared, b * whole.poisson_epsilon, c * whole.poisson_delta)
    rest = left(terms, gone)
    if admits(terms, gone, gone) is not None:
        assert (rest.mu_squared, rest.epsilon, rest.poisson_epsilon, rest.poisson_delta) == (0, 0, 0, 0)
    else:
        last = gone.plus(Charge(rest.mu_squared, rest.poisson_epsilon, rest.poisson_delta))
        assert admits(terms, last, last) is None
