"""What a person sees in a terminal: progress bars on stderr, results on stdout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedhead.common.progress import Listener
from fedhead.common.results import Result

_NAMES = {"accuracy": "accuracy", "auc_roc": "AUC-ROC", "loss": "loss"}


@contextmanager
def progress_bars() -> Iterator[Listener | None]:
    """Bars on stderr, one a stage; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
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
    out = Console(highlight=False)
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
    out.print()
    _show_privacy(out, result)
    _show_time(out, result)
    for note in result.notes:
        out.print(f"note: {note}", style="dim", soft_wrap=True)
    out.print(f"\nresults in {folder}\nreport  at {folder / 'report.html'}", soft_wrap=True)


def _show_privacy(out: Console, result: Result) -> None:
    kept = {holder["name"]: holder for holder in result.holders}
    table = Table(title="what each holder spent", title_justify="left", pad_edge=False)
    for name in ("holder", "records", "accuracy", "epsilon", "delta", "counted by"):
        table.add_column(name, justify="left" if name in ("holder", "counted by") else "right")
    entries = result.privacy[:10]
    for entry in entries:
        holder = kept.get(entry["holder"], {})
        table.add_row(
            entry["holder"],
            str(holder.get("records", "")),
            _number(holder.get("metrics", {}).get("accuracy")),
            _epsilon(entry["epsilon"]),
            f"{entry['delta']:g}",
            entry["accountant"],
        )
    if len(result.privacy) > len(entries):
        table.add_row(f"and {len(result.privacy) - len(entries)} more", "", "", "", "", "")
    out.print(table)
    if result.privacy:
        entry = result.privacy[0]
        out.print(f"unit: {entry['unit']}; neighbours: {entry['adjacency']}; mechanism: {entry['mechanism']}\n")


def _show_time(out: Console, result: Result) -> None:
    timing = result.timing
    names = ("features", "training", "server", "total")
    parts = [f"{name} {timing[f'{name}_seconds']:.1f} s" for name in names if f"{name}_seconds" in timing]
    out.print("time: " + ", ".join(parts))
    if "load_seconds" in timing:
        out.print(f"      (before that, imports and weights: {timing['load_seconds']:.1f} s)")
    up = sum(entry["bytes_up"] for entry in result.rounds)
    down = sum(entry["bytes_down"] for entry in result.rounds)
    out.print(f"sent: {_bytes(up)} up, {_bytes(down)} down, over {len(result.rounds)} rounds")


def show_seeds(summary: Mapping[str, Any]) -> None:
    """Mean and deviation over seeds."""
    out = Console(highlight=False)
    table = Table(title=f"over {len(summary['seeds'])} seeds", title_justify="left", pad_edge=False)
    table.add_column("")
    for name in ("mean", "deviation", "least", "most"):
        table.add_column(name, justify="right")
    for name, metric in summary["metrics"].items():
        values = metric["values"]
        row = (metric["mean"], metric["deviation"], min(values), max(values))
        table.add_row(_NAMES.get(name, name), *(_number(value) for value in row))
    out.print(table)
    out.print(f"\nresults in {summary['folder']}", soft_wrap=True)


def show_plan(found: Mapping[str, Any]) -> None:
    """Noise and epsilon over rounds."""
    out = Console(highlight=False)
    out.print(
        f"{found['mechanism']}, noise multiplier {found['noise_multiplier']:.4g}"
        + (f", sample rate {found['sample_rate']:g}" if found["sample_rate"] else "")
        + f", {found['local_steps']} local step(s) a round"
    )
    table = Table(pad_edge=False)
    table.add_column("rounds", justify="right")
    table.add_column(f"epsilon at delta {found['delta']:g}", justify="right")
    for row in found["table"]:
        table.add_row(str(row["rounds"]), _epsilon(row["epsilon"]))
    out.print(table)
    out.print(f"counted by {found['accountant']}; every holder spends this, whatever the others do")


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
