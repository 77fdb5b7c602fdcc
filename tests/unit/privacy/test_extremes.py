"""Numbers at the ends of float32, and records of very different lengths."""

import pytest
import torch
from torch import nn

from fedhead.client.paths import make_path
from fedhead.common.config.schema import TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import linear_softmax_clipped_sum
from fedhead.common.tasks.classification import Classification


@pytest.mark.parametrize("confidence", [50.0, 52.0, 53.0, 54.0, 60.0])
def test_a_gradient_whose_square_is_lost_is_clipped_all_the_same(confidence):
    x, norm = torch.zeros(1, 4), 1e-6
    x[0, 0] = 9e17
    weight, bias = linear_softmax_clipped_sum(
        x, torch.tensor([0]), torch.zeros(2, 4), torch.tensor([confidence, 0.0]), norm
    )
    assert bias is not None
    assert float(torch.cat([weight.flatten(), bias]).double().norm()) <= norm


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(384, 384)

    def forward(self, values, lengths=None):
        return self.layer(values).mean(1)


@pytest.mark.parametrize("lengths", [[1, 512, 512], [512, 1, 1]])
def test_chunks_have_room_for_the_longest_record_wherever_it_stands(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    features = FeatureSet(torch.zeros(int(offsets[-1]), 384), offsets)
    task = Classification(TaskSettings(labels=["a", "b"]))
    path = make_path(Trainable(Tail(), True, nn.Linear(384, 2)), task, "ghost")
    path.begin(features, torch.zeros(3, dtype=torch.int64), 1.0)
    assert path.records_at_once(4096) == 2**26 // (512 * (384 + 2))  # what leaves both layers
    path.end()
