"""The door for data holders: the Fleet routes alone, over TLS, for registered keys alone.

Some of the routes are our own. Pulling waits for a message. Activating lets a node that was killed come back at once,
because its key is proved. Pushing, fetching and confirming look at whose message it is; Flower's own routes don't.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections import defaultdict
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fedhead.server.link.bell import Bell, heard
from fedhead.server.link.flower import (
    PROTOBUF_REQUEST_DEPENDENCY,
    PUBLIC_KEY_HEADER,
    ActivateNodeRequest,
    ActivateNodeResponse,
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    NodeAuthMiddleware,
    ProtobufRoute,
    ProtobufTranslationMiddleware,
    PullMessagesRequest,
    PullMessagesResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    PushObjectRequest,
    PushObjectResponse,
    fleet_handlers,
    fleet_router,
    http_error_translator,
)
from fedhead.server.link.gate import GONE, TOO_LARGE, Figures, Gate
from fedhead.server.link.post import MOST_OBJECTS, Post, objects_of
from fedhead.server.link.proof import node_proof
from fedhead.server.link.registry import Registry

PREFIX: Final = "/v1/fleet/"
ROUTES: Final = frozenset({
    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab",
    "push-object", "pull-object", "confirm-message-received",
})  # fmt: skip
NOT_YOURS: Final = "not this node's message"

_HOLD: Final = 20.0  # seconds; a node's own limit for an answer is 30
_LOOK: Final = 1.0  # seconds between looks for whether the node still waits
_PATHS: Final = frozenset(PREFIX + route for route in ROUTES)


def make_public(inner: FastAPI, registry: Registry, bell: Bell, most_bytes: int, figures: Figures | None) -> Gate:
    """The application of the public port.

    Parameters
    ----------
    inner : FastAPI
        Flower's own application; its state is shared.
    registry : Registry
        The keys that may connect.
    bell : Bell
        Rung when there are messages.
    most_bytes : int
        Largest body, and largest answer in all.
    figures : optional
        Gets every request.
    """
    state = inner.state.linkstate_factory.state()
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )  # fmt: skip
    app.state.linkstate_factory = inner.state.linkstate_factory
    app.state.enable_supernode_auth = True
    app.include_router(_routes(state, bell, Post(state, most_bytes)))
    app.include_router(fleet_router)  # after our own: the first route that fits is taken
    return Gate(
        app, _PATHS.__contains__, most_bytes, proof=node_proof(lambda: registry.nodes), caller=PUBLIC_KEY_HEADER,
        name_of=lambda caller: registry.name_of(b64decode(caller)), figures=figures,
    )  # fmt: skip


def _whole(request: Request) -> Request:
    """The request itself: FastAPI injects one bare Request alone, and ProtobufRoute takes that."""
    return request


def _routes(state: Any, bell: Bell, post: Post) -> APIRouter:
    router = APIRouter(prefix=PREFIX.rstrip("/"), route_class=ProtobufRoute)
    turns: dict[int, int] = defaultdict(int)

    @router.post("/activate-node")
    def activate_node(request: Annotated[ActivateNodeRequest, PROTOBUF_REQUEST_DEPENDENCY]) -> ActivateNodeResponse:
        node = state.get_node_id_by_public_key(request.public_key)
        if node is not None:
            turns[node] += 1  # whoever waited for messages with this key is gone
            state.deactivate_node(node)
            post.settle(node)
        return fleet_handlers.activate_node(request=request, state=state)

    @router.post("/pull-messages")
    async def pull_messages(
        request: Annotated[PullMessagesRequest, PROTOBUF_REQUEST_DEPENDENCY],
        http: Annotated[Request, Depends(_whole)],
    ) -> PullMessagesResponse:
        node, gone = request.node.node_id, http.scope[GONE]
        turns[node] += 1
        turn, end = turns[node], asyncio.get_running_loop().time() + _HOLD
        await run_in_threadpool(post.settle, node)
        while turns[node] == turn and not bell.stopping and not gone.is_set():
            ticket = bell.ticket()
            found = await run_in_threadpool(
                fleet_handlers.pull_messages, request=request, state=state, store=state.object_store
            )
            if found.messages_list:
                post.delivered(node, found.message_object_trees)
                return found
            while not await heard(ticket, _LOOK) and turns[node] == turn and not gone.is_set():
                if asyncio.get_running_loop().time() >= end:
                    return PullMessagesResponse()
        return PullMessagesResponse()

    @router.post("/push-messages")
    def push_messages(request: Annotated[PushMessagesRequest, PROTOBUF_REQUEST_DEPENDENCY]) -> PushMessagesResponse:
        node = request.node.node_id
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise HTTPException(403, NOT_YOURS)
        if not post.may_answer(node, request.messages_list[0].metadata):
            raise HTTPException(403, NOT_YOURS)
        if sum(1 for _ in objects_of(request.message_object_trees[0])) > MOST_OBJECTS:
            raise HTTPException(413, TOO_LARGE)
        if request.message_object_trees[0].object_id != request.messages_list[0].metadata.message_id:
            raise HTTPException(403, NOT_YOURS)  # the objects of another answer could follow without end
        name = request.messages_list[0].metadata.message_id
        post.answered(node, request.messages_list[0].metadata.reply_to_message_id)
        begun = post.begun(name)
        if begun is not None:  # the answer to an earlier announcement was lost, or the server didn't take an object
            session, missing = begun
            return PushMessagesResponse(results={name: 0}, objects_to_push=missing, session_id=session)
        return fleet_handlers.push_messages(request=request, state=state)

    @router.post("/push-object")
    def push_object(request: Annotated[PushObjectRequest, PROTOBUF_REQUEST_DEPENDENCY]) -> PushObjectResponse:
        node, name, content = request.node.node_id, request.object_id, request.object_content
        if not post.may_bring(node, name, len(content)):
            raise HTTPException(413, TOO_LARGE)
        answer = fleet_handlers.push_object(request=request, state=state)
        if answer.stored:
            post.brought(node, name)
        elif post.has_brought(node, request.session_id, name, content):  # Flower takes an object once
            return PushObjectResponse(stored=True)
        return answer

    @router.post("/pull-object")
    def pull_object(request: Annotated[PullObjectRequest, PROTOBUF_REQUEST_DEPENDENCY]) -> PullObjectResponse:
        if not post.may_fetch(request.node.node_id, request.object_id):
            raise HTTPException(403, NOT_YOURS)
        return fleet_handlers.pull_object(request=request, state=state)

    @router.post("/confirm-message-received")
    def confirm_message_received(
        request: Annotated[ConfirmMessageReceivedRequest, PROTOBUF_REQUEST_DEPENDENCY],
    ) -> ConfirmMessageReceivedResponse:
        if not post.may_confirm(request.node.node_id, request.message_object_id):
            raise HTTPException(403, NOT_YOURS)
        return fleet_handlers.confirm_message_received(request=request, state=state, store=state.object_store)

    return router
