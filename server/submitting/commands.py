"""The coordinator's commands to its server, over the Control API on loopback: nodes, runs, start, stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from fedhead.common.config.faults import fault
from fedhead.common.errors import FedheadError, InputError, RunError
from fedhead.server.link.state import read_secret
from fedhead.server.server_file import ServerFile
from fedhead.server.submitting import flower
from fedhead.server.submitting.waiting import Away, LinkLost, TimeUp, Waiting

_REACH_SECONDS: Final = 10.0  # for an answer of a server that is on this machine
_RUNS: Final = 20  # that are listed; nobody has more of them unfinished
_START_AGAIN: Final = 'Start "fedhead serve" again, then go on with "fedhead submit --resume".'

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Seen:
    """A registered node.

    Attributes
    ----------
    node : int
    key : bytes
        Its public key, SubjectPublicKeyInfo in PEM.
    online : bool
    last_seen : float or None
        Unix time in seconds of its last sign of life; None for a node that never was connected.
    """

    node: int
    key: bytes
    online: bool
    last_seen: float | None


@dataclass(frozen=True)
class Listed:
    """A run as the server knows it.

    Attributes
    ----------
    flower_run : int
    state : str
        pending, starting, running, completed, failed or stopped.
    started, ended : str
        ISO times in UTC; "" before.
    """

    flower_run: int
    state: str
    started: str
    ended: str

    @property
    def finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("completed", "failed", "stopped")


class Commands:
    """Commands to one server.

    Parameters
    ----------
    server : ServerFile
    seconds : float, >= 0
        How long the server may be away; 0 tries each command once.

    Raises
    ------
    RunError
        The server was never started: there is no token yet.
    InputError
        The token can't be read.

    Notes
    -----
    Every command raises `Away` when the server is away for so long, and InputError when it is the server of
    another file.
    """

    def __init__(self, server: ServerFile, seconds: float) -> None:
        self._server = server
        self.waiting = Waiting(seconds, self._refused, lambda: Away(self._away()))
        self._client = flower.control(server.control, secret(server, server.token_file), self.waiting)

    def nodes(self) -> list[Seen]:
        """All registered nodes."""
        answer = self._ask(self._client.ListNodes, flower.ListNodesRequest())
        return [_seen(node) for node in answer.nodes_info if node.status != "unregistered"]

    def runs(self) -> list[Listed]:
        """The last runs, newest first."""
        answer = self._ask(self._client.ListRuns, flower.ListRunsRequest(limit=_RUNS))
        # A protobuf map has no order.
        found = sorted(answer.run_dict.values(), key=lambda run: run.pending_at, reverse=True)
        return [_listed(run) for run in found]

    def state_of(self, flower_run: int) -> str:
        """The state of one run; also frees what the server keeps of one that is finished."""
        answer = self._ask(self._client.ListRuns, flower.ListRunsRequest(run_id=flower_run))
        return _listed(answer.run_dict[flower_run]).state

    def start(self, recipe: str) -> int:
        """Start a run; nobody carries it out yet."""
        return int(self._ask(self._client.StartRun, flower.start_request(recipe)).run_id)

    def stop(self, flower_run: int) -> bool:
        """Stop a run; False when it was finished already."""
        try:
            return bool(self._ask(self._client.StopRun, flower.StopRunRequest(run_id=flower_run)).success)
        except LinkLost:
            raise
        except RunError:  # it has come to its end by itself
            if self.state_of(flower_run) in ("completed", "failed", "stopped"):
                return False
            raise

    def close(self) -> None:
        """Give the connection back."""
        self.waiting.leave()
        self._client.close()

    def _ask(self, command: Callable[[_Request], _Answer], request: _Request) -> _Answer:
        try:
            return command(request)
        except ValueError as error:
            raise InputError(
                fault(
                    "control", self._server.control, "what answers there is no fedhead server",
                    "Correct it, or end the other program.",
                )
            ) from error  # fmt: skip

    def _refused(self) -> FedheadError:
        return InputError(
            fault(
                "control", self._server.control, "the server there doesn't take the token of this file's state folder",
                'Name the server.toml that "fedhead serve" was started with.',
            )
        )  # fmt: skip

    def _away(self) -> str:
        if not self.waiting.seconds:
            return not_running(self._server)
        return f"the server at {self._server.control} gave no answer for {self.waiting.seconds:.0f} s. {_START_AGAIN}"


def secret(server: ServerFile, path: Path) -> str:
    """What the server wrote into one of its secret files at its first start.

    Raises
    ------
    RunError
        The file isn't there: the server was never started.
    InputError
        It can't be read, others have rights to it, or it holds something else.
    """
    try:
        return read_secret(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(not_running(server)) from None
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}). Run this as the user that the server runs as."
        ) from error


def reach(server: ServerFile) -> None:
    """See that the server runs and takes this file's token, before anything slow is done for a run.

    Raises
    ------
    RunError
        It doesn't run, or doesn't answer.
    InputError
        The server's files can't be used, or belong to another server.
    """
    commands = Commands(server, 0.0)
    try:
        with commands.waiting.within(_REACH_SECONDS):
            commands.runs()
    except TimeUp:
        raise RunError(not_running(server)) from None
    finally:
        commands.close()


def not_running(server: ServerFile) -> str:
    """One line for a server that isn't there."""
    return f'no server answers at {server.control}. Start it first: "fedhead serve SERVER.toml".'


def canonical(key: bytes) -> bytes:
    """A public key as SubjectPublicKeyInfo in PEM; b"" for what is none."""
    try:
        found = serialization.load_pem_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return b""
    return found.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _seen(node: flower.NodeInfo) -> Seen:
    online = node.status == "online"
    last: float | None = None
    if online and node.HasField("online_until"):
        last = node.online_until - flower.HEARTBEAT_PATIENCE * node.heartbeat_interval
    elif not online and node.HasField("last_deactivated_at"):
        with suppress(ValueError):
            last = datetime.fromisoformat(node.last_deactivated_at).timestamp()
    return Seen(node.node_id, canonical(node.public_key), online, last)


def _listed(run: flower.RunProto) -> Listed:
    state = run.status.sub_status if run.status.status == flower.Status.FINISHED else run.status.status
    return Listed(run.run_id, state, run.pending_at, run.finished_at)
