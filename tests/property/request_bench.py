"""One deployed holder that is sent odd requests, and what must be true after every message."""

import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from runpy import run_path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedhead.client import workplace
from fedhead.client.admission import Admission
from fedhead.client.training import Trainer
from fedhead.common import protocol, refusals
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.refusals import TEXTS

HOLDER, EPSILON, DELTA = "st-mary", 3.0, 1e-5
ODD = run_path(str(Path(__file__).with_name("odd_requests.py")))
Step, array, foreseen, head, honest, spelled = (
    ODD[name] for name in ("Step", "array", "foreseen", "head", "honest", "spelled")
)
LIMITS = """noise_multiplier_min = 1.5
clipping_norm_max = 1.0
exact_noise_seconds = 0.0
release = { metrics = true, metrics_noise_multiplier_min = 10.0 }"""


def mu_squared_of(epsilon, delta):
    """The largest mu^2 of a Gaussian mechanism with this guarantee (Balle and Wang 2018), found by halving."""

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 10.0
    for _ in range(200):
        mu = (low + high) / 2
        spent = phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)
        low, high = (mu, high) if spent <= delta else (low, mu)
    return high**2


MOST = mu_squared_of(EPSILON, DELTA)


class Bench:
    """One holder with a new ledger for every example, and what must be true after every message."""

    def __init__(self, holder, folder):
        self.holder, self.folder, self.numbers, self.early = holder, folder, count(), []
        assert holder.ask(backbone="0" * 64).error.code == refusals.OTHER_MODEL  # opens the workplace
        self.good = json.loads(holder.request().model_dump_json())
        real = Trainer.round

        def watched(trainer, *args):
            last = [*self.ledger.entries()][-1]
            self.rounds.append(last.digest)
            if last.kind != "reserve" or last.digest != self.asked:
                self.early.append(last.kind)
            return real(trainer, *args)

        self.watched = watched

    def fresh(self):
        """A ledger of its own for an example, and nothing granted."""
        ((key, place),) = workplace._WORKPLACES.items()
        old = place.admission
        old.close()
        self.ledger = Ledger(self.folder / f"ledger-{next(self.numbers)}.sqlite")
        admission = Admission(self.ledger, old.limits, old.budget, old.fingerprints)
        workplace._WORKPLACES[key] = replace(place, admission=admission)
        self.granted, self.rounds, self.kept, self.begun, self.asked = Fraction(0), [], {}, set(), ""
        self.early.clear()

    def mark(self, kind):
        entries = [*self.ledger.entries(HOLDER)]
        hashes = {
            "last": (entries[-1].sequence, entries[-1].hash), "first": (1, entries[0].hash),
            "unknown": (entries[-1].sequence + 1, "0" * 64), "older": (entries[-1].sequence, "1" * 64),
            "zero": (0, "0" * 64), "negative": (-1, "0" * 64), "large": (2**63, "0" * 64), "short": (1, "0" * 63),
            "texts": ("1", "0" * 64), "no hash": (1, 1),
        }  # fmt: skip
        if kind == "arrays":
            return ArrayRecord({"sequence": array(np.zeros(1))})
        sequence, hashed = hashes[kind]
        return ConfigRecord({"sequence": sequence, "hash": hashed})

    def message(self, step):
        text = spelled({**self.good, **step.changes})
        requests = {
            "request is a number": 7, "request is bytes": text.encode(), "request is a list": [text, text],
            "request is long": text + " " * 10**6 + "x", "two requests": text * 2,
        }  # fmt: skip
        config = {"request": requests.get(step.records, text)}
        content = {
            protocol.ARRAYS: head(step.head),
            protocol.CONFIG: ConfigRecord({} if step.records == "no request" else config),
        }
        if step.records == "arrays as config":
            content[protocol.ARRAYS] = ConfigRecord({"head.weight": 1.0})
        elif step.records == "config as metrics":
            content[protocol.CONFIG] = MetricRecord({"request": 1})
        elif step.records == "extra record":
            content["extra"] = ConfigRecord({"command": "rm"})
        elif step.records in ("no arrays", "no config"):
            del content[step.records.removeprefix("no ")]
        if step.mark != "none":
            content[protocol.LEDGER] = self.mark(step.mark)
        message = self.holder.message(self.holder.request())
        message = Message(RecordDict({} if step.records == "nothing" else content), dst_node_id=2, message_type="train")
        return text, message

    def play(self, step):
        """Send a message and hold the holder to everything that it promises."""
        text, message = self.message(step)
        before, trained = [*self.ledger.entries()], len(self.rounds)
        try:
            self.asked = protocol.read_request(message).digest
        except Exception:
            self.asked = ""
        reply = self.holder.send(message)
        new = [*self.ledger.entries()][len(before) :]
        assert self.early == []  # no noise was drawn before its charge was in the file
        if reply.has_error():
            code = reply.error.code
            said = {"holder": HOLDER, "text": TEXTS[code], **self.ledger.mark(HOLDER)._asdict()}
            assert reply.error.reason == json.dumps(said)
            if code == refusals.TRAINING_FAILED:  # a round that was charged, and no other fault of ours
                assert [entry.kind for entry in new if entry.of is None] == ["reserve"]
                self.charge(json.loads(text))
            else:
                assert code != refusals.NO_LEDGER
                assert new == []
                assert len(self.rounds) == trained
        else:
            assert step.records in ("all", "extra record")
            assert step.head in ("zeros", "ones")
            assert step.mark in ("none", "last", "first")
            self.released(json.loads(text), reply, new, trained)
        self.totals()
        return reply

    def released(self, fields, reply, new, trained):
        content = reply.content
        assert honest(fields, self.holder.backbone)
        notes = dict(content[protocol.RELEASE].items())
        wanted = {"holder", "event"} | ({"correct"} if fields.get("metrics_noise") is not None else set())
        assert set(notes) == wanted
        assert set(content) == {protocol.ARRAYS, protocol.METRICS, protocol.RELEASE, protocol.LEDGER}
        assert dict(content[protocol.METRICS]) == {protocol.WEIGHT: fields["declared_records"]}
        assert json.loads(notes["event"]) == {
            "schema": 1, "mechanism": "full-batch", "noise_multiplier": fields["noise_multiplier"],
            "clipping_norm": fields["clipping_norm"], "steps": fields["local_steps"],
        }  # fmt: skip
        shapes = {name: value.numpy().shape for name, value in content[protocol.ARRAYS].items()}
        assert shapes == {"head.weight": (10, 64), "head.bias": (10,)}
        assert protocol.read_mark(reply) == self.ledger.mark(HOLDER)
        bytes_ = protocol.pack(content)
        if len(self.rounds) == trained:  # asked before: the very same bytes, and nothing spent
            assert self.kept[fields["run"]] == (self.asked, bytes_)
            assert new == []
            return
        self.charge(fields)
        self.kept[fields["run"]] = self.asked, bytes_
        assert [entry.kind for entry in new] == ["reserve"] * (len(wanted) - 1) + ["release"]
        assert {entry.digest for entry in new} == {self.asked}
        assert new[-1].payload_digest == hashlib.sha256(bytes_).hexdigest()

    def charge(self, fields):
        """Add up what an admitted round costs; a run's first must leave room for all that it announces."""
        self.granted += Fraction(fields["local_steps"]) / Fraction(fields["noise_multiplier"]) ** 2
        if fields.get("metrics_noise") is not None:
            self.granted += 1 / Fraction(fields["metrics_noise"]) ** 2
        if fields["run"] not in self.begun:
            assert self.granted + foreseen(fields) <= Fraction(MOST * (1 + 1e-12))
        self.begun.add(fields["run"])

    def totals(self):
        """What the ledger says is spent is what was granted, added up exactly and by another way, and within budget."""
        mine = [entry for entry in self.ledger.entries(HOLDER) if entry.domain == "wards"]
        spent = Fraction(mine[-1].domain_mu_squared)
        assert self.granted <= spent <= self.granted * Fraction(1 + 1e-9)
        assert spent <= Fraction(MOST * (1 + 1e-12))

    def play_all(self, asked):
        for step in asked:
            self.play(step)

    def usable(self):
        """A good request afterwards is answered, whatever came before it."""
        reply = self.play(Step({"run": "afterwards", "noise_multiplier": 5000.0}))
        assert not reply.has_error() or reply.error.code == refusals.BEYOND_BUDGET
        if self.granted < Fraction(MOST) - Fraction(1, 10**6):
            assert not reply.has_error()
        self.ledger.verify()
