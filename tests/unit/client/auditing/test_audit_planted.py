"""Planted gradients: production clips, sums and noises them as any record's, in every head."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedhead.client import hooked, paths
from fedhead.client.auditing.contributions import largest_contribution
from fedhead.client.auditing.dropped import DropoutMasks
from fedhead.client.auditing.exactness import largest, largest_difference
from fedhead.client.auditing.experiment import observe
from fedhead.client.auditing.planted import LONG, MARK, linear_layers
from fedhead.client.auditing.reference import Reference
from fedhead.client.auditing.watching import watch
from fedhead.client.gradients import GradientPath
from fedhead.client.training import Trainer
from fedhead.common.config.schema import MLPHead
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable

BENCH = run_path(str(Path(__file__).with_name("audit_bench.py")))
Bench, LINEAR = BENCH["Bench"], BENCH["LINEAR"]
DEEP = MLPHead(kind="mlp", hidden=[8, 6])
DROPPING = MLPHead(kind="mlp", hidden=[8, 6], dropout=0.3)
POISSON = {"mechanism": "poisson", "sample_rate": 0.3, "local_steps": 2}
RARE = 1e-4


planted, drawn = BENCH["planted"], BENCH["drawn"]


def variance_p(residuals):
    tail = stats.chi2.cdf(np.square(residuals).sum(), residuals.size)
    return 2 * min(tail, 1 - tail)


# ---- canaries


def test_each_canary_has_a_number_of_its_own_and_is_longer_than_the_clipping_norm():
    bench = Bench(DEEP, features=5)
    canaries = planted(bench, 40 + 48 + 18).canaries  # every number of every weight
    assert len(canaries) == canaries.most
    assert [(one.name, one.outputs, one.inputs) for one in canaries.layers] == [
        ("head.0", 8, 5), ("head.2", 6, 8), ("head.4", 3, 6)
    ]  # fmt: skip
    assert len(np.unique(canaries.places)) == len(canaries)
    starts = Reference(bench.make(), bench.task).groups()
    for place, layer in zip(canaries.places[:, 0], canaries.layer, strict=True):
        part = starts[f"{canaries.layers[layer].name}.weight"]
        assert part.start <= place < part.stop
    assert canaries.length.min() > 1.4
    assert 20 < canaries.length.mean() < 60
    features, targets = canaries.units(np.arange(len(canaries)) % 2 == 0)
    assert features.values[3].tolist() == [MARK + 6] * 5
    assert len(features) == len(targets) == 53


@pytest.mark.parametrize("path", ["ghost", "hooks"])
@pytest.mark.parametrize("settings", [{}, {"people": 3}], ids=str)
@pytest.mark.parametrize("head", [DEEP, DROPPING], ids=["plain", "dropout"])
def test_production_clips_and_sums_a_canary_as_it_is_said_to(head, settings, path):
    """Alone, and beside others: with next to no noise, what is released is the signature, bias and all."""
    bench = Bench(head, noise_multiplier=1e-9, clipping_norm=0.7, double=True, **settings)
    setup = planted(bench, path=path)
    trainer = setup.trainer()
    for chosen in (np.arange(60) == 7, np.arange(60) % 3 == 0):
        seen = watch(trainer, *setup.canaries.units(chosen), bench.plan, bench.streams(1))
        expected = setup.canaries.signatures(0.7, chosen)
        assert np.abs(seen.releases(bench.plan)[0] - expected.total).max() < 2e-6
        assert np.linalg.norm(expected.total) > 0.6
        assert np.linalg.norm(expected.own, axis=1) == pytest.approx(0.7 / np.sqrt(1 + LONG**-2))
        other = setup.canaries.signatures(0.7, ~chosen)
        assert np.array_equal(other.own, expected.own)  # who is in shows in `total` alone


def test_what_cannot_be_planted_is_refused():
    bench = Bench(DEEP)
    for number in (0, 24 * 8 + 48 + 18 + 1):
        with pytest.raises(InputError, match=rf"canaries is {number}: .*from 1 to 258"):
            planted(bench, number)
    with pytest.raises(InputError, match="the closed form captures none"):
        planted(Bench(LINEAR)).trainer()
    bench.real.values[3] = MARK + 5
    with pytest.raises(InputError, match="the same number above 4194304"):
        planted(bench)
    bench = Bench(DEEP, features=3)
    bench.make = lambda: Trainable(None, True, nn.LayerNorm(3))
    assert linear_layers(bench.make()) == []
    with pytest.raises(InputError, match="planted in trained linear layers, and it has none"):
        planted(bench)


# ---- heads


SETTINGS = [{}, {"people": 3}, POISSON, {"people": 3, **POISSON}, {"normalize": False}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("head", [DEEP, DROPPING], ids=["plain", "dropout"])
def test_residuals_are_the_very_noise_that_was_drawn(head, settings):
    setup = planted(Bench(head, noise_multiplier=1.0, **settings))
    found = observe(setup, 3)
    assert np.abs(found.residuals - drawn(setup, 3)).max() < (1e-3 if "people" in settings else 2e-5)
    assert found.signal == pytest.approx(1 / (1 + LONG**-2))
    assert found.clipped == 1
    assert found.replay_error == 0


class Own(nn.Module):
    """A head of a user's own: a norm, and a branch around a layer."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(24), nn.Linear(24, 24, bias=False), nn.Linear(24, 3)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.last(x + self.drop(torch.tanh(self.first(self.norm(x)))))


@pytest.mark.parametrize("settings", [{}, {"people": 3}, POISSON], ids=str)
@pytest.mark.parametrize("path", ["ghost", "hooks"])
def test_a_head_of_a_users_own(settings, path):
    bench = Bench(DEEP, noise_multiplier=1.0, **settings)

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return Trainable(None, True, Own(0.2))

    bench.make = make
    setup = planted(bench, path=path)
    found = observe(setup, 2)
    assert np.abs(found.residuals - drawn(setup, 2)).max() < (1e-3 if "people" in settings else 2e-5)


@pytest.mark.parametrize("settings", [{}, {**POISSON, "noise_multiplier": 0.03}], ids=str)
def test_scores_tell_who_was_in_where_noise_is_small(settings):
    found = observe(planted(Bench(DROPPING, **{"noise_multiplier": 0.1, "seed": 4, **settings})), 12)
    assert 10 < found.included.sum() < 50
    assert found.scores[found.included].min() > found.scores[~found.included].max()


def test_scores_have_the_law_that_the_claim_says():
    found = observe(planted(Bench(DROPPING, noise_multiplier=4.0, features=40), 320), 4)
    s = 4 * found.signal / 4.0**2
    out = found.scores[~found.included]
    assert stats.kstest((found.scores[found.included] - s / 2) / np.sqrt(s), "norm").pvalue > RARE
    assert stats.kstest((out + s / 2) / np.sqrt(s), "norm").pvalue > RARE
    assert stats.kstest((out - s / 2) / np.sqrt(s), "norm").pvalue < RARE  # a wrong law is seen


def test_a_deployments_noise():
    found = observe(planted(Bench(DROPPING, system=True, local_steps=2)), 4)
    assert variance_p(found.residuals) > RARE
    assert stats.pearsonr(*found.asked_twice).pvalue > RARE
    assert found.off_lattice < 0.05


# ---- dropout


@pytest.mark.parametrize("settings", [POISSON, {"people": 3, "local_steps": 2}], ids=str)
def test_looking_at_dropout_changes_nothing(settings):
    bench = Bench(DROPPING, **settings)
    plain, watched = (Trainer(bench.make(), bench.task) for _ in range(2))
    plain.round(bench.real, bench.targets, bench.plan, bench.streams(1))
    seen = watch(watched, bench.real, bench.targets, bench.plan, bench.streams(1))
    for p, q in zip(plain.parameters, watched.parameters, strict=True):
        assert torch.equal(p, q)
    assert len(seen.masks) == 2
    for step, masks in enumerate(seen.masks):
        assert sorted(masks) == sorted(seen.samples.get(step, range(40)))
        values = torch.cat([one.flatten() for unit in masks.values() for one in unit]).unique()
        assert values.tolist() == pytest.approx([0.0, 1 / 0.7])
    assert not watched.trainable._forward_pre_hooks


def test_other_masks_than_were_drawn_show(monkeypatch):
    setup = planted(Bench(DROPPING, noise_multiplier=0.02))
    assert variance_p(observe(setup, 3).residuals) > RARE
    monkeypatch.setattr(DropoutMasks, "taken", lambda self: {})
    assert variance_p(observe(setup, 3).residuals) < RARE


class Odd(nn.Module):
    """A head with a dropout that can't be followed."""

    def __init__(self, dropout, twice=False):
        super().__init__()
        self.first, self.last, self.drop, self.twice = nn.Linear(24, 4), nn.Linear(4, 3), dropout, twice

    def forward(self, x):
        hidden = self.drop(self.first(x))
        return self.last(self.drop(hidden) if self.twice else hidden)


@pytest.mark.parametrize(
    ("head", "words"),
    [(lambda: Odd(nn.AlphaDropout(0.2)), "AlphaDropout"), (lambda: Odd(nn.Dropout(0.2), True), "used once")],
)
def test_dropout_that_cannot_be_followed_is_refused(head, words):
    bench = Bench(DEEP)
    bench.make = lambda: Trainable(None, True, head())
    with pytest.raises(InputError, match=words):
        observe(planted(bench), 1)


def test_a_record_that_is_not_finite_has_no_mask():
    bench = Bench(DROPPING, noise_multiplier=1.0)
    bench.real.values[5, 3] = torch.nan
    setup = planted(bench)
    assert np.abs(observe(setup, 2).residuals - drawn(setup, 2)).max() < 2e-5


# ---- sums and contributions


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        (DROPPING, {}),
        pytest.param(DEEP, POISSON, marks=pytest.mark.slow),
        pytest.param(DROPPING, {"people": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sums_and_contributions(head, settings):
    setup = planted(Bench(head, **settings))
    assert largest_difference(setup).share < 0.5
    found = largest_contribution(setup)
    assert found.largest < 1 + 2.0**-10
    assert found.by_kind["a canary"] == pytest.approx(1, abs=1e-4)


def test_the_worst_of_several_is_kept():
    setup = planted(Bench(DEEP))
    good, bad = largest_difference(setup), largest_difference(replace(setup, path="hooks"))
    worse = replace(bad, share=3.0)
    assert largest([good, worse]).share == 3.0
    assert largest([good, worse]).sums == good.sums + bad.sums
    assert not largest([good, worse]).check().passed


# ---- wrong twins


def leave_out_a_layer(monkeypatch):
    """The norm of wide layers' weights isn't counted."""

    real = hooked.linear_norms

    def norms(layer, activations, backprops):
        found = real(layer, activations, backprops)
        if layer.weight.shape[1] > 20:
            found[layer.weight] = torch.zeros_like(found[layer.weight])
        return found

    monkeypatch.setattr(hooked, "linear_norms", norms)


def clip_by_the_mean(monkeypatch):
    """All records of a chunk are scaled alike, by their mean norm."""
    monkeypatch.setattr(
        hooked, "clip_factors", lambda norms, norm: torch.ones_like(norms) * (norm / norms.mean()).clamp(max=1)
    )


def clip_half_as_much_again(monkeypatch):
    begin = GradientPath.begin
    monkeypatch.setattr(GradientPath, "begin", lambda self, f, t, norm: begin(self, f, t, 1.5 * norm))


@pytest.mark.parametrize("twin", [leave_out_a_layer, clip_by_the_mean, clip_half_as_much_again])
def test_wrong_clipping_shows(monkeypatch, twin):
    setup = planted(Bench(DROPPING, noise_multiplier=0.1))
    assert variance_p(observe(setup, 3).residuals) > RARE
    twin(monkeypatch)
    assert variance_p(observe(setup, 3).residuals) < RARE
    assert largest_difference(setup).share > 100
    if twin is clip_half_as_much_again:
        found = largest_contribution(setup)
        assert found.by_kind["a canary"] == pytest.approx(1.5, abs=1e-3)


def test_a_sum_of_a_second_backward_pass_shows(monkeypatch):
    """Where a gradient cancels, both passes round differently: only the head with alike rows shows it."""
    bench = Bench(MLPHead(kind="mlp", hidden=[8], activation="tanh"), normalize=False, double=True)
    assert largest_contribution(planted(bench)).check().passed
    twins = run_path(str(Path(__file__).parents[3] / "property" / "test_cancelling_bound.py"))
    monkeypatch.setitem(paths.PATHS, "ghost", twins["TwoPasses"])
    found = largest_contribution(planted(bench))
    assert found.kind == "one huge number"
    assert not found.check().passed


def test_bias_without_noise_shows_in_its_group(monkeypatch):
    BENCH["spare_the_bias"](monkeypatch)
    found = observe(planted(Bench(DROPPING)), 4)
    for name in ("head.0.bias", "head.3.bias", "head.6.bias"):
        assert np.abs(found.residuals[:, found.groups[name]]).max() < 1e-3
    assert variance_p(found.residuals[:, found.groups["head.0.weight"]]) > RARE
