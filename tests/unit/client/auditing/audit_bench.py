"""Small settings for the tests of the mechanism audit, and the wrong twins that they must notice."""

from dataclasses import replace

import numpy as np
import torch

from fedhead.client import gradients
from fedhead.client.auditing.canaries import craft
from fedhead.client.auditing.planted import plant
from fedhead.client.auditing.setup import Setup
from fedhead.client.gradients import ClosedForm, of_persons
from fedhead.client.hooked import Ghost
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, LinearHead, MLPHead, TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models.heads import make_head
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.noise import simulation_streams, system_streams
from fedhead.common.privacy.optimizers import PrivateOptimizer
from fedhead.common.tasks.classification import Classification

LINEAR = LinearHead(kind="linear")
MLP = MLPHead(kind="mlp", hidden=[8])


class Bench:
    """Records, head, plan and canaries of one small audit."""

    def __init__(
        self, head=LINEAR, *, features=24, outputs=3, people=None, normalize=True, system=False, double=False,
        count=40, seed=0, canaries=None, **plan,
    ):  # fmt: skip
        self.head, self.features, self.outputs, self.normalize = head, features, outputs, normalize
        self.double, self.system, self.seed = double or system, system, seed
        self.task = Classification(TaskSettings(labels=[str(label) for label in range(outputs)]))
        self.generator = np.random.default_rng(seed)
        drawn = torch.Generator().manual_seed(seed)
        self.plan = replace(StepPlan("full-batch", 2.0, 1.0, None, 1, 50, SGD(kind="sgd"), 0.5, chunk=16), **plan)
        self.canaries = craft(
            canaries or features, features, outputs, normalize=normalize, clipping_norm=self.plan.clipping_norm,
            records_per_person=people, generator=self.generator,
        )  # fmt: skip
        if people is None:
            self.real = FeatureSet(torch.randn(count, features, generator=drawn))
            self.targets = torch.randint(outputs, (count,), generator=drawn)
        else:
            lengths = torch.randint(1, people + 1, (count,), generator=drawn)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            self.real = FeatureSet(torch.randn(int(offsets[-1]), features, generator=drawn), offsets)
            self.targets = torch.randint(outputs, (count, people), generator=drawn)
            self.targets[torch.arange(people) >= lengths[:, None]] = -1

    def make(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = Trainable(None, self.normalize, make_head(self.head, self.features, self.outputs))
        return made.double() if self.double else made

    def streams(self, number):
        return system_streams() if self.system else simulation_streams(self.seed, "holder", number)

    def setup(self, **changes):
        made = Setup(
            self.make, self.task, self.real, self.targets, self.plan, self.streams, self.canaries, self.generator
        )
        return replace(made, **changes)


def planted(bench, number=60, path=None):
    """The setup of a bench with planted gradients in place of crafted records."""
    people = bench.canaries.records
    canaries = plant(
        number, bench.make(), bench.real, bench.outputs, clipping_norm=bench.plan.clipping_norm,
        records_per_person=people, generator=bench.generator,
    )  # fmt: skip
    return bench.setup(canaries=canaries, path=path)


def drawn(setup, rounds):
    """The noise that a simulation's streams draw in so many rounds, in clipping norms."""
    parameters, found = setup.make_trainable().trained().values(), []
    for number in range(1, rounds + 1):
        for step in range(setup.plan.local_steps):
            noise = setup.streams_for(number).noise(step)
            parts = [noise.add(torch.zeros_like(p), noise_multiplier=1.0, clipping_norm=1.0) for p in parameters]
            found.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    return np.stack(found)


def clip_looser(monkeypatch, factor=1.5):
    """The clipping norm is larger than was claimed."""
    for path in (ClosedForm, Ghost):
        begin = path.begin
        monkeypatch.setattr(path, "begin", lambda self, f, t, norm, begin=begin: begin(self, f, t, factor * norm))


def clip_batches(monkeypatch):
    """The sum of a chunk is clipped, in place of each record."""

    def batch(x, y, weight, bias, clipping_norm, *, reach=None, scale=None, hot=None):
        total, total_bias = right(x, y, weight, bias, 1e9, reach=reach, scale=scale, hot=hot)
        length = torch.sqrt(total.square().sum() + total_bias.square().sum())
        factor = (clipping_norm * len(x) / length).clamp(max=1)
        return total * factor, total_bias * factor

    right = gradients.linear_softmax_clipped_sum
    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", batch)


def clip_records_of_persons(monkeypatch):
    """Each record is clipped by itself although the unit is a person."""
    private = Trainer._private

    def as_records(self, features, targets, plan, streams):
        if of_persons(targets) and len(targets):
            features, targets = FeatureSet(features.values), targets[targets >= 0]
        private(self, features, targets, plan, streams)

    monkeypatch.setattr(Trainer, "_private", as_records)


def count_truly(monkeypatch):
    """The divisor is the true number of units."""
    private = Trainer._private
    monkeypatch.setattr(
        Trainer,
        "_private",
        lambda self, f, t, plan, streams: private(self, f, t, replace(plan, declared_records=max(1, len(f))), streams),
    )


def let_nan_through(monkeypatch):
    """A record that isn't finite stays in the sum."""

    def blind(x, *, bias, normalize):
        reach, scale = right(x, bias=bias, normalize=normalize)
        return reach.nan_to_num(posinf=1.0), scale

    right = gradients.feature_reach
    monkeypatch.setattr(gradients, "feature_reach", blind)


def spare_the_bias(monkeypatch):
    """No noise on parameters of one dimension."""
    noisy = PrivateOptimizer.add_noise

    def add_noise(self):
        noisy(self)
        for p in self.params:
            if p.dim() == 1:
                p.grad = p.summed_grad.clone()

    monkeypatch.setattr(PrivateOptimizer, "add_noise", add_noise)


def leave_beside(monkeypatch):
    """A little of the sum without noise is added to the parameters after the step."""
    right = PrivateOptimizer.step

    def step(self, closure=None):
        sums = [p.grad if p.summed_grad is None else p.summed_grad for p in self.params]
        right(self, closure)
        for p, total in zip(self.params, sums, strict=True):
            if total is not None:
                p.detach().add_(total, alpha=1e-5)

    monkeypatch.setattr(PrivateOptimizer, "step", step)


def read_other_records(monkeypatch):
    """Batches of a shuffled order in place of the sample that was drawn."""
    read = Trainer._read

    def shuffled(self, samples, chunk):
        count = len(self.path.features)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
        yield from read(self, [order[: len(sample)].sort().values for sample in samples], chunk)

    monkeypatch.setattr(Trainer, "_read", shuffled)
