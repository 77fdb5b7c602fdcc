"""The unit `holder`: one noised update in place of all, charged before its noise is drawn."""

import math

import pytest
import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedhead.common import protocol
from fedhead.common.config import changed, make_config
from fedhead.common.errors import RunError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent, from_json
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.privacy.terms import Terms
from fedhead.server import central as module
from fedhead.server.central import DOMAIN, Central, central_of
from fedhead.server.requests import make_plan

BASE = {
    "task": {"labels": ["a", "b"]},
    "model": {"backbone": "torchvision:resnet18"},
    "data": {"source": "csv:x.csv"},
    "holders": {"count": 4},
    "privacy": {"unit": "holder", "epsilon": 2.0},
    "training": {"rounds": 10},
}
NAMES = [f"holder-{i:05d}" for i in range(4)]
SENT = {"head.weight": torch.linspace(-1, 1, 6).view(2, 3), "head.bias": torch.tensor([0.5, -0.5])}


@pytest.fixture(autouse=True)
def a_task_of_flowers(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def config(**changes):
    return changed(make_config(BASE), {key.replace("__", "."): value for key, value in changes.items()})


def request(number=1, **changes):
    return make_plan(config(**changes), "run", "0" * 64, 100, 10).request(number)


def reply(update, like=SENT):
    """A holder's reply: the sent head plus an update, given as one number a parameter tensor."""
    state = {name: value + part for (name, value), part in zip(like.items(), update, strict=True)}
    content = {protocol.ARRAYS: protocol.to_arrays(state), protocol.METRICS: MetricRecord({protocol.WEIGHT: 100})}
    return Message(RecordDict(content), 1, MessageType.TRAIN)


def moved(central, replies, number=1, sent=SENT, asked=NAMES):
    """What the one reply adds to the sent head, flat."""
    found = central.combine(request(number), asked, protocol.to_arrays(sent), replies)
    assert found.content[protocol.METRICS][protocol.WEIGHT] == 1
    arrays = protocol.from_arrays(found.content[protocol.ARRAYS], sent)
    return torch.cat([(arrays[name] - sent[name]).flatten() for name in sent])


def silent(norm=1.0, cohort=4, **more):
    return Central(1e-9, norm, cohort, 0, **more)


def flat(*parts):
    return torch.cat([torch.full((value.numel(),), float(p)) for p, value in zip(parts, SENT.values(), strict=True)])


def test_updates_are_clipped_whole_and_divided_by_the_declared_cohort():
    small, large = (0.1, -0.1), (3.0, 4.0)
    length = math.sqrt(6 * 9 + 2 * 16)
    found = moved(silent(), [reply(small), reply(large)])
    assert torch.allclose(found, (flat(*small) + flat(*large) / length) / 4, atol=1e-6)
    # twins: by the number of replies, and each tensor by itself
    assert not torch.allclose(found, (flat(*small) + flat(*large) / length) / 2, atol=1e-3)
    assert not torch.allclose(found, (flat(*small) + flat(3 / math.sqrt(54), 4 / math.sqrt(32))) / 4, atol=1e-3)


def test_a_holder_without_a_reply_counts_as_an_update_of_zero():
    assert torch.equal(moved(silent(), [reply((0.1, 0.2))]), moved(silent(), [reply((0.1, 0.2)), reply((0, 0))]))
    assert torch.allclose(moved(silent(), []), torch.zeros(8), atol=1e-7)


@pytest.mark.parametrize("odd", [(math.nan, 0.0), (0.0, math.inf), (-math.inf, 1.0)])
def test_an_update_that_is_not_finite_contributes_nothing(odd):
    with_odd = moved(silent(), [reply((0.1, 0.2)), reply(odd)])
    assert torch.equal(with_odd, moved(silent(), [reply((0.1, 0.2))]))


def test_a_huge_update_contributes_the_clipping_norm():
    found = moved(silent(norm=0.5), [reply((3e38, -3e38))])
    assert float(found.norm()) == pytest.approx(0.5 / 4, rel=1e-4)


def test_declared_counts_of_records_have_no_say():
    first, second = reply((0.1, 0.2)), reply((0.3, 0.1))
    protocol.set_weight(second, 10_000)
    found = moved(silent(), [first, second])
    assert torch.allclose(found, (flat(0.1, 0.2) + flat(0.3, 0.1)) / 4, atol=1e-6)


@pytest.mark.parametrize("seed", [7, None])
def test_noise_has_the_planned_size_once_for_all_replies(seed):
    big = {"w": torch.zeros(200, 100)}
    central = Central(noise_multiplier=5.0, clipping_norm=0.2, cohort=4, seed=seed)
    for replies in ([], [reply((0.0,), big)] * 3):
        noise = moved(central, replies, sent=big) * 4
        assert float(noise.mean()) == pytest.approx(0, abs=5 / math.sqrt(20_000))
        # 20,000 draws: the deviation itself deviates by half a percent
        assert float(noise.std()) == pytest.approx(1.0, rel=0.03)


def test_seeded_noise_is_keyed_by_round_and_that_of_the_system_is_always_new():
    seeded = Central(5.0, 0.2, 4, seed=7)
    assert torch.equal(moved(seeded, []), moved(seeded, []))
    assert not torch.equal(moved(seeded, []), moved(seeded, [], number=2))
    assert not torch.equal(moved(seeded, []), moved(Central(5.0, 0.2, 4, seed=8), []))
    system = Central(5.0, 0.2, 4, seed=None)
    assert not torch.equal(moved(system, []), moved(system, []))


def test_every_holder_that_was_asked_is_charged_whether_it_answered_or_not(tmp_path):
    central = central_of(config(), 7.5, NAMES, tmp_path, simulated=True)
    moved(central, [reply((0.1, 0.2))])
    moved(central, [], number=2, asked=NAMES[:2])
    central.close()
    ledger = Ledger(tmp_path / module.LEDGER, create=False)
    ledger.verify()
    for number, name in enumerate(NAMES):
        rows = [row for row in ledger.entries(name) if row.kind == "reserve"]
        assert [row.round for row in rows] == ([1, 2] if number < 2 else [1])
        assert {from_json(row.event) for row in rows} == {GaussianEvent(7.5, 0.3, 1)}
        assert {(row.unit, row.domain) for row in rows} == {("holder", DOMAIN)}
        assert sum(row.kind == "release" for row in ledger.entries(name)) == len(rows)
    ledger.close()


def test_no_noise_is_drawn_before_the_round_is_charged(tmp_path, monkeypatch):
    """The ledger holds each holder to the recipe's epsilon: the round beyond it is refused, and nothing is drawn."""
    noise = make_plan(config(), "run", "0" * 64, 100, 10).noise_multiplier
    ledger = Ledger(tmp_path / "l.sqlite")
    for name in NAMES:
        ledger.declare(name, DOMAIN, Terms(2.0, 1e-5))
    central = Central(noise, 0.3, 4, None, ledger)
    order, real = [], ledger.reserve
    monkeypatch.setattr(ledger, "reserve", lambda *given: order.append("reserve") or real(*given))

    class Streams:
        source = "test"

        def noise(self, step):
            order.append("noise")
            return self

        def add(self, total, **_):
            return total

    monkeypatch.setattr(module, "system_streams", Streams)
    for number in range(1, 11):
        moved(central, [], number=number)
    assert order == ["reserve", "noise"] * 10
    with pytest.raises(RunError, match=r"round 11 is refused by the server's own ledger \(budget\)"):
        moved(central, [], number=11)
    assert order == ["reserve", "noise"] * 10 + ["reserve"]


def test_a_repeated_round_is_one_release_from_a_seed_and_the_kept_one_from_the_system(tmp_path):
    for seed, simulated in ((7, True), (None, False)):
        folder = tmp_path / str(seed)
        central = central_of(
            config(privacy__epsilon=None, privacy__noise_multiplier=5.0), 5.0, NAMES, folder, simulated
        )
        moved(central, [], number=1)
        first = moved(central, [], number=2)
        central.close()  # as if the process had ended before its checkpoint
        central = central_of(
            config(privacy__epsilon=None, privacy__noise_multiplier=5.0), 5.0, NAMES, folder, simulated
        )
        assert torch.equal(moved(central, [], number=2), first)
        if simulated:  # a round before the last one is repeated when a run goes on from its checkpoint
            moved(central, [], number=1)
        else:
            with pytest.raises(RunError, match="stale"):
                moved(central, [], number=1)
        (summary,) = central.ledger.summary(NAMES[0])
        assert summary.totals.mu_squared == pytest.approx(2 / 25)
        central.close()


def test_the_plan_is_for_rounds_and_never_for_local_steps():
    for steps in (1, 20):
        plan = make_plan(config(training__local_steps=steps), "r", "b", 100, 10)
        spent = epsilon([GaussianEvent(plan.noise_multiplier, 0.3, 1)] * 10, 1e-5).epsilon
        assert 0.9999 * 2.0 < spent <= 2.0
        asked = plan.request(1)
        assert (asked.mechanism, asked.unit, asked.plan_steps, asked.local_steps) == ("none", "holder", 10, steps)
        assert asked.noise_multiplier == plan.noise_multiplier  # what the server promises


def test_the_default_rate_is_in_clipping_norms_and_no_more_than_is_stable():
    assert request(privacy__clipping_norm=0.1).learning_rate == pytest.approx(3.0)
    assert request(privacy__clipping_norm=0.1, training__local_steps=10).learning_rate == pytest.approx(0.3)
    assert request(privacy__clipping_norm=10.0).learning_rate == pytest.approx(5.0)
    assert request(training__optimizer={"kind": "sgd", "learning_rate": 0.7}).learning_rate == pytest.approx(0.7)


@pytest.mark.parametrize(
    "changes", [{"privacy__unit": "record"}, {"privacy__mechanism": "none", "privacy__epsilon": None}]
)
def test_other_units_and_runs_without_privacy_have_no_central_noise(tmp_path, changes):
    assert central_of(config(**changes), 1.0, NAMES, tmp_path, simulated=True) is None
    assert not list(tmp_path.iterdir())
