"""An audit of ledgers on stdout: verdict, checks, epsilon of each domain and run, releases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhead.client.findings import delta_as, left_as, spent_as

SHOWN: Final = 50  # domains in a terminal; --json has all
RELEASES: Final = 20


def show_audit(found: Mapping[str, Any]) -> None:
    """What `audit_ledgers` found, in 80 columns."""
    out = Console(highlight=False, markup=False, emoji=False)
    for one in found["holders"]:
        if one["first_bad"] is not None:
            _show_bad(out, one)
    _show_checks(out, found)
    domains = [(one, domain) for one in found["holders"] for domain in one["domains"]]
    if domains:
        _show_figures(out, domains[:SHOWN])
        if len(domains) > SHOWN:
            out.print(f"and {len(domains) - SHOWN} more domains; --json has all of them")
        _show_releases(out, domains)
    _show_across(out, found["across"])
    for note in found["notes"]:
        out.print(Text(f"note: {note}"), style="dim")


def show_statement(found: Mapping[str, Any]) -> None:
    """What `read_statement` found, in 80 columns."""
    out = Console(highlight=False, markup=False, emoji=False)
    out.print(Text(f"{found['holder']} states, by its clock on {found['time'][:16].replace('T', ' ')} UTC", "bold"))
    out.print(Text(f"  relation: {found['relation']}; ledger up to row {found['sequence']:,}"))
    table = _table("epsilon")
    table.add_column("domain", overflow="fold", min_width=8)
    for name in ("unit", "GDP/PRV", "PLD", "ledger", "of", "delta", "sent", "unsent", "sent on"):
        table.add_column(name, justify="right", no_wrap=name not in ("unit", "sent on"))
    for one in found["domains"]:
        terms, times = one["terms"], [(one[name] or "")[:10] for name in ("first_time", "last_time")]
        table.add_row(
            Text(one["domain"]),
            " and ".join(one["unit"]),
            *(_figure(one[name]) for name in ("first", "second", "ledger")),
            "" if terms is None else f"{terms['epsilon']:g}",
            "" if one["first"] is None else delta_as(one["first"]["delta"]),
            str(one["released"]),
            str(one["reserved"] + one["abandoned"]),
            "\n".join(dict.fromkeys(times)),
        )
    out.print(table)
    out.print(f"signed with the key {found['public_key']}", soft_wrap=True)
    if not found["key_known"]:
        out.print("note: that is the key in the statement: compare it with the one you know the holder by", style="dim")


def _show_bad(out: Console, one: Mapping[str, Any]) -> None:
    bad = one["first_bad"]
    if bad["sequence"] is None:
        out.print(Text(bad["what"], "bold red"))
        return
    text = Text(f"{one['holder']}: first bad row {bad['sequence']}: it {bad['what']}", "bold red")
    out.print(text.append(f"\n  {one['ledger']}", "not bold dim"))


def _show_checks(out: Console, found: Mapping[str, Any]) -> None:
    verdict = "passed" if found["passed"] else "FAILED"
    table = _table(f"audit of ledgers: {verdict}")
    table.add_column("check", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("of", overflow="fold")
    table.add_column("what it means", overflow="fold")
    for check in found["checks"]:
        mark = Text("pass", "green") if check["passed"] else Text("FAIL", "bold red")
        table.add_row(Text(check["title"]), mark, Text(check["figure"]), Text(check["meaning"]))
    out.print(table)


def _show_figures(out: Console, domains: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    table = _table("epsilon")
    table.add_column("holder, domain, runs", overflow="fold", min_width=14)
    for name in ("GDP/PRV", "PLD", "ledger", "of", "left", "delta", "sent", "unsent"):
        table.add_column(name, justify="right", no_wrap=True)
    for holder, domain in domains:
        terms, left = domain["terms"], domain["left"]
        table.add_row(
            Text(f"{holder['holder']}, {domain['domain']}", "bold"),
            *_figures(domain["epsilon"]),
            "" if terms is None else f"{terms['epsilon']:g}",
            "" if left is None else left_as(left["epsilon"]),
            _delta(domain["epsilon"]),
            *_counts(domain["runs"]),
        )
        for run in domain["runs"]:
            name = run["run"] if len(run["run"]) <= 12 else f"{run['run'][:8]}…"
            cells = [*_figures(run["epsilon"]), "", "", _delta(run["epsilon"]), *_counts([run])]
            table.add_row(Text(f"  run {name}"), *cells)
    out.print(table)
    out.print("GDP or PRV, and PLD: independent accountants, of all events together, as one schedule", style="dim")
    out.print("ledger: as charged to the budget, each Poisson plan by itself, chosen when it may", style="dim")
    out.print("unsent: reserved and never released, spent all the same", style="dim")


def _show_releases(out: Console, domains: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    rows = [(holder, row) for holder, domain in domains for row in domain["releases"]]
    table = _table(f"{len(rows):,} events that were charged")
    table.add_column("holder", overflow="fold")
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("run", overflow="fold")
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("event", overflow="fold")
    table.add_column("state", no_wrap=True)
    for holder, row in rows[:RELEASES]:
        run = row["run"] if len(row["run"]) <= 8 else f"{row['run'][:7]}…"
        table.add_row(
            Text(holder["holder"]), str(row["sequence"]), Text(row["time"][:16].replace("T", " ")), Text(run),
            str(row["round"]), Text(_event(row["event"])), row["state"],
        )  # fmt: skip
    out.print(table)
    if len(rows) > RELEASES:
        out.print(f"and {len(rows) - RELEASES:,} more; --json has all of them")


def _show_across(out: Console, across: Mapping[str, Any]) -> None:
    disjoint, same = across["disjoint"], across["same-people"]
    if disjoint is not None:
        text = f"{spent_as(float(disjoint['epsilon']))} at {delta_as(disjoint['delta'])}"
        out.print(Text(f"over all holders, if nobody is at two: {text} (the maximum)"))
    if same is not None:
        text = f"{spent_as(float(same['epsilon']))} at {delta_as(same['delta'])}"
        out.print(Text(f"for somebody who is at all of them: {text} (composed by {same['accountant']})"))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _event(event: Mapping[str, Any]) -> str:
    parts = [event["mechanism"]]
    if event["steps"] > 1:
        parts.append(f"{event['steps']} x")
    if "noise_multiplier" in event:
        parts.append(f"noise {event['noise_multiplier']:.4g}")
    if "sample_rate" in event:
        parts.append(f"rate {event['sample_rate']:.3g}")
    return " ".join(parts)


def _figures(figures: Mapping[str, Any] | None) -> Iterator[str]:
    for name in ("first", "second", "ledger"):
        yield _figure(None if figures is None else figures[name])


def _figure(one: Mapping[str, Any] | None) -> str:
    return "none" if one is None else spent_as(float(one["epsilon"]))


def _delta(figures: Mapping[str, Any] | None) -> str:
    return "" if figures is None else delta_as(figures["first"]["delta"])


def _counts(runs: list[Mapping[str, Any]]) -> list[str]:
    sent = sum(run["released"] for run in runs)
    return [str(sent), str(sum(run["reserved"] + run["abandoned"] for run in runs))]
