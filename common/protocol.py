"""What travels between the server and the data holders: the only Flower-aware module of `common`.

Down: the head's arrays and one `RoundRequest`. Up: the noised head's arrays, the declared record count as weight, the
holder's name and the mechanism event that it charged. Nothing else leaves a holder: no loss, no accuracy, no true
count, no exception text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedhead.common.config.schema import Optimizer
from fedhead.common.errors import Refused

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

ARRAYS, CONFIG, METRICS, RELEASE = "arrays", "config", "metrics", "release"
WEIGHT = "num-examples"
_NPY = "numpy.ndarray"  # Flower's name for the bytes that `numpy.save` writes

# Fixed codes and texts of a refusal: all that the server learns about its reason.
INVALID_REQUEST = 1001
OTHER_MODEL = 1002
NOT_READY = 1003
TRAINING_FAILED = 1099
TEXTS: Mapping[int, str] = {
    INVALID_REQUEST: "the request is not valid",
    OTHER_MODEL: "the request is for another backbone or head",
    NOT_READY: "the holder's records can't be opened; its own log says why",
    TRAINING_FAILED: "training failed; the holder's own log says why",
}


class RoundRequest(BaseModel):
    """All that fixes what a holder does in one round, checked field by field before anything is read.

    The noise multiplier, clipping norm, sample rate and declared record count change the guarantee; the holder's own
    policy has the last word on them. `seed` is for simulation: a deployed holder ignores it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    run: str = Field(min_length=1, max_length=64)
    round: int = Field(ge=1)
    task: str
    backbone: str = Field(description="Digest of the backbone.")
    unit: Literal["record"] = "record"
    mechanism: Literal["full-batch", "poisson", "none"]
    noise_multiplier: float = Field(ge=0)
    clipping_norm: float = Field(gt=0)
    sample_rate: float | None = Field(None, gt=0, lt=1)
    local_steps: int = Field(ge=1, le=100_000)
    declared_records: int = Field(ge=1)
    optimizer: Optimizer
    learning_rate: float = Field(gt=0)
    proximal_mu: float = Field(0.0, ge=0)
    chunk: int = Field(4096, ge=1)
    seed: int | None = Field(None, ge=0)


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name, in order, as Flower's arrays (float32): what `ArrayRecord(state)` makes, sooner."""
    record = ArrayRecord()
    for name, value in state.items():
        values = value.detach().to("cpu", torch.float32).numpy()
        shape = tuple(values.shape)
        record[name] = Array("float32", shape, _NPY, _npy_header(shape) + values.tobytes())
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
        values = _read_npy(array.data, shape)
        if not np.isfinite(values).all():
            raise refusal(INVALID_REQUEST)
        found[name] = torch.from_numpy(values)
    return found


@lru_cache(maxsize=64)
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What `numpy.save` writes before float32 values of a shape."""
    stream = io.BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def _read_npy(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of the float32 values in `data`, which `numpy.save` wrote; allocates nothing that `data` doesn't hold.

    `numpy.load` would do, at ten times the price, because it evaluates the header, and with an allocation of whatever
    size the header claims.

    Raises
    ------
    Refused
        Anything else is in it.
    """
    start, fortran = len(_npy_header(shape)), False
    try:
        if not data.startswith(_npy_header(shape)):
            stream = io.BytesIO(data)
            version = np.lib.format.read_magic(stream)
            claimed, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if version != (1, 0) or claimed != shape or dtype != np.dtype("<f4"):
                raise refusal(INVALID_REQUEST)
            start = stream.tell()
        values = np.frombuffer(data, dtype="<f4", offset=start).reshape(shape, order="F" if fortran else "C")
    except (ValueError, SyntaxError) as error:
        raise refusal(INVALID_REQUEST) from error
    return values.copy()


def refusal(code: int) -> Refused:
    """A refusal with its fixed text."""
    return Refused(code, TEXTS[code])


def round_config(request: RoundRequest) -> ConfigRecord:
    """A request as it travels."""
    return ConfigRecord({"server-round": request.round, "request": request.model_dump_json()})


def read_request(message: Message) -> tuple[RoundRequest, ArrayRecord]:
    """The request and the arrays of a message.

    Raises
    ------
    Refused
        When anything is missing, unknown or out of range.
    """
    try:
        return _parse(str(_record(message, CONFIG, ConfigRecord)["request"])), _record(message, ARRAYS, ArrayRecord)
    except (KeyError, ValueError, ValidationError) as error:
        raise refusal(INVALID_REQUEST) from error


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


def release(message: Message, state: Mapping[str, Tensor], weight: int, holder: str, event: str) -> Message:
    """The reply of a holder: the noised head, its declared weight, its name and the event it charged (JSON)."""
    content = RecordDict(
        {
            ARRAYS: to_arrays(state),
            METRICS: MetricRecord({WEIGHT: weight}),
            RELEASE: ConfigRecord({"holder": holder, "event": event}),
        }
    )
    return Message(content, reply_to=message)


def refuse(message: Message, refused: Refused, holder: str) -> Message:
    """The reply of a holder that refuses: code and fixed text only."""
    return Message(Error(refused.code, json.dumps({"holder": holder, "text": str(refused)})), reply_to=message)


def read_refusal(message: Message) -> tuple[str, int, str]:
    """Holder, code and text of an error reply; the holder is empty when Flower itself made the reply."""
    try:
        reason = json.loads(message.error.reason or "")
        return str(reason["holder"]), message.error.code, str(reason["text"])
    except (TypeError, ValueError, KeyError):
        return "", message.error.code, "no update arrived"


def read_release(message: Message) -> tuple[str, str]:
    """Holder and event (JSON) of a release; empty texts when they are missing."""
    try:
        record = _record(message, RELEASE, ConfigRecord)
    except KeyError:
        return "", ""
    return str(record.get("holder", "")), str(record.get("event", ""))


def read_update(message: Message, like: Mapping[str, Tensor]) -> int | float:
    """The weight that a release asks for, when it can be aggregated with others.

    Raises
    ------
    Refused
        Something is missing or too much, or the arrays are not those that are expected; see `from_arrays`.
    """
    try:
        if set(message.content) != {ARRAYS, METRICS, RELEASE}:
            raise refusal(INVALID_REQUEST)
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


def hello(message: Message, holder: str) -> Message:
    """The reply to the first query of a run: who is there."""
    return Message(RecordDict({RELEASE: ConfigRecord({"holder": holder})}), reply_to=message)


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
