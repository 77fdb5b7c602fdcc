"""A deployed run gives the simulation's head where every holder allows the recipe's seed, and only there."""

import math

import numpy as np
import pytest
from deployment_harness import RECIPE, digits, merged, write_records
from safetensors.numpy import load_file

from fedhead.common.config import make_config
from fedhead.common.preparation import read_split
from fedhead.simulations.simulate import simulate

pytestmark = pytest.mark.slow
NAMES = ["holder-00000", "holder-00001"]  # seeded streams go by name


def head_of(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / "head.safetensors")


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_a_deployed_run_gives_the_head_of_the_simulation(federation, tmp_path):
    ours = federation(NAMES, server={"least_holders": 2}, holder={"limits": {"allow_seeded_noise": True}})
    vectors, labels = digits()
    write_records(ours.folder / "all.json", vectors[:600], labels[:600])
    recipe = merged(RECIPE, {"data": {"source": "json:all.json"}, "holders": {"count": 2}, "run": {"seed": 11}})
    config = make_config(merged(recipe, {"run": {"baseline": False}}), base=ours.folder)
    for name, rows in zip(NAMES, read_split(config).holders, strict=True):
        write_records(ours.folder / name / "records.json", vectors[rows], labels[rows])
    simulate(config, tmp_path / "simulated")

    joined = ours.up()
    path = ours.write_recipe(merged(recipe, {}))
    seeded = ours.submit("seeded", recipe=path)
    assert seeded.wait() == 0, seeded.text()
    assert difference(head_of(ours.folder / "seeded"), head_of(tmp_path / "simulated")) < 1e-6
    assert all(row["epsilon"] == "inf" for row in ours.result("seeded")["privacy"])
    assert all(math.isinf(ours.spent(name)) for name in NAMES)

    # without it the same seed arrives and is ignored: new noise, another head, a finite epsilon
    for name in NAMES:
        assert joined[name].terminate() == 0
        ours.write_holder(name)
    ours.all_online(dict(zip(NAMES, ours.join(*NAMES), strict=True)))
    own = ours.submit("own", recipe=path)
    assert own.wait() == 0, own.text()
    assert difference(head_of(ours.folder / "own"), head_of(tmp_path / "simulated")) > 1e-3
    assert all(row["epsilon"] <= 3.0 for row in ours.result("own")["privacy"])
