"""What the bounds on clipped sums are tried on: small heads, records that no model expects, and the sum itself."""

import torch
from hypothesis import strategies as st
from torch import nn

from fedhead.common.config.schema import TaskSettings
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks.classification import Classification

D, K = 4, 3
TASK = Classification(TaskSettings(labels=list("abc")))
NUMBERS = st.one_of(
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3e38, 1e-40, 1e19, 1e17, -1e17]),
)
RECORDS = st.tuples(st.lists(NUMBERS, min_size=D, max_size=D), st.integers(0, K - 1))
HEADS = {
    "linear": lambda: nn.Linear(D, K),
    "no bias": lambda: nn.Linear(D, K, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, K)),
}


def trainable(head, normalize, dtype):
    torch.manual_seed(3)
    made = Trainable(None, normalize, HEADS[head]()).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made


def clipped_sum(path, features, targets, c):
    """A path's sum over all units, as one vector."""
    for p in path.parameters:
        p.summed_grad = None
    path.begin(features, targets, c)
    if len(targets):
        path.add_rows(slice(0, len(targets)))
    path.end()
    return torch.cat(
        [(torch.zeros_like(p) if p.summed_grad is None else p.summed_grad).detach().flatten() for p in path.parameters]
    )


def largest_move(units, sum_of):
    """Most that leaving out one of the units moves the sum."""
    whole = sum_of(units)
    assert whole.isfinite().all()
    return max((whole - sum_of(units[:i] + units[i + 1 :])).norm().item() for i in range(len(units)))
