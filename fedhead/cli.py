"""The command `fedhead`: results on stdout, progress and errors on stderr; exit status 0, 1 (failed) or 2 (bad input).

Heavy imports happen inside the commands: `fedhead --help` must not import torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fedhead import __version__
from fedhead.audit_cli import audit
from fedhead.common.errors import FedheadError, InputError
from fedhead.deploy_cli import COMMANDS
from fedhead.output import Commands, JsonOption, SetOption, emit
from fedhead.stopping import Stopping

app = typer.Typer(
    cls=Commands,
    name="fedhead",
    help="Fine-tune the head of a pre-trained model across data holders, under differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(audit, name="audit")

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder of the results. Default: a new one under runs/.")]
StateOption = Annotated[Path | None, typer.Option("--state", help="Folder that keeps the holders between runs.")]


@app.command()
def simulate(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's file, or the name of a built-in one.")] = None,
    out: OutOption = None,
    state: StateOption = None,
    settings: SetOption = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Run from several seeds: mean and deviation.")] = None,
    engine: Annotated[str, typer.Option(help="Where holders run: inprocess or ray.")] = "inprocess",
    exact: Annotated[bool, typer.Option("--exact", help="One thread: the same bits from the same seed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the built-in recipes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a whole federation on this machine."""
    from fedhead.common.config import builtin_recipes, find_recipe

    if list_recipes:
        _list(builtin_recipes(), as_json)
        return
    if recipe is None:
        raise InputError('RECIPE is missing: it must be given. "fedhead simulate --list" names the built-in recipes.')
    if engine not in ("inprocess", "ray"):
        raise InputError(f'--engine is "{engine}": it must be inprocess or ray. Leave it out for inprocess.')
    if resume and (out is None or seeds is not None):
        raise InputError("--resume goes with --out, and not with --seeds. Name the folder of the run that was stopped.")
    config = find_recipe(recipe, [*(settings or []), *(["run.exact=true"] if exact else [])])
    if out is not None:
        from fedhead.simulations.folders import check_out

        check_out(out, resume)  # before the slow imports; claimed again by the run

    from fedhead.simulations import console
    from fedhead.simulations.simulate import simulate, simulate_seeds

    engine_name: Any = engine
    # What a module of the user's own prints goes to stderr: stdout is for the result alone.
    with contextlib.redirect_stdout(sys.stderr), console.progress_bars() as listener:
        if seeds is not None:
            summary = simulate_seeds(
                config,
                seeds,
                out,
                name=Path(recipe).stem,
                state=state,
                engine=engine_name,
                progress_listener=listener,
            )
        else:
            result = simulate(
                config,
                out,
                name=Path(recipe).stem,
                state=state,
                engine=engine_name,
                resume=resume,
                progress_listener=listener,
            )
    if seeds is not None:
        emit(summary, as_json, lambda: console.show_seeds(summary))
    else:
        emit(result.to_dict(), as_json, lambda: console.show_result(result, result.folder or Path()))


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's file, or the name of a built-in one.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Most to spend.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta that goes with epsilon. Default: 1e-5.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise deviation over clipping norm.")] = None,
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="Private steps a holder takes in a round. Default: 1.")
    ] = None,
    sample_rate: Annotated[float | None, typer.Option(help="Poisson sampling; default: every record.")] = None,
    state: Annotated[Path | None, typer.Option("--state", help="Folder that keeps the holders: what is left.")] = None,
    ledgers: Annotated[
        list[Path] | None, typer.Option("--ledger", metavar="FILE", help="A data holder's ledger: what is left.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw epsilon against rounds (.png, .svg).")] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a run would cost, before anything is spent.

    Give a recipe, or two of --epsilon, --noise-multiplier and --rounds: the third follows.
    """
    if plot is not None and (plot.suffix not in (".png", ".svg") or not plot.absolute().parent.is_dir()):
        raise InputError(f'--plot is "{plot}": it must end in .png or .svg, in a folder that exists. Name such a file.')
    numbers = {
        "--epsilon": epsilon, "--delta": delta, "--rounds": rounds, "--noise-multiplier": noise_multiplier,
        "--local-steps": local_steps, "--sample-rate": sample_rate,
    }  # fmt: skip
    config = None
    if recipe is not None:
        from fedhead.common.config import find_recipe

        extra = next((name for name, value in numbers.items() if value is not None), None)
        if extra is not None:
            raise InputError(f"{extra} is given together with RECIPE: the recipe says it. Change it with --set.")
        if state is not None and ledgers:
            raise InputError("--ledger is given together with --state: one of them says what was spent. Remove one.")
        config = find_recipe(recipe, settings or [])
    else:
        for name, given in (("--state", state), ("--ledger", ledgers), ("--set", settings)):
            if given:
                raise InputError(f"RECIPE is missing: {name} goes with one. Give it.")

    from fedhead.simulations import console, plans

    if config is not None:
        found = plans.of_recipe(config, state, ledgers or ())
    else:
        delta, local_steps = 1e-5 if delta is None else delta, 1 if local_steps is None else local_steps
        found = plans.of_numbers(epsilon, delta, rounds, local_steps, sample_rate, noise_multiplier)
    if plot is not None:
        from fedhead.simulations.plan_plot import draw_plan

        draw_plan(plot, found, plans.curves(found, config))
    emit(found, as_json, lambda: console.show_plan(found))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")], as_json: JsonOption = False) -> None:
    """Make the HTML page of a run anew."""
    from fedhead.simulations.report import write_report

    path = write_report(run_dir)
    emit({"report": str(path)}, as_json, lambda: typer.echo(str(path)))


@app.command()
def predict(
    model_dir: Annotated[Path, typer.Argument(help="The folder model/ of a run.")],
    inputs: Annotated[list[str], typer.Argument(help="A csv, json or parquet file, images, a folder, or - for stdin.")],
    column: Annotated[str | None, typer.Option(help="Column of the input; default: text.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of stdout.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="The backbone's weights here: a path or pkg://... Default: as in the run.")
    ] = None,
    allow_modules: Annotated[
        bool, typer.Option("--allow-modules", help="Let the model name code of its own (module:...); trust it first.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Labels and probabilities for new records."""
    from fedhead.simulations.predict import predict_file

    predict_file(
        model_dir, inputs, out=out, column=column, as_json=as_json, weights=weights, allow_modules=allow_modules
    )


@app.command()
def budget(
    ledgers: Annotated[list[Path], typer.Argument(metavar="LEDGER...", help="Ledgers, or folders that hold some.")],
    delta: Annotated[float | None, typer.Option(help="State epsilon at this delta. Default: each budget's.")] = None,
    sign: Annotated[Path | None, typer.Option(help="Write a signed statement of each holder into this folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What was spent and what is left, per holder, domain and run."""
    from fedhead.simulations.budgets import read_budgets, show_budgets, sign_statements

    found = read_budgets(ledgers, delta)
    if sign is not None:
        found["statements"] = [str(path) for path in sign_statements(found, sign)]
    emit(found, as_json, lambda: show_budgets(found))


for _command in COMMANDS:
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _list(recipes: dict[str, Path], as_json: bool) -> None:
    import tomllib

    rows = {}
    for name, path in recipes.items():
        text = path.read_text(encoding="utf-8")
        first = next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")
        rows[name] = {"summary": first, "file": str(path), "backbone": tomllib.loads(text)["model"]["backbone"]}
    width = max(map(len, rows), default=0)
    lines = [f"{name:<{width}}  {row['summary']}" for name, row in rows.items()]
    emit(rows, as_json, lambda: typer.echo("\n".join(lines)))


def main() -> NoReturn:
    """Run the command; every error that a user can meet is one line and an exit status, never a traceback."""
    debug = bool(os.environ.get("FEDHEAD_DEBUG"))
    if not debug:
        # Of the libraries underneath: they speak to programmers, and may quote a record.
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a character; what can be shown is shown
            stream.reconfigure(errors="replace")
    try:
        status = _run()
        if status == 130:
            raise KeyboardInterrupt
    except FedheadError as error:
        if debug:
            raise
        _fail(str(error), error.exit_status)
    except (typer.Abort, KeyboardInterrupt):
        # Python remembers a KeyboardInterrupt that left a text under `exec`, such as a dataclass's in an import, and
        # would end by the signal, whatever the status is. Another text that ends well makes it forget.
        exec("")
        _fail("stopped.", 130)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            if not usage():  # no arguments: the help has been printed
                sys.exit(2)
            _fail(f'{usage()} "fedhead --help" shows what can be given.', 2)
        if debug:
            raise
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror}. Check the file, its permissions and the space left.", 1)
        _fail(
            f"something went wrong inside fedhead ({type(error).__name__}). "
            "Set FEDHEAD_DEBUG=1 for the details, and report it please.",
            1,
        )
    sys.exit(status or 0)


def _run() -> int | None:
    """Status of an early exit, 130 after Ctrl-C; None."""
    with Stopping(_run.__code__) as stopping:
        try:
            status: int | None = app(standalone_mode=False)
        except Exception:
            stopping.settle()
            raise
        stopping.settle()
    return status


def _fail(text: str, status: int) -> NoReturn:
    as_json = "--json-logs" in sys.argv
    if as_json:  # a collector gets the last lines in the form of all the others
        from fedhead.common.operations.logs import set_up_logs

        set_up_logs("client" if sys.argv[1] == "join" else "server", as_json=True)
    for line in text.splitlines():
        if as_json:
            logging.getLogger("fedhead").error("%s", line)
        else:
            typer.echo(f"fedhead: {line}", err=True)
    sys.exit(status)
