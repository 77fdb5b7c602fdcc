"""The fixed codes and texts of a refusal: all that a server learns about its reason.

They depend on policy, ledger and request only, never on the records.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedhead.common.errors import Refused

INVALID_REQUEST = 1001
OTHER_MODEL = 1002
NOT_READY = 1003
BEYOND_BUDGET = 1010
BEYOND_RUN = 1011
BEYOND_PLAN = 1012
LITTLE_NOISE = 1013
LARGE_CLIPPING_NORM = 1014
OTHER_TASK = 1015
OTHER_BACKBONE = 1016
OTHER_UNIT = 1017
NO_METRICS = 1018
NO_PRIVACY = 1019
STALE_ROUND = 1020
CHANGED_ROUND = 1021
OLD_LEDGER = 1022
NO_LEDGER = 1023
TRAINING_FAILED = 1099
TEXTS: Mapping[int, str] = {
    INVALID_REQUEST: "the request is not valid",
    OTHER_MODEL: "the request is for another backbone or head",
    NOT_READY: "the holder's records can't be opened; its own log says why",
    BEYOND_BUDGET: "the holder's privacy budget does not allow it",
    BEYOND_RUN: "it is beyond what the holder allows one run to spend",
    BEYOND_PLAN: "it is beyond the plan that the run began with",
    LITTLE_NOISE: "the noise is less than the holder allows",
    LARGE_CLIPPING_NORM: "the clipping norm is larger than the holder allows",
    OTHER_TASK: "the holder does not allow this kind of task",
    OTHER_BACKBONE: "the holder does not allow this backbone",
    OTHER_UNIT: "the holder does not accept this privacy unit",
    NO_METRICS: "the holder does not release such metrics",
    NO_PRIVACY: "the holder does not train without privacy",
    STALE_ROUND: "the round is over",
    CHANGED_ROUND: "the round was asked before, with another request",
    OLD_LEDGER: "the holder's ledger is older than one that was seen; its own log says more",
    NO_LEDGER: "the holder's ledger can't be used; its own log says why",
    TRAINING_FAILED: "training failed; the holder's own log says why",
}

UNSPENT = frozenset(TEXTS) - {NO_LEDGER, TRAINING_FAILED, STALE_ROUND, CHANGED_ROUND}
"""Codes of a round that nothing was ever charged for. Training fails after the charge, a ledger may, and a round that
is over, or was asked otherwise, was charged then."""


def refusal(code: int) -> Refused:
    """A refusal with its fixed text."""
    return Refused(code, TEXTS[code])
