"""The report of an audit: what the audits found, as one HTML page for a data protection officer.

No script, no font, nothing from elsewhere; all text is escaped. A claimed or spent epsilon is rounded up, what is left
and a measured lower bound are rounded down, and none is shown without its delta. What was not audited is said to be so.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from fedhead import __version__
from fedhead.common.writing import write_aside
from fedhead.simulations import plots
from fedhead.simulations.audit import pictures
from fedhead.simulations.audit.spending import MOST_BARS, moment, pair, spending_of
from fedhead.simulations.report import ACCOUNTANTS, MECHANISMS, environment
from fedhead.simulations.show import show_count, show_delta, show_epsilon

TEMPLATE: Final = "audit/page.html"
LARGEST: Final = 1e9  # JSON has no infinity: a lower bound of this or more stands for it
MOST_LEDGERS: Final = 3  # that the commands name one by one
MOST_NAMED: Final = 3  # failed checks that the verdict names

PARTS: Final[Mapping[str, str]] = {"ledger": "Ledger", "mechanism": "Mechanism", "membership": "Membership attack"}
METHODS: Final[Mapping[str, str]] = {
    "one-run": "guesses for each canary whether it was trained on, and counts the guesses that are right",
    "f-dp": "the same guesses, compared with the whole curve of errors that the mechanism allows, not one point of it",
    "clopper-pearson": "both kinds of error of one threshold, each with its interval, as if canaries were "
    "independent runs",
}
Found = Mapping[str, Any]


def write_page(found: Found, path: str | Path) -> Path:
    """Write the page of an audit; see `render_page`.

    Parameters
    ----------
    found : mapping
    path : path
        The HTML file. An older one is replaced in one step.

    Returns
    -------
    Path
    """
    path = Path(path)
    write_aside(path, render_page(found).encode(errors="replace"))  # a name may hold half a surrogate pair
    return path


def render_page(found: Found) -> str:
    """The page as text; the same findings give the same text.

    Parameters
    ----------
    found : mapping
        "name" and "created" of what was audited (text or None), and the results of "ledger", "mechanism" and
        "membership" as the audits give them for JSON; None, or no such key, for one that was not made. "why_not" may
        say why, by part.

    Returns
    -------
    str
        HTML that needs nothing else.
    """
    page = environment()
    page.filters.update(
        least=show_least, p_value=show_p_value, moment=moment, rate=plots.percent, tail=show_share, eps=_epsilon
    )
    return page.get_template(TEMPLATE).render(**context_of(found))


def now() -> str:
    """The time for "created": UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def passed(found: Found) -> bool | None:
    """Whether everything that was audited passed; None if nothing was.

    An attack passes unless it finds more members than the claim allows, beyond what its intervals leave to chance.
    """
    known = [part["passed"] for part in parts_of(found) if part["passed"] is not None]
    return all(known) if known else None


def context_of(found: Found) -> dict[str, Any]:
    """All that the template shows, computed from the findings alone."""
    ledger, mechanism, membership = (found.get(part) for part in PARTS)
    parts = parts_of(found)
    spending = None if ledger is None else spending_of(ledger)
    claim = None if mechanism is None else pair(mechanism["claim"])
    return {
        "name": found.get("name"),
        "created": None if found.get("created") is None else moment(found["created"]),
        "ledger": ledger,
        "mechanism": mechanism,
        "membership": membership,
        "parts": parts,
        "passed": passed(found),
        "reserve": reserve_of(found, spending),
        "sentence": _sentence(found, parts, spending, claim),
        "missing": [str(part["name"]).lower() for part in parts if part["passed"] is None],
        "spending": spending,
        "across": None if ledger is None else {k: pair(v) for k, v in (ledger.get("across") or {}).items()},
        "claim": claim,
        "bounds": [] if mechanism is None else [_bound(one, claim) for one in mechanism["bounds"]],
        "charts": {
            "bounds": _bounds_chart(mechanism, claim),
            "shares": _shares_chart(spending),
            **_residual_charts(mechanism),
            "roc": _roc_chart(membership),
        },
        "checks": [
            (PARTS[part], sorted(one["checks"], key=lambda check: check["passed"] is None or bool(check["passed"])))
            for part, one in (("ledger", ledger), ("mechanism", mechanism))
            if one is not None and one["checks"]
        ],
        "rates": [] if membership is None else [_rate(row) for row in membership["rates"]],
        "seeded": bool((mechanism or {}).get("seeded") or (spending or {}).get("seeded")),
        "notes": _notes(found),
        "commands": _commands(found, spending),
        "most": MOST_BARS,
        "mechanisms": MECHANISMS,
        "accountants": ACCOUNTANTS,
        "methods": METHODS,
        "version": __version__,
    }


def reserve_of(found: Found, spending: Found | None) -> str | None:
    """The verdict instead of "Passed" where no fault was found and the largest epsilon is infinite; else None."""
    if spending is None or spending["largest"] is None or not passed(found):
        return None
    if not math.isinf(spending["largest"]["epsilon"]):
        return None
    return "The server's noise is not audited here" if spending["units"] == ["holder"] else "No privacy was promised"


def parts_of(found: Found) -> list[dict[str, Any]]:
    """The verdict on each part: its name, "passed" (None: not audited), and one sentence."""
    return [
        {"name": name, **_part(part, found.get(part), (found.get("why_not") or {}).get(part))}
        for part, name in PARTS.items()
    ]


def _part(part: str, one: Found | None, why_not: str | None) -> dict[str, Any]:
    if one is None:
        return {"passed": None, "said": "Not audited." if why_not is None else f"Not audited: {why_not}"}
    if part == "membership":
        beaten = [row for row in map(_rate, one["rates"]) if row["beaten"]]
        if beaten:
            return {"passed": False, "said": "The attack finds more members than the claim allows."}
        allowed = any(row["ceiling"] is not None for row in one["rates"])
        said = "The attack finds no more members than the claim allows." if allowed else "Shown; nothing was claimed."
        return {"passed": True, "said": said}
    failed = [check for check in one["checks"] if check["passed"] is not None and not check["passed"]]
    good = bool(one["passed"]) and not failed
    total = show_count(sum(check["passed"] is not None for check in one["checks"]))
    if failed:
        named = ", ".join(str(check["title"]) for check in failed[:MOST_NAMED])
        more = " and more" if len(failed) > MOST_NAMED else ""
        return {"passed": False, "said": f"{show_count(len(failed))} of {total} checks failed: {named}{more}."}
    said = f"All {total} checks passed." if one["checks"] and good else "The audit did not pass; its notes say why."
    return {"passed": good, "said": said if one["checks"] or not good else "Passed; there was nothing to check."}


def _sentence(found: Found, parts: Sequence[Found], spending: Found | None, claim: Found | None) -> str:
    """The verdict in one sentence."""
    if all(part["passed"] is None for part in parts):
        return "Nothing was audited, so this page shows nothing about privacy."
    if not all(part["passed"] in (True, None) for part in parts):
        wrong = [f"the {part['name']}".lower() for part in parts if part["passed"] is False]
        listed = " and ".join([", ".join(wrong[:-1]), wrong[-1]] if len(wrong) > 1 else wrong)
        return f"Faults were found in {listed}: do not rely on any ε of this page before they are explained."
    most = spending["largest"] if spending is not None else None
    if spending is None:
        if claim is None:
            return "Nothing contradicts what was claimed."
        return f"Nothing that was measured contradicts the claim of {_epsilon(claim)} for one {_unit(found)}."
    if most is None:
        return "The ledgers are whole, and nothing was released that has an ε."
    if math.isinf(most["epsilon"]):
        if spending["units"] == ["holder"]:
            return "The ledgers are whole, but updates left without the noise that the server adds: ε is infinite."
        return "The ledgers are whole, but something was released without privacy: ε is infinite."
    units = spending["units"]
    unit = f" for one {units[0]}" if len(units) == 1 else ""
    more = ", and nothing that was measured contradicts the mechanism's claim" if claim is not None else ""
    return f"No data holder spent more than {_epsilon(most)}{unit}{more}."


def _unit(found: Found) -> str:
    return str((found.get("mechanism") or {}).get("unit", "record"))


def _epsilon(one: Found) -> str:
    """A claimed or spent epsilon, rounded up, with its delta."""
    return f"ε = {show_epsilon(one['epsilon'])} at δ = {show_delta(one['delta'])}"


def show_least(value: float) -> str:
    """Epsilon with two digits, rounded down: a lower bound, or what is left, is never shown larger than it is."""
    return "∞" if not math.isfinite(value) or value >= LARGEST else f"{math.floor(value * 100 + 1e-7) / 100:.2f}"


def show_p_value(value: float) -> str:
    """A p-value with two digits, small ones as a power of ten."""
    if value < 1e-99:
        return "< 1e-99"
    return f"{value:.2g}" if value >= 0.001 else show_delta(float(f"{value:.1e}"))


def show_share(value: float) -> str:
    """A share of a whole, for the width of a bar."""
    return f"{min(max(value, 0.0), 1.0) * 100:.2f}"


def _bound(one: Found, claim: Found | None) -> dict[str, Any]:
    epsilon = math.inf if one["epsilon"] >= LARGEST else float(one["epsilon"])
    return {**one, "epsilon": epsilon, "above": claim is not None and epsilon > claim["epsilon"]}


def _bounds_chart(mechanism: Found | None, claim: Found | None) -> Markup | None:
    if mechanism is None or not mechanism["bounds"]:
        return None
    rows = [_bound(one, claim) for one in mechanism["bounds"]]
    said = "; ".join(f"{row['title']} at least {show_least(row['epsilon'])}" for row in rows)
    level = claim["epsilon"] if claim is not None and math.isfinite(claim["epsilon"]) else None
    alt = f"Lower bounds on epsilon from attacks: {said}. Claimed: {'infinite' if claim is None else _epsilon(claim)}."
    return pictures.bounds("bounds", alt, [(row["title"], row["epsilon"], row["above"]) for row in rows], level)


def _shares_chart(spending: Found | None) -> Markup | None:
    """How much of their budgets many holders have spent; few are shown one by one."""
    if spending is None or len(spending["shares"]) <= MOST_BARS:
        return None
    shares = spending["shares"]
    low, middle, high = (plots.percent(share) for share in (min(shares), float(np.median(shares)), max(shares)))
    alt = (
        f"Share of the budget that was spent, over {show_count(len(shares))} budgets: between {low} and {high}, "
        f"median {middle}."
    )
    return plots.histogram("shares", alt, shares, "spent of the budget's ε", what="budgets")


def _residual_charts(mechanism: Found | None) -> dict[str, Markup | None]:
    found = None if mechanism is None else mechanism.get("residuals")
    if not found or not sum(found["counts"]):
        return {"residuals": None, "quantiles": None}
    total = sum(found["counts"])
    off = sum(abs(count - wanted) for count, wanted in zip(found["counts"], found["expected"], strict=True)) / 2 / total
    alt = (
        f"Histogram of {show_count(int(total))} residuals beside the normal curve: {plots.percent(off)} of them lie in "
        "another column than the curve leads one to expect."
    )
    pairs = found["quantiles"]
    spread = max((abs(was - wanted) for wanted, was in pairs), default=0.0)
    said = (
        f"Quantiles of the residuals against those of the normal curve, at {len(pairs)} places: the largest difference "
        f"is {spread:.2g} standard deviations."
    )
    return {
        "residuals": pictures.residuals("residuals", alt, found["edges"], found["counts"], found["expected"]),
        "quantiles": pictures.quantiles("quantiles", said, pairs) if pairs else None,
    }


def _rate(row: Found) -> dict[str, Any]:
    return {**row, "beaten": None not in (row["ceiling"], row["low"]) and row["low"] > row["ceiling"]}


def _roc_chart(membership: Found | None) -> Markup | None:
    if membership is None or not membership["roc"]:
        return None
    limit = [(rate, most) for rate, most in membership["ceiling"] or () if rate >= pictures.LEAST_RATE]
    stated = [row for row in membership["rates"] if row["tpr"] is not None]
    said = "; ".join(f"{plots.percent(row['tpr'])} at {plots.percent(row['fpr'])}" for row in stated)
    alt = f"True positives of the membership attack at rates of false positives: {said}. Area {membership['auc']:.3f}."
    rates = [(row["fpr"], row["tpr"], row["low"], row["high"]) for row in stated]
    return pictures.roc("roc", alt, membership["roc"], rates, limit)


def _notes(found: Found) -> list[str]:
    notes = [str(note) for part in PARTS if found.get(part) for note in found[part].get("notes") or ()]
    return list(dict.fromkeys(notes))


def _commands(found: Found, spending: Found | None) -> list[tuple[str, str]]:
    """What to type to repeat each audit; a part that was not audited has a command all the same."""
    ledgers = [] if spending is None else spending["ledgers"]
    named = " ".join(shlex.quote(path) for path in ledgers[:MOST_LEDGERS]) or "LEDGER..."
    if len(ledgers) > MOST_LEDGERS:
        named += f" ...  # {show_count(len(ledgers))} files; a folder that holds them will do"
    commands = [("the ledger", f"fedhead audit ledger {named}")]
    for part, what in (("mechanism", "the mechanism"), ("membership", "the attack")):
        recipe = (found.get(part) or {}).get("recipe")
        commands.append((what, f"fedhead audit {part} {shlex.quote(str(recipe)) if recipe else 'RECIPE'}"))
    return commands
