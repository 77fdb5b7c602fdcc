"""Private training of a head on features, at one data holder, in one round.

Nothing that depends on the records leaves this module but the noised parameters: divisor, sample rate and number of
steps are declared, and no loss, norm or count is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedhead.client.gradients import ClosedForm, Features, losses_of, of_persons, persons_at_once, without_unusable
from fedhead.client.paths import make_path
from fedhead.common.config.schema import Optimizer
from fedhead.common.errors import InputError
from fedhead.common.models.memory import records_at_once
from fedhead.common.models.trainable import Trainable
from fedhead.common.privacy.clipping import finite_records
from fedhead.common.privacy.conditioning import check_weights
from fedhead.common.privacy.events import Event, NoPrivacyEvent, event_of
from fedhead.common.privacy.lattice import MOST_RECORDS, check_sums
from fedhead.common.privacy.noise import Streams
from fedhead.common.privacy.optimizers import PrivateOptimizer, add_pull, begin_round, make_optimizer
from fedhead.common.privacy.summing import AT_ONCE, rounding_records
from fedhead.common.tasks import Task

CHUNK: Final = AT_ONCE
"""Most records whose gradients a deployed holder holds at once, whatever a request says."""
MOST_OPTIMIZERS: Final = 8  # that a trainer keeps
MECHANISMS: Final = ("full-batch", "poisson", "none")


@dataclass(frozen=True)
class StepPlan:
    """All that fixes what a holder does in one round; holds no data.

    Parameters
    ----------
    mechanism : "full-batch", "poisson" or "none"
    noise_multiplier : float, > 0
        Noise standard deviation over clipping norm; not used by "none".
    clipping_norm : float, > 0
        Most that one record moves the gradient sum (L2 norm); not used by "none".
    sample_rate : float in (0, 1], or None
        Probability of each record in a step ("poisson").
    local_steps : int, >= 1
    declared_records : int, >= 1
        The public constant in place of the true count.
    optimizer : SGD, Adam or AdamW
        Settings; the learning rate in them is not read.
    learning_rate : float, > 0
        Of this round.
    proximal_mu : float, >= 0
        Pull to the received parameters (FedProx).
    chunk : int, >= 1
        Most records at once; changes memory, not the result. With dropout it changes which units are dropped.
    """

    mechanism: str
    noise_multiplier: float
    clipping_norm: float
    sample_rate: float | None
    local_steps: int
    declared_records: int
    optimizer: Optimizer
    learning_rate: float
    proximal_mu: float = 0.0
    chunk: int = 4096

    def event(self) -> Event:
        """What a round by this plan spends.

        Raises
        ------
        InputError
            A value breaks its rule.
        """
        if self.declared_records < 1:
            raise InputError(
                f"declared_records is {self.declared_records!r}: it must be at least 1. Declare a constant."
            )
        if self.chunk < 1:
            raise InputError(f"chunk is {self.chunk!r}: it must be at least 1. Leave it out.")
        return event_of(self.mechanism, self.noise_multiplier, self.clipping_norm, self.local_steps, self.sample_rate)

    @property
    def divisor(self) -> float:
        """Expected records in a step, from declared numbers alone."""
        return self.declared_records * (self.sample_rate or 1.0 if self.mechanism == "poisson" else 1.0)


class Trainer:
    """Trains one trainable, round after round and holder after holder.

    Parameters
    ----------
    trainable : Trainable
        Trained in place; load the received parameters into it before a round. In float64 for a deployment's streams:
        features are converted as they are read.
    task : Task
    path : str, optional
        Gradient path (`fedhead.client.paths`); default the quickest.
    most_records : int, optional
        A public number that a deployed holder's records are not more than; the fewer, the longer weights may be.

    Notes
    -----
    Optimizers and gradient paths are made once and start every round without memory of the last.
    """

    def __init__(
        self, trainable: Trainable, task: Task, path: str | None = None, most_records: int = MOST_RECORDS
    ) -> None:
        self.most_records = most_records
        self.trainable = trainable
        self.task = task
        self.path = make_path(trainable, task, path)
        self.parameters: list[nn.Parameter] = list(trainable.trained().values())
        self._optimizers: dict[Optimizer, PrivateOptimizer] = {}
        self._draws = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in trainable.modules())

    def round(self, features: Features, targets: Tensor, plan: StepPlan, streams: Streams) -> Event:
        """Take the plan's local steps on a holder's records.

        Parameters
        ----------
        features : Features
            N records; N may be 0, and the steps then release noise alone.
        targets : Tensor, int64, shape (N,), or (N, T) of N persons
        plan : StepPlan
        streams : Streams
            Of this holder and round: noise, sampling and dropout, each from a stream of its own.

        Returns
        -------
        Event
            What was spent. It depends on the plan only.

        Raises
        ------
        InputError
            The plan breaks a rule, features and targets differ in length, or the streams are a deployment's and the
            sums are not in float64, or of more than `most_records`, or the weights are of a size that can't be trained.
        RunError
            The streams are a deployment's and a sum is out of range: nothing of the round may leave.

        Notes
        -----
        Guarantee: with "full-batch" or "poisson", the change of the parameters is the event's mechanism applied to
        the records, under adding or removing one; what follows the noise (divisor, pull, optimizer) reads no record.
        """
        event = plan.event()
        if len(features) != len(targets):
            raise InputError("targets differ in number from features: each record must have one. Rebuild the features.")
        self.trainable.train()
        if isinstance(event, NoPrivacyEvent):
            self._plain(features, targets, plan, streams)
        else:
            if not streams.seeded:
                records = len(features)
                if of_persons(targets):
                    records = rounding_records((targets >= 0).sum(1).cpu().numpy(), plan.chunk)
                check_sums(records, self.parameters, self.most_records)
            self._private(features, targets, plan, streams)
        return event

    def check_weights(self, weights: Sequence[Tensor], clipping_norm: float, *, persons: bool) -> None:
        """Refuse weights of the trained part with which rounding would show in what a deployed holder releases.

        Raises
        ------
        InputError
            See `fedhead.common.privacy.conditioning.check_weights`.
        """
        linear = isinstance(self.path, ClosedForm) and self.trainable.normalize
        check_weights(weights, clipping_norm, linear=linear, persons=persons, records=self.most_records)

    def optimizer_of(self, settings: Optimizer) -> PrivateOptimizer:
        """The private optimizer that rounds with these settings use; an audit attaches its step hook to it."""
        found = self._optimizers.get(settings)
        if found is None:
            if len(self._optimizers) >= MOST_OPTIMIZERS:  # settings arrive with requests
                self._optimizers.clear()
            found = self._optimizers[settings] = PrivateOptimizer(make_optimizer(settings, self.parameters))
        return found

    def _private(self, features: Features, targets: Tensor, plan: StepPlan, streams: Streams) -> None:
        optimizer, path, records = self.optimizer_of(plan.optimizer), self.path, len(features)
        optimizer.begin(
            noise_multiplier=plan.noise_multiplier,
            clipping_norm=plan.clipping_norm,
            divisor=plan.divisor,
            learning_rate=plan.learning_rate,
            proximal_mu=plan.proximal_mu,
        )
        path.begin(features, targets, plan.clipping_norm)
        try:
            chunk = path.records_at_once(plan.chunk)
            if plan.mechanism == "poisson":
                steps: Iterable[Sequence[Any]] = self._sampled(records, plan, streams, chunk)
            else:
                everything = [slice(start, min(start + chunk, records)) for start in range(0, records, chunk)]
                steps = repeat(everything, plan.local_steps)
            for step, pieces in enumerate(steps):
                if not streams.seeded:
                    self.check_weights(self.parameters, plan.clipping_norm, persons=of_persons(targets))
                with self._dropout(streams, step) if self._draws else nullcontext():
                    for rows in pieces:
                        path.add_rows(rows)
                optimizer.noise = streams.noise(step)
                optimizer.step()
                optimizer.zero_grad()
        finally:
            path.end()
            optimizer.zero_grad()

    def _sampled(self, records: int, plan: StepPlan, streams: Streams, chunk: int) -> Iterator[Sequence[Any]]:
        """Each step's Poisson sample, in pieces; steps that fit in a chunk together are read together."""
        assert plan.sample_rate is not None  # held by plan.event()
        waiting: list[Tensor] = []
        together = 0
        for step in range(plan.local_steps):
            sample = streams.sample(step, records, plan.sample_rate)
            size = sample.shape[0]
            if waiting and together + size > chunk:
                yield from self._read(waiting, chunk)
                waiting, together = [], 0
            waiting.append(sample)
            together += size
        yield from self._read(waiting, chunk)

    def _read(self, samples: list[Tensor], chunk: int) -> Iterator[Sequence[Any]]:
        if len(samples) == 1 and samples[0].shape[0] > chunk:
            yield torch.split(samples[0], chunk)
            return
        for sample, rows in zip(samples, self.path.read(samples), strict=True):
            yield (rows,) if sample.shape[0] else ()

    def _plain(self, features: Features, targets: Tensor, plan: StepPlan, streams: Streams) -> None:
        """Steps without privacy: the plain gradient of the summed loss over the same divisor."""
        optimizer = self.optimizer_of(plan.optimizer).original_optimizer
        begin_round(optimizer, plan.learning_rate)
        received = [p.detach().clone() for p in self.parameters] if plan.proximal_mu else []
        chunk = plan.chunk
        if not of_persons(targets):
            chunk = records_at_once(self.trainable, features, chunk)
        elif len(features):
            chunk = persons_at_once(chunk, targets, features.batch(slice(0, 1))[0].shape[-1])
        for step in range(plan.local_steps):
            optimizer.zero_grad(set_to_none=True)
            with self._dropout(streams, step) if self._draws else nullcontext():
                for start in range(0, len(features), chunk):
                    rows = slice(start, min(start + chunk, len(features)))
                    losses = self._plain_losses(features, targets, rows)
                    torch.autograd.backward(losses.sum() / plan.divisor)
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if received:
                add_pull(self.parameters, plan.proximal_mu, received)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _plain_losses(self, features: Features, targets: Tensor, rows: slice) -> Tensor:
        """Losses of some records, or persons, without those that aren't finite."""
        first = self.parameters[0]
        values, lengths = features.batch(rows)
        wanted = targets[rows]
        if of_persons(wanted):
            values, wanted = without_unusable(values, wanted[:, : values.shape[1]])
        else:
            keep = finite_records(values, lengths)
            values, wanted = values[keep], wanted[keep]
            lengths = None if lengths is None else lengths[keep].to(first.device)
        return losses_of(
            self.trainable, self.task, values.to(first.device, first.dtype), lengths, wanted.to(first.device)
        )

    @contextmanager
    def _dropout(self, streams: Streams, step: int) -> Iterator[None]:
        """Draw dropout from the step's stream; torch's global generator is put back afterwards."""
        device = self.parameters[0].device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            source = streams.generator(step, "dropout")
            if streams.seeded or device.type != "cpu":
                torch.manual_seed(int(torch.randint(2**62, (), generator=source)))
            else:
                torch.set_rng_state(source.get_state())  # manual_seed keeps 32 bits
            yield
