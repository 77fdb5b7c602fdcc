"""What a data holder's process keeps between messages: features, targets, the trained part and its trainer.

In a simulation in one process, the engine puts it here once for all holders. Any other process (a Ray worker, `flwr
run`) prepares it from the recipe when the first message arrives, from the feature cache if that is warm.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context

from fedhead.client.training import Trainer
from fedhead.common.config import RunConfig, from_json
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import (
    Labelled,
    default_cache,
    featurize,
    load_backbone_for,
    make_trainable,
    read_split,
)
from fedhead.common.tasks import make_task


@dataclass(frozen=True)
class Workplace:
    """All that training needs, the same for every holder of a process but for the records.

    Attributes
    ----------
    config : RunConfig
    backbone : str
        Digest of the backbone.
    trainer : Trainer
        Bound to the trained part; one round at a time.
    holders : sequence of (name, Labelled)
        By partition id.
    simulated : bool
        Whether randomness may come from a seed in the request; a deployed holder never lets it.
    """

    config: RunConfig
    backbone: str
    trainer: Trainer
    holders: list[tuple[str, Labelled]]
    simulated: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def trainable(self) -> Trainable:
        """The trained part as one module."""
        trainable: Trainable = self.trainer.trainable
        return trainable


_WORKPLACES: dict[str, Workplace] = {}


def holder_name(number: int) -> str:
    """The name of a simulated holder, sorted by name in the order of numbers."""
    return f"holder-{number:05d}"


def offer(key: str, workplace: Workplace) -> None:
    """Keep a workplace that the engine prepared; `key` is the recipe as `to_json` writes it."""
    _WORKPLACES[key] = workplace


def withdraw(key: str) -> None:
    """Forget a workplace."""
    _WORKPLACES.pop(key, None)


def workplace_of(context: Context) -> tuple[Workplace, str, Labelled]:
    """The workplace, name and records of the holder that a message is for."""
    key = str(context.run_config["recipe"])
    workplace = _WORKPLACES.get(key)
    if workplace is None:
        cache = str(context.run_config.get("cache", ""))
        workplace = prepare(resolve_recipe(key), Path(cache) if cache else default_cache())
        _WORKPLACES.clear()
        offer(key, workplace)
    number = int(context.node_config["partition-id"])
    return workplace, *workplace.holders[number]


def resolve_recipe(text: str) -> RunConfig:
    """A recipe from run config: JSON of `to_json`, a file's path, or the name of a built-in recipe."""
    if text.lstrip().startswith("{"):
        return from_json(text)
    from fedhead.common.config import find_recipe

    return find_recipe(text)


def prepare(config: RunConfig, cache: Path | None) -> Workplace:
    """A workplace from the recipe alone."""
    split = read_split(config)
    backbone, _ = load_backbone_for(config, split.train)
    train = featurize(config, backbone, split.train, cache, "training features")
    return arrange(
        config, backbone.digest, make_trainable(config, backbone, make_task(config.task)), train, split.holders
    )


def arrange(config: RunConfig, digest: str, trainable: Trainable, train: Labelled, parts: list[Any]) -> Workplace:
    """A workplace from features, each holder's records contiguous: one copy of the features, whatever the holders."""
    order = torch.cat([torch.from_numpy(part) for part in parts])
    joined = Labelled(train.features.take(order), train.targets[order])
    holders: list[tuple[str, Labelled]] = []
    start = 0
    for number, part in enumerate(parts):
        holders.append((holder_name(number), joined.slice(start, start + len(part))))
        start += len(part)
    return Workplace(config, digest, Trainer(trainable, make_task(config.task)), holders, simulated=True)
