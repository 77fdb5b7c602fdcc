"""From noised counts to an estimate, and how the estimate is shown."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from fedhead.common.errors import InputError
from fedhead.common.results import Result
from fedhead.server.metrics import NoisedAccuracy, estimate
from fedhead.simulations.console import show_result
from fedhead.simulations.report import render

SAID = "Accuracy from noised counts"


def test_sum_over_what_is_declared():
    counts = [70.5, 82.0, -3.25]
    found = estimate(counts, 1000, 0.1, 20.0)
    assert found is not None
    assert found.value == pytest.approx(float(sum(map(Fraction, counts)) / 300))
    assert found.standard_error == pytest.approx(math.sqrt(3) * 20 / 300)
    assert found.holders == 3
    assert found.to_row() == {"accuracy": found.value, "standard_error": found.standard_error, "holders": 3}


def test_each_holder_may_declare_its_own_number():
    found = estimate([30.0, 500.0], [400, 6000], 0.1, 20.0)
    assert found is not None
    assert found.value == pytest.approx(530 / 640)
    assert found.standard_error == pytest.approx(math.sqrt(2) * 20 / 640)


def test_the_estimate_is_not_clamped():
    low, high = estimate([-50.0], 100, 0.1, 20.0), estimate([50.0], 100, 0.1, 20.0)
    assert low is not None
    assert high is not None
    assert (low.value, high.value) == (pytest.approx(-5), pytest.approx(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, -1e17])
def test_a_count_that_is_none_is_left_out_with_its_holder(bad):
    assert estimate([40.0, bad], [500, 700], 0.1, 20.0) == estimate([40.0], [500], 0.1, 20.0)
    assert estimate([bad], 500, 0.1, 20.0) is None


def test_without_counts_there_is_no_estimate():
    assert estimate([], 500, 0.1, 20.0) is None


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (([1.0], 0, 0.1, 20.0), "declared_records"),
        (([1.0, 2.0], [5], 0.1, 20.0), "declared_records"),
        (([1.0], 10, 0.0, 20.0), "privacy.metrics.fraction"),
        (([1.0], 10, 1.0, 20.0), "privacy.metrics.fraction"),
        (([1.0], 10, 0.1, 0.0), "privacy.metrics.noise_multiplier"),
        (([1.0], 10, 0.1, math.nan), "privacy.metrics.noise_multiplier"),
    ],
)
def test_public_numbers_without_sense_are_refused(arguments, setting):
    with pytest.raises(InputError, match=f"^{setting} ") as refused:
        estimate(*arguments)
    assert "\n" not in str(refused.value)


def result(noised=None, final=None) -> Result:
    """Three rounds; `noised` is round -> estimate."""
    rows = []
    for number in (1, 2, 3):
        row = {
            "round": number, "metrics": {"accuracy": 0.6 + 0.05 * number}, "seconds": 0.1, "bytes_up": 1,
            "bytes_down": 1, "holders": 2, "refused": [], "epsilon": None,
        }  # fmt: skip
        if number in (noised or {}):
            row["noised"] = noised[number].to_row()
        rows.append(row)
    return Result(
        fedhead="0", name="tiny", config={"privacy": {"mechanism": "full-batch"}}, rounds=rows,
        final={"accuracy": 0.75} if final is None else final, majority={"accuracy": 0.5}, baseline=None, privacy=[],
        holders=[], model={"backbone": "b", "digest": "d", "trained_parameters": 4, "task": "classification"},
        declared_records={"value": 100, "origin": "recipe"}, timing={"total_seconds": 1.0}, notes=[],
    )  # fmt: skip


def test_a_result_carries_the_estimate_bit_for_bit():
    made = result({2: NoisedAccuracy(1 / 3, 0.1, 2), 3: NoisedAccuracy(-0.2, 0.1, 1)})
    back = Result.from_json(made.to_json())
    assert back == made
    assert "noised" not in back.rounds[0]
    assert back.rounds[1]["noised"] == {"accuracy": 1 / 3, "standard_error": 0.1, "holders": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"accuracy": math.nan, "standard_error": 0.1, "holders": 1},
        {"accuracy": 0.5, "standard_error": 0.0, "holders": 1},
        {"accuracy": 0.5, "standard_error": 0.1, "holders": 0},
        {"accuracy": 0.5, "standard_error": 0.1},
        {"accuracy": 0.5, "standard_error": 0.1, "holders": 1, "count": 7.0},
    ],
)
def test_a_result_takes_nothing_else(row):
    made = result()
    with pytest.raises(InputError, match="noised"):
        replace(made, rounds=[{**made.rounds[0], "noised": row}])


def test_the_report_shows_the_estimate_and_says_what_it_is():
    text = render(result({2: NoisedAccuracy(0.7, 0.05, 2), 3: NoisedAccuracy(0.72, 0.05, 2)}))
    assert SAID in text
    assert "72.0% ± 9.8 points" in text
    assert "after round 2 " in text  # the head that round 3 began with
    assert "75.0%" in text
    assert "from what is declared" in text
    assert "true counts of right answers" in text
    assert 'id="noised-' in text


def test_the_report_clamps_what_it_shows():
    text = render(result({1: NoisedAccuracy(1.4, 0.1, 2), 3: NoisedAccuracy(-0.3, 0.1, 1)}))
    assert "0.0% ± 19.6 points" in text
    assert "from 1 data holder:" in text
    assert "-30" not in text


def test_an_estimate_without_test_accuracy_is_shown_alone():
    text = render(result({1: NoisedAccuracy(0.4, 0.1, 2)}, final={"loss": 0.3}))
    assert SAID in text
    assert "after round 0 " in text
    assert "public test records, at the end" not in text


def test_without_counts_nothing_is_shown(capsys):
    text = render(result())
    assert SAID not in text
    assert "noised-" not in text
    assert "right answers" not in text
    show_result(result(), Path("out"))
    assert "noised" not in capsys.readouterr().out


def test_the_console_shows_the_last_estimate_in_one_line(capsys):
    show_result(result({2: NoisedAccuracy(0.7, 0.05, 2), 3: NoisedAccuracy(1.2, 0.05, 2)}), Path("out"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "noised" in line]
    assert len(lines) == 1
    assert lines[0].startswith("noised counts: accuracy 1.000 ± 0.098 after round 2, from 2 holder(s); an estimate")
