"""Federations of real processes; whatever a test leaves running is ended by its process id."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from deployment_harness import Federation


@pytest.fixture
def federation(tmp_path):
    """A maker of federations: `federation(["north", "south"], server={"least_holders": 2})`."""
    made = []

    def make(*args, **settings) -> Federation:
        made.append(Federation(tmp_path / f"federation-{len(made)}", *args, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
