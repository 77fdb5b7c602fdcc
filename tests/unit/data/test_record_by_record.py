"""Each record is read by itself: one more, or one fewer, changes nothing of another."""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from PIL import Image

from fedhead.common.data.persons import names_of
from fedhead.common.data.sources import load_records
from fedhead.common.errors import DataError

write = run_path(str(Path(__file__).with_name("data_files.py")))["write"]
ODD = {"text": "odd one", "label": "b", "who": "someone", "v": ["x"]}


@pytest.mark.parametrize("as_lines", [True, False])
@pytest.mark.parametrize(
    ("column", "value", "odd"),
    [
        ("text", lambda i: f"2020-01-{i:02d}", "no date"),
        ("text", lambda i: i, 2.5),
        ("text", lambda i: i, None),
        ("text", lambda i: f"{i:03d}", 7),
        ("who", lambda i: f"1980-01-{i:02d}", "someone"),
        ("who", lambda i: 10**17 + i, 0.5),
        ("who", lambda i: i, [1, 2]),
        ("label", lambda i: "01", 1),
        ("v", lambda i: [i, 0.5], "word"),
        ("v", lambda i: [i, 2**60], [1.5]),
        ("v", lambda i: [i, 0], {"a": 1}),
    ],
)
def test_one_json_record_changes_nothing_of_another(tmp_path: Path, column: str, value, odd, as_lines: bool) -> None:
    """Neighbouring files: with types found from all values, one record of another type rewrote all the others."""
    rows = [{"text": f"t{i}", "label": "a", "who": f"p{i}", "v": [1, i], column: value(i)} for i in range(1, 20)]

    def read(rows, role):
        text = "\n".join(json.dumps(row) for row in rows) if as_lines else json.dumps(rows)
        write(tmp_path / "t.json", text)
        found = load_records("json:t.json", {role: role}, ["a", "01"], tmp_path, lenient=True).select(range(19))
        inputs = [np.asarray(one).tolist() for one in found.inputs(slice(None))]
        return inputs, found.digests().tolist(), found.labels.tolist(), names_of(found, "who").tolist()

    for role in ("text", "vector"):
        rows = [{**row, "vector": row["v"]} for row in rows]
        extra = {**ODD, "vector": ODD["v"], column: odd, **({"vector": odd} if column == "v" else {})}
        without, among = read(rows, role), read([*rows, extra], role)
        first = tuple(part[1:] for part in read([extra, *rows], role))
        assert without == among
        assert tuple(part[:18] for part in without) == first
    if column == "text":
        assert without[0][:1] == [[1, 1]]
    assert len(set(without[3])) == 19


def test_json_is_read_as_it_is_written(tmp_path: Path) -> None:
    rows = [
        '{"text": 5, "label": 1.0, "further": "x"}', '{"text": "2020-01-01", "label": true}',
        '{"text": null, "label": "null"}', '{"text": 6.50, "label": 123456789012345678901234567890}', "",
        '{"label": false, "text": "\\ud800"}',
    ]  # fmt: skip
    write(tmp_path / "t.json", "\ufeff" + "\n".join(rows))
    labels = ["1", "true", "null", "123456789012345678901234567890", "False"]
    records = load_records("json:t.json", {}, labels, tmp_path)
    assert records.inputs(slice(None)) == ["5", "2020-01-01", "", "6.5", "\ud800"]
    assert records.labels.tolist() == [0, 1, 2, 3, 4]
    assert records.column("further").tolist() == ["x", None, None, None, None]
    assert len({bytes(digest) for digest in records.digests()}) == 5


@pytest.mark.parametrize("text", ['{"text": "SECRET"', "[1, 2]", '"SECRET"', "[" * 100_000, '{"text": 1}\nSECRET'])
def test_what_is_no_json_of_records_is_told_without_content(tmp_path: Path, text: str) -> None:
    write(tmp_path / "t.json", text)
    with pytest.raises(DataError, match=r"it can't be read \(\w+\)") as caught:
        load_records("json:t.json", {}, ["1"], tmp_path)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_whose_first_record_is_long(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "text,label\n" + "x" * 200_000 + ",1\nshort,0\n")
    assert [len(text) for text in load_records("csv:t.csv", {}, ["0", "1"], tmp_path).inputs([0, 1])] == [200_000, 5]


def test_a_pattern_of_columns_leaves_the_label_out(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "a,x[0],kind\n1,2,0\n3,4,1\n")
    for name, found in (("*", [1, 2]), ("x[0], a", [2, 1]), ("a, kind", [1, 0])):
        records = load_records("csv:t.csv", {"vector": name, "label": "kind"}, ["0", "1"], tmp_path)
        assert records.inputs([0])[0].tolist() == found


@pytest.mark.parametrize("labels", [["0", "1", "2", "3"], ["healthy", "ill", "odd", "rare"]])
@pytest.mark.parametrize("changed", ["out", "root", "below", "new"])
def test_one_image_changes_the_label_of_no_other(tmp_path: Path, labels: list[str], changed: str) -> None:
    """Neighbouring folders: with labels numbered from what is found, the only image of a class moved all the others."""

    def read() -> dict[str, int]:
        records = load_records("imagefolder:scans", {}, labels, tmp_path, lenient=True)
        return {records.origin(i): int(records.labels[i]) for i in range(len(records))}

    for place, label in enumerate(labels):
        (tmp_path / "scans" / label).mkdir(parents=True)
        for i in range(1 if place == 2 else 4):
            Image.new("L", (4, 4), 9 * i + place).save(tmp_path / "scans" / label / f"{i}.png")
    before = read()
    assert {path: labels.index(Path(path).parent.name) for path in before} == before
    if changed == "out":
        (tmp_path / "scans" / labels[2] / "0.png").unlink()
    else:
        path = tmp_path / "scans" / {"root": "x.png", "below": f"{labels[1]}/sub/x.png", "new": "zzz/x.png"}[changed]
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), 200).save(path)
    after = read()
    assert len(after) == len(before) + (-1 if changed == "out" else 1)
    assert {path: after[path] for path in after if path in before} == {
        path: before[path] for path in after if path in before
    }
    other = {path: label for path, label in after.items() if path not in before}
    assert list(other.values()) == {"out": [], "root": [-1], "below": [1], "new": [-1]}[changed]


def test_columns_beside_a_folder_of_images(images: Path) -> None:
    write(images / "images" / "metadata.csv", "file_name,who\ncat/0.png,007\ndog/5.png,ann\n")
    records = load_records("imagefolder:images", {}, ["dog", "cat"], images)
    told = {
        Path(records.origin(i)).relative_to(images / "images").as_posix(): records.column("who")[i] for i in range(6)
    }
    assert {name: who for name, who in told.items() if who is not None} == {"cat/0.png": "007", "dog/5.png": "ann"}
    write(images / "images" / "metadata.csv", "name,who\ncat/0.png,007\n")
    with pytest.raises(DataError, match=r"metadata\.csv has no column file_name"):
        load_records("imagefolder:images", {}, ["dog", "cat"], images)


def test_images_of_more_than_8_bits(tmp_path: Path) -> None:
    (tmp_path / "i" / "a").mkdir(parents=True)
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / "i" / "a" / "0.png")
    Image.fromarray(deep).save(tmp_path / "i" / "a" / "1.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "i" / "a" / "2.tif")
    Image.fromarray((deep / 65536).astype(np.float32)).save(tmp_path / "i" / "a" / "3.tif")
    Image.fromarray(deep.astype(np.int32) * 1000).save(tmp_path / "i" / "a" / "4.tif")
    read = load_records("imagefolder:i", {}, ["a"], tmp_path).inputs(slice(None))
    for image in read[:3]:
        assert np.array_equal(np.asarray(image), np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2))
    assert read[3:] == [None, None]
