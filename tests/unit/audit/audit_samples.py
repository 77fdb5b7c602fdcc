"""Results of audits as the audit commands give them, made up: for tests of what shows them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from scipy.stats import norm

START = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
EVENT = {
    "schema": 1,
    "mechanism": "full-batch",
    "noise_multiplier": 13.17,
    "clipping_norm": 1.0,
    "steps": 1,
}


MEANINGS = {  # of a check that passed, and of one that failed
    "chain": ("No entry was changed, removed or moved.", "An entry was changed after it was written."),
    "mark": ("No ledger was cut off or put back to an older copy.", "A ledger ends before the mark that was kept."),
    "signature": ("Every statement was signed with its holder's key.", "A statement was signed with another key."),
    "accountants": ("Two computations that share no code agree on ε.", "The ledger claims less than was spent."),
    "total-variance": ("The noise is as strong as promised.", "The noise is weaker than promised."),
    "coordinates": ("Every number has its noise.", "Some numbers leave without noise."),
    "lag": ("Each step has noise of its own.", "Noise is used again in a later step."),
    "bias": ("The bias has its noise.", "The bias leaves with too little noise."),
    "single": ("No record moves a sum by more than the clipping norm.", "A record moves a sum by more than it may."),
}


def check(name: str, title: str, figure: str, p_value: float | None = None, passed: bool = True) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "passed": passed,
        "figure": figure,
        "meaning": MEANINGS[name][not passed],
        "p_value": p_value,
        "level": None if p_value is None else 0.0025,
    }


def figures(epsilon: float | str, accountant: str) -> dict[str, Any]:
    return {"epsilon": epsilon, "delta": 1e-5, "accountant": accountant}


def holder(number: int, rounds: int, *, name: str | None = None, seeded: bool = False) -> dict[str, Any]:
    """One holder with two runs; the last round of the second was charged and never sent."""
    name = f"hospital-{number:03d}" if name is None else name
    runs = ["2c9e41d07b5f-first", "77b1a0c3e962-second"]
    releases = []
    for sequence in range(1, rounds + 1):
        second = sequence > rounds // 2
        state = "abandoned" if sequence == rounds else "reserved" if sequence == rounds - 1 else "released"
        releases.append(
            {
                "sequence": sequence + 1,
                "time": (START + timedelta(minutes=7 * sequence, hours=20 * second)).isoformat(timespec="microseconds"),
                "run": runs[second],
                "round": sequence - (rounds // 2) * second,
                "event": EVENT,
                "state": state,
                "noise": "mt19937-seeded" if seeded else "aes-ctr-lattice",
                "payload_digest": None if state != "released" else f"{sequence:02x}" * 32,
            }
        )
    spent = 1.0 + 1.9 * ((number * 37) % 100) / 100
    domain = {
        "domain": "radiology",
        "unit": ["record"],
        "counted_with": [],
        "terms": {"epsilon": 3.0, "delta": 1e-5, "poisson_share": 0.0, "run_epsilon": None, "run_delta": None},
        "epsilon": {
            "first": figures(spent, "gdp"),
            "second": figures(spent + 2e-4, "pld"),
            "ledger": figures(spent, "gdp"),
        },
        "left": {"mu_squared": 0.1, "epsilon": 2.9 - spent, "delta": 1e-5, "poisson_epsilon": 0, "poisson_delta": 0},
        "releases": releases,
        "runs": [
            {
                "run": run,
                "epsilon": {
                    "first": figures(spent * 0.7, "gdp"),
                    "second": figures(spent * 0.7, "pld"),
                    "ledger": figures(spent * 0.7, "gdp"),
                },
                "released": sum(one["run"] == run and one["state"] == "released" for one in releases),
                "reserved": sum(one["run"] == run and one["state"] == "reserved" for one in releases),
                "abandoned": sum(one["run"] == run and one["state"] == "abandoned" for one in releases),
            }
            for run in runs
        ],
    }
    return {
        "holder": name,
        "ledger": f"holders/{name}/ledger.sqlite",
        "entries": 2 * rounds,
        "mark": {"sequence": 2 * rounds, "hash": f"{number % 256:02x}" * 32},
        "passed": True,
        "first_bad": None,
        "domains": [domain],
        "together": [{"unit": "record", "domains": ["radiology"], "epsilon": domain["epsilon"]}],
    }


def ledger(holders: int = 3, rounds: int = 12, *, seeded: bool = False) -> dict[str, Any]:
    found = [holder(number, rounds, seeded=seeded) for number in range(holders)]
    most = max((one["domains"][0]["epsilon"]["second"]["epsilon"] for one in found), default=0.0)
    return {
        "schema": 1,
        "passed": True,
        "checks": [
            check("chain", "Hash chain", f"{2 * rounds * holders} entries"),
            check("mark", "High-water mark", f"{holders} of {holders}"),
            check("signature", "Signed statements", f"{holders} of {holders}"),
            check("accountants", "Two accountants agree", "0.0002 apart"),
        ],
        "holders": found,
        "across": {"disjoint": {"epsilon": most, "delta": 1e-5}, "same-people": None},
        "notes": [],
    }


def mechanism(*, seeded: bool = False) -> dict[str, Any]:
    draws = np.random.default_rng(4).standard_normal(24_000)
    edges = np.linspace(-4.5, 4.5, 46)
    shares = np.linspace(0.001, 0.999, 99)
    expected = np.diff(norm.cdf(edges)) * len(draws)
    return {
        "schema": 1,
        "recipe": "quickstart",
        "unit": "record",
        "mechanism": "full-batch",
        "head": "linear",
        "features": 384,
        "outputs": 2,
        "canaries": 384,
        "records": 1384,
        "rounds": 60,
        "steps": 60,
        "noise_multiplier": 13.17,
        "clipping_norm": 1.0,
        "sample_rate": None,
        "noise": "aes-ctr-lattice",
        "claim": {"epsilon": 2.991, "delta": 1e-5, "accountant": "gdp"},
        "bounds": [
            bound("one-run", "One run (Steinke et al.)", 0.829, 0.41),
            bound("f-dp", "One run, f-DP", 1.246, 0.33),
            bound("clopper-pearson", "Parallel Clopper–Pearson", 1.778, 0.27),
        ],
        "checks": [
            check("total-variance", "Total variance", "1.003 of 1", 0.62),
            check("coordinates", "Variance of each number", "worst 1.31 of 1", 0.21),
            check("lag", "Correlation from step to step", "0.004 of 0", 0.53),
            check("bias", "Variance at the bias", "0.98 of 1", 0.048),
            check("single", "One record's contribution", "1.0000 of at most 1", None),
        ],
        "false_alarms": 0.01,
        "passed": True,
        "seconds": 31.4,
        "residuals": {
            "edges": edges.tolist(),
            "counts": np.histogram(draws, edges)[0].tolist(),
            "expected": expected.tolist(),
            "quantiles": np.column_stack([norm.ppf(shares), np.quantile(draws, shares)]).tolist(),
        },
        "notes": ["A canary is a made-up record: no real record takes part in this measurement."],
        "seeded": seeded,
    }


def bound(name: str, title: str, epsilon: float, p_value: float) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "epsilon": epsilon,
        "delta": 1e-5,
        "confidence": 0.95,
        "guesses": 190,
        "right": 141,
        "claim_p_value": p_value,
        "note": "Rests on the mechanism being Gaussian." if name == "f-dp" else "",
    }


def most(rate: float) -> float:
    """True positives that (2.991, 1e-5) allows."""
    return min(math.exp(2.991) * rate + 1e-5, 1 - math.exp(-2.991) * (1 - 1e-5 - rate))


def membership(advantage: float = 0.4) -> dict[str, Any]:
    rates = np.unique(np.concatenate([[0.0], np.geomspace(1e-4, 1, 2000)]))
    found = norm.cdf(norm.ppf(rates) + advantage)
    rows = []
    for rate in (0.001, 0.01, 0.1):
        share = float(norm.cdf(norm.ppf(rate) + advantage))
        off = 1.96 * math.sqrt(share * (1 - share) / 10_000)
        low = max(0, share - off)
        rows.append({"fpr": rate, "tpr": share, "low": low, "high": share + off, "ceiling": most(rate)})
    return {
        "schema": 1,
        "recipe": "quickstart",
        "models": 64,
        "members": 10_000,
        "nonmembers": 10_000,
        "auc": float(norm.cdf(advantage / math.sqrt(2))),
        "rates": rows,
        "roc": np.column_stack([rates, found]).tolist(),
        "ceiling": [[rate, most(rate)] for rate in rates.tolist()],
        "claim": {"epsilon": 2.991, "delta": 1e-5},
        "seconds": 44.0,
        "notes": [],
    }


def passing() -> dict[str, Any]:
    return {
        "name": "quickstart",
        "created": "2026-11-22T16:03:11+00:00",
        "ledger": ledger(),
        "mechanism": mechanism(),
        "membership": membership(),
    }


def failing() -> dict[str, Any]:
    """One flipped bit in a ledger, noise that is halved, and an attack that beats the claim."""
    found = passing()
    found["ledger"]["passed"] = False
    found["ledger"]["checks"][0] = check("chain", "Hash chain", "entry 9 of hospital-001", passed=False)
    broken = found["ledger"]["holders"][1]
    broken.update(passed=False, domains=[], together=[])
    broken["first_bad"] = {"sequence": 9, "what": "has a hash that does not fit: the row was changed", "check": "chain"}
    found["mechanism"]["passed"] = False
    found["mechanism"]["checks"][0] = check("total-variance", "Total variance", "0.251 of 1", 3e-210, passed=False)
    found["mechanism"]["bounds"][2] = bound("clopper-pearson", "Parallel Clopper–Pearson", 4.61, 2e-9)
    residuals = found["mechanism"]["residuals"]
    residuals["quantiles"] = [[wanted, was * 0.5] for wanted, was in residuals["quantiles"]]
    draws = np.random.default_rng(4).standard_normal(24_000) * 0.5
    residuals["counts"] = np.histogram(draws, residuals["edges"])[0].tolist()
    found["membership"] = membership(3.4)
    return found


def empty() -> dict[str, Any]:
    return {"name": None, "created": "2026-11-22T16:03:11+00:00", "ledger": None, "mechanism": None, "membership": None}
