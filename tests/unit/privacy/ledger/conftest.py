"""A ledger of one holder with a budget, and the file of one that isn't there yet."""

from pathlib import Path

import pytest

from fedhead.common.privacy.ledger import Ledger
from fedhead.common.privacy.terms import Terms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path):
    with Ledger(path) as made:
        made.declare("ann", "notes", Terms(1.0, 1e-5))
        yield made
