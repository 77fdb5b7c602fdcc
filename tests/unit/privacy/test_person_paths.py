"""Persons: every path gives the sum of clipped gradients of one person at a time by plain autograd."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedhead.client.gradients import ClosedForm, of_persons
from fedhead.client.hooked import Ghost
from fedhead.client.paths import make_path
from fedhead.client.persons import PersonRows
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, TaskSettings
from fedhead.common.errors import ModelError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.privacy import sequences
from fedhead.common.privacy.clipping import SHRINK
from fedhead.common.privacy.noise import simulation_streams
from fedhead.common.privacy.sequences import Grams, pieces_of, similar_lengths
from fedhead.common.privacy.summing import rounding_records
from fedhead.common.tasks.classification import Classification

D, K = 16, 5
C = 0.7
LENGTHS = [1, 3, 1, 2, 9, 4, 17, 1, 40, 2, 5]
TASK = Classification(TaskSettings(labels=list("abcde")))
PATHS = ["closed-form", "ghost", "hooks"]


def persons(lengths=LENGTHS, seed=0, scale=1.0, width=D):
    g = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(sum(lengths), width, generator=g)
    labels = torch.randint(K, (sum(lengths),), generator=g)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    made = Labelled(FeatureSet(values), labels).by_person(ends.numpy())
    return made.features, made.targets


def linear(normalize=False, bias=True, dtype=torch.float64, width=D):
    torch.manual_seed(1)
    return Trainable(None, normalize, nn.Linear(width, K, bias=bias)).to(dtype)


def mlp(normalize=True, dtype=torch.float64):
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(D, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, K))
    return Trainable(None, normalize, head).to(dtype)


def gradient_of(head, x, y):
    """One person's gradient of the summed loss, by autograd on (T, D)."""
    parameters = list(head.trained().values())
    gradients = torch.autograd.grad(F.cross_entropy(head(x), y, reduction="sum"), parameters)
    return torch.cat([g.flatten() for g in gradients])


def expected_sum(head, features, targets, c=C):
    """Micro-batches of one person; records that aren't finite are left out, persons whose gradient isn't as well."""
    dtype = next(head.parameters()).dtype
    total = torch.zeros(sum(p.numel() for p in head.trained().values()), dtype=dtype)
    for i in range(len(targets)):
        start, stop = features.offsets[i : i + 2].tolist()
        x, y = features.values[start:stop].to(dtype), targets[i][: stop - start]
        keep = x.isfinite().all(1)
        if not keep.any():
            continue
        gradient = gradient_of(head, x[keep], y[keep])
        if gradient.norm().isfinite():
            total += gradient * min(1.0, c * SHRINK / gradient.norm().item())
    return total


def summed(head, path, features, targets, c=C, index=None):
    path = make_path(head, TASK, path) if isinstance(path, str) else path
    path.begin(features, targets, c)
    path.add_rows(slice(0, len(targets)) if index is None else index)
    path.end()
    found = torch.cat(
        [(torch.zeros_like(p) if p.summed_grad is None else p.summed_grad).detach().flatten() for p in path.parameters]
    )
    for p in path.parameters:
        p.summed_grad = None
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_linear_head_equals_one_person_at_a_time(path, normalize, bias, dtype, close):
    head = linear(normalize, bias, dtype)
    data = persons()
    expected = expected_sum(head, *data)
    assert expected.norm() > 1
    assert (summed(head, path, *data) - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize("path", ["ghost", "hooks"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_mlp_equals_one_person_at_a_time(path, dtype, close):
    head, data = mlp(dtype=dtype), persons()
    expected = expected_sum(head, *data)
    assert (summed(head, path, *data) - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "index", [torch.tensor([8, 0, 6]), torch.tensor([3]), slice(2, 7), torch.tensor([], dtype=int)]
)
def test_some_of_the_persons(path, index):
    head, (features, targets) = linear(True), persons()
    chosen = torch.arange(len(targets))[index]
    expected = expected_sum(head, features.take(chosen), targets[chosen])
    assert (summed(head, path, features, targets, index=index) - expected).norm() <= 1e-10


@pytest.mark.parametrize("way", ["gram", "gradient", "kept", "kept for samples"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_to_a_norm_is_taken_and_right(way, bias, monkeypatch):
    """Long sequences of short vectors go by gradients, short ones of long vectors by Gram matrices."""
    width, lengths = (2, [50, 60, 33]) if way == "gradient" else (D, [3, 2, 3])
    head, data = linear(bias=bias, width=width), persons(lengths, width=width)
    seen = []
    for name in ("_gram", "_block_norms"):
        real = getattr(sequences, name)
        monkeypatch.setattr(sequences, name, lambda *a, real=real, name=name: seen.append(name) or real(*a))
    path = ClosedForm(head, TASK)
    index = slice(0, 3) if way == "kept" else torch.arange(3)
    if way == "gram":
        monkeypatch.setattr(PersonRows, "_keep", lambda self: Grams(torch.zeros(3, dtype=int), {}))
    for repeat in range(2):
        seen.clear()
        expected = expected_sum(head, *data)
        assert (summed(head, path, *data, index=index) - expected).norm() <= 1e-10 * expected.norm()
        assert "_block_norms" in seen
        assert ("_gram" in seen) == (way == "gram" or (way.startswith("kept") and repeat == 0))
        with torch.no_grad():
            head.head.weight.mul_(1.5)  # what is kept holds for any weights


def test_kept_matrices_are_bounded(monkeypatch):
    from fedhead.client import persons as module

    monkeypatch.setattr(module, "_KEPT", 10)
    head, data = linear(), persons([2] * 3)
    expected = expected_sum(head, *data)
    rows = PersonRows(data[0], head.head, False)
    rows._room = 10  # three matrices of 4 numbers do not fit
    found = torch.cat([g.flatten() for g in rows.clipped_sum(data[1], slice(0, 3), C)]).detach()
    assert (found - expected).norm() <= 1e-10
    assert all(block.gram is None for found in rows._groupings.values() for block in found.blocks)
    found = torch.cat([g.flatten() for g in rows.clipped_sum(data[1], torch.arange(3), C)]).detach()
    assert (found - expected).norm() <= 1e-10
    assert rows._grams.kept == {}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [slice(2, 11), slice(0, 11), torch.tensor([8, 1, 10, 0])])
def test_pieces_that_fit_in_memory_add_up_to_the_same(path, index, monkeypatch):
    head, data = linear(True), persons()
    whole = summed(head, path, *data, index=index)
    monkeypatch.setattr("fedhead.client.persons._PIECE", 6 * D)  # six records at once
    monkeypatch.setattr("fedhead.client.gradients._PIECE", 6 * D)
    assert (summed(head, path, *data, index=index) - whole).norm() <= 1e-12


def test_pieces_keep_the_order_and_the_bound():
    lengths = torch.tensor(LENGTHS)
    pieces = pieces_of(lengths, 8)
    assert [i for piece in pieces for i in range(11)[piece]] == list(range(11))
    assert all(int(lengths[piece].sum()) <= 8 or piece.stop - piece.start == 1 for piece in pieces)
    assert any(piece.stop - piece.start > 1 for piece in pieces)
    assert pieces_of(lengths, 1000) == [slice(0, 11)]
    assert pieces_of(lengths[:0], 1000) == [slice(0, 0)]


@pytest.mark.parametrize("path", PATHS)
def test_one_record_a_person_equals_the_record_path(path):
    for dtype in (torch.float64, torch.float32):
        head, data = linear(True, dtype=dtype), persons([1] * 30)
        by_person = summed(head, path, *data)
        by_record = summed(head, path, FeatureSet(data[0].values), data[1][:, 0])
        assert (by_person - by_record).abs().max() <= 1e-7
        if path == "closed-form":
            assert torch.equal(by_person, by_record)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunk", [1, 4, 4096])
@pytest.mark.parametrize("mechanism", ["full-batch", "poisson", "none"])
def test_training_takes_whole_persons_and_chunks_change_nothing(path, chunk, mechanism):
    given = StepPlan(
        mechanism, 1.3, C, 0.5 if mechanism == "poisson" else None, 3, 20, SGD(momentum=0.9), 0.5, chunk=chunk
    )
    heads = []
    for each in (given, StepPlan(**{**given.__dict__, "chunk": 7})):
        head = copy.deepcopy(linear(True))
        Trainer(head, TASK, path).round(*persons(), each, simulation_streams(3, "holder", 1))
        heads.append(head.head.weight.detach())
    assert (heads[0] - heads[1]).abs().max() < 1e-10
    assert (heads[0] - linear(True).head.weight).abs().max() > 1e-3


def test_without_privacy_is_the_gradient_of_all_records():
    head, (features, targets) = linear(), persons()
    before = torch.cat([p.detach().clone().flatten() for p in head.parameters()])
    gradient = gradient_of(head, features.values.double(), targets[targets >= 0])
    plan = StepPlan("none", 0.0, C, None, 1, 20, SGD(), 0.5)
    Trainer(head, TASK).round(features, targets, plan, simulation_streams(0, "holder", 1))
    after = torch.cat([p.detach().flatten() for p in head.parameters()])
    assert torch.allclose(after, before - 0.5 * gradient / 20, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", [float("nan"), float("inf"), 1e30])
def test_a_broken_record_is_left_out_and_the_others_of_the_person_count(path, what):
    head, (features, targets) = linear(), persons([3, 2, 1, 4])
    values = features.values.clone()
    values[1, 4] = what  # of the first person
    values[5] = what  # the third person's only one
    broken = FeatureSet(values, features.offsets)
    keep = torch.tensor([0, 2, 3, 4, 6, 7, 8, 9])
    left = FeatureSet(values[keep], torch.tensor([0, 2, 4, 8]))
    labels = targets.clone()
    labels[0] = torch.tensor([targets[0, 0], targets[0, 2], -1, -1])
    expected = expected_sum(head, left, labels[[0, 1, 3]])
    found = summed(head, path, broken, targets)
    assert (found - expected).norm() <= 1e-10
    assert (summed(head, path, broken, targets, index=torch.tensor([2])) == 0).all()


@pytest.mark.parametrize("path", ["ghost", "hooks"])
def test_a_person_whose_loss_is_broken_is_left_out(path):
    class Broken(Classification):
        closed_form = None

        def losses(self, outputs, targets):
            losses = super().losses(outputs, targets)
            return losses * torch.where(targets == 3, float("nan"), 1.0)

    head, (features, targets) = linear(), persons()
    good = ~(targets == 3).any(1)
    assert good.any()
    assert not good.all()
    chosen = good.nonzero().flatten()
    expected = expected_sum(head, features.take(chosen), targets[chosen])
    broken = Broken(TaskSettings(labels=list("abcde")))
    assert (summed(head, make_path(head, broken, path), features, targets) - expected).norm() <= 1e-10


class PerRecord(ClosedForm):
    """Twin: clips records, then sums a person's."""

    def add_rows(self, index):
        real = self.targets >= 0
        self._persons, self.targets = None, self.targets[real]
        self._reach, self._scale, self._broken = self._measure(FeatureSet(self.features.values))
        self.features = FeatureSet(self.features.values)
        super().add_rows(slice(0, len(self.targets)))


class MeanOfPerson(Ghost):
    """Twin: the person's loss is the mean, not the sum."""

    def _losses(self, values, lengths, targets):
        return super()._losses(values, lengths, targets) / (targets >= 0).sum(1)


class PerBatch(ClosedForm):
    """Twin: clips all persons together."""

    def add_rows(self, index):
        found = self._persons.clipped_sum(self.targets, index, 1e9)
        norm = torch.cat([part.flatten() for part in found]).norm()
        self._sum(tuple(part * min(1.0, self.clipping_norm / norm.item()) for part in found))


@pytest.mark.parametrize("twin", [PerRecord, MeanOfPerson, PerBatch])
def test_twins_are_told_apart(twin):
    head, data = linear(), persons()
    expected = expected_sum(head, *data)
    assert (summed(head, twin(head, TASK), *data) - expected).norm() > 1e-2 * expected.norm()


def test_records_that_cancel_keep_a_bounded_factor():
    """Two huge records whose gradients cancel: exact arithmetic would not clip, rounding would then be all there is."""
    head = linear(dtype=torch.float32)
    with torch.no_grad():
        head.head.weight.zero_()
        head.head.bias.zero_()
    x = torch.full((1, D), 1e10)
    features = FeatureSet(torch.cat([x] * K), torch.tensor([0, K]))
    targets = torch.arange(K)[None]  # residuals of all labels add up to nothing
    for path in ("closed-form", "ghost"):
        assert summed(head, path, features, targets).norm() <= C
    one, _ = persons([1])
    both = FeatureSet(torch.cat([one.values, features.values]), torch.tensor([0, 1, 1 + K]))
    padded = torch.full((2, K), -1)
    padded[0, 0], padded[1] = 2, targets[0]
    for path in ("closed-form", "ghost"):
        alone = summed(head, path, both, padded, index=torch.tensor([0]))
        assert (summed(head, path, both, padded) - alone).norm() <= C * (1 + 1e-5)


class Squeeze(nn.Module):
    """A head that takes (B, D) only: over dimension 1 of (B, T, D) it mixes a person's records."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, K)

    def forward(self, x):
        return self.out(x - x.mean(1, keepdim=True))


def test_a_head_that_mixes_a_persons_records_is_refused():
    head = Trainable(None, False, Squeeze())
    features, targets = persons()
    with pytest.raises(ModelError, match=r"^model.head brings code of your own that works on one record at a time"):
        summed(head, "ghost", features, targets)
    summed(head, "ghost", FeatureSet(features.values), targets[targets >= 0])  # as records it is fine


def test_lengths_are_grouped_within_a_factor_of_two():
    lengths = torch.tensor([1, 0, 2, 3, 4, 5, 8, 9, 100, 10_000])
    groups = similar_lengths(lengths)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(10))
    for members in groups:
        mine = lengths[members]
        assert mine.max() <= 1 or 2 * mine.min() > mine.max()


def test_rounding_counts_what_is_added_up():
    assert rounding_records(np.ones(100, dtype=int), 4096) == 100  # as records
    assert rounding_records(np.full(100, 10), 4096) > 1000
    assert rounding_records(np.full(100_000, 10), 4096) < 2**20
    assert rounding_records(np.full(2**20, 10), 4096) > 2**20
    assert rounding_records(np.array([], dtype=int), 4096) == 0


def test_targets_say_what_the_unit_is():
    features, targets = persons()
    assert of_persons(targets)
    assert not of_persons(targets[:, 0])
    assert (targets >= 0).sum(1).tolist() == LENGTHS == features.offsets.diff().tolist()
