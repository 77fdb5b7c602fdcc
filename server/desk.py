"""What the coordinator works with besides the grid: recipe, backbone, trained part and test records.

A simulation prepares it once, together with its holders; any other process makes it itself, from the recipe alone. A
deployment reads the public test records only, because the training records lie at the holders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedhead.common.config import RunConfig, find_recipe, from_json
from fedhead.common.data.sources import load_records
from fedhead.common.models.backbones import Backbone
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled, default_cache, featurize, load_backbone_for, make_trainable, read_split
from fedhead.common.tasks import Task, make_task


@dataclass(frozen=True)
class Desk:
    """What the coordinator needs besides the grid; a simulation prepares it, any other process makes it itself.

    Attributes
    ----------
    digest : str
        Of the backbone.
    declared : (int, str)
        Divisor of every holder's gradient sum, and where it comes from.
    simulated : bool
        Whether noise that the server adds (unit `holder`) may come from the recipe's seed.
    """

    config: RunConfig
    backbone: Backbone
    task: Task
    trainable: Trainable
    test: Labelled
    declared: tuple[int, str]
    timing: dict[str, float] = field(default_factory=dict)
    simulated: bool = False


_DESKS: dict[str, Desk] = {}


def offer(key: str, desk: Desk) -> None:
    """Keep a desk that a simulation prepared; `key` is the recipe as `to_json` writes it."""
    _DESKS[key] = desk


def withdraw(key: str) -> None:
    """Forget a desk."""
    _DESKS.pop(key, None)


def offered(key: str) -> Desk | None:
    """The desk that was prepared for a recipe, if any."""
    return _DESKS.get(key)


def prepare(recipe: str, cache: str) -> Desk:
    """A desk from the recipe alone."""
    config = from_json(recipe) if recipe.lstrip().startswith("{") else find_recipe(recipe)
    split = read_split(config)
    backbone, seconds = load_backbone_for(config, split.train)
    task = make_task(config.task)
    folder = Path(cache) if cache else default_cache()
    test = featurize(config, backbone, split.test, folder, "test features")
    declared = declared_records(config, split.units)
    return Desk(
        config, backbone, task, make_trainable(config, backbone, task), test, declared, {"load_seconds": seconds}
    )


def declared_records(config: RunConfig, simulated: int) -> tuple[int, str]:
    """The divisor of every holder's gradient sum, and where it comes from.

    In a simulation that doesn't declare one, it is the mean number of records a holder, rounded up to two digits: good
    for trying things out, and marked in the result, because a deployment must declare a public constant.
    """
    if config.data.declared_records is not None:
        return config.data.declared_records, "recipe"
    mean = max(1, -(-simulated // config.holders.count))
    unit = 10 ** max(0, len(str(mean)) - 2)
    return -(-mean // unit) * unit, "simulated data"


def prepare_deployed(config: RunConfig, cache: Path | None = None) -> Desk:
    """A desk for holders that are elsewhere: nothing of `data.source` is read.

    Parameters
    ----------
    config : RunConfig
        With `data.test.source` and `data.declared_records`.

    Raises
    ------
    InputError
        The test records or the backbone can't be used.
    """
    data = config.data
    assert data.test.source is not None  # held before a run is submitted
    assert data.declared_records is not None
    columns = data.columns if data.test.columns is None else data.test.columns
    records = load_records(
        data.test.source, columns, config.task.labels, config.base, setting="data.test", split="test"
    )
    backbone, seconds = load_backbone_for(config, records)
    task = make_task(config.task)
    test = featurize(config, backbone, records, cache or default_cache(), "test features")
    declared = data.declared_records, "recipe"
    return Desk(
        config, backbone, task, make_trainable(config, backbone, task), test, declared, {"load_seconds": seconds}
    )
