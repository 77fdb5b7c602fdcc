from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fedhead.common.data.inputs import EncodedImages, decode_image
from fedhead.common.data.records import Records, check_classes, split_records
from fedhead.common.errors import DataError


def png(colour: tuple[int, int, int] = (9, 8, 7), size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def texts(count: int = 50) -> Records:
    return Records.from_memory(
        "text", [f"sentence {i}" for i in range(count)], np.arange(count) % 2, {"hospital": ["a", "b"] * (count // 2)}
    )


def test_select_keeps_inputs_labels_digests_and_columns_together() -> None:
    records = texts()
    whole = records.digests()
    chosen = records.select([7, 3, 4])
    assert chosen.inputs(slice(None)) == ["sentence 7", "sentence 3", "sentence 4"]
    assert chosen.labels.tolist() == [1, 1, 0]
    assert chosen.column("hospital").tolist() == ["b", "b", "a"]
    assert np.array_equal(chosen.digests(), whole[[7, 3, 4]])
    assert chosen.select([2]).inputs([0]) == ["sentence 4"]
    assert chosen.origin(0) == "row 8"


def test_digests_of_a_selection_without_those_of_the_whole_are_the_same() -> None:
    assert np.array_equal(texts().select([7, 3]).digests(), texts().digests()[[7, 3]])


def test_digests_are_distinct_between_contents_shapes_and_kinds() -> None:
    flat = Records.from_memory("image", np.zeros((1, 2, 8), np.uint8)).digests()
    square = Records.from_memory("image", np.zeros((1, 4, 4), np.uint8)).digests()
    vector = Records.from_memory("vector", np.zeros((1, 2))).digests()
    text = Records.from_memory("text", ["\0" * 16]).digests()
    assert len({bytes(found[0]) for found in (flat, square, vector, text)}) == 4
    assert flat.dtype == np.uint8
    assert flat.shape == (1, 16)


def test_digest_leaves_the_label_out() -> None:
    one, two = (Records.from_memory("text", ["a"], [label]) for label in (0, 1))
    assert np.array_equal(one.digests(), two.digests())


def test_representation_shows_no_content() -> None:
    assert repr(Records.from_memory("text", ["secret"], [0])) == "Records(kind='text', 1 records)"


def test_unknown_column_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="hospital"):
        texts().column("ward")


def test_images_decode_to_rgb_and_a_broken_one_to_none() -> None:
    whole = png()
    assert decode_image(whole).getpixel((0, 0)) == (9, 8, 7)  # type: ignore[union-attr]
    grey = io.BytesIO()
    Image.new("L", (3, 3), 5).save(grey, "JPEG")
    assert decode_image(grey.getvalue()).mode == "RGB"  # type: ignore[union-attr]
    for broken in (b"", b"no image", whole[: len(whole) // 2], grey.getvalue()[:120]):
        assert decode_image(broken) is None


def test_image_files_by_bytes_path_or_neither(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    values = [{"bytes": png(), "path": None}, {"bytes": None, "path": "a.png"}, "a.png", png(), "gone.png", None]
    store = EncodedImages(lambda rows: [values[row] for row in rows], len(values), tmp_path)
    rows = np.arange(len(values))
    assert [image is None for image in store.read(rows)] == [False, False, False, False, True, True]
    digests = store.digests(rows)
    assert len({bytes(digest) for digest in digests[:4]}) == 1
    assert store.origin(2) == "a.png"
    assert store.origin(3) == "row 4"


def test_split_takes_about_the_share_and_keeps_equal_records_together() -> None:
    records = Records.from_memory("text", [f"text {i % 2000}" for i in range(4000)])
    train, test = split_records(records, 0.25)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(4000))
    assert abs(len(test) / 4000 - 0.25) < 0.05
    assert set(test[test < 2000] + 2000) == set(test[test >= 2000])


def test_split_depends_on_the_key() -> None:
    _, one = split_records(texts(), 0.5)
    _, two = split_records(texts(), 0.5, key=b"another")
    assert not np.array_equal(one, two)


def test_a_label_without_a_record_is_named() -> None:
    check_classes(texts(), ["negative", "positive"])
    with pytest.raises(DataError, match='"neutral": no training record has that label'):
        check_classes(texts(), ["negative", "positive", "neutral"])
