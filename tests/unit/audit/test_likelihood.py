"""The arithmetic of the membership attack: beside a second one, and beside what a Gaussian mechanism allows."""

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from fedhead.simulations.audit.likelihood import SHADOWS, area, attack_scores, curve_points, rate_at


def drawn(seed, heads=12, units=300, mu=0.0, shared=0.0):
    """Confidences as a Gaussian mechanism gives them: usual for the unit, mu more inside, noise, and one shift a head
    that all its units share."""
    rng = np.random.default_rng(seed)
    included = rng.random((heads, units)) < 0.5
    noise = rng.standard_normal((heads, units)) + shared * rng.standard_normal((heads, 1))
    return rng.normal(0, 3, units) + mu * included + noise, included


def slowly(confidences, included):
    """The scores, one unit after another, from the definition."""
    heads, units = confidences.shape
    found = np.full((heads, units), np.nan)
    for target in range(heads):
        others = [head for head in range(heads) if head != target]
        outside = [[confidences[h, u] for h in others if not included[h, u]] for u in range(units)]
        squares = [sum((x - np.mean(values)) ** 2 for x in values) if values else 0.0 for values in outside]
        usual = sum(squares) / sum(max(len(values) - 1, 0) for values in outside)
        for u, values in enumerate(outside):
            if values:
                variance = (SHADOWS * usual + squares[u]) / (SHADOWS + len(values) - 1)
                scale = math.sqrt(variance * (1 + 1 / len(values)))
                found[target, u] = (confidences[target, u] - np.mean(values)) / scale
    return found


def test_scores_are_those_of_the_definition():
    confidences, included = drawn(1, heads=5, units=40, mu=1.0)
    included[:, 0] = [True, True, True, False, True]  # its only stranger has no shadow
    found = attack_scores(confidences, included)
    assert np.isnan(found[3, 0])
    assert np.isfinite(found[[0, 1, 2, 4], 0]).all()
    np.testing.assert_allclose(found, slowly(confidences, included), rtol=1e-9)


def with_itself(confidences, included):
    """A wrong twin: the target is among its own shadows wherever it did not see the unit."""
    outside = np.where(included, np.nan, confidences)
    return (confidences - np.nanmean(outside, 0)) / np.nanstd(outside, 0)


def test_scores_of_a_target_never_read_who_was_in_it():
    confidences, included = drawn(2, heads=20)
    turned = included.copy()
    turned[4] = ~turned[4]
    right, same = attack_scores(confidences, included)[4], attack_scores(confidences, turned)[4]
    np.testing.assert_allclose(right, same, rtol=1e-9)
    assert not np.allclose(with_itself(confidences, included)[4], with_itself(confidences, turned)[4])


def test_a_unit_without_a_confidence_is_left_out():
    confidences, included = drawn(3)
    whole = attack_scores(confidences, included)
    confidences[:, 7] = np.nan
    found = attack_scores(confidences, included)
    assert np.isnan(found[:, 7]).all()
    assert np.isfinite(np.delete(found, 7, 1)).all() == np.isfinite(np.delete(whole, 7, 1)).all()
    assert 0 < area(found, included) < 1


def test_area_and_rates_are_those_of_scikit_learn():
    confidences, included = drawn(4, mu=1.0)
    scores = attack_scores(confidences, included).round(2)  # with ties
    good = np.isfinite(scores)
    assert area(scores, included) == pytest.approx(roc_auc_score(included[good], scores[good]))
    alarms, hits, _ = roc_curve(included[good], scores[good], drop_intermediate=False)
    for fpr in (0.001, 0.01, 0.3):
        assert rate_at(scores, included, fpr).tpr == pytest.approx(hits[alarms <= fpr + 1e-12].max())
    points = curve_points(scores, included)
    pairs = set(zip(alarms.round(9), hits.round(9), strict=True))
    assert 50 < len(points) <= 200
    assert all((round(x, 9), round(y, 9)) in pairs for x, y in points)
    assert points == sorted(points)
    assert points[-1] == [1.0, 1.0]


def test_the_attack_nearly_reaches_what_a_gaussian_mechanism_allows_and_never_more():
    mu = 1.5
    confidences, included = drawn(5, heads=48, units=600, mu=mu)
    found = rate_at(attack_scores(confidences, included), included, 0.01)
    ceiling = norm.sf(norm.isf(0.01) - mu)
    assert found.low <= ceiling
    assert found.tpr > 0.8 * ceiling
    # a wrong twin: half the noise of the claim
    confidences, included = drawn(5, heads=48, units=600, mu=2 * mu)
    assert rate_at(attack_scores(confidences, included), included, 0.01).low > 1.5 * ceiling


def test_intervals_hold_the_true_rate_although_units_of_a_head_share_its_noise():
    mu, shared, fpr = 1.0, 0.7, 0.05
    wide = math.hypot(1, shared)
    truth = norm.sf((norm.isf(fpr) * wide - mu) / wide)
    held = narrow = 0
    for seed in range(200):
        rng = np.random.default_rng([6, seed])
        included = rng.random((16, 200)) < 0.5
        scores = rng.standard_normal((16, 200)) + shared * rng.standard_normal((16, 1)) + mu * included
        found = rate_at(scores, included, fpr)
        held += found.low <= truth <= found.high
        n = included.sum()
        half = 1.96 * math.sqrt(found.tpr * (1 - found.tpr) / n)  # the twin: as if all units were independent
        narrow += abs(found.tpr - truth) <= half
    assert held >= 184  # 0.95 of 200 would be 190; with 184 the true coverage may be .95 in 99 of 100 cases
    assert narrow < 170


def test_an_attack_that_finds_nobody_has_an_interval_all_the_same():
    included = np.arange(4000).reshape(4, 1000) % 2 == 0
    scores = np.where(included, -1.0, np.linspace(0, 1, 4000).reshape(4, 1000))
    found = rate_at(scores, included, 0.01)
    assert (found.tpr, found.low) == (0, 0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 2000))
    assert rate_at(-scores, included, 0.01).high == 1
