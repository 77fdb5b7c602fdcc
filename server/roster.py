"""Who takes part in a round: the holders that are connected and ready, at which node.

In a simulation everybody always is. In a deployment holders come late, go, hang and come back:

    registered   its public key is in server.toml; its name is the key file's, whatever a node says of itself
    connected    its node answers the link
    greeted      it was sent the run's first message, and is opening its records; that may take long, once
    present      it has answered, and is asked in the rounds
    missed       it didn't answer a round in time: it is greeted again, and asked again once it has answered

So a holder that hangs costs one deadline, not one a round, and nobody waits for a late one except at the beginning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedhead.common import progress, protocol
from fedhead.common.errors import RunError
from fedhead.common.privacy.ledger import Mark
from fedhead.common.refusals import TEXTS
from fedhead.server.marks import newest

log = logging.getLogger("fedhead.server")

LOOK_SECONDS = 0.5
AGAIN_SECONDS = 20.0  # after a holder has said that it isn't ready
LOST_SECONDS = 2.0  # after the link has said that a greeting, or its node, was lost


class Roster(Protocol):
    """Who can be asked."""

    def present(self, wanted: Sequence[str]) -> Mapping[str, int]:
        """Holder -> node of those of `wanted` that can be asked now; may wait for them."""

    def missed(self, names: Collection[str]) -> None:
        """These did not answer a round in time."""

    def marks(self) -> Mapping[str, Mark]:
        """Holder -> where its ledger stands, as its answers outside of rounds said."""


@dataclass(frozen=True)
class Everybody:
    """All holders, always: a simulation, or a run that nobody may leave.

    Attributes
    ----------
    nodes : mapping of str to int
        Holder -> node.
    """

    nodes: Mapping[str, int]

    def present(self, wanted: Sequence[str]) -> Mapping[str, int]:
        """All that are wanted."""
        return {name: self.nodes[name] for name in wanted}

    def missed(self, names: Collection[str]) -> None:
        """Ask them again all the same."""

    def marks(self) -> Mapping[str, Mark]:
        """None: what is spent in a simulation is spent in its own ledger."""
        return {}


@dataclass(frozen=True)
class Registered:
    """A node whose key the coordinator knows.

    Attributes
    ----------
    node : int
    name : str
        The holder's, from its key file in server.toml.
    online : bool
    """

    node: int
    name: str
    online: bool


class Callers:
    """Holders of a deployment, who come and go.

    Parameters
    ----------
    grid : Grid
    registered : callable
        Gives all registered nodes, and whether each is connected.
    least : int
        Fewest holders that a round is begun with.
    patience : float
        Seconds to wait for them.
    greeting_seconds : float
        How long a greeting is valid: opening the records and computing their features must fit in, or is finished by
        the next greeting.
    """

    def __init__(
        self,
        grid: Grid,
        registered: Callable[[], Iterable[Registered]],
        least: int,
        patience: float,
        greeting_seconds: float,
    ) -> None:
        self.grid, self.registered = grid, registered
        self.least, self.patience, self.greeting_seconds = least, patience, greeting_seconds
        self.turned_away: dict[str, str] = {}
        """Holder -> why it doesn't take part, in fixed words."""
        self._present: dict[str, int] = {}
        self._greeted: dict[int, tuple[str, float]] = {}  # node -> the greeting's message, and when it is void
        self._later: dict[int, float] = {}  # node -> when to greet it again
        self._slow: set[int] = set()  # nodes whose greeting was void before they answered: not waited for again
        self._begun = False
        self._marks: dict[str, Mark] = {}

    def marks(self) -> Mapping[str, Mark]:
        """Holder -> where its ledger stands, as its answers to greetings said."""
        return self._marks

    def names(self) -> list[str]:
        """Holders that are present, sorted."""
        return sorted(self._present)

    def present(self, wanted: Sequence[str]) -> Mapping[str, int]:
        """Those of `wanted` that are present; waits until there are enough, at the beginning for all that are greeted.

        Raises
        ------
        RunError
            Too few came within the patience, or every registered holder has said that it can't take part.
        """
        until = time.monotonic() + self.patience
        while True:
            everybody = self._look()
            found = {name: self._present[name] for name in wanted if name in self._present}
            late = time.monotonic() > until  # one that keeps silent must not keep the others from beginning
            if len(found) >= self.least and (self._begun or late or set(self._greeted) <= self._slow):
                if not self._begun:
                    progress.advance("holders", len(found), len(found))  # nobody is waited for any more
                self._begun = True
                return found
            why = "; ".join(f"{name}: {text}" for name, text in sorted(self.turned_away.items()))
            if everybody and set(self.turned_away) >= everybody:
                raise RunError(f"no holder can take part ({why}). Their own logs say more.")
            if late:
                raise RunError(
                    f"{len(found)} of at least {self.least} holders were there within {self.patience:.0f} s"
                    f"{f' ({why})' if why else ''}. Start the others, or lower least_holders."
                )
            progress.advance("holders", len(found), max(self.least, len(found) + len(self._greeted)), why)
            time.sleep(LOOK_SECONDS)

    def missed(self, names: Collection[str]) -> None:
        """Greet these again before they are asked again."""
        for name in names:
            log.warning("%s has not answered; it is asked again once it does", name)
            self._present.pop(name, None)

    def _look(self) -> set[str]:
        """See who is connected, greet who is new, and hear who has answered; gives the names of all registered."""
        known = {one.node: one for one in self.registered()}
        online = {node for node, one in known.items() if one.online}
        for name, node in list(self._present.items()):
            if node not in online:
                log.warning("%s is gone", name)
                del self._present[name]
        for node in set(self._greeted) - online:
            del self._greeted[node]
        self._hear(known)
        self._greet(online)
        return {one.name for one in known.values()}

    def _greet(self, online: set[int]) -> None:
        now, there = time.monotonic(), set(self._present.values())
        for node, (_, void) in list(self._greeted.items()):
            if now > void:
                del self._greeted[node]
                self._slow.add(node)
        due = [node for node in sorted(online - there - set(self._greeted)) if now >= self._later.get(node, 0.0)]
        messages = [Message(RecordDict(), node, MessageType.QUERY, ttl=self.greeting_seconds) for node in due]
        if messages:
            for node, sent in zip(due, self.grid.push_messages(messages), strict=True):
                self._greeted[node] = sent, now + self.greeting_seconds

    def _hear(self, known: Mapping[int, Registered]) -> None:
        """Take in who has answered its greeting, under the name that its key has."""
        open_ = [message for message, _ in self._greeted.values()]
        for reply in self.grid.pull_messages(open_) if open_ else ():
            node = next((node for node, (sent, _) in self._greeted.items() if sent == _answered(reply)), None)
            if node is None or node not in known:
                continue
            del self._greeted[node]
            name = known[node].name
            if reply.has_error() and reply.error.code not in TEXTS:  # the link's word: the holder has said nothing
                self._slow.add(node)
                self._later[node] = time.monotonic() + LOST_SECONDS
                continue
            said, mark = protocol.read_holder(reply), protocol.read_mark(reply)
            if mark is not None and said == name:  # who has another's key by mistake must not say where its ledger is
                self._marks = newest(self._marks, {name: mark})
            text = _fault(reply, name)
            if text:
                if self.turned_away.get(name) != text:
                    log.warning("%s can't take part: %s", name, text)
                self.turned_away[name], self._later[node] = text, time.monotonic() + AGAIN_SECONDS
                continue
            log.info("%s is there", name)
            self.turned_away.pop(name, None)
            self._present[name] = node


def _answered(reply: Message) -> str:
    return str(reply.metadata.reply_to_message_id)


def _fault(reply: Message, name: str) -> str:
    """Why the holder of this name doesn't take part by its answer to the greeting; empty where it does."""
    if reply.has_error():
        _, code, text = protocol.read_refusal(reply)
        return f"{code} {text}"
    return "" if protocol.read_release(reply)[0] == name else "its holder.toml has another name than its key file"
