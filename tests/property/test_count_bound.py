"""Adding or removing one unit moves the count by at most 1, and moves no other unit from side to side."""

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedhead.client.metrics import count_correct
from fedhead.common.config.schema import TaskSettings
from fedhead.common.data.holdout import holdout_rows
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.tasks.classification import Classification

D, K = 3, 3
TASK = Classification(TaskSettings(labels=list("abc")))
ROUNDING = 1e-12  # of a sum of shares; ETA of the noise covers far more
NUMBERS = st.one_of(
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3e38, 1e-40, 1e19]),
)
RECORD = st.tuples(st.lists(NUMBERS, min_size=D, max_size=D), st.integers(0, K - 1))
RECORDS = st.lists(RECORD, min_size=1, max_size=6)
PERSONS = st.lists(st.lists(RECORD, max_size=12), min_size=1, max_size=5)
FRACTIONS = st.floats(0.05, 0.95)


class Crowded(nn.Module):
    """A head at the edge of a tie, whose last bits go by the shape of the batch, as those of matrix products do."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(K))

    def forward(self, x):
        tilt = 1e-6 * (len(x) - 3.5)
        return self.bias + torch.tensor([tilt, -tilt, 0.0]) + 0 * x[..., :1].nan_to_num(0, 0, 0)


def heads():
    torch.manual_seed(3)
    made = {
        "linear": Trainable(None, False, nn.Linear(D, K)),
        "normalised": Trainable(None, True, nn.Linear(D, K)),
        "mlp": Trainable(None, False, nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, K))),
        "zero": Trainable(None, True, nn.Linear(D, K)),  # all outputs equal: every answer is a tie
        "crowded": Trainable(None, False, Crowded()),
    }
    with torch.no_grad():
        for p in made["zero"].parameters():
            p.zero_()
    return made


HEADS = heads()


def of_records(rows):
    return Labelled(
        FeatureSet(torch.tensor([row for row, _ in rows], dtype=torch.float32).reshape(-1, D)),
        torch.tensor([label for _, label in rows], dtype=torch.int64),
    )


def of_persons(people):
    rows = [row for person in people for row, _ in person]
    most = max((len(person) for person in people), default=0)
    targets = torch.full((len(people), most), -1)
    for i, person in enumerate(people):
        targets[i, : len(person)] = torch.tensor([label for _, label in person], dtype=torch.int64)
    offsets = torch.tensor([0, *np.cumsum([len(person) for person in people]).tolist()], dtype=torch.int64)
    return Labelled(FeatureSet(torch.tensor(rows, dtype=torch.float32).reshape(-1, D), offsets), targets)


def largest_move(count, units, build):
    """Most that leaving out one unit moves a count; every count lies in [0, units]."""
    whole = count(build(units))
    assert 0 <= whole <= len(units) + ROUNDING
    return max(abs(whole - count(build(units[:i] + units[i + 1 :]))) for i in range(len(units)))


@pytest.mark.parametrize("name", HEADS)
def test_one_unit_moves_the_count_by_at_most_one(name):
    def count(held):
        return count_correct(HEADS[name], TASK, held)

    @given(RECORDS)
    @settings(max_examples=40, deadline=None, derandomize=True)
    def records(rows):
        assert largest_move(count, rows, of_records) <= 1

    @given(PERSONS)
    @settings(max_examples=40, deadline=None, derandomize=True)
    def persons(people):
        assert largest_move(count, people, of_persons) <= 1 + ROUNDING

    records()
    persons()


@given(PERSONS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_order_of_units_never_matters(people, random):
    mixed = list(people)
    random.shuffle(mixed)
    for name in ("linear", "crowded"):
        before, after = (count_correct(HEADS[name], TASK, of_persons(found)) for found in (people, mixed))
        assert before == after  # the sum of the shares is rounded once, whatever their order


# What must not pass. Each is what somebody might write instead.


def right_of(trainable, held):
    trainable.eval()
    with torch.no_grad():
        outputs = trainable(held.features.values)
    flat = held.targets[held.targets >= 0] if held.targets.dim() == 2 else held.targets
    return (outputs.argmax(1) == flat) & outputs.isfinite().all(1)


def every_record(trainable, held):
    """Twin: a person counts once for every right record."""
    return float(right_of(trainable, held).sum())


def one_batch(trainable, held):
    """Twin: all units in one batch."""
    return float(right_of(trainable, held).sum())


def mean_times_expected(trainable, held, expected=40):
    """Twin: corrected for how many records were really kept apart, by dividing by that number."""
    right = right_of(trainable, held)
    return float(right.double().mean()) * expected if len(right) else 0.0


ME = ([1.0, 2.0, 3.0], 0)


def label(trainable):
    """What a head answers for ME."""
    return int(right_of(trainable, of_records([(ME[0], k) for k in range(K)])).nonzero()[0])


def test_twins_break_the_bound():
    linear = HEADS["linear"]
    right = (ME[0], label(linear))
    wrong = (ME[0], (right[1] + 1) % K)
    people = [[right] * 9, [right, wrong]]
    assert largest_move(lambda held: count_correct(linear, TASK, held), people, of_persons) <= 1
    assert every_record(linear, of_persons(people)) - every_record(linear, of_persons(people[1:])) == 9

    rows = [(ME[0], 0)] * 4
    assert count_correct(HEADS["crowded"], TASK, of_records(rows)) in (0, 4)
    assert largest_move(lambda held: count_correct(HEADS["crowded"], TASK, held), rows, of_records) <= 1
    assert abs(one_batch(HEADS["crowded"], of_records(rows)) - one_batch(HEADS["crowded"], of_records(rows[1:]))) == 4

    few = [right, wrong]
    moved = mean_times_expected(linear, of_records(few)) - mean_times_expected(linear, of_records(few[:1]))
    assert abs(moved) == 20
    assert largest_move(lambda held: count_correct(linear, TASK, held), few, of_records) == 1


UNITS = st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.text(max_size=5)), min_size=1, max_size=25)


def sides(units, fraction, by_person, choose=holdout_rows):
    """Unit -> whether it is kept apart."""
    digests = np.frombuffer(b"".join(digest for digest, _ in units), dtype=np.uint8).reshape(-1, 16)
    whose = np.array([person for _, person in units], dtype=object)
    apart = choose(digests, fraction, whose if by_person else None)
    found = {}
    for (digest, person), side in zip(units, apart, strict=True):
        found.setdefault(person if by_person else digest, set()).add(bool(side))
    return found


def depends_on_others(choose, units, others, fraction, by_person, random):
    """Whether a unit has records on both sides, or its side changes with other units or their order."""
    before = sides(units, fraction, by_person, choose)
    mixed = [*units, *others]
    random.shuffle(mixed)
    after = sides(mixed, fraction, by_person, choose)
    return any(len(side) > 1 for side in after.values()) or {unit: after[unit] for unit in before} != before


@pytest.mark.parametrize("by_person", [False, True])
def test_what_is_kept_apart_depends_on_the_unit_alone(by_person):
    @given(UNITS, UNITS, FRACTIONS, st.randoms(use_true_random=False))
    @settings(max_examples=80, deadline=None, derandomize=True)
    def check(units, others, fraction, random):
        assert not depends_on_others(holdout_rows, units, others, fraction, by_person, random)

    check()


@given(UNITS, st.floats(0.05, 0.5), st.floats(0.5, 0.95), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_larger_share_only_adds(units, small, large, by_person):
    few, many = sides(units, small, by_person), sides(units, large, by_person)
    assert all(many[unit] == {True} for unit, side in few.items() if side == {True})


def every_tenth(digests, fraction, persons=None):
    """Twin: by index."""
    return np.arange(len(digests)) % round(1 / fraction) == 0


def smallest_hashes(digests, fraction, persons=None):
    """Twin: exactly the share asked for, of those with the smallest digests."""
    rank = np.argsort(np.argsort([row.tobytes() for row in digests], kind="stable"))
    return rank < math.ceil(fraction * len(digests))


def records_of_a_person(digests, fraction, persons=None):
    """Twin: by record although a person is the unit."""
    return holdout_rows(digests, fraction)


@pytest.mark.parametrize(
    ("twin", "by_person"), [(every_tenth, False), (smallest_hashes, False), (records_of_a_person, True)]
)
def test_a_choice_that_looks_at_others_is_rejected(twin, by_person):
    random = Random(1)
    units = [(bytes([i] * 16), "ab"[i % 2]) for i in range(20)]
    others = [(bytes([i + 100] * 16), "abc"[i % 3]) for i in range(20)]
    assert depends_on_others(twin, units, others, 0.3, by_person, random)
    assert not depends_on_others(holdout_rows, units, others, 0.3, by_person, random)
