"""Whether released noise and drawn samples are what the mechanism says: questions with valid p-values.

    residual_questions   is a release minus the clean clipped sum exactly the noise that was claimed?
    sample_questions     is each record in each step with the claimed probability, by itself? (samples.py)
    retry_question       is the noise of a round that is asked again drawn anew?

A lower bound on epsilon alone is weak: noise that is missing on a twentieth of the model, or used again in each step,
moves it hardly at all. These questions find both with certainty, because whoever runs the audit knows the clean sum.
Guarantee: of a mechanism that does what it says, `findings.judge` of all questions at level a raises a false alarm with
probability at most a, however few the steps or the trained numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit import dependence, values
from fedhead.common.privacy.audit.findings import Question
from fedhead.common.privacy.audit.laws import FloatArray, IntArray, at_least, cosine, cosine_p
from fedhead.common.privacy.audit.samples import sample_questions

__all__ = ["FloatArray", "IntArray", "residual_questions", "retry_question", "sample_questions"]

_LARGEST: Final = 1e100  # beyond, squares may overflow; no noise reaches it
_CLOSE: Final = 1e-3  # two residuals this close count as equal
_EQUAL_RATE: Final = math.erf(_CLOSE / 2)  # by chance


def residual_questions(residuals: FloatArray, groups: Mapping[str, slice], *, steps_per_round: int) -> list[Question]:
    """Ask whether residuals are independent standard normal numbers, as the claim says.

    Parameters
    ----------
    residuals : array of float, shape (T, P)
        (release - clean clipped sum - included canaries' part) / (noise multiplier * clipping norm * widening), steps
        in the order of the run.
    groups : mapping from name to slice
        Which of the P numbers belong together: weight, bias.
    steps_per_round : int, >= 1

    Returns
    -------
    list of Question
        The same names for the same shape. Each p-value is valid if the residuals are iid N(0, 1). Where residuals are
        NaN, infinite or beyond 1e100, every question has p-value 0 and says so.

    Raises
    ------
    InputError
        Not two-dimensional, no step or fewer than 2 numbers; a group that is empty or goes beyond the P numbers;
        steps_per_round below 1.
    """
    found = np.asarray(residuals, dtype=np.float64)
    _check(found, groups, steps_per_round)
    broken = ~(np.abs(found) <= _LARGEST)
    clean = np.where(broken, 0.0, found) if broken.any() else found
    asked = [
        values.total_variance(clean),
        values.group_variance(clean, groups) if groups else None,
        values.coordinate_variance(clean),
        values.step_variance(clean),
        values.mean(clean),
        values.coordinate_mean(clean),
        values.normality(clean),
        values.tails(clean),
        values.near_zero(clean),
        dependence.step_correlation(clean),
        dependence.round_correlation(clean, steps_per_round),
        dependence.repeated_steps(clean, groups),
        dependence.directions(clean),
        dependence.shared_noise(clean),
        dependence.repeated_numbers(clean),
        dependence.group_correlation(clean, groups),
        dependence.stream_overlap(clean),
    ]
    questions = [question for question in asked if question is not None]
    return (
        [_unusable(question, int(broken.sum()), broken.size) for question in questions] if broken.any() else questions
    )


def _check(residuals: FloatArray, groups: Mapping[str, slice], steps_per_round: int) -> None:
    if residuals.ndim != 2 or not residuals.size or residuals.shape[1] < 2:
        raise InputError(
            f"residuals.shape is {residuals.shape}: it must be (steps, numbers), with at least 1 step and 2 numbers. "
            "Pass one row a step."
        )
    if steps_per_round < 1:
        raise InputError(f"steps_per_round is {steps_per_round}: it must be at least 1. Give the steps of one round.")
    for name, part in groups.items():
        stop = residuals.shape[1] if part.stop is None else part.stop
        if not 0 <= (part.start or 0) < stop <= residuals.shape[1] or part.step not in (None, 1):
            raise InputError(
                f"groups.{name} is {part}: it must be a part of the {residuals.shape[1]} trained numbers. "
                "Give a slice with a start below its stop."
            )


def _unusable(question: Question, broken: int, size: int) -> Question:
    """The same question, failed, of residuals that aren't all usable numbers."""
    return replace(
        question,
        p_value=0.0,
        figure=f"{broken} of {size} values are no usable numbers",
        bad=f"What was released can't be judged: {broken} of {size} values are infinite, too large or not a number. A "
        "single record can cause that, so that whoever sees it learns that the record took part.",
    )


def retry_question(first: FloatArray, second: FloatArray) -> Question:
    """Ask whether the residuals of a round that was asked twice are independent.

    Parameters
    ----------
    first, second : array of float, same shape, at least 2 numbers
        Residuals of both answers, as in `residual_questions`.

    Returns
    -------
    Question
        Of the cosine between both (exact) and of the number of places where they are closer than 1e-3 (exact,
        binomial), which finds noise that was used again in a few places only; corrected for two. p-value 0 where both
        are equal or hold NaN or infinities.

    Raises
    ------
    InputError
        Different shapes, or fewer than 2 numbers.
    """
    one, other = np.ravel(first).astype(np.float64), np.ravel(second).astype(np.float64)
    if one.size != other.size or one.size < 2:
        raise InputError(
            f"second.size is {other.size}: it must be that of first, {one.size}, and at least 2. "
            "Pass both residuals of one round."
        )
    question = Question(
        "retry",
        "Noise of a round that was asked twice",
        "",
        1.0,
        "A round that is asked again is answered with noise of its own.",
        "",
    )
    broken = ~(np.abs(one) <= _LARGEST) | ~(np.abs(other) <= _LARGEST)
    if broken.any():
        return _unusable(question, int(broken.sum()), one.size)
    alike = cosine(float(np.vdot(one, other)), float(np.vdot(one, one)), float(np.vdot(other, other)))
    equal = int((np.abs(one - other) < _CLOSE).sum())
    p_equal = float(at_least(equal, one.size, _EQUAL_RATE))
    same = bool(np.array_equal(one, other))
    return replace(
        question,
        figure=f"correlation {alike:+.4f}; {equal} of {one.size} numbers the same",
        p_value=0.0 if same else min(1.0, 2 * min(float(cosine_p(alike, one.size)), p_equal)),
        bad=f"A round that was asked again was answered with the same noise (correlation {alike:+.2f}, {equal} of "
        f"{one.size} numbers the same): the difference of both answers shows what the noise should hide.",
    )
