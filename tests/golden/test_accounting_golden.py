"""Our accountants against stored values of dp-accounting's PLD accountant, and a few of those computed again."""

import json
from pathlib import Path

import pytest

from fedhead.common.privacy.accounting import epsilon, pld_epsilon
from fedhead.common.privacy.events import GaussianEvent, PoissonEvent

ROWS = json.loads(Path(__file__).with_name("accounting.json").read_text(encoding="utf-8"))["rows"]


def spent(row):
    noise, steps = row["noise_multiplier"], row["steps"]
    if row["sample_rate"] is None:
        return epsilon([GaussianEvent(noise, 1.0, steps)], row["delta"])
    return epsilon([PoissonEvent(noise, 1.0, row["sample_rate"], steps)], row["delta"])


def close(found, row):
    return row["least"] * (1 - 1e-6) <= found <= row["epsilon"] * 1.01


def test_there_are_enough_points():
    assert len(ROWS) >= 60
    assert sum(row["sample_rate"] is not None for row in ROWS) >= 20


@pytest.mark.parametrize("rate", sorted({row["sample_rate"] or 1.0 for row in ROWS}))
def test_within_one_percent_and_never_below(rate):
    """Never below the optimistic figure: an accountant that reports too little breaks the promise."""
    rows = [row for row in ROWS if (row["sample_rate"] or 1.0) == rate]
    accountants = set()
    for row in rows:
        found = spent(row)
        accountants.add(found.accountant)
        assert close(found.epsilon, row), row
    assert accountants <= ({"gdp"} if rate == 1 else {"prv", "pld"})


@pytest.mark.parametrize("wrong", [{"steps": 2}, {"noise_multiplier": 1.05}, {"delta": 0.5}])
def test_a_wrong_question_is_told_apart(wrong):
    for row in (ROWS[3], ROWS[-1]):
        twin = {**row, **{name: type(row[name])(row[name] * factor) for name, factor in wrong.items()}}
        assert not close(spent(twin).epsilon, row)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[10], ROWS[-1], ROWS[-12]], ids=str)
def test_stored_values_come_out_again(row):
    rate = row["sample_rate"] or 1.0
    again = pld_epsilon([(row["noise_multiplier"], rate, row["steps"])], row["delta"])
    assert again == pytest.approx(row["epsilon"], rel=2e-3)
