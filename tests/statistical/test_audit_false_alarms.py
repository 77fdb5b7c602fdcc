"""Conformance questions keep their false-alarm rate: 2,000 seeds of a mechanism that does what it says, a shape.

A p-value is valid if it is at most t with probability at most t. Each frequency is held against the binomial limit that
2,000 valid p-values pass with probability 1 - REJECT. The wrong twins are a little off, so that p-values pile up near
zero: the same comparison must reject them.
"""

import functools

import numpy as np
import pytest
from scipy import stats

from fedhead.common.privacy.audit import laws
from fedhead.common.privacy.audit.conformance import residual_questions, retry_question, sample_questions
from fedhead.common.privacy.audit.findings import judge

SEEDS, REJECT, FALSE_ALARMS = 2000, 1e-5, 0.01
LEVELS = (0.01, 0.05, 0.2)


def too_often(found, level, seeds=SEEDS):
    """Whether `found` of the seeds are more than what has probability `level` can give."""
    return stats.binom.sf(found - 1, seeds, level) < REJECT


def invalid(ask, seeds=SEEDS):
    """Names of questions whose p-values are small too often; "judge" if the verdicts together are."""
    p_values, alarms = {}, 0
    for seed in range(seeds):
        questions = ask(np.random.default_rng(seed))
        alarms += not all(check.passed for check in judge(questions, FALSE_ALARMS))
        for question in questions:
            p_values.setdefault(question.name, []).append(question.p_value)
    assert all(len(found) == seeds for found in p_values.values())  # the same questions whatever the seed
    wrong = {
        name
        for name, found in p_values.items()
        for level in LEVELS
        if too_often(int((np.array(found) <= level).sum()), level, seeds)
    }
    return wrong | ({"judge"} if too_often(alarms, FALSE_ALARMS, seeds) else set())


def noise(rng, steps, size, deviation=1.0):
    bias = max(1, size // 77)
    groups = {"weight": slice(0, size - bias), "bias": slice(size - bias, size)}
    return residual_questions(deviation * rng.standard_normal((steps, size)), groups, steps_per_round=3)


def samples(rng, steps, records, rate, drawn=None):
    drawn = rate if drawn is None else drawn
    return sample_questions([np.flatnonzero(rng.random(records) < drawn) for _ in range(steps)], records, rate)


def retry(rng, size, correlation=0.0):
    first, second = rng.standard_normal((2, size))
    return [retry_question(first, correlation * first + np.sqrt(1 - correlation**2) * second)]


@pytest.mark.parametrize(("steps", "size"), [(1, 50), (5, 770)])
def test_right_noise(steps, size):
    assert not invalid(functools.partial(noise, steps=steps, size=size))


@pytest.mark.parametrize(("steps", "size"), [(1, 2), (3, 5), (8, 2), (40, 12)])
def test_right_noise_of_odd_shapes(steps, size):
    assert not invalid(functools.partial(noise, steps=steps, size=size), seeds=500)


@pytest.mark.slow
def test_right_noise_of_many_steps():
    assert not invalid(functools.partial(noise, steps=60, size=770), seeds=500)


def test_wrong_twin_of_the_noise():
    found = invalid(functools.partial(noise, steps=5, size=770, deviation=0.98), seeds=300)
    assert {"total-variance", "normality", "judge"} <= found


@pytest.mark.parametrize(
    ("steps", "records", "rate", "seeds"),
    [(12, 300, 0.1, SEEDS), (5, 40, 0.3, 500), (12, 300, 0.02, 500), (2, 3, 0.5, 500)],
)
def test_right_samples(steps, records, rate, seeds):
    assert not invalid(functools.partial(samples, steps=steps, records=records, rate=rate), seeds)


def test_wrong_twin_of_the_samples():
    assert {"batch-mean", "judge"} <= invalid(
        functools.partial(samples, steps=12, records=300, rate=0.1, drawn=0.12), 300
    )


@pytest.mark.parametrize("size", [2, 50, 770])
def test_right_retries(size):
    assert not invalid(functools.partial(retry, size=size))


def test_wrong_twin_of_the_retries():
    assert {"retry", "judge"} <= invalid(functools.partial(retry, size=770, correlation=0.1), 300)


@pytest.mark.parametrize(
    ("counts", "trials", "rate"), [(5, 200, 0.1), (60, 3, 0.4), (2000, 20, 0.05), (60, 10_000, 0.01)]
)
def test_dispersion(counts, trials, rate):
    def small(scatter):
        """Frequency of each level, of counts that vary by `scatter` times as much as binomial ones."""
        rng = np.random.default_rng(0)
        mean = trials * rate
        found = [
            laws.dispersion_p(np.rint(mean + scatter * (rng.binomial(trials, rate, counts) - mean)), trials, rate)
            for _ in range(SEEDS // 2)
        ]
        return [int((np.array(found) <= level).sum()) for level in LEVELS]

    assert not any(too_often(found, level, SEEDS // 2) for found, level in zip(small(1.0), LEVELS, strict=True))
    assert all(too_often(found, level, SEEDS // 2) for found, level in zip(small(2.5), LEVELS, strict=True))
