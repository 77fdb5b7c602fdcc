"""A try on made-up records, before private records are touched: is a record's clipped gradient its own?

Opacus's hooks see a leaf's input and output. What they don't see, such as a weight that is also used outside of its
layer, or records that are mixed, makes a norm too small, and then one record moves the sum by more than the clipping
norm without a sign. fedhead's own heads and tails are held to this by tests; code of a user's own is tried here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from fedhead.common.errors import ModelError
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task

KNOWN: Final = frozenset(["torch", "torchvision", "transformers", "fedhead"])  # what tests hold to the contract
RECORDS, TOKENS = 3, 4
TOLERANCE: Final = 1e-3  # share of the sum; a hundred times the rounding of float32 on such a try
SPREAD: Final = 0.1  # of what is added to the parameters: zeros would hide what is wrong

Losses = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def has_own_code(trainable: Trainable, task: Task) -> bool:
    """Whether the head, the tail or the task is code of a user's own."""
    return any(type(part).__module__.partition(".")[0] not in KNOWN for part in (task, *trainable.modules()))


def check_own_gradients(
    trainable: Trainable,
    losses: Losses,
    clipped_sum: Callable[..., list[Tensor]],
    values: Tensor,
    ragged: bool,
    persons: bool = False,
) -> None:
    """Hold a path's clipped sum of made-up records to autograd's gradients of each of them alone.

    Parameters
    ----------
    trainable : Trainable
        Its parameters are moved for the try, and put back.
    losses : callable
        (values, lengths, targets) -> (B,).
    clipped_sum : callable
        (values, lengths, targets, clipping norm) -> the path's sum, one tensor a parameter.
    values : Tensor, shape (B, *shape)
        Of which only the shape is used.
    ragged : bool
        Whether records have lengths.
    persons : bool
        Whether what counts as one is a person with several records, values (B, T, D).

    Raises
    ------
    ModelError
        They differ, or a person's outputs are not those of each of their records.
    """
    parameters = list(trainable.trained().values())
    device, dtype = parameters[0].device, parameters[0].dtype
    before = [p.detach().clone() for p in parameters]
    stream = torch.Generator().manual_seed(0)
    shape = (TOKENS, *values.shape[2:]) if ragged else values.shape[1:]
    made = torch.randn(RECORDS, *shape, generator=stream).to(device, dtype)
    lengths = torch.full((RECORDS,), TOKENS, device=device) if ragged else None
    targets = torch.zeros((RECORDS, TOKENS) if persons else RECORDS, dtype=torch.int64, device=device)
    dropouts = [m for m in trainable.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_((SPREAD * torch.randn(p.shape, generator=stream)).to(device, p.dtype))
        for dropout in dropouts:
            dropout.training = False
        if persons:
            _check_outputs(trainable, made)
        alone = []
        for i in range(RECORDS):
            one = losses(made[i : i + 1], None if lengths is None else lengths[i : i + 1], targets[i : i + 1])
            found = torch.autograd.grad(one.sum(), parameters, allow_unused=True)
            pairs = zip(found, parameters, strict=True)
            alone.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]))
        norms = torch.stack(alone).norm(dim=1)
        least = float(norms.min())
        most = float(norms.max())
        if not 0 < least <= most < float("inf"):
            return  # nothing to compare: made-up records may have no gradient, or one that isn't finite
        good = True
        for norm in (least / 2, 2 * most):  # all are clipped, none is
            expected = torch.stack(alone).mul(norms.reciprocal().mul(norm).clamp(max=1).unsqueeze(1)).sum(0)
            found_sum = torch.cat([g.flatten() for g in clipped_sum(made, lengths, targets, norm)])
            scale = RECORDS * min(norm, most)
            good = good and float((found_sum - expected).norm()) <= TOLERANCE * scale
    finally:
        for dropout in dropouts:
            dropout.training = True
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    if not good:
        raise ModelError(
            "model.head, model.unfreeze or task.kind brings code of your own in which a record's gradient is not its "
            "own: records must not be mixed, and weights must be used through their layer only. Change that code."
        )


def _check_outputs(trainable: Trainable, made: Tensor) -> None:
    """Hold the outputs of persons (B, T, D) to those of their records (B T, D)."""
    with torch.no_grad():
        expected = trainable(made.flatten(0, 1))
        try:
            found = trainable(made).flatten(0, 1)
            good = found.shape == expected.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        except RuntimeError:
            good = False
    if not good:
        raise ModelError(
            "model.head brings code of your own that works on one record at a time: a person's records come as "
            "(B, T, D). Let it work over the last dimension, whatever comes before."
        )
