"""Code of a user's own in a head or task that would let one record move the sum by more than the clipping norm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedhead.client.paths import make_path
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.errors import ModelError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.tasks.classification import Classification

N, D, K = 40, 8, 3
SETTINGS = TaskSettings(labels=["a", "b", "c"])


class Centred(nn.Module):
    """Takes the mean of the batch away: every record's output depends on every other's."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, K)

    def forward(self, x):
        return self.out(x - x.mean(0))


class Tied(nn.Module):
    """Uses a weight outside of its layer, where no hook sees it."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(D, D)
        self.out = nn.Linear(D, K)

    def forward(self, x):
        return self.out(F.linear(torch.tanh(self.into(x)), self.into.weight.t()))


class Gated(nn.Module):
    """Nothing wrong with it: two layers, a product, dropout."""

    def __init__(self):
        super().__init__()
        self.gate, self.out, self.drop = nn.Linear(D, D), nn.Linear(D, K), nn.Dropout(0.5)

    def forward(self, x):
        return self.out(self.drop(x * self.gate(x).sigmoid()))


class Relative(Classification):
    """A record's loss is measured against the batch's."""

    closed_form = None

    def losses(self, outputs, targets):
        found = super().losses(outputs, targets)
        return found * found.detach().mean() + found - found.mean()


class Sharper(Classification):
    """Another loss, with `closed_form` inherited by oversight."""

    def losses(self, outputs, targets):
        return F.cross_entropy(3 * outputs, targets, reduction="none", label_smoothing=0.2)


def train(head, task, path):
    g = torch.Generator().manual_seed(0)
    records, targets = FeatureSet(torch.randn(N, D, generator=g)), torch.randint(K, (N,), generator=g)
    torch.manual_seed(1)
    trainable = Trainable(None, True, head)
    plan = StepPlan("full-batch", 1.0, 0.3, None, 1, N, SGD(), 1.0)
    Trainer(trainable, task, path).round(records, targets, plan, simulation_streams(0, "a", 1))
    return trainable


@pytest.mark.parametrize("path", ["ghost", "hooks"])
@pytest.mark.parametrize(("head", "task"), [(Centred, Classification), (nn.Linear, Relative)])
def test_records_that_are_mixed_are_refused(head, task, path):
    made = head(D, K) if head is nn.Linear else head()
    with pytest.raises(ModelError, match="not its own"):
        train(made, task(SETTINGS), path)


def test_a_weight_used_outside_of_its_layer_is_refused():
    head = Tied()
    before = [p.detach().clone() for p in head.parameters()]
    with pytest.raises(ModelError, match="not its own"):
        train(head, Classification(SETTINGS), "ghost")
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    assert not any(module._forward_hooks for module in head.modules())


@pytest.mark.parametrize("path", ["ghost", "hooks"])
def test_own_code_that_keeps_records_apart_trains(path):
    torch.manual_seed(2)
    trainable = train(Gated(), Classification(SETTINGS), path)
    assert all(bool(p.isfinite().all()) for p in trainable.parameters())
    assert trainable.head.drop.training


def test_a_loss_that_is_no_cross_entropy_never_takes_its_closed_form():
    trainable = Trainable(None, True, nn.Linear(D, K))
    assert type(make_path(trainable, Classification(SETTINGS))).__name__ == "ClosedForm"
    assert type(make_path(trainable, Sharper(SETTINGS))).__name__ == "Ghost"
