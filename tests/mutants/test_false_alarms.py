"""A sound mechanism passes: whole audits from twenty seeds, and each kind of head, sampling and unit.

The false-alarm rate of the tests themselves is measured over 2,000 seeds in
tests/statistical/test_audit_false_alarms.py.
"""

import numpy as np
import pytest

from fedhead.common.config import make_config
from fedhead.simulations.audit.mechanism import audit_mechanism

SMALL = {"privacy.epsilon": 5.0, "training.rounds": 12}
POISSON = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "training.local_steps": 4}
MLP = {"model.head": {"kind": "mlp", "hidden": [24], "dropout": 0.2}}


def failures(found):
    return [check["name"] for check in found["checks"] if not check["passed"]]


@pytest.mark.slow
def test_twenty_whole_audits_of_a_sound_mechanism_pass(tiny):
    """At a rate of 1 %, two false alarms in twenty would be a chance of 1.7 %."""
    alarms = [failures(audit_mechanism(tiny(SMALL), records=60, seed=seed)) for seed in range(20)]
    assert sum(map(bool, alarms)) <= 1, alarms


@pytest.mark.slow
def test_twenty_whole_audits_with_planted_gradients_pass(tiny):
    small = {**SMALL, **MLP, "training.rounds": 4}
    alarms = [failures(audit_mechanism(tiny(small), records=40, seed=seed, canaries=120)) for seed in range(20)]
    assert sum(map(bool, alarms)) <= 1, alarms


@pytest.fixture
def persons(tmp_path):
    """A recipe of persons with several records."""
    rng = np.random.default_rng(3)
    lines = ["label,who," + ",".join(f"x{i}" for i in range(16))]
    for row in range(300):
        lines.append(f"{row % 2},p{row % 70}," + ",".join(f"{value:.4f}" for value in rng.standard_normal(16)))
    (tmp_path / "people.csv").write_text("\n".join(lines))
    raw = {
        "task": {"labels": ["0", "1"]},
        "model": {"backbone": "module:torch.nn:Identity"},
        "data": {"source": "csv:people.csv", "columns": {"vector": "x*"}, "declared_records": 40},
        "holders": {"count": 2},
        "privacy": {"epsilon": 5.0, "unit": "person", "person": "who", "records_per_person": 4},
        "training": {"rounds": 10},
    }
    return lambda changes: make_config(
        {**raw, **{key: {**raw.get(key, {}), **value} for key, value in changes.items()}}, base=tmp_path
    )


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
