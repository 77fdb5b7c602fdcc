"""What a recipe's run would cost each data holder, and whether its budget allows that: nothing is spent by asking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal

from fedhead.client.policy import check_request
from fedhead.common.config import RunConfig
from fedhead.common.errors import InputError, Refused
from fedhead.common.planned import central, counted, most_participations, planned_steps
from fedhead.common.privacy.events import CountEvent, Event, GaussianEvent, PoissonEvent
from fedhead.common.privacy.filters import Limit, Totals, admits, charge_of, left, spent
from fedhead.common.privacy.ledger import Declaration, DomainSummary, Ledger, unwritten
from fedhead.common.privacy.planning import cost
from fedhead.common.privacy.terms import Terms
from fedhead.server.cohorts import Cohorts

DOMAIN: Final = "default"
MOST_ASKED: Final = 2_000_000  # holders times rounds whose cohorts are gone through one by one


@dataclass(frozen=True)
class Part:
    """What a run asks of a holder: rounds of training, and rounds with a noised count."""

    rounds: int
    counts: int


@dataclass(frozen=True)
class Work:
    """A recipe's run with its noise.

    Attributes
    ----------
    config : RunConfig
    noise_multiplier : float
    """

    config: RunConfig
    noise_multiplier: float

    def epsilon(self, part: Part) -> tuple[float, str]:
        """Epsilon of a part of the run at the recipe's delta, and the accountant that computed it."""
        metrics = self.config.privacy.metrics
        other = part.counts / metrics.noise_multiplier**2 if metrics is not None else 0.0
        steps, delta = planned_steps(self.config, part.rounds), self.config.privacy.delta
        found = cost(self.noise_multiplier, delta, steps, self.config.privacy.sample_rate, other)
        return found.epsilon, found.accountant

    def charges(self, part: Part) -> Totals:
        """What the ledger would charge, event by event as the rounds come; a Poisson plan whole."""
        privacy, total = self.config.privacy, Totals()
        if privacy.mechanism == "poisson":
            assert privacy.sample_rate is not None
            steps = planned_steps(self.config, most_asked(self.config))
            event: Event = PoissonEvent(self.noise_multiplier, privacy.clipping_norm, privacy.sample_rate, steps)
            total = total.plus(charge_of(event, privacy.delta))
        else:
            event = GaussianEvent(self.noise_multiplier, privacy.clipping_norm, planned_steps(self.config, 1))
            charge = charge_of(event)
            for _ in range(part.rounds):
                total = total.plus(charge)
        if privacy.metrics is not None:
            charge = charge_of(CountEvent(privacy.metrics.noise_multiplier, 1.0, 1))
            for _ in range(part.counts):
                total = total.plus(charge)
        return total


def most_asked(config: RunConfig) -> int:
    """Most rounds in which any one holder is asked."""
    cohort = config.holders.per_round or config.holders.count
    return most_participations(config.training.rounds, config.holders.count, cohort)


def parts_of(config: RunConfig) -> dict[str, Part]:
    """Simulated holder -> its part of the run. A very long run with cohorts gives every holder the largest part."""
    rounds, count = config.training.rounds, config.holders.count
    names = [f"holder-{number:05d}" for number in range(count)]
    asked, counts = Counter[str](), Counter[str]()
    if config.holders.per_round in (None, count) or rounds * count > MOST_ASKED:
        whole = Part(most_asked(config), min(most_asked(config), sum(counted(config, n + 1) for n in range(rounds))))
        return dict.fromkeys(names, whole)
    cohorts = Cohorts(names, config.holders.per_round or count, config.run.seed)
    for number in range(1, rounds + 1):
        cohort = cohorts.of_round(number)
        asked.update(cohort)
        counts.update(cohort if counted(config, number) else ())
    return {name: Part(asked[name], counts[name]) for name in names}


def holders_of(work: Work, state: Path | None = None, ledgers: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """What each holder would spend, and its budget before and after; holders of whom all is the same are one entry.

    Parameters
    ----------
    work : Work
    state : path, optional
        Folder that keeps the simulated holders between runs.
    ledgers : sequence of path
        Ledgers of data holders; each is taken to be asked in as many rounds as any holder.

    Returns
    -------
    list of dict
        `holders` (names), `rounds`, `counts`, `epsilon`, `delta`, `accountant`, `refused` (why the holder's limits
        don't allow the request, or None; the backbone is not looked at), and `budget`: None, or `domain`,
        `epsilon`, `delta`, `spent_delta` (of the next two; `delta`, unless plans were charged more under other terms),
        `spent_before`, `spent_after`, `left_after` (epsilon, rounded down, by all budgets it counts against),
        `admitted`, `limit` ("budget", "run", "unit" or None), `rounds_that_fit`, `other_units` (that were released
        under these budgets). It is that of the domain of the run, or where that has none, the tightest of those that
        the run counts against; None where there is none, and under the unit `holder`.

    Raises
    ------
    InputError
        A ledger is named that isn't there.
    LedgerError
        A ledger can't be read, or was changed.
    """
    config = work.config
    wanted: list[tuple[str, Part, list[DomainSummary], DomainSummary]]
    if ledgers:
        largest = Part(most_asked(config), max(part.counts for part in parts_of(config).values()))
        named = [one for path in ledgers for one in _budgeted(_read(path))]
        wanted = [(one.holder, largest, [two for two in named if two.holder == one.holder], one) for one in named]
    else:
        parts = parts_of(config)
        seen = _by_holder(_state_ledger(state, config, list(parts)))
        domain = _domain(config)
        wanted = [
            (name, part, seen[name], next(one for one in seen[name] if one.domain == domain))
            for name, part in parts.items()
        ]
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, part, summaries, summary in wanted:
        key = (part, _fingerprint(summary), tuple(_fingerprint(one) for one in summaries))
        if key not in entries:
            epsilon, accountant = work.epsilon(part) if part.rounds else (0.0, "gdp")
            entries[key] = {
                "holders": [], "rounds": part.rounds, "counts": part.counts, "epsilon": epsilon,
                "delta": config.privacy.delta, "accountant": accountant,
                "refused": None if ledgers else _beyond_limits(work),
                "budget": _budget(work, part, summaries, summary),
            }  # fmt: skip
        entries[key]["holders"].append(name)
    return list(entries.values())


def _beyond_limits(work: Work) -> str | None:
    limits, privacy = work.config.holders.limits, work.config.privacy
    if limits is None:
        return None
    request: Any = SimpleNamespace(  # what the policy looks at; the real one needs the backbone's digest
        unit=privacy.unit,
        task=work.config.task.kind,
        mechanism="none" if central(work.config) else privacy.mechanism,
        clipping_norm=privacy.clipping_norm,
        noise_multiplier=work.noise_multiplier,
        metrics_noise=None if privacy.metrics is None else privacy.metrics.noise_multiplier,
    )
    try:
        budgeted = work.config.holders.budget is not None and not central(work.config)
        known = limits.model_copy(update={"backbones": None})
        check_request(request, known, budgeted=budgeted)
    except Refused as refused:
        return str(refused)
    return None


def _budget(
    work: Work, part: Part, summaries: Sequence[DomainSummary], summary: DomainSummary
) -> dict[str, Any] | None:
    """What a run in a domain does to its budget, or where it has none, to the tightest that it counts against."""
    if central(work.config):
        return None  # a holder's budget is for noise of its own; this run's is the server's, and so is its account
    covered = [one for one in summaries if one.domain == summary.domain or one.domain in summary.overlapping]
    budgets = _budgets(summary)
    if not budgets:
        return None

    def broken(some: Part) -> Limit | None:
        """The first limit that this much of the run would break, in any domain that shares a unit with this one."""
        charges = work.charges(some)
        found = (admits(terms, shared.plus(charges), charges) for terms, shared in budgets)
        return next((limit for limit in found if limit is not None), None)

    other_units = sorted({unit for one in covered for unit in one.units} - {work.config.privacy.unit})
    limit: Limit | Literal["unit"] | None = "unit" if other_units else broken(part) if part.rounds else None
    taken = Part(0, 0) if other_units else part if limit is None else _fitting(work, part, broken)
    # a run that can't be finished is refused at its first round, and spends nothing
    charged = work.charges(part) if limit is None and part.rounds else Totals()
    poisson = work.config.privacy.mechanism == "poisson"

    def rest(budget: tuple[Terms, Totals]) -> float:
        found = left(budget[0], budget[1].plus(charged))
        return found.poisson_epsilon if poisson else found.epsilon

    terms, before = budgets[0] if summary.terms is not None else min(budgets, key=rest)
    shown = next(one for one in covered if one.terms is terms)
    after = before.plus(charged)
    stated = spent(terms, after).delta
    return {
        "domain": shown.domain,
        "epsilon": terms.epsilon,
        "delta": terms.delta,
        "spent_delta": stated,
        "spent_before": _spent(terms, before, stated),
        "spent_after": _spent(terms, after, stated),
        "left_after": min(map(rest, budgets)),
        "admitted": limit is None,
        "limit": limit,
        "rounds_that_fit": taken.rounds,
        "other_units": other_units,
    }


def _budgets(summary: DomainSummary) -> list[tuple[Terms, Totals]]:
    """Every budget that a run in a domain counts against, its own first, with what counts against it already."""
    own = [] if summary.terms is None else [(summary.terms, summary.shared)]
    return [*own, *summary.others]


def _fitting(work: Work, part: Part, broken: Callable[[Part], Limit | None]) -> Part:
    """How much of its part a holder would do before it refuses; counts are taken to come evenly among the rounds."""
    low, high = Part(0, 0), part
    while work.config.privacy.mechanism != "poisson" and high.rounds - low.rounds > 1:
        middle = (low.rounds + high.rounds) // 2
        some = Part(middle, part.counts * middle // part.rounds)
        low, high = (some, high) if broken(some) is None else (low, some)
    return low


def _spent(terms: Terms, totals: Totals, delta: float) -> float:
    """At the terms' delta, or at a larger one, which covers plans that were charged under other terms."""
    return spent(terms, totals, delta if delta != terms.delta else None).epsilon if totals != Totals() else 0.0


def _domain(config: RunConfig) -> str:
    return DOMAIN if config.holders.budget is None else config.holders.budget.domain


def _state_ledger(state: Path | None, config: RunConfig, holders: Sequence[str]) -> list[DomainSummary]:
    """The ledger as it will be when the run begins: what the recipe says now goes before what earlier runs declared."""
    from fedhead.simulations.ledgers import ledger_of  # brings torch, which nothing before needs

    path, budget = None if state is None else ledger_of(Path(), state), config.holders.budget
    kept = path if path is not None and path.exists() else None
    if budget is not None:
        terms, disjoint = budget.terms(), tuple(budget.disjoint_from)
        declared = [Declaration(name, budget.domain, terms, disjoint) for name in holders]
    else:  # nothing is declared then, and what was stays; a domain that is new has no budget of its own
        known = set() if kept is None else {one.holder for one in _read(kept) if one.domain == DOMAIN}
        declared = [Declaration(name, DOMAIN, None) for name in holders if name not in known]
    return unwritten(declared) if kept is None else _read(kept, declared)


def _read(path: Path, declared: Sequence[Declaration] = ()) -> list[DomainSummary]:
    if not path.is_file():
        raise InputError(f'--ledger is "{path}": there is no such file. Name a ledger.sqlite of a data holder.')
    with Ledger(path, create=False, read_only=True) as ledger:
        return ledger.summary(declared=declared)


def _budgeted(summaries: Sequence[DomainSummary]) -> list[DomainSummary]:
    """The domains with a budget; of a holder without any budget, all its domains."""
    limited = {one.holder for one in summaries if one.terms is not None}
    return [one for one in summaries if one.terms is not None or one.holder not in limited]


def _by_holder(summaries: Sequence[DomainSummary]) -> Mapping[str, list[DomainSummary]]:
    found: dict[str, list[DomainSummary]] = {}
    for one in summaries:
        found.setdefault(one.holder, []).append(one)
    return found


def _fingerprint(summary: DomainSummary | None) -> tuple[Any, ...] | None:
    if summary is None:
        return None
    return summary.domain, summary.terms, summary.totals, summary.shared, summary.overlapping, summary.units
