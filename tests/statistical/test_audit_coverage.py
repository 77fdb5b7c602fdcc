"""The audit's promises, by simulation: bounds cover, p-values are valid, a fault is seen; wrong twins are rejected.

Mechanisms are simulated where they leak exactly as much as they claim. Seeds are fixed: no test fails by chance.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from fedhead.common.privacy.audit.bounds import Attack, clopper_pearson, f_dp, guess_count, one_run
from fedhead.common.privacy.audit.curves import approximate_curve, gaussian_curve
from fedhead.common.privacy.gaussian import gdp_epsilon, mu_for

SEEDS = 2000
CANARIES = 120
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def gaussian(mu: float) -> Draw:
    """Each canary adds 1 in its own coordinate, beside noise of standard deviation 1 / mu."""

    def draw(rng, canaries):
        included = rng.random(canaries) < 0.5
        return included * mu + rng.normal(size=canaries), included

    return draw


def response(epsilon: float, delta: float) -> Draw:
    """Randomized response that tells the truth in the open with probability delta: (epsilon, delta)-DP, no better."""

    def draw(rng, canaries):
        included = rng.random(canaries) < 0.5
        honest = rng.random(canaries) < 1 / (1 + math.exp(-epsilon))
        scores = np.where(honest == included, 1.0, -1.0) * (1 + rng.random(canaries) / 2)
        return np.where(rng.random(canaries) < delta, np.where(included, 3.0, -3.0), scores), included

    return draw


def all_or_nothing(epsilon: float, delta: float) -> Draw:
    """Randomized response that gives every canary away at once with probability delta: (epsilon, delta)-DP too."""

    def draw(rng, canaries):
        return response(epsilon, 1.0 if rng.random() < delta else 0.0)(rng, canaries)

    return draw


WORST = (response, all_or_nothing)


def observed(draw: Draw, test, seeds=SEEDS, canaries=CANARIES):
    """Bounds and p-values of the test; shape (seeds,) each.

    What the one-run tests find hangs on the number of right guesses alone, which is counted here anew: the same number
    is not looked up twice.
    """
    known, bounds, p_values = {}, np.empty(seeds), np.empty(seeds)
    for seed in range(seeds):
        scores, included = draw(np.random.default_rng([17, seed]), canaries)
        ends, order = guess_count(canaries), np.argsort(scores, kind="stable")
        key = int(included[order[-ends:]].sum() + (~included[order[:ends]]).sum())
        found = known.get(key) or test(scores, included)
        if found.name != "clopper-pearson":
            assert found.right == key
            known[key] = found
        bounds[seed], p_values[seed] = found.epsilon, found.claim_p_value
    return bounds, p_values


def too_many(share: float, promised: float, seeds=SEEDS) -> bool:
    """Whether so many of the seeds are more than chance allows, 1 in 1,000."""
    return bool(binom.sf(round(share * seeds) - 1, seeds, promised) < 1e-3)


def audits_of(claim, claimed, delta, family):
    return {
        "one-run": lambda s, i: one_run(Attack(s, i, delta), claimed=claimed),
        "f-dp": lambda s, i: f_dp(Attack(s, i, delta), claim=claim, gaussian=family),
        "clopper-pearson": lambda s, i: clopper_pearson(Attack(s, i, delta), claim=claim, gaussian=family),
    }


def gaussian_audits(epsilon, delta=1e-5):
    claim = gaussian_curve(mu_for(epsilon, delta))
    return audits_of(claim, (epsilon, delta), delta, True), audits_of(claim, (epsilon, delta), delta, False)


@pytest.mark.parametrize(
    ("name", "epsilon"), [("one-run", 0.3), ("one-run", 3.0), ("f-dp", 0.3), ("f-dp", 3.0), ("clopper-pearson", 3.0)]
)
def test_gaussian_at_its_claim(name, epsilon):
    tight, free = gaussian_audits(epsilon)
    mu = mu_for(epsilon, 1e-5)
    bounds, p_values = observed(gaussian(mu), tight[name])
    for level in (0.001, 0.01, 0.05, 0.2):
        assert not too_many((p_values <= level).mean(), level)
    assert not too_many((bounds > epsilon).mean(), 0.05)
    assert not too_many((observed(gaussian(mu), free[name], seeds=300)[0] > epsilon).mean(), 0.05, seeds=300)
    for audit in (tight[name], free[name]):  # with a twelfth of the noise
        bounds, p_values = observed(gaussian(12 * mu), audit, seeds=100, canaries=400)
        assert too_many((bounds > epsilon).mean(), 0.05, seeds=100)
        assert too_many((p_values <= 0.05).mean(), 0.05, seeds=100)


RESPONSES = [(1.0, 0.0), (1.0, 5e-4), (2.5, 2e-4)]


@pytest.mark.parametrize(
    ("name", "mechanism", "epsilon", "delta"),
    [(name, mechanism, *claim) for name in ("one-run", "f-dp") for mechanism in WORST for claim in RESPONSES]
    + [("clopper-pearson", response, 1.0, 5e-4)],  # which takes for granted that canaries are given away one by one
)
def test_randomized_response_at_its_claim(name, mechanism, epsilon, delta):
    audit = audits_of(approximate_curve(epsilon, delta), (epsilon, delta), max(delta, 1e-12), False)[name]
    bounds, p_values = observed(mechanism(epsilon, delta), audit)
    for level in (0.001, 0.01, 0.05, 0.2):
        assert not too_many((p_values <= level).mean(), level)
    assert not too_many((bounds > epsilon).mean(), 0.05)
    bounds, p_values = observed(mechanism(12.0, delta), audit, seeds=100, canaries=400)
    assert too_many((bounds > epsilon).mean(), 0.05, seeds=100)
    assert too_many((p_values <= 0.05).mean(), 0.05, seeds=100)


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 0.02), (0.0, 0.1)])
@pytest.mark.parametrize("name", ["one-run", "f-dp"])
def test_large_deltas_at_their_claim(name, epsilon, delta):
    audit = audits_of(approximate_curve(epsilon, delta), (epsilon, delta), delta, False)[name]
    for mechanism in WORST:
        bounds, p_values = observed(mechanism(epsilon, delta), audit, canaries=30)
        assert not too_many((bounds > epsilon).mean(), 0.05)
        assert not any(too_many((p_values <= level).mean(), level) for level in (0.01, 0.05, 0.2))
    if name == "f-dp":  # a mechanism that gives away five times as much, and a claim of no delta
        forgets = audits_of(approximate_curve(epsilon, 0.0), (epsilon, 0.0), delta, False)[name]
        assert too_many((observed(response(epsilon, 5 * delta), forgets)[1] <= 0.2).mean(), 0.2)


def test_one_run_spends_nearly_all_of_its_level_where_the_theorem_is_exact():
    # a test that never rejects would be valid as well
    p_values = observed(response(1.0, 0.0), audits_of(None, (1.0, 0.0), 1e-12, False)["one-run"])[1]
    assert 0.1 < (p_values <= 0.2).mean() <= 0.2


def test_ties_broken_by_the_coins_would_be_caught():
    def blind(rng, canaries):
        included = rng.random(canaries) < 0.5
        return np.zeros(canaries), included

    def peeking(rng, canaries):
        scores, included = blind(rng, canaries)
        return scores + 1e-9 * included, included

    for test in gaussian_audits(0.5)[0].values():
        assert not too_many((observed(blind, test, seeds=400)[1] <= 0.01).mean(), 0.01, seeds=400)
        assert too_many((observed(peeking, test, seeds=400)[1] <= 0.01).mean(), 0.01, seeds=400)


def test_halved_noise_is_refuted_at_four_thousand_canaries():
    mu, seeds, level = mu_for(5.0, 1e-5), 30, 0.01 / 3
    tight = gaussian_audits(5.0)[0]
    refuted = {
        (name, factor): sum(
            test(*gaussian(factor * mu)(np.random.default_rng([3, seed]), 4000)).claim_p_value <= level
            for seed in range(seeds)
        )
        for name, test in tight.items()
        for factor in (1, 2)
    }
    assert refuted["f-dp", 2] >= 28
    assert refuted["clopper-pearson", 2] == seeds
    assert all(refuted[name, 1] == 0 for name in tight)
    # an attacker whose scores say nothing finds nothing, although the noise is halved
    for test in tight.values():
        scores, _ = gaussian(2 * mu)(np.random.default_rng(1), 4000)
        _, unrelated = gaussian(2 * mu)(np.random.default_rng(2), 4000)
        blind = test(scores, unrelated)
        assert blind.claim_p_value > 0.01
        assert blind.epsilon < 1


def test_bounds_without_a_fault_are_as_tight_as_documented():
    # epsilon 5.0 at 4,000 canaries: one-run about 1.8, f-DP about 2.8, Clopper-Pearson about 4
    mu = mu_for(5.0, 1e-5)
    assert gdp_epsilon(mu, 1e-5) == pytest.approx(5.0, rel=1e-4)
    means = {
        name: np.mean([test(*gaussian(mu)(np.random.default_rng([9, seed]), 4000)).epsilon for seed in range(20)])
        for name, test in gaussian_audits(5.0)[0].items()
    }
    assert 1.6 < means["one-run"] < means["f-dp"] < means["clopper-pearson"] < 5.0
    assert means["f-dp"] > 2.6
    assert means["clopper-pearson"] > 3.8
