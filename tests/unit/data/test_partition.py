from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from fedhead.common.config.schema import HolderSettings
from fedhead.common.data import partition as module
from fedhead.common.data.partition import PARTITIONERS, partition
from fedhead.common.data.records import Records
from fedhead.common.errors import ConfigError, DataError

TABLES = {
    "iid": {"kind": "iid"},
    "dirichlet": {"kind": "dirichlet", "alpha": 0.5},
    "label-shards": {"kind": "label-shards", "shards": 2},
    "by-column": {"kind": "by-column", "column": "hospital"},
    "sizes": {"kind": "sizes", "sizes": [100, 50, 25, 25, 40]},
}


def records(count: int = 240) -> Records:
    rng = np.random.default_rng(4)
    hospitals = [f"h{i % 5}" for i in range(count)]
    return Records.from_memory("vector", np.zeros((count, 1)), rng.integers(0, 4, count), {"hospital": hospitals})


def settings(table: dict[str, object], count: int = 5) -> HolderSettings:
    return HolderSettings.model_validate({"count": count, "partition": table})


def test_every_row_of_the_table_is_tried_here() -> None:
    assert set(TABLES) == set(PARTITIONERS)


@pytest.mark.parametrize("kind", TABLES)
def test_parts_are_sorted_disjoint_cover_all_and_follow_the_seed(kind: str) -> None:
    parts = partition(records(), settings(TABLES[kind]), 3)
    assert len(parts) == 5
    assert all(part.dtype == np.int64 and len(part) and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(240))
    again = partition(records(), settings(TABLES[kind]), 3)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))
    other = partition(records(), settings(TABLES[kind]), 4)
    moved = any(not np.array_equal(one, two) for one, two in zip(parts, other, strict=True))
    assert moved == (kind != "by-column")


@pytest.mark.parametrize("kind", ["dirichlet", "label-shards", "by-column"])
def test_row_numbers_equal_those_of_the_public_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr_datasets.partitioner

    quick = partition(records(), settings(TABLES[kind]), 3)
    for name in ("DirichletPartitioner", "ShardPartitioner", "NaturalIdPartitioner"):
        known = getattr(flwr_datasets.partitioner, name)

        class Forgetful(known):  # type: ignore[misc,valid-type]
            def __getattribute__(self, name: str):
                caller = sys._getframe(1).f_code.co_filename
                if name == "_partition_id_to_indices" and caller == module.__file__:
                    raise AttributeError(name)
                return super().__getattribute__(name)

        monkeypatch.setattr(flwr_datasets.partitioner, name, Forgetful)
    public = partition(records(), settings(TABLES[kind]), 3)
    assert all(np.array_equal(one, two) for one, two in zip(quick, public, strict=True))


def test_kinds_do_what_they_say() -> None:
    data = records()
    sizes = [len(part) for part in partition(data, settings(TABLES["sizes"]), 0)]
    assert sizes == [100, 50, 25, 25, 40]
    assert {len(part) for part in partition(data, settings(TABLES["iid"]), 0)} == {48}
    for name, part in zip(
        ["h0", "h1", "h2", "h3", "h4"], partition(data, settings(TABLES["by-column"]), 0), strict=True
    ):
        assert set(data.column("hospital")[part]) == {name}
    shards = partition(data, settings({"kind": "label-shards", "shards": 1}, 4), 0)
    assert np.mean([len(set(data.labels[part])) for part in shards]) <= 2.5
    skewed = partition(data, settings({"kind": "dirichlet", "alpha": 0.05}, 3), 0)
    even = partition(data, settings({"kind": "dirichlet", "alpha": 1e4}, 3), 0)

    def skew(parts: list[np.ndarray]) -> float:
        return float(np.mean([np.bincount(data.labels[part], minlength=4).max() / len(part) for part in parts]))

    assert skew(even) < 0.4 < 0.6 < skew(skewed)


def test_sizes_may_leave_records_over() -> None:
    parts = partition(records(), settings({"kind": "sizes", "sizes": [10, 20]}, 2), 0)
    assert [len(part) for part in parts] == [10, 20]


@pytest.mark.parametrize(
    ("table", "count", "message"),
    [
        ({"kind": "iid"}, 241, "holders.count is 241: there are only 240 records"),
        ({"kind": "dirichlet", "alpha": 0.0001}, 50, "larger alpha"),
        ({"kind": "label-shards", "shards": 50}, 5, "need 250 shards"),
        ({"kind": "by-column", "column": "ward"}, 5, "Use one of: hospital"),
        ({"kind": "by-column", "column": "hospital"}, 4, "Set holders.count = 5"),
        ({"kind": "sizes", "sizes": [200, 100]}, 2, "add up to 300"),
        ({"kind": "sizes", "sizes": [20, 100]}, 3, "Set holders.count = 2"),
    ],
)
def test_faults_are_one_line_with_a_remedy(table: dict[str, object], count: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        partition(records(), settings(table, count), 0)
    assert "\n" not in str(caught.value)


def test_a_gap_in_the_column_is_counted() -> None:
    data = Records.from_memory("vector", np.zeros((3, 1)), [0, 1, 0], {"hospital": ["a", "", "b"]})
    with pytest.raises(DataError, match="1 of 3 records have no value"):
        partition(data, settings({"kind": "by-column", "column": "hospital"}, 2), 0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1], [2]], None),
        ([[0, 1]], "1 parts for 2 holders"),
        ([[0, 1], [1]], "two holders"),
        ([[0], [240]], "outside 0 to 239"),
        ([[0.5], [1.0]], "integers"),
        ([[0], []], "1 of 2 holders get no record"),
    ],
)
def test_a_partitioner_of_the_users_own_is_checked(parts, message, monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("own_partitioner")
    own.spread = lambda labels, holders, seed, bonus: [np.array(part) for part in parts]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_partitioner", own)
    table = {"kind": "module:own_partitioner:spread", "options": {"bonus": 1}}
    if message is None:
        assert [part.tolist() for part in partition(records(), settings(table, 2), 0)] == parts
    else:
        with pytest.raises(DataError, match=message):
            partition(records(), settings(table, 2), 0)


def test_a_partitioner_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="can't be imported"):
        partition(records(), settings({"kind": "module:no_such_module:spread"}, 2), 0)
