"""The plots of an audit's page: lower bounds beside the claim, noise residuals, the curve of a membership attack.

As in plots.py: SVG whose text is text and whose colours are the page's. A colour never stands alone: what failed is
also said in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from fedhead.simulations.plots import VARIABLES, new_axes, percent, short, styled, to_svg

MOST_POINTS: Final = 240  # of a curve: more can't be told apart at this size
LEAST_RATE: Final = 1e-5  # where the axes of a ROC curve start at the latest

Array = NDArray[np.float64]


def bounds(name: str, alt: str, found: Sequence[tuple[str, float, bool]], claim: float | None) -> Markup:
    """Measured lower bounds on epsilon as bars, and the claim as a line.

    Parameters
    ----------
    name, alt
        As in `plots.curve`.
    found : sequence of (str, float, bool)
        Title, epsilon (>= 0; infinite: the bar reaches the edge), and whether it is above the claim.
    claim : float or None
        None: nothing finite was claimed, and there is no line.
    """
    finite = [epsilon for _, epsilon, _ in found if math.isfinite(epsilon)]
    most = max([*finite, claim or 0.0, 0.1])
    edge = most * 1.16
    with styled(name):
        figure, axes = new_axes(440, 66 + 46 * len(found), grid="x")
        for place, (_, epsilon, above) in enumerate(found):
            colour = VARIABLES["bad" if above else "accent"]
            length = min(epsilon, edge)
            axes.barh(place, length, height=0.5, color=colour, alpha=0.85, linewidth=0, zorder=3)
            known = math.isfinite(epsilon)
            axes.annotate(
                f"{math.floor(epsilon * 100 + 1e-7) / 100:.2f}" if known else "infinite", (length, place), va="center",
                xytext=(5 if known else -5, 0), textcoords="offset points", ha="left" if known else "right",
                color=VARIABLES["ink" if known else "card"], zorder=5,
            )  # fmt: skip
        if claim is not None:
            axes.axvline(claim, color=VARIABLES["privacy"], linewidth=2, dashes=(6, 3), zorder=4)
            axes.annotate(
                f"claimed {math.ceil(claim * 100 - 1e-7) / 100:.2f}", (claim, -0.62), va="center",
                xytext=(-5 if claim > most / 2 else 5, 0), textcoords="offset points",
                ha="right" if claim > most / 2 else "left", color=VARIABLES["privacy"], zorder=5,
            )  # fmt: skip
        axes.set_yticks(range(len(found)), [short(title, 26) for title, _, _ in found])
        axes.set_ylim(len(found) - 0.4, -0.95)
        axes.set_xlim(0, edge)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("ε")
        return to_svg(figure, name, alt)


def residuals(
    name: str, alt: str, edges: Sequence[float], counts: Sequence[float], expected: Sequence[float]
) -> Markup:
    """How the residuals are spread, beside what the normal curve leads one to expect.

    Parameters
    ----------
    edges : sequence of float, length B + 1
        In standard deviations of the promised noise, rising. Infinite ones are drawn one step beyond the others.
    counts, expected : sequence of float, length B
        Residuals found and to expect between two edges.
    """
    rims = np.asarray(edges, dtype=float)
    finite = rims[np.isfinite(rims)]
    step = float(np.diff(finite).mean()) if len(finite) > 1 else 1.0
    rims = np.clip(rims, finite[0] - step, finite[-1] + step)
    with styled(name):
        figure, axes = new_axes(440, 270)
        axes.stairs(counts, rims, fill=True, color=VARIABLES["accent"], alpha=0.5, linewidth=0, zorder=2)
        axes.plot((rims[:-1] + rims[1:]) / 2, expected, color=VARIABLES["ink"], linewidth=1.8, zorder=4)
        axes.set_xlim(rims[0], rims[-1])
        axes.set_ylim(0, max([1.0, *counts, *expected]) * 1.06)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.set_xlabel("residual, in standard deviations of the promised noise")
        axes.set_ylabel("residuals")
        return to_svg(figure, name, alt)


def quantiles(name: str, alt: str, pairs: Sequence[Sequence[float]]) -> Markup:
    """Quantiles that were found against those of the normal curve: pairs on the diagonal if all is right."""
    points = np.asarray(pairs, dtype=float)  # (Q, 2)
    with styled(name):
        figure, axes = new_axes(440, 270)
        low, high = float(points.min()), float(points.max())
        room = (high - low or 1.0) * 0.05
        ends = [low - room, high + room]
        axes.grid(axis="x", color=VARIABLES["line"], linewidth=0.8, zorder=0)
        axes.plot(ends, ends, color=VARIABLES["ink"], linewidth=1.4, zorder=2)
        axes.plot(
            points[:, 0], points[:, 1], "o", color=VARIABLES["accent"], markersize=4.5,
            markeredgecolor=VARIABLES["card"], markeredgewidth=0.8, zorder=3,
        )  # fmt: skip
        span = float(np.ptp(points[:, 0])) or 1.0
        axes.set_xlim(points[:, 0].min() - span * 0.05, points[:, 0].max() + span * 0.05)
        axes.set_ylim(points[:, 1].min() - room, points[:, 1].max() + room)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("quantile of the normal curve")
        axes.set_ylabel("quantile found")
        return to_svg(figure, name, alt)


def roc(
    name: str,
    alt: str,
    points: Sequence[Sequence[float]],
    rates: Sequence[tuple[float, float, float, float]],
    limit: Sequence[tuple[float, float]],
) -> Markup:
    """True against false positives of an attack, both on a log scale; zeros have no place there and are left out.

    Parameters
    ----------
    points : sequence of (float, float)
        False-positive and true-positive rate, in any order.
    rates : sequence of (float, float, float, float)
        False-positive rate, true-positive rate and the ends of its interval, for the points that the table has.
    limit : sequence of (float, float)
        The most that the claim allows; empty without a claim.
    """
    found = np.asarray(points, dtype=float).reshape(-1, 2)
    positive = [value for value in [*found.ravel(), *(rate for rate, *_ in rates)] if value > 0]
    least = max(10.0 ** math.floor(math.log10(min([*positive, 0.1]))), LEAST_RATE)
    with styled(name):
        figure, axes = new_axes(440, 320)
        axes.grid(axis="x", color=VARIABLES["line"], linewidth=0.8, zorder=0)
        _log(axes, least)
        axes.plot([least, 1], [least, 1], color=VARIABLES["floor"], linewidth=1.5, dashes=(1.5, 2.5), zorder=2)
        if limit:
            grid = np.asarray(limit, dtype=float)
            axes.plot(grid[:, 0], grid[:, 1], color=VARIABLES["privacy"], linewidth=2, dashes=(6, 3), zorder=3)
        if len(found):
            places, reached = _stairs(found, least)
            axes.plot(places, reached, color=VARIABLES["accent"], linewidth=2.2, zorder=4, drawstyle="steps-post")
        for rate, share, low, high in rates:
            if high > 0:
                axes.vlines(rate, max(low, least), max(high, least), color=VARIABLES["accent"], linewidth=1.8, zorder=5)
            if share >= least:
                axes.plot(
                    [rate], [share], "o", color=VARIABLES["accent"], markersize=6.5, zorder=6,
                    markeredgecolor=VARIABLES["card"], markeredgewidth=1.2, clip_on=False,
                )  # fmt: skip
        axes.set_xlabel("false positives: others that the attack takes for members")
        axes.set_ylabel("true positives: members found")
        return to_svg(figure, name, alt)


def _log(axes: Axes, least: float) -> None:
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.15))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10))
        axis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def _stairs(found: Array, least: float) -> tuple[Array, Array]:
    """At most MOST_POINTS of a curve: at each rate of false positives the most that was found with no more."""
    ordered = found[np.lexsort((found[:, 1], found[:, 0]))]
    best = np.maximum.accumulate(ordered[:, 1])
    places = np.geomspace(least, 1.0, MOST_POINTS)
    at = np.searchsorted(ordered[:, 0], places * (1 + 1e-12), side="right") - 1
    reached = np.where(at >= 0, best[np.maximum(at, 0)], 0.0)
    return places, np.where(reached >= least, reached, np.nan)
