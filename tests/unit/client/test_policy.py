"""What a request may ask for: nothing beyond a limit passes, and each refusal has its own code."""

import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedhead.client import policy
from fedhead.client.policy import check_request
from fedhead.common.config.limits import Limits, ReleaseLimits
from fedhead.common.config.schema import SGD
from fedhead.common.errors import Refused
from fedhead.common.refusals import (
    LARGE_CLIPPING_NORM,
    LITTLE_NOISE,
    NO_METRICS,
    NO_PRIVACY,
    OTHER_BACKBONE,
    OTHER_TASK,
    OTHER_UNIT,
    TEXTS,
)
from fedhead.common.round_request import RoundRequest

GOOD = {
    "run": "r", "round": 1, "task": "classification", "backbone": "ab" * 32, "unit": "record",
    "mechanism": "full-batch", "noise_multiplier": 2.0, "clipping_norm": 1.0, "local_steps": 1,
    "declared_records": 100, "optimizer": SGD(), "learning_rate": 0.1,
}  # fmt: skip
DIGESTS = ["ab" * 32, "cd" * 32, "ef" * 32]


def request(**changes) -> RoundRequest:
    return RoundRequest(**{**GOOD, **changes})


def code_of(asked: RoundRequest, limits: Limits, budgeted: bool = True) -> int | None:
    return answer(check_request, asked, limits, budgeted)


def answer(check, asked, limits, budgeted) -> int | None:
    """The code of a refusal, None for a request that passes."""
    try:
        check(asked, limits, budgeted=budgeted)
    except Refused as refused:
        return refused.code if str(refused) == TEXTS[refused.code] else -1
    return None


@pytest.mark.parametrize(
    ("changes", "limits", "code"),
    [
        ({}, Limits(), None),
        ({"unit": "person"}, Limits(units=["record"]), OTHER_UNIT),
        ({"unit": "holder"}, Limits(), OTHER_UNIT),
        ({"task": "tagging"}, Limits(tasks=["classification"]), OTHER_TASK),
        ({}, Limits(backbones=["sha256:" + "cd" * 32]), OTHER_BACKBONE),
        ({}, Limits(backbones=["sha256:" + "ab" * 32]), None),
        ({}, Limits(backbones=["ab" * 32]), None),
        ({"clipping_norm": 1.0 + 1e-9}, Limits(clipping_norm_max=1.0), LARGE_CLIPPING_NORM),
        ({}, Limits(clipping_norm_max=1.0), None),
        ({"noise_multiplier": 2.0 - 1e-9}, Limits(noise_multiplier_min=2.0), LITTLE_NOISE),
        ({}, Limits(noise_multiplier_min=2.0), None),
        ({"metrics_noise": 1e9}, Limits(), NO_METRICS),
        ({"metrics_noise": 9.9}, Limits(release=ReleaseLimits(metrics=True)), NO_METRICS),
        ({"metrics_noise": 10.0}, Limits(release=ReleaseLimits(metrics=True)), None),
        ({"mechanism": "none", "noise_multiplier": 0.0}, Limits(), NO_PRIVACY),
        ({"mechanism": "none", "unit": "holder"}, Limits(units=["holder"]), NO_PRIVACY),
    ],
)
def test_each_code(changes, limits, code):
    assert code_of(request(**changes), limits) == code


def test_without_a_budget_only_the_unit_holder_may_ask_for_no_noise():
    bare = {"mechanism": "none", "noise_multiplier": 0.0, "clipping_norm": 9.0}
    limits = Limits(units=["record", "person", "holder"], noise_multiplier_min=1.0, clipping_norm_max=1.0)
    assert code_of(request(**bare, unit="holder"), limits, budgeted=False) is None
    assert code_of(request(**bare, unit="record"), limits, budgeted=False) == NO_PRIVACY
    assert code_of(request(**bare, unit="person"), limits, budgeted=False) == NO_PRIVACY


def test_the_first_code_in_the_fixed_order_is_the_answer():
    """A request that is wrong in every way; one thing after the other is put right."""
    limits = Limits(
        units=["record"], tasks=["a"], backbones=["cd" * 32], clipping_norm_max=0.5, noise_multiplier_min=5.0
    )
    wrong = {"unit": "holder", "mechanism": "none", "metrics_noise": 1.0}
    cures = [
        (OTHER_UNIT, {"unit": "record"}),
        (OTHER_TASK, {"task": "a"}),
        (OTHER_BACKBONE, {"backbone": "cd" * 32}),
        (NO_PRIVACY, {"mechanism": "full-batch"}),
        (LARGE_CLIPPING_NORM, {"clipping_norm": 0.5}),
        (LITTLE_NOISE, {"noise_multiplier": 5.0}),
        (NO_METRICS, {"metrics_noise": None}),
    ]
    for code, cure in cures:
        assert code_of(request(**wrong), limits) == code
        wrong |= cure
    assert code_of(request(**wrong), limits) is None


@pytest.mark.parametrize(
    ("field", "limits"),
    [
        ("clipping_norm", Limits(clipping_norm_max=1.0)),
        ("noise_multiplier", Limits(noise_multiplier_min=1.0)),
        ("metrics_noise", Limits(release=ReleaseLimits(metrics=True))),
    ],
)
def test_a_nan_breaks_every_limit(field, limits):
    assert code_of(request().model_copy(update={field: math.nan}), limits) is not None


RELEASE_20 = ReleaseLimits(metrics=True, metrics_noise_multiplier_min=20.0)


def some(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """Any selection of the fields, so that requests that break one limit only are common."""
    return st.fixed_dictionaries({}, optional=fields)


REQUESTS = some(
    unit=st.sampled_from(["person", "holder", "holder"]),
    task=st.sampled_from(["classification", "tagging", "module:a:b"]),
    backbone=st.sampled_from(DIGESTS),
    mechanism=st.sampled_from(["poisson", "none", "none"]),
    noise_multiplier=st.sampled_from([0.0, 0.5, 1.0, math.nextafter(1.0, 0)]) | st.floats(0, 1e6),
    clipping_norm=st.sampled_from([0.5, math.nextafter(1.0, 2)]) | st.floats(1e-6, 1e6),
    metrics_noise=st.sampled_from([10.0, math.nextafter(10.0, 0), 20.0]) | st.floats(1e-6, 1e6),
    seed=st.integers(0, 9),
).map(lambda changes: request(**changes))
LIMITS = some(
    units=st.sampled_from([["record", "person", "holder"], ["holder"], ["person", "holder"], ["record"]]),
    tasks=st.sampled_from([["classification"], ["classification", "tagging"], []]),
    backbones=st.sampled_from([DIGESTS, ["sha256:" + text for text in DIGESTS], DIGESTS[:1], DIGESTS[1:], []]),
    clipping_norm_max=st.sampled_from([0.5, 1.0]),
    noise_multiplier_min=st.sampled_from([0.5, 1.0]),
    release=st.sampled_from([ReleaseLimits(metrics=True), ReleaseLimits(), RELEASE_20]),
).map(lambda fields: Limits(**fields))


def broken(asked: RoundRequest, limits: Limits, budgeted: bool) -> set[int]:
    """Every limit that a request breaks, stated anew, without order."""
    private = asked.mechanism != "none"
    allowed = {text[-64:] for text in limits.backbones or []}
    least_count = limits.release.metrics_noise_multiplier_min if limits.release.metrics else math.inf
    found = {
        OTHER_UNIT: not any(unit == asked.unit for unit in limits.units),
        OTHER_TASK: limits.tasks is not None and limits.tasks.count(asked.task) == 0,
        OTHER_BACKBONE: limits.backbones is not None and asked.backbone not in allowed,
        NO_PRIVACY: not private and (asked.unit in ("record", "person") or budgeted),
        LARGE_CLIPPING_NORM: private and asked.clipping_norm > (limits.clipping_norm_max or math.inf),
        LITTLE_NOISE: private and asked.noise_multiplier < (limits.noise_multiplier_min or 0.0),
        NO_METRICS: asked.metrics_noise is not None and asked.metrics_noise < least_count,
    }
    return {code for code, bad in found.items() if bad}


def holds(check) -> None:
    """The property: what passes breaks no limit, what is refused breaks the one that is named."""

    @settings(derandomize=True, max_examples=600, deadline=None, phases=[Phase.generate])
    @given(REQUESTS, LIMITS, st.booleans())
    def accepted_within_limits(asked, limits, budgeted):
        wrong = broken(asked, limits, budgeted)
        code = answer(check, asked, limits, budgeted)
        assert (code is None) == (not wrong)
        assert code is None or code in wrong

    accepted_within_limits()


def test_what_is_accepted_violates_no_limit():
    holds(check_request)


def backwards(asked, limits, *, budgeted):
    """A wrong twin: the clipping norm is held to the noise's limit and the other way round."""
    swapped = limits.model_copy(
        update={"clipping_norm_max": limits.noise_multiplier_min, "noise_multiplier_min": limits.clipping_norm_max}
    )
    check_request(asked, swapped, budgeted=budgeted)


def trusting(asked, limits, *, budgeted):
    """A wrong twin: a request that says that it is without privacy is believed."""
    if asked.mechanism != "none":
        check_request(asked, limits, budgeted=budgeted)


def unbudgeted(asked, limits, *, budgeted):
    """A wrong twin: forgets the budget."""
    check_request(asked, limits, budgeted=False)


def loose(asked, limits, *, budgeted):
    """A wrong twin: where metrics may leave, they may with any noise."""
    noise = None if asked.metrics_noise is None else math.inf
    check_request(asked.model_copy(update={"metrics_noise": noise}), limits, budgeted=budgeted)


@pytest.mark.parametrize("twin", [backwards, trusting, unbudgeted, loose])
def test_a_wrong_twin_is_rejected(twin):
    with pytest.raises(AssertionError):
        holds(twin)


def test_the_policy_never_sees_records():
    """It can't read what it doesn't import."""
    assert not {"Records", "Ledger", "torch"} & set(vars(policy))
