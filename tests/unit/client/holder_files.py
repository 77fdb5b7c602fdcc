"""A data holder's file as tests of `check` write it, and how they change it."""

HOLDER = """
name = "st-mary"
[data]
source = "csv:notes.csv"
columns = { text = "note", label = "code" }
person = "patient"
[budget]
domain = "adults"
epsilon = 4.0
delta = 1e-6
[limits]
units = ["person"]
"""


def change(here, old, new):
    text = (here / "holder.toml").read_text()
    assert old in text
    (here / "holder.toml").write_text(text.replace(old, new))
