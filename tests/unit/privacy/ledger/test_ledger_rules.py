"""What a ledger admits: repeats, order, retries, Poisson plans, metrics, domains, marks."""

import math
from fractions import Fraction
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.errors import InputError
from fedhead.common.privacy.events import CountEvent, GaussianEvent, NoPrivacyEvent
from fedhead.common.privacy.ledger import (
    Declaration,
    Denied,
    Granted,
    Ledger,
    LedgerError,
    Plan,
    Repeated,
)
from fedhead.common.privacy.terms import Terms

SHARED = run_path(str(Path(__file__).with_name("reservations.py")))
PLAN, POISSON, TERMS, kinds, one, total, want = (
    SHARED[name] for name in ("PLAN", "POISSON", "TERMS", "kinds", "one", "total", "want")
)


def test_seven_fit_and_the_eighth_does_not(ledger: Ledger):
    got = [one(ledger, want(round)) for round in range(1, 10)]
    assert [type(found) for found in got] == [Granted] * 7 + [Denied] * 2
    assert got[-1] == Denied("budget")
    assert Fraction(total(ledger)) >= 7 * Fraction(1, 100)
    assert total(ledger) <= TERMS.mu_squared
    assert ledger.verify() == 8


def test_totals_are_in_every_row_and_never_below_the_exact_sum(ledger: Ledger):
    ledger.declare("ann", "notes", None)
    events = [GaussianEvent(noise, 1.0, steps) for noise, steps in ((3.3, 7), (0.7, 1), (19.0, 3), (1e5, 1), (1.1, 9))]
    exact = Fraction(0)
    for round, event in enumerate(events):
        one(ledger, want(round, event=event, run=f"run-{round % 2}"))
        exact += Fraction(event.steps) / Fraction(event.noise_multiplier) ** 2
        last = list(ledger.entries())[-1]
        assert exact <= Fraction(last.domain_mu_squared) <= exact * (1 + Fraction(1, 10**14))
        assert last.run_mu_squared <= last.domain_mu_squared


def test_no_row_but_a_reserve_has_a_hash_that_can_be_guessed(ledger: Ledger):
    """A reserve's fingerprint is keyed by its holder; other rows get 128 random bits each."""
    granted = one(ledger, want(1))
    ledger.release([("ann", granted.sequence, b"bytes")])
    ledger.abandon("ann", one(ledger, want(2)).sequence)
    ledger.declare("ann", "notes", None)
    rows = list(ledger.entries())
    assert [row.kind for row in rows] == ["terms", "reserve", "release", "reserve", "abandon", "terms"]
    others = [row.fingerprint for row in rows if row.kind != "reserve"]
    assert len({bytes.fromhex(one) for one in others if len(one) == 32}) == 4
    assert {row.fingerprint for row in rows if row.kind == "reserve"} == {"f0"}
    ledger.verify()


def test_a_repeat_gets_the_stored_bytes_and_spends_nothing(ledger: Ledger):
    granted = one(ledger, want())
    (mark,) = ledger.release([("ann", granted.sequence, b"bytes")])
    before = total(ledger)
    assert one(ledger, want()) == Repeated(granted.sequence, b"bytes", mark)
    assert one(ledger, want(fingerprint="other data")).payload == b"bytes"
    assert total(ledger) == before
    assert ledger.mark("ann") == mark


def test_a_repeat_after_a_restart(ledger: Ledger):
    granted = one(ledger, want())
    ledger.release([("ann", granted.sequence, b"bytes")])
    with Ledger(ledger.path) as again:
        assert one(again, want()).payload == b"bytes"


def test_another_digest_in_the_same_round_is_changed(ledger: Ledger):
    granted = one(ledger, want())
    assert one(ledger, want(digest="other")) == Denied("changed")
    ledger.release([("ann", granted.sequence, b"bytes")])
    assert one(ledger, want(digest="other")) == Denied("changed")
    assert len(kinds(ledger)) == 3


def test_an_older_round_is_stale_but_other_runs_are_their_own(ledger: Ledger):
    for round in (1, 2):
        ledger.release([("ann", one(ledger, want(round)).sequence, b"bytes")])
    assert one(ledger, want(1)) == Denied("stale")
    assert one(ledger, want(0)) == Denied("stale")
    assert isinstance(one(ledger, want(1, run="second")), Granted)


def test_a_retry_without_bytes_is_a_new_spend(ledger: Ledger):
    first = one(ledger, want())
    second = one(ledger, want())
    assert isinstance(second, Granted)
    assert second.sequence != first.sequence
    assert kinds(ledger) == ["terms", "reserve", "abandon", "reserve"]
    assert Fraction(total(ledger)) >= 2 * Fraction(1, 100)
    with pytest.raises(LedgerError, match="abandoned"):
        ledger.release([("ann", first.sequence, b"too late")])
    ledger.release([("ann", second.sequence, b"bytes")])
    assert one(ledger, want()).payload == b"bytes"


def test_a_release_without_bytes_is_spent_anew_too(ledger: Ledger):
    ledger.release([("ann", one(ledger, want()).sequence, None)])
    again = one(ledger, want())
    assert isinstance(again, Granted)
    assert kinds(ledger) == ["terms", "reserve", "release", "reserve"]
    assert Fraction(total(ledger)) >= 2 * Fraction(1, 100)


def test_erased_bytes_are_spent_anew(ledger: Ledger):
    ledger.release([("ann", one(ledger, want()).sequence, b"bytes")])
    ledger._connection.execute("DELETE FROM payloads")
    assert isinstance(one(ledger, want()), Granted)
    assert Fraction(total(ledger)) >= 2 * Fraction(1, 100)


def test_a_seeded_retry_is_the_same_release(ledger: Ledger):
    first = one(ledger, want(seeded=True))
    assert one(ledger, want(seeded=True)).sequence == first.sequence
    ledger.release([("ann", first.sequence, None)])
    again = one(ledger, want(seeded=True))
    assert again.sequence == first.sequence
    ledger.release([("ann", first.sequence, None)])
    assert kinds(ledger) == ["terms", "reserve", "release"]


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "f1"},  # the same noise on other data: the difference of the two shows the records
        {"event": GaussianEvent(10.0, 2.0, 1)},
        {"noise": "other"},
        {"seeded": False},
        {"metrics": CountEvent(10.0, 1.0, 1)},
    ],
)
def test_a_seeded_retry_with_anything_else_is_a_new_spend(ledger: Ledger, change: dict):
    first = one(ledger, want(seeded=True))
    ledger.release([("ann", first.sequence, None)])
    before = total(ledger)
    again = one(ledger, want(**{"seeded": True, **change}))
    assert again.sequence != first.sequence
    assert total(ledger) > before


def test_one_budget_covers_one_unit(ledger: Ledger):
    """Adding a record can turn a person's whole gradient around, so a figure over both would hold for neither."""
    one(ledger, want(1))
    before = total(ledger)
    assert ledger.reserve([want(2, unit="person"), want(2, run="second", unit="person")]) == [Denied("unit")] * 2
    assert total(ledger) == before
    # another domain that may share people with this one, too; not one under the unit holder, which counts nowhere
    assert ledger.reserve([want(1, run="third", domain="images", unit="person")]) == [Denied("unit")]
    assert type(ledger.reserve([want(1, run="fourth", domain="trusting", unit="holder")])[0]) is Granted
    assert type(ledger.reserve([want(2)])[0]) is Granted


def test_nothing_is_refunded(ledger: Ledger):
    first = one(ledger, want())
    spent = total(ledger)
    mark = ledger.abandon("ann", first.sequence)
    assert ledger.abandon("ann", first.sequence) == mark == ledger.mark("ann")
    assert total(ledger) == spent
    again = one(ledger, want())
    assert again.sequence == mark.sequence + 1  # abandoned once, not twice
    ledger.release([("ann", again.sequence, b"bytes")])
    with pytest.raises(LedgerError, match="was released"):
        ledger.abandon("ann", again.sequence)


def test_release_twice(ledger: Ledger):
    granted = one(ledger, want())
    (mark,) = ledger.release([("ann", granted.sequence, b"bytes")])
    assert ledger.release([("ann", granted.sequence, b"bytes")]) == [mark]
    with pytest.raises(LedgerError, match="released before"):
        ledger.release([("ann", granted.sequence, b"other bytes")])
    with pytest.raises(LedgerError, match="not a reserve"):
        ledger.release([("ann", 1, b"bytes")])
    assert ledger.mark("ann") == mark


def test_only_the_latest_round_s_bytes_are_kept(ledger: Ledger):
    for round in (1, 2, 3):
        ledger.release([("ann", one(ledger, want(round)).sequence, b"%d" % round)])
    ledger.release([("ann", one(ledger, want(1, run="second")).sequence, b"second")])
    assert [row[0] for row in ledger._connection.execute("SELECT bytes FROM payloads")] == [b"3", b"second"]
    late, latest = one(ledger, want(4)), one(ledger, want(5))
    ledger.release([("ann", latest.sequence, b"5")])
    ledger.release([("ann", late.sequence, b"4")])
    assert sorted(row[0] for row in ledger._connection.execute("SELECT bytes FROM payloads")) == [b"5", b"second"]
    assert one(ledger, want(5)).payload == b"5"


def test_states_in_the_view(ledger: Ledger):
    sequences = [one(ledger, want(round, metrics=CountEvent(20.0, 1.0, 1))).sequence for round in (1, 2, 3)]
    ledger.release([("ann", sequences[0], b"bytes")])
    ledger.abandon("ann", sequences[1])
    found = ledger._connection.execute("SELECT round, state FROM events ORDER BY sequence").fetchall()
    assert found == [(1, "released")] * 2 + [(2, "abandoned")] * 2 + [(3, "reserved")] * 2


def test_metrics_are_charged_in_the_same_transaction(ledger: Ledger):
    count = CountEvent(5.0, 1.0, 1)
    assert one(ledger, want(1, metrics=count)).mark.sequence == 3
    assert Fraction(total(ledger)) >= Fraction(1, 100) + Fraction(1, 25)
    assert one(ledger, want(2, metrics=count)) == Denied("budget")
    assert isinstance(one(ledger, want(2)), Granted)
    assert len([entry for entry in ledger.entries() if entry.kind == "reserve"]) == 3


def test_the_limit_of_one_run(ledger: Ledger):
    ledger.declare("ann", "notes", Terms(1.0, 1e-5, run_epsilon=0.4))  # mu squared .0134: one round a run
    assert isinstance(one(ledger, want(1)), Granted)
    assert one(ledger, want(2)) == Denied("run")
    assert isinstance(one(ledger, want(1, run="second")), Granted)


def test_one_call_for_many_holders_denies_only_those_who_are_beyond(ledger: Ledger):
    ledger.declare_all([Declaration("bob", "notes", Terms(0.1, 1e-5)), Declaration("cid", "notes", None)])
    got = ledger.reserve([want(holder=holder) for holder in ("ann", "bob", "cid")])
    assert [type(found) for found in got] == [Granted, Denied, Granted]
    assert ledger.holders() == ["ann", "bob", "cid"]
    assert ledger.mark("bob").sequence == 1


def test_a_domain_without_terms_admits_everything(ledger: Ledger):
    got = one(ledger, want(holder="bob", event=NoPrivacyEvent(3)))
    assert isinstance(got, Granted)
    assert math.isinf(total(ledger, holder="bob"))
    assert isinstance(one(ledger, want(2, holder="bob")), Granted)
    assert one(ledger, want(event=NoPrivacyEvent(3))) == Denied("budget")
    assert ledger.verify() == 3
    with Ledger(ledger.path) as again:
        assert math.isinf(total(again, holder="bob"))


@pytest.mark.parametrize(
    "change",
    [
        {"holder": ""},
        {"domain": None},
        {"run": "\udc80"},
        {"digest": 3},
        {"round": -1},
        {"round": 2**63},
        {"round": True},
        {"round": 1.0},
        {"event": POISSON},
        {"plan": PLAN},
        {"event": POISSON, "plan": Plan(POISSON, 0.0)},
        {"event": POISSON, "plan": Plan(POISSON, math.nan)},
    ],
)
def test_what_can_t_be_written_down_spends_nothing(ledger: Ledger, change: dict):
    before = ledger.mark("ann")
    with pytest.raises(InputError, match=r"reservation\.\w+.* is .*: it must be"):
        ledger.reserve([want(1), want(**{"round": 1, "holder": "bob", **change})])
    assert ledger.mark("ann") == before
    assert isinstance(one(ledger, want(1)), Granted)
