"""`fedhead audit report`: a run's ledgers, its mechanism and, on request, its head, audited and shown on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedhead.common import progress
from fedhead.common.config import RunConfig, builtin_recipes, find_recipe, make_config
from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.findings import Check
from fedhead.common.privacy.audit.recount import agree, pld_epsilon, rows_of
from fedhead.common.privacy.events import NoPrivacyEvent, from_row
from fedhead.common.results import Result
from fedhead.simulations.audit.ledgers import audit_ledgers
from fedhead.simulations.audit.mechanism import NotAudited, audit_mechanism, check_seed
from fedhead.simulations.audit.membership import audit_membership, check_settings
from fedhead.simulations.audit.page import now, passed, write_page

FILE: Final = "audit.html"


def audit_run(
    run_dir: str | Path,
    out: Path | None = None,
    *,
    recipe: str | Path | None = None,
    membership: bool = False,
    seed: int | None = None,
    statements: Sequence[Path] = (),
    keys: Sequence[str] = (),
    marks: Path | None = None,
    progress_listener: progress.Listener | None = None,
) -> tuple[dict[str, Any], Path]:
    """Audit a run and write the page.

    Parameters
    ----------
    run_dir : path
        The folder of a run.
    out : path, optional
        The page; default: audit.html in the folder.
    recipe : path, optional
        The run's recipe, where its file can't be found from the result: paths to records start from its folder.
    membership : bool
        Attack final heads as well; trains the recipe many times.
    seed : int, optional
        Audit a simulation's noise from this seed instead of a deployment's.
    statements, keys, marks
        What the ledgers must bear out, as `audit_ledgers` takes them.
    progress_listener : callable, optional
        Called as `listener(stage, done, total, note)`.

    Returns
    -------
    found : dict
        `name`, `created`, `passed`, and the results `ledger`, `mechanism` and `membership`; None for what was not
        audited. `why_not` says why of a mechanism that can't be.
    path : Path
        Of the page.

    Raises
    ------
    InputError
        The run or its recipe can't be read.
    LedgerError
        A ledger can't be opened.
    """
    folder = Path(run_dir)
    path = folder / FILE if out is None else out
    if path.is_dir():
        raise InputError(f'--out is "{path}": it is a folder. Name a file that ends in .html.')
    check_seed(seed)
    result = Result.read(folder)
    config = config_of(result, recipe)
    if membership:
        check_settings(config, None)  # before the work
    ledger = audit_ledgers(
        [folder / "holders"], delta=config.privacy.delta, statements=statements, keys=keys, marks=marks
    )
    agrees = same_run(result, ledger)
    compared = not agrees.figure.endswith("of 0 holders")
    unseen = {"passed": None, "meaning": "No holder was charged for what the result says, so nothing was compared."}
    ledger["checks"].append({**agrees.to_dict(), **({} if compared else unseen)})
    ledger["passed"] = ledger["passed"] and agrees.passed
    found: dict[str, Any] = {
        "name": result.name, "created": now(), "ledger": ledger, "mechanism": None, "membership": None,
    }  # fmt: skip
    try:
        found["mechanism"] = audit_mechanism(config, seed=seed, name=result.name, progress_listener=progress_listener)
    except NotAudited as reason:  # the ledgers are worth a page all the same
        found["why_not"] = {"mechanism": str(reason)}
    if membership:
        found["membership"] = audit_membership(config, name=result.name, progress_listener=progress_listener)
    found["passed"] = passed(found) is not False
    write_page(found, path)
    return found, path


def same_run(result: Result, ledger: Mapping[str, Any]) -> Check:
    """Whether some run in each holder's ledger is what the result says that the holder released and spent.

    A run is that if it charged all that the result says, and released nothing beyond it: a holder that fell silent was
    charged, and may or may not have released.
    """
    faults, compared = [], 0
    for spend in result.privacy:
        if spend["mechanism"] == "none" or spend["unit"] == "holder":  # charged nowhere, or by the server
            continue
        compared += 1
        charged: dict[str, set[str]] = {}
        released: dict[str, set[str]] = {}
        for row in _rows(ledger, spend["holder"]):
            line = _line(row["round"], row["event"])
            charged.setdefault(row["run"], set()).add(line)
            if row["state"] == "released":
                released.setdefault(row["run"], set()).add(line)
        said = {_line(event["round"], event) for event in spend["events"]}
        if not any(said <= charged[run] for run in charged):
            faults.append(f"says that {spend['holder']} released what no run in its ledger was charged with")
        elif not any(said <= charged[run] and released.get(run, set()) <= said for run in charged):
            faults.append(f"leaves out what {spend['holder']} released, by its ledger")
        elif not _counted(spend):
            faults.append(f"states another epsilon for {spend['holder']} than its own events come to")
    return Check(
        "result",
        "The run's result, against the ledgers",
        not faults,
        f"{compared - len(faults)} of {compared} holders",
        "What the result says that each holder released and spent is what some run in its ledger was charged with."
        if not faults
        else f"The result {faults[0]}: it is another run's ledger, or the result was changed.",
    )


def _rows(ledger: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    domains = [domain for one in ledger["holders"] if one["holder"] == name for domain in one["domains"]]
    return [row for domain in domains for row in domain["releases"]]


def _counted(spend: Mapping[str, Any]) -> bool:
    """Whether a result's epsilon is at least what a second accountant makes of its events, up to rounding."""
    events = [from_row(row) for row in spend["events"]]
    if any(isinstance(event, NoPrivacyEvent) for event in events):
        return math.isinf(spend["epsilon"])
    found = pld_epsilon(rows_of(events), spend["delta"])
    return found is None or agree(spend["epsilon"], found)


def _line(number: object, event: Mapping[str, Any]) -> str:
    numbers = [event.get(name) for name in ("mechanism", "noise_multiplier", "sample_rate", "steps", "clipping_norm")]
    return repr((number, *numbers))


def config_of(result: Result, recipe: str | Path | None = None) -> RunConfig:
    """The recipe of a result. A result keeps no path of its machine: paths start where the recipe's file lies."""
    config = make_config(dict(result.config))
    if recipe is not None:
        try:
            return make_config(dict(result.config), base=find_recipe(recipe).base)
        except InputError as fault:
            if not str(fault).startswith("RECIPE is"):
                raise
            raise InputError(str(fault).replace("RECIPE is", "--recipe is", 1)) from fault
    if result.name in builtin_recipes():
        builtin = find_recipe(result.name)
        if builtin.data.source == config.data.source:
            return make_config(dict(result.config), base=builtin.base)
    return config
