"""What a person sees in a terminal: progress bars on stderr, results on stdout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedhead.common.progress import Listener
from fedhead.common.results import NOISE_BAR, Result
from fedhead.simulations.show import refusal_text, refusals_of, show_delta, show_noise

SHOWN = 30  # lines of holders in a terminal; --json has all
_NAMES = {"accuracy": "accuracy", "auc_roc": "AUC-ROC", "loss": "loss"}


@contextmanager
def progress_bars() -> Iterator[Listener | None]:
    """Bars on stderr, one a stage; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = Progress(
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True, markup=False, emoji=False),
    )
    ids: dict[str, TaskID] = {}

    def listen(stage: str, done: int, total: int, note: str) -> None:
        if stage not in ids:
            ids[stage] = bars.add_task(stage, total=total, note="")
        bars.update(ids[stage], completed=done, total=total, note=note)

    with bars:
        yield listen


def show_result(result: Result, folder: Path) -> None:
    """Accuracy beside its comparisons, privacy, time, and where everything lies."""
    out = Console(highlight=False, markup=False, emoji=False)
    names = [name for name in result.final if name != "loss"]
    table = Table(title=f"{result.name}: test records", title_justify="left", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(_NAMES.get(name, name), justify="right")
    rows: list[tuple[str, Mapping[str, float] | None]] = [
        ("this head" if result.baseline is None or result.baseline == result.final else "private head", result.final),
        ("same head without privacy", result.baseline if result.baseline != result.final else None),
        ("majority class", result.majority),
    ]
    for label, metrics in rows:
        if metrics is not None:
            table.add_row(label, *(_number(metrics.get(name)) for name in names))
    out.print(table)
    _show_noised(out, result)
    out.print()
    _show_privacy(out, result)
    _show_time(out, result)
    for note in result.notes:
        out.print(f"note: {note}", style="dim", soft_wrap=True)
    out.print(f"\nresults in {folder}\nreport  at {folder / 'report.html'}", soft_wrap=True)


def _show_noised(out: Console, result: Result) -> None:
    """The last estimate from noised counts; nothing where there is none."""
    row = next((row for row in reversed(result.rounds) if row.get("noised") is not None), None)
    if row is None:
        return
    found = row["noised"]
    value, half = min(max(found["accuracy"], 0.0), 1.0), NOISE_BAR * found["standard_error"]
    out.print(
        f"noised counts: accuracy {_number(value)} ± {_number(half)} after round {row['round'] - 1}, from "
        f"{found['holders']} holder(s); an estimate on records kept apart, over a declared number of them",
        soft_wrap=True,
    )


def _show_privacy(out: Console, result: Result) -> None:
    kept = {holder["name"]: holder for holder in result.holders}
    known = ("records", "accuracy") if kept else ()  # of a deployment's holders nobody but they know them
    table = Table(title="what each holder spent in this run", title_justify="left", pad_edge=False)
    for name in ("holder", *known, "epsilon", "delta", "counted by"):
        table.add_column(name, justify="left" if name in ("holder", "counted by") else "right")

    def known_of(name: str) -> list[str]:
        holder = kept.get(name, {})
        return [str(holder.get("records", "")), _number(holder.get("metrics", {}).get("accuracy"))][: len(known)]

    entries = result.privacy[:10]
    for entry in entries:
        epsilon, delta = _epsilon(entry["epsilon"]), f"{entry['delta']:g}"
        table.add_row(entry["holder"], *known_of(entry["holder"]), epsilon, delta, entry["accountant"])
    if len(result.privacy) > len(entries):
        table.add_row(f"and {len(result.privacy) - len(entries)} more", *[""] * (3 + len(known)))
    spent = {entry["holder"] for entry in result.privacy}
    refusals = refusals_of(result.rounds)
    without = sorted({holder for one in refusals for holder in one["holders"]} - spent)
    for name in without[:10]:
        table.add_row(name, *known_of(name), "0.000", "", "no update")
    if len(without) > 10:
        table.add_row(f"and {len(without) - 10} more without an update", *[""] * (3 + len(known)))
    out.print(table)
    for one in refusals:
        out.print(f"no update: {refusal_text(one)}", soft_wrap=True)
    if result.privacy:
        entry = result.privacy[0]
        out.print(f"unit: {entry['unit']}; neighbours: {entry['adjacency']}; mechanism: {entry['mechanism']}\n")


def _show_time(out: Console, result: Result) -> None:
    timing = result.timing
    names = ("features", "training", "server", "total")
    shown = {} if result.holders else {"training": "rounds"}  # of a deployment: with transport
    parts = [
        f"{shown.get(name, name)} {timing[f'{name}_seconds']:.1f} s" for name in names if f"{name}_seconds" in timing
    ]
    out.print("time: " + ", ".join(parts))
    if "load_seconds" in timing:
        out.print(f"      (before that, imports and weights: {timing['load_seconds']:.1f} s)")
    up = sum(entry["bytes_up"] for entry in result.rounds)
    down = sum(entry["bytes_down"] for entry in result.rounds)
    out.print(f"sent: {_bytes(up)} up, {_bytes(down)} down, over {len(result.rounds)} rounds")


def show_seeds(summary: Mapping[str, Any]) -> None:
    """Mean and deviation over seeds."""
    out = Console(highlight=False, markup=False, emoji=False)
    table = Table(title=f"over {len(summary['seeds'])} seeds", title_justify="left", pad_edge=False)
    table.add_column("")
    for name in ("mean", "deviation", "least", "most"):
        table.add_column(name, justify="right")
    for name, metric in summary["metrics"].items():
        values = metric["values"]
        row = (metric["mean"], metric["deviation"], min(values), max(values))
        table.add_row(_NAMES.get(name, name), *(_number(value) for value in row))
    out.print(table)
    for one in summary["privacy"][:1]:
        least = min(summary["privacy"], key=lambda one: one["epsilon"])["epsilon"]
        most = max(summary["privacy"], key=lambda one: one["epsilon"])["epsilon"]
        between = _epsilon(most) if _epsilon(least) == _epsilon(most) else f"{_epsilon(least)} to {_epsilon(most)}"
        out.print(
            f"each run spent epsilon {between} at delta {show_delta(one['delta'])}, the most of any holder; the runs "
            "are on the same records, so that together they spend more",
            soft_wrap=True,
        )
    out.print(f"\nresults in {summary['folder']}\nreports in its folder of each seed", soft_wrap=True)


def show_plan(found: Mapping[str, Any]) -> None:
    """Noise, epsilon over rounds, and what the run would leave of the holders' budgets."""
    out = Console(highlight=False, markup=False, emoji=False)
    out.print(
        f"{found['mechanism']}, noise multiplier {show_noise(found['noise_multiplier'], 4)}"
        + (f", sample rate {found['sample_rate']:g}" if found["sample_rate"] else "")
        + f", {found['local_steps']} local step(s) a round"
    )
    if found["solved"] == "rounds":
        most = ", the most that a recipe can have" if found["rounds"] == 100_000 else ""
        out.print(f"{found['rounds']} rounds fit{most}")
    table = Table(pad_edge=False)
    table.add_column("rounds", justify="right")
    table.add_column(f"epsilon at delta {show_delta(found['delta'])}", justify="right")
    for row in found["table"]:
        table.add_row(str(row["rounds"]), _epsilon(row["epsilon"]))
    out.print(table)
    out.print(f"counted by {found['accountant']}; unit: {found['unit']}; neighbours: {found['adjacency']}")
    if found["counts"]:
        out.print(f"with {found['counts']} noised count(s) of correct answers")
    if found["unit"] == "holder":
        out.print("the server adds the noise and is trusted to do so; its own ledger counts")
    if "holders" not in found:
        out.print("every holder spends this, whatever the others do")
        return
    out.print()
    _show_budgets(out, found["holders"])


def _show_budgets(out: Console, entries: Sequence[Mapping[str, Any]]) -> None:
    """What each holder would spend, and its budget; one line for all holders of whom everything is the same."""
    budgeted = any(entry["budget"] is not None for entry in entries)
    table = Table(title="what each holder would spend (epsilon)", title_justify="left", pad_edge=False)
    table.add_column("holders", overflow="fold")
    table.add_column("rounds", justify="right")
    table.add_column("run", justify="right")
    for name in ("now", "then", "of", "left") if budgeted else ():
        table.add_column(name, justify="right")
    table.add_column("fits")
    for entry in entries[:SHOWN]:
        names, budget = entry["holders"], entry["budget"]
        label = names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"
        figures = [""] * (4 if budgeted else 0)
        if budget is not None:
            figures = [_epsilon(budget[name]) for name in ("spent_before", "spent_after", "epsilon")]
            figures.append(_rounded_down(budget["left_after"]))
        good = entry["refused"] is None and (budget is None or budget["admitted"])
        table.add_row(label, str(entry["rounds"]), _epsilon(entry["epsilon"]), *figures, "yes" if good else "no")
    if len(entries) > SHOWN:
        table.add_row(f"and {len(entries) - SHOWN} more lines")
    out.print(table)
    budgets = {(b["domain"], b["spent_delta"]) for entry in entries if (b := entry["budget"]) is not None}
    said = [f"domain {domain} at delta {show_delta(delta)}" for domain, delta in sorted(budgets)][:5]
    if said:
        out.print("; ".join(said))
        out.print("now, then: spent before and after; left: what one more run may cost")
    else:
        out.print("no holder's budget counts here: what is spent is written down, without a limit")
    for text in dict.fromkeys(filter(None, map(_why, entries))):
        out.print(text)


def _why(entry: Mapping[str, Any]) -> str:
    """What is to be said about an entry that is not admitted, or mixes units; empty where nothing is."""
    budget, said = entry["budget"], []
    if entry["refused"] is not None:
        return f"refused by the holders' limits: {entry['refused']}"
    if budget is not None and not budget["admitted"] and budget["limit"] != "unit":
        what = "the budget" if budget["limit"] == "budget" else "the limit of one run"
        said.append(f"{entry['holders'][0]}: {what} allows {budget['rounds_that_fit']} of its {entry['rounds']} rounds")
    if budget is not None and budget["other_units"]:
        begun = ", ".join(budget["other_units"])
        said.append(f"{entry['holders'][0]}: its budget was begun with the unit {begun}; one budget covers one unit")
    return "\n".join(said)


def _rounded_down(value: float) -> str:
    """What is left, never more than there is."""
    return f"{math.floor(value * 1000) / 1000:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _epsilon(value: float) -> str:
    """Rounded up: what is shown is never less than what was spent."""
    return "infinite" if math.isinf(value) else f"{math.ceil(round(value * 1000, 6)) / 1000:.3f}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
