"""The data holders' public keys, and the nodes that the state has for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedhead.server.link.nodes import create_node, delete_node, registrations

log = logging.getLogger("fedhead")


class Registry:
    """Which keys may connect.

    Attributes
    ----------
    nodes : dict
        Public key in PEM -> its node.
    names : dict
        Node -> the data holder's name.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self.nodes: dict[bytes, int] = {}
        self.names: dict[int, str] = {}
        self._here: set[int] = set()

    def update(self, keys: Mapping[str, bytes]) -> None:
        """Make the state's nodes those of the keys; what can't be is one line in the log.

        Parameters
        ----------
        keys : mapping
            Name of each data holder -> its public key in PEM.

        Notes
        -----
        Guarantee: a key that is not among `keys` can't connect afterwards, also where the database fails.
        """
        wanted = set(keys.values())
        self.nodes = {key: node for key, node in self.nodes.items() if key in wanted}
        known = {found.key: found for found in registrations(self._state)}
        nodes: dict[bytes, int] = {}
        for name, key in keys.items():
            found = known.get(key)
            if found is None:
                nodes[key] = create_node(self._state, key)
                log.info("data holder %s: registered", name)
            elif found.deleted:
                log.error(
                    "data holder %s: its key was taken away before, and can't be registered again. Ask for a new key: "
                    'remove its two key files and run "fedhead keys" for it.', name,
                )  # fmt: skip
            else:
                nodes[key] = found.node
        self.names = {node: name for name, key in keys.items() if (node := nodes.get(key)) is not None}
        self.nodes = nodes
        for key, found in known.items():
            if key not in wanted and not found.deleted:
                delete_node(self._state, found.node)
                log.info("a data holder's key was taken away; its node %d is deleted", found.node)

    def name_of(self, key: bytes) -> str | None:
        """The data holder that a public key, in PEM, is registered for."""
        node = self.nodes.get(key)
        return None if node is None else self.names.get(node)

    def online(self) -> tuple[int, int]:
        """How many data holders are connected, and how many are registered."""
        here = set(self.nodes.values())
        return sum(found.online for found in registrations(self._state) if found.node in here), len(here)

    def tell(self) -> None:
        """Say in the log who has come and who has gone since the last call; a restarted holder is seen if it was away.

        Notes
        -----
        A holder that leaves says so, and is gone at once; one that dies or is cut off is gone when it was not heard
        for as long as the server waits for a sign of life.
        """
        names = dict(self.names)
        here = {found.node for found in registrations(self._state) if found.online} & set(names)
        for node in sorted(here - self._here, key=names.__getitem__):
            log.info("data holder %s: connected", names[node])
        for node in sorted((self._here & set(names)) - here, key=names.__getitem__):
            log.warning("data holder %s: gone", names[node])
        self._here = here
