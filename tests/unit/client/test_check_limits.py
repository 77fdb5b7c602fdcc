"""`fedhead check`: what of the limits is shown, and what is a remedy."""

import socket
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest

from fedhead.client.checking import check_holder
from fedhead.client.holder import load_holder
from fedhead.client.joining.join import only_one
from fedhead.common.config.schema import TASKS as KINDS
from fedhead.common.privacy.summing import rounding_records

FILES = run_path(str(Path(__file__).with_name("holder_files.py")))
HOLDER, change = (FILES[name] for name in ("HOLDER", "change"))


@pytest.fixture
def here(tmp_path):
    rows = [f"note {i},{'ab'[i % 2]},p{i}" for i in range(40)]
    (tmp_path / "notes.csv").write_text("note,code,patient\n" + "\n".join(rows) + "\n")
    (tmp_path / "holder.toml").write_text(HOLDER)
    return tmp_path


def found(here, name):
    report = check_holder(here / "holder.toml", connect=False)
    return [finding for finding in report.findings if finding.name == name]


def test_what_a_request_may_ask_for_is_shown(here):
    (shown,) = found(here, "requests")
    assert (shown.state, shown.text) == (
        "ok",
        "unit person; head linear; any task; any backbone; any clipping norm; any noise that the budget pays for; no "
        "limit for one run; no metrics leave; no code of its own",
    )
    assert not found(here, "heads")
    change(here, "delta = 1e-6", "delta = 1e-6\nper_run = { epsilon = 1.5 }")
    change(
        here, "[limits]", f"""[limits]
        heads = ["linear", "mlp"]
        tasks = ["classification"]
        backbones = ["sha256:{"a" * 64}"]
        clipping_norm_max = 0.5
        noise_multiplier_min = 4.0
        modules = ["torch.nn:Identity"]
        release = {{ metrics = true }}""",
    )  # fmt: skip
    (shown,) = found(here, "requests")
    assert shown.text == (
        "unit person; head linear or mlp; task classification; one of 1 backbone; clipping norm at most 0.5; noise "
        "multiplier at least 4; a run at most epsilon 1.5; noised counts may leave; code: torch.nn:Identity"
    )
    (heads,) = found(here, "heads")
    assert heads.state == "warning"
    assert "limits.heads has mlp" in heads.text


def test_more_records_than_were_promised_are_a_remedy(here):
    change(here, "[limits]", "[limits]\nmost_records = 39")
    (most,) = found(here, "most records")
    assert (most.state, most.text) == ("remedy", "there are 40 records, and limits.most_records is 39")
    change(
        here, "most_records = 39", "most_records = 39\nallow_seeded_noise = true"
    )  # nothing holds it to a number then
    assert not found(here, "most records")


def test_records_of_persons_count_as_more(here):
    """20 persons with two records each: as many as a run would take them for."""
    rows = [f"note {i},{'ab'[i % 2]},p{i // 2}" for i in range(40)]
    (here / "notes.csv").write_text("note,code,patient\n" + "\n".join(rows) + "\n")
    many = rounding_records(np.full(20, 2))
    assert many > 100
    change(here, "[limits]", "[limits]\nmost_records = 100")
    change(here, 'units = ["person"]', 'units = ["record"]')
    assert not found(here, "most records")
    text = f"there are 40 records, which count as {many} where persons are the unit, and limits.most_records is 100"
    change(here, 'units = ["record"]', 'units = ["record", "person"]')
    (most,) = found(here, "most records")
    assert (most.state, most.text) == ("warning", text)
    change(here, 'units = ["record", "person"]', 'units = ["person"]')
    (most,) = found(here, "most records")
    assert (most.state, most.text) == ("remedy", text)
    change(here, "most_records = 100", f"most_records = {many}")
    assert not found(here, "most records")


@pytest.mark.parametrize("server", [False, True])
def test_a_holder_without_labels_of_its_own_can_not_join(here, server):
    """It would refuse every recipe; to look at its data alone it needs none."""
    if server:
        change(here, "[data]", 'server = "fl.example.org:8443"\n[data]')
    (labels,) = found(here, "labels")
    assert (labels.state, labels.remedy) == (
        "remedy" if server else "warning",
        "List in data.labels those that you agree to.",
    )
    joining = check_holder(here / "holder.toml", connect=False, joining=True).findings
    assert [finding.state for finding in joining if finding.name == "labels"] == ["remedy"]
    change(here, "[data]", '[data]\nlabels = ["a", "b"]')
    assert not found(here, "labels")


@pytest.mark.parametrize(
    ("entry", "text", "remedy"),
    [
        ("module:torch.nn:Identity", "it must have the form package.module:name", 'Write "torch.nn:Identity".'),
        ("torch.nn.Identity", "it must have the form package.module:name", "Give one such as torch.nn:Identity."),
        ("no_such_package_here.heads:Head", 'there is no package "no_such_package_here" here',
         "Install it where `fedhead join` runs, or correct the name."),
    ],
)  # fmt: skip
def test_code_that_could_never_be_named_is_a_remedy(here, entry, text, remedy):
    change(here, "[limits]", f'[limits]\nmodules = ["torch.nn:Identity", "{entry}"]')
    (code,) = found(here, "code")
    assert (code.state, code.text, code.remedy) == ("remedy", f'limits.modules has "{entry}": {text}', remedy)
    joining = check_holder(here / "holder.toml", connect=False, joining=True).findings
    assert [one.state for one in joining if one.name == "code"] == ["warning"]


def test_code_is_looked_for_and_not_imported(here, monkeypatch):
    (here / "fedhead_loud_package").mkdir()
    (here / "fedhead_loud_package" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.syspath_prepend(str(here))
    change(here, "[limits]", '[limits]\nmodules = ["fedhead_loud_package.heads:Head"]')
    assert not found(here, "code")


@pytest.mark.parametrize(
    ("entry", "text", "remedy"),
    [
        ("clasification", 'limits.tasks has "clasification": there is no such kind of task',
         "Write classification, or module:package.module:name for code that limits.modules names."),
        ("module:mine.tasks:Ranks", 'limits.tasks has "module:mine.tasks:Ranks": limits.modules lacks it',
         'Add "mine.tasks:Ranks" there, or remove it.'),
    ],
)  # fmt: skip
def test_a_task_that_no_recipe_can_have_is_a_remedy(here, entry, text, remedy):
    change(here, "[limits]", f'[limits]\ntasks = ["classification", "{entry}"]')
    (task,) = found(here, "task")
    assert (task.state, task.text, task.remedy) == ("remedy", text, remedy)
    joining = check_holder(here / "holder.toml", connect=False, joining=True).findings
    assert [one.state for one in joining if one.name == "task"] == ["warning"]


def test_a_task_of_ones_own_goes_with_its_code(here):
    change(here, "[limits]", '[limits]\ntasks = ["module:torch.nn:Identity"]\nmodules = ["torch.nn:Identity"]')
    assert not found(here, "task") + found(here, "code")


def test_the_kinds_of_task_that_are_known_are_those_that_there_are():
    from fedhead.common.tasks import TASKS

    assert set(KINDS) == set(TASKS)


def test_a_metrics_port_that_is_taken_is_a_remedy(here):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        change(here, "[data]", f'metrics = "{address}"\n[data]')
        (metrics,) = found(here, "metrics")
        assert (metrics.state, metrics.text, metrics.remedy) == (
            "remedy", f'metrics is "{address}": it can\'t be listened on (Address already in use)',
            "Give a free port, or end what listens there.",
        )  # fmt: skip
        with only_one(load_holder(here / "holder.toml")):  # what listens there is this holder's own
            (metrics,) = found(here, "metrics")
            assert (metrics.state, metrics.text) == ("ok", f"{address}: this holder has joined, and listens there")
            joining = check_holder(here / "holder.toml", connect=False, joining=True).findings
            assert [one.state for one in joining if one.name == "metrics"] == ["remedy"]
    (metrics,) = found(here, "metrics")
    assert (metrics.state, metrics.text) == ("ok", f"{address} is free")
