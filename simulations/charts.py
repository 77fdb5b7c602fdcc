"""Which pictures a report shows: accuracy and epsilon by round, how records are spread. plots.py draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from fedhead.common.results import NOISE_BAR, Result
from fedhead.simulations import plots
from fedhead.simulations.show import metric_name, show_count, show_epsilon, show_metric, show_number

MOST_ROWS: Final = 30  # holders that a table shows unfolded and a picture shows one by one


def charts_of(result: Result, planned: Any) -> dict[str, Any]:
    """Accuracy, epsilon and estimates from noised counts by round; a chart that has nothing to show is None."""
    charts: dict[str, Any] = {"metric": None, "epsilon": None, "noised": noised_chart(result)}
    names = ["accuracy", "auc_roc", *result.final]
    name = next((name for name in names if name in result.final), None)
    if name is not None:
        points = [
            (row["round"], row["metrics"][name])
            for row in result.rounds
            if row["metrics"] is not None and math.isfinite(row["metrics"].get(name, math.nan))
        ]
        levels = []
        key = [("this run", result.final[name], "accent")]
        for what, metrics, colour, dashes in (
            ("without privacy", result.baseline, "plain", (6, 3)),
            ("most frequent label", result.majority, "floor", (1.5, 2.5)),
        ):
            same = colour == "plain" and (result.config.get("privacy") or {}).get("mechanism") == "none"
            if metrics is not None and math.isfinite(metrics.get(name, math.nan)) and not same:
                levels.append(plots.Line(metrics[name], colour, dashes))
                key.append((what, metrics[name], colour))
        if points:
            said = "; ".join(f"{what} {show_metric(value, name)}" for what, value, _ in key)
            alt = (
                f"{metric_name(name)} on the test records by round: {show_metric(points[0][1], name)} in round "
                f"{points[0][0]}, {show_metric(points[-1][1], name)} in round {points[-1][0]}. At the end: {said}."
            )
            share = name in ("accuracy", "auc_roc")
            svg = plots.curve("metric", alt, points, levels, show=plots.percent if share else show_number)
            charts["metric"] = {"name": name, "svg": svg, "key": key}
    spent = [(row["round"], row["epsilon"]) for row in result.rounds if row["epsilon"] is not None]
    if spent and all(math.isfinite(value) for _, value in spent):
        target = isinstance(planned, int | float)
        alt = (
            f"Largest epsilon over the data holders by round: {show_epsilon(spent[0][1])} after round {spent[0][0]}, "
            f"{show_epsilon(spent[-1][1])} after round {spent[-1][0]}"
            + (f"; planned were {show_epsilon(planned)}." if target else ".")
        )
        svg = plots.curve(
            "epsilon", alt, [(0, 0.0), *spent], [plots.Line(planned, "muted", (6, 3))] if target else [],
            colour="privacy", show=lambda value: f"{value:.4g}", from_zero=True,
        )  # fmt: skip
        charts["epsilon"] = {"svg": svg, "last": spent[-1][1]}
    return charts


def noised_chart(result: Result) -> dict[str, Any] | None:
    """Accuracy estimated from noised counts, beside that on the test records; None where no holder released a count.

    A count is of the head that its round began with, so it is shown at the round before.
    """
    rows = [row for row in result.rounds if row.get("noised") is not None]
    if not rows:
        return None
    points = [
        (row["round"] - 1, row["noised"]["accuracy"], NOISE_BAR * row["noised"]["standard_error"]) for row in rows
    ]
    line = [
        (row["round"], row["metrics"]["accuracy"])
        for row in result.rounds
        if row["metrics"] is not None and math.isfinite(row["metrics"].get("accuracy", math.nan))
    ]
    last, after = rows[-1]["noised"], rows[-1]["round"] - 1
    said = f"{show_metric(min(max(last['accuracy'], 0.0), 1.0))} ± {points[-1][2] * 100:.1f} points"
    alt = (
        f"Accuracy estimated from the holders' noised counts in {len(points)} round{'' if len(points) == 1 else 's'}; "
        f"the last says {said}, for the head after round {after}."
    )
    return {
        "svg": plots.estimates("noised", alt, points, line),
        "said": said,
        "after": after,
        "holders": last["holders"],
        "tested": result.final.get("accuracy") if line else None,
    }


def pictures_of(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[tuple[str, Markup]]:
    """How records, labels and metrics are spread: one by one for few holders, as histograms for many."""
    known = [row for row in rows if row["mix"]]
    if not known or len(known) < 2:
        return []
    names = [row["name"] for row in known]
    counts = np.array([row["counts"] for row in known], dtype=float)  # (holders, K)
    top = counts.max(1) / counts.sum(1)
    alt = (
        f"Labels at {len(known)} data holders: the most frequent label has between {plots.percent(top.min())} and "
        f"{plots.percent(top.max())} of a holder's records. The table says the same in numbers."
    )
    if len(known) <= MOST_ROWS:
        draw = plots.label_bars if len(labels) <= plots.LABEL_COLOURS else plots.label_map
        return [("wide", draw("skew", alt, names, counts, labels))]
    sizes = counts.sum(1)
    span = f"between {show_count(int(sizes.min()))} and {show_count(int(sizes.max()))}"
    found = [
        (
            "small",
            plots.histogram(
                "sizes", f"Records a holder: {span}.", sizes.tolist(), "records a holder", lambda v: f"{v:,.4g}"
            ),
        ),
        ("small", plots.histogram("top", alt, top.tolist(), "share of a holder's most frequent label")),
    ]
    for name in ("accuracy", "auc_roc"):
        values = [row["metrics"][name] for row in known if math.isfinite(row["metrics"].get(name, math.nan))]
        if values:
            said = f"{metric_name(name)} at the holders: median {show_metric(float(np.median(values)), name)}."
            found.append(("small", plots.histogram(f"of-{name}", said, values, f"{metric_name(name)} a holder")))
            break
    return found
