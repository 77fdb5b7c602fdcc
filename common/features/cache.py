"""The feature cache: one folder a key, complete or not there at all.

    KEY/                  0700
      values.bin          0600   the numbers, record after record
      offsets.bin         0600   int64, where each record's tokens start; ragged features only
      manifest.json       0600   schema, key, shape, number format, sizes and SHA-256 of the files, and of itself
    KEY.lock              held while features are computed: a second process waits, then opens the first one's
    .KEY.XXXX.part/       being written; without its lock held by anyone it is left over from a kill, and removed

A folder is written aside, every file and the folder itself are flushed to the disk, then it is renamed and the folder
above is flushed: whatever happens half-way, a name without ".part" stands for whole files. Checksums are verified when
an entry is opened, so a file that changed on the disk is noticed and computed again. POSIX only (flock).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedhead.common.features.featureset import FeatureSet

SCHEMA = 1
VALUES, OFFSETS, MANIFEST = "values.bin", "offsets.bin", "manifest.json"
PART = ".part"


def open_entry(folder: Path, key: str) -> FeatureSet | None:
    """The features stored under a key, mapped into memory; None when there are none, or not whole.

    Notes
    -----
    Guarantee: what is returned has the checksums that were written with it.
    """
    entry = folder / key
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        if manifest.pop("sha256") != _digest(manifest) or (manifest["schema"], manifest["key"]) != (SCHEMA, key):
            return None
        for name, described in manifest["files"].items():
            with (entry / name).open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != described["sha256"]:
                    return None
        arrays = {
            name: _map(entry / name, described["dtype"], described["shape"])
            for name, described in manifest["files"].items()
        }
        values, offsets = arrays[VALUES], arrays.get(OFFSETS)
        return FeatureSet(
            torch.from_numpy(values),
            None if offsets is None else torch.from_numpy(offsets),
            values.base if isinstance(values.base, mmap.mmap) else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Hold a key's lock; waits while another process or thread computes it. Creates the folder, for its owner only."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open_lock(folder, key) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def written_aside(folder: Path, key: str) -> Iterator[Path]:
    """A folder to write an entry in; it becomes the entry when the block ends well, and is removed when it doesn't.

    To be used with the key's lock held. Files that lie in it must be named in a manifest (`write_manifest`).
    """
    _remove_leftovers(folder, key)
    part = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=PART, dir=folder))  # mkdtemp makes it 0700
    try:
        yield part
        for path in part.iterdir():
            _flush(path)
        _flush(part)
        entry = folder / key
        if entry.exists():  # an entry that isn't whole; moved out of the way first, so that none half removed stays
            broken = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=PART, dir=folder))
            entry.rename(broken / key)
            shutil.rmtree(broken, ignore_errors=True)
        part.rename(entry)
        _flush(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def create_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A new file of zeros, mapped for writing, that only its owner can read."""
    path.touch(mode=0o600, exist_ok=False)
    size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
    if size == 0:  # an empty file can't be mapped
        return np.zeros(shape, dtype)
    with path.open("r+b") as file:
        # Reserved, not only sized: on a full disk, writing to a mapped hole would kill the process.
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


def write_manifest(part: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Describe the files of an entry; to be called last."""
    files: dict[str, Any] = {}
    for name, array in arrays.items():
        if isinstance(array, np.memmap):
            array.flush()
        with (part / name).open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        files[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}
    manifest: dict[str, Any] = {"schema": SCHEMA, "key": key, "files": files}
    manifest["sha256"] = _digest(manifest)
    path = part / MANIFEST
    path.touch(mode=0o600)
    path.write_text(json.dumps(manifest, indent=1))


def _map(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
    if path.stat().st_size != size:
        raise ValueError("the file has another size than its manifest says")
    if size == 0:
        return np.zeros(shape, dtype)
    # Copy on write: whatever is written to the array by mistake never reaches the file.
    return np.memmap(path, dtype=dtype, mode="c", shape=tuple(shape))


def _digest(manifest: dict[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _open_lock(folder: Path, key: str) -> Any:
    return os.fdopen(os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")


def _remove_leftovers(folder: Path, held: str) -> None:
    """Remove what a kill left half-way: parts whose key nobody holds, and of the key that we hold ourselves."""
    for part in folder.glob(f".*{PART}"):
        key = part.name.split(".")[1]
        with _open_lock(folder, key) as handle:
            if key != held:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # its process is still at work
            shutil.rmtree(part, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
