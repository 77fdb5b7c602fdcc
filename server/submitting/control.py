"""`fedhead status` and `fedhead stop`: what the server knows, what the run under way says of itself, and its end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhead.common.errors import RunError
from fedhead.server.server_file import ServerFile
from fedhead.server.submitting.commands import Commands, Seen
from fedhead.server.submitting.lock import held, owner_of
from fedhead.server.submitting.waiting import Away, TimeUp

_SECONDS: Final = 5.0  # that the server has for an answer
_LISTED: Final = 5  # runs
_METRICS: Final = 4  # that are shown
_UNDER_WAY: Final = ("waiting", "running")
_STYLES: Final[Mapping[str, str]] = {
    "running": "green", "waiting": "yellow", "finished": "green", "failed": "bold red", "stopped": "yellow",
    "broken off": "bold red",
}  # fmt: skip


def status_of(server: ServerFile) -> dict[str, Any]:
    """How the server, its data holders and the run under way are doing.

    Parameters
    ----------
    server : ServerFile

    Returns
    -------
    found : dict
        ``server``: its public address; ``reachable``: whether it answers; ``holders``: name, online, last_seen (Unix
        time in seconds, or None) of each in server.toml; ``runs``: flower_run, state, started, ended of the last ones,
        newest first; ``run``: what run.json holds, or None. The ``state`` of a run whose process is gone without a
        word is "broken off".

    Raises
    ------
    InputError
        The server's files can't be used, or belong to another server.
    """
    names = {key: name for name, key in server.public_pems().items()}
    nodes: dict[str, Seen] = {}
    runs: list[dict[str, Any]] = []
    reachable = False
    try:
        commands = Commands(server, 0.0)
        with commands.waiting.within(_SECONDS):
            nodes = {names[one.key]: one for one in commands.nodes() if one.key in names}
            runs = [vars(run) for run in commands.runs()[:_LISTED]]
        commands.close()
        reachable = True
    except (RunError, TimeUp):  # it was never started, or doesn't run now: that is what is asked here
        pass
    holders = [
        {"name": name, "online": name in nodes and nodes[name].online, "last_seen": _last_seen(nodes.get(name))}
        for name in sorted(server.public_keys)
    ]
    return {
        "server": server.address, "reachable": reachable, "holders": holders, "runs": runs, "run": _run(server),
    }  # fmt: skip


def stop_run(server: ServerFile) -> dict[str, Any]:
    """Stop the run under way; its process ends at its next request, and its checkpoint stays.

    A run that the server doesn't know of at the moment, as it is being prepared or begins anew, is stopped by SIGTERM
    to its process: what the server still has for open is then of a process that was killed.

    Returns
    -------
    found : dict
        ``stopped``: Flower's numbers of the runs that were stopped; ``process``: the one that got a signal, or None.

    Raises
    ------
    RunError
        The server doesn't run, no run is under way, or it has held its last round.
    InputError
        The server's files can't be used, or belong to another server.
    """
    _check_rounds_left(_run(server))
    commands = Commands(server, 0.0)
    try:
        with commands.waiting.within(_SECONDS):
            open_ = [run.flower_run for run in commands.runs() if not run.finished]
            stopped = [run for run in open_ if commands.stop(run)]
    except TimeUp:
        raise Away(f"the server at {server.control} gave no answer within {_SECONDS:.0f} s. See its log.") from None
    finally:
        commands.close()
    return {"stopped": stopped, "process": None if stopped and not _goes_on(server, stopped) else _end(server)}


def _check_rounds_left(run: Mapping[str, Any] | None) -> None:
    if run is not None and run.get("state") in _UNDER_WAY and run.get("round") == run.get("rounds"):
        raise RunError("the run has held its last round, and writes its results. Wait for it.")


def _goes_on(server: ServerFile, stopped: Collection[int]) -> bool:
    """Whether there is a process whose run is none of those that were stopped."""
    run = _run(server)
    if run is None or run.get("state") not in _UNDER_WAY or run.get("flower_run") in stopped:
        return False
    return owner_of(server.submit_lock) is not None


def _end(server: ServerFile) -> int:
    """End the process of a run that the server doesn't know of."""
    run, process = _run(server), owner_of(server.submit_lock)
    if run is None or run.get("state") not in _UNDER_WAY:
        raise RunError('no run is under way. "fedhead status --server SERVER.toml" shows the last ones.')
    _check_rounds_left(run)
    if process is None:
        raise RunError("the run is being prepared by a process that can't be seen from here. End it where it runs.")
    try:
        os.kill(process, signal.SIGTERM)
    except OSError as error:
        raise RunError(
            f"the run's process {process} can't be ended ({error.strerror}). Run this as the user that it runs as."
        ) from error
    return process


def show_status(found: Mapping[str, Any]) -> None:
    """What `status_of` found, on stdout."""
    out = Console(highlight=False, markup=False, emoji=False)
    plain, now = out.options.ascii_only, time.time()
    reachable = found["reachable"]
    out.print(
        Text.assemble(
            ("server ", ""), (str(found["server"]), "bold"), "  ",
            ("running", "green") if reachable else ("no answer", "bold red"),
        )
    )  # fmt: skip
    if not reachable:
        out.print(Text('Start it: "fedhead serve SERVER.toml".'))
    table = Table(pad_edge=False)
    for name in ("", "data holder", "state", "last seen"):
        table.add_column(name, overflow="fold")
    for holder in found["holders"]:
        mark, state, style = _holder(holder, reachable, plain)
        last = holder["last_seen"]
        table.add_row(
            Text(mark, style), Text(holder["name"]), Text(state, style), "" if last is None else _ago(now, last)
        )
    out.print(table)
    for line in _about_run(found["run"], now):
        out.print(line)


def _holder(holder: Mapping[str, Any], reachable: bool, plain: bool) -> tuple[str, str, str]:
    if not reachable:
        return "-" if plain else "–", "unknown", "dim"
    if holder["online"]:
        return "ok" if plain else "✓", "connected", "green"
    return "X" if plain else "✗", "away" if holder["last_seen"] else "never connected", "yellow"


def _about_run(run: Mapping[str, Any] | None, now: float) -> Iterator[Text]:
    if run is None:
        yield Text("no run yet")
        return
    state = str(run.get("state"))
    line = Text.assemble(
        "run ", (str(run.get("name")), "bold"), "  ", (state, _STYLES.get(state, "")),
        f"  round {run.get('round')} of {run.get('rounds')}",
    )  # fmt: skip
    updated = run.get("updated")
    if isinstance(updated, int | float):
        line.append(f", {_ago(now, float(updated))}")
    yield line
    holders = run.get("holders")
    if isinstance(holders, list):
        names = ", ".join(map(str, holders)) or "none"
        yield Text(f"holders  {names} ({len(holders)}; at least {run.get('least_holders')} needed)")
    metrics = run.get("metrics")
    if isinstance(metrics, dict) and metrics:
        shown = [f"{name} {_figure(value)}" for name, value in list(metrics.items())[:_METRICS]]
        yield Text(f"metrics  {', '.join(shown)}")
    yield Text(f"results  {run.get('out')}")
    if state in ("broken off", "stopped", "failed"):
        yield Text('Go on from its last checkpoint with "fedhead submit --resume".')


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _ago(now: float, then: float) -> str:
    """A span of time in the largest unit that says enough."""
    seconds = max(0.0, now - then)
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def _last_seen(node: Seen | None) -> float | None:
    return None if node is None else node.last_seen


def _run(server: ServerFile) -> dict[str, Any] | None:
    """What run.json holds; None where there is none, or it isn't what submit writes."""
    try:
        found = json.loads(server.run_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("schema") != 1:
        return None
    # A process that was killed says nothing any more; its lock is free then.
    if found.get("state") in _UNDER_WAY and not held(server.submit_lock):
        found["state"] = "broken off"
    return found
