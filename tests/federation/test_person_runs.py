"""Whole runs with the unit person: from a file with a person column to the result's figures and notes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fedhead.client import workplace
from fedhead.common.config import RunConfig, changed, make_config
from fedhead.common.errors import DataError
from fedhead.common.preparation import read_split
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent
from fedhead.simulations.simulate import simulate


def write_digits(path: Path, most: int) -> int:
    """Digits of people with 1 to `most` records each, at one of three hospitals a record; how many people."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    people, start = np.zeros(len(x), dtype=int), 0
    order = rng.permutation(len(x))
    person = 0
    while start < len(x):
        count = int(rng.integers(1, most + 1))
        people[order[start : start + count]] = person
        start, person = start + count, person + 1
    table = {
        "pixels": [row.tolist() for row in x],
        "label": y.astype(str).tolist(),
        "patient": [f"patient-{who}" for who in people],
        "hospital": [f"h{i % 3}" for i in range(len(x))],
    }
    pq.write_table(pa.table(table), path)
    return person


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("digits")
    for most in (1, 4):
        write_digits(folder / f"{most}.parquet", most)
    return {most: folder / f"{most}.parquet" for most in (1, 4)}


def recipe(path: Path, changes: dict | None = None) -> RunConfig:
    made = make_config(
        {
            "task": {"labels": [str(digit) for digit in range(10)]},
            "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": f"parquet:{path}", "columns": {"vector": "pixels", "label": "label"}},
            "holders": {"count": 3},
            "privacy": {"epsilon": 8.0, "unit": "person", "person": "patient"},
            "training": {"rounds": 12},
            "run": {"baseline": False},
        },
        base=Path.cwd(),
    )
    return changed(made, changes or {})


def head_of(folder: Path) -> torch.Tensor:
    state = load_file(folder / "model" / "head.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_a_run_protects_persons_and_says_so(digits, tmp_path):
    result = simulate(recipe(digits[4], {"privacy.records_per_person": 3}), tmp_path / "run")
    split = read_split(recipe(digits[4]))
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.5
    for entry in result.privacy:
        assert entry["unit"] == "person"
        assert entry["adjacency"] == "add or remove one person, with all their records at a holder"
        noise = entry["events"][0]["noise_multiplier"]
        assert entry["epsilon"] == pytest.approx(epsilon([GaussianEvent(noise, 0.3, 12)], 1e-5).epsilon, rel=1e-9)
    assert sum(holder["persons"] for holder in result.holders) == split.units < len(split.train)
    # the divisor counts persons, not records
    mean = split.units / 3
    assert mean <= result.declared_records["value"] < 1.2 * mean
    # what is left out is in the holders' own log, and nowhere else
    log = (tmp_path / "run" / "holders.log").read_text()
    assert "holder-00000" in log
    assert "records are left out, of persons with more than 3" in log
    assert "left out" not in (tmp_path / "run" / "result.json").read_text()
    assert "patient-" not in json.dumps(json.loads((tmp_path / "run" / "result.json").read_text())) + log


def test_one_record_a_person_is_the_record_run(digits, tmp_path):
    """The same head, bit for bit, when nobody has more than one record; the split follows the person, so test apart."""
    changes = {"data.test": {"source": f"parquet:{digits[1]}"}, "run.exact": True, "data.declared_records": 600}
    simulate(recipe(digits[1], changes), tmp_path / "person")
    simulate(recipe(digits[1], {**changes, "privacy.unit": "record"}), tmp_path / "record")
    assert torch.equal(head_of(tmp_path / "person"), head_of(tmp_path / "record"))


def test_poisson_samples_persons(digits, tmp_path):
    config = recipe(digits[4], {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.3, "training.local_steps": 2})
    result = simulate(config, tmp_path / "run")
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.3
    assert all(entry["events"][0]["sample_rate"] == 0.3 for entry in result.privacy)


def test_an_mlp_learns_from_persons(digits, tmp_path):
    config = recipe(
        digits[4],
        {
            "model.head": {"kind": "mlp", "hidden": [32]}, "privacy.epsilon": None, "privacy.noise_multiplier": 0.5,
            "training.optimizer": {"kind": "adam", "learning_rate": 0.02}, "strategy": {"kind": "fedavg"},
            "training.rounds": 20,
        },
    )  # fmt: skip
    result = simulate(config, tmp_path / "run")
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.4


def test_the_split_does_not_matter_without_noise(digits, tmp_path):
    """The aggregate is the sum over persons, wherever they are."""
    heads = []
    for name, partition in (("iid", {"kind": "iid"}), ("skewed", {"kind": "dirichlet", "alpha": 0.3})):
        changes = {
            "privacy.epsilon": None, "privacy.noise_multiplier": 1e-9, "holders.partition": partition,
            "training.optimizer": {"kind": "sgd", "learning_rate": 5.0}, "data.declared_records": 200,
        }  # fmt: skip
        simulate(recipe(digits[4], changes), tmp_path / name)
        heads.append(head_of(tmp_path / name))
    assert heads[0].abs().max() > 0.1
    assert (heads[0] - heads[1]).abs().max() < 1e-5 * heads[0].abs().max()


def test_record_figures_are_never_shown_as_if_for_persons(digits, tmp_path):
    result = simulate(recipe(digits[4], {"privacy.unit": "record", "training.rounds": 2}), tmp_path / "run")
    assert {entry["unit"] for entry in result.privacy} == {"record"}
    assert any("somebody with several records is protected less" in note for note in result.notes)
    plain = simulate(
        recipe(digits[4], {"privacy.unit": "record", "privacy.person": None, "training.rounds": 2}), tmp_path / "plain"
    )
    assert not any("several records" in note for note in plain.notes)


def test_people_at_two_holders_are_told_of(digits, tmp_path):
    changes = {"holders.partition": {"kind": "by-column", "column": "hospital"}, "training.rounds": 2}
    result = simulate(recipe(digits[4], changes), tmp_path / "run")
    assert any("more than one holder: each of them pays the sum" in note for note in result.notes)
    other = simulate(recipe(digits[4], {"training.rounds": 2}), tmp_path / "iid")
    assert not any("pays the sum" in note for note in other.notes)


def test_a_holder_that_prepares_itself_has_the_same_persons(digits, tmp_path):
    """As a Ray worker or `flwr run` does, from the recipe alone."""
    config = recipe(digits[4])
    split = read_split(config)
    mine = workplace.prepare(config, None, tmp_path / "ledgers.sqlite")
    try:
        for (_, part), persons in zip(mine.holders, split.persons, strict=True):
            assert len(part) == len(persons)
            assert part.targets.dim() == 2
            first = persons.rows[: persons.offsets[1]]
            assert part.targets[0, : len(first)].tolist() == split.train.labels[first].tolist()
    finally:
        mine.admission.close()


def test_nobody_is_in_training_and_test(digits):
    split = read_split(recipe(digits[4]))
    train, test = (set(part.column("patient").tolist()) for part in (split.train, split.test))
    assert train
    assert test
    assert not train & test
    assert np.array_equal(np.sort(np.concatenate(split.holder_tests)), np.arange(len(split.test)))
    where = [set(split.test.column("patient")[rows].tolist()) for rows in split.holder_tests]
    assert not where[0] & where[1] | where[0] & where[2] | where[1] & where[2]


@pytest.mark.parametrize("unit", ["person", "record"])
def test_a_person_column_that_is_not_there(digits, unit):
    with pytest.raises(
        DataError, match=r'^privacy.person is "ward": the data has no such column. Use one of: .*patient'
    ):
        read_split(recipe(digits[4], {"privacy.person": "ward", "privacy.unit": unit}))
