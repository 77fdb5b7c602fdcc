"""A damaged ledger or write-ahead log: refused, and never a silent admission."""

import os
import shutil
import signal
import sqlite3
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.errors import FedheadError
from fedhead.common.privacy.ledger import Granted, Ledger, LedgerError, Mark, reading
from fedhead.common.privacy.ledger.chain import Entry, hash_of
from fedhead.common.privacy.ledger.files import OBJECTS
from fedhead.common.privacy.ledger.state import State

SHARED = run_path(str(Path(__file__).with_name("reservations.py")))
ROUNDS, fill, want = (SHARED[name] for name in ("ROUNDS", "fill", "want"))


# -------------------------------------------------------------------------------------------------------------- damage


def silent(path: Path, mark: Mark, spent: float) -> str | None:
    """What a damaged ledger admits without a word, None where it is refused or nothing is lost."""
    try:
        with Ledger(path) as ledger:
            (got,) = ledger.reserve([want(ROUNDS, run="after")])
            if not isinstance(got, Granted):
                return f"answered {got}"
            if got.sequence != mark.sequence + 1 or not ledger.has("ann", mark):
                return "forgot rows"
            if ledger.standing("ann")[1]["notes"].mu_squared < spent + 0.01:
                return "forgot a charge"
    except FedheadError as error:
        return None if "\n" not in str(error) else "more than one line"
    return None


def damage(path: Path, tmp_path: Path, change) -> str | None:
    """`silent` on a copy whose bytes went through `change`."""
    with Ledger(path) as ledger:
        mark, spent = ledger.mark("ann"), ledger.standing("ann")[1]["notes"].mu_squared
    copy = tmp_path / "copy.sqlite"
    for suffix in ("-wal", "-shm"):
        copy.with_name(copy.name + suffix).unlink(missing_ok=True)
    data = bytearray(path.read_bytes())
    copy.write_bytes(change(data))
    return silent(copy, mark, spent)


def flips(path: Path, tmp_path: Path, step: int) -> list[tuple[int, str]]:
    """What single flipped bits admit silently: one in `step` bytes, and in each byte of the last totals."""
    found = []
    data = path.read_bytes()
    with Ledger(path) as ledger:
        last = [entry for entry in ledger.entries() if entry.kind == "reserve"][-1]
    row = data.index((last.previous + last.hash).encode())
    numbers = range(row - 16, row)  # the totals of the last charge that are not 0 stand before its hashes
    for place in sorted({*range(0, len(data), step), *numbers}):

        def change(data: bytearray, place: int = place) -> bytes:
            data[place] ^= 1 << (place // step) % 8
            return bytes(data)

        what = damage(path, tmp_path, change)
        if what is not None:
            found.append((place, what))
    return found


@pytest.fixture
def closed(path: Path) -> Path:
    with Ledger(path) as ledger:
        fill(ledger)
    return path


def test_no_bit_flip_admits_silently(closed: Path, tmp_path: Path):
    assert flips(closed, tmp_path, 151) == []


@pytest.mark.parametrize("blind", ["rows", "ends"])
def test_flips_are_noticed_by_our_checks_and_not_by_chance(closed: Path, tmp_path: Path, blind: str, monkeypatch):
    if blind == "rows":
        monkeypatch.setattr(State, "fault", lambda self, entry: None)
    else:
        monkeypatch.setattr(reading, "replay", blind_replay)
    assert flips(closed, tmp_path, 307) != []


def blind_replay(connection, path, state) -> int:
    """Twin: takes the rows as they are found, and does not ask where the chain ends."""
    for entry in reading.chain(connection, state.holder, state.sequence):
        if entry.previous == state.hash:
            state.apply(entry)
    return 0


def test_every_column_is_covered_by_the_hash(closed: Path):
    raw = sqlite3.connect(closed)
    raw.execute("DROP TRIGGER entries_keep")
    columns = [row[1] for row in raw.execute("PRAGMA table_info(entries)")]
    for column in columns:
        for sequence in (2, 3, 2 * ROUNDS + 1):
            raw.execute("BEGIN")
            before = raw.execute(f"SELECT {column} FROM entries WHERE sequence = {sequence}").fetchone()[0]
            value = {str: "x", int: 77, float: 0.5, type(None): "y"}[type(before)]
            raw.execute(f"UPDATE entries SET {column} = ? WHERE sequence = {sequence}", (value,))
            state = State("ann")
            with pytest.raises(LedgerError, match="damaged"):
                reading.replay(raw, closed, state)
            raw.execute("ROLLBACK")
    assert reading.replay(raw, closed, State("ann")) == 2 * ROUNDS + 1
    raw.close()


@pytest.mark.parametrize("sequence", [1, 2, ROUNDS])
def test_a_row_that_was_written_anew_with_a_hash_of_its_own(closed: Path, sequence: int):
    """Only the row after it tells: it names the hash that the row had."""
    raw = sqlite3.connect(closed)
    row = raw.execute("SELECT * FROM entries WHERE sequence = ?", (sequence,)).fetchone()
    changed = Entry(*row)._replace(time="2000-01-01T00:00:00.000000")
    raw.execute("DROP TRIGGER entries_keep")
    fitting = (changed.time, hash_of(changed[:-1]), sequence)
    raw.execute("UPDATE entries SET time = ?, hash = ? WHERE sequence = ?", fitting)
    raw.execute(OBJECTS["entries_keep"])
    raw.commit()
    raw.close()
    for asked in (lambda ledger: ledger.verify(), lambda ledger: ledger.reserve([want(ROUNDS)])):
        with Ledger(closed) as ledger, pytest.raises(LedgerError, match=f"entry {sequence + 1} of ann"):
            asked(ledger)


@pytest.mark.parametrize("keep", ["last", "middle", "first", "all"])
def test_rows_left_out(closed: Path, keep: str):
    raw = sqlite3.connect(closed)
    raw.execute("DROP TRIGGER entries_stay")
    where = {"last": "sequence = 13", "middle": "sequence = 7", "first": "sequence = 1", "all": "1"}[keep]
    raw.execute(f"DELETE FROM entries WHERE {where}")
    raw.execute(OBJECTS["entries_stay"])
    raw.commit()
    raw.close()
    with Ledger(closed) as ledger, pytest.raises(LedgerError, match="damaged"):
        ledger.reserve([want(ROUNDS)])


def test_a_row_with_a_good_hash_and_a_low_total(closed: Path, monkeypatch):
    """What a writer that forgets to charge would leave."""
    from fedhead.common.privacy.ledger import store

    original = store.spend
    with Ledger(closed) as ledger:
        state = ledger._state("ann")
        monkeypatch.setattr(store, "spend", lambda s, w: original(s, w)._replace(after=s.totals(w.domain, w.run)))
        ledger.reserve([want(ROUNDS)])
        assert state.sequence == 2 * ROUNDS + 2
    monkeypatch.undo()
    with Ledger(closed) as ledger, pytest.raises(LedgerError, match="total below"):
        ledger.mark("ann")


def test_stored_bytes_that_were_changed(closed: Path):
    with Ledger(closed) as ledger:
        ledger._connection.execute("UPDATE payloads SET bytes = x'00'")
        with pytest.raises(LedgerError, match="stored bytes of entry 12 of ann"):
            ledger.reserve([want(ROUNDS - 1)])
        with pytest.raises(LedgerError, match="stored bytes of entry 12 of ann"):
            ledger.verify()


def test_verify_names_the_first_bad_row(closed: Path):
    with Ledger(closed) as ledger:
        assert ledger.verify() == 2 * ROUNDS + 1
        assert ledger.verify("ann") == 2 * ROUNDS + 1
        raw = ledger._connection
        (sql,) = raw.execute("SELECT sql FROM sqlite_master WHERE name = 'entries_keep'").fetchone()
        raw.execute("DROP TRIGGER entries_keep")
        raw.execute("UPDATE entries SET domain_mu_squared = 0 WHERE sequence IN (5, 9)")
        raw.execute(sql)
        with pytest.raises(LedgerError, match="entry 5 of ann has a hash that does not fit"):
            ledger.verify()
    with Ledger(closed) as ledger, pytest.raises(LedgerError, match="entry 5 of ann"):
        ledger.reserve([want(ROUNDS)])


def test_entries_of_no_chain(closed: Path):
    with Ledger(closed) as ledger:
        last = list(ledger.entries())[-1]
        ledger._connection.execute(f"INSERT INTO entries VALUES ({','.join('?' * len(last))})", ("eve", *last[1:]))
        with pytest.raises(LedgerError, match="belong to no chain"):
            ledger.verify()


def test_a_truncated_file(closed: Path, tmp_path: Path):
    size = closed.stat().st_size
    for length in range(0, size, 977):
        assert damage(closed, tmp_path, lambda data, length=length: bytes(data[:length])) is None
        with pytest.raises(LedgerError):
            Ledger(tmp_path / "copy.sqlite", create=False).reserve([want(ROUNDS)])


def test_a_file_that_was_replaced_while_open(closed: Path, tmp_path: Path):
    copy = tmp_path / "copy.sqlite"
    shutil.copy(closed, copy)
    with Ledger(closed) as ledger:
        ledger.mark("ann")
        os.replace(copy, closed)
        with pytest.raises(LedgerError, match="was replaced"):
            ledger.reserve([want(ROUNDS)])


# ------------------------------------------------------------------------------------------------- the write-ahead log


@pytest.fixture
def killed(path: Path) -> tuple[Path, Mark]:
    """A ledger whose process died: all rows are in the write-ahead log."""
    child = os.fork()
    if child == 0:
        ledger = Ledger(path)
        fill(ledger)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (path.parent / "ledger.sqlite-wal").stat().st_size > 10_000
    copy = path.with_name("ask.sqlite")
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    with Ledger(copy) as ledger:
        mark = ledger.mark("ann")
    assert mark.sequence == 2 * ROUNDS + 1
    return path, mark


def log_damage(path: Path, mark: Mark, tmp_path: Path, change) -> tuple[str, int]:
    """What is found with a changed log: an error or the rows, and how many."""
    copy = tmp_path / "copy.sqlite"
    for suffix in ("-wal", "-shm"):
        copy.with_name(copy.name + suffix).unlink(missing_ok=True)
    shutil.copy(path, copy)
    (tmp_path / "copy.sqlite-wal").write_bytes(change(bytearray(Path(f"{path}-wal").read_bytes())))
    try:
        with Ledger(copy) as ledger:
            found = ledger.mark("ann")
            assert ledger.has("ann", mark) == (found == mark)
            return "rows", found.sequence
    except LedgerError:
        return "refused", 0


def test_a_flipped_log_is_refused_unless_only_its_end_is_lost(killed: tuple[Path, Mark], tmp_path: Path):
    path, mark = killed
    size = Path(f"{path}-wal").stat().st_size
    found = []
    for place in range(0, size, 1201):

        def change(data: bytearray, place: int = place) -> bytes:
            data[place] ^= 1 << place % 8
            return bytes(data)

        found.append((place, *log_damage(path, mark, tmp_path, change)))
    # the last transaction may look like a write that never finished: a release that was lost leaves its reserve
    wrong = [one for one in found if one[1] == "rows" and one[2] < mark.sequence - 1]
    assert wrong == []
    assert sum(one[1] == "refused" for one in found) > len(found) / 2


def test_a_torn_log_shows_whole_transactions_and_no_error(killed: tuple[Path, Mark], tmp_path: Path):
    path, mark = killed
    size = Path(f"{path}-wal").stat().st_size
    seen = set()
    for length in range(0, size + 1, 3001):
        what, rows = log_damage(path, mark, tmp_path, lambda data, length=length: bytes(data[:length]))
        assert what == "rows"
        seen.add(rows)
    assert len(seen) > ROUNDS
