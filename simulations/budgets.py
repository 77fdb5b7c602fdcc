"""`fedhead budget`: what was spent and what is left, read from ledgers, for each holder, domain and run.

Ledgers are opened for reading only, and every chain is checked before it is believed. Spent figures are rounded up and
what is left is rounded down. Without a budget there is no delta to state epsilon at: then it is 1e-5, or the one that
is asked for, and each Poisson plan's own delta comes on top.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedhead.client.findings import delta_as, delta_left_as, left_as, spent_as
from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import Spent
from fedhead.common.privacy.filters import Totals, spent
from fedhead.common.privacy.ledger import DomainSummary, Ledger, Mark, RunSummary, load_key, statement
from fedhead.common.writing import write_aside
from fedhead.simulations.ledger_files import KEY, ledger_files, newest

DELTA: Final = 1e-5
_LEGEND: Final = (
    "spent, of, left: epsilon; left: what one more run may cost, not the difference",
    "Poisson: what is left for Poisson plans",
    "unsent: reserved and never released, spent all the same",
)
_FORKED: Final = "a copy of this ledger went on by itself: what both spent adds up; run fedhead audit ledger"
SHOWN: Final = 50  # domains in a terminal; --json has all


def read_budgets(paths: Sequence[Path], delta: float | None = None) -> dict[str, Any]:
    """What the ledgers say.

    Parameters
    ----------
    paths : sequence of Path
        Ledgers, or folders: then every ledger below them. A chain that another one contains is left out.
    delta : float, in (0, 1), optional
        At which to state what was spent; default: each budget's own.

    Returns
    -------
    dict
        `domains`: one entry for each holder and domain, as `--json` prints them.

    Raises
    ------
    InputError
        Nothing is there, or delta is out of range.
    LedgerError
        A ledger can't be read, or a chain is broken.
    """
    if delta is not None and not 0 < delta < 1:
        raise InputError(f"--delta is {delta}: it must lie between 0 and 1. Give one such as 1e-5.")
    files = ledger_files(paths)
    with _Reader() as reader:
        chains: dict[str, list[tuple[Mark, Path]]] = {}
        for file in files:
            ledger = reader.open(file)
            for holder in ledger.holders():
                chains.setdefault(holder, []).append((ledger.mark(holder), file))

        def has(holder: str) -> Callable[[Path, Mark], bool]:
            return lambda file, mark: reader.open(file).has(holder, mark)

        kept = [(holder, file) for holder in sorted(chains) for file in newest(chains[holder], has(holder))]
        firsts = {} if len(kept) == len(chains) else {one: reader.first(*one) for one in kept}
        seen = Counter((holder, first) for (holder, _), first in firsts.items())
        forked = {one for one, first in firsts.items() if seen[one[0], first] > 1}
        return {
            "domains": [
                _row(file, one, delta, (holder, file) in forked)
                for holder, file in kept
                for one in reader.open(file).summary(holder)
            ]
        }


def sign_statements(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a signed statement of where each holder's ledger stands, for others to keep.

    Parameters
    ----------
    found : mapping
        From `read_budgets`.
    folder : Path
        Gets `HOLDER.statement.json`. The key lies beside each ledger, in `ledger.key`, and is made where there is none.

    Returns
    -------
    list of Path

    Raises
    ------
    LedgerError
        A key can't be read or made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for holder, file in dict.fromkeys((row["holder"], row["ledger"]) for row in found["domains"]):
        key = load_key(Path(file).with_name(KEY))
        with Ledger(Path(file), create=False, read_only=True) as ledger:
            text = statement(ledger, holder, key)
        path = folder / f"{holder}.statement.json"
        write_aside(path, (text + "\n").encode())
        written.append(path)
    return written


def show_budgets(found: Mapping[str, Any]) -> None:
    """The same on stdout, as a table with a line for each domain and for each of its runs."""
    out = Console(highlight=False, markup=False, emoji=False)
    rows = found["domains"]
    if not rows:
        out.print("nothing was ever spent or declared here")
        return
    poisson = any(row["left"] and row["terms"]["poisson_share"] for row in rows)
    files = len({row["ledger"] for row in rows}) > 1
    table = Table(title="privacy budgets", title_justify="left", pad_edge=False)
    table.add_column("holder, domain, runs", overflow="fold", min_width=14)
    for name in ("spent", "of", "left", *(["Poisson"] if poisson else []), "delta", "by", "sent", "unsent"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:SHOWN]:
        table.add_row(*_domain_cells(row, poisson, files))
        for run in row["runs"]:
            table.add_row(*_run_cells(run, row["terms"], poisson))
    if Measurement.get(out, out.options.update(width=1000), table).minimum <= out.width:
        out.print(table)
    else:  # figures would be cut off
        _show_lines(out, rows[:SHOWN])
    if len(rows) > SHOWN:
        out.print(f"and {len(rows) - SHOWN} more; --json has all of them")
    for line in _LEGEND:
        if poisson or not line.startswith("Poisson"):
            out.print(line, style="dim")
    for note in dict.fromkeys(note for row in rows[:SHOWN] for note in row["notes"]):
        out.print(Text(f"note: {note}"), style="dim")


class _Reader:
    """Ledgers, one open at a time: a folder may hold thousands."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def open(self, file: Path) -> Ledger:
        if self._ledger is None or self._ledger.path != file:
            self.__exit__()
            self._ledger = None
            self._ledger = Ledger(file, create=False, read_only=True)
        return self._ledger

    def first(self, holder: str, file: Path) -> str:
        """The hash of the first row of a holder's chain: copies share it, whatever became of them."""
        return next(self.open(file).entries(holder)).hash


def _row(file: Path, one: DomainSummary, delta: float | None, forked: bool) -> dict[str, Any]:
    return {
        "ledger": str(file),
        "holder": one.holder,
        "domain": one.domain,
        "terms": None if one.terms is None else asdict(one.terms),
        "disjoint_from": list(one.disjoint_from),
        "counted_with": list(one.overlapping),
        "units": list(one.units),
        "noise": list(one.noise),
        "spent": None if len(one.units) > 1 else _figures(one, one.totals, delta),
        "left": None if one.left is None else asdict(one.left),
        "released": sum(run.released for run in one.runs),
        "reserved": sum(run.reserved for run in one.runs),
        "abandoned": sum(run.abandoned for run in one.runs),
        "runs": [_run(run, one, delta) for run in one.runs],
        "notes": [*([_FORKED] if forked else []), *_notes(one)],
    }


def _run(run: RunSummary, one: DomainSummary, delta: float | None) -> dict[str, Any]:
    return {
        "run": run.run,
        "rounds": run.rounds,
        "spent": _figures(one, run.totals, delta),
        "released": run.released,
        "reserved": run.reserved,
        "abandoned": run.abandoned,
    }


def _figures(one: DomainSummary, totals: Totals, delta: float | None) -> dict[str, Any]:
    """What was spent, as JSON can carry it: infinity is the text "inf"."""
    if delta is None and one.terms is None:
        delta = min(DELTA + totals.delta, 0.5)
    cost = spent(one.terms, totals, delta)
    if one.given_away:
        cost = Spent(math.inf, cost.delta, "none")
    epsilon: float | str = "inf" if math.isinf(cost.epsilon) else cost.epsilon
    return {"epsilon": epsilon, "delta": cost.delta, "accountant": cost.accountant}


def _notes(one: DomainSummary) -> Iterator[str]:
    if len(one.units) > 1:
        yield f"{one.holder}, {one.domain}: the units {' and '.join(one.units)} have no epsilon in common"
    if one.overlapping:
        yield f"{one.holder}, {one.domain}: counted together with {', '.join(one.overlapping)}, as not disjoint"
    if one.seeded:
        yield "simulated noise comes from a seed: for whoever knows the seed, epsilon is infinite"
    if one.given_away:
        yield f"{one.holder}, {one.domain}: a release took its noise from a seed that arrived: epsilon is infinite"
    if one.terms is None:
        yield f"{one.holder}, {one.domain}: there is no budget, everything is admitted"


def _show_lines(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same where a table has no room."""
    for row in rows:
        out.print(Text(f"{row['holder']}, {row['domain']}", "bold"))
        terms, left = row["terms"], row["left"]
        if terms is not None and left is not None:
            poisson = f", Poisson {_poisson(left)}" if terms["poisson_share"] else ""
            out.print(f"  of {terms['epsilon']:g}, left {left_as(left['epsilon'])}{poisson}")
        for name, one, indent in (
            ("", row, "  "),
            *((f"run {_short(run['run'])}", run, "    ") for run in row["runs"]),
        ):
            delta, accountant, released, unsent = _counts(one)
            if name:
                out.print(Text(f"  {name}"))
            out.print(f"{indent}spent {_epsilon(one['spent'])}" + (f" at {delta} ({accountant})" if delta else ""))
            out.print(f"{indent}sent {released}, unsent {unsent}")


def _domain_cells(row: Mapping[str, Any], poisson: bool, files: bool) -> list[Text | str]:
    name = Text(f"{row['holder']}, {row['domain']}", "bold")
    if files:
        name.append(f"\n{row['ledger']}", "not bold dim")
    terms, left = row["terms"], row["left"]
    return [
        name,
        _epsilon(row["spent"]),
        "" if terms is None else f"{terms['epsilon']:g}",
        "" if left is None else left_as(left["epsilon"]),
        *(["" if left is None else _poisson(left).replace(" at", "\nat")] if poisson else []),
        *_counts(row),
    ]


def _poisson(left: Mapping[str, float]) -> str:
    """What is left for Poisson plans; their deltas add up, too."""
    return f"{left_as(left['poisson_epsilon'])} at {delta_left_as(left['poisson_delta'])}"


def _run_cells(run: Mapping[str, Any], terms: Mapping[str, Any] | None, poisson: bool) -> list[Text | str]:
    most = None if terms is None else terms["run_epsilon"]
    return [
        Text(f"  run {_short(run['run'])}"),
        _epsilon(run["spent"]),
        "" if most is None else f"{most:g}",
        *([""] * (2 if poisson else 1)),
        *_counts(run),
    ]


def _short(run: str) -> str:
    """A run's name as it is shown; the JSON has all of it."""
    return run if len(run) <= 12 else f"{run[:8]}…"


def _epsilon(figures: Mapping[str, Any] | None) -> str:
    return "none" if figures is None else spent_as(float(figures["epsilon"]))


def _counts(row: Mapping[str, Any]) -> list[str]:
    figures = row["spent"]
    shown = ["", ""] if figures is None else [delta_as(figures["delta"]), figures["accountant"]]
    return [*shown, str(row["released"]), str(row["reserved"] + row["abandoned"])]
