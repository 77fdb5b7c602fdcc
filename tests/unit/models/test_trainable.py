"""What is trained, as one module: features are normalised, dropout alone trains besides the parameters."""

import copy

import torch
from opacus import GradSampleModule
from torch import nn

from fedhead.common.config.schema import LinearHead
from fedhead.common.models.heads import make_head
from fedhead.common.models.trainable import Trainable, unsupported_leaves


def test_trainable_without_tail_normalises_and_travels_small():
    head = make_head(LinearHead(), 5, 3)
    nn.init.normal_(head.weight)
    trainable = Trainable(None, True, head)
    values = torch.randn(4, 5)
    torch.testing.assert_close(trainable(values), head(values / values.norm(dim=1, keepdim=True)))
    torch.testing.assert_close(trainable(values * 1000), trainable(values))
    assert torch.isfinite(trainable(torch.zeros(1, 5))).all()
    assert list(trainable.trained()) == ["head.weight", "head.bias"]
    assert trainable(torch.randn(2, 7, 5)).shape == (2, 7, 3)  # a sequence of feature vectors a record


def test_dropout_of_the_head_trains_and_its_batchnorm_does_not():
    trainable = Trainable(None, False, nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)))
    norm, dropout, linear = trainable.head
    assert (norm.training, dropout.training, linear.training) == (False, True, True)
    trainable.eval()
    assert not any(module.training for module in trainable.modules())
    assert unsupported_leaves(trainable) == ["head.0 (BatchNorm1d)"]


def test_channels_last_values_give_the_same_gradients():
    """Opacus's own convolution sampler would give other ones: it takes the contiguous layout for granted."""
    trainable = Trainable(None, True, nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2)))
    values = torch.randn(5, 4, 4, 3).permute(0, 3, 1, 2)
    samples = []
    for batch in (values, values.contiguous()):
        hooked = GradSampleModule(copy.deepcopy(trainable), loss_reduction="sum")
        hooked(batch).square().sum().backward()
        samples.append(hooked._module.head[0].weight.grad_sample)
    torch.testing.assert_close(samples[0], samples[1])
