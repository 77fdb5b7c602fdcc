"""A Ray worker's stderr reaches the terminal: what a holder logs must go to the holders' log instead."""

import logging
import stat

from flwr.app import Context, RecordDict

from fedhead.client import app as client_module
from fedhead.simulations.ray_engine import ConfiguredClient


def test_what_a_holder_logs_in_a_worker_stays_off_the_terminal(monkeypatch, tmp_path, capfd):
    def fails(message, context):
        try:
            raise ValueError("the record's own text")
        except ValueError:
            logging.getLogger("fedhead.client").exception("training failed")
        return message

    monkeypatch.setattr(client_module, "app", fails)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    ConfiguredClient({"out": str(tmp_path)})(None, context)
    assert "own text" not in "".join(capfd.readouterr())
    log = tmp_path / "holders.log"
    assert "own text" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
