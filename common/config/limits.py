"""What a data holder allows: its budget and its limits, as holder.toml and a simulation's `[holders]` both write them.

Nothing that arrives from a server can change them; `fedhead.client.policy` holds every request to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedhead.common.config.tables import Table

if TYPE_CHECKING:
    from fedhead.common.privacy.terms import Terms

Unit = Literal["record", "person", "holder"]


class PerRun(Table):
    """Most that one run may spend."""

    epsilon: float = Field(gt=0, description="Most that one run may spend.")
    delta: float | None = Field(
        None, gt=0, lt=1, description="The delta that goes with it. Default: the budget's own delta."
    )


class Budget(Table):
    """What may be spent in all, over runs, restarts and changes of the data."""

    domain: str = Field(
        "default",
        min_length=1,
        max_length=64,
        pattern=r"^[\w.-]+$",
        description="The budget domain: whose data this is, whatever its fingerprint. Data that changes stays in it.",
    )
    epsilon: float = Field(gt=0, description="Most that all runs together may spend.")
    delta: float = Field(1e-5, gt=0, lt=1, description="The delta that goes with epsilon.")
    per_run: PerRun | None = Field(None, description="Most that one run may spend.")
    poisson_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of epsilon and delta set aside for Poisson plans; the rest is for full-batch steps and "
        "counts. It is fixed beforehand, because a budget that moves with what was seen promises nothing.",
    )
    disjoint_from: list[str] = Field(
        default_factory=list,
        description="Domains of the same holder that share no person (no record, under the unit `record`) with this "
        "one. Others add up. `fedhead check` compares, and refuses what isn't so.",
    )

    def terms(self) -> Terms:
        """The budget as the filter reads it."""
        from fedhead.common.privacy.terms import Terms  # brings numpy, which reading a recipe doesn't need

        run = self.per_run
        return Terms(
            epsilon=self.epsilon,
            delta=self.delta,
            poisson_share=self.poisson_share,
            run_epsilon=None if run is None else run.epsilon,
            run_delta=None if run is None else run.delta,
        )


class ReleaseLimits(Table):
    """What may leave besides the noised update."""

    metrics: bool = Field(False, description="Whether noised counts of correct answers may leave; they are charged.")
    metrics_noise_multiplier_min: float = Field(
        10.0, gt=0, description="Least noise on such a count, as a standard deviation in units. Each costs 1/noise²."
    )
    declared_records: int | None = Field(
        None,
        ge=1,
        description="A public constant that stands for the number of units, as divisor and weight, instead of the "
        "request's. Never the true count. In a deployment the coordinator's server.toml must have the same number in "
        "`declared_records`: it weighs by that.",
    )


class Limits(Table):
    """What a request may ask for."""

    units: list[Unit] = Field(
        ["record", "person"],
        min_length=1,
        description="Privacy units that are accepted. One budget covers one unit: the first that a domain is charged "
        "under stays its only one. `holder` trusts the server to add the noise, and must stand alone.",
    )
    tasks: list[str] | None = Field(None, description="Kinds of task that are accepted. Default: any.")
    backbones: list[Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-f]{64}$")]] | None = Field(
        None, description="Digests of the backbones that are accepted, `sha256:...`. Default: any."
    )
    heads: list[Literal["linear", "mlp", "module", "unfrozen", "unnormalized"]] = Field(
        ["linear"],
        min_length=1,
        description="What may be trained. For a `linear` head with cross-entropy on features of length 1 the bound on "
        "what one unit changes is proved, rounding included. For others (`unfrozen`: blocks of the backbone; "
        "`unnormalized`: `model.features.normalize = false`) a server that chooses the weights can carry rounding "
        "beyond it: name them only for servers that you trust that far. Deployment only.",
    )
    modules: list[str] = Field(
        default_factory=list,
        description="Code that a request may name as `module:package.module:name`, such as `torch.nn:Identity`. It "
        "must be installed here; nothing that arrives is ever run. Default: none. Deployment only.",
    )
    clipping_norm_max: float | None = Field(None, gt=0, description="Largest clipping norm. Default: any.")
    noise_multiplier_min: float | None = Field(
        None, gt=0, description="Least noise multiplier of a step. Default: any; the budget still counts."
    )
    least_records: int = Field(
        1,
        ge=1,
        description="Fewest records to take part with. Looked at by `check` and `join`, never within a run. "
        "Deployment only.",
    )
    most_records: int = Field(
        2**17,
        ge=1,
        le=2**20,
        description="Most records to take part with: a public number. Rounding is covered for so many; the fewer, the "
        "longer the weights of a head may be. With persons as the unit records count as more, because each person's "
        "are added up first: `check` says as how many. Deployment only.",
    )
    release: ReleaseLimits = Field(
        default_factory=ReleaseLimits, description="What may leave besides the noised update."
    )
    allow_seeded_noise: bool = Field(
        False,
        description="Draw noise from a seed that arrives: for tests only, epsilon is then infinite. Deployment only.",
    )
    round_seconds: float = Field(
        3600.0,
        gt=0,
        description="Longest time for training in one round: then the training process is ended and started anew. The "
        "round stays spent. It never has longer than the coordinator waits for its answer. Deployment only.",
    )
    prepare_seconds: float = Field(
        86_400.0,
        gt=0,
        description="Longest time to open the records and compute their features when a recipe arrives: then the "
        "recipe is refused as one whose records can't be opened. Deployment only.",
    )
    exact_noise_seconds: float = Field(
        5.0,
        ge=0,
        description="Longest time for the noise of one release by exact discrete sampling; where it would take "
        "longer, noise comes from a keyed generator, and the ledger says so. Deployment only.",
    )
    reply_at: float = Field(
        0.0,
        ge=0,
        description="Seconds after a request at which the reply leaves, so that its time says nothing. Deployment "
        "only.",
    )
