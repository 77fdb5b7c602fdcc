"""What the server's side uses of Flower 1.41, public or not; of its nodes in nodes.py. No other file imports Flower.

Most of it is no public interface of Flower's, so the version is pinned, `check_flower` refuses another one, and
tests/unit/server/link/test_link_flower.py notices a change of each thing used. `set_environment` comes before the first
import of this module.
"""

from __future__ import annotations

import hmac
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI
from flwr.app import Error, Message
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TIMESTAMP_HEADER,
    TRANSPORT_TYPE_GRPC_RERE,
    ErrorCode,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.server.superlink.linkstate.sql_linkstate import _message_model_to_dict
from flwr.server.superlink.linkstate.utils import dict_to_message
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import get_object_children_ids_from_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.protobuf.routing import ProtobufRoute
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_DEPENDENCY, ProtobufTranslationMiddleware
from flwr.supercore.state.schema.corestate_models import ObjectPushSession as SessionModel
from flwr.supercore.state.schema.corestate_models import ObjectPushSessionPending as PendingModel
from flwr.supercore.state.schema.corestate_models import ObjectPushSessionRoot as RootModel
from flwr.supercore.state.schema.linkstate_models import MessageIns as MessageInsModel
from flwr.supercore.state.schema.linkstate_models import MessageRes as MessageResModel
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers
from sqlalchemy import delete, exists, insert, select, update

__all__ = [
    "PROTOBUF_REQUEST_DEPENDENCY", "PUBLIC_KEY_HEADER", "SIGNATURE_HEADER", "TIME_HEADER", "ActivateNodeRequest",
    "ActivateNodeResponse", "ConfirmMessageReceivedRequest", "ConfirmMessageReceivedResponse",
    "NodeAuthMiddleware", "ObjectTree", "Open", "ProtobufRoute", "ProtobufTranslationMiddleware",
    "PullMessagesRequest", "PullMessagesResponse", "PullObjectRequest", "PullObjectResponse", "PushMessagesRequest",
    "PushMessagesResponse", "PushObjectRequest", "PushObjectResponse", "answer_unavailable", "fleet_handlers",
    "fleet_router", "give_again", "http_error_translator", "is_in_upload", "make_inner", "node_of_message",
    "open_messages", "tree_of", "upload_of",
]  # fmt: skip

PUBLIC_KEY_HEADER: Final = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
SIGNATURE_HEADER: Final = FLEET_HTTP_SIGNATURE_HEADER.lower().encode()
TIME_HEADER: Final = TIMESTAMP_HEADER.lower().encode()

CLEAN_UP_SECONDS: Final = 1.0


class TokenPlugin(NoOpControlAuthnPlugin):
    """Control takes one token, compared in constant time."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token.encode()

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Whether the one value given is the token."""
        given = [value.encode() if isinstance(value, str) else value for _, value in metadata]
        if len(given) != 1 or not hmac.compare_digest(given[0], self._token):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)


def make_inner(database: str, host: str, port: int, token: str, secret: bytes) -> FastAPI:
    """Flower's own application, with all its routes and the state; for loopback only.

    Parameters
    ----------
    database : str
        File of the state, SQLite.
    host, port
        Where it will listen.
    token : str
        What Control wants to be shown.
    secret : bytes
        What a server task is taken with.

    Notes
    -----
    Isolation "process" means that Flower starts no process that unpacks or runs what a run brings.
    """
    config = SuperLinkLifespanConfig(
        control_address="", health_server_address=None, host=host, port=port, insecure=True, certificates=None,
        superexec_auth_secret=secret, authn_plugin=TokenPlugin(token), event_log_plugin=None,
        fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None, enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE, fleet_api_address=None, simulation=False, ssl_ca_certfile=None,
        ssl_certfile=None, ssl_keyfile=None, database=database, isolation="process", runtime_dependency_install=False,
    )  # fmt: skip
    app = create_app(config, SuperLinkLifespan)
    state = app.state.linkstate_factory.state()
    _believe_contents(state.object_store)
    _clean_up_at_times(state)
    return app


def _clean_up_at_times(state: Any) -> None:
    """Have tasks without a sign of life be given up at most once a second.

    Flower looks for them, in a transaction that writes, at every request for an object: 22 times a round and data
    holder were counted, over 12 rounds of two. A task has a minute for its next sign of life, and the list of runs may
    say for a second longer that it runs.
    """
    clean_up, last = state._cleanup_expired_task_tokens, -math.inf

    def now_and_then() -> None:
        nonlocal last
        if time.monotonic() - last >= CLEAN_UP_SECONDS:
            last = time.monotonic()
            clean_up()

    state._cleanup_expired_task_tokens = now_and_then


def _believe_contents(store: SqlObjectStore) -> None:
    """Have an object's own bytes say which parts it has, not whoever announces it first.

    An object is announced with its parts, and its bytes follow. Flower refuses who announces one with other parts
    later. Some objects are the same for all, and known before: a data holder could announce these with parts that don't
    exist, and nobody else could send a reply any more. Here the last who announces is believed, until the bytes are
    there; these have the object's hash, and say it themselves.
    """
    announce, put = store.preregister, store.put

    def preregister(run_id: int, object_tree: ObjectTree) -> list[str]:
        with store._mutation_session():
            for part in _from_the_top(object_tree):
                _set_parts(store, part.object_id, [child.object_id for child in part.children], bytes_there=False)
            return announce(run_id, object_tree)

    def put_and_look(object_id: str, object_content: bytes) -> None:
        with store._mutation_session():
            put(object_id, object_content)
            parts = get_object_children_ids_from_object_content(object_content)
            _set_parts(store, object_id, parts, bytes_there=True)

    store.preregister, store.put = preregister, put_and_look  # type: ignore[method-assign]


def _from_the_top(tree: ObjectTree) -> Iterator[ObjectTree]:
    yield tree
    for child in tree.children:
        yield from _from_the_top(child)


def _set_parts(store: SqlObjectStore, name: str, parts: Sequence[str], *, bytes_there: bool) -> None:
    """Give an object that is announced already these parts; none that isn't, or whose bytes are (not) there."""
    with store.session() as session:
        known = session.scalar(select(StoredObject.is_available).where(StoredObject.object_id == name))
        if known is None or bool(known) is not bytes_there:
            return
        before = set(session.scalars(select(ObjectChild.child_id).where(ObjectChild.parent_id == name)))
        wanted = set(parts)
        if before == wanted:
            return
        session.execute(delete(ObjectChild).where(ObjectChild.parent_id == name, ObjectChild.child_id.in_(before)))
        for child in wanted - before:
            row: Any = store.dialect_insert(StoredObject).values(
                object_id=child, content=b"", is_available=0, ref_count=0
            )
            session.execute(row.on_conflict_do_nothing(index_elements=[StoredObject.object_id]))
        for child in wanted:
            session.execute(insert(ObjectChild).values(parent_id=name, child_id=child))
        for changed, step in ((before - wanted, -1), (wanted - before, 1)):
            session.execute(
                update(StoredObject)
                .where(StoredObject.object_id.in_(changed))
                .values(ref_count=StoredObject.ref_count + step)
            )


@dataclass(frozen=True)
class Open:
    """A message that was delivered to a node and has no answer.

    Attributes
    ----------
    message : Message
        Without its content.
    received : bool
        The node has said that it has all of it.
    """

    message: Message
    received: bool

    @property
    def id(self) -> str:
        """The message's id."""
        return str(self.message.metadata.message_id)


def open_messages(state: Any, node: int) -> list[Open]:
    """What was delivered to a node, has no answer yet and has not expired."""
    statement = select(MessageInsModel).where(
        MessageInsModel.dst_node_id == uint64_to_int64(node),
        MessageInsModel.delivered_at != "",
        MessageInsModel.created_at + MessageInsModel.ttl > now().timestamp(),
        ~exists(select(MessageResModel.message_id).where(
            MessageResModel.reply_to_message_id == MessageInsModel.message_id)),
    )  # fmt: skip
    with state.session() as session:
        rows = [_message_model_to_dict(model) for model in session.scalars(statement).all()]
    for row in rows:
        row |= {name: int64_to_uint64(row[name]) for name in ("run_id", "src_node_id", "dst_node_id")}
    found = [dict_to_message(row) for row in rows]
    return [Open(message, tree_of(state, str(message.metadata.message_id)) is None) for message in found]


def give_again(state: Any, message_id: str) -> None:
    """Have a message delivered once more."""
    with state.session() as session:
        session.execute(update(MessageInsModel).where(MessageInsModel.message_id == message_id).values(delivered_at=""))


def answer_unavailable(state: Any, message: Message) -> None:
    """Answer a message in place of a node that lost it: the run need not wait for the deadline."""
    reply = Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="the node was restarted"), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with state.session():
        if state.store_message_res(reply) is not None:
            state._store_generated_message(reply)


def node_of_message(state: Any, message_id: str) -> int | None:
    """The node that a message is for; None where there is no such message, or it has expired."""
    row = state.get_valid_message_ins(message_id)
    return None if row is None else int64_to_uint64(row["dst_node_id"])


def tree_of(state: Any, message_id: str) -> ObjectTree | None:
    """The objects of a message; None once its node has received it."""
    try:
        found: ObjectTree = state.object_store.get_object_tree(message_id)
    except NoObjectInStoreError:
        return None
    return found


def upload_of(state: Any, message_id: str) -> tuple[str, list[str]] | None:
    """The session in which the objects of a message are brought, and those that are missing; None where none is open.

    Flower knows nothing of an answer any more once the coordinator has its envelope, which may be before its sender
    knows that it was taken.
    """
    sessions = select(SessionModel.session_id).join(RootModel, RootModel.session_id == SessionModel.session_id)
    with state.session() as session:
        found = session.scalar(sessions.where(RootModel.root_object_id == message_id, SessionModel.expires_at > now()))
        if found is None:
            return None
        missing = session.scalars(select(PendingModel.object_id).where(PendingModel.session_id == found)).all()
    return str(found), list(missing)


def is_in_upload(state: Any, session_id: str, object_id: str) -> bool:
    """Whether an object is part of the message that an open session is for, and its bytes are there already."""
    with state.session() as session:
        roots = session.scalars(select(RootModel.root_object_id).where(RootModel.session_id == session_id)).all()
        there = session.scalar(select(StoredObject.is_available).where(StoredObject.object_id == object_id))
        trees = [tree_of(state, str(root)) for root in roots] if there else []
    return any(part.object_id == object_id for tree in trees if tree is not None for part in _from_the_top(tree))
