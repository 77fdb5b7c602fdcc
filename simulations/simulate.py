"""The door to a simulation: a recipe in, a result folder out, once or from several seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fedhead.common import progress
from fedhead.common.config import RunConfig, changed, find_recipe
from fedhead.common.config.places import path_from
from fedhead.common.errors import InputError
from fedhead.common.preparation import default_cache
from fedhead.common.results import SEEDS, Result, finite
from fedhead.common.writing import write_aside
from fedhead.simulations.faults import plainly
from fedhead.simulations.federation import Engine, run
from fedhead.simulations.folders import SEED, claimed
from fedhead.simulations.logs import holders_log
from fedhead.simulations.prepared import prepare


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
        Folder that keeps the holders between runs: their ledgers, and with them what they have spent, and the feature
        cache. Default: holders of this run alone, and the user's cache folder.
    engine : "inprocess" or "ray"
        Where the holders run.
    resume : bool
        Go on from the checkpoint in `out`; without one the run starts at its beginning. Left out, a folder with a
        checkpoint is refused.
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
    state = _path(state)
    with at_work(config, out, name, progress_listener, resume) as folder:
        prepared = prepare(config, cache_folder(state))
        return run(prepared, folder, name, engine, cache_folder(state), resume, state)


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
        `seeds`, `folder`, `metrics`: name -> {mean, deviation (of the sample), values}, and `privacy`: of each run the
        largest epsilon of any holder, with its delta and unit; also in seeds.json.

    Notes
    -----
    When one of the runs fails or is stopped, those before it stay in the folder; a warning in the log names them.
    """
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    name = name or ("run" if isinstance(recipe, RunConfig) else Path(str(recipe)).stem)
    if seeds < 1:
        raise InputError(f"seeds is {seeds}: it must be at least 1. Give a positive whole number such as 5.")
    results = []
    state = _path(state)
    with at_work(config, out, name, progress_listener) as folder:
        for seed in range(config.run.seed, config.run.seed + seeds):
            one = changed(config, {"run.seed": seed})
            prepared = prepare(one, cache_folder(state))
            results.append(run(prepared, folder / f"{SEED}{seed}", name, engine, cache_folder(state), state=state))
        summary = _over_seeds(results)
        write_aside(folder / SEEDS, (json.dumps(finite(summary), indent=1, allow_nan=False) + "\n").encode())
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
    largest = [max(result.privacy, key=lambda one: one["epsilon"], default=None) for result in results]
    privacy = [
        {"seed": result.config["run"]["seed"], "epsilon": one["epsilon"], "delta": one["delta"], "unit": one["unit"]}
        for result, one in zip(results, largest, strict=True)
        if one is not None
    ]
    return {"seeds": [result.config["run"]["seed"] for result in results], "metrics": metrics, "privacy": privacy}


@contextmanager
def at_work(
    config: RunConfig,
    out: str | Path | None,
    name: str,
    listener: progress.Listener | None,
    resume: bool = False,
) -> Iterator[Path]:
    """Everything around a run: its folder claimed, the holders' log open, progress told, failures in plain words."""
    with (
        claimed(_path(out), name, resume) as folder,
        holders_log(folder) as log,
        progress.listening(listener),
        threads(config.run.exact),
        quiet(),
        plainly(config, log),
    ):
        yield folder


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else path_from(str(given), Path())


def cache_folder(state: str | Path | None) -> Path:
    """Where features are kept: in the state folder, or in the user's cache folder."""
    return Path(state) / "features" if state is not None else default_cache()


@contextmanager
def threads(exact: bool) -> Iterator[None]:
    """One thread inside the block, of PyTorch and NumPy, when the same bits are asked for."""
    before = torch.get_num_threads()
    if exact:
        torch.set_num_threads(1)
    try:
        with threadpool_limits(1 if exact else None, user_api="blas"):
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
