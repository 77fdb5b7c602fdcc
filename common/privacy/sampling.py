"""Poisson sampling: every record is in a step with the same probability, whatever the other records do.

Amplification by sampling holds for this only, not for shuffled batches of fixed size (arXiv:2411.10614,
arXiv:2405.20769).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def poisson_sample(records: int, sample_rate: float, generator: torch.Generator) -> Tensor:
    """Draw which records take part in a step.

    Parameters
    ----------
    records : int, >= 0
        N, true count; it stays at the holder.
    sample_rate : float, in (0, 1]
        Declared beforehand, never derived from N.
    generator : torch.Generator
        A stream used for nothing else.

    Returns
    -------
    index : Tensor, int64, shape (Binomial(N, sample_rate),)
        Rising, without repeats; may be empty.

    Notes
    -----
    Guarantee: each record is in independently with probability sample_rate. The gaps between successes of independent
    trials are geometric, so drawing gaps gives the same law as one trial a record, at the cost of the sample alone.
    """
    if sample_rate == 1:
        return torch.arange(records)
    mean = records * sample_rate
    drawn: list[np.ndarray] = []
    last = -1.0
    while last < records:
        # enough for one draw in nearly all cases; a short draw goes on where it ended, which changes nothing in law
        count = int((0 if drawn else mean) + 6 * math.sqrt(mean) + 8)
        positions = torch.empty(count, dtype=torch.float64).geometric_(sample_rate, generator=generator).numpy()
        positions[0] += last
        last = np.cumsum(positions, out=positions)[-1]
        drawn.append(positions)
    # numpy, because at these sizes it costs a third of torch
    positions = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
    return torch.from_numpy(positions[: positions.searchsorted(records)].astype(np.int64))
