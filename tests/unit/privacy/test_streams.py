"""Random streams: the whole state from the operating system, or keyed by all that a simulation names."""

import inspect
import itertools
import random

import numpy as np
import torch
from opacus.optimizers.optimizer import _generate_noise

from fedhead.common.privacy import noise
from fedhead.common.privacy.noise import TorchNoise, simulation_streams, system_generator, system_streams


def draws(generator, n=8):
    return tuple(torch.randint(2**31, (n,), generator=generator).tolist())


def test_streams_differ_in_every_part_of_the_key_and_repeat():
    keys = itertools.product((0, 1), ("a", "b"), (1, 11), (1, 11), ("noise", "sampling", "dropout"))
    found = {key: draws(simulation_streams(*key[:3]).generator(*key[3:])) for key in keys}
    assert len(set(found.values())) == len(found)
    again = simulation_streams(1, "b", 11)
    assert draws(again.generator(1, "noise")) == found[1, "b", 11, 1, "noise"]
    assert draws(again.generator(1, "noise")) == found[1, "b", 11, 1, "noise"]  # from its start every time
    assert again.seeded


def test_parts_of_the_key_do_not_run_together():
    assert draws(simulation_streams(1, "1", 1).generator(1, "noise")) != draws(
        simulation_streams(11, "", 1).generator(1, "noise")
    )


def test_system_streams_never_repeat_whatever_the_seed():
    streams = system_streams()
    assert not streams.seeded
    torch.manual_seed(0)
    first = draws(streams.generator(0, "noise"))
    torch.manual_seed(0)
    assert len({first, *(draws(streams.generator(0, "noise")) for _ in range(50))}) == 51
    assert not inspect.signature(system_streams).parameters  # no way for a seed to come in


def test_all_624_words_come_from_the_system(monkeypatch):
    """torch keeps 32 bits of a manual seed; here the state itself is set, as an independent Mersenne Twister shows."""
    raw = np.random.default_rng(3).bytes(4 * 624)
    monkeypatch.setattr(noise.os, "urandom", lambda n: raw[:n])
    words = np.frombuffer(raw, dtype="<u4").tolist()
    reference = random.Random()
    reference.setstate((3, (*words, 624), None))
    # torch takes two 32-bit draws for a 64-bit number, and the second is its lower half
    expected = [(reference.getrandbits(32), reference.getrandbits(32))[1] & 0x7FFFFFFF for _ in range(2000)]
    assert torch.empty(2000, dtype=torch.int64).random_(0, 2**31, generator=system_generator()).tolist() == expected


def test_noise_is_opacus_noise():
    total = torch.randn(7, 3)
    found = TorchNoise(torch.Generator().manual_seed(4)).add(total, 1.5)
    drawn = _generate_noise(std=1.5, reference=total, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found, total + drawn)
    assert found is not total
