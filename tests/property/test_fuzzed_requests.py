"""Whatever is asked of a deployed holder: a fixed refusal that cost nothing, or a release that was charged before."""

import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import count
from typing import NamedTuple

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedhead.client import app as client_app
from fedhead.client import workplace
from fedhead.client.admission import Admission, Admitted
from fedhead.client.training import Trainer
from fedhead.common import protocol, refusals
from fedhead.common.npy import npy_header, read_npy
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.privacy.ledger import admission as ledger_admission
from fedhead.common.refusals import TEXTS

HOLDER, EPSILON, DELTA = "st-mary", 3.0, 1e-5
LIMITS = """noise_multiplier_min = 1.5
clipping_norm_max = 1.0
exact_noise_seconds = 0.0
release = { metrics = true, metrics_noise_multiplier_min = 10.0 }"""
KEYS = {
    "version", "run", "round", "task", "backbone", "unit", "records_per_person", "mechanism", "noise_multiplier",
    "clipping_norm", "sample_rate", "local_steps", "declared_records", "optimizer", "learning_rate", "proximal_mu",
    "chunk", "seed", "plan_steps", "delta", "metrics_noise",
}  # fmt: skip


class Raw(NamedTuple):
    """A value as it is spelled in the request, which json.dumps would not write."""

    text: str


class Step(NamedTuple):
    """A message: fields of its request that differ from the good one, its head, its mark, and what else is odd."""

    changes: dict
    head: str = "zeros"
    mark: str = "none"
    records: str = "all"


NESTED = Raw("[" * 50_000 + "]" * 50_000)
ANY = [
    None, True, -1, 0, 2.5, "1", "", [], {}, {"a": {"b": [1, {}]}}, NESTED, Raw("NaN"), Raw("-Infinity"),
    Raw("Infinity"), Raw("1e400"), Raw("-0.0"), Raw("1" * 5000), Raw("1" * 400), 2**63, 2**53 + 1, "x" * 10**6,
    "patient-4711", Raw('"\\ud800"'), Raw("1"), Raw("5e-324"), Raw("1.7e308"), Raw("}"),
]  # fmt: skip
FIELDS = {
    "version": [1, 2],
    "run": ["run-1", "run-2", "x" * 64, "x" * 65, "r\u00fcn \u2603", "\x00", "a\x00b", "'; DROP TABLE entries; --", "x" * 10**6],
    "round": [1, 2, 3, 2**53],
    "task": ["classification", "segmentation"],
    "backbone": ["0" * 64],
    "unit": ["record", "person", "holder", "family"],
    "records_per_person": [1, 10],
    "mechanism": ["full-batch", "none", "poisson"],
    "noise_multiplier": [1.5, 1.4999, 3.0, 20.0, 50, 2.0**25, 2.0**25 + 8, -20.0],
    "clipping_norm": [1.0, 1.0001, 1e-3, 2.0**-500, 2.0**-501, 2.0**500],
    "sample_rate": [1.0, 1.5, 0.1],
    "local_steps": [1, 2, 3, 4, 5, 100_000, 100_001],
    "declared_records": [1, 1500, 10**9, 2**53],
    "optimizer": [
        {"kind": "sgd", "momentum": 0.9}, {"kind": "adam"}, {"kind": "evil"}, {"kind": "module:os:getcwd"},
        {"kind": "sgd", "weight_decay": -1.0}, {"kind": "adam", "betas": [0.9, 2.0]}, {"kind": "sgd", "surprise": 1},
    ],
    "learning_rate": [1e-9, 3.0, 1e9, 1e308],
    "proximal_mu": [0.0, 0.5, 1e308, -1.0],
    "chunk": [64, 2**62],
    "seed": [7, 2**64],
    "plan_steps": [1, 4, 2**53],
    "delta": [1e-9, 1.0],
    "metrics_noise": [10.0, 9.999, 50.0],
    "surprise": [1],
}  # fmt: skip
MISSING = object()
HEADERS = {  # what numpy would evaluate
    "open bracket": "(((", "deep": "-" * 9000 + "1", "deeper": "[" * 5000, "odd keys": "{1: 2, 'a': 3}", "no hash": "{[]: 1}",
    "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (10, 64)}", "nul": "\x00",
}  # fmt: skip
HEADS = [
    "zeros", "ones", "nan", "inf", "huge", "names", "order", "shape", "float64", "claims float32", "truncated", "longer", "no bytes",
    "extra", "none", "pickle", *HEADERS,
]  # fmt: skip
MARKS = [
    "none",
    "last",
    "first",
    "unknown",
    "older",
    "zero",
    "negative",
    "large",
    "short",
    "texts",
    "no hash",
    "arrays",
]
RECORDS = [
    "all", "all", "nothing", "no arrays", "no config", "arrays as config", "config as metrics", "request is a number",
    "request is bytes", "request is a list", "request is long", "no request", "two requests", "extra record",
]  # fmt: skip


def array(values):
    return Array(np.asarray(values))


def head(kind):
    """The arrays of a message."""
    weight, bias = np.zeros((10, 64), np.float32), np.zeros(10, np.float32)
    arrays = {"head.weight": array(weight), "head.bias": array(bias)}
    fills = {"ones": 1.0, "nan": np.nan, "inf": -np.inf, "huge": 3e38}
    data = arrays["head.weight"].data
    bytes_of = {
        "truncated": data[:-1], "longer": data + b"\0", "no bytes": b"", "pickle": b"\x80\x04cos\nsystem\n.",
    }  # fmt: skip
    if kind in fills:
        arrays["head.weight"] = array(weight + np.float32(fills[kind]))
    elif kind in bytes_of:
        arrays["head.weight"] = Array("float32", (10, 64), "numpy.ndarray", bytes_of[kind])
    elif kind in HEADERS:
        text = HEADERS[kind].encode() + b"\n"
        made = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[len(npy_header((10, 64))) :]
        arrays["head.weight"] = Array("float32", (10, 64), "numpy.ndarray", made)
    elif kind == "names":
        arrays = {"evil.weight": arrays["head.weight"], "head.bias": arrays["head.bias"]}
    elif kind == "order":
        arrays = dict(reversed(arrays.items()))
    elif kind == "shape":
        arrays["head.weight"] = array(weight.T.copy())
    elif kind == "float64":
        arrays["head.weight"] = array(weight.astype(np.float64))
    elif kind == "claims float32":
        arrays["head.weight"] = Array("float32", (10, 64), "numpy.ndarray", array(weight.astype(np.float64)).data)
    elif kind == "extra":
        arrays["more"] = array(bias)
    elif kind == "none":
        arrays = {}
    return ArrayRecord(arrays)


def spelled(fields):
    """A request's JSON, with values as they are spelled."""
    parts = [
        f"{json.dumps(key)}: {value.text if isinstance(value, Raw) else json.dumps(value)}"
        for key, value in fields.items()
        if value is not MISSING
    ]
    return "{" + ", ".join(parts) + "}"


@st.composite
def steps(draw):
    """A message that differs from a good one in some fields, or in one thing besides."""
    good = draw(st.fixed_dictionaries({"run": st.sampled_from(["run-1", "run-2"]), "round": st.integers(1, 4)}))
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True))
    changes = {name: draw(st.sampled_from([*FIELDS[name], *FIELDS[name], *ANY, MISSING])) for name in names}
    changes = {**good, "noise_multiplier": draw(st.sampled_from([3.0, 5.0, 20.0])), **changes}
    if changes.get("mechanism") == "poisson" and changes.get("sample_rate") == 0.1:
        changes["sample_rate"] = 1.0  # a plan that is worth an accountant's second is no business of this test
    if changes.get("local_steps") == 100_000:
        changes["noise_multiplier"] = 20.0  # beyond the budget, which is sooner done than as many steps
    odd = draw(st.sampled_from(["", "", "", "head", "mark", "records"]))
    return Step(
        changes,
        draw(st.sampled_from(HEADS)) if odd == "head" else "zeros",
        draw(st.sampled_from(MARKS)) if odd == "mark" else draw(st.sampled_from(["none", "last"])),
        draw(st.sampled_from(RECORDS)) if odd == "records" else "all",
    )


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


def honest(fields, backbone):
    """Whether a request is one that this holder may answer with a release: rules written down a second time."""

    def number(name, low, high, default=None):
        value = fields.get(name, default)
        return type(value) in (int, float) and low <= value <= high

    def whole(name, high, default=None):
        return type(fields.get(name, default)) is int and number(name, 1, high, default)

    metrics = fields.get("metrics_noise")
    return (
        set(fields) <= KEYS
        and fields.get("version", 1) == 1
        and type(fields.get("run")) is str
        and 1 <= len(fields["run"]) <= 64
        and whole("round", 2**53)
        and fields.get("task") == "classification"
        and fields.get("backbone") == backbone
        and fields.get("unit", "record") == "record"
        and fields.get("records_per_person") is None
        and fields.get("mechanism") == "full-batch"
        and fields.get("sample_rate") is None
        and number("noise_multiplier", 1.5, 2**25)
        and number("clipping_norm", 2.0**-500, 1.0)
        and whole("local_steps", 100_000)
        and whole("plan_steps", 2**53, 1)
        and fields["local_steps"] <= fields.get("plan_steps", 1)
        and whole("declared_records", 2**53)
        and number("learning_rate", 5e-324, 1.7e308)
        and number("proximal_mu", 0, 1.7e308, 0.0)
        and (metrics is None or number("metrics_noise", 10.0, 2**25))
    )


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


FUZZ = settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(asked=st.lists(steps(), min_size=1, max_size=8))
def test_whatever_is_asked(bench, asked):
    bench.fresh()
    for step in asked:
        bench.play(step)
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
        from flwr.app import Context

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
        (charge_afterwards, [Step({"noise_multiplier": 1.5, "local_steps": 4})]),
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
        for step in asked:
            bench.play(step)
    monkeypatch.undo()
