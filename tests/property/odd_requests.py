"""Requests that a fuzzed server may send, good, odd and hostile, and which of them a holder may answer."""

import json
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord
from hypothesis import strategies as st

from fedhead.common.npy import npy_header

KEYS = {
    "version", "run", "round", "task", "backbone", "unit", "records_per_person", "mechanism", "noise_multiplier",
    "clipping_norm", "sample_rate", "local_steps", "declared_records", "optimizer", "learning_rate", "proximal_mu",
    "chunk", "seed", "plan_steps", "delta", "plan_counts", "metrics_noise",
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
    "run": [
        "run-1", "run-2", "x" * 64, "x" * 65,
        "r\u00fcn \u2603", "\x00", "a\x00b", "'; DROP TABLE entries; --", "x" * 10**6,
    ],
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
    "plan_counts": [
        {"number": 4, "noise_multiplier": 50.0}, {"number": 10**9, "noise_multiplier": 50.0},
        {"number": 4, "noise_multiplier": 5e-324}, {"number": 4, "noise_multiplier": -1.0}, {"number": 0},
    ],
    "metrics_noise": [10.0, 9.999, 50.0],
    "surprise": [1],
}  # fmt: skip
MISSING = object()
HEADERS = {  # what numpy would evaluate
    "open bracket": "(((", "deep": "-" * 9000 + "1", "deeper": "[" * 5000, "odd keys": "{1: 2, 'a': 3}",
    "no hash": "{[]: 1}",
    "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (10, 64)}", "nul": "\x00",
}  # fmt: skip
HEADS = [
    "zeros", "ones", "nan", "inf", "huge", "names", "order", "shape", "float64", "claims float32", "truncated",
    "longer",
    "no bytes", "extra", "none", "pickle", *HEADERS,
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
    good = draw(st.fixed_dictionaries({"run": st.sampled_from(["run-1", "run-2"]), "round": st.integers(1, 3)}))
    many = draw(st.sampled_from([0, 0, 0, 0, 1, 1, 1, 2, 3]))
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=many, max_size=many, unique=True))
    changes = {name: draw(st.sampled_from([*FIELDS[name], *FIELDS[name], *ANY, MISSING])) for name in names}
    changes = {**good, "noise_multiplier": draw(st.sampled_from([3.0, 3.0, 20.0])), **changes}
    if changes.get("mechanism") == "poisson" and changes.get("sample_rate") == 0.1:
        changes["sample_rate"] = 1.0  # a plan that is worth an accountant's second is no business of this test
    if changes.get("local_steps") == 100_000:
        changes["noise_multiplier"] = 20.0  # beyond the budget, which is sooner done than as many steps
    odd = draw(st.sampled_from(["", "", "", "", "", "", "head", "mark", "records"]))
    return Step(
        changes,
        draw(st.sampled_from(HEADS)) if odd == "head" else "zeros",
        draw(st.sampled_from(MARKS)) if odd == "mark" else draw(st.sampled_from(["none", "last"])),
        draw(st.sampled_from(RECORDS)) if odd == "records" else "all",
    )


GOOD_NUMBERS = [1, 4, 100_000]
GOOD_NOISES = [9.999, 10.0, 12, 50.0, 5000.0, 2.0**25]
ODD_NUMBERS = st.one_of(
    st.sampled_from([0, -1, 100_001, 2**31, 2**53, 2**64, -(2**63), 1.0, 4.0, 1e5, 1e400, 5e-324, -0.0, 2.0**25 + 8]),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.one_of(st.integers(), st.floats()).map(str),
    st.text(max_size=8),
    st.lists(st.integers(1, 9), max_size=2),
    st.integers(300, 6000).map(lambda digits: Raw("7" * digits)),
    st.sampled_from([*ANY, MISSING]),
)
"""What may stand where a number should: some of these are good ones, too."""


@st.composite
def counts(draw):
    """Numbers of noised counts, planned and asked for, at most two of the three odd."""
    odd = draw(st.lists(st.sampled_from(["number", "noise", "asked"]), max_size=2, unique=True))

    def value(name, good):
        return draw(ODD_NUMBERS if name in odd else st.sampled_from(good))

    planned = {"number": value("number", GOOD_NUMBERS), "noise_multiplier": value("noise", GOOD_NOISES)}
    asked = value("asked", [None, MISSING, *GOOD_NOISES])
    return {"plan_counts": Raw(spelled(planned)), "metrics_noise": asked}


def number(value, low, high):
    return type(value) in (int, float) and low <= value <= high


def whole(value, high):
    return type(value) is int and 1 <= value <= high


def countable(planned):
    """Whether this is a plan of counts that a holder has room for."""
    return (
        type(planned) is dict
        and set(planned) == {"number", "noise_multiplier"}
        and whole(planned["number"], 100_000)
        and number(planned["noise_multiplier"], 5e-324, 2**25)
    )


def foreseen(fields):
    """What the rest of a run costs by its own word: the sum of steps / noise^2, exactly."""
    cost = Fraction(fields.get("plan_steps", 1) - fields["local_steps"]) / Fraction(fields["noise_multiplier"]) ** 2
    planned = fields.get("plan_counts")
    if planned is not None:
        rest = planned["number"] - (fields.get("metrics_noise") is not None)
        cost += rest / Fraction(planned["noise_multiplier"]) ** 2
    return cost


def honest(fields, backbone):
    """Whether a request is one that this holder may answer with a release: rules written down a second time."""
    metrics, planned = fields.get("metrics_noise"), fields.get("plan_counts")
    return (
        set(fields) <= KEYS
        and fields.get("version", 1) == 1
        and type(fields.get("run")) is str
        and 1 <= len(fields["run"]) <= 64
        and whole(fields.get("round"), 2**53)
        and fields.get("task") == "classification"
        and fields.get("backbone") == backbone
        and fields.get("unit", "record") == "record"
        and fields.get("records_per_person") is None
        and fields.get("mechanism") == "full-batch"
        and fields.get("sample_rate") is None
        and number(fields.get("noise_multiplier"), 1.5, 2**25)
        and number(fields.get("clipping_norm"), 2.0**-500, 1.0)
        and whole(fields.get("local_steps"), 100_000)
        and whole(fields.get("plan_steps", 1), 2**53)
        and fields["local_steps"] <= fields.get("plan_steps", 1)
        and whole(fields.get("declared_records"), 2**53)
        and number(fields.get("learning_rate"), 5e-324, 1.7e308)
        and number(fields.get("proximal_mu", 0.0), 0, 1.7e308)
        and (metrics is None or number(metrics, 10.0, 2**25))
        and (planned is None or countable(planned))
    )
