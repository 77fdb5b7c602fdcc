"""The data holder's side of a run, as Flower starts it: check the request, admit it, train privately, release.

What leaves is in fedhead.common.protocol. Every exception is caught here: the server gets a fixed code and text, the
holder's own log gets the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedhead.client.holder import load_holder
from fedhead.client.metrics import noised_count
from fedhead.client.timing import limited, over, round_limit, wait_until
from fedhead.client.together import Member
from fedhead.client.training import CHUNK, StepPlan
from fedhead.client.workplace import Workplace, is_open, workplace_of
from fedhead.common import protocol
from fedhead.common.config.limits import Limits
from fedhead.common.errors import FedheadError, InputError, Refused
from fedhead.common.failpoints import reach
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.events import Event, NoPrivacyEvent
from fedhead.common.privacy.ledger import LedgerError, Mark
from fedhead.common.privacy.noise import Streams
from fedhead.common.protocol import Asked
from fedhead.common.refusals import (
    INVALID_REQUEST,
    NO_LEDGER,
    NO_METRICS,
    NOT_READY,
    OTHER_MODEL,
    STALE_ROUND,
    TRAINING_FAILED,
    refusal,
)
from fedhead.common.round_request import RoundRequest

log = logging.getLogger("fedhead.client")

MOST_NOISE, LARGEST_NORM = 2.0**25, 2.0**500
"""What a deployed holder's noise has room for (fedhead.common.privacy.secure); refused before it is charged."""

MOST_PLANNED = 100_000
"""Most Poisson steps of a run that a deployed holder looks at."""

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which holder this is, once its records are open and their features are there."""
    arrived = time.monotonic()
    deployed = _deployed(context)
    if deployed and over(message):  # before records are opened, which may take long
        return _late(message, context)
    try:
        workplace, name, _ = workplace_of(context)
    except Exception as fault:  # the boundary: an exception's own text may hold private data
        return _not_ready(message, context, arrived, fault)
    mark = workplace.admission.mark(name) if deployed else None
    _pad(workplace.admission.limits, context, arrived)
    return protocol.hello(message, name, mark)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: check, admit, train, release."""
    arrived = time.monotonic()
    deployed = _deployed(context)
    if deployed and over(message):  # as above
        return _late(message, context)
    try:
        if deployed and not is_open(context):
            _look_first(message, context)
        workplace, name, records = workplace_of(context)
    except Exception as fault:  # the boundary: an exception's own text may hold private data
        return _not_ready(message, context, arrived, fault)
    outcome = _outcome(message, workplace, name, records, arrived if deployed else None)
    _pad(workplace.admission.limits, context, arrived)
    # a reply carries when it was made: it is made after the wait, whose length says how long the work took
    if isinstance(outcome, Refused):
        return protocol.refuse(message, outcome, name, workplace.admission.mark(name) if deployed else None)
    return protocol.release(message, *outcome)


def _deployed(context: Context) -> bool:
    return bool(context.node_config.get("holder"))


def _look_first(message: Message, context: Context) -> None:
    """Hold the first request of a recipe to the holder's own file, before anything else is opened for it."""
    from fedhead.client.deployed import look_first

    request = protocol.read_request(message).request
    look_first(Path(str(context.node_config["holder"])), str(context.run_config["recipe"]), request)


def _pad(limits: Limits | None, context: Context, arrived: float) -> None:
    """Hold a deployed holder's answer back until the time that its own file says."""
    if _deployed(context) and limits is not None:
        wait_until(arrived, limits.reply_at)


def _outcome(
    message: Message, workplace: Workplace, name: str, records: Labelled, arrived: float | None
) -> tuple[RecordDict, Mark | None] | Refused:
    """What is released, or why nothing is; `arrived` at a deployed holder alone."""
    try:
        if arrived is not None and over(message):
            raise refusal(STALE_ROUND)
        asked = protocol.read_request(message)
        check(asked.request, workplace)
        # One trained part serves all holders of a process, one holder at a time.
        limits = workplace.admission.limits
        bound = nullcontext() if arrived is None or limits is None else limited(round_limit(message, limits, arrived))
        with workplace.lock, bound:
            return answer(workplace, name, records, asked)
    except Refused as refused:
        return refused
    except Exception:  # the boundary: an exception's own text may hold private data
        log.exception("%s: training failed", name)
        return refusal(TRAINING_FAILED)


def _not_ready(message: Message, context: Context, arrived: float, fault: Exception) -> Message:
    """The reply of a holder that can't open its records or its ledger, or won't for this request.

    Its own log says why and what to do.
    """
    refused = refusal(NO_LEDGER if isinstance(fault, LedgerError) else NOT_READY)
    if isinstance(fault, Refused):
        log.warning("refused before anything was opened: %s", fault)
        refused = fault
    elif isinstance(fault, FedheadError):  # its text is the whole message
        log.error("the holder can't be opened: %s", fault)
    else:
        log.error("the holder can't be opened", exc_info=fault)
    name, mark = _closed(context)
    with suppress(FedheadError):
        if _deployed(context):  # how far opening came, and how long that took, depends on the records
            _pad(load_holder(str(context.node_config["holder"])).limits, context, arrived)
    return protocol.refuse(message, refused, name, mark)


def failed(message: Message, context: Context) -> Message:
    """The reply to a message on which the app raised, such as one of a kind that it doesn't know; it never fails."""
    try:
        name, mark = _closed(context)
    except Exception as error:  # the boundary
        log.error("where the ledger stands can't be told: %s", type(error).__name__)
        name, mark = "", None
    return protocol.refuse(message, refusal(TRAINING_FAILED), name, mark)


def _late(message: Message, context: Context) -> Message:
    """The reply of a deployed holder to a message of a round that is over: for it nothing is opened."""
    name, mark = _closed(context)
    return protocol.refuse(message, refusal(STALE_ROUND), name, mark)


def _closed(context: Context) -> tuple[str, Mark | None]:
    """A deployed holder's name and where its ledger stands, its records open or not; empty and None if unreadable."""
    from fedhead.client.deployed import mark_of

    with suppress(FedheadError):
        if is_open(context):
            workplace, name, _ = workplace_of(context)
            return name, workplace.admission.mark(name)
        if _deployed(context):
            holder = load_holder(str(context.node_config["holder"]))
            return holder.name, mark_of(holder)
    return "", None


def expect(messages: Sequence[tuple[Message, Context]]) -> None:
    """Reserve what several messages of a round ask of one process's holders, in one transaction.

    An engine that delivers many messages in one process may call it before; without it each holder reserves its own.
    What is wrong with a message shows when it is delivered.
    """
    asked: list[tuple[str, Asked]] = []
    members: list[Member] = []
    workplace: Workplace | None = None
    source = ""
    for message, context in messages:
        if message.metadata.message_type != MessageType.TRAIN:
            continue
        workplace, name, records = workplace_of(context)
        try:
            one = protocol.read_request(message)
            check(one.request, workplace)
        except Refused:  # it is told when the message is delivered
            continue
        streams = workplace.streams(one.request, name)
        source = source or streams.source
        asked.append((name, one))
        members.append(Member((name, one.digest), records, streams))
    if workplace is not None and asked:
        workplace.admission.expect(asked, source)
        _step_together(workplace, asked[0][1], members)


def _step_together(workplace: Workplace, asked: Asked, members: list[Member]) -> None:
    """Let the simulated holders of a round that got the same request as the first, and may answer, train together."""
    if not workplace.admission.simulated or workplace.config.run.exact:  # exact: no batching
        return
    granted = [
        member for member in members if member.key[1] == asked.digest and workplace.admission.granted(*member.key)
    ]
    with workplace.lock:
        workplace.together.expect(granted, plan_of(workplace, asked.request))


def check(request: RoundRequest, workplace: Workplace) -> None:
    """Refuse a request that is for another model or task, or that doesn't add up.

    Raises
    ------
    Refused
        Before any record is read, and before anything is charged.
    """
    if request.backbone != workplace.backbone or request.task != workplace.config.task.kind:
        raise refusal(OTHER_MODEL)
    privacy = workplace.config.privacy
    if request.unit != privacy.unit or (request.unit == "person") != (request.records_per_person is not None):
        raise refusal(INVALID_REQUEST)
    if request.records_per_person not in (None, privacy.records_per_person):
        raise refusal(INVALID_REQUEST)
    if (request.mechanism == "poisson") != (request.sample_rate is not None):
        raise refusal(INVALID_REQUEST)
    planned = None if request.plan_counts is None else request.plan_counts.noise_multiplier
    noises = [noise for noise in (request.noise_multiplier, request.metrics_noise, planned) if noise is not None]
    if max(noises) > MOST_NOISE or not 1 / LARGEST_NORM <= request.clipping_norm <= LARGEST_NORM:
        raise refusal(INVALID_REQUEST)
    if request.metrics_noise is not None and privacy.metrics is None:  # nothing was kept apart to count on
        raise refusal(NO_METRICS)
    admission = workplace.admission
    if not admission.simulated:
        # what a plan costs is computed before it is refused: bounded, so that this takes seconds at most
        if request.mechanism == "poisson" and (request.plan_steps > MOST_PLANNED or request.noise_multiplier > 100):
            raise refusal(INVALID_REQUEST)
        if admission.limits is not None and admission.limits.allow_seeded_noise and request.seed is None:
            raise refusal(INVALID_REQUEST)  # its sums are float32, for tests alone
    if request.mechanism == "none":
        if request.metrics_noise is not None or request.plan_counts is not None:
            raise refusal(INVALID_REQUEST)
    elif request.noise_multiplier <= 0 or request.plan_steps < request.local_steps or request.unit == "holder":
        raise refusal(INVALID_REQUEST)


def answer(workplace: Workplace, name: str, records: Labelled, asked: Asked) -> tuple[RecordDict, Mark | None]:
    """What a holder releases in a round, and where its ledger then stands.

    The trained part of the workplace holds the released head afterwards, unless the release was kept from before.

    Raises
    ------
    Refused
        Before any record is read.
    """
    request, admission = asked.request, workplace.admission
    received = protocol.from_arrays(asked.arrays, workplace.trainable.trained())
    streams = workplace.streams(request, name)
    if not streams.seeded and request.mechanism != "none":
        try:
            persons = request.unit == "person"
            workplace.trainer.check_weights(list(received.values()), request.clipping_norm, persons=persons)
        except InputError as error:
            raise refusal(INVALID_REQUEST) from error
    admitted = admission.admit(name, asked, streams.source)
    if admitted.payload is not None:
        return protocol.unpack(admitted.payload), admitted.mark
    reach("round.admitted")
    try:
        with torch.no_grad():
            for parameter, value in zip(workplace.trainable.trained().values(), received.values(), strict=True):
                parameter.copy_(value)
        content = _train(workplace, name, records, asked, streams)
    except BaseException:
        admission.fail(name, admitted)
        raise
    reach("round.trained")
    mark = admission.release(name, admitted, content)
    reach("round.sending")
    return content, mark


def _train(workplace: Workplace, name: str, records: Labelled, asked: Asked, streams: Streams) -> RecordDict:
    request, plan, trained = asked.request, plan_of(workplace, asked.request), workplace.trainable.trained()
    count = None
    if request.metrics_noise is not None:  # of the head as it arrived: after this round's steps it is not the run's
        count = noised_count(
            workplace.trainable,
            workplace.trainer.task,
            workplace.holdouts[name],
            request.metrics_noise,
            streams.noise(request.local_steps),
        )
    event: Event = plan.event()
    if streams.seeded and not workplace.admission.simulated:
        event = NoPrivacyEvent(event.steps)  # whoever sent the seed can take the noise off
    finished = workplace.together.take((name, asked.digest))
    if finished is None:
        workplace.trainer.round(records.features, records.targets, plan, streams)
    else:
        with torch.no_grad():
            for parameter, value in zip(trained.values(), finished, strict=True):
                parameter.copy_(value)
    return protocol.released(trained, plan.declared_records, name, event.to_json(), count)


def plan_of(workplace: Workplace, request: RoundRequest) -> StepPlan:
    """What a holder of this workplace does for a request."""
    declared = workplace.declared_records or request.declared_records
    return step_plan(request, declared, request.chunk if workplace.admission.simulated else CHUNK)


def step_plan(request: RoundRequest, declared_records: int, chunk: int) -> StepPlan:
    """What a holder does for a request.

    Parameters
    ----------
    declared_records : int, >= 1
        The holder's own public constant, or the request's.
    chunk : int, >= 1
        Most records at once.
    """
    return StepPlan(
        mechanism=request.mechanism,
        noise_multiplier=request.noise_multiplier,
        clipping_norm=request.clipping_norm,
        sample_rate=request.sample_rate,
        local_steps=request.local_steps,
        declared_records=declared_records,
        optimizer=request.optimizer,
        learning_rate=request.learning_rate,
        proximal_mu=request.proximal_mu,
        chunk=chunk,
    )
