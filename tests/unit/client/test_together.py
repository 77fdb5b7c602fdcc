"""Holders that are stepped together end with the heads that each of them ends with alone."""

import logging

import pytest
import torch
from torch import nn

from fedhead.client import together
from fedhead.client.together import Member, Together, fits, train_together
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD, Adam, AdamW, TaskSettings
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.noise import NoiseOfEach, TorchNoise, simulation_streams, system_streams
from fedhead.common.privacy.secure import CSPRNG
from fedhead.common.tasks.classification import Classification

D, LENGTHS = 16, [30, 7, 0, 55, 1, 12]
POISSON = {"mechanism": "poisson", "sample_rate": 0.3}


def trainer_of(outputs=5, bias=True, normalize=True, features=D):
    torch.manual_seed(1)
    task = Classification(TaskSettings(labels=[str(k) for k in range(outputs)]))
    return Trainer(Trainable(None, normalize, nn.Linear(features, outputs, bias=bias)), task)


def plan_of(**changes):
    given = {
        "mechanism": "full-batch", "noise_multiplier": 0.4, "clipping_norm": 0.7, "sample_rate": None, "local_steps": 5,
        "declared_records": 20, "optimizer": SGD(), "learning_rate": 0.5,
    }  # fmt: skip
    return StepPlan(**{**given, **changes})


def members_of(lengths=LENGTHS, outputs=5, spoil=lambda values: values, width=D):
    g = torch.Generator().manual_seed(0)
    values = spoil(3 * torch.randn(sum(lengths), width, generator=g))
    everyone = Labelled(FeatureSet(values), torch.randint(outputs, (sum(lengths),), generator=g))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [
        Member((f"h{i}", "asked"), everyone.slice(end - length, end), simulation_streams(3, f"h{i}", 2))
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def one_by_one(trainer, members, plan):
    """Each holder's parameters, as vectors: (H, P)."""
    received = [p.detach().clone() for p in trainer.parameters]
    found = []
    for member in members:
        with torch.no_grad():
            for p, value in zip(trainer.parameters, received, strict=True):
                p.copy_(value)
        trainer.round(member.records.features, member.records.targets, plan, member.streams)
        found.append(torch.cat([p.detach().flatten() for p in trainer.parameters]))
    with torch.no_grad():
        for p, value in zip(trainer.parameters, received, strict=True):
            p.copy_(value)
    return torch.stack(found)


def side_by_side(trainer, members, plan):
    return torch.cat([head.flatten(1) for head in train_together(trainer, members, plan)], 1)


def apart(trainer, members, plan):
    """How far the two are apart, in the largest coordinate."""
    return float((one_by_one(trainer, members, plan) - side_by_side(trainer, members, plan)).abs().max())


OPTIMIZERS = [SGD(), SGD(momentum=0.9), SGD(weight_decay=0.1), SGD(momentum=0.5, weight_decay=0.1)]


@pytest.mark.parametrize("mechanism", [{}, POISSON], ids=["full-batch", "poisson"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_heads_are_those_of_one_holder_at_a_time(mechanism, optimizer, mu):
    plan = plan_of(**mechanism, optimizer=optimizer, proximal_mu=mu)
    assert apart(trainer_of(), members_of(), plan) < 1e-6


@pytest.mark.parametrize("mechanism", [{}, POISSON], ids=["full-batch", "poisson"])
@pytest.mark.parametrize("outputs", [2, 3, 10])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_for_every_shape_of_head(mechanism, outputs, bias, normalize):
    trainer = trainer_of(outputs, bias, normalize)
    assert apart(trainer, members_of(outputs=outputs), plan_of(**mechanism)) < 1e-6


@pytest.mark.parametrize("mechanism", [{}, POISSON], ids=["full-batch", "poisson"])
@pytest.mark.parametrize("normalize", [True, False])
def test_records_that_are_not_finite_count_for_nothing_here_too(mechanism, normalize):
    def spoil(values):
        values[3, 2], values[33], values[40, 0] = torch.nan, torch.inf, 1e30
        return values

    members, plan = members_of(spoil=spoil), plan_of(**mechanism)
    assert apart(trainer_of(normalize=normalize), members, plan) < 1e-6
    assert side_by_side(trainer_of(normalize=normalize), members, plan).isfinite().all()


@pytest.mark.parametrize("mechanism", [{}, POISSON], ids=["full-batch", "poisson"])
def test_half_precision_features_and_a_part_of_the_holders(mechanism):
    members = members_of(spoil=lambda values: values.half())
    assert apart(trainer_of(), [members[4], members[1], members[3]], plan_of(**mechanism)) < 1e-6


def test_places_are_drawn_ahead_for_a_few_steps_at_a_time(monkeypatch):
    plan = plan_of(**POISSON, local_steps=23)
    expected = side_by_side(trainer_of(), members_of(), plan)
    monkeypatch.setattr(together, "_AHEAD", 100)
    assert torch.equal(side_by_side(trainer_of(), members_of(), plan), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_the_noise_is_the_same_bit_for_bit(bias):
    """Without records a head is its noise, and nothing rounds differently."""
    trainer, members = trainer_of(bias=bias), members_of([0, 0, 0])
    plan = plan_of(optimizer=SGD(momentum=0.9))
    alone = one_by_one(trainer, members, plan)
    assert torch.equal(side_by_side(trainer, members, plan), alone)
    assert not torch.allclose(alone[0], alone[1])


@pytest.mark.parametrize("shape", [(10, 512), (3, 7), (5,), (16,), (37,)])
def test_noise_of_each_is_that_of_a_tensor_of_its_own(shape):
    total = torch.randn(4, *shape)

    def noises():
        return [TorchNoise(torch.Generator().manual_seed(seed)) for seed in range(4)]

    scale = {"noise_multiplier": 1.7, "clipping_norm": 0.3}
    expected = [noise.add(row, **scale) for noise, row in zip(noises(), total, strict=True)]
    assert torch.equal(NoiseOfEach(noises()).add(total, **scale), torch.stack(expected))


def test_noise_of_a_deployment_is_refused():
    with pytest.raises(AssertionError, match="never drawn side by side"):
        NoiseOfEach([system_streams(CSPRNG).noise(0)])


def _twin(change):
    """The kernel, with something wrong in what it gets."""
    real = together.linear_softmax_clipped_sums

    def wrong(xs, y, weights, biases, c, *, reach, scale, owner):
        given = {
            "xs": xs, "y": y, "weights": weights, "biases": biases, "clipping_norm": c, "reach": reach, "scale": scale,
            "owner": owner,
        }  # fmt: skip
        return real(**{**given, **change(given)})

    return wrong


def _shifted(given):
    """The first record of a holder is taken for the last of the one before."""
    sizes = [len(x) for x in given["xs"]]
    sizes[0], sizes[1] = sizes[0] + 1, sizes[1] - 1
    return {"xs": list(torch.cat(given["xs"]).split(sizes))}


TWINS = {
    "another holder's record": ("linear_softmax_clipped_sums", _twin(_shifted)),
    "another holder's weights": (
        "linear_softmax_clipped_sums",
        _twin(lambda given: {"weights": given["weights"].roll(1, 0)}),
    ),
    "another holder's bias": (
        "linear_softmax_clipped_sums",
        _twin(lambda given: {"owner": (given["owner"] + 1) % len(given["xs"])}),
    ),
    "no clipping": ("linear_softmax_clipped_sums", _twin(lambda given: {"clipping_norm": 1e9})),
    "shared noise": ("NoiseOfEach", lambda noises: NoiseOfEach(noises[:1] * len(noises))),
    "one noise for all": (
        "NoiseOfEach",
        lambda noises: NoiseOfEach([TorchNoise(torch.Generator().manual_seed(7)) for _ in noises]),
    ),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("mechanism", [{}, {**POISSON, "sample_rate": 0.9}], ids=["full-batch", "poisson"])
def test_a_wrong_twin_is_told_apart(name, mechanism, monkeypatch):
    trainer, members, plan = trainer_of(), members_of(), plan_of(**mechanism)
    assert apart(trainer, members, plan) < 1e-6
    monkeypatch.setattr(together, *TWINS[name])
    assert apart(trainer, members, plan) > 1e-4


def taken(trainer, members, plan):
    """Which members' parameters are there when they ask for them."""
    waiting = Together(trainer)
    waiting.expect(members, plan)
    return [waiting.take(member.key) is not None for member in members]


def test_each_takes_its_own_parameters_once():
    trainer, members, plan = trainer_of(), members_of(), plan_of()
    waiting = Together(trainer)
    waiting.expect(members, plan)
    alone = one_by_one(trainer, members, plan)
    for member, expected in zip(members, alone, strict=True):
        found = waiting.take(member.key)
        assert found is not None
        assert [value.shape for value in found] == [p.shape for p in trainer.parameters]
        assert torch.allclose(torch.cat([value.flatten() for value in found]), expected, rtol=0, atol=1e-6)
        assert waiting.take(member.key) is None
    assert waiting.take(("stranger", "asked")) is None
    assert not waiting._groups
    assert not waiting._finished


def test_what_was_expected_before_is_forgotten():
    trainer, members = trainer_of(), members_of()
    waiting = Together(trainer)
    waiting.expect(members, plan_of())
    assert waiting.take(members[0].key) is not None
    waiting.expect(members[2:], plan_of())
    assert waiting.take(members[1].key) is None


def test_groups_fit_in_memory(monkeypatch):
    sizes = []
    real = together.train_together

    def watched(trainer, members, plan):
        sizes.append(len(members))
        return real(trainer, members, plan)

    monkeypatch.setattr(together, "train_together", watched)
    monkeypatch.setattr(together, "LARGEST_GROUP", 2 * (5 * (D + 1) + 10 * (D + 5)) + 1)
    assert taken(trainer_of(), members_of([10] * 5), plan_of()) == [True] * 4 + [False]  # one is left over
    assert sizes == [2, 2]
    assert taken(trainer_of(), members_of([10] * 5), plan_of(**POISSON)) == [True] * 5  # samples are smaller
    assert sizes[2:] == [3, 2]


def test_a_holder_that_is_named_twice_is_trained_twice_but_together_once():
    members = members_of([10, 10])
    assert taken(trainer_of(), [members[0], members[1], members[0]], plan_of()) == [True, True, False]


def test_only_what_is_the_same_alone_is_taken_together(monkeypatch):
    members, full = members_of([10, 10]), plan_of()
    assert taken(trainer_of(), members, full) == [True, True]
    assert taken(trainer_of(), members[:1], full) == [False]
    assert taken(trainer_of(), members, plan_of(chunk=9)) == [False, False]  # sums of pieces are rounded otherwise
    assert taken(trainer_of(), members, plan_of(mechanism="none")) == [False, False]
    unseeded = [member._replace(streams=system_streams(CSPRNG)) for member in members]
    assert taken(trainer_of(), unseeded, full) == [False, False]
    assert taken(trainer_of(), [*members, unseeded[0]._replace(key=("c", ""))], full) == [True, True, False]
    other = members_of([10, 10])
    mixed = [members[0], other[1]._replace(key=("b", ""))]  # not of one tensor
    assert taken(trainer_of(), mixed, full) == [False, False]
    persons = [m._replace(records=Labelled(m.records.features, m.records.targets[:, None])) for m in members]
    assert taken(trainer_of(), persons, full) == [False, False]
    ragged = FeatureSet(torch.randn(20, D), torch.arange(0, 22, 2))
    texts = [m._replace(records=Labelled(ragged, m.records.targets)) for m in members]
    assert taken(trainer_of(), texts, full) == [False, False]
    monkeypatch.setattr(together, "LARGEST_HEAD", 5 * D)
    assert taken(trainer_of(), members, full) == [False, False]


def test_trainers_that_are_taken_together():
    plan = plan_of()
    assert fits(trainer_of(), plan)
    task = trainer_of().task
    assert not fits(trainer_of(), plan_of(optimizer=Adam(kind="adam")))
    assert not fits(trainer_of(), plan_of(optimizer=AdamW(kind="adamw")))
    assert not fits(Trainer(trainer_of().trainable, task, "ghost"), plan)
    assert not fits(Trainer(trainer_of().trainable.double(), task), plan)
    watched = trainer_of()
    watched.optimizer_of(plan.optimizer).attach_step_hook(lambda _: None)  # an audit that would miss the steps
    assert not fits(watched, plan)


def test_a_fault_costs_nothing_but_time(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(together, "train_together", broken)
    monkeypatch.setattr(together, "LARGEST_GROUP", 2 * (5 * (D + 1) + 10 * (D + 5)) + 1)
    with caplog.at_level(logging.ERROR, "fedhead.client"):
        assert taken(trainer_of(), members_of([10] * 6), plan_of()) == [False] * 6
    assert [record.getMessage() for record in caplog.records] == [
        "holders can't be stepped together: they are trained one at a time"
    ]


def test_what_was_received_stays():
    trainer = trainer_of()
    before = [p.detach().clone() for p in trainer.parameters]
    train_together(trainer, members_of(), plan_of())
    assert all(torch.equal(p, value) for p, value in zip(trainer.parameters, before, strict=True))
    assert all(p.grad is None for p in trainer.parameters)
