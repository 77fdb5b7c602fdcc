"""Persons: who has which records, whose are left out, who is a test person; never by order or by others."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.config.schema import HolderSettings
from fedhead.common.data.partition import PARTITIONERS, partition, partition_persons
from fedhead.common.data.persons import (
    codes_of,
    group_persons,
    majority_labels,
    names_of,
    split_persons,
    tell_left_out,
)
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError


def records(names, labels=None, seed=0, **columns):
    count = len(names)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count) if labels is None else labels
    return Records.from_memory("vector", rng.normal(size=(count, 2)), labels, {"patient": names, **columns})


def test_persons_keep_the_order_of_their_first_record():
    found = group_persons(records(["b", "a", "b", "c", "a", "b"]), "patient", 10)
    assert len(found) == 3
    assert found.rows.tolist() == [0, 2, 5, 1, 4, 3]
    assert found.offsets.tolist() == [0, 3, 5, 6]
    assert found.left_out == 0
    assert repr(found) == "Persons(3 persons)"


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_which_records_are_left_out_depends_on_the_person_alone(owners, most, random):
    data = records(owners)
    found = group_persons(data, "patient", most)
    lengths = np.diff(found.offsets)
    assert lengths.tolist() == [min(most, owners.count(owner)) for owner in dict.fromkeys(owners)]
    assert found.left_out == len(owners) - len(found.rows)
    kept = {i: set(found.rows[found.offsets[i] : found.offsets[i + 1]].tolist()) for i in range(len(found))}
    for i, owner in enumerate(dict.fromkeys(owners)):
        assert {owners[row] for row in kept[i]} == {owner}
        alone = [row for row, name in enumerate(owners) if name == owner]  # nobody else, in another order
        random.shuffle(alone)
        only = group_persons(data.select(alone), "patient", most)
        assert {alone[row] for row in only.rows} == kept[i]


def test_the_surplus_is_not_the_last_records():
    """The twin of the test above: what is kept does change with the contents."""
    kept = {tuple(sorted(group_persons(records([1] * 12, seed=seed), "patient", 4).rows)) for seed in range(6)}
    assert len(kept) > 3


def test_records_of_equal_input_are_told_apart_by_their_label():
    inputs = np.zeros((4, 2))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        labels = np.array([0, 1, 2, 3])[order]
        data = Records.from_memory("vector", inputs, labels, {"patient": ["p"] * 4})
        kept = sorted(labels[group_persons(data, "patient", 2).rows].tolist())
        assert kept == sorted(np.array([0, 1, 2, 3])[group_persons(
            Records.from_memory("vector", inputs, [0, 1, 2, 3], {"patient": ["p"] * 4}), "patient", 2
        ).rows].tolist())  # fmt: skip


def test_the_number_left_out_goes_to_the_holders_log_only(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="fedhead.client"):
        tell_left_out("holder-1", group_persons(records(["a"] * 5 + ["b"]), "patient", 2), 2)
        tell_left_out("holder-2", group_persons(records(["a"] * 2), "patient", 2), 2)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("fedhead.client", "holder-1: 3 records are left out, of persons with more than 2 (privacy.records_per_person)")
    ]
    assert capsys.readouterr().out == ""


def test_nobody_is_on_both_sides_of_a_split():
    names = [f"p{i % 300}" for i in range(1000)]
    train, test = split_persons(records(names), "patient", 0.2)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1000))
    assert not {names[i] for i in train} & {names[i] for i in test}
    assert 0.1 < len(test) / 1000 < 0.3
    moved = np.random.default_rng(0).permutation(1000)[:600]  # others leave, the order changes
    some = records([names[i] for i in moved], seed=5)
    _, again = split_persons(some, "patient", 0.2)
    assert {names[moved[i]] for i in again} == {names[i] for i in test} & {names[i] for i in moved}
    _, other = split_persons(records(names), "patient", 0.2, key=b"another")
    assert {names[i] for i in other} != {names[i] for i in test}


@pytest.mark.parametrize(
    "values",
    [
        ["1", "2", " 1 "],
        [1, 2, 1],
        [1.0, 2.0, 1.0],
        np.array([b"1", b"2", b"1"]),
        np.array(["1", 2, 1.0], dtype=object),
    ],
)
def test_names_are_text_whatever_the_column(values):
    assert names_of(records(values), "patient").tolist() == ["1", "2", "1"]


@pytest.mark.parametrize("gap", [None, "", " ", float("nan")])
def test_a_record_without_a_person_is_refused_and_not_shown(gap):
    values = np.array(["secret", gap, "secret"], dtype=object)
    with pytest.raises(DataError, match=r'^privacy.person is "patient": some records have no value there') as error:
        names_of(records(values), "patient")
    assert "secret" not in str(error.value)


def test_bad_columns_are_refused():
    with pytest.raises(DataError, match=r'^data.person is "ward": the data has no such column. Use one of: patient.$'):
        group_persons(records(["a"]), "ward", 3, "data.person")
    with pytest.raises(DataError, match=r"a person must be one value a record"):
        names_of(records(np.zeros((2, 2))), "patient")


def test_codes_and_majorities():
    codes, first = codes_of(["z", "a", "z", "m"])
    assert codes.tolist() == [0, 1, 0, 2]
    assert first.tolist() == [0, 1, 3]
    codes = np.array([0, 0, 0, 1, 1, 2])
    assert majority_labels(codes, np.array([2, 1, 2, 3, 0, 1])).tolist() == [2, 0, 1]


TABLES = {
    "iid": {"kind": "iid"},
    "dirichlet": {"kind": "dirichlet", "alpha": 1.0},
    "label-shards": {"kind": "label-shards", "shards": 2},
    "by-column": {"kind": "by-column", "column": "hospital"},
    "sizes": {"kind": "sizes", "sizes": [20, 10, 5]},
}


def holders(kind):
    return HolderSettings.model_validate({"count": 3, "partition": TABLES[kind]})


def test_every_row_of_the_table_is_tried_here():
    assert set(TABLES) == set(PARTITIONERS)


@pytest.mark.parametrize("kind", TABLES)
def test_a_persons_records_stay_together(kind):
    names = [f"p{i % 60}" for i in range(240)]
    data = records(names, hospital=[f"h{i % 3}" for i in range(240)])
    parts = partition_persons(data, holders(kind), 3, "patient")
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows) == (140 if kind == "sizes" else 240)
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    owners = [{names[row] for row in part} for part in parts]
    assert not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]
    if kind == "sizes":
        assert [len(mine) for mine in owners] == [20, 10, 5]


def test_a_person_may_be_in_two_hospitals():
    data = records(["a", "a", "b", "c"], hospital=["h0", "h1", "h1", "h2"])
    parts = partition_persons(data, holders("by-column"), 3, "patient")
    assert [part.tolist() for part in parts] == [[0], [1, 2], [3]]


@pytest.mark.parametrize("kind", TABLES)
def test_one_record_a_person_is_spread_as_records_are(kind):
    data = records([f"p{i}" for i in range(90)], hospital=[f"h{i % 3}" for i in range(90)])
    for mine, theirs in zip(
        partition_persons(data, holders(kind), 5, "patient"), partition(data, holders(kind), 5), strict=True
    ):
        assert np.array_equal(mine, theirs)


def test_messages_speak_of_persons():
    data = records(["a", "a", "b", "b"])
    with pytest.raises(DataError, match=r"there are only 2 persons to spread. Give fewer holders or more persons"):
        partition_persons(data, holders("iid"), 0, "patient")
    with pytest.raises(DataError, match=r"add up to 35: there are 30 persons"):
        partition_persons(records([str(i % 30) for i in range(90)]), holders("sizes"), 0, "patient")
