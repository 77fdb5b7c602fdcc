"""A deployed holder and time: what is over is refused and costs nothing, and an answer doesn't leave too soon."""

import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from fedhead.client import app as client_app
from fedhead.client import timing
from fedhead.common import protocol, refusals
from fedhead.common.config import to_json
from fedhead.common.config.limits import Limits
from fedhead.common.privacy.events import NoPrivacyEvent, from_json
from fedhead.common.privacy.ledger import Ledger


def test_a_round_that_is_over_is_refused_before_anything_is_spent(deployed):
    holder = deployed()
    message = holder.message(holder.request())
    message.metadata.ttl, message.metadata.created_at = 10.0, time.time() - 11
    assert holder.code_of(holder.send(message)) == refusals.STALE_ROUND
    message.metadata.message_type = "query"
    assert holder.code_of(holder.send(message)) == refusals.STALE_ROUND
    assert not holder.ledger.exists()  # nothing was opened for it
    assert not holder.ask().has_error()
    again = holder.message(holder.request(round=2))
    again.metadata.ttl, again.metadata.created_at = 10.0, time.time() - 11
    assert holder.code_of(holder.send(again)) == refusals.STALE_ROUND
    assert holder.spent() == pytest.approx(1 / 400)


def test_a_round_that_is_over_once_the_records_are_open_is_refused(deployed, monkeypatch):
    holder = deployed()
    asked = iter([False, True])
    monkeypatch.setattr(client_app, "over", lambda message: next(asked))
    assert holder.code_of(holder.ask()) == refusals.STALE_ROUND
    assert holder.spent() == 0


@pytest.mark.parametrize("kind", ["train", "refused", "query"])
def test_no_answer_leaves_before_its_time(deployed, monkeypatch, kind):
    waits = []
    monkeypatch.setattr(client_app, "wait_until", lambda arrived, reply_at: waits.append(reply_at))
    holder = deployed(limits="reply_at = 7.5\nclipping_norm_max = 0.5")
    request = holder.request(clipping_norm=0.6 if kind == "refused" else 0.3)
    message = holder.message(request)
    if kind == "query":
        message.metadata.message_type = "query"
    reply = holder.send(message)
    assert reply.has_error() == (kind == "refused")
    assert waits == [7.5]


def test_a_refusal_of_a_holder_whose_records_are_open_waits_as_long(deployed, monkeypatch):
    waits = []
    monkeypatch.setattr(client_app, "wait_until", lambda arrived, reply_at: waits.append(reply_at))
    holder = deployed(limits="reply_at = 7.5\nclipping_norm_max = 0.5")
    assert not holder.ask().has_error()
    assert holder.code_of(holder.ask(round=2, clipping_norm=0.6)) == refusals.LARGE_CLIPPING_NORM
    assert waits == [7.5, 7.5]


def test_waiting_ends_at_the_time_and_not_before(monkeypatch):
    slept = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    monkeypatch.setattr(timing.time, "monotonic", lambda: 100.0)
    timing.wait_until(99.0, 3.0)
    timing.wait_until(90.0, 3.0)
    timing.wait_until(99.0, 0.0)
    assert slept == [2.0]


def test_features_that_take_too_long_are_given_up_as_records_that_can_not_be_opened(deployed, caplog):
    """A recipe with huge images or texts must not hold a holder from others for hours."""
    holder = deployed(limits="prepare_seconds = 1e-9")
    for reply in (holder.hello(), holder.ask()):
        assert holder.code_of(reply) == refusals.NOT_READY
    assert "limits.prepare_seconds is 1e-09: the features of a recipe take longer" in caplog.text
    assert not holder.ledger.exists()
    holder.file.write_text(holder.file.read_text().replace("prepare_seconds = 1e-9", ""))
    assert not holder.ask().has_error()


def test_opening_that_hangs_ends_the_process(monkeypatch):
    limits = []
    monkeypatch.setattr(timing, "limited", lambda seconds, what: limits.append((seconds, what)) or nullcontext())
    with timing.preparing(100.0):
        pass
    assert limits == [(100.0 + timing.HUNG, "opening the records took longer than limits.prepare_seconds")]


@pytest.mark.parametrize(
    ("ttl", "reply_at", "limit"),
    [
        (1e6, 0.0, 3600.0),  # the holder's own limit
        (100.0, 0.0, 90.0 + timing.CLOCKS),  # nobody waits for more: the message is 10 seconds old
        (100.0, 500.0, 495.0),  # ending sooner would tell how long the work takes: it arrived 5 seconds ago
        (float("inf"), 0.0, 3600.0),
    ],
)
def test_training_has_as_long_as_anybody_waits_and_never_ends_before_the_reply(
    deployed, monkeypatch, ttl, reply_at, limit
):
    message = deployed().message(deployed().request())
    message.metadata.created_at, message.metadata.ttl = 1000.0, ttl
    monkeypatch.setattr(timing.time, "time", lambda: 1010.0)
    monkeypatch.setattr(timing.time, "monotonic", lambda: 75.0)
    assert timing.round_limit(message, Limits(reply_at=reply_at), arrived=70.0) == limit


def test_a_simulated_holder_never_waits(monkeypatch, tmp_path):
    from fedhead.simulations.simulate import simulate

    monkeypatch.setattr(client_app, "wait_until", lambda *_: pytest.fail("a simulation waited"))
    monkeypatch.setattr(client_app, "over", lambda *_: True)  # nor is anything late in one process
    from fedhead.common.config import make_config

    recipe = {
        "task": {"labels": [str(digit) for digit in range(10)]},
        "model": {"backbone": "module:torch.nn:Identity"},
        "data": {"source": "sklearn:digits"},
        "holders": {"count": 2, "limits": {"reply_at": 50.0}},
        "privacy": {"epsilon": 3.0},
        "training": {"rounds": 2},
        "run": {"baseline": False},
    }
    assert simulate(make_config(recipe, base=tmp_path), tmp_path / "out").rounds[-1]["holders"] == 2


def test_a_release_with_seeded_noise_says_that_it_has_no_privacy(deployed):
    holder = deployed(limits="allow_seeded_noise = true")
    _, event = protocol.read_release(holder.ask(seed=7))
    assert isinstance(from_json(event), NoPrivacyEvent)
    own = deployed()
    _, event = protocol.read_release(own.ask(seed=7))
    assert not isinstance(from_json(event), NoPrivacyEvent)


def test_a_round_without_end_ends_the_process_and_stays_spent(deployed):
    """100,000 steps at next to no charge would hold the holder from honest rounds for hours."""
    holder = deployed(limits="round_seconds = 6.0")
    script = (
        "import runpy, sys\n"
        "bench = runpy.run_path(sys.argv[1])['Deployed']\n"
        "from pathlib import Path\n"
        "class Same(bench):\n"
        "    def __init__(self, folder, config, backbone):\n"
        "        self.folder, self.file = folder, folder / 'holder.toml'\n"
        "        self.config, self.backbone = config, backbone\n"
        "from fedhead.common.config import from_json\n"
        "one = Same(Path(sys.argv[2]), from_json(sys.argv[3]), sys.argv[4])\n"
        "one.ask(round=1, run='short')\n"  # so that imports and records are not what takes long
        "one.ask(round=1, local_steps=100_000, plan_steps=100_000, noise_multiplier=2.0**24, learning_rate=1e-9)\n"
        "print('answered')\n"
    )
    arguments = [
        str(Path(__file__).parent / "conftest.py"),
        str(holder.folder),
        to_json(holder.config),
        holder.backbone,
    ]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "answered" not in ended.stdout
    assert "a round took longer than limits.round_seconds" in ended.stderr
    with Ledger(holder.ledger) as ledger:
        assert [one.kind for one in ledger.entries()][-1] == "reserve"  # and nothing was released
    assert not holder.ask(run="honest").has_error()
