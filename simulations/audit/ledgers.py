"""`fedhead audit ledger`: whether ledgers are whole, charge what was released, and say what it cost.

ledger_rows.py         the file's rows, and the first that is wrong (fedhead.common.privacy.audit.ledger)
ledger_contents.py     the stored bytes of releases
ledger_witnesses.py    signed statements and a server's marks
ledger_figures.py      epsilon by two accountants
ledger_composition.py  over domains and holders
show_ledgers.py        tables
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.findings import all_passed
from fedhead.common.privacy.audit.ledger import Bad, Charged, Reading
from fedhead.common.privacy.audit.statement import sign_privacy_statement, verify_privacy_statement
from fedhead.common.privacy.ledger import Ledger, LedgerError, Mark, load_key
from fedhead.common.writing import write_aside
from fedhead.simulations.audit.ledger_checks import Audit, figure_checks, row_checks, witness_checks
from fedhead.simulations.audit.ledger_composition import Together, across, together
from fedhead.simulations.audit.ledger_contents import check_contents
from fedhead.simulations.audit.ledger_figures import domain_figures, left_of
from fedhead.simulations.audit.ledger_rows import Chain, read_file
from fedhead.simulations.audit.ledger_witnesses import Witnesses, behind, check_key, gather, read_text
from fedhead.simulations.audit.show_ledgers import show_audit, show_statement
from fedhead.simulations.ledger_files import KEY, ledger_files, newest

__all__ = ["audit_ledgers", "passed", "read_statement", "show_audit", "show_statement", "sign_audit"]

SCHEMA: Final = 1


def audit_ledgers(
    paths: Sequence[Path],
    *,
    delta: float | None = None,
    statements: Sequence[Path] = (),
    keys: Sequence[str] = (),
    marks: Path | None = None,
    same_people: bool = False,
) -> dict[str, Any]:
    """Audit ledgers: nothing is written, and a ledger that can't be believed is a finding, not an exception.

    Parameters
    ----------
    paths : sequence of Path
        Ledgers, or folders: then every ledger below them. A copy of a chain that goes on elsewhere is checked, and
        counted once.
    delta : float, in (0, 1), optional
        At which to state epsilon; default: each budget's own, or 1e-5 without one.
    statements : sequence of Path
        Signed statements of where a ledger stood: each must be sound, and its ledger must contain what it states.
    keys : sequence of str
        Public keys, ``KEY`` or ``HOLDER=KEY``, that statements must be signed with.
    marks : Path, optional
        A server's marks.json, or its state folder: each ledger must contain what the server has seen of it.
    same_people : bool
        Whether to compose over holders for somebody who is at all of them.

    Returns
    -------
    dict
        As JSON: `passed`, `checks`, `holders` (each with its first bad row, domains, runs and releases), `across`,
        `notes`.

    Raises
    ------
    InputError
        Nothing is there, or an option is out of range.
    """
    if delta is not None and not 0 < delta < 1:
        raise InputError(f"--delta is {delta}: it must lie between 0 and 1. Give one such as 1e-5.")
    witnesses = gather(statements, keys, marks)
    found = Audit()
    for file in ledger_files(paths):
        _read(found, file)
    kept = _distinct(found)
    lost = _remember(found, kept, witnesses)
    holders, parts = [], []
    for chain in sorted(kept, key=lambda one: (one.holder, str(one.path))):
        entry = _holder(found, chain, delta)
        holders.append(entry)
        if entry["passed"]:
            of_units = together(chain.reading, delta)
            units = {unit for domain in chain.reading.domains.values() for unit in domain.units}
            parts.append((units, of_units))
            entry["together"] = [_together(each) for each in of_units.values()]
    composed, summed, said = across(parts, delta, same_people)
    if summed is not None:
        found.compare("the same people at all holders", summed)
    for entry, (_, of_units) in zip((entry for entry in holders if entry["passed"]), parts, strict=True):
        for one in of_units.values():
            if len(one.domains) > 1:
                found.compare(f"{entry['holder']}, {' and '.join(one.domains)}", one.figures)
    holders += [_unreadable(file, what) for file, what in found.broken]
    free = [
        f"{entry['holder']}, {domain['domain']}"
        for entry in holders
        for domain in entry["domains"]
        if domain["terms"] is None
    ]
    if free:
        more = f" and {len(free) - 1} more" if len(free) > 1 else ""
        found.notes.append(f"{free[0]}{more}: there is no budget, everything is admitted")
    checks = [*row_checks(found), *witness_checks(found, witnesses, lost), *figure_checks(found)]
    return {
        "schema": SCHEMA,
        "passed": all_passed(checks) and all(one["passed"] for one in holders),
        "checks": [check.to_dict() for check in checks],
        "holders": holders,
        "across": composed,
        "notes": list(dict.fromkeys([*found.notes, *said])),
    }


def passed(found: Mapping[str, Any]) -> bool:
    """Whether an audit found nothing wrong: the command's exit status is 0, else 1."""
    return bool(found["passed"])


def sign_audit(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a signed privacy statement of each holder, for others to verify with the public key alone.

    Parameters
    ----------
    found : mapping
        From `audit_ledgers`; it must have passed.
    folder : Path
        Gets `HOLDER.privacy.json`. The key lies beside each ledger, in `ledger.key`, and is made where there is none.

    Returns
    -------
    list of Path

    Raises
    ------
    InputError
        The audit did not pass, or two ledgers have one holder's name.
    LedgerError
        A key can't be read or made.
    """
    if not found["passed"]:
        raise InputError("the audit did not pass: there is nothing to sign. Look at the first bad row.")
    names = [one["holder"] for one in found["holders"]]
    if len(set(names)) < len(names):
        raise InputError("two ledgers have one holder's name: one statement can't speak of both. Name one of them.")
    if any(name in (".", "..") or set(name) & set("/\\\0") for name in names):
        raise InputError("a holder's name is no plain file name: there is no place for its statement. Rename it.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for one in found["holders"]:
        path = folder / f"{one['holder']}.privacy.json"
        key = load_key(Path(one["ledger"]).with_name(KEY))
        write_aside(path, (sign_privacy_statement(one, key) + "\n").encode())
        written.append(path)
    return written


def read_statement(path: Path, key: str | None = None) -> dict[str, Any]:
    """A privacy statement whose signature holds; see `fedhead.common.privacy.audit.statement`.

    Parameters
    ----------
    path : Path
    key : str, optional
        The holder's public key in hexadecimal, known from elsewhere.

    Raises
    ------
    InputError
        The file can't be read, or the key is none.
    LedgerError
        It is not what a holder signed, or another key signed it.
    """
    if key is not None:
        check_key(key)
    text = read_text(path, "STATEMENT")
    # a file ends with a newline, the statement does not
    return {**verify_privacy_statement(text.removesuffix("\n"), key), "key_known": key is not None}


# ---------------------------------------------------------------------------------------------------------------- rows


def _read(found: Audit, file: Path) -> None:
    try:
        chains = read_file(file, check_contents)
    except LedgerError as fault:
        found.broken.append((file, str(fault)))
        return
    found.chains += chains
    for chain in chains:
        if chain.first_bad is not None:
            found.fail(chain, chain.first_bad)
    if any(chain.first_bad is not None for chain in chains):
        return
    try:
        with Ledger(file, create=False, read_only=True) as ledger:
            ledger.verify()
    except LedgerError as fault:
        found.broken.append((file, str(fault)))


def _distinct(found: Audit) -> list[Chain]:
    """The chains to count: bad ones, and of each good one the copy that goes furthest."""
    by_holder: dict[str, list[Chain]] = {}
    for chain in found.chains:
        by_holder.setdefault(chain.holder, []).append(chain)
    kept = []
    for holder, chains in by_holder.items():
        good = {chain.path: chain for chain in chains if (holder, chain.path) not in found.bad}
        kept += [chain for chain in chains if chain.path not in good]
        ends = [(chain.mark, path) for path, chain in good.items() if chain.mark is not None]
        distinct = [good[path] for path in newest(ends, _among(good))]
        for chain in distinct[1:]:
            shared = max((_shared(other, chain) for other in distinct if other is not chain), default=0)
            if shared:
                what = "is not the row that another copy of this ledger has: a copy was put back, and went on"
                found.fail(chain, Bad(shared + 1, what, "high-water"))
            else:
                found.notes.append(f"{holder} has ledgers that share no row: each is counted as a holder of its own")
        kept += distinct
    return kept


def _among(chains: Mapping[Path, Chain]) -> Callable[[Path, Mark], bool]:
    return lambda path, mark: chains[path].has(mark)


def _shared(one: Chain, other: Chain) -> int:
    """Rows that two chains have in common."""
    pairs = zip(one.reading.hashes, other.reading.hashes, strict=False)
    return next(
        (n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.reading.hashes), len(other.reading.hashes))
    )


def _remember(found: Audit, kept: Sequence[Chain], witnesses: Witnesses) -> list[str]:
    """Hold the chains against what others have seen; what speaks of no ledger here is returned."""
    lost = []
    for one in witnesses.seen:
        chains = [chain for chain in kept if chain.holder == one.holder]
        if not chains:
            lost.append(one.holder)
            continue
        bad = behind(one, chains)
        if bad is not None:
            for chain in chains:
                found.fail(chain, bad)
    return lost


# ------------------------------------------------------------------------------------------------------------- entries


def _holder(found: Audit, chain: Chain, delta: float | None) -> dict[str, Any]:
    bad, reading, mark = found.bad.get((chain.holder, chain.path)), chain.reading, chain.mark
    return {
        "holder": chain.holder,
        "ledger": str(chain.path),
        "entries": reading.rows,
        "mark": None if mark is None else {"sequence": mark.sequence, "hash": mark.hash},
        "passed": bad is None,
        "first_bad": None if bad is None else {"sequence": bad.sequence, "what": bad.what, "check": bad.topic},
        # after a bad row nothing is believed, and figures of what stood before it would say too little
        "domains": [] if bad is not None else [_domain(found, chain, name, delta) for name in sorted(reading.domains)],
        "together": [],
    }


def _unreadable(file: Path, what: str) -> dict[str, Any]:
    return {
        "holder": "", "ledger": str(file), "entries": 0, "mark": None, "passed": False,
        "first_bad": {"sequence": None, "what": what, "check": "file"}, "domains": [], "together": [],
    }  # fmt: skip


def _domain(found: Audit, chain: Chain, name: str, delta: float | None) -> dict[str, Any]:
    reading = chain.reading
    domain = reading.domains[name]
    figures = domain_figures(domain, None, delta)
    who = f"{chain.holder}, {name}"
    if figures is not None:
        found.compare(who, figures)
    found.notes += _notes(who, reading, name)
    runs = []
    for run in domain.runs:
        of_run = domain_figures(domain, run, delta)
        if of_run is not None:
            found.compare(f"{who}, run {run}", of_run)
        states = [one.status for one in domain.charged if one.row.run == run and one.of is None]
        counts = {state: states.count(state) for state in ("released", "reserved", "abandoned")}
        runs.append({"run": run, "epsilon": None if of_run is None else of_run.to_dict(), **counts})
    return {
        "domain": name,
        "unit": sorted(domain.units),
        "terms": None if domain.terms is None else asdict(domain.terms),
        "counted_with": sorted(reading.overlapping(name)[1:]),
        "epsilon": None if figures is None else figures.to_dict(),
        "left": left_of(reading, name),
        "releases": [_release(reading, one) for one in domain.charged],
        "runs": runs,
    }


def _release(reading: Reading, one: Charged) -> dict[str, Any]:
    """One event: when its bytes were released or given up, else when it was reserved."""
    ended = one.ended if one.of is None else one.of.ended
    row = one.row
    return {
        "sequence": row.sequence,
        "time": row.time if ended is None else ended.time,
        "run": row.run,
        "round": row.round,
        "event": {"mechanism": one.event.mechanism, **asdict(one.event)},
        "state": one.status,
        "noise": row.noise,
        "payload_digest": reading.payloads.get(row.sequence if row.of is None else row.of),
    }


def _together(one: Together) -> dict[str, Any]:
    return {"unit": one.unit, "domains": list(one.domains), "epsilon": one.figures.to_dict()}


def _notes(who: str, reading: Reading, name: str) -> Iterable[str]:
    domain = reading.domains[name]
    if len(domain.units) > 1:
        yield f"{who}: the units {' and '.join(sorted(domain.units))} have no epsilon in common"
    if any(one.row.seeded for one in domain.charged):
        yield "simulated noise comes from a seed: for whoever knows the seed, epsilon is infinite"
    if any("seeded" in (one.row.noise or "") and not one.row.seeded for one in domain.charged):
        yield f"{who}: a release took its noise from a seed that arrived: epsilon is infinite"
    if "holder" in domain.units:
        if any(one.event.mechanism == "none" for one in domain.charged if one.row.unit == "holder"):
            yield (
                'under the unit "holder" infinite is what the server saw, which is trusted: the figure of what it let '
                "out is in its server-ledger.sqlite, to be audited by itself"
            )
        else:
            yield 'under the unit "holder" the server adds the noise: the figure trusts it'
