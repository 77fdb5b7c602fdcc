"""The laws behind the conformance questions, each against a second computation: exact, or proved to be above it."""

import math

import numpy as np
import pytest
from scipy import stats

from fedhead.common.privacy.audit import laws


def test_binomial_tails_agree_with_scipy():
    for trials, rate in [(5, 0.3), (60, 0.1), (100_000, 0.01), (7, 1.0), (3, 1e-9)]:
        k = np.unique(np.r_[-1 : min(trials, 50) + 2, np.arange(0, trials, 1 + trials // 500), trials, trials + 1])
        np.testing.assert_allclose(laws.at_most(k, trials, rate), stats.binom.cdf(k, trials, rate), rtol=1e-8)
        np.testing.assert_allclose(laws.at_least(k, trials, rate), stats.binom.sf(k - 1, trials, rate), rtol=1e-8)


@pytest.mark.parametrize("size", [2, 20, 5000])
def test_uniform_p_is_at_least_the_exact_one(size):
    for power in (1.0, 1.05, 1.5, 3.0):
        values = np.random.default_rng(0).random(size) ** power
        exact = stats.kstest(values, "uniform")
        distance, p_value = laws.uniform_p(values)
        assert distance == pytest.approx(exact.statistic, rel=1e-9)
        assert p_value >= exact.pvalue * (1 - 1e-6)
        if size == 5000 and 1e-12 < exact.pvalue < 0.1:
            assert p_value == pytest.approx(exact.pvalue, rel=0.1)


@pytest.mark.parametrize("length", [2, 3, 10, 50_000])
def test_cosine_p_is_that_of_student(length):
    for cosine in (0.001, 0.1, 0.9, 0.99999):
        t = cosine * math.sqrt((length - 1) / ((1 - cosine) * (1 + cosine)))
        assert laws.cosine_p(-cosine, length) == pytest.approx(2 * stats.t.sf(t, length - 1), rel=1e-8, abs=1e-290)


def test_spread_p_and_share_p_far_out():
    assert laws.spread_p(0.0, 5) == 0
    assert laws.spread_p(100.0, 50) == pytest.approx(2 * stats.chi2.sf(100, 50), rel=1e-9)
    assert laws.spread_p(1.0, 50) == pytest.approx(2 * stats.chi2.cdf(1, 50), rel=1e-9)
    assert laws.share_p(0.9, 4, 100) == pytest.approx(2 * stats.beta.sf(0.9, 2, 50), rel=1e-9)
    assert 0 < laws.spread_p(1300.0, 100) < 1e-200


def test_following_is_the_sum_of_products():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((11, 4))
    for lag in (1, 2, 3, 10):
        p_value, correlation = laws.following(rows, lag)
        assert correlation == pytest.approx(
            np.sum(rows[lag:] * rows[:-lag]) / (np.linalg.norm(rows[lag:]) * np.linalg.norm(rows[:-lag]))
        )
        odd = [t for t in range(11) if (t // lag) % 2]  # each second of its chain
        weights = np.array([rows[t - lag] + (rows[t + lag] if t + lag < 11 else 0) for t in odd])
        cosine = (rows[odd] * weights).sum() / (np.linalg.norm(rows[odd]) * np.linalg.norm(weights))
        assert p_value == pytest.approx(float(laws.cosine_p(cosine, rows[odd].size)))


@pytest.mark.parametrize(("trials", "rate", "counts"), [(4, 0.3, 5), (6, 0.5, 4), (3, 0.05, 6)])
def test_dispersion_p_is_above_the_exact_probability(trials, rate, counts):
    """All outcomes are listed; the bound must hold at each, and be exact where nothing scatters."""
    outcomes = np.stack(np.meshgrid(*[np.arange(trials + 1)] * counts, indexing="ij"), -1).reshape(-1, counts)
    mass = stats.binom.pmf(outcomes, trials, rate).prod(1)
    sums = ((outcomes - trials * rate) ** 2).sum(1)
    for number in np.random.default_rng(0).integers(len(outcomes), size=60):
        low, high = mass[sums <= sums[number] + 1e-9].sum(), mass[sums >= sums[number] - 1e-9].sum()
        assert laws.dispersion_p(outcomes[number], trials, rate) >= min(1, 2 * min(low, high)) * (1 - 1e-9)
    still = laws.dispersion_p(np.full(8, 50), 100, 0.5)
    assert still == pytest.approx(2 * stats.binom.pmf(50, 100, 0.5) ** 8, rel=1e-6)


def test_overlap_log_p_is_above_the_exact_probability():
    """Two numbers have a direction that is uniform on the circle; many follow the normal limit."""
    for share in (0.01, 0.2, 0.4, 0.49999):
        exact = 1 - 2 / math.pi * math.asin(2 * share)
        assert laws.overlap_log_p(np.array([share]), np.array([1.0]), 2)[0] >= math.log(exact)
    bound = laws.overlap_log_p(np.array([6e-3, -6e-3]), np.array([1e6, 1e6]), 10**6)
    assert bound[0] == bound[1] == pytest.approx(math.log(2) - 18, abs=0.01)
    assert laws.overlap_log_p(np.array([0.9]), np.array([1e4]), 10**4)[0] < -3000
