"""The ledger's file: modes, foreign files, full disks, rights, forks, threads, every failpoint."""

import errno
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.failpoints import FAILPOINTS, installed
from fedhead.common.privacy.ledger import GENESIS, Granted, Ledger, LedgerError, Mark, stored_mark
from fedhead.common.privacy.terms import Terms

SHARED = run_path(str(Path(__file__).with_name("reservations.py")))
ROUNDS, fill, one, want = (SHARED[name] for name in ("ROUNDS", "fill", "one", "want"))


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def test_the_package_imports_neither_torch_nor_an_accountant(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path\n"
        "from fedhead.common.privacy.ledger import *\n"
        "from fedhead.common.privacy.events import GaussianEvent; from fedhead.common.privacy.terms import Terms\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.declare('ann', 'notes', Terms(1.0, 1e-5))\n"
        "event = GaussianEvent(10., 1., 1)\n"
        "(got,) = ledger.reserve([Reservation('ann', 'notes', 'run', 1, 'd', event, 'record', 'f', 'os')])\n"
        "ledger.release([('ann', got.sequence, b'bytes')]); ledger.verify(); ledger.summary()\n"
        "heavy = {'torch', 'flwr', 'opacus', 'dp_accounting', 'pydantic', 'cryptography'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "l.sqlite")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_file_and_folder_are_the_user_s_own(path: Path):
    with Ledger(path) as ledger:
        fill(ledger, 1)
        assert files(path) == ["ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal"]
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert files(path) == ["ledger.sqlite"]


def test_durable_settings(path: Path):
    with Ledger(path) as ledger:
        assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_rows_can_t_be_changed_or_deleted(path: Path):
    with Ledger(path) as ledger:
        fill(ledger, 1)
        for sql in ("DELETE FROM entries", "UPDATE entries SET domain_mu_squared = 0"):
            with pytest.raises(sqlite3.IntegrityError, match="never"):
                ledger._connection.execute(sql)


def test_the_last_mark_is_read_without_a_check(path: Path):
    """For replies of a holder whose ledger isn't open; it costs no more for a long ledger than for a short one."""
    assert stored_mark(path, "ann") is None
    assert not path.parent.exists()
    with Ledger(path) as ledger:
        assert stored_mark(path, "ann") == ledger.mark("ann") == Mark(0, GENESIS)
        mark = fill(ledger)
        with ledger._writing("declare"):  # somebody writes just now
            assert stored_mark(path, "ann") == mark
        assert stored_mark(path, "bob") == Mark(0, GENESIS)
        assert one(ledger, want(ROUNDS)) is not None  # the lock that this process holds was not lost with the file
    mark = stored_mark(path, "ann")
    assert mark.sequence == 2 * ROUNDS + 2
    with Ledger(path) as ledger:
        assert ledger.mark("ann") == mark
        assert ledger.verify() == mark.sequence
    assert files(path) == ["ledger.sqlite"]
    for content in (b"", b"no database at all" * 100):
        path.write_bytes(content)
        assert stored_mark(path, "ann") is None
    path.unlink()
    path.mkdir()
    assert stored_mark(path, "ann") is None


def test_no_file(path: Path):
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(LedgerError, match="is not there"):
            Ledger(path, **options)
    path.mkdir(parents=True)
    with pytest.raises(LedgerError, match="is not there"):
        Ledger(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 5000, b"SQLite format 3\0", b"SQLite format 3\0" + b"\0" * 9000]
)
def test_no_ledger(path: Path, content: bytes):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="ledger"):
        Ledger(path)
    assert path.read_bytes() == content


def test_another_database(path: Path):
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE entries (holder)")
    other.close()
    with pytest.raises(LedgerError, match="is not a ledger"):
        Ledger(path)


def test_a_later_schema(path: Path):
    with Ledger(path) as ledger:
        fill(ledger, 1)
        ledger._connection.execute("PRAGMA user_version = 2")
    with pytest.raises(LedgerError, match="has schema 2: this fedhead knows 1"):
        Ledger(path)


@pytest.mark.parametrize(
    "sql",
    ["DROP TRIGGER entries_stay", "CREATE TABLE more (x)", "ALTER TABLE entries ADD COLUMN more", "DROP VIEW events"],
)
def test_other_tables(path: Path, sql: str):
    with Ledger(path) as ledger:
        fill(ledger, 1)
        ledger._connection.execute(sql)
    with pytest.raises(LedgerError, match="tables"):
        Ledger(path)


# --------------------------------------------------------------------------------------------- disks, rights, processes


def test_a_disk_without_space(path: Path):
    with Ledger(path) as ledger:
        mark = fill(ledger, 2)
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match=r"is full.*nothing was admitted.*Free some space"):
            ledger.release([("ann", ledger.reserve([want(2)])[0].sequence, b"x" * 50_000)])
        ledger._connection.execute("PRAGMA max_page_count = 1000000")
        assert ledger.has("ann", mark)
        assert ledger.verify() == 6
        assert isinstance(ledger.reserve([want(3)])[0], Granted)


def test_a_file_that_can_t_grow(path: Path):
    """The operating system itself refuses the write: the child reports what the ledger made of it."""
    with Ledger(path) as ledger:
        mark = fill(ledger, 2)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            mine = Ledger(path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
            try:
                for round in range(2, 5):
                    mine.release([("ann", mine.reserve([want(round)])[0].sequence, b"x" * 100_000)])
                text = "admitted"
            except LedgerError as error:
                text = str(error)
            os.write(write, text.encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(read, 10_000).decode()
        assert "nothing was admitted and nothing may leave" in said
        assert ledger.has("ann", mark)
        ledger.verify()
        assert isinstance(ledger.reserve([want(6)])[0], Granted)


@pytest.mark.parametrize("operation", ["declare", "reserve", "release", "abandon"])
@pytest.mark.parametrize("stage", ["begin", "locked", "written", "committed"])
def test_a_fault_at_every_point(path: Path, operation: str, stage: str):
    name = f"ledger.{operation}.{stage}"
    with Ledger(path) as ledger:
        fill(ledger, 2)
        (open_one,) = ledger.reserve([want(2)])
        before = ledger.mark("ann")

        def fail(reached: str) -> None:
            if reached == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        act = {
            "declare": lambda: ledger.declare("ann", "notes", Terms(2.0, 1e-5)),
            "reserve": lambda: ledger.reserve([want(3)]),
            "release": lambda: ledger.release([("ann", open_one.sequence, b"bytes")]),
            "abandon": lambda: ledger.abandon("ann", open_one.sequence),
        }[operation]
        with installed(fail), pytest.raises(LedgerError, match=r"No space.*Free some space"):
            act()
        grown = ledger.mark("ann").sequence - before.sequence
        assert grown == (1 if stage == "committed" else 0)
        act()  # once there is space, it goes on
        ledger.verify()
        spent = ledger.standing("ann")[1]["notes"].mu_squared
        rows = sum(entry.kind == "reserve" for entry in ledger.entries())
        assert spent == pytest.approx(0.01 * rows)


def test_every_failpoint_is_reached(path: Path, tmp_path: Path):
    from fedhead.common.privacy.ledger import load_key

    reached: list[str] = []
    with installed(reached.append), Ledger(path) as ledger:
        fill(ledger, 1)
        ledger.abandon("ann", ledger.reserve([want(1)])[0].sequence)
        ledger.export(tmp_path / "out")
        load_key(tmp_path / "key.pem")
    assert set(reached) == {name for name in FAILPOINTS if name.startswith("ledger.")}
    order = [name for name in reached if name.startswith("ledger.reserve")][:4]
    assert order == [f"ledger.reserve.{stage}" for stage in ("begin", "locked", "written", "committed")]


def test_a_failpoint_without_a_name_is_a_defect():
    from fedhead.common.failpoints import reach

    reach("anything")  # nothing is installed, nothing is looked at
    with installed(lambda name: None), pytest.raises(AssertionError, match="anything"):
        reach("anything")


def test_a_ledger_that_may_not_be_written():
    """As a user without rights; root may write everywhere, so the child becomes nobody."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    with Ledger(folder / "ledger.sqlite") as ledger:
        fill(ledger, 1)
    (folder / "ledger.sqlite").chmod(0o644)
    folder.chmod(0o555)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        for path in (folder / "ledger.sqlite", folder / "other" / "ledger.sqlite"):
            try:
                Ledger(path).reserve([want(1)])
                said.append("admitted")
            except LedgerError as error:
                said.append(str(error))
        with Ledger(folder / "ledger.sqlite", read_only=True) as audited:
            said.append(f"{audited.verify()} rows")
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 10_000).decode().splitlines()
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert said.pop() == "3 rows"
    assert len(said) == 2
    for line in said:
        assert "Give this user the right to write" in line


def test_a_ledger_does_not_go_through_a_fork(path: Path):
    with Ledger(path) as ledger:
        fill(ledger, 1)
        child = os.fork()
        if child == 0:
            try:
                ledger.reserve([want(1)])
            except LedgerError as error:
                os._exit(7 if "another process" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_ledger_that_stays_locked(path: Path, monkeypatch):
    from fedhead.common.privacy.ledger import files

    monkeypatch.setattr(files, "BUSY_SECONDS", 0.05)
    with Ledger(path) as ledger, Ledger(path) as other:
        fill(ledger, 1)
        other._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"locked.*Wait for the other process"):
            ledger.reserve([want(1)])
        other._connection.execute("ROLLBACK")
        assert isinstance(ledger.reserve([want(1)])[0], Granted)


def test_a_log_that_the_last_other_process_tidies_away_meanwhile_has_lost_nothing(path: Path, monkeypatch):
    with Ledger(path) as ledger:
        fill(ledger, 1)
        rows = ledger.verify()
    there, read = Path.exists, Path.read_bytes
    monkeypatch.setattr(Path, "exists", lambda self, **how: self.name.endswith("-wal") or there(self, **how))
    looked_at = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: looked_at.append(self.name) or read(self))
    with Ledger(path, create=False) as ledger:
        assert ledger.verify() == rows > 0
    assert path.name + "-wal" in looked_at


def test_threads_share_one_ledger(path: Path):
    from concurrent.futures import ThreadPoolExecutor

    with Ledger(path) as ledger:
        ledger.declare("ann", "notes", Terms(1.0, 1e-5))
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda n: ledger.reserve([want(1, run=f"run-{n}")])[0], range(20)))
        assert sum(isinstance(one, Granted) for one in got) == 7
        assert ledger.verify() == 8
