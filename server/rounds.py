"""What stands around Flower's strategy in every round: who is asked, what is asked, and which replies count.

`around(strategy class)` makes a strategy that asks the cohort of the round, sends the round's request, drops replies
that don't have the head's shapes or finite values, sorts the others by holder, so that sums don't depend on the order
of arrival, and writes down what the round cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedhead.common import protocol
from fedhead.common.errors import InputError, Refused, RunError
from fedhead.common.privacy.events import (
    MOST_STEPS,
    CountEvent,
    Event,
    GaussianEvent,
    NoPrivacyEvent,
    PoissonEvent,
    event_of,
    from_json,
)
from fedhead.common.privacy.filters import charge_of
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import INVALID_REQUEST, NOT_READY, OLD_LEDGER, TEXTS, UNSPENT
from fedhead.common.round_request import RoundRequest
from fedhead.server.central import Central
from fedhead.server.cohorts import Cohorts
from fedhead.server.marks import newest
from fedhead.server.roster import Roster

log = logging.getLogger("fedhead.server")

ROUNDS_WITHOUT_UPDATE = 3
ABSENT, SILENT = "not connected when the round began", "no reply arrived"


@dataclass
class RoundRecord:
    """What one round cost and who took part.

    `events` is holder -> its mechanism events (JSON), `counts` is holder -> its noised count of correct answers.
    """

    round: int
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    holders: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)
    events: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


@dataclass
class Rounds:
    """Settings and history of the rounds of a run.

    Attributes
    ----------
    cohorts : Cohorts
    roster : Roster
        Who of a cohort can be asked, and at which node.
    request : callable
        Round -> its request.
    like : mapping
        Name -> tensor of the shape that every update must have.
    uniform : bool
        Same weight for every holder instead of its declared record count.
    done : int
        Rounds of an earlier start of the same run: Flower counts from 1 again, we go on from here.
    marks : dict of str to Mark
        Holder -> the last of its ledger that was seen. It goes back with every request, so that a holder notices when
        its ledger was replaced by an older copy.
    central : Central, optional
        Unit `holder`: clips and noises the updates before the strategy sees them.
    least : int
        Fewest updates that make a new head; a round with fewer leaves it as it was.
    run : str
        Identifier of the run, as the ledgers have it.
    deadline : float or None
        Seconds after which a round is over: replies that come later don't count, and a holder doesn't begin it.
    again : int or None
        The round that an earlier start of the run may have asked: a holder that can't be asked now may have spent it.
    declared : mapping or None
        Holder -> the public constant that it divides by in place of the request's, and that its update weighs here;
        None in a simulation.
    notes : dict of str to str
        Holder -> what a reader should know of its weight.
    """

    cohorts: Cohorts
    roster: Roster
    request: Callable[[int], RoundRequest]
    like: Mapping[str, Tensor]
    uniform: bool = False
    done: int = 0
    history: list[RoundRecord] = field(default_factory=list)
    marks: dict[str, Mark] = field(default_factory=dict)
    central: Central | None = None
    least: int = 1
    run: str = ""
    deadline: float | None = None
    again: int | None = None
    declared: Mapping[str, int] | None = None
    notes: dict[str, str] = field(default_factory=dict)


def around(base: type[FedAvg], options: Mapping[str, Any], rounds: Rounds) -> FedAvg:
    """A strategy of Flower's with our rounds around it; behaves as the base in how updates become the next head."""
    kind = type(f"Rounds{base.__name__}", (_InRounds, base), {})
    strategy: FedAvg = kind(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=1,  # who is asked, and how long is waited for them, is the roster's
        min_available_nodes=1,
        weighted_by_key=protocol.WEIGHT,
        arrayrecord_key=protocol.ARRAYS,
        configrecord_key=protocol.CONFIG,
        **options,
    )
    strategy.rounds = rounds  # type: ignore[attr-defined]
    return strategy


class _Cohort:
    """The part of a Grid that a strategy uses to choose nodes, showing one round's cohort only."""

    def __init__(self, node_ids: list[int]) -> None:
        self.node_ids = node_ids

    def get_node_ids(self) -> list[int]:
        return self.node_ids


class _InRounds(FedAvg):
    """Goes before the base strategy in the order of method resolution."""

    rounds: Rounds

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the round's cohort, in the order of the holders' names."""
        server_round += self.rounds.done
        self._nodes = self.rounds.roster.present(self.rounds.cohorts.of_round(server_round))
        self.rounds.marks = newest(self.rounds.marks, self.rounds.roster.marks())
        self._started, self._sent = time.perf_counter(), arrays  # waiting for holders is no training
        names = sorted(self._nodes)
        order = {self._nodes[name]: i for i, name in enumerate(names)}
        asked = protocol.round_config(self.rounds.request(server_round))
        cohort: Any = _Cohort(list(order))
        messages = list(super().configure_train(server_round, arrays, asked, cohort))
        messages.sort(key=lambda message: order[message.metadata.dst_node_id])
        for name, message in zip(names, messages, strict=True):
            message.content = protocol.with_mark(message.content, self.rounds.marks.get(name))
            if self.rounds.deadline is not None:
                message.metadata.ttl = self.rounds.deadline
        down = protocol.payload_bytes(messages[0].content) * len(messages) if messages else 0
        self.rounds.history.append(RoundRecord(server_round, bytes_down=down))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies that can be used, in the order of the holders' names."""
        server_round += self.rounds.done
        record = self.rounds.history[-1]
        good = self._usable(list(replies), record)
        record.holders = len(good)
        if len(good) < self.rounds.least:
            good = []
            if self.rounds.central is not None:
                record.events = {}  # nothing was noised, and nothing of the updates is used
        elif self.rounds.central is not None:
            asked = self.rounds.cohorts.of_round(server_round)
            good = [self.rounds.central.combine(self.rounds.request(server_round), asked, self._sent, good)]
            record.events = {name: [self.rounds.central.event.to_json()] for name in asked}
        arrays, metrics = super().aggregate_train(server_round, good) if good else (None, None)
        record.seconds = time.perf_counter() - self._started
        self._stop_if_alone(record)
        return None if arrays is None else self._finite(protocol.as_float32(arrays), server_round), metrics

    def _finite(self, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
        try:
            protocol.from_arrays(arrays, self.rounds.like)
        except Refused as error:
            raise RunError(
                f"round {server_round} gave a head that isn't finite: the training diverged. "
                "Lower training.optimizer.learning_rate or strategy.learning_rate."
            ) from error
        return arrays

    def _usable(self, replies: list[Message], record: RoundRecord) -> list[Message]:
        good: list[tuple[str, Message]] = []
        names = {node: name for name, node in self._nodes.items()}
        asked = self.rounds.request(record.round).declared_records
        spent = _asked(self.rounds.request(record.round))
        heard = {reply.metadata.src_node_id for reply in replies}
        missed = [name for name in sorted(self._nodes) if self._nodes[name] not in heard]
        again = record.round == self.rounds.again
        for name in self.rounds.cohorts.of_round(record.round):
            if name not in self._nodes:
                record.refused.append({"holder": name, "code": 0, "text": ABSENT})
                if again:
                    record.events[name] = spent
            elif name in missed:  # it may have released: what was asked counts as spent
                record.refused.append({"holder": name, "code": 0, "text": SILENT})
                record.events[name] = spent
        # Codes that no holder has are the link's: the node was restarted, and opens its records before it is asked.
        lost = [names[_sender(reply)] for reply in replies if _lost(reply) and _sender(reply) in names]
        self.rounds.roster.missed(missed + lost)
        for reply in replies:
            name = names.get(reply.metadata.src_node_id, str(reply.metadata.src_node_id))
            if reply.has_error():
                holder, code, text = protocol.read_refusal(reply)
                if reply.metadata.src_node_id not in names and holder in self._nodes:
                    name = holder  # a node is the holder that it said it was first: nobody spends in another's name
                if name not in self._nodes:
                    continue  # the link's word for a node that is among the missed
                record.refused.append({"holder": name, "code": code, "text": text})
                mark = protocol.read_mark(reply)
                if mark is not None and holder == name:
                    self.rounds.marks = newest(self.rounds.marks, {name: mark})
                # it may have been charged, or released: what was asked counts as spent
                if code not in UNSPENT or (again and code in (NOT_READY, OLD_LEDGER)):
                    record.events[name] = spent
                continue
            record.bytes_up += protocol.payload_bytes(reply.content)
            # A release that arrived was spent, whatever becomes of it, so its event counts before anything is checked.
            record.events[name] = [_event(reply, spent[0]), *spent[1:]]
            wanted = self._weight(name, asked)
            mark, count = protocol.read_mark(reply), protocol.read_count(reply)
            if mark is not None:
                self.rounds.marks = newest(self.rounds.marks, {name: mark})
            if count is not None and len(spent) > 1:
                record.counts[name] = count
            try:
                weight = protocol.read_update(reply, self.rounds.like)
            except Refused as refused:
                # Under the unit `holder`, whether an update is finite is what the noise hides: it counts as zero.
                if self.rounds.central is None or refused.code != INVALID_REQUEST:
                    record.refused.append({"holder": name, "code": 0, "text": "the update can't be used"})
                    continue
                weight = wanted
            if weight != wanted:
                self._note(name, weight, wanted)
                protocol.set_weight(reply, wanted)
            good.append((name, reply))
        return [reply for _, reply in sorted(good, key=lambda pair: pair[0])]

    def _weight(self, name: str, asked: int) -> int:
        """What a holder's update weighs; never what its reply says, which would let it outweigh all others."""
        if self.rounds.uniform:
            return 1
        return asked if self.rounds.central is not None else (self.rounds.declared or {}).get(name, asked)

    def _note(self, name: str, said: int | float, weight: int) -> None:
        """Say once in a run that a holder divides by another constant than its update is weighed by."""
        if self.rounds.declared is None or self.rounds.uniform or self.rounds.central or name in self.rounds.notes:
            return
        self.rounds.notes[name] = note = _weight_note(name, said, weight)
        log.warning("%s", note)

    def _stop_if_alone(self, record: RoundRecord) -> None:
        least = self.rounds.least
        if record.holders >= least:
            return
        recent = self.rounds.history[-ROUNDS_WITHOUT_UPDATE:]
        # who was cut off or restarted may come back, where anybody may
        silent = self.rounds.deadline is not None and any(
            item["text"] in (ABSENT, SILENT) or (item["code"] and item["code"] not in TEXTS) for item in record.refused
        )
        if (len(self.rounds.history) == 1 and not silent) or (
            len(recent) == ROUNDS_WITHOUT_UPDATE and not any(past.holders >= least for past in recent)
        ):
            reasons = sorted({f"{item['code']} {item['text']}" for item in record.refused}) or ["no reply"]
            # every further round would be spent by those who answer, for the same head
            got = "no update from any holder" if least == 1 else f"{record.holders} of at least {least} updates"
            raise RunError(
                f"round {record.round} got {got} ({'; '.join(reasons)}). "
                "The holders' own logs say more; the last head is kept."
            )


def _asked(request: RoundRequest) -> list[str]:
    """The events that a request asks for, as JSON: the training's, then the count's."""
    event = event_of(
        request.mechanism, request.noise_multiplier, request.clipping_norm, request.local_steps, request.sample_rate
    )
    counted = [] if request.metrics_noise is None else [CountEvent(request.metrics_noise, 1.0, 1)]
    return [one.to_json() for one in (event, *counted)]


def _event(reply: Message, asked: str) -> str:
    """The event that a holder says it released where that spends more than what was asked; else what was asked."""
    try:
        said = from_json(protocol.read_release(reply)[1])
    except InputError:
        return asked
    if said == from_json(asked) or not _spends_more(said, from_json(asked)):
        return asked
    # Other sampling than was asked for: a different one each round would keep the accountant busy for hours.
    return (NoPrivacyEvent(said.steps) if isinstance(said, PoissonEvent) else said).to_json()


def _weight_note(name: str, said: int | float, weight: int) -> str:
    if not isinstance(said, int) or not 1 <= said <= MOST_STEPS:
        return f"{name} sent a weight that is no number of records; its updates weigh {weight}."
    return (
        f"{name} divides by {said} records and its updates weigh {weight}: each of its records counts "
        f"{weight / said:.3g} times as much as it should. Set declared_records.{name} = {said} in server.toml, or ask "
        f"{name} for limits.release.declared_records = {weight}."
    )


def _sender(reply: Message) -> int:
    return int(reply.metadata.src_node_id)


def _lost(reply: Message) -> bool:
    return reply.has_error() and reply.error.code not in TEXTS


def _spends_more(said: Event, asked: Event) -> bool:
    """Whether an event costs more than the other of its kind, or has no privacy at all.

    Nothing else is believed: a request fixes the event, so that any other event says that something is wrong, and
    accountants take long for some of them.
    """
    if isinstance(said, NoPrivacyEvent) or isinstance(asked, NoPrivacyEvent) or type(said) is not type(asked):
        return isinstance(said, NoPrivacyEvent)
    if isinstance(said, GaussianEvent | CountEvent) and isinstance(asked, GaussianEvent | CountEvent):
        return charge_of(said).mu_squared > charge_of(asked).mu_squared
    sampled = getattr(said, "sample_rate", 1.0) >= getattr(asked, "sample_rate", 1.0)
    return sampled and said.noise_multiplier <= asked.noise_multiplier and said.steps >= asked.steps
