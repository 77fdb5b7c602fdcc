"""`flwr run .` as Flower's users know it: the same apps, the recipe as run config, the same head."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedhead.common.config import load_recipe
from fedhead.common.results import Result
from fedhead.simulations.simulate import simulate

pytest.importorskip("ray", reason="the extra `simulation` is not installed")

ROOT = Path(__file__).parents[2]
PORT = 39091  # of the SuperLink that `flwr run` starts
RECIPE = """
[task]
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[model]
backbone = "module:torch.nn:Identity"
[data]
source = "sklearn:digits"
declared_records = 300
[holders]
count = 3
[privacy]
epsilon = 3.0
[training]
rounds = 2
[run]
baseline = false
exact = true
"""


def processes_of(home: Path) -> list[int]:
    """The processes that were started with this FLWR_HOME."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"FLWR_HOME={home}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def stop(home: Path) -> None:
    for signal in (15, 9):
        for pid in processes_of(home):
            try:
                os.kill(pid, signal)
            except ProcessLookupError:
                continue
        until = time.monotonic() + 15
        while processes_of(home) and time.monotonic() < until:
            time.sleep(0.2)


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds Flower's processes in /proc")
def test_flwr_run_gives_the_same_head(tmp_path):
    if taken(PORT):
        pytest.skip(f"port {PORT} is taken: a SuperLink of somebody else's runs here")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    expected = simulate(load_recipe(recipe), tmp_path / "one", state=tmp_path / "state")
    app = tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, app / name)
    home = tmp_path / "flwr"
    environment = {
        **os.environ, "FLWR_HOME": str(home), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    settings = f'recipe="{recipe}" out="{tmp_path / "two"}" cache="{tmp_path / "state" / "features"}"'
    command = ["flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=3", "--run-config", settings]
    try:
        done = subprocess.run(
            command, cwd=app, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        until = time.monotonic() + 120
        while not (tmp_path / "two" / "result.json").exists() and time.monotonic() < until:
            time.sleep(0.5)
    finally:
        stop(home)
    assert (tmp_path / "two" / "result.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    found = Result.read(tmp_path / "two")
    assert found.final == expected.final
    heads = [(tmp_path / name / "model" / "head.safetensors").read_bytes() for name in ("one", "two")]
    assert heads[0] == heads[1]
    assert not processes_of(home)
