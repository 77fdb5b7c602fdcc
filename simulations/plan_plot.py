"""The picture of a plan: epsilon against rounds, for its own noise and for less and more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedhead.simulations.show import show_delta

_LIGHT: Final = {"ink": "#1f2328", "muted": "#57606a", "line": "#d8dee4", "plan": "#0b57d0", "other": "#8a94a0"}
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedhead-plan",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout everywhere
    "text.color": _LIGHT["ink"],
}


def draw_plan(path: Path, found: Mapping[str, Any], lines: Mapping[float, Sequence[tuple[int, float]]]) -> None:
    """Draw epsilon against rounds for several noise multipliers, the plan marked; a file of its own, light theme.

    Parameters
    ----------
    path : Path
        Ends in .png or .svg.
    found : mapping
        A plan, as `fedhead.simulations.plans` gives it.
    lines : mapping of float to sequence of (int, float)
        Noise multiplier -> (rounds, epsilon), by `fedhead.simulations.plans.curves`.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        highest = 2.2 * found["epsilon"]
        for noise, points in lines.items():
            mine = noise == found["noise_multiplier"]
            colour = _LIGHT["plan"] if mine else _LIGHT["other"]
            rounds, values = [point[0] for point in points], [point[1] for point in points]
            axes.plot(rounds, values, color=colour, linewidth=2.4 if mine else 1.3, zorder=3 if mine else 2)
            # named where the line leaves the picture, on top or at the right
            on_top = values[-1] > highest
            end = (float(np.interp(highest, values, rounds)), highest) if on_top else points[-1]
            axes.annotate(
                f"noise {noise:.3g}", end, xytext=(0, 3) if on_top else (4, 0), textcoords="offset points",
                ha="center" if on_top else "left", va="bottom" if on_top else "center", color=colour, fontsize=9.5,
                fontweight="bold" if mine else "normal", annotation_clip=False,
            )  # fmt: skip
        plan = (found["rounds"], found["epsilon"])
        axes.plot(*plan, "o", color=_LIGHT["plan"], markersize=8, markeredgecolor="white", zorder=5)
        axes.annotate(
            f"the plan: {plan[0]} round(s), epsilon {math.ceil(plan[1] * 1000 - 1e-6) / 1000:.3g}", plan,
            xytext=(10, -14), textcoords="offset points", color=_LIGHT["plan"], fontsize=10, zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip
        last = max(point[0] for points in lines.values() for point in points)
        axes.set_xlim(0, last)
        axes.set_ylim(0, highest)
        axes.set_xlabel("rounds", color=_LIGHT["muted"])
        axes.set_ylabel(f"epsilon at delta {show_delta(found['delta'])}, per {_unit(found)}", color=_LIGHT["muted"])
        sampled = f", sample rate {found['sample_rate']:g}" if found["sample_rate"] else ""
        title = f"{found['mechanism']}, {found['local_steps']} local step(s) a round{sampled}"
        axes.set_title(f"{title}\nnoise: standard deviation over clipping norm", loc="left", fontsize=11, pad=20)
        axes.grid(color=_LIGHT["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=_LIGHT["muted"])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_LIGHT["line"])
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _unit(found: Mapping[str, Any]) -> str:
    return str(found["unit"]) if " " not in found["unit"] else "unit"
