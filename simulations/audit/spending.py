"""What a ledger audit says about releases and budgets, condensed for a page.

A release is a row of the ledger that was charged. What became of it is its state: "released" left the holder,
"reserved" may have, "abandoned" did not; all three are spent.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from fedhead.simulations.show import show_noise

MOST_RELEASES: Final = 500  # rows of single releases that a page carries; the rest is counted
MOST_GROUPS: Final = 1000  # rows of runs, budgets and marks
MOST_BARS: Final = 30  # bars and rows that are shown unfolded
STATES: Final = ("released", "reserved", "abandoned")

Found = Mapping[str, Any]


def spending_of(ledger: Found) -> dict[str, Any]:
    """All that a page says about a ledger audit's holders, those with a fault first.

    A ledger with a fault has no releases and no figures here: the audit believes nothing that it says.
    """
    holders = sorted(ledger["holders"], key=lambda one: (bool(one["passed"]), str(one["holder"])))
    releases = [one for holder in holders for one in _releases(holder)]
    groups = [group for holder in holders for group in _groups(holder)]
    budgets = [row for holder in holders for row in _budgets(holder)]
    budgets.sort(key=lambda row: math.inf if row["share"] is None else -row["share"])
    together = [one for holder in holders for one in holder.get("together") or ()]
    times = sorted(one["time"] for one in releases if one["time"] is not None)
    return {
        "holders": len(holders),
        "sound": sum(bool(one["passed"]) for one in holders),
        "runs": len({group["run"] for group in groups}),
        "count": len(releases),
        "states": {state: sum(one["state"] == state for one in releases) for state in STATES},
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
        "units": sorted({unit for row in budgets for unit in row["units"]}),
        "sources": sorted({str(one["noise"]) for one in releases if one["noise"] is not None}),
        "seeded": any("seeded" in str(one["noise"]) for one in releases),
        "kinds": _kinds(releases),
        "groups": groups[:MOST_GROUPS],
        "more_groups": max(0, len(groups) - MOST_GROUPS),
        "releases": releases[:MOST_RELEASES],
        "more_releases": max(0, len(releases) - MOST_RELEASES),
        "budgets": budgets[:MOST_GROUPS],
        "more_budgets": max(0, len(budgets) - MOST_GROUPS),
        "shares": [row["share"] for row in budgets if row["share"] is not None and math.isfinite(row["share"])],
        "bad": [holder for holder in holders if not holder["passed"]],
        "marks": holders[:MOST_GROUPS],
        "more_marks": max(0, len(holders) - MOST_GROUPS),
        "largest": largest([*(row["spent"] for row in budgets), *(_worst(one["epsilon"]) for one in together)]),
        "ledgers": list(dict.fromkeys(str(holder["ledger"]) for holder in holders)),
    }


def pair(figures: Found | None) -> dict[str, Any] | None:
    """Epsilon, delta and accountant; JSON has no infinity, so it comes as the text "inf"."""
    if figures is None or figures.get("epsilon") is None:
        return None
    return {
        "epsilon": float(figures["epsilon"]),
        "delta": float(figures["delta"]),
        "accountant": str(figures.get("accountant") or ""),
    }


def largest(pairs: Sequence[Found | None]) -> dict[str, Any] | None:
    """The pair with the largest epsilon, and of equal ones with the largest delta."""
    known = [dict(one) for one in pairs if one is not None]
    return max(known, key=lambda one: (one["epsilon"], one["delta"]), default=None)


def _by(figures: Found | None) -> dict[str, dict[str, Any] | None]:
    """What each accountant says; None where it says nothing."""
    return {name: pair((figures or {}).get(name)) for name in ("first", "second", "ledger")}


def _worst(figures: Found | None) -> dict[str, Any] | None:
    return largest(list(_by(figures).values()))


def moment(text: object) -> str:
    """A time as it is shown, in UTC to the second; what is no time is shown as it is."""
    try:
        found = datetime.fromisoformat(str(text))
        return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return str(text)


def event_text(event: Found) -> str:
    """A mechanism event in words, without the number of steps."""
    kind = str(event.get("mechanism", "unknown"))
    if kind == "none":
        return "not private: neither clipped nor noised"
    noise = f"noise multiplier {_noise(event.get('noise_multiplier'))}"
    if kind == "count":
        return f"noised count, {noise}, sensitivity {_short(event.get('sensitivity'))}"
    rate = event.get("sample_rate")
    whom = "all records in each step" if rate is None else f"each record with probability {_short(rate)}"
    return f"{kind}, {noise}, clipping norm {_short(event.get('clipping_norm'))}, {whom}"


def _noise(value: object) -> str:
    return show_noise(value) if isinstance(value, float) else _short(value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _releases(holder: Found) -> Iterator[dict[str, Any]]:
    for domain in holder["domains"]:
        for one in domain["releases"]:
            yield {
                **one,
                "holder": holder["holder"],
                "domain": domain["domain"],
                "time": None if one["time"] is None else moment(one["time"]),
                "steps": one["event"].get("steps"),
                "what": event_text(one["event"]),
            }


def _groups(holder: Found) -> Iterator[dict[str, Any]]:
    """Releases of one holder by domain and run, in the order in which they began."""
    for domain in holder["domains"]:
        known = {run["run"]: run for run in domain["runs"]}
        found: dict[str, list[Found]] = {run: [] for run in known}
        for one in domain["releases"]:
            found.setdefault(one["run"], []).append(one)
        for run, releases in found.items():
            times = sorted(moment(one["time"]) for one in releases if one["time"] is not None)
            counts = Counter(one["state"] for one in releases)
            yield {
                "holder": holder["holder"],
                "domain": domain["domain"],
                "run": run,
                "first": times[0] if times else None,
                "last": times[-1] if times else None,
                "count": len(releases),
                "rounds": len({one["round"] for one in releases}),
                "states": {state: counts[state] for state in STATES},
                "spent": _worst(known[run]["epsilon"]) if run in known else None,
            }


def _budgets(holder: Found) -> Iterator[dict[str, Any]]:
    for domain in holder["domains"]:
        by = _by(domain["epsilon"])
        spent, terms = largest(list(by.values())), domain["terms"]
        again = (by["first"], by["second"])  # one of them rounds up a little: over is where both are
        yield {
            "holder": holder["holder"],
            "domain": domain["domain"],
            "units": [str(unit) for unit in domain["unit"]],
            "by": by,
            "spent": spent,
            "terms": terms,
            "left": domain["left"],
            "with": [str(other) for other in domain.get("counted_with") or ()],
            "share": None if terms is None or spent is None else spent["epsilon"] / terms["epsilon"],
            "over": terms is not None and any(again) and min(one["epsilon"] for one in again if one) > terms["epsilon"],
        }


def _kinds(releases: Sequence[Found]) -> list[dict[str, Any]]:
    """Which events were charged: releases, steps and holders of each."""
    found: dict[str, dict[str, Any]] = {}
    for one in releases:
        key = json.dumps({k: v for k, v in one["event"].items() if k != "steps"}, sort_keys=True, default=str)
        kind = found.setdefault(key, {"what": one["what"], "releases": 0, "steps": 0, "holders": set()})
        kind["releases"] += 1
        kind["steps"] += one["steps"] or 0
        kind["holders"].add(one["holder"])
    return sorted(found.values(), key=lambda kind: -kind["releases"])
