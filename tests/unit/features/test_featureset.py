from __future__ import annotations

import pytest
import torch

from fedhead.common.features import FeatureSet


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
