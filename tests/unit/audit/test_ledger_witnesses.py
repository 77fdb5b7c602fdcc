"""Copies, forks, signed statements and marks; and what ledgers of several domains and holders say together."""

import json
import math
import sqlite3
import time
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.errors import InputError
from fedhead.common.privacy.accounting import epsilon
from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.privacy.filters import Totals
from fedhead.common.privacy.gaussian import gdp_epsilon
from fedhead.common.privacy.ledger import (
    Ledger,
    load_key,
    statement,
)
from fedhead.common.privacy.ledger.statements import public_key
from fedhead.server.marks import write_marks
from fedhead.simulations.audit.ledgers import (
    audit_ledgers,
    passed,
    sign_audit,
)

WORK = run_path(str(Path(__file__).with_name("ledger_work.py")))
STEP, TERMS = (WORK[name] for name in ("STEP", "TERMS"))
bad, checks, fill, give, want = (WORK[name] for name in ("bad", "checks", "fill", "give", "want"))


def test_an_older_copy_is_seen_by_a_mark_and_by_a_statement(ledger, tmp_path):
    older = tmp_path / "older"
    older.mkdir()
    with Ledger(ledger) as opened:
        opened.export(older)
    older = older / "ann" / "ledger.sqlite"
    key = load_key(ledger.with_name("ledger.key"))
    with Ledger(ledger) as opened:
        give(opened, want(9))
        mark = opened.mark("ann")
        (tmp_path / "ann.json").write_text(statement(opened, "ann", key) + "\n")
    write_marks(tmp_path / "server" / "marks.json", {"ann": mark})
    seen = {"statements": [tmp_path / "ann.json"], "keys": [public_key(key)], "marks": tmp_path / "server"}
    assert passed(audit_ledgers([ledger], **seen))
    assert passed(audit_ledgers([older]))  # nothing in itself shows it
    for one in ({"marks": tmp_path / "server" / "marks.json"}, {"statements": seen["statements"]}):
        sequence, what, failed = bad(audit_ledgers([older], **one))
        assert (sequence, failed) == (mark.sequence, {"high-water"})
        assert "an older copy was put back" in what
    # it goes on, with as many rows
    with Ledger(older) as opened:
        give(opened, want(9))
    sequence, what, failed = bad(audit_ledgers([older], marks=tmp_path / "server"))
    assert failed == {"high-water"}
    assert "written anew" in what
    # and both together show where they part, without any witness
    found = audit_ledgers([ledger, older])
    assert not passed(found)
    assert "another copy of this ledger" in next(
        one["first_bad"]["what"] for one in found["holders"] if one["first_bad"]
    )


def test_statements_need_the_key_that_is_known(ledger, tmp_path):
    key, other = load_key(ledger.with_name("ledger.key")), load_key(tmp_path / "other.key")
    with Ledger(ledger) as opened:
        text = statement(opened, "ann", key)
    path = tmp_path / "ann.json"
    path.write_text(text)
    assert passed(audit_ledgers([ledger], statements=[path], keys=[f"ann={public_key(key)}"]))
    for keys in ([public_key(other)], [f"ann={public_key(other)}", public_key(key)], [f"bob={public_key(key)}"]):
        found = audit_ledgers([ledger], statements=[path], keys=keys)
        assert checks(found)["signatures"] is False
        assert not passed(found)
    path.write_text(text.replace("ann", "bob"))
    assert checks(audit_ledgers([ledger], statements=[path]))["signatures"] is False
    for key in ("", "xyz", "ann=12"):
        with pytest.raises(InputError, match="64 hexadecimal digits"):
            audit_ledgers([ledger], keys=[key])
    with pytest.raises(InputError, match="can't be read"):
        audit_ledgers([ledger], statements=[tmp_path / "none.json"])
    with pytest.raises(InputError, match=r"no marks\.json"):
        audit_ledgers([ledger], marks=tmp_path)


def test_a_statement_of_other_totals_or_of_nobody(ledger, tmp_path, monkeypatch):
    key = load_key(ledger.with_name("ledger.key"))
    path = tmp_path / "ann.json"
    with Ledger(ledger) as opened:
        mark, totals = opened.standing("ann")
        with monkeypatch.context() as patch:
            patch.setattr(opened, "standing", lambda _: (mark, {"notes": Totals(totals["notes"].mu_squared / 2)}))
            path.write_text(statement(opened, "ann", key))
    _, what, failed = bad(audit_ledgers([ledger], statements=[path]))
    assert failed == {"high-water"}
    assert "totals of the domain 'notes'" in what
    other = fill(tmp_path / "other" / "ledger.sqlite", holder="bob")
    found = audit_ledgers([other], statements=[path])
    assert not checks(found)["high-water"]
    assert "ann: there is a statement, and no ledger" in next(
        check["meaning"] for check in found["checks"] if check["name"] == "high-water"
    )


def test_a_mark_from_outside_may_be_anything(ledger, tmp_path):
    for row in ([10**30, "0" * 64], [-1, ""], [0, "x"]):
        (tmp_path / "marks.json").write_text(json.dumps({"ann": row, "somebody": [1, "x"]}))
        found = audit_ledgers([ledger], marks=tmp_path)
        assert not passed(found)
    assert any("somebody: there is a mark" in note for note in found["notes"])


@pytest.fixture
def simulated(tmp_path):
    """Three holders in one file, each exported to one of its own before the file went on."""
    path = tmp_path / "run" / "ledgers.sqlite"
    with Ledger(path) as opened:
        for round in range(3):
            got = opened.reserve([want(round, holder=name, seeded=True) for name in ("a", "b", "c")])
            opened.release([(n, one.sequence, None) for n, one in zip(("a", "b", "c"), got, strict=True)])
            if round == 1:
                opened.export(tmp_path / "run" / "holders")
        give(opened, want(0, GaussianEvent(10.0, 1.0, 1), run="more", holder="b", seeded=True))
    return tmp_path / "run"


def test_copies_are_checked_and_counted_once(simulated):
    found = audit_ledgers([simulated], same_people=True)
    assert passed(found)
    assert [one["holder"] for one in found["holders"]] == ["a", "b", "c"]
    assert {Path(one["ledger"]).name for one in found["holders"]} == {"ledgers.sqlite"}
    each = 3 * 2 / 30**2
    across = found["across"]
    assert across["disjoint"]["epsilon"] == pytest.approx(gdp_epsilon(math.sqrt(each + 0.01), 1e-5), rel=1e-3)
    assert across["same-people"]["epsilon"] == pytest.approx(gdp_epsilon(math.sqrt(3 * each + 0.01), 1e-5), rel=1e-6)
    raw = sqlite3.connect(simulated / "holders" / "a" / "ledger.sqlite")
    raw.executescript("DROP TRIGGER entries_keep; UPDATE entries SET unit = 'person' WHERE sequence = 1;")
    raw.close()
    found = audit_ledgers([simulated])
    assert not passed(found)  # tables of a copy are not those of a ledger
    assert "holders/a/ledger.sqlite" in found["holders"][-1]["ledger"]


def test_ledgers_of_one_name_that_share_no_row_are_two_holders(tmp_path):
    for name in ("one", "two"):
        fill(tmp_path / name / "ledger.sqlite")
        time.sleep(0.001)
    found = audit_ledgers([tmp_path])
    assert passed(found)
    assert len(found["holders"]) == 2
    assert any("share no row" in note for note in found["notes"])
    with pytest.raises(InputError, match="one holder's name"):
        sign_audit(found, tmp_path / "out")


def test_domains_add_up_unless_they_are_disjoint(tmp_path):
    squared = 2 / 30**2
    for disjoint, parts in ((True, 1), (False, 2)):
        folder = tmp_path / str(disjoint)
        with Ledger(folder / "ledger.sqlite") as opened:
            for domain, other in (("notes", "scans"), ("scans", "notes")):
                opened.declare("ann", domain, TERMS, [other] if disjoint else [])
            give(opened, want(0))
            give(opened, want(0, run="other", domain="scans"))
        found = audit_ledgers([folder])
        assert passed(found)
        expected = gdp_epsilon(math.sqrt(parts * squared), 1e-5)
        assert expected <= found["across"]["disjoint"]["epsilon"] < 1.03 * expected  # of three figures the largest
        (together,) = found["holders"][0]["together"]
        assert len(together["domains"]) == parts


def two_units(folder, domain, unit):
    """A ledger of a round for records, and of one in another run, domain and unit."""
    with Ledger(folder / "ledger.sqlite") as opened:
        give(opened, want(0))
        give(opened, want(0, domain=domain, run="second", unit=unit))


def test_units_are_never_mixed(tmp_path):
    two_units(tmp_path, "other", "person")
    found = audit_ledgers([tmp_path])
    assert passed(found)
    assert found["across"] == {"disjoint": None, "same-people": None}
    assert any("have no epsilon in common" in note for note in found["notes"])


def test_a_domain_that_mixes_units_leaves_no_figure_out(tmp_path):
    """No largest figure is shown while a holder that may have paid more has none."""
    fill(tmp_path / "bob" / "ledger.sqlite", "bob")
    with Ledger(tmp_path / "ann" / "ledger.sqlite") as opened:
        for round in range(9):
            give(opened, want(round))
        give(opened, want(0, run="second", unit="holder"))
    found = audit_ledgers([tmp_path], same_people=True)
    assert found["across"] == {"disjoint": None, "same-people": None}
    assert any("1 of 2 holders have no epsilon for a record, because a domain mixes units" in n for n in found["notes"])
    alone = audit_ledgers([tmp_path / "ann"])
    assert alone["across"]["disjoint"] is None


def test_what_the_server_noised_stands_apart(tmp_path):
    two_units(tmp_path, "notes.holder-unit", "holder")
    found = audit_ledgers([tmp_path])
    assert passed(found)
    assert found["across"]["disjoint"]["epsilon"] == pytest.approx(gdp_epsilon(math.sqrt(2 / 30**2), 1e-5), rel=1e-3)
    assert {one["unit"] for one in found["holders"][0]["together"]} == {"record", "holder"}


def test_the_largest_figure_counts_plans_that_were_chosen_along_the_way(ledger):
    """Each Poisson plan by itself, as it was charged: more than both accountants find for the schedule as it was."""
    found = audit_ledgers([ledger])
    (domain,) = found["holders"][0]["domains"]
    figures = {name: domain["epsilon"][name]["epsilon"] for name in ("first", "second", "ledger")}
    assert figures["ledger"] > max(figures["first"], figures["second"])
    assert found["across"]["disjoint"]["epsilon"] == pytest.approx(figures["ledger"])


def test_an_accountant_that_is_off_is_noticed(ledger, monkeypatch):
    from fedhead.simulations.audit import ledger_figures

    monkeypatch.setattr(ledger_figures, "pld_epsilon", lambda rows, delta: 1.05 * epsilon_of(rows, delta))
    found = audit_ledgers([ledger])
    assert checks(found)["accountants"] is False
    monkeypatch.setattr(ledger_figures, "spent", lambda terms, totals, delta: epsilon([STEP], 1e-5))
    assert checks(audit_ledgers([ledger]))["spent"] is False


def epsilon_of(rows, delta):
    from fedhead.common.privacy.accounting import epsilon_of_rows

    return epsilon_of_rows(rows, delta).epsilon
