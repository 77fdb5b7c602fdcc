"""Conformance questions: each planted fault is found, and named in plain words.

Faults are planted in arrays of random numbers here; the audit's own tests plant them in the training path.
"""

import math
import time

import numpy as np
import pytest

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.conformance import residual_questions, retry_question
from fedhead.common.privacy.audit.findings import judge

T, P, ROUND = 60, 770, 5
GROUPS = {"weight": slice(0, 760), "bias": slice(760, 770)}
FALSE_ALARMS = 0.01
SEEDS = range(20)


def fresh(rng):
    return rng.standard_normal((T, P))


def without(columns):
    def mutant(rng):
        z = fresh(rng)
        z[:, columns(rng)] = 0
        return z

    return mutant


def copied(rows_to, rows_from, to=slice(None), source=slice(None), sign=1):
    def mutant(rng):
        z = fresh(rng)
        z[rows_to, to] = sign * z[rows_from, source]
        return z

    return mutant


def changed(change):
    def mutant(rng):
        z = fresh(rng)
        change(z, rng)
        return z

    return mutant


def some(rng):
    return rng.permutation(P)[: P // 20]


def shifted(rng):
    stream = rng.standard_normal(T * 400 + P)
    return np.stack([stream[400 * t : 400 * t + P] for t in range(T)])


def confined(rng):
    return np.repeat(rng.standard_normal((T, P // 2)), 2, axis=1)[:, rng.permutation(P)]


def scale(z, part, factor):
    z[part] *= factor


RESIDUAL_MUTANTS = {
    "no noise": (lambda rng: np.zeros((T, P)), "total-variance", "No noise was added, or next to none"),
    "rounding errors instead of noise": (lambda rng: 1e-7 * fresh(rng), "total-variance", "No noise was added"),
    "noise halved": (lambda rng: fresh(rng) / 2, "total-variance", "Less noise was added than the claim says"),
    "noise 5 % too small": (lambda rng: 0.95 * fresh(rng), "total-variance", "Less noise was added than the claim"),
    "clip of 1.5": (lambda rng: 1.5 * fresh(rng), "total-variance", "records that were not clipped as claimed"),
    "missing on the bias": (without(lambda rng: GROUPS["bias"]), "group-variance", 'No noise was added to "bias"'),
    "missing on the bias once": (
        changed(lambda z, rng: scale(z, np.s_[17, 760:], 0)),
        "group-variance",
        'No noise was added to "bias" in step 18',
    ),
    "missing on 5 %": (without(some), "coordinate-variance", "on 38 of 770 trained numbers. No noise was added"),
    "halved on 5 %": (
        changed(lambda z, rng: scale(z, np.s_[:, some(rng)], 0.5)),
        "coordinate-variance",
        "of 770 trained numbers. Less noise was added",
    ),
    "halved in a round's last step": (
        changed(lambda z, rng: scale(z, np.s_[4::5], 0.5)),
        "step-variance",
        "Less noise was added in step",
    ),
    "same noise every step": (
        lambda rng: np.tile(fresh(rng)[:1], (T, 1)),
        "step-correlation",
        "noise of consecutive steps is related (correlation +1.00)",
    ),
    "same noise every round": (
        lambda rng: np.tile(fresh(rng)[:ROUND], (T // ROUND, 1)),
        "round-correlation",
        "comes back at the same step of the next round (correlation +1.00)",
    ),
    "used again once": (copied(47, 3), "repeated-steps", "that of step 4 came back in step 48."),
    "used again on the bias": (
        copied(47, 3, GROUPS["bias"], GROUPS["bias"]),
        "repeated-steps",
        'that of step 4 came back in step 48 in "bias"',
    ),
    "every second step cancels": (copied(np.s_[1::2], np.s_[::2], sign=-1), "coordinate-mean", "steps cancels out"),
    "one number for all": (
        lambda rng: np.repeat(fresh(rng)[:, :1], P, axis=1),
        "shared-noise",
        "Trained numbers share noise (correlation of neighbours +1.00)",
    ),
    "sums to zero": (
        changed(lambda z, rng: np.subtract(z, z.mean(1, keepdims=True), out=z)),
        "shared-noise",
        "adds up to nearly nothing",
    ),
    "two numbers share theirs": (
        changed(lambda z, rng: z.__setitem__(np.s_[:, 517], z[:, 18])),
        "repeated-numbers",
        "Two trained numbers are given related noise in every step (correlation +1.00)",
    ),
    "stream starts again for the bias": (
        copied(np.s_[:], np.s_[:], GROUPS["bias"], slice(0, 10)),
        "group-correlation",
        '"weight" and "bias" were given the same noise',
    ),
    "counter moves on too little": (
        shifted,
        "stream-overlap",
        "come back 400 numbers later|come back 370 numbers later",
    ),
    "half the directions": (confined, "directions", "lies in fewer directions"),
    "uniform noise": (
        lambda rng: rng.uniform(-math.sqrt(3), math.sqrt(3), (T, P)),
        "normality",
        "isn't normally distributed",
    ),
    "Laplace noise": (lambda rng: rng.laplace(size=(T, P)) / math.sqrt(2), "normality", "isn't normally distributed"),
    "cut off at 3": (lambda rng: np.clip(fresh(rng), -3, 3), "tails", "cut off"),
    "a record shines through": (changed(lambda z, rng: z[12].__setitem__(55, 9.0)), "tails", "shine through"),
    "gaps of 1 %": (
        changed(lambda z, rng: z.__setitem__(rng.random(z.shape) < 0.01, 0)),
        "near-zero",
        "Noise is missing in places",
    ),
    "not centred": (lambda rng: fresh(rng) + 0.05, "mean", "doesn't have mean zero"),
}


@pytest.mark.parametrize("mutant", RESIDUAL_MUTANTS)
def test_a_fault_of_the_noise_is_found_and_named(mutant):
    make, name, words = RESIDUAL_MUTANTS[mutant]
    for seed in SEEDS:
        checks = judge(
            residual_questions(make(np.random.default_rng(seed)), GROUPS, steps_per_round=ROUND), FALSE_ALARMS
        )
        (check,) = (check for check in checks if check.name == name)
        assert not check.passed, seed
        assert any(part in check.meaning for part in words.split("|")), check.meaning


def test_right_noise_passes_and_says_so():
    for seed in SEEDS:
        questions = residual_questions(fresh(np.random.default_rng(seed)), GROUPS, steps_per_round=ROUND)
        checks = judge(questions, FALSE_ALARMS)
        assert all(check.passed for check in checks)
        assert [check.meaning for check in checks] == [question.good for question in questions]


def test_a_wrong_size_alone_is_not_taken_for_noise_that_is_used_again():
    about_size = {"total-variance", "group-variance", "coordinate-variance", "step-variance"}
    about_size |= {"normality", "tails", "near-zero"}  # of noise of the claimed size
    for factor in (0.01, 0.5, 3.0):
        questions = residual_questions(factor * fresh(np.random.default_rng(1)), GROUPS, steps_per_round=ROUND)
        assert {check.name for check in judge(questions, FALSE_ALARMS) if not check.passed} <= about_size


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_what_is_no_number_fails_every_question(value):
    z = fresh(np.random.default_rng(0))
    right = residual_questions(z, GROUPS, steps_per_round=ROUND)
    z[3, 5] = value
    questions = residual_questions(z, GROUPS, steps_per_round=ROUND)
    assert [question.name for question in questions] == [question.name for question in right]
    assert all(question.p_value == 0 and "1 of 46200 values are infinite" in question.bad for question in questions)


def test_a_single_step_without_noise_on_some_numbers():
    for seed in SEEDS:
        z = np.random.default_rng(seed).standard_normal((1, P))
        right = residual_questions(z, GROUPS, steps_per_round=1)
        assert "step-correlation" not in {question.name for question in right}
        z[0, :38] = 0
        failed = {c.name for c in judge(residual_questions(z, GROUPS, steps_per_round=1), FALSE_ALARMS) if not c.passed}
        assert {"coordinate-variance", "near-zero"} <= failed


@pytest.mark.parametrize(
    ("steps", "where"), [(301, (7, 291)), (700, (12, 600)), (700, (510, 513))], ids=["300", "700", "block"]
)
def test_repeats_are_found_among_many_steps_too(steps, where):
    z = np.random.default_rng(0).standard_normal((steps, 800))
    z[where[1]] = z[where[0]]
    checks = judge(residual_questions(z, {}, steps_per_round=ROUND), FALSE_ALARMS)
    (check,) = (check for check in checks if check.name == "repeated-steps")
    assert f"step {where[0] + 1} came back in step {where[1] + 1}" in check.meaning


def test_large_audits_are_fast():
    z = np.random.default_rng(0).standard_normal((60, 13_000))
    start = time.process_time()
    residual_questions(z, {"weight": slice(0, 12_990), "bias": slice(12_990, 13_000)}, steps_per_round=ROUND)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("shape", "groups", "per_round", "words"),
    [
        ((3,), {}, 1, "residuals.shape"),
        ((0, 5), {}, 1, "residuals.shape"),
        ((5, 1), {}, 1, "residuals.shape"),
        ((5, 4), {}, 0, "steps_per_round is 0"),
        ((5, 4), {"bias": slice(2, 5)}, 1, "groups.bias"),
        ((5, 4), {"bias": slice(2, 2)}, 1, "groups.bias"),
    ],
)
def test_residuals_that_make_no_sense_are_refused(shape, groups, per_round, words):
    with pytest.raises(InputError, match=words):
        residual_questions(np.ones(shape), groups, steps_per_round=per_round)


def test_noise_of_a_retried_round():
    for seed in SEEDS:
        first, second = np.random.default_rng(seed).standard_normal((2, P))
        partly = second.copy()
        partly[GROUPS["bias"]] = first[GROUPS["bias"]] + 1e-6
        assert judge([retry_question(first, second)], FALSE_ALARMS)[0].passed
        assert retry_question(first, first.copy()).p_value == 0
        for again in (first, first + 1e-6, 0.5 * first + 0.01 * second, -first, partly):
            (check,) = judge([retry_question(first, again)], FALSE_ALARMS)
            assert not check.passed
            assert "with the same noise" in check.meaning
    second[0] = np.nan
    assert retry_question(first, second).p_value == 0
    assert retry_question(np.zeros(P), np.zeros(P)).p_value == 0
    with pytest.raises(InputError, match="second"):
        retry_question(first, second[1:])
