"""`fedhead check`: whether a data holder is ready, without joining anything. For the holder's own eyes.

Every line is a finding with one of four states:

    ok        as it should be
    warning   the holder should know it; nothing has to change
    remedy    something must be changed before taking part; the line says what
    unknown   not looked at, and why

Numbers of records, persons and labels appear here and nowhere else: they are for the holder's terminal, never for a
server. What is written: the storage folder where it is missing, and what this domain has held (domains.py). The
ledger is only read. What concerns the storage folder is in standing.py, the coordinator in connection.py, code, tasks
and a port that the file names in naming.py, features and the cost of a recipe in foresight.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhead.client.connection import connection
from fedhead.client.findings import NO_RECORDS, Finding, State, apart, count
from fedhead.client.foresight import foresight
from fedhead.client.holder import HolderFile, load_holder
from fedhead.client.naming import named_code, named_tasks, port
from fedhead.client.own_records import counted
from fedhead.client.standing import disjoint, ledger, storage
from fedhead.common.config import RunConfig
from fedhead.common.data.persons import names_of
from fedhead.common.data.records import Records
from fedhead.common.data.sources import load_records
from fedhead.common.errors import DataError

_MARKS: Final[Mapping[State, tuple[str, str, str]]] = {  # as shown, where only ASCII can be shown, style
    "ok": ("✓", "ok", "green"),
    "warning": ("!", "!", "yellow"),
    "remedy": ("✗", "X", "bold red"),
    "unknown": ("–", "-", "dim"),
}


@dataclass(frozen=True)
class Report:
    """All findings about one holder file."""

    holder: str
    domain: str
    findings: tuple[Finding, ...]

    @property
    def good(self) -> bool:
        """Whether nothing has to be changed; warnings are allowed."""
        return all(finding.state != "remedy" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can carry it."""
        return {
            "holder": self.holder,
            "domain": self.domain,
            "good": self.good,
            "findings": [vars(finding) for finding in self.findings],
        }


def check_holder(
    path: str | Path, *, connect: bool = True, recipe: RunConfig | None = None, joining: bool = False
) -> Report:
    """Look at everything that a data holder needs.

    Parameters
    ----------
    path : path
        A holder.toml.
    connect : bool
        False: the network is not touched.
    recipe : RunConfig, optional
        A recipe that the coordinator has told: also whether the holder would take part in it, what it would cost, and
        how long its features take. Loads its backbone.
    joining : bool
        Whether the holder joins if all is well: settings that only joining needs must then be there, and a server that
        can't be reached at the moment is a warning, because joining goes on trying.

    Raises
    ------
    ConfigError
        The file itself has faults; every other fault is a finding.

    Notes
    -----
    Guarantee: what is sent is one request with a signature over the time, and only where server, ca and key are given.
    """
    holder = load_holder(path)
    records = _read(holder)
    findings = [
        Finding("holder file", "ok", f"{holder.name}, domain {holder.budget.domain}"),
        *connection(holder, connect=connect, joining=joining),
        *_data(holder, records), *_labels(holder, joining), *_people(holder, records), *_limits(holder, records),
        *named_code(holder, joining=joining), *named_tasks(holder, joining=joining), *port(holder, joining=joining),
        *storage(holder), *ledger(holder),
        *foresight(holder, records, recipe), *disjoint(holder, records),
    ]  # fmt: skip
    return Report(holder.name, holder.budget.domain, tuple(findings))


def show_report(report: Report) -> None:
    """The report on stdout, as a table."""
    out = Console(highlight=False, markup=False, emoji=False)
    plain = out.options.ascii_only
    table = Table(title=f"{report.holder}: ready to take part?", title_justify="left", pad_edge=False)
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in report.findings:
        mark, simple, style = _MARKS[finding.state]
        found = Text(finding.text)
        if finding.remedy:
            found.append(f"\n{'->' if plain else '→'} {finding.remedy}", style)
        table.add_row(Text(simple if plain else mark, style), Text(finding.name), found)
    out.print(table)
    wrong = sum(finding.state == "remedy" for finding in report.findings)
    out.print("ready" if report.good else f"not ready: {count(wrong, 'thing')} to change")


def _read(holder: HolderFile) -> Records | DataError:
    """The records, or why there are none."""
    data = holder.data
    try:
        return load_records(data.source, data.columns, data.labels, holder.base)
    except DataError as error:
        # The reader speaks of recipes; here the same settings stand in the holder's own file.
        text = str(error).replace("task.labels", "data.labels").replace("the recipe's folder", "this file's folder")
        return DataError(text)


def _data(holder: HolderFile, records: Records | DataError) -> Iterator[Finding]:
    data = holder.data
    if isinstance(records, DataError):
        yield Finding("data", "remedy", *apart(records))
        return
    column = data.columns.get("label", "label")
    if column not in records.columns:
        yield Finding(
            "data", "remedy", f'data.columns.label is "{column}": the data has no such column.',
            f"Use one of: {', '.join(list(records.columns)[:12])}.",
        )  # fmt: skip
        return
    if data.labels is None:
        labels = f"{len(set(map(str, records.column(column).tolist())))} different labels"
    else:
        labels = f"{len(set(records.labels.tolist()))} of {len(data.labels)} labels occur"
    yield Finding("data", "ok", f"{count(len(records), 'record')} ({records.kind}), {labels}")


def _labels(holder: HolderFile, joining: bool) -> Iterator[Finding]:
    """Without labels of its own a holder refuses every recipe that arrives: `own_recipe` in deployed.py."""
    if holder.data.labels is None:
        state: State = "remedy" if joining or holder.server is not None else "warning"
        text = "data.labels is not given: a holder that has joined trains only for recipes with just these labels."
        yield Finding("labels", state, text, "List in data.labels those that you agree to.")


def _people(holder: HolderFile, records: Records | DataError) -> Iterator[Finding]:
    person, units = holder.data.person, holder.limits.units
    if person is None:
        if "person" in units:
            text = "data.person is not given: requests for the unit person can't be met"
            yield Finding("persons", "unknown", text)
        return
    if isinstance(records, DataError):
        yield Finding("persons", "unknown", NO_RECORDS)
        return
    try:
        counts = Counter(names_of(records, person, "data.person").tolist())
    except DataError as error:
        yield Finding("persons", "remedy", *apart(error))
        return
    most = max(counts.values())
    yield Finding("persons", "ok", f"{count(len(counts), 'person')}, at most {count(most, 'record')} each")
    if "record" in units and most > 1:
        yield Finding(
            "unit", "warning",
            "the unit record is accepted, and figures for records do not protect people with several: a person has up "
            f"to {count(most, 'record')} here",
            'Set limits.units = ["person"] to accept only requests that protect people.',
        )  # fmt: skip


def _limits(holder: HolderFile, records: Records | DataError) -> Iterator[Finding]:
    limits = holder.limits
    least = limits.least_records
    if isinstance(records, DataError):
        yield Finding("least records", "unknown", NO_RECORDS)
    elif len(records) < least:
        yield Finding(
            "least records", "remedy", f"there are {len(records)} records, and limits.least_records is {least}",
            "Take part with more records, or lower it.",
        )  # fmt: skip
    else:
        yield Finding("least records", "ok", f"{count(len(records), 'record')}, at least {least:,} wanted")
        yield from _most(holder, records)
    yield Finding("requests", "ok", _accepted(holder))
    unproved = [head for head in limits.heads if head != "linear"]
    if unproved:
        yield Finding(
            "heads", "warning",
            f"limits.heads has {', '.join(unproved)}: what one unit changes is proved, rounding included, for linear "
            "heads only",
            'Set limits.heads = ["linear"] unless you trust the server that far.',
        )  # fmt: skip
    if "holder" in limits.units:
        yield Finding(
            "unit", "warning", "the unit holder is accepted: the server is then trusted to add the noise",
            'Remove "holder" from limits.units unless you trust it.',
        )  # fmt: skip
    if limits.allow_seeded_noise:
        yield Finding(
            "noise", "warning", "limits.allow_seeded_noise is true: whoever sends the seed can take the noise off",
            "Set it to false outside of tests.",
        )  # fmt: skip


def _most(holder: HolderFile, records: Records) -> Iterator[Finding]:
    """Whether there are more records than rounding is covered for, by each unit that a request may be for."""
    limits, person = holder.limits, holder.data.person
    if limits.allow_seeded_noise:  # then nothing is rounded to a lattice
        return
    has, most = f"there are {len(records)} records", f"and limits.most_records is {limits.most_records}"
    if len(records) > limits.most_records:
        yield Finding("most records", "remedy", f"{has}, {most}", "Raise it, up to 1048576, or take part with fewer.")
        return
    if person is None or "person" not in limits.units:
        return
    with suppress(DataError):  # told with the persons
        many = counted(records, person)
        if many > limits.most_records:
            yield Finding(
                "most records", "warning" if "record" in limits.units else "remedy",
                f"{has}, which count as {many} where persons are the unit, {most}",
                "Raise it, up to 1048576, or take part with fewer.",
            )  # fmt: skip


def _accepted(holder: HolderFile) -> str:
    """What a request may ask for, in words."""
    limits, run = holder.limits, holder.budget.per_run
    backbones, release = limits.backbones, limits.release
    norm, noise = limits.clipping_norm_max, limits.noise_multiplier_min
    return "; ".join(
        [
            f"unit {' or '.join(limits.units)}",
            f"head {' or '.join(limits.heads)}",
            "any task" if limits.tasks is None else f"task {' or '.join(limits.tasks)}",
            "any backbone" if backbones is None else f"one of {count(len(backbones), 'backbone')}",
            "any clipping norm" if norm is None else f"clipping norm at most {norm:g}",
            "any noise that the budget pays for" if noise is None else f"noise multiplier at least {noise:g}",
            "no limit for one run" if run is None else f"a run at most epsilon {run.epsilon:g}",
            "noised counts may leave" if release.metrics else "no metrics leave",
            f"code: {', '.join(limits.modules)}" if limits.modules else "no code of its own",
        ]
    )
