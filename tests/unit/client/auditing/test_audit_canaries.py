"""Crafted canaries: each in a column of its own, long under the heads that are sent, and audited heads only."""

from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from torch import nn

from fedhead.client.auditing.canaries import craft, entry_weight, flat, joined, load_flat, sent_head
from fedhead.client.auditing.reference import Reference
from fedhead.common.config.schema import MLPHead
from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable

BENCH = run_path(str(Path(__file__).with_name("audit_bench.py")))
Bench, LINEAR, MLP = (BENCH[name] for name in ("Bench", "LINEAR", "MLP"))
DEEP = MLPHead(kind="mlp", hidden=[24, 16], activation="relu")


def test_columns_are_different_and_one_number_a_record_is_not_zero():
    made = craft(9, 9, 4, normalize=False, clipping_norm=3.0, generator=np.random.default_rng(0))
    features, targets = made.units()
    assert sorted(made.columns) == list(range(9))
    assert (features.values != 0).sum(1).tolist() == [1] * 9
    assert features.values[torch.arange(9), torch.from_numpy(made.columns)].tolist() == [12.0] * 9  # 4 clipping norms
    assert targets.tolist() == made.labels.tolist()
    some, labels = made.units(np.arange(9) % 2 == 0)
    assert torch.equal(some.values, features.values[::2])
    assert labels.tolist() == made.labels[::2].tolist()


def test_a_person_has_all_their_records_in_one_column():
    made = craft(5, 8, 2, normalize=True, clipping_norm=1.0, records_per_person=3, generator=np.random.default_rng(0))
    features, targets = made.units()
    assert features.offsets.tolist() == [0, 3, 6, 9, 12, 15]
    assert targets.shape == (5, 3)
    for i in range(5):
        rows, _ = features.batch(torch.tensor([i]))
        assert rows[0].nonzero()[:, 1].tolist() == [made.columns[i]] * 3
        assert set(targets[i].tolist()) == {int(made.labels[i])}


@pytest.mark.parametrize("number", [0, 9])
def test_more_canaries_than_features_are_refused(number):
    with pytest.raises(InputError, match=rf"canaries is {number}: .*from 1 to 8"):
        craft(number, 8, 2, normalize=True, clipping_norm=1.0, generator=np.random.default_rng(0))


def test_joined_keeps_the_order_and_pads_targets():
    a = FeatureSet(torch.ones(3, 2), torch.tensor([0, 1, 3])), torch.tensor([[0, -1], [1, 1]])
    b = FeatureSet(torch.zeros(3, 2), torch.tensor([0, 3])), torch.tensor([[0, 1, 0]])
    features, targets = joined(a, b)
    assert features.offsets.tolist() == [0, 1, 3, 6]
    assert targets.tolist() == [[0, -1, -1], [1, 1, -1], [0, 1, 0]]
    records, labels = joined(
        (FeatureSet(torch.ones(1, 2).half()), torch.tensor([1])), (FeatureSet(torch.zeros(1, 2)), torch.tensor([0]))
    )
    assert records.values.dtype == torch.float32
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize("head", [LINEAR, MLP, DEEP])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("people", [None, 3])
def test_heads_make_canaries_longer_than_the_clipping_norm_and_mostly_their_own(head, normalize, people):
    bench = Bench(head, features=32, people=people, normalize=normalize)
    trainable, norm = bench.make(), 1.0
    first, second = (sent_head(trainable, bench.canaries, bench.generator) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, first.astype(np.float32))
    features, targets = bench.canaries.units()
    found = Reference(trainable, bench.task).signatures(
        first, features, targets, norm, bench.canaries.columns, np.ones(32, dtype=bool)
    )
    share = np.square(found.own).sum(1)
    assert (found.norms >= norm).mean() > 0.95
    assert share.mean() > (0.45 if normalize else 0.9)  # a bias takes half of what is normalised
    assert found.stray < 1e-7


def test_loading_a_head_is_exact():
    bench = Bench(MLP)
    trainable = bench.make()
    head = sent_head(trainable, bench.canaries, bench.generator)
    load_flat(trainable, head)
    assert np.array_equal(flat(trainable).double().numpy(), head)


def test_heads_that_canaries_cannot_audit_are_refused():
    assert entry_weight(Trainable(None, True, nn.Linear(4, 2))) == "head.weight"
    assert entry_weight(Trainable(None, True, nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))) == (
        "head.0.weight"
    )
    with pytest.raises(InputError, match="first layer must be a trained linear layer"):
        entry_weight(Trainable(None, True, nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))))
    with pytest.raises(InputError, match="first layer must be a trained linear layer"):
        entry_weight(Trainable(nn.Linear(4, 4), True, nn.Linear(4, 2)))
    with pytest.raises(InputError, match="dropout is more than 0"):
        entry_weight(Trainable(None, True, nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1), nn.Linear(3, 2))))
