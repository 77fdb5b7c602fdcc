"""`fedhead check`: ticks, remedies and exit status, with nothing that leads out of the holder's own terminal."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest
from scipy.stats import norm

from fedhead.client.checking import check_holder
from fedhead.client.holder import load_holder
from fedhead.common.privacy.events import GaussianEvent
from fedhead.common.privacy.ledger import Ledger, Reservation
from fedhead.common.privacy.terms import Terms
from fedhead.server.keys import make_keys

FILES = run_path(str(Path(__file__).with_name("holder_files.py")))
HOLDER, change = (FILES[name] for name in ("HOLDER", "change"))
SECRET = "Zebulon"


def notes(first: int, last: int, persons: int) -> str:
    rows = [f"note {i},{'ab'[i % 2]},{SECRET}{i % persons}" for i in range(first, last)]
    return "note,code,patient\n" + "\n".join(rows) + "\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "notes.csv").write_text(notes(0, 40, 8))
    (tmp_path / "holder.toml").write_text(HOLDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDHEAD_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def fedhead(here, fedhead):
    """The command in that folder."""
    return fedhead


def found(here, name: str):
    """The findings of one name."""
    return [finding for finding in check_holder(here / "holder.toml").findings if finding.name == name]


def test_all_is_well(fedhead, here):
    status, out, err = fedhead("check", "holder.toml")
    assert (status, err) == (0, "")
    assert "✗" not in out
    assert "40 records (text), 2 different labels" in out
    assert "8 persons, at most 5 records each" in out
    assert "spent 0.000 of epsilon 4 at delta 1e-6" in " ".join(re.sub(r"[│\n]", " ", out).split())
    assert SECRET not in out
    assert (here / "state").stat().st_mode & 0o777 == 0o700
    assert not (here / "state" / "ledger.sqlite").exists()  # a check makes no ledger
    assert fedhead("check", "holder.toml")[1] == out


def test_json_is_one_object_and_the_status_is_the_same(fedhead, here):
    status, out, _ = fedhead("check", "holder.toml", "--json")
    report = json.loads(out)
    assert (status, report["good"], report["holder"], report["domain"]) == (0, True, "st-mary", "adults")
    change(here, "[limits]", "[limits]\nleast_records = 41")
    status, out, _ = fedhead("check", "holder.toml", "--json")
    assert (status, json.loads(out)["good"]) == (1, False)


def test_a_bad_file_is_status_2_with_every_fault_on_its_line(fedhead, here):
    change(here, "epsilon = 4.0", "epsilon = -4.0\nepsilom = 1")
    status, out, err = fedhead("check", "holder.toml")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"fedhead: budget.epsilon is -4.0: .*\nfedhead: budget.epsilom is 1: .*\n", err), err
    status, _, err = fedhead("check", "none.toml")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("old", "new", "name", "words"),
    [
        ("notes.csv", "none.csv", "data", "no such file"),
        ('text = "note"', 'text = "body"', "data", "no such column"),
        ('label = "code"', 'label = "diagnosis"', "data", "no such column"),
        ("[data]", '[data]\nlabels = ["a", "c"]', "data", "20 of 40 records have a label outside data.labels"),
        ('person = "patient"', 'person = "doctor"', "persons", "no such column"),
        ("[limits]", "[limits]\nleast_records = 41", "least records", "there are 40 records"),
    ],
)
def test_what_has_to_be_changed(fedhead, here, old, new, name, words):
    change(here, old, new)
    (finding,) = found(here, name)
    assert finding.state == "remedy"
    assert finding.remedy
    assert words in finding.text
    assert "recipe" not in finding.text + finding.remedy
    status, out, err = fedhead("check", "holder.toml")
    assert (status, err) == (1, "")
    assert "not ready" in out
    assert SECRET not in out


def test_records_without_a_person_are_a_fault(here):
    (here / "notes.csv").write_text(notes(0, 9, 3) + "another,a,\n")
    (finding,) = found(here, "persons")
    assert finding.state == "remedy"
    assert SECRET not in finding.text + finding.remedy


def test_figures_for_records_do_not_protect_people(here):
    assert found(here, "unit") == []
    change(here, 'units = ["person"]', 'units = ["record", "person"]')
    (finding,) = found(here, "unit")
    assert finding.state == "warning"
    assert "up to 5 records" in finding.text
    (here / "notes.csv").write_text(notes(0, 40, 40))
    assert found(here, "unit") == []  # everybody has one record


def test_what_the_holder_trusts_is_said(here):
    change(here, 'units = ["person"]', 'units = ["holder"]\nallow_seeded_noise = true')
    assert [finding.state for name in ("unit", "noise") for finding in found(here, name)] == ["warning", "warning"]
    assert check_holder(here / "holder.toml").good


def test_the_storage_folder_must_be_closed_to_others(here):
    (here / "state").mkdir(mode=0o755)
    (here / "state").chmod(0o755)
    (finding,) = found(here, "storage")
    assert (finding.state, finding.remedy) == ("remedy", f"Run: chmod 700 {here / 'state'}")
    (here / "state").chmod(0o700)
    assert found(here, "storage")[0].state == "ok"


def test_a_storage_folder_that_is_none_is_a_remedy_and_stops_what_needs_it(here):
    (here / "state").write_text("")
    change(here, 'domain = "adults"', 'domain = "adults"\ndisjoint_from = ["children"]')
    assert found(here, "storage")[0].state == "remedy"
    assert [found(here, name)[0].state for name in ("ledger", "disjoint")] == ["unknown", "unknown"]


def test_a_key_that_others_can_read(here):
    make_keys(here / "keys", ["st-mary"])
    key = here / "keys" / "st-mary.key"
    change(here, 'name = "st-mary"', 'name = "st-mary"\nkey = "keys/st-mary.key"')
    assert found(here, "key")[0].state == "ok"
    key.chmod(0o644)
    (finding,) = found(here, "key")
    assert (finding.state, finding.remedy) == ("remedy", f"Run: chmod 600 {key}")
    key.chmod(0o600)
    key.write_text("")
    assert found(here, "key")[0].state == "remedy"


def spend(here, noise: float, rounds: int) -> None:
    holder = load_holder(here / "holder.toml")
    with Ledger(holder.ledger) as ledger:
        ledger.declare(holder.name, holder.budget.domain, holder.budget.terms(), holder.budget.disjoint_from)
        for number in range(1, rounds + 1):
            event = GaussianEvent(noise, 1.0, 1)
            wanted = Reservation(holder.name, holder.budget.domain, "r", number, str(number), event, "person", "f", "n")
            ledger.reserve([wanted])


def test_the_budget_left_comes_from_the_ledger(here):
    spend(here, noise=4.0, rounds=2)
    assert found(here, "ledger")[0].state == "ok"
    (finding,) = found(here, "budget")
    assert finding.state == "ok"
    (shown,) = re.findall(r"spent ([0-9.]+) of epsilon 4 at delta 1e-6", finding.text)
    mu, eps = math.sqrt(2 / 4.0**2), float(shown)  # delta of Gaussian differential privacy, by scipy alone
    for claimed, enough in ((eps, True), (eps - 0.002, False)):
        delta = norm.cdf(-claimed / mu + mu / 2) - math.exp(claimed) * norm.cdf(-claimed / mu - mu / 2)
        assert bool(delta <= 1e-6) is enough
    assert found(here, "budget") == [finding]  # looking changes nothing


@pytest.mark.parametrize("known", [True, False])
def test_what_is_left_counts_the_terms_of_overlapping_domains(here, known):
    """Epsilon 4 here and 1.8 in another domain that overlaps, 1.7 of which is spent: a tenth is left, not two."""
    holder = load_holder(here / "holder.toml")
    other = Terms(1.8, 1e-6)
    with Ledger(holder.ledger) as ledger:
        ledger.declare(holder.name, "other", other)
        noise = Terms(1.7, 1e-6).mu_squared ** -0.5
        event = GaussianEvent(noise, 1.0, 1)
        ledger.reserve([Reservation(holder.name, "other", "r", 1, "1", event, "person", "f", "n")])
        if known:
            ledger.declare(holder.name, holder.budget.domain, holder.budget.terms())
        (rest,) = {one.left.epsilon for one in ledger.summary(holder.name)}
    (own,) = [one for one in found(here, "budget") if '"adults"' in one.text]
    (shown,) = re.findall(r"left ([0-9.]+)", own.text)
    assert math.floor(rest * 1000) / 1000 == float(shown) < 0.6


@pytest.mark.parametrize("mutual", [True, False])
def test_what_is_left_is_what_the_next_run_will_find(here, mutual):
    """A domain that this file newly declares disjoint no longer counts, once that domain declares the same."""
    spend(here, noise=4.0, rounds=1)
    holder = load_holder(here / "holder.toml")
    change(here, 'domain = "adults"', 'domain = "adults"\ndisjoint_from = ["other"]')
    with Ledger(holder.ledger) as ledger:
        ledger.declare(holder.name, "other", Terms(8.0, 1e-6), ["adults"] if mutual else [])
        event = GaussianEvent(2.0, 1.0, 1)
        ledger.reserve([Reservation(holder.name, "other", "r", 1, "1", event, "person", "f", "n")])
    (own,) = [one for one in found(here, "budget") if '"adults"' in one.text]
    assert own.state == "warning"
    assert ("counted together with other" in own.text) is not mutual
    with Ledger(holder.ledger) as ledger:
        ledger.declare(holder.name, "adults", holder.budget.terms(), ["other"])
        (rest,) = [one.left.epsilon for one in ledger.summary(holder.name) if one.domain == "adults"]
    (shown,) = re.findall(r"left ([0-9.]+)", own.text)
    assert math.floor(rest * 1000) / 1000 == float(shown)


def test_a_budget_that_is_gone_is_told(here):
    most = load_holder(here / "holder.toml").budget.terms().mu_squared
    spend(here, noise=(most - 1e-12) ** -0.5, rounds=1)
    (finding,) = found(here, "budget")
    assert finding.state == "remedy"
    assert finding.text.endswith("left 0.000")
    assert not check_holder(here / "holder.toml").good


def test_other_terms_in_the_ledger_are_told(here):
    spend(here, noise=4.0, rounds=1)
    change(here, "epsilon = 4.0", "epsilon = 5.0")
    (finding,) = found(here, "budget")
    assert finding.state == "warning"
    assert "of epsilon 5" in finding.text


def test_a_damaged_ledger_is_a_remedy_and_is_not_written(fedhead, here):
    spend(here, noise=4.0, rounds=3)
    path = here / "state" / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    at = content.find(b"reserve\x00") if b"reserve\x00" in content else content.rfind(b'"steps"')
    content[at] ^= 1
    path.write_bytes(content)
    (finding,) = found(here, "ledger")
    assert finding.state == "remedy"
    assert path.read_bytes() == content
    assert fedhead("check", "holder.toml")[0] == 1


def test_a_ledger_of_another_holder_is_told(here):
    spend(here, noise=4.0, rounds=1)
    change(here, 'name = "st-mary"', 'name = "saint-mary"')
    assert [finding.state for finding in found(here, "ledger")] == ["ok", "remedy"]


def two_domains(here, children: str) -> None:
    (here / "children.csv").write_text(children)
    (here / "children.toml").write_text(
        HOLDER.replace("notes.csv", "children.csv").replace('"adults"', '"children"\ndisjoint_from = ["adults"]')
    )
    change(here, 'domain = "adults"', 'domain = "adults"\ndisjoint_from = ["children"]')


def test_disjoint_domains_are_compared_once_both_were_seen(here):
    two_domains(here, notes(100, 120, 8).replace(SECRET, "Other"))
    assert found(here, "disjoint")[0].state == "warning"
    assert check_holder(here / "children.toml").findings[-1].state == "ok"
    assert found(here, "disjoint")[0].state == "ok"


def test_a_false_declaration_is_refused_without_names_or_numbers(fedhead, here):
    two_domains(here, notes(100, 103, 8))  # three of the same persons, other notes
    check_holder(here / "holder.toml")
    status, out, _ = fedhead("check", "children.toml", "--json")
    assert status == 1
    finding = json.loads(out)["findings"][-1]
    assert (finding["name"], finding["state"]) == ("disjoint", "remedy")
    assert '"children" and "adults"' in finding["text"]
    assert not re.search(r"\d", finding["text"] + finding["remedy"])
    assert SECRET not in out


@pytest.mark.parametrize("change_of", ["deleted", "edited", "reordered", "appended"])
def test_no_change_of_the_data_makes_a_false_declaration_true(here, change_of):
    shared = notes(0, 5, 8)
    other = "note,code,patient\n" + "".join(f"new {i},a,Other{i}\n" for i in range(9))
    two_domains(here, shared)
    check_holder(here / "children.toml")
    lines = shared.splitlines()
    changed = {
        "deleted": other,
        "edited": shared.replace(SECRET, "Other"),
        "reordered": "\n".join([lines[0], *reversed(lines[1:])]) + "\n",
        "appended": shared + "".join(other.splitlines(keepends=True)[1:]),
    }
    (here / "children.csv").write_text(changed[change_of])
    check_holder(here / "children.toml")
    assert found(here, "disjoint")[0].state == "remedy"
    assert check_holder(here / "children.toml").findings[-1].state == "remedy"


def test_records_with_persons_and_without_are_not_taken_for_disjoint(here):
    two_domains(here, notes(100, 120, 8))
    text = (here / "children.toml").read_text().replace('person = "patient"\n', "").replace('["person"]', '["record"]')
    (here / "children.toml").write_text(text)
    check_holder(here / "children.toml")
    (finding,) = found(here, "disjoint")
    assert finding.state == "remedy"
    assert "can't be compared" in finding.text


def test_it_needs_no_torch(here):
    code = (
        "import sys\nfrom fedhead.client.checking import check_holder\n"
        "assert check_holder('holder.toml').good\n"
        "print([name for name in ('torch', 'flwr', 'opacus', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=here)
    assert done.stdout.strip() == "[]"


def test_it_shows_where_only_ascii_can_be_shown(here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-m", "fedhead", "check", "holder.toml"]
    done = subprocess.run(command, capture_output=True, cwd=here, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.decode("ascii").splitlines())) <= 80
