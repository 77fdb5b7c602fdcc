"""Trade-off curves: against their definitions, and against the best test of a sampled Gaussian step."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon_of_rows, gdp_delta
from fedhead.common.privacy.audit import curves
from fedhead.common.privacy.audit.curves import approximate_curve, claimed_curve, gaussian_curve

ALPHAS = np.concatenate([[0.0], np.logspace(-9, -1, 33), np.linspace(0.1, 1, 91)])
SAMPLED = [(1.0, 0.02, 300)]


def values(curve, alphas=ALPHAS):
    return np.array([curve(float(alpha)) for alpha in alphas])


@pytest.mark.parametrize(
    "curve",
    [gaussian_curve(1.2), approximate_curve(2.0, 1e-2), claimed_curve(SAMPLED), claimed_curve([(2.0, 1.0, 3)])],
    ids=["gaussian", "approximate", "sampled", "full-batch"],
)
def test_every_curve_is_convex_falling_symmetric_and_no_better_than_a_coin(curve):
    even = np.linspace(0, 1, 1001)
    f = values(curve, even)
    assert (np.diff(f) <= 1e-12).all()
    assert (np.diff(f, 2) >= -1e-9).all()
    assert ((f >= 0) & (f <= 1 - even + 1e-12)).all()
    inside = even[(f > 1e-6) & (f < 1 - 1e-6)]
    back = values(curve, values(curve, inside))
    assert np.allclose(back, inside, atol=1e-9)


def test_gaussian_curve_is_the_best_test_between_two_normal_laws():
    for mu in (0.1, 1.0, 4.0):
        assert np.allclose(values(gaussian_curve(mu)), norm.cdf(norm.isf(ALPHAS) - mu), atol=1e-12)


def test_gaussian_curve_is_the_largest_of_its_epsilon_delta_curves():
    mu, epsilons = 0.8, np.linspace(0, 12, 201)
    best = np.max([values(approximate_curve(float(e), gdp_delta(mu, float(e)))) for e in epsilons], axis=0)
    assert np.allclose(values(gaussian_curve(mu)), best, atol=3e-4)
    assert (best <= values(gaussian_curve(mu)) + 1e-12).all()


def test_approximate_curve_is_the_published_formula():
    e, d = 1.3, 0.01
    expected = [max(0, 1 - d - math.exp(e) * a, math.exp(-e) * (1 - d - a)) for a in ALPHAS]
    assert np.allclose(values(approximate_curve(e, d)), expected, atol=1e-12)


def test_the_ends_perfect_privacy_and_none():
    for perfect in (gaussian_curve(0.0), approximate_curve(0.0, 0.0), claimed_curve([])):
        assert np.allclose(values(perfect), 1 - ALPHAS, atol=1e-12)
    for nothing in (gaussian_curve(math.inf), approximate_curve(math.inf, 1e-5), claimed_curve([(0.0, 1.0, 1)])):
        assert (values(nothing) == 0).all()
    assert approximate_curve(5000.0, 0.0)(0.5) == pytest.approx(0.0, abs=1e-300)
    assert claimed_curve([(0.0, 0.5, 1)])(0.5) == 0


def test_full_batch_steps_are_one_gaussian():
    assert np.allclose(values(claimed_curve([(2.0, 1.0, 3), (5.0, 1.0, 7)])), values(gaussian_curve(math.sqrt(1.03))))


def sampled_step(noise, rate):
    """The convex symmetric curve of one sampled Gaussian step, from likelihood-ratio tests; at ALPHAS.

    A test of "in" against "out" can look for large values or for small ones; the lower hull of both is what may be
    claimed in both directions.
    """
    at = np.linspace(-9 / noise - 12, 9 / noise + 12, 6001)
    out = norm.sf(at)
    inside = (1 - rate) * out + rate * norm.sf(at - 1 / noise)
    points = np.concatenate([np.stack([out, 1 - inside], 1), np.stack([1 - inside, out], 1), [[0, 1], [1, 0]]])
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    hull = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return np.interp(ALPHAS, *np.array(hull).T)


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.6, 0.5), (3.0, 0.01)])
def test_claim_of_a_sampled_step_is_just_below_the_best_test(noise, rate):
    truth, claim = sampled_step(noise, rate), values(claimed_curve([(noise, rate, 1)]))
    assert (claim <= truth + 1e-6).all()
    assert (claim >= truth - 2e-4).all()
    # a claim for twice the rate lies visibly lower: the comparison above would see it
    assert (values(claimed_curve([(noise, min(1.0, 2 * rate), 1)])) < truth - 2e-4).any()


@pytest.mark.parametrize("rows", [SAMPLED, [(1.5, 0.05, 100), (4.0, 1.0, 5)]])
def test_claim_of_many_sampled_steps_has_the_epsilon_of_the_other_accountant(rows):
    spent = epsilon_of_rows(rows, 1e-5)
    assert spent.accountant == "prv"
    curve, alphas = claimed_curve(rows), np.logspace(-9, 0, 4001)
    delta = 1 - np.min(values(curve, alphas) + math.exp(spent.epsilon) * alphas)
    assert delta == pytest.approx(1e-5, rel=0.1)


def test_sampling_only_helps_and_its_claim_lies_above_that_of_full_batches():
    assert (values(claimed_curve(SAMPLED)) >= values(gaussian_curve(math.sqrt(300))) - 1e-9).all()


def test_corners_hold_the_largest_of_all_lines_also_where_some_lines_never_count():
    rng = np.random.default_rng(3)
    for _ in range(20):
        epsilons = np.sort(rng.uniform(0, 6, 40))
        deltas = rng.uniform(0, 1, 40) ** 3
        corners, costs = curves._envelope(epsilons, deltas)
        power = np.concatenate([np.linspace(0, 1, 501), np.logspace(-9, 0, 100)])
        lines = [curves.approximate_cost(power, e, d) for e, d in zip(epsilons, deltas, strict=True)]
        assert np.allclose(np.interp(power, corners, costs), np.max(lines, axis=0), atol=1e-12)


def test_losses_beyond_every_grid_fall_back_to_the_gaussian_claim():
    rows = [(1e-3, 0.5, 50)]
    assert np.array_equal(values(claimed_curve(rows)), values(gaussian_curve(math.sqrt(50) * 1e3)))


def test_a_claim_is_composed_once():
    assert claimed_curve(SAMPLED) is claimed_curve(tuple(SAMPLED))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gaussian_curve(-0.1), "mu is -0.1"),
        (lambda: gaussian_curve(math.nan), "mu is nan"),
        (lambda: approximate_curve(-1.0, 0.0), "epsilon is -1.0"),
        (lambda: approximate_curve(1.0, 1.0), "delta is 1.0"),
        (lambda: approximate_curve(1.0, math.nan), "delta is nan"),
        (lambda: gaussian_curve(1.0)(1.5), "alpha is 1.5"),
        (lambda: gaussian_curve(1.0)(math.nan), "alpha is nan"),
        (lambda: claimed_curve([(-1.0, 1.0, 1)]), "rows has"),
        (lambda: claimed_curve([(1.0, 0.0, 1)]), "rows has"),
        (lambda: claimed_curve([(1.0, 1.5, 1)]), "rows has"),
        (lambda: claimed_curve([(1.0, 1.0, 0)]), "rows has"),
    ],
)
def test_bad_input_is_named_in_one_line(call, says):
    with pytest.raises(InputError, match=says) as fault:
        call()
    assert "\n" not in str(fault.value)
