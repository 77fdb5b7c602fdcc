"""Random streams: keyed by all that a simulation names, or from the operating system and from nothing else."""

import inspect
import itertools
import random

import numpy as np
import pytest
import torch
from opacus.optimizers.optimizer import _generate_noise

from fedhead.common.privacy import noise
from fedhead.common.privacy.noise import TorchNoise, simulation_streams, system_streams
from fedhead.common.privacy.sampling import poisson_sample

SIZE = {"noise_multiplier": 1.3, "clipping_norm": 0.7}
SOURCES = ["aes-ctr-gaussian", "opendp-discrete-gaussian"]


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
    assert again.source == "mt19937-seeded"


def test_parts_of_the_key_do_not_run_together():
    assert draws(simulation_streams(1, "1", 1).generator(1, "noise")) != draws(
        simulation_streams(11, "", 1).generator(1, "noise")
    )


def test_noise_and_samples_of_a_simulation_are_those_of_its_generators():
    streams = simulation_streams(3, "holder", 2)
    total = torch.randn(6, 4)
    for step in (1, 0, 1):  # in any order, as often as one likes
        expected = TorchNoise(streams.generator(step, "noise")).add(total, **SIZE)
        assert torch.equal(streams.noise(step).add(total, **SIZE), expected)
        sample = poisson_sample(500, 0.1, streams.generator(step, "sampling"))
        assert torch.equal(streams.sample(step, 500, 0.1), sample)
    assert not torch.equal(streams.sample(0, 500, 0.1), streams.sample(1, 500, 0.1))


def test_the_draws_of_a_simulation_stay():
    """Written down, so that a run of an older version can be repeated."""
    streams = simulation_streams(7, "holder-00001", 3)
    found = [streams.sample(step, 60, 0.05).tolist() for step in range(3)]
    assert found == [[10, 24, 41], [7, 8, 20, 35, 44, 58, 59], [28, 36]]
    drawn = streams.noise(0).add(torch.zeros(3), noise_multiplier=2.0, clipping_norm=0.5)
    assert drawn.tolist() == pytest.approx([0.57451331615448, 0.8464592695236206, -1.2629989385604858], rel=1e-5)


def legacy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def everything_drawn(source):
    streams = system_streams(source)
    return (
        tuple(streams.noise(0).add(torch.zeros(4, dtype=torch.float64), **SIZE).tolist()),
        tuple(streams.sample(0, 200, 0.5).tolist()),
        draws(streams.generator(0, "dropout")),
    )


@pytest.mark.parametrize("source", SOURCES)
def test_system_streams_never_repeat_whatever_is_seeded(source):
    streams = system_streams(source)
    assert not streams.seeded
    assert streams.source == source
    everything_drawn(source)  # what OpenDP imports reads Python's generator, once
    found = []
    for _ in range(5):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        before = torch.get_rng_state(), legacy_state(), random.getstate()
        found.append(everything_drawn(source))
        assert torch.equal(torch.get_rng_state(), before[0])  # not read, not moved
        assert legacy_state() == before[1]
        assert random.getstate() == before[2]
    for drawn in zip(*found, strict=True):
        assert len(set(drawn)) == len(found)


def test_a_seed_has_no_way_into_system_streams():
    assert list(inspect.signature(system_streams).parameters) == ["source"]
    for unknown in (7, True, "mt19937-seeded"):
        with pytest.raises(KeyError):
            system_streams(unknown)
    for purpose in ("noise", "sampling"):
        with pytest.raises(AssertionError, match="no generator of torch"):
            system_streams().generator(0, purpose)


def test_the_operating_system_is_the_only_source(monkeypatch):
    """With the same bytes from the system everything repeats; with others nothing does."""

    def drawn(byte):
        monkeypatch.setattr("os.urandom", lambda n: bytes([byte]) * n)
        return everything_drawn(SOURCES[0])

    first = drawn(1)
    assert drawn(1) == first
    assert all(a != b for a, b in zip(drawn(2), first, strict=True))


def test_every_step_and_purpose_asks_for_a_key_of_its_own(monkeypatch):
    asked = []
    real = noise.os.urandom
    monkeypatch.setattr("os.urandom", lambda n: (asked.append(n), real(n))[1])
    streams, zero = system_streams(), torch.zeros(2, 3, dtype=torch.float64)
    assert asked == []
    for step in (0, 0, 1):
        first = streams.noise(step)
        a, b = first.add(zero, **SIZE), first.add(zero, **SIZE)
        assert not torch.equal(a, b)  # two parameters of a step: one key, another part of its stream
    assert asked == [32] * 3
    streams.sample(0, 10, 0.5)
    assert asked == [32] * 4
    streams.generator(0, "dropout")
    assert asked == [32] * 4 + [4 * 624]


def test_all_624_words_of_dropout_come_from_the_system(monkeypatch):
    """torch keeps 32 bits of a manual seed; here the state itself is set, as an independent Mersenne Twister shows."""
    raw = np.random.default_rng(3).bytes(4 * 624)
    monkeypatch.setattr("os.urandom", lambda n: raw[:n])
    words = np.frombuffer(raw, dtype="<u4").tolist()
    reference = random.Random()
    reference.setstate((3, (*words, 624), None))
    # torch takes two 32-bit draws for a 64-bit number, and the second is its lower half
    expected = [(reference.getrandbits(32), reference.getrandbits(32))[1] & 0x7FFFFFFF for _ in range(2000)]
    generator = system_streams().generator(0, "dropout")
    assert torch.empty(2000, dtype=torch.int64).random_(0, 2**31, generator=generator).tolist() == expected


def test_noise_is_opacus_noise():
    total = torch.randn(7, 3)
    found = TorchNoise(torch.Generator().manual_seed(4)).add(total, noise_multiplier=3.0, clipping_norm=0.5)
    drawn = _generate_noise(std=1.5, reference=total, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found, total + drawn)
    assert found is not total
