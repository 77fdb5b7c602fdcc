"""Deployed sums are in float64: every gradient path adds up what one record at a time gives, to the last bits."""

import pytest
import torch
from torch import nn

from fedhead.client.paths import make_path
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, AdamW, TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import SHRINK
from fedhead.common.privacy.noise import system_streams
from fedhead.common.tasks.classification import Classification

N, D, K, C = 40, 16, 5, 0.7
TASK = Classification(TaskSettings(labels=list("abcde")))
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Tokens(nn.Module):
    """A head on sequences: (B, T, D) -> (B, K)."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(D, 12), nn.Linear(12, K)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)).mean(1))


def linear():
    return nn.Linear(D, K)


def mlp():
    return nn.Sequential(nn.Linear(D, 12), nn.LayerNorm(12), nn.Tanh(), nn.Dropout(0.0), nn.Linear(12, K))


CASES = [
    (linear, (D,), "closed-form"),
    (linear, (D,), "ghost"),
    (linear, (D,), "hooks"),
    (mlp, (D,), "ghost"),
    (mlp, (D,), "hooks"),
    (Tokens, (3, D), "ghost"),
    (Tokens, (40, D), "ghost"),
    (Tokens, (40, D), "hooks"),
]


def made(head, dtype=torch.float64, normalize=False):
    torch.manual_seed(1)
    return Trainable(None, normalize, head()).to(dtype).train()


def records(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return FeatureSet((3 * torch.randn(N, *shape, generator=g)).to(dtype)), torch.randint(K, (N,), generator=g)


def by_record(trainable, features, targets, clip=SHRINK * C):
    """The clipped sum by autograd, one record at a time."""
    parameters = list(trainable.trained().values())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(N):
        values = features.values[i : i + 1].to(parameters[0].dtype)
        gradients = torch.autograd.grad(TASK.losses(trainable(values, None), targets[i : i + 1]).sum(), parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for part, g in zip(total, gradients, strict=True):
            part.add_(g * min(1.0, clip / norm))
    return torch.cat([part.flatten() for part in total])


def summed(trainable, path, features, targets, pieces):
    path = make_path(trainable, TASK, path)
    path.begin(features, targets, C)
    try:
        for rows in pieces:
            path.add_rows(rows)
        return torch.cat([p.summed_grad.flatten() for p in path.parameters])
    finally:
        path.end()


@pytest.mark.parametrize(("head", "shape", "path"), CASES)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_path_is_right_in_float64(head, shape, path, stored, normalize):
    trainable, data = made(head, normalize=normalize), records(shape, stored)
    expected = by_record(trainable, *data)
    for pieces in ([slice(0, N)], [slice(0, 7), slice(7, N)], [torch.arange(N).flip(0)]):
        found = summed(trainable, path, *data, pieces)
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("head", "shape", "path"), CASES)
def test_float32_is_told_apart(head, shape, path):
    """Twin: the same in float32 is off by far more than the bound above."""
    data = records(shape)
    expected = by_record(made(head), *data)
    found = summed(made(head, torch.float32), path, *data, [slice(0, N)])
    assert found.dtype == torch.float32
    assert 1e-8 < (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("head", "shape", "path"), CASES)
@pytest.mark.parametrize("mechanism", ["full-batch", "poisson"])
def test_secure_rounds_run_on_every_path(head, shape, path, mechanism):
    trainable, data = made(head), records(shape)
    before = torch.cat([p.detach().flatten() for p in trainable.trained().values()])
    rate = 0.3 if mechanism == "poisson" else None
    for optimizer in (SGD(momentum=0.9), AdamW(kind="adamw")):
        plan = StepPlan(mechanism, 1.3, C, rate, 2, N, optimizer, 0.1, proximal_mu=0.1, chunk=16)
        Trainer(trainable, TASK, path).round(*data, plan, system_streams())
    after = torch.cat([p.detach().flatten() for p in trainable.trained().values()])
    assert after.dtype == torch.float64
    assert after.isfinite().all()
    assert (after != before).all()


@pytest.mark.parametrize("path", ["closed-form", "ghost", "hooks"])
def test_broken_records_are_left_out_in_float64(path):
    features, targets = records((D,))
    values = features.values.clone()
    values[3], values[9, 2] = torch.nan, torch.inf
    keep = torch.tensor([i not in (3, 9) for i in range(N)])
    trainable = made(linear)
    found = summed(trainable, path, FeatureSet(values), targets, [slice(0, N)])
    expected = summed(trainable, path, FeatureSet(values[keep]), targets[keep], [slice(0, N - 2)])
    assert (found - expected).abs().max() < 1e-12


def test_dropout_of_a_secure_round_is_fresh_and_leaves_torch_alone():
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        head = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, K)).double()
        trainable = Trainable(None, False, head)
        torch.manual_seed(4)
        state = torch.get_rng_state()
        plan = StepPlan("full-batch", 1e-9, C, None, 1, N, SGD(), 1.0)
        Trainer(trainable, TASK, "ghost").round(*records((D,)), plan, system_streams())
        assert torch.equal(torch.get_rng_state(), state)
        found.append(head[1].weight.detach().clone())
    assert (found[0] - found[1]).abs().max() > 1e-3
