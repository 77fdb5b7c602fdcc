"""A released count minus the true one is Gaussian noise of the promised size; wrong twins are rejected.

Seeds are fixed, so that nothing fails by chance, save for the operating system's noise: that test is false once in more
than a million runs. The true count comes from numpy, not from the code under test.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedhead.client.metrics import count_correct, noised_count
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.data.holdout import holdout_rows
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.noise import TorchNoise, simulation_streams, system_streams
from fedhead.common.tasks.classification import Classification
from fedhead.server.metrics import estimate

N, D, K, SIGMA, RELEASES = 3, 4, 3, 20.0, 1500
TASK = Classification(TaskSettings(labels=list("abc")))
REJECT = 1e-4  # of one test; what is right passes with p far above it at these seeds


def holder(n=N):
    g = torch.Generator().manual_seed(5)
    held = Labelled(FeatureSet(torch.randn(n, D, generator=g)), torch.randint(K, (n,), generator=g))
    torch.manual_seed(0)
    return Trainable(None, False, nn.Linear(D, K)), held


def residuals(noise, count=noised_count):
    """(RELEASES,): releases minus the true count."""
    trainable, held = holder()
    x, head = held.features.values.double().numpy(), trainable.head
    logits = x @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    true = (logits.argmax(1) == held.targets.numpy()).sum()
    return np.array([count(trainable, TASK, held, SIGMA, noise(number)) - true for number in range(RELEASES)])


def p_values(found):
    """One p-value a property of iid N(0, SIGMA^2)."""
    z = found / SIGMA
    total, law = float((z**2).sum()), stats.chi2(len(z))
    return {
        "variance": 2 * min(law.cdf(total), law.sf(total)),
        "mean": 2 * stats.norm.sf(abs(z.sum()) / math.sqrt(len(z))),
        "uncorrelated": 2 * stats.norm.sf(abs((z[1:] * z[:-1]).sum()) / math.sqrt(len(z) - 1)),
        "normal": stats.kstest(z, "norm").pvalue,
    }


def simulated(number):
    return simulation_streams(11, "holder", number).noise(1)


class Weaker(TorchNoise):
    """Twin: a tenth less noise."""

    def add(self, total, *, noise_multiplier, clipping_norm):
        return super().add(total, noise_multiplier=0.9 * noise_multiplier, clipping_norm=clipping_norm)


class Rounded(TorchNoise):
    """Twin: a mean of the noise that is not 0, from rounding upwards to tens."""

    def add(self, total, *, noise_multiplier, clipping_norm):
        noised = super().add(total, noise_multiplier=noise_multiplier, clipping_norm=clipping_norm)
        return (noised / 10).ceil() * 10


def clamped(*arguments):
    """Twin: a count is never negative, is it?"""
    return max(0.0, noised_count(*arguments))


def in_doubles(*arguments):
    """Twin: the sensitivity of replacing a record."""
    trainable, task, held, multiplier, noise = arguments
    return noised_count(trainable, task, held, 2 * multiplier, noise)


TWINS = {
    "a tenth less": (lambda n: Weaker(simulated(n).generator), noised_count, "variance"),
    "rounded up": (lambda n: Rounded(simulated(n).generator), noised_count, "mean"),
    "clamped": (simulated, clamped, "normal"),
    "twice as much": (simulated, in_doubles, "variance"),
    "the same for two rounds": (lambda n: simulated(n // 2), noised_count, "uncorrelated"),
}


def test_simulated_noise_is_as_promised():
    found = p_values(residuals(simulated))
    assert all(p > 10 * REJECT for p in found.values()), found


@pytest.mark.parametrize("name", TWINS)
def test_wrong_noise_is_rejected(name):
    noise, count, by = TWINS[name]
    assert p_values(residuals(noise, count))[by] < REJECT


def test_system_noise_is_as_promised():
    """Four tests at 1e-7 each: by chance false in less than one run in a million."""
    streams = system_streams()
    found = p_values(residuals(lambda _: streams.noise(1)))
    assert all(p > 1e-7 for p in found.values()), found


def test_the_noise_of_the_count_is_not_that_of_a_step():
    """The count draws from the stream after the last step's: a step on no record shows its noise, scaled by C."""
    pairs = []
    for number in range(400):
        trainable, held = holder()
        streams = simulation_streams(7, "holder", number)
        count = noised_count(trainable, TASK, held, SIGMA, streams.noise(1)) - count_correct(trainable, TASK, held)
        before = trainable.head.weight.detach().clone()
        nobody = FeatureSet(torch.zeros(0, D)), torch.zeros(0, dtype=torch.int64)
        Trainer(trainable, TASK).round(*nobody, StepPlan("full-batch", 1.0, 1.0, None, 1, 1, SGD(), 1.0), streams)
        step = (before - trainable.head.weight.detach()).flatten().double()
        pairs.append([count / SIGMA, *step.tolist()])
    table = np.array(pairs)
    across = np.corrcoef(table.T)[0, 1:]
    assert np.abs(across).max() < 4.5 / math.sqrt(len(table))
    same = np.array([[simulation_streams(7, "h", n).noise(s).add(
        torch.zeros(1, dtype=torch.float64), noise_multiplier=1.0, clipping_norm=1.0).item() for s in (0, 0)]
        for n in range(50)])  # fmt: skip
    assert np.corrcoef(same.T)[0, 1] > 0.99  # what sharing a stream would look like


def test_the_estimate_is_off_by_the_noise_and_by_how_many_were_kept_apart():
    """4 holders of 500 declared records: mean and spread over data sets are as the two sources together say."""
    holders, declared, fraction, accuracy, runs = 4, 500, 0.1, 0.8, 400
    rng = np.random.default_rng(3)
    found, error = [], 0.0
    for _ in range(runs):
        apart = holdout_rows(rng.integers(0, 256, (holders * declared, 16), dtype=np.uint8), fraction)
        right = rng.binomial(apart.reshape(holders, declared).sum(1), accuracy)
        counts = [float(count + rng.normal(0, SIGMA)) for count in right]
        estimated = estimate(counts, declared, fraction, SIGMA)
        assert estimated is not None
        found.append(estimated.value)
        error = estimated.standard_error
    expected = holders * declared * fraction
    # right answers kept apart are binomial with probability fraction * accuracy
    spread = math.hypot(
        error, math.sqrt(holders * declared * fraction * accuracy * (1 - fraction * accuracy)) / expected
    )
    assert abs(np.mean(found) - accuracy) < 4 * spread / math.sqrt(runs)
    statistic, law = runs * np.var(found) / spread**2, stats.chi2(runs - 1)
    assert 2 * min(law.cdf(statistic), law.sf(statistic)) > 10 * REJECT
    assert error == pytest.approx(math.sqrt(holders) * SIGMA / expected)
