"""Rules that span several settings: combinations that can't be run, or that would promise what can't be kept.

Each check looks at the recipe as far as it is valid (a section with faults is None) and gives its faults, so that they
are reported together with those of single settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedhead.common.config.faults import fault, setting_name
from fedhead.common.config.privacy import PrivacySettings
from fedhead.common.config.schema import (
    ColumnPartition,
    DataSettings,
    HolderSettings,
    ModelSettings,
    RunSettings,
    SizePartition,
    TaskSettings,
    TrainingSettings,
)
from fedhead.common.config.strategies import FedMedian, FedTrimmedAvg, Krum, Strategy


@dataclass(frozen=True)
class Sections:
    """The sections of a recipe; None for one that has faults of its own."""

    task: TaskSettings | None = None
    model: ModelSettings | None = None
    data: DataSettings | None = None
    holders: HolderSettings | None = None
    privacy: PrivacySettings | None = None
    training: TrainingSettings | None = None
    strategy: Strategy | None = None
    run: RunSettings | None = None


def _labels(s: Sections) -> Iterator[str]:
    if s.task is not None and len(set(s.task.labels)) < len(s.task.labels):
        twice = sorted({label for label in s.task.labels if s.task.labels.count(label) > 1})
        yield fault("task.labels", twice, "a label must be listed once", "Remove the repetition.")
    if s.task is not None and s.task.kind != "classification" and not s.task.kind.startswith("module:"):
        yield fault(
            "task.kind", s.task.kind, "it must be one of 'classification', 'module:package.module:name'",
            'Set task.kind = "classification".',
        )  # fmt: skip


def _noise(s: Sections) -> Iterator[str]:
    p = s.privacy
    if p is None:
        return
    if p.mechanism == "none":
        for name in ("epsilon", "noise_multiplier"):
            if getattr(p, name) is not None:
                yield fault(
                    f"privacy.{name}", getattr(p, name), 'it must be left out when privacy.mechanism is "none"',
                    'Remove it, or set privacy.mechanism = "full-batch".',
                )  # fmt: skip
    elif p.epsilon is None and p.noise_multiplier is None:
        yield (
            "privacy.epsilon is missing: it must be given, or privacy.noise_multiplier instead. "
            'Set privacy.epsilon = 3.0, or privacy.mechanism = "none" for a run without privacy.'
        )
    elif p.epsilon is not None and p.noise_multiplier is not None:
        yield fault(
            "privacy.noise_multiplier", p.noise_multiplier, "it can't be given together with privacy.epsilon",
            "Remove one: each follows from the other.",
        )  # fmt: skip
    if p.mechanism == "poisson" and p.sample_rate is None:
        yield (
            'privacy.sample_rate is missing: it must be given when privacy.mechanism is "poisson". '
            "Set the share of records that a step takes, such as 0.05."
        )
    if p.mechanism != "poisson" and p.sample_rate is not None:
        yield fault(
            "privacy.sample_rate", p.sample_rate, f'it has no meaning when privacy.mechanism is "{p.mechanism}"',
            'Remove it, or set privacy.mechanism = "poisson".',
        )  # fmt: skip


# Below these, squares and quotients leave the range of floats, or the accountant's grids outgrow the memory.
_LEAST = {"noise_multiplier": 1e-12, "clipping_norm": 1e-12, "sample_rate": 1e-6}


def _reach(s: Sections) -> Iterator[str]:
    for name, least in _LEAST.items():
        value = None if s.privacy is None else getattr(s.privacy, name)
        if value is not None and value < least:
            yield fault(f"privacy.{name}", value, f"it must be at least {least:g}", "Give a larger value.")


def _unit(s: Sections) -> Iterator[str]:
    p = s.privacy
    if p is None:
        return
    if p.unit == "person" and p.person is None:
        yield (
            'privacy.person is missing: it must name a column when privacy.unit is "person". '
            'Set the column that says whose record it is, such as "patient_id".'
        )
    if p.unit == "person" and s.model is not None and s.model.unfreeze:
        yield fault(
            "model.unfreeze", s.model.unfreeze,
            'it must be 0 when privacy.unit is "person": a person is a sequence of feature vectors',
            'Set model.unfreeze = 0, or protect records with privacy.unit = "record".',
        )  # fmt: skip
    if p.unit == "holder" and p.mechanism == "poisson":
        yield fault(
            "privacy.mechanism", p.mechanism, 'the unit "holder" claims no amplification by sampling',
            'Set privacy.mechanism = "full-batch".',
        )  # fmt: skip
    if p.unit == "holder" and p.metrics is not None:
        yield (
            'privacy.metrics is given: its noise hides records, and privacy.unit is "holder". '
            "Remove it: units are never mixed in one figure."
        )
    if p.unit == "holder" and p.mechanism != "none" and isinstance(s.strategy, FedMedian | FedTrimmedAvg | Krum):
        yield fault(
            "strategy.kind", s.strategy.kind,
            'it needs single updates, and under privacy.unit = "holder" a strategy sees their noised mean only',
            'Set strategy.kind = "fedavgm".',
        )  # fmt: skip
    if p.metrics is not None and p.mechanism == "none":
        yield 'privacy.metrics is given: it has no meaning when privacy.mechanism is "none". Remove it.'
    if p.metrics is not None and s.training is not None and p.metrics.every > s.training.rounds:
        yield fault(
            "privacy.metrics.every", p.metrics.every, f"it must be at most training.rounds, {s.training.rounds}",
            "Lower it.",
        )  # fmt: skip
    if p.person is not None and s.data is not None and p.person in s.data.columns.values():
        yield fault(
            "privacy.person", p.person, "it must be a column of its own, not an input or label",
            "Name the column that says whose record it is.",
        )  # fmt: skip


def _test(s: Sections) -> Iterator[str]:
    if s.data is None:
        return
    given = [name for name in ("source", "fraction") if getattr(s.data.test, name) is not None]
    if len(given) != 1:
        yield fault(
            "data.test", dict.fromkeys(given), "it must have exactly one of source and fraction",
            "Name public test records, or hold out a share such as fraction = 0.2.",
        )  # fmt: skip
    if s.data.test.columns is not None and s.data.test.source is None:
        yield "data.test.columns is given: it has no meaning without data.test.source. Remove it."
    for role in s.data.columns:
        if role not in ("text", "image", "vector", "label"):
            yield fault(
                setting_name(("data", "columns", role), {}), s.data.columns[role],
                "a role must be one of text, image, vector, label", "Further columns need no role.",
            )  # fmt: skip
    label = s.data.columns.get("label", "label")
    for role in ("text", "image", "vector"):
        if s.data.columns.get(role) == label:
            yield fault(
                f"data.columns.{role}", label, "it must be another column than the label's", "Name the input's column."
            )
    if len({"text", "image", "vector"} & set(s.data.columns)) > 1:
        yield fault(
            "data.columns", s.data.columns, "a record must have one input: text, image or vector", "Keep one of them."
        )


def _holders(s: Sections) -> Iterator[str]:
    h = s.holders
    if h is None:
        return
    if h.per_round is not None and h.per_round > h.count:
        yield fault(
            "holders.per_round",
            h.per_round,
            f"it must be at most holders.count, {h.count}",
            "Lower it or leave it out.",
        )
    if isinstance(h.partition, SizePartition) and len(h.partition.sizes) != h.count:
        yield fault(
            "holders.partition.sizes", h.partition.sizes, f"it must have one size for each of the {h.count} holders",
            f"Set holders.count = {len(h.partition.sizes)}, or change the sizes.",
        )  # fmt: skip
    if (
        isinstance(h.partition, ColumnPartition)
        and s.data is not None
        and h.partition.column in s.data.columns.values()
    ):
        yield fault(
            "holders.partition.column", h.partition.column, "it must be a column of its own, not an input or label",
            "Name the column that says which holder a record belongs to.",
        )  # fmt: skip
    cohort = h.per_round or h.count
    if isinstance(s.strategy, Krum) and cohort < s.strategy.malicious + 3:
        yield fault(
            "strategy.malicious", s.strategy.malicious,
            f"krum needs at least malicious + 3 holders a round, here {cohort}", "Lower it, or ask more holders.",
        )  # fmt: skip
    if isinstance(s.strategy, FedTrimmedAvg) and int(s.strategy.beta * cohort) * 2 >= cohort:
        yield fault(
            "strategy.beta", s.strategy.beta, f"it would cut off all of the {cohort} holders of a round", "Lower it."
        )


def _model(s: Sections) -> Iterator[str]:
    m = s.model
    if m is None:
        return
    if m.head.kind not in ("linear", "mlp") and not m.head.kind.startswith("module:"):
        yield fault("model.head.kind", m.head.kind, "it must be one of 'linear', 'mlp', 'module:...'", "Choose one.")
    family, _, name = m.backbone.partition(":")
    if family not in ("torchvision", "transformers", "module") or not name:
        yield fault(
            "model.backbone", m.backbone, "it must be torchvision:NAME, transformers:ID_OR_PATH or module:...:factory",
            "Name one, such as torchvision:resnet18.",
        )  # fmt: skip


def _schedule(s: Sections) -> Iterator[str]:
    t = s.training
    if t is not None and t.schedule.warmup >= t.rounds:
        yield fault(
            "training.schedule.warmup", t.schedule.warmup, f"it must be less than training.rounds, {t.rounds}",
            "Lower it or leave it out.",
        )  # fmt: skip


def _budget(s: Sections) -> Iterator[str]:
    budget = None if s.holders is None else s.holders.budget
    if budget is None or s.privacy is None:
        return
    if budget.per_run is not None and budget.per_run.epsilon > budget.epsilon:
        yield fault(
            "holders.budget.per_run.epsilon", budget.per_run.epsilon,
            f"it must be at most holders.budget.epsilon, {budget.epsilon:g}", "Lower it.",
        )  # fmt: skip
    share = budget.poisson_share
    if s.privacy.mechanism == "poisson" and share == 0:
        yield fault(
            "holders.budget.poisson_share", share, 'it must be more than 0 when privacy.mechanism is "poisson"',
            "Set the share of the budget that Poisson plans may spend, such as 1.0.",
        )  # fmt: skip
    if s.privacy.mechanism == "full-batch" and share == 1:
        yield fault(
            "holders.budget.poisson_share", share, 'it must be less than 1 when privacy.mechanism is "full-batch"',
            "Lower it or leave it out.",
        )  # fmt: skip


CHECKS: tuple[Callable[[Sections], Iterator[str]], ...] = (
    _labels, _model, _test, _holders, _noise, _reach, _unit, _budget, _schedule,
)  # fmt: skip
