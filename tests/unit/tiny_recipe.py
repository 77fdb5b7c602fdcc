"""A recipe on a made-up table, which runs in about a second: for tests of the command."""

import numpy as np

RECIPE = """
[task]
labels = ["a", "b"]
[model]
backbone = "module:torch.nn:Identity"
[data]
source = "csv:v.csv"
columns = { vector = "x*", label = "label" }
[holders]
count = 3
[privacy]
epsilon = 3.0
[training]
rounds = 2
[run]
baseline = false
"""


def write_table(path, rows, features, change=None):
    """Vectors of two labels; `change(row, values)` gives other values of a row."""
    rng = np.random.default_rng(0)
    lines = [",".join([*(f"x{i}" for i in range(features)), "label"])]
    for row in range(rows):
        values = [*(rng.normal(size=features) + row % 2).round(4).astype(str), "ab"[row % 2]]
        lines.append(",".join(values if change is None else change(row, values)))
    path.write_text("\n".join(lines) + "\n")


def write_recipe(folder, rows, features, text=RECIPE):
    """The recipe r.toml and its table v.csv; the recipe's path."""
    write_table(folder / "v.csv", rows, features)
    (folder / "r.toml").write_text(text)
    return folder / "r.toml"
