"""fedhead predict: every input gets its row, in order, whatever it is read from."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fedhead.common.config import make_config
from fedhead.common.errors import DataError, InputError
from fedhead.common.models.backbones import load_backbone
from fedhead.common.models.heads import make_head
from fedhead.common.models.saved import load_model, save_model
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import make_task
from fedhead.simulations import predict
from fedhead.simulations.predict import predict_file

NETS = '''
import torch
from torch import nn


class Lengths(nn.Module):
    """A text's features: its length, and 1."""

    input_kind = "text"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def collate(self, texts):
        return {"sizes": torch.tensor([[float(len(text)), 1.0] for text in texts])}

    def forward(self, sizes):
        return sizes * self.scale


class Brightness(nn.Sequential):
    input_kind = "image"
    image_size = 16
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with torch.no_grad():
            self[0].weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]])[:, :, None, None])
            self[0].bias.copy_(torch.tensor([0.0, 1.0]))


class Same(nn.Sequential):
    input_kind = "vector"
    feature_dim = 2

    def __init__(self):
        super().__init__(nn.Linear(2, 2))
        with torch.no_grad():
            self[0].weight.copy_(torch.eye(2))
            self[0].bias.zero_()
'''
LABELS = ["low", 'h,i"gh']  # a label that CSV has to quote


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Models whose answers are known: `high` for texts of more than 10 letters, bright images, x > 10."""
    (tmp_path / "predict_nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    limits = {"Lengths": 10.0, "Brightness": 0.0, "Same": 10.0}
    return {name: save(tmp_path / name, tmp_path, name, limit) for name, limit in limits.items()}


def save(folder: Path, base: Path, name: str, limit: float, **model: Any) -> Path:
    """A model that answers `high` where the first feature, with the second as its unit, is above a limit."""
    raw = {
        "task": {"labels": LABELS},
        "model": {"backbone": f"module:predict_nets:{name}", "features": {"normalize": False}, **model},
        "data": {"source": "csv:x.csv"},
        "privacy": {"epsilon": 1.0},
    }
    config = make_config(raw, base=base)
    backbone, task = load_backbone(config.model, base), make_task(config.task)
    trainable = Trainable(tail=None, normalize=False, head=make_head(config.model.head, 2, task.outputs))
    with torch.no_grad():
        trainable.head.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -limit]]))
    return save_model(folder, trainable, config, backbone, task)


def answers(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return list(csv.reader(io.StringIO(capsys.readouterr().out)))


def texts(count: int) -> list[str]:
    return ["x" * (number * 7 % 23) + "," * (number % 2) for number in range(count)]


def wanted(values: list[str]) -> list[str]:
    return [LABELS[len(value) > 10] for value in values]


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
        path.write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_every_row_of_a_table_gets_its_answer_in_order(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    monkeypatch.setattr(predict, "BLOCK", 7)
    given = [text + "y" for text in texts(20)]
    write_table(tmp_path / f"data.{suffix}", {"id": list(range(20)), "text": given})
    missing = predict_file(models["Lengths"], [str(tmp_path / f"data.{suffix}")], allow_modules=True, batch_size=3)
    header, *rows = answers(capsys)
    assert missing == 0
    assert header == ["input", "label", "p_low", 'p_h,i"gh']
    assert [row[0] for row in rows] == [str(number + 1) for number in range(20)]
    assert [row[1] for row in rows] == wanted(given)
    _, probabilities = load_model(models["Lengths"], allow_modules=True).predict(given)
    np.testing.assert_allclose([[float(p) for p in row[2:]] for row in rows], probabilities, rtol=1e-5)


def test_another_column_can_be_named(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "d.csv", {"text": ["short"], "note": ["rather a long one"]})
    predict_file(models["Lengths"], [str(tmp_path / "d.csv")], column="note", allow_modules=True)
    assert answers(capsys)[1][1] == LABELS[1]
    with pytest.raises(InputError, match=r'^--column is "nope": the data has no such column\. Use one of: text, note'):
        predict_file(models["Lengths"], [str(tmp_path / "d.csv")], column="nope", allow_modules=True)
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(InputError, match=r'^INPUT is "[^:]*/empty\.csv": it holds no record'):
        predict_file(models["Lengths"], [str(tmp_path / "empty.csv")], allow_modules=True)
    assert capsys.readouterr().out == ""


def test_weights_that_lie_elsewhere_on_this_machine(
    fedhead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names what helps, and it does."""
    (tmp_path / "predict_nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"0.weight": 2 * torch.eye(2), "0.bias": torch.zeros(2)}, tmp_path / "w.pth")
    save(tmp_path / "model", tmp_path, "Same", 10.0, weights="w.pth")
    write_table(tmp_path / "v.csv", {"a": [6.0], "b": [0.5]})
    command = ("predict", "model", "v.csv", "--column", "a, b", "--allow-modules")
    status, before, _ = fedhead(*command)
    assert status == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w.pth").rename(tmp_path / "elsewhere" / "w.pth")
    status, _, err = fedhead(*command)
    assert status == 2
    assert err.startswith(
        'fedhead: MODEL_DIR is "model": there is no such file or folder here as its backbone\'s weights'
    )
    assert "--weights PATH of fedhead predict" in err
    assert fedhead(*command, "--weights", "elsewhere/w.pth") == (0, before, "")
    status, _, err = fedhead(*command, "--weights", "w.pth")
    assert (status, err) == (2, 'fedhead: --weights is "w.pth": there is no such file or folder. Check the path.\n')
    torch.save({"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}, tmp_path / "w.pth")
    status, _, err = fedhead(*command)
    assert status == 2
    assert "was trained on a backbone with digest" in err
    assert "--weights PATH of fedhead predict" in err


def test_standard_input_is_one_text_a_line(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "BLOCK", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n\nrather a long one\r\nlast, without end"))
    predict_file(models["Lengths"], ["-"], allow_modules=True)
    assert [row[:2] for row in answers(capsys)[1:]] == [
        ["1", LABELS[0]], ["2", LABELS[0]], ["3", LABELS[1]], ["4", LABELS[1]],
    ]  # fmt: skip


def test_json_is_one_object(models: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20), "white").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    predict_file(models["Brightness"], [str(tmp_path / "images")], as_json=True, allow_modules=True)
    data = json.loads(capsys.readouterr().out)
    assert data["labels"] == LABELS
    first, second = data["predictions"]
    assert (first["input"], first["label"]) == ("a.png", LABELS[1])
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert second == {"input": "b.png", "label": None, "probabilities": None}


def test_images_of_a_folder_and_a_corrupt_one(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "FEW", 2)
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(5):
        name = f"deep/{number}.jpg" if number == 4 else f"{number}.png"
        Image.new("L", (9, 30), 255 * (number % 2)).save(folder / name)
    (folder / "2b.png").write_bytes(b"\x89PNG broken")
    (folder / "readme.txt").write_text("no image")
    assert predict_file(models["Brightness"], [str(folder)], allow_modules=True) == 1
    captured = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(captured.out)))[1:]
    assert [row[:2] for row in rows] == [
        ["0.png", "low"], ["1.png", LABELS[1]], ["2.png", "low"], ["2b.png", ""], ["3.png", LABELS[1]],
        ["deep/4.jpg", "low"],
    ]  # fmt: skip
    assert rows[3][2:] == ["", ""]
    assert captured.err.count("\n") == 1
    assert "2b.png" in captured.err


def test_a_file_name_that_is_no_text_comes_out_as_it_is(models: dict[str, Path], tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out.csv"
    folder.mkdir()
    Image.new("L", (9, 30), 255).save(folder / "a.png")
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xe9.png")
    assert predict_file(models["Brightness"], [str(folder)], out=out, allow_modules=True) == 0
    assert b"\n\xe9.png," in out.read_bytes()


def test_several_inputs_are_told_apart(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "a.csv"), str(tmp_path / "b.csv")
    write_table(Path(first), {"text": ["short", "rather a long one"]})
    write_table(Path(second), {"text": ["also a long one"]})
    predict_file(models["Lengths"], [first, second], allow_modules=True)
    assert [row[:2] for row in answers(capsys)[1:]] == [
        [f"{first}:1", "low"], [f"{first}:2", LABELS[1]], [f"{second}:1", LABELS[1]],
    ]  # fmt: skip


def test_vectors_span_columns_and_a_nan_has_no_label(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "v.parquet", {"a": [50.0, 1.0, float("nan")], "b": [1.0, 1.0, 1.0]})
    assert predict_file(models["Same"], [str(tmp_path / "v.parquet")], column="a, b", allow_modules=True) == 1
    captured = capsys.readouterr()
    assert [row[1] for row in list(csv.reader(io.StringIO(captured.out)))[1:]] == [LABELS[1], "low", ""]
    assert "no finite" in captured.err


def test_a_file_takes_the_answers_whole_or_not_at_all(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "d.csv", {"text": ["short"]})
    out = tmp_path / "answers.csv"
    predict_file(models["Lengths"], [str(tmp_path / "d.csv")], out=out, allow_modules=True)
    assert capsys.readouterr().out == ""
    assert out.read_text(encoding="utf-8").splitlines()[1].startswith("1,low,")
    before = out.read_bytes()
    (tmp_path / "bad.csv").write_text("other\nx\n")
    with pytest.raises(InputError):
        predict_file(
            models["Lengths"], [str(tmp_path / "d.csv"), str(tmp_path / "bad.csv")], out=out, allow_modules=True
        )
    assert out.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".answers")]
    with pytest.raises(InputError, match="--out"):
        predict_file(models["Lengths"], [str(tmp_path / "d.csv")], out=tmp_path / "no" / "a.csv", allow_modules=True)


@pytest.mark.parametrize(
    ("model", "inputs", "word"),
    [
        ("Lengths", [], "missing"),
        ("Lengths", ["nowhere.csv"], "no such file"),
        ("Lengths", ["-", "-"], "twice"),
        ("Lengths", ["FOLDER"], "folder"),
        ("Lengths", ["FOLDER/odd.xyz"], "csv, json"),
        ("Brightness", ["-"], "standard input"),
        ("Brightness", ["FOLDER"], "holds no image"),
        ("Brightness", ["FOLDER/odd.xyz"], "an image, a folder"),
    ],
)
def test_bad_inputs_are_refused_in_one_line(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    inputs: list[str],
    word: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "odd.xyz").write_text("x")
    given = [value.replace("FOLDER", str(tmp_path / "empty")) for value in inputs]
    with pytest.raises(InputError, match=word) as refused:
        predict_file(models[model], given, allow_modules=True)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


def test_a_reader_that_stops_early_gets_no_traceback(models: dict[str, Path], tmp_path: Path) -> None:
    write_table(tmp_path / "d.csv", {"text": ["some text"] * 20_000})
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fedhead.simulations.predict import predict_file; "
        "predict_file(sys.argv[2], [sys.argv[3]], allow_modules=True)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(models["Lengths"]), str(tmp_path / "d.csv")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0


@pytest.mark.parametrize("odd", [[1.0], [1.0, 2.0, 3.0], [1.0, "SECRET"], [[1.0], [1.0, 2.0]], []])
def test_a_vector_that_does_not_fit_is_told_in_one_line(models, odd):
    model = load_model(models["Same"], allow_modules=True)
    with pytest.raises(DataError, match=r"inputs\[1\] is .*\. Give") as caught:
        model.predict([[1.0, 2.0], odd])
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vectors_of_another_length_name_the_option(models, tmp_path, capsys):
    (tmp_path / "v.csv").write_text("x1,x2,x3\n1,2,3\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        predict_file(models["Same"], [str(tmp_path / "v.csv")], column="x1,x2,x3", allow_modules=True)
    assert str(caught.value).startswith('--column is "x1,x2,x3": it gives vectors of length 3, and this model takes')
    assert capsys.readouterr().out == ""
