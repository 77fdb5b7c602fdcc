"""A server that sends what it must not, over the real link to a real data holder: fixed codes, nothing spent, alive."""

import json
import time

import numpy as np
import pytest
from deployment_harness import RECIPE
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedhead.common import protocol
from fedhead.common.config import make_config, to_json
from fedhead.common.models.backbones import load_backbone
from fedhead.common.refusals import (
    BEYOND_BUDGET,
    CHANGED_ROUND,
    INVALID_REQUEST,
    LARGE_CLIPPING_NORM,
    LITTLE_NOISE,
    NO_PRIVACY,
    NOT_READY,
    OTHER_MODEL,
    STALE_ROUND,
    TEXTS,
)
from fedhead.server.server_file import load_server
from fedhead.server.submitting.session import Session

pytestmark = pytest.mark.slow
LIMITS = {"limits": {"noise_multiplier_min": 5.0, "clipping_norm_max": 1.0}}
SECONDS = 60.0


class Hostile:
    """The server's side of a run, in this process."""

    def __init__(self, ours, session: Session) -> None:
        self.ours, self.config = ours, make_config(RECIPE, base=ours.folder)
        self.backbone = load_backbone(self.config.model, ours.folder, vector_size=64).digest
        self.grid = session.grid
        (self.node,) = (one.node for one in session.registered())

    def request(self, **changes) -> dict:
        privacy = self.config.privacy
        fields = {
            "version": 1, "run": "run-1", "round": 1, "task": "classification", "backbone": self.backbone,
            "unit": privacy.unit, "mechanism": privacy.mechanism, "noise_multiplier": 20.0, "clipping_norm": 0.3,
            "local_steps": 1, "declared_records": 300, "optimizer": {"kind": "sgd"}, "learning_rate": 3.0, "seed": 7,
            "plan_steps": 1,
        }  # fmt: skip
        return {**fields, **changes}

    def content(self, head: ArrayRecord | None = None, text: str | None = None, **changes) -> RecordDict:
        text = json.dumps(self.request(**changes)) if text is None else text
        asked = ConfigRecord({"server-round": 1, "request": text})
        return RecordDict({protocol.ARRAYS: head or arrays(), protocol.CONFIG: asked})

    def send(self, content: RecordDict, kind: str = MessageType.TRAIN) -> Message:
        replies = self.grid.send_and_receive([Message(content, self.node, kind, ttl=SECONDS)], timeout=SECONDS)
        assert len(replies) == 1, "no reply"
        return replies[0]

    def code(self, content: RecordDict, kind: str = MessageType.TRAIN) -> int:
        """The code of a refusal: beside it the code's own text, the holder's name, and where its ledger stands."""
        reply = self.send(content, kind)
        assert reply.has_error()
        said = json.loads(reply.error.reason)
        mark = {key: said.pop(key) for key in ("sequence", "hash") if key in said}
        if mark:
            chain = {entry.sequence: entry.hash for entry in self.ours.entries("north")}
            assert chain[mark["sequence"]] == mark["hash"]
        assert said == {"holder": said["holder"], "text": TEXTS[reply.error.code]}
        assert said["holder"] in ("north", "")
        return reply.error.code

    def released(self, **changes) -> bool:
        return not self.send(self.content(**changes)).has_error()


def arrays(**changes: np.ndarray) -> ArrayRecord:
    """A head; by default of zeros, as the recipe's is."""
    found = {"head.weight": np.zeros((10, 64), np.float32), "head.bias": np.zeros(10, np.float32)}
    names = {name.replace("_", "."): value for name, value in changes.items()}
    return ArrayRecord({name: Array(value) for name, value in {**found, **names}.items()})


def filled(value: float) -> ArrayRecord:
    return arrays(head_weight=np.full((10, 64), value, np.float32))


def heads() -> dict[str, tuple[ArrayRecord, int]]:
    plain = np.zeros((10, 64), np.float32)
    one_nan = plain.copy()
    one_nan[3, 5] = np.nan
    lying = ArrayRecord({"head.weight": Array("float32", (10, 64), "numpy.ndarray", b"\x93NUMPY" + b"\xff" * 200)})
    lying["head.bias"] = Array(np.zeros(10, np.float32))
    return {
        "nan": (arrays(head_weight=one_nan), INVALID_REQUEST),
        "infinite": (filled(np.inf), INVALID_REQUEST),
        "huge": (filled(3e38), INVALID_REQUEST),
        "shape": (arrays(head_weight=plain.T.copy()), OTHER_MODEL),
        "larger": (arrays(head_weight=np.zeros((10, 4096), np.float32)), OTHER_MODEL),
        "kind": (arrays(head_weight=plain.astype(np.float64)), OTHER_MODEL),
        "1e300": (arrays(head_weight=np.full((10, 64), 1e300)), OTHER_MODEL),
        "name": (arrays(head_other=plain), OTHER_MODEL),
        "bytes": (lying, INVALID_REQUEST),
    }


REQUESTS = {
    "little noise": ({"noise_multiplier": 4.9}, {LITTLE_NOISE}),
    "no noise": ({"noise_multiplier": 0.0}, {INVALID_REQUEST}),
    "huge noise": ({"noise_multiplier": 1e300}, {INVALID_REQUEST}),
    "large norm": ({"clipping_norm": 2.0}, {LARGE_CLIPPING_NORM}),
    "huge norm": ({"clipping_norm": 1e300}, {INVALID_REQUEST, LARGE_CLIPPING_NORM}),
    "tiny norm": ({"clipping_norm": 1e-300}, {INVALID_REQUEST}),
    "long plan": ({"plan_steps": 2**40}, {BEYOND_BUDGET, INVALID_REQUEST}),
    "many steps": ({"local_steps": 100_000, "plan_steps": 100_000}, {BEYOND_BUDGET, INVALID_REQUEST}),
    "steps beyond plan": ({"local_steps": 3}, {INVALID_REQUEST}),
    "counts": ({"plan_counts": {"number": 100_000, "noise_multiplier": 1.0}}, {BEYOND_BUDGET, INVALID_REQUEST}),
    "unit": ({"unit": "person", "records_per_person": 1}, {INVALID_REQUEST}),
    "trusting unit": ({"unit": "holder"}, {INVALID_REQUEST}),
    "mechanism": ({"mechanism": "none", "noise_multiplier": 0.0}, {NO_PRIVACY}),
    "sampling": ({"mechanism": "poisson", "sample_rate": 0.999, "plan_steps": 10**9}, {INVALID_REQUEST}),
    "task": ({"task": "segmentation"}, {OTHER_MODEL}),
    "backbone": ({"backbone": "0" * 64}, {OTHER_MODEL}),
    "unknown field": ({"path": "/etc/passwd"}, {INVALID_REQUEST}),
    "not a number": ({"learning_rate": "nan"}, {INVALID_REQUEST}),
}
TEXTS_OF_REQUESTS = ("", "null", "[" * 50_000, '{"run": "\ud800"}'.encode("utf-8", "replace").decode(), "1e999", "\0")


def test_what_a_hostile_server_sends_gets_fixed_codes_and_spends_nothing(federation):
    ours = federation(["north"], holder=LIMITS)
    joined = ours.up()["north"]
    children = joined.child("node"), joined.child("executor")
    server = load_server(ours.server_file)
    config = make_config(RECIPE, base=ours.folder)
    with Session(server, to_json(config)) as session:
        us = Hostile(ours, session)
        assert us.released()
        charged = len(ours.entries("north"))
        for name, (head, code) in heads().items():
            assert us.code(us.content(head, round=2)) == code, name
        for name, (changes, codes) in REQUESTS.items():
            assert us.code(us.content(run=f"crafted: {name}", **changes)) in codes, name
        for text in TEXTS_OF_REQUESTS:
            assert us.code(us.content(text=text)) == INVALID_REQUEST, text[:20]
        assert us.code(RecordDict()) == INVALID_REQUEST
        assert us.code(us.content(learning_rate=2.0)) == CHANGED_ROUND  # the first round again, otherwise
        for kind in ("train.other", "evaluate", "query.other"):
            us.code(us.content(round=2), kind)
        assert len(ours.entries("north")) == charged, "something was spent"
        assert us.released(round=2)
        assert us.code(us.content()) == STALE_ROUND
        session.close("completed")

    crafted = {
        "code": {"model": {"backbone": "module:os:system"}},
        "labels": {"task": {"labels": ["0", "1"]}},
        "a file": {"model": {"backbone": "transformers:/etc"}},
    }
    for changes in crafted.values():
        fields = json.loads(to_json(config))
        for table, change in changes.items():
            fields["recipe"][table] |= change
        with Session(server, json.dumps(fields)) as session:
            assert Hostile(ours, session).code(RecordDict(), MessageType.QUERY) == NOT_READY
            session.close("completed")
    with Session(server, "no recipe at all") as session:
        assert Hostile(ours, session).code(RecordDict(), MessageType.QUERY) == NOT_READY
        session.close("completed")

    assert (joined.child("node"), joined.child("executor")) == children, "a process had to be started again"
    ours.audited()


def test_a_flood_of_messages_spends_within_the_budget_and_does_not_stop_the_holder(federation):
    ours = federation(["north"], holder=LIMITS)
    joined = ours.up()["north"]
    children = joined.child("node"), joined.child("executor")
    with Session(load_server(ours.server_file), to_json(make_config(RECIPE, base=ours.folder))) as session:
        us = Hostile(ours, session)
        assert us.released()
        flood = [Message(RecordDict(), us.node, MessageType.QUERY, ttl=15.0) for _ in range(50)]
        flood += [
            Message(us.content(run=f"flood-{number}", noise_multiplier=5.0), us.node, MessageType.TRAIN, ttl=15.0)
            for number in range(50)
        ]
        replies = us.grid.send_and_receive(flood, timeout=20.0)
        codes = {reply.error.code for reply in replies if reply.has_error()}
        assert codes <= set(TEXTS) | {3, 5}, codes  # 3 and 5 are Flower's own: the message expired, the node is away
        began = time.monotonic()
        assert us.released(run="honest")
        assert time.monotonic() - began < SECONDS
        session.close("completed")
    assert ours.spent("north") <= 8.0
    assert joined.alive
    assert (joined.child("node"), joined.child("executor")) == children, "a process had to be started again"
    ours.audited()
