"""Adding or removing one person, with any number of records, moves the clipped sum by at most the clipping norm."""

from pathlib import Path
from runpy import run_path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.client.gradients import ClosedForm
from fedhead.client.hooked import Ghost
from fedhead.client.paths import make_path
from fedhead.client.persons import PersonRows
from fedhead.common.features import FeatureSet

SUMS = run_path(str(Path(__file__).with_name("bounded_sums.py")))
D, RECORDS, TASK, trainable = (SUMS[name] for name in ("D", "RECORDS", "TASK", "trainable"))
PERSONS = st.lists(st.lists(RECORDS, min_size=1, max_size=9), min_size=1, max_size=4)


def arranged(persons):
    """Features and targets of persons given as lists of (features, label)."""
    lengths = [len(person) for person in persons]
    rows = [row for person in persons for row, _ in person]
    values = torch.tensor(rows, dtype=torch.float32) if rows else torch.zeros(0, D)
    targets = torch.full((len(persons), max(lengths, default=0)), -1)
    for i, person in enumerate(persons):
        targets[i, : len(person)] = torch.tensor([label for _, label in person])
    return FeatureSet(values, torch.tensor([0, *lengths]).cumsum(0)), targets


def clipped_sum(path, persons, c):
    return SUMS["clipped_sum"](path, *arranged(persons), c)


def largest_move(path, persons, c):
    """Most that leaving out one of the persons moves the sum."""
    return SUMS["largest_move"](persons, lambda kept: clipped_sum(path, kept, c))


@pytest.mark.parametrize(
    ("head", "path"),
    [
        ("linear", "closed-form"),
        ("no bias", "closed-form"),
        ("linear", "closed-form sampled"),
        ("linear", "ghost"),
        ("mlp", "ghost"),
        ("mlp", "hooks"),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_one_person_moves_the_sum_by_at_most_the_clipping_norm(head, path, normalize):
    name, _, sampled = path.partition(" ")
    made = {dtype: make_path(trainable(head, normalize, dtype), TASK, name) for dtype in (torch.float64, torch.float32)}
    for path in made.values() if sampled else ():
        path.add_rows = lambda rows, add=path.add_rows: add(torch.arange(rows.stop))

    @given(PERSONS, st.sampled_from([1e-3, 0.5, 20.0]))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def check(persons, c):
        assert largest_move(made[torch.float64], persons, c) <= c
        assert largest_move(made[torch.float32], persons, c) <= c * (1 + 2e-5)

    check()


@given(st.lists(RECORDS, min_size=1, max_size=40), st.sampled_from([1e-3, 0.5]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_person_alone_is_at_most_the_clipping_norm(person, c):
    for dtype in (torch.float64, torch.float32):
        path = make_path(trainable("linear", False, dtype), TASK)
        assert clipped_sum(path, [person], c).norm() <= c * (1 + (0 if dtype == torch.float64 else 1e-5))


class PerRecord(PersonRows):
    """Twin: every record is clipped as if it were a person."""

    def _grouping(self, index, lengths, x, scale):
        return super()._grouping(torch.zeros(0), torch.ones(len(x), dtype=torch.int64), x, scale)


class MeanOfNorms(ClosedForm):
    """Twin: clips the mean over the records, and adds the sum."""

    def add_rows(self, index):
        self.clipping_norm *= self.targets.shape[1]
        super().add_rows(index)


class FirstNorm(Ghost):
    """Twin: the norm of the longest record for that of the sum, as hooks give that don't know of sequences."""

    def _norms(self):
        return {
            id(p): found
            for layer, a, g in self.hooks.kept
            for p, found in (
                (layer.weight, (g.norm(dim=2) * a.norm(dim=2)).amax(1)),
                (layer.bias, g.norm(dim=2).amax(1)),
            )
        }


FAR = [
    [([9.0, 9.0, -9.0, 9.0], 0), ([9.0, 8.0, -9.0, 9.0], 0), ([7.0, 9.0, -9.0, 9.0], 0)],
    [([8.0, -9.0, 9.0, 9.0], 1)],
]


def test_twins_break_the_bound(monkeypatch):
    made = trainable("linear", False, torch.float64)
    assert largest_move(ClosedForm(made, TASK), FAR, 0.5) <= 0.5
    assert largest_move(Ghost(made, TASK), FAR, 0.5) <= 0.5
    assert largest_move(MeanOfNorms(made, TASK), FAR, 0.5) > 0.5 * 1.4
    assert largest_move(FirstNorm(made, TASK), FAR, 0.5) > 0.5 * 1.4
    monkeypatch.setattr("fedhead.client.gradients.PersonRows", PerRecord)
    assert largest_move(ClosedForm(made, TASK), FAR, 0.5) > 0.5 * 1.4
