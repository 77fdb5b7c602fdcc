"""One private step of a linear head against one plain step: 512 features, 10 labels, batch 256, one thread.

Both take the same records, momentum and learning rate. Private: closed-form clipping, Opacus's optimizer and noise,
through the code a holder runs. Plain: cross-entropy, autograd, torch's SGD. Blocks of both take turns, and the median
of the blocks' ratios counts, so that a busy machine slows both alike. Goal: at most 1.10.

    python benchmarks/step.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.tasks.classification import Classification

FEATURES, LABELS, BATCH, STEPS, BLOCKS = 512, 10, 256, 400, 9


def private_block(x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    head = nn.Linear(FEATURES, LABELS)
    trainer = Trainer(Trainable(None, True, head), Classification(TaskSettings(labels=[str(k) for k in range(LABELS)])))
    plan = StepPlan("full-batch", 1.0, 1.0, None, STEPS, BATCH, SGD(momentum=0.9), 0.1)
    features, streams = FeatureSet(x), simulation_streams(0, "holder", 1)
    return lambda: void(trainer.round(features, y, plan, streams))


def plain_block(x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    head = nn.Linear(FEATURES, LABELS)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    x = F.normalize(x)

    def block() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimizer.step()

    return block


def poisson_round(holders: int = 20, records: int = 500) -> float:
    """CPU milliseconds of a round of 20 holders x 500 records, Poisson batches of 32, 16 steps each."""
    torch.manual_seed(1)
    head = nn.Linear(FEATURES, LABELS)
    trainer = Trainer(Trainable(None, True, head), Classification(TaskSettings(labels=[str(k) for k in range(LABELS)])))
    plan = StepPlan("poisson", 1.0, 1.0, 32 / records, 16, records, SGD(), 0.1)
    data = [(FeatureSet(torch.randn(records, FEATURES)), torch.randint(LABELS, (records,))) for _ in range(holders)]
    times = []
    for number in range(12):
        start = time.process_time()
        for holder, (features, targets) in enumerate(data):
            trainer.round(features, targets, plan, simulation_streams(0, str(holder), number))
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times[2:])


def void(_: object) -> None:
    pass


def seconds(block: Callable[[], None]) -> float:
    start = time.process_time()
    block()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, FEATURES), torch.randint(LABELS, (BATCH,))
    private, plain = private_block(x, y), plain_block(x, y)
    private()
    plain()
    pairs = [(seconds(private), seconds(plain)) for _ in range(BLOCKS)]
    print(
        json.dumps(
            {
                "private_us": round(statistics.median(a for a, _ in pairs) / STEPS * 1e6, 1),
                "plain_us": round(statistics.median(b for _, b in pairs) / STEPS * 1e6, 1),
                "ratio": round(statistics.median(a / b for a, b in pairs), 3),
                "goal": 1.10,
                "poisson_round_20_holders_cpu_ms": round(poisson_round(), 1),
            }
        )
    )


if __name__ == "__main__":
    main()
