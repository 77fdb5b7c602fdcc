"""What every holder spent, as the server knows it: the events that holders say they released.

The holder's own ledger is the authority; this is what a run's result shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fedhead.common.config import RunConfig
from fedhead.common.privacy.accounting import Spent, epsilon
from fedhead.common.privacy.events import Event, from_json
from fedhead.server.rounds import RoundRecord


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
        Rounds after which epsilon is wanted; for Poisson sampling one figure takes up to a second.

    Returns
    -------
    list of float or None
        Largest epsilon over the holders after each round; None where it wasn't wanted.
    list of dict
        One entry a holder, as in result.json.
    """
    delta, cheap = config.privacy.delta, config.privacy.mechanism != "poisson"
    histories: list[tuple[Event, ...]] = [()]  # distinct histories; a holder's is known by its index
    following: dict[tuple[int, str], int] = {}
    spent: dict[int, Spent] = {}
    at: dict[str, int] = {}
    rounds: dict[str, list[int]] = {}
    path: list[float | None] = []
    for record in history:
        for holder, text in record.events.items():
            step = (at.get(holder, 0), text)
            if step not in following:
                following[step] = len(histories)
                histories.append((*histories[step[0]], from_json(text)))
            at[holder] = following[step]
            rounds.setdefault(holder, []).append(record.round)
        if not cheap and record.round not in shown and record is not history[-1]:
            path.append(None)
            continue
        for index in set(at.values()) - spent.keys():
            spent[index] = epsilon(histories[index], delta)
        path.append(max((spent[index].epsilon for index in at.values()), default=0.0))
    entries = [
        {
            "holder": holder,
            "unit": config.privacy.unit,
            "adjacency": "add or remove one record",
            "mechanism": config.privacy.mechanism,
            "accountant": spent[index].accountant,
            "epsilon": spent[index].epsilon,
            "delta": delta,
            "events": [event.to_row(number) for event, number in zip(histories[index], rounds[holder], strict=True)],
        }
        for holder, index in sorted(at.items())
    ]
    return path, entries
