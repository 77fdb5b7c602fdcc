"""Poisson plans at a deployed holder: charged whole, held to their first round, whatever is asked, in any order."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedhead.client.persons import PersonRows
from fedhead.client.training import CHUNK, Trainer
from fedhead.common import protocol, refusals
from fedhead.common.privacy import lattice, noise
from fedhead.common.privacy.accounting import pld_epsilon
from fedhead.common.privacy.events import from_json
from fedhead.common.privacy.ledger import Ledger

POISSON = {"mechanism": "poisson", "sample_rate": 0.1, "epsilon": 1.0}
STEPS = st.fixed_dictionaries(
    {
        "run": st.sampled_from("ab"),
        "round": st.integers(1, 3),
        "noise_multiplier": st.sampled_from([1.5, 3.0]),
        "sample_rate": st.sampled_from([0.05, 0.2]),
        "local_steps": st.integers(1, 3),
        "plan_steps": st.sampled_from([2, 4]),
        "delta": st.sampled_from([1e-6, 4e-6, 2e-5]),
        "clipping_norm": st.sampled_from([0.3, 0.2]),
    }
)


@pytest.fixture
def made(deployed):
    """A maker of holders that spend all their budget on Poisson plans, each with a ledger of its own."""

    def make():
        return deployed(budget="poisson_share = 1.0", changes=POISSON)

    return make


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(STEPS, min_size=4, max_size=10))
def test_plans_are_charged_whole_and_kept_to(made, asked):
    holder, plans, used, replies = made(), {}, {}, {}
    for step in asked:
        reply = holder.ask(**step)
        if reply.has_error():
            assert reply.error.code in {
                refusals.INVALID_REQUEST, refusals.BEYOND_PLAN, refusals.BEYOND_BUDGET, refusals.STALE_ROUND,
                refusals.CHANGED_ROUND,
            }  # fmt: skip
            continue
        key, release = json.dumps(step, sort_keys=True), protocol.pack(reply.content)
        if key in replies:  # the same request: the same bytes, and nothing is used up
            assert release == replies[key]
            continue
        replies[key] = release
        plan = tuple(step[name] for name in ("noise_multiplier", "sample_rate", "clipping_norm", "plan_steps", "delta"))
        assert plans.setdefault(step["run"], plan) == plan
        used[step["run"]] = used.get(step["run"], 0) + step["local_steps"]
        assert used[step["run"]] <= step["plan_steps"]
    # what was admitted fits the budget by another accountant than the one that admits (PRV), a coarser grid above it
    cost = sum(pld_epsilon([(noise, rate, steps)], delta) for noise, rate, _, steps, delta in plans.values())
    assert cost <= 3.0 * 1.01
    assert sum(plan[-1] for plan in plans.values()) <= 1e-5 * (1 + 1e-12)
    with Ledger(holder.ledger) as ledger:
        ledger.verify()
        events = [from_json(one.event) for one in ledger.entries() if one.kind == "reserve"]
    assert sum(event.steps for event in events) == sum(used.values())
    holder.restart()


def test_plans_that_do_not_fit_are_refused(made):
    """The twin of the test above: each rule has a request that breaks it alone."""
    holder = made()
    good = {"noise_multiplier": 3.0, "plan_steps": 4, "local_steps": 2, "delta": 4e-6}
    assert not holder.ask(**good, run="another").has_error()
    assert not holder.ask(**good).has_error()
    code = {
        "another plan": holder.ask(**{**good, "round": 2, "plan_steps": 6}),
        "another norm": holder.ask(**{**good, "round": 2, "clipping_norm": 0.2}),
        "too many steps": holder.ask(**{**good, "round": 2, "local_steps": 3}),
        "no delta left": holder.ask(**{**good, "run": "b", "delta": 4e-6}),
    }
    found = {name: reply.error.code for name, reply in code.items()}
    assert found == {
        "another plan": refusals.BEYOND_PLAN, "another norm": refusals.BEYOND_PLAN,
        "too many steps": refusals.BEYOND_PLAN, "no delta left": refusals.BEYOND_BUDGET,
    }  # fmt: skip


def test_how_much_is_held_at_once_is_the_holders_own(deployed, monkeypatch):
    holder, plans = deployed(), []
    real = Trainer.round

    def watched(self, features, targets, plan, streams):
        plans.append(plan)
        return real(self, features, targets, plan, streams)

    monkeypatch.setattr(Trainer, "round", watched)
    assert not holder.ask(chunk=1).has_error()
    assert [plan.chunk for plan in plans] == [CHUNK]


def test_too_many_records_are_told_when_the_data_is_opened(deployed, monkeypatch):
    """Not by a round that fails: whether it does would show how many records there are."""
    rounds = []
    monkeypatch.setattr(Trainer, "round", lambda *args: rounds.append(args))
    monkeypatch.setattr(lattice, "MOST_RECORDS", 1000)
    holder = deployed()
    for chunk in (1, 100, 4096):
        reply = holder.ask(chunk=chunk)
        assert reply.error.code == refusals.NOT_READY
    assert rounds == []
    assert not holder.ledger.exists()


def test_samples_are_of_persons_where_they_are_the_unit(deployed, monkeypatch):
    """Each of 450 persons takes part or not, with all their records: the draw, and whose gradients are then summed."""
    asked, summed = [], []
    monkeypatch.setattr(noise, "bernoulli_sample", lambda number, rate: asked.append(number) or torch.tensor([3, 77]))
    usual = PersonRows.clipped_sum

    def clipped_sum(self, targets, index, norm):
        summed.append((self.lengths[index].tolist(), targets[index].tolist()))
        return usual(self, targets, index, norm)

    monkeypatch.setattr(PersonRows, "clipped_sum", clipped_sum)
    persons = {"unit": "person", "person": "anything", "records_per_person": 4}
    holder = deployed(budget="poisson_share = 1.0", changes={**POISSON, **persons})
    holder.give_persons()  # patient n has the records from 4 n on; the last one has a single record
    assert not holder.ask(noise_multiplier=3.0, plan_steps=2, local_steps=2, delta=1e-6).has_error()
    assert asked == [450, 450]
    labels = load_digits().target
    assert summed == [([4, 4], [labels[4 * n : 4 * n + 4].tolist() for n in (3, 77)])] * 2
