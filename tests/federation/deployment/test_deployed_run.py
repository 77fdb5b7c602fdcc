"""Runs of `fedhead serve`, `join` and `submit` as processes: what they leave, and who may come, refuse and go on."""

import json
import math
import os
import signal

import pytest
from deployment_harness import LABELS, free_ports
from deployment_processes import PATIENCE, figures_at, until

import fedhead
from fedhead.common.refusals import BEYOND_BUDGET

pytestmark = pytest.mark.slow
RELEASED = 'fedhead_holder_rounds_total{outcome="released"}'
SLOWLY = {"limits": {"reply_at": 1.0}}  # a round then lasts long enough to do something within it


def test_a_run_leaves_what_a_simulation_leaves_and_goes_on_where_it_was_stopped(federation):
    ours = federation(server={"least_holders": 2}, holder=SLOWLY)
    (figures,) = free_ports(1)
    ours.write_holder("north", {**SLOWLY, "metrics": f"127.0.0.1:{figures}"})
    ours.options = ["--json-logs"]
    ours.up()

    told = ours.run("status", "--server", ours.server_file, "--json")
    assert told.returncode == 0, told.stderr
    assert {row["name"]: row["online"] for row in json.loads(told.stdout)["holders"]} == {"north": True, "south": True}

    submit = ours.submit()
    assert submit.wait() == 0, submit.text()
    result = ours.result()
    assert [row["round"] for row in result["rounds"]] == [1, 2, 3, 4]
    assert [row["holders"] for row in result["rounds"]] == [2] * 4
    assert result["final"]["accuracy"] > result["majority"]["accuracy"]
    assert {row["holder"] for row in result["privacy"]} == {"north", "south"}
    assert all(2.9 < row["epsilon"] <= 3.0 for row in result["privacy"])
    assert {path.name for path in (ours.folder / "out").iterdir()} >= {
        "result.json", "report.html", "model", "checkpoints"
    }  # fmt: skip
    labels, _ = fedhead.load(ours.folder / "out" / "model", allow_modules=True).predict([[0.5] * 64])
    assert labels[0] in LABELS

    shown = until(lambda: (found := figures_at(figures)).get(RELEASED) == 4 and found, what="four rounds were released")
    (epsilon,) = (row["epsilon"] for row in result["privacy"] if row["holder"] == "north")
    assert shown['fedhead_holder_budget_epsilon{domain="wards",kind="spent"}'] == pytest.approx(epsilon, rel=1e-3)
    # budgets compose: what is left is more than the difference
    assert 8 - epsilon < shown['fedhead_holder_budget_epsilon{domain="wards",kind="left"}'] < 8
    assert shown["fedhead_holder_training_seconds_count"] == 4
    assert shown["fedhead_holder_online"] == shown['fedhead_holder_up{process="executor"}'] == 1

    budget = ours.run("budget", *map(ours.ledger, ours.holders), "--json")
    assert budget.returncode == 0, budget.stderr
    domains = {row["holder"]: row["spent"]["epsilon"] for row in json.loads(budget.stdout)["domains"]}
    for row in result["privacy"]:
        assert domains[row["holder"]] == pytest.approx(row["epsilon"], rel=1e-3)
    audit = ours.run("audit", "ledger", *map(ours.ledger, ours.holders), "--marks", ours.folder / "link" / "marks.json")
    assert audit.returncode == 0, audit.stdout + audit.stderr

    # stopped and resumed: exit status 1 and a checkpoint, then to the end, each round charged once
    first = ours.submit("second", recipe=ours.write_recipe({"privacy": {"epsilon": 2.0}}, "other.toml"))
    ours.after_round(first, 1)
    assert ours.run("stop", "--server", ours.server_file).returncode == 0
    assert first.wait() == 1, first.text()
    assert "--resume" in first.text()
    assert not (ours.folder / "second" / "result.json").exists()
    again = ours.submit("second", "--resume", recipe=ours.folder / "other.toml")
    assert again.wait() == 0, again.text()
    assert [row["round"] for row in ours.result("second")["rounds"]] == [1, 2, 3, 4]
    for name in ours.holders:
        assert ours.charges(name) == {number: {"reserve": 1, "release": 1} for number in (1, 2, 3, 4)}
    ours.audited()

    for change, setting in (
        ({"data": {"test": None}}, "data.test.fraction"),
        ({"run": {"baseline": True}}, "run.baseline"),
    ):
        recipe, out = ours.write_recipe(change, "refused.toml"), ours.folder / "no"
        refused = ours.run("submit", recipe, "--server", ours.server_file, "--out", out)
        assert refused.returncode == 2, refused.stderr
        assert setting in refused.stderr
        assert not (ours.folder / "no").exists()
    joined = [process for process in ours.processes if process.alive]
    assert [process.name for process in joined] == ["serve", "north", "south"]
    assert all(process.terminate() == 0 for process in joined)
    for process in joined:  # theirs, and their children's
        lines = [json.loads(line) for line in process.log.read_text().splitlines()]
        assert {"time", "side", "level", "logger", "message"} <= set.intersection(*map(set, lines))
        assert {line["side"] for line in lines} == {"server" if process.name == "serve" else "client"}
        assert process.out.read_text() == ""


def test_a_late_holder_is_taken_in_and_one_without_budget_is_left_out(federation):
    ours = federation(["north", "south", "poor"], server={"round_deadline": PATIENCE}, holder=SLOWLY)
    ours.write_holder("poor", {**SLOWLY, "budget": {"epsilon": 0.5}})
    joined = ours.up("north", "poor")
    submit = ours.submit(recipe=ours.write_recipe({"training": {"rounds": 6}}))
    ours.after_round(submit, 1)
    north = joined["north"].child("executor")
    os.kill(north, signal.SIGSTOP)  # so that the run waits for the late one, however long that takes to come
    (south,) = ours.join("south")
    ours.all_online({**joined, "south": south})
    os.kill(north, signal.SIGCONT)
    assert submit.wait() == 0, submit.text()
    result = ours.result()
    holders = [row["holders"] for row in result["rounds"]]
    assert holders[0] == 1
    assert holders[-1] == 2
    refused = [{row["holder"]: row["code"] for row in one["refused"]} for one in result["rounds"]]
    assert all(row.get("poor") == BEYOND_BUDGET for row in refused)
    assert refused[0].keys() >= {"south"}
    assert "south" not in refused[-1]
    spent = {row["holder"]: row["epsilon"] for row in result["privacy"]}
    assert 0 < spent["south"] < spent["north"] <= 3.0
    assert "poor" not in spent or spent["poor"] == 0
    assert not ours.charges("poor")
    ours.audited("north", "south")


def test_a_submit_without_a_server_or_enough_holders_ends_in_one_line(federation):
    ours = federation(server={"least_holders": 2, "holders_deadline": 3.0})
    alone = ours.submit("alone", "--json-logs")
    assert alone.wait() in (1, 2)
    assert "Traceback" not in alone.text()
    assert "fedhead serve" in alone.text()
    assert [json.loads(line)["level"] for line in alone.log.read_text().splitlines()] == ["ERROR"]
    ours.serve()
    few = ours.submit("few")
    assert few.wait() == 1, few.text()
    assert "0 of at least 2 holders" in few.text()
    assert "Traceback" not in few.text()
    status = ours.run("status", "--server", ours.server_file, "--json")
    assert json.loads(status.stdout)["run"]["state"] == "failed"
    until(lambda: ours.online() == 0, what="figures")
    assert math.isfinite(ours.state()["updated"])
