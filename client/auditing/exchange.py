"""A whole exchange of a data holder, from the request to what leaves: `fedhead.client.app.answer`, as a holder runs it.

The experiment watches the trainer. What stands between it and the network is looked at here: that the request's noise
is the noise that is drawn, that the head which leaves is the trainer's, that nothing beside it depends on records, and
that the ledger was charged for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedhead.client.admission import Admission, event_of_request
from fedhead.client.app import answer, step_plan
from fedhead.client.auditing.canaries import flat, load_flat
from fedhead.client.auditing.watching import noise_scale
from fedhead.client.training import CHUNK
from fedhead.client.workplace import Workplace
from fedhead.common import protocol
from fedhead.common.preparation import Labelled
from fedhead.common.privacy.audit.findings import Check
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.protocol import Asked, RoundRequest

FloatArray = NDArray[np.float64]

HOLDER = "audited"


@dataclass(frozen=True)
class Exchanged:
    """What rounds on different records let out.

    Attributes
    ----------
    residuals : float64 array, shape (T, P)
        Of the round without records, in standard deviations of the noise that the request asks for.
    beside : str
        What differs between two replies beside their heads; "" if nothing.
    head_error : float, >= 0
        Furthest that a number which left was from the trainer's, as float32 has it: 0 if all is right.
    charged : str
        What the ledger holds instead of the requests' events; "" if it holds those.
    """

    residuals: FloatArray
    beside: str
    head_error: float
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
                "exchange-charged",
                "What the ledger was charged, against what was asked",
                not self.charged,
                self.charged or "the same",
                "Each round was charged as what it released.",
                "The ledger was charged with something else than what was released.",
            ),
        ]


def exchange(
    place: Callable[[Admission], Workplace], request: RoundRequest, data: Sequence[Labelled], folder: Path
) -> Exchanged:
    """Ask for one round after the other, each on other records, the last time on none.

    Parameters
    ----------
    place : callable
        Admission -> the holder's workplace, with an initial head and the trainer that production makes.
    request : RoundRequest
        Of the recipe.
    data : sequence of Labelled
        At least two data sets.
    folder : Path
        For a ledger that is thrown away.
    """
    seeded = request.seed is not None
    with Ledger(folder / "ledger.sqlite") as ledger:
        workplace = place(Admission(ledger, fingerprints={HOLDER: "audit"}, simulated=seeded))
        trainer, start = workplace.trainer, flat(workplace.trainable)
        gradients: list[torch.Tensor] = []
        optimizer = trainer.optimizer_of(request.optimizer)
        optimizer.attach_step_hook(lambda one: gradients.append(torch.cat([p.grad.flatten() for p in one.params])))
        replies, error = [], 0.0
        try:
            for number, records in enumerate([*data, data[0].slice(0, 0)], 1):
                gradients.clear()
                load_flat(workplace.trainable, start.double().numpy())
                asked = request.model_copy(update={"round": number})
                arrays = protocol.to_arrays(workplace.trainable.trained())
                content, _ = answer(workplace, HOLDER, records, Asked(asked, arrays, f"{number:064x}", None))
                error = max(error, _head_error(content, flat(workplace.trainable)))
                replies.append(_beside(content))
        finally:
            optimizer.step_hook = None
        charged = [entry.event for entry in ledger.entries(HOLDER) if entry.kind == "reserve"]
    plan = step_plan(request, request.declared_records, CHUNK)
    scale = noise_scale(plan, workplace.streams(request, HOLDER))
    found = torch.stack(gradients).double().numpy() if gradients else np.zeros((0, len(start)))
    expected = [event_of_request(request).to_json()] * len(replies)
    return Exchanged(
        residuals=found * plan.divisor / scale,
        beside=next((f"reply {i + 1} differs" for i, one in enumerate(replies) if one != replies[0]), ""),
        head_error=error,
        charged="" if charged == expected else f"{len(charged)} rows, other than those of {len(expected)} rounds",
    )


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
