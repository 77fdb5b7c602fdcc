"""The commands of a deployment: keys, serve, submit, status and stop at the coordinator, check and join at a holder.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedhead.common.errors import InputError
from fedhead.output import JsonOption, SetOption, emit

if TYPE_CHECKING:
    from fedhead.server.server_file import ServerFile

HolderArgument = Annotated[Path, typer.Argument(metavar="HOLDER", help="A data holder's own file, holder.toml.")]
ServerArgument = Annotated[Path, typer.Argument(metavar="SERVER", help="The coordinator's file, server.toml.")]
ServerOption = Annotated[Path, typer.Option("--server", metavar="FILE", help="The coordinator's file, server.toml.")]
LogsOption = Annotated[bool, typer.Option("--json-logs", help="Logs as one JSON object a line.")]


def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the keys; made if it isn't there.")],
    holders: Annotated[
        list[str] | None, typer.Argument(metavar="HOLDER...", help="Data holders that get a key. Default: show DIR.")
    ] = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="Name or address of the server. Default: localhost, 127.0.0.1.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long certificates are valid.")] = 365,
    as_json: JsonOption = False,
) -> None:
    """A certificate authority, the server's certificate, and a key pair for each data holder; overwrites nothing."""
    from fedhead.server.keys import describe_keys, make_keys, show_keys

    found = make_keys(folder, holders, hosts=hosts, days=days) if holders else describe_keys(folder)
    emit(found, as_json, lambda: show_keys(found))


def serve(server: ServerArgument, json_logs: LogsOption = False) -> None:
    """Run the coordinator's link: data holders connect over TLS. SIGTERM ends it, SIGHUP reads their keys again."""
    from fedhead.common.operations.logs import set_up_logs

    set_up_logs("server", as_json=json_logs)
    from fedhead.server.link.serve import serve as run

    run(server)


def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a built-in one.")],
    server: ServerOption,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results. Default: a new one under runs/.")
    ] = None,
    settings: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    json_logs: LogsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run at the data holders and follow it to its end; leaves the same folder as a simulation."""
    from fedhead.common.config import find_recipe

    if resume and out is None:
        raise InputError("--resume goes with --out. Name the folder of the run that was stopped.")
    config = find_recipe(recipe, settings or [])
    from fedhead.server.server_file import load_server
    from fedhead.server.submitting.deployable import deployable

    file = load_server(server)
    config = deployable(config, file)
    if out is not None:
        _check_results(out, file, resume)
    from fedhead.common.operations.logs import set_up_logs
    from fedhead.server.submitting.commands import reach

    reach(file)  # before the slow imports, and before a folder or the last run's state is touched
    from fedhead.simulations.folders import claimed

    # where a terminal shows progress, only what is wrong needs a line of its own
    watched = sys.stderr.isatty() and not json_logs
    set_up_logs("server", as_json=json_logs, level=logging.WARNING if watched else logging.INFO)
    from fedhead.server.submitting.submit import submit as run
    from fedhead.simulations import console

    name = Path(recipe).stem
    with (
        contextlib.redirect_stdout(sys.stderr),
        console.progress_bars() as listener,
        claimed(out, name, resume) as folder,
    ):
        result = run(config, file, folder, name=name, resume=resume, progress_listener=listener)
        from fedhead.simulations.report import write_report

        write_report(folder)
    emit(result.to_dict(), as_json, lambda: console.show_result(result, folder))


def _check_results(out: Path, server: ServerFile, resume: bool) -> None:
    """Refuse a folder that is named by mistake: a run that began anew for a slip would cost the data holders."""
    from fedhead.common.results import FILE

    if resume and not out.is_dir():
        raise InputError(
            f'--out is "{out}": there is no run to go on with. Name the folder of the one that was stopped; without '
            "--resume a new one starts."
        )
    if resume and (out / FILE).exists():
        raise InputError(f'--out is "{out}": its run has ended. Leave out --resume, and choose another folder.')
    if out.resolve().is_relative_to(server.folder.resolve()):
        raise InputError(f'--out is "{out}": it lies in the server\'s state folder. Choose a folder of its own.')


def status(server: ServerOption, as_json: JsonOption = False) -> None:
    """Which data holders are connected, and how the run under way is doing."""
    from fedhead.server.server_file import load_server
    from fedhead.server.submitting.control import show_status, status_of

    found = status_of(load_server(server))
    emit(found, as_json, lambda: show_status(found))
    if not found["reachable"]:
        raise typer.Exit(1)


def stop(server: ServerOption, as_json: JsonOption = False) -> None:
    """Stop the run under way; its checkpoint stays, and `fedhead submit --resume` goes on from it."""
    from fedhead.server.server_file import load_server
    from fedhead.server.submitting.control import stop_run

    found = stop_run(load_server(server))
    emit(found, as_json, lambda: typer.echo("stopped; fedhead submit --resume goes on from the last checkpoint"))


def check(
    holder: HolderArgument,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A run that is planned: what it would need, and cost.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Whether a data holder is ready: data, limits, ledger, budget left, features, connection. Joins nothing.

    Numbers of records are for the holder alone. Status 1 when something has to be changed, 2 for a file with faults.
    """
    from fedhead.common.config import find_recipe

    config = None if recipe is None else find_recipe(recipe)
    from fedhead.client.checking import check_holder, show_report

    with contextlib.redirect_stdout(sys.stderr):  # what a module of the user's own prints
        report = check_holder(holder, recipe=config)
    emit(report.to_dict(), as_json, lambda: show_report(report))
    if not report.good:
        raise typer.Exit(1)


def join(holder: HolderArgument, json_logs: LogsOption = False) -> None:
    """Join a federation as a data holder, until SIGTERM. Runs only the code that is installed here."""
    from fedhead.client.joining.join import join as run

    status = run(holder, json_logs=json_logs)
    if status:
        raise typer.Exit(status)


COMMANDS = (check, join, keys, serve, submit, status, stop)
