"""A holder's figures: rounds, refusals, seconds, budget, processes, and nothing of a record."""

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from fedhead.client.joining.figures import MOST_DOMAINS, HolderFigures
from fedhead.common.operations.metrics import OTHER
from fedhead.common.refusals import BEYOND_BUDGET, STALE_ROUND, TEXTS

PAGE = Path(__file__).parents[4] / "docs" / "deploy.md"


def samples(figures: HolderFigures) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (one.name, tuple(one.labels.values())): one.value
        for family in figures.registry.collect()
        for one in family.samples
    }


def test_rounds_and_refusals_are_counted():
    figures = HolderFigures()
    figures.event({"event": "round", "outcome": "released", "code": None, "seconds": 2.0})
    figures.event({"event": "round", "outcome": "released", "code": None, "seconds": 3.0})
    figures.event({"event": "round", "outcome": "refused", "code": STALE_ROUND, "seconds": 0.1})
    figures.event({"event": "round", "outcome": "refused", "code": BEYOND_BUDGET, "seconds": 0.1})
    figures.event({"event": "round", "outcome": "refused", "code": 9999, "seconds": 0.1})
    found = samples(figures)
    assert found["fedhead_holder_rounds_total", ("released",)] == 2
    assert found["fedhead_holder_rounds_total", ("refused",)] == 3
    assert found["fedhead_holder_refusals_total", (str(STALE_ROUND),)] == 1
    assert found["fedhead_holder_refusals_total", (str(BEYOND_BUDGET),)] == 1
    assert found["fedhead_holder_refusals_total", (OTHER,)] == 1
    assert found["fedhead_holder_training_seconds_count", ()] == 2
    assert found["fedhead_holder_training_seconds_sum", ()] == 5.0


def test_the_budget_is_what_the_ledger_says_and_unknown_is_not_nothing():
    figures = HolderFigures()
    figures.event({"event": "budget", "domain": "oncology", "spent": 3.0, "left": 1.0})
    figures.event({"event": "budget", "domain": "children", "spent": 2.0, "left": None})
    found = samples(figures)
    assert found["fedhead_holder_budget_epsilon", ("oncology", "spent")] == 3.0
    assert found["fedhead_holder_budget_epsilon", ("oncology", "left")] == 1.0
    assert math.isnan(found["fedhead_holder_budget_epsilon", ("children", "left")])
    figures.event({"event": "budget", "domain": "oncology", "spent": 4.0, "left": 0})
    assert samples(figures)["fedhead_holder_budget_epsilon", ("oncology", "left")] == 0.0


def test_processes_and_the_connection():
    figures = HolderFigures()
    found = samples(figures)
    assert found["fedhead_holder_up", ("node",)] == found["fedhead_holder_up", ("executor",)] == 0
    assert found["fedhead_holder_restarts_total", ("executor",)] == 0
    figures.up("node", True)
    figures.event({"event": "online"})
    figures.restarted("executor")
    found = samples(figures)
    assert found["fedhead_holder_up", ("node",)] == 1
    assert found["fedhead_holder_online", ()] == 1
    assert found["fedhead_holder_restarts_total", ("executor",)] == 1
    figures.event({"event": "offline", "why": "the server can't be reached"})
    assert samples(figures)["fedhead_holder_online", ()] == 0
    figures.event({"event": "online"})
    figures.up("node", False)
    assert samples(figures)["fedhead_holder_online", ()] == 0


def test_records_that_were_made_ready():
    figures = HolderFigures()
    figures.event({"event": "prepared", "seconds": 41.5, "good": True})
    assert samples(figures)["fedhead_holder_preparing_seconds", ()] == 41.5


VALUES = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(), st.lists(st.text(), max_size=2))


@given(
    st.sampled_from(["round", "prepared", "budget", "online", "offline", "ready", "x", None, 7]),
    st.dictionaries(st.sampled_from(["outcome", "code", "seconds", "domain", "spent", "left", "why"]), VALUES),
)
def test_any_event_can_come(kind, fields):
    figures = HolderFigures()
    figures.event({"event": kind, **fields})
    assert generate_latest(figures.registry)
    labels = {value for name, values in samples(figures) for value in values if "budget" not in name}
    known = {*map(str, TEXTS), "released", "refused", "node", "executor", OTHER}
    assert {value for value in labels if not value.replace(".", "").isdigit() and value != "+Inf"} <= known


def test_labels_are_bounded():
    figures = HolderFigures()
    for number in range(1000):
        figures.event({"event": "budget", "domain": f"d{number}", "spent": 1.0, "left": 1.0})
        figures.event({"event": "budget", "domain": f"bad name {number}", "spent": 1.0, "left": 1.0})
        figures.event({"event": "round", "outcome": f"o{number}", "code": number, "seconds": 1.0})
        figures.restarted(f"p{number}")
        figures.up(f"p{number}", True)
    domains = {values[0] for name, values in samples(figures) if name == "fedhead_holder_budget_epsilon"}
    assert len(domains) == MOST_DOMAINS + 1
    assert OTHER in domains
    assert len(samples(figures)) < 2 * (MOST_DOMAINS + 1) + 60


def test_nothing_but_figures_of_rounds_time_and_budget_is_shown():
    """Whatever else a process put into an event stays out, and the page names every figure."""
    figures = HolderFigures()
    figures.event({"event": "round", "outcome": "released", "seconds": 1.0, "records": 1234, "path": "patients.csv"})
    figures.event({"event": "prepared", "seconds": 1.0, "good": True, "rows": 1234, "labels": ["ill"]})
    figures.event({"event": "round", "outcome": "refused", "code": 1099, "text": "patient 7 is ill"})
    figures.event({"event": "budget", "domain": "d", "spent": 1.0, "left": 1.0, "records": 1234})
    shown = generate_latest(figures.registry).decode()
    assert [word for word in ("1234", "patient", 'ill"', "csv") if word in shown] == []
    names = {family.name + ("_total" if family.type == "counter" else "") for family in figures.registry.collect()}
    assert names == {
        "fedhead_holder_rounds_total", "fedhead_holder_refusals_total", "fedhead_holder_training_seconds",
        "fedhead_holder_preparing_seconds", "fedhead_holder_budget_epsilon", "fedhead_holder_online",
        "fedhead_holder_restarts_total", "fedhead_holder_up",
    }  # fmt: skip
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}" not in page] == []
