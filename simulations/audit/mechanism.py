"""`fedhead audit mechanism`: canaries through the production training path of a recipe.

What runs is what a data holder runs: the same request, streams, trainer and optimizer, and for some rounds the whole
way from the request to what leaves. Around it stand the auditor's own coins and heads, an independent reference for
every clipped sum, and tests whose rules were fixed before any result was seen.

    subject.py    the recipe's production path, ready to be asked
    judging.py    bounds, tests and verdicts
    verdict.py    the terminal
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.special import ndtr, ndtri

from fedhead.client.auditing.canaries import Canaries
from fedhead.client.auditing.contributions import largest_contribution
from fedhead.client.auditing.exactness import largest, largest_difference
from fedhead.client.auditing.exchange import exchange
from fedhead.client.auditing.experiment import Observations, observe
from fedhead.client.auditing.planted import PlantedCanaries
from fedhead.client.auditing.reference import Reference
from fedhead.client.auditing.setup import Setup
from fedhead.common import progress
from fedhead.common.config import RunConfig, find_recipe
from fedhead.common.errors import InputError
from fedhead.common.preparation import Labelled, default_cache
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.audit.findings import all_passed
from fedhead.common.privacy.noise import Streams, system_streams
from fedhead.common.privacy.secure import CSPRNG
from fedhead.simulations.afford import most_asked
from fedhead.simulations.audit.judging import FALSE_ALARMS, FloatArray, Seen, verdicts
from fedhead.simulations.audit.subject import (
    NotAudited,
    Subject,
    canaries_for,
    check_seed,
    crafted,
    crafted_records,
    make_subject,
    most_canaries,
    refusals,
    takes_records,
    why_not,
)
from fedhead.simulations.faults import plainly
from fedhead.simulations.logs import HoldersLog
from fedhead.simulations.simulate import threads

__all__ = ["NotAudited", "audit_mechanism", "check_seed", "why_not"]

SCHEMA: Final = 1
EDGES: Final = np.linspace(-5, 5, 51)
QUANTILES: Final = ndtr(np.linspace(-3, 3, 41))
FEW: Final = (1, 7, 33)  # records of rounds on few of them
VALUES: Final = 2000  # of noise that are wanted from each of these


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
        Planted records, or persons. In closed form, of a linear head: crafted feature vectors, as many as there are
        features, which is also the most. Elsewhere crafted gradients: 512 by default, at most as many as trained
        linear layers have weights.
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
    NotAudited
        The recipe has no mechanism that canaries can audit.
    InputError
        The recipe or its data can't be used, or a number is out of range.
    """
    started = time.perf_counter()
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    reason = why_not(config)
    if reason is not None:
        raise NotAudited(reason)
    if records < 1:
        raise InputError(f"--records is {records}: it must be at least 1. Leave it out for 256.")
    check_seed(seed)
    # no holder runs here that could log anything: what fails is code of the user's own, memory or files
    with progress.listening(progress_listener), plainly(config, HoldersLog(Path(os.devnull))):
        subject = make_subject(config, records, seed, default_cache() if cache is None else cache)
        generator = np.random.default_rng(seed)
        planted = canaries_for(subject, canaries, generator)
        # one thread: thousands of small operations, in which several threads mostly wait for each other
        with threads(True):
            with refusals():
                seen = _look(subject, planted, generator, seed)
            bounds, checks = verdicts(subject, seen)
    return {
        **described(subject, planted, seen.main, name or "recipe"),
        "bounds": [bound.to_dict() for bound in bounds],
        "checks": [check.to_dict() for check in checks],
        "false_alarms": FALSE_ALARMS,
        "passed": all_passed(checks),
        "seconds": time.perf_counter() - started,
        "residuals": pictured(seen.main),
        "notes": notes(subject, config, planted, seen.main, seed),
        "seeded": seed is not None,
    }


def _look(
    subject: Subject, canaries: Canaries | PlantedCanaries, generator: np.random.Generator, seed: int | None
) -> Seen:
    """Everything that is run."""
    real = subject.real
    setup = _setup(subject, real, canaries, generator)
    main = observe(setup, subject.rounds)

    def quick(number: int) -> Streams:
        # next to no noise is drawn in these, hundreds of times: OpenDP's would take most of the audit's time
        return subject.streams(number) if seed is not None else system_streams(CSPRNG)

    quiet = replace(setup, streams_for=quick)
    moved, exact = largest_contribution(quiet), largest_difference(quiet)
    if subject.planted and takes_records(subject):
        # through the whole of the model as well, under heads that make their gradients long
        records = crafted_records(subject, real.features.shape[-1], generator)
        exact = largest([exact, largest_difference(replace(quiet, canaries=records))])
    few = {number: _few(subject, number, generator) for number in FEW if number < len(real)}
    with tempfile.TemporaryDirectory(prefix="fedhead-") as folder:
        data = [real, real.slice(0, 1 + len(real) // 2)]
        reference = Reference(subject.make(), subject.task)
        exchanged = exchange(subject.place, reference, subject.request, data, Path(folder))
    return Seen(main, few, moved, exact, exchanged)


def _few(subject: Subject, number: int, generator: np.random.Generator) -> FloatArray:
    """Residuals of some rounds on few records and as few canaries."""
    canaries = crafted(subject, min(2, most_canaries(subject)), generator)
    numbers = sum(p.numel() for p in subject.make().trained().values()) * subject.plan.local_steps
    rounds = min(50, math.ceil(VALUES / numbers))
    some = subject.real.slice(0, number)
    setup = _setup(subject, some, canaries, generator)
    found = observe(replace(setup, streams_for=lambda round: subject.streams(10_000 * number + round)), rounds)
    return found.residuals


def _setup(
    subject: Subject, real: Labelled, canaries: Canaries | PlantedCanaries, generator: np.random.Generator
) -> Setup:
    return Setup(
        subject.make, subject.task, real.features, real.targets, subject.plan, subject.streams, canaries, generator
    )


def described(subject: Subject, canaries: Canaries | PlantedCanaries, seen: Observations, name: str) -> dict[str, Any]:
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
        "unfrozen": config.model.unfreeze,
        "features": subject.width,
        "outputs": subject.task.outputs,
        "canaries": len(canaries),
        "canary_kind": "gradients" if subject.planted else "records",
        "most_canaries": most_canaries(subject),
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


def notes(
    subject: Subject,
    config: RunConfig,
    canaries: Canaries | PlantedCanaries,
    seen: Observations,
    seed: int | None,
) -> list[str]:
    """What a reader of the figures must know."""
    what = "a trained number of a linear layer" if subject.planted else "a feature"
    found = [
        f"{len(canaries)} of at most {most_canaries(subject)} canaries: each takes {what} for itself.",
    ]
    if isinstance(canaries, PlantedCanaries):
        layers = sum((canaries.layer == i).any() for i in range(len(canaries.layers)))
        found.append(
            f"A canary is a crafted gradient, put where production captures that of a record, in {layers} linear "
            "layers. Clipping, sum, noise and what leaves see it as any other; the model's own way from a record to "
            "its gradient is held to the reference on real records."
        )
    found += [
        f"What scores see of a canary is {seen.signal:.0%} of the squared clipping norm; the rest is in the bias or in "
        "other layers, which all canaries share, or the gradient is shorter. Lower bounds are lower by that.",
        f"Noise that is off by {300 / math.sqrt(seen.residuals.size):.2g} % of its deviation in all places would show.",
    ]
    if config.privacy.metrics is not None:
        found.append("Noised counts are charged beside the training and are not part of this claim.")
    if seen.clipped < 1:
        found.append(f"{1 - seen.clipped:.1%} of the canaries' gradients were shorter than the clipping norm.")
    if subject.rounds < most_asked(config):
        found.append(
            f"{subject.rounds} of the run's {most_asked(config)} rounds were audited, and the claim is for those: more "
            "would take too much memory or time."
        )
    if getattr(config.model.head, "dropout", 0.0):
        found.append("What one unit moves was measured without the head's dropout; everything else with it.")
    if seed is not None:
        found.append("Noise came from a seed, as in a simulation: for whoever knows the seed, epsilon is infinite.")
    return found
