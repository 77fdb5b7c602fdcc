"""`fedhead audit ledger` from Python: whole files, production code with planted faults, witnesses and statements."""

import json
import math
import sqlite3
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent, NoPrivacyEvent, PoissonEvent
from fedhead.common.privacy.filters import Totals
from fedhead.common.privacy.gaussian import gdp_epsilon
from fedhead.common.privacy.ledger import (
    Granted,
    Ledger,
    Plan,
    store,
    transactions,
)
from fedhead.common.privacy.ledger import state as states
from fedhead.common.privacy.terms import Terms
from fedhead.simulations.audit.ledgers import (
    audit_ledgers,
    passed,
    show_audit,
)
from fedhead.simulations.budgets import read_budgets

WORK = run_path(str(Path(__file__).with_name("ledger_work.py")))
COUNT, PLAN, STEP, TERMS = (WORK[name] for name in ("COUNT", "PLAN", "STEP", "TERMS"))
bad, checks, fill, give, pack, want = (WORK[name] for name in ("bad", "checks", "fill", "give", "pack", "want"))


# ----------------------------------------------------------------------------------------------------- a sound ledger


def test_terms_that_came_after_a_plan_with_a_larger_share_of_delta(tmp_path):
    """A plan takes all of the later terms' delta: what is stated then covers both, and the audit passes."""
    plan, step = Plan(PoissonEvent(30.0, 1.0, 0.25, 6), 0.01), GaussianEvent(20.0, 1.0, 1)
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        give(opened, want(1, plan.event, "sampled", plan=plan))
        give(opened, want(1, step, "full"))
        opened.declare("ann", "notes", Terms(1.0, 0.01))
    found = audit_ledgers([tmp_path])
    assert passed(found), bad(found)
    figures = found["holders"][0]["domains"][0]["epsilon"]
    assert {one["delta"] for one in figures.values()} == {0.02}
    (row,) = read_budgets([tmp_path])["domains"]
    assert row["spent"] == figures["ledger"]
    assert row["spent"]["epsilon"] >= epsilon([plan.event, step], 0.02).epsilon
    sampled = next(run for run in row["runs"] if run["run"] == "sampled")
    assert sampled["spent"]["delta"] == 0.01  # a plan by itself is stated at its own


def test_a_sound_ledger_passes_with_figures_of_independent_accountants(ledger, capsys):
    found = audit_ledgers([ledger])
    assert passed(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (holder,) = found["holders"]
    (domain,) = holder["domains"]
    assert (holder["holder"], holder["first_bad"], domain["unit"]) == ("ann", None, ["record"])
    events = [*[STEP] * 4, COUNT, PLAN.event]  # the plan whole, although half of it took place
    figures = domain["epsilon"]
    assert figures["first"] == {"epsilon": epsilon(events, 1e-5).epsilon, "delta": 1e-5, "accountant": "prv"}
    assert figures["second"]["epsilon"] == pytest.approx(figures["first"]["epsilon"], rel=0.01, abs=1e-3)
    assert figures["ledger"]["epsilon"] > figures["first"]["epsilon"]
    first, sampled = domain["runs"]
    assert (first["run"], first["released"], first["reserved"], first["abandoned"]) == ("first", 3, 1, 0)
    exact = gdp_epsilon(math.sqrt(4 * 2 / 30**2 + 1 / 70**2), 1e-5)
    assert first["epsilon"]["first"]["epsilon"] == pytest.approx(exact, rel=1e-6)
    assert first["epsilon"]["second"]["epsilon"] == pytest.approx(exact, rel=1e-3)
    assert sampled["epsilon"]["ledger"]["accountant"] == "sum"
    states = [(row["event"]["mechanism"], row["state"]) for row in domain["releases"]]
    assert states == [
        *[("full-batch", "released")] * 2, ("count", "released"), ("full-batch", "released"),
        ("full-batch", "reserved"), *[("poisson", "released")] * 2,
    ]  # fmt: skip
    assert found["across"]["disjoint"]["epsilon"] == max(one["epsilon"] for one in figures.values())
    show_audit(found)
    out = capsys.readouterr().out
    assert "audit of ledgers: passed" in out
    assert "full-batch" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_delta_may_be_chosen_and_must_be_one(ledger):
    found = audit_ledgers([ledger], delta=1e-3)
    assert found["holders"][0]["domains"][0]["epsilon"]["second"]["delta"] == 1e-3
    with pytest.raises(InputError, match=r"--delta is 2"):
        audit_ledgers([ledger], delta=2.0)
    with pytest.raises(InputError, match="there is no such file"):
        audit_ledgers([ledger.with_name("other")])


def test_a_release_without_privacy_is_infinite(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        give(opened, want(0, NoPrivacyEvent(1)))
    found = audit_ledgers([tmp_path])
    assert passed(found)
    figures = found["holders"][0]["domains"][0]["epsilon"]
    assert [figures[name]["epsilon"] for name in ("first", "second", "ledger")] == ["inf"] * 3
    assert found["across"]["disjoint"]["epsilon"] == "inf"
    json.dumps(found, allow_nan=False)


def test_a_seed_that_arrived_gives_everything_away(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        give(opened, want(0, noise="mt19937-seeded"))
    found = audit_ledgers([tmp_path])
    assert found["holders"][0]["domains"][0]["epsilon"]["first"]["epsilon"] == "inf"
    assert any("a seed that arrived" in note for note in found["notes"])


def test_a_ledger_of_many_runs_is_listed_whole(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        for start in range(0, 1000, 100):
            batch = [want(round, run=f"run {start // 200}") for round in range(start, start + 100)]
            got = opened.reserve(batch)
            opened.release([("ann", one.sequence, None) for one in got])
    found = audit_ledgers([tmp_path / "ledger.sqlite"])
    assert passed(found)
    (domain,) = found["holders"][0]["domains"]
    assert len(domain["releases"]) == 1000
    assert len(domain["runs"]) == 5


# ----------------------------------------------------------- production code with a fault: the audit names each of them


def refunds(monkeypatch):
    """A crash is taken back: what was reserved and never sent is subtracted when the round is asked again."""
    real = transactions.Transactions._append

    def append(self, chain, kind, columns, after):
        if kind == "abandon":
            domain, run = chain.domains[columns.domain], chain.runs[columns.run].shares[columns.domain]
            cost = 2 / 30**2
            domain.totals = Totals(domain.totals.mu_squared - cost)
            run.totals = Totals(run.totals.mu_squared - cost)
            after = domain.totals, run.totals
        return real(self, chain, kind, columns, after)

    monkeypatch.setattr(transactions.Transactions, "_append", append)


def restarts(monkeypatch):
    """Every round has an accountant of its own."""
    monkeypatch.setattr(states.State, "totals", lambda self, domain, run: (Totals(), Totals()))


def counts_for_free(monkeypatch):
    """The row of a count adds nothing."""
    from fedhead.common.privacy.ledger import admission

    real = admission.charge_of
    free = admission.Charge(0.0, 0.0, 0.0)
    monkeypatch.setattr(admission, "charge_of", lambda event, *more: free if event == COUNT else real(event, *more))


def forgets_counts(monkeypatch):
    """A count is released, and nobody reserves it."""
    from dataclasses import replace

    real = store.Ledger._reserve
    monkeypatch.setattr(store.Ledger, "_reserve", lambda self, wanted: real(self, replace(wanted, metrics=None)))


def reuses(monkeypatch):
    """A retry draws fresh noise under the charge that was there."""
    monkeypatch.setattr(store.Ledger, "_payload", lambda *_: None)
    monkeypatch.setattr(store, "same_release", lambda *_: True)

    def release(self, holder, sequence, payload):
        chain = self._state(holder)
        reserve = chain.reserves[sequence]
        self._follow(chain, reserve, "release", transactions.hash_of([payload.hex()]))
        return chain.mark

    monkeypatch.setattr(store.Ledger, "_release", release)


def admits_all(monkeypatch):
    from fedhead.common.privacy.ledger import admission

    monkeypatch.setattr(admission, "admits", lambda *_: None)


TWINS = {
    "a refund after a crash": (refunds, "takes a charge back", "totals"),
    "an accountant that restarts every round": (restarts, "started anew", "totals"),
    "a count that costs nothing": (counts_for_free, "was not charged", "totals"),
    "a released metric that was not charged": (forgets_counts, "count of correct answers that was not charged", "payl"),
    "fresh noise in a retry": (reuses, "a second time under one charge", "rounds"),
    "a filter that admits all": (admits_all, "goes beyond the budget", "budget"),
}


def work(path):
    """Rounds with a count, a crash and its retry, a reply that was lost, and one round too dear."""
    with Ledger(path) as opened:
        opened.declare("ann", "notes", TERMS)
        give(opened, want(0, metrics=COUNT))
        give(opened, want(1))
        opened.reserve([want(2)])
        give(opened, want(2))
        (got,) = opened.reserve([want(2)])
        if isinstance(got, Granted):  # not the stored bytes: the server gets others
            opened.release([("ann", got.sequence, pack(STEP) + b"")])
        give(opened, want(0, run="last", metrics=COUNT))
        (got,) = opened.reserve([want(3, GaussianEvent(0.1, 1.0, 1))])
        if isinstance(got, Granted):
            opened.release([("ann", got.sequence, pack(GaussianEvent(0.1, 1.0, 1)))])


def test_the_same_work_without_a_fault_passes(tmp_path):
    work(tmp_path / "ledger.sqlite")
    assert passed(audit_ledgers([tmp_path]))


@pytest.mark.parametrize("name", TWINS)
def test_a_faulty_holder_is_found_and_the_fault_named(tmp_path, name, record_property):
    twin, words, check = TWINS[name]
    with pytest.MonkeyPatch.context() as patch:
        twin(patch)
        work(tmp_path / "ledger.sqlite")
    sequence, what, failed = bad(audit_ledgers([tmp_path]))
    assert words in what
    assert any(one.startswith(check) for one in failed)
    assert sequence > 1
    record_property("mutant", [name, "ledger audit", f"row {sequence}", what])


# ------------------------------------------------------------------------------------------------------- stored bytes


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"bytes", "can't be read"),
        (pack(STEP) + b"17", "beyond those that its parts have room for"),
        (pack(STEP, loss=0.25), "released 'loss', which no row of the ledger charges"),
        (pack(STEP, count=17.0), "that was not charged"),
        (pack(GaussianEvent(31.0, 1.0, 2)), "an event or a name"),
        (pack(STEP, holder="bob"), "an event or a name"),
    ],
)
def test_bytes_that_say_more_than_was_charged(tmp_path, payload, words):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        give(opened, want(0), payload)
    sequence, what, failed = bad(audit_ledgers([tmp_path]))
    assert (sequence, failed) == (2, {"payloads"})
    assert words in what


def test_stored_bytes_that_were_exchanged(ledger):
    raw = sqlite3.connect(ledger)
    raw.execute("UPDATE payloads SET bytes = ?", (pack(GaussianEvent(31.0, 1.0, 2)),))
    raw.commit()
    raw.close()
    _, what, failed = bad(audit_ledgers([ledger]))
    assert failed == {"payloads"}
    assert "other bytes than the row says" in what


# ------------------------------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_names_its_row(ledger):
    with Ledger(ledger) as opened:
        row = list(opened.entries())[5]
    data = ledger.read_bytes()
    place = data.index((row.previous + row.hash).encode()) + 70
    ledger.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    sequence, what, failed = bad(audit_ledgers([ledger]))
    assert (sequence, failed) == (6, {"chain"})
    assert "the row was changed" in what


@pytest.mark.parametrize("keep", [0, 100, 4096, 9000])
def test_a_truncated_file_is_a_finding(ledger, keep, capsys):
    ledger.write_bytes(ledger.read_bytes()[:keep])
    found = audit_ledgers([ledger])
    assert not passed(found)
    assert not checks(found)["file"]
    assert "\n" not in found["holders"][-1]["first_bad"]["what"]
    show_audit(found)
    assert "FAILED" in capsys.readouterr().out


def test_a_lost_end_that_the_file_itself_remembers(ledger):
    raw = sqlite3.connect(ledger)
    raw.executescript("DROP TRIGGER entries_stay; DELETE FROM entries WHERE sequence > 8;")
    from fedhead.common.privacy.ledger.files import OBJECTS

    raw.execute(OBJECTS["entries_stay"])
    raw.commit()
    raw.close()
    sequence, what, failed = bad(audit_ledgers([ledger]))
    assert (sequence, "chain" in failed) == (9, True)
    assert "is missing" in what


def test_a_file_that_is_no_ledger(tmp_path):
    (tmp_path / "ledger.sqlite").write_text("hello")
    found = audit_ledgers([tmp_path])
    assert not passed(found)
    assert "ledger" in found["holders"][0]["first_bad"]["what"]
