"""Our accountants against stored values of independent second accountants, and a few of those computed again."""

import json
from pathlib import Path

import pytest
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

from fedhead.common.privacy.accounting import epsilon, pld_epsilon, rows_of
from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent

ROWS = json.loads(Path(__file__).with_name("accounting.json").read_text(encoding="utf-8"))["rows"]


def events_of(row):
    return [
        PoissonEvent(noise, 1.0, rate, steps)
        if mechanism == "poisson"
        else {"full-batch": GaussianEvent, "count": CountEvent}[mechanism](noise, 1.0, steps)
        for mechanism, noise, rate, steps in row["events"]
    ]


def spent(row):
    return epsilon(events_of(row), row["delta"])


def sampled(row):
    return any(mechanism == "poisson" and rate < 1 for mechanism, _, rate, _ in row["events"])


def close(found, row):
    """Never below the optimistic figure, and within 1 % of the pessimistic one."""
    return max(row["least"] * (1 - 1e-6), row["epsilon"] * 0.99) <= found <= row["epsilon"] * 1.01


FULL = [row for row in ROWS if not sampled(row)]
POISSON = [row for row in ROWS if sampled(row)]
PARTS = 8


def test_there_are_enough_points():
    assert len({(str(row["events"]), row["delta"]) for row in ROWS}) == len(ROWS) >= 200
    assert sum(len(row["events"]) == 1 for row in ROWS) >= 200  # of (noise, rate, steps, delta)
    single = [row for row in POISSON if len(row["events"]) == 1]
    assert len(single) >= 75
    assert {row["by"] for row in ROWS} == {"gaussian", "pld", "prv"}
    figures = [row["epsilon"] for row in ROWS]
    assert min(figures) == 0
    assert max(figures) > 1e4
    assert min(row["epsilon"] for row in POISSON) < 0.05
    assert any(not row["events"] for row in ROWS)
    assert max(len(row["events"]) for row in POISSON) == 40
    assert any({"poisson", "count", "full-batch"} <= {name for name, *_ in row["events"]} for row in ROWS)
    assert any(rate == 1 for row in ROWS for _, _, rate, _ in row["events"])


def test_full_batch_and_counts():
    for row in FULL:
        found = spent(row)
        assert found.accountant == "gdp"
        assert close(found.epsilon, row), row
        if row["by"] == "gaussian":  # both are exact
            assert found.epsilon == pytest.approx(row["epsilon"], rel=1e-5, abs=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_sampled_steps(part):
    for row in POISSON[part::PARTS]:
        found = spent(row)
        assert close(found.epsilon, row), (found, row)
        assert found.accountant in {"prv", "pld"} - {row["by"]}, (found, row)  # a second opinion, not the same again


WRONG = {
    "steps": lambda e: [e[0], e[1], e[2], 2 * e[3]],
    "noise": lambda e: [e[0], 1.05 * e[1], e[2], e[3]],
    "rate": lambda e: [e[0], e[1], e[2] and 0.9 * e[2], e[3]],
}


@pytest.mark.parametrize("what", [*WRONG, "delta", "forgotten"])
def test_a_wrong_question_is_told_apart(what):
    mixed = next(row for row in ROWS if len(row["events"]) == 3)
    row = {"rate": POISSON[5], "forgotten": mixed}.get(what, FULL[5])
    twin = dict(row)
    if what == "delta":
        twin["delta"] /= 2
    elif what == "forgotten":
        twin["events"] = [event for event in row["events"] if event[0] != "count"]
    else:
        twin["events"] = [WRONG[what](event) for event in row["events"]]
    assert close(spent(row).epsilon, row)
    assert not close(spent(twin).epsilon, row)


@pytest.mark.parametrize("at", [0, 9, 30])
def test_stored_values_come_out_again(at):
    """So that the file is what the script writes and not what somebody typed."""
    rows = [row for row in ROWS if row["by"] == "pld" and len(row["events"]) == 1 and row["epsilon"] > 0.3]
    for row in (rows[at], rows[-at - 1]):
        assert pld_epsilon(rows_of_steps(row), row["delta"]) == pytest.approx(row["epsilon"], rel=4e-3)
    exact = [row for row in ROWS if row["by"] == "gaussian" and len(row["events"]) == 1]
    for row in exact:
        _, noise, _, steps = row["events"][0]
        assert get_epsilon_gaussian(noise / steps**0.5, row["delta"]) == pytest.approx(row["epsilon"], rel=1e-9)


def rows_of_steps(row):
    return rows_of(events_of(row)) if sampled(row) else [(noise, 1.0, steps) for _, noise, _, steps in row["events"]]
