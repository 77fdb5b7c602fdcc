"""Epsilon over all events: exact for full batch, the fallbacks, the edges."""

import math

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.errors import InputError
from fedhead.common.privacy import accounting
from fedhead.common.privacy.accounting import epsilon, gdp_delta, gdp_epsilon, mu_for, pld_epsilon, rows_of
from fedhead.common.privacy.events import CountEvent, GaussianEvent, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.gaussian import SLACK


def exact_delta(mu, eps):
    """The same curve in 60 digits."""
    with mpmath.workdps(60):
        mu, eps = mpmath.mpf(mu), mpmath.mpf(eps)
        return mpmath.ncdf(mu / 2 - eps / mu) - mpmath.exp(eps) * mpmath.ncdf(-mu / 2 - eps / mu)


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 0.1, 1.0, 7.0, 60.0, 1000.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_epsilon_is_a_tight_upper_bound(mu, delta):
    eps = gdp_epsilon(mu, delta)
    assert exact_delta(mu, eps) <= delta
    if eps > 0:
        assert exact_delta(mu, eps * (1 - 1e-6)) > delta


@pytest.mark.parametrize("mu", [1e-30, 1e-12, 1e-9, 1e-6, 1e-3, 9.99e-3])
@pytest.mark.parametrize("ratio", [0.0, 1e-3, 1.0, 8.0, 30.0])
def test_delta_of_tiny_mu_does_not_cancel(mu, ratio):
    exact = exact_delta(mu, ratio * mu)
    assert float(abs(gdp_delta(mu, ratio * mu) - exact) / exact) < SLACK / 100


@given(st.floats(1e-4, 200), st.floats(0, 5000))
@settings(deadline=None, max_examples=60)
def test_delta_agrees_with_sixty_digits(mu, eps):
    exact = exact_delta(mu, eps)
    assert float(abs(gdp_delta(mu, eps) - exact)) <= 1e-9 * float(exact) + 1e-300


@pytest.mark.parametrize(("eps", "mu"), [(1, 0.268), (2, 0.502), (4, 0.925), (8, 1.666)])
def test_anchors(eps, mu):
    assert mu_for(eps, 1e-5) == pytest.approx(mu, abs=6e-4)


@given(st.floats(1e-3, 500), st.sampled_from([1e-10, 1e-5, 1e-2]))
@settings(deadline=None, max_examples=60)
def test_mu_and_epsilon_are_inverse(eps, delta):
    mu = mu_for(eps, delta)
    assert exact_delta(mu, eps) <= delta
    assert gdp_epsilon(mu, delta) == pytest.approx(eps, rel=1e-6)


def test_edges():
    assert epsilon([], 1e-5) == accounting.Spent(0.0, 1e-5, "gdp")
    assert gdp_epsilon(0.0, 1e-5) == 0
    assert gdp_epsilon(1e-7, 1e-5) == 0  # delta alone covers it
    assert gdp_epsilon(math.inf, 1e-5) == math.inf
    assert mu_for(math.inf, 1e-5) == math.inf
    none = epsilon([GaussianEvent(1.0, 1.0, 1), NoPrivacyEvent(1)], 1e-5)
    assert (none.epsilon, none.accountant) == (math.inf, "none")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_delta_is_checked(delta):
    for call in (lambda: epsilon([], delta), lambda: gdp_epsilon(1.0, delta), lambda: mu_for(1.0, delta)):
        with pytest.raises(InputError, match=r"^delta is "):
            call()


def test_full_batch_is_composed_over_all_rounds():
    rounds = [GaussianEvent(20.0, 1.0, 2)] * 30 + [GaussianEvent(10.0, 0.5, 5)]
    spent = epsilon(rounds, 1e-5)
    assert spent.accountant == "gdp"
    assert spent.epsilon == pytest.approx(gdp_epsilon(math.sqrt(60 / 400 + 5 / 100), 1e-5), rel=1e-9)
    assert spent.epsilon > 5 * epsilon(rounds[:1], 1e-5).epsilon  # never one round's figure


def test_a_count_costs_what_a_full_batch_step_costs():
    counts = [CountEvent(20.0, 1.0, 2), CountEvent(10.0, 7.0, 1)]
    assert epsilon(counts, 1e-5) == epsilon([GaussianEvent(20.0, 1.0, 2), GaussianEvent(10.0, 1.0, 1)], 1e-5)
    assert rows_of([PoissonEvent(2.0, 1.0, 0.1, 3), *counts]) == [(2.0, 0.1, 3), *rows_of(counts)]


def test_no_row_hides_a_release_without_privacy():
    with pytest.raises(InputError):
        rows_of([GaussianEvent(1.0, 1.0, 1), NoPrivacyEvent(1)])


def test_equal_rows_merge_and_order_does_not_matter():
    events = [PoissonEvent(2.0, 1.0, 0.1, 3), GaussianEvent(9.0, 1.0, 1), PoissonEvent(2.0, 0.5, 0.1, 4)]
    assert rows_of(events) == rows_of(events[::-1]) == [(2.0, 0.1, 7), (9.0, 1.0, 1)]


def test_poisson_anchor():
    spent = epsilon([PoissonEvent(1.0, 1.0, 0.005, 1000), PoissonEvent(1.0, 1.0, 0.005, 1000)], 1e-5)
    assert spent.epsilon == pytest.approx(1.21, abs=0.01)  # RDP would say 1.458
    assert spent.accountant in {"prv", "pld"}


def test_sample_rate_one_is_full_batch():
    assert epsilon([PoissonEvent(3.0, 1.0, 1.0, 4)], 1e-5) == epsilon([GaussianEvent(3.0, 1.0, 4)], 1e-5)


def test_both_mechanisms_together():
    events = [GaussianEvent(20.0, 1.0, 30), PoissonEvent(2.0, 1.0, 0.05, 60)]
    both = epsilon(events, 1e-5)
    reference = pld_epsilon(rows_of(events), 1e-5)
    assert both.accountant == "prv"
    assert both.epsilon == pytest.approx(reference, rel=0.01)
    assert both.epsilon > max(epsilon([event], 1e-5).epsilon for event in events)


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([PoissonEvent(1.0, 1.0, 0.01, 10)], 1e-11),  # below what the PRV grid can resolve
        ([PoissonEvent(1.0 + k / 100, 1.0, 0.01, 1) for k in range(20)], 1e-5),  # too many rows
        ([PoissonEvent(1.0, 1.0, 0.01, 10**5)], 1e-5),  # too fine a grid
        ([PoissonEvent(0.01, 1.0, 0.5, 1)], 1e-5),  # enormous losses
    ],
)
def test_falls_back_and_says_so(events, delta):
    spent = epsilon(events, delta)
    assert spent.accountant == "pld"
    assert math.isfinite(spent.epsilon)
    assert spent.epsilon == pytest.approx(pld_epsilon(rows_of(events), delta), rel=1e-12)


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([GaussianEvent(1e-200, 1.0, 1)], math.inf),
        ([GaussianEvent(1e-154, 1.0, 1)] * 3, math.inf),  # each square is finite, their sum is not
        ([GaussianEvent(1e200, 1.0, 2**53)], 0.0),
        ([PoissonEvent(1e-200, 1.0, 0.5, 3)], math.inf),
        ([PoissonEvent(1.0, 1.0, 0.01, 1), GaussianEvent(1e-200, 1.0, 1)], math.inf),
        ([PoissonEvent(1e200, 1.0, 0.5, 3)], 0.0),
        ([PoissonEvent(1.0, 1.0, 1e-12, 3)], 0.0),
    ],
)
def test_numbers_beyond_every_grid(events, found):
    assert epsilon(events, 1e-5).epsilon == found


@pytest.mark.parametrize("event", [PoissonEvent(1e-5, 1.0, 0.5, 3), PoissonEvent(1.0, 1.0, 5e-324, 3)])
def test_what_no_grid_holds_is_accounted_as_full_batch(event):
    spent = epsilon([event], 1e-5)
    full = epsilon([GaussianEvent(event.noise_multiplier, 1.0, event.steps)], 1e-5)
    assert 0 < spent.epsilon <= full.epsilon * (1 + 1e-9)


@pytest.mark.parametrize("delta", [1e-291, 5e-324])
def test_delta_below_what_floats_resolve(delta):
    assert gdp_epsilon(1.0, delta) == math.inf
    assert gdp_epsilon(0.0, delta) == 0
    assert mu_for(1.0, delta) == 0


def test_tiny_delta_is_accounted_as_full_batch():
    """Both accountants' sums are rounding noise down there."""
    spent = epsilon([PoissonEvent(1.0, 1.0, 0.01, 10)], 1e-15)
    assert spent.epsilon == pytest.approx(epsilon([GaussianEvent(1.0, 1.0, 10)], 1e-15).epsilon, rel=1e-9)
    assert spent.accountant == "gdp"


def test_falls_back_when_opacus_raises(monkeypatch):
    from opacus.accountants import PRVAccountant

    def fail(*_, **__):
        raise RuntimeError("Discrete mean differs")

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fail)
    assert epsilon([PoissonEvent(1.23, 1.0, 0.0123, 12)], 1e-5).accountant == "pld"


def test_prv_answer_that_is_no_number_is_not_believed(monkeypatch):
    from opacus.accountants import PRVAccountant

    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *_, **__: math.nan)
    assert epsilon([PoissonEvent(1.24, 1.0, 0.0124, 12)], 1e-5).accountant == "pld"
