"""Simulated holders that are kept between runs: what they spent stays spent, across runs, processes and restarts."""

import json
import shutil
import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedhead.common.errors import RunError
from fedhead.common.privacy.events import CountEvent, GaussianEvent, from_json
from fedhead.common.privacy.ledger import Granted, Ledger, Reservation
from fedhead.common.privacy.ledger.transactions import Transactions
from fedhead.common.privacy.terms import Terms
from fedhead.simulations.simulate import simulate

RECIPE = """
[task]
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[model]
backbone = "module:torch.nn:Identity"
[data]
source = "sklearn:digits"
declared_records = 480
[holders]
count = 3
budget = { domain = "digits", epsilon = 1.6, delta = 1e-5 }
[privacy]
epsilon = 1.0
[training]
rounds = 6
[run]
baseline = false
"""


def independent_epsilon(events, delta):
    """By dp-accounting, from the events alone."""
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    for event in events:
        accountant.compose(dp_accounting.GaussianDpEvent(event.noise_multiplier), event.steps)
    return accountant.get_epsilon(delta)


def fedhead(*arguments, cwd):
    command = [sys.executable, "-m", "fedhead", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_third_run_is_refused_and_budget_says_what_was_spent(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    runs = [fedhead("simulate", "recipe.toml", "--state", "kept", "--out", f"run-{i}", cwd=tmp_path) for i in range(3)]
    assert [run.returncode for run in runs] == [0, 0, 1], [run.stderr for run in runs]
    assert "1010" in runs[2].stderr
    assert "Traceback" not in runs[2].stderr

    shown = fedhead("budget", *sorted((tmp_path / "kept" / "holders").glob("*/ledger.sqlite")), "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    for number in range(3):
        name = f"holder-{number:05d}"
        ledger = Ledger(tmp_path / "kept" / "holders" / name / "ledger.sqlite")
        ledger.verify()
        events = [from_json(one.event) for one in ledger.entries(name) if one.kind == "reserve"]
        (summary,) = [one for one in ledger.summary(name) if one.domain == "digits"]
        ledger.close()
        assert len(events) == 12  # six rounds of two runs
        expected = independent_epsilon(events, 1e-5)
        assert 1.0 < expected < 1.6
        assert summary.spent.epsilon == pytest.approx(expected, rel=0.01)
        (row,) = [one for one in found["domains"] if (one["holder"], one["domain"]) == (name, "digits")]
        assert row["spent"]["epsilon"] == pytest.approx(expected, rel=0.01)
        assert row["left"]["epsilon"] < 1.6 - 1.0


def test_runs_without_a_budget_are_written_down_all_the_same(tiny, tmp_path):
    result = simulate(tiny({"training.rounds": 3}), tmp_path / "run")
    for entry in result.privacy:
        ledger = Ledger(tmp_path / "run" / "holders" / entry["holder"] / "ledger.sqlite")
        entries = list(ledger.entries())
        ledger.verify()
        ledger.close()
        assert [one.kind for one in entries] == ["reserve", "release"] * 3
        events = [from_json(one.event) for one in entries if one.kind == "reserve"]
        assert entry["epsilon"] == pytest.approx(independent_epsilon(events, 1e-5), rel=0.01)


def test_a_refusal_names_who_and_why_in_code_and_the_others_go_on(tiny, tmp_path):
    config = tiny({"training.rounds": 2, "holders.budget": {"epsilon": 3.5, "delta": 1e-5}})
    with Ledger(tmp_path / "kept" / "holders" / "ledgers.sqlite") as ledger:
        ledger.declare("holder-00002", "default", Terms(3.5, 1e-5))
        (outcome,) = ledger.reserve(
            [
                Reservation(
                    holder="holder-00002", domain="default", run="an earlier one", round=1, digest="0" * 64,
                    event=GaussianEvent(1.5, 0.3, 1), unit="record", fingerprint="f", noise="n",
                )
            ]
        )  # fmt: skip
        assert isinstance(outcome, Granted)
    result = simulate(config, tmp_path / "second", state=tmp_path / "kept")
    for row in result.rounds:
        assert row["holders"] == 4
        assert row["refused"] == [
            {"holder": "holder-00002", "code": 1010, "text": "the holder's privacy budget does not allow it"}
        ]


def test_an_older_ledger_folder_is_refused(tiny, tmp_path):
    config = tiny({"training.rounds": 2})
    simulate(config, tmp_path / "first", state=tmp_path / "kept")
    shutil.copytree(tmp_path / "kept" / "holders", tmp_path / "backup")
    simulate(config, tmp_path / "second", state=tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "holders")
    shutil.copytree(tmp_path / "backup", tmp_path / "kept" / "holders")
    with pytest.raises(RunError, match="1022"):
        simulate(config, tmp_path / "third", state=tmp_path / "kept")


def test_noised_counts_are_released_and_charged(tiny, tmp_path):
    config = tiny({"training.rounds": 4, "privacy.metrics": {"every": 2, "noise_multiplier": 20.0, "fraction": 0.2}})
    result = simulate(config, tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "holders" / "holder-00000" / "ledger.sqlite")
    events = [from_json(one.event) for one in ledger.entries() if one.kind == "reserve"]
    ledger.close()
    assert [type(event) for event in events].count(CountEvent) == 2
    assert [type(event) for event in events].count(GaussianEvent) == 4
    entry = result.privacy[0]
    assert entry["epsilon"] <= 3.0 * (1 + 1e-9)
    assert entry["epsilon"] == pytest.approx(independent_epsilon(events, 1e-5), rel=0.01)
    noised = [row["noised"] for row in result.rounds if row.get("noised")]
    assert len(noised) == 2
    assert all(one["holders"] == 5 and one["standard_error"] > 0 for one in noised)


def test_a_round_of_all_simulated_holders_is_one_transaction(tiny, tmp_path, monkeypatch):
    commits, execute = [], Transactions._execute

    def counted(self, sql, values=()):
        commits.extend([self.path] if sql == "COMMIT" else [])
        return execute(self, sql, values)

    monkeypatch.setattr(Transactions, "_execute", counted)
    result = simulate(tiny({"training.rounds": 5, "holders.budget": {"epsilon": 8.0, "delta": 1e-5}}), tmp_path / "run")
    assert all(row["holders"] == 5 for row in result.rounds)
    # the budgets of all, each round with what the one before released, and what the last one released
    assert len(commits) == 1 + 5 + 1
