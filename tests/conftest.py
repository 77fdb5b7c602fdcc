"""What several test files share: a recipe that runs in about a second, and a cache of its own for every session."""

import gc
import os
from pathlib import Path
from runpy import run_path

# One thread, in NumPy and PyTorch, here and in every process that a test starts: sums have the same order on every
# machine, and the workers of pytest-xdist don't fight over two cores. It counts before either is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from fedhead.common.config import RunConfig, changed, make_config

torch.set_num_threads(1)
# Most objects here are libraries, which stay: looking for cycles among them takes a tenth of the suite's time.
gc.set_threshold(100_000, 20, 20)

# How long an example takes says something of the machine and of what else runs on it, and nothing of the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep the user's feature cache out of the tests, and the tests out of it."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def unprivileged():
    """A context in which root may what the bits of a file say, and no more; others may that anyway."""
    return run_path(str(Path(__file__).with_name("unprivileged.py")))["unprivileged"]


TINY = {
    "task": {"labels": [str(digit) for digit in range(10)]},
    "model": {"backbone": "module:torch.nn:Identity"},
    "data": {"source": "sklearn:digits", "declared_records": 300},
    "holders": {"count": 5},
    "privacy": {"epsilon": 3.0},
    "training": {"rounds": 8},
    "run": {"baseline": False},
}


@pytest.fixture
def tiny():
    """A maker of small recipes on real digits: `tiny({"privacy.epsilon": 1.0})`."""

    def make(changes: dict | None = None) -> RunConfig:
        return changed(make_config(TINY, base=Path.cwd()), changes or {})

    return make


def pytest_terminal_summary(terminalreporter):
    """The table of mutants: planted bug, what caught it, by which figure (tests/mutants)."""
    rows = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in getattr(report, "user_properties", [])
        if name == "mutant"
    ]
    if rows:
        terminalreporter.section("mutants")
        for mutant, tool, check, figure in rows:
            terminalreporter.write_line(f"{mutant:<42} {tool:<16} {check}: {figure}")
