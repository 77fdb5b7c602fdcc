"""Training simulated data holders side by side: the same numbers as one after another, in fewer and larger operations.

A private step of a small head is some thirty operations on tensors so small that calling them costs more than what
they compute. The in-process engine hands over a whole round before its first message; its holders take each step so:

    samples      each holder's own stream
    products     each holder's own rows and head; all that lies between them in one operation for all holders
    noise        each holder's own stream, the very bits that it would draw alone
    optimizer    the private optimizer, over the heads stacked along a first dimension

A deployment never comes here, nor does `run.exact`. Shapes: H holders, B records of a step, D features, K outputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from fedhead.client.gradients import ClosedForm
from fedhead.client.training import StepPlan, Trainer
from fedhead.common.config.schema import SGD
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.clipping import linear_softmax_clipped_sums
from fedhead.common.privacy.noise import NoiseOfEach, Streams
from fedhead.common.privacy.optimizers import PrivateOptimizer, make_optimizer

log = logging.getLogger("fedhead.client")

LARGEST_GROUP: Final = 2**22  # numbers in the heads of a group and in the features and outputs of one step
LARGEST_HEAD: Final = 2**16  # numbers in a head: a larger one costs its noise, which takes as long side by side
_AHEAD: Final = 2**18  # records whose places are drawn ahead

Key = tuple[str, str]  # a holder's name and the digest of what it was asked


class Member(NamedTuple):
    """A holder that waits for its training."""

    key: Key
    records: Labelled
    streams: Streams


# x of each holder (B_h, D); of all records y, reach, scale, owner: see `linear_softmax_clipped_sums`
_Step = tuple[list[Tensor], Tensor, Tensor, Tensor | None, Tensor]


@dataclass
class Together:
    """The holders of a round that wait for their training, in groups that fit in memory.

    A group is trained when its first member asks, so that one group's heads are kept at a time. What is wrong with a
    group costs its members nothing: `take` gives None, and they are trained one at a time.
    """

    trainer: Trainer
    _groups: dict[Key, tuple[list[Member], StepPlan]] = field(default_factory=dict)
    _finished: dict[Key, list[Tensor]] = field(default_factory=dict)

    def expect(self, members: Sequence[Member], plan: StepPlan) -> None:
        """Take note of holders whose round is reserved and that got the same request; forget those of before."""
        self._groups, self._finished = {}, {}
        if not fits(self.trainer, plan):
            return
        weights, outputs = sum(p.numel() for p in self.trainer.parameters), len(self.trainer.parameters[0])
        group: list[Member] = []
        size = 0
        for member in members:
            if not _fits(member, plan) or member.key in self._groups:
                continue
            width = member.records.features.values.shape[1] + outputs
            needs = weights + width * _expected(len(member.records), plan)
            if size + needs > LARGEST_GROUP or (group and _home(group[0]) != _home(member)):
                group, size = [], 0
            group.append(member)
            self._groups[member.key] = group, plan
            size += needs

    def take(self, key: Key) -> list[Tensor] | None:
        """The parameters that a holder ends its round with, once; None when it is to be trained on its own.

        The trainer's parameters must be those that the holder received.
        """
        group, plan = self._groups.pop(key, ([], None))
        if plan is not None and key not in self._finished and len(group) > 1:
            self._finished = {}
            try:
                heads = train_together(self.trainer, group, plan)
            except Exception:  # whatever it is: each holder meets it on its own, or not at all
                log.exception("holders can't be stepped together: they are trained one at a time")
                self._groups = {}
                return None
            for member, *parameters in zip(group, *heads, strict=True):
                self._finished[member.key] = parameters
        return self._finished.pop(key, None)


def fits(trainer: Trainer, plan: StepPlan) -> bool:
    """Whether rounds by this plan can be taken together: a small linear head in float32, no hook on its steps, SGD.

    Adam divides by what may be rounding alone, so that heads would differ by more than that.
    """
    return (
        plan.mechanism in ("full-batch", "poisson")
        and isinstance(plan.optimizer, SGD)
        and type(trainer.path) is ClosedForm
        and all(p.is_cpu and p.dtype == torch.float32 for p in trainer.parameters)
        and sum(p.numel() for p in trainer.parameters) <= LARGEST_HEAD
        and trainer.optimizer_of(plan.optimizer).step_hook is None
    )


def _fits(member: Member, plan: StepPlan) -> bool:
    """Whether a holder has seeded streams, and records rather than persons, no more than are read at once."""
    features, targets = member.records.features, member.records.targets
    values = features.values
    return (
        member.streams.seeded
        and features.offsets is None
        and values.dim() == 2
        and values.shape[1] > 0
        and values.is_cpu
        and values.is_contiguous()
        and int(values.storage_offset()) % values.shape[1] == 0  # rows of its `_home`
        and targets.shape == (len(features),)
        and (plan.mechanism == "poisson" or len(features) <= plan.chunk)
    )


def _home(member: Member) -> tuple[int, torch.dtype, int]:
    """The tensor that a holder's features are a view of: the members of a group must have it in common."""
    values = member.records.features.values
    return values.untyped_storage().data_ptr(), values.dtype, values.shape[1]


def _expected(records: int, plan: StepPlan) -> int:
    return math.ceil(records * (plan.sample_rate or 1.0)) if plan.mechanism == "poisson" else records


@torch.no_grad()
def train_together(trainer: Trainer, members: Sequence[Member], plan: StepPlan) -> list[Tensor]:
    """Take a plan's local steps for several holders.

    Parameters
    ----------
    trainer : Trainer
        With the received parameters in it; they stay as they are.
    members : sequence of H Member
        No two of one holder; their features are views of one tensor.
    plan : StepPlan

    Returns
    -------
    list of Tensor, shape (H, *shape)
        For each of the trainer's parameters what the holders end with.

    Notes
    -----
    Guarantee: for each holder the same mechanism as `Trainer.round`, from the same samples and the same bits of noise;
    sums differ by rounding alone. No holder's records, head or noise have a part in what another ends with.
    """
    assert isinstance(trainer.path, ClosedForm), "held by `fits`"
    heads = [nn.Parameter(p.detach().expand(len(members), *p.shape).clone()) for p in trainer.parameters]
    optimizer = PrivateOptimizer(make_optimizer(plan.optimizer, heads))
    optimizer.begin(
        noise_multiplier=plan.noise_multiplier,
        clipping_norm=plan.clipping_norm,
        divisor=plan.divisor,
        learning_rate=plan.learning_rate,
        proximal_mu=plan.proximal_mu,
    )
    weights, biases = heads[0].detach(), heads[1].detach() if len(heads) > 1 else None
    rows = _Rows(trainer.path, members)
    steps = rows.sampled(plan) if plan.mechanism == "poisson" else rows.whole(plan)
    for step, (xs, y, reach, scale, owner) in enumerate(steps):
        sums = linear_softmax_clipped_sums(
            xs, y, weights, biases, plan.clipping_norm, reach=reach, scale=scale, owner=owner
        )
        for p, total in zip(optimizer.params, sums, strict=False):  # a head without bias has one sum
            p.summed_grad = total
        optimizer.noise = NoiseOfEach([member.streams.noise(step) for member in members])
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in heads]


class _Rows:
    """The records of a group, holder after holder, as `linear_softmax_clipped_sums` takes them."""

    def __init__(self, path: ClosedForm, members: Sequence[Member]) -> None:
        self.members = members
        self.values = [member.records.features.values for member in members]
        self.lengths = [len(values) for values in self.values]
        known = [path.measured(member.records.features) for member in members]
        self.y = torch.cat([member.records.targets for member in members])
        self.reach = torch.cat([reach for reach, _, _ in known])
        scales = [scale for _, scale, _ in known if scale is not None]
        self.scale = torch.cat(scales) if scales else None
        self.broken = None if all(broken is None for _, _, broken in known) else ~self.reach.isfinite()

    def whole(self, plan: StepPlan) -> Iterator[_Step]:
        """Full batch: the same records in every step."""
        xs = [values.float() for values in self.values]
        if self.broken is not None:
            parts = zip(xs, torch.split(self.broken, self.lengths), strict=True)
            xs = [x.masked_fill(broken[:, None], 0.0) for x, broken in parts]
        owner = torch.arange(len(xs)).repeat_interleave(torch.tensor(self.lengths))
        return repeat((xs, self.y, self.reach, self.scale, owner), plan.local_steps)

    def sampled(self, plan: StepPlan) -> Iterator[_Step]:
        """Each step's Poisson samples, gathered from all holders at once; samples of a few steps are drawn ahead."""
        rate, count = plan.sample_rate, len(self.members)
        assert rate is not None  # held by plan.event()
        lengths, width = torch.tensor(self.lengths), self.values[0].shape[1]
        # where each holder's records begin: among those of the group, and in the tensor that all features are views of
        firsts = lengths.cumsum(0) - lengths
        places = torch.tensor([int(values.storage_offset()) // width for values in self.values])
        last = int((places + lengths).max())
        everything = self.values[0].as_strided((last, width), (width, 1), 0)
        ahead = max(1, _AHEAD // max(1, sum(_expected(length, plan) for length in self.lengths)))
        for start in range(0, plan.local_steps, ahead):
            steps = range(start, min(start + ahead, plan.local_steps))
            samples = [
                member.streams.sample(step, length, rate)
                for step in steps
                for member, length in zip(self.members, self.lengths, strict=True)
            ]
            sizes = torch.tensor([sample.shape[0] for sample in samples])
            owner, index = torch.arange(count).repeat(len(steps)).repeat_interleave(sizes), torch.cat(samples)
            mine, place = index + firsts[owner], index + places[owner]
            each = sizes.view(-1, count)
            totals = each.sum(1).tolist()
            columns = [
                repeat(None, len(steps)) if part is None else torch.split(part[mine], totals)
                for part in (self.y, self.reach, self.scale, self.broken)
            ]
            moved = (torch.split(owner, totals), torch.split(place, totals), each.tolist())
            for y, reach, scale, broken, whose, where, counts in zip(*columns, *moved, strict=True):
                x = everything.index_select(0, where).float()
                if broken is not None:
                    x.masked_fill_(broken[:, None], 0.0)
                yield list(torch.split(x, counts)), y, reach, scale, whose
