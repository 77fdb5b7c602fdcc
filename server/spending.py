"""What every holder spent, as the server knows it: the events that holders say they released.

The holder's own ledger is the authority; this is what a run's result shows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedhead.common.config import RunConfig
from fedhead.common.privacy.accounting import Spent, epsilon
from fedhead.common.privacy.events import Event, from_json
from fedhead.server.rounds import RoundRecord

ADJACENCY: Mapping[str, str] = {
    "record": "add or remove one record",
    "person": "add or remove one person, with all their records at a holder",
    "holder": "add or remove one holder",
}
ALL_ROUNDS = 1000  # longest run whose every round gets a figure, because each composes all rounds before it


def account(
    history: Sequence[RoundRecord], config: RunConfig, shown: Collection[int]
) -> tuple[list[float | None], list[dict[str, Any]]]:
    """Epsilon over all rounds: every event that a holder released counts, composed over all rounds, never one round's.

    Holders with the same history of events share one computation.

    Parameters
    ----------
    history : sequence of RoundRecord
    config : RunConfig
    shown : collection of int
        Rounds after which epsilon is wanted. A short full-batch run gives it after every round; for Poisson sampling
        one figure takes up to a second.

    Returns
    -------
    list of float or None
        Largest epsilon over the holders after each round; None where it wasn't wanted.
    list of dict
        One entry a holder, as in result.json.
    """
    delta = config.privacy.delta
    every = config.privacy.mechanism != "poisson" and len(history) <= ALL_ROUNDS
    # Distinct histories, each as its last event and the one before it; a holder's is known by its index.
    histories: list[tuple[int, Event | None]] = [(0, None)]
    following: dict[tuple[int, str], int] = {}
    spent: dict[int, Spent] = {}
    at: dict[str, int] = {}
    rounds: dict[str, list[int]] = {}
    path: list[float | None] = []
    for record in history:
        for holder, texts in record.events.items():
            for text in texts:
                step = (at.get(holder, 0), text)
                if step not in following:
                    following[step] = len(histories)
                    histories.append((step[0], from_json(text)))
                at[holder] = following[step]
                rounds.setdefault(holder, []).append(record.round)
        if not every and record.round not in shown and record is not history[-1]:
            path.append(None)
            continue
        for index in set(at.values()) - spent.keys():
            spent[index] = epsilon(_events(histories, index), delta)
        path.append(max((spent[index].epsilon for index in at.values()), default=0.0))
    entries = [
        {
            "holder": holder,
            "unit": config.privacy.unit,
            "adjacency": ADJACENCY[config.privacy.unit],
            "mechanism": config.privacy.mechanism,
            "accountant": spent[index].accountant,
            "epsilon": spent[index].epsilon,
            "delta": delta,
            "events": [
                event.to_row(number) for event, number in zip(_events(histories, index), rounds[holder], strict=True)
            ],
        }
        for holder, index in sorted(at.items())
    ]
    return path, entries


def _events(histories: Sequence[tuple[int, Event | None]], index: int) -> list[Event]:
    """The events of a history, in order."""
    found: list[Event] = []
    while index:
        index, event = histories[index]
        assert event is not None
        found.append(event)
    return found[::-1]
