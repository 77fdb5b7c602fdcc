"""Planted bugs of clipped sums: clipping, sampling, and what a sum is divided by."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

import torch

from fedhead.client import gradients, hooked
from fedhead.client.gradients import ClosedForm, GradientPath
from fedhead.client.training import Trainer
from fedhead.common.features import FeatureSet
from fedhead.common.privacy import noise

wrapped = run_path(str(Path(__file__).with_name("planting.py")))["wrapped"]


def clipping_norm_half_as_much_again(monkeypatch):
    wrapped(
        monkeypatch, ClosedForm, "begin",
        lambda real, self, features, targets, norm: real(self, features, targets, 1.5 * norm),
    )  # fmt: skip


def clipping_a_batch_at_a_time(monkeypatch):
    def clipped(x, y, weight, bias, clipping_norm, *, reach=None, scale=None, hot=None):
        if scale is None:
            scale = torch.ones(len(x))
        seen = (x * scale[:, None]).nan_to_num(0.0)
        g = torch.softmax(seen @ weight.t() + (0 if bias is None else bias), 1)
        g[torch.arange(len(y)), y] -= 1
        whole, of_bias = g.t() @ seen, g.sum(0)
        norm = torch.sqrt(whole.square().sum() + of_bias.square().sum())
        factor = min(1.0, clipping_norm / max(float(norm), 1e-12))
        return whole * factor, None if bias is None else of_bias * factor

    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", clipped)


def clipping_norm_half_as_much_again_on_any_path(monkeypatch):
    wrapped(
        monkeypatch, GradientPath, "begin",
        lambda real, self, features, targets, norm: real(self, features, targets, 1.5 * norm),
    )  # fmt: skip


def clipping_a_batch_by_its_mean_norm(monkeypatch):
    monkeypatch.setattr(
        hooked, "clip_factors", lambda norms, norm: torch.ones_like(norms) * (norm / norms.mean()).clamp(max=1)
    )


def a_layer_left_out_of_the_norm(monkeypatch):
    """The last layer's weight, which is the smallest."""

    real = hooked.linear_norms

    def norms(layer, activations, backprops):
        found = real(layer, activations, backprops)
        if layer.out_features == 10:
            found[layer.weight] = torch.zeros_like(found[layer.weight])
        return found

    monkeypatch.setattr(hooked, "linear_norms", norms)


def sampling_twice_as_often(monkeypatch):
    real = noise.poisson_sample
    monkeypatch.setattr(
        noise, "poisson_sample", lambda records, rate, generator: real(records, min(1.0, 2 * rate), generator)
    )


def shuffled_batches(monkeypatch):
    """An epoch in shuffled batches of fixed size, accounted as Poisson samples."""
    waiting: dict[int, list[torch.Tensor]] = {}

    def sample(records, rate, generator):
        size, left = round(records * rate), waiting.setdefault(records, [])
        if not size:
            return torch.empty(0, dtype=torch.int64)
        if not left:
            order = torch.randperm(records, generator=generator)
            left.extend(order[start : start + size].sort().values for start in range(0, records - size + 1, size))
        return left.pop()

    monkeypatch.setattr(noise, "poisson_sample", sample)


def divisor_from_the_true_count(monkeypatch):
    wrapped(
        monkeypatch, Trainer, "_private",
        lambda real, self, features, targets, plan, streams: real(
            self, features, targets, replace(plan, declared_records=max(1, len(features))), streams
        ),
    )  # fmt: skip


def a_looser_clip_for_one_label(monkeypatch):
    """A hundredth too much, for records of one label only: nothing that noise would let show."""
    real = gradients.linear_softmax_clipped_sum

    def clipped(x, y, weight, bias, clipping_norm, *, reach=None, scale=None, hot=None):
        rest = {"reach": reach, "scale": scale}
        parts = []
        for chosen, norm in ((y == 3, 1.01 * clipping_norm), (y != 3, clipping_norm)):
            mine = {name: None if value is None else value[chosen] for name, value in rest.items()}
            parts.append(real(x[chosen], y[chosen], weight, bias, norm, **mine))
        return parts[0][0] + parts[1][0], None if bias is None else parts[0][1] + parts[1][1]

    monkeypatch.setattr(gradients, "linear_softmax_clipped_sum", clipped)


def sampling_by_label(monkeypatch):
    """Records of one label are drawn half as often again."""
    seen: list[torch.Tensor] = []
    wrapped(
        monkeypatch, Trainer, "_private",
        lambda real, self, features, targets, plan, streams: (
            seen.append(targets), real(self, features, targets, plan, streams)
        )[1],
    )  # fmt: skip

    def sample(records, rate, generator):
        rates = torch.full((records,), float(rate))
        rates[seen[-1] == 0] *= 1.8
        return (torch.rand(records, generator=generator) < rates.clamp(max=1)).nonzero().flatten()

    monkeypatch.setattr(noise, "poisson_sample", sample)


def records_of_persons_clipped_by_themselves(monkeypatch):
    """Each record is clipped although the unit is a person."""

    def private(real, self, features, targets, plan, streams):
        if targets.dim() == 2 and len(targets):
            features, targets = FeatureSet(features.values), targets[targets >= 0]
        real(self, features, targets, plan, streams)

    wrapped(monkeypatch, Trainer, "_private", private)
