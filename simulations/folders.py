"""The folder of a run: claimed before anything is read, and left as it was when the run is refused or stopped."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fedhead.common.errors import InputError
from fedhead.common.results import FILE, SEEDS
from fedhead.server.central import LEDGER as SERVER_LEDGER
from fedhead.server.checkpoints import FILE as CHECKPOINT
from fedhead.server.checkpoints import FOLDER as CHECKPOINTS
from fedhead.simulations.logs import FILE as LOG

SEED = "seed-"  # and the seed: the folder of one of several
HOLDERS = "holders"

log = logging.getLogger("fedhead")


def check_out(out: Path, resume: bool = False) -> None:
    """Refuse a folder of results that can't be used.

    Parameters
    ----------
    out : Path
    resume : bool
        Whether a checkpoint there is gone on from; a run that began anew would write over it.

    Raises
    ------
    InputError
        When it holds a run already, is a file, or lies where nothing can be written.
    """
    if (out / FILE).exists() or (out / SEEDS).exists() or finished_seeds(out):
        raise InputError(f'--out is "{out}": it already holds a run. Choose another folder, or remove that one.')
    if not resume and (out / CHECKPOINTS / CHECKPOINT).exists():
        raise InputError(
            f'--out is "{out}": it holds a run that was stopped. Give --resume to go on with it, or choose another '
            "folder."
        )
    if out.exists() and not out.is_dir():
        raise InputError(f'--out is "{out}": it must be a folder. Choose another name.')
    nearest = next((path for path in (out, *out.absolute().parents) if path.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f'--out is "{out}": it can\'t be written. Choose a folder of your own.')


def finished_seeds(folder: Path) -> list[str]:
    """Names of the folders below of those of several seeds whose rounds are all done, in the order of the seeds."""
    names = [path.parent.name for path in folder.glob(f"{SEED}*/{FILE}")]
    return sorted(names, key=lambda name: (len(name), name))


@contextmanager
def claimed(out: Path | None, name: str, resume: bool = False) -> Iterator[Path]:
    """The folder of a run, for this run alone: `out`, or a new `runs/NAME-DATE-TIME`.

    When the block fails, what it left in the folder is removed again, and the folder too if it was not there before.
    The holders' log stays when the run itself failed, because it says why; a refusal (InputError) leaves nothing. A
    checkpoint stays, and a warning in the log says how to go on from it. Of several seeds the runs stay that are
    finished, because their budget is spent; a warning names them.

    Raises
    ------
    InputError
        When `out` can't be used, or another run is writing there.
    """
    if out is not None:
        check_out(out, resume)
    made: list[Path] = []
    try:
        folder = _new(name, made) if out is None else _given(out, made)
    except OSError as error:
        raise InputError(
            f'--out is "{out or "runs"}": it can\'t be made ({error.strerror}). Choose another folder.'
        ) from error
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f'--out is "{folder}": another run is writing there. Choose another folder.') from error
        if out is not None:
            check_out(out, resume)  # another run may have ended there in between
        before = {path.name for path in folder.iterdir()}
        try:
            yield folder
        except BaseException as error:
            keep = set() if isinstance(error, InputError | KeyboardInterrupt) else {LOG}
            if (folder / CHECKPOINTS / CHECKPOINT).exists():
                keep |= {CHECKPOINTS, HOLDERS, SERVER_LEDGER}
                log.warning("the last checkpoint is kept: give --out %s --resume to go on from it", folder)
            finished = [name for name in finished_seeds(folder) if name not in before]
            if finished:
                log.warning(
                    "what had finished is kept in %s: %s. For other seeds set run.seed, and name another folder",
                    folder, ", ".join(finished),
                )  # fmt: skip
            _undo(folder, before | keep | set(finished), made)
            raise
    finally:
        os.close(handle)


def _given(out: Path, made: list[Path]) -> Path:
    for path in (*reversed(out.parents), out):
        if not path.exists():
            path.mkdir(exist_ok=True)
            made.append(path)
    return out


def _new(name: str, made: list[Path]) -> Path:
    runs = _given(Path("runs"), made)
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 10_000):
        path = runs / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):  # two runs may start in the same second
            path.mkdir()
            made.append(path)
            return path
    raise InputError('--out is "runs": it has no free name left. Choose a folder.')


def _undo(folder: Path, keep: set[str], made: list[Path]) -> None:
    """Remove what a run left behind; never what was there before it."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in reversed(made):
        with contextlib.suppress(OSError):  # one that holds something stays
            path.rmdir()
