"""Whatever is asked of a deployed holder: a fixed refusal that cost nothing, or a release that was charged before."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from runpy import run_path

import pytest
from flwr.app import Context, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedhead.client import admission as client_admission
from fedhead.client import app as client_app
from fedhead.client.admission import Admission, Admitted
from fedhead.client.training import Trainer
from fedhead.common import protocol, refusals
from fedhead.common.errors import Refused
from fedhead.common.npy import read_npy
from fedhead.common.privacy.ledger import admission as ledger_admission
from fedhead.common.refusals import TEXTS

BENCH = run_path(str(Path(__file__).with_name("request_bench.py")))
ODD, MOST = BENCH["ODD"], BENCH["MOST"]
ANY, FIELDS, HEADS, MARKS, MISSING, RECORDS = (
    ODD[name] for name in ("ANY", "FIELDS", "HEADS", "MARKS", "MISSING", "RECORDS")
)
Raw, Step, countable, counts, foreseen, number, spelled, steps = (
    ODD[name] for name in ("Raw", "Step", "countable", "counts", "foreseen", "number", "spelled", "steps")
)


@pytest.fixture
def bench(deployed, tmp_path, monkeypatch):
    made = BENCH["Bench"](deployed(limits=BENCH["LIMITS"], changes={"metrics": {"every": 1}}), tmp_path)
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


def expected_code(bench, changes):
    """The answer to a good request with other counts, by the rules of `odd_requests` and exact sums; 0 is a release.

    Two answers where the sum is within rounding of the budget.
    """
    try:
        fields = json.loads(spelled({**bench.good, **changes}))
    except (ValueError, RecursionError):
        return {refusals.INVALID_REQUEST}
    planned, asked = fields.get("plan_counts"), fields.get("metrics_noise")
    if not (planned is None or countable(planned)) or not (asked is None or number(asked, 5e-324, 2**25)):
        return {refusals.INVALID_REQUEST}
    if asked is not None and asked < 10:
        return {refusals.NO_METRICS}
    cost = bench.granted + 1 / Fraction(fields["noise_multiplier"]) ** 2 + foreseen(fields)
    cost += 0 if asked is None else 1 / Fraction(asked) ** 2
    return {
        refusals.BEYOND_BUDGET if cost > Fraction(MOST * bound) else 0 for bound in (1 - 1e-12, 1 + 1e-12)
    }  # fmt: skip


def play_counts(bench, changes, run):
    changes = {"run": run, "noise_multiplier": 20.0, **changes}
    expected = expected_code(bench, changes)
    reply = bench.play(Step(changes))
    assert (reply.error.code if reply.has_error() else 0) in expected


@FUZZ
@given(asked=st.lists(counts(), min_size=3, max_size=9))
def test_whatever_counts_are_planned_and_asked(bench, asked):
    bench.fresh()
    for place, changes in enumerate(asked):
        play_counts(bench, changes, f"run-{place}")
    bench.usable()


@pytest.mark.parametrize("name", ["number", "noise_multiplier", "surprise", "metrics_noise"])
def test_every_number_of_counts_with_every_value(bench, name):
    bench.fresh()
    for place, value in enumerate([*ANY, MISSING]):
        plan = {"number": 4, "noise_multiplier": 50.0, "metrics_noise": 50.0, name: value}
        asked = plan.pop("metrics_noise")
        play_counts(bench, {"plan_counts": Raw(spelled(plan)), "metrics_noise": asked}, f"run-{place}")
    bench.usable()


@settings(FUZZ, max_examples=300)
@given(changes=counts())
def test_numbers_of_counts_arrive_as_they_were_sent_or_not_at_all(bench, changes):
    text, message = bench.message(Step(changes))
    try:
        request = protocol.read_request(message).request
    except Refused as refused:
        answer = refused.code, str(refused)
        request = None
    if request is None:
        assert answer == (refusals.INVALID_REQUEST, TEXTS[refusals.INVALID_REQUEST])
        return
    sent, found = json.loads(text), request.plan_counts
    number, noise, asked = (
        sent["plan_counts"]["number"],
        sent["plan_counts"]["noise_multiplier"],
        sent.get("metrics_noise"),
    )
    assert type(number) is int
    assert {type(noise), type(asked)} <= {int, float, type(None)}
    # a whole number of more than 53 bits is rounded, as every float is
    assert (number, float(noise)) == (found.number, found.noise_multiplier)
    assert (None if asked is None else float(asked)) == request.metrics_noise


def test_counts_are_planned_only_where_a_round_is_noised(deployed):
    holder = deployed(limits='units = ["holder"]', changes={"unit": "holder"})
    plan = {"number": 1, "noise_multiplier": 50.0}
    reply = holder.ask(mechanism="none", unit="holder", plan_counts=plan)
    assert reply.error.code == refusals.INVALID_REQUEST
    assert not holder.ask(mechanism="none", unit="holder").has_error()


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

    def telling(message, refused, holder, *mark):
        return real(message, type(refused)(refused.code, f"{refused} {refused.__cause__}"), holder, *mark)

    monkeypatch.setattr(protocol, "refuse", telling)


def trust_headers(monkeypatch):
    monkeypatch.setattr(protocol, "_values", read_npy)


def no_budget(monkeypatch):
    monkeypatch.setattr(ledger_admission, "admits", lambda *_: None)


def read_loosely(monkeypatch):
    """Takes a text for a number, and a whole number for any other."""
    monkeypatch.setattr(protocol, "_parse", lambda text: protocol.RoundRequest.model_validate_json(text, strict=False))


def foresee_nothing(monkeypatch):
    monkeypatch.setattr(client_admission, "foreseen", lambda _: ())


def any_noise(monkeypatch):
    monkeypatch.setattr(client_app, "MOST_NOISE", 1e308)


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
        (read_loosely, [Step({"plan_counts": {"number": "4", "noise_multiplier": 50.0}})]),
        (read_loosely, [Step({"plan_counts": {"number": True, "noise_multiplier": 50.0}})]),
        (read_loosely, [Step({"metrics_noise": "50"})]),
        (foresee_nothing, [Step({"plan_counts": {"number": 100_000, "noise_multiplier": 50.0}})]),
        (foresee_nothing, [Step({"plan_steps": 1000})]),
        (any_noise, [Step({"plan_counts": {"number": 1, "noise_multiplier": 2.0**25 + 8}})]),
        (no_budget, [Step({"round": number, "noise_multiplier": 1.5}) for number in (1, 2)]),
    ],
)
def test_a_wrong_holder_is_caught(bench, monkeypatch, twin, asked):
    bench.fresh()
    twin(monkeypatch)
    with pytest.raises(AssertionError):
        bench.play_all(asked)
