"""Whatever is asked of a deployed holder: a fixed refusal that cost nothing, or a release that was charged before."""

import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedhead.client import app as client_app
from fedhead.client import workplace
from fedhead.client.admission import Admission, Admitted
from fedhead.client.training import Trainer
from fedhead.common import protocol, refusals
from fedhead.common.npy import read_npy
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.privacy.ledger import admission as ledger_admission
from fedhead.common.refusals import TEXTS

HOLDER, EPSILON, DELTA = "st-mary", 3.0, 1e-5
ODD = run_path(str(Path(__file__).with_name("odd_requests.py")))
ANY, FIELDS, HEADS, MARKS, MISSING, RECORDS = (
    ODD[name] for name in ("ANY", "FIELDS", "HEADS", "MARKS", "MISSING", "RECORDS")
)
Step, array, head, honest, spelled, steps = (
    ODD[name] for name in ("Step", "array", "head", "honest", "spelled", "steps")
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
        self.granted, self.rounds, self.kept, self.asked = Fraction(0), [], {}, ""
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
            assert reply.error.reason == json.dumps({"holder": HOLDER, "text": TEXTS[code]})
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
        self.granted += Fraction(fields["local_steps"]) / Fraction(fields["noise_multiplier"]) ** 2
        if fields.get("metrics_noise") is not None:
            self.granted += 1 / Fraction(fields["metrics_noise"]) ** 2

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


@pytest.fixture
def bench(deployed, tmp_path, monkeypatch):
    made = Bench(deployed(limits=LIMITS, changes={"metrics": {"every": 1}}), tmp_path)
    monkeypatch.setattr(Trainer, "round", made.watched)
    return made


FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(asked=st.lists(steps(), min_size=3, max_size=9))
def test_whatever_is_asked(bench, asked):
    bench.fresh()
    bench.play_all(asked)
    bench.usable()


@pytest.mark.parametrize("name", sorted({*FIELDS} - {"mechanism"}))
def test_every_field_with_every_value(bench, name):
    bench.fresh()
    for number, value in enumerate([*FIELDS[name], *ANY, MISSING]):
        bench.play(Step({"run": f"run-{number}", "noise_multiplier": 20.0, name: value}))
    bench.usable()


@pytest.mark.parametrize("part", ["head", "mark", "records"])
def test_every_other_part_of_a_message(bench, part):
    bench.fresh()
    kinds = {"head": HEADS, "mark": MARKS, "records": RECORDS}[part]
    for number, kind in enumerate(kinds):
        bench.play(Step({"round": number + 1}, **{part: kind}))
    bench.usable()


def test_a_context_that_can_not_be_opened_is_refused(bench):
    bench.fresh()
    before = [*bench.ledger.entries()]
    for node, recipe in [({}, "{"), ({"partition-id": "x"}, "/etc/passwd"), ({"holder": "/nowhere"}, "{}")]:
        context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={"recipe": recipe})
        reply = client_app.app(bench.message(Step({}))[1], context)
        assert reply.error.code == refusals.NOT_READY
        assert reply.error.reason == json.dumps({"holder": "", "text": TEXTS[refusals.NOT_READY]})
    assert [*bench.ledger.entries()] == before
    bench.usable()


# The wrong twins: each breaks one promise, and the same steps must say so.


def no_check(monkeypatch):
    monkeypatch.setattr(client_app, "check", lambda *_: None)


def charge_afterwards(monkeypatch):
    admit, release = Admission.admit, Admission.release

    def admitting(self, name, asked, noise):
        self.later = name, asked, noise
        return Admitted()

    monkeypatch.setattr(Admission, "admit", admitting)
    monkeypatch.setattr(
        Admission, "release", lambda self, name, _, content: release(self, name, admit(self, *self.later), content)
    )


def charge_less(monkeypatch):
    real = Admission._reservation

    def cheaper(self, *args):
        wanted = real(self, *args)
        return replace(wanted, event=replace(wanted.event, noise_multiplier=2 * wanted.event.noise_multiplier))

    monkeypatch.setattr(Admission, "_reservation", cheaper)


def draw_again(monkeypatch):
    """A repeat is trained anew, without a charge."""
    real = Admission.admit

    def forgetting(self, *args):
        return replace(real(self, *args), payload=None)

    monkeypatch.setattr(Admission, "admit", forgetting)
    monkeypatch.setattr(Admission, "release", lambda self, name, *_: self.ledger.mark(name))


def tell_why(monkeypatch):
    real = protocol.refuse

    def telling(message, refused, holder):
        return real(message, type(refused)(refused.code, f"{refused} {refused.__cause__}"), holder)

    monkeypatch.setattr(protocol, "refuse", telling)


def trust_headers(monkeypatch):
    monkeypatch.setattr(protocol, "_values", read_npy)


def no_budget(monkeypatch):
    monkeypatch.setattr(ledger_admission, "admits", lambda *_: None)


@pytest.mark.parametrize(
    ("twin", "asked"),
    [
        (no_check, [Step({"unit": "person", "records_per_person": 1})]),
        (no_check, [Step({"plan_steps": 1, "local_steps": 2})]),
        (charge_afterwards, [Step({})]),
        (charge_afterwards, [Step({"noise_multiplier": 1.5, "local_steps": 4, "plan_steps": 4})]),
        (charge_less, [Step({})]),
        (draw_again, [Step({}), Step({})]),
        (tell_why, [Step({"round": "patient 4711"})]),
        (trust_headers, [Step({}, head="open bracket")]),
        (no_budget, [Step({"round": number, "noise_multiplier": 1.5}) for number in (1, 2)]),
    ],
)
def test_a_wrong_holder_is_caught(bench, monkeypatch, twin, asked):
    bench.fresh()
    twin(monkeypatch)
    with pytest.raises(AssertionError):
        bench.play_all(asked)
