"""Rules that span several settings: combinations that can't be run, or that would promise what can't be kept.

Each check looks at the recipe as far as it is valid (a section with faults is None) and gives its faults, so that they
are reported together with those of single settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedhead.common.config.faults import fault, setting_name
from fedhead.common.config.schema import (
    ColumnPartition,
    DataSettings,
    HolderSettings,
    ModelSettings,
    PrivacySettings,
    RunSettings,
    SizePartition,
    TaskSettings,
    TrainingSettings,
)
from fedhead.common.config.strategies import FedTrimmedAvg, Krum, Strategy


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
    if s.privacy is not None and s.privacy.unit != "record":
        yield fault(
            "privacy.unit", s.privacy.unit, 'this version protects the unit "record" only',
            'Set privacy.unit = "record", and don\'t read its epsilon as one of persons with several records.',
        )  # fmt: skip
    if s.privacy is not None and s.privacy.unit == "record" and s.privacy.person is not None:
        yield fault("privacy.person", s.privacy.person, 'it has no meaning when privacy.unit is "record"', "Remove it.")


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


CHECKS: tuple[Callable[[Sections], Iterator[str]], ...] = (
    _labels, _model, _test, _holders, _noise, _reach, _unit, _schedule,
)  # fmt: skip
