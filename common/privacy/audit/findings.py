"""What an audit reports: checks that passed or failed, and lower bounds on epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes
    ----------
    name : str
        Key that doesn't change, such as "total-variance".
    title : str
        What was looked at, in a few words.
    passed : bool
    figure : str
        What was found, as it is shown: "1.003 of 1".
    meaning : str
        One sentence. Of a check that passed: what that shows. Of one that failed: the fault, by name.
    p_value : float, in [0, 1], or None
        Probability of so much or more if all is right; None for a question without chance.
    level : float or None
        The check fails where p_value is at most this.
    """

    name: str
    title: str
    passed: bool
    figure: str
    meaning: str
    p_value: float | None = None
    level: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """A check before its verdict: tests of chance are judged together, so that false alarms stay as rare as promised.

    Attributes
    ----------
    name, title, figure, p_value
        As in `Check`.
    good, bad : str
        Its meaning if it passes, and if it fails.
    """

    name: str
    title: str
    figure: str
    p_value: float
    good: str
    bad: str


def judge(questions: Sequence[Question], false_alarms: float) -> list[Check]:
    """Verdicts of several tests with a false-alarm rate over all of them (Holm 1979).

    Parameters
    ----------
    questions : sequence of Question
        Each p-value must be valid: if all is right, it is at most t with probability at most t.
    false_alarms : float, in (0, 1)
        Most probability that any check fails although all is right, however the tests depend on one another.

    Returns
    -------
    list of Check
        In the order of the questions.
    """
    order = sorted(range(len(questions)), key=lambda i: questions[i].p_value)
    found: dict[int, Check] = {}
    failing, level = True, 0.0
    for rank, i in enumerate(order):
        one = questions[i]
        if failing:  # the level at which the first one passed holds for all that follow
            level = false_alarms / (len(questions) - rank)
            failing = one.p_value <= level
        meaning = one.bad if failing else one.good
        found[i] = Check(one.name, one.title, not failing, one.figure, meaning, one.p_value, level)
    return [found[i] for i in range(len(questions))]


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on epsilon from an attack.

    Attributes
    ----------
    name : str
        "one-run", "f-dp" or "clopper-pearson".
    title : str
    epsilon : float, >= 0
        With probability `confidence` the true epsilon is at least this. 0: the attack shows nothing.
    delta : float
    confidence : float
    guesses, right : int
        Of the best of the guessing rules, all of which were fixed beforehand.
    claim_p_value : float, in [0, 1]
        Of the claim itself: small where an attacker did better than the claim allows.
    note : str
        What the bound rests on, beyond the claim's own neighbouring relation; "" where on nothing.
    """

    name: str
    title: str
    epsilon: float
    delta: float
    confidence: float
    guesses: int
    right: int
    claim_p_value: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(replace(self, epsilon=self.epsilon if math.isfinite(self.epsilon) else 1e9))


def all_passed(checks: Iterable[Check]) -> bool:
    """Whether none failed."""
    return all(check.passed for check in checks)
