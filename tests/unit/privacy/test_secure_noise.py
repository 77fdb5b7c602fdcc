"""Secure noise: always on the lattice, its mass exact against rational arithmetic, refusals, the choice of a source."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from fedhead.common.errors import InputError, RunError
from fedhead.common.privacy import secure
from fedhead.common.privacy.lattice import lattice_step, sensitivity
from fedhead.common.privacy.secure import CsprngNoise, KeyStream, OpenDPNoise, bernoulli_sample, choose_source, envelope

SOURCES = [CsprngNoise, OpenDPNoise]
SIZE = {"noise_multiplier": 1.3, "clipping_norm": 0.7}
SCALES = [0.3, 1.0, 3.3, 63.0, 64.0, 1000.3, 1.3 * 2**30, 2.0**31, 2.0**57]


def steps_of(values, norm=0.7):
    return values.double().numpy() / lattice_step(norm)


@pytest.mark.parametrize("source", SOURCES)
def test_neighbours_have_the_same_support(source):
    """Whatever the sum, what comes out are multiples of one step that the clipping norm alone fixes."""
    torch.manual_seed(0)
    one = torch.randn(40, 3, dtype=torch.float64)
    for total in (one, one + 0.01 * torch.randn_like(one), torch.zeros_like(one), one * 1e-12, one * 1e5):
        found = source().add(total, **SIZE)
        assert found.dtype == torch.float64
        assert found.shape == total.shape
        steps = steps_of(found)
        assert (steps == np.round(steps)).all()
        # all residues come up: no coarser lattice, which could depend on the sum
        assert len(set((steps % 8).ravel())) == 8


@pytest.mark.parametrize("source", SOURCES)
def test_the_input_is_kept_and_edges_of_shape_work(source):
    total = torch.ones(5, dtype=torch.float64)
    source().add(total, **SIZE)
    assert torch.equal(total, torch.ones(5, dtype=torch.float64))
    for shape in ((0,), (), (1,), (2, 3, 4)):
        assert source().add(torch.zeros(shape, dtype=torch.float64), **SIZE).shape == shape


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
def test_a_sum_out_of_range_draws_no_noise(source, value, monkeypatch):
    def never(self, count, scale):
        raise AssertionError("noise was drawn")

    monkeypatch.setattr(source, "integers", never)
    with pytest.raises(RunError, match=r"^the sum of clipped gradients is out of its range: nothing is released"):
        source().add(torch.tensor([0.0, value], dtype=torch.float64), **SIZE)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_noise_without_room_is_refused(multiplier):
    with pytest.raises(InputError, match=r"^noise_multiplier is .*: it must be more than 0 and at most 2\^25"):
        CsprngNoise().add(torch.zeros(2, dtype=torch.float64), noise_multiplier=multiplier, clipping_norm=1.0)


@pytest.mark.parametrize("source", SOURCES)
def test_the_scale_is_that_of_the_widened_sensitivity(source, monkeypatch):
    asked = []
    monkeypatch.setattr(source, "integers", lambda self, n, scale: (asked.append(scale), np.zeros(n, np.int64))[1])
    source().add(torch.zeros(2, dtype=torch.float64), **SIZE)
    assert asked == [1.3 * sensitivity(0.7) / lattice_step(0.7)]
    assert asked[0] * lattice_step(0.7) > 1.3 * 0.7 * (1 + 2.0**-11)


def test_the_largest_noise_stays_in_range():
    found = CsprngNoise().add(torch.zeros(500, dtype=torch.float64), noise_multiplier=2.0**25, clipping_norm=1.999)
    assert found.isfinite().all()
    assert 0.8 < float(found.std()) / (2.0**25 * 1.999) < 1.2


# ---- the mass of each integer ----


def mass(shape, scale, n):
    """Chance of one proposal to end at n >= 0 with a plus sign, as CsprngNoise computes it, in exact arithmetic."""
    cell, weights = n // shape.width, np.diff(shape.upto.astype(object), prepend=0)
    stay = float(shape.accept[cell]) * float(np.exp(-0.5 * np.square(np.int64(n) / scale)))
    return Fraction(int(weights[cell]), 2**63) * Fraction(1, shape.width) * Fraction(min(1.0, stay))


def worst_share(shape, scale, upto=8.0):
    """Largest relative error of a mass against exp(-n^2 / 2 scale^2), in 60 digits."""
    rng = np.random.default_rng(1)
    last = max(1, int(upto * scale))
    places = {0, 1, shape.width - 1, shape.width, last} | {int(n) for n in rng.integers(0, last, 300, dtype=np.int64)}
    zero, worst = mass(shape, scale, 0), 0.0
    with mpmath.workdps(60):
        for n in places:
            expected = mpmath.exp(-(mpmath.mpf(n) ** 2) / (2 * mpmath.mpf(scale) ** 2))
            found = mass(shape, scale, n) / zero
            share = mpmath.mpf(found.numerator) / found.denominator / expected - 1
            worst = max(worst, abs(float(share)))
    return worst


@pytest.mark.parametrize("scale", SCALES)
def test_each_mass_is_that_of_the_discrete_gaussian(scale):
    assert worst_share(envelope(scale), scale) < 2.0**-44


def exact_chance(shape, scale, size, cell):
    weights = np.diff(shape.upto.astype(object), prepend=0)
    with mpmath.workdps(120):
        gauss = mpmath.exp(-(mpmath.mpf(size) ** 2) / (2 * mpmath.mpf(scale) ** 2))
        return gauss * mpmath.mpf(shape.unit) / int(weights[cell])


class Scripted:
    """A stream of words that were written beforehand; counts how many are asked for."""

    def __init__(self, *parts):
        self.parts, self.asked = list(parts), []

    def words(self, count):
        self.asked.append(count)
        return np.array(self.parts.pop(0), dtype=np.uint64)


@pytest.mark.parametrize("scale", [1000.3, 1.3 * 2**30])
def test_a_draw_near_its_chance_is_decided_exactly(scale):
    """The first 64 bits of the draw are those of the chance: float64 can't tell, the bits that follow do."""
    shape = envelope(scale)
    cell, inside = 40, shape.width - 1
    size = cell * shape.width + inside
    with mpmath.workdps(120):
        chance = int(mpmath.floor(exact_chance(shape, scale, size, cell) * mpmath.mpf(2) ** 256))
    first = (int(shape.upto[cell]) - 1) << 1  # the last place of the cell, with a plus sign
    for draw, kept in ((chance - 2**40, [size]), (chance + 2**40, [])):
        words = [draw >> 64 * n & 2**64 - 1 for n in (3, 2, 1, 0)]
        noise = CsprngNoise()
        noise._stream = Scripted([first, inside, words[0]], words[1:])
        assert noise._propose(1, scale).tolist() == kept
        assert noise._stream.asked == [3, 3]  # the near path was taken


@pytest.mark.parametrize("scale", SCALES)
def test_far_from_its_chance_float64_and_exact_arithmetic_agree(scale, monkeypatch):
    decided = []

    def decide(self, *given):
        decided.append(secure.stays(given[0] << 192, *given[1:]))
        return decided[-1]

    noise, again = CsprngNoise(), CsprngNoise()
    words = noise._stream.words(3 * 300)
    usual, exact = (Scripted(words.tolist()) for _ in range(2))
    noise._stream, again._stream = usual, exact
    found = noise._propose(300, scale)
    assert usual.asked == [900]  # none was near
    monkeypatch.setattr(CsprngNoise, "_decide", decide)
    monkeypatch.setattr(secure, "_NEAR", math.inf)
    assert again._propose(300, scale).tolist() == found.tolist()
    assert len(decided) >= 299


@pytest.mark.parametrize("scale", SCALES)
def test_no_chance_to_stay_is_above_one_and_rounding_is_within_what_counts_as_near(scale):
    shape = envelope(scale)
    for cell in {0, 1, 2, len(shape.upto) // 2, len(shape.upto) - 1} & set(range(len(shape.upto))):
        for size in {cell * shape.width, (cell + 1) * shape.width - 1}:
            exact = exact_chance(shape, scale, size, cell)
            assert exact <= 1
            rounded = float(shape.accept[cell] * np.exp(-0.5 * np.square(np.int64(size) / scale)))
            assert abs(rounded - exact) * 2**64 < secure._NEAR / 2


def test_wrong_envelopes_are_told_apart():
    scale = 1000.3
    right = envelope(scale)
    assert worst_share(right._replace(accept=right.accept * 0 + 1), scale) > 1e-3  # weights not taken into account
    moved = right.upto.copy()
    moved[1:] += np.uint64(2**30)  # one cell a little heavier: a share of 2^-27
    assert worst_share(right._replace(upto=moved), scale) > 2.0**-30


@pytest.mark.parametrize("scale", SCALES)
def test_the_envelope_lies_above_and_leaves_little_out(scale):
    shape = envelope(scale)
    upto = shape.upto.astype(object)
    assert 2**63 - 2**40 < upto[-1] <= 2**63
    assert (np.diff(upto, prepend=0) > 0).all()
    assert shape.width * len(upto) >= 12.5 * scale
    left = np.arange(len(upto)) * float(shape.width)
    assert (shape.accept * np.exp(-0.5 * (left / scale) ** 2) <= 1 + 1e-12).all()


def test_words_are_aes_in_counter_mode(monkeypatch):
    """The first blocks for a key of zeros, as NIST's AES-256 known answers give them for counters 0 and 1."""
    monkeypatch.setattr("os.urandom", bytes)
    stream = KeyStream()
    found = b"".join(stream.words(n).tobytes() for n in (1, 3))
    assert found.hex() == "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"


# ---- sampling ----


def test_a_record_is_in_when_its_word_is_below_the_rate(monkeypatch):
    words = np.array([0, 2**63 - 1, 2**63, 2**64 - 1, 2**62, 2**62 - 1], dtype=np.uint64)
    monkeypatch.setattr(KeyStream, "words", lambda self, n: words[:n])
    assert bernoulli_sample(6, 0.5).tolist() == [0, 1, 4, 5]
    assert bernoulli_sample(6, 0.25).tolist() == [0, 5]
    assert bernoulli_sample(6, math.nextafter(1.0, 0.0)).tolist() == [0, 1, 2, 4, 5]
    assert bernoulli_sample(6, 2.0**-64).tolist() == [0]
    assert bernoulli_sample(6, 2.0**-65).tolist() == []
    assert bernoulli_sample(6, 1.0).tolist() == [0, 1, 2, 3, 4, 5]


def test_edges_of_secure_sampling():
    assert bernoulli_sample(0, 0.5).shape == (0,)
    assert bernoulli_sample(0, 1.0).shape == (0,)
    assert all(bernoulli_sample(9, rate).dtype == torch.int64 for rate in (0.3, 1.0))


# ---- the choice of a source ----


def test_the_choice_keeps_to_the_bound(monkeypatch):
    monkeypatch.setattr(secure, "_exact_rate", lambda: 1e-5)
    assert secure.seconds_for_exact(5130) == pytest.approx(0.0513)
    assert choose_source(5130, 1, 0.06) == "opendp-discrete-gaussian"
    assert choose_source(5130, 1, 0.05) == "aes-ctr-gaussian"
    assert choose_source(5130, 10, 0.06) == "aes-ctr-gaussian"
    assert choose_source(0, 10, 0.06) == "opendp-discrete-gaussian"


def test_no_time_for_exact_noise_never_measures_it(monkeypatch):
    monkeypatch.setattr(secure, "_exact_rate", lambda: pytest.fail("measured"))
    assert choose_source(5130, 1, 0.0) == "aes-ctr-gaussian"


def test_the_rate_is_measured_once_and_plausible():
    first = secure.seconds_for_exact(1000)
    assert 1e-4 < first < 30
    assert secure.seconds_for_exact(1000) == first


def test_consent_to_opendp_features_stays_local():
    from opendp.mod import GLOBAL_FEATURES

    secure._opendp_gaussian.cache_clear()
    before = set(GLOBAL_FEATURES)
    OpenDPNoise().integers(3, 2.5)
    assert before == GLOBAL_FEATURES
    GLOBAL_FEATURES.add("contrib")
    try:
        secure._opendp_gaussian.cache_clear()
        OpenDPNoise().integers(3, 2.5)
        assert "contrib" in GLOBAL_FEATURES
    finally:
        GLOBAL_FEATURES.clear()
        GLOBAL_FEATURES.update(before)
