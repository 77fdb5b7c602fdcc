"""What a result says, as it is shown to people: numbers, and what was refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

METRIC_NAMES: Final[Mapping[str, str]] = {"accuracy": "Accuracy", "auc_roc": "AUC-ROC", "loss": "Loss", "f1": "F1"}


def metric_name(name: str) -> str:
    """A metric's name for people."""
    return METRIC_NAMES.get(name, name.replace("_", " ").capitalize())


def show_metric(value: float, name: str = "accuracy") -> str:
    """Accuracy as a percentage, other metrics with three digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value * 100:.1f}%" if name == "accuracy" else f"{value:.3f}"


def show_number(value: float) -> str:
    """A number with at most four digits."""
    return f"{value:.4g}"


def show_noise(value: float, digits: int = 6) -> str:
    """A noise multiplier, rounded up: whoever types it in again stays within the epsilon that goes with it."""
    if not math.isfinite(value) or value < 1e-6:
        return f"{value:.{digits}g}"
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.{digits}g}"


def show_epsilon(value: float) -> str:
    """Epsilon with two digits, rounded up: a claim is never shown smaller than it is."""
    if not math.isfinite(value):
        return "∞"
    return f"{math.ceil(value * 100 - 1e-7) / 100:.2f}"  # the slack is for the float product alone


def show_delta(value: float) -> str:
    """Delta as in a recipe, such as 1e-5."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def show_count(value: int) -> str:
    """A whole number with thousands apart."""
    return f"{value:,}"


def show_bytes(value: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"


def show_seconds(value: float) -> str:
    """A duration for people."""
    if value < 59.95:
        return f"{value * 1000:.0f} ms" if value < 0.1 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def show_setting(value: Any) -> str:
    """A setting's value about as it would be typed."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(show_setting(item) for item in value) or "—"
    return str(value) if not isinstance(value, Mapping) else "—"


def refusals_of(rounds: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was refused over all rounds of a result, by code: `code`, `text`, `times`, and the set of `holders`."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rounds:
        for one in row["refused"]:
            new = {"code": one["code"], "text": one["text"], "times": 0, "holders": set()}
            entry = found.setdefault((one["code"], one["text"]), new)
            entry["times"] += 1
            entry["holders"].add(one["holder"])
    return [found[key] for key in sorted(found)]


def refusal_text(one: Mapping[str, Any]) -> str:
    """One of these in words."""
    holders, code = len(one["holders"]), f" (code {one['code']})" if one["code"] else ""  # 0: nothing came from it
    return f"{one['times']:,} × {one['text']}{code}, {holders:,} data holder{'' if holders == 1 else 's'}"
