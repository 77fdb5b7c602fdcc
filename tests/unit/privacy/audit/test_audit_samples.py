"""Questions about samples: each fault of the sampling is found, and named in plain words."""

import math

import numpy as np
import pytest

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.conformance import sample_questions
from fedhead.common.privacy.audit.findings import judge

T, RECORDS, RATE = 60, 1000, 0.1
FALSE_ALARMS = 0.01
SEEDS = range(20)


def poisson(rng, rate=RATE):
    return [np.flatnonzero(rng.random(RECORDS) < rate) for _ in range(T)]


def shuffled(rng):
    size = int(RECORDS * RATE)
    epochs = [rng.permutation(RECORDS).reshape(-1, size) for _ in range(T * size // RECORDS)]
    return list(np.concatenate(epochs))


def fixed_size(rng):
    return [rng.choice(RECORDS, int(RECORDS * RATE), replace=False) for _ in range(T)]


def blocks(rng):
    return [np.flatnonzero(np.repeat(rng.random(RECORDS // 10) < RATE, 10)) for _ in range(T)]


def again(rng):
    found = poisson(rng)
    found[40] = found[2]
    return found


def favoured(rng):
    return [np.union1d(step, [77]) for step in poisson(rng)]


def twice(rng):
    found = poisson(rng)
    found[5] = np.append(found[5], found[5][0])
    return found


def unequal(rng):
    rates = RATE * np.where(np.arange(RECORDS) % 2, 1.3, 0.7)
    return [np.flatnonzero(rng.random(RECORDS) < rates) for _ in range(T)]


SAMPLE_MUTANTS = {
    "rate doubled": (lambda rng: poisson(rng, 2 * RATE), "batch-mean", "more often than the claim says"),
    "rate halved": (lambda rng: poisson(rng, RATE / 2), "batch-mean", "less often than the claim says"),
    "shuffled, size": (shuffled, "batch-variance", "batches of a fixed size were used"),
    "shuffled, turns": (shuffled, "participation", "as in shuffled batches"),
    "shuffled, overlap": (shuffled, "batch-overlap", "fewer records than chance"),
    "random subsets of one size": (fixed_size, "batch-variance", "batches of a fixed size were used"),
    "blocks": (blocks, "neighbouring-records", "drawn together beyond chance"),
    "blocks, size": (blocks, "batch-variance", "varies more than"),
    "same sample twice": (again, "repeated-batch", "Steps 3 and 41 share"),
    "same sample always": (lambda rng: poisson(rng)[:1] * T, "batch-overlap", "more records than chance"),
    "one record always": (favoured, "participation", "far more or far less often"),
    "unequal rates": (unequal, "participation", "more often than others"),
    "a record twice in a step": (twice, "sample-repeats", "more than once in one step (1 times)"),
}


@pytest.mark.parametrize("mutant", SAMPLE_MUTANTS)
def test_a_fault_of_the_samples_is_found_and_named(mutant):
    make, name, words = SAMPLE_MUTANTS[mutant]
    for seed in SEEDS:
        checks = judge(sample_questions(make(np.random.default_rng(seed)), RECORDS, RATE), FALSE_ALARMS)
        (check,) = (check for check in checks if check.name == name)
        assert not check.passed, seed
        assert words in check.meaning, check.meaning


def test_right_samples_pass_in_any_order():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        found = poisson(rng)
        questions = sample_questions(found, RECORDS, RATE)
        assert all(check.passed for check in judge(questions, FALSE_ALARMS))
        assert sample_questions([rng.permutation(step) for step in found], RECORDS, RATE) == questions


def test_with_rate_one_every_record_is_in_every_step():
    whole = [np.arange(50)] * 3
    assert all(check.passed for check in judge(sample_questions(whole, 50, 1.0), FALSE_ALARMS))
    whole[1] = np.arange(49)
    failed = [check.name for check in judge(sample_questions(whole, 50, 1.0), FALSE_ALARMS) if not check.passed]
    assert failed == ["batch-mean"]


@pytest.mark.parametrize("rate", [0.001, 0.5])
def test_samples_may_be_empty_or_few(rate):
    for sampled in ([np.array([], dtype=np.int64)], [np.array([0])], [np.array([], dtype=np.int64)] * 4):
        for records in (1, 2, 3):
            found = sample_questions(sampled, records, rate)
            assert all(0 <= question.p_value <= 1 for question in found)


@pytest.mark.parametrize(
    ("sampled", "records", "rate", "words"),
    [
        ([], 5, 0.1, "sampled is empty"),
        ([np.array([0])], 0, 0.1, "records is 0"),
        ([np.array([0])], 5, 0.0, "rate is 0.0"),
        ([np.array([0])], 5, 1.5, "rate is 1.5"),
        ([np.array([0])], 5, math.nan, "rate is nan"),
        ([np.array([5])], 5, 0.1, r"sampled\[0\]"),
        ([np.array([0]), np.array([-1])], 5, 0.1, r"sampled\[1\]"),
    ],
)
def test_samples_that_make_no_sense_are_refused(sampled, records, rate, words):
    with pytest.raises(InputError, match=words):
        sample_questions(sampled, records, rate)
