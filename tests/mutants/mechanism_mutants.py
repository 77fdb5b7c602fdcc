"""Privacy bugs in the training path, each planted into production code by a monkeypatch; see test_mutants.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch

from fedhead.client import gradients
from fedhead.client.gradients import ClosedForm
from fedhead.client.training import Trainer
from fedhead.client.workplace import Workplace
from fedhead.common.privacy import noise
from fedhead.common.privacy.optimizers import PrivateOptimizer

POISSON = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "training.local_steps": 4, "training.rounds": 12}


@dataclass(frozen=True)
class Mutant:
    """A planted bug, and which check must name it."""

    name: str
    plant: Callable[[Any], None]
    caught_by: str  # name of a check that must fail
    says: str  # words of its meaning
    changes: dict[str, Any]
    seed: int | None = 7  # None: the noise of a deployment


def _wrapped(monkeypatch, owner, name, around):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, wraps(real)(lambda *args, **kwargs: around(real, *args, **kwargs)))


def _noise(monkeypatch, change):
    """Let `change(optimizer, p, sum)` stand in for the noised sum of a parameter."""

    def add_noise(self):
        for p in self._params:
            p.grad = change(self, p, p.summed_grad)
            p.summed_grad._processed = True

    monkeypatch.setattr(PrivateOptimizer, "add_noise", add_noise)


def _drawn(optimizer, total, factor=1.0):
    return optimizer.noise.add(
        total, noise_multiplier=factor * optimizer.noise_multiplier, clipping_norm=optimizer.max_grad_norm
    )


def no_noise(monkeypatch):
    _noise(monkeypatch, lambda optimizer, p, total: total.clone())


def noise_halved(monkeypatch):
    _noise(monkeypatch, lambda optimizer, p, total: _drawn(optimizer, total, 0.5))


def noise_missing_on_the_bias(monkeypatch):
    _noise(monkeypatch, lambda optimizer, p, total: total.clone() if p.dim() == 1 else _drawn(optimizer, total))


def noise_missing_on_a_twentieth(monkeypatch):
    def change(optimizer, p, total):
        noised = _drawn(optimizer, total)
        left_out = torch.arange(total.numel()).view(total.shape) % 20 == 3
        return torch.where(left_out, total, noised)

    _noise(monkeypatch, change)


def same_noise_every_step(monkeypatch):
    _wrapped(
        monkeypatch, noise._SimulationStreams, "_seed",
        lambda real, self, step, purpose: 5 if purpose == "noise" else real(self, step, purpose),
    )  # fmt: skip


def clipping_norm_half_as_much_again(monkeypatch):
    _wrapped(
        monkeypatch, ClosedForm, "begin",
        lambda real, self, features, targets, norm: real(self, features, targets, 1.5 * norm),
    )  # fmt: skip


def clipping_a_batch_at_a_time(monkeypatch):
    def clipped(x, y, weight, bias, clipping_norm, *, reach=None, scale=None, hot=None):
        if scale is None:
            scale = torch.ones(len(x))
        seen = (x * scale[:, None]).nan_to_num(0.0)
        g = torch.softmax(seen @ weight.t() + (0 if bias is None else bias), 1)
        g[torch.arange(len(y)), y] -= 1
        whole, of_bias = g.t() @ seen, g.sum(0)
        norm = torch.sqrt(whole.square().sum() + of_bias.square().sum())
        factor = min(1.0, clipping_norm / max(float(norm), 1e-12))
        return whole * factor, None if bias is None else of_bias * factor

    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", clipped)


def sampling_twice_as_often(monkeypatch):
    real = noise.poisson_sample
    monkeypatch.setattr(
        noise, "poisson_sample", lambda records, rate, generator: real(records, min(1.0, 2 * rate), generator)
    )


def shuffled_batches(monkeypatch):
    """An epoch in shuffled batches of fixed size, accounted as Poisson samples."""
    waiting: dict[int, list[torch.Tensor]] = {}

    def sample(records, rate, generator):
        size, left = round(records * rate), waiting.setdefault(records, [])
        if not size:
            return torch.empty(0, dtype=torch.int64)
        if not left:
            order = torch.randperm(records, generator=generator)
            left.extend(order[start : start + size].sort().values for start in range(0, records - size + 1, size))
        return left.pop()

    monkeypatch.setattr(noise, "poisson_sample", sample)


def divisor_from_the_true_count(monkeypatch):
    _wrapped(
        monkeypatch, Trainer, "_private",
        lambda real, self, features, targets, plan, streams: real(
            self, features, targets, replace(plan, declared_records=max(1, len(features))), streams
        ),
    )  # fmt: skip


def noise_used_again_in_a_retried_round(monkeypatch):
    """A holder that keys its noise by run and round: a retry with another head draws the same."""

    class Keyed(noise._SimulationStreams):
        def __init__(self, round):
            super().__init__(11, "holder", round)
            self.seeded, self.source = False, noise.CSPRNG

        def noise(self, step):
            generator = self.generator(step, "noise")

            class Wide:
                def add(self, total, *, noise_multiplier, clipping_norm):
                    scale = noise_multiplier * clipping_norm * (1 + 2.0**-10)
                    return total + scale * torch.randn(total.shape, dtype=total.dtype, generator=generator)

            return Wide()

    monkeypatch.setattr(Workplace, "streams", lambda self, request, name: Keyed(request.round))


MECHANISM_MUTANTS = [
    Mutant("no noise", no_noise, "total-variance", "noise", {}),
    Mutant("noise halved", noise_halved, "total-variance", "noise", {}),
    Mutant("noise missing on the bias", noise_missing_on_the_bias, "group-variance", "bias", {}),
    Mutant("noise missing on 5 % of the coordinates", noise_missing_on_a_twentieth, "coordinate-variance", "noise", {}),
    Mutant("the same noise every step", same_noise_every_step, "repeated-steps", "noise", {}),
    Mutant("clipping norm 1.5 times the claim", clipping_norm_half_as_much_again, "largest-contribution", "clip", {}),
    Mutant("clipping per batch", clipping_a_batch_at_a_time, "largest-contribution", "clip", {}),
    Mutant("sampling rate twice the accounted", sampling_twice_as_often, "batch-mean", "more often", POISSON),
    Mutant("shuffled batches accounted as Poisson", shuffled_batches, "batch-variance", "fixed size", POISSON),
    Mutant("divisor from the true record count", divisor_from_the_true_count, "largest-contribution", "divisor", {}),
    Mutant("noise reused in a retried round", noise_used_again_in_a_retried_round, "retry", "again", {}, None),
]
