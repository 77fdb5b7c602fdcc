"""Simulated holders that are stepped together: the same run as one at a time, and never in a deployment."""

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedhead.client import app as client_app
from fedhead.client import together, workplace
from fedhead.client.training import Trainer
from fedhead.common.config import to_json
from fedhead.common.privacy.ledger import Denied, Ledger
from fedhead.simulations.simulate import simulate

MECHANISMS = {
    "full-batch": {},
    "poisson": {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.2, "training.local_steps": 4},
    "momentum and pull": {
        "training.optimizer.momentum": 0.5, "training.local_steps": 3,
        "strategy": {"kind": "fedprox", "proximal_mu": 0.2},
    },
}  # fmt: skip
SMALL = {"training.rounds": 3, "holders.count": 5}


def head_of(folder):
    state = load_file(folder / "model" / "head.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.fixture
def seen(monkeypatch):
    """What happens in a run, in order: ("reserve", n), ("together", names), ("alone",)."""
    found = []

    def watch(owner, name, note):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            found.append(note(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(Ledger, "reserve", lambda ledger, reservations, *_: ("reserve", len(reservations)))
    watch(together, "train_together", lambda _, members, plan: ("together", [member.key[0] for member in members]))
    watch(Trainer, "round", lambda *_: ("alone",))
    return found


NAMES = [f"holder-{number:05d}" for number in range(5)]


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_head_is_that_of_one_holder_at_a_time(name, tiny, tmp_path, seen):
    config = {**SMALL, **MECHANISMS[name]}
    fast = simulate(tiny(config), tmp_path / "fast", state=tmp_path / "one")
    assert seen == [("reserve", 5), ("together", NAMES)] * 3  # all is reserved before any noise is drawn
    seen.clear()
    exact = simulate(tiny({**config, "run.exact": True}), tmp_path / "exact", state=tmp_path / "two")
    assert seen == [("reserve", 5), *[("alone",)] * 5] * 3
    one, other = head_of(tmp_path / "fast"), head_of(tmp_path / "exact")
    assert float(one.norm()) > 0.1
    assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert [entry["events"] for entry in fast.privacy] == [entry["events"] for entry in exact.privacy]
    assert fast.privacy == exact.privacy


def test_a_fault_falls_back_to_one_at_a_time(tiny, tmp_path, monkeypatch):
    config = {**SMALL, **MECHANISMS["poisson"]}
    exact = simulate(tiny({**config, "run.exact": True}), tmp_path / "exact", state=tmp_path / "one")
    monkeypatch.setattr(together, "linear_softmax_clipped_sums", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    broken = simulate(tiny(config), tmp_path / "broken", state=tmp_path / "two")
    assert torch.equal(head_of(tmp_path / "exact"), head_of(tmp_path / "broken"))
    assert broken.privacy == exact.privacy
    log = (tmp_path / "broken" / "holders.log").read_text()
    assert log.count("trained one at a time") == 3  # once a round


def test_who_is_refused_is_left_out(tiny, tmp_path, monkeypatch, seen):
    real = Ledger.reserve

    def reserve(ledger, reservations, *rest):
        found = real(ledger, reservations, *rest)
        return [
            Denied("budget") if one.holder == NAMES[2] else had for one, had in zip(reservations, found, strict=True)
        ]

    monkeypatch.setattr(Ledger, "reserve", reserve)
    simulate(tiny({**SMALL, "training.rounds": 1}), tmp_path / "run")
    assert ("together", [*NAMES[:2], *NAMES[3:]]) in seen
    assert ("alone",) not in seen


def test_a_count_of_right_answers_is_of_the_head_as_it_arrived(tiny, tmp_path, seen):
    config = {**SMALL, "privacy.metrics": {"noise_multiplier": 5.0, "fraction": 0.3, "every": 1}}
    fast = simulate(tiny(config), tmp_path / "fast", state=tmp_path / "one")
    assert ("together", NAMES) in seen
    exact = simulate(tiny({**config, "run.exact": True}), tmp_path / "exact", state=tmp_path / "two")
    assert torch.allclose(head_of(tmp_path / "fast"), head_of(tmp_path / "exact"), rtol=0, atol=1e-6)
    assert fast.privacy == exact.privacy


@pytest.mark.parametrize("limits", ["", "allow_seeded_noise = true"], ids=["own noise", "seeded noise"])
def test_a_deployed_holder_never_comes_here(limits, deployed, monkeypatch, seen):
    def never(*_):
        pytest.fail("holders of a deployment are stepped together")

    holder = deployed(limits=limits)
    message = holder.message(holder.request())
    context = Context(
        run_id=1, node_id=2, node_config={"holder": str(holder.file)}, state=RecordDict(),
        run_config={"recipe": to_json(holder.config)},
    )  # fmt: skip
    monkeypatch.setattr(together.Together, "expect", never)
    client_app.expect([(message, context), (message, context)])  # as no deployed process does
    assert not holder.send(message).has_error()
    assert ("alone",) in seen
    assert not any(one[0] == "together" for one in seen)
    (place,) = workplace._WORKPLACES.values()
    assert not place.together._groups
