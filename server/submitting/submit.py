"""`fedhead submit`: one run at the data holders, from its first message to the result folder.

The coordinator's app runs in this process. After every round a checkpoint is on disk before the next request leaves.
Going on from it repeats the round that was under way, with the very same request: holders that had answered it send the
bytes that they kept, and spend nothing again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedhead.common import progress
from fedhead.common.config import RunConfig, to_json
from fedhead.common.errors import RunError
from fedhead.common.models.saved import save_model
from fedhead.common.results import Result
from fedhead.server.app import Coordinator, Deployed, Outcome
from fedhead.server.checkpoints import Checkpoint
from fedhead.server.desk import Desk, prepare_deployed
from fedhead.server.roster import Callers
from fedhead.server.rounds import RoundRecord, Rounds
from fedhead.server.server_file import ServerFile
from fedhead.server.submitting.commands import not_running
from fedhead.server.submitting.lock import SubmitLock
from fedhead.server.submitting.notes import notes_of
from fedhead.server.submitting.runfile import RunFile
from fedhead.server.submitting.session import Away, LinkLost, Session, Stopped

log = logging.getLogger("fedhead.server")

STARTS: Final = 5
"""Most Flower runs that one run of ours may take: a server that is away for a minute gives Flower's up."""


def submit(
    config: RunConfig,
    server: ServerFile,
    folder: Path,
    *,
    name: str,
    resume: bool = False,
    progress_listener: progress.Listener | None = None,
) -> Result:
    """Carry out a run at the data holders of a link.

    Parameters
    ----------
    config : RunConfig
        As `deployable` gives it.
    server : ServerFile
        Of the link, on this machine. Whenever it is away, it is waited for, ten minutes at most.
    folder : Path
        Of the results; checkpoints lie below it.
    name : str
        Shown in the result and the report.
    resume : bool
        Go on from the checkpoint in the folder; without one the run starts at its beginning.
    progress_listener : callable, optional
        Called as `listener(stage, done, total, note)`.

    Returns
    -------
    Result
        As written to the folder.

    Raises
    ------
    InputError
        The recipe's test records or backbone, or the link's files, can't be used.
    RunError
        Another run is under way, or this one could not go on, or was stopped; its checkpoint is kept.
    """
    started, key = time.perf_counter(), to_json(config)
    resumed = Checkpoint.read(folder, key) if resume else None
    told = RunFile(server.run_file, name, folder, config.training.rounds, server.least_holders)
    earlier = 0.0 if resumed is None else sum(record.seconds for record in resumed.history)
    if not server.folder.is_dir():
        raise RunError(not_running(server))
    # The lock first: whoever has it is the run that run.json tells of, from its preparation on.
    lock = SubmitLock(server.submit_lock)
    with _quiet(), contextlib.closing(lock), progress.listening(progress_listener), told:
        desk = prepare_deployed(config)
        outcome = _hold(desk, server, key, folder, resumed, told, lock)
        total = desk.timing.get("load_seconds", 0.0)
        result = replace(
            outcome.result,
            name=name,
            timing={**outcome.result.timing, "total_seconds": earlier + time.perf_counter() - started - total},
            notes=[*notes_of(config, outcome.result), *outcome.result.notes],
        )
        # A folder with a result.json is taken for a whole run, which can't be resumed: it comes last.
        save_model(folder / "model", desk.trainable, desk.config, desk.backbone, desk.task)
        return result.write(folder)


def _hold(
    desk: Desk,
    server: ServerFile,
    key: str,
    folder: Path,
    resumed: Checkpoint | None,
    told: RunFile,
    lock: SubmitLock,
) -> Outcome:
    """Hold the rounds, over as many Flower runs as it takes."""
    for start in range(1, STARTS + 1):
        try:
            # where the recipe lies on this machine is not for the holders to know
            with Session(server, to_json(desk.config, base=False), lock=lock, seen=True) as session:
                outcome = _coordinator(desk, server, key, folder, resumed, told, session).run()
                session.close("completed")
                return outcome
        except (Stopped, Away):
            raise
        except LinkLost as error:
            if start == STARTS:
                raise
            log.warning("%s Starting again from the last checkpoint.", error)
            if told.begun:  # before that, a checkpoint in the folder is of another run
                resumed = Checkpoint.read(folder, key)
    raise AssertionError("unreachable")


def _coordinator(
    desk: Desk,
    server: ServerFile,
    key: str,
    folder: Path,
    resumed: Checkpoint | None,
    told: RunFile,
    session: Session,
) -> Coordinator:
    deadline = float(server.round_deadline)
    patience = float(server.holders_deadline)
    roster = Callers(session.grid, session.registered, server.least_holders, patience, patience)

    def after_round(rounds: Rounds, metrics: Mapping[str, float]) -> None:
        number = rounds.history[-1].round if rounds.history else 0
        if number > rounds.done:
            _log(rounds.history[-1], told.rounds)
        told.tell("running", number, roster.names(), metrics, rounds.run, session.flower_run)

    deployed = Deployed(
        sorted(server.public_keys), roster, server.least_holders, deadline, after_round, server.declared_records or {}
    )
    return Coordinator(desk, session.grid, key, folder, resumed, server.marks_file, deployed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower narrates every round, which is done here in a line."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _log(record: RoundRecord, rounds: int) -> None:
    """A line about a round that has ended, and one about each holder whose update is missing."""
    log.info("round %d of %d: %d updates in %.1f s", record.round, rounds, record.holders, record.seconds)
    for row in record.refused:
        log.warning("round %d: %s: %s (code %d)", record.round, row["holder"], row["text"], row["code"])
