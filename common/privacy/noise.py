"""Random streams and the noise that is drawn from them.

In a deployment every stream starts from the holder's operating system, anew for each release. In a simulation streams
are keyed by (seed, holder, round, step, purpose), so that any engine, in any order, draws the same numbers.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

Purpose = Literal["noise", "sampling", "dropout"]

_WORDS: Final = 624  # of the Mersenne Twister's state; in torch's state they start after 24 bytes, each in 8 bytes
_OFFSET: Final = 3


class Noise(Protocol):
    """Adds noise to one sum; the optimizer calls nothing else, so another source of noise is another class."""

    def add(self, total: Tensor, std: float) -> Tensor:
        """A new tensor: `total` plus independent Gaussian noise of standard deviation `std` in every coordinate."""


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

    def add(self, total: Tensor, std: float) -> Tensor:
        """`total` plus noise, shape and dtype kept."""
        # the draws of Opacus's _generate_noise without its buffer of zeros: a twelfth of a small step
        noise = torch.empty(total.shape, dtype=total.dtype).normal_(0.0, std, generator=self.generator)
        return noise.to(total.device).add_(total)


def system_generator() -> torch.Generator:
    """A generator whose whole state comes from the operating system.

    Notes
    -----
    Not ``manual_seed``: torch keeps 32 bits of it, and 2^32 noises can be tried one by one.
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

    @abstractmethod
    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        """The stream of one step and purpose, from its start."""

    def noise(self, step: int) -> Noise:
        """The noise of one step."""
        return TorchNoise(self.generator(step, "noise"))


class _SystemStreams(Streams):
    seeded = False

    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        return system_generator()


class _SimulationStreams(Streams):
    seeded = True

    def __init__(self, seed: int, holder: str, round: int) -> None:
        self._prefix = hashlib.blake2b(repr((seed, holder, round)).encode(), digest_size=8)

    def generator(self, step: int, purpose: Purpose) -> torch.Generator:
        key = self._prefix.copy()
        key.update(b"%d:%s" % (step, purpose.encode()))
        return torch.Generator().manual_seed(int.from_bytes(key.digest(), "little"))


def system_streams() -> Streams:
    """Streams for a deployment.

    Notes
    -----
    Guarantee: every generator is new and starts from the operating system's randomness, whatever was drawn before.
    """
    return _SystemStreams()


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
