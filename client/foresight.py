"""What taking part would take: features that are there or have to be computed, a recipe's admission, and its cost.

A holder learns the recipe of a run with its first message. Until then all that can be said is what the cache has; what
is kept in it is named by a hash over backbone, preprocessing and records, which can't be read backwards. With a recipe
that the coordinator has told beforehand, the rules that a deployed holder applies are gone through one by one, and the
first round is admitted in a copy of the ledger: the same code answers, and nothing is spent.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from fedhead.client.findings import (
    NO_RECORDS,
    Finding,
    apart,
    count,
    delta_as,
    delta_left_as,
    left_as,
    span,
    spent_as,
)
from fedhead.client.holder import MADE, HolderFile
from fedhead.client.standing import usable
from fedhead.common.config import RunConfig
from fedhead.common.data.records import Records
from fedhead.common.errors import ConfigError, DataError, FedheadError, Refused
from fedhead.common.refusals import BEYOND_BUDGET, BEYOND_RUN, OTHER_UNIT

if TYPE_CHECKING:
    from fedhead.common.config.schema import FeatureSettings
    from fedhead.common.models.backbones import Backbone
    from fedhead.common.privacy.ledger import DomainSummary
    from fedhead.common.round_request import RoundRequest

LOOK_SECONDS: Final = 5.0  # that computing some features may take, to say how long all will
GROWTH: Final = 4  # each look takes so many times the records of the one before

_RUN: Final = "foresight"  # name of the run in the copy of the ledger


def foresight(holder: HolderFile, records: Records | DataError, recipe: RunConfig | None) -> Iterator[Finding]:
    """Features, and with a recipe what a deployed holder would say to it.

    Parameters
    ----------
    holder : HolderFile
    records : Records, or why there are none
    recipe : RunConfig, optional
        Its backbone is loaded, and if it is nowhere on this machine, fetched: joining takes what is there by then.
    """
    if isinstance(records, DataError):
        yield Finding("features", "unknown", NO_RECORDS)
    elif recipe is None:
        yield _cached(holder.features, len(records))
    else:
        yield from _with_recipe(holder, records, recipe)


def _cached(folder: Path, records: int) -> Finding:
    """What the cache has, without knowing the backbone; the checksums of its files are not verified here."""
    fitting = sum(_records_of(manifest) == records for manifest in folder.glob("[!.]*/manifest.json"))
    if not fitting:
        text = "none cached yet: check --recipe tells how long they take"
    else:
        text = f"{count(fitting, 'set')} cached of as many records: check --recipe tells which"
    return Finding("features", "unknown", text)


def _records_of(manifest: Path) -> int | None:
    """Of how many records an entry of the cache is."""
    try:
        files = json.loads(manifest.read_text())["files"]
        if "offsets.bin" in files:
            return int(files["offsets.bin"]["shape"][0]) - 1
        return int(files["values.bin"]["shape"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _with_recipe(holder: HolderFile, records: Records, recipe: RunConfig) -> Iterator[Finding]:
    # these bring PyTorch and Flower, which a check without a recipe doesn't need
    from fedhead.client.deployed import own_recipe
    from fedhead.common.preparation import load_backbone_for

    try:
        config = own_recipe(holder, recipe)
        backbone, _ = load_backbone_for(config, records)
        _check_trained(holder, records, config, backbone)
    except ConfigError as error:
        yield from (Finding("recipe", "remedy", *_apart(line)) for line in error.faults)
        return
    except FedheadError as error:
        yield Finding("recipe", "remedy", *_apart(str(error)))
        return
    allowed = holder.limits.backbones
    if allowed is not None and backbone.digest not in {digest.removeprefix("sha256:") for digest in allowed}:
        text = f"limits.backbones lacks its backbone, sha256:{backbone.digest}"
        yield Finding("recipe", "remedy", text, "Add it to allow it.")
    else:
        yield from _admitted(holder, config, backbone.digest)
    yield _computed(holder.features, backbone, records, config.model.features)


def _apart(line: str) -> tuple[str, str]:
    return apart(FedheadError(line))


def _check_trained(holder: HolderFile, records: Records, config: RunConfig, backbone: Backbone) -> None:
    """Refuse what a deployed holder refuses of the trained part, for these records."""
    from fedhead.client.deployed import check_rounding
    from fedhead.client.placing import alone
    from fedhead.common.preparation import make_trainable
    from fedhead.common.tasks import make_task

    trainable = make_trainable(config, backbone, make_task(config.task))
    whole = alone(config, records)  # what is looked at is how many there are: their features need not be there yet
    if not holder.limits.allow_seeded_noise:
        check_rounding(whole, trainable.double(), config.privacy.person, holder.limits.most_records)


# ------------------------------------------------------------------------------------------------------------- the cost


def _admitted(holder: HolderFile, config: RunConfig, backbone: str) -> Iterator[Finding]:
    """Whether limits and budget admit the run, by admitting its first round in a copy of the ledger."""
    try:
        request = _request(config, backbone)
    except FedheadError as error:
        yield Finding("recipe", "remedy", *_apart(str(error)))
        return
    privacy, limits = config.privacy, "Agree on another recipe with the coordinator, or change the limit."
    within = Finding("recipe", "ok", f"within the limits: {config.model.head.kind} head, unit {privacy.unit}")
    if not usable(holder) or (not holder.ledger.exists() and (holder.folder / MADE).exists()):
        yield Finding("cost", "unknown", "not looked at: it takes the storage folder and the ledger in it")
        return
    try:
        refused, domains = _rehearse(holder, request)
    except FedheadError as error:
        yield Finding("cost", "unknown", f"not looked at: {apart(error)[0]}")
        return
    if refused is not None and refused.code == OTHER_UNIT and request.unit in holder.limits.units:
        yield _mixed(holder, request.unit, domains)
        return
    if refused is not None and refused.code not in (BEYOND_BUDGET, BEYOND_RUN):
        yield Finding("recipe", "remedy", f"a request would be refused: {refused}", limits)
        return
    if refused is not None:
        yield within
        text = f"{_cost(request)}; it would be refused: {refused}"
        yield Finding("cost", "remedy", text, _cheaper(holder, request, domains))
        return
    yield within
    if request.mechanism == "none":
        yield Finding("cost", "ok", "none of the budget: the server adds the noise")
    else:
        yield Finding("cost", "ok", f"{_cost(request)}; {left_as(_left_then(holder, request, domains))} is left then")


def _request(config: RunConfig, backbone: str) -> RoundRequest:
    """The request of the first round, with as many holders as the recipe says, as far as limits and cost look at it."""
    from fedhead.common import planned
    from fedhead.common.round_request import PlannedCounts, RoundRequest

    privacy, training, holders = config.privacy, config.training, config.holders
    asked = planned.most_participations(training.rounds, holders.count, holders.per_round or holders.count)
    metrics, counts = privacy.metrics, planned.planned_counts(config, asked)
    return RoundRequest(
        run=_RUN,
        round=1,
        task=config.task.kind,
        backbone=backbone,
        unit=privacy.unit,
        records_per_person=privacy.records_per_person if privacy.unit == "person" else None,
        mechanism="none" if planned.central(config) else privacy.mechanism,
        noise_multiplier=planned.planned_noise(config, asked),
        clipping_norm=privacy.clipping_norm,
        sample_rate=privacy.sample_rate,
        local_steps=training.local_steps,
        declared_records=config.data.declared_records or 1,
        optimizer=training.optimizer,
        learning_rate=training.optimizer.learning_rate or 1.0,
        plan_steps=planned.planned_steps(config, asked),
        delta=privacy.delta,
        plan_counts=PlannedCounts(number=counts, noise_multiplier=metrics.noise_multiplier)
        if metrics and counts
        else None,
        metrics_noise=metrics.noise_multiplier if metrics and planned.counted(config, 1) else None,
    )


class _Rehearsed(NamedTuple):
    """How the first round was met in the copy of the ledger, and the holder's domains there after it, by name."""

    refused: Refused | None
    domains: dict[str, DomainSummary]


def _rehearse(holder: HolderFile, request: RoundRequest) -> _Rehearsed:
    """Admit the first round of a run in a copy of the ledger.

    Raises
    ------
    LedgerError
        The ledger can't be read.
    """
    from flwr.app import ArrayRecord

    from fedhead.client.admission import Admission
    from fedhead.common.privacy.ledger import Ledger
    from fedhead.common.protocol import Asked

    with tempfile.TemporaryDirectory() as folder:  # only its owner can enter it
        copy = Path(folder) / holder.name / "ledger.sqlite"
        if holder.ledger.exists():
            with Ledger(holder.ledger, create=False, read_only=True) as ledger:
                ledger.export(Path(folder))
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        ledger, refused = Ledger(copy), None
        admission = Admission(ledger, holder.limits, holder.budget, {holder.name: _RUN})
        try:
            admission.admit(holder.name, Asked(request, ArrayRecord(), _RUN, None), _RUN)
        except Refused as found:
            refused = found
        finally:
            domains = {one.domain: one for one in ledger.summary(holder.name)}
            admission.close()
    return _Rehearsed(refused, domains)


def _left_then(holder: HolderFile, request: RoundRequest, domains: Mapping[str, DomainSummary]) -> float:
    """The epsilon that is left when the run has ended; its first round brought, of a Poisson plan, all of it."""
    from fedhead.client.admission import foreseen
    from fedhead.common.privacy.filters import Totals, charge_of

    further = Totals()
    for event in foreseen(request):
        further = further.plus(charge_of(event))
    rest = domains[holder.budget.domain].left_by(holder.budget.terms(), further)
    return rest.poisson_epsilon if request.mechanism == "poisson" else rest.epsilon


def _cheaper(holder: HolderFile, request: RoundRequest, domains: Mapping[str, DomainSummary]) -> str:
    """What makes a run fit that is beyond the budget. A Poisson plan's delta is charged whatever the noise."""
    from fedhead.common.privacy.terms import run_parts_of

    usual, terms = "Agree on fewer rounds or more noise with the coordinator.", holder.budget.terms()
    rest, run = domains[holder.budget.domain].left_by(terms), run_parts_of(terms)
    if not rest.mu_squared and not rest.poisson_epsilon:
        return "Nothing is left of the budget: no run fits. Take other people's records, under another budget.domain."
    if request.mechanism != "poisson":
        return usual
    room = rest.poisson_delta if run is None else min(rest.poisson_delta, run.poisson_delta)
    if request.delta <= room:
        return usual
    if not room:
        return (
            'budget.poisson_share leaves no delta for Poisson plans: agree on privacy.mechanism = "full-batch" with '
            "the coordinator, or raise the share."
        )
    return (
        f"Set privacy.delta to at most {delta_left_as(room)} in the recipe, with the coordinator: so much delta is "
        "left for Poisson plans (budget.poisson_share), and no noise lowers a plan's."
    )


def _mixed(holder: HolderFile, unit: str, domains: Mapping[str, DomainSummary]) -> Finding:
    """That the limits allow a unit, and the budget, begun with another one, does not."""
    own, apart_from = holder.budget.domain, holder.budget.disjoint_from
    begun = [one for one in domains.values() if set(one.units) - {unit, "holder"}]
    first = min(begun, key=lambda one: (one.domain != own, one.domain in apart_from))
    return Finding(
        "recipe", "remedy",
        f'its unit is {unit}, but the budget of domain "{first.domain}" was begun with the unit '
        f"{', '.join(first.units)}, and one budget covers one unit",
        "Have the recipe ask for that unit, or take other people's records under another budget.domain; both files "
        "must then name the other's domain in budget.disjoint_from.",
    )  # fmt: skip


def _cost(request: RoundRequest) -> str:
    """What the whole run costs, as its own delta states it."""
    from fedhead.common.privacy.planning import cost

    counts = request.plan_counts
    other = 0.0 if counts is None else counts.number / counts.noise_multiplier**2
    found = cost(request.noise_multiplier, request.delta, request.plan_steps, request.sample_rate, other)
    steps = count(request.plan_steps, "step")
    return f"epsilon {spent_as(found.epsilon)} at delta {delta_as(request.delta)}, in {steps}"


# --------------------------------------------------------------------------------------------------------- the features


def _computed(folder: Path, backbone: Backbone, records: Records, settings: FeatureSettings) -> Finding:
    """Whether the features that a recipe needs are cached, or how long computing them takes on this machine now."""
    from fedhead.common.features.cache import open_entry
    from fedhead.common.features.extraction import cache_key

    if open_entry(folder, cache_key(backbone, records, settings)) is not None:
        return Finding("features", "ok", f"cached for this recipe, of all {count(len(records), 'record')}")
    seconds = _seconds(backbone, records, settings)
    if seconds is None:
        text = "none of the images that were looked at can be decoded"
        return Finding("features", "remedy", text, "Check the files in data.source.")
    when = f"about {span(seconds)} here" if seconds >= 2 else "a moment"
    return Finding("features", "ok", f"computed when the run begins: {when} for {count(len(records), 'record')}")


def _seconds(backbone: Backbone, records: Records, settings: FeatureSettings) -> float | None:
    """How long the features of all records take, from some of them; None where none of those can be decoded.

    Records are taken at random, in growing numbers until `LOOK_SECONDS` are nearly over. The largest look counts: its
    batches are sorted by length, as those of all records are. One record comes before, for what is slow only once.
    """
    from fedhead.common.features import extract

    order = np.random.default_rng(0).permutation(len(records))
    best: tuple[int, float] | None = None
    begun, start, size = time.perf_counter(), 0, 1
    while start < len(order):
        rows = order[start : start + size]
        started = time.perf_counter()
        try:
            extract(backbone, records.select(rows), None, settings)
        except DataError:  # none of these images can be decoded
            pass
        else:
            now = time.perf_counter()
            if best is None or len(rows) >= best[0]:
                best = len(rows), now - started
            if now - begun + GROWTH * (now - started) > LOOK_SECONDS and size > 1:
                break
        if time.perf_counter() - begun > LOOK_SECONDS:
            break
        start, size = start + len(rows), size * GROWTH
    return None if best is None else best[1] / best[0] * len(records)
