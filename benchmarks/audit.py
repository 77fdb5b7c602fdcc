"""What an audit of the mechanism takes: a linear head with as many canaries as it has features, and an mlp.

The goal is 60 seconds on 2 cores for the linear head, the whole command but its imports: features of the real records,
their backbone's weights, canaries, references, bounds and verdicts. Beside it, the share of a whole private run of the
same recipe, measured in the same process.

    python benchmarks/audit.py
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedhead.common.config import find_recipe
from fedhead.simulations.audit.mechanism import audit_mechanism
from fedhead.simulations.simulate import simulate

MLP = ['model.head={kind = "mlp", hidden = [64], dropout = 0.2}']


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        for name, settings in (("linear", []), ("mlp", MLP)):
            config = find_recipe("quickstart", settings)
            found, wall, cpu = timed(lambda config=config: audit_mechanism(config, name="quickstart", cache=cache))
            rows[name] = {
                "canaries": found["canaries"], "features": found["features"], "rounds": found["rounds"],
                "passed": found["passed"], "wall_s": round(wall, 1), "cpu_s": round(cpu, 1),
            }  # fmt: skip
        config = find_recipe("quickstart", ["run.baseline=false"])
        _, wall, cpu = timed(lambda: simulate(config, Path(folder) / "run", state=Path(folder) / "state"))
        rows["run of the recipe"] = {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1)}
    rows["goal_s"] = 60
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
