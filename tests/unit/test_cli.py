"""The command: exit status, what goes to stdout and to stderr, and what is left behind when it is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path

import pytest

from fedhead import stopping
from fedhead.cli import main
from fedhead.common.errors import Terminated
from fedhead.output import emit

write_recipe = run_path(str(Path(__file__).with_name("tiny_recipe.py")))["write_recipe"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a tiny recipe, as the current one, and a cache of its own."""
    write_recipe(tmp_path, 60, 3)
    (tmp_path / "fedhead_cli_loud.py").write_text(
        "from torch import nn\nclass Loud(nn.Module):\n    def forward(self, x):\n"
        "        print('LOUD')\n        return x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("FEDHEAD_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def fedhead(here, fedhead):
    """The command in that folder."""
    return fedhead


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fedhead", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate"], "RECIPE is missing"),
        (["simulate", "none.toml"], "no such file"),
        (["simulate", "."], "can't be read"),
        (["simulate", "v.csv"], "no valid TOML"),
        (["simulate", "r.toml", "--engine", "foo"], "--engine is"),
        (["simulate", "r.toml", "--seeds", "0"], "--seeds"),
        (["simulate", "r.toml", "--set", "nonsense"], "form key=value"),
        (["simulate", "r.toml", "--set", "a.b.c=3"], "no such setting"),
        (["simulate", "r.toml", "--set", "privacy.epsilon=0"], "more than 0"),
        (["simulate", "r.toml", "--set", "model.backbone=transformers:no/such", "--out", "o"], "hub"),
        (["simulate", "r.toml", "--out", "v.csv"], "must be a folder"),
        (["simulate", "r.toml", "--state", "v.csv", "--out", "o"], "feature cache in .* can't be written"),
        (["simulate", "r.toml", "--no-such-option"], "No such option"),
        (["plan"], "RECIPE is missing"),
        (["plan", "--epsilon", "0", "--rounds", "3"], "--epsilon is 0.0"),
        (["plan", "--epsilon", "nan", "--rounds", "3"], "--epsilon is nan"),
        (["plan", "--epsilon", "3", "--rounds", "0"], "--rounds"),
        (["report", "nowhere"], "no result.json"),
        (["predict", "nowhere", "v.csv"], "MODEL_DIR"),
        (["no-such-command"], "No such command"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(fedhead, here, monkeypatch, arguments, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path.name for path in here.iterdir()}
    status, out, err = fedhead(*arguments)
    assert status == 2
    assert out == ""
    assert re.fullmatch(rf"fedhead: .*{words}.*\n", err), err
    assert {path.name for path in here.iterdir()} <= before | {"cache"}


def test_all_faults_of_a_recipe_are_reported_a_line_each(fedhead):
    status, _, err = fedhead("simulate", "r.toml", "--set", "training.rounds=0", "--set", "holders.count=0")
    assert status == 2
    assert [line.split(" is ")[0] for line in err.splitlines()] == [
        "fedhead: holders.count",
        "fedhead: training.rounds",
    ]


def test_json_is_one_object_and_nothing_else(fedhead, here):
    """Whatever a module of the user's own prints."""
    loud = ["--set", "model.backbone=module:fedhead_cli_loud:Loud"]
    status, out, err = fedhead("simulate", "r.toml", "--json", "--out", "o", *loud)
    assert status == 0
    assert json.loads(out)["final"] == json.loads((here / "o" / "result.json").read_text())["final"]
    assert out.count("\n") == 1
    assert set(err.split()) == {"LOUD"}
    status, out, err = fedhead("simulate", "r.toml", "--json", "--out", "o2", "--set", "data.source=csv:none.csv")
    assert (status, out) == (2, "")
    assert "no such file" in err
    for arguments in (["plan", "r.toml"], ["report", "o"], ["simulate", "--list"]):
        status, out, _ = fedhead(*arguments, "--json")
        assert status == 0
        assert isinstance(json.loads(out), dict)


def test_without_a_terminal_output_is_plain_and_fits_80_columns(fedhead, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = fedhead("simulate", "r.toml", "--out", "o")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    wrapped = [line for line in out.splitlines() if not line.startswith(("note: ", "results in", "report  at"))]
    assert max(map(len, wrapped)) <= 80


def test_several_seeds_from_the_command(fedhead, here):
    status, out, err = fedhead("simulate", "r.toml", "--seeds", "2", "--out", "o")
    assert (status, err) == (0, "")
    found = json.loads((here / "o" / "seeds.json").read_text())
    assert found["seeds"] == [0, 1]
    loss = found["metrics"]["loss"]
    assert loss["deviation"] > 0
    assert "over 2 seeds" in out
    row = next(line for line in out.splitlines() if "loss" in line)
    shown = (loss["mean"], loss["deviation"], min(loss["values"]), max(loss["values"]))
    assert re.findall(r"\d+\.\d+", row) == [f"{value:.3f}" for value in shown]
    assert "results in o\n" in out
    for seed, privacy in zip((0, 1), found["privacy"], strict=True):
        result = json.loads((here / "o" / f"seed-{seed}" / "result.json").read_text())
        assert result["config"]["run"]["seed"] == seed
        worst = max(result["privacy"], key=lambda one: one["epsilon"])
        assert privacy == {"seed": seed, **{name: worst[name] for name in ("epsilon", "delta", "unit")}}
    assert "each run spent epsilon " in out
    status, _, err = fedhead("report", "o")
    assert status == 2
    assert "name one of these folders" in err


def test_runs_without_a_folder_get_one_each(fedhead, here):
    assert [fedhead("simulate", "r.toml")[0] for _ in range(2)] == [0, 0]
    assert len(list((here / "runs").glob("r-*/result.json"))) == 2


def test_the_cifar_recipe_says_quickly_what_is_missing(fedhead, monkeypatch, here):
    import urllib.request

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    started = time.monotonic()
    status, _, err = fedhead("simulate", "cifar10", "--out", "o")
    assert status == 2
    assert "can't be downloaded" in err
    assert err.count("\n") == 1
    assert time.monotonic() - started < 30
    assert not (here / "o").exists()


def test_details_only_when_asked_for(fedhead, monkeypatch, capsys):
    from fedhead.simulations import plans

    def broken(*_):
        raise RuntimeError("DETAIL")

    monkeypatch.setattr(plans, "of_recipe", broken)
    status, _, err = fedhead("plan", "r.toml")
    assert status == 1
    assert "RuntimeError" in err
    assert "DETAIL" not in err
    monkeypatch.setenv("FEDHEAD_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["fedhead", "plan", "r.toml"])
    with pytest.raises(RuntimeError, match="DETAIL"):
        main()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing_and_says_one_line(here, number, status):
    # No evaluation, so no checkpoint that would be kept.
    process = start(
        "simulate", "r.toml", "--out", "o", "--set", "training.rounds=100000", "--set", "run.evaluate_every=100000",
        cwd=here,
    )  # fmt: skip
    wait_for(here / "cache", process)  # it is past the imports, and at work
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err[-2000:]
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") <= 1
    assert not (here / "o").exists()


def test_ctrl_c_in_the_middle_of_an_import_has_the_same_status(tmp_path):
    """Python would end by the signal where it came while a text ran under `exec`, as in every dataclass's import."""
    (tmp_path / "stopped.py").write_text(
        "import fedhead.cli\nfedhead.cli.app = lambda **_: exec('raise KeyboardInterrupt')\nfedhead.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fedhead: stopped.\n")


@pytest.mark.parametrize("where", ["", "def stopped(*_):\n    "], ids=["imported", "called"])
def test_a_stop_while_code_of_a_recipes_own_runs_is_a_stop(fedhead, here, monkeypatch, where):
    """When it is imported, or called: what it raises itself would be its own fault."""
    (here / "fedhead_cli_stopped.py").write_text(f"import signal\n{where}signal.raise_signal(signal.SIGTERM)\n")
    monkeypatch.delitem(sys.modules, "fedhead_cli_stopped", raising=False)
    backbone = "model.backbone=module:fedhead_cli_stopped:stopped"
    status, out, err = fedhead("simulate", "r.toml", "--out", "o", "--set", backbone)
    assert (status, out, err) == (143, "", "")
    assert not (here / "o").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "after", ["pass", "raise ValueError", "while True: time.sleep(0.1)"], ids=["ends", "fails", "never-ends"]
)
def test_a_stop_within_an_import_is_raised_after_it(fedhead, here, monkeypatch, number, status, after):
    """What is raised within a library's import may be swallowed there, or end the process."""
    monkeypatch.setattr(stopping, "LONGEST", 0.5)
    (here / "fedhead_cli_stopped.py").write_text(
        f"import signal, time\ntry:\n    signal.raise_signal({int(number)})\n    time.sleep(0.1)\n"
        f"except BaseException:\n    raise RuntimeError from None\n{after}\n"
    )
    monkeypatch.delitem(sys.modules, "fedhead_cli_stopped", raising=False)
    backbone = "model.backbone=module:fedhead_cli_stopped:stopped"
    found, out, err = fedhead("simulate", "r.toml", "--out", "o", "--set", backbone)
    assert (found, out, err) == (status, "", "fedhead: stopped.\n" if status == 130 else "")
    assert not (here / "o").exists()


def test_a_stop_while_a_result_is_shown_is_no_reader_that_went_away():
    def show():
        raise Terminated(143)

    with pytest.raises(Terminated):
        emit({}, False, show)


def wait_for(path, process):
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_run_keeps_its_checkpoint_and_says_how_to_go_on(here):
    process = start("simulate", "r.toml", "--out", "o", "--set", "training.rounds=100000", cwd=here)
    wait_for(here / "o" / "checkpoints" / "latest.safetensors", process)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # what the holders have spent is kept along with it
    assert sorted(path.name for path in (here / "o").iterdir()) == ["checkpoints", "holders"]
    assert "--out o --resume" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_fault(here):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "fedhead", "plan", "r.toml"], cwd=here, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (0, b"")


def test_a_terminal_that_lacks_a_character_shows_the_rest(here):
    budget = ["--set", "holders.budget.epsilon=5", "--set", "holders.budget.domain=sté"]
    done = subprocess.run(
        [sys.executable, "-m", "fedhead", "plan", "r.toml", *budget], cwd=here, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"domain st? at delta 1e-5" in done.stdout


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line(here):
    command = f"ulimit -f 4; exec {sys.executable} -m fedhead simulate r.toml --out o"
    process = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {command}"], cwd=here, capture_output=True, text=True, check=False
    )
    assert process.returncode in {1, 2}
    assert "Traceback" not in process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert not (here / "o" / "result.json").exists()
