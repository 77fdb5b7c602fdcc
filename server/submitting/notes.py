"""What a reader of a deployed run's result should know."""

from __future__ import annotations

import math

from fedhead.common.config import RunConfig
from fedhead.common.results import Result
from fedhead.server.rounds import ABSENT, SILENT


def notes_of(config: RunConfig, result: Result) -> list[str]:
    """Sentences for the result and its report."""
    notes = [
        "This run was deployed: the figures are from the rounds that the server saw. What a holder has spent is what "
        "its own ledger says."
    ]
    if config.privacy.unit == "holder":
        notes.append(
            "What is protected is each holder's whole update, and the server adds the noise: it sees every update and "
            "is trusted to do so. Which holders were asked and answered is not hidden."
        )
    else:
        notes.append("Each holder drew its noise on its own machine; no seed was used.")
    seeded = sorted(row["holder"] for row in result.privacy if math.isinf(row["epsilon"]))
    if seeded:
        notes[-1] = (
            f"{', '.join(seeded)} allowed noise from the recipe's seed (limits.allow_seeded_noise): whoever has the "
            "recipe can take it off, so that epsilon is infinite. That is for tests alone."
        )
    if config.privacy.unit == "record" and config.privacy.person is not None:
        notes.append("Every epsilon here is for one record. Somebody with several records is protected less.")
    refused = [row for one in result.rounds for row in one["refused"]]
    away = sum(row["text"] in (ABSENT, SILENT) for row in refused)
    if away:
        notes.append(f"{away} times a holder was away, or too late for the round's deadline.")
    if len(refused) > away:
        notes.append(f"{len(refused) - away} times a holder refused or failed; the rounds say who, and why in code.")
    return notes
