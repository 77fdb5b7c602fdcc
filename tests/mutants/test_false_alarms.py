"""A sound mechanism passes: whole audits from twenty seeds, and each kind of head, sampling and unit.

The false-alarm rate of the tests themselves is measured over 2,000 seeds in
tests/statistical/test_audit_false_alarms.py.
"""

import pytest

from fedhead.client.auditing import contributions
from fedhead.simulations.audit.mechanism import audit_mechanism

SMALL = {"privacy.epsilon": 5.0, "training.rounds": 12}
POISSON = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "training.local_steps": 4}
MLP = {"model.head": {"kind": "mlp", "hidden": [24], "dropout": 0.2}}


def failures(found):
    return [check["name"] for check in found["checks"] if not check["passed"]]


@pytest.fixture
def brief(monkeypatch):
    """Fewer data sets in what has no chance in it, and would say the same from every seed."""
    monkeypatch.setattr(contributions, "_SIZES", (0,))
    monkeypatch.setattr(contributions, "_LABELS", 2)


@pytest.mark.slow
def test_twenty_whole_audits_of_a_sound_mechanism_pass(tiny, brief):
    """At a rate of 1 %, two false alarms in twenty would be a chance of 1.7 %."""
    alarms = [failures(audit_mechanism(tiny(SMALL), records=60, seed=seed)) for seed in range(20)]
    assert sum(map(bool, alarms)) <= 1, alarms


@pytest.mark.slow
def test_twenty_whole_audits_with_planted_gradients_pass(tiny, brief):
    small = {**SMALL, **MLP, "training.rounds": 4}
    alarms = [failures(audit_mechanism(tiny(small), records=40, seed=seed, canaries=120)) for seed in range(20)]
    assert sum(map(bool, alarms)) <= 1, alarms


@pytest.mark.parametrize("seed", [5, None], ids=["simulated noise", "a deployment's noise"])
@pytest.mark.parametrize("head", [{}, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("mechanism", [{}, POISSON], ids=["full-batch", "poisson"])
@pytest.mark.slow
def test_records(tiny, head, mechanism, seed):
    found = audit_mechanism(tiny({**SMALL, **head, **mechanism}), records=60, seed=seed)
    assert not set(failures(found)) - set(chance(found))
    assert len(failures(found)) <= (0 if seed is not None else 1)
    assert {"one-run", "f-dp", "clopper-pearson"} == {bound["name"] for bound in found["bounds"]}
    assert all(bound["epsilon"] <= found["claim"]["epsilon"] for bound in found["bounds"])


@pytest.mark.parametrize("head", [{}, {"head": MLP["model.head"]}], ids=["linear", "mlp"])
@pytest.mark.parametrize("mechanism", [{}, {"mechanism": "poisson", "sample_rate": 0.2}], ids=["full-batch", "poisson"])
@pytest.mark.slow
def test_persons(persons, head, mechanism):
    found = audit_mechanism(persons({"model": head, "privacy": mechanism}), records=40, seed=3)
    assert not failures(found)
    assert found["unit"] == "person"
    assert found["canaries"] == (432 if head else 16)  # as many as an mlp has weights, or a linear head features


def chance(found):
    """Checks that may fail by chance, in one audit of a hundred."""
    return [check["name"] for check in found["checks"] if check["p_value"] is not None and check["p_value"] > 1e-6]
