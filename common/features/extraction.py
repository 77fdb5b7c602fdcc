"""Extraction: each record once through the frozen part of the backbone, in large, even batches."""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedhead.common.config.schema import FeatureSettings
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError, ModelError
from fedhead.common.features.cache import (
    OFFSETS,
    VALUES,
    create_array,
    locked,
    open_entry,
    write_manifest,
    written_aside,
)
from fedhead.common.features.featureset import FeatureSet

if TYPE_CHECKING:
    from fedhead.common.models.backbones import Backbone

Progress = Callable[[int, int], None]
Allocate = Callable[[str, str, tuple[int, ...]], np.ndarray]  # (file's name, number format, shape) -> array of zeros

SCHEMA = 1  # a change of what features are, other than by the backbone, its preprocessing or the number format
COST_BLOCK = 4096  # raw inputs held at once while their costs are asked for
AHEAD = 2  # batches read and tokenised or decoded ahead of the backbone, in a thread of their own
HALF_LIMIT = 65504.0  # largest finite float16

log = logging.getLogger("fedhead.records")


def cache_key(backbone: Backbone, records: Records, settings: FeatureSettings) -> str:
    """Name of the features of these records, in this order: SHA-256 (hex) over all that they depend on.

    Backbone (architecture and weights), preprocessing with the cut, number format, and the records' contents. Labels
    and normalisation aren't part of it: labels don't enter the backbone, and what is kept is not normalised.
    """
    contents = {
        "schema": SCHEMA,
        "backbone": backbone.digest,
        "preprocessing": backbone.preprocessing,
        "format": settings.cache,
        "records": len(records),
        "fingerprint": blake2b(records.digests().tobytes(), digest_size=32).hexdigest(),
    }
    return sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def extract(
    backbone: Backbone,
    records: Records,
    cache: Path | None,
    settings: FeatureSettings,
    progress: Progress | None = None,
) -> FeatureSet:
    """Features of records, computed once or found in the cache.

    Parameters
    ----------
    backbone : Backbone
    records : Records
        Of the backbone's kind.
    cache : Path or None
        Folder of the cache, created when missing. None: kept in memory, no file is written.
    settings : FeatureSettings
        `batch_size`, and the number format on disk.
    progress : callable, optional
        Called with (records done, all records).

    Returns
    -------
    FeatureSet
        Not normalised. With a cache its values are mapped from a file that all processes share. A record whose image
        can't be decoded has NaN for features. The origin of every record whose features aren't finite goes to the
        logger `fedhead.records` (level INFO), which is the data holder's own, from a warm cache too.

    Raises
    ------
    DataError
        When records and backbone are of different kinds, or no image can be decoded.

    Notes
    -----
    Guarantee: features depend on each record alone, so their order and their batches don't matter (within the rounding
    of the backbone's contract). Memory: a few batches of raw inputs, never all.
    """
    if backbone.kind != records.kind:
        raise DataError(
            f'model.backbone is "{backbone.name}": it takes {backbone.kind} records, and data.source gives '
            f"{records.kind} records. Choose another backbone, or name the {backbone.kind} column in data.columns."
        )
    if len(records) == 0:
        return FeatureSet(torch.zeros(0, backbone.dim))
    try:
        found = _found_or_computed(backbone, records, cache, settings, progress)
    except _Outside as outside:
        raise outside.error from None
    for position in (~found.finite()).nonzero().flatten().tolist():
        log.info("record skipped, it can't be decoded or has no finite features: %s", records.origin(position))
    return found


class _Outside(Exception):
    """An OSError of the backbone or the records, on its way past what is told of the cache."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


@contextmanager
def _outside() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Outside(error) from error


def _found_or_computed(
    backbone: Backbone, records: Records, cache: Path | None, settings: FeatureSettings, progress: Progress | None
) -> FeatureSet:
    if cache is None:
        arrays = _compute(backbone, records, settings, progress, allocate=_in_memory, spool=io.BytesIO())
        own = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return FeatureSet(own[VALUES], own.get(OFFSETS))
    key = cache_key(backbone, records, settings)
    found = open_entry(cache, key)
    if found is None:
        try:
            with locked(cache, key):
                found = open_entry(cache, key)  # another process may have been at it
                if found is None:
                    with written_aside(cache, key) as part, tempfile.TemporaryFile(dir=part) as spool:
                        allocate = partial(_in_file, part)
                        arrays = _compute(backbone, records, settings, progress, allocate=allocate, spool=spool)
                        write_manifest(part, key, arrays)
                    found = open_entry(cache, key)
        except OSError as error:
            raise DataError(
                f"the feature cache in {cache} can't be written ({error.strerror or type(error).__name__}). Free some "
                "space or correct its permissions, or choose another folder with --state or XDG_CACHE_HOME."
            ) from error
    elif progress is not None:
        progress(len(records), len(records))
    if found is None:
        raise DataError(
            f"the feature cache in {cache} can't be read back after writing. Check that disk, or choose another folder "
            "with --state or XDG_CACHE_HOME."
        )
    return found


def _in_file(folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return create_array(folder / name, dtype, shape)


def _in_memory(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtype)


def _compute(
    backbone: Backbone,
    records: Records,
    settings: FeatureSettings,
    progress: Progress | None,
    *,
    allocate: Allocate,
    spool: IO[bytes],
) -> dict[str, np.ndarray]:
    """All features, written batch by batch: {values} of shape (N, *shape), or {values, offsets} when ragged.

    Ragged features are spooled in the order of computing, because where a record's tokens belong is known only when
    the lengths of all records before it are.
    """
    total = len(records)
    values: np.ndarray | None = None
    lengths = np.ones(total, dtype=np.int64)  # a record without features takes one row of NaN
    spooled: list[tuple[np.ndarray, int]] = []  # positions and tokens of each batch
    failed: list[int] = []
    width, done = 0, 0
    for positions, lost, batch in _batches(backbone, records, settings.batch_size):
        failed += lost.tolist()
        if batch is not None:
            found, real = _forward(backbone, batch, settings.cache, len(positions))
            if real is None:
                if values is None:
                    values = allocate(VALUES, settings.cache, (total, *found.shape[1:]))
                values[positions] = found
            else:
                lengths[positions] = real
                tokens = found[np.arange(found.shape[1]) < real[:, None]]  # (sum of real, H), without the padding
                spooled.append((positions, len(tokens)))
                width = tokens.shape[1]
                spool.write(tokens.tobytes())
        done += len(positions) + len(lost)
        if progress is not None:
            progress(done, total)
    if len(failed) == total:
        raise DataError(f"data.source: none of its {total} images can be decoded. Check the files.")
    if values is not None:
        values[failed] = np.nan
        return {VALUES: values}
    return _in_order(spool, spooled, lengths, failed, dtype=settings.cache, width=width, allocate=allocate)


def _in_order(
    spool: IO[bytes],
    spooled: list[tuple[np.ndarray, int]],
    lengths: np.ndarray,
    failed: list[int],
    *,
    dtype: str,
    width: int,
    allocate: Allocate,
) -> dict[str, np.ndarray]:
    """Copy spooled tokens to the order of records, batch by batch."""
    offsets = allocate(OFFSETS, "int64", (len(lengths) + 1,))
    np.cumsum(lengths, out=offsets[1:])
    values = allocate(VALUES, dtype, (int(offsets[-1]), width))
    spool.seek(0)
    for positions, tokens in spooled:
        block = np.frombuffer(spool.read(tokens * width * np.dtype(dtype).itemsize), dtype).reshape(tokens, width)
        real = lengths[positions]
        within = np.arange(tokens) - np.repeat(np.cumsum(real) - real, real)
        values[np.repeat(offsets[positions], real) + within] = block
    values[offsets[failed]] = np.nan
    return {VALUES: values, OFFSETS: offsets}


def _forward(
    backbone: Backbone, batch: dict[str, Tensor], dtype: str, asked: int
) -> tuple[np.ndarray, np.ndarray | None]:
    with torch.inference_mode():
        with _outside():
            values, lengths = backbone.forward(batch)
        if dtype == "float16":
            # A finite feature must stay finite: the record would else lose all weight in training.
            values = torch.where(values.isfinite(), values.clamp(-HALF_LIMIT, HALF_LIMIT), torch.nan)
        if len(values) != asked:
            raise ModelError(
                f'model.backbone is "{backbone.name}": it gave {len(values)} feature vectors for {asked} records. It '
                "must give one a record, in their order."
            )
        array: np.ndarray = values.to("cpu", getattr(torch, dtype)).numpy()
        return array, None if lengths is None else lengths.to("cpu", torch.int64).numpy()


Batch = tuple[np.ndarray, np.ndarray, dict[str, Tensor] | None]


def _batches(backbone: Backbone, records: Records, size: int) -> Iterator[Batch]:
    """Positions with an input, positions without one, and the batch; made ahead in a thread of its own."""
    with _outside():
        order = _order(backbone, records)
    parts = iter(np.array_split(order, -(-len(order) // size)))

    def make(part: np.ndarray) -> Batch:
        with _outside():
            inputs = records.inputs(part)
            there = np.array([one is not None for one in inputs], dtype=bool)
            kept = [one for one in inputs if one is not None]
            return part[there], part[~there], backbone.collate(kept) if kept else None

    with ThreadPoolExecutor(1, thread_name_prefix="fedhead-collate") as pool:
        waiting: deque[Future[Batch]] = deque()
        for part in parts:
            waiting.append(pool.submit(make, part))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _order(backbone: Backbone, records: Records) -> np.ndarray:
    """Positions by falling cost, so that the records of a batch are alike and the largest batch comes first."""
    positions = np.arange(len(records))
    first = records.inputs(positions[:1])
    if first[0] is None or backbone.cost(first) is None:
        return positions
    costs: list[int] = []
    for start in range(0, len(positions), COST_BLOCK):
        costs += backbone.cost(records.inputs(positions[start : start + COST_BLOCK])) or []
    return np.argsort(-np.asarray(costs), kind="stable")
