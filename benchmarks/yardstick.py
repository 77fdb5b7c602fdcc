"""How fast the machine is just now: plain steps of gradient descent, 512 -> 10, batch 256, one thread.

CPU time grows on a busy machine, because caches and cores are shared. The goals were set on a quiet one, where such a
step takes QUIET_US; a figure that was measured beside a step of u microseconds is scaled by QUIET_US / u.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

QUIET_US = 235.0
PLAIN_STEPS = 100


def yardstick() -> Callable[[int], None]:
    """PLAIN_STEPS steps; the argument is of no meaning."""
    x, y = F.normalize(torch.randn(256, 512)), torch.randint(10, (256,))
    head = torch.nn.Linear(512, 10)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)

    def steps(_: int = 0) -> None:
        for _ in range(PLAIN_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()

    return steps
