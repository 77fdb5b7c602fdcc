"""Noise and sampling of a deployed holder: all randomness from the operating system, integers instead of floats.

OpenDPNoise   OpenDP's exact discrete Gaussian; about 15 microseconds a coordinate
CsprngNoise   the same law from an AES-256 key stream; some hundred times faster

Both add integer noise to a sum on the lattice (fedhead.common.privacy.lattice). With a standard deviation of s steps,
the discrete Gaussian's mass at t standard deviations is that of a rounded continuous Gaussian up to a share of
(t^2 + 1) / (24 s^2), for which exact Gaussian DP accounting holds. Noise multiplier 1 is s > 2^30, where this is below
2^-57 for all that is ever drawn. What remains adds up: n coordinates over T steps add at most n T 2^-56 to epsilon
(1.4e-7 for a million coordinates and 10,000 steps), and less by the square of the noise multiplier. `CsprngNoise` adds
n T 2^-99 to epsilon and to delta.
Reference: Canonne, Kamath, Steinke (2020), arXiv:2004.00010.
"""

from __future__ import annotations

import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from fedhead.common.errors import InputError
from fedhead.common.privacy.lattice import from_lattice, lattice_step, sensitivity, to_lattice

OPENDP: Final = "opendp-discrete-gaussian"
CSPRNG: Final = "aes-ctr-gaussian"

_REACH: Final = 12.5  # standard deviations that CsprngNoise draws; beyond lies a mass of 1e-35
_CELLS: Final = 5  # a cell is 2^-5 to 2^-6 standard deviations wide
_AT_ONCE: Final = 2**16  # draws; keeps the words of one go in the processor's cache
_ROUNDED: Final = 2.0**-43  # share that exp(-n^2 / 2 scale^2) times a factor is off by in float64, at most
_NEAR: Final = 2.0**23  # of 2^64: more than what rounding of a chance, of a draw and of their difference comes to
_WIDEST: Final = 2.0**57  # standard deviation in steps; 12.5 of them and a sum still fit in 63 bits

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


class KeyStream:
    """Random 64-bit words: AES-256 in counter mode, under a key that the operating system gives and nobody keeps."""

    def __init__(self) -> None:
        self._encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> Words:
        """The next words, uint64, shape (count,)."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")


class LatticeNoise(ABC):
    """Integer noise on the lattice; the `Noise` of one step."""

    def add(self, total: Tensor, *, noise_multiplier: float, clipping_norm: float) -> Tensor:
        """`total`, rounded to the lattice, plus discrete Gaussian noise.

        Parameters
        ----------
        total : Tensor, float64
            Sum of clipped gradients, or a part of its coordinates.
        noise_multiplier : float, > 0
        clipping_norm : float, > 0

        Returns
        -------
        Tensor, float64, same shape and device
            Multiples of the lattice's step, whatever the sum was.

        Raises
        ------
        RunError
            The sum is not one of clipped gradients; no noise was drawn and nothing may be released.
        InputError
            The noise has no room in 63 bits.

        Notes
        -----
        Guarantee: the standard deviation is noise_multiplier * C (1 + ETA), so that the release is the Gaussian
        mechanism of this noise multiplier, the rounding of the sum included (see `lattice.ETA`).
        """
        step = lattice_step(clipping_norm)
        scale = noise_multiplier * sensitivity(clipping_norm) / step
        if not 0 < scale <= _WIDEST:
            raise InputError(
                f"noise_multiplier is {noise_multiplier!r}: it must be more than 0 and at most 2^25. Take less."
            )
        whole = to_lattice(total.detach().cpu(), step)
        noise = torch.from_numpy(self.integers(whole.numel(), scale)).view(whole.shape)
        return from_lattice(whole.add_(noise), step).to(total.device)

    @abstractmethod
    def integers(self, count: int, scale: float) -> Integers:
        """Independent discrete Gaussian noise, int64, shape (count,): mass at n proportional to exp(-n^2/2 scale^2)."""


class OpenDPNoise(LatticeNoise):
    """OpenDP's discrete Gaussian: exact in rational arithmetic, each draw from the operating system."""

    def integers(self, count: int, scale: float) -> Integers:
        """Independent draws; see `LatticeNoise.integers`."""
        drawn = _opendp_gaussian(scale)([0] * count) if count else []
        return np.array(drawn, dtype=np.int64)


_FEATURES = threading.Lock()


@lru_cache(maxsize=8)
def _opendp_gaussian(scale: float) -> Any:
    import opendp.prelude as dp  # seconds; only holders that use it pay
    from opendp.mod import GLOBAL_FEATURES

    with _FEATURES:
        # OpenDP asks for consent to "contrib" while a mechanism is made; other users in the process keep their choice
        missing = "contrib" not in GLOBAL_FEATURES
        if missing:
            dp.enable_features("contrib")
        try:
            space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="i64")
            return dp.m.make_gaussian(*space, scale=scale)
        finally:
            if missing:
                dp.disable_features("contrib")


class Envelope(NamedTuple):
    """A step function above exp(-n^2 / 2 scale^2) for n >= 0, whose cells are drawn with exactly known chances.

    Attributes
    ----------
    width : int
        Integers in a cell, a power of two; cell j holds [j width, (j + 1) width).
    upto : uint64, shape (J,)
        Running sums of the cells' weights; of 2^63, so what lies beyond the last one is drawn again.
    unit : float
        The target's scale, taken as an exact number. An n in cell j stays with chance
        unit / weight[j] * exp(-n^2 / 2 scale^2), which is at most 1.
    accept : float64, shape (J,)
        unit / weight, rounded.
    """

    width: int
    upto: Words
    unit: float
    accept: NDArray[np.float64]


@lru_cache(maxsize=8)
def envelope(scale: float) -> Envelope:
    """The envelope that `CsprngNoise` draws from, for one standard deviation in steps."""
    width = 2 ** max(0, math.frexp(scale)[1] - 1 - _CELLS)
    cells = math.ceil(_REACH * scale / width)
    top = np.exp(-0.5 * np.square(np.arange(cells) * (width / scale)))  # the largest value in each cell
    unit = (1 - 2.0**-40) * 2.0**63 / float(top.sum())  # a little less than 2^63 in all: room for rounding up
    # more than top is off by, so that no chance to stay is above 1
    weight = np.floor(top * unit * (1 + 2 * _ROUNDED)).astype(np.uint64) + np.uint64(1)
    upto = np.cumsum(weight, dtype=np.uint64)
    assert int(upto[-1]) <= 2**63
    return Envelope(width, upto, unit, unit / weight.astype(np.float64))


def stays(draw: int, size: int, scale: float, shape: Envelope, cell: int) -> bool:
    """Whether an integer stays, decided with 100 digits.

    Parameters
    ----------
    draw : int
        256 random bits.
    size : int
        n, in this cell.
    scale : float
        Standard deviation in steps.

    Notes
    -----
    Guarantee: over all draws the chance is right to an absolute 2^-255, that is to a share of 2^-190 for any n.
    """
    weight = int(shape.upto[cell]) - (int(shape.upto[cell - 1]) if cell else 0)
    squared = Fraction(size) ** 2 / (2 * Fraction(scale) ** 2)
    with localcontext(Context(prec=100)):
        exponent = Decimal(squared.numerator) / Decimal(squared.denominator)
        chance = (-exponent).exp() * Decimal(shape.unit) / weight
        return Decimal(draw) < chance * 2**256


class CsprngNoise(LatticeNoise):
    """Discrete Gaussian noise from an AES-256 key stream, by rejection from a step function.

    Notes
    -----
    Guarantee: draws are independent, and each integer within 12.5 standard deviations comes with its discrete Gaussian
    mass up to a share of 2^-100, most of which is the mass beyond. Cells and places in them are drawn with exact
    chances, from integers. The chance to stay is computed in float64, where it is off by less than a share of 2^-43:
    the exponent is below 79 and off by five roundings, and exp by some units in the last place. A draw that comes that
    near to it (one in 2^40) is decided with further random bits and 100 digits, by `stays`.

    A new object has a new key: take one for each release.
    """

    def __init__(self) -> None:
        self._stream = KeyStream()

    def integers(self, count: int, scale: float) -> Integers:
        """Independent draws; see `LatticeNoise.integers`."""
        found: list[Integers] = [np.empty(0, dtype=np.int64)]
        missing = count
        while missing > 0:
            # of a hundred proposals one is drawn again
            drawn = self._propose(min(_AT_ONCE, missing + missing // 32 + 16), scale)[:missing]
            found.append(drawn)
            missing -= len(drawn)
        return np.concatenate(found)

    def _propose(self, count: int, scale: float) -> Integers:
        shape = envelope(scale)
        first, second, third = self._stream.words(3 * count).reshape(3, count)
        cell = shape.upto.searchsorted(first >> np.uint64(1), side="right")
        inside = cell < len(shape.upto)
        cell = np.minimum(cell, len(shape.upto) - 1)
        size = cell * shape.width + (second & np.uint64(shape.width - 1)).astype(np.int64)
        chance = shape.accept[cell] * np.exp(-0.5 * np.square(size / scale))
        minus = (first & np.uint64(1)).astype(bool)
        over = third.astype(np.float64) - chance * 2.0**64
        stay = over < 0
        for near in np.flatnonzero(np.abs(over) <= _NEAR):
            if inside[near]:
                stay[near] = self._decide(int(third[near]), int(size[near]), scale, shape, int(cell[near]))
        # 0 has no second sign, or it would come twice as often
        keep = inside & stay & ~(minus & (size == 0))
        kept: Integers = np.where(minus, -size, size)[keep]
        return kept

    def _decide(self, first: int, size: int, scale: float, shape: Envelope, cell: int) -> bool:
        """`stays` for a draw whose first 64 bits are known."""
        draw = first
        for word in self._stream.words(3):
            draw = draw << 64 | int(word)
        return stays(draw, size, scale, shape, cell)


SOURCES: Final[Mapping[str, type[LatticeNoise]]] = {OPENDP: OpenDPNoise, CSPRNG: CsprngNoise}
"""By name, as the ledger writes it; each is made anew for each step."""


def bernoulli_sample(records: int, sample_rate: float) -> Tensor:
    """Draw which records take part in a step, from the operating system's randomness.

    Parameters
    ----------
    records : int, >= 0
        N, true count; it stays at the holder.
    sample_rate : float, in (0, 1]

    Returns
    -------
    index : Tensor, int64, shape (Binomial(N, sample_rate),)
        Rising, without repeats; may be empty.

    Notes
    -----
    Guarantee: each record is in independently, with a probability that is at most sample_rate and less than 2^-64
    below it. Every record takes one word, whatever is drawn.
    """
    if sample_rate == 1:
        return torch.arange(records)
    bound = math.floor(Fraction(sample_rate) * 2**64)
    return torch.from_numpy(np.flatnonzero(KeyStream().words(records) < np.uint64(bound)).astype(np.int64))


@lru_cache(maxsize=1)
def _exact_rate() -> float:
    """Seconds that OpenDP takes for one coordinate, measured once in the process."""
    noise, scale = OpenDPNoise(), 2.0**30
    noise.integers(16, scale)  # loads the library
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        noise.integers(128, scale)
        taken.append((time.perf_counter() - start) / 128)
    return max(taken)  # the slowest: a bound that is held matters more than one step more of exact noise


def seconds_for_exact(coordinates: int) -> float:
    """How long OpenDP's noise for one sum is expected to take on this machine, in seconds.

    Parameters
    ----------
    coordinates : int, >= 0
        Trained parameters.
    """
    return coordinates * _exact_rate()


def choose_source(coordinates: int, steps: int, bound_seconds: float) -> str:
    """Which noise a round takes: OpenDP's where it keeps to the holder's bound on time, else the key stream's.

    Parameters
    ----------
    coordinates : int, >= 0
        Trained parameters.
    steps : int, >= 1
        Local steps of the round; each draws noise.
    bound_seconds : float, >= 0
        Most that a round's noise may take; 0 never takes OpenDP's, and doesn't load it.

    Returns
    -------
    "opendp-discrete-gaussian" or "aes-ctr-gaussian"

    Notes
    -----
    Reads no data. Both have the same guarantee, so nothing is lost if the clock misleads.
    """
    if bound_seconds > 0 and steps * seconds_for_exact(coordinates) <= bound_seconds:
        return OPENDP
    return CSPRNG
