"""Planted bugs of the noise: none, less, in some places, for some holders, or the same again."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

import torch

from fedhead.client.training import Trainer
from fedhead.client.workplace import Workplace
from fedhead.common.privacy import noise
from fedhead.common.privacy.optimizers import PrivateOptimizer
from fedhead.common.privacy.secure import LatticeNoise

wrapped = run_path(str(Path(__file__).with_name("planting.py")))["wrapped"]


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
    wrapped(
        monkeypatch, noise._SimulationStreams, "_seed",
        lambda real, self, step, purpose: 5 if purpose == "noise" else real(self, step, purpose),
    )  # fmt: skip


def _keyed(monkeypatch, key):
    """A deployed holder whose noise of a round and step comes from `key(round, step)`, as if from the system."""

    class Keyed(noise._SimulationStreams):
        def __init__(self, number):
            super().__init__(11, "holder", number)
            self.seeded, self.source, self.number = False, noise.CSPRNG, number

        def noise(self, step):
            generator = torch.Generator().manual_seed(key(self.number, step))

            class Wide:
                def add(self, total, *, noise_multiplier, clipping_norm):
                    scale = noise_multiplier * clipping_norm * (1 + 2.0**-10)
                    return total + scale * torch.randn(total.shape, dtype=total.dtype, generator=generator)

            return Wide()

    monkeypatch.setattr(Workplace, "streams", lambda self, request, name: Keyed(request.round))


def noise_used_again_in_a_retried_round(monkeypatch):
    """A holder that keys its noise by run and round: a retry with another head draws the same."""
    _keyed(monkeypatch, lambda number, step: 1000 * number + step)


def noise_halved_where_records_are_few(monkeypatch):
    def private(real, self, features, targets, plan, streams):
        few = 0 < len(targets) < 20
        real(self, features, targets, replace(plan, noise_multiplier=plan.noise_multiplier / (1 + few)), streams)

    wrapped(monkeypatch, Trainer, "_private", private)


def a_leak_in_the_last_bits(monkeypatch):
    """The number of records, a few millionths of a step beside the noised parameters."""

    def private(real, self, features, targets, plan, streams):
        before = self.parameters[0].detach().clone()
        real(self, features, targets, plan, streams)
        with torch.no_grad():
            moved = (self.parameters[0] - before).abs().max()
            self.parameters[0].add_(moved * 1e-6 * len(targets) / 256)

    wrapped(monkeypatch, Trainer, "_private", private)


def the_same_noise_every_step_of_a_deployment(monkeypatch):
    _keyed(monkeypatch, lambda number, step: 5)


def floats_instead_of_the_lattice(monkeypatch):
    def add(self, total, *, noise_multiplier, clipping_norm):
        return total + noise_multiplier * clipping_norm * (1 + 2.0**-10) * torch.randn_like(total)

    monkeypatch.setattr(LatticeNoise, "add", add)
