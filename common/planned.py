"""What a run asks of each data holder, as far as the recipe alone decides: its releases, and the noise on them."""

from __future__ import annotations

from fedhead.common.config import RunConfig
from fedhead.common.privacy.planning import noise_multiplier_for


def central(config: RunConfig) -> bool:
    """Whether the server clips whole updates and adds the noise; the holders then train without any.

    Their requests carry the noise multiplier and clipping norm all the same: what the server promises to do.
    """
    return config.privacy.unit == "holder" and config.privacy.mechanism != "none"


def counted(config: RunConfig, number: int) -> bool:
    """Whether a round (from 1) asks for noised counts of correct answers."""
    metrics, rounds = config.privacy.metrics, config.training.rounds
    return metrics is not None and (number % metrics.every == 0 or number == rounds)


def counts_within(config: RunConfig, rounds: int) -> int:
    """In how many of the first rounds counts are asked for."""
    metrics = config.privacy.metrics
    if metrics is None:
        return 0
    last = rounds == config.training.rounds and rounds % metrics.every != 0
    return rounds // metrics.every + last


def planned_steps(config: RunConfig, participations: int) -> int:
    """Noised releases that a run asks of a holder; under the unit `holder` one a round, whatever its local steps."""
    return participations * (1 if central(config) else config.training.local_steps)


def planned_counts(config: RunConfig, participations: int) -> int:
    """Noised counts that a run asks of a holder at most."""
    return min(counts_within(config, config.training.rounds), participations)


def counts_cost(config: RunConfig, participations: int) -> float:
    """What the noised counts of a run cost a holder at most: the sum of 1 / noise^2."""
    metrics = config.privacy.metrics
    if metrics is None:
        return 0.0
    return planned_counts(config, participations) / metrics.noise_multiplier**2


def planned_noise(config: RunConfig, participations: int) -> float:
    """The noise multiplier with which `participations` rounds cost a holder at most the recipe's epsilon.

    Returns
    -------
    float
        The recipe's own where it gives one; 0 without privacy.

    Raises
    ------
    InputError
        No noise reaches epsilon.
    """
    privacy = config.privacy
    if privacy.mechanism == "none":
        return 0.0
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None
    return noise_multiplier_for(
        privacy.epsilon,
        privacy.delta,
        privacy.mechanism,
        planned_steps(config, participations),
        privacy.sample_rate,
        counts_cost(config, participations),
    )


def most_participations(rounds: int, holders: int, per_round: int) -> int:
    """Most rounds that one holder takes part in: ceil(rounds * per_round / holders)."""
    return -(-rounds * min(per_round, holders) // holders)
