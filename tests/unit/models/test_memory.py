"""The bound on memory: records go through the trained part in pieces, and what comes out doesn't change."""

import pytest
import torch
from torch import nn

from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models import memory
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.tasks.classification import Classification
from fedhead.server.evaluation import outputs_of

TASK = Classification(TaskSettings(labels=["a", "b", "c"]))


class Tail(nn.Module):
    """A layer behind a cut; remembers how many records came at once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 16)
        self.seen = []

    def forward(self, values, lengths=None):
        self.seen.append(len(values))
        return self.layer(values).mean(1)


def data():
    torch.manual_seed(0)
    return Labelled(FeatureSet(torch.randn(40, 5, 8)), torch.arange(40) % 3)


def trained():
    torch.manual_seed(1)
    return Trainable(Tail(), False, nn.Linear(16, 3))


@pytest.fixture
def little(monkeypatch):
    """Room for seven records of five positions, by what leaves the two layers."""
    monkeypatch.setattr(memory, "BYTES", 7 * (5 * 16 + 3) * 4)


def test_evaluation_behind_a_cut_is_bounded_and_changes_nothing(little, monkeypatch):
    trainable, records = trained(), data()
    found = outputs_of(trainable, records)
    assert trainable.tail.seen == [1] + [7] * 5 + [5]  # the first is made up, to count
    monkeypatch.setattr(memory, "BYTES", 2**28)
    torch.testing.assert_close(found, outputs_of(trainable, records), rtol=1e-5, atol=1e-6)
    assert trainable.tail.seen[7:] == [1, 40]


def test_the_longest_record_counts(little):
    lengths = torch.tensor([1, 5, 2])
    features = FeatureSet(torch.full((8, 8), torch.nan), torch.tensor([0, *lengths]).cumsum(0))
    trainable, before = trained(), torch.get_rng_state()
    for mode in (True, False):
        trainable.train(mode)
        assert memory.records_at_once(trainable, features, 4096) == 7
        assert trainable.training == trainable.head.training == mode
    assert not any(module._forward_hooks for module in trainable.modules())
    assert torch.equal(before, torch.get_rng_state())


def test_plain_training_behind_a_cut_is_bounded_and_changes_nothing(little, monkeypatch):
    records = data()
    plan = StepPlan("none", 0.0, 1.0, None, 2, 40, SGD(), 0.5)

    def after():
        trainable = trained()
        Trainer(trainable, TASK).round(records.features, records.targets, plan, simulation_streams(0, "holder", 1))
        return torch.cat([p.detach().flatten() for p in trainable.trained().values()]), trainable.tail.seen

    small, pieces = after()
    assert pieces[-12:] == ([7] * 5 + [5]) * 2
    monkeypatch.setattr(memory, "BYTES", 2**28)
    whole, pieces = after()
    assert pieces[-2:] == [40, 40]
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-6)


def test_a_head_alone_has_its_whole_batch():
    trainable = Trainable(None, True, nn.Linear(2048, 1000))
    assert memory.records_at_once(trainable, FeatureSet(torch.zeros(3, 2048)), 4096) == 4096
    assert memory.records_at_once(trainable, FeatureSet(torch.zeros(0, 2048)), 4096) == 4096
    assert memory.records_at_once(trainable, FeatureSet(torch.zeros(1).expand(3, 2**27)), 4096) == 1


def test_a_convolution_counts_with_what_leaves_it_not_with_its_weights(monkeypatch):
    tail = nn.Sequential(nn.Conv2d(4, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tail.forward = lambda values, lengths=None: nn.Sequential.forward(tail, values)
    monkeypatch.setattr(memory, "BYTES", 5 * (64 * 2 * 2 + 64 + 64 + 3) * 4)
    trainable = Trainable(tail, True, nn.Linear(64, 3))
    assert memory.records_at_once(trainable, FeatureSet(torch.zeros(9, 4, 2, 2)), 4096) == 5
