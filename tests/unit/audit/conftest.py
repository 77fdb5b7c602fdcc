"""Ledgers and runs that are audited, and the command in the folder of such a run."""

import shutil
from pathlib import Path
from runpy import run_path

import pytest

from fedhead.common.privacy.events import PoissonEvent
from fedhead.common.privacy.ledger import Ledger, load_key
from fedhead.common.privacy.ledger.statements import public_key
from fedhead.simulations.simulate import simulate

COMMANDS = run_path(str(Path(__file__).with_name("audit_commands.py")))
WORK = run_path(str(Path(__file__).with_name("ledger_work.py")))


@pytest.fixture
def ledger(tmp_path):
    """A ledger of two runs: full batches, of which one was never sent, and samples under a plan."""
    path = WORK["fill"](tmp_path / "state" / "ledger.sqlite")
    with Ledger(path) as opened:
        opened.reserve([WORK["want"](3)])  # never sent
        for round in range(2):
            WORK["give"](opened, WORK["want"](round, PoissonEvent(2.0, 1.0, 0.05, 10), "sampled", plan=WORK["PLAN"]))
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a recipe and its run."""
    folder = tmp_path_factory.mktemp("audited")
    simulate(COMMANDS["write_recipe"](folder), folder / "run")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "fedhead_audit_own.py").write_text(COMMANDS["OWN"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    return tmp_path


@pytest.fixture
def audit(here, fedhead):
    """`fedhead audit` in that folder."""
    return lambda *arguments: fedhead("audit", *map(str, arguments))


@pytest.fixture
def statement(audit, here):
    """A privacy statement of the first holder, and the public key."""
    assert audit("ledger", "run", "--sign", "signed")[0] == 0
    return here / "signed" / "holder-00000.privacy.json", public_key(load_key(here / "run/holders/ledger.key"))
