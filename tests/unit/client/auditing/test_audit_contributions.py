"""The largest contribution of one record or person: within the clipping norm, and wrong twins beyond it."""

from pathlib import Path
from runpy import run_path

import pytest

from fedhead.client.auditing import contributions
from fedhead.client.auditing.contributions import TOLERANCE, largest_contribution
from fedhead.common.errors import InputError
from fedhead.common.privacy.secure import LatticeNoise

BENCH = run_path(str(Path(__file__).with_name("audit_bench.py")))
Bench, LINEAR, MLP = (BENCH[name] for name in ("Bench", "LINEAR", "MLP"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(contributions, "_SIZES", (0, 5))
    monkeypatch.setattr(contributions, "_CHUNK", 4)


def found(bench):
    return largest_contribution(bench.setup())


@pytest.mark.parametrize(
    "settings",
    [
        {"head": LINEAR, "system": True},
        {"head": LINEAR, "clipping_norm": 0.01, "normalize": False},  # float32
        {"head": LINEAR, "people": 3, "double": True, "mechanism": "poisson", "sample_rate": 0.1},
        {"head": MLP, "double": True, "mechanism": "poisson", "sample_rate": 0.1},
        {"head": MLP, "people": 2, "system": True, "normalize": False},
    ],
)
def test_right_training_keeps_the_bound_and_reaches_it(settings):
    result = found(Bench(features=12, **settings))
    assert 0.999 < result.largest <= 1 + TOLERANCE
    assert result.by_kind["not a number"] < 1e-5
    check = result.check()
    assert check.passed
    assert check.p_value is None
    assert check.name == "largest-contribution"
    assert ("person" if settings.get("people") else "record") in check.meaning


@pytest.mark.parametrize("head", [LINEAR, MLP])
def test_a_looser_clip_is_measured(monkeypatch, head):
    BENCH["clip_looser"](monkeypatch)
    result = found(Bench(head, features=12, double=True))
    assert result.largest == pytest.approx(1.5, rel=1e-4)
    check = result.check()
    assert not check.passed
    assert "A record like any other is clipped to 1.5 times the clipping norm" in check.meaning


@pytest.mark.parametrize(
    ("twin", "says"),
    [("clip_batches", "records are clipped together, not each by itself"), ("count_truly", "follows the true count")],
)
def test_clipping_per_batch_and_the_true_count_are_seen_and_told_apart(monkeypatch, twin, says):
    BENCH[twin](monkeypatch)
    result = found(Bench(features=12, double=True))
    assert result.largest > 1.2
    assert says in result.check().meaning


def test_clipping_records_of_persons_is_seen(monkeypatch):
    BENCH["clip_records_of_persons"](monkeypatch)
    result = found(Bench(features=12, people=3, double=True))
    assert result.largest > 100
    assert result.kind == "a great many records"
    assert "One person (a great many records) moves a sum by" in result.check().meaning


def test_a_sum_that_is_not_a_number_is_seen(monkeypatch):
    BENCH["let_nan_through"](monkeypatch)
    result = found(Bench(features=12, double=True))
    assert result.largest == float("inf")
    assert not result.check().passed


def test_a_round_that_a_record_makes_refuse_is_seen(monkeypatch):
    """The lattice refuses sums that are not numbers: the refusal itself tells of the record."""
    BENCH["let_nan_through"](monkeypatch)
    assert issubclass(type(Bench(system=True).streams(1).noise(0)), LatticeNoise)
    assert found(Bench(features=12, system=True)).largest == float("inf")


def test_without_noise_there_is_nothing_to_measure():
    with pytest.raises(InputError, match=r"privacy\.mechanism is 'none'"):
        found(Bench(mechanism="none"))
