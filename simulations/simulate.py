"""A whole federated run on this machine: prepare once, run the apps, compare, write the result folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedhead.client import app as client_app
from fedhead.client import workplace
from fedhead.common import progress
from fedhead.common.config import RunConfig, changed, find_recipe, to_json
from fedhead.common.config.schema import SGD
from fedhead.common.errors import DataError, InputError
from fedhead.common.models.backbones import Backbone
from fedhead.common.preparation import (
    Labelled,
    Split,
    default_cache,
    featurize,
    import_readers,
    load_backbone_for,
    make_trainable,
    read_split,
)
from fedhead.common.results import Result, write_aside
from fedhead.common.tasks import make_task
from fedhead.server import app as server_app
from fedhead.server.evaluation import load_state, outputs_of
from fedhead.simulations.engine import run_in_process
from fedhead.simulations.faults import plainly
from fedhead.simulations.folders import SEEDS, claimed
from fedhead.simulations.logs import FILE as HOLDERS_LOG
from fedhead.simulations.logs import holders_log

Engine = Literal["inprocess", "ray"]


@dataclass(frozen=True)
class Prepared:
    """Everything of a simulation that doesn't change from run to run: records, features, backbone."""

    config: RunConfig
    split: Split
    backbone: Backbone
    train: Labelled
    test: Labelled
    timing: Mapping[str, float]


def simulate(
    recipe: RunConfig | str | Path,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    state: str | Path | None = None,
    engine: Engine = "inprocess",
    resume: bool = False,
    progress_listener: progress.Listener | None = None,
) -> Result:
    """Run a whole federation on this machine.

    Parameters
    ----------
    recipe : RunConfig, str or path
        A recipe, its file, or the name of a built-in one.
    out : path, optional
        Folder of the results; default: a new folder under `runs/`.
    name : str, optional
        Shown in the result and the report; default: the recipe's.
    state : path, optional
        Folder that keeps the feature cache between runs; default: the user's cache folder.
    engine : "inprocess" or "ray"
        Where the holders run.
    resume : bool
        Go on from the checkpoint in `out`; without one the run starts at its beginning.
    progress_listener : callable, optional
        Called as `listener(stage, done, total, note)`.

    Returns
    -------
    Result
        What result.json holds; `result.folder` is where it lies.

    Raises
    ------
    InputError
        When the recipe, the data or the model can't be used.
    RunError
        When the run could not go on.
    """
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    name = name or ("run" if isinstance(recipe, RunConfig) else Path(str(recipe)).stem)
    with (
        claimed(None if out is None else Path(out), name) as folder,
        holders_log(folder) as log,
        progress.listening(progress_listener),
        threads(config.run.exact),
        quiet(),
        plainly(config, log),
    ):
        prepared = prepare(config, cache_folder(state))
        return run(prepared, folder, name, engine, cache_folder(state), resume)


def simulate_seeds(
    recipe: RunConfig | str | Path,
    seeds: int,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    state: str | Path | None = None,
    engine: Engine = "inprocess",
    progress_listener: progress.Listener | None = None,
) -> dict[str, Any]:
    """Run the same recipe from several seeds: split, initial head, sampling and noise all change.

    Returns
    -------
    dict
        `seeds`, `folder`, and `metrics`: name -> {mean, deviation (of the sample), values}; also in seeds.json.
    """
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    name = name or ("run" if isinstance(recipe, RunConfig) else Path(str(recipe)).stem)
    if seeds < 1:
        raise InputError(f"seeds is {seeds}: it must be at least 1. Give a positive whole number such as 5.")
    results = []
    with (
        claimed(None if out is None else Path(out), name) as folder,
        holders_log(folder) as log,
        progress.listening(progress_listener),
        threads(config.run.exact),
        quiet(),
        plainly(config, log),
    ):
        for seed in range(config.run.seed, config.run.seed + seeds):
            one = changed(config, {"run.seed": seed})
            prepared = prepare(one, cache_folder(state))
            results.append(run(prepared, folder / f"seed-{seed}", name, engine, cache_folder(state)))
        summary = _over_seeds(results)
        write_aside(folder / SEEDS, (json.dumps(summary, indent=1) + "\n").encode())
    return {**summary, "folder": str(folder)}


def _over_seeds(results: list[Result]) -> dict[str, Any]:
    metrics = {
        key: {
            "mean": float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "values": values,
        }
        for key in results[0].final
        if all(key in result.final for result in results)  # a metric may be left out, such as AUC-ROC of one label
        for values in [[result.final[key] for result in results]]
    }
    return {"seeds": [result.config["run"]["seed"] for result in results], "metrics": metrics}


def prepare(config: RunConfig, cache: Path | None) -> Prepared:
    """Read records, load the backbone, compute or open features."""
    import_seconds = import_readers(config)
    started = time.perf_counter()
    split = read_split(config)
    backbone, load_seconds = load_backbone_for(config, split.train)
    train = featurize(config, backbone, split.train, cache, "training features")
    test = featurize(config, backbone, split.test, cache, "test features")
    check_usable(train, "training", config)
    check_usable(test, "test", config)
    features_seconds = time.perf_counter() - started - load_seconds
    timing = {"load_seconds": import_seconds + load_seconds, "features_seconds": features_seconds}
    return Prepared(config, split, backbone, train, test, timing)


def check_usable(records: Labelled, which: str, config: RunConfig) -> None:
    """Refuse records of which none has finite features: nothing could be learned from them, or said about the head.

    Raises
    ------
    DataError
    """
    if not bool(records.features.finite().any()):
        raise DataError(
            f'model.backbone is "{config.model.backbone}": none of the {len(records)} {which} records has finite '
            "features. Check the records for missing values, and the backbone's weights."
        )


def run(
    prepared: Prepared, folder: Path, name: str, engine: Engine, cache: Path | None, resume: bool = False
) -> Result:
    """One run from prepared features, its comparison without privacy, and the result folder."""
    started = time.perf_counter()
    config = prepared.config
    result = federate(prepared, config, folder, engine, cache, resume)
    finished = time.perf_counter()
    baseline = result.final if config.privacy.mechanism == "none" else None
    if config.run.baseline and baseline is None:
        with progress.listening(_renamed("without privacy")):
            baseline = federate(prepared, without_privacy(config), folder / "baseline", "inprocess", cache).final
    total = prepared.timing["features_seconds"] + finished - started
    result = replace(
        result,
        name=name,
        baseline=baseline,
        holders=holders_of(prepared, folder),
        timing={**result.timing, "total_seconds": total},
        notes=notes_of(prepared, result),
    )
    result = result.write(folder)
    from fedhead.simulations.report import write_report

    write_report(folder)
    return result


def federate(
    prepared: Prepared, config: RunConfig, folder: Path, engine: Engine, cache: Path | None, resume: bool = False
) -> Result:
    """Run both apps to the end; the server leaves its result in the folder."""
    key = to_json(config)
    task = make_task(config.task)
    declared = server_app.declared_records(config, len(prepared.train))
    trainable = make_trainable(config, prepared.backbone, task)
    desk = server_app.Desk(config, prepared.backbone, task, trainable, prepared.test, declared, dict(prepared.timing))
    run_config = {"recipe": key, "out": str(folder), "cache": str(cache or ""), "resume": resume}
    server_app.offer(key, desk)
    try:
        if engine == "ray":
            from fedhead.simulations.ray_engine import run_on_ray

            run_on_ray(server_app.app, config.holders.count, run_config)
        else:
            mine = workplace.arrange(
                config,
                prepared.backbone.digest,
                make_trainable(config, prepared.backbone, task),
                prepared.train,
                prepared.split.holders,
            )
            workplace.offer(key, mine)
            run_in_process(server_app.app, client_app.app, config.holders.count, run_config)
    finally:
        server_app.withdraw(key)
        workplace.withdraw(key)
    return Result.read(folder)


def without_privacy(config: RunConfig) -> RunConfig:
    """The same recipe without clipping and noise; a learning rate that was set for a clipping norm is scaled back."""
    changes: dict[str, Any] = {
        "privacy.mechanism": "none",
        "privacy.epsilon": None,
        "privacy.noise_multiplier": None,
        "privacy.sample_rate": None,
    }
    given = config.training.optimizer.learning_rate
    if isinstance(config.training.optimizer, SGD) and given is not None:
        changes["training.optimizer.learning_rate"] = given * config.privacy.clipping_norm
    return changed(config, changes)


def holders_of(prepared: Prepared, folder: Path) -> list[dict[str, Any]]:
    """What the simulator, and nobody in a deployment, knows of each holder: records, labels, accuracy."""
    from safetensors.torch import load_file

    config, split = prepared.config, prepared.split
    task = make_task(config.task)
    trainable = make_trainable(config, prepared.backbone, task)
    load_state(trainable, load_file(folder / "model" / "head.safetensors"))
    held_out = bool(split.holder_tests)
    source, rows = (prepared.test, split.holder_tests) if held_out else (prepared.train, split.holders)
    outputs, usable = outputs_of(trainable, source), source.features.finite().numpy()
    found = []
    for number, (part, test) in enumerate(zip(split.holders, rows, strict=True)):
        counts = np.bincount(split.train.labels[part], minlength=len(config.task.labels))
        mine = torch.from_numpy(test[usable[test]])
        found.append(
            {
                "name": workplace.holder_name(number),
                "records": len(part),
                "labels": dict(zip(config.task.labels, counts.tolist(), strict=True)),
                "metrics": task.metrics(outputs[mine], source.targets[mine]) if len(mine) else {},
                "metrics_on": "held-out records" if held_out else "its own training records",
            }
        )
    return found


def notes_of(prepared: Prepared, result: Result) -> list[str]:
    """What a reader of the result should know."""
    notes = []
    if result.declared_records["origin"] != "recipe":
        notes.append(
            f"data.declared_records was not given: {result.declared_records['value']} was taken from the size of the "
            "simulated data. A deployment needs a public constant, because the true count is a release."
        )
    if prepared.config.privacy.mechanism == "none":
        notes.append("This run had no privacy: nothing was clipped, no noise was added, epsilon is infinite.")
    else:
        notes.append("Noise came from the seed, as in every simulation. Deployed holders draw it on their own machine.")
    corrupt = int((~prepared.train.features.finite()).sum())
    if corrupt:
        notes.append(f"{corrupt} training records could not be read or gave no finite features; they count as zero.")
    missing = sum(len(row["refused"]) for row in result.rounds)
    if missing:
        notes.append(f"{missing} updates are missing: a holder failed in that round, see {HOLDERS_LOG} in the folder.")
    return notes


def cache_folder(state: str | Path | None) -> Path:
    """Where features are kept: in the state folder, or in the user's cache folder."""
    return Path(state) / "features" if state is not None else default_cache()


@contextmanager
def threads(exact: bool) -> Iterator[None]:
    """One thread inside the block when the same bits are asked for."""
    before = torch.get_num_threads()
    if exact:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Flower narrates every round at INFO, where our progress says it shorter; matplotlib warns of its font cache."""
    loggers = [logging.getLogger(name) for name in ("flwr", "matplotlib")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _renamed(stage: str) -> progress.Listener | None:
    listener = progress.current()
    if listener is None:
        return None
    inner: Callable[[str, int, int, str], None] = listener
    return lambda _, done, total, note: inner(stage, done, total, note)
