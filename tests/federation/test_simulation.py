"""A whole federation in one process: what must not depend on the split or the order, and what is counted."""

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedhead.common.config import RunConfig
from fedhead.common.config.strategies import Strategy
from fedhead.common.config.tables import tables_of
from fedhead.common.errors import InputError, RunError
from fedhead.common.models.saved import load_model
from fedhead.common.preparation import read_split
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent, PoissonEvent
from fedhead.common.results import Result
from fedhead.server.strategies import STRATEGIES
from fedhead.simulations.engine import InProcessGrid
from fedhead.simulations.simulate import simulate, simulate_seeds


def head_of(folder: Path) -> torch.Tensor:
    state = load_file(folder / "model" / "head.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


NETS = """
import torch
from torch import nn


def layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 8))
"""


def assert_loaded_model_answers(config: RunConfig, result: Result, folder: Path) -> None:
    """The result's figures, the holders' too, are those of the saved model on the test records, read anew."""
    split = read_split(config)
    model = load_model(folder / "model", allow_modules=True)
    assert result.model["digest"] == model.backbone.digest
    labels, _ = model.predict(split.test.inputs(slice(None)))
    right = np.array([int(label) for label in labels]) == split.test.labels
    assert result.final["accuracy"] == pytest.approx(right.mean())
    for holder, rows, own in zip(result.holders, split.holder_tests, split.holders, strict=True):
        assert holder["records"] == len(own)
        assert holder["metrics"]["accuracy"] == pytest.approx(right[rows].mean())
    assert len({holder["metrics"]["accuracy"] for holder in result.holders}) > 1


def test_result_folder_is_complete_and_readable(tiny, tmp_path):
    config = tiny({"run.baseline": True})
    result = simulate(config, tmp_path / "run", name="tiny")
    assert Result.read(tmp_path / "run") == result
    for name in ("result.json", "report.html", "model/head.safetensors", "model/model.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert len(result.rounds) == 8
    assert result.baseline["accuracy"] > result.majority["accuracy"] + 0.3
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.2
    assert 0.5 < result.final["auc_roc"] <= 1
    assert {holder["name"] for holder in result.holders} == {entry["holder"] for entry in result.privacy}
    assert sum(holder["records"] for holder in result.holders) + 0 > 1300
    assert_loaded_model_answers(config, result, tmp_path / "run")
    assert set(result.timing) == {
        "load_seconds", "features_seconds", "training_seconds", "server_seconds", "total_seconds",
    }  # fmt: skip
    assert result.rounds[-1]["metrics"]["accuracy"] == result.final["accuracy"]
    for row in result.rounds:
        assert row["holders"] == 5
        assert row["refused"] == []
        assert row["bytes_up"] >= 5 * 4 * result.model["trained_parameters"]


def test_what_is_trained_behind_a_cut_is_saved_and_loaded(tiny, tmp_path, monkeypatch):
    (tmp_path / "layers_of_simulation.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny({"model.backbone": "module:layers_of_simulation:layers", "model.unfreeze": 2, "training.rounds": 3})
    result = simulate(config, tmp_path / "run")
    assert result.model["trained_parameters"] == 12 * 8 + 8 + 8 * 10 + 10
    assert_loaded_model_answers(config, result, tmp_path / "run")
    backbone = load_model(tmp_path / "run" / "model", allow_modules=True).backbone
    untrained = {f"tail.{name}": value for name, value in backbone.tail.named_parameters()}
    state = load_file(tmp_path / "run" / "model" / "head.safetensors")
    assert set(untrained) < set(state)
    assert all(not torch.equal(state[name], value) for name, value in untrained.items())


@pytest.mark.parametrize("mechanism", ["none", "full-batch"])
def test_without_noise_the_split_does_not_matter(tiny, tmp_path, mechanism):
    """With one full-batch step a round the aggregate is the sum over all records, however they are spread."""
    changes = {"privacy.mechanism": mechanism, "privacy.epsilon": None}
    if mechanism == "full-batch":
        changes["privacy.noise_multiplier"] = 1e-9  # clipped, but as good as without noise
        changes["training.optimizer.learning_rate"] = 10.0
        changes["training.optimizer.kind"] = "sgd"
    heads = []
    for name, partition in (("iid", {"kind": "iid"}), ("skewed", {"kind": "dirichlet", "alpha": 0.1})):
        simulate(tiny({**changes, "holders.partition": partition}), tmp_path / name)
        heads.append(head_of(tmp_path / name))
    scale = heads[0].abs().max()
    assert scale > 0.1
    assert (heads[0] - heads[1]).abs().max() < 1e-5 * scale


def test_many_local_steps_do_depend_on_the_split(tiny, tmp_path):
    """The twin of the test above: local steps drift apart, so that the comparison can fail."""
    heads = []
    for name, partition in (("iid", {"kind": "iid"}), ("skewed", {"kind": "dirichlet", "alpha": 0.1})):
        config = tiny(
            {
                "privacy.mechanism": "none", "privacy.epsilon": None,
                "training.local_steps": 5, "holders.partition": partition,
            }
        )  # fmt: skip
        simulate(config, tmp_path / name)
        heads.append(head_of(tmp_path / name))
    assert (heads[0] - heads[1]).abs().max() > 1e-3 * heads[0].abs().max()


def test_same_seed_same_bits_other_seed_other_head(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(tiny({"run.seed": seed, "run.exact": True}), tmp_path / name)
    assert torch.equal(head_of(tmp_path / "a"), head_of(tmp_path / "b"))
    assert not torch.equal(head_of(tmp_path / "a"), head_of(tmp_path / "c"))


def test_the_order_of_replies_does_not_matter(tiny, tmp_path, monkeypatch):
    """Bit for bit: sums of floats depend on the order, so replies are put into that of the holders' names."""
    config = tiny({"run.exact": True, "training.rounds": 2, "holders.partition": {"kind": "dirichlet", "alpha": 0.3}})
    simulate(config, tmp_path / "a")
    pull = InProcessGrid.pull_messages
    monkeypatch.setattr(InProcessGrid, "pull_messages", lambda grid, ids: list(pull(grid, ids))[::-1])
    simulate(config, tmp_path / "b")
    assert torch.equal(head_of(tmp_path / "a"), head_of(tmp_path / "b"))


@pytest.mark.parametrize("target", [0.5, 3.0])
def test_epsilon_is_composed_over_all_rounds(tiny, tmp_path, target):
    result = simulate(tiny({"privacy.epsilon": target, "training.local_steps": 3}), tmp_path / "run")
    for entry in result.privacy:
        assert len(entry["events"]) == 8
        noise = entry["events"][0]["noise_multiplier"]
        whole = epsilon([GaussianEvent(noise, 0.3, 3 * 8)], 1e-5).epsilon
        one = epsilon([GaussianEvent(noise, 0.3, 3)], 1e-5).epsilon
        assert entry["epsilon"] == pytest.approx(whole, rel=1e-9)
        assert entry["epsilon"] <= target
        assert entry["epsilon"] > 0.99 * target
        assert one < 0.6 * whole  # one round's figure, which others print, is far off
    path = [row["epsilon"] for row in result.rounds]
    assert path == sorted(path)
    assert path[-1] == result.privacy[0]["epsilon"]


def test_poisson_run_is_planned_and_counted(tiny, tmp_path):
    config = tiny({"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "training.local_steps": 4})
    result = simulate(config, tmp_path / "run")
    entry = result.privacy[0]
    noise = entry["events"][0]["noise_multiplier"]
    assert entry["epsilon"] == pytest.approx(epsilon([PoissonEvent(noise, 0.3, 0.1, 32)], 1e-5).epsilon, rel=1e-6)
    assert 2.9 < entry["epsilon"] <= 3.0
    assert result.final["accuracy"] > result.majority["accuracy"]


def test_cohorts_pay_for_the_rounds_they_took_part_in(tiny, tmp_path):
    result = simulate(tiny({"holders.count": 6, "holders.per_round": 2, "training.rounds": 9}), tmp_path / "run")
    assert [row["holders"] for row in result.rounds] == [2] * 9
    assert [len(entry["events"]) for entry in result.privacy] == [3] * 6
    assert max(entry["epsilon"] for entry in result.privacy) == pytest.approx(3.0, rel=2e-3)


def kinds() -> list[str]:
    return sorted(get_args(kind.model_fields["kind"].annotation)[0] for kind in tables_of(Strategy))


def test_every_strategy_has_settings_and_a_row():
    assert sorted(STRATEGIES) == kinds()


@pytest.mark.parametrize("kind", sorted(STRATEGIES))
def test_every_strategy_learns(tiny, tmp_path, kind):
    changes = {"strategy": {"kind": kind}, "training.rounds": 12, "privacy": {"mechanism": "none"}}
    if kind == "fedprox":
        changes["strategy"]["proximal_mu"] = 0.1
        changes["training.local_steps"] = 2
    result = simulate(tiny(changes), tmp_path / "run")
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.3, result.final
    assert {entry["epsilon"] for entry in result.privacy} == {float("inf")}


def test_uniform_weights_equal_declared_ones_when_all_declare_the_same(tiny, tmp_path):
    for weights in ("declared", "uniform"):
        simulate(tiny({"strategy": {"kind": "fedavgm", "weights": weights}}), tmp_path / weights)
    assert torch.allclose(head_of(tmp_path / "declared"), head_of(tmp_path / "uniform"), atol=1e-6)


def test_seeds_give_mean_and_deviation(tiny, tmp_path):
    summary = simulate_seeds(tiny(), 3, tmp_path / "runs")
    values = [Result.read(tmp_path / "runs" / f"seed-{seed}").final["accuracy"] for seed in range(3)]
    found = summary["metrics"]["accuracy"]
    assert found["values"] == values
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert json.loads((tmp_path / "runs" / "seeds.json").read_text())["metrics"] == summary["metrics"]


def test_seeds_without_privacy_are_json_that_everybody_reads(tiny, tmp_path):
    """JSON has no Infinity: some readers refuse it, others take it for a large number."""
    summary = simulate_seeds(tiny({"privacy": {"mechanism": "none"}}), 1, tmp_path / "runs")
    assert summary["privacy"][0]["epsilon"] == math.inf
    text = (tmp_path / "runs" / "seeds.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["privacy"][0]["epsilon"] == "inf"


def test_seeds_that_have_finished_stay_when_a_later_one_is_refused(tiny, tmp_path, caplog):
    """Their budget is spent: the holders admit one run here, and not a second."""
    config = tiny({"privacy.epsilon": 1.0, "holders.budget": {"epsilon": 1.2}})
    with pytest.raises(RunError, match="budget"):
        simulate_seeds(config, 3, tmp_path / "runs", state=tmp_path / "state")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["holders.log", "seed-0"]
    assert Result.read(tmp_path / "runs" / "seed-0").final
    assert (tmp_path / "runs" / "seed-0" / "report.html").exists()
    assert f"kept in {tmp_path / 'runs'}: seed-0. For other seeds" in caplog.text
    for again in (lambda: simulate_seeds(config, 1, tmp_path / "runs"), lambda: simulate(config, tmp_path / "runs")):
        with pytest.raises(InputError, match="already holds a run"):  # it would write over the one that is there
            again()


def test_seeds_that_have_finished_stay_after_a_stop(tiny, tmp_path, caplog):
    config = tiny({"run.seed": 9})
    done = []

    def listen(stage, round, rounds, note):
        done.append(stage == "rounds" and round == rounds)
        if sum(done) == 2 and not done[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_seeds(config, 4, tmp_path / "runs", progress_listener=listen)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["seed-10", "seed-9"]
    assert ": seed-9, seed-10. For" in caplog.text


def test_declared_records_default_is_marked(tiny, tmp_path):
    result = simulate(tiny({"data.declared_records": None}), tmp_path / "run")
    assert result.declared_records["origin"] == "simulated data"
    assert any("declared_records" in note for note in result.notes)


def test_mlp_head_and_adam(tiny, tmp_path):
    config = tiny(
        {
            "model.head": {"kind": "mlp", "hidden": [32], "dropout": 0.1},
            "training.optimizer": {"kind": "adam", "learning_rate": 0.02},
            "training.rounds": 20, "privacy": {"noise_multiplier": 0.5}, "strategy": {"kind": "fedavg"},
        }
    )  # fmt: skip
    result = simulate(config, tmp_path / "run")
    assert result.model["trained_parameters"] == 64 * 32 + 32 + 32 * 10 + 10
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.2
