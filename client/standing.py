"""What a data holder's storage folder says: whether it can be used, its ledger, budgets, and disjoint domains."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

from fedhead.client.domains import DomainError, Domains, identities
from fedhead.client.findings import Finding, apart, count, delta_as, delta_left_as, left_as, open_to_others, spent_as
from fedhead.client.holder import MADE, HolderFile
from fedhead.common.data.records import Records
from fedhead.common.errors import DataError, FedheadError
from fedhead.common.privacy.accounting import Spent
from fedhead.common.privacy.filters import spent
from fedhead.common.privacy.ledger import Declaration, DomainSummary, Ledger, unwritten
from fedhead.common.privacy.terms import Terms

GONE: Final = 1e-3  # share of epsilon below which a budget counts as used up: no useful run fits


def storage(holder: HolderFile) -> Iterator[Finding]:
    """Whether the storage folder is there (it is made), can be written, and is closed to others."""
    folder = holder.folder
    shown = f"storage.folder is {folder}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        yield Finding("storage", "remedy", f"{shown}: it can't be made ({error.strerror})", "Name another folder.")
        return
    if not usable(holder):
        yield Finding("storage", "remedy", f"{shown}: it can't be read and written", f"Run: chmod u+rwx {folder}")
    elif open_to_others(folder):
        yield Finding("storage", "remedy", f"{shown}: it is open to others", f"Run: chmod 700 {folder}")
    else:
        yield Finding("storage", "ok", "writable, and closed to others")


def usable(holder: HolderFile) -> bool:
    """Whether the storage folder can be read and written."""
    return holder.folder.is_dir() and os.access(holder.folder, os.R_OK | os.W_OK | os.X_OK)


def ledger(holder: HolderFile) -> Iterator[Finding]:
    """Whether the ledger verifies, and what is left of each domain's budget. Nothing is written."""
    if not usable(holder):
        yield Finding("ledger", "unknown", "not looked at: the storage folder can't be used")
        return
    if not holder.ledger.exists() and (holder.folder / MADE).exists():
        yield Finding(
            "ledger", "remedy", f"{holder.ledger} is gone: what it held is spent",
            "Restore its newest copy; for records that no ledger has charged yet, use another storage folder.",
        )  # fmt: skip
        return
    if not holder.ledger.exists():
        yield Finding("ledger", "ok", "none yet: nothing was ever spent here")
        yield _own_budget(holder, [], unwritten([_declared(holder)]))
        return
    try:
        with Ledger(holder.ledger, create=False, read_only=True) as opened:
            rows, others = opened.verify(), opened.holders()
            domains = opened.summary(holder.name)
            meant = opened.summary(holder.name, declared=[_declared(holder)])
    except FedheadError as error:
        yield Finding("ledger", "remedy", *apart(error))
        return
    yield Finding("ledger", "ok", f"{count(rows, 'row')}, every chain is whole")
    if holder.name not in others and others:
        yield Finding(
            "ledger", "remedy", f'nothing in it is of "{holder.name}", but of {", ".join(others[:3])}',
            "A budget goes with its name: set name back, or give this holder a storage folder of its own.",
        )  # fmt: skip
    yield _own_budget(holder, domains, meant)
    yield from (_other_budget(one) for one in domains if one.domain != holder.budget.domain)


def disjoint(holder: HolderFile, records: Records | DataError) -> Iterator[Finding]:
    """Remember whose data this domain holds, and compare it with the domains that are declared disjoint."""
    domain, others = holder.budget.domain, holder.budget.disjoint_from
    if not usable(holder) or isinstance(records, DataError):
        if others:
            yield Finding("disjoint", "unknown", "not looked at: it takes the records and the storage folder")
        return
    domains = Domains(holder.folder)
    try:
        domains.remember(domain, identities(records, holder.data.person))
    except DataError as error:
        if others:
            yield Finding("disjoint", "unknown", "not looked at: persons can't be read", apart(error)[1])
        return
    except DomainError as error:
        yield Finding("disjoint", "remedy", *apart(error))
        return
    for other in others:
        yield _compared(domains, domain, other)


def _declared(holder: HolderFile) -> Declaration:
    """The budget as the next run will declare it."""
    budget = holder.budget
    return Declaration(holder.name, budget.domain, budget.terms(), tuple(budget.disjoint_from))


def _own_budget(holder: HolderFile, written: Sequence[DomainSummary], meant: Sequence[DomainSummary]) -> Finding:
    """The budget of the file's domain, by the file's own terms.

    Parameters
    ----------
    written, meant : sequence of DomainSummary
        What the ledger says, and what it will say once this file is declared.
    """
    name = holder.budget.domain
    found = next(one for one in meant if one.domain == name)
    terms, rest = found.terms, found.left
    assert terms is not None
    assert rest is not None
    parts = [f'"{name}": {_figures(terms, spent(terms, found.totals))}']
    parts.append(f"left {left_as(rest.epsilon)}" + (" for full-batch runs" if terms.poisson_share else ""))
    if terms.poisson_share:
        delta = delta_left_as(rest.poisson_delta)
        parts.append(f"{left_as(rest.poisson_epsilon)} at delta {delta} for Poisson plans")
    if found.overlapping:
        parts.append(f"counted together with {', '.join(found.overlapping)}")
    text = ", ".join(parts)
    if max(rest.epsilon, rest.poisson_epsilon) < GONE * terms.epsilon:
        return Finding("budget", "remedy", text, "Hardly anything is left: requests will be refused. Take other data.")
    before = next((one for one in written if one.domain == name), found)
    if (before.terms, before.disjoint_from) != (terms, found.disjoint_from):
        return Finding(
            "budget", "warning", text, "The ledger has other terms; those of this file count from the next run."
        )
    return Finding("budget", "ok", text)


def _other_budget(found: DomainSummary) -> Finding:
    """The budget of another domain of the same holder, as its ledger knows it."""
    if found.terms is None or found.left is None or found.spent is None:
        return Finding("budget", "unknown", f'"{found.domain}": the ledger has no terms of it')
    text = f'"{found.domain}": {_figures(found.terms, found.spent)}, left {left_as(found.left.epsilon)}'
    return Finding("budget", "ok", text)


def _figures(terms: Terms, cost: Spent) -> str:
    at = f" at delta {delta_as(cost.delta)}" if cost.delta != terms.delta else ""  # plans charged under other terms
    return f"spent {spent_as(cost.epsilon)}{at} of epsilon {terms.epsilon:g} at delta {delta_as(terms.delta)}"


def _compared(domains: Domains, domain: str, other: str) -> Finding:
    """Whether one declaration of disjointness is true; says neither who is in both, nor how many."""
    if not domains.seen(other):
        text = f'"{other}" was not looked at here yet: its own check will compare'
        return Finding("disjoint", "warning", text, f'Run "fedhead check" on the file of "{other}" too.')
    try:
        common = domains.overlap(domain, other)
    except DomainError as error:
        return Finding("disjoint", "remedy", *apart(error))
    if common:
        text = f'"{domain}" and "{other}" are declared disjoint, and are not: some are in both'
        return Finding("disjoint", "remedy", text, f'Remove "{other}" from budget.disjoint_from: their costs add up.')
    return Finding("disjoint", "ok", f'"{domain}" has nothing in common with "{other}"')
