"""One round of 20 holders x 500 records, 512 features -> 10 labels, in process: CPU time. Goal: at most 60 ms.

Poisson batches of 32 are expected (sample rate 0.064) and every holder takes one local epoch, 16 steps. The round is a
whole one: the real server and client apps, Flower's strategy, requests, checks on the updates, aggregation.

    python benchmarks/round.py [--rounds 25] [--json]

After each round, two other blocks are timed in the same process: the holders' training alone, which shows what the
engine adds, and a yardstick, 100 plain autograd steps (512 -> 10, batch 256). Medians count. A yardstick step took
235 us on the quiet machine that the goal was set on, so the last line scales the round by that: on a busy machine the
same work costs more CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from yardstick import PLAIN_STEPS, QUIET_US, yardstick

from fedhead.client.together import Member, Together
from fedhead.client.training import StepPlan, Trainer
from fedhead.common import progress
from fedhead.common.config import make_config
from fedhead.common.config.schema import SGD, RunConfig
from fedhead.common.data.records import Records
from fedhead.common.features import FeatureSet
from fedhead.common.models.backbones import load_backbone
from fedhead.common.preparation import Labelled, Split, make_trainable
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.tasks import make_task
from fedhead.simulations.federation import federate
from fedhead.simulations.prepared import Prepared
from fedhead.simulations.simulate import quiet, threads

HOLDERS, RECORDS, FEATURES, LABELS, RATE, STEPS = 20, 500, 512, 10, 0.064, 16
GOAL_MS = 60.0


def recipe(rounds: int) -> RunConfig:
    return make_config(
        {
            "task": {"kind": "classification", "labels": [str(k) for k in range(LABELS)]},
            "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": "csv:in-memory", "declared_records": RECORDS},
            "holders": {"count": HOLDERS},
            "privacy": {"mechanism": "poisson", "sample_rate": RATE, "noise_multiplier": 1.0},
            "training": {"rounds": rounds, "local_steps": STEPS, "optimizer": {"kind": "sgd", "learning_rate": 0.1}},
            "run": {"evaluate_every": rounds, "baseline": False},
        }
    )


def prepared_for(config: RunConfig) -> Prepared:
    """What `prepare` makes, from random vectors in memory."""
    total = HOLDERS * RECORDS
    torch.manual_seed(0)
    values, targets = torch.randn(total, FEATURES), torch.randint(LABELS, (total,))
    train, test = Labelled(FeatureSet(values), targets), Labelled(FeatureSet(values[:1000]), targets[:1000])
    records = Records.from_memory("vector", values[:1000].numpy(), targets[:1000].numpy())
    everyone = records.select(np.arange(total) % len(records))
    split = Split(everyone, records, np.split(np.arange(total), HOLDERS), [])
    backbone = load_backbone(config.model, Path.cwd(), vector_size=FEATURES)
    return Prepared(config, split, backbone, train, test, {})


def training_alone(prepared: Prepared) -> Callable[[int], None]:
    """The holders' steps and nothing else, together as the engine takes them."""
    config, task = prepared.config, make_task(prepared.config.task)
    waiting = Together(Trainer(make_trainable(config, prepared.backbone, task), task))
    plan = StepPlan("poisson", 1.0, config.privacy.clipping_norm, RATE, STEPS, RECORDS, SGD(learning_rate=0.1), 0.1)
    holders = [prepared.train.slice(start, start + RECORDS) for start in range(0, HOLDERS * RECORDS, RECORDS)]

    def train(number: int) -> None:
        named = [(f"holder-{i:05d}", mine) for i, mine in enumerate(holders)]
        members = [Member((name, ""), mine, simulation_streams(0, name, number)) for name, mine in named]
        waiting.expect(members, plan)
        for member in members:
            assert waiting.take(member.key) is not None

    return train


def measure(rounds: int) -> dict[str, float]:
    config = recipe(rounds)
    prepared = prepared_for(config)
    others = {"training_alone_ms": training_alone(prepared), "yardstick_ms": yardstick()}
    taken: dict[str, list[float]] = {"round_ms": [], **{name: [] for name in others}}
    since = 0.0

    def after(stage: str, done: int, total: int, note: str) -> None:
        nonlocal since
        if done:
            taken["round_ms"].append((time.process_time() - since) * 1e3)
            for name, block in others.items():
                start = time.process_time()
                block(done)
                taken[name].append((time.process_time() - start) * 1e3)
        since = time.process_time()

    with tempfile.TemporaryDirectory() as folder, progress.listening(after), threads(True), quiet():
        federate(prepared, config, Path(folder), "inprocess", None, ledger=Path(folder) / "ledgers.sqlite")
    # the first rounds warm caches up, the last one evaluates
    found = {name: statistics.median(values[2:-1]) for name, values in taken.items()}
    found["fastest_round_ms"] = min(taken["round_ms"])
    found["yardstick_us"] = found.pop("yardstick_ms") * 1e3 / PLAIN_STEPS
    found["goal_ms"] = GOAL_MS
    found["round_on_quiet_machine_ms"] = found["round_ms"] * QUIET_US / found["yardstick_us"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.rounds)
    if given.json:
        print(json.dumps(found))
        return
    print(f"a whole round                 {found['round_ms']:6.1f} ms CPU, fastest {found['fastest_round_ms']:.1f}")
    print(f"the holders' training alone   {found['training_alone_ms']:6.1f} ms CPU")
    print(f"yardstick, a plain step       {found['yardstick_us']:6.0f} us CPU ({QUIET_US:.0f} on a quiet machine)")
    print(f"a round, scaled by that       {found['round_on_quiet_machine_ms']:6.1f} ms, goal: {GOAL_MS:.0f}")


if __name__ == "__main__":
    main()
