"""Whole runs under the unit `holder`: what is charged and written down, and what becomes of odd holders."""

import math

import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from safetensors.torch import load_file

from fedhead.client import app as client_app
from fedhead.common import protocol
from fedhead.common.privacy.events import GaussianEvent, from_json
from fedhead.common.privacy.ledger import Ledger
from fedhead.server.central import LEDGER
from fedhead.server.rounds import Rounds
from fedhead.simulations.audit.ledgers import audit_ledgers
from fedhead.simulations.simulate import simulate

HOLDERS = 30


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """The page of a run takes longer than these runs do, and has tests of its own."""
    monkeypatch.setattr("fedhead.simulations.report.write_report", lambda folder: None)


@pytest.fixture
def many(tiny):
    def make(changes=None):
        base = {
            "holders.count": HOLDERS, "privacy.unit": "holder", "privacy.epsilon": 8.0, "training.rounds": 6,
            "data.declared_records": 50, "run.evaluate_every": 2,
        }  # fmt: skip
        return tiny({**base, **(changes or {})})

    return make


def head_of(folder):
    state = load_file(folder / "model" / "head.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def events_of(ledger, holder):
    return [from_json(row.event) for row in ledger.entries(holder) if row.kind == "reserve"]


def test_ledger_result_and_an_independent_count_agree(many, tmp_path):
    result = simulate(many(), tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / LEDGER, create=False, read_only=True)
    assert ledger.verify() == HOLDERS * (1 + 2 * 6)
    summaries = {summary.holder: summary for summary in ledger.summary()}
    assert sorted(summaries) == [entry["holder"] for entry in result.privacy]
    assert len(summaries) == HOLDERS
    for entry in result.privacy:
        assert (entry["unit"], entry["adjacency"]) == ("holder", "add or remove one holder")
        events = events_of(ledger, entry["holder"])
        assert [event.to_row(number) for number, event in enumerate(events, 1)] == entry["events"]
        summary = summaries[entry["holder"]]
        assert summary.units == ("holder",)
        assert summary.spent.epsilon == pytest.approx(entry["epsilon"], rel=1e-9)
        assert {run.released for run in summary.runs} == {6}
    one = events[0]
    assert isinstance(one, GaussianEvent)
    assert one.steps == 1
    composed = privacy_loss_distribution.from_gaussian_mechanism(one.noise_multiplier).self_compose(6)
    assert result.privacy[0]["epsilon"] == pytest.approx(composed.get_epsilon_for_delta(1e-5), rel=1e-3)
    assert 7.99 < result.privacy[0]["epsilon"] <= 8.0
    assert any("the server adds the noise" in note and "trusted" in note for note in result.notes)
    assert [row["epsilon"] for row in result.rounds] == sorted(row["epsilon"] for row in result.rounds)
    ledger.close()


def test_an_audit_says_which_ledger_has_the_figure(many, tmp_path):
    simulate(many({"training.rounds": 2}), tmp_path / "run")
    holders, server = (audit_ledgers([tmp_path / "run" / name]) for name in ("holders", LEDGER))
    assert any("is in its server-ledger.sqlite" in note for note in holders["notes"])
    assert not any("server-ledger.sqlite" in note for note in server["notes"])
    assert any("the figure trusts it" in note for note in server["notes"])


def test_defaults_learn(many, tmp_path):
    result = simulate(many({"training.rounds": 30}), tmp_path / "run")
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.3


def test_cohorts_pay_for_the_rounds_in_which_they_were_asked(many, tmp_path):
    result = simulate(many({"holders.per_round": 10}), tmp_path / "run")
    assert [len(entry["events"]) for entry in result.privacy] == [2] * HOLDERS
    assert max(entry["epsilon"] for entry in result.privacy) == pytest.approx(8.0, rel=1e-6)
    assert [row["holders"] for row in result.rounds] == [10] * 6


@pytest.mark.parametrize("kind", ["fedavg", "fedadam", "fedprox"])
def test_a_server_optimizer_sees_one_update(many, tmp_path, kind):
    changes = {"strategy": {"kind": kind}, "privacy.epsilon": None, "privacy.noise_multiplier": 0.01}
    result = simulate(many({**changes, "training.rounds": 20}), tmp_path / "run")
    assert result.final["accuracy"] > result.majority["accuracy"] + 0.2


def test_a_step_of_fedavg_is_the_clipped_sum_over_the_declared_cohort(many, tmp_path):
    changes = {"strategy": {"kind": "fedavg"}, "privacy.epsilon": None, "privacy.noise_multiplier": 1e-9}
    simulate(many({**changes, "training.rounds": 1, "privacy.clipping_norm": 0.01}), tmp_path / "run")
    norm = float(head_of(tmp_path / "run").norm())
    assert 0.3 * 0.01 < norm <= 0.01  # a mean of 30 updates of norm 0.01 each, which point nearly the same way


def test_odd_holders_count_as_zero_and_are_charged(many, tmp_path, monkeypatch):
    """One that fails and one whose update is NaN: the others' head is theirs over the same divisor."""
    real = client_app.answer

    def odd(workplace, name, *rest):
        if name.endswith("3"):
            raise RuntimeError("broken")
        content, mark = real(workplace, name, *rest)
        if name.endswith("7"):
            state = {key: value * math.nan for key, value in workplace.trainable.trained().items()}
            content[protocol.ARRAYS] = protocol.to_arrays(state)
        return content, mark

    monkeypatch.setattr(client_app, "answer", odd)
    result = simulate(many(), tmp_path / "run")
    for row in result.rounds:
        assert row["holders"] == HOLDERS - 3
        # that an update is not finite may be due to one record: the result says nothing of it
        assert sorted(item["holder"] for item in row["refused"]) == [f"holder-{i:05d}" for i in (3, 13, 23)]
    assert [len(entry["events"]) for entry in result.privacy] == [6] * HOLDERS
    assert {entry["epsilon"] for entry in result.privacy} == {result.privacy[0]["epsilon"]}
    assert head_of(tmp_path / "run").isfinite().all()


class Stop(Exception):
    pass


def test_a_resumed_run_spends_nothing_twice_and_ends_with_the_same_bits(many, tmp_path):
    def stop(stage, done, total, note):
        if stage == "rounds" and done == 5:
            raise Stop

    config = many({"run.exact": True})
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(Stop):
        simulate(config, tmp_path / "broken", progress_listener=stop)
    resumed = simulate(config, tmp_path / "broken", resume=True)
    assert torch.equal(head_of(tmp_path / "whole"), head_of(tmp_path / "broken"))
    assert [entry["epsilon"] for entry in resumed.privacy] == [entry["epsilon"] for entry in whole.privacy]
    ledger = Ledger(tmp_path / "broken" / LEDGER, create=False, read_only=True)
    assert len(events_of(ledger, "holder-00000")) == 6
    ledger.close()


def test_a_run_that_divides_by_its_replies_is_told_apart(many, tmp_path, monkeypatch):
    """The wrong twin of the whole path: with half of the holders silent, the head is twice as far."""
    changes = {"strategy": {"kind": "fedavg"}, "privacy.epsilon": None, "privacy.noise_multiplier": 1e-9}
    config = many({**changes, "training.rounds": 1})
    real = client_app.answer

    def half(workplace, name, *rest):
        if int(name[-2:]) % 2:
            raise RuntimeError("broken")
        return real(workplace, name, *rest)

    monkeypatch.setattr(client_app, "answer", half)
    simulate(config, tmp_path / "right")
    init = Rounds.__init__

    def twin(self, *arguments, **named):
        init(self, *arguments, **named)
        self.__class__ = Twin

    class Twin(Rounds):
        def __setattr__(self, name, value):
            if name == "central":
                value.cohort = HOLDERS // 2
            super().__setattr__(name, value)

    monkeypatch.setattr(Rounds, "__init__", twin)
    simulate(config, tmp_path / "wrong")
    right, wrong = head_of(tmp_path / "right"), head_of(tmp_path / "wrong")
    assert torch.allclose(wrong, 2 * right, atol=1e-6)
    assert float(right.norm()) > 0.05
