"""What a run would cost, before anything is spent."""

from __future__ import annotations

import math
from typing import Any, Literal

from fedhead.common.config import RunConfig
from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import Event, GaussianEvent, PoissonEvent
from fedhead.common.privacy.planning import noise_multiplier_for
from fedhead.server.cohorts import most_participations


def of_recipe(config: RunConfig) -> dict[str, Any]:
    """The cost of a recipe's run at each holder.

    Returns
    -------
    dict
        `mechanism`, `epsilon`, `delta`, `noise_multiplier`, `rounds`, `local_steps`, `participations`, `accountant`,
        and `table`: epsilon after shares of the rounds.
    """
    privacy, training = config.privacy, config.training
    if privacy.mechanism == "none":
        raise InputError('privacy.mechanism is "none": there is nothing to plan. Set it to "full-batch" or "poisson".')
    cohort = config.holders.per_round or config.holders.count
    times = most_participations(training.rounds, config.holders.count, cohort)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None
        steps = times * training.local_steps
        noise = noise_multiplier_for(privacy.epsilon, privacy.delta, privacy.mechanism, steps, privacy.sample_rate)
    return _table(noise, privacy.delta, times, training.local_steps, privacy.sample_rate, privacy.clipping_norm)


def of_numbers(target: float, delta: float, rounds: int, local_steps: int, sample_rate: float | None) -> dict[str, Any]:
    """The noise for a given epsilon and number of rounds.

    Raises
    ------
    InputError
        When a number is out of range.
    """
    for name, value, good, rule in (
        ("--epsilon", target, target > 0 and math.isfinite(target), "it must be more than 0"),
        ("--delta", delta, 0 < delta < 1, "it must lie between 0 and 1"),
        ("--sample-rate", sample_rate, sample_rate is None or 0 < sample_rate < 1, "it must lie between 0 and 1"),
    ):
        if not good:
            raise InputError(f"{name} is {value}: {rule}. Give another value.")
    mechanism: Literal["full-batch", "poisson"] = "full-batch" if sample_rate is None else "poisson"
    noise = noise_multiplier_for(target, delta, mechanism, rounds * local_steps, sample_rate)
    return _table(noise, delta, rounds, local_steps, sample_rate, 1.0)


def _table(
    noise: float, delta: float, rounds: int, local_steps: int, sample_rate: float | None, clipping_norm: float
) -> dict[str, Any]:
    def event(number: int) -> Event:
        steps = number * local_steps
        if sample_rate is None:
            return GaussianEvent(noise_multiplier=noise, clipping_norm=clipping_norm, steps=steps)
        return PoissonEvent(noise_multiplier=noise, clipping_norm=clipping_norm, sample_rate=sample_rate, steps=steps)

    shown = sorted({max(1, math.ceil(rounds * share / 8)) for share in range(1, 9)})
    spent = {number: epsilon([event(number)], delta) for number in shown}
    return {
        "mechanism": "full-batch" if sample_rate is None else "poisson",
        "noise_multiplier": noise,
        "sample_rate": sample_rate,
        "epsilon": spent[rounds].epsilon,
        "delta": delta,
        "rounds": rounds,
        "local_steps": local_steps,
        "accountant": spent[rounds].accountant,
        "table": [{"rounds": number, "epsilon": spent[number].epsilon} for number in shown],
    }
