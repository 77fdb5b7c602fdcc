"""Which records are kept apart, what is counted on them, and that nothing but a noised count leaves."""

import numpy as np
import pytest
import torch
from torch import nn

from fedhead.client import metrics
from fedhead.client.metrics import count_correct, count_event, noised_count
from fedhead.common.config.schema import TaskSettings
from fedhead.common.data.holdout import holdout_rows
from fedhead.common.data.records import SPLIT_KEY, Records
from fedhead.common.errors import InputError
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.events import CountEvent
from fedhead.common.privacy.noise import simulation_streams, system_streams
from fedhead.common.tasks.classification import Classification

N, D, K = 60, 6, 3
TASK = Classification(TaskSettings(labels=list("abc")))


def linear(normalize=True, dtype=torch.float32):
    torch.manual_seed(1)
    return Trainable(None, normalize, nn.Linear(D, K)).to(dtype)


def records(n=N, seed=2):
    g = torch.Generator().manual_seed(seed)
    return Labelled(FeatureSet(torch.randn(n, D, generator=g)), torch.randint(K, (n,), generator=g))


def persons(sizes, seed=3):
    """Persons with so many records each: values (total, D), targets (P, Tmax) padded with -1."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.full((len(sizes), max(sizes)), -1)
    for row, size in zip(targets, sizes, strict=True):
        row[:size] = torch.randint(K, (size,), generator=g)
    offsets = torch.tensor([0, *np.cumsum(sizes).tolist()])
    return Labelled(FeatureSet(torch.randn(sum(sizes), D, generator=g), offsets), targets)


def numpy_right(trainable, values, targets):
    """Which answers are right, without torch."""
    x = values.double().numpy()
    if trainable.normalize:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    head = trainable.head
    logits = x @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    return logits.argmax(1) == targets.numpy()


class Told:
    """Noise of a known value, which keeps what it was asked for."""

    def __init__(self, value=0.25):
        self.value, self.asked = value, []

    def add(self, total, *, noise_multiplier, clipping_norm):
        self.asked.append((total.clone(), noise_multiplier, clipping_norm))
        return total + self.value


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_records_are_counted_as_by_numpy(normalize, dtype):
    made, held = linear(normalize, dtype), records()
    assert 0 < count_correct(made, TASK, held) < N
    assert count_correct(made, TASK, held) == numpy_right(made, held.features.values, held.targets).sum()


def test_a_person_counts_the_share_of_right_answers():
    sizes = [1, 4, 2, 7, 1, 3]
    made, held = linear(), persons(sizes)
    ends = np.cumsum(sizes)
    expected = sum(
        numpy_right(made, held.features.values[end - size : end], held.targets[i, :size]).mean()
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )
    assert count_correct(made, TASK, held) == pytest.approx(expected, abs=1e-12)
    assert expected != round(expected)


def test_features_of_texts_at_a_cut_are_read_with_their_lengths():
    class Tail(nn.Module):
        def forward(self, values, lengths):
            real = torch.arange(values.shape[1]) < lengths[:, None]
            return (values * real[..., None]).sum(1) / lengths[:, None]

    sizes = [2, 5, 1, 3]
    ragged = persons(sizes)
    held = Labelled(ragged.features, torch.tensor([0, 1, 2, 0]))  # one target each: texts of tokens, not persons
    made = linear()
    made.tail = Tail()
    pooled = torch.stack([part.mean(0) for part in ragged.features.values.split(sizes)])
    assert count_correct(made, TASK, held) == numpy_right(made, pooled, held.targets).sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_record_that_is_not_finite_counts_nothing_and_harms_nobody(bad):
    made = Trainable(None, False, nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, K)))  # tanh(inf) is finite
    held = records()
    whole = count_correct(made, TASK, held)
    right = made.eval()(held.features.values).argmax(1) == held.targets
    made.train()
    row = int(right.nonzero()[0])
    values = held.features.values.clone()
    values[row, 1] = bad
    assert count_correct(made, TASK, Labelled(FeatureSet(values), held.targets)) == whole - 1
    first = persons([4])
    right = int(count_correct(made, TASK, first) * 4)
    broken = first.features.values.clone()
    good = row_that_is_right(made, first)
    broken[good, 0] = bad
    assert (
        count_correct(made, TASK, Labelled(FeatureSet(broken, first.features.offsets), first.targets))
        == (right - 1) / 4
    )


def row_that_is_right(made, held):
    with torch.no_grad():
        return int((made(held.features.values).argmax(1) == held.targets[0]).nonzero()[0])


def test_a_head_that_is_not_finite_is_never_right():
    made = linear()
    with torch.no_grad():
        made.head.bias[0] = float("nan")
    assert count_correct(made, TASK, Labelled(FeatureSet(torch.randn(5, D)), torch.zeros(5, dtype=torch.int64))) == 0


def test_without_any_unit_noise_alone_is_released():
    nobody = Labelled(FeatureSet(torch.zeros(0, D)), torch.zeros(0, dtype=torch.int64))
    no_person = Labelled(FeatureSet(torch.zeros(0, D), torch.zeros(1, dtype=torch.int64)), torch.zeros(0, 4).long())
    recordless = Labelled(FeatureSet(torch.zeros(0, D), torch.zeros(2, dtype=torch.int64)), torch.full((1, 4), -1))
    for held in (nobody, no_person, recordless):
        assert count_correct(linear(), TASK, held) == 0
        assert noised_count(linear(), TASK, held, 20.0, Told(-3.5)) == -3.5


def test_the_release_is_the_count_plus_noise_of_sensitivity_one():
    noise, made, held = Told(), linear(), persons([2, 3, 1])
    count = count_correct(made, TASK, held)
    assert noised_count(made, TASK, held, 7, noise) == count + 0.25
    ((total, multiplier, clipping_norm),) = noise.asked
    assert (total.dtype, total.shape, total.item()) == (torch.float64, (1,), count)
    assert (multiplier, clipping_norm) == (7.0, 1.0)
    assert count_event(7) == CountEvent(7.0, 1.0, 1)


@pytest.mark.parametrize("streams", [lambda: simulation_streams(1, "a", 1), system_streams])
def test_real_sources_of_noise_serve(streams):
    made, held = linear(), records()
    one, two = (noised_count(made, TASK, held, 20.0, streams().noise(step)) for step in (1, 2))
    assert one != two
    assert abs(one - count_correct(made, TASK, held)) < 20.0 * 12


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_multiplier_without_sense_draws_no_noise(bad):
    noise = Told()
    with pytest.raises(InputError, match="noise_multiplier"):
        noised_count(linear(), TASK, records(), bad, noise)
    assert noise.asked == []


def test_counting_changes_neither_mode_nor_weights_nor_random_state():
    torch.manual_seed(4)
    made = Trainable(None, True, nn.Sequential(nn.Linear(D, 5), nn.Dropout(0.5), nn.Linear(5, K)))
    held = records()
    weights = [p.detach().clone() for p in made.parameters()]
    state = torch.get_rng_state()
    for mode in (True, False):
        made.train(mode)
        counts = {count_correct(made, TASK, held) for _ in range(3)}
        assert len(counts) == 1  # dropout is off
        assert made.training is mode
        assert made.head[1].training is mode
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, made.parameters(), strict=True))
    assert all(p.grad is None for p in made.parameters())


def test_the_mode_comes_back_when_counting_fails():
    class Coupled(Classification):
        def correct(self, outputs, targets):
            return torch.tensor(True)

    made = linear()
    with pytest.raises(InputError, match=r"task\.correct") as refused:
        count_correct(made, Coupled(TaskSettings(labels=list("abc"))), records())
    assert "\n" not in str(refused.value)
    assert made.training


def test_a_task_may_say_what_is_right():
    class Near(Classification):
        def correct(self, outputs, targets):
            return (outputs.argmax(1) - targets).abs() <= 1

    made, held = linear(), records()
    near = count_correct(made, Near(TaskSettings(labels=list("abc"))), held)
    answers = made(held.features.values).argmax(1)
    assert near == ((answers - held.targets).abs() <= 1).sum() > count_correct(made, TASK, held)


def test_targets_of_another_number_are_refused_without_any_number():
    with pytest.raises(InputError, match="differ in number") as refused:
        count_correct(linear(), TASK, Labelled(FeatureSet(torch.zeros(3, D)), torch.zeros(2, dtype=torch.int64)))
    assert not any(letter.isdigit() for letter in str(refused.value))


def test_the_release_is_one_float_and_no_other_figure_can_be_had():
    assert type(noised_count(linear(), TASK, records(), 20.0, Told())) is float
    public = {name for name, value in vars(metrics).items() if getattr(value, "__module__", "") == metrics.__name__}
    assert {name for name in public if not name.startswith("_")} == {
        "Held", "count_correct", "noised_count", "count_event",
    }  # fmt: skip


def digests(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 16), dtype=np.uint8)


def test_records_kept_apart_are_about_the_share_asked_for():
    apart = holdout_rows(digests(20_000), 0.1)
    assert (apart.dtype, apart.shape) == (np.bool_, (20_000,))
    assert abs(apart.mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert holdout_rows(digests(0), 0.1).shape == (0,)


def test_the_choice_is_another_than_that_of_test_records():
    """Test records were taken out first: among those left, the share must still be what was asked for."""
    rows = digests(20_000)
    left = rows[~holdout_rows(rows, 0.2, key=SPLIT_KEY)]
    assert abs(holdout_rows(left, 0.2).mean() - 0.2) < 5 * (0.16 / len(left)) ** 0.5


def test_equal_records_fall_on_one_side_and_so_do_all_records_of_a_person():
    rows = np.concatenate([digests(200), digests(200)[::-1]])
    apart = holdout_rows(rows, 0.5)
    assert np.array_equal(apart[:200], apart[200:][::-1])
    whose = np.random.default_rng(1).integers(0, 40, 400).astype(str)
    apart = holdout_rows(rows, 0.5, whose)
    kept, trained = set(whose[apart]), set(whose[~apart])
    assert kept
    assert trained
    assert not kept & trained


def test_a_person_is_the_same_whatever_type_the_column_was_read_as():
    """One record without a number turns the others' whole numbers into floats."""
    numbers = np.arange(300)
    rows = digests(300)
    expected = holdout_rows(rows, 0.5, numbers)
    for column in (numbers.astype(float), numbers.astype(str), numbers.astype(object), numbers.astype(np.int32)):
        assert np.array_equal(holdout_rows(rows, 0.5, column), expected)
    gap = numbers.astype(float)
    gap[0] = np.nan
    assert np.array_equal(holdout_rows(rows, 0.5, gap)[1:], expected[1:])
    odd = np.array(["\udcff", "é", "", None, 1.5], dtype=object)
    assert holdout_rows(digests(5), 0.5, odd).shape == (5,)


def test_real_records_can_be_kept_apart():
    found = Records.from_memory("text", [f"text {i}" for i in range(500)], np.zeros(500, dtype=int))
    apart = holdout_rows(found.digests(), 0.2)
    train, held = found.select(~apart), found.select(apart)
    assert len(train) + len(held) == 500
    assert not {*train.inputs(slice(None))} & {*held.inputs(slice(None))}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), 2])
def test_a_share_without_sense_is_refused(fraction):
    with pytest.raises(InputError, match=r"^privacy\.metrics\.fraction is .*: it must be"):
        holdout_rows(digests(3), fraction)


def test_persons_of_another_number_are_refused():
    with pytest.raises(InputError, match="persons differ"):
        holdout_rows(digests(3), 0.5, np.array(["a"]))
