"""The mechanism audit in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhead.simulations.show import show_delta, show_epsilon


def show_mechanism(found: Mapping[str, Any]) -> None:
    """Claim, lower bounds, every check, and the verdict, on stdout."""
    out = Console(highlight=False, markup=False, emoji=False)
    claim = found["claim"]
    out.print(
        Text(
            f"{found['recipe']}: {found['mechanism']}, {found['head']} head, {found['features']} features, "
            f"{found['outputs']} outputs, unit {found['unit']}, {found['steps']} steps, {found['canaries']} canaries"
        )
    )
    out.print(
        f"claimed     epsilon {show_epsilon(claim['epsilon'])} at delta {show_delta(claim['delta'])} "
        f"({claim['accountant']})"
    )
    for bound in found["bounds"]:
        out.print(Text(f"at least    epsilon {bound['epsilon']:.2f} by {bound['title']} ({bound['confidence']:.0%})"))
    table = Table(title="checks", title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("found", overflow="fold")
    table.add_column("p", justify="right", no_wrap=True)
    for check in found["checks"]:
        mark = Text("pass", "green") if check["passed"] else Text("FAIL", "bold red")
        p = "" if check["p_value"] is None else f"{check['p_value']:.2g}"
        table.add_row(mark, Text(check["title"]), Text(check["figure"]), p)
    out.print(table)
    for check in found["checks"]:
        if not check["passed"]:
            out.print(Text(f"FAIL {check['title']}: {check['meaning']}", "red"))
    for note in found["notes"]:
        out.print(Text(f"note: {note}"), style="dim")
    verdict = "nothing was found against the promise" if found["passed"] else "the promise is broken"
    out.print(
        Text(f"{verdict} (false alarms: {found['false_alarms']:.0%} of audits at most)", "bold"),
    )
