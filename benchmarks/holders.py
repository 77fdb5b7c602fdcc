"""1,000 holders, 100 a round, in process: what the engine costs beyond training, and what memory grows with.

    python benchmarks/holders.py [--rounds 25] [--json]

Time: CPU time of a whole round less that of the same 100 holders' training alone, which takes turns with it in the same
process; a holder's share of the difference, as the median over rounds. Goal: at most 1 ms a holder and round.

Memory: the same 40,000 x 512 features (82 MB), in the feature cache, spread over 10, 100 and 1,000 holders, each in a
process of its own: how far its resident memory grows from before the features are opened to the end of the run, as
memory of its own and as pages of the mapped file. Goal: the features once, whatever the holders.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fedhead.client.together import Member, Together
from fedhead.client.training import StepPlan, Trainer
from fedhead.client.workplace import holder_name
from fedhead.common import progress
from fedhead.common.config import make_config
from fedhead.common.config.schema import SGD, RunConfig
from fedhead.common.data.records import Records
from fedhead.common.features import FeatureSet
from fedhead.common.features.cache import VALUES, create_array, locked, open_entry, write_manifest, written_aside
from fedhead.common.models.backbones import load_backbone
from fedhead.common.preparation import Labelled, Split, make_trainable
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.tasks import make_task
from fedhead.server.cohorts import Cohorts
from fedhead.simulations.federation import federate
from fedhead.simulations.prepared import Prepared
from fedhead.simulations.simulate import quiet, threads

RECORDS, FEATURES, LABELS, ASKED = 40_000, 512, 10, 100
GOAL_MS = 1.0
KEY = "features"


def recipe(holders: int, rounds: int) -> RunConfig:
    return make_config(
        {
            "task": {"kind": "classification", "labels": [str(k) for k in range(LABELS)]},
            "model": {"backbone": "module:torch.nn:Identity"},
            "data": {"source": "csv:in-memory", "declared_records": RECORDS // holders},
            "holders": {"count": holders, "per_round": min(ASKED, holders)},
            "privacy": {"noise_multiplier": 5.0},
            "training": {"rounds": rounds, "optimizer": {"kind": "sgd", "learning_rate": 0.1}},
            "run": {"evaluate_every": rounds, "baseline": False},
        }
    )


def store(cache: Path) -> None:
    """Random vectors as an entry of the feature cache."""
    with locked(cache, KEY), written_aside(cache, KEY) as part:
        values = create_array(part / VALUES, "float32", (RECORDS, FEATURES))
        values[:] = np.random.default_rng(0).standard_normal((RECORDS, FEATURES), dtype=np.float32)
        write_manifest(part, KEY, {VALUES: values})


def prepared_for(config: RunConfig, cache: Path) -> Prepared:
    """What `prepare` makes, from features that are cached."""
    features = open_entry(cache, KEY)
    assert features is not None
    targets = torch.arange(RECORDS) % LABELS
    head = Records.from_memory("vector", np.zeros((10, FEATURES)), np.arange(10))
    test = Labelled(features.slice(0, 1000), targets[:1000])
    rows = np.random.default_rng(0).permutation(RECORDS)
    split = Split(head.select(rows % len(head)), head, np.split(rows, config.holders.count), [])
    backbone = load_backbone(config.model, Path.cwd(), vector_size=FEATURES)
    return Prepared(config, split, backbone, Labelled(features, targets), test, {})


def overhead(prepared: Prepared) -> dict[str, float]:
    config, task = prepared.config, make_task(prepared.config.task)
    count = config.holders.count
    names = [holder_name(i) for i in range(count)]
    cohorts = Cohorts(names, ASKED, config.run.seed)
    waiting = Together(Trainer(make_trainable(config, prepared.backbone, task), task))
    plan = StepPlan("full-batch", 5.0, config.privacy.clipping_norm, None, 1, RECORDS // count, SGD(), 0.1)
    each = RECORDS // count
    mine = {name: prepared.train.slice(i * each, (i + 1) * each) for i, name in enumerate(names)}
    whole: list[float] = []
    alone: list[float] = []
    since = 0.0

    def after(stage: str, done: int, total: int, note: str) -> None:
        nonlocal since
        if done:
            whole.append((time.process_time() - since) * 1e3)
            start = time.process_time()
            asked = cohorts.of_round(done)
            waiting.expect([Member((name, ""), mine[name], simulation_streams(0, name, done)) for name in asked], plan)
            for name in asked:
                assert waiting.take((name, "")) is not None
            alone.append((time.process_time() - start) * 1e3)
        since = time.process_time()

    with tempfile.TemporaryDirectory() as folder, progress.listening(after), threads(True), quiet():
        start = time.process_time()
        federate(prepared, config, Path(folder), "inprocess", None, ledger=Path(folder) / "ledgers.sqlite")
        total = (time.process_time() - start) * 1e3
    # Every holder is asked once in ten rounds; what a trainer keeps of each is made then, on both sides. The last
    # round evaluates.
    first = min(10, len(whole) // 2)
    beyond = [(a - b) / ASKED for a, b in zip(whole[first:-1], alone[first:-1], strict=True)]
    return {
        "round_ms": statistics.median(whole[first:-1]),
        "training_alone_ms": statistics.median(alone[first:-1]),
        "beyond_training_ms": statistics.median(beyond),
        "around_the_rounds_ms": total - sum(whole) - sum(alone),
        "goal_ms": GOAL_MS,
    }


def resident() -> dict[str, float]:
    """Resident memory in MB: of its own, and of mapped files."""
    status = Path("/proc/self/status").read_text()
    sizes = {name: re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "RssFile")}
    return {name: int(found.group(1)) / 1000 for name, found in sizes.items() if found}


def grown(holders: int, cache: Path) -> dict[str, float]:
    """How far resident memory grows over a short run, in MB."""
    with tempfile.TemporaryDirectory() as folder, threads(True), quiet():
        config = recipe(holders, 12)
        ledgers = [Path(folder) / f"{name}.sqlite" for name in ("warm", "run")]
        few = prepared_for_nothing(cache)
        federate(few, recipe(2, 2), Path(folder) / "warm", "inprocess", None, ledger=ledgers[0])
        before, after = resident(), {}

        def look(stage: str, done: int, total: int, note: str) -> None:
            after.update(resident())

        prepared = prepared_for(config, cache)
        with progress.listening(look):
            federate(prepared, config, Path(folder) / "run", "inprocess", None, ledger=ledgers[1])
    return {name: after[name] - before[name] for name in after}


def prepared_for_nothing(cache: Path) -> Prepared:
    """A run over a few records, so that all code and its buffers are in memory before counting starts."""
    prepared = prepared_for(recipe(2, 2), cache)
    few = Labelled(FeatureSet(torch.zeros(10, FEATURES)), torch.arange(10))
    split = Split(prepared.split.train, prepared.split.test, [np.arange(5), np.arange(5, 10)], [])
    return Prepared(prepared.config, split, prepared.backbone, few, few, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(grown(given.memory_of, given.cache)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "features"
        store(cache)
        size = RECORDS * FEATURES * 4 / 1e6
        time_found = overhead(prepared_for(recipe(1000, given.rounds), cache))
        memory = {}
        for holders in (10, 100, 1000):
            command = [sys.executable, __file__, "--memory-of", str(holders), "--cache", str(cache)]
            memory[holders] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if given.json:
        print(json.dumps({**time_found, "features_mb": size, "memory_mb": memory}))
        return
    print(f"a round of 100 of 1,000 holders {time_found['round_ms']:7.1f} ms CPU")
    print(f"their training alone            {time_found['training_alone_ms']:7.1f} ms CPU")
    print(f"beyond training                 {time_found['beyond_training_ms']:7.2f} ms a holder, goal: {GOAL_MS:.0f}")
    print(f"before and after the rounds     {time_found['around_the_rounds_ms']:7.1f} ms CPU, once")
    print(f"resident memory gained, features of {size:.0f} MB:")
    for holders, found in memory.items():
        print(f"  {holders:5} holders  {found['RssAnon']:7.1f} MB own, {found['RssFile']:7.1f} MB of the mapped file")


if __name__ == "__main__":
    main()
