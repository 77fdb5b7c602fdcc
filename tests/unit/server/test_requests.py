"""From a recipe to requests: noise that is planned for all rounds, a learning rate from public numbers."""

import pytest

from fedhead.common.config import changed, make_config
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent, PoissonEvent
from fedhead.server.requests import MOST_STEP, learning_rate, make_plan, schedule_factor

BASE = {
    "task": {"labels": ["a", "b"]},
    "model": {"backbone": "torchvision:resnet18"},
    "data": {"source": "csv:x.csv"},
    "privacy": {"epsilon": 2.0},
}


def config(**changes):
    return changed(make_config(BASE), {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("rounds", [1, 7, 60])
@pytest.mark.parametrize("steps", [1, 5])
def test_noise_spends_at_most_epsilon_over_all_rounds_and_not_much_less(rounds, steps):
    plan = make_plan(config(training__rounds=rounds, training__local_steps=steps), "r", "b", 100, rounds)
    spent = epsilon([GaussianEvent(plan.noise_multiplier, 0.3, rounds * steps)], 1e-5).epsilon
    assert 0.995 * 2.0 < spent <= 2.0
    twin = epsilon([GaussianEvent(plan.noise_multiplier * 0.9, 0.3, rounds * steps)], 1e-5).epsilon
    assert twin > 2.0


def test_poisson_noise_spends_at_most_epsilon():
    poisson = config(privacy__mechanism="poisson", privacy__sample_rate=0.1, training__rounds=20)
    plan = make_plan(poisson, "r", "b", 100, 20)
    spent = epsilon([PoissonEvent(plan.noise_multiplier, 0.3, 0.1, 20)], 1e-5).epsilon
    assert 0.98 * 2.0 < spent <= 2.0


def test_given_noise_is_taken_as_it_is():
    given = config(privacy__epsilon=None, privacy__noise_multiplier=1.7)
    assert make_plan(given, "r", "b", 100, 60).noise_multiplier == 1.7


def test_no_privacy_has_no_noise():
    none = config(privacy__epsilon=None, privacy__mechanism="none")
    assert make_plan(none, "r", "b", 100, 60).noise_multiplier == 0.0


def test_default_rate_counts_on_public_numbers_only():
    noisy = learning_rate(config(), 30.0, 500)
    assert noisy == pytest.approx(0.25 / (30.0 / (500 * 10**0.5)) * 0.1 / 0.3)
    assert learning_rate(config(), 60.0, 500) == pytest.approx(noisy / 2)  # twice the noise, half the step
    assert learning_rate(config(privacy__clipping_norm=0.6), 30.0, 500) == pytest.approx(noisy / 2)
    assert learning_rate(config(), 1e-9, 500) == pytest.approx(MOST_STEP * 1.9 / 0.3)  # no more than is stable
    assert learning_rate(config(model__head={"kind": "mlp"}), 30.0, 500) == pytest.approx(noisy * 0.3)
    assert learning_rate(config(model__unfreeze=1), 30.0, 500) == pytest.approx(noisy * 0.03)
    assert learning_rate(config(training__optimizer={"kind": "sgd", "learning_rate": 7.0}), 30.0, 500) == 7.0


def test_schedules():
    for kind, expected in (("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])):
        one = config(training__rounds=4, training__schedule={"kind": kind})
        assert [schedule_factor(one, n) for n in range(1, 5)] == pytest.approx(expected)
    cosine = config(training__rounds=10, training__schedule={"kind": "cosine", "warmup": 2, "floor": 0.1})
    factors = [schedule_factor(cosine, n) for n in range(1, 11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert min(factors[2:]) >= 0.1
