"""The data holder's side of a run, as Flower starts it: check the request, train privately, release.

What leaves is in fedhead.common.protocol. Every exception is caught here: the server gets a fixed code and text, the
holder's own log gets the rest.
"""

from __future__ import annotations

import logging

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedhead.client.training import StepPlan
from fedhead.client.workplace import Workplace, workplace_of
from fedhead.common import protocol
from fedhead.common.errors import Refused
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.noise import simulation_streams, system_streams
from fedhead.common.protocol import RoundRequest

log = logging.getLogger("fedhead.client")

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which holder this is."""
    try:
        _, name, _ = workplace_of(context)
        return protocol.hello(message, name)
    except Exception:  # the boundary: an exception's own text may hold private data
        log.exception("the holder's records can't be opened")
        return protocol.refuse(message, protocol.refusal(protocol.NOT_READY), "")


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: admit, train, release."""
    name = ""
    try:
        workplace, name, records = workplace_of(context)
        request, arrays = protocol.read_request(message)
        check(request, workplace)
        # One trained part serves all holders of a process, one holder at a time.
        with workplace.lock:
            trained = workplace.trainable.trained()
            received = protocol.from_arrays(arrays, trained)
            event = train_holder(workplace, name, records, request, received)
            return protocol.release(message, trained, request.declared_records, name, event)
    except Refused as refused:
        return protocol.refuse(message, refused, name)
    except Exception:  # the boundary: an exception's own text may hold private data
        log.exception("%s: training failed", name)
        return protocol.refuse(message, protocol.refusal(protocol.TRAINING_FAILED), name)


def check(request: RoundRequest, workplace: Workplace) -> None:
    """Refuse a request that is for another model or task, or that doesn't add up.

    Raises
    ------
    Refused
        Before any record is read.
    """
    if request.backbone != workplace.backbone or request.task != workplace.config.task.kind:
        raise protocol.refusal(protocol.OTHER_MODEL)
    if (request.mechanism == "poisson") != (request.sample_rate is not None):
        raise protocol.refusal(protocol.INVALID_REQUEST)
    if request.mechanism != "none" and request.noise_multiplier <= 0:
        raise protocol.refusal(protocol.INVALID_REQUEST)


def train_holder(
    workplace: Workplace, name: str, records: Labelled, request: RoundRequest, received: dict[str, Tensor]
) -> str:
    """Train the received head on one holder's records; returns the event that was spent, as JSON.

    The trained part of the workplace holds the released head afterwards.
    """
    with torch.no_grad():
        for parameter, value in zip(workplace.trainable.trained().values(), received.values(), strict=True):
            parameter.copy_(value)
    # A seed that arrives is for simulated holders; whoever sent it can draw the noise again.
    seed = request.seed if workplace.simulated else None
    streams = system_streams() if seed is None else simulation_streams(seed, name, request.round)
    plan = StepPlan(
        mechanism=request.mechanism,
        noise_multiplier=request.noise_multiplier,
        clipping_norm=request.clipping_norm,
        sample_rate=request.sample_rate,
        local_steps=request.local_steps,
        declared_records=request.declared_records,
        optimizer=request.optimizer,
        learning_rate=request.learning_rate,
        proximal_mu=request.proximal_mu,
        chunk=request.chunk,
    )
    event = workplace.trainer.round(records.features, records.targets, plan, streams)
    return event.to_json()
