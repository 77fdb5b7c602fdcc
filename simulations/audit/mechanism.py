"""`fedhead audit mechanism`: canaries through the production training path of a recipe.

What runs is what a data holder runs: the same request, streams, trainer and optimizer. Around it stand the auditor's
own coins and heads, an independent reference for every clipped sum, and tests whose rules were fixed before any result
was seen. The verdict's false-alarm rate, over all tests together, is `FALSE_ALARMS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.special import ndtr, ndtri

from fedhead.client.admission import Admission, event_of_request
from fedhead.client.app import step_plan
from fedhead.client.auditing.canaries import Canaries, craft, entry_weight
from fedhead.client.auditing.contributions import largest_contribution
from fedhead.client.auditing.experiment import Observations, observe
from fedhead.client.training import CHUNK, StepPlan, Trainer
from fedhead.client.workplace import Workplace, holder_name
from fedhead.common import progress
from fedhead.common.config import RunConfig, changed, find_recipe
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import (
    Labelled,
    default_cache,
    featurize,
    load_backbone_for,
    make_trainable,
    read_split,
)
from fedhead.common.privacy.accounting import epsilon, rows_of
from fedhead.common.privacy.audit.bounds import clopper_pearson, f_dp, one_run
from fedhead.common.privacy.audit.conformance import residual_questions, retry_question, sample_questions
from fedhead.common.privacy.audit.curves import claimed_curve
from fedhead.common.privacy.audit.findings import Check, LowerBound, Question, all_passed, judge
from fedhead.common.privacy.events import Event
from fedhead.common.privacy.noise import Streams, system_streams
from fedhead.common.privacy.secure import CSPRNG
from fedhead.common.protocol import RoundRequest
from fedhead.common.tasks import Task, make_task
from fedhead.server.app import declared_records
from fedhead.server.requests import make_plan
from fedhead.simulations.afford import most_asked

SCHEMA: Final = 1
FALSE_ALARMS: Final = 0.01
"""Most probability that a sound mechanism fails, all tests together."""
CONFIDENCE: Final = 0.95  # of each lower bound
REPLAYED: Final = 1e-6
"""Most that parameters may differ from a replay of the releases, as a share of the round's largest move."""
MOST_NUMBERS: Final = 60_000_000  # residuals that are kept: half a gigabyte
EDGES: Final = np.linspace(-5, 5, 51)
QUANTILES: Final = ndtr(np.linspace(-3, 3, 41))


@dataclass(frozen=True)
class Subject:
    """What is audited: a recipe's production training path, ready to be asked for rounds."""

    config: RunConfig
    request: RoundRequest
    plan: StepPlan
    rounds: int
    task: Task
    make: Callable[[], Trainable]
    real: Labelled
    streams: Callable[[int], Streams]

    @property
    def events(self) -> list[Event]:
        """What the rounds are charged with: the claim."""
        return [event_of_request(self.request)] * self.rounds


def audit_mechanism(
    recipe: RunConfig | str | Path,
    *,
    canaries: int | None = None,
    records: int = 256,
    seed: int | None = None,
    name: str | None = None,
    cache: Path | None = None,
    progress_listener: progress.Listener | None = None,
) -> dict[str, Any]:
    """Audit the mechanism of a recipe.

    Parameters
    ----------
    recipe : RunConfig, str or path
    canaries : int, optional
        Planted records, or persons; default and most: as many as there are features.
    records : int
        Real records, or persons, that the canaries hide among; from the recipe's data.
    seed : int, optional
        Audit a simulation's noise, drawn from this seed, and draw the auditor's coins from it as well. Default: a
        deployment's noise and sampling, from the operating system, in float64.
    name : str, optional
        Of the recipe, as it is shown.
    cache : Path, optional
        Folder of cached features; default: the user's.
    progress_listener : callable, optional
        Called as `listener(stage, done, total, note)`.

    Returns
    -------
    dict
        As `--json` prints it: the claim, `bounds`, `checks`, `residuals`, and `passed`.

    Raises
    ------
    InputError
        The recipe has no mechanism that canaries can audit, or a number is out of range.
    """
    started = time.perf_counter()
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    reason = why_not(config)
    if reason is not None:
        raise InputError(reason)
    if records < 1:
        raise InputError(f"--records is {records}: it must be at least 1. Leave it out for 256.")
    with progress.listening(progress_listener):
        subject = make_subject(config, records, seed, default_cache() if cache is None else cache)
        generator = np.random.default_rng(seed)
        crafted = _craft(subject, canaries, generator)
        seen = observe(
            subject.make, subject.task, subject.real.features, subject.real.targets, subject.plan, subject.rounds,
            subject.streams, canaries=crafted, generator=generator,
        )  # fmt: skip
        moved = largest_contribution(
            subject.make, subject.task, subject.real.features, subject.real.targets, subject.plan,
            # next to no noise is drawn here, hundreds of times: OpenDP's would take most of the audit's time
            subject.streams if seed is not None else lambda _: system_streams(CSPRNG),
            canaries=crafted, generator=generator,
        )  # fmt: skip
    bounds = lower_bounds(subject, seen)
    half = FALSE_ALARMS / 2  # of two groups, because the attacks' few questions would drown among those about noise
    claims = judge([_claim_question(bound) for bound in bounds], half)
    checks = [*claims, *judge(questions(subject, seen), half), moved.check(), *certain(subject, seen)]
    return {
        **described(subject, crafted, seen, name or "recipe"),
        "bounds": [bound.to_dict() for bound in bounds],
        "checks": [check.to_dict() for check in checks],
        "false_alarms": FALSE_ALARMS,
        "passed": all_passed(checks),
        "seconds": time.perf_counter() - started,
        "residuals": pictured(seen),
        "notes": notes(subject, config, crafted, seen, seed),
        "seeded": seed is not None,
    }


def why_not(config: RunConfig) -> str | None:
    """Why a recipe's mechanism can't be audited, in one line with a remedy; None if it can."""
    privacy = config.privacy
    if privacy.mechanism == "none":
        return 'privacy.mechanism is "none": there is no noise to audit. Set it to "full-batch" or "poisson".'
    if privacy.unit == "holder":
        return (
            "privacy.unit is \"holder\": its noise is the server's, and no holder's training has any. Audit the units "
            '"record" and "person".'
        )
    if config.model.unfreeze:
        return (
            f"model.unfreeze is {config.model.unfreeze}: canaries are feature vectors, which only a head reads. Audit "
            "the recipe with --set model.unfreeze=0."
        )
    return None


def make_subject(config: RunConfig, records: int, seed: int | None, cache: Path) -> Subject:
    """A holder's training path for a recipe, on some of its records.

    Raises
    ------
    InputError
        The records or the model can't be used, or the head can't be audited.
    """
    dropout = getattr(config.model.head, "dropout", 0.0)
    if dropout:
        config = changed(config, {"model.head.dropout": 0.0})
    task = make_task(config.task)
    split = read_split(config)
    declared, _ = declared_records(config, split.units)
    rows = np.concatenate(split.holders) if split.persons is None else split.persons[0].rows
    offsets = None if split.persons is None else split.persons[0].offsets[: records + 1]
    rows = rows[:records] if offsets is None else rows[: offsets[-1]]
    chosen = split.train.select(rows)
    backbone, _ = load_backbone_for(config, chosen)
    real = featurize(config, backbone, chosen, cache, "features")
    if offsets is not None:
        real = real.by_person(offsets)

    def make() -> Trainable:
        made = make_trainable(config, backbone, task)
        return made if seed is not None else made.double()

    head = make()
    entry_weight(head)  # refuses heads that canaries can't reach
    request = make_plan(config, "audit", backbone.digest, declared, most_asked(config)).request(1)
    request = request.model_copy(update={"seed": seed})
    admission = Admission(None, simulated=seed is not None)
    place = Workplace(config, backbone.digest, Trainer(head, task), [], admission)

    def streams(number: int) -> Streams:
        return place.streams(request.model_copy(update={"round": number}), holder_name(0))

    numbers = sum(p.numel() for p in head.trained().values()) * request.local_steps
    rounds = max(1, min(most_asked(config), MOST_NUMBERS // numbers))
    plan = step_plan(request, declared, CHUNK)
    return Subject(config, request, plan, rounds, task, make, real, streams)


def _craft(subject: Subject, number: int | None, generator: np.random.Generator) -> Canaries:
    config, width = subject.config, subject.real.features.values.shape[-1]
    if number is not None and not 1 <= number <= width:
        raise InputError(
            f"--canaries is {number}: it must be from 1 to {width}, because each takes a feature for itself. Leave it "
            "out for the most."
        )
    return craft(
        number or width,
        width,
        subject.task.outputs,
        normalize=config.model.features.normalize,
        clipping_norm=subject.plan.clipping_norm,
        records_per_person=config.privacy.records_per_person if config.privacy.unit == "person" else None,
        generator=generator,
    )


def lower_bounds(subject: Subject, seen: Observations) -> list[LowerBound]:
    """Three lower bounds on epsilon, each with the p-value of the claim."""
    delta, rows = subject.config.privacy.delta, rows_of(subject.events)
    claim, gaussian = claimed_curve(rows), subject.plan.mechanism == "full-batch"
    claimed = (epsilon(subject.events, delta).epsilon, delta)
    return [
        one_run(seen.scores, seen.included, delta, claimed=claimed, confidence=CONFIDENCE),
        f_dp(seen.scores, seen.included, delta, claim=claim, gaussian=gaussian, confidence=CONFIDENCE),
        clopper_pearson(seen.scores, seen.included, delta, claim=claim, gaussian=gaussian, confidence=CONFIDENCE),
    ]


def questions(subject: Subject, seen: Observations) -> list[Question]:
    """All tests of noise and samples, to be judged together with the claim."""
    asked = residual_questions(seen.residuals, seen.groups, steps_per_round=seen.steps_per_round)
    for one in residual_questions(seen.empty, seen.groups, steps_per_round=seen.steps_per_round):
        if one.name == "total-variance":
            asked.append(
                replace(
                    one,
                    name="empty-variance",
                    title="Noise of a round without records",
                    good="A holder without records releases as much noise as any other: that it has none doesn't show.",
                    bad="Without records the noise is not what the claim says: whether there are records shows.",
                )
            )
    if seen.sampled is not None:
        asked += sample_questions(seen.sampled, seen.records, float(subject.plan.sample_rate or 1.0))
    if seen.asked_twice is not None:
        asked.append(retry_question(*seen.asked_twice))
    return asked


def _claim_question(bound: LowerBound) -> Question:
    return Question(
        f"claim-{bound.name}",
        f"The claim against the attack: {bound.title}",
        f"{bound.right} of {bound.guesses} guesses right",
        bound.claim_p_value,
        "The attack guessed no better than the claimed epsilon allows.",
        "The claimed epsilon is broken: the attack guessed better than any mechanism with that epsilon allows.",
    )


def certain(subject: Subject, seen: Observations) -> list[Check]:
    """Questions without chance."""
    unplanned, rates = seen.unplanned_steps, seen.rates - {subject.plan.sample_rate}
    return [
        _check(
            "replay",
            "What leaves, explained by the noised sums alone",
            seen.replay_error <= REPLAYED,
            f"{seen.replay_error:.1g} of a round's largest move",
            "Beside the noised sums nothing of the records is in the parameters that leave.",
            "The parameters that leave hold more than the noised sums: something leaves without noise.",
        ),
        _check(
            "planned-steps",
            "Steps taken, against steps accounted",
            not unplanned,
            f"{unplanned} too many or too few",
            "Each round released as many noised sums as it is charged for.",
            "A round released more or fewer noised sums than it is charged for.",
        ),
        *(
            []
            if seen.sampled is None
            else [
                _check(
                    "planned-rate",
                    "Sampling rate that was drawn with",
                    not rates,
                    ", ".join(f"{rate:g}" for rate in sorted(seen.rates)) or "none",
                    "Records were drawn with the sampling rate that is accounted for.",
                    "Records were drawn with another sampling rate than the one that is accounted for.",
                )
            ]
        ),
    ]


def _check(name: str, title: str, passed: bool, figure: str, good: str, bad: str) -> Check:
    return Check(name, title, passed, figure, good if passed else bad)


def described(subject: Subject, crafted: Canaries, seen: Observations, name: str) -> dict[str, Any]:
    """What was audited, for JSON."""
    config, plan = subject.config, subject.plan
    spent = epsilon(subject.events, config.privacy.delta)
    return {
        "schema": SCHEMA,
        "recipe": name,
        "unit": config.privacy.unit,
        "adjacency": f"add or remove one {config.privacy.unit}",
        "mechanism": plan.mechanism,
        "head": config.model.head.kind,
        "features": crafted.features,
        "outputs": subject.task.outputs,
        "canaries": len(crafted),
        "records": seen.records,
        "rounds": subject.rounds,
        "steps": subject.rounds * plan.local_steps,
        "noise_multiplier": plan.noise_multiplier,
        "clipping_norm": plan.clipping_norm,
        "sample_rate": plan.sample_rate,
        "noise": subject.streams(1).source,
        "signal": seen.signal,
        "claim": {"epsilon": spent.epsilon, "delta": spent.delta, "accountant": spent.accountant},
    }


def pictured(seen: Observations) -> dict[str, Any]:
    """Residual noise for a histogram and a quantile plot."""
    values = np.sort(seen.residuals, axis=None)
    usable = values[np.isfinite(values)]
    counts, _ = np.histogram(usable, EDGES)
    expected = np.diff(ndtr(EDGES)) * values.size
    found = np.quantile(usable, QUANTILES) if usable.size else np.zeros(len(QUANTILES))
    return {
        "edges": EDGES.tolist(),
        "counts": counts.tolist(),
        "expected": expected.tolist(),
        "quantiles": [[float(a), float(b)] for a, b in zip(ndtri(QUANTILES), found, strict=True)],
    }


def notes(subject: Subject, config: RunConfig, crafted: Canaries, seen: Observations, seed: int | None) -> list[str]:
    """What a reader of the figures must know."""
    found = [
        f"{len(crafted)} canaries: each takes one of {crafted.features} features for itself, so there can't be more.",
        f"Scores see {seen.signal:.0%} of a canary's squared gradient; the rest is in the bias or in other layers, "
        "which all canaries share. Lower bounds are lower by that.",
    ]
    if seen.clipped < 1:
        found.append(f"{1 - seen.clipped:.1%} of the canaries' gradients were shorter than the clipping norm.")
    if subject.rounds < most_asked(config):
        found.append(
            f"{subject.rounds} of the run's {most_asked(config)} rounds were audited, and the claim is for those: more "
            "would not fit in memory."
        )
    if getattr(config.model.head, "dropout", 0.0):
        found.append("The head was audited without its dropout.")
    if seed is not None:
        found.append("Noise came from a seed, as in a simulation: for whoever knows the seed, epsilon is infinite.")
    return found
