"""From a recipe to the request of each round: noise, divisor, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedhead.common.config.schema import RunConfig
from fedhead.common.config.strategies import FedAvgM
from fedhead.common.planned import central, counted, planned_counts, planned_noise, planned_steps
from fedhead.common.round_request import PlannedCounts, RoundRequest

# Chosen by measurement, see docs/defaults.md. The effective rate, learning rate times clipping norm over 1 - momentum,
# is SIGNAL over the noise in one coordinate of the averaged gradient; the rate itself is at most MOST_STEP times
# 1 + momentum, because gradient descent is stable up to a rate that grows so with momentum. Both are for a linear
# head; what has more parameters takes in more noise and gets a share of them.
SIGNAL = 0.25
MOST_STEP = 5.0
SHARE_OF_MLP = 0.3
SHARE_OF_UNFROZEN = 0.03
# Under the unit "holder" what is clipped is a whole update. A rate of MOST_UPDATE clipping norms a round carries nearly
# every update beyond the clipping norm, where its length says nothing and its direction all, see docs/defaults.md.
MOST_UPDATE = 30.0


@dataclass(frozen=True)
class Plan:
    """The requests of a run.

    Attributes
    ----------
    config : RunConfig
    run : str
        Identifier of the run.
    backbone : str
        Digest of the backbone.
    noise_multiplier : float
        Noise standard deviation over clipping norm, the same in every step; 0 without privacy.
    declared_records : int
        Divisor of every holder's gradient sum.
    learning_rate : float
        Before the schedule.
    plan_steps : int
        Private steps that the whole run asks of a holder at most.
    plan_counts : PlannedCounts or None
        Noised counts that it asks for at most.
    """

    config: RunConfig
    run: str
    backbone: str
    noise_multiplier: float
    declared_records: int
    learning_rate: float
    plan_steps: int = 1
    plan_counts: PlannedCounts | None = None

    def request(self, number: int) -> RoundRequest:
        """The request of a round (from 1)."""
        c = self.config
        return RoundRequest(
            run=self.run,
            round=number,
            task=c.task.kind,
            backbone=self.backbone,
            mechanism="none" if central(c) else c.privacy.mechanism,
            noise_multiplier=self.noise_multiplier,
            clipping_norm=c.privacy.clipping_norm,
            sample_rate=c.privacy.sample_rate,
            local_steps=c.training.local_steps,
            declared_records=self.declared_records,
            optimizer=c.training.optimizer,
            learning_rate=self.learning_rate * schedule_factor(c, number),
            proximal_mu=getattr(c.strategy, "proximal_mu", 0.0),
            chunk=c.training.chunk,
            seed=c.run.seed,
            unit=c.privacy.unit,
            records_per_person=c.privacy.records_per_person if c.privacy.unit == "person" else None,
            plan_steps=self.plan_steps,
            plan_counts=self.plan_counts,
            delta=c.privacy.delta,
            metrics_noise=c.privacy.metrics.noise_multiplier if c.privacy.metrics and counted(c, number) else None,
        )


def make_plan(config: RunConfig, run: str, backbone: str, declared_records: int, participations: int) -> Plan:
    """Plan the noise so that `participations` rounds spend at most the recipe's epsilon at every holder.

    Parameters
    ----------
    participations : int
        Most rounds that any one holder takes part in.
    """
    noise, steps = planned_noise(config, participations), planned_steps(config, participations)
    metrics, asked = config.privacy.metrics, planned_counts(config, participations)
    counts = None
    if metrics is not None and asked:
        counts = PlannedCounts(number=asked, noise_multiplier=metrics.noise_multiplier)
    rate = learning_rate(config, noise, declared_records)
    return Plan(config, run, backbone, noise, declared_records, rate, steps, counts)


def learning_rate(config: RunConfig, noise_multiplier: float, declared_records: int) -> float:
    """The recipe's learning rate, or the default for plain gradient descent.

    The averaged gradient of a round carries noise of known size in every coordinate, and the default rate is inversely
    proportional to it: more noise, smaller steps. Everything in the formula is public: noise multiplier, clipping
    norm, number of holders, declared records. Momentum m adds up to 1 / (1 - m) steps, so the rate is scaled back, and
    local steps share the rate of a round.

    Returns
    -------
    float
        Before the schedule.
    """
    optimizer, privacy = config.training.optimizer, config.privacy
    if optimizer.learning_rate is not None:
        return optimizer.learning_rate
    server = config.strategy.momentum if isinstance(config.strategy, FedAvgM) else 0.0
    momentum = max(server, getattr(optimizer, "momentum", 0.0))
    steps = config.training.local_steps
    share = _share(config)
    most = share * MOST_STEP * (1 + momentum)
    if privacy.mechanism == "none":
        # a person's loss is the sum over their records, and the steepness with it
        return most / (steps * (max(1.0, privacy.records_per_person / 2) if privacy.unit == "person" else 1.0))
    if central(config):
        return share * min(MOST_UPDATE * privacy.clipping_norm, MOST_STEP) / steps
    cohort = config.holders.per_round or config.holders.count
    divisor = declared_records * (privacy.sample_rate or 1.0)
    # Standard deviation in a coordinate of the mean over the cohort's steps of a round, in units of the clipping norm.
    noise = noise_multiplier / (divisor * math.sqrt(cohort * steps))
    return min(share * SIGNAL / noise * (1 - momentum), most) / (steps * privacy.clipping_norm)


def _share(config: RunConfig) -> float:
    if config.model.unfreeze:
        return SHARE_OF_UNFROZEN
    return 1.0 if config.model.head.kind == "linear" else SHARE_OF_MLP


def schedule_factor(config: RunConfig, number: int) -> float:
    """Factor on the learning rate in a round (from 1), in (0, 1]."""
    schedule, rounds = config.training.schedule, config.training.rounds
    if number <= schedule.warmup:
        return number / (schedule.warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    done = (number - 1 - schedule.warmup) / max(1, rounds - schedule.warmup)
    shape = 1 - done if schedule.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return max(schedule.floor + (1 - schedule.floor) * shape, 1e-6)
