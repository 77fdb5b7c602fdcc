"""Cohorts: everyone in turn, at most as often as planned."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.planned import most_participations
from fedhead.server.cohorts import Cohorts


def names(count):
    return [f"holder-{i:03d}" for i in range(count)]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.integers(1, 50))
def test_cohorts_are_balanced_distinct_and_within_the_plan(holders, per_round, seed, rounds):
    per_round = min(per_round, holders)
    cohorts = Cohorts(names(holders), per_round, seed)
    counts = dict.fromkeys(names(holders), 0)
    for number in range(1, rounds + 1):
        asked = cohorts.of_round(number)
        assert len(asked) == len(set(asked)) == per_round
        assert asked == sorted(asked)
        for name in asked:
            counts[name] += 1
    assert max(counts.values()) == cohorts.participations(rounds)
    assert cohorts.participations(rounds) == most_participations(rounds, holders, per_round)


def test_order_of_names_does_not_matter():
    assert Cohorts(names(9), 4, 1).of_round(3) == Cohorts(names(9)[::-1], 4, 1).of_round(3)


def test_seed_changes_the_cohorts():
    assert any(Cohorts(names(30), 5, 1).of_round(r) != Cohorts(names(30), 5, 2).of_round(r) for r in range(1, 4))
