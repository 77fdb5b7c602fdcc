"""Noise and samples from the operating system follow the promised law; wrong twins are rejected.

Nothing here is seeded. What is right is held to p-values above 1e-9, in some 60 comparisons: a false alarm comes once
in ten million runs. Twins must fall below 1e-12; where they are wrong by little, they lie near 1e-30.
"""

import math

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
from fedhead.common.privacy.lattice import lattice_step
from fedhead.common.privacy.noise import system_streams
from fedhead.common.privacy.secure import SOURCES, CsprngNoise, OpenDPNoise, bernoulli_sample, envelope
from fedhead.common.tasks.classification import Classification

ACCEPT, REJECT = 1e-9, 1e-12
DRAWS = {CsprngNoise: 200_000, OpenDPNoise: 12_000}
WIDE = 1.3 * 2**30


def two_sided(value, law):
    return 2 * min(law.cdf(value), law.sf(value))


def small_law(found, scale):
    """Chi-square of each integer, against the discrete Gaussian's exact mass."""
    reach = math.ceil(40 * scale)
    n = np.arange(-reach, reach + 1)
    mass = np.exp(-0.5 * (n / scale) ** 2)
    mass /= mass.sum()
    expected = mass * len(found)
    body = expected >= 10
    counts = np.bincount(found + reach, minlength=len(n))[: len(n)]
    observed = np.append(counts[body], counts[~body].sum())
    wanted = np.append(expected[body], expected[~body].sum())
    if wanted[-1] < 1:  # no room for a test of the tail
        observed[-2], wanted[-2] = observed[-2:].sum(), wanted[-2:].sum()
        observed, wanted = observed[:-1], wanted[:-1]
    return {"integers": stats.chisquare(observed, wanted).pvalue}


def wide_law(found, scale):
    """Variance, mean, bins of equal mass, tails, the low bits, independence of neighbours, and signs."""
    z = found / scale
    size, squares = len(z), z**2 - 1
    bins = np.bincount(np.minimum((stats.norm.cdf(z) * 200).astype(int), 199), minlength=200)
    tail = int((np.abs(z) > 3).sum())
    return {
        "variance": two_sided(float((z**2).sum()), stats.chi2(size)),
        "mean": 2 * stats.norm.sf(abs(z.sum()) / math.sqrt(size)),
        "bins": stats.chisquare(bins).pvalue,
        "tails": stats.binomtest(tail, size, 2 * stats.norm.sf(3)).pvalue,
        "low bits": stats.chisquare(np.bincount(found & 255, minlength=256)).pvalue,
        "fine places": stats.kstest(((found & (2**26 - 1)) + 0.5) / 2**26, "uniform").pvalue,
        "neighbours": 2 * stats.norm.sf(abs((z[1:] * z[:-1]).sum()) / math.sqrt(size - 1)),
        "sizes of neighbours": 2 * stats.norm.sf(abs((squares[1:] * squares[:-1]).sum()) / math.sqrt(4 * (size - 1))),
    }


@pytest.mark.parametrize("source", [CsprngNoise, OpenDPNoise])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.7, 100.3])
def test_small_noise_is_the_discrete_gaussian(source, scale):
    found = small_law(source().integers(DRAWS[source], scale), scale)
    assert all(p > ACCEPT for p in found.values()), found


@pytest.mark.parametrize("source", [CsprngNoise, OpenDPNoise])
def test_wide_noise_is_gaussian(source):
    found = wide_law(source().integers(DRAWS[source], WIDE), WIDE)
    assert all(p > ACCEPT for p in found.values()), found


def test_both_sources_have_one_law():
    """Two implementations with nothing in common, compared with each other."""
    a, b = (source().integers(DRAWS[OpenDPNoise], WIDE) for source in (CsprngNoise, OpenDPNoise))
    assert stats.ks_2samp(a, b).pvalue > ACCEPT


class Twin(CsprngNoise):
    """Everything right, but for one thing that a subclass does wrong."""

    def proposal(self, count, scale):
        shape = envelope(scale)
        first, second, third = self._stream.words(3 * count).reshape(3, count)
        cell = shape.upto.searchsorted(first >> np.uint64(1), side="right")
        size = cell * shape.width + (second & np.uint64(shape.width - 1)).astype(np.int64)
        chance = shape.accept[cell] * np.exp(-0.5 * np.square(size / scale))
        stays = third.astype(np.float64) * 2.0**-64 < chance
        return size, stays, (first & np.uint64(1)).astype(bool)


class ZeroTwice(Twin):
    def _propose(self, count, scale):
        size, stays, minus = self.proposal(count, scale)
        return np.where(minus, -size, size)[stays]


class OneSign(Twin):
    def _propose(self, count, scale):
        size, stays, _ = self.proposal(count, scale)
        return size[stays]


class NoFinePlaces(CsprngNoise):
    def _propose(self, count, scale):
        return super()._propose(count, scale) & ~np.int64(255)


class TwoPercentLess(CsprngNoise):
    def integers(self, count, scale):
        return super().integers(count, 0.98 * scale)


class EachTwice(CsprngNoise):
    def integers(self, count, scale):
        return super().integers((count + 1) // 2, scale).repeat(2)[:count]


class CutOff(CsprngNoise):
    def integers(self, count, scale):
        return np.clip(super().integers(count, scale), -int(3 * scale), int(3 * scale))


TWINS = [
    (ZeroTwice, small_law, 3.7, "integers"),
    (OneSign, wide_law, WIDE, "mean"),
    (NoFinePlaces, wide_law, WIDE, "low bits"),
    (TwoPercentLess, small_law, 3.7, "integers"),
    (TwoPercentLess, wide_law, WIDE, "variance"),
    (EachTwice, wide_law, WIDE, "neighbours"),
    (CutOff, wide_law, WIDE, "tails"),
]


@pytest.mark.parametrize(("twin", "law", "scale", "by"), TWINS)
def test_wrong_noise_is_rejected(twin, law, scale, by):
    assert law(twin().integers(DRAWS[CsprngNoise], scale), scale)[by] < REJECT


# ---- in production steps ----

N, D, K = 12, 8, 4
SIGMA, C, DECLARED = 1.7, 0.6, 20
TASK = Classification(TaskSettings(labels=list("abcd")))


def clean_sum(head, x, y):
    """The clipped sum, one record at a time, by autograd."""
    total = torch.zeros(K * D + K, dtype=torch.float64)
    for row, label in zip(x, y, strict=True):
        loss = F.cross_entropy(head(row[None]), label[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()))])
        total += gradient * min(1.0, C / gradient.norm().item())
    return total


def residuals(streams, releases):
    """(releases, P): release times divisor minus the clean sum, in noise standard deviations; two steps in a round."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(N, D, generator=g), torch.randint(K, (N,), generator=g)
    torch.manual_seed(0)
    head = nn.Linear(D, K).double()
    start = [p.detach().clone() for p in head.parameters()]
    clean = clean_sum(head, x.double(), y)
    trainer = Trainer(Trainable(None, False, head), TASK)
    plan = StepPlan("full-batch", SIGMA, C, None, 1, DECLARED, SGD(), 1.0)
    features, found = FeatureSet(x), []
    for number in range(releases):
        with torch.no_grad():
            for p, value in zip(head.parameters(), start, strict=True):
                p.copy_(value)
        trainer.round(features, y, plan, streams(number))
        release = torch.cat([(a - p.detach()).flatten() for a, p in zip(start, head.parameters(), strict=True)])
        found.append(release * DECLARED - clean)
    return torch.stack(found).numpy() / (SIGMA * C)


def step_law(z):
    releases, size = z.shape
    columns = min(two_sided(value, stats.chi2(releases)) for value in (z**2).sum(0)) * size
    lag = float((z[1:] * z[:-1]).sum()) / math.sqrt((releases - 1) * size)
    cross = float((z[:, :K] * z[:, K * D :]).sum()) / math.sqrt(releases * K)
    return {
        "total variance": two_sided(float((z**2).sum()) / 1.0009765625**2, stats.chi2(releases * size)),
        "variance of a coordinate": min(1.0, columns),
        "mean": 2 * stats.norm.sf(abs(z.sum()) / math.sqrt(z.size)),
        "steps uncorrelated": 2 * stats.norm.sf(abs(lag)),
        "weight and bias uncorrelated": 2 * stats.norm.sf(abs(cross)),
        "normal": stats.kstest(z.ravel(), "norm").pvalue,
    }


@pytest.mark.parametrize(("source", "releases"), [("aes-ctr-gaussian", 400), ("opendp-discrete-gaussian", 200)])
def test_production_steps_are_as_promised(source, releases):
    found = step_law(residuals(lambda _: system_streams(source), releases))
    assert all(p > ACCEPT for p in found.values()), found


@pytest.mark.parametrize("source", SOURCES)
def test_neighbours_release_on_one_lattice(source):
    """Noised sums of two data sets, one of them empty: multiples of one step, and all residues of it."""
    streams = system_streams(source)
    sums = (torch.zeros(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64) * 0.03)
    found = [streams.noise(0).add(total, noise_multiplier=SIGMA, clipping_norm=C) for total in sums]
    steps = [(values / lattice_step(C)).numpy() for values in found]
    for each in steps:
        assert (each == np.round(each)).all()
        assert stats.chisquare(np.bincount(each.astype(np.int64) & 3, minlength=4)).pvalue > ACCEPT


class Repeating:
    """Twin: streams whose noise has the same key in every release."""

    seeded, source = False, "aes-ctr-gaussian"

    def noise(self, step):
        noise = CsprngNoise()
        noise._stream = self
        self.random = np.random.default_rng(7)
        return noise

    def words(self, count):
        return self.random.integers(0, 2**64, count, dtype=np.uint64)


def test_one_key_for_all_releases_is_rejected():
    assert step_law(residuals(lambda _: Repeating(), 300))["steps uncorrelated"] < REJECT


# ---- samples ----


def sample_law(draw, records=400, rate=0.08, steps=4000):
    taken = np.zeros((steps, records), dtype=bool)
    for step in range(steps):
        taken[step, draw(records, rate, step).numpy()] = True
    sizes, variance = taken.sum(1), records * rate * (1 - rate)
    fourth = 3 * variance**2 + variance * (1 - 6 * rate * (1 - rate))
    pair = math.sqrt(rate**2 * (1 - rate) * (1 + 3 * rate) / (steps * (records - 1)))
    again = (taken[1:] & taken[:-1]).mean()
    shares = np.abs(taken.mean(0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    return {
        "mean": 2 * stats.norm.sf(abs(sizes.mean() - records * rate) / math.sqrt(variance / steps)),
        "variance": 2 * stats.norm.sf(abs(sizes.var() - variance) / math.sqrt((fourth - variance**2) / steps)),
        "share": min(1.0, 2 * stats.norm.sf(shares.max()) * records),
        "neighbours": 2 * stats.norm.sf(abs((taken[:, 1:] & taken[:, :-1]).mean() - rate**2) / pair),
        "steps": 2 * stats.norm.sf(abs(again - rate**2) / pair),
    }


def fixed_size(records, rate, step):
    return torch.randperm(records)[: int(records * rate)]


def too_often(records, rate, step):
    return bernoulli_sample(records, 1.05 * rate)


def in_blocks(records, rate, step):
    half = bernoulli_sample(records // 2, rate)
    return torch.cat([2 * half, 2 * half + 1])


def kept():
    last = {}

    def draw(records, rate, step):
        if step % 2 == 0:
            last["sample"] = bernoulli_sample(records, rate)
        return last["sample"]

    return draw


@pytest.mark.parametrize("rate", [0.08, 0.5, 0.97])
def test_samples_are_independent_trials(rate):
    streams = system_streams()
    found = sample_law(lambda n, q, step: streams.sample(step, n, q), rate=rate, steps=2000)
    assert all(p > ACCEPT for p in found.values()), found


@pytest.mark.parametrize(
    ("twin", "by"), [(fixed_size, "variance"), (too_often, "mean"), (in_blocks, "neighbours"), (kept(), "steps")]
)
def test_other_samples_are_rejected(twin, by):
    assert sample_law(twin)[by] < REJECT
