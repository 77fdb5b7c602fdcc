"""Whatever a ledger was used for, its audit passes; whatever was done to it afterwards, its audit finds it.

Hypothesis plays the server: it asks for rounds, retries, plans and counts in two domains, and lets replies get lost. It
also plays the forger: one flipped bit of the file, or rows that were edited, removed or moved, with all hashes computed
anew. An audit that looks at hashes alone goes through the same test, and must fail it.
"""

import sqlite3
import tempfile
from contextlib import closing
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedhead.common import protocol
from fedhead.common.privacy.audit import ledger as audit
from fedhead.common.privacy.audit.ledger import read
from fedhead.common.privacy.events import CountEvent, GaussianEvent, NoPrivacyEvent, PoissonEvent, from_json
from fedhead.common.privacy.ledger import Granted, Ledger, LedgerError, Plan, Reservation
from fedhead.common.privacy.ledger.chain import hash_of
from fedhead.common.privacy.terms import Terms
from fedhead.simulations.audit.ledger_contents import check_contents
from fedhead.simulations.audit.ledger_rows import read_file
from fedhead.simulations.audit.ledgers import audit_ledgers

QUICK = settings(
    derandomize=True, deadline=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck)
)
PLANS = (Plan(PoissonEvent(2.0, 1.0, 0.05, 40), 1e-7), Plan(PoissonEvent(1.0, 1.0, 0.01, 30), 2e-7))
COUNT = CountEvent(150.0, 1.0, 1)
DOMAINS = ("notes", "scans")
RUNS = ("one", "two", "three")


@cache
def pack(event, counted):
    content = protocol.released({"weight": torch.zeros(1, 1)}, 9, "ann", event.to_json(), 3.5 if counted else None)
    return protocol.pack(content)


# -------------------------------------------------------------------------------------------------------- a legal life

TERMS = st.sampled_from([
    None, Terms(8.0, 1e-5), Terms(2.0, 1e-5, 0.5), Terms(8.0, 1e-5, 0.25, 1.0), Terms(0.7, 1e-6, 0.3, 0.5, 1e-7),
])  # fmt: skip
EVENTS = st.one_of(
    st.builds(GaussianEvent, st.floats(5.0, 300.0), st.just(1.0), st.integers(1, 4)),
    st.sampled_from([GaussianEvent(40.0, 1.0, 1), CountEvent(90.0, 1.0, 2), NoPrivacyEvent(1), *PLANS]),
)
ASK = st.fixed_dictionaries({
    "run": st.sampled_from(RUNS),
    "domain": st.sampled_from(DOMAINS),
    "event": EVENTS,
    "steps": st.integers(1, 25),
    "next": st.booleans(),
    "counted": st.booleans(),
    "fate": st.sampled_from(["sent", "sent", "sent", "lost", "kept back", "not stored"]),
})  # fmt: skip
DECLARE = st.tuples(st.sampled_from(DOMAINS), TERMS, st.booleans())
LIFE = st.lists(st.one_of(ASK, ASK, ASK, DECLARE), min_size=1, max_size=14)


def live(path, life, seeded=False):
    """Play a life into a ledger."""
    rounds = dict.fromkeys(RUNS, 0)
    with Ledger(path) as ledger:
        for move in life:
            if isinstance(move, tuple):
                domain, terms, disjoint = move
                ledger.declare("ann", domain, terms, DOMAINS if disjoint else ())
                continue
            run, event, plan = move["run"], move["event"], None
            rounds[run] += move["next"]
            if isinstance(event, Plan):
                event, plan = PoissonEvent(*list(vars(event.event).values())[:3], move["steps"]), event
            counted = COUNT if move["counted"] else None
            digest = f"{run} {rounds[run]} {event} {move['domain']} {counted}"
            (got,) = ledger.reserve([
                Reservation(
                    "ann", move["domain"], run, rounds[run], digest, event, "record", "f", "os", plan, seeded, counted
                )
            ])  # fmt: skip
            if isinstance(got, Granted) and move["fate"] != "lost":
                if move["fate"] == "kept back":
                    if not seeded:
                        ledger.abandon("ann", got.sequence)
                else:
                    payload = None if move["fate"] == "not stored" else pack(event, move["counted"])
                    ledger.release([("ann", got.sequence, payload)])


@settings(QUICK, max_examples=60)
@given(LIFE, st.booleans())
def test_every_legal_use_is_read_without_a_fault(life, seeded):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        live(path, life, seeded)
        for chain in read_file(path, check_contents):
            assert chain.first_bad is None, chain.first_bad
            for domain in chain.reading.domains.values():
                covers(domain)


def covers(domain):
    """The total that was accepted covers every charge, by rational arithmetic, and by no more than rounding."""
    events = [one.event for one in domain.charged]
    if any(isinstance(event, NoPrivacyEvent) for event in events):
        assert domain.sums.totals[0] == float("inf")
        return
    costs = [
        Fraction(event.steps) / Fraction(event.noise_multiplier) ** 2
        for event in events
        if not isinstance(event, PoissonEvent)
    ]
    assert sum(costs) <= Fraction(domain.sums.totals[0]) <= sum(costs) * (1 + Fraction(1, 10**12))


@settings(QUICK, max_examples=8)
@given(LIFE)
def test_and_its_audit_passes(life):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        live(path, life)
        found = audit_ledgers([path], same_people=True)
        assert found["passed"], [check for check in found["checks"] if not check["passed"]]


# --------------------------------------------------------------------------------------------------------- flipped bits


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Rows of every kind, in a file of its own."""
    path = tmp_path_factory.mktemp("sound") / "ledger.sqlite"
    ask = {"domain": "notes", "steps": 10, "next": True, "counted": False, "fate": "sent"}
    noises = [40.0, 33.3, 71.0]
    live(
        path,
        [
            ("notes", Terms(8.0, 1e-5, 0.5), False),
            ("scans", Terms(8.0, 1e-5, 0.5), False),
            *({**ask, "run": "one", "event": GaussianEvent(noise, 1.0, 2), "counted": True} for noise in noises),
            {**ask, "run": "one", "event": GaussianEvent(50.0, 1.0, 1), "fate": "lost"},
            {**ask, "run": "one", "event": GaussianEvent(50.0, 1.0, 1), "next": False},
            *[{**ask, "run": "two", "event": PLANS[0]}] * 2,
            {**ask, "run": "three", "event": GaussianEvent(45.0, 1.0, 1), "domain": "scans"},
            {**ask, "run": "three", "event": GaussianEvent(45.0, 1.0, 1), "domain": "scans", "fate": "not stored"},
        ],
    )
    return path


def contents(path):
    """All that a file says."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [
            connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
            for table in ("entries", "heads", "payloads")
        ]


def flipped(path, copy, place, bit):
    """Whether a flipped bit is found; None where the file says the same as before: no row lies there."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    copy.write_bytes(data)
    try:
        found = any(chain.first_bad is not None for chain in read_file(copy, check_contents))
    except LedgerError as fault:
        found = "\n" not in str(fault)  # and nothing but this: no traceback
    if found:
        return True
    return None if contents(copy) == contents(path) else False


def test_every_flipped_bit_that_says_something_else_is_found(ledger, tmp_path):
    size = len(ledger.read_bytes())
    places = range(0, size, 101)
    found = [flipped(ledger, tmp_path / "copy.sqlite", place, place // 101 % 8) for place in places]
    assert False not in found
    assert found.count(True) > 20  # the rest is room that no row uses


@settings(QUICK, max_examples=150)
@given(data=st.data())
def test_bits_of_rows_are_all_found(ledger, data):
    """Aimed at the rows themselves: in their pages no bit is without a meaning, save those of room to spare."""
    raw = ledger.read_bytes()
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT previous || hash, sequence FROM entries").fetchall()
    text, sequence = data.draw(st.sampled_from(rows))
    end = raw.index(text.encode()) + len(text)
    place = end - 1 - data.draw(st.integers(0, 250))
    bit = data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        assert flipped(ledger, Path(folder) / "copy.sqlite", place, bit) is True, (sequence, place, bit)


# ----------------------------------------------------------------------------------------------------------- a rewriter


def chained(rows):
    """The rows with sequences, references and hashes that fit."""
    moved = {row.sequence: n for n, row in enumerate(rows, 1)}
    last, found = "0" * 64, []
    for n, row in enumerate(rows, 1):
        of = moved.get(row.of, row.of) if row.of is not None else None
        row = row._replace(sequence=n, of=of, previous=last)  # noqa: PLW2901
        last = hash_of(row[:-1])
        found.append(row._replace(hash=last))
    return found


@st.composite
def forgeries(draw, rows):
    """A rewritten chain whose totals are not those of its charges, and what was done."""
    charged = [row for row in rows if row.kind == "reserve"]
    gaussian = [row for row in charged if row.plan is None]
    kind = draw(st.sampled_from(["total", "discount", "remove", "event", "swap", "kind"]))
    if kind == "total":  # of one row
        row, column = draw(st.sampled_from(rows)), draw(st.sampled_from(COLUMNS))
        before = getattr(row, column)
        after = before * draw(st.sampled_from([0.0, 0.5, 1 - 1e-12, 1.5, 10.0])) if before else 1e-6
        return chained([one._replace(**{column: after}) if one is row else one for one in rows]), (kind, column)
    if kind == "discount":  # of all rows from one on, each with all that follows from it
        row = draw(st.sampled_from(gaussian))
        part = draw(st.sampled_from([0.01, 0.5, 1.0]))
        cost = row.domain_mu_squared - max(
            (one.domain_mu_squared for one in rows[: row.sequence - 1] if one.domain == row.domain), default=0.0
        )
        return chained([
            one._replace(domain_mu_squared=one.domain_mu_squared - part * cost)
            if one.sequence >= row.sequence and one.domain == row.domain
            else one
            for one in rows
        ]), kind  # fmt: skip
    if kind == "remove":  # a charge, with what became of it and with its count
        # the last one of a domain may be removed: that is an older copy, which only a mark shows
        last = {one.domain: one.sequence for one in charged}
        row = draw(st.sampled_from([one for one in gaussian if one.of is None and one.sequence < last[one.domain]]))
        return chained([one for one in rows if row.sequence not in (one.sequence, one.of)]), kind
    if kind == "event":  # another one than was charged
        row = draw(st.sampled_from(gaussian))
        event = from_json(row.event)
        other = type(event)(event.noise_multiplier * draw(st.sampled_from([0.5, 0.999, 1.001, 2.0])), 1.0, event.steps)
        return chained([one._replace(event=other.to_json()) if one is row else one for one in rows]), kind
    if kind == "swap":  # two charges
        first, second = sorted(draw(st.lists(st.sampled_from(gaussian), min_size=2, max_size=2, unique=True)))
        order = {first.sequence: second, second.sequence: first}
        return chained([order.get(one.sequence, one) for one in rows]), kind
    row = draw(st.sampled_from([one for one in charged if one.of is None]))
    return chained([one._replace(kind="abandon", of=1) if one is row else one for one in rows]), kind


COLUMNS = [
    f"{part}_{name}" for part in ("domain", "run") for name in ("mu_squared", "delta")
]  # what a plan's epsilon may be is a range


@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_a_rewritten_chain_is_found(ledger, data):
    with Ledger(ledger, create=False, read_only=True) as opened:
        rows = list(opened.entries("ann"))
    forged, what = data.draw(forgeries(rows))
    bad = read("ann", forged).first_bad
    assert bad is not None, what
    assert "\n" not in bad.what


def test_an_audit_of_hashes_alone_finds_none_of_them(ledger, monkeypatch):
    """Twin: the same forgeries pass an audit that does not count again."""
    monkeypatch.setattr(audit, "check_grown", lambda *_: None)
    monkeypatch.setattr(audit, "_check_budget", lambda *_: None)
    monkeypatch.setattr(audit, "check_unchanged", lambda *_: None)
    with Ledger(ledger, create=False, read_only=True) as opened:
        rows = list(opened.entries("ann"))
    cheap = chained([row._replace(domain_mu_squared=0.0, run_mu_squared=0.0) for row in rows])
    assert read("ann", cheap).first_bad is None
    monkeypatch.undo()
    assert read("ann", cheap).first_bad is not None
