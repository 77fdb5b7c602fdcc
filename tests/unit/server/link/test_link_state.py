"""The state folder and its secrets: closed to others, one serve, nothing overwritten."""

import os
import stat
import threading

import pytest

from fedhead.common.errors import InputError
from fedhead.server.keys import make_keys
from fedhead.server.link.state import held_state, kept_secret, read_secret
from fedhead.server.server_file import make_server


@pytest.fixture
def server(tmp_path):
    make_keys(tmp_path / "keys", ["north", "south"])
    return make_server({"certificates": "keys", "holders": ["keys/north.pub", "keys/south.pub"]}, tmp_path)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_of_its_own(server):
    before = os.umask(0)
    try:
        with held_state(server):
            kept_secret(server.token_file)
    finally:
        os.umask(before)
    assert mode_of(server.folder) == 0o700
    assert mode_of(server.token_file) == mode_of(server.serve_lock) == 0o600


def test_one_serve_at_a_time(server):
    with held_state(server):
        with pytest.raises(InputError, match='another "fedhead serve" uses it') as caught, held_state(server):
            pass
        assert "\n" not in str(caught.value)
    with held_state(server):
        pass


def test_a_folder_that_others_may_enter_is_refused(server):
    server.folder.mkdir(mode=0o750)
    server.folder.chmod(0o750)
    with pytest.raises(InputError, match="must be closed to others, and its mode is 0750"), held_state(server):
        pass


def test_a_file_in_its_place_is_refused(server):
    server.folder.write_text("")
    with pytest.raises(InputError, match="it must be a folder that can be written"), held_state(server):
        pass


def test_a_secret_is_made_once(tmp_path):
    path = tmp_path / "secret"
    made = kept_secret(path)
    assert len(bytes.fromhex(made)) == 32
    assert (kept_secret(path), read_secret(path), path.read_text()) == (made, made, made)
    assert [item.name for item in tmp_path.iterdir()] == ["secret"]
    assert kept_secret(tmp_path / "other") != made


def test_of_several_processes_one_makes_it(tmp_path):
    found, barrier = [], threading.Barrier(8)

    def one():
        barrier.wait(30)
        found.append(kept_secret(tmp_path / "secret"))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_may_read_or_write_is_refused(tmp_path, mode):
    path = tmp_path / "secret"
    made = kept_secret(path)
    path.chmod(mode)
    with pytest.raises(InputError, match=f"has mode {mode:04o}"):
        kept_secret(path)
    assert path.read_text() == made


@pytest.mark.parametrize("content", ["", "abc", "g" * 64, "a" * 63, "a" * 65, "\u00e9" * 64])
def test_a_file_that_holds_no_secret_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        kept_secret(path)
    assert path.read_text() == content


def test_a_secret_that_can_not_be_made_is_one_line(tmp_path):
    with pytest.raises(InputError, match="can't be made or read"):
        kept_secret(tmp_path / "nowhere" / "secret")
