"""Raw inputs of records, one class for each way they are stored.

Each reads and decodes only what it is asked for, and digests an input's raw bytes without decoding it.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fedhead.common.data.loaded import text_of

DIGEST_SIZE = 16
BLOCK = 1024  # inputs held in memory at once while digesting


class Inputs(ABC):
    """N raw inputs."""

    person: bytes  # keeps digests of different kinds of input apart

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> list[Any]:
        """Decoded inputs at these rows; None where one can't be decoded."""

    @abstractmethod
    def raw(self, rows: np.ndarray) -> list[bytes]:
        """The bytes that make up each input's identity."""

    def origin(self, row: int) -> str:
        """Where an input comes from, for the data holder's own log."""
        return f"row {row + 1}"

    def digests(self, rows: np.ndarray) -> np.ndarray:
        """BLAKE2b digest of each input's bytes: (N,) -> uint8 (N, 16)."""
        found = bytearray()
        for start in range(0, len(rows), BLOCK):
            for raw in self.raw(rows[start : start + BLOCK]):
                found += blake2b(raw, digest_size=DIGEST_SIZE, person=self.person).digest()
        return np.frombuffer(bytes(found), dtype=np.uint8).reshape(len(rows), DIGEST_SIZE)


Fetch = Callable[[np.ndarray], Sequence[Any]]


class Texts(Inputs):
    """Texts, from a list or from a function that fetches rows.

    Parameters
    ----------
    values : list of str, or callable
        A callable takes an int64 array of rows and returns their values; None counts as the empty text.
    count : int, optional
        N, needed with a callable.
    """

    person = b"text"

    def __init__(self, values: list[str] | Fetch, count: int | None = None) -> None:
        if callable(values):
            self._fetch, self._count = values, int(count or 0)
        else:
            self._fetch, self._count = _from_list(values), len(values)

    def __len__(self) -> int:
        return self._count

    def read(self, rows: np.ndarray) -> list[Any]:
        """Texts; no value reads as the empty text."""
        return [text_of(value) for value in self._fetch(rows)]

    def raw(self, rows: np.ndarray) -> list[bytes]:
        """UTF-8 bytes."""
        # A lone surrogate can stand in JSON; it has no UTF-8 form of its own.
        return [text.encode("utf-8", "surrogatepass") for text in self.read(rows)]


class _InMemory(Inputs):
    """Inputs that are rows of one array."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)


class Vectors(_InMemory):
    """Vectors: a float64 array of shape (N, D)."""

    person = b"vector"

    def read(self, rows: np.ndarray) -> list[Any]:
        """Arrays of shape (D,)."""
        return list(self._values[rows])

    def raw(self, rows: np.ndarray) -> list[bytes]:
        """The array's bytes."""
        return [row.tobytes() for row in self._values[rows]]


class ArrayImages(_InMemory):
    """Images in memory: a uint8 array of shape (N, H, W) or (N, H, W, 3)."""

    person = b"image-array"

    def read(self, rows: np.ndarray) -> list[Any]:
        """RGB images."""
        return [Image.fromarray(self._values[row]).convert("RGB") for row in rows]

    def raw(self, rows: np.ndarray) -> list[bytes]:
        """The shape and the array's bytes."""
        shape = repr(self._values.shape[1:]).encode()  # 4 x 4 and 2 x 8 pixels are different images
        return [shape + self._values[row].tobytes() for row in rows]


class EncodedImages(Inputs):
    """Image files, by their bytes or their path.

    Parameters
    ----------
    fetch : callable
        Takes rows, returns for each the file's bytes, its path, or a mapping with `bytes` and `path`.
    count : int
        N.
    folder : Path
        Where relative paths start.
    """

    person = b"image-file"

    def __init__(self, fetch: Fetch, count: int, folder: Path) -> None:
        self._fetch, self._count, self._folder = fetch, count, folder

    def __len__(self) -> int:
        return self._count

    def read(self, rows: np.ndarray) -> list[Any]:
        """RGB images; None for a file that is missing or corrupt."""
        return [None if data is None else decode_image(data) for data, _ in self._files(rows)]

    def raw(self, rows: np.ndarray) -> list[bytes]:
        """The file's bytes."""
        return [_missing(path) if data is None else data for data, path in self._files(rows)]

    def origin(self, row: int) -> str:
        """The file's path, or its row when the image came without one."""
        _, path = self._split(self._fetch(np.array([row]))[0])
        return path or super().origin(row)

    def _files(self, rows: np.ndarray) -> list[tuple[bytes | None, str]]:
        found: list[tuple[bytes | None, str]] = []
        for value in self._fetch(rows):
            data, path = self._split(value)
            if data is None and path:
                data = _content(self._folder / path)
            found.append((data, path))
        return found

    @staticmethod
    def _split(value: Any) -> tuple[bytes | None, str]:
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path") or ""
        if isinstance(value, bytes):
            return value, ""
        return None, "" if value is None else str(value)


def _missing(path: str) -> bytes:
    """What stands for a file that can't be read, which is still a record of its own: its path."""
    return b"missing:" + path.encode(errors="surrogatepass")


def _content(path: Path) -> bytes | None:
    """What is in a file; None where there is none, also of a path that no file can have, or what a pipe would say."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def decode_image(data: bytes) -> Image.Image | None:
    """Decode an image file to RGB, turned upright as its EXIF data says; None when it is corrupt or truncated."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception:  # the decoders of so many formats raise almost anything on a broken file
        return None


def to_rgb(image: Image.Image) -> Image.Image | None:
    """An image of 8 bits a colour. Of 16 bits the higher 8 are kept; None for one of any numbers, such as a float TIFF.

    Pillow's own conversion would cut every value above 255 to white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            return None
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _from_list(values: list[str]) -> Fetch:
    return lambda rows: [values[row] for row in rows]
