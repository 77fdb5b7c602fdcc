"""submit: who writes run.json, what it starts again from, and when a folder holds a whole run."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from flwr.proto.control_pb2 import (
    ListNodesResponse,
    ListRunsResponse,
    StartRunResponse,
)
from flwr.proto.run_pb2 import Run, RunStatus
from flwr.proto.runtime_pb2 import (
    AcquireTaskResponse,
    GetNodesResponse,
    PullTaskInputResponse,
    PushTaskOutputResponse,
    SendTaskHeartbeatResponse,
)
from flwr.proto.task_pb2 import Task

from fedhead import deploy_cli
from fedhead.common.config import make_config, to_json
from fedhead.common.errors import InputError, RunError
from fedhead.server.checkpoints import Checkpoint
from fedhead.server.roster import Callers
from fedhead.server.rounds import RoundRecord
from fedhead.server.submitting import submit as module
from fedhead.server.submitting.control import status_of
from fedhead.server.submitting.lock import SubmitLock
from fedhead.server.submitting.session import Away, LinkLost, Session, Stopped


class Ended(Exception):
    """Far enough."""


@pytest.fixture
def config(tmp_path):
    return make_config(
        {
            "task": {"labels": ["0", "1"]},
            "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": "csv:nobody.csv", "test": {"source": "sklearn:digits"}, "declared_records": 1500},
            "privacy": {"epsilon": 1.0},
            "training": {"rounds": 3},
        },
        base=tmp_path,
    )


def go(config, server_file, folder, **more):
    folder.mkdir(exist_ok=True)
    return module.submit(config, server_file, folder, name="tumours", **more)


def test_a_second_submit_leaves_the_run_file_of_the_first(config, server_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prepare_deployed", lambda _: pytest.fail("it loads a backbone for nothing"))
    told = b'{"schema": 1, "name": "first", "state": "running"}'
    server_file.run_file.write_bytes(told)
    lock = SubmitLock(server_file.submit_lock)
    try:
        with pytest.raises(RunError, match="another run is under way"):
            go(config, server_file, tmp_path / "out")
    finally:
        lock.release()
    assert server_file.run_file.read_bytes() == told


def test_a_run_that_prepares_is_not_broken_off(config, server_file, tmp_path, monkeypatch):
    def prepare(_):
        raise Ended(status_of(server_file)["run"]["state"])

    monkeypatch.setattr(module, "prepare_deployed", prepare)
    with pytest.raises(Ended, match="waiting"):
        go(config, server_file, tmp_path / "out")
    assert json.loads(server_file.run_file.read_text())["state"] == "failed"
    SubmitLock(server_file.submit_lock).release()


def test_a_server_that_was_never_started_is_said_at_once(config, server_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prepare_deployed", lambda _: pytest.fail("nothing to prepare for"))
    server_file._base = tmp_path / "elsewhere"
    with pytest.raises(RunError, match="Start it first"):
        go(config, server_file, tmp_path / "out")


@pytest.mark.parametrize("told", [False, True])
def test_it_starts_again_from_a_checkpoint_of_its_own_only(config, server_file, tmp_path, monkeypatch, told):
    """A run that is begun anew in the folder of an old one, and loses its server early or late."""
    out = tmp_path / "out"
    out.mkdir()
    old = Checkpoint(to_json(config), "old", 2, {"w": torch.zeros(1)}, {}, [], {})
    old.write(out)
    seen = []

    def coordinator(desk, server, key, folder, resumed, run_file, session):
        def run():
            seen.append(resumed and resumed.run)
            if len(seen) == 2:
                raise Ended
            if told:
                Checkpoint(key, "new", 0, {"w": torch.zeros(1)}, {}, [], {}).write(folder)
                run_file.tell("running", 0, [], {}, "new", 5)
            raise LinkLost("away")

        return SimpleNamespace(run=run)

    monkeypatch.setattr(module, "prepare_deployed", lambda _: SimpleNamespace(timing={}, config=config))
    monkeypatch.setattr(module, "Session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module, "_coordinator", coordinator)
    with pytest.raises(Ended):
        go(config, server_file, out)
    assert seen == [None, "new" if told else None]


@pytest.mark.parametrize(("error", "starts"), [(LinkLost, 5), (Away, 1), (Stopped, 1)])
def test_how_often_it_starts_again(config, server_file, tmp_path, monkeypatch, error, starts):
    """A run that was given up is begun anew, four times at most; a server that stayed away was waited for enough."""
    given = []

    def session(*_, **settings):
        given.append(settings["seen"])  # `submit` has looked for the server before: it waits for one that is away
        raise error("gone")

    monkeypatch.setattr(module, "prepare_deployed", lambda _: SimpleNamespace(timing={}, config=config))
    monkeypatch.setattr(module, "Session", session)
    with pytest.raises(error, match="gone"):
        go(config, server_file, tmp_path / "out")
    assert given == [True] * starts


def test_a_folder_without_a_model_is_not_taken_for_a_whole_run(config, server_file, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*_):
        raise Ended(str((out / "result.json").exists()))

    outcome = SimpleNamespace(result=None, head={})
    desk = SimpleNamespace(timing={}, trainable=None, config=config, backbone=None, task=None)
    monkeypatch.setattr(module, "prepare_deployed", lambda _: desk)
    monkeypatch.setattr(module, "_hold", lambda *_: SimpleNamespace(**vars(outcome)))
    monkeypatch.setattr(
        module, "replace", lambda *_, **__: SimpleNamespace(write=lambda f: (f / "result.json").touch())
    )
    monkeypatch.setattr(module, "notes_of", lambda *_: [])
    monkeypatch.setattr(outcome, "result", SimpleNamespace(timing={}, notes=[]))
    monkeypatch.setattr(module, "save_model", killed)
    with pytest.raises(Ended, match="False"):
        go(config, server_file, out)


def test_the_time_of_earlier_starts_and_the_notes_of_the_rounds_count(config, server_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    history = [RoundRecord(1, seconds=100.0), RoundRecord(2, seconds=200.0)]
    Checkpoint(to_json(config), "r", 2, {"w": torch.zeros(1)}, {}, history, {}).write(out)
    desk = SimpleNamespace(timing={}, trainable=None, config=config, backbone=None, task=None)
    monkeypatch.setattr(module, "prepare_deployed", lambda _: desk)
    found = SimpleNamespace(timing={}, notes=["of a weight"])
    monkeypatch.setattr(module, "_hold", lambda *_: SimpleNamespace(result=found))
    monkeypatch.setattr(module, "notes_of", lambda *_: ["of all"])
    monkeypatch.setattr(module, "save_model", lambda *_: None)
    given = {}

    def replaced(_, **changes):
        given.update(changes)
        return SimpleNamespace(write=lambda _: None)

    monkeypatch.setattr(module, "replace", replaced)
    go(config, server_file, out, resume=True)
    assert 300 <= given["timing"]["total_seconds"] < 360
    assert given["notes"] == ["of all", "of a weight"]


def test_a_run_that_was_stopped_is_not_written_over(config, server_file, tmp_path, monkeypatch):
    """Whoever forgets --resume pays for no round twice: the refusal comes before the last run's state is touched."""
    out = tmp_path / "out"
    out.mkdir()
    Checkpoint(to_json(config), "r", 2, {"w": torch.zeros(1)}, {}, [], {}).write(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr("fedhead.common.config.find_recipe", lambda *_: config)
    monkeypatch.setattr("fedhead.server.server_file.load_server", lambda _: server_file)
    monkeypatch.setattr("fedhead.server.submitting.deployable.deployable", lambda *_: config)
    monkeypatch.setattr("fedhead.server.submitting.commands.reach", lambda _: None)
    monkeypatch.setattr("fedhead.common.operations.logs.set_up_logs", lambda *_, **__: None)
    given = []

    def run(*_, resume, **__):
        given.append(resume)
        raise Ended

    monkeypatch.setattr(module, "submit", run)
    with pytest.raises(InputError, match="it holds a run that was stopped"):
        deploy_cli.submit("wards", tmp_path / "server.toml", out)
    assert given == []
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(Ended):
        deploy_cli.submit("wards", tmp_path / "server.toml", out, resume=True)
    assert given == [True]


def test_a_stop_is_noticed_while_nobody_is_connected(link, server_file):
    state = ["running", ""]
    run = lambda: Run(run_id=5, status=RunStatus(status=state[0], sub_status=state[1]))  # noqa: E731
    link.answers.update({
        "/v1/control/list-runs": lambda _: ListRunsResponse(run_dict={5: run()}).SerializeToString(),
        "/v1/control/list-nodes": ListNodesResponse().SerializeToString(),
        "/v1/control/start-run": StartRunResponse(run_id=5).SerializeToString(),
        "/v1/control/stop-run": b"",
        "/v1/runtime/acquire-task": AcquireTaskResponse(task=Task(run_id=5), token="a" * 8).SerializeToString(),
        "/v1/runtime/pull-task-input": PullTaskInputResponse(task_id=9, run=Run(run_id=5)).SerializeToString(),
        "/v1/runtime/push-task-output": PushTaskOutputResponse().SerializeToString(),
        "/v1/runtime/send-task-heartbeat": SendTaskHeartbeatResponse(success=True).SerializeToString(),
        "/v1/runtime/get-nodes": lambda _: 401 if state[0] == "finished" else GetNodesResponse().SerializeToString(),
    })  # fmt: skip
    lock = SubmitLock(server_file.submit_lock)
    with Session(server_file, "{}", lock=lock) as session:
        assert session.registered() == []
        state[:] = ["finished", "stopped"]
        with pytest.raises(Stopped):
            Callers(session.grid, session.registered, 1, 30.0, 30.0).present(["north"])
    with pytest.raises(RunError, match="another run is under way"):  # a session gives back only what it took itself
        SubmitLock(server_file.submit_lock)
    lock.release()
