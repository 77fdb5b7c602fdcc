"""Keys that are made while processes are killed, or at the same time: every file whole, one set that fits together."""

import multiprocessing
import os
import re
import signal
import stat
import time

import pytest

from fedhead.common.errors import InputError
from fedhead.common.failpoints import installed, reach
from fedhead.server.keys import describe_keys, make_keys
from fedhead.server.keys.files import PRIVATE, PUBLIC, KeyFolder
from fedhead.server.keys.pairs import certificate, node_key, node_public, tls_key

HOLDERS = ["ann", "ben"]
FILES = [
    "ca.key",
    "ca.crt",
    "server.key",
    "server.crt",
    *(f"{name}.{end}" for name in HOLDERS for end in ("key", "pub")),
]
POINTS = [(point, number) for number in range(len(FILES)) for point in ("keys.written", "keys.linked")]
ASIDE = re.compile(r"\.fedhead-[0-9a-f]{16}\.part")
FORK = multiprocessing.get_context("fork")


def at(point, number, act):
    """A hook that acts when a point is reached for the `number`-th time, from 0."""
    left = [number]

    def hook(name):
        if name == point:
            if left[0] == 0:
                left[0] -= 1
                act()
            else:
                left[0] -= 1

    return hook


def killed(folder, point, number):
    """A process that is killed at a point; whether it was."""

    def work():
        with installed(at(point, number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
            make_keys(folder, HOLDERS)

    process = FORK.Process(target=work)
    process.start()
    process.join(30)
    return process.exitcode == -signal.SIGKILL


def whole(folder):
    """Every file under its own name can be read, has its mode, and no other file but one aside is there."""
    keys = KeyFolder(folder)
    names = set(os.listdir(folder))
    aside = {name for name in names if ASIDE.fullmatch(name)}
    assert len(aside) <= 1
    assert names - aside <= set(FILES)
    for name in names:
        wanted = PUBLIC if name.endswith((".crt", ".pub")) else PRIVATE
        found = stat.S_IMODE((folder / name).stat().st_mode)
        assert found in ((wanted,) if name in FILES else (PRIVATE, PUBLIC))
    for name in names & {"ca.crt", "server.crt"}:
        assert certificate(keys, name) is not None
    for name in names & {"ca.key", "server.key"}:
        assert tls_key(keys, name) is not None
    for holder in HOLDERS:
        public, private = node_public(keys, holder), node_key(keys, holder)
        assert public is None or private.public_key() == public
    return {name: (folder / name).read_bytes() for name in names & set(FILES)}


@pytest.mark.parametrize(("point", "number"), POINTS)
def test_a_kill_leaves_whole_files_and_the_next_call_completes_them(tmp_path, point, number):
    folder = tmp_path / "keys"
    assert killed(folder, point, number)
    before = whole(folder)
    assert list(before) == [name for name in before if name in FILES[: number + (point == "keys.linked")]]
    assert len(before) == number + (point == "keys.linked")
    found = make_keys(folder, HOLDERS)
    after = whole(folder)
    assert set(after) == set(FILES)
    assert {name: after[name] for name in before} == before
    assert set(found["made"]) == set(FILES) - set(before)
    assert found["authority"]["state"] == found["server"]["state"] == "valid"


def test_what_a_kill_leaves_aside_is_told_and_taken_away(tmp_path):
    folder = tmp_path / "keys"
    assert killed(folder, "keys.written", 4)
    (aside,) = [name for name in os.listdir(folder) if ASIDE.fullmatch(name)]
    assert sum(aside in line for line in describe_keys(folder)["warnings"]) == 1
    make_keys(folder, HOLDERS)
    assert aside in os.listdir(folder)  # it may be what another process writes right now
    long_ago = time.time() - 3600
    os.utime(folder / aside, (long_ago, long_ago))
    assert not make_keys(folder, HOLDERS)["warnings"]
    assert sorted(os.listdir(folder)) == sorted(FILES)


def test_what_two_calls_take_away_at_once_is_no_fault(tmp_path, monkeypatch):
    folder = tmp_path / "keys"
    make_keys(folder, HOLDERS)
    gone = ".fedhead-0123456789abcdef.part"
    monkeypatch.setattr(KeyFolder, "left_over", lambda keys: [gone])
    assert make_keys(folder, HOLDERS)["made"] == []


def test_the_twin_that_writes_in_place_is_caught(tmp_path, monkeypatch):
    def in_place(keys, name, content, mode):
        with open(os.open(keys.path / name, os.O_WRONLY | os.O_CREAT, mode), "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            reach("keys.written")
            file.write(content[len(content) // 2 :])
        keys.made.append(name)

    monkeypatch.setattr(KeyFolder, "add", in_place)
    for number in range(len(FILES)):
        folder = tmp_path / f"keys-{number}"
        assert killed(folder, "keys.written", number)
        with pytest.raises((AssertionError, InputError)):
            whole(folder)


@pytest.mark.parametrize(("point", "number"), POINTS)
def test_another_process_that_does_all_in_between_is_taken_as_it_is(tmp_path, point, number):
    folder = tmp_path / "keys"
    others = []

    def other():
        others.append((make_keys(folder, HOLDERS), whole_without_aside(folder)))

    with installed(at(point, number, other)):
        mine = make_keys(folder, HOLDERS)
    (theirs, written), after = others[0], whole(folder)
    assert after == written
    assert sorted([*mine["made"], *theirs["made"]]) == sorted(FILES)  # each file by one of the two
    assert lasting(mine) == lasting(theirs)


def lasting(found):
    """What doesn't change with the clock: whole days are left, and the two calls may differ by a second."""
    certificates = {key: {**found[key], "days_left": None} for key in ("authority", "server")}
    return {**certificates, "holders": found["holders"]}


def whole_without_aside(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize(("point", "number"), POINTS[:7])
def test_another_process_with_other_hosts_is_noticed(tmp_path, point, number):
    folder = tmp_path / "keys"
    with (
        installed(at(point, number, lambda: make_keys(folder, HOLDERS, hosts=["192.0.2.7"]))),
        pytest.raises(InputError, match=r"server\.crt is for 192\.0\.2\.7"),
    ):
        make_keys(folder, HOLDERS, hosts=["fl.example.org"])
    assert set(whole(folder)) == set(FILES)


def _race(folder, barrier, name, results):
    barrier.wait(20)
    try:
        results.put(sorted(make_keys(folder, [*HOLDERS, name])["made"]))
    except InputError as error:
        results.put(str(error))


def test_processes_at_once_end_with_one_set(tmp_path):
    for trial in range(4):
        folder = tmp_path / f"keys-{trial}"
        barrier, results = FORK.Barrier(4), FORK.Queue()
        processes = [FORK.Process(target=_race, args=(folder, barrier, f"own-{n}", results)) for n in range(4)]
        for process in processes:
            process.start()
        made = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.join(30)
        own = [f"own-{n}.{end}" for n in range(4) for end in ("key", "pub")]
        assert sorted(name for names in made for name in names) == sorted([*FILES, *own])
        found = describe_keys(folder)
        assert not found["warnings"]
        assert all(entry["private"] and entry["public"] for entry in found["holders"])
        assert make_keys(folder, HOLDERS)["made"] == []  # all of it fits together
