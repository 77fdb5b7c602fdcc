"""The report of a run: result.json as one HTML page that needs nothing else.

No script, no font, no picture from elsewhere; all text of the recipe is escaped. What the page says about privacy is
what result.json holds: epsilon is composed over all rounds, rounded up, and never shown without delta.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedhead.common.results import Result
from fedhead.common.writing import write_aside
from fedhead.simulations import plots
from fedhead.simulations.charts import MOST_ROWS, charts_of, pictures_of
from fedhead.simulations.show import (
    metric_name,
    refusal_text,
    refusals_of,
    show_bytes,
    show_count,
    show_delta,
    show_epsilon,
    show_metric,
    show_noise,
    show_number,
    show_seconds,
    show_setting,
)

FILE: Final = "report.html"
FALSE_ALARMS: Final = 0.01

ACCOUNTANTS: Final[Mapping[str, str]] = {
    "gdp": "exact Gaussian differential privacy",
    "prv": "privacy random variables (Opacus), upper bound",
    "pld": "privacy loss distributions (dp-accounting), upper bound",
    "none": "none: without noise there is nothing to count",
}
MECHANISMS: Final[Mapping[str, str]] = {
    "full-batch": "full-batch DP gradient descent",
    "poisson": "Poisson-sampled DP-SGD",
    "none": "gradient descent without privacy",
}


def write_report(run_dir: str | Path) -> Path:
    """Make report.html from a run's result.json.

    Parameters
    ----------
    run_dir : path
        The folder of a run.

    Returns
    -------
    Path
        The page, in the same folder.

    Raises
    ------
    InputError
        When result.json is missing or broken. One line.
    """
    result = Result.read(run_dir)
    path = Path(run_dir) / FILE
    write_aside(path, render(result).encode())
    return path


def render(result: Result) -> str:
    """The page as text; the same result gives the same text."""
    return environment().get_template(FILE).render(**context_of(result))


def environment() -> Environment:
    """What pages are made with: all text escaped, a name that is missing refused, numbers shown as in show.py.

    Every page extends base.html, which holds the style and the policy that nothing is loaded.
    """
    found = Environment(
        loader=PackageLoader("fedhead.simulations", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        metric=show_metric, epsilon=show_epsilon, count=show_count, size=show_bytes, seconds=show_seconds,
        delta=show_delta, metric_name=metric_name, value=show_setting, number=show_number, noise=show_noise,
        refusal=refusal_text,
    )  # fmt: skip
    return found


def context_of(result: Result) -> dict[str, Any]:
    """All that the template shows, computed from the result alone."""
    labels = _labels(result)
    rows = holder_rows(result, labels)
    private = any(spend["mechanism"] != "none" for spend in result.privacy) or not result.privacy
    largest = max((spend["epsilon"] for spend in result.privacy), default=None)
    delta = max((spend["delta"] for spend in result.privacy), default=None)
    planned = _setting(result, "privacy", "epsilon")
    return {
        "r": result,
        "labels": labels,
        "rows": rows,
        "many": len(rows) > MOST_ROWS,
        "simulated": bool(result.holders),
        "private": private and largest != math.inf,
        "epsilon": largest,
        "delta": delta,
        "planned": planned,
        "power": ceiling(largest, delta),
        "tiles": [
            _tile(result, name) for name in ("accuracy", "auc_roc") if name in result.final
        ] or [_tile(result, name) for name in list(result.final)[:2]],
        "metric_names": [name for name in result.final if any(name in row["metrics"] for row in rows)],
        "metrics_on": sorted({holder["metrics_on"] for holder in result.holders if "metrics_on" in holder}),
        "charts": charts_of(result, planned),
        "pictures": pictures_of(rows, labels),
        "steps": _steps(result),
        "spends": _distinct(result.privacy, ("unit", "adjacency", "mechanism", "accountant", "delta")),
        "accountants": ACCOUNTANTS,
        "mechanism": MECHANISMS.get(
            str(_setting(result, "privacy", "mechanism")), str(_setting(result, "privacy", "mechanism"))
        ),
        "time": _time(result),
        "bytes_up": sum(row["bytes_up"] for row in result.rounds),
        "bytes_down": sum(row["bytes_down"] for row in result.rounds),
        "replies": sum(row["holders"] for row in result.rounds),
        "cohort": _span([row["holders"] for row in result.rounds]),
        "refusals": refusals_of(result.rounds),
        "settings": [
            (section, list(_flat(values))) if isinstance(values, Mapping) else ("", [(section, values)])
            for section, values in result.config.items()
        ],
    }  # fmt: skip


def holder_rows(result: Result, labels: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each data holder that is known: simulated ones with their records, others by their answers."""
    spends: dict[str, list[Mapping[str, Any]]] = {}
    for spend in result.privacy:
        spends.setdefault(spend["holder"], []).append(spend)
    refused = Counter(refusal["holder"] for row in result.rounds for refusal in row["refused"])
    known = {holder["name"]: holder for holder in result.holders}
    rows = []
    for name in dict.fromkeys([*known, *spends, *sorted(refused)]):
        holder = known.get(name)
        counts = [holder["labels"].get(label, 0) for label in labels] if holder else []
        total = sum(counts)
        rows.append(
            {
                "name": name,
                "value": holder.get("value") if holder else None,
                "records": holder["records"] if holder else None,
                "persons": holder.get("persons") if holder else None,
                "counts": counts,
                "mix": _mix(labels, counts) if total else [],
                "metrics": holder["metrics"] if holder else {},
                "spends": spends.get(name, []),
                "refused": refused[name],
            }
        )
    return rows


def _labels(result: Result) -> list[str]:
    """The task's labels in order, then any that only the holders have."""
    declared = _setting(result, "task", "labels") or []
    return list(dict.fromkeys([*declared, *(label for holder in result.holders for label in holder["labels"])]))


def _mix(labels: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Shares for a small bar: the first labels in a colour each, all others together."""
    total = sum(counts)
    most = len(labels) if len(labels) <= plots.LABEL_COLOURS else plots.LABEL_COLOURS - 1
    parts = [
        {"label": label, "count": count, "share": count / total, "colour": f"label-{number}"}
        for number, (label, count) in enumerate(zip(labels[:most], counts[:most], strict=True))
    ]
    rest = sum(counts[most:])
    if rest:
        parts.append({"label": "others", "count": rest, "share": rest / total, "colour": "label-7"})
    return [part for part in parts if part["count"]]


def _tile(result: Result, name: str) -> dict[str, Any]:
    """A metric beside what it must be compared with."""
    versus = [("this run", result.final, "accent"), ("without privacy", result.baseline, "plain")]
    if _setting(result, "privacy", "mechanism") == "none":
        versus = versus[:1]
    versus.append(("most frequent label", result.majority, "floor"))
    return {
        "name": name,
        "value": result.final[name],
        "bars": [
            {"what": what, "value": metrics[name], "colour": colour, "width": min(max(metrics[name], 0.0), 1.0)}
            for what, metrics, colour in versus
            if metrics is not None and name in metrics and math.isfinite(metrics[name])
        ],
    }


def _steps(result: Result) -> list[dict[str, Any]]:
    """Mechanism events of the same kind added up: steps a holder, and how many holders took so many."""
    kinds: Counter[tuple[Any, ...]] = Counter()
    for spend in result.privacy:
        mine: Counter[tuple[Any, ...]] = Counter()
        for event in spend["events"]:
            what = ("mechanism", "noise_multiplier", "sample_rate", "clipping_norm")
            mine[tuple(event.get(key) for key in what)] += event["steps"]
        kinds.update((*kind, steps) for kind, steps in mine.items())
    keys = ("mechanism", "noise_multiplier", "sample_rate", "clipping_norm", "steps", "holders")
    return [dict(zip(keys, (*kind, holders), strict=True)) for kind, holders in kinds.most_common()]


def _time(result: Result) -> dict[str, Any]:
    """The time of a run in parts; what the parts leave of the total is named as such."""
    timing = result.timing
    # A deployment's server sees how long an exchange takes, and not what of it is training.
    training, server = (
        ("training at the holders", "server, transport and evaluation")
        if result.holders
        else ("rounds: transport, and training at the holders", "server and evaluation")
    )
    names = (
        ("features_seconds", "features", "label-0"),
        ("training_seconds", training, "label-1"),
        ("server_seconds", server, "label-2"),
    )
    parts = [(what, timing[key], colour) for key, what, colour in names if key in timing]
    known = sum(seconds for _, seconds, _ in parts)
    total = timing.get("total_seconds", known)
    if total - known > 0.005 * total:
        parts.append(("reading, comparison and the rest", total - known, "label-7"))
    whole = max(total, known) or 1.0
    return {
        "total": total,
        "load": timing.get("load_seconds"),
        "parts": [
            {"what": what, "seconds": seconds, "share": seconds / whole, "colour": colour}
            for what, seconds, colour in parts
        ],
    }


def ceiling(epsilon: float | None, delta: float | None, false_alarms: float = FALSE_ALARMS) -> float | None:
    """Most true alarms of any test for one unit's presence, at a rate of false alarms (Kairouz et al. 2015).

    Reference: arXiv:1311.0776, Theorem 2.1. None where there is no finite claim: nothing is promised.
    """
    if epsilon is None or delta is None or not math.isfinite(epsilon):
        return None
    if epsilon > 700:
        return 1.0
    grown = math.exp(epsilon) * false_alarms + delta
    return min(grown, 1 - math.exp(-epsilon) * (1 - delta - false_alarms), 1.0)


def _distinct(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Which combinations of these keys occur, and at how many holders."""
    found = Counter(tuple(row[key] for key in keys) for row in rows)
    return [{**dict(zip(keys, values, strict=True)), "holders": count} for values, count in found.most_common()]


def _setting(result: Result, section: str, key: str) -> Any:
    table = result.config.get(section)
    return table.get(key) if isinstance(table, Mapping) else None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _span(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return show_count(high) if low == high else f"{show_count(low)} to {show_count(high)}"
