"""Disjoint domains: whoever was ever in a domain stays in it, whatever becomes of the data."""

import os
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.client import domains as module
from fedhead.client.domains import DomainError, Domains, Identities, identities
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError


def records(texts, persons=None) -> Records:
    columns = None if persons is None else {"patient": persons}
    return Records.from_memory("text", list(texts), [0] * len(texts), columns)


def of(*texts) -> Identities:
    return identities(records(texts), None)


def people(*names) -> Identities:
    return identities(records([f"note {i}" for i in range(len(names))], list(names)), "patient")


@pytest.fixture
def domains(tmp_path):
    return Domains(tmp_path / "state")


def test_what_is_in_both_is_counted(domains):
    domains.remember("a", of("one", "two", "three"))
    domains.remember("b", of("three", "four", "two"))
    domains.remember("c", of("five"))
    assert domains.overlap("a", "b") == domains.overlap("b", "a") == 2
    assert domains.overlap("a", "c") == domains.overlap("c", "b") == 0
    assert domains.overlap("a", "a") == 3


@pytest.mark.parametrize(
    ("later", "common"),
    [
        (["two", "one"], 1),  # reordered
        (["one", "two", "four"], 2),  # appended, and what is new is in the other domain
        (["two"], 1),  # deleted, but trained on before
        (["one, edited", "two"], 1),  # edited: the old text stays
        (["four", "four"], 2),  # replaced by repeated ones
    ],
)
def test_changes_of_the_data_only_add(domains, later, common):
    domains.remember("b", of("one", "four"))
    domains.remember("a", of("one", "two"))
    domains.remember("a", of(*later))
    assert domains.overlap("a", "b") == common


@pytest.mark.parametrize(
    ("later", "common"),
    [
        (["eve", "ann"], 1),  # reordered
        (["ann", "eve", "bob"], 2),  # appended
        (["eve"], 1),  # deleted
        (["ann", "ann", "ann"], 1),  # more records of a person
    ],
)
def test_persons_count_whatever_their_records(domains, later, common):
    domains.remember("b", people("ann", "bob"))
    domains.remember("a", people("ann", "eve"))
    domains.remember("a", people(*later))
    assert domains.overlap("a", "b") == common


def test_labels_and_further_columns_do_not_matter(domains):
    domains.remember("a", identities(Records.from_memory("text", ["x", "y"], [0, 1], {"day": [1, 2]}), None))
    domains.remember("b", identities(Records.from_memory("text", ["y", "x"], [0, 0], {"day": [3, 4]}), None))
    assert domains.overlap("a", "b") == 2


@pytest.mark.parametrize("values", [np.array([3.0, 12.0]), np.array([3, 12]), ["3", " 12 "]])
def test_a_person_is_the_same_whatever_the_column_s_type(domains, values):
    domains.remember("a", identities(records(["x", "y"], values), "patient"))
    domains.remember("b", people("12", "3"))
    assert domains.overlap("a", "b") == 2


def test_a_record_without_a_person_is_a_fault_that_names_nobody():
    with pytest.raises(DataError, match="no value") as caught:
        people("ann", "")
    assert "ann" not in str(caught.value)


def test_persons_and_records_can_not_be_compared(domains):
    domains.remember("a", people("ann"))
    domains.remember("b", of("note 0"))
    with pytest.raises(DomainError, match='"a" and "b" can\'t be compared'):
        domains.overlap("a", "b")
    domains.remember("b", people("bob"))  # it was without persons once, and that data stays spent
    with pytest.raises(DomainError, match="can't be compared"):
        domains.overlap("a", "b")


def test_a_domain_that_was_never_seen_is_not_taken_for_disjoint(domains):
    domains.remember("a", of("one"))
    assert not domains.seen("b")
    with pytest.raises(DomainError, match='"b": nothing of it was seen'):
        domains.overlap("a", "b")


def test_an_empty_domain_is_one_that_was_seen(domains):
    domains.remember("a", of())
    assert domains.seen("a")
    assert domains.overlap("a", "a") == 0


SETS = st.lists(st.sets(st.binary(min_size=1, max_size=2), max_size=6), min_size=1, max_size=4)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(SETS, SETS)
def test_overlap_is_that_of_the_unions(tmp_path_factory, first, second):
    domains = Domains(tmp_path_factory.mktemp("d"))
    for name, history in (("a", first), ("b", second)):
        for values in history:
            domains.remember(name, Identities("records", tuple(values)))
    expected = set().union(*first) & set().union(*second)
    empty = not set().union(*first) or not set().union(*second)
    if empty and set().union(*first) != set().union(*second):
        return  # one has held nothing: there is no kind to compare
    assert domains.overlap("a", "b") == len(expected)


class Forgetful(Domains):
    """A wrong twin: remembers only the data of now."""

    def remember(self, domain, found):
        self._path(domain).unlink(missing_ok=True)
        super().remember(domain, found)


def test_a_twin_that_forgets_is_rejected(tmp_path):
    for kind, expected in ((Domains, 1), (Forgetful, 0)):
        domains = kind(tmp_path / kind.__name__)
        domains.remember("b", of("one"))
        domains.remember("a", of("one", "two"))
        domains.remember("a", of("two"))
        assert domains.overlap("a", "b") == expected


def test_files_are_closed_to_others_and_say_nothing(domains, tmp_path):
    old = os.umask(0)
    try:
        domains.remember("a", people("ann", "bob"))
    finally:
        os.umask(old)
    folder = tmp_path / "state" / "domains"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"a.bin", "key", "lock"}
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert b"ann" not in path.read_bytes()
    other = Domains(tmp_path / "other")
    other.remember("a", people("ann", "bob"))
    here, there = (path.read_bytes() for path in sorted(tmp_path.glob("*/domains/a.bin")))
    assert here.split(b"\n")[0] == there.split(b"\n")[0]
    assert here != there  # another key: no hash of a person is the same in two folders


@pytest.mark.parametrize("at", [0, 20, 60, -40, -1])
def test_a_flipped_bit_is_noticed_and_the_file_is_kept(domains, tmp_path, at):
    domains.remember("a", of("one", "two"))
    path = tmp_path / "state" / "domains" / "a.bin"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    for act in (lambda: domains.overlap("a", "a"), lambda: domains.remember("a", of("three"))):
        with pytest.raises(DomainError, match="damaged"):
            act()
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100])
def test_a_truncated_file_is_noticed(domains, tmp_path, size):
    domains.remember("a", of(*map(str, range(9))))
    path = tmp_path / "state" / "domains" / "a.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DomainError, match="damaged"):
        domains.overlap("a", "a")


def test_a_renamed_file_is_noticed(domains, tmp_path):
    domains.remember("a", of("one"))
    folder = tmp_path / "state" / "domains"
    (folder / "a.bin").rename(folder / "b.bin")
    with pytest.raises(DomainError, match="damaged, or belongs to another"):
        domains.remember("b", of("two"))


def test_without_its_key_nothing_is_replaced(domains, tmp_path):
    domains.remember("a", of("one"))
    key = tmp_path / "state" / "domains" / "key"
    kept = key.read_bytes()
    key.unlink()
    for act in (lambda: domains.remember("a", of("two")), lambda: domains.overlap("a", "a")):
        with pytest.raises(DomainError):
            act()
    key.write_bytes(kept[:5])
    with pytest.raises(DomainError, match="key is damaged"):
        domains.remember("a", of("two"))
    key.write_bytes(bytes(32))
    with pytest.raises(DomainError, match="another key"):
        domains.remember("a", of("two"))
    key.write_bytes(kept)
    assert domains.overlap("a", "a") == 1


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(domains, tmp_path, monkeypatch, name):
    domains.remember("a", of("one"))
    folder = tmp_path / "state" / "domains"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, name, full)
        with pytest.raises(DomainError, match="No space left"):
            domains.remember("a", of("two"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    domains.remember("a", of("two"))
    assert domains.overlap("a", "a") == 2


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(DomainError) as caught:
        Domains(tmp_path / "state").remember("a", of("one"))
    assert "\n" not in str(caught.value)


def _add(folder: str, number: int) -> None:
    domains = Domains(Path(folder))
    for i in range(5):
        domains.remember("a", of(f"{number} {i}"))


def test_processes_wait_for_each_other(tmp_path):
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        list(pool.map(_add, [str(tmp_path)] * 4, range(4)))
    assert Domains(tmp_path).overlap("a", "a") == 20
