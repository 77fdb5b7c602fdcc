"""Privacy bugs in the training path, each planted into production code by a monkeypatch; see test_mutants.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch

from fedhead.client import admission, app, gradients, hooked
from fedhead.client.gradients import ClosedForm, GradientPath
from fedhead.client.training import Trainer
from fedhead.client.workplace import Workplace
from fedhead.common.errors import Refused
from fedhead.common.features import FeatureSet
from fedhead.common.privacy import noise
from fedhead.common.privacy.optimizers import PrivateOptimizer
from fedhead.common.privacy.secure import LatticeNoise

MANY = {
    "privacy.mechanism": "poisson", "privacy.sample_rate": 0.2, "training.local_steps": 8, "training.rounds": 40
}  # fmt: skip
DROPPING = {"model.head": {"kind": "mlp", "hidden": [24], "dropout": 0.2}, "training.rounds": 8}
"""No closed form: canaries are planted gradients."""
POISSON = {"privacy.mechanism": "poisson", "privacy.sample_rate": 0.1, "training.local_steps": 4, "training.rounds": 12}


@dataclass(frozen=True)
class Mutant:
    """A planted bug, and which check must name it."""

    name: str
    plant: Callable[[Any], None]
    caught_by: str  # name of a check that must fail
    says: str  # pattern that its meaning, in small letters, must hold: the fault's name
    changes: dict[str, Any]
    seed: int | None = 7  # None: the noise of a deployment


def _wrapped(monkeypatch, owner, name, around):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, wraps(real)(lambda *args, **kwargs: around(real, *args, **kwargs)))


def _noise(monkeypatch, change):
    """Let `change(optimizer, p, sum)` stand in for the noised sum of a parameter."""

    def add_noise(self):
        for p in self._params:
            p.grad = change(self, p, p.summed_grad)
            p.summed_grad._processed = True

    monkeypatch.setattr(PrivateOptimizer, "add_noise", add_noise)


def _drawn(optimizer, total, factor=1.0):
    return optimizer.noise.add(
        total, noise_multiplier=factor * optimizer.noise_multiplier, clipping_norm=optimizer.max_grad_norm
    )


def no_noise(monkeypatch):
    _noise(monkeypatch, lambda optimizer, p, total: total.clone())


def noise_halved(monkeypatch):
    _noise(monkeypatch, lambda optimizer, p, total: _drawn(optimizer, total, 0.5))


def noise_missing_on_the_bias(monkeypatch):
    _noise(monkeypatch, lambda optimizer, p, total: total.clone() if p.dim() == 1 else _drawn(optimizer, total))


def noise_missing_on_a_twentieth(monkeypatch):
    def change(optimizer, p, total):
        noised = _drawn(optimizer, total)
        left_out = torch.arange(total.numel()).view(total.shape) % 20 == 3
        return torch.where(left_out, total, noised)

    _noise(monkeypatch, change)


def same_noise_every_step(monkeypatch):
    _wrapped(
        monkeypatch, noise._SimulationStreams, "_seed",
        lambda real, self, step, purpose: 5 if purpose == "noise" else real(self, step, purpose),
    )  # fmt: skip


def clipping_norm_half_as_much_again(monkeypatch):
    _wrapped(
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
    _wrapped(
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
    _wrapped(
        monkeypatch, Trainer, "_private",
        lambda real, self, features, targets, plan, streams: real(
            self, features, targets, replace(plan, declared_records=max(1, len(features))), streams
        ),
    )  # fmt: skip


def noise_used_again_in_a_retried_round(monkeypatch):
    """A holder that keys its noise by run and round: a retry with another head draws the same."""

    class Keyed(noise._SimulationStreams):
        def __init__(self, round):
            super().__init__(11, "holder", round)
            self.seeded, self.source = False, noise.CSPRNG

        def noise(self, step):
            generator = self.generator(step, "noise")

            class Wide:
                def add(self, total, *, noise_multiplier, clipping_norm):
                    scale = noise_multiplier * clipping_norm * (1 + 2.0**-10)
                    return total + scale * torch.randn(total.shape, dtype=total.dtype, generator=generator)

            return Wide()

    monkeypatch.setattr(Workplace, "streams", lambda self, request, name: Keyed(request.round))


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


def noise_halved_where_records_are_few(monkeypatch):
    def private(real, self, features, targets, plan, streams):
        few = 0 < len(targets) < 20
        real(self, features, targets, replace(plan, noise_multiplier=plan.noise_multiplier / (1 + few)), streams)

    _wrapped(monkeypatch, Trainer, "_private", private)


def a_leak_in_the_last_bits(monkeypatch):
    """The number of records, a few millionths of a step beside the noised parameters."""

    def private(real, self, features, targets, plan, streams):
        before = self.parameters[0].detach().clone()
        real(self, features, targets, plan, streams)
        with torch.no_grad():
            moved = (self.parameters[0] - before).abs().max()
            self.parameters[0].add_(moved * 1e-6 * len(targets) / 256)

    _wrapped(monkeypatch, Trainer, "_private", private)


def sampling_by_label(monkeypatch):
    """Records of one label are drawn half as often again."""
    seen: list[torch.Tensor] = []
    _wrapped(
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


def a_tenth_of_the_noise_between_request_and_training(monkeypatch):
    real = app.step_plan
    monkeypatch.setattr(
        app, "step_plan",
        lambda *args: (plan := real(*args)) and replace(plan, noise_multiplier=plan.noise_multiplier / 10),
    )  # fmt: skip


def a_tenth_of_the_noise_where_there_are_records(monkeypatch):
    """Only on the way from a request to its reply; rounds without records have all of theirs."""

    def train(real, workplace, name, records, asked, streams):
        if len(records):
            noise = asked.request.noise_multiplier / 10
            asked = asked._replace(request=asked.request.model_copy(update={"noise_multiplier": noise}))
        return real(workplace, name, records, asked, streams)

    _wrapped(monkeypatch, app, "_train", train)


def a_record_counted_again_and_again(monkeypatch):
    """On the way from a request to its reply, the first record is there 400 times."""

    def train(real, workplace, name, records, asked, streams):
        if len(records):
            records = records.take(np.concatenate([np.arange(len(records)), np.zeros(399, dtype=np.int64)]))
        return real(workplace, name, records, asked, streams)

    _wrapped(monkeypatch, app, "_train", train)


def a_repeated_round_trained_again(monkeypatch):
    """And what the ledger then says is not heard: by itself it lets no second release out."""

    def release(real, self, holder, admitted, content):
        try:
            return real(self, holder, admitted, content)
        except Refused:
            return admitted.mark

    _wrapped(monkeypatch, admission.Admission, "admit", lambda real, *args: replace(real(*args), payload=None))
    _wrapped(monkeypatch, admission.Admission, "release", release)


def a_nudge_after_training(monkeypatch):
    """The number of records is added to the head after the trainer's last step, before it is kept and sent."""

    def train(real, workplace, name, records, asked, streams):
        real(workplace, name, records, asked, streams)
        with torch.no_grad():
            next(iter(workplace.trainable.trained().values())).add_(1e-3 * len(records))
        trained = workplace.trainable.trained()
        event = admission.event_of_request(asked.request).to_json()
        return app.protocol.released(trained, asked.request.declared_records, name, event, None)

    _wrapped(monkeypatch, app, "_train", train)


def the_same_noise_every_step_of_a_deployment(monkeypatch):
    class Same(noise._SimulationStreams):
        def __init__(self, number):
            super().__init__(11, "holder", 1)
            self.seeded, self.source, self.number = False, noise.CSPRNG, number

        def noise(self, step):
            generator = self.generator(0, "noise")

            class Wide:
                def add(self, total, *, noise_multiplier, clipping_norm):
                    scale = noise_multiplier * clipping_norm * (1 + 2.0**-10)
                    return total + scale * torch.randn(total.shape, dtype=total.dtype, generator=generator)

            return Wide()

    monkeypatch.setattr(Workplace, "streams", lambda self, request, name: Same(request.round))


def records_of_persons_clipped_by_themselves(monkeypatch):
    """Each record is clipped although the unit is a person."""

    def private(real, self, features, targets, plan, streams):
        if targets.dim() == 2 and len(targets):
            features, targets = FeatureSet(features.values), targets[targets >= 0]
        real(self, features, targets, plan, streams)

    _wrapped(monkeypatch, Trainer, "_private", private)


def another_head_in_the_reply(monkeypatch):
    def train(real, workplace, name, records, request, streams):
        content = real(workplace, name, records, request, streams)
        state = workplace.trainable.trained()
        changed = {key: value + len(records) for key, value in state.items()}
        content[app.protocol.ARRAYS] = app.protocol.to_arrays(changed)
        return content

    _wrapped(monkeypatch, app, "_train", train)


def a_loss_in_the_reply(monkeypatch):
    def train(real, workplace, name, records, request, streams):
        content = real(workplace, name, records, request, streams)
        content[app.protocol.METRICS]["loss"] = float(len(records))
        return content

    _wrapped(monkeypatch, app, "_train", train)


def charged_at_twice_the_noise(monkeypatch):
    real = admission.event_of_request
    monkeypatch.setattr(
        admission, "event_of_request",
        lambda request: real(request.model_copy(update={"noise_multiplier": 2 * request.noise_multiplier})),
    )  # fmt: skip


def floats_instead_of_the_lattice(monkeypatch):
    def add(self, total, *, noise_multiplier, clipping_norm):
        return total + noise_multiplier * clipping_norm * (1 + 2.0**-10) * torch.randn_like(total)

    monkeypatch.setattr(LatticeNoise, "add", add)


MECHANISM_MUTANTS = [
    Mutant("no noise", no_noise, "total-variance", "^no noise was added, or", {}),
    Mutant("noise halved", noise_halved, "total-variance", r"^less noise was added than .* 0\.25", {}),
    Mutant("noise missing on the bias", noise_missing_on_the_bias, "group-variance", '^no noise .* to "head.bias"', {}),
    Mutant(
        "noise missing on 5 % of the coordinates",
        noise_missing_on_a_twentieth,
        "coordinate-variance",
        r"on 3\d of \d+ trained numbers\. no noise was added to them",
        {},
    ),
    Mutant("the same noise every step", same_noise_every_step, "repeated-steps", "same noise was used more", {}),
    Mutant(
        "the same noise every step, of a deployment",
        the_same_noise_every_step_of_a_deployment,
        "repeated-steps",
        "same noise was used more",
        {},
        None,
    ),
    Mutant(
        "clipping norm 1.5 times the claim",
        clipping_norm_half_as_much_again,
        "largest-contribution",
        r"like any other is clipped to 1\.5 times",
        {},
    ),
    Mutant("clipping per batch", clipping_a_batch_at_a_time, "exact-sums", "the batch is clipped as one", {}),
    Mutant(
        "sampling rate twice the accounted", sampling_twice_as_often, "batch-mean", r"more often .* 0\.[12]\d*", POISSON
    ),
    Mutant("shuffled batches accounted as Poisson", shuffled_batches, "batch-variance", "fixed size", POISSON),
    Mutant(
        "divisor from the true record count",
        divisor_from_the_true_count,
        "largest-contribution",
        "the divisor follows the true count",
        {},
    ),
    Mutant(
        "clipped 1 % too little, for one label",
        a_looser_clip_for_one_label,
        "exact-sums",
        r"\d of \d+ records count 1\.01 times .* clipped too little",
        {},
    ),
    Mutant("noise halved where records are few", noise_halved_where_records_are_few, "few-variance-7", "few", {}),
    Mutant("a leak in the last bits of the head", a_leak_in_the_last_bits, "replay", "without noise", {}),
    Mutant("sampling by label", sampling_by_label, "participation-by-label", "what they hold", MANY),
    Mutant(
        "a tenth of the noise before training",
        a_tenth_of_the_noise_between_request_and_training,
        "exchange-variance",
        "other noise",
        {},
    ),
    Mutant(
        "a tenth of the noise where there are records",
        a_tenth_of_the_noise_where_there_are_records,
        "exchange-variance",
        "other noise",
        {},
    ),
    Mutant(
        "a record counted again and again", a_record_counted_again_and_again, "exchange-variance", "another sum", {}
    ),
    Mutant("a head nudged after training", a_nudge_after_training, "exchange-head", "something else", {}),
    Mutant(
        "a repeated round trained again",
        a_repeated_round_trained_again,
        "exchange-repeated",
        "a second release of a round",
        {},
        None,
    ),
    Mutant("another head in the reply", another_head_in_the_reply, "exchange-head", "something else", {}),
    Mutant("a loss beside the head", a_loss_in_the_reply, "exchange-beside", "differs with the records", {}),
    Mutant("charged at twice the noise", charged_at_twice_the_noise, "exchange-charged", "charged with", {}),
    Mutant("floats instead of the lattice", floats_instead_of_the_lattice, "lattice", "between the steps", {}, None),
    Mutant("noise reused in a retried round", noise_used_again_in_a_retried_round, "retry", "again", {}, None),
    *(
        Mutant(f"mlp with dropout: {name}", plant, caught_by, says, DROPPING, seed)
        for name, plant, caught_by, says, seed in (
            ("no noise", no_noise, "total-variance", "^no noise was added, or", 7),
            ("noise halved", noise_halved, "total-variance", "^less noise was added than", 7),
            ("noise missing on biases", noise_missing_on_the_bias, "group-variance", '^no noise .* to ".*bias"', 7),
            ("the same noise every step", same_noise_every_step, "repeated-steps", "same noise was used more", 7),
            (
                "clipping norm 1.5 times",
                clipping_norm_half_as_much_again_on_any_path,
                "largest-contribution",
                r"like any other is clipped to 1\.5 times",
                7,
            ),
            ("clipping per batch", clipping_a_batch_by_its_mean_norm, "exact-sums", "the batch is clipped as one", 7),
            ("a layer left out of the norm", a_layer_left_out_of_the_norm, "largest-contribution", "not clipped to", 7),
            ("noise reused in a retry", noise_used_again_in_a_retried_round, "retry", "again", None),
        )
    ),
]
PERSON_MUTANTS = [
    Mutant("persons: no noise", no_noise, "total-variance", "^no noise was added, or", {}),
    Mutant(
        "persons: each record clipped by itself",
        records_of_persons_clipped_by_themselves,
        "largest-contribution",
        "clipped",
        {},
    ),
    Mutant(
        "persons: divisor from the true count",
        divisor_from_the_true_count,
        "largest-contribution",
        "the divisor follows the true count",
        {},
    ),
]
