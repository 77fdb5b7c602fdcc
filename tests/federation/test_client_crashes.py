"""Twenty SIGKILLs of a real client in the middle of exchanges, at random times and at named points."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_client.py")


@pytest.mark.slow
def test_twenty_kills_of_a_client_lose_nothing_and_release_nothing_twice(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "20", "1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["finished"] == 40
    assert found["sent"] == 40
    assert found["reserved"] > found["released"]  # some lives ended between the two, and stay spent
