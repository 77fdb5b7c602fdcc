"""What is said of a wrong sum: made from known factors, the fault must be the one that was made."""

import numpy as np
import pytest

from fedhead.client.auditing.diagnosis import fault_of

NORM = 0.5


@pytest.fixture
def gradients():
    rows = np.random.default_rng(4).standard_normal((12, 40))
    lengths = np.geomspace(0.1, 20, 12)  # some below the clipping norm
    return rows / np.linalg.norm(rows, axis=1)[:, None] * lengths[:, None]


def right(gradients):
    return np.minimum(1, NORM / np.linalg.norm(gradients, axis=1))


def said(gradients, factors, beside=0.0, unit="record"):
    return fault_of(factors @ gradients + beside, gradients, NORM, unit)


def only(place, value):
    return lambda factors: np.where(np.arange(len(factors)) == place, value * factors, factors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda factors: 1.5 * factors, "All 12 records count 1.5 times what the clipping norm allows: clipped too"),
        (only(3, 1.01), "1 of 12 records count 1.01 times what the clipping norm allows: clipped too little"),
        (only(3, 2.0), "1 of 12 records count 2 times what the clipping norm allows: counted more than once"),
        (only(5, 0.0), "1 of 12 records are left out of a sum that they belong to"),
        (only(5, 0.9), "1 of 12 records count for less than they should, down to 0.9 of it"),
        (lambda factors: np.full_like(factors, 0.07), "the batch is clipped as one, not each record by itself"),
        (lambda factors: factors * np.linspace(0.5, 2, 12), "what one record counts depends on the others"),
        (lambda factors: factors * np.linspace(1.1, 2, 12), "All 12 records count 1.1 to 2 times"),
    ],
)
def test_what_was_done_to_factors_is_named(gradients, change, says):
    assert says in said(gradients, change(right(gradients)))


def test_what_is_no_gradient_is_told_by_its_length(gradients):
    beside = np.linalg.svd(gradients)[2][-1] * 3 * NORM  # at right angles to all of them
    assert said(gradients, right(gradients), beside) == (
        "A sum holds 3 clipping norms of something that is no gradient of its records."
    )


def test_persons_are_called_persons(gradients):
    assert "1 of 12 persons count" in said(gradients, only(0, 3.5)(right(gradients)), unit="person")


def test_records_that_are_alike_can_not_be_told_apart(gradients):
    gradients[1] = gradients[0]
    assert "can't be told" in said(gradients, 2 * right(gradients))
    assert "can't be told" in said(np.tile(gradients, (4, 1)), 2 * right(np.tile(gradients, (4, 1))))


def test_sums_of_nothing_and_sums_that_are_none(gradients):
    assert fault_of(np.ones(40), np.zeros((0, 40)), NORM, "record") == (
        "A sum over no record with a gradient is not zero."
    )
    assert "is not a number" in fault_of(np.full(40, np.nan), gradients, NORM, "record")


def test_records_without_a_gradient_say_nothing(gradients):
    gradients[2] = 0
    factors = np.where(
        np.arange(12) == 2, 1.0, 1.5 * np.minimum(1, NORM / np.linalg.norm(gradients, axis=1).clip(1e-9))
    )
    assert "All 11 records count 1.5 times" in said(gradients, factors)
