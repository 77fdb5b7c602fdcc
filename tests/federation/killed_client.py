"""A data holder that is killed again and again in the middle of an exchange; run by test_client_crashes.py.

Everything slow is imported once; each life of the client is a fork. A life asks itself for rounds as a server would,
and "sends" each reply by appending its round and digest to a file before it goes on.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import torch

from fedhead.common import failpoints, protocol
from fedhead.common.privacy.ledger import Ledger

torch.set_num_threads(1)
ROUNDS = 40


def live(holder, sent: Path, fatal: str | None, after: int) -> None:
    """Ask round after round; die at the failpoint `fatal`, at its `after`-th time."""
    left = [after]

    def hook(name: str) -> None:
        if name == fatal:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    done = [json.loads(line) for line in sent.read_text().splitlines()]
    start = max((one["round"] for one in done), default=1)  # the last one is asked again, as after a lost reply
    context = failpoints.installed(hook) if fatal else contextlib.nullcontext()
    with context:
        for number in range(start, ROUNDS + 1):
            reply = holder.ask(round=number)
            if reply.has_error():
                code = protocol.read_refusal(reply)[1]
                line = {"round": number, "code": code}
            else:
                line = {"round": number, "digest": sha256(protocol.pack(reply.content)).hexdigest()}
            with sent.open("a") as file:  # the network: what is in it has left the process
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def check(holder, sent: Path) -> dict:
    """What left the process is in the ledger as released, with the very same bytes."""
    lines = [json.loads(line) for line in sent.read_text().splitlines()]
    with Ledger(holder.ledger) as ledger:
        ledger.verify()
        entries = list(ledger.entries())
    rounds = {one.sequence: one.round for one in entries if one.kind == "reserve"}
    released = {(rounds[one.of], one.payload_digest) for one in entries if one.kind == "release"}
    replies = {(one["round"], one["digest"]) for one in lines if "digest" in one}
    assert replies <= released, "something left that the ledger does not know"
    assert len({number for number, _ in replies}) == len(replies), "two releases of one round left"
    assert len(released) <= len(rounds)
    return {"rows": len(entries), "reserved": len(rounds), "released": len(released), "sent": len(replies)}


def main(folder: Path, kills: int, seed: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import Deployed  # the same holder as in the other tests

    random.seed(seed)
    holder, sent = Deployed(folder / "holder"), folder / "sent.jsonl"
    sent.write_text("")
    points = [name for name in failpoints.FAILPOINTS if name.startswith(("round.", "ledger.reserve", "ledger.release"))]
    rows = 0
    for life in range(kills + 1):
        last = life == kills
        fatal = None if last or life % 3 == 0 else points[life % len(points)]
        after = random.randint(1, 3)
        child = os.fork()
        if child == 0:
            live(holder, sent, fatal, after)
            if fatal is None and not last:
                signal.pause()  # all rounds are done: the kill is on its way
            os._exit(0)
        if not last and fatal is None:
            time.sleep(random.uniform(0.05, 0.6))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed != last, f"life {life} ended otherwise than it should, by status {status} ({fatal})"
        if not holder.ledger.exists():
            assert not sent.read_text(), "something left without a ledger"
            continue
        found = check(holder, sent)
        assert found["rows"] >= rows, "a row was lost"
        rows = found["rows"]
    final = check(holder, sent)
    finished = max(json.loads(line)["round"] for line in sent.read_text().splitlines())
    sys.stdout.write(json.dumps({**final, "finished": finished}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
