"""Training with secure noise: what is released lies on the lattice, is fresh, and is refused where no bound holds."""

import numpy as np
import pytest
import torch
from torch import nn

from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.errors import InputError, RunError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy import secure
from fedhead.common.privacy.lattice import MOST_RECORDS, lattice_step
from fedhead.common.privacy.noise import system_streams
from fedhead.common.tasks.classification import Classification

TASK = Classification(TaskSettings(labels=list("abc")))


def plan(**changes):
    given = ("full-batch", 1.3, 0.7, None, 2, 25, SGD(), 0.5)
    return StepPlan(*given, **changes)


def records(n=30):
    g = torch.Generator().manual_seed(0)
    return FeatureSet(torch.randn(n, 6, generator=g)), torch.randint(3, (n,), generator=g)


def head(dtype=torch.float64):
    torch.manual_seed(1)
    return Trainable(None, True, nn.Linear(6, 3)).to(dtype)


@pytest.mark.parametrize("source", secure.SOURCES)
def test_a_secure_round_releases_multiples_of_the_step(source):
    trainable = head()
    before = [p.detach().clone() for p in trainable.trained().values()]
    one = StepPlan("full-batch", 1.3, 0.7, None, 1, 1, SGD(), 1.0)
    Trainer(trainable, TASK).round(*records(), one, system_streams(source))
    for a, p in zip(before, trainable.trained().values(), strict=True):
        steps = (a - p.detach()).numpy() / lattice_step(0.7)
        assert p.dtype == torch.float64
        assert np.abs(steps - np.round(steps)).max() < 1e-4  # the weights' own rounding
        assert len(np.unique(np.round(steps))) > 1


def test_two_secure_rounds_differ():
    found = []
    for _ in range(2):
        trainable = head()
        torch.manual_seed(5)
        Trainer(trainable, TASK).round(*records(), plan(), system_streams())
        found.append(trainable.head.weight.detach().clone())
    assert not torch.equal(*found)


def test_secure_streams_refuse_float32_and_too_many_records(monkeypatch):
    trainable = head(torch.float32)
    before = trainable.head.weight.detach().clone()
    with pytest.raises(InputError, match=r"^trainable is torch.float32"):
        Trainer(trainable, TASK).round(*records(), plan(), system_streams())
    assert torch.equal(trainable.head.weight, before)

    class Many(FeatureSet):
        def __len__(self):
            return MOST_RECORDS + 1

        def batch(self, index):
            raise AssertionError("records were read")

    many = Many(torch.zeros(1, 6)), torch.zeros(MOST_RECORDS + 1, dtype=torch.long)
    with pytest.raises(InputError, match=r"^data.source counts as more than 1048576 records") as error:
        Trainer(head(), TASK).round(*many, plan(), system_streams())
    assert "1048577" not in str(error.value)


def test_weights_are_looked_at_before_every_secure_step():
    """Huge weights from a server, or from its learning rate: gradients would then tell how batches were cut."""
    trainable = head()
    with torch.no_grad():
        trainable.head.weight.mul_(1e12)
    with pytest.raises(InputError, match=r"^the head's weights are longer"):
        Trainer(trainable, TASK).round(*records(), plan(), system_streams())
    fast = StepPlan("full-batch", 1.3, 0.7, None, 2, 25, SGD(), 1e12)
    with pytest.raises(InputError, match=r"^the head's weights are longer"):
        Trainer(head(), TASK).round(*records(), fast, system_streams())


def test_a_broken_gradient_path_releases_nothing(monkeypatch):
    trainer = Trainer(head(), TASK)
    before = trainer.trainable.head.weight.detach().clone()
    broken = torch.full((3,), torch.nan, dtype=torch.float64)
    monkeypatch.setattr(trainer.path, "add_rows", lambda rows: setattr(trainer.parameters[1], "summed_grad", broken))
    with pytest.raises(RunError, match="out of its range"):
        trainer.round(*records(), plan(), system_streams())
    assert torch.equal(trainer.trainable.head.weight, before)
    assert all(p.grad is None and p.summed_grad is None for p in trainer.parameters)
