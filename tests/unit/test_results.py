"""result.json: strict, exact, whole or not there."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common import failpoints, writing
from fedhead.common.errors import InputError
from fedhead.common.results import Result
from fedhead.common.writing import write_aside


def make(**changes: Any) -> Result:
    event = {"mechanism": "full-batch", "noise_multiplier": 4.6, "sample_rate": None, "steps": 1, "clipping_norm": 1.0}
    parts: dict[str, Any] = {
        "fedhead": "0.1.0",
        "name": "quickstart",
        "config": {"privacy": {"epsilon": 3.0}, "task": {"labels": ["no", "ja ✓"]}},
        "rounds": [
            {
                "round": 1,
                "metrics": {"accuracy": 0.1 + 0.2, "loss": 1 / 3},
                "seconds": 0.1,
                "bytes_up": 10,
                "bytes_down": 12,
                "holders": 5,
                "refused": [{"holder": "a", "code": 1001, "text": "the request is not valid"}],
                "epsilon": 0.4,
            }
        ],
        "final": {"accuracy": 0.8},
        "majority": {"accuracy": 0.5},
        "baseline": None,
        "privacy": [
            {
                "holder": "a",
                "unit": "record",
                "adjacency": "add or remove one record",
                "mechanism": "full-batch",
                "accountant": "gdp",
                "epsilon": 0.4,
                "delta": 1e-5,
                "events": [{**event, "round": 1}],
            }
        ],
        "holders": [{"name": "a", "records": 3, "labels": {"no": 3}, "metrics": {"accuracy": 1.0}}],
        "model": {
            "backbone": "torchvision:resnet18",
            "digest": "ab",
            "trained_parameters": 10,
            "task": "classification",
        },
        "declared_records": {"value": 1000, "origin": "recipe"},
        "timing": {"total_seconds": 1.5},
        "notes": ["a note"],
    }
    return Result(**{**parts, **changes})


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    result = make()
    written = result.write(tmp_path / "new" / "run")
    assert written.folder == tmp_path / "new" / "run"
    assert Result.read(tmp_path / "new" / "run") == result
    assert Result.read(written.folder or "").folder == written.folder
    assert Result.from_json(result.to_json()).to_json() == result.to_json()


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.floats(allow_nan=False), st.floats(min_value=0, allow_nan=False))
def test_floats_come_back_bit_for_bit(metric: float, epsilon: float) -> None:
    result = make(final={"loss": metric}, privacy=[{**make().privacy[0], "epsilon": epsilon}])
    back = Result.from_json(result.to_json())
    assert np.float64(back.final["loss"]).tobytes() == np.float64(metric).tobytes()
    assert np.float64(back.privacy[0]["epsilon"]).tobytes() == np.float64(epsilon).tobytes()


def test_what_is_not_finite_is_text_in_strict_json() -> None:
    spend = {**make().privacy[0], "epsilon": math.inf}
    text = make(privacy=[spend], final={"loss": math.nan, "low": -math.inf}).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(text, parse_constant=refuse)
    assert data["privacy"][0]["epsilon"] == "inf"
    assert data["final"] == {"loss": "nan", "low": "-inf"}
    back = Result.from_json(text)
    assert back.privacy[0]["epsilon"] == math.inf
    assert math.isnan(back.final["loss"])


def test_the_file_has_the_agreed_parts() -> None:
    data = json.loads(make().to_json())
    assert list(data) == [
        "schema", "fedhead", "name", "config", "rounds", "final", "majority", "baseline", "privacy", "holders", "model",
        "declared_records", "timing", "notes",
    ]  # fmt: skip
    assert data["schema"] == 1
    assert data == make().to_dict()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"final": {"accuracy": "high"}}, "final.accuracy"),
        ({"privacy": [{**make().privacy[0], "epsilon": math.nan}]}, "epsilon"),
        ({"privacy": [{**make().privacy[0], "epsilon": -1.0}]}, "epsilon"),
        ({"privacy": [{**make().privacy[0], "delta": 2.0}]}, "delta"),
        ({"privacy": [{key: value for key, value in make().privacy[0].items() if key != "delta"}]}, "delta"),
        ({"rounds": [{**make().rounds[0], "extra": 1}]}, "extra"),
        ({"timing": {"total_seconds": -1.0}}, "timing"),
        ({"declared_records": {"value": 0, "origin": "recipe"}}, "declared_records"),
    ],
)
def test_a_part_of_another_shape_is_refused_in_one_line(change: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word) as refused:
        make(**change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "JSON"),
        ("[1]", "schema"),
        ('{"schema": 1, "final": NaN}', "JSON"),
        ('{"schema": 2}', "schema is 2"),
        ('{"schema": true}', "schema is true"),
        ('{"schema": 1}', "is missing"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match=word) as refused:
        Result.read(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_an_unknown_part_is_refused() -> None:
    data = {**make().to_dict(), "surprise": 1}
    with pytest.raises(InputError, match="surprise"):
        Result.from_json(json.dumps(data))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no result\.json"):
        Result.read(tmp_path / "nowhere")
    (tmp_path / "result.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="can't be read"):
        Result.read(tmp_path)


def test_later_changes_do_not_reach_a_result() -> None:
    notes = ["first"]
    result = make(notes=notes)
    notes.append("second")
    assert list(result.notes) == ["first"]
    with pytest.raises(FrozenInstanceError):
        result.name = "other"  # type: ignore[misc]
    assert replace(result, name="other").name == "other"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().write(tmp_path)
    before = (tmp_path / "result.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writing.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(name="other").write(tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_aside(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode


def test_a_durable_write_flushes_the_folder_after_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace_, fsync = os.replace, os.fsync

    def renamed(*names: Path) -> None:
        replace_(*names)
        done.append("rename")

    def flushed(handle: int) -> None:
        fsync(handle)
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    monkeypatch.setattr(writing.os, "replace", renamed)
    monkeypatch.setattr(writing.os, "fsync", flushed)
    write_aside(tmp_path / "a", b"x", 0o600, durable=True)
    assert done == ["file", "rename", "folder"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_reading_a_result_needs_no_torch() -> None:
    code = "import sys, fedhead.common.results; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("point", "left"), [("file.written", b"old"), ("file.renamed", b"new")])
def test_a_kill_at_either_point_leaves_one_whole_file(tmp_path: Path, point: str, left: bytes) -> None:
    path = tmp_path / "marks.json"
    write_aside(path, b"old", durable=True)

    def die(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with failpoints.installed(die):
            write_aside(path, b"new", durable=True)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == left
    write_aside(path, b"next", durable=True)  # what was left over stands in nobody's way
    assert path.read_bytes() == b"next"


def test_a_write_in_place_would_be_noticed(tmp_path: Path) -> None:
    """The wrong twin: cut off by a kill, it leaves neither file."""
    path = tmp_path / "marks.json"
    path.write_bytes(b"old")
    child = os.fork()
    if not child:
        with path.open("wb") as file:
            file.write(b"ne")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() not in (b"old", b"new")
