"""A whole exchange of a data holder, from the request to what leaves: `fedhead.client.app.answer`, as a holder runs it.

The experiment watches the trainer. What stands between it and the network is looked at here: that the request's noise
is the noise that is drawn over the sum of the holder's records, that the head which leaves is the trainer's, that
nothing beside it depends on records, that a repeated request gets the same reply, and that the ledger was charged once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedhead.client.admission import Admission, event_of_request
from fedhead.client.app import answer, step_plan
from fedhead.client.auditing.canaries import flat, load_flat
from fedhead.client.auditing.reference import Reference
from fedhead.client.auditing.watching import Seen, WatchedTrainer, noise_scale, replay_error
from fedhead.client.training import CHUNK, StepPlan
from fedhead.client.workplace import Workplace
from fedhead.common import protocol
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.audit.findings import Check
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.protocol import Asked, pack
from fedhead.common.round_request import RoundRequest

FloatArray = NDArray[np.float64]

HOLDER = "audited"


@dataclass(frozen=True)
class Exchanged:
    """What rounds on different records let out.

    Attributes
    ----------
    residuals : float64 array, shape (T, P)
        Of all rounds, with records and without: what was released beyond the reference's clipped sums, in standard
        deviations of the noise that the request asks for. Independent and standard normal if all is right; inf where a
        round took other steps than it was asked for.
    replay_error : float, >= 0
        The largest of all rounds; see `watching.replay_error`.
    beside : str
        What differs between two replies beside their heads; "" if nothing.
    head_error : float, >= 0
        Furthest that a number which left was from the trainer's, as float32 has it: 0 if all is right.
    repeated : str
        What a request that came twice changed; "" if nothing.
    charged : str
        What the ledger holds instead of the requests' events; "" if it holds those.
    """

    residuals: FloatArray
    replay_error: float
    beside: str
    head_error: float
    repeated: str
    charged: str

    def checks(self) -> list[Check]:
        """The verdicts without chance."""
        return [
            _check(
                "exchange-beside",
                "What leaves beside the head",
                not self.beside,
                self.beside or "the same for different records",
                "Beside the noised head, a reply is the same whatever the records are.",
                "Something beside the noised head differs with the records: it leaves without noise.",
            ),
            _check(
                "exchange-head",
                "The head that leaves, against the trainer's",
                self.head_error == 0,
                f"{self.head_error:.2g} apart",
                "The head that leaves is the one that noised sums made, number for number.",
                "The head that leaves isn't the one that noised sums made: something else leaves with it.",
            ),
            _check(
                "exchange-repeated",
                "A request that comes twice",
                not self.repeated,
                self.repeated or "the same reply, charged once",
                "A repeated request gets the reply that was made before, and costs nothing.",
                "A repeated request gets another reply than before, or is charged again: a second release of a round.",
            ),
            _check(
                "exchange-charged",
                "What the ledger was charged, against what was asked",
                not self.charged,
                self.charged or "the same",
                "Each round was charged as what it released.",
                "The ledger was charged with something else than what was released.",
            ),
        ]


def exchange(
    place: Callable[[Admission], Workplace],
    reference: Reference,
    request: RoundRequest,
    data: Sequence[Labelled],
    folder: Path,
) -> Exchanged:
    """Ask for one round after the other, each on other records and twice, the last time on none.

    Parameters
    ----------
    place : callable
        Admission -> the holder's workplace, with an initial head and the trainer that production makes.
    reference : Reference
        Of the same trainable.
    request : RoundRequest
        Of the recipe.
    data : sequence of Labelled
        At least two data sets.
    folder : Path
        For a ledger that is thrown away.

    Notes
    -----
    What is released is held to these records and this request, whatever records and plan the trainer was handed.
    """
    plan = step_plan(request, request.declared_records, CHUNK)
    with Ledger(folder / "ledger.sqlite") as ledger:
        admission = Admission(ledger, fingerprints={HOLDER: "audit"}, simulated=request.seed is not None)
        placed = place(admission)
        trainer = WatchedTrainer(placed.trainer)
        workplace = replace(placed, trainer=trainer)
        start = flat(workplace.trainable)
        scale = noise_scale(plan, workplace.streams(request, HOLDER))
        replies: list[dict[str, Any]] = []
        residuals: list[FloatArray] = []
        error, replayed, repeated = 0.0, 0.0, ""
        for number, records in enumerate([*data, data[0].slice(0, 0)], 1):
            load_flat(workplace.trainable, start.double().numpy())
            arrays = protocol.to_arrays(workplace.trainable.trained())
            asked = Asked(request.model_copy(update={"round": number}), arrays, f"{number:064x}", None)
            trainer.seen.clear()
            content, _ = answer(workplace, HOLDER, records, asked)
            residuals.append(_residuals(reference, trainer.seen, records, plan, scale))
            for seen in trainer.seen:
                replayed = max(replayed, replay_error(seen, plan, [p.shape for p in trainer.parameters]))
                as_asked = torch.equal(seen.received, start)
                error = max(error, _head_error(content, seen.left) if as_asked else math.inf)
            replies.append(_beside(content))
            again, _ = answer(workplace, HOLDER, records, asked)
            if pack(again) != pack(content):
                repeated = repeated or f"reply {number} is another the second time"
        charged = [entry.event for entry in ledger.entries(HOLDER) if entry.kind == "reserve"]
    if len(charged) > len(replies):
        repeated = repeated or f"{len(charged)} charges for {len(replies)} rounds"
    expected = [event_of_request(request).to_json()] * len(replies)
    return Exchanged(
        residuals=np.concatenate(residuals),
        replay_error=replayed,
        beside=next((f"reply {i + 1} differs" for i, one in enumerate(replies) if one != replies[0]), ""),
        head_error=error,
        repeated=repeated,
        charged="" if charged == expected else f"{len(charged)} rows, other than those of {len(expected)} rounds",
    )


def _residuals(
    reference: Reference, rounds: Sequence[Seen], records: Labelled, plan: StepPlan, scale: float
) -> FloatArray:
    """Of the steps of one round; a row of inf for one that wasn't taken as asked."""
    if len(rounds) != 1 or len(rounds[0].gradients) != plan.local_steps:
        return np.full((1, reference.parameters), np.inf)
    (seen,), found = rounds, []
    for step, release in enumerate(seen.releases(plan)):
        index = None
        if plan.mechanism == "poisson":
            sample = seen.samples.get(step, np.empty(0, dtype=np.int64))
            index = torch.from_numpy(sample[sample < len(records)])
        head = seen.heads[step].double().numpy()
        total = reference.clipped_sum(
            head, records.features, records.targets, plan.clipping_norm, index, seen.masks[step]
        )
        found.append((release - total) / scale)
    return np.stack(found)


def _head_error(content: RecordDict, left: torch.Tensor) -> float:
    arrays: ArrayRecord = content.array_records[protocol.ARRAYS]
    sent = np.concatenate([array.numpy().ravel() for array in arrays.values()])
    made = left.float().numpy()
    if sent.shape != made.shape or not np.isfinite(sent).all():
        return float("inf")
    return float(np.abs(sent - made).max(initial=0.0))


def _beside(content: RecordDict) -> dict[str, Any]:
    """All of a reply but the numbers of its head."""
    return {
        name: [(key, array.shape, array.dtype) for key, array in record.items()]
        if isinstance(record, ArrayRecord)
        else dict(record.items())
        for name, record in content.items()
    }


def _check(name: str, title: str, passed: bool, figure: str, good: str, bad: str) -> Check:
    return Check(name, title, passed, figure, good if passed else bad)
