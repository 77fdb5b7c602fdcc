"""The command, run in the process of the tests."""

import signal
import sys

import pytest

from fedhead.cli import main


@pytest.fixture
def fedhead(tmp_path, monkeypatch, capsys):
    """Run the command in this process and an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDHEAD_DEBUG", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedhead", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return caught.value.code or 0, *capsys.readouterr()

    return run
