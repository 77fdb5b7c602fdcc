"""Closed form, ghost and hooks give the update of Opacus itself; what is wrong is told apart."""

import copy

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional as F

from fedhead.client.gradients import ClosedForm
from fedhead.client.hooked import Ghost, _sequence_norms, linear_norms
from fedhead.client.paths import make_path
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, Adam, AdamW, TaskSettings
from fedhead.common.errors import FedheadError, InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.noise import TorchNoise, simulation_streams
from fedhead.common.privacy.summing import CANCEL
from fedhead.common.tasks.classification import Classification

N, D, K = 60, 16, 5
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's own wrapper
TASK = Classification(TaskSettings(labels=list("abcde")))
PATHS = ["closed-form", "ghost", "hooks"]


class OneStream:
    """The same generator for the noise of all steps, as Opacus's own optimizer draws it."""

    seeded = True

    def __init__(self, seed=7):
        self.source = torch.Generator().manual_seed(seed)

    def generator(self, step, purpose):
        return torch.Generator().manual_seed(1000 * step + len(purpose))

    def noise(self, step):
        return TorchNoise(self.source)


def records(shape=(D,), n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return FeatureSet(3 * torch.randn(n, *shape, generator=g)), torch.randint(K, (n,), generator=g)


def linear(normalize=False, bias=True, seed=1):
    torch.manual_seed(seed)
    return Trainable(None, normalize, nn.Linear(D, K, bias=bias))


def mlp(normalize=True, dropout=0.0, seed=1):
    torch.manual_seed(seed)
    return Trainable(
        None,
        normalize,
        nn.Sequential(nn.Linear(D, 12), nn.LayerNorm(12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, K)),
    )


def plan(optimizer=None, **changes):
    given = {
        "mechanism": "full-batch",
        "noise_multiplier": 1.3,
        "clipping_norm": 0.7,
        "sample_rate": None,
        "local_steps": 5,
        "declared_records": 50,
        "optimizer": optimizer or SGD(momentum=0.9),
        "learning_rate": 0.5,
    }
    return StepPlan(**{**given, **changes})


def flat(trainable):
    return torch.cat([p.detach().flatten() for p in trainable.trained().values()])


def trained(trainable, path, given, data, streams=None):
    trainable = copy.deepcopy(trainable)
    Trainer(trainable, TASK, path).round(*data, given, streams or OneStream())
    return flat(trainable)


def by_opacus(trainable, given, data, optimizer):
    """Plain Opacus: its module wrapper, its optimizer, its clipping, its noise."""
    trainable = copy.deepcopy(trainable)
    module = GradSampleModule(trainable, loss_reduction="mean")
    private = DPOptimizer(
        optimizer(trainable.parameters()),
        noise_multiplier=given.noise_multiplier,
        max_grad_norm=given.clipping_norm,
        expected_batch_size=given.declared_records,
        generator=torch.Generator().manual_seed(7),
    )
    features, targets = data
    for _ in range(given.local_steps):
        private.zero_grad()
        F.cross_entropy(module(features.values), targets).backward()
        private.step()
    return flat(trainable)


OPTIMIZERS = [
    (SGD(), lambda p: torch.optim.SGD(p, lr=0.5)),
    (SGD(momentum=0.9, weight_decay=0.01), lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.01)),
    (Adam(kind="adam"), lambda p: torch.optim.Adam(p, lr=0.5)),
    (AdamW(kind="adamw", weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.1)),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("settings", "optimizer"), OPTIMIZERS[:2])
def test_every_path_equals_opacus_on_a_linear_head(path, normalize, settings, optimizer):
    head, given, data = linear(normalize), plan(settings), records()
    found = trained(head, path, given, data)
    assert (found - by_opacus(head, given, data, optimizer)).abs().max() < 1e-6


@pytest.mark.parametrize("path", ["ghost", "hooks"])
@pytest.mark.parametrize(("settings", "optimizer"), OPTIMIZERS)
def test_both_paths_equal_opacus_on_an_mlp(path, settings, optimizer):
    # Adam divides by the root of what it saw: where that is near 0, rounding of 1e-7 grows
    head, given, data = mlp(), plan(settings, noise_multiplier=3.0), records()
    found = trained(head, path, given, data)
    close = 1e-6 if isinstance(settings, SGD) else 1e-4
    assert (found - by_opacus(head, given, data, optimizer)).abs().max() < close


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("path", ["ghost", "hooks"])
def test_paths_agree_from_the_same_seed_with_poisson(path, bias, normalize):
    head, data = linear(normalize, bias), records()
    given = plan(mechanism="poisson", sample_rate=0.2)
    streams = simulation_streams(3, "holder", 4)
    closed = trained(head, "closed-form", given, data, streams)
    assert (trained(head, path, given, data, streams) - closed).abs().max() < 1e-6
    assert not torch.equal(trained(head, "closed-form", given, data, simulation_streams(3, "holder", 5)), closed)


class Tokens(nn.Module):
    """A head on sequences: (B, T, D) -> (B, K)."""

    def __init__(self, tokens, width):
        super().__init__()
        self.inner = nn.Linear(D, width)
        self.out = nn.Linear(width, K)
        self.tokens = tokens

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)).mean(1))


@pytest.mark.parametrize(("tokens", "width"), [(3, 12), (40, 3)], ids=["gram", "per record"])
def test_both_norms_of_a_sequence_equal_micro_batches(tokens, width):
    torch.manual_seed(2)
    head = Trainable(None, False, Tokens(tokens, width))
    assert (tokens**2 <= D * width) == (tokens == 3)
    features, targets = records((tokens, D), n=7)
    path = Ghost(head, TASK)
    path.begin(features, targets, 0.2)
    path.add_rows(slice(0, 7))
    path.end()
    expected = [torch.zeros_like(p) for p in path.parameters]
    for i in range(7):
        gradients = torch.autograd.grad(
            TASK.losses(head(features.values[i : i + 1]), targets[i : i + 1]).sum(), path.parameters
        )
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for total, g in zip(expected, gradients, strict=True):
            total.add_(g * min(1.0, 0.2 / norm))
    for p, total in zip(path.parameters, expected, strict=True):
        assert torch.allclose(p.summed_grad, total, atol=1e-6)


def test_norm_of_a_sequence_that_cancels_is_not_lost():
    """g = +1, -1 on nearly the same activation: in float32 the Gram sum rounds the difference away."""
    layer = nn.Linear(8, 8)
    a = torch.ones(1, 2, 8) * 1000
    a[0, 1, 0] += 500
    g = torch.ones(1, 2, 8)
    g[0, 1] = -1
    found = linear_norms(layer, a, g)
    assert found[layer.weight].item() == pytest.approx(500 * 8**0.5, rel=1e-9)
    a[0, 1, 0] = 1000.25
    found = linear_norms(layer, a, g)
    assert _sequence_norms(a, g).item() == pytest.approx(0.25 * 8**0.5, rel=1e-5)
    sizes = g.norm(dim=2) * a.norm(dim=2)  # a floor: rounding of the sum is a share of these
    assert found[layer.weight].item() == pytest.approx(CANCEL * sizes.sum().item(), rel=1e-6)
    assert found[layer.bias].item() == pytest.approx(CANCEL * 2 * 8**0.5, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mechanism", ["full-batch", "none"])
@pytest.mark.parametrize("chunk", [1, 7, 59, 60, 4096])
def test_chunks_change_nothing(path, mechanism, chunk):
    head, data = linear(True), records()
    whole = trained(head, path, plan(mechanism=mechanism), data)
    assert (trained(head, path, plan(mechanism=mechanism, chunk=chunk), data) - whole).abs().max() < 1e-6


def test_dropout_comes_from_its_own_stream():
    head, data, given = mlp(dropout=0.5), records(), plan(noise_multiplier=0.01)
    torch.manual_seed(0)
    first, state = trained(head, "ghost", given, data), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is as it was
    torch.manual_seed(99)
    assert torch.equal(trained(head, "ghost", given, data), first)
    assert not torch.allclose(trained(mlp(dropout=0.0), "ghost", given, data), first, atol=1e-3)


def summed(trainable, path, data, c=0.7):
    path = make_path(trainable, TASK, path) if isinstance(path, str) else path
    path.begin(*data, c)
    path.add_rows(slice(0, len(data[1])))
    path.end()
    found = torch.cat([p.summed_grad.flatten() for p in path.parameters])
    for p in path.parameters:
        p.summed_grad = None
    return found


class PerBatch(ClosedForm):
    """Twin: clips the batch's gradient once."""

    def _add(self, x, y, reach, scale, hot=None):
        head = self.head
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                F.cross_entropy(F.linear(x, head.weight, head.bias), y, reduction="sum"), self.parameters
            )
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        self._accumulate([g * min(1.0, self.clipping_norm / norm) for g in gradients])


class TooMuch(ClosedForm):
    """Twin: clips at 1.5 C."""

    def _add(self, x, y, reach, scale, hot=None):
        self.clipping_norm *= 1.5
        super()._add(x, y, reach, scale, hot)
        self.clipping_norm /= 1.5


@pytest.mark.parametrize("twin", [PerBatch, TooMuch])
def test_wrong_clipping_is_told_apart(twin):
    head, data = linear(), records()
    right = summed(head, "closed-form", data)
    assert (summed(head, "hooks", data) - right).abs().max() < 1e-5
    assert (summed(head, twin(head, TASK), data) - right).abs().max() > 0.1
    single = FeatureSet(data[0].values[:1] * 100), data[1][:1]
    if twin is TooMuch:
        assert summed(head, twin(head, TASK), single).norm() > 0.7 * 1.4


class WrongShape(Classification):
    """Twin: a loss of shape (B, 1), with which Opacus clips wrongly and says nothing."""

    closed_form = None

    def losses(self, outputs, targets):
        return super().losses(outputs, targets).unsqueeze(1)


class MeanLoss(Classification):
    """Twin: one loss for the whole batch."""

    closed_form = None

    def losses(self, outputs, targets):
        return super().losses(outputs, targets).mean()


@pytest.mark.parametrize("task", [WrongShape, MeanLoss])
@pytest.mark.parametrize("path", ["ghost", "hooks"])
def test_loss_of_another_shape_is_refused(task, path):
    trainer = Trainer(linear(), task(TaskSettings(labels=list("abcde"))), path)
    with pytest.raises(InputError, match=r"^task.losses is of shape"):
        trainer.round(*records(), plan(), OneStream())


class Loose(nn.Module):
    """A head with a parameter that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(D, K), nn.Linear(D, K)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("path", ["ghost", "hooks"])
def test_a_layer_without_gradient_is_named(path):
    with pytest.raises(FedheadError, match=r"trains head.unused.weight"):
        Trainer(Trainable(None, False, Loose()), TASK, path).round(*records(), plan(), OneStream())


def test_hooks_are_gone_after_a_round():
    head = mlp()
    for _ in range(2):  # a second trainer on the same module would fail on hooks left behind
        Trainer(head, TASK, "ghost").round(*records(), plan(), OneStream())
        Trainer(head, TASK, "hooks").round(*records(), plan(), OneStream())
    assert not any(module._forward_hooks or module._backward_hooks for module in head.modules())
    assert not any(hasattr(p, name) for p in head.parameters() for name in ("grad_sample", "_current_grad_sample"))


def test_default_path_and_names():
    assert type(make_path(linear(), TASK)) is ClosedForm
    assert type(make_path(mlp(), TASK)) is Ghost
    assert type(make_path(linear(), WrongShape(TaskSettings(labels=list("abcde"))))) is Ghost
    with pytest.raises(InputError, match=r"^path is 'fast'"):
        make_path(linear(), TASK, "fast")
    with pytest.raises(InputError, match=r"^path is 'closed-form'"):
        make_path(mlp(), TASK, "closed-form")
