"""Whether a write-ahead log was damaged after its transactions had become durable.

SQLite takes a frame with a wrong checksum, and all that follow, for a write that never finished, and forgets them
without a word. That is right for the last transaction of a process that died. Where two or more commits follow, the
first of them had returned from fsync: charges would be forgotten.

Looked at before SQLite opens the file, because closing it would tidy the log away; and never by opening the database or
its ``-shm`` file, because closing those would drop the locks that this process holds on them (POSIX). The log itself is
never locked. Format: https://sqlite.org/walformat.html.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

_HEADER: Final = 32
_FRAME: Final = 24
_MAGIC: Final = (0x377F0682, 0x377F0683)  # the last bit says which byte of a checksummed word comes first
_TRIES: Final = 3  # another process may write while we read

Words = NDArray[np.uint32]


def lost_rows(database: Path) -> bool:
    """Whether SQLite would forget a transaction that had become durable.

    Parameters
    ----------
    database : Path
        Its log is the file of that name with ``-wal`` added; none, or an empty one, has lost nothing.

    Notes
    -----
    Guarantee: True for any damage in one place that makes SQLite forget two commits or more, unless it lies in the 24
    bytes before the page that the last but one commit wrote last. A log that was cut off, or taken away, is an older
    copy of the ledger: only a mark shows it.
    """
    log = database.with_name(database.name + "-wal")
    for attempt in range(_TRIES):
        try:
            data = log.read_bytes()
        except FileNotFoundError:  # or the last of the other processes has just closed the ledger and tidied it away
            return False
        if _commits_after_damage(data) < 2:
            return False
        time.sleep(0.01 * attempt)
    return True


def _commits_after_damage(data: bytes) -> int:
    """Commits that stand in or after the first frame that SQLite does not accept."""
    if len(data) < _HEADER + _FRAME:
        return 0
    head = np.frombuffer(data[:_HEADER], ">u4").astype(np.uint32)
    size = int(head[2])
    if size < 512 or size > 65536 or size & (size - 1):
        size = 4096  # the header is what was damaged
    order = ">u4" if head[0] & 1 else "<u4"
    count = (len(data) - _HEADER) // (_FRAME + size)
    if not count:
        return 0
    raw = np.frombuffer(data, np.uint8, count * (_FRAME + size), _HEADER).reshape(count, _FRAME + size)
    frames = raw[:, :_FRAME].copy().view(">u4").astype(np.uint32)  # (frames, 6): page, commit, salts, checksum
    first = np.frombuffer(data[: _HEADER - 8], order).astype(np.uint32)
    sound = int(head[0]) in _MAGIC and bool((_checksum(first[None], np.zeros((1, 2), np.uint32))[0] == head[6:]).all())
    salts = head[4:6] if sound else frames[0, 2:4]
    ours = (frames[:, 2:4] == salts).all(1)
    accepted = np.zeros(count, bool)
    if sound:
        covered = np.concatenate([raw[:, :8], raw[:, _FRAME:]], 1).view(order).astype(np.uint32)
        before = np.concatenate([head[None, 6:], frames[:-1, 4:6]])
        accepted = ours & (_checksum(covered, before) == frames[:, 4:6]).all(1)
    damaged = int(np.argmin(accepted)) if not accepted.all() else count
    return int((ours & (frames[:, 1] != 0))[damaged:].sum())


def _checksum(words: Words, before: Words) -> Words:
    """SQLite's checksum of each row: s0 += word + s1; s1 += next word + s0; on and on, modulo 2^32.

    It is linear, so the weights of all words are found once for a length.
    """
    weights = _weights(words.shape[1] // 2)
    return np.concatenate([before, words], 1) @ weights


@lru_cache(maxsize=8)
def _weights(pairs: int) -> Words:
    """Shape (2 + 2 pairs, 2): what each start value and each word adds to s0 and s1."""
    # one pair: s0' = s0 + s1 + a, s1' = s0 + s1 + a + s1 + b
    step = np.array([[1, 1], [1, 2]], np.uint32)
    rows = [np.array([[1, 1], [0, 1]], np.uint32)]
    for _ in range(pairs - 1):
        rows.append(rows[-1] @ step)
    start = np.eye(2, dtype=np.uint32)
    for _ in range(pairs):
        start = start @ step
    return np.concatenate([start, *reversed(rows)])
