"""Where a gradient cancels inside the network, only its rounding goes on, and its clipped norm must still be kept."""

import copy
from pathlib import Path
from runpy import run_path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedhead.client.hooked import Ghost
from fedhead.client.paths import make_path
from fedhead.common.config.schema import MLPHead, TaskSettings
from fedhead.common.errors import ModelError
from fedhead.common.features import FeatureSet
from fedhead.common.models.heads import make_head
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks.classification import Classification

SUMS = run_path(str(Path(__file__).with_name("bounded_sums.py")))
CUT = run_path(str(Path(__file__).parents[1] / "unit" / "models" / "test_cut.py"))
D, H, K = 12, 8, 5
TASK = Classification(TaskSettings(labels=list("abcde")))
SIZES = {torch.float32: 1 + 2.0**-20, torch.float64: 1}


class TwoPasses(Ghost):
    """Twin: norms of one backward pass, and the sum of a second one, whose losses are multiplied by the factors."""

    def _add_finite(self, values, lengths, targets):
        seen = {}
        self._weighted = lambda factors: seen.setdefault("factors", factors) is None or list(self.parameters)
        self._accumulate = lambda sums: None
        try:
            super()._add_finite(values, lengths, targets)
        finally:
            del self._weighted, self._accumulate
        self.hooks.disable_hooks()
        losses = self._losses(values, lengths, targets)
        self._accumulate(list(torch.autograd.grad(losses @ seen["factors"], self.parameters)))
        self.hooks.enable_hooks()


def alike(dtype, normalize, large, length, seed):
    """An mlp whose last layer has the same row for all labels: what comes back to its hidden units is rounding."""
    drawn = torch.Generator().manual_seed(seed)
    made = Trainable(None, normalize, make_head(MLPHead(kind="mlp", hidden=[H], activation="tanh"), D, K)).to(dtype)
    first, bias, last, of_labels = made.trained().values()
    with torch.no_grad():
        first.copy_(torch.randn(H, D, generator=drawn) / (1 if normalize else length))
        bias.copy_(0.3 * torch.randn(H, generator=drawn))
        last.copy_(large * torch.randn(1, H, generator=drawn).expand(K, H))
        of_labels.copy_(torch.randn(K, generator=drawn))
    return made


def one_huge(length):
    row = torch.zeros(1, D)
    row[0, 3] = length
    return FeatureSet(row)


def largest_of_mlps(path, dtype, normalize, large, length):
    return max(
        SUMS["clipped_sum"](
            path(alike(dtype, normalize, large, length, seed), TASK), one_huge(length), torch.tensor([seed % K]), 1.0
        ).norm()
        for seed in range(12)
    )


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_alike_rows_in_the_last_layer(dtype, normalize):
    @given(st.sampled_from([1.0, 1e3, 1e5]), st.floats(0, 12).map(lambda power: 10**power))
    @settings(max_examples=12, deadline=None, derandomize=True)
    def check(large, length):
        assert largest_of_mlps(Ghost, dtype, normalize, large, length) <= SIZES[dtype]

    check()


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 1e6), (torch.float32, 1e12), (torch.float64, 1e12)])
def test_two_passes_break_the_bound_of_alike_rows(dtype, length):
    assert max(largest_of_mlps(TwoPasses, dtype, False, large, length) for large in (1.0, 1e3, 1e5)) > 1.05
    ordinary = largest_of_mlps(TwoPasses, torch.float64, True, 1.0, 1.0)
    assert ordinary == pytest.approx(float(largest_of_mlps(Ghost, torch.float64, True, 1.0, 1.0)), rel=1e-6)


def encoder(unfreeze):
    backbone = CUT["make"]("bert", unfreeze)
    width = backbone.forward(backbone.collate(CUT["inputs"](backbone)))[0].shape[-1]
    torch.manual_seed(0)
    made = Trainable(copy.deepcopy(backbone.tail), True, make_head(MLPHead(kind="mlp", hidden=[6]), backbone.dim, K))
    moved = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.trained().values():
            inputs = p[0].numel() if p.dim() > 1 else 3
            p.add_(torch.randn(p.shape, generator=moved) * 0.3 / inputs**0.5)
    return made, width


def largest_of_encoders(path, unfreeze, dtype, scale):
    made, width = encoder(unfreeze)
    path = path(made.to(dtype), TASK)
    return max(
        SUMS["clipped_sum"](path, FeatureSet(tokens, torch.tensor([0, 2])), torch.tensor([0]), 1.0).norm()
        for seed in range(8)
        for tokens in [scale * torch.randn(1, width, generator=torch.Generator().manual_seed(seed)).expand(2, width)]
    )


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("unfreeze", [1, 2])
def test_tokens_that_are_all_the_same(unfreeze, dtype):
    for scale in (1.0, 1e4, 1e6, 1e8):
        assert largest_of_encoders(Ghost, unfreeze, dtype, scale) <= SIZES[dtype]


@pytest.mark.parametrize("unfreeze", [1, 2])
def test_two_passes_break_the_bound_of_tokens(unfreeze):
    assert max(largest_of_encoders(TwoPasses, unfreeze, torch.float32, scale) for scale in (1e6, 1e8)) > 1.05


class Twice(nn.Module):
    """A head that uses a linear layer twice, or the weight of one in another."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, K)
        if tied:
            self.second.weight = self.first.weight
        else:
            self.second = self.first

    def forward(self, x):
        return self.out(self.second(self.first(x)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_that_would_be_measured_in_parts_is_refused(tied, monkeypatch):
    monkeypatch.setattr("fedhead.client.hooked.has_own_code", lambda *_: False)
    path = make_path(Trainable(None, False, Twice(tied)), TASK, "ghost")
    with pytest.raises(ModelError, match="more than once: norms would be measured in parts"):
        SUMS["clipped_sum"](path, one_huge(1.0), torch.tensor([0]), 1.0)
