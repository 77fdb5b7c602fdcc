"""The recipe's `[privacy]`: every setting that changes what is promised, save for ``data.declared_records``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedhead.common.config.tables import Table


class MetricSettings(Table):
    """Noised counts of correct answers on records that each holder keeps apart from training."""

    every: int = Field(10, ge=1, description="Rounds between counts; the last round always has one.")
    noise_multiplier: float = Field(
        20.0, gt=0, le=1e6, description="Standard deviation of the noise on a count, in units. Each costs 1/noise²."
    )
    fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of a holder's records kept apart for them, by a keyed hash of the record (of the person).",
    )


class PrivacySettings(Table):
    """What is promised to whom, and by which mechanism."""

    unit: Literal["record", "person", "holder"] = Field(
        "record",
        description="Whose presence is hidden: a `record`, a `person` with all their records at a holder, or a whole "
        "`holder` (the server adds the noise and is trusted to do so).",
    )
    person: str | None = Field(
        None,
        description="The column that says whose record it is. Needed by the unit `person`; named under the unit "
        "`record`, the result warns that people with several records are protected less.",
    )
    records_per_person: int = Field(
        10,
        ge=1,
        le=10_000,
        description="Most records of a person that are used (unit `person`); the surplus is left out by a keyed hash.",
    )
    mechanism: Literal["full-batch", "poisson", "none"] = Field(
        "full-batch",
        description="`full-batch`: every record in every step, exact Gaussian accounting. `poisson`: each step "
        "takes each record with probability `sample_rate`. `none`: no clipping, no noise, epsilon is infinite.",
    )
    epsilon: float | None = Field(None, gt=0, description="Most that the whole run may spend at each holder.")
    noise_multiplier: float | None = Field(
        None, gt=0, le=1e6, description="Noise standard deviation over clipping norm, instead of `epsilon`."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="The delta that goes with epsilon.")
    sample_rate: float | None = Field(None, gt=0, lt=1, description="Probability of each record in a step (poisson).")
    clipping_norm: float = Field(
        0.3,
        gt=0,
        le=1e6,
        description="Most that one unit can move the gradient sum (L2 norm over all trained parameters).",
    )
    metrics: MetricSettings | None = Field(
        None, description="Noised metrics from the holders, charged to their budgets. Default: none."
    )
