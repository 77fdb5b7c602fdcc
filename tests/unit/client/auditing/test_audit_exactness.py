"""Sums against the reference with noise next to nothing: sound ones pass, and each wrong twin is noticed."""

import re
from pathlib import Path
from runpy import run_path

import pytest
import torch

from fedhead.client import gradients
from fedhead.client.auditing.exactness import largest_difference
from fedhead.client.training import Trainer
from fedhead.common.privacy import clipping
from fedhead.common.privacy.optimizers import PrivateOptimizer

BENCH = run_path(str(Path(__file__).with_name("audit_bench.py")))
Bench, LINEAR, MLP = (BENCH[name] for name in ("Bench", "LINEAR", "MLP"))

POISSON = {"mechanism": "poisson", "sample_rate": 0.5, "local_steps": 4}


def found(**settings):
    return largest_difference(Bench(**settings).setup())


@pytest.mark.parametrize("system", [False, True], ids=["simulated", "deployed"])
@pytest.mark.parametrize("people", [None, 3], ids=["records", "persons"])
@pytest.mark.parametrize("head", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("plan", [{}, POISSON], ids=["full-batch", "poisson"])
def test_a_sound_path_gives_the_sums_of_the_reference(system, people, head, plan):
    result = found(system=system, people=people, head=head, **plan)
    assert result.check().passed
    assert result.share < 0.5, result.share
    assert result.distance > 0  # something was compared


def test_long_features_in_a_simulation():
    made = Bench(normalize=False)
    made.real.values.mul_(300)
    assert largest_difference(made.setup()).share < 0.5


def weighted(monkeypatch, weight):
    """Clip each record to `weight(y, place)` clipping norms, place after place."""
    right = clipping.linear_softmax_clipped_sum

    def wrong(x, y, w, bias, norm, *, reach=None, scale=None, hot=None):
        labels = y if hot is None else hot.argmax(1)
        factors, total = weight(labels, torch.arange(len(labels))), None
        for factor in factors.unique().tolist():
            rows = factors == factor
            part = right(
                x[rows], labels[rows], w, bias, factor * norm, reach=None if reach is None else reach[rows],
                scale=None if scale is None else scale[rows],
            )  # fmt: skip
            total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
        return total

    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", wrong)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda y, place: 1 + 0.02 * (y == 1), r"\d of 18 records count 1\.02 times .*: clipped too little"),
        (lambda y, place: 1 - 0.02 * (place == 5), r"1 of 18 records count for less than they should, down to 0\.98"),
        (lambda y, place: 1 + 0.02 * (place == 45), "can't be told"),
        (lambda y, place: 1 + (place > 1000) * (torch.arange(len(place)) % 7 == 0) * 0.5, "can't be told"),
        (lambda y, place: 1 - 0.02 * (place == 45), "can't be told"),
    ],
    ids=["a label", "a record too short", "one canary", "some beyond a thousand", "a canary too short"],
)
def test_a_record_that_is_clipped_otherwise_is_noticed(weight, says, monkeypatch):
    weighted(monkeypatch, weight)
    check = found(chunk=4096).check()
    assert not check.passed
    assert re.search(says, check.meaning), check.meaning


def test_norms_that_are_kept_from_the_first_step_are_noticed(monkeypatch):
    """Clipped as under the head that arrived: later gradients are longer."""
    right, real, step = clipping.linear_softmax_clipped_sum, PrivateOptimizer.begin, PrivateOptimizer.step
    taken = [0]

    def begin(self, **settings):
        taken[0] = 0
        real(self, **settings)

    def count(self, closure=None):
        step(self, closure)
        taken[0] += 1

    def wrong(x, y, weight, bias, norm, **named):
        return right(x, y, weight, bias, norm * (1.02 if taken[0] else 1), **named)

    monkeypatch.setattr(PrivateOptimizer, "begin", begin)
    monkeypatch.setattr(PrivateOptimizer, "step", count)
    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", wrong)
    assert found().check().passed
    assert not found(local_steps=3).check().passed


def test_short_gradients_that_depend_on_the_others_are_noticed(monkeypatch):
    """Records are scaled to the median of all norms, which shows only where gradients are short."""
    right = clipping.linear_softmax_clipped_sum

    def wrong(x, y, weight, bias, norm, *, reach=None, scale=None, hot=None):
        seen = x if scale is None else x * scale[:, None]
        g = (seen @ weight.t() + bias).softmax(1)
        g[torch.arange(len(y)), y] -= 1
        lengths = g.norm(dim=1) * (seen.square().sum(1) + 1).sqrt()
        least = min(norm, float(lengths.median())) if len(y) else norm
        return right(x, y, weight, bias, least, reach=reach, scale=scale, hot=hot)

    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", wrong)
    assert not found().check().passed


def test_other_records_than_those_drawn_are_noticed(monkeypatch):
    read = Trainer._read

    def other(self, samples, chunk):
        return read(self, [sample[1:] for sample in samples], chunk)

    monkeypatch.setattr(Trainer, "_read", other)
    assert not found(**POISSON).check().passed
