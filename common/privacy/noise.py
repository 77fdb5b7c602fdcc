"""Random streams, and the noise and samples that are drawn from them.

In a deployment all randomness comes from the holder's operating system, anew for each release (how: secure.py). In a
simulation streams are keyed by (seed, holder, round, step, purpose), so that any engine, in any order, draws the same
numbers.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from fedhead.common.privacy.sampling import poisson_sample
from fedhead.common.privacy.secure import CSPRNG, SOURCES, bernoulli_sample

SEEDED: Final = "mt19937-seeded"
"""The source of a simulation's noise; those of a deployment are in secure.py."""

Purpose = Literal["noise", "sampling", "dropout"]

_WORDS: Final = 624  # of the Mersenne Twister's state; in torch's state they start after 24 bytes, each in 8 bytes
_OFFSET: Final = 3


class Noise(Protocol):
    """Noises the sums of one step; the optimizer calls nothing else, so another source of noise is another class."""

    def add(self, total: Tensor, *, noise_multiplier: float, clipping_norm: float) -> Tensor:
        """A new tensor: `total` plus independent Gaussian noise in every coordinate.

        Its standard deviation is noise_multiplier times the sensitivity: clipping_norm, or more where rounding counts.
        """


class TorchNoise:
    """Gaussian noise from a torch generator, the same draws as Opacus's own.

    Parameters
    ----------
    generator : torch.Generator
        On the CPU: noise is drawn there and moved, so that it is the same for any device.

    Notes
    -----
    float32 noise from a Mersenne Twister: not safe against attacks on floating-point numbers (Mironov 2012).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def add(self, total: Tensor, *, noise_multiplier: float, clipping_norm: float) -> Tensor:
        """`total` plus noise of standard deviation noise_multiplier * clipping_norm, shape and dtype kept."""
        # the draws of Opacus's _generate_noise without its buffer of zeros: a twelfth of a small step
        noise = torch.empty(total.shape, dtype=total.dtype)
        self.fill(noise, noise_multiplier=noise_multiplier, clipping_norm=clipping_norm)
        if not total.is_cpu:
            noise = noise.to(total.device)
        return noise.add_(total)

    def fill(self, noise: Tensor, *, noise_multiplier: float, clipping_norm: float) -> None:
        """Put noise of standard deviation noise_multiplier * clipping_norm in place of a contiguous CPU tensor."""
        noise.normal_(0.0, noise_multiplier * clipping_norm, generator=self.generator)


class NoiseOfEach:
    """Noises the sums of several simulated data holders, (H, ...), each from a stream of its own.

    Parameters
    ----------
    noises : sequence of H TorchNoise
        No two with the same generator.

    Notes
    -----
    Row h gets the very bits that ``noises[h].add`` gives a tensor of that row's shape.
    """

    def __init__(self, noises: Sequence[Noise]) -> None:
        self.noises = [noise for noise in noises if isinstance(noise, TorchNoise)]
        assert len(self.noises) == len(noises), "noise of a deployment is never drawn side by side"

    def add(self, total: Tensor, *, noise_multiplier: float, clipping_norm: float) -> Tensor:
        """`total`, shape (H, ...), plus noise of standard deviation noise_multiplier * clipping_norm."""
        found = torch.empty(total.shape, dtype=total.dtype)
        for noise, row in zip(self.noises, found.unbind(), strict=True):
            noise.fill(row, noise_multiplier=noise_multiplier, clipping_norm=clipping_norm)
        return found.add_(total)


def _dropout_generator() -> torch.Generator:
    """A generator whose whole state comes from the operating system.

    Notes
    -----
    For dropout, which torch draws itself; the noise doesn't rest on it. Not ``manual_seed``: torch keeps 32 bits of it,
    and 2^32 masks can be tried one by one.
    """
    generator = torch.Generator()
    state = generator.manual_seed(0).get_state()
    words = torch.frombuffer(bytearray(os.urandom(4 * _WORDS)), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
    state.view(torch.int64)[_OFFSET : _OFFSET + _WORDS] = words
    generator.set_state(state)
    return generator


class Streams(ABC):
    """The random streams of one data holder in one round: noise, sampling and dropout, each step its own.

    Made by `system_streams` or `simulation_streams`, never from a flag or a seed alone: a seed that arrives with a
    request must not reach the noise by accident.
    """

    seeded: bool
    """Whether whoever knows a seed can draw the streams again; epsilon then means nothing to them."""

    source: str
    """Where the noise comes from, as the ledger writes it."""

    @abstractmethod
    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        """The stream of one step and purpose, from its start."""

    @abstractmethod
    def noise(self, step: int) -> Noise:
        """The noise of one step."""

    @abstractmethod
    def sample(self, step: int, records: int, rate: float) -> Tensor:
        """Which of N records take part in a step, each independently with probability `rate`: int64, rising."""


class _SystemStreams(Streams):
    seeded = False

    def __init__(self, source: str) -> None:
        self.source = source
        self._noise = SOURCES[source]

    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        assert purpose == "dropout", "noise and samples of a deployment come from no generator of torch"
        return _dropout_generator()

    def noise(self, step: int) -> Noise:
        return self._noise()

    def sample(self, step: int, records: int, rate: float) -> Tensor:
        return bernoulli_sample(records, rate)


class _SimulationStreams(Streams):
    seeded = True
    source = SEEDED

    def __init__(self, seed: int, holder: str, round: int) -> None:
        self._prefix = hashlib.blake2b(repr((seed, holder, round)).encode(), digest_size=8)
        self._sampling = torch.Generator()

    def _seed(self, step: int, purpose: Purpose) -> int:
        key = self._prefix.copy()
        key.update(f"{step}:{purpose}".encode())
        return int.from_bytes(key.digest(), "little")

    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(step, purpose))

    def noise(self, step: int) -> Noise:
        return TorchNoise(self.generator(step, "noise"))

    def sample(self, step: int, records: int, rate: float) -> Tensor:
        # one generator for all samples: nothing is left of it when this returns
        return poisson_sample(records, rate, self._sampling.manual_seed(self._seed(step, "sampling")))


def system_streams(source: str = CSPRNG) -> Streams:
    """Streams for a deployment.

    Parameters
    ----------
    source : "aes-ctr-gaussian" or "opendp-discrete-gaussian"
        Of the noise; `secure.choose_source` says whether there is time for OpenDP's.

    Raises
    ------
    KeyError
        There is no such source.

    Notes
    -----
    Guarantee: noise and samples of every step are drawn from the operating system's randomness alone, under a new key
    each; no generator of Python, numpy or torch is read, and no seed has a way in. Noise takes float64 sums only.
    """
    return _SystemStreams(source)


def simulation_streams(seed: int, holder: str, round: int) -> Streams:
    """Streams for a simulation, keyed by (seed, holder, round, step, purpose).

    Parameters
    ----------
    seed : int
        Of the run.
    holder : str
        The holder's name.
    round : int

    Notes
    -----
    The same key gives the same draws on any engine, in any order. torch keeps 32 bits of a seed, so two of a run's
    streams may coincide, once in 2^32 pairs. Seeded noise hides nothing from whoever knows the seed.
    """
    return _SimulationStreams(seed, holder, round)
