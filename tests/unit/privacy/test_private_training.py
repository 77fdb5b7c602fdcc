"""One round at one holder: events, empty holders, divisors, pulls, state between rounds, broken records."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, Adam, AdamW, TaskSettings
from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.events import GaussianEvent, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.noise import TorchNoise, simulation_streams
from fedhead.common.privacy.optimizers import PrivateOptimizer, make_optimizer
from fedhead.common.tasks.classification import Classification

N, D, K = 30, 6, 3
TASK = Classification(TaskSettings(labels=list("abc")))
PATHS = ["closed-form", "ghost", "hooks"]
STREAMS = simulation_streams(0, "holder", 1)


def records(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return FeatureSet(torch.randn(n, D, generator=g)), torch.randint(K, (n,), generator=g)


def linear(normalize=True):
    torch.manual_seed(1)
    return Trainable(None, normalize, nn.Linear(D, K))


def plan(**changes):
    given = {
        "mechanism": "full-batch",
        "noise_multiplier": 1.3,
        "clipping_norm": 0.7,
        "sample_rate": None,
        "local_steps": 3,
        "declared_records": 25,
        "optimizer": SGD(),
        "learning_rate": 0.5,
    }
    return StepPlan(**{**given, **changes})


def flat(trainable):
    return torch.cat([p.detach().flatten() for p in trainable.trained().values()]).clone()


def train_round(trainable, task, features, targets, given, streams, path=None):
    return Trainer(trainable, task, path).round(features, targets, given, streams)


def after(given, data, path=None, streams=STREAMS, trainable=None):
    trainable = trainable or linear()
    train_round(trainable, TASK, *data, given, streams, path)
    return flat(trainable)


def test_events_say_what_was_done_and_nothing_of_the_data():
    expected = {
        "full-batch": GaussianEvent(1.3, 0.7, 3),
        "poisson": PoissonEvent(1.3, 0.7, 0.2, 3),
        "none": NoPrivacyEvent(3),
    }
    for mechanism, event in expected.items():
        given = plan(mechanism=mechanism, sample_rate=0.2 if mechanism == "poisson" else None)
        for data in (records(), records(1), records(0)):
            assert train_round(linear(), TASK, *data, given, STREAMS) == event


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mechanism": "laplace"}, "mechanism is 'laplace'"),
        ({"mechanism": "poisson"}, "sample_rate is missing"),
        ({"noise_multiplier": 0.0}, "event.noise_multiplier is 0.0"),
        ({"noise_multiplier": math.nan}, "event.noise_multiplier is nan"),
        ({"clipping_norm": -1.0}, "event.clipping_norm is -1.0"),
        ({"local_steps": 0}, "event.steps is 0"),
        ({"declared_records": 0}, "declared_records is 0"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_a_wrong_plan_is_refused_before_any_step(changes, named):
    trainable = linear()
    before = flat(trainable)
    with pytest.raises(InputError, match=f"^{named}"):
        train_round(trainable, TASK, *records(), plan(**changes), STREAMS)
    assert torch.equal(flat(trainable), before)


def test_targets_must_match():
    with pytest.raises(InputError, match=r"^targets differ"):
        train_round(linear(), TASK, records()[0], torch.zeros(3, dtype=torch.long), plan(), STREAMS)


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_holder_and_an_empty_batch_release_noise_only(path):
    before, empty = flat(linear()), records(0)
    for given in (plan(), plan(mechanism="poisson", sample_rate=0.3)):
        moved = after(given, empty, path) - before
        assert (moved != 0).all()
        # the same noise as a full holder draws
        parts = [torch.zeros(K, D), torch.zeros(K)]
        for step in range(3):
            noise, size = STREAMS.noise(step), {"noise_multiplier": 1.3, "clipping_norm": 0.7}
            for part in parts:
                part.sub_(0.5 / given.divisor * noise.add(torch.zeros_like(part), **size))
        assert torch.allclose(moved, torch.cat([p.flatten() for p in parts]), atol=1e-6)
    # nobody is drawn at this rate: noise only as well
    rare = plan(mechanism="poisson", sample_rate=1e-9)
    assert torch.equal(after(rare, records(), path), after(rare, empty, path))


@pytest.mark.parametrize("path", PATHS)
def test_the_divisor_is_declared(path):
    """Twice the records move twice as far: nothing is divided by their true number."""
    quiet = plan(noise_multiplier=1e-9, local_steps=1)
    features, targets = records()
    twice = FeatureSet(features.values.repeat(2, 1)), targets.repeat(2)
    before = flat(linear())
    once = after(quiet, (features, targets), path) - before
    assert torch.allclose(after(quiet, twice, path) - before, 2 * once, atol=1e-6)
    half = after(plan(noise_multiplier=1e-9, local_steps=1, declared_records=50), (features, targets), path) - before
    assert torch.allclose(half, once / 2, atol=1e-6)
    assert plan(mechanism="poisson", sample_rate=0.2).divisor == pytest.approx(5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mechanism", ["full-batch", "poisson", "none"])
def test_broken_records_are_as_if_absent(path, mechanism):
    features, targets = records()
    values = features.values.clone()
    rate = 1.0 if mechanism == "poisson" else None
    for row, value in ((3, math.nan), (7, math.inf), (20, -math.inf)):
        values[row, 2] = value
    keep = torch.tensor([i not in (3, 7, 20) for i in range(N)])
    given = plan(mechanism=mechanism, sample_rate=rate)
    found = after(given, (FeatureSet(values), targets), path)
    assert found.isfinite().all()
    assert torch.allclose(found, after(given, (FeatureSet(values[keep]), targets[keep]), path), atol=1e-6)
    everything = after(given, (FeatureSet(torch.full((N, D), math.nan)), targets), path)
    assert everything.isfinite().all()


def test_without_privacy_it_is_plain_training():
    features, targets = records()
    trainable, reference = linear(False), linear(False)
    given = plan(mechanism="none", noise_multiplier=0.0, optimizer=SGD(momentum=0.9, weight_decay=0.1))
    train_round(trainable, TASK, features, targets, given, STREAMS)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(reference(features.values), targets, reduction="sum") / 25).backward()
        optimizer.step()
    assert torch.allclose(flat(trainable), flat(reference), atol=1e-6)


@pytest.mark.parametrize("mechanism", ["full-batch", "none"])
def test_the_pull_is_added_after_clipping_and_noise(mechanism):
    """Against the recursion by hand: p <- p - lr (g + mu (p - received)); the first step has no pull."""
    data, mu = records(), 0.4
    given = plan(mechanism=mechanism, local_steps=1)
    received = flat(linear())
    one = after(given, data)
    assert torch.allclose(after(plan(mechanism=mechanism, local_steps=1, proximal_mu=mu), data), one, atol=1e-7)
    pulled = after(plan(mechanism=mechanism, local_steps=2, proximal_mu=mu), data)
    plain = after(plan(mechanism=mechanism, local_steps=2), data)
    assert torch.allclose(pulled, plain - 0.5 * mu * (one - received), atol=1e-6)
    # far larger than any clipped gradient could be: it was not clipped
    far = after(plan(mechanism=mechanism, local_steps=2, proximal_mu=1e4), data)
    assert (far - plain).norm() > 100


@pytest.mark.parametrize("settings", [SGD(), SGD(momentum=0.9), Adam(kind="adam"), AdamW(kind="adamw")])
def test_a_trainer_remembers_nothing_of_the_last_round(settings):
    trainable = linear()
    trainer = Trainer(trainable, TASK)
    start = flat(trainable)
    other = plan(optimizer=settings, learning_rate=0.1, clipping_norm=0.2, declared_records=7, proximal_mu=0.3)

    def load(vector):
        with torch.no_grad():
            nn.utils.vector_to_parameters(vector.clone(), trainable.parameters())

    trainer.round(*records(), plan(optimizer=settings), STREAMS)
    first = flat(trainable)
    load(start)
    trainer.round(*records(9, seed=4), other, simulation_streams(0, "other", 2))
    load(start)
    trainer.round(*records(), plan(optimizer=settings), STREAMS)
    assert torch.equal(flat(trainable), first)
    assert all(p.grad is None and p.summed_grad is None for p in trainable.parameters())


def test_known_norms_are_not_taken_for_another_holders():
    trainer = Trainer(linear(), TASK)
    for seed in range(20):  # holders come and go, and their addresses are used again
        data = records(seed=seed)
        with torch.no_grad():
            nn.utils.vector_to_parameters(flat(linear()), trainer.trainable.parameters())
        trainer.round(*data, plan(), STREAMS)
        assert torch.equal(flat(trainer.trainable), after(plan(), data))
        del data
    assert len(trainer.path._known) == 0


def test_a_sum_is_released_once():
    head = nn.Linear(2, 2)
    optimizer = PrivateOptimizer(make_optimizer(SGD(), head.parameters()))
    optimizer.begin(noise_multiplier=1.0, clipping_norm=1.0, divisor=1.0, learning_rate=0.1)
    optimizer.noise = TorchNoise(torch.Generator())
    optimizer.step()
    with pytest.raises(ValueError, match="cleared"):
        optimizer.step()


def test_features_kept_as_half_numbers_train_in_float():
    features, targets = records()
    half = FeatureSet(features.values.half())
    assert torch.allclose(after(plan(), (half, targets)), after(plan(), (features, targets)), atol=1e-3)
