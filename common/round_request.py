"""What the server asks of every data holder in one round: all that fixes the mechanism, and nothing of Flower.

protocol.py says how a request travels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedhead.common.config.schema import Optimizer
from fedhead.common.privacy.events import MOST_STEPS


class PlannedCounts(BaseModel):
    """The noised counts of a whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    number: int = Field(ge=1, le=100_000)
    noise_multiplier: float = Field(gt=0)


class RoundRequest(BaseModel):
    """All that fixes what a holder does in one round, checked field by field before anything is read.

    The noise multiplier, clipping norm, sample rate and declared record count change the guarantee; the holder's own
    policy has the last word on them. `seed` is for simulation: a deployed holder ignores it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    run: str = Field(min_length=1, max_length=64)
    round: int = Field(ge=1, le=MOST_STEPS)
    task: str
    backbone: str = Field(description="Digest of the backbone.")
    unit: Literal["record", "person", "holder"] = "record"
    records_per_person: int | None = Field(None, ge=1, le=10_000)
    mechanism: Literal["full-batch", "poisson", "none"]
    noise_multiplier: float = Field(ge=0)
    clipping_norm: float = Field(gt=0)
    sample_rate: float | None = Field(None, gt=0, lt=1)
    local_steps: int = Field(ge=1, le=100_000)
    declared_records: int = Field(ge=1, le=MOST_STEPS)
    optimizer: Optimizer
    learning_rate: float = Field(gt=0)
    proximal_mu: float = Field(0.0, ge=0)
    chunk: int = Field(4096, ge=1)
    seed: int | None = Field(None, ge=0)
    plan_steps: int = Field(1, ge=1, le=MOST_STEPS, description="Private steps that the whole run asks of a holder.")
    delta: float = Field(1e-5, gt=0, lt=1, description="The delta that the run's epsilon goes with.")
    plan_counts: PlannedCounts | None = Field(None, description="Noised counts that the whole run asks of a holder.")
    metrics_noise: float | None = Field(
        None, gt=0, description="Noise on the count of correct answers, in units; None when no count is asked for."
    )
