"""How many records go through the trained part at once: a bound on memory, by shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedhead.common.models.trainable import Trainable

BYTES: Final = 2**28  # most memory that values, or what is held of the records of one chunk, may take


def held_a_record(trainable: nn.Module, positions: int) -> int:
    """Numbers held for a record of so many positions: what leaves trained linear layers, a gradient of all others."""
    held = 0
    for layer in trainable.modules():
        trained = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad)
        held += layer.out_features * positions if trained and type(layer) is nn.Linear else trained
    return max(1, held)


def at_once(features: Any, held: Callable[[int], int], chunk: int, number: int, *, persons: bool = False) -> int:
    """How many of `chunk` records fit in memory, each as long as the longest; changes memory, not the result.

    Parameters
    ----------
    features : FeatureSet, or what a gradient path takes for one
    held : callable
        Numbers held for each record of so many positions.
    chunk : int, >= 1
    number : int
        Bytes of one number.
    persons : bool
        Features are of persons: whoever reads them cuts by their numbers of records.

    Returns
    -------
    int, from 1 to `chunk`
        Depends on shapes only, never on values.
    """
    size = held(1)
    if len(features):
        values, lengths = features.batch(slice(0, 1))
        offsets = getattr(features, "offsets", None)
        longest = values.shape[1] if lengths is None or offsets is None else int(offsets.diff().max())
        longest = 1 if persons else longest
        positions = longest if values.dim() == 3 else 1
        size = max(held(positions), values[0, :1].numel() * longest)
    return max(1, min(chunk, BYTES // max(1, size * number)))


def records_at_once(trainable: Trainable, features: Any, chunk: int) -> int:
    """`at_once` for a pass, forward or back, through a trained part as it is: behind a cut, what leaves each layer."""
    number = next(trainable.parameters()).element_size()
    if trainable.tail is None or len(features) == 0:
        return at_once(features, partial(held_a_record, trainable), chunk, number)
    leaving = _leaving(trainable, features)
    return at_once(features, lambda _: leaving, chunk, number)


def _leaving(trainable: Trainable, features: Any) -> int:
    """Numbers that leave all layers for the longest record: counted on one of zeros, without its dropout."""
    values, lengths = features.batch(slice(0, 1))
    if lengths is not None:
        lengths = features.offsets.diff().max().view(1)
        values = values.new_zeros(1, int(lengths), *values.shape[2:])
    first = next(trainable.parameters())
    count, mode = 0, trainable.training

    def add(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, Tensor) else 0

    layers = [layer for layer in trainable.modules() if not any(True for _ in layer.children())]
    handles = [layer.register_forward_hook(add) for layer in layers]
    trainable.eval()
    try:
        with torch.inference_mode():
            trainable(torch.zeros_like(values).to(first.device, first.dtype), lengths)
    finally:
        trainable.train(mode)
        for handle in handles:
            handle.remove()
    return count
