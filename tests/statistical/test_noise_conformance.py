"""What is released minus the clean clipped sum is iid Gaussian noise of the promised size; wrong twins are rejected.

The clean sum comes from per-record autograd, not from the code under test. Seeds are fixed: no test fails by chance.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy import sampling
from fedhead.common.privacy.noise import TorchNoise, simulation_streams
from fedhead.common.privacy.sampling import poisson_sample
from fedhead.common.tasks.classification import Classification

N, D, K = 12, 8, 4
SIGMA, C, DECLARED, RELEASES = 1.7, 0.6, 20, 300
TASK = Classification(TaskSettings(labels=list("abcd")))
REJECT = 1e-4  # of one test; what is right passes with p far above it at these seeds


def data():
    g = torch.Generator().manual_seed(5)
    return torch.randn(N, D, generator=g), torch.randint(K, (N,), generator=g)


def clean_sum(head, x, y):
    """The clipped sum, one record at a time."""
    total = torch.zeros(K * D + K)
    for row, label in zip(x, y, strict=True):
        loss = F.cross_entropy(head(row[None]), label[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()))])
        total += gradient * min(1.0, C / gradient.norm().item())
    return total


def residuals(streams, empty=False):
    """(RELEASES, P): release times divisor minus the clean sum, each from one production step at the same weights."""
    x, y = data()
    if empty:
        x, y = x[:0], y[:0]
    torch.manual_seed(0)
    head = nn.Linear(D, K)
    start = [p.detach().clone() for p in head.parameters()]
    clean = clean_sum(head, x, y)
    trainer = Trainer(Trainable(None, False, head), TASK)
    plan = StepPlan("full-batch", SIGMA, C, None, 1, DECLARED, SGD(), 1.0)
    features, found = FeatureSet(x), []
    for number in range(RELEASES):
        with torch.no_grad():
            for p, value in zip(head.parameters(), start, strict=True):
                p.copy_(value)
        trainer.round(features, y, plan, streams(number))
        release = torch.cat([(a - p.detach()).flatten() for a, p in zip(start, head.parameters(), strict=True)])
        found.append(release * DECLARED - clean)
    return torch.stack(found).double().numpy()


def both(value, law):
    """Two-sided p-value."""
    return 2 * min(law.cdf(value), law.sf(value))


def p_values(found):
    """One p-value a property of iid N(0, SIGMA^2 C^2)."""
    z = found / (SIGMA * C)
    releases, size = z.shape
    total = float((z**2).sum())
    columns = (z**2).sum(0)  # chi-square of each coordinate
    column = min(both(value, stats.chi2(releases)) for value in columns) * size
    lag = float((z[1:] * z[:-1]).sum()) / math.sqrt((releases - 1) * size)
    weight = K * D
    cross = float((z[:, :K] * z[:, weight:]).sum()) / math.sqrt(releases * K)
    return {
        "total variance": both(total, stats.chi2(releases * size)),
        "variance of a coordinate": min(1.0, column),
        "mean": both(float(z.sum()) / math.sqrt(z.size), stats.norm),
        "steps uncorrelated": both(lag, stats.norm),
        "weight and bias uncorrelated": both(cross, stats.norm),
        "normal": stats.kstest(z.ravel(), "norm").pvalue,
    }


def simulated(number):
    return simulation_streams(11, "holder", number)


class Twin:
    """Streams whose noise is wrong in one way."""

    seeded = True

    def __init__(self, number, noise):
        self.inner, self.make = simulated(number), noise

    def generator(self, step, purpose):
        return self.inner.generator(step, purpose)

    def noise(self, step):
        return self.make(self.inner.generator(step, "noise"))


class Halved(TorchNoise):
    def add(self, total, *, noise_multiplier, clipping_norm):
        return super().add(total, noise_multiplier=noise_multiplier / 2, clipping_norm=clipping_norm)


class WeightOnly(TorchNoise):
    def add(self, total, **size):
        return total.clone() if total.dim() == 1 else super().add(total, **size)


class Nothing(TorchNoise):
    def add(self, total, **size):
        return total.clone()


class Uniform(TorchNoise):
    """The right variance, the wrong law."""

    def add(self, total, *, noise_multiplier, clipping_norm):
        std = noise_multiplier * clipping_norm
        return total + (torch.rand(total.shape, generator=self.generator) - 0.5) * math.sqrt(12) * std


class FivePercentLess(TorchNoise):
    def add(self, total, *, noise_multiplier, clipping_norm):
        return super().add(total, noise_multiplier=noise_multiplier * 0.95, clipping_norm=clipping_norm)


TWINS = {
    "halved": (lambda n: Twin(n, Halved), "total variance"),
    "5 % less": (lambda n: Twin(n, FivePercentLess), "total variance"),
    "none": (lambda n: Twin(n, Nothing), "total variance"),
    "weight only": (lambda n: Twin(n, WeightOnly), "variance of a coordinate"),
    "same every round": (lambda n: simulated(0), "steps uncorrelated"),
    "same as the round before": (lambda n: simulated(n // 2), "steps uncorrelated"),
    "uniform": (lambda n: Twin(n, Uniform), "normal"),
}


@pytest.mark.parametrize("empty", [False, True])
def test_simulated_noise_is_as_promised(empty):
    found = p_values(residuals(simulated, empty))
    assert all(p > 10 * REJECT for p in found.values()), found


@pytest.mark.parametrize("name", TWINS)
def test_wrong_noise_is_rejected(name):
    streams, by = TWINS[name]
    assert p_values(residuals(streams))[by] < REJECT


def test_steps_of_one_round_draw_anew():
    """Two steps of a round on no record: their noises are uncorrelated, and of the same size."""
    torch.manual_seed(0)
    head = nn.Linear(D, K)
    trainer = Trainer(Trainable(None, False, head), TASK)
    streams, found = simulation_streams(1, "holder", 1), []
    for steps in (1, 2, 3):
        with torch.no_grad():
            head.weight.zero_()
        trainer.round(FeatureSet(torch.zeros(0, D)), torch.zeros(0, dtype=torch.long),
                      StepPlan("full-batch", 1.0, 1.0, None, steps, 1, SGD(), 1.0), streams)  # fmt: skip
        found.append(head.weight.detach().flatten().clone())
    first, second, third = found[0], found[1] - found[0], found[2] - found[1]
    for a, b in itertools.combinations([first, second, third], 2):
        assert abs(float((a * b).sum())) / math.sqrt(len(a)) < 4
        assert not torch.equal(a, b)


def sample_statistics(draw, records=400, rate=0.08, steps=4000):
    """p-values of batch size mean and variance, of each record's share, and of neighbours being independent."""
    taken = np.zeros((steps, records), dtype=bool)
    for step in range(steps):
        index = draw(records, rate, step).numpy()
        assert len(np.unique(index)) == len(index)
        assert len(index) == 0 or (index.min() >= 0 and index.max() < records)
        taken[step, index] = True
    sizes = taken.sum(1)
    variance = records * rate * (1 - rate)
    mean_z = (sizes.mean() - records * rate) / math.sqrt(variance / steps)
    # variance of a sample variance, with the binomial's own fourth moment
    fourth = 3 * variance**2 + variance * (1 - 6 * rate * (1 - rate))
    variance_z = (sizes.var() - variance) / math.sqrt((fourth - variance**2) / steps)
    share_z = np.abs(taken.mean(0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    pairs = (taken[:, 1:] & taken[:, :-1]).mean()
    pairs_z = (pairs - rate**2) / math.sqrt(rate**2 * (1 - rate) * (1 + 3 * rate) / (steps * (records - 1)))
    return {
        "mean": 2 * stats.norm.sf(abs(mean_z)),
        "variance": 2 * stats.norm.sf(abs(variance_z)),
        "share": min(1.0, 2 * stats.norm.sf(share_z.max()) * records),
        "pairs": 2 * stats.norm.sf(abs(pairs_z)),
    }


def poisson(records, rate, step):
    return poisson_sample(records, rate, simulation_streams(2, "holder", 1).generator(step, "sampling"))


def shuffled(records, rate, step):
    """Twin: batches of fixed size out of a shuffled order."""
    size = int(records * rate)
    order = np.random.default_rng(step // (records // size)).permutation(records)
    start = step % (records // size) * size
    return torch.from_numpy(order[start : start + size])


def too_often(records, rate, step):
    """Twin: a rate 3 % higher than declared."""
    return poisson(records, rate * 1.03, step)


def blocks(records, rate, step):
    """Twin: records come and go two by two."""
    half = poisson(records // 2, rate, step)
    return torch.cat([2 * half, 2 * half + 1])


@pytest.mark.parametrize("rate", [0.08, 0.5, 0.97])
def test_batches_are_poisson(rate):
    found = sample_statistics(poisson, rate=rate, steps=2000)
    assert all(p > 10 * REJECT for p in found.values()), found


@pytest.mark.parametrize(("twin", "by"), [(shuffled, "variance"), (too_often, "mean"), (blocks, "pairs")])
def test_other_batches_are_rejected(twin, by):
    assert sample_statistics(twin)[by] < REJECT


def test_edges_of_sampling():
    g = torch.Generator().manual_seed(0)
    assert len(poisson_sample(0, 0.5, g)) == 0
    assert poisson_sample(5, 1.0, g).tolist() == [0, 1, 2, 3, 4]
    tiny = [len(poisson_sample(3, 1e-6, g)) for _ in range(50)]
    assert sum(tiny) == 0
    assert all(index.dtype == torch.int64 for index in (poisson_sample(9, 0.3, g), poisson_sample(0, 1.0, g)))


def test_a_short_draw_goes_on_where_it_ended(monkeypatch):
    """With room for two more gaps than expected, the law is the same."""
    monkeypatch.setattr(sampling, "math", SimpleNamespace(sqrt=lambda _: -1.0))
    found = sample_statistics(poisson, 60, 0.05, 4000)
    assert all(p > 10 * REJECT for p in found.values()), found
