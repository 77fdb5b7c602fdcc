"""One federation on this machine: run both apps, compare with the head without privacy, write the result folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedhead.client import app as client_app
from fedhead.client import workplace
from fedhead.common import progress
from fedhead.common.config import RunConfig, changed, to_json
from fedhead.common.config.schema import SGD
from fedhead.common.preparation import make_trainable
from fedhead.common.results import Result
from fedhead.common.tasks import make_task
from fedhead.server import app as server_app
from fedhead.server import desk as desks
from fedhead.simulations.engine import run_in_process
from fedhead.simulations.insight import holders_of, notes_of
from fedhead.simulations.ledgers import MARKS, export, ledger_of
from fedhead.simulations.prepared import Prepared

Engine = Literal["inprocess", "ray"]


def run(
    prepared: Prepared,
    folder: Path,
    name: str,
    engine: Engine,
    cache: Path | None,
    resume: bool = False,
    state: str | Path | None = None,
) -> Result:
    """One run from prepared features, its comparison without privacy, and the result folder.

    Parameters
    ----------
    state : path, optional
        Folder that keeps the holders' ledgers between runs; default: the folder of the run.
    """
    started = time.perf_counter()
    config = prepared.config
    ledger = ledger_of(folder, state)
    marks = None if state is None else Path(state) / MARKS
    result = federate(prepared, config, folder, engine, cache, resume, ledger, marks)
    export(ledger, folder)
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
    from fedhead.simulations.report import write_report  # brings matplotlib, which nothing before needs

    write_report(folder)
    return result


def federate(
    prepared: Prepared,
    config: RunConfig,
    folder: Path,
    engine: Engine,
    cache: Path | None,
    resume: bool = False,
    ledger: Path | None = None,
    marks: Path | None = None,
) -> Result:
    """Run both apps to the end; the server leaves its result in the folder.

    Parameters
    ----------
    ledger : Path or None
        Of all simulated holders; None for the comparison without privacy, whose head is thrown away.
    marks : Path or None
        What the server remembers of the ledgers between runs.
    """
    key = to_json(config)
    task = make_task(config.task)
    declared = desks.declared_records(config, prepared.split.units)
    trainable = make_trainable(config, prepared.backbone, task)
    timing = dict(prepared.timing)
    desk = desks.Desk(config, prepared.backbone, task, trainable, prepared.test, declared, timing, simulated=True)
    run_config = {
        "recipe": key, "out": str(folder), "cache": str(cache or ""), "resume": resume,
        "ledger": "" if ledger is None else str(ledger.absolute()), "marks": str(marks or ""),
    }  # fmt: skip
    mine: workplace.Workplace | None = None
    desks.offer(key, desk)
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
                prepared.split,
                ledger,
            )
            workplace.offer(key, mine)
            run_in_process(server_app.app, client_app.app, config.holders.count, run_config, client_app.expect)
    finally:
        desks.withdraw(key)
        workplace.withdraw(key)
        if mine is not None:
            mine.admission.close()
    return Result.read(folder)


def without_privacy(config: RunConfig) -> RunConfig:
    """The same recipe without clipping and noise; a learning rate that was set for a clipping norm is scaled back."""
    changes: dict[str, Any] = {
        "privacy.mechanism": "none",
        "privacy.epsilon": None,
        "privacy.noise_multiplier": None,
        "privacy.sample_rate": None,
        "privacy.metrics": None,
        "holders.budget": None,
        "holders.limits": None,
    }
    given = config.training.optimizer.learning_rate
    # under the unit holder what is clipped is the update, and the rate is the same with and without clipping
    if isinstance(config.training.optimizer, SGD) and given is not None and config.privacy.unit != "holder":
        changes["training.optimizer.learning_rate"] = given * config.privacy.clipping_norm
    return changed(config, changes)


def _renamed(stage: str) -> progress.Listener | None:
    listener = progress.current()
    if listener is None:
        return None
    inner: Callable[[str, int, int, str], None] = listener
    return lambda _, done, total, note: inner(stage, done, total, note)
