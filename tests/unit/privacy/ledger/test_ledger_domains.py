"""What counts against which budget, across plans, domains, processes and copies of a ledger."""

import shutil
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.privacy.events import PoissonEvent
from fedhead.common.privacy.filters import Totals, charge_of
from fedhead.common.privacy.ledger import (
    Declaration,
    Denied,
    Granted,
    Ledger,
    LedgerError,
    Mark,
    Plan,
    Reservation,
    unwritten,
)
from fedhead.common.privacy.terms import Terms

SHARED = run_path(str(Path(__file__).with_name("reservations.py")))
PLAN, POISSON, TERMS, kinds, one, want = (SHARED[name] for name in ("PLAN", "POISSON", "TERMS", "kinds", "one", "want"))


# --------------------------------------------------------------------------------------------------------------- plans


def sampled(round: int, steps: int = 5, **changes) -> Reservation:
    return want(round, **{"event": replace(POISSON, steps=steps), "plan": PLAN, **changes})


def test_a_plan_is_charged_whole_by_its_first_round(ledger: Ledger):
    ledger.declare("ann", "notes", Terms(4.0, 1e-5, poisson_share=0.5))
    for round in range(1, 5):
        assert isinstance(one(ledger, sampled(round)), Granted)
        totals = ledger.standing("ann")[1]["notes"]
        assert (totals.epsilon, totals.delta) == (charge_of(POISSON, 1e-6).epsilon, 1e-6)
    assert one(ledger, sampled(5)) == Denied("plan")
    with Ledger(ledger.path) as again:
        assert one(again, sampled(5)) == Denied("plan")
    assert one(ledger, sampled(1, run="second")) != Denied("plan")
    assert ledger.standing("ann")[1]["notes"].delta >= 2e-6
    assert ledger.verify() > 5


@pytest.mark.parametrize(
    "change",
    [
        {"event": PoissonEvent(0.5, 1.0, 0.01, 5)},
        {"event": PoissonEvent(1.0, 1.0, 0.02, 5)},
        {"event": PoissonEvent(1.0, 2.0, 0.01, 5)},
        {"event": PoissonEvent(1.0, 1.0, 0.01, 21)},
        {"plan": Plan(replace(POISSON, steps=40), 1e-6)},
        {"plan": Plan(POISSON, 2e-6)},
    ],
)
def test_a_round_outside_of_its_plan(ledger: Ledger, change: dict):
    ledger.declare("ann", "notes", Terms(4.0, 1e-5, poisson_share=0.5))
    one(ledger, sampled(1))
    before = ledger.mark("ann")
    assert one(ledger, sampled(2, **change)) == Denied("plan")
    assert ledger.mark("ann") == before


def test_a_retry_uses_up_the_plan_s_steps(ledger: Ledger):
    ledger.declare("ann", "notes", Terms(4.0, 1e-5, poisson_share=0.5))
    assert [type(one(ledger, sampled(1))) for _ in range(5)] == [Granted] * 4 + [Denied]


def test_a_plan_in_another_domain_is_charged_there(ledger: Ledger):
    ledger.declare("ann", "notes", Terms(4.0, 1e-5, poisson_share=0.5))
    one(ledger, sampled(1))
    assert isinstance(one(ledger, sampled(2, domain="other")), Granted)
    assert ledger.standing("ann")[1]["other"].delta == 1e-6


# ------------------------------------------------------------------------------------------------------------- domains


@pytest.mark.parametrize("change", ["appended", "deleted", "edited", "reordered"])
def test_changed_data_inherits_what_the_domain_has_spent(ledger: Ledger, change: str):
    for round in range(1, 8):
        one(ledger, want(round))
    with Ledger(ledger.path) as again:
        again.declare("ann", "notes", TERMS)
        assert one(again, want(1, run="new", fingerprint=change)) == Denied("budget")


def test_domains_add_up_unless_both_declare_each_other_disjoint(ledger: Ledger):
    ledger.declare("ann", "images", TERMS)
    for round in range(1, 5):
        assert isinstance(one(ledger, want(round)), Granted)
    for round in range(1, 4):
        assert isinstance(one(ledger, want(round, run="i", domain="images")), Granted)
    assert one(ledger, want(4, run="i", domain="images")) == Denied("budget")
    ledger.declare("ann", "images", TERMS, ["notes"])  # one side only
    assert one(ledger, want(4, run="i", domain="images")) == Denied("budget")
    ledger.declare("ann", "notes", TERMS, ["images"])
    for round in range(4, 8):
        assert isinstance(one(ledger, want(round, run="i", domain="images")), Granted)
    assert one(ledger, want(8, run="i", domain="images")) == Denied("budget")


def test_a_false_declaration_that_is_taken_back_counts_everything_again(ledger: Ledger):
    ledger.declare_all(
        [Declaration("ann", "notes", TERMS, ("images",)), Declaration("ann", "images", TERMS, ("notes",))]
    )
    for round in range(1, 8):
        one(ledger, want(round))
        one(ledger, want(round, run="i", domain="images"))
    ledger.declare("ann", "images", Terms(1.3, 1e-5))
    assert one(ledger, want(8, run="i", domain="images")) == Denied("budget")


def test_a_domain_without_a_budget_of_its_own_counts_against_the_others(ledger: Ledger):
    for round in range(1, 8):
        assert isinstance(one(ledger, want(round, domain="elsewhere")), Granted)
    assert one(ledger, want(8, domain="elsewhere")) == Denied("budget")
    assert one(ledger, want(9)) == Denied("budget")


def test_the_limit_of_a_run_counts_over_overlapping_domains(ledger: Ledger):
    ledger.declare("ann", "notes", Terms(1.0, 1e-5, run_epsilon=0.4))
    assert isinstance(one(ledger, want(1)), Granted)
    assert one(ledger, want(2, domain="elsewhere")) == Denied("run")


def test_terms_are_written_only_where_they_differ(ledger: Ledger):
    ledger.declare("ann", "notes", TERMS)
    assert kinds(ledger) == ["terms"]
    ledger.declare("ann", "notes", Terms(2.0, 1e-5))
    with Ledger(ledger.path) as again:
        again.declare("ann", "notes", Terms(2.0, 1e-5))
    assert kinds(ledger) == ["terms", "terms"]


def test_summary(ledger: Ledger):
    first = one(ledger, want(1))
    ledger.release([("ann", first.sequence, b"bytes")])
    one(ledger, want(2, noise="mt19937-seeded", seeded=True))
    one(ledger, want(1, run="second", domain="images"))
    (images, notes) = ledger.summary()
    assert (notes.holder, notes.domain, notes.terms, notes.overlapping) == ("ann", "notes", TERMS, ("images",))
    assert (notes.units, notes.noise, notes.seeded) == (("record",), ("mt19937-seeded", "os"), True)
    assert notes.shared.mu_squared > notes.totals.mu_squared
    assert notes.left.mu_squared == pytest.approx(TERMS.mu_squared - 0.03)
    assert notes.spent.epsilon == pytest.approx(0.4997, rel=0.02)
    (run,) = notes.runs
    assert (run.run, run.rounds, run.released, run.reserved) == ("run", 2, 1, 1)
    assert images.terms is images.spent is images.left is None
    assert ledger.summary("ann", delta=1e-6)[0].spent.delta == 1e-6
    assert ledger.summary("nobody") == []


def test_what_is_left_is_what_every_overlapping_budget_leaves(ledger: Ledger):
    """Admission holds a domain to the terms of those that overlap it: what is said to be left must do so too."""
    wide, narrow = Terms(3.0, 1e-5), Terms(1.0, 1e-5)
    ledger.declare_all([Declaration("ann", "notes", wide, ()), Declaration("ann", "images", narrow, ())])
    for round in range(1, 7):
        assert isinstance(one(ledger, want(round)), Granted)  # .06 of .0718 that the narrow one has
    left = {found.domain: found.left for found in ledger.summary()}
    assert left["notes"] == left["images"]
    assert left["notes"].mu_squared == pytest.approx(narrow.mu_squared - 0.06)
    one(ledger, want(7))
    assert one(ledger, want(8)) == Denied("budget")
    (_, notes) = ledger.summary()
    assert notes.left.mu_squared < 0.01 < wide.mu_squared - notes.shared.mu_squared  # so the wide terms alone would err
    assert notes.left_by(wide, charge_totals(want(8))).mu_squared == 0
    ledger.declare_all(
        [Declaration("ann", "notes", wide, ("images",)), Declaration("ann", "images", narrow, ("notes",))]
    )
    (_, notes) = ledger.summary()
    assert notes.left.mu_squared == pytest.approx(wide.mu_squared - 0.07)


@pytest.mark.parametrize("before", [(), ("notes",), ("notes", "images")], ids=len)
@pytest.mark.parametrize("disjoint", [(), ("images",), ("images", "notes")], ids=len)
def test_a_summary_as_declared_is_that_after_the_declaration(ledger: Ledger, before: tuple, disjoint: tuple):
    for domain in before:
        ledger.declare("ann", domain, Terms(4.0, 1e-5), ["notes"])
        assert isinstance(one(ledger, want(1, domain=domain, run=domain)), Granted)
    declared = [Declaration("ann", "notes", Terms(2.0, 1e-5), disjoint), Declaration("bob", "notes", TERMS)]
    rows, now = list(ledger.entries()), ledger.summary()
    found = ledger.summary(declared=declared)
    assert found != now
    assert (list(ledger.entries()), ledger.summary()) == (rows, now)  # nothing was written, or kept in memory
    ledger.declare_all(declared)
    assert found == ledger.summary()
    if not before:
        assert found == unwritten(declared)


def charge_totals(wanted: Reservation) -> Totals:
    return Totals().plus(charge_of(wanted.event))


# --------------------------------------------------------------------------------------------------------------- marks


def test_a_restored_older_copy_is_noticed(ledger: Ledger, tmp_path: Path):
    ledger.release([("ann", one(ledger, want(1)).sequence, b"bytes")])
    ledger.close()
    copy = tmp_path / "copy.sqlite"
    shutil.copy(ledger.path, copy)
    with Ledger(ledger.path) as going_on:
        one(going_on, want(2))
        seen = going_on.mark("ann")
        assert going_on.has("ann", seen)
    with Ledger(copy) as restored:
        assert not restored.has("ann", seen)
        one(restored, want(2, digest="another history"))
        assert restored.mark("ann").sequence == seen.sequence
        assert not restored.has("ann", seen)  # as long, but not the same


def test_marks(ledger: Ledger):
    nothing = ledger.mark("bob")
    assert nothing.sequence == 0
    assert ledger.has("bob", nothing)
    assert not ledger.has("bob", Mark(0, "f" * 64))
    first = ledger.mark("ann")
    one(ledger, want())
    assert ledger.has("ann", first)
    assert not ledger.has("bob", first)
    assert not ledger.has("ann", Mark(2, first.hash))
    for sequence in (-1, 2**63, 10**30, True, 1.0, None):
        assert not ledger.has("ann", Mark(sequence, first.hash))
    assert not ledger.has("ann", Mark(1, None))


def test_another_process_s_rows_count(ledger: Ledger):
    with Ledger(ledger.path) as other:
        for round in range(1, 8):
            one(other if round % 2 else ledger, want(round))
        assert one(other, want(8)) == one(ledger, want(8)) == Denied("budget")
        assert ledger.mark("ann") == other.mark("ann")


def test_export_gives_a_file_a_holder(ledger: Ledger, tmp_path: Path):
    ledger.declare("bob", "notes", None)
    for holder in ("ann", "bob"):
        ledger.release([(holder, one(ledger, want(holder=holder)).sequence, b"bytes")])
    for _ in range(2):  # the second time over the first
        written = ledger.export(tmp_path / "holders")
    assert written == [tmp_path / "holders" / holder / "ledger.sqlite" for holder in ("ann", "bob")]
    for holder, path in zip(("ann", "bob"), written, strict=True):
        assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite"]
        assert path.stat().st_mode & 0o777 == 0o600
        with Ledger(path, read_only=True) as exported:
            assert list(exported.entries()) == list(ledger.entries(holder))
            assert exported.verify() == 3
            with pytest.raises(LedgerError, match="reading only"):
                exported.reserve([want(9, holder=holder)])
        with Ledger(path) as usable:
            assert isinstance(one(usable, want(2, holder=holder)), Granted)
    ledger.declare("../ann", "notes", None)
    with pytest.raises(LedgerError, match="no folder"):
        ledger.export(tmp_path / "holders")


def test_a_domain_that_began_with_the_unit_holder_counts_as_soon_as_it_takes_records(ledger: Ledger):
    """Otherwise records' releases would be hidden from the budgets of the domains that may hold the same people."""
    ledger.declare("ann", "notes", TERMS)
    assert isinstance(one(ledger, want(1, domain="whole", run="a", unit="holder")), Granted)
    assert one(ledger, want(1, domain="whole", run="b")) == Denied("unit")
