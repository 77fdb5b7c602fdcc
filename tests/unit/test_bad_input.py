"""Input of hostile, clumsy or new users: one line with the remedy and status 2, and nothing left behind."""

import json
import logging
import sys

import numpy as np
import pytest

from fedhead.common.config import changed, make_config
from fedhead.common.errors import ConfigError, DataError, FedheadError, InputError, RunError
from fedhead.common.models.saved import load_model
from fedhead.common.results import Result
from fedhead.simulations import federation
from fedhead.simulations.simulate import simulate, simulate_seeds

OWN_CODE = """
import torch
from torch import nn
from fedhead.common.tasks.classification import Classification

def raising(*args, **kwargs): raise ValueError("SECRET")
def leaving(*args, **kwargs): raise SystemExit(3)
def nothing(*args, **kwargs): return None
def untrainable(features, outputs):
    class Cut(nn.Module):
        def forward(self, x): return x[:, :outputs]
    return Cut()
def mixing(features, outputs): return nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, outputs))

class Few(nn.Module):
    def forward(self, x): return x[:2]
class Lost(nn.Module):
    def forward(self, x): return x * float("nan")
class Late(nn.Module):
    def forward(self, x):
        if len(x) > 2: raise KeyError("SECRET")
        return x
class Loud(nn.Module):
    def forward(self, x): print("LOUD"); return x

class OneLoss(Classification):
    closed_form = None
    def losses(self, outputs, targets): return super().losses(outputs, targets).mean()
class Column(OneLoss):
    def losses(self, outputs, targets): return Classification.losses(self, outputs, targets)[:, None]
class Raising(OneLoss):
    def losses(self, outputs, targets): raise ValueError("SECRET")
class NoNumber(OneLoss):
    def losses(self, outputs, targets): return Classification.losses(self, outputs, targets) * float("nan")
class NoMetrics(Classification):
    def metrics(self, outputs, targets): raise ValueError("SECRET")
class NoTask:
    def __init__(self, settings): pass
class NoOutputs(Classification):
    outputs = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-input")
    rng = np.random.default_rng(0)
    rows = [[*(rng.normal(size=3) + i % 2).round(4), "ab"[i % 2]] for i in range(60)]
    (folder / "v.csv").write_text("x0,x1,x2,label\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    (folder / "fedhead_bad_own.py").write_text(OWN_CODE)
    (folder / "fedhead_bad_syntax.py").write_text("def f(:\n")
    (folder / "fedhead_bad_import.py").write_text("raise ValueError('SECRET')\n")
    (folder / "fedhead_bad_exit.py").write_text("raise SystemExit(7)\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def recipe(folder):
    raw = {
        "task": {"labels": ["a", "b"]},
        "model": {"backbone": "module:torch.nn:Identity"},
        "data": {"source": "csv:v.csv", "columns": {"vector": "x*", "label": "label"}},
        "holders": {"count": 3},
        "privacy": {"epsilon": 3.0},
        "training": {"rounds": 2},
        "run": {"baseline": False},
    }
    return make_config(raw, base=folder)


def fails(recipe, tmp_path, changes, kind=InputError):
    """The error of a run that must be refused: one line, and nothing left in its folder."""
    out = tmp_path / "new" / "run"
    with pytest.raises(kind) as caught:
        simulate(changed(recipe, changes), out, state=tmp_path / "state")
    text = str(caught.value)
    assert "\n" not in text
    assert "SECRET" not in text
    assert not out.parent.exists()
    return text


OWN = "module:fedhead_bad_own:"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.backbone": "module::"}, "must have the form"),
        ({"model.backbone": "module:.here:f"}, "must have the form"),
        ({"model.backbone": "module:fedhead_bad_syntax:f"}, "SyntaxError when it was imported"),
        ({"model.backbone": "module:fedhead_bad_import:f"}, "ValueError when it was imported"),
        ({"model.backbone": "module:fedhead_bad_exit:f"}, "SystemExit when it was imported"),
        ({"model.backbone": OWN + "raising"}, "model.backbone is .* raised ValueError in line 6"),
        ({"model.backbone": OWN + "leaving"}, "model.backbone is .* raised SystemExit in line 7"),
        ({"model.backbone": OWN + "nothing"}, "must give a torch.nn.Module"),
        ({"model.backbone": OWN + "Few"}, "2 feature vectors for"),
        ({"model.backbone": OWN + "Lost"}, "none of the .* training records has finite features"),
        ({"model.backbone": OWN + "Late"}, "model.backbone is .* raised KeyError"),
        ({"model.head": {"kind": OWN + "raising"}}, "model.head.kind is .* raised ValueError"),
        ({"model.head": {"kind": OWN + "untrainable"}}, "nothing to train"),
        ({"model.head": {"kind": OWN + "mixing"}}, "BatchNorm"),
        ({"task.kind": OWN + "raising"}, "task.kind is .* raised ValueError"),
        ({"task.kind": "module:fedhead_bad_own:NoTask"}, "it has no outputs"),
        ({"task.kind": OWN + "NoOutputs"}, "at least 1"),
        ({"task.kind": OWN + "OneLoss"}, r"of shape \(\): it must be"),
        ({"task.kind": OWN + "Column"}, r"of shape \(\d+, 1\): it must be"),
        ({"task.kind": OWN + "Raising"}, "task.kind is .* raised ValueError"),
        ({"task.kind": OWN + "NoMetrics"}, "task.kind is .* raised ValueError"),
        ({"holders.partition": {"kind": OWN + "raising"}}, "holders.partition.kind is .* raised ValueError"),
        ({"holders.partition": {"kind": OWN + "nothing"}}, "must return a list"),
        ({"holders.partition": {"kind": "module:os:getcwd"}}, r"must take \(labels, holders, seed\)"),
        ({"data.test": {"fraction": 1e-6}}, "none of the 60 records is held out"),
        ({"data.source": "csv:none.csv"}, "no such file"),
        ({"data.source": "csv:."}, "must be a file"),
        ({"task.labels": ["a", "b", "c"]}, 'has "c": no training record'),
        ({"task.labels": ["a", "x"]}, "30 of 60 records have a label outside"),
        ({"holders.count": 1000}, "there are only"),
        ({"model.sha256": "0" * 64}, "no weights to check"),
        ({"model.unfreeze": 1}, "can't be cut"),
    ],
)
def test_refused_in_one_line_and_nothing_is_left(recipe, tmp_path, changes, words):
    import re

    assert re.search(words, fails(recipe, tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy.epsilon": 0.0}, "privacy.epsilon is 0.0: it must be more than 0"),
        ({"training.rounds": 0}, "training.rounds is 0: it must be at least 1"),
        ({"data.columns": {"vector": "label", "label": "label"}}, "another column than the label's"),
        ({"holders.partition": {"kind": "sizes", "sizes": []}}, "holders.partition.sizes is []"),
        ({"privacy.clipping_norm": 1e-300}, "privacy.clipping_norm is 1e-300"),
        ({"training.optimizer.learning_rate": 1e300}, "training.optimizer.learning_rate is 1e+300"),
        ({"privacy.mechanism": "poisson", "privacy.sample_rate": 1e-300}, "privacy.sample_rate is 1e-300"),
    ],
)
def test_settings_out_of_reach_are_refused_before_anything_runs(recipe, changes, words):
    with pytest.raises(ConfigError) as caught:
        changed(recipe, changes)
    assert any(line.startswith(words) or words in line for line in caught.value.faults)


@pytest.mark.parametrize("epsilon", [1e-9, 1e9])
def test_epsilon_that_the_poisson_accountant_cannot_certify(recipe, tmp_path, epsilon):
    changes = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.3, "privacy.epsilon": epsilon}
    assert "must lie between 0.01 and 100" in fails(recipe, tmp_path, changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x0,x0,label\n1,2,a\n1,3,b\n", "a name of its own"),
        (",x1,label\n1,2,a\n1,3,b\n", "a name of its own"),
        ("x0,x1,label\n1,2,a,more\n1,3,b\n", "ParserWarning"),
        ("x0,x1,label\n", "holds no record"),
        ("x0,x1,label\nfoo,2,a\n1,3,b\n", "list of numbers"),
        ("x0,x1,label\n,,a\n,,b\n", "NaN or an infinity"),
        ("x0,x1,label\n1,2,\u00e9\n", "UTF-8"),
    ],
)
def test_odd_tables(recipe, folder, tmp_path, text, words):
    (folder / "odd.csv").write_bytes(text.encode("latin-1"))
    error = fails(recipe, tmp_path, {"data.source": "csv:odd.csv"}, DataError)
    assert words in error
    assert "foo" not in error


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tables_of_other_programs_are_read(recipe, folder, tmp_path, encoding, newline):
    text = (folder / "v.csv").read_text().replace(",a\n", ",\U0001f600\n").replace("\n", newline)
    (folder / "other.csv").write_bytes(text.encode(encoding))
    result = simulate(
        changed(recipe, {"data.source": "csv:other.csv", "task.labels": ["b", "\U0001f600"]}), tmp_path / "run",
        state=tmp_path / "state",
    )  # fmt: skip
    assert result.holders[0]["labels"].keys() == {"b", "\U0001f600"}


def test_a_folder_in_use_or_with_a_run_is_refused(recipe, tmp_path):
    import fcntl
    import os

    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another run is writing there"):
        simulate(recipe, out, state=tmp_path / "state")
    os.close(handle)
    with pytest.raises(InputError, match="can't be imported"):
        simulate(changed(recipe, {"model.backbone": "module:none:f"}), out, state=tmp_path / "state")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    simulate(recipe, out, state=tmp_path / "state")
    assert (out / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="already holds a run"):
        simulate(recipe, out, state=tmp_path / "state")
    assert (out / "result.json").is_file()


def test_folders_that_are_files(recipe, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/below"):
        with pytest.raises(InputError, match="--out is"):
            simulate(recipe, tmp_path / out, state=tmp_path / "state")
    with pytest.raises(InputError, match=r"the feature cache in .* can't be written"):
        simulate(recipe, tmp_path / "run", state=tmp_path / "file")
    assert not (tmp_path / "run").exists()


def test_test_records_that_metrics_leave_out_are_told(recipe, folder, tmp_path):
    lines = (folder / "v.csv").read_text().splitlines()
    (folder / "gaps.csv").write_text("\n".join([*lines[:21], *(f",{line.partition(',')[2]}" for line in lines[21:24])]))
    changes = {"data.test": {"source": "csv:gaps.csv"}}
    told = "3 of 23 test records could not be read or gave no finite features; the metrics leave them out."
    result = simulate(changed(recipe, changes), tmp_path / "gaps", state=tmp_path / "state")
    assert told in result.notes
    assert told in json.loads((tmp_path / "gaps" / "result.json").read_text())["notes"]
    assert told in (tmp_path / "gaps" / "report.html").read_text()
    (folder / "gaps.csv").write_text("\n".join(lines[:21]))
    assert simulate(changed(recipe, changes), tmp_path / "whole", state=tmp_path / "state").final == result.final
    assert not any("test records" in note for note in Result.read(tmp_path / "whole").notes)


def test_a_server_tells_what_metrics_leave_out(recipe, folder, tmp_path, monkeypatch):
    """Its own notes are all that a deployed run has; a simulation makes them anew."""
    lines = (folder / "v.csv").read_text().splitlines()
    (folder / "gaps.csv").write_text("\n".join([*lines[:21], f",{lines[21].partition(',')[2]}"]))
    monkeypatch.setattr(federation, "notes_of", lambda _, result: result.notes)
    result = simulate(
        changed(recipe, {"data.test": {"source": "csv:gaps.csv"}}), tmp_path / "run", state=tmp_path / "s"
    )
    assert [note.partition(" test records")[0] for note in result.notes] == ["1 of 21"]


def test_the_home_folder_can_be_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    result = simulate(recipe, "~/run", state="~/state")
    assert result.folder == tmp_path / "home" / "run"
    assert (tmp_path / "home" / "state" / "holders").is_dir()
    assert load_model("~/run", allow_modules=True).labels == ("a", "b")
    assert not (tmp_path / "~").exists()


def test_seeds_must_be_positive(recipe, tmp_path):
    with pytest.raises(InputError, match="seeds is 0"):
        simulate_seeds(recipe, 0, tmp_path / "run")


def test_what_fails_at_a_holder_goes_to_its_log_only(recipe, tmp_path, capfd, monkeypatch):
    """The terminal gets one line; the traceback, which may show a record, stays in a file for the owner."""
    from fedhead.client import app

    def broken(*_):
        raise RuntimeError("SECRET")

    monkeypatch.setattr(app, "_train", broken)
    with pytest.raises(RunError, match=r"got no update from any holder .* See .*holders\.log") as caught:
        simulate(recipe, tmp_path / "run", state=tmp_path / "state")
    seen = capfd.readouterr()
    assert "SECRET" not in str(caught.value) + seen.out + seen.err
    log = tmp_path / "run" / "holders.log"
    assert "SECRET" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["holders.log"]
    assert not logging.getLogger("fedhead.client").handlers


def test_updates_without_numbers_end_the_run(recipe, tmp_path):
    config = changed(recipe, {"task.kind": OWN + "NoNumber", "privacy.mechanism": "none", "privacy.epsilon": None})
    with pytest.raises(FedheadError, match="got no update"):
        simulate(config, tmp_path / "run", state=tmp_path / "state")
    assert not (tmp_path / "run").exists()


def test_corrupt_images_are_named_in_the_log_only(recipe, folder, tmp_path, capfd):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    (folder / "images" / "a" / "empty.png").write_bytes(b"")
    (folder / "images" / "a" / "notes.txt").write_text("no image")
    Image.new("CMYK", (9, 9)).save(folder / "images" / "b" / "print.jpg")
    Image.new("RGB", (1, 1)).save(folder / "images" / "b" / "dot.png")
    (folder / "fedhead_bad_images.py").write_text(
        "from torch import nn\ndef f():\n    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    m.input_kind, m.image_size = 'image', 8\n    return m\n"
    )
    config = changed(
        recipe,
        {
            "data.source": "imagefolder:images",
            "data.columns": {"image": "image", "label": "label"},
            "model.backbone": "module:fedhead_bad_images:f",
        },
    )
    simulate(config, tmp_path / "run", state=tmp_path / "state")
    assert "empty.png" in (tmp_path / "run" / "holders.log").read_text()
    assert "notes.txt" not in (tmp_path / "run" / "holders.log").read_text()
    seen = capfd.readouterr()
    assert "empty.png" not in seen.out + seen.err + (tmp_path / "run" / "result.json").read_text()
