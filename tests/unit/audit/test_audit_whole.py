"""A run's result and its ledgers belong together, and an audit of the run says when they don't."""

import json
import shutil

import pytest

from fedhead.common.results import Result
from fedhead.simulations.audit.ledgers import audit_ledgers
from fedhead.simulations.audit.whole import same_run
from fedhead.simulations.simulate import simulate

POISSON = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.2, "training.local_steps": 2}
COUNTS = {"privacy.metrics": {"every": 2}}


def checked(folder, result=None):
    return same_run(result or Result.read(folder), audit_ledgers([folder / "holders"]))


@pytest.mark.parametrize("changes", [{}, POISSON, COUNTS, {"privacy.unit": "holder", "privacy.noise_multiplier": 1.0,
    "privacy.epsilon": None}, {"privacy.mechanism": "none", "privacy.epsilon": None}], ids=str)  # fmt: skip
def test_a_run_and_its_own_ledgers(tiny, tmp_path, changes):
    simulate(tiny({"training.rounds": 3, **changes}), tmp_path / "run")
    assert checked(tmp_path / "run").passed


def test_ledgers_of_another_run(tiny, tmp_path):
    for name, noise in (("first", 20.0), ("second", 30.0)):
        simulate(
            tiny({"training.rounds": 3, "privacy.epsilon": None, "privacy.noise_multiplier": noise}), tmp_path / name
        )
    shutil.rmtree(tmp_path / "first" / "holders")
    shutil.copytree(tmp_path / "second" / "holders", tmp_path / "first" / "holders")
    found = checked(tmp_path / "first")
    assert not found.passed
    assert "holder-00000 released what no run in its ledger was charged with" in found.meaning


def test_a_result_that_was_changed(tiny, tmp_path):
    folder = tmp_path / "run"
    simulate(tiny({"training.rounds": 3}), folder)
    raw = json.loads((folder / "result.json").read_text())
    raw["privacy"][2]["events"][1]["noise_multiplier"] *= 1.01
    (folder / "result.json").write_text(json.dumps(raw))
    found = checked(folder)
    assert not found.passed
    assert found.figure == "4 of 5 holders"
    assert "holder-00002" in found.meaning


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda spend: spend["events"].pop(), "leaves out what holder-00001 released"),
        (lambda spend: spend.update(epsilon=0.5), "states another epsilon for holder-00001"),
        (lambda spend: spend.update(events=[]), "leaves out what holder-00001 released"),
    ],
    ids=["an event less", "another epsilon", "no event"],
)
def test_a_result_that_says_less_than_was_spent(change, says, tiny, tmp_path):
    folder = tmp_path / "run"
    simulate(tiny({"training.rounds": 3}), folder)
    raw = json.loads((folder / "result.json").read_text())
    change(raw["privacy"][1])
    (folder / "result.json").write_text(json.dumps(raw))
    found = checked(folder)
    assert not found.passed
    assert found.figure == "4 of 5 holders"
    assert says in found.meaning


def test_holders_that_keep_their_ledgers_between_runs(tiny, tmp_path):
    for number in range(2):
        simulate(tiny({"training.rounds": 2, "run.seed": number}), tmp_path / f"run-{number}", state=tmp_path / "state")
    assert checked(tmp_path / "run-1").passed
