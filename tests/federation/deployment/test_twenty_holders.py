"""Twenty data holders, sixty processes, join at once: all are taken in and answer.

Their executors do without PyTorch (inside/light_executor.py), because twenty real ones hold 12 GB.
"""

import time

import pytest

pytestmark = pytest.mark.slow
HOLDERS = [f"ward-{number:02d}" for number in range(20)]


def test_twenty_holders_that_join_at_once_all_answer_a_round(federation):
    ours = federation(
        HOLDERS, records=60, recipe={"training": {"rounds": 2}, "data": {"declared_records": 60}},
        server={"least_holders": 20, "holders_deadline": 400.0, "round_deadline": 120.0},
    )  # fmt: skip
    for name in HOLDERS:
        ours.order(name, "executor", "light")
    ours.serve()
    began = time.monotonic()
    joined = dict(zip(HOLDERS, ours.join(*HOLDERS), strict=True))
    ours.all_online(joined, seconds=400)
    submit = ours.submit()
    assert submit.wait(400) == 0, submit.text()
    assert time.monotonic() - began < 600
    result = ours.result()
    assert [row["holders"] for row in result["rounds"]] == [20, 20]
    assert [row["refused"] for row in result["rounds"]] == [[], []]
    assert {row["holder"] for row in result["privacy"]} == set(HOLDERS)
    assert all(process.alive for process in joined.values())
