"""Mechanism events: exact round trip, one text an event, every field checked."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhead.common.errors import InputError
from fedhead.common.privacy.events import (
    EVENTS,
    CountEvent,
    GaussianEvent,
    NoPrivacyEvent,
    PoissonEvent,
    from_json,
    from_row,
)

HUGE = pytest.param(10**5000, id="huge")  # more digits than Python prints
LONG = pytest.param("1" * 10**6, id="long")
POSITIVE = st.floats(min_value=5e-324, max_value=1.7e308)
COUNT = st.integers(1, 2**53)
ANY = st.one_of(
    st.builds(GaussianEvent, POSITIVE, POSITIVE, COUNT),
    st.builds(PoissonEvent, POSITIVE, POSITIVE, st.floats(5e-324, 1.0), COUNT),
    st.builds(CountEvent, POSITIVE, POSITIVE, COUNT),
    st.builds(NoPrivacyEvent, COUNT),
)


@given(ANY)
def test_round_trip_is_exact(event):
    text = event.to_json()
    back = from_json(text)
    assert back == event
    assert type(back) is type(event)
    assert back.to_json() == text


@pytest.mark.parametrize(
    "event",
    [GaussianEvent(2.0, 1.0, 3), PoissonEvent(2.0, 1.0, 0.1, 3), CountEvent(4.0, 1.0, 1), NoPrivacyEvent(2)],
    ids=lambda event: event.mechanism,
)
def test_an_event_never_changes(event):
    """What was charged can't be made cheaper afterwards; equal events are one key."""
    before = event.to_json()
    for name in [*(field.name for field in fields(event)), "mechanism", "anything"]:
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(event, name, 10**6)
        with pytest.raises((FrozenInstanceError, AttributeError)):
            delattr(event, name)
    assert event.to_json() == before
    assert {event: 1}[from_json(before)] == 1


def test_canonical_text():
    assert GaussianEvent(2, 1, 3).to_json() == (
        '{"clipping_norm":1.0,"mechanism":"full-batch","noise_multiplier":2.0,"schema":1,"steps":3}'
    )
    assert CountEvent(4, 2, 1).to_json() == (
        '{"mechanism":"count","noise_multiplier":4.0,"schema":1,"sensitivity":2.0,"steps":1}'
    )
    assert NoPrivacyEvent(2).to_json() == '{"mechanism":"none","schema":1,"steps":2}'


def test_table_is_by_name():
    assert {name: kind.mechanism for name, kind in EVENTS.items()} == {name: name for name in EVENTS}


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "1", None, 10**400, HUGE, LONG])
@pytest.mark.parametrize("name", ["noise_multiplier", "clipping_norm", "sample_rate"])
def test_numbers_are_checked(name, bad):
    fields = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "sample_rate": 0.5, "steps": 1, name: bad}
    with pytest.raises(InputError, match=rf"^event.{name} is .{{1,200}}$"):
        PoissonEvent(**fields)


@pytest.mark.parametrize("name", ["noise_multiplier", "sensitivity", "steps"])
def test_a_count_is_checked(name):
    with pytest.raises(InputError, match=rf"^event.{name} is -1: "):
        CountEvent(**{"noise_multiplier": 1.0, "sensitivity": 1.0, "steps": 1, name: -1})


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "1", None, 2**53 + 1, HUGE])
def test_steps_are_checked(bad):
    for make in (lambda: GaussianEvent(1.0, 1.0, bad), lambda: CountEvent(1.0, 1.0, bad), lambda: NoPrivacyEvent(bad)):
        with pytest.raises(InputError, match=r"^event.steps is "):
            make()


def test_sample_rate_is_at_most_one():
    assert PoissonEvent(1.0, 1.0, 1.0, 1).sample_rate == 1
    with pytest.raises(InputError):
        PoissonEvent(1.0, 1.0, 1.0000001, 1)


GOOD = json.loads(PoissonEvent(1.5, 1.0, 0.25, 4).to_json())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps(GOOD),  # spaces: not canonical
        json.dumps({**GOOD, "schema": 2}),
        json.dumps({**GOOD, "schema": True}),
        json.dumps({**GOOD, "mechanism": "PoissonEvent"}),
        json.dumps({**GOOD, "mechanism": ["poisson"]}),
        json.dumps({**GOOD, "mechanism": "count"}),
        PoissonEvent(1.5, 1.0, 0.25, 4).to_json().replace("1.5", "1" * 400),
        PoissonEvent(1.5, 1.0, 0.25, 4).to_json().replace("1.5", "1" * 10**5),
        json.dumps({**GOOD, "round": 1}),
        json.dumps({name: value for name, value in GOOD.items() if name != "sample_rate"}),
        PoissonEvent(1.5, 1.0, 0.25, 4).to_json().replace("1.5", "NaN"),
        PoissonEvent(1.5, 1.0, 0.25, 4).to_json().replace("1.5", "1.50"),
        PoissonEvent(1.5, 1.0, 0.25, 4).to_json().replace('"steps":4', '"steps":5,"steps":4'),
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(InputError):
        from_json(text)


def test_row_of_the_result():
    assert PoissonEvent(1.5, 0.5, 0.25, 4).to_row(7) == {
        "mechanism": "poisson",
        "noise_multiplier": 1.5,
        "sample_rate": 0.25,
        "steps": 4,
        "clipping_norm": 0.5,
        "round": 7,
    }
    assert NoPrivacyEvent(1).to_row(2)["noise_multiplier"] is None
    count = CountEvent(3.0, 1.0, 2).to_row(1)
    assert (count["mechanism"], count["noise_multiplier"], count["steps"], count["clipping_norm"]) == (
        "count",
        3.0,
        2,
        None,
    )


@given(ANY, st.integers(1, 10**6))
def test_a_row_reads_back_as_what_costs_the_same(event, number):
    back = from_row(json.loads(json.dumps(event.to_row(number))))
    if isinstance(event, CountEvent):  # a row does not say of how much each count may change
        assert back == GaussianEvent(event.noise_multiplier, 1.0, event.steps)
    else:
        assert back == event


@pytest.mark.parametrize(("field", "value"), [("noise_multiplier", -1.0), ("steps", 0), ("mechanism", "laplace")])
def test_a_row_that_breaks_a_rule_is_refused(field, value):
    with pytest.raises(InputError, match=rf"^(event\.)?{field} is "):
        from_row({**GaussianEvent(1.5, 0.5, 4).to_row(1), field: value})
