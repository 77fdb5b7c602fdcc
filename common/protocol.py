"""What travels between the server and the data holders: the only Flower-aware module of `common`.

Down: the head's arrays and one `RoundRequest`. Up: the noised head's arrays, the declared record count as weight, the
holder's name and the mechanism event that it charged. Nothing else leaves a holder: no loss, no accuracy, no true
count, no exception text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from pydantic import ValidationError
from torch import Tensor

from fedhead.common.errors import Refused
from fedhead.common.npy import npy_header, read_npy
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import INVALID_REQUEST, OTHER_MODEL, TEXTS, refusal
from fedhead.common.round_request import RoundRequest

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

ARRAYS, CONFIG, METRICS, RELEASE, LEDGER = "arrays", "config", "metrics", "release", "ledger"
WEIGHT = "num-examples"
_NPY = "numpy.ndarray"  # Flower's name for the bytes that `numpy.save` writes


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name, in order, as Flower's arrays (float32): what `ArrayRecord(state)` makes, sooner."""
    record = ArrayRecord()
    for name, value in state.items():
        values = value.detach().to("cpu", torch.float32).numpy()
        shape = tuple(values.shape)
        record[name] = Array("float32", shape, _NPY, npy_header(shape) + values.tobytes())
    return record


def as_float32(arrays: ArrayRecord) -> ArrayRecord:
    """The same arrays in float32; some strategies compute the next head in float64."""
    if all(array.dtype == "float32" for array in arrays.values()):
        return arrays
    return ArrayRecord({name: Array(array.numpy().astype("float32")) for name, array in arrays.items()})


def from_arrays(arrays: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a record, checked against the names, shapes and finiteness that are expected.

    Raises
    ------
    Refused
        With the code OTHER_MODEL or INVALID_REQUEST; nothing of the values is in the text.
    """
    if list(arrays.keys()) != list(like):
        raise refusal(OTHER_MODEL)
    found: dict[str, Tensor] = {}
    for name, expected in like.items():
        array, shape = arrays[name], tuple(expected.shape)
        if (array.dtype, array.stype, tuple(array.shape)) != ("float32", _NPY, shape):
            raise refusal(OTHER_MODEL)
        values = _values(array.data, shape)
        if not np.isfinite(values).all():
            raise refusal(INVALID_REQUEST)
        found[name] = torch.from_numpy(values)
    return found


def _values(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return read_npy(data, shape)
    except Exception as error:  # numpy evaluates the header: a bad one may raise nearly anything, MemoryError included
        raise refusal(INVALID_REQUEST) from error


def round_config(request: RoundRequest) -> ConfigRecord:
    """A request as it travels."""
    return ConfigRecord({"server-round": request.round, "request": request.model_dump_json()})


class Asked(NamedTuple):
    """What a message asks: the request, the head, the digest of both, and the last of our ledger that was seen."""

    request: RoundRequest
    arrays: ArrayRecord
    digest: str
    seen: Mark | None


def read_request(message: Message) -> Asked:
    """What a message asks.

    Raises
    ------
    Refused
        When anything is missing, unknown or out of range.
    """
    try:
        text, arrays = str(_record(message, CONFIG, ConfigRecord)["request"]), _record(message, ARRAYS, ArrayRecord)
        seen = _mark(_record(message, LEDGER, ConfigRecord)) if LEDGER in message.content else None
        return Asked(_parse(text), arrays, _digest(text, arrays), seen)
    except (KeyError, ValueError, TypeError, ValidationError) as error:
        raise refusal(INVALID_REQUEST) from error


def with_mark(content: RecordDict, mark: Mark | None) -> RecordDict:
    """The content of a request for one holder: the same records, and the last of its ledger that was seen."""
    own = RecordDict(dict(content.items()))
    if mark is not None:
        own[LEDGER] = _mark_record(mark)
    return own


def _mark_record(mark: Mark) -> ConfigRecord:
    return ConfigRecord({"sequence": mark.sequence, "hash": mark.hash})


def _mark(record: Mapping[str, Any]) -> Mark:
    """The mark in a record; a ValueError where it is none."""
    sequence, hashed = record["sequence"], record["hash"]
    if isinstance(sequence, bool) or not isinstance(sequence, int) or not 0 < sequence < 2**63:
        raise ValueError("no sequence")
    if not isinstance(hashed, str) or len(hashed) != 64:
        raise ValueError("no hash")
    return Mark(sequence, hashed)


def _digest(text: str, arrays: ArrayRecord) -> str:
    """SHA-256 over a whole request: its text, and the names, shapes and bytes of the head."""
    return _hash(text, tuple((name, array.dtype, tuple(array.shape), array.data) for name, array in arrays.items()))


@lru_cache(maxsize=2)
def _hash(text: str, arrays: tuple[tuple[str, str, tuple[int, ...], bytes], ...]) -> str:
    # kept like _parse; Python keeps the hash of bytes with them, so that asking again costs next to nothing
    found = hashlib.sha256(json.dumps([text, [list(array[:3]) for array in arrays]]).encode())
    for *_, data in arrays:
        found.update(len(data).to_bytes(8, "big"))
        found.update(data)
    return found.hexdigest()


@lru_cache(maxsize=2)
def _parse(text: str) -> RoundRequest:
    """A request, which never changes; kept, because one process may serve all holders of a round."""
    return RoundRequest.model_validate_json(text)


def _record(message: Message, name: str, kind: type[Record]) -> Record:
    """A record of a message, of the kind that it must be; a KeyError where it isn't there."""
    found = message.content[name]
    if not isinstance(found, kind):
        raise KeyError(name)
    return found


def release(message: Message, content: RecordDict, mark: Mark | None) -> Message:
    """The reply of a holder: what it releases, and where its ledger stands."""
    if mark is not None:
        content[LEDGER] = _mark_record(mark)
    return Message(content, reply_to=message)


def released(
    state: Mapping[str, Tensor], weight: int, holder: str, event: str, count: float | None = None
) -> RecordDict:
    """What a holder releases: the noised head, its declared weight, its name and the event it charged (JSON).

    Parameters
    ----------
    count : float, optional
        The noised count of correct answers, where one was asked for.
    """
    notes: dict[str, str | float] = {"holder": holder, "event": event}
    if count is not None:
        notes["correct"] = count
    return RecordDict(
        {ARRAYS: to_arrays(state), METRICS: MetricRecord({WEIGHT: weight}), RELEASE: ConfigRecord({**notes})}
    )


def pack(content: RecordDict) -> bytes:
    """A release as bytes, for the ledger to keep: the very same release leaves when the round is asked again."""
    arrays = content.array_records[ARRAYS]
    head = {
        "weight": content.metric_records[METRICS][WEIGHT],
        "notes": dict(content.config_records[RELEASE].items()),
        "arrays": [[name, list(array.shape), len(array.data)] for name, array in arrays.items()],
    }
    first = json.dumps(head, allow_nan=False).encode()
    return b"".join([len(first).to_bytes(8, "big"), first, *(array.data for array in arrays.values())])


def unpack(data: bytes) -> RecordDict:
    """What `pack` made bytes of."""
    start = 8 + int.from_bytes(data[:8], "big")
    head, arrays = json.loads(data[8:start]), ArrayRecord()
    for name, shape, size in head["arrays"]:
        arrays[name] = Array("float32", tuple(shape), _NPY, data[start : start + size])
        start += size
    return RecordDict(
        {ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: head["weight"]}), RELEASE: ConfigRecord(head["notes"])}
    )


def refuse(message: Message, refused: Refused, holder: str, mark: Mark | None = None) -> Message:
    """The reply of a holder that refuses: code and fixed text, and where its ledger stands."""
    said: dict[str, str | int] = {"holder": holder, "text": str(refused)}
    if mark is not None:
        said.update(mark._asdict())
    return Message(Error(refused.code, json.dumps(said)), reply_to=message)


def read_refusal(message: Message) -> tuple[str, int, str]:
    """Holder, code and text of an error reply; the holder is empty when Flower itself made the reply.

    The text is the code's own: what arrives goes into logs and results, and may be anything.
    """
    code = message.error.code
    try:
        holder = str(json.loads(message.error.reason or "")["holder"])
    except (TypeError, ValueError, KeyError, RecursionError):
        return "", code, "no update arrived"
    return holder, code, TEXTS.get(code, "no update arrived")


def read_release(message: Message) -> tuple[str, str]:
    """Holder and event (JSON) of a release; empty texts when they are missing."""
    try:
        record = _record(message, RELEASE, ConfigRecord)
    except KeyError:
        return "", ""
    return str(record.get("holder", "")), str(record.get("event", ""))


def read_holder(message: Message) -> str:
    """The name that a reply gives its holder, a refusal or a release; empty where it gives none."""
    return read_refusal(message)[0] if message.has_error() else read_release(message)[0]


def read_mark(message: Message) -> Mark | None:
    """Where a holder's ledger stands, by its reply, a refusal or a release; None where it doesn't say."""
    try:
        if message.has_error():
            return _mark(json.loads(message.error.reason or ""))
        return _mark(_record(message, LEDGER, ConfigRecord))
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def read_count(message: Message) -> float | None:
    """The noised count of correct answers in a release, or None."""
    try:
        count = _record(message, RELEASE, ConfigRecord)["correct"]
    except KeyError:
        return None
    return count if isinstance(count, float) and math.isfinite(count) else None


def read_update(message: Message, like: Mapping[str, Tensor]) -> int | float:
    """The weight that a release asks for, when it can be aggregated with others.

    Raises
    ------
    Refused
        Something is missing or too much, or the arrays are not those that are expected; see `from_arrays`.
    """
    try:
        if set(message.content) - {LEDGER} != {ARRAYS, METRICS, RELEASE}:
            raise refusal(INVALID_REQUEST)
        for name in {RELEASE, LEDGER} & set(message.content):  # strategies count records of a kind
            _record(message, name, ConfigRecord)
        from_arrays(_record(message, ARRAYS, ArrayRecord), like)
        metrics = _record(message, METRICS, MetricRecord)
        (weight,) = metrics.values()
        if WEIGHT not in metrics or isinstance(weight, list):
            raise refusal(INVALID_REQUEST)
        return weight
    except (KeyError, ValueError) as error:
        raise refusal(INVALID_REQUEST) from error


def set_weight(message: Message, weight: int) -> None:
    """Give a release another weight than it asks for."""
    message.content[METRICS] = MetricRecord({WEIGHT: weight})


def hello(message: Message, holder: str, mark: Mark | None = None) -> Message:
    """The reply to the first query of a run: who is there, and where its ledger stands."""
    return release(message, RecordDict({RELEASE: ConfigRecord({"holder": holder})}), mark)


def payload_bytes(content: RecordDict) -> int:
    """Bytes of arrays, texts and numbers in a message, without the transport's own framing."""
    size = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            size += sum(len(array.data) for array in record.values())
            continue
        for key, value in record.items():
            size += len(key) + (len(value) if isinstance(value, str | bytes) else 8)
    return size
