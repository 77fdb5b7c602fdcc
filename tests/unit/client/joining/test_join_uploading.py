"""A node's reply, and a server that doesn't take all of it at the first try."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedhead.client.joining import uploading
from fedhead.client.joining.uploading import MOST_UPLOADS, Upload

RUN = 7
NAMES = [letter * 64 for letter in "abcde"]
TREE = ObjectTree(object_id=NAMES[0], children=[ObjectTree(object_id=name) for name in NAMES[1:]])
MESSAGE = SimpleNamespace(metadata=SimpleNamespace(message_id=NAMES[0]))


class Server:
    """Takes objects in the session of the last announcement alone, each once."""

    def __init__(self):
        self.there, self.session, self.announced, self.lock = {}, 0, 0, threading.Lock()

    def send(self, message, tree, seconds):
        assert (message, tree) == (MESSAGE, TREE)
        with self.lock:
            self.announced += 1
            self.session += 1
            return {name for name in NAMES if name not in self.there}, str(self.session)

    def push(self, run, session, name, content):
        with self.lock:
            if (run, session) != (RUN, str(self.session)) or name in self.there:
                raise ObjectPushError(name, run, session)
            self.there[name] = content

    def drop(self):
        """End the session, as the server does for one that takes minutes."""
        with self.lock:
            self.there.clear()
            self.session += 1


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(uploading.time, "sleep", found.append)
    return found


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def upload(server):
    return Upload({name: name.encode() for name in NAMES}, server.send, server.push)


WHOLE = {name: name.encode() for name in NAMES}


def bring(upload, session, names):
    for name in names:
        upload.push_object(RUN, session, name, name.encode())


def test_a_reply_that_is_taken_is_announced_once(server, upload, pauses):
    missing, session = upload.send(MESSAGE, TREE, 0.0)
    bring(upload, session, sorted(missing))
    assert (server.there, server.announced, pauses) == (WHOLE, 1, [])


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_what_a_server_has_dropped_is_brought_again(server, upload, pauses, after):
    _, session = upload.send(MESSAGE, TREE, 0.0)
    bring(upload, session, NAMES[:after])
    server.drop()
    bring(upload, session, NAMES[after:])
    assert (server.there, server.announced, pauses) == (WHOLE, 2, [1])


def test_an_object_whose_answer_was_lost_is_there(server, upload, pauses):
    """A server that says that it didn't take what it has: the reply is whole all the same."""
    _, session = upload.send(MESSAGE, TREE, 0.0)
    server.push(RUN, session, NAMES[0], NAMES[0].encode())  # the first try; its answer never arrived
    bring(upload, session, NAMES)
    assert (server.there, server.announced) == (WHOLE, 2)


def test_threads_bring_it_again_once(server, upload, pauses):
    _, session = upload.send(MESSAGE, TREE, 0.0)
    server.drop()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda name: bring(upload, session, [name]), NAMES))
    assert (server.there, server.announced) == (WHOLE, 2)


def test_a_server_that_takes_nothing_is_given_up(server, upload, pauses):
    server.push = None

    def push(run, session, name, _):
        raise ObjectPushError(name, run, session)

    upload._push = push
    _, session = upload.send(MESSAGE, TREE, 0.0)
    for name in NAMES[:2]:
        with pytest.raises(ObjectPushError):
            bring(upload, session, [name])
    assert server.announced == 1 + MOST_UPLOADS
    assert sum(pauses) == 10


def test_a_run_that_is_over_ends_it(server, upload, pauses):
    class Over(BaseException):
        pass

    _, session = upload.send(MESSAGE, TREE, 0.0)
    server.drop()

    def over(*_):
        raise Over

    upload._send = over
    with pytest.raises(Over):
        bring(upload, session, NAMES[:1])


def test_bytes_that_the_executor_still_brings_are_waited_for(server, monkeypatch):
    contents = {**WHOLE, NAMES[1]: b""}
    upload = Upload(contents, server.send, server.push)
    _, session = upload.send(MESSAGE, TREE, 0.0)
    server.drop()
    monkeypatch.setattr(uploading.time, "sleep", lambda _: contents.update(WHOLE))
    bring(upload, session, NAMES)
    assert server.there == WHOLE
