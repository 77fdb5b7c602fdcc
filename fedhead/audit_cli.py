"""`fedhead audit`: prove what was spent, and that the mechanism keeps its promise.

Exit status 1 when anything disagrees or a claim is broken, 2 for bad input.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedhead.common.errors import InputError
from fedhead.output import Commands, JsonOption, SetOption, emit

audit = typer.Typer(
    cls=Commands,
    help="Prove what was spent, and that the mechanism keeps its promise.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's file, or the name of a built-in one.")]
PageOption = Annotated[
    Path | None, typer.Option("--page", metavar="FILE", help="Write the page for a data protection officer.")
]
StatementsOption = Annotated[
    list[Path] | None,
    typer.Option("--statement", metavar="FILE", help="A signed statement that the ledger must bear out."),
]
KeysOption = Annotated[
    list[str] | None, typer.Option("--key", metavar="HEX", help="A holder's public key, known from elsewhere.")
]
MarksOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The server's marks.json: no ledger may be older than it.")
]


@audit.command("ledger")
def audit_ledger(
    ledgers: Annotated[list[Path], typer.Argument(metavar="LEDGER...", help="Ledgers, or folders that hold some.")],
    delta: Annotated[float | None, typer.Option(help="State epsilon at this delta. Default: each budget's.")] = None,
    statements: StatementsOption = None,
    keys: KeysOption = None,
    marks: MarksOption = None,
    same_people: Annotated[
        bool, typer.Option("--same-people", help="The same person may be at several holders: their epsilons add up.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a signed privacy statement of each holder here.")
    ] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check chains, signatures and marks, and count epsilon anew with two independent accountants.

    Status 1, with the first bad row, when anything disagrees.
    """
    _check_page(page)
    _check_folder(sign)
    from fedhead.simulations.audit.ledgers import audit_ledgers, show_audit, sign_audit

    found = audit_ledgers(
        ledgers, delta=delta, statements=statements or (), keys=keys or (), marks=marks, same_people=same_people
    )
    if sign is not None and found["passed"]:
        found["signed"] = [str(path) for path in sign_audit(found, sign)]
    _write_page(page, "ledgers", ledger=found)
    emit(found, as_json, lambda: show_audit(found))
    _end(found["passed"])


@audit.command("statement")
def audit_statement(
    statement: Annotated[Path, typer.Argument(help="A signed privacy statement.")],
    key: Annotated[
        str | None, typer.Option(metavar="HEX", help="The holder's public key, known from elsewhere.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a signed privacy statement by the holder's public key alone."""
    from fedhead.simulations.audit.ledgers import read_statement, show_statement

    found = read_statement(statement, key)
    emit(found, as_json, lambda: show_statement(found))


@audit.command("mechanism")
def audit_mechanism(
    recipe: RecipeArgument,
    canaries: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Planted records. Default and most: as many as there are features; of planted gradients, as many as "
            "linear layers have weights, and at most 512 by default.",
        ),
    ] = None,
    records: Annotated[int, typer.Option(min=1, help="Real records that the canaries hide among.")] = 256,
    seed: Annotated[
        int | None,
        typer.Option(help="Audit a simulation's noise, from this seed, instead of a deployment's secure noise."),
    ] = None,
    settings: SetOption = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Plant canaries in the real training path: lower bounds on epsilon beside the claim, and conformance tests.

    Status 1 when the claim is broken.
    """
    from fedhead.common.config import find_recipe

    _check_page(page)
    config = find_recipe(recipe, settings or [])
    from fedhead.simulations import console
    from fedhead.simulations.audit.mechanism import audit_mechanism
    from fedhead.simulations.audit.verdict import show_mechanism

    with contextlib.redirect_stdout(sys.stderr), console.progress_bars() as listener:
        found = audit_mechanism(
            config, canaries=canaries, records=records, seed=seed, name=Path(recipe).stem, progress_listener=listener
        )
    _write_page(page, Path(recipe).stem, mechanism=found)
    emit(found, as_json, lambda: show_mechanism(found))
    _end(found["passed"])


@audit.command("membership")
def audit_membership(
    recipe: RecipeArgument,
    models: Annotated[int | None, typer.Option(min=4, help="Heads to train. Default: enough for 0.1 %.")] = None,
    settings: SetOption = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attack the final heads of simulated runs: who was a member? Beside the ceiling that epsilon and delta allow."""
    from fedhead.common.config import find_recipe

    _check_page(page)
    config = find_recipe(recipe, settings or [])
    from fedhead.simulations import console
    from fedhead.simulations.audit.membership import audit_membership, show_membership

    with contextlib.redirect_stdout(sys.stderr), console.progress_bars() as listener:
        found = audit_membership(config, models=models, name=Path(recipe).stem, progress_listener=listener)
    _write_page(page, Path(recipe).stem, membership=found)
    emit(found, as_json, lambda: show_membership(found))


@audit.command("report")
def audit_report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page. Default: audit.html in the run's folder.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The run's recipe, if it is no built-in one: its paths start from there.")
    ] = None,
    membership: Annotated[
        bool, typer.Option("--membership", help="Attack final heads too: trains the recipe many times.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Audit a simulation's noise, from this seed, instead of a deployment's secure noise."),
    ] = None,
    statements: StatementsOption = None,
    keys: KeysOption = None,
    marks: MarksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Audit a run's ledgers and its mechanism, and write one page that a data protection officer can read."""
    _check_page(out, "--out")
    from fedhead.simulations import console
    from fedhead.simulations.audit.whole import audit_run

    with contextlib.redirect_stdout(sys.stderr), console.progress_bars() as listener:
        found, path = audit_run(
            run_dir,
            out,
            recipe=recipe,
            membership=membership,
            seed=seed,
            statements=statements or (),
            keys=keys or (),
            marks=marks,
            progress_listener=listener,
        )
    emit({**found, "page": str(path)}, as_json, lambda: typer.echo(str(path)))
    _end(found["passed"])


def _check_page(path: Path | None, option: str = "--page") -> None:
    """Before the work, not after it."""
    if path is not None and (path.suffix != ".html" or path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f'{option} is "{path}": it must end in .html, in a folder that exists. Name such a file.')


def _check_folder(path: Path | None) -> None:
    if path is not None and next(one for one in (path.absolute(), *path.absolute().parents) if one.exists()).is_file():
        raise InputError(f'--sign is "{path}": it must be a folder, or a new one. Name such a folder.')


def _write_page(path: Path | None, name: str, **found: Any) -> None:
    if path is None:
        return
    from fedhead.simulations.audit.page import now, write_page

    write_page({"name": name, "created": now(), "ledger": None, "mechanism": None, "membership": None, **found}, path)


def _end(passed: bool) -> None:
    if not passed:
        raise typer.Exit(1)
