"""Any sequence of calls, restarts included, gives what a second implementation gives: a list and rational numbers."""

import tempfile
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.privacy.events import CountEvent, GaussianEvent
from fedhead.common.privacy.ledger import Denied, Granted, Ledger, LedgerError, Repeated, Reservation, store
from fedhead.common.privacy.terms import Terms

DOMAINS = ("a", "b", "c")
EVENTS = (GaussianEvent(10.0, 1.0, 1), GaussianEvent(7.0, 1.0, 2), GaussianEvent(25.0, 2.0, 3))
COUNT = CountEvent(30.0, 1.0, 1)
TERMS = (None, Terms(1.0, 1e-5), Terms(1.6, 1e-6, run_epsilon=0.7), Terms(2.2, 1e-5, run_epsilon=1.1, run_delta=1e-6))


def cost(event) -> Fraction:
    return Fraction(event.steps) / Fraction(event.noise_multiplier) ** 2


@dataclass
class Spent:
    wanted: Reservation
    sequence: int
    status: str = "reserved"
    payload: bytes | None = None

    @property
    def cost(self) -> Fraction:
        return cost(self.wanted.event) + (cost(self.wanted.metrics) if self.wanted.metrics else 0)


@dataclass
class Model:
    """The rules once more, without state that is kept up: every answer goes through all that was spent."""

    spent: list[Spent] = field(default_factory=list)
    terms: dict[str, tuple[Terms | None, frozenset[str]]] = field(default_factory=dict)

    def overlap(self, one: str, other: str) -> bool:
        def names(domain: str) -> frozenset[str]:
            return self.terms.get(domain, (None, frozenset()))[1]

        return one == other or not (other in names(one) and one in names(other))

    def answer(self, wanted: Reservation) -> tuple[str, Spent | None]:
        same_run = [one for one in self.spent if one.wanted.run == wanted.run]
        last = same_run[-1] if same_run else None
        if last is not None and wanted.round < last.wanted.round:
            return "stale", None
        if last is not None and wanted.round == last.wanted.round:
            if wanted.digest != last.wanted.digest:
                return "changed", None
            if last.status == "released" and last.payload is not None:
                return "repeated", last
            if last.wanted.seeded and last.wanted == wanted:
                return "again", last
        new = Spent(wanted, 0)
        for domain, (terms, _) in self.terms.items():
            if terms is None or not self.overlap(domain, wanted.domain):
                continue
            counted = [one for one in [*self.spent, new] if self.overlap(domain, one.wanted.domain)]
            if sum(one.cost for one in counted) > Fraction(terms.mu_squared):
                return "limit", None
            of_run = sum(one.cost for one in counted if one.wanted.run == wanted.run)
            if terms.run is not None and of_run > Fraction(terms.run.mu_squared):
                return "limit", None
        if last is not None and last.wanted.round == wanted.round and last.status == "reserved":
            last.status = "abandoned"
        self.spent.append(new)
        return "granted", new


reserve = st.tuples(
    st.just("reserve"), st.sampled_from(DOMAINS), st.sampled_from(("r", "s")), st.integers(0, 3), st.booleans(),
    st.sampled_from(EVENTS), st.sampled_from((None, None, COUNT)), st.booleans(),
)  # fmt: skip
declare = st.tuples(
    st.just("declare"), st.sampled_from(DOMAINS), st.sampled_from(TERMS), st.sets(st.sampled_from(DOMAINS))
)
finish = st.tuples(st.sampled_from(("release", "release", "release without bytes", "abandon")), st.integers(0, 2))
calls = st.lists(st.one_of(reserve, reserve, reserve, finish, finish, declare, st.just(("restart",))), max_size=25)


def play(folder: Path, script: list[tuple]) -> None:
    model = Model()
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        for what, *rest in script:
            if what == "restart":
                ledger.close()
                ledger = Ledger(folder / "ledger.sqlite", create=False)
            elif what == "declare":
                domain, terms, disjoint = rest
                ledger.declare("ann", domain, terms, sorted(disjoint))
                model.terms[domain] = terms, frozenset(disjoint)
            elif what == "reserve":
                domain, run, round, other, event, metrics, seeded = rest
                wanted = Reservation(
                    "ann", domain, run, round, f"{round}{other}", event, "record", "f", "os", None, seeded, metrics
                )
                (got,) = ledger.reserve([wanted])
                check(got, *model.answer(wanted))
            else:
                open_ones = [one for one in model.spent if one.status == "reserved"]
                if open_ones:
                    finish_one(ledger, open_ones[-1 - rest[0] % len(open_ones)], what)
        for domain in DOMAINS:
            exact = sum(one.cost for one in model.spent if one.wanted.domain == domain)
            found = ledger.standing("ann")[1].get(domain)
            assert exact <= Fraction(found.mu_squared if found else 0.0) <= exact * (1 + Fraction(1, 10**12))
        states = [row[0] for row in ledger._connection.execute("SELECT state FROM events ORDER BY sequence")]
        assert states == [one.status for one in model.spent for _ in range(2 if one.wanted.metrics else 1)]
        ledger.verify()
    finally:
        ledger.close()


def check(got, expected: str, which: Spent | None) -> None:
    if isinstance(got, Denied):
        assert expected == {"budget": "limit", "run": "limit"}.get(got.reason, got.reason)
    elif isinstance(got, Repeated):
        assert expected == "repeated"
        assert (got.sequence, got.payload) == (which.sequence, which.payload)
    else:
        assert isinstance(got, Granted)
        assert expected in ("granted", "again")
        if expected == "granted":
            which.sequence = got.sequence
        assert got.sequence == which.sequence


def finish_one(ledger: Ledger, one: Spent, what: str) -> None:
    if what == "abandon":
        ledger.abandon("ann", one.sequence)
        one.status = "abandoned"
        return
    one.payload = b"%d" % one.sequence if what == "release" else None
    ledger.release([("ann", one.sequence, one.payload)])
    one.status = "released"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(calls)
def test_any_sequence_of_calls(script: list[tuple]):
    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), script)


SCRIPT = [
    ("declare", "a", TERMS[1], set()),
    ("reserve", "a", "r", 1, False, EVENTS[0], None, False),
    ("restart",),
    *[("reserve", "a", "r", 1, False, EVENTS[0], None, False)] * 7,
]


def test_the_script_of_the_twins_is_sound(tmp_path: Path):
    play(tmp_path, SCRIPT)


@pytest.mark.parametrize("twin", ["retries are free", "no budget", "charges half"])
def test_twins_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twin: str):
    if twin == "retries are free":
        monkeypatch.setattr(store, "same_release", lambda reserve, wanted: True)
    elif twin == "no budget":
        monkeypatch.setattr("fedhead.common.privacy.ledger.admission.admits", lambda *_: None)
    else:
        original = store.spend
        half = GaussianEvent(15.0, 1.0, 1)
        monkeypatch.setattr(store, "spend", lambda state, wanted: original(state, replace(wanted, event=half)))
    with pytest.raises((AssertionError, LedgerError)):
        play(tmp_path, SCRIPT)
