"""A whole 20-round private run against one bare, batched inference pass of the same backbone over the same records.

The run is `fedhead.simulate` of the quickstart's recipe on its first records: reading the file, splitting, digesting,
features of training and test records, the cache's files, all rounds, evaluation, the result folder and its report.
The bare pass tokenises and runs the backbone on the same records in batches of the same size, once in the order of
the records and once sorted by length, which is the stricter comparison because `extract` sorts as well. Goal: a run
costs at most 1.25 of a pass. Imports and weight loading are outside on both sides. Then the same run is made again
with the features in the cache.

    python benchmarks/run.py [--records 1500] [--repeats 3] [--threads 1] [--json]

All ways take turns in one process and medians count. CPU time is compared, because other work on the machine would be
counted as ours in wall time; with one thread the two are the same on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedhead.common.config import find_recipe
from fedhead.common.config.schema import RunConfig
from fedhead.common.models.backbones import Backbone, load_backbone
from fedhead.simulations.simulate import simulate

GOAL = 1.25


def sentences(count: int) -> list[dict[str, str]]:
    """The first sentences that ship with fedhead."""
    spec = importlib.util.find_spec("fedhead.simulations.data")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    with (Path(folder) / "sentences.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[:count]


def recipe(file: Path) -> RunConfig:
    return find_recipe("quickstart", [f'data.source="csv:{file}"', "training.rounds=20", "run.baseline=false"])


def bare(backbone: Backbone, texts: list[str], size: int) -> None:
    with torch.inference_mode():
        for start in range(0, len(texts), size):
            backbone.forward(backbone.collate(texts[start : start + size]))


def measure(count: int, repeats: int, folder: Path) -> dict[str, object]:
    rows = sentences(count)
    file = folder / "sentences.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config = recipe(file)
    texts = [row["text"] for row in rows]
    by_length = sorted(texts, key=len, reverse=True)
    size = config.model.features.batch_size
    backbone = load_backbone(config.model, config.base)
    state = folder / "state"
    number = 0

    def run(fresh: bool) -> float:
        """One run; returns the seconds of weight loading inside it."""
        nonlocal number, state
        number += 1
        if fresh:
            state = folder / f"state-{number}"
        result = simulate(config, folder / f"run-{number}", state=state)
        return float(result.timing["load_seconds"])

    def load() -> None:
        load_backbone(config.model, config.base)

    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(backbone, texts, size),
        "bare_sorted": lambda: bare(backbone, by_length, size),
        "run": lambda: run(fresh=True),
        "warm_run": lambda: run(fresh=False),
        "load": load,
    }
    ways["run"]()  # imports and first calls of every library
    bare(backbone, texts[:size], size)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            taken[name].append(time.process_time() - start)
    load_seconds = statistics.median(taken.pop("load"))
    for name in ("run", "warm_run"):
        taken[name] = [seconds - load_seconds for seconds in taken[name]]
    ratios = {
        against: [a / b for a, b in zip(taken["run"], taken[against], strict=True)]
        for against in ("bare", "bare_sorted")
    }
    return {
        "records": len(rows),
        "cpu_seconds": {name: statistics.median(seconds) for name, seconds in taken.items()},
        "load_cpu_seconds": load_seconds,
        "ratio": {against: statistics.median(values) for against, values in ratios.items()},
        "ratios": ratios,
        "goal": GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.records, given.repeats, Path(folder).resolve())
    if given.json:
        print(json.dumps(found))
        return
    spent: dict[str, float] = found["cpu_seconds"]  # type: ignore[assignment]
    ratio: dict[str, float] = found["ratio"]  # type: ignore[assignment]
    each: dict[str, list[float]] = found["ratios"]  # type: ignore[assignment]
    print(f"{found['records']} records, CPU seconds")
    print(f"  bare pass, order of the records {spent['bare']:7.2f}")
    print(f"  bare pass, sorted by length     {spent['bare_sorted']:7.2f}")
    print(f"  a whole run, empty cache        {spent['run']:7.2f}")
    print(f"  a whole run, warm cache         {spent['warm_run']:7.2f}")
    for name, title in (("bare", "run / bare"), ("bare_sorted", "run / bare sorted")):
        repeats = ", ".join(f"{value:.2f}" for value in each[name])
        print(f"{title:19} {ratio[name]:.3f}, goal: {GOAL}  (each repeat: {repeats})")


if __name__ == "__main__":
    main()
