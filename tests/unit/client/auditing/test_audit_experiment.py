"""The audit's experiment: what it sees of right training is noise and canaries alone, and wrong twins show."""

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from scipy import stats

from fedhead.client.auditing import experiment
from fedhead.client.auditing.experiment import log_ratios, observe
from fedhead.client.auditing.watching import WatchedStreams, replay_error, watch
from fedhead.client.training import Trainer
from fedhead.common.config.schema import SGD, Adam, AdamW
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.lattice import ETA
from fedhead.common.privacy.noise import TorchNoise, simulation_streams

BENCH = run_path(str(Path(__file__).with_name("audit_bench.py")))
Bench, LINEAR, MLP = (BENCH[name] for name in ("Bench", "LINEAR", "MLP"))
MOMENTUM = SGD(kind="sgd", momentum=0.9, weight_decay=0.1)
RARE = 1e-4


def variance_p(residuals):
    """Two-sided p-value of the total variance of standard normal numbers."""
    tail = stats.chi2.cdf(np.square(residuals).sum(), residuals.size)
    return 2 * min(tail, 1 - tail)


def seen(bench, rounds=6, **settings):
    return observe(bench.setup(**settings), rounds)


SETTINGS = [
    {"head": LINEAR},
    {"head": LINEAR, "system": True, "local_steps": 3, "proximal_mu": 0.3, "optimizer": MOMENTUM},
    {"head": LINEAR, "people": 3, "mechanism": "poisson", "sample_rate": 0.3, "local_steps": 2},
    {"head": LINEAR, "people": 3, "system": True, "normalize": False},
    {"head": MLP, "system": True, "mechanism": "poisson", "sample_rate": 0.3},
    {"head": MLP, "people": 3, "local_steps": 2, "optimizer": Adam(kind="adam"), "learning_rate": 0.01},
    {"head": MLP, "normalize": False, "optimizer": AdamW(kind="adamw"), "learning_rate": 0.01, "local_steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_right_training_shows_noise_alone(settings):
    bench = Bench(noise_multiplier=1.5, seed=3, **settings)
    found = seen(bench)
    steps = 6 * bench.plan.local_steps
    assert found.residuals.shape == (steps, sum(p.numel() for p in bench.make().parameters()))
    assert found.empty.shape == (bench.plan.local_steps, found.residuals.shape[1])
    assert variance_p(found.residuals) > RARE
    assert variance_p(found.empty) > RARE
    assert abs(found.residuals.mean()) * np.sqrt(found.residuals.size) < 4
    assert found.replay_error == 0
    assert found.unplanned_steps == 0
    assert found.records == 40 + found.included.sum()
    assert found.clipped > 0.8
    assert 0.4 < found.signal <= 1
    assert max(part.stop for part in found.groups.values()) == found.residuals.shape[1]
    if bench.plan.mechanism == "poisson":
        assert found.rates == {0.3}
        assert len(found.sampled) == steps
        drawn = sum(len(sample) for sample in found.sampled)
        assert stats.binomtest(drawn, steps * found.records, 0.3).pvalue > RARE
    else:
        assert found.sampled is None
    assert (found.asked_twice is None) is (not bench.system)
    if found.asked_twice is not None:
        assert stats.pearsonr(*found.asked_twice).pvalue > RARE
        assert np.array_equal(found.asked_twice[0], found.residuals[0])


@pytest.mark.parametrize("head", [LINEAR, MLP])
@pytest.mark.parametrize("people", [None, 3])
def test_residuals_are_the_very_noise_that_was_drawn(head, people):
    """A seeded stream can be drawn again: what the reference leaves of a release is that, number for number."""
    bench = Bench(head, people=people, mechanism="poisson", sample_rate=0.3, local_steps=2, noise_multiplier=1.0)
    found, drawn = seen(bench, 3), []
    for number in (1, 2, 3):
        for step in range(2):
            noise = bench.streams(number).noise(step)
            parts = [
                noise.add(torch.zeros_like(p), noise_multiplier=1.0, clipping_norm=1.0).flatten()
                for p in bench.make().trained().values()
            ]
            drawn.append(torch.cat(parts).double().numpy())
    assert np.abs(found.residuals - drawn).max() < (1e-3 if people and head is MLP else 1e-4)


@pytest.mark.parametrize("settings", SETTINGS[:5])
def test_scores_tell_who_was_in_where_noise_is_small(settings):
    found = seen(Bench(noise_multiplier=0.1, seed=4, **settings), 40 if "sample_rate" in settings else 4)
    assert found.included.any()
    assert not found.included.all()
    assert found.scores[found.included].min() > found.scores[~found.included].max()


def test_scores_have_the_law_that_the_claim_says():
    """Full batch: -s/2 out, s/2 in, variance s, with s the squared signal to noise over all steps."""
    high, low = [], []
    for seed in range(12):
        bench = Bench(features=40, noise_multiplier=4.0, seed=seed)
        found = seen(bench, 4)
        s = 4 * found.signal / 4.0**2
        high.extend((found.scores[found.included] - s / 2) / np.sqrt(s))
        low.extend((found.scores[~found.included] + s / 2) / np.sqrt(s))
    for side in (high, low):
        assert len(side) > 150
        assert stats.kstest(side, "norm").pvalue > RARE
    assert stats.kstest(np.add(low, 0.5), "norm").pvalue < RARE  # a wrong law is seen


def test_scores_read_no_coin(monkeypatch):
    """The same release with other coins in the auditor's book gives the same scores."""
    recorded = []
    right = experiment.log_ratios
    monkeypatch.setattr(experiment, "log_ratios", lambda *given: recorded.append(given) or right(*given))
    bench = Bench(mechanism="poisson", sample_rate=0.5, seed=1)
    found = seen(bench, 3)
    again = sum(right(*given) for given in recorded)
    assert np.array_equal(again, found.scores)
    for _, clean, own, *_ in recorded:
        assert clean.shape == (75,)
        assert own.shape == (24, 3)  # of canaries that were in and of those that were not


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_log_ratio_is_that_of_the_densities(rate):
    drawn = np.random.default_rng(0)
    own, places = drawn.standard_normal((5, 3)), np.arange(15).reshape(5, 3)
    clean, release = drawn.standard_normal(20), 3 * drawn.standard_normal(20)
    found = log_ratios(release, clean, own, places, 1.7, rate)
    for i in range(5):
        beyond = (release - clean)[places[i]]
        out = stats.multivariate_normal.pdf(beyond, np.zeros(3), 1.7**2)
        takes_part = stats.multivariate_normal.pdf(beyond, own[i], 1.7**2)
        assert found[i] == pytest.approx(np.log(((1 - rate) * out + rate * takes_part) / out), rel=1e-9)


def test_a_deployments_noise_is_measured_against_what_it_claims():
    bench = Bench(noise_multiplier=1e-4, system=True)
    claimed = experiment.noise_scale(bench.plan, bench.streams(1))
    assert claimed == 1e-4 * (1 + ETA)
    assert experiment.noise_scale(bench.plan, simulation_streams(0, "holder", 1)) == 1e-4


def test_coins_are_fair_and_the_auditors_own():
    ins = np.mean([seen(Bench(seed=seed), 1).included for seed in range(30)], axis=0)
    assert 0.35 < ins.mean() < 0.65
    assert np.array_equal(seen(Bench(seed=5), 1).included, seen(Bench(seed=5, noise_multiplier=9.0), 1).included)


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(InputError, match=r"privacy\.mechanism is 'none'"):
        seen(Bench(mechanism="none"))
    with pytest.raises(InputError, match="rounds is 0"):
        seen(Bench(), 0)
    persons, records = Bench(people=2), Bench()
    with pytest.raises(InputError, match=r"canaries\.records is None"):
        observe(persons.setup(canaries=records.canaries), 1)
    bench = Bench(features=12)
    bench.make = lambda: Trainable(None, True, Tied())
    with pytest.raises(InputError, match="sees a feature vector more than once"):
        seen(bench, 1, path="hooks")


class Tied(torch.nn.Module):
    """A head whose first layer also sees the features in another order."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.layer(x) + self.layer(x.roll(1, -1))


# ---- wrong twins


def test_bias_without_noise_shows_in_its_group(monkeypatch):
    BENCH["spare_the_bias"](monkeypatch)
    found = seen(Bench(seed=3))
    assert np.abs(found.residuals[:, found.groups["head.bias"]]).max() < 1e-3
    assert variance_p(found.residuals[:, found.groups["head.weight"]]) > RARE
    assert np.abs(found.empty[:, found.groups["head.bias"]]).max() == 0


@pytest.mark.parametrize("head", [LINEAR, MLP])
def test_a_looser_clip_shows_where_many_are_clipped(monkeypatch, head):
    BENCH["clip_looser"](monkeypatch)
    assert variance_p(seen(Bench(head, seed=3, noise_multiplier=0.5)).residuals) < RARE


@pytest.mark.parametrize("twin", ["clip_batches", "count_truly"])
def test_wrong_sums_and_divisors_show(monkeypatch, twin):
    BENCH[twin](monkeypatch)
    assert variance_p(seen(Bench(seed=3, declared_records=200)).residuals) < RARE


def test_clipping_records_of_persons_shows(monkeypatch):
    BENCH["clip_records_of_persons"](monkeypatch)
    assert variance_p(seen(Bench(people=3, seed=3)).residuals) < RARE


def test_other_records_than_were_sampled_show(monkeypatch):
    settings = {"mechanism": "poisson", "sample_rate": 0.4, "noise_multiplier": 0.5, "seed": 3}
    assert variance_p(seen(Bench(**settings)).residuals) > RARE
    BENCH["read_other_records"](monkeypatch)
    assert variance_p(seen(Bench(**settings)).residuals) < RARE


def test_a_higher_rate_shows_in_the_samples():
    class Twice:
        """Streams that sample twice as often as was asked."""

        def __init__(self, streams):
            self._streams, self.seeded, self.source = streams, streams.seeded, streams.source

        def __getattr__(self, name):
            return getattr(self._streams, name)

        def sample(self, step, records, rate):
            return self._streams.sample(step, records, 2 * rate)

    bench = Bench(mechanism="poisson", sample_rate=0.2, seed=3)
    right = bench.streams
    bench.streams = lambda number: Twice(right(number))
    found = seen(bench)
    drawn = sum(len(sample) for sample in found.sampled)
    assert stats.binomtest(drawn, 6 * found.records, 0.2).pvalue < RARE


@pytest.mark.parametrize("optimizer", [SGD(kind="sgd"), MOMENTUM, Adam(kind="adam")])
def test_what_leaves_beside_the_noised_gradient_shows_in_the_replay(monkeypatch, optimizer):
    settings = {"optimizer": optimizer, "local_steps": 2, "proximal_mu": 0.1}
    assert seen(Bench(**settings), 2).replay_error == 0
    BENCH["leave_beside"](monkeypatch)
    found = seen(Bench(**settings), 2)
    assert found.replay_error > 1e-5
    assert variance_p(found.residuals) > RARE  # nothing else sees it


def test_noise_that_a_retry_uses_again_shows():
    class Kept:
        """Streams of a deployment that keep their noise by step."""

        seeded, source = False, "kept"

        def noise(self, step):
            return TorchNoise(torch.Generator().manual_seed(step))

    bench = Bench(system=True)
    found = observe(bench.setup(streams_for=lambda _: Kept()), 2)
    first, second = found.asked_twice
    assert np.allclose(first, second, atol=1e-3)


def test_noise_that_is_made_from_the_sum_shows_in_a_retry():
    """Fresh for every other head, and open to whoever guesses the records: only the very same round shows it."""

    class FromSum:
        def add(self, total, *, noise_multiplier, clipping_norm):
            key = int.from_bytes(blake2b(total.numpy().tobytes(), digest_size=7).digest(), "little")
            noise = torch.randn(total.shape, dtype=total.dtype, generator=torch.Generator().manual_seed(key))
            return total + noise_multiplier * clipping_norm * (1 + ETA) * noise

    class Keyed:
        seeded, source = False, "keyed"

        def noise(self, step):
            return FromSum()

    bench = Bench(system=True)
    found = observe(bench.setup(streams_for=lambda _: Keyed()), 2)
    assert np.allclose(*found.asked_twice, atol=1e-3)
    assert variance_p(found.residuals) > RARE  # nothing else sees it


def test_steps_beyond_the_plan_show(monkeypatch):
    private = Trainer._private
    monkeypatch.setattr(
        Trainer,
        "_private",
        lambda self, f, t, plan, s: private(self, f, t, replace(plan, local_steps=plan.local_steps + 1), s),
    )
    assert seen(Bench(), 2).unplanned_steps == 3  # two rounds and the empty one


# ---- watching


def test_watching_changes_nothing():
    bench = Bench(mechanism="poisson", sample_rate=0.4, local_steps=3)
    plain, watched = Trainer(bench.make(), bench.task), Trainer(bench.make(), bench.task)
    plain.round(bench.real, bench.targets, bench.plan, bench.streams(1))
    looked = watch(watched, bench.real, bench.targets, bench.plan, bench.streams(1))
    for p, q in zip(plain.parameters, watched.parameters, strict=True):
        assert torch.equal(p, q)
    assert sorted(looked.samples) == [0, 1, 2]
    assert looked.rates == {0: 0.4, 1: 0.4, 2: 0.4}
    assert watched.optimizer_of(bench.plan.optimizer).step_hook is None
    shapes = [p.shape for p in watched.parameters]
    assert replay_error(looked, bench.plan, shapes) == 0
    moved = replace(looked, left=looked.left + 1e-3)
    assert replay_error(moved, bench.plan, shapes) > 1e-4
    assert replay_error(replace(looked, left=looked.left * torch.nan), bench.plan, shapes) == np.inf
    still = replace(looked, heads=looked.heads[:0], gradients=looked.gradients[:0])
    assert replay_error(still, bench.plan, shapes) == np.inf  # it moved without a step


def test_watched_streams_pass_on_what_they_watch():
    watched, right = WatchedStreams(simulation_streams(1, "a", 2)), simulation_streams(1, "a", 2)
    assert watched.seeded
    assert watched.source == right.source
    assert torch.equal(watched.sample(3, 100, 0.2), right.sample(3, 100, 0.2))
    assert torch.equal(watched.generator(1, "dropout").get_state(), right.generator(1, "dropout").get_state())
    settings = {"noise_multiplier": 1.0, "clipping_norm": 1.0}
    assert torch.equal(watched.noise(2).add(torch.zeros(4), **settings), right.noise(2).add(torch.zeros(4), **settings))
