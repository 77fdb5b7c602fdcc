"""float32 arrays as `numpy.save` writes them, written and read without trusting a header that arrives."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What `numpy.save` writes before float32 values of a shape."""
    stream = io.BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def read_npy(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of the float32 values in `data`, which `numpy.save` wrote; allocates nothing that `data` doesn't hold.

    `numpy.load` would do, at ten times the price, because it evaluates the header, and with an allocation of whatever
    size the header claims.

    Raises
    ------
    ValueError
        Anything else is in it.
    """
    start, fortran = len(npy_header(shape)), False
    try:
        if not data.startswith(npy_header(shape)):
            stream = io.BytesIO(data)
            version = np.lib.format.read_magic(stream)
            claimed, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if version != (1, 0) or claimed != shape or dtype != np.dtype("<f4"):
                raise ValueError("another array than expected")
            start = stream.tell()
        values = np.frombuffer(data, dtype="<f4", offset=start).reshape(shape, order="F" if fortran else "C")
    except SyntaxError as error:
        raise ValueError("no array") from error
    return values.copy()
