"""The lattice of deployed sums: its step, rounding, range, and what is refused."""

import math

import pytest
import torch

from fedhead.common.errors import InputError, RunError
from fedhead.common.privacy.lattice import (
    ETA,
    MOST_COORDINATES,
    MOST_RECORDS,
    check_sums,
    from_lattice,
    lattice_step,
    sensitivity,
    to_lattice,
)


@pytest.mark.parametrize("norm", [1.0, 0.7, 2.0, math.nextafter(2.0, 0), 1e-3, 3e9, 2.0**-500, 2.0**500])
def test_the_step_is_a_power_of_two_of_the_clipping_norm_alone(norm):
    step = lattice_step(norm)
    assert math.frexp(step)[0] == 0.5
    assert 2**30 <= norm / step < 2**31


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, -math.inf, math.nan, 2.0**501, 2.0**-501, 5e-324])
def test_a_clipping_norm_without_a_lattice_is_refused(norm):
    with pytest.raises(InputError, match=r"^clipping_norm is .*: it must be from 2\^-500 to 2\^500\. "):
        lattice_step(norm)


def test_halves_go_to_the_even_neighbour():
    step = lattice_step(0.7)
    steps = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 7.51, -3.0, 0.0, 2**30 + 0.5], dtype=torch.float64)
    found = to_lattice(steps * step, step)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 2, 2, 0, -2, -2, 0, 8, -3, 0, 2**30]


def test_there_and_back_is_exact_and_keeps_shape():
    step = lattice_step(0.3)
    whole = torch.randint(-(2**52), 2**52, (4, 5, 6))
    back = from_lattice(whole, step)
    assert back.dtype == torch.float64
    assert torch.equal(to_lattice(back, step), whole)
    assert whole.shape == back.shape


def test_the_largest_possible_sum_fits():
    norm = math.nextafter(2.0, 0)
    step = lattice_step(norm)
    total = torch.tensor([MOST_RECORDS * norm, -MOST_RECORDS * norm], dtype=torch.float64)
    assert to_lattice(total, step).tolist() == [round(MOST_RECORDS * norm / step), -round(MOST_RECORDS * norm / step)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**23 + 1, -(2.0**23) - 1, 1e300])
def test_what_is_no_clipped_sum_stops_everything_and_says_nothing(value):
    total = torch.tensor([0.1, value, 0.2], dtype=torch.float64)
    with pytest.raises(RunError) as error:
        to_lattice(total, lattice_step(1.0))
    assert str(error.value) == (
        "the sum of clipped gradients is out of its range: nothing is released. Report this as a bug."
    )


def test_sums_in_float32_are_a_fault_of_ours():
    with pytest.raises(AssertionError):
        to_lattice(torch.zeros(3), lattice_step(1.0))


def test_the_widened_sensitivity():
    assert sensitivity(0.5) == 0.5 * (1 + 2.0**-10)
    assert ETA == 2.0**-10
    # the parts that lattice.ETA lists
    additions = 2 * MOST_RECORDS * MOST_RECORDS * 2.0**-53
    rounding = math.sqrt(MOST_COORDINATES) * 2.0**-30
    assert (additions, rounding) == (2.0**-12, 2.0**-14)
    assert additions + rounding + 2.0**-11 <= ETA


def meta(*shape, dtype=torch.float64):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_what_the_widening_does_not_cover_is_refused():
    check_sums(MOST_RECORDS, [meta(10, 512), meta(10)])
    check_sums(0, [meta(MOST_COORDINATES)])
    with pytest.raises(InputError, match=r"^data.source counts as more than 1048576 records: ") as error:
        check_sums(MOST_RECORDS + 77, [meta(10)])
    assert str(MOST_RECORDS + 77) not in str(error.value)
    with pytest.raises(InputError, match=r"^trainable is torch.float32: .* Call trainable.double\(\)"):
        check_sums(5, [meta(10), meta(10, dtype=torch.float32)])
    with pytest.raises(InputError, match=r"^model.head trains more than 4294967296 numbers"):
        check_sums(5, [meta(MOST_COORDINATES), meta(1)])
