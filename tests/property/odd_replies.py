"""What a holder may reply, and what it may not: the vocabulary of test_fuzzed_replies.py."""

import json
import math

import numpy as np
from flwr.app import Array

from fedhead.common.privacy.events import CountEvent, GaussianEvent, NoPrivacyEvent
from fedhead.common.refusals import TEXTS

ASKED = GaussianEvent(20.0, 0.3, 2)


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


W, B = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(3, np.float32)


def claiming(data, dtype="float32", shape=(3, 2), stype="numpy.ndarray"):
    return {"w": Array(dtype, shape, stype, data), "b": Array(B)}


GOOD_BYTES = Array(W).data
ARRAYS = {
    "good": {"w": Array(W), "b": Array(B)},
    "large": {"w": Array(W + np.float32(3e38)), "b": Array(B)},
    "nan": {"w": Array(W * np.float32("nan")), "b": Array(B)},
    "inf": {"w": Array(W), "b": Array(B - np.float32("inf"))},
    "none": {},
    "extra": {"w": Array(W), "b": Array(B), "c": Array(B)},
    "order": {"b": Array(B), "w": Array(W)},
    "float64": {"w": Array(W.astype(np.float64)), "b": Array(B)},
    "shape": {"w": Array(W.T.copy()), "b": Array(B)},
    "truncated": claiming(GOOD_BYTES[:-3]),
    "longer": claiming(GOOD_BYTES + b"\0\0\0\0"),
    "empty": claiming(b""),
    "other dtype": claiming(Array(W.astype(np.int32)).data),
    "pickle": claiming(b"\x80\x04cos\nsystem\n."),
    "stype": claiming(GOOD_BYTES, stype="torch.tensor"),
    "objects": claiming(npy("{'descr': '|O', 'fortran_order': False, 'shape': (3, 2), }", b"\x80\x04N.")),
    "huge": claiming(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 2), }")),
    "brackets": claiming(npy("(((")),
    "deep": claiming(npy("-" * 9000 + "1")),
    "deeper": claiming(npy("[" * 5000)),
    "odd keys": claiming(npy("{1: 2, 'a': 3}")),
    "no hash": claiming(npy("{[]: 1}")),
}
USABLE = {"good", "large"}
EVENTS = [
    ASKED.to_json(), GaussianEvent(1e9, 0.3, 2).to_json(), GaussianEvent(20.0, 0.3, 1).to_json(),
    GaussianEvent(1.0, 0.3, 2).to_json(), GaussianEvent(20.0, 0.3, 2**53).to_json(),
    GaussianEvent(1e-300, 0.3, 2).to_json(), CountEvent(20.0, 1.0, 1).to_json(), NoPrivacyEvent(1).to_json(),
    '{"mechanism":"poisson","noise_multiplier":1.0,"clipping_norm":1.0,"sample_rate":0.5,"schema":1,"steps":1}',
    '{"clipping_norm":0.3,"mechanism":"poisson","noise_multiplier":0.001,"sample_rate":0.9,"schema":1,"steps":99999}',
    '{"mechanism": "free lunch"}', "", "null", "[" * 100_000, '{"schema":1,"steps":' + "1" * 6000 + "}",
    '{"clipping_norm":0.3,"mechanism":"full-batch","noise_multiplier":NaN,"schema":1,"steps":2}',
    7, 1.5, b"\xff", [1, 2],
]  # fmt: skip
VALUES = [0.0, -1e308, 1e308, math.nan, math.inf, "7", 7, True, b"7", [1.0, 2.0]]
WEIGHTS = [0, -1, 1, 10**9, 2**70, 0.5, math.nan, math.inf, [1, 2]]
MARKS = [
    (1, "0" * 64), (2**63, "0" * 64), (-1, "0" * 64), (True, "0" * 64), (1, "0" * 63), ("1", "0" * 64), (1, 1),
    (0.5, ""),
]  # fmt: skip
RECORDS = [
    "all", "no arrays", "no metrics", "no release", "nothing", "extra", "extra arrays", "extra metrics",
    "release is metrics", "release is arrays", "mark is arrays", "mark is metrics", "arrays are config",
    "mark is empty",
]  # fmt: skip
REASONS = [
    "", "null", "[]", "3", '"text"', "[" * 200_000, '{"holder": "b"}', '{"holder": "nobody", "text": "x"}',
    '{"holder": ["b"], "text": {"a": 1}}', '{"holder": "b", "text": "patient 4711\\n\\u001b[31m"}', "1" * 6000,
    json.dumps({"holder": "c", "text": "x" * 10**6}), "patient 4711 has the flu",
]  # fmt: skip
CODES = [*TEXTS, 0, -1, 1, 2**31 - 1, 1098]
