"""What tests of `fedhead audit` share: a recipe with heads of its own, and how what the command says is read."""

import json
import re
from pathlib import Path
from runpy import run_path

TINY = run_path(str(Path(__file__).parents[1] / "tiny_recipe.py"))
write_table = TINY["write_table"]

OWN = """
from torch import nn
def broken(features, outputs):
    raise ValueError("a private record")
def normed(features, outputs):
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, outputs))
class Scaled(nn.LayerNorm):
    def __init__(self, features, outputs):
        super().__init__(features)
        self.outputs = outputs
    def forward(self, x):
        return super().forward(x)[..., : self.outputs]
def net():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
def unplanted(features, outputs):
    return nn.Sequential(Scaled(features, outputs))
class Loud(nn.Linear):
    def forward(self, x):
        print("LOUD")
        return super().forward(x)
"""
FEATURES = 12
HEAD = "model.head.kind=module:fedhead_audit_own:"


def write_recipe(folder):
    """Two data holders with 40 records each."""
    return TINY["write_recipe"](folder, 80, FEATURES, TINY["RECIPE"].replace("count = 3", "count = 2"))


def strict(out):
    """The one JSON object on stdout: no NaN, no Infinity, nothing before or after."""
    assert out.count("\n") == 1

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads(out, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def refused(said, words, status=2):
    assert said[0] == status, said
    assert said[1] == ""
    assert re.fullmatch(rf"fedhead: .*{words}.*\n", said[2]), said[2]


def sound(run, *arguments):
    """What a command says of a sound mechanism: fresh noise fails one audit in a hundred, and hardly three in a row."""
    for _ in range(3):
        said = run(*arguments)
        if (said.returncode if hasattr(said, "returncode") else said[0]) == 0:
            break
    return said
