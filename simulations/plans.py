"""What a run would cost, before anything is spent: one of epsilon, noise and rounds from the two others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedhead.common.config import RunConfig, find_recipe
from fedhead.common.errors import InputError
from fedhead.common.planned import counts_within, most_participations, planned_noise, planned_steps
from fedhead.common.privacy.accounting import pld_epsilon
from fedhead.common.privacy.planning import MOST_ROUNDS, Mechanism, cost, noise_multiplier_for, rounds_for
from fedhead.simulations.afford import Part, Work, holders_of, most_asked

NOISE: Final = (1e-9, 1e6)  # as in recipes, but for noise that no accountant's numbers have room for
FACTORS: Final = (0.5, 0.7, 1.0, 1.4, 2.0)  # of the plan's noise: the lines of the picture
_ANY_UNIT: Final = "record or person (under the unit holder: one step a round)"


def of_recipe(
    recipe: RunConfig | str | Path, state: Path | None = None, ledgers: Sequence[Path] = ()
) -> dict[str, Any]:
    """The cost of a recipe's run, and what it would leave of each holder's budget.

    Parameters
    ----------
    recipe : RunConfig, str or path
        A recipe, its file, or the name of a built-in one.
    state : path, optional
        Folder that keeps the simulated holders between runs: what they have spent counts.
    ledgers : sequence of path
        Ledgers of data holders, instead of the simulated ones.

    Returns
    -------
    dict
        `mechanism`, `unit`, `adjacency`, `epsilon`, `delta`, `noise_multiplier`, `sample_rate`, `rounds`,
        `local_steps`, `participations`, `counts`, `accountant`, `solved`, `table` (epsilon after shares of the rounds),
        and `holders`, as `fedhead.simulations.afford.holders_of` gives them.

    Raises
    ------
    InputError
        The recipe has no privacy to plan, or no noise reaches its epsilon.
    """
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    privacy, training, holders = config.privacy, config.training, config.holders
    if privacy.mechanism == "none":
        raise InputError('privacy.mechanism is "none": there is nothing to plan. Set it to "full-batch" or "poisson".')
    times = most_asked(config)
    work = Work(config, planned_noise(config, times))

    def part(rounds: int) -> Part:
        asked = most_participations(rounds, holders.count, holders.per_round or holders.count)
        return Part(asked, min(asked, counts_within(config, rounds)))

    last = part(training.rounds)
    epsilon, accountant = work.epsilon(last)
    return {
        "mechanism": privacy.mechanism,
        "unit": privacy.unit,
        "adjacency": f"add or remove one {privacy.unit}",
        "noise_multiplier": work.noise_multiplier,
        "sample_rate": privacy.sample_rate,
        "epsilon": epsilon,
        "delta": privacy.delta,
        "rounds": training.rounds,
        "local_steps": training.local_steps,
        "participations": times,
        "counts": last.counts,
        "accountant": accountant,
        "solved": "epsilon" if privacy.epsilon is None else "noise_multiplier",
        "table": _table(training.rounds, lambda rounds: work.epsilon(part(rounds))[0]),
        "holders": holders_of(work, state, ledgers),
    }


def of_numbers(
    epsilon: float | None,
    delta: float,
    rounds: int | None,
    local_steps: int = 1,
    sample_rate: float | None = None,
    noise_multiplier: float | None = None,
) -> dict[str, Any]:
    """Whichever of epsilon, noise multiplier and rounds is None, from the two others.

    Returns
    -------
    dict
        As `of_recipe`, without what only a recipe says. `rounds` is the largest number that stays within epsilon.

    Raises
    ------
    InputError
        Not exactly one is left out, or a number is out of range.
    """
    given = {"--epsilon": epsilon, "--noise-multiplier": noise_multiplier, "--rounds": rounds}
    _check_given([name for name, value in given.items() if value is not None])
    low, high = NOISE
    for name, value, good, rule in (
        ("--epsilon", epsilon, epsilon is None or 0 < epsilon < math.inf, "it must be more than 0"),
        ("--delta", delta, 0 < delta < 1, "it must lie between 0 and 1"),
        ("--sample-rate", sample_rate, sample_rate is None or 0 < sample_rate < 1, "it must lie between 0 and 1"),
        (
            "--noise-multiplier", noise_multiplier, noise_multiplier is None or low <= noise_multiplier <= high,
            f"it must lie between {low:g} and {high:g}",
        ),
        ("--rounds", rounds, rounds is None or 1 <= rounds <= MOST_ROUNDS, f"it must lie between 1 and {MOST_ROUNDS}"),
        ("--local-steps", local_steps, 1 <= local_steps <= MOST_ROUNDS, f"it must lie between 1 and {MOST_ROUNDS}"),
    ):  # fmt: skip
        if not good:
            raise InputError(f"{name} is {value}: {rule}. Give another value.")
    mechanism: Mechanism = "full-batch" if sample_rate is None else "poisson"
    solved = next(name for name, value in given.items() if value is None)
    if rounds is None:
        assert epsilon is not None
        assert noise_multiplier is not None
        rounds = rounds_for(epsilon, delta, noise_multiplier, local_steps, sample_rate)
    if noise_multiplier is None:
        assert epsilon is not None
        noise_multiplier = noise_multiplier_for(epsilon, delta, mechanism, rounds * local_steps, sample_rate)
    noise = noise_multiplier
    spent = cost(noise, delta, rounds * local_steps, sample_rate)
    return {
        "mechanism": mechanism,
        "unit": _ANY_UNIT,
        "adjacency": "add or remove one unit",
        "noise_multiplier": noise,
        "sample_rate": sample_rate,
        "epsilon": spent.epsilon,
        "delta": delta,
        "rounds": rounds,
        "local_steps": local_steps,
        "participations": rounds,
        "counts": 0,
        "accountant": spent.accountant,
        "solved": solved[2:].replace("-", "_"),
        "table": _table(rounds, lambda number: cost(noise, delta, number * local_steps, sample_rate).epsilon),
    }


def _check_given(given: list[str]) -> None:
    if len(given) == 3:
        raise InputError(
            "--rounds is given with --epsilon and --noise-multiplier: each follows from the others. Remove one."
        )
    if len(given) < 2:
        also = f", {given[0]} alone is too little" if given else ""
        raise InputError(f"RECIPE is missing{also}: give one, or two of --epsilon, --noise-multiplier and --rounds.")


def _table(rounds: int, epsilon_after: Callable[[int], float]) -> list[dict[str, Any]]:
    shown = sorted({max(1, math.ceil(rounds * share / 8)) for share in range(1, 9)})
    return [{"rounds": number, "epsilon": epsilon_after(number)} for number in shown]


def curves(found: Mapping[str, Any], config: RunConfig | None = None) -> dict[float, list[tuple[int, float]]]:
    """Epsilon against rounds for several noise multipliers around a plan's.

    Parameters
    ----------
    found : mapping
        What `of_recipe` or `of_numbers` gave.
    config : RunConfig, optional
        The recipe, whose cohorts, unit and counts then enter.

    Returns
    -------
    dict of float to list of (int, float)
        Noise multiplier -> (rounds, epsilon). For sampled steps a quick upper bound, within a few hundredths.
    """
    sampled = found["sample_rate"] is not None
    most = min(MOST_ROUNDS, max(4, found["rounds"] * 2))
    points = 8 if sampled else 41  # closer together at the start, where the lines bend
    shown = sorted({max(1, round(most * (i / (points - 1)) ** 2)) for i in range(points)})

    def epsilon(noise: float, rounds: int) -> float:
        steps, other = rounds * found["local_steps"], 0.0
        if config is not None:
            holders, metrics = config.holders, config.privacy.metrics
            asked = most_participations(rounds, holders.count, holders.per_round or holders.count)
            steps = planned_steps(config, asked)
            if metrics is not None:
                other = min(asked, rounds // metrics.every) / metrics.noise_multiplier**2
        if not sampled:
            return cost(noise, found["delta"], steps, None, other).epsilon
        rows = [(noise, found["sample_rate"], steps), *([(1 / math.sqrt(other), 1.0, 1)] if other else [])]
        return pld_epsilon(rows, found["delta"], 2e-3)

    noises = [found["noise_multiplier"] * factor for factor in FACTORS]
    return {noise: [(rounds, epsilon(noise, rounds)) for rounds in shown] for noise in noises}
