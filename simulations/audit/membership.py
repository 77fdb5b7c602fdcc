"""`fedhead audit membership`: who attacks the final head, how much they find out, and what the claim would let them.

    heads       the recipe's own federation, again and again, each time on a random half of the units
    scores      offline LiRA: how unusual is a unit's confidence beside heads that did not see it
    rates       true positives at a rate of false positives, beside the ceiling of the claim

A unit is a record, or a person with all their records at a holder. Shapes: M heads, U units.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fedhead.client.workplace import LEDGER
from fedhead.common import progress
from fedhead.common.config import RunConfig, changed, find_recipe
from fedhead.common.errors import DataError, InputError, RunError
from fedhead.common.models.card import HEAD
from fedhead.common.planned import most_participations, planned_noise
from fedhead.common.preparation import make_trainable
from fedhead.common.privacy.accounting import rows_of
from fedhead.common.privacy.audit.curves import claimed_curve
from fedhead.common.privacy.events import from_row
from fedhead.common.results import Result
from fedhead.common.tasks import make_task
from fedhead.server.desk import declared_records
from fedhead.server.evaluation import load_state, outputs_of
from fedhead.simulations.audit.likelihood import Interval, area, attack_scores, curve_points, rate_at
from fedhead.simulations.audit.units import Units
from fedhead.simulations.federation import federate
from fedhead.simulations.prepared import Prepared, prepare
from fedhead.simulations.show import show_count, show_delta, show_epsilon, show_seconds
from fedhead.simulations.simulate import at_work, cache_folder

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

RATES: Final = (0.001, 0.01)
LEAST_ALARMS: Final = 10  # false positives that a rate of them is stated from: 10,000 non-members for 0.1 %
LEAST_MODELS: Final = 4
LEAST_UNITS: Final = 20
MODELS: Final = (32, 128)  # trained by default: at least and at most, as the rate at 0.1 % needs
MOST_SCORES: Final = 100_000_000  # heads times units: some gigabytes of confidences and scores
LEAST_LOSS: Final = 1e-15  # below it a probability can't be told from 1 in float64
TEST_RECORDS: Final = 64  # that each head is evaluated on, because a run evaluates; nobody reads it
_HALVES: Final = 0x4D656D  # keeps the draw of the halves apart from the seed's other uses

CHANCE_NOTE: Final = (
    "Intervals are of 95 %: the wider of a jackknife over the heads attacked (units of one head share its noise) and "
    "Clopper-Pearson over its units."
)
CEILING_NOTE: Final = (
    "The ceiling holds for whoever sees every update of a holder. This attack sees the final head alone, where the "
    "noise of all holders adds up, so that it stays far below: it can show a leak, never the absence of one."
)


def audit_membership(
    recipe: RunConfig | str | Path,
    *,
    models: int | None = None,
    name: str | None = None,
    state: str | Path | None = None,
    progress_listener: progress.Listener | None = None,
) -> dict[str, Any]:
    """Attack the final head of a recipe: was this unit trained on?

    Each head is trained by the recipe's own federation on a random half of all holders' units, every unit in or out by
    a fair coin of its own. Noise, divisor and learning rate are those of the whole recipe. Each head in turn is the
    target, and the others tell what is usual.

    Parameters
    ----------
    recipe : RunConfig, str or path
        A recipe, its file, or the name of a built-in one. With the mechanism "none" there is no ceiling.
    models : int, optional
        Heads to train, at least 4. Default: 32, or as many as the rate at 0.1 % needs, up to 128.
    name : str, optional
        Shown in the result; default: the recipe's.
    state : path, optional
        Folder whose feature cache is used; default: the user's. Its ledgers are not touched: every head is charged to
        a ledger of its own that is thrown away with it.
    progress_listener : callable, optional
        Called as `listener(stage, done, total, note)`.

    Returns
    -------
    dict
        As JSON can carry it: `schema`, `recipe`, `models`, `members` and `nonmembers` (scores of each), `auc`,
        `rates` (`fpr`, `tpr`, `low`, `high`, `ceiling`), `roc` and `ceiling` (at most 200 points each, at the same
        false-positive rates), `claim` (of the holder that spent most), `seconds`, `notes`. Where a rate would rest on
        fewer than ten false positives, what was found is None, and a note says why. Without privacy `claim` and every
        ceiling is None.

    Raises
    ------
    InputError
        The recipe, the data or `models` can't be used.
    RunError
        A head could not be trained.

    Notes
    -----
    Guarantee of the ceiling: units are in or out independently of each other, so the two cases of one unit are
    neighbours under adding or removing it, and all shadow heads are independent of the target's coin. Of a mechanism
    with trade-off curve f no attack then finds more than 1 - f(fpr) of the members, in expectation, and neither do
    many units pooled, because 1 - f is concave.
    References: Carlini et al. (2022), arXiv:2112.03570 (offline attack); Dong, Roth, Su (2022), arXiv:1905.02383.
    """
    started = time.perf_counter()
    config = recipe if isinstance(recipe, RunConfig) else find_recipe(recipe)
    name = name or ("run" if isinstance(recipe, RunConfig) else Path(str(recipe)).stem)
    check_settings(config, models)
    with tempfile.TemporaryDirectory() as work:
        try:
            with at_work(config, Path(work) / "heads", name, progress_listener) as folder:
                prepared = prepare(config, cache_folder(state))
                units = Units(prepared)
                usable = int((~units.apart).sum())
                if usable < LEAST_UNITS:
                    raise DataError(
                        f"data.source has {usable} training {config.privacy.unit}s: a membership attack needs at least "
                        f"{LEAST_UNITS}. Give more records."
                    )
                number = models or _enough(usable)
                if number > MOST_SCORES // len(units):
                    raise InputError(
                        f"--models is {number}: it must be at most {MOST_SCORES // len(units)} with {len(units)} "
                        f"{config.privacy.unit}s. Leave it out for enough."
                    )
                confidences, included, results = _train(units, number, folder)
        except RunError as error:
            if work in str(error):  # what it points to is thrown away
                raise RunError(
                    'a head could not be trained. Run "fedhead simulate" with this recipe: its folder keeps the log.'
                ) from error
            raise
    if not np.isfinite(confidences).all(0).any():
        raise RunError(
            "a head has no finite outputs, so nothing can be scored. Lower training.optimizer.learning_rate."
        )
    scores = attack_scores(confidences, included)
    claim, ceiling, notes = _claim(results)
    rates, missing = _rates(scores, included, ceiling, usable)
    roc = curve_points(scores, included)
    return {
        "schema": 1,
        "recipe": name,
        "models": number,
        "members": int(np.isfinite(scores[included]).sum()),
        "nonmembers": int(np.isfinite(scores[~included]).sum()),
        "auc": area(scores, included),
        "rates": rates,
        "roc": roc,
        "ceiling": None if ceiling is None else [[fpr, ceiling(fpr)] for fpr, _ in roc],
        "claim": claim,
        "seconds": time.perf_counter() - started,
        "notes": [*missing, CHANCE_NOTE, *notes],
    }


def check_settings(config: RunConfig, models: int | None) -> None:
    """Refuse what the attack can't be made on.

    Raises
    ------
    InputError
    """
    if config.privacy.unit == "holder":
        raise InputError(
            'privacy.unit is "holder": the attack asks whether a record or a person was trained on. Set it to record '
            "or person."
        )
    if models is not None and (isinstance(models, bool) or not isinstance(models, int) or models < LEAST_MODELS):
        raise InputError(
            f"--models is {models!r}: it must be a whole number of at least {LEAST_MODELS}. Leave it out for enough."
        )


def _enough(units: int) -> int:
    """Heads for a rate at 0.1 %, with a tenth to spare, because the halves vary."""
    return min(max(math.ceil(2.2 * LEAST_ALARMS / RATES[0] / units), MODELS[0]), MODELS[1])


def _train(units: Units, models: int, folder: Path) -> tuple[FloatArray, BoolArray, list[Result]]:
    """Train all heads: confidences (M, U), NaN of what has none or is kept apart; who was in (M, U); their results."""
    prepared = units.prepared
    config, usable = prepared.config, prepared.test.features.finite().nonzero().flatten()[:TEST_RECORDS]
    prepared = replace(prepared, test=prepared.test.take(usable.numpy()))
    drawn = np.random.default_rng([config.run.seed, _HALVES]).random((models, len(units))) < 0.5
    config = changed(config, _whole(prepared))
    confidences, results = np.empty((models, len(units))), []
    for number, included in enumerate(drawn):
        # its own noise and samples, and hidden layers of an mlp
        one = changed(config, {"run.seed": (config.run.seed + number) % 2**63})
        part = replace(units.only(included | units.apart), config=one, test=prepared.test)
        with tempfile.TemporaryDirectory(dir=folder) as own, progress.listening(None):
            results.append(federate(part, one, Path(own), "inprocess", None, ledger=Path(own) / LEDGER))
            confidences[number] = units.means(_confidences(part, one, Path(own)))
        progress.advance("heads", number + 1, models)
    confidences[:, units.apart] = np.nan
    return confidences, drawn, results


def _whole(prepared: Prepared) -> dict[str, Any]:
    """Settings that hold noise and divisor to those of the whole recipe, and spend no time on what nobody reads."""
    config = prepared.config
    found: dict[str, Any] = {
        "run.evaluate_every": config.training.rounds,
        "data.declared_records": declared_records(config, prepared.split.units)[0],
    }
    if config.privacy.mechanism != "none":  # planned once: for sampled steps it takes seconds
        rounds, holders = config.training.rounds, config.holders
        participations = most_participations(rounds, holders.count, holders.per_round or holders.count)
        found |= {"privacy.epsilon": None, "privacy.noise_multiplier": planned_noise(config, participations)}
    return found


def _confidences(prepared: Prepared, config: RunConfig, folder: Path) -> FloatArray:
    """log(p / (1 - p)) of each training record, where p = exp(-loss), as the trained head has it; NaN without one.

    Of cross-entropy p is the probability of the record's label.
    """
    task = make_task(config.task)
    trainable = make_trainable(config, prepared.backbone, task)
    load_state(trainable, load_file(folder / "model" / HEAD))
    train = prepared.train
    with torch.inference_mode():
        losses = task.losses(outputs_of(trainable, train).double(), train.targets).numpy().astype(np.float64)
    losses = np.where(train.features.finite().numpy(), np.maximum(losses, LEAST_LOSS), np.nan)
    return np.asarray(-losses - np.log(-np.expm1(-losses)), dtype=np.float64)


def _claim(results: Sequence[Result]) -> tuple[dict[str, float] | None, Callable[[float], float] | None, list[str]]:
    """What was spent at most, the ceiling that it puts on true positives, and what to say of both."""
    refused = sum(len(row["refused"]) for result in results for row in result.rounds)
    notes = [f"{refused} updates are missing: their holders refused or failed."] if refused else []
    most = max((row for result in results for row in result.privacy), key=lambda row: row["epsilon"], default=None)
    if most is None or not math.isfinite(most["epsilon"]):
        return None, None, [*notes, "Nothing bounds this attack: without privacy there is no ceiling."]
    events = [from_row(row) for row in most["events"]]
    curve = claimed_curve(rows_of(events))
    claim = {"epsilon": most["epsilon"], "delta": most["delta"]}
    return claim, lambda fpr: 1 - curve(fpr), [*notes, CEILING_NOTE]


def _rates(
    scores: FloatArray, included: BoolArray, ceiling: Callable[[float], float] | None, units: int
) -> tuple[list[dict[str, float | None]], list[str]]:
    """The rates of the result, and a note for each that can't be stated."""
    rates, notes = [], []
    strangers = int(np.isfinite(scores[~included]).sum())
    for fpr in RATES:
        needed = round(LEAST_ALARMS / fpr)
        found: Interval | None = None
        if strangers >= needed:
            found = rate_at(scores, included, fpr)
        else:
            notes.append(
                f"True positives at {fpr:.1%} false positives are not stated: that takes {needed:,} scores of "
                f"non-members, and there are {strangers:,}. Give models = {math.ceil(2.2 * needed / units)} or more."
            )
        shown = {"tpr": None, "low": None, "high": None} if found is None else found._asdict()
        rates.append({"fpr": fpr, **shown, "ceiling": None if ceiling is None else ceiling(fpr)})
    return rates, notes


def show_membership(found: Mapping[str, Any]) -> None:
    """What `audit_membership` found, on stdout, within 80 columns."""
    out = Console(highlight=False, markup=False, emoji=False, width=80)
    table = Table(title=f"{found['recipe']}: membership attack on the final head", title_justify="left", pad_edge=False)
    for name in ("false positives", "members found", "95 %", "ceiling of the claim"):
        table.add_column(name, justify="right")
    for row in found["rates"]:
        stated = row["tpr"] is not None
        table.add_row(
            f"{row['fpr']:.1%}",
            f"{row['tpr']:.2%}" if stated else "—",
            f"{row['low']:.2%} to {row['high']:.2%}" if stated else "—",
            "none" if row["ceiling"] is None else f"{row['ceiling']:.2%}",
        )
    out.print(table)
    claim = found["claim"]
    said = (
        "no privacy"
        if claim is None
        else f"epsilon {show_epsilon(claim['epsilon'])}, delta {show_delta(claim['delta'])}"
    )
    out.print(f"claim: {said}; area under the curve {found['auc']:.3f}, of 0.5 by guessing")
    out.print(
        f"{found['models']} heads, {show_count(found['members'])} scores of members and "
        f"{show_count(found['nonmembers'])} of others, {show_seconds(found['seconds'])}"
    )
    for note in found["notes"]:
        out.print(f"note: {note}", style="dim")
