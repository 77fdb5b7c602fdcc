"""Privacy bugs planted in production code: the audit must catch each one, and say which fault it is.

The table of mutants is printed at the end of the test run.
"""

import re
import runpy
from pathlib import Path

import pytest

from fedhead.client.auditing import contributions
from fedhead.simulations.audit.mechanism import audit_mechanism

HERE = Path(__file__).parent
SOURCE = runpy.run_path(str(HERE / "mechanism_mutants.py"))
MUTANTS, OF_PERSONS = SOURCE["MECHANISM_MUTANTS"], SOURCE["PERSON_MUTANTS"]
RECIPE = {"privacy.epsilon": 5.0, "training.rounds": 40}


@pytest.fixture
def brief(monkeypatch):
    """Fewer data sets for what one unit moves: it takes most of an audit's time, and half of them show it all."""
    monkeypatch.setattr(contributions, "_SIZES", (0, 7))
    monkeypatch.setattr(contributions, "_LABELS", 3)


def audited(tiny, changes, seed):
    return audit_mechanism(tiny({**RECIPE, **changes}), records=200, seed=seed)


def failures(found):
    return {check["name"]: check for check in found["checks"] if not check["passed"]}


def caught(mutant, found, record_property):
    failed = failures(found)
    assert not found["passed"]
    assert mutant.caught_by in failed, sorted(failed)
    check = failed[mutant.caught_by]
    assert re.search(mutant.says, check["meaning"].lower()), check["meaning"]
    record_property("mutant", [mutant.name, "mechanism audit", check["title"], check["figure"]])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mechanism_audit_catches(mutant, tiny, brief, monkeypatch, record_property):
    mutant.plant(monkeypatch)
    caught(mutant, audited(tiny, mutant.changes, mutant.seed), record_property)


@pytest.mark.parametrize("mutant", OF_PERSONS, ids=lambda mutant: mutant.name)
def test_it_catches_what_is_wrong_for_persons(mutant, persons, brief, monkeypatch, record_property):
    mutant.plant(monkeypatch)
    caught(mutant, audit_mechanism(persons({}), records=40, seed=mutant.seed), record_property)


@pytest.mark.parametrize("changes", [{}, SOURCE["POISSON"], SOURCE["DROPPING"]], ids=str)
def test_the_unmutated_path_passes(changes, tiny):
    found = audited(tiny, changes, 7)
    assert found["passed"], failures(found)
