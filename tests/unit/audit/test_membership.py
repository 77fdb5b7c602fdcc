"""The membership attack on whole runs, with and without privacy."""

import json
import tempfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from scipy.stats import norm

from fedhead.common.config import changed, make_config
from fedhead.common.data.holdout import holdout_rows
from fedhead.common.data.persons import names_of
from fedhead.common.errors import InputError, RunError
from fedhead.common.planned import planned_noise
from fedhead.server.desk import declared_records
from fedhead.simulations.audit import membership as module
from fedhead.simulations.audit.membership import audit_membership, show_membership
from fedhead.simulations.audit.units import Units
from fedhead.simulations.federation import without_privacy
from fedhead.simulations.prepared import prepare


def random_labels(folder, records=100, features=150, **changes):
    """Few records, many features, labels that nothing explains: what a head learns of them it has by heart."""
    rng = np.random.default_rng(7)
    table = {
        "x": list(rng.standard_normal((records, features)).astype(np.float32)),
        "label": rng.choice(["a", "b"], records),
        "who": [f"p{number // 3}" for number in range(records)],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "noise.parquet")
    raw = {
        "task": {"labels": ["a", "b"]},
        "model": {"backbone": "module:torch.nn:Identity"},
        "data": {"source": "parquet:noise.parquet", "columns": {"vector": "x"}},
        "holders": {"count": 2},
        "privacy": {"epsilon": 1.0},
        "training": {"rounds": 30},
    }
    return changed(make_config(raw, base=folder), {key.replace("__", "."): value for key, value in changes.items()})


def test_privacy_is_what_stands_between_the_attack_and_the_members(tmp_path):
    private = random_labels(tmp_path, records=200, features=300, training__rounds=20)
    found = audit_membership(private, models=16)
    rate = found["rates"][1]
    assert rate["fpr"] == 0.01
    assert rate["low"] <= rate["ceiling"]
    assert rate["tpr"] < 0.05
    assert found["claim"] == {"epsilon": pytest.approx(1.0, abs=1e-3), "delta": 1e-5}
    assert [point[0] for point in found["ceiling"]] == [point[0] for point in found["roc"]]
    mu = 0.2678  # of epsilon 1 at delta 1e-5
    assert rate["ceiling"] == pytest.approx(norm.sf(norm.isf(0.01) - mu), rel=0.01)

    naked = audit_membership(without_privacy(private), models=16)
    worse = naked["rates"][1]
    assert worse["low"] > 0.2  # of all members found; 0.01 by guessing
    assert worse["low"] > 5 * rate["high"]
    assert naked["auc"] > 0.85 > 0.6 > found["auc"]
    assert worse["ceiling"] is naked["ceiling"] is naked["claim"] is None
    assert any("no ceiling" in note for note in naked["notes"])
    json.dumps([found, naked], allow_nan=False)


def test_too_few_strangers_state_no_rate(tmp_path, capsys):
    found = audit_membership(random_labels(tmp_path), models=4)
    for rate, needed in zip(found["rates"], ("10,000", "1,000"), strict=True):
        assert rate["tpr"] is rate["low"] is rate["high"] is None
        assert 0 < rate["ceiling"] < 1
        assert any(needed in note and "models = " in note for note in found["notes"])
    assert found["members"] + found["nonmembers"] <= 4 * 100
    show_membership(found)
    text = capsys.readouterr().out
    assert "—" in text
    assert "epsilon 1.00, delta 1e-5" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("units", "heads"), [(20, 128), (100, 128), (400, 55), (1000, 32), (4000, 32), (10**6, 32)], ids=str
)
def test_heads_by_default(units, heads):
    assert module._enough(units) == heads


def test_heads_are_trained_as_the_recipe_says_but_for_who_is_in(tmp_path, monkeypatch):
    config = random_labels(tmp_path, data__declared_records=None)
    seen = []

    def watched(prepared, one, *rest, **more):
        seen.append((prepared, one, result := module_federate(prepared, one, *rest, **more)))
        return result

    module_federate = module.federate
    monkeypatch.setattr(module, "federate", watched)
    audit_membership(config, models=4)
    whole = prepare(config, None)
    value, _ = declared_records(config, whole.split.units)
    noise = planned_noise(config, config.training.rounds)
    assert len({one.run.seed for _, one, _ in seen}) == 4  # or two heads would have the same noise
    chosen = []
    for prepared, one, result in seen:
        assert result.declared_records["value"] == value
        for row in result.privacy:
            assert row["epsilon"] <= 1.0
            assert [event["noise_multiplier"] for event in row["events"]] == [pytest.approx(noise)] * 30
        same = {"run.seed": 0, "run.evaluate_every": 1, "data.declared_records": 1}
        same |= {"privacy.epsilon": 1.0, "privacy.noise_multiplier": None}
        assert changed(one, same) == changed(config, same)
        assert prepared.train is seen[0][0].train
        for part, everything in zip(prepared.split.holders, whole.split.holders, strict=True):
            assert set(part) < set(everything)
        chosen.append(np.isin(np.arange(len(whole.train)), np.concatenate(prepared.split.holders)))
    assert 0.4 < np.mean(chosen) < 0.6
    assert np.abs(np.corrcoef(chosen)[np.triu_indices(4, 1)]).max() < 0.4


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    work, here, state = tmp_path / "work", tmp_path / "here", tmp_path / "state"
    for folder in (work, here, state):
        folder.mkdir()
    (tmp_path / "data").mkdir()
    config = random_labels(tmp_path / "data")
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    monkeypatch.chdir(here)
    told = []
    first = audit_membership(config, models=4, state=state, progress_listener=lambda *what: told.append(what))
    again = audit_membership(config, models=4, state=state)
    assert [what[1:3] for what in told if what[0] == "heads"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {what[0] for what in told} <= {"heads", "training features", "test features"}
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert list(work.iterdir()) == list(here.iterdir()) == []
    assert {path.name for path in state.iterdir()} <= {"features"}


def persons(folder, **changes):
    return random_labels(folder, privacy__unit="person", privacy__person="who", **changes)


def test_units_are_whole_persons(tmp_path):
    prepared = prepare(persons(tmp_path), None)
    units = Units(prepared)
    assert len(units) == prepared.split.units
    chosen = np.arange(len(units)) % 3 == 0
    part = units.only(chosen)
    names, start = names_of(part.split.train, "who"), 0
    for holder, (before, after) in enumerate(zip(prepared.split.persons, part.split.persons, strict=True)):
        mine = np.flatnonzero(chosen[start : start + len(before)])
        start += len(before)
        whole = [before.rows[before.offsets[i] : before.offsets[i + 1]].tolist() for i in mine]
        kept = [after.rows[a:b].tolist() for a, b in zip(after.offsets, after.offsets[1:], strict=False)]
        assert kept == whole
        assert all(len(set(names[rows])) == 1 for rows in kept)
        assert part.split.holders[holder].tolist() == after.rows.tolist() == [row for rows in kept for row in rows]
    values = np.arange(len(prepared.train), dtype=float)
    values[units.rows[units.unit == 1][0]] = np.nan
    values[units.rows[units.unit == 2]] = np.inf
    found = units.means(values)
    assert found[0] == pytest.approx(values[units.rows[units.unit == 0]].mean())
    assert found[1] == pytest.approx(values[units.rows[units.unit == 1][1:]].mean())
    assert np.isnan(found[2])


def test_units_that_are_kept_apart_for_counts_are_no_members_and_not_scored(tmp_path):
    config = random_labels(tmp_path, privacy__metrics={"every": 10, "noise_multiplier": 20.0, "fraction": 0.3})
    prepared = prepare(config, None)
    units = Units(prepared)
    kept = holdout_rows(prepared.split.train.digests(), 0.3)
    assert (units.apart == kept[units.rows]).all()
    found = audit_membership(config, models=4)
    assert found["members"] + found["nonmembers"] <= 4 * int((~units.apart).sum())
    assert found["claim"]["epsilon"] == pytest.approx(1.0, abs=1e-3)  # the counts are part of the claim


def test_a_holder_without_any_chosen_unit_still_takes_part(tmp_path):
    prepared = prepare(random_labels(tmp_path), None)
    units = Units(prepared)
    first = np.arange(len(units)) < len(prepared.split.holders[0])
    part = units.only(first)
    assert [len(rows) for rows in part.split.holders] == [first.sum(), 0]
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        config = changed(part.config, {"data.declared_records": 50})
        result = module.federate(replace(part, config=config), config, tmp_path / folder, "inprocess", None)
    assert len(result.privacy) == 2
    assert {row["holders"] for row in result.rounds} == {2}


@pytest.mark.parametrize(
    ("changes", "models", "said"),
    [
        ({}, 3, "--models is 3: it must be a whole number of at least 4"),
        ({}, True, "--models is True"),
        ({}, 8.0, "--models is 8.0"),
        ({}, "8", "--models is '8'"),
        ({"privacy__unit": "holder"}, 8, 'privacy.unit is "holder"'),
        ({"records": 12}, 8, "data.source has"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, models, said):
    with pytest.raises(InputError) as caught:
        audit_membership(random_labels(tmp_path, **changes), models=models)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_failure_names_no_folder_that_is_gone(tmp_path, monkeypatch):
    def fail(prepared, config, folder, *_, **__):
        raise RunError(f"it went wrong. See {folder}/holders.log.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "federate", fail)
    with pytest.raises(RunError, match="fedhead simulate") as caught:
        audit_membership(random_labels(tmp_path), models=4)
    assert str(tmp_path) not in str(caught.value)


def test_heads_that_diverge_are_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "_confidences", lambda prepared, *_: np.full(len(prepared.train), float("nan"), dtype=np.float64)
    )
    with pytest.raises(RunError, match="no finite outputs"):
        audit_membership(random_labels(tmp_path), models=4)


def test_confidences_are_scaled_probabilities_of_the_labels(tmp_path):
    prepared = prepare(random_labels(tmp_path), None)
    config = changed(prepared.config, {"training.rounds": 2, "data.declared_records": 50})
    module.federate(replace(prepared, config=config), config, tmp_path / "run", "inprocess", None)
    found = module._confidences(prepared, config, tmp_path / "run")
    from safetensors.torch import load_file

    head = load_file(tmp_path / "run" / "model" / "head.safetensors")
    weight, bias = (next(v for k, v in head.items() if k.endswith(end)).double() for end in ("weight", "bias"))
    values = prepared.train.features.batch(slice(0, len(prepared.train)))[0].double()
    if prepared.config.model.features.normalize:
        values = torch.nn.functional.normalize(values, dim=-1)
    own = (values @ weight.T + bias).softmax(1)[torch.arange(len(values)), prepared.train.targets].numpy()
    np.testing.assert_allclose(found, np.log(own / (1 - own)), atol=1e-5)


def test_the_rate_at_one_in_a_thousand_is_stated_from_ten_thousand_strangers(tmp_path):
    found = audit_membership(random_labels(tmp_path, records=2000, training__rounds=10), models=14)
    assert found["nonmembers"] >= 10_000
    assert all(rate["low"] <= rate["tpr"] <= rate["high"] for rate in found["rates"])
    assert all(rate["low"] <= rate["ceiling"] for rate in found["rates"])
    assert not any("not stated" in note for note in found["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "unit", "head"),
    [
        ("full-batch", "record", "mlp"),
        ("full-batch", "person", "linear"),
        ("poisson", "record", "linear"),
        ("poisson", "person", "mlp"),
    ],
)
def test_every_private_recipe_stays_under_its_ceiling(tmp_path, mechanism, unit, head):
    config = random_labels(
        tmp_path,
        records=900 if unit == "person" else 300,
        training__rounds=15,
        privacy__epsilon=4.0,
        privacy__mechanism=mechanism,
        privacy__sample_rate=0.2 if mechanism == "poisson" else None,
        privacy__unit=unit,
        privacy__person="who",
        model__head={"kind": "mlp", "hidden": [16]} if head == "mlp" else {"kind": "linear"},
    )
    found = audit_membership(config, models=11)
    rate = found["rates"][1]
    assert rate["tpr"] is not None
    assert rate["low"] <= rate["ceiling"] < 0.1
    assert found["auc"] < 0.7
