"""One Flower run that this process carries out as its ServerApp: started, taken, kept alive, and brought to its end.

The server runs none of our code: a run that is started there waits until somebody takes its task, and this process
does. From then on a heartbeat says that it lives; a minute without one, and the server gives the run up.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Final, Literal

from fedhead.common.errors import FedheadError, InputError, RunError
from fedhead.server.roster import Registered
from fedhead.server.server_file import ServerFile
from fedhead.server.submitting import flower
from fedhead.server.submitting.commands import Commands, not_running, secret
from fedhead.server.submitting.grid import DeployedGrid
from fedhead.server.submitting.lock import SubmitLock
from fedhead.server.submitting.waiting import Away, LinkLost, Rejected, Stopped, TimeUp, Waiting

__all__ = ["Away", "DeployedGrid", "LinkLost", "Outcome", "Registered", "Session", "Stopped"]

Outcome = Literal["completed", "failed", "stopped"]

START_SECONDS: Final = 60.0  # for the server to offer a run that it has just been given
CLOSE_SECONDS: Final = 4.0  # for the last words; then the server finds out by itself
BEAT_SECONDS: Final = 10.0  # the server waits for 60
_AGAIN_SECONDS: Final = 1.0  # after a heartbeat that didn't come through
_BEAT_LIMIT: Final = 5.0
_REASON_SECONDS: Final = 30.0  # to find out why a request was refused
_FOREIGN: Final = "nobody carries this run out"
_LOOK_SECONDS: Final = 1.0  # whether a run that isn't offered was stopped
_RESUME: Final = 'Go on from the last checkpoint with "fedhead submit --resume".'
_STOPPED: Final = f"the run was stopped. {_RESUME}"
_GIVEN_UP: Final = f"the server has given the run up, as it heard nothing of it for a minute. {_RESUME}"
_LOST: Final = f"the server handed the run over in an answer that was lost. {_RESUME}"


class Session:
    """A run, from its start to its end; a context manager.

    Parameters
    ----------
    server : ServerFile
        Of the server, which must be running on this machine.
    recipe : str
        As `to_json` writes it; goes to every holder's node.
    patience : float, > 0
        Seconds for which the server may be away.
    lock : SubmitLock, optional
        Of this server, where the caller has it and will give it back; left out, the session takes its own.
    seen : bool
        Whether the server was there a while ago. Then the session waits for it from the start; else a server that
        isn't there is told at once.

    Attributes
    ----------
    grid : DeployedGrid
    flower_run : int
        Flower's number of the run.

    Raises
    ------
    RunError
        Another run is under way; as `Away`: the server isn't running; as `LinkLost`: it doesn't take the run.
    InputError
        The server's files can't be used, or belong to another server.

    Notes
    -----
    Left by an exception of a signal (KeyboardInterrupt, SystemExit) the run ends as stopped, by any other as failed.
    Runs that the server still takes for unfinished have no process any more, as this one has the lock; they are
    stopped first.
    """

    def __init__(
        self,
        server: ServerFile,
        recipe: str,
        patience: float = 600.0,
        lock: SubmitLock | None = None,
        *,
        seen: bool = False,
    ) -> None:
        self._closed, self.flower_run = False, 0
        self._server, self._names = server, {key: name for name, key in server.public_pems().items()}
        if not server.folder.is_dir():
            raise RunError(not_running(server))
        self._lock = SubmitLock(server.submit_lock) if lock is None else None
        try:
            self._start(recipe, patience, patience if seen else 0.0)
        except BaseException:
            self._abandon()
            if self._lock is not None:
                self._lock.release()
            raise

    def registered(self) -> list[Registered]:
        """The nodes of the holders in server.toml, connected or not; each is named after its key's file.

        Raises
        ------
        LinkLost
            The server has given the run up; as `Away`: it was away for longer than the session's patience.
        Stopped
            Somebody stopped the run.
        """
        # The list itself would still be given to a run that was stopped, and a wait for holders would go on.
        self.grid.get_node_ids()
        found = [(self._names.get(one.key), one) for one in self._commands.nodes()]
        return [Registered(one.node, name, one.online) for name, one in found if name is not None]

    def close(self, outcome: Outcome) -> None:
        """End the run; takes at most 5 s, also when the server is away, and never fails. Later calls do nothing.

        Parameters
        ----------
        outcome : {"completed", "failed", "stopped"}
            As it is shown in the server's list of runs.
        """
        if self._closed:
            return
        self._closed = True
        self._waiting.leave()
        self._commands.waiting.leave()
        self._pulse.stop()
        try:
            last = Waiting(CLOSE_SECONDS, _gone, _gone)
            client = flower.runtime(self._server.control, self._token, last)
            with last.within(CLOSE_SECONDS), suppress(FedheadError, TimeUp):
                client.PushTaskOutput(flower.PushTaskOutputRequest(sub_status=outcome, details=""))
                commands = Commands(self._server, CLOSE_SECONDS)
                with commands.waiting.within(1.0):
                    commands.state_of(self.flower_run)
        finally:
            self._client.close()
            self._commands.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("stopped" if isinstance(error, KeyboardInterrupt | SystemExit | Stopped) else "failed")

    def _start(self, recipe: str, patience: float, first: float) -> None:
        server = self._server
        proof = secret(server, server.secret_file).encode()
        probe = Commands(server, first)
        for run in probe.runs():
            if not run.finished:
                probe.stop(run.flower_run)
        probe.close()
        self._commands = Commands(server, patience)
        self.flower_run = self._commands.start(recipe)
        self._token = self._take(proof)
        self._waiting = Waiting(patience, lambda: self._why(_GIVEN_UP), lambda: Away(self._silent(patience)))
        self._client = flower.runtime(server.control, self._token, self._waiting)
        try:
            task = self._client.PullTaskInput(flower.PullTaskInputRequest())
        except Rejected as error:  # a task is handed over once: the answer that it was in has been lost
            raise self._why(_LOST) from error
        flower.enter(task.task_id, task.run.run_id, task.context.node_id)
        self.grid = DeployedGrid(self._client, self._waiting, server.message_megabytes)
        self.grid.set_run(flower.run_from_proto(task.run))
        self._pulse = _Pulse(server, self._token)
        self._pulse.start()

    def _take(self, proof: bytes) -> str:
        """Take the task of our run; tasks of runs that nobody carries out come first, and are ended."""
        waiting = Waiting(START_SECONDS, self._wrong_secret, self._not_offered)
        client = flower.acquiring(self._server.control, proof, waiting)
        until, look = time.monotonic() + START_SECONDS, time.monotonic() + _LOOK_SECONDS
        while time.monotonic() < until:
            answer = client.AcquireTask(flower.AcquireTaskRequest(supported_task_types=[flower.TaskType.SERVER_APP]))
            if not answer.token:
                if time.monotonic() > look:
                    look = time.monotonic() + _LOOK_SECONDS
                    if self._commands.state_of(self.flower_run) == "stopped":
                        raise Stopped(_STOPPED)
                time.sleep(0.1)
            elif answer.task.run_id == self.flower_run:
                client.close()
                return str(answer.token)
            else:
                foreign = flower.runtime(self._server.control, answer.token, Waiting(0.0, _gone, _gone))
                with suppress(RunError):
                    foreign.PushTaskOutput(
                        flower.PushTaskOutputRequest(sub_status=flower.SubStatus.FAILED, details=_FOREIGN)
                    )
                foreign.close()
        raise self._not_offered()

    def _why(self, otherwise: str) -> FedheadError:
        """What is behind a request that was refused: the list of runs says whether somebody stopped the run."""
        state = ""
        with suppress(FedheadError):
            commands = Commands(self._server, _REASON_SECONDS)
            state = commands.state_of(self.flower_run)
            commands.close()
        if state == "stopped":
            return Stopped(_STOPPED)
        return LinkLost(otherwise)

    def _silent(self, patience: float) -> str:
        return f'the server gave no answer for {patience:.0f} s. Start "fedhead serve" again. {_RESUME}'

    def _wrong_secret(self) -> FedheadError:
        return InputError(
            f"{self._server.secret_file} can't be used: the server doesn't take it. "
            "Restore the file that the server wrote at its first start."
        )

    def _not_offered(self) -> FedheadError:
        return LinkLost(f"the server has not offered the run within {START_SECONDS:.0f} s. {_RESUME}")

    def _abandon(self) -> None:
        """Stop what a failed start has left behind."""
        if self.flower_run:
            with self._commands.waiting.within(1.0), suppress(FedheadError, TimeUp):
                self._commands.stop(self.flower_run)


class _Pulse(threading.Thread):
    """Tells the server that this process lives, until the task has ended."""

    def __init__(self, server: ServerFile, token: str) -> None:
        super().__init__(name="fedhead-pulse", daemon=True)
        self._ended = threading.Event()
        # A refusal ends it quietly; whoever sends the next request learns why.
        self._waiting = Waiting(0.0, lambda: Stopped("refused"), lambda: Away("away"))
        self._client = flower.runtime(server.control, token, self._waiting)

    def stop(self) -> None:
        """Send no more."""
        self._ended.set()

    def run(self) -> None:
        while not self._ended.is_set():
            pause = _AGAIN_SECONDS
            with suppress(LinkLost, TimeUp, RunError), self._waiting.within(_BEAT_LIMIT):
                try:
                    answer = self._client.SendTaskHeartbeat(flower.SendTaskHeartbeatRequest())
                except Stopped:
                    break
                if not answer.success:
                    break
                pause = BEAT_SECONDS
            self._ended.wait(pause)
        self._client.close()


def _gone() -> FedheadError:
    return RunError("the server is away, or the task has ended")
