"""The nodes in Flower's state: registered keys, and who is taken for connected.

For Flower 1.41 alone, and imported as late, like flower.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.state.schema.linkstate_models import Node as NodeModel
from sqlalchemy import update

_HEARTBEAT_SECONDS: Final = 30.0  # what Flower's own registration writes; a node says its own when it activates
SILENT_SECONDS: Final = 60.0
"""How long a node may keep silent before Flower takes it for gone: two heartbeats."""


@dataclass(frozen=True)
class Registration:
    """A public key that the state knows."""

    node: int
    key: bytes
    online: bool
    deleted: bool


def registrations(state: Any) -> list[Registration]:
    """Every key that was ever registered."""
    return [
        Registration(info.node_id, bytes(info.public_key), info.status == NodeStatus.ONLINE, _deleted(info))
        for info in state.get_node_info(owner_aids=[NOOP_FLWR_AID])
    ]


def _deleted(info: Any) -> bool:
    return bool(info.status == NodeStatus.UNREGISTERED)


def create_node(state: Any, key: bytes) -> int:
    """Register a public key, in PEM.

    Raises
    ------
    ValueError
        The key is, or once was, registered.
    """
    node: int = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, _HEARTBEAT_SECONDS)
    return node


def delete_node(state: Any, node: int) -> None:
    """Take a node away for good."""
    state.delete_node(NOOP_FLWR_AID, node)


def await_heartbeats(state: Any) -> None:
    """Give every node that was connected when the server ended its time for a heartbeat anew; before it is served.

    While the server was away nobody could send one, and afterwards a node takes up to 25 s for its next. Flower would
    meanwhile call it gone, and throw its reply away, one that has arrived included. A node that was connected just
    before, and has ended since, counts as connected for a minute more.
    """
    current = now().timestamp()
    with state.session() as session:
        session.execute(
            update(NodeModel)
            .where(
                NodeModel.status == NodeStatus.ONLINE,
                NodeModel.online_until.between(current - SILENT_SECONDS, current + SILENT_SECONDS),
            )
            .values(online_until=current + SILENT_SECONDS)
        )
