from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedhead.common.features import FeatureSet, featureset


def ragged() -> FeatureSet:
    return FeatureSet(torch.arange(18.0).reshape(9, 2) + 1, torch.tensor([0, 2, 2, 5, 9]))


def test_batch_of_one_shape_is_float32_and_a_slice_is_a_view() -> None:
    features = FeatureSet(torch.arange(12.0).reshape(4, 3))
    values, lengths = features.batch(torch.tensor([3, 0]))
    assert values.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert lengths is None
    assert features.batch(slice(1, 3))[0].data_ptr() == features.values[1:].data_ptr()
    half = FeatureSet(features.values.half())
    assert half.batch(slice(0, 2))[0].dtype == torch.float32
    assert half.nbytes == 24


def test_ragged_batch_pads_with_zeros() -> None:
    values, lengths = ragged().batch(torch.tensor([0, 3, 1]))
    assert lengths is not None
    assert lengths.tolist() == [2, 4, 0]
    assert values.shape == (3, 4, 2)
    assert values[0].tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    assert values[1].tolist() == [[11, 12], [13, 14], [15, 16], [17, 18]]
    assert not values[2].any()


def test_empty_batches() -> None:
    none = torch.tensor([], dtype=torch.int64)
    assert FeatureSet(torch.ones(3, 2)).batch(none)[0].shape == (0, 2)
    values, lengths = ragged().batch(none)
    assert values.shape == (0, 0, 2)
    assert lengths is not None
    assert lengths.shape == (0,)


@pytest.mark.parametrize("features", [ragged(), FeatureSet(torch.randn(4, 2, 3))], ids=["ragged", "one shape"])
def test_take_and_slice_equal_batch(features: FeatureSet) -> None:
    order = torch.tensor([3, 0, 1, 2, 0])
    for found, expected in ((features.take(order), order), (features.slice(1, 4), torch.tensor([1, 2, 3]))):
        assert len(found) == len(expected)
        values, lengths = found.batch(slice(None))
        wanted, wanted_lengths = features.batch(expected)
        assert torch.equal(values, wanted)
        assert (lengths is None) == (wanted_lengths is None)
        assert lengths is None or torch.equal(lengths, wanted_lengths)
    assert features.slice(1, 4).values.untyped_storage().data_ptr() == features.values.untyped_storage().data_ptr()
    assert len(features.slice(2, 2)) == 0


def test_shape_length_and_representation() -> None:
    assert (len(ragged()), ragged().shape) == (4, (2,))
    assert ragged().nbytes == 9 * 2 * 4 + 5 * 8
    assert repr(ragged()) == "FeatureSet(4 records, shape=(2,), ragged=True)"


def test_finite_finds_the_records_with_nan_or_infinity() -> None:
    values = torch.ones(4, 2, 2)
    values[1, 0, 1], values[3, 1, 1] = torch.nan, torch.inf
    assert FeatureSet(values).finite().tolist() == [True, False, True, False]
    tokens = ragged()
    tokens.values[3, 0] = torch.nan
    assert tokens.finite().tolist() == [True, True, False, True]


def mapped(path: Path, values: torch.Tensor, offsets: torch.Tensor | None = None) -> FeatureSet:
    values.numpy().tofile(path)
    stored = np.memmap(path, values.numpy().dtype, mode="c", shape=tuple(values.shape))
    assert isinstance(stored.base, mmap.mmap)
    return FeatureSet(torch.from_numpy(stored), offsets, stored.base)


@pytest.mark.parametrize("block", [1, 40, 5_000, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sequences", [False, True])
def test_features_of_a_mapped_file_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype, sequences: bool
) -> None:
    monkeypatch.setattr(featureset, "BLOCK_BYTES", block)
    rng = np.random.default_rng(block)
    values = torch.from_numpy(rng.standard_normal((4_001, 3))).to(dtype)
    values[[0, 17, 4_000]] = torch.nan
    offsets = torch.from_numpy(np.sort(np.append(rng.integers(0, 4_002, 99), [0, 4_001]))) if sequences else None
    own, stored = FeatureSet(values.clone(), offsets), mapped(tmp_path / "values.bin", values, offsets)
    order = torch.from_numpy(rng.integers(0, len(own), 2 * len(own)))
    for rows in (order, order.sort().values, order[:0], order[:1]):
        found, wanted = stored.take(rows), own.take(rows)
        assert found.mapped is None
        assert torch.equal(found.values.nan_to_num(9), wanted.values.nan_to_num(9))
        assert found.values.dtype == dtype
        assert sequences is (found.offsets is not None)
        assert found.offsets is None or torch.equal(found.offsets, wanted.offsets)
    assert torch.equal(stored.finite(), own.finite())


def test_a_pass_over_a_mapped_file_leaves_none_of_it_in_memory(tmp_path: Path) -> None:
    def resident() -> int:
        """Bytes of the file that this process holds in memory."""
        parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        found = [re.search(r"^Rss:\s+(\d+) kB", part, re.MULTILINE) for part in parts if "resident.bin" in part]
        assert found
        return sum(int(one.group(1)) * 1024 for one in found if one)

    size = 3 * featureset.BLOCK_BYTES + 40_000
    stored = mapped(tmp_path / "resident.bin", torch.ones(size // 40, 10))
    assert stored.nbytes // 2 < float(stored.values.sum()) * 4
    assert resident() > stored.nbytes * 0.9
    stored.finite()
    assert resident() < 2 * mmap.PAGESIZE
    stored.take(torch.arange(len(stored)).flip(0))
    assert resident() < 2 * mmap.PAGESIZE
    assert bool((stored.values == 1).all())
