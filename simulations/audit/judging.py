"""From what the mechanism's audit saw to its verdicts: bounds on epsilon, tests of chance, and questions without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedhead.client.auditing.contributions import Contributions
from fedhead.client.auditing.exactness import Exactness
from fedhead.client.auditing.exchange import Exchanged
from fedhead.client.auditing.experiment import Observations
from fedhead.common.privacy.accounting import epsilon, rows_of
from fedhead.common.privacy.audit import recount
from fedhead.common.privacy.audit.bounds import Attack, clopper_pearson, f_dp, one_run
from fedhead.common.privacy.audit.conformance import residual_questions, retry_question, sample_questions
from fedhead.common.privacy.audit.curves import claimed_curve
from fedhead.common.privacy.audit.findings import Check, LowerBound, Question, judge
from fedhead.common.privacy.audit.laws import corrected, count_p, spread_p
from fedhead.simulations.audit.subject import Subject

FloatArray = NDArray[np.float64]

FALSE_ALARMS: Final = 0.01
"""Most probability that a sound mechanism fails, all tests together."""
CONFIDENCE: Final = 0.95  # of each lower bound
REPLAYED: Final = 1e-12
"""Most that parameters may differ from a replay of the releases, as a share of the round's largest move."""
OFF_LATTICE: Final = 0.05  # steps; float64 loses less through a product and a quotient


@dataclass(frozen=True)
class Seen:
    """All that was seen of a mechanism.

    Attributes
    ----------
    main : Observations
        Of all rounds, with canaries.
    few : dict of int to float64 array, shape (T, P)
        Number of records -> residuals of some rounds on so few.
    moved : Contributions
    exact : Exactness
    exchanged : Exchanged
    """

    main: Observations
    few: dict[int, FloatArray]
    moved: Contributions
    exact: Exactness
    exchanged: Exchanged


def verdicts(subject: Subject, seen: Seen) -> tuple[list[LowerBound], list[Check]]:
    """Lower bounds on epsilon, and every check.

    Notes
    -----
    Guarantee: a sound mechanism fails a check with probability at most `FALSE_ALARMS`. Half of it is for the claim
    against the three attacks, half for all other tests: the attacks' few would drown among those about noise.
    """
    bounds = lower_bounds(subject, seen.main)
    chance = judge([_claim_question(bound) for bound in bounds], FALSE_ALARMS / 2)
    chance += judge(list(questions(subject, seen)), FALSE_ALARMS / 2)
    return bounds, [*chance, seen.moved.check(), seen.exact.check(), *certain(subject, seen)]


def lower_bounds(subject: Subject, seen: Observations) -> list[LowerBound]:
    """Three lower bounds on epsilon, each with the p-value of the claim."""
    delta, rows = subject.config.privacy.delta, rows_of(subject.events)
    claim, gaussian = claimed_curve(rows), subject.plan.mechanism == "full-batch"
    claimed = (epsilon(subject.events, delta).epsilon, delta)
    attack = Attack(seen.scores, seen.included, delta, CONFIDENCE)
    return [
        one_run(attack, claimed=claimed),
        f_dp(attack, claim=claim, gaussian=gaussian),
        clopper_pearson(attack, claim=claim, gaussian=gaussian),
    ]


def _claim_question(bound: LowerBound) -> Question:
    return Question(
        f"claim-{bound.name}",
        f"The claim against the attack: {bound.title}",
        f"{bound.right} of {bound.guesses} guesses right",
        bound.claim_p_value,
        "The attack guessed no better than the claimed epsilon allows.",
        "The claimed epsilon is broken: the attack guessed better than any mechanism with that epsilon allows.",
    )


def questions(subject: Subject, seen: Seen) -> Iterator[Question]:
    """All tests of noise and samples."""
    main = seen.main
    yield from residual_questions(main.residuals, main.groups, steps_per_round=main.steps_per_round)
    yield from _variances(seen)
    if main.along.size:
        yield _along(main.along)
    if main.sampled is not None:
        rate = float(subject.plan.sample_rate or 1.0)
        yield from sample_questions(main.sampled, main.records, rate)
        yield _by_label(subject, main.sampled, main.records, rate)
    if main.asked_twice is not None:
        yield retry_question(*main.asked_twice)


def _variances(seen: Seen) -> Iterator[Question]:
    """The size of the noise where there are few records or none, and of a whole exchange."""
    places = [
        (
            "empty-variance",
            "Noise of a round without records",
            seen.main.empty,
            "A holder without records releases as much noise as any other: that it has none doesn't show.",
            "Without records the noise is not what the claim says: whether there are records shows.",
        ),
        (
            "exchange-variance",
            "Noise of a whole exchange",
            seen.exchanged.residuals,
            "A request that goes all the way through the holder's program gets the noise that it is charged for, over "
            "the sum of the holder's records.",
            "A request that goes all the way through the holder's program gets other noise than it is charged for, or "
            "another sum than that of the holder's records.",
        ),
        *(
            (
                f"few-variance-{number}",
                f"Noise of rounds on {number} record{'s' if number > 1 else ''} and a few canaries",
                residuals,
                "A holder with few records releases as much noise as any other.",
                "With few records the noise is not what the claim says: how many there are shows.",
            )
            for number, residuals in seen.few.items()
        ),
    ]
    for name, title, residuals, good, bad in places:
        size = residuals.size
        total = float(np.square(residuals).sum()) if np.isfinite(residuals).all() else np.inf
        p_value = float(spread_p(total, size)) if size and np.isfinite(total) else 0.0
        figure = f"variance {total / max(1, size):.4g} of 1 over {size} values"
        yield Question(name, title, figure, p_value, good, bad)


def _along(along: FloatArray) -> Question:
    """Whether sums are longer or shorter than the reference's, in all steps or in some."""
    # the square of one number follows chi-square with one degree; both tails of it: a sum of 0 would be odd, too
    total, squares = float(along.sum() / np.sqrt(along.size)), float(np.square(along).sum())
    usable = np.isfinite(squares)
    p_value = corrected([spread_p(total * total, 1), spread_p(squares, along.size)]) if usable else 0.0
    return Question(
        "along-the-sum",
        "Noise along the records' own sum",
        f"{total:+.2f} deviations over {along.size} steps",
        p_value,
        "The sums of clipped gradients are as long as they should be, in every step.",
        "The sums of clipped gradients are longer or shorter than they should be, in all steps or in some: records "
        "count for more than the clipping norm allows, or are left out.",
    )


def _by_label(subject: Subject, sampled: Sequence[NDArray[np.int64]], records: int, rate: float) -> Question:
    """Whether records of every label, and canaries, are drawn at the same rate."""
    targets = subject.real.targets
    labels = (targets if targets.dim() == 1 else targets[:, 0]).numpy()
    kind = np.concatenate([labels, np.full(records - len(labels), labels.max(initial=0) + 1)])
    there = np.bincount(kind)
    drawn = sum((np.bincount(kind[one], minlength=len(there)) for one in sampled), np.zeros(len(there), dtype=np.int64))
    p_values = [float(count_p(n, len(sampled) * m, rate)) for n, m in zip(drawn, there, strict=True) if m]
    worst = int(np.argmin(p_values))
    shares = [n / (len(sampled) * m) for n, m in zip(drawn, there, strict=True) if m]
    return Question(
        "participation-by-label",
        "Sampling rate of each kind of record",
        f"{shares[worst]:.3g} of {rate:.3g}, of the kind furthest off",
        corrected(p_values),
        "Records of every label are drawn at the rate that is accounted for.",
        "Records of some kind are drawn more or less often than is accounted for: sampling looks at what they hold.",
    )


def certain(subject: Subject, seen: Seen) -> list[Check]:
    """Questions without chance."""
    main, plan = seen.main, subject.plan
    rates = main.rates - {plan.sample_rate}
    replayed = max(main.replay_error, seen.exchanged.replay_error)
    found = [
        check(
            "replay",
            "What leaves, explained by the noised sums alone",
            replayed <= REPLAYED,
            f"{replayed:.1g} of a round's largest move",
            "The parameters that leave are what the noised sums make of the received ones, and nothing else.",
            "The parameters that leave hold more than the noised sums: something leaves without noise.",
        ),
        check(
            "planned-steps",
            "Steps taken, against steps accounted",
            not main.unplanned_steps,
            f"{main.unplanned_steps} too many or too few",
            "Each round released as many noised sums as it is charged for.",
            "A round released more or fewer noised sums than it is charged for.",
        ),
        *_claim(subject),
        *seen.exchanged.checks(),
    ]
    if main.sampled is not None:
        found.append(
            check(
                "planned-rate",
                "Sampling rate that was asked for",
                not rates,
                ", ".join(f"{rate:g}" for rate in sorted(main.rates)) or "none",
                "Records were drawn with the sampling rate that is accounted for.",
                "Records were drawn with another sampling rate than the one that is accounted for.",
            )
        )
    if subject.make().trained() and next(iter(subject.make().trained().values())).dtype == torch.float64:
        found.append(
            check(
                "lattice",
                "Releases on the lattice",
                main.off_lattice <= OFF_LATTICE,
                f"{main.off_lattice:.1g} of a step off",
                "Every number that is released is a whole multiple of the lattice's step: no digits of a sum show.",
                "A released number lies between the steps of the lattice: its last digits may show what the sum was.",
            )
        )
    return found


def _claim(subject: Subject) -> Iterator[Check]:
    """Whether the claim is that of the steps which are taken, and within what the recipe promises."""
    asked, taken, delta = subject.events[0], subject.plan.event(), subject.config.privacy.delta
    yield check(
        "claimed-event",
        "What a round is charged as, against what it does",
        asked == taken,
        "the same" if asked == taken else f"{asked.to_json()} for {taken.to_json()}",
        "The event that the ledger is charged with is the one that the steps are.",
        "The event that the ledger is charged with isn't what the steps do.",
    )
    first, second = epsilon(subject.events, delta).epsilon, _second(subject, delta)
    yield check(
        "claimed-epsilon",
        "The claim by a second accountant",
        second is None or recount.agree(first, second),
        f"{first:.4g} and {'no figure' if second is None else f'{second:.4g}'}",
        "Two independent accountants agree on the claimed epsilon.",
        "Two independent accountants disagree on the claimed epsilon.",
    )
    promised = subject.config.privacy.epsilon
    if promised is not None:
        yield check(
            "promised-epsilon",
            "The claim, against the recipe's promise",
            first <= promised * (1 + 1e-6),
            f"{first:.4g} of {promised:g}",
            "The steps cost no more than the recipe promises.",
            "The steps cost more than the recipe promises.",
        )


def _second(subject: Subject, delta: float) -> float | None:
    return recount.pld_epsilon(recount.rows_of([replace(one) for one in subject.events]), delta)


def check(name: str, title: str, passed: bool, figure: str, good: str, bad: str) -> Check:
    """A question without chance."""
    return Check(name, title, passed, figure, good if passed else bad)
