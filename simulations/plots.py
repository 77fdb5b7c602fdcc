"""The plots of a report: matplotlib figures as SVG that a page carries inline.

Text stays text (it takes the page's font), and every colour is one of the page's CSS variables, so that one picture
serves light, dark and print. No pyplot: no figure outlives its function. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.cells import cell_len, set_cell_size

LABEL_COLOURS: Final = 8
_NAMES: Final = ("ink", "muted", "line", "card", "accent", "plain", "floor", "privacy")
_LABELS: Final = tuple(f"label-{number}" for number in range(LABEL_COLOURS))
VARIABLES: Final = {name: f"#0102{number:02x}" for number, name in enumerate((*_NAMES, *_LABELS, "good", "bad"))}
"""Matplotlib knows no CSS variables: each stands in a picture as a colour nobody would choose, exchanged at the end."""
_BACK: Final = {colour: f"var(--{name})" for name, colour in VARIABLES.items()}
_COLOUR: Final = re.compile("#0102[0-9a-f]{2}")
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.parse_math": False,  # a label such as "$x" is text
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout everywhere
    "font.size": 10.5,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Line:
    """A level to compare with: a horizontal line in one of the page's colours."""

    value: float
    colour: str
    dashes: tuple[float, float]


def percent(value: float) -> str:
    """A share as a percentage, without digits that say nothing."""
    return f"{value * 100:.4g}%"


def curve(
    name: str,
    alt: str,
    points: Sequence[tuple[int, float]],
    levels: Sequence[Line] = (),
    *,
    colour: str = "accent",
    show: Callable[[float], str] = percent,
    from_zero: bool = False,
) -> Markup:
    """A value by round, with levels to compare with.

    Parameters
    ----------
    name : str
        Keeps the ids of several pictures of one page apart.
    alt : str
        What the picture says, for those who can't see it.
    points : sequence of (int, float)
        Round and value; finite.
    """
    with styled(name):
        figure, axes = new_axes(440, 230)
        rounds, values = [point[0] for point in points], [point[1] for point in points]
        for level in levels:
            axes.axhline(level.value, color=VARIABLES[level.colour], linewidth=1.5, dashes=level.dashes, zorder=2)
        if from_zero:
            axes.fill_between(rounds, values, color=VARIABLES[colour], alpha=0.1, linewidth=0, zorder=1)
        axes.plot(rounds, values, color=VARIABLES[colour], linewidth=2.2, zorder=3, solid_capstyle="round")
        marked = slice(None) if len(points) <= 25 and not from_zero else slice(-1, None)
        axes.plot(
            rounds[marked], values[marked], "o", color=VARIABLES[colour], markersize=5.5,
            markeredgecolor=VARIABLES["card"], markeredgewidth=1.2, zorder=4, clip_on=False,
        )  # fmt: skip
        everything = [*values, *(level.value for level in levels)]
        low, high = min(everything), max(everything)
        room = (high - low or abs(high) or 1.0) * 0.08
        axes.set_ylim(0 if from_zero else low - room, high + room)
        first = min(rounds)
        axes.set_xlim(min(first, 1) if len(points) > 1 else first - 1, max(rounds) if len(points) > 1 else first + 1)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.set_xlabel("round")
        return to_svg(figure, name, alt)


def estimates(
    name: str,
    alt: str,
    points: Sequence[tuple[int, float, float]],
    line: Sequence[tuple[int, float]] = (),
) -> Markup:
    """Estimates of a share by round, each with what it may be off by, beside a line that is known.

    Parameters
    ----------
    name, alt
        As in `curve`.
    points : sequence of (int, float, float)
        Round, estimate, and half the length of its bar; finite. What lies outside 0 to 1 is cut off.
    line : sequence of (int, float)
        Round and value.
    """
    with styled(name):
        figure, axes = new_axes(440, 230)
        if line:
            axes.plot(
                [point[0] for point in line], [point[1] for point in line], color=VARIABLES["accent"], linewidth=1.6,
                zorder=2,
            )  # fmt: skip
        rounds = [point[0] for point in points]
        shown = [min(max(value, 0.0), 1.0) for _, value, _ in points]
        low = [max(value - half, 0.0) for _, value, half in points]
        high = [min(value + half, 1.0) for _, value, half in points]
        # an interval wholly outside 0 to 1 leaves its point at the rim
        axes.vlines(
            rounds, np.minimum(low, shown), np.maximum(high, shown), color=VARIABLES["privacy"], linewidth=1.8,
            alpha=0.55, zorder=3,
        )  # fmt: skip
        axes.plot(
            rounds, shown, "o", color=VARIABLES["privacy"], markersize=5.5, markeredgecolor=VARIABLES["card"],
            markeredgewidth=1.2, zorder=4, clip_on=False,
        )  # fmt: skip
        values = [*low, *high, *shown, *(value for _, value in line)]
        room = (max(values) - min(values) or 0.1) * 0.08
        axes.set_ylim(min(values) - room, max(values) + room)
        axes.set_xlim(0, max(1, *rounds, *(point[0] for point in line)))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        axes.set_xlabel("round")
        return to_svg(figure, name, alt)


def label_bars(name: str, alt: str, holders: Sequence[str], counts: np.ndarray, labels: Sequence[str]) -> Markup:
    """Records of each holder, split by label: counts (holders, K), K at most LABEL_COLOURS."""
    with styled(name):
        figure, axes = new_axes(720, 58 + 21 * len(holders), grid="x")
        places, left = np.arange(len(holders)), np.zeros(len(holders))
        for number in range(len(labels)):
            axes.barh(
                places, counts[:, number], left=left, height=0.68, color=VARIABLES[f"label-{number}"],
                edgecolor=VARIABLES["card"], linewidth=1, zorder=3,
            )  # fmt: skip
            left += counts[:, number]
        axes.set_yticks(places, [short(holder) for holder in holders])
        axes.set_ylim(len(holders) - 0.4, -0.6)
        axes.set_xlim(0, max(1, left.max()))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("records")
        return to_svg(figure, name, alt)


def label_map(name: str, alt: str, holders: Sequence[str], counts: np.ndarray, labels: Sequence[str]) -> Markup:
    """Share of each label at each holder, as a map: counts (holders, K)."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with styled(name):
        figure, axes = new_axes(720, 74 + 21 * len(holders), grid=None)
        for row, column in np.ndindex(shares.shape):
            field = Rectangle((column, row), 1, 1, facecolor=VARIABLES["accent"], edgecolor=VARIABLES["card"])
            field.set(alpha=0.05 + 0.95 * float(shares[row, column] / shares.max()), linewidth=1.5, zorder=2)
            axes.add_patch(field)
        axes.set_xlim(0, len(labels))
        axes.set_ylim(len(holders), 0)
        axes.set_yticks(np.arange(len(holders)) + 0.5, [short(holder) for holder in holders])
        every = -(-len(labels) // 24)
        shown = list(range(0, len(labels), every))
        turned = sum(cell_len(short(labels[i])) for i in shown) > 60
        axes.set_xticks(
            [i + 0.5 for i in shown], [short(labels[i]) for i in shown],
            rotation=40 if turned else 0, ha="right" if turned else "center",
        )  # fmt: skip
        axes.spines["bottom"].set_visible(False)
        return to_svg(figure, name, alt)


def histogram(
    name: str,
    alt: str,
    values: Sequence[float],
    caption: str,
    show: Callable[[float], str] = percent,
    what: str = "holders",
) -> Markup:
    """How a value is spread over the holders, or what else is counted; for more than bars can show one by one."""
    with styled(name):
        figure, axes = new_axes(300, 170)
        found = np.asarray(values, dtype=float)
        spread = float(found.max() - found.min())
        margin = 0.5 * (abs(float(found[0])) or 1.0)
        limits = None if spread > 0 else (float(found[0]) - margin, float(found[0]) + margin)
        axes.hist(
            found, bins=min(24, max(5, len(found) // 8)), range=limits, color=VARIABLES["accent"],
            edgecolor=VARIABLES["card"], linewidth=1, zorder=3,
        )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel(caption)
        axes.set_ylabel(what)
        return to_svg(figure, name, alt)


class styled:
    """Our settings inside the block, the user's after it."""

    def __init__(self, name: str) -> None:
        self._settings = matplotlib.rc_context({**_RC, "svg.hashsalt": f"fedhead-{name}"})
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._warnings.__enter__()
        # Glyphs that the layout font lacks are still shown by the browser: the text itself is in the picture.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        self._settings.__enter__()

    def __exit__(self, *failure: object) -> None:
        self._settings.__exit__(None, None, None)
        self._warnings.__exit__(None, None, None)


def new_axes(width: float, height: float, grid: str | None = "y") -> tuple[Figure, Axes]:
    """A figure of this size in CSS pixels and its axes, without a frame; call it inside `styled`."""
    figure = Figure(figsize=(width / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04))
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(VARIABLES["line"])
    axes.tick_params(length=0, colors=VARIABLES["muted"], pad=5)
    axes.xaxis.label.set_color(VARIABLES["muted"])
    axes.yaxis.label.set_color(VARIABLES["muted"])
    if grid is not None:
        axes.grid(axis="x" if grid == "x" else "y", color=VARIABLES["line"], linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def short(text: str, most: int = 18) -> str:
    """A name that fits beside an axis, with nothing that XML can't hold; a Chinese sign counts as two letters."""
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)  # XML has no control characters
    return clean if cell_len(clean) <= most else set_cell_size(clean, most - 1).rstrip() + "…"


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an element of a page: own ids, the page's colours, no style that reaches beyond the picture."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _own(key, value, name) for key, value in attributes.items()})
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": alt, "class": "chart"})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _own(key: str, value: str, name: str) -> str:
    """An attribute's value with ids of this picture alone and the page's colours."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    return _COLOUR.sub(lambda match: _BACK[match.group()], value.replace("url(#", f"url(#{name}-"))
