"""The report of a run: what it says, that it is safe to open, and that it stays readable."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest

from fedhead.common.errors import InputError
from fedhead.common.results import Result
from fedhead.simulations import plots, show
from fedhead.simulations.report import render, write_report

READING = SimpleNamespace(**run_path(str(Path(__file__).with_name("page_reading.py"))))
Page, XSS = READING.Page, READING.XSS


def make_result(
    holders: int = 5, rounds: int = 60, labels: tuple[str, ...] = ("negative", "positive"), epsilon: float = 3.0
) -> Result:
    """A run as fedhead simulate leaves it: figures of the size that real ones have."""
    rng = np.random.default_rng([holders, rounds, len(labels)])
    names = [f"holder-{number:03d}" for number in range(holders)]
    none = math.isinf(epsilon)
    mechanism = "none" if none else "full-batch"
    event = {"mechanism": mechanism, "noise_multiplier": None if none else 13.17, "sample_rate": None, "steps": 1}
    spends = [
        {
            "holder": name,
            "unit": "record",
            "adjacency": "add or remove one record",
            "mechanism": mechanism,
            "accountant": "none" if none else "gdp",
            "epsilon": epsilon,
            "delta": 1e-5,
            "events": [{**event, "clipping_norm": None if none else 1.0, "round": t + 1} for t in range(rounds)],
        }
        for name in names
    ]
    mixes = rng.dirichlet([0.6] * len(labels), holders)
    known = []
    for name, mix in zip(names, mixes, strict=True):
        counts = rng.multinomial(int(rng.integers(500, 1500)), mix)
        metrics = {"accuracy": 0.8 + 0.1 * float(rng.uniform(-1, 1)), "loss": 0.45, "auc_roc": 0.88}
        known.append(
            {
                "name": name,
                "records": int(counts.sum()),
                "labels": dict(zip(labels, counts.tolist(), strict=True)),
                "metrics": metrics,
                "metrics_on": "held-out records",
            }
        )
    rows: list[dict[str, Any]] = []
    for t in range(1, rounds + 1):
        accuracy = 0.531 + 0.275 * (1 - math.exp(-t / 9)) + 0.004 * float(rng.normal())
        seen = t % 5 == 0 or t == rounds
        rows.append(
            {
                "round": t,
                "metrics": {"accuracy": accuracy, "loss": 0.7 - 0.3 * t / rounds, "auc_roc": 0.88} if seen else None,
                "seconds": 0.05,
                "bytes_up": 3300 * holders,
                "bytes_down": 3500 * holders,
                "holders": holders,
                "refused": [],
                "epsilon": epsilon if none else epsilon * math.sqrt(t / rounds),
            }
        )
    return Result(
        fedhead="0.1.0",
        name="quickstart",
        config={
            "task": {"kind": "classification", "labels": list(labels)},
            "model": {"backbone": "transformers:all-MiniLM-L6-v2", "head": {"kind": "linear", "bias": True}},
            "holders": {"count": holders, "per_round": None, "partition": {"kind": "dirichlet", "alpha": 0.3}},
            "privacy": {"unit": "record", "mechanism": mechanism, "epsilon": None if none else epsilon, "delta": 1e-5},
            "training": {"rounds": rounds, "optimizer": {"kind": "sgd", "betas": [0.9, 0.999]}},
        },
        rounds=rows,
        final={"accuracy": 0.8083, "loss": 0.431, "auc_roc": 0.8871},
        majority={"accuracy": 0.5312, "auc_roc": 0.5},
        baseline={"accuracy": 0.8142, "loss": 0.421, "auc_roc": 0.8932},
        privacy=spends,
        holders=known,
        model={
            "backbone": "transformers:all-MiniLM-L6-v2",
            "digest": "ab12" * 16,
            "trained_parameters": 770,
            "task": "classification",
        },
        declared_records={"value": 980, "origin": "simulated data"},
        timing={
            "load_seconds": 6.3,
            "features_seconds": 71.2,
            "training_seconds": 1.9,
            "server_seconds": 4.1,
            "total_seconds": 82.4,
        },
        notes=["Noise came from the seed, as in every simulation."],
    )


def test_headline_figures_stand_beside_what_they_are_compared_with() -> None:
    text = Page(render(make_result())).text
    for said in ("80.8%", "81.4%", "53.1%", "0.887", "0.893", "0.500", "ε 3.00", "δ = 1e-5", "1 min 22 s"):
        assert said in text
    assert "add or remove one record" in text
    assert "exact Gaussian differential privacy" in text
    assert "770 numbers" in text
    assert "a deployment must declare a public constant" in text


def test_what_was_spent_is_said_of_this_run_alone() -> None:
    text = Page(render(make_result())).text
    assert "In this run no data holder spent more than ε = 3.00 at δ = 1e-5" in text
    assert "Spent in this run, at most" in text
    assert "No data holder spent more than" not in text


def of_unit(unit: str) -> Result:
    """A private run under another unit than the record."""
    result = make_result()
    return replace(
        result,
        config={**result.config, "privacy": {**result.config["privacy"], "unit": unit}},
        privacy=[{**spend, "unit": unit, "adjacency": f"add or remove one {unit}"} for spend in result.privacy],
    )


def test_where_the_server_adds_the_noise_no_update_is_said_to_be_noised() -> None:
    text = Page(render(of_unit("holder"))).text
    assert "its update without noise" in text
    assert "The server clips it, adds the noise and is trusted" in text
    assert "clipped and noised gradients" not in text
    assert "Somebody who sees every update" not in text
    assert "Somebody who sees the heads after the noise (not the server, which is trusted)" in text
    lead = text[text.index("The trained head reaches") : text.index("on test records")]
    assert "sees every update without it and is trusted" in lead
    for unit in ("record", "person"):
        text = Page(render(of_unit(unit))).text
        assert "clipped and noised gradients" in text
        assert "Somebody who sees every update" in text
        assert "trusted" not in text


def test_where_persons_are_protected_it_is_persons_that_are_spoken_of() -> None:
    result = of_unit("person")
    result = replace(result, holders=[{**holder, "persons": 217} for holder in result.holders])
    text = Page(render(result)).text
    assert "a declared number of persons" in text
    assert "knows the records of all other persons" in text
    assert "all persons" in text  # in every step
    assert text.count("217") == len(result.holders)
    assert "Persons" in text
    for said in ("a declared number of records", "all other records"):
        assert said not in text


def test_noise_from_a_seed_is_said_beside_the_epsilon_that_it_takes_away() -> None:
    said = "for whoever knows the seed, ε is infinite"
    assert said in Page(render(make_result())).text
    assert said not in Page(render(replace(make_result(), holders=[]))).text  # a deployment's


def test_who_refused_is_listed_and_who_holds_what_is_named() -> None:
    result = make_result()
    refused = {"holder": "st-mary", "code": 1010, "text": "the holder's privacy budget does not allow it"}
    rounds = [{**row, "refused": [refused]} for row in result.rounds]
    named = [{**holder, "value": f"ward {XSS}"} for holder in result.holders]
    page = Page(render(replace(result, rounds=rounds, holders=named)))
    assert "st-mary" in page.text
    assert "60 × the holder's privacy budget does not allow it (code 1010), 1 data holder" in page.text
    assert page.text.count(f"ward {XSS}") == len(named)


def test_noise_that_is_typed_in_again_as_shown_is_no_less_than_it_was() -> None:
    rng = np.random.default_rng(0)
    for value in [13.17, 1.0, 10.0, 0.1, 1e-3, 99.99999, *np.exp(rng.uniform(-8, 12, 2000)).tolist()]:
        for digits in (4, 6):
            shown = float(show.show_noise(value, digits))
            assert value * (1 - 1e-11) <= shown <= value * (1 + 1.01 * 10 ** (1 - digits))
    assert show.show_noise(13.17) == "13.17"
    assert show.show_noise(10.772631234) == "10.7727"


def test_a_declared_constant_of_the_recipe_carries_no_warning() -> None:
    result = replace(make_result(), declared_records={"value": 1000, "origin": "recipe"})
    text = Page(render(result)).text
    assert "1,000 , a public constant of the recipe" in text or "1,000, a public constant of the recipe" in text
    assert "taken from" not in text


def test_without_privacy_the_page_says_so_and_shows_no_epsilon_curve() -> None:
    page = Page(render(make_result(epsilon=math.inf)))
    assert "were not private" in page.text
    assert "ε ∞" in page.text
    assert "neither clipped nor noised" in page.text
    assert "ε by round" not in page.text
    assert "notices that a given" not in page.text
    assert "no data holder spent more than" not in page.text


def test_nothing_is_called_protected_without_privacy() -> None:
    text = Page(render(make_result(epsilon=math.inf))).text
    assert "Protected nothing" in " ".join(text.split())
    assert "one record; neighbouring" not in text


def test_text_of_a_recipe_is_never_markup() -> None:
    result = replace(make_result(labels=(XSS, "positive")), name=XSS, notes=[XSS])
    result = replace(
        result,
        holders=[{**holder, "name": XSS + str(i)} for i, holder in enumerate(result.holders)],
        privacy=[{**spend, "holder": XSS + str(i)} for i, spend in enumerate(result.privacy)],
        model={**result.model, "backbone": XSS},
        rounds=[{**row, "refused": [{"holder": XSS, "code": 1001, "text": XSS}]} for row in result.rounds],
    )
    text = render(result)
    READING.assert_no_markup(text)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    READING.assert_nothing_from_elsewhere(render(make_result()))


def test_pictures_have_words_own_ids_and_the_colours_of_the_page() -> None:
    READING.assert_pictures(render(make_result()), 3)


def test_the_same_result_gives_the_same_bytes_and_leaves_no_setting_behind() -> None:
    before = dict(matplotlib.rcParams)
    assert render(make_result()) == render(make_result())
    assert dict(matplotlib.rcParams) == before


def test_a_thousand_holders_stay_readable() -> None:
    text = render(make_result(holders=1000, rounds=3))
    page = Page(text)
    assert "Table of all 1,000 data holders" in page.text
    assert [a for tag, a in page.tags if tag == "details" and "open" in a] == []
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 5
    assert len(text) < 1_500_000


def test_ten_labels_are_shown_as_a_map_and_many_labels_share_a_colour() -> None:
    page = Page(render(make_result(holders=4, labels=tuple(f"kind {i}" for i in range(12)))))
    assert "The stronger the colour" in page.text
    shown = " ".join(a.get("aria-label") or "" for tag, a in page.tags if a.get("class") == "mix")
    assert "others" in shown


def test_a_deployment_shows_what_it_knows_only() -> None:
    page = Page(render(replace(make_result(), holders=[], baseline=None)))
    assert "Deployment" in page.text
    assert "holder-004" in page.text
    assert "Records, labels and metrics of single holders" not in page.text
    assert "without privacy" not in page.text


def test_other_metrics_single_rounds_and_empty_runs() -> None:
    result = make_result(rounds=1, holders=1)
    odd = replace(result, final={"f1": 0.5}, majority={}, baseline=None, holders=[], rounds=[], privacy=[])
    assert "F1" in Page(render(odd)).text
    assert "No data holder released anything" in Page(render(odd)).text
    diverged = replace(result, final={"accuracy": math.nan, "loss": math.inf})
    assert "not finite" in Page(render(diverged)).text
    assert "1 round" in Page(render(result)).text


def test_different_events_are_told_apart() -> None:
    result = make_result()
    first = result.privacy[0]
    events = [{**event, "mechanism": "poisson", "sample_rate": 0.05} for event in first["events"]]
    mixed = replace(result, privacy=[{**first, "accountant": "prv", "events": events}, *result.privacy[1:]])
    text = Page(render(mixed)).text
    assert "poisson 60 13.17 0.05 1 1" in text
    assert "full-batch 60 13.17 all records 1 4" in text


def test_epsilon_is_rounded_up_and_delta_reads_as_typed() -> None:
    assert show.show_epsilon(2.991) == "3.00"
    assert show.show_epsilon(3.0) == "3.00"
    assert show.show_epsilon(3.0 + 1e-6) == "3.01"
    assert show.show_epsilon(1.1) == "1.10"
    assert show.show_epsilon(math.inf) == "∞"
    assert [show.show_delta(x) for x in (1e-5, 2.5e-6, 0.01)] == ["1e-5", "2.5e-6", "0.01"]
    assert [show.show_bytes(x) for x in (12, 999, 1000, 123_456_789)] == ["12 B", "999 B", "1.0 kB", "123 MB"]
    assert [show.show_seconds(x) for x in (0.0123, 5.04, 61.6, 7325)] == ["12 ms", "5.0 s", "1 min 2 s", "2 h 2 min"]
    assert show.show_seconds(59.97) == "1 min 0 s"


def test_what_epsilon_means_is_the_known_bound_on_any_test() -> None:
    text = Page(render(make_result(epsilon=1.0))).text
    assert f"at most {(math.e * 0.01 + 1e-5) * 100:.1f} of 100 cases" in text
    assert "weak promise" not in text
    assert "weak promise" in Page(render(make_result(epsilon=8.0))).text


def test_a_picture_survives_text_that_is_no_formula_and_no_xml() -> None:
    counts = np.array([[3.0, 1.0], [0.0, 2.0]])
    svg = plots.label_bars("x", "a & b", ["$\\frac$", "a\x00b<&"], counts, ["a", "b"])
    assert "$\\frac$" in svg
    assert "a\ufffdb&lt;&amp;" in svg


@pytest.mark.parametrize(
    ("content", "word"), [(None, "no result.json"), ("{", "JSON"), ("{}", "schema"), ('{"schema": 99}', "99")]
)
def test_a_missing_or_broken_result_is_refused_in_one_line(tmp_path: Path, content: str | None, word: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match=word) as refused:
        write_report(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "report.html").exists()


def test_the_page_lies_beside_its_result(tmp_path: Path) -> None:
    make_result().write(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "result.json"]
    json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(READING.CHROMIUM is None, reason="no Chromium on this machine to draw the page with")
@pytest.mark.parametrize("width", [500, 1200])  # headless windows are at least 500 wide
def test_a_browser_draws_the_page_without_sideways_scrolling(tmp_path: Path, width: int) -> None:
    make_result(labels=("a" * 60, "b")).write(tmp_path)
    READING.draw(write_report(tmp_path), width, 1600)


@pytest.mark.slow
@pytest.mark.skipif(READING.CHROMIUM is None, reason="no Chromium on this machine to draw the page with")
@pytest.mark.parametrize("epsilon", [math.inf, 3.0])
def test_a_chart_alone_in_its_row_does_not_fill_it(tmp_path: Path, epsilon: float) -> None:
    """Without privacy there is no curve of epsilon, and the one beside it would be 1,040 px wide."""
    make_result(epsilon=epsilon).write(tmp_path)
    drawn = READING.draw(write_report(tmp_path), 1280, 1200)
    right = (np.abs(drawn[:, 800:1140] - drawn[0, 0]).max(-1) <= 2).all(-1)  # rows with nothing in the right third
    empty = max((len(run) for run in "".join("_x"[row] for row in right.astype(int)).split("_")), default=0)
    assert (empty > 300) == math.isinf(epsilon), empty


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("st-mary", "st-mary"),
        ("a" * 19, "a" * 17 + "…"),
        ("\x1b\x00", "\ufffd\ufffd"),
        ("内" * 9, "内" * 9),
        ("内" * 10, "内" * 8 + "…"),
    ],
)
def test_names_beside_a_picture_take_no_more_place_than_there_is(name: str, shown: str) -> None:
    assert plots.short(name) == shown
