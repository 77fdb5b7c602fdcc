from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.common.config.schema import FeatureSettings
from fedhead.common.data.inputs import EncodedImages
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError
from fedhead.common.features import FeatureSet, cache_key, extract

_SPEC = importlib.util.spec_from_file_location("fake_backbone", Path(__file__).with_name("fake_backbone.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
fake: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["fake_backbone"] = fake
_SPEC.loader.exec_module(fake)

SETTINGS = FeatureSettings(batch_size=8)


def files(cache: Path) -> dict[str, int]:
    return {str(path.relative_to(cache)): path.stat().st_mode & 0o777 for path in cache.rglob("*")}


@pytest.mark.parametrize("cached", [True, False])
def test_features_stand_in_the_order_of_records(tmp_path: Path, cached: bool) -> None:
    records, backbone = fake.sentences(), fake.FakeBackbone()
    features = extract(backbone, records, tmp_path if cached else None, SETTINGS)
    assert torch.equal(features.values, fake.expected(records))
    assert features.offsets is None
    assert sorted(backbone.batches) == [7, 7, 7, 8, 8]  # even batches
    assert backbone.batches[0] == 8
    assert bool(list(tmp_path.iterdir())) == cached


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_ragged_features_keep_real_tokens_only(tmp_path: Path, cached: bool, precision: str) -> None:
    records, backbone = fake.sentences(), fake.FakeBackbone(ragged=True, scale=0.01)
    features = extract(backbone, records, tmp_path if cached else None, FeatureSettings(batch_size=8, cache=precision))
    texts = records.inputs(slice(None))
    assert features.offsets is not None
    assert features.offsets.diff().tolist() == [len(text) for text in texts]
    assert features.values.shape == (sum(map(len, texts)), 3)
    values, _ = features.batch(slice(None))
    assert values.dtype == torch.float32
    assert torch.allclose(values.sum(1), fake.expected(records, 0.01), rtol=1e-5 if precision == "float32" else 2e-3)


def test_cost_decides_the_batches() -> None:
    lengths: list[list[int]] = []
    backbone = fake.FakeBackbone()
    collate = backbone.collate
    backbone.collate = lambda inputs: lengths.append([len(one) for one in inputs]) or collate(inputs)
    extract(backbone, fake.sentences(), None, SETTINGS)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)


def test_inputs_are_prepared_in_another_thread_and_never_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    asked: list[int] = []
    known = Records.inputs

    def spy(self: Records, indices: Any) -> list[Any]:
        found = known(self, indices)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Records, "inputs", spy)
    vectors = Records.from_memory("vector", np.ones((100, 3)))
    backbone = fake.FakeBackbone(kind="vector")
    extract(backbone, vectors, None, SETTINGS)
    assert max(asked) <= 8
    assert backbone.threads
    assert threading.get_ident() not in backbone.threads


def test_progress_ends_at_the_number_of_records(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        extract(
            fake.FakeBackbone(), fake.sentences(), tmp_path, SETTINGS, lambda done, total: seen.append((done, total))
        )
    assert [done for done, _ in seen] == [8, 16, 23, 30, 37, 37]  # the last one from the cache
    assert {total for _, total in seen} == {37}


def test_a_warm_cache_runs_no_backbone_and_is_mapped(tmp_path: Path) -> None:
    first = extract(fake.FakeBackbone(), fake.sentences(), tmp_path, SETTINGS)
    warm = fake.FakeBackbone()
    second = extract(warm, fake.sentences(), tmp_path, SETTINGS)
    assert warm.batches == []
    assert torch.equal(first.values, second.values)
    if Path("/proc/self/maps").exists():
        assert "values.bin" in Path("/proc/self/maps").read_text()
    key = cache_key(warm, fake.sentences(), SETTINGS)
    before = (tmp_path / key / "values.bin").read_bytes()
    second.values[0] = 0  # by mistake
    assert (tmp_path / key / "values.bin").read_bytes() == before


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    extract(fake.FakeBackbone(ragged=True), fake.sentences(), cache, SETTINGS)
    key = cache_key(fake.FakeBackbone(), fake.sentences(), SETTINGS)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert files(cache) == {
        key: 0o700,
        f"{key}.lock": 0o600,
        f"{key}/values.bin": 0o600,
        f"{key}/offsets.bin": 0o600,
        f"{key}/manifest.json": 0o600,
    }


def test_the_key_follows_everything_that_features_depend_on() -> None:
    records = fake.sentences()
    base = cache_key(fake.FakeBackbone(), records, SETTINGS)
    same = Records.from_memory("text", records.inputs(slice(None)), [1] * 37)
    assert cache_key(fake.FakeBackbone(), same, SETTINGS) == base  # labels don't matter
    assert cache_key(fake.FakeBackbone(), records, FeatureSettings(batch_size=3, normalize=False)) == base
    others = {
        cache_key(fake.FakeBackbone(digest="e" * 64), records, SETTINGS),
        cache_key(fake.FakeBackbone(preprocessing='{"max_length": 9}'), records, SETTINGS),
        cache_key(fake.FakeBackbone(), records, FeatureSettings(cache="float16")),
        cache_key(fake.FakeBackbone(), records.select(slice(0, 36)), SETTINGS),
        cache_key(fake.FakeBackbone(), records.select(np.arange(37)[::-1]), SETTINGS),
        cache_key(fake.FakeBackbone(), Records.from_memory("text", [*records.inputs(slice(0, 36)), "x"]), SETTINGS),
    }
    assert len(others) == 6
    assert base not in others


def test_float16_is_half_the_size_and_keeps_finite_features_finite(tmp_path: Path) -> None:
    rows = [[1e6, -1e6, 1.5], [np.inf, 0, 0], [np.nan, 0, 0]]
    records = Records.from_memory("vector", np.array(rows))
    settings = FeatureSettings(cache="float16")
    features = extract(fake.FakeBackbone(kind="vector"), records, tmp_path, settings)
    assert features.values.dtype == torch.float16
    assert features.nbytes == 18
    values, _ = features.batch(slice(None))
    assert values.dtype == torch.float32
    assert values[0].tolist() == [65504, -65504, 1.5]
    assert features.finite().tolist() == [True, False, False]


def images(*files: bytes | None) -> Records:
    values = [{"bytes": data, "path": f"folder/{i}.png"} for i, data in enumerate(files)]
    store = EncodedImages(lambda rows: [values[row] for row in rows], len(values), Path("nowhere"))
    return Records("image", np.zeros(len(values), np.int64), store, np.arange(len(values)))


def png(level: int) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("order", [[None, 5, 6, None], [5, None, None, 6], [None, None, 5, 6]])
def test_a_corrupt_image_becomes_nan_and_is_named_in_the_log_only(order: list[int | None], caplog) -> None:
    records = images(*[b"broken" if level is None else png(level) for level in order])
    with caplog.at_level(logging.INFO, "fedhead.records"):
        features = extract(fake.FakeBackbone(kind="image"), records, None, FeatureSettings(batch_size=2))
    good = [level is not None for level in order]
    assert features.finite().tolist() == good
    assert features.values[torch.tensor(good)].tolist() == [[level] * 3 for level in order if level is not None]
    named = [record.getMessage().rsplit("/", 1)[1] for record in caplog.records]
    assert named == [f"{i}.png" for i, there in enumerate(good) if not there]
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_a_corrupt_image_is_named_from_a_warm_cache_too(tmp_path: Path, caplog) -> None:
    records = images(png(3), b"broken", png(2))
    for ragged in (False, True):
        for _ in range(2):
            caplog.clear()
            with caplog.at_level(logging.INFO, "fedhead.records"):
                backbone = fake.FakeBackbone(kind="image", ragged=ragged)
                extract(backbone, records, tmp_path / str(ragged), SETTINGS)
            assert [record.getMessage().rsplit("/", 1)[1] for record in caplog.records] == ["1.png"]
        assert backbone.batches == []


def test_a_corrupt_image_takes_one_token_of_nan_when_ragged(tmp_path: Path) -> None:
    records = images(png(3), b"broken", png(2), b"broken")
    features = extract(fake.FakeBackbone(kind="image", ragged=True), records, tmp_path, FeatureSettings(batch_size=2))
    assert features.offsets is not None
    assert features.offsets.tolist() == [0, 3, 4, 6, 7]
    assert features.finite().tolist() == [True, False, True, False]


def test_no_image_that_can_be_decoded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 2 images can be decoded"):
        extract(fake.FakeBackbone(kind="image"), images(b"x", None), tmp_path, SETTINGS)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_records_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match=r"takes image records, and data\.source gives text records"):
        extract(fake.FakeBackbone(kind="image"), fake.sentences(), None, SETTINGS)


def test_no_records_need_no_backbone(tmp_path: Path) -> None:
    nobody = fake.sentences().select([])
    assert extract(fake.FakeBackbone(), nobody, tmp_path, SETTINGS).values.shape == (0, 3)
    assert isinstance(extract(fake.FakeBackbone(), nobody, None, SETTINGS), FeatureSet)


def test_a_fault_while_collating_reaches_the_caller_and_leaves_nothing(tmp_path: Path) -> None:
    backbone = fake.FakeBackbone()

    def fail(_: Any) -> Any:
        raise RuntimeError("tokenizer")

    backbone.collate = fail
    with pytest.raises(RuntimeError, match="tokenizer"):
        extract(backbone, fake.sentences(), tmp_path, SETTINGS)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("part", ["collate", "forward", "cost"])
def test_a_file_that_the_backbone_misses_is_not_told_as_the_cache_s_fault(tmp_path: Path, part: str) -> None:
    backbone = fake.FakeBackbone()

    def fail(*_: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "vocabulary.txt")

    setattr(backbone, part, fail)
    for cache in (tmp_path, None):
        with pytest.raises(FileNotFoundError, match="vocabulary"):
            extract(backbone, fake.sentences(), cache, SETTINGS)


def test_a_cache_that_can_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache in .* can't be written"):
        extract(fake.FakeBackbone(), fake.sentences(), tmp_path / "file", SETTINGS)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedhead.common.features.extraction.create_array", full)
    with pytest.raises(DataError, match=r"can't be written \(No space left"):
        extract(fake.FakeBackbone(), fake.sentences(), tmp_path / "cache", SETTINGS)
