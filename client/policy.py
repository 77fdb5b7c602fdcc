"""The holder's policy: what a request may ask for, decided from the request and the limits alone.

    OTHER_UNIT            the privacy unit is not one that the limits accept
    OTHER_TASK            the kind of task isn't
    OTHER_BACKBONE        the backbone's digest isn't
    NO_PRIVACY            no noise, though nobody else adds it, or though there is a budget
    LARGE_CLIPPING_NORM   one unit may move the sum by more than the limit
    LITTLE_NOISE          less noise than the limit
    NO_METRICS            a count of correct answers that may not leave, or with less noise than the limit

The first of these that applies is the answer. Neither records nor ledger nor time enter it, so that a refusal says
nothing about the data; whether the budget allows the request is the ledger's answer, after this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhead.common.refusals import (
    LARGE_CLIPPING_NORM,
    LITTLE_NOISE,
    NO_METRICS,
    NO_PRIVACY,
    OTHER_BACKBONE,
    OTHER_TASK,
    OTHER_UNIT,
    refusal,
)

if TYPE_CHECKING:
    from fedhead.common.config.limits import Limits
    from fedhead.common.round_request import RoundRequest

_ALGORITHM = "sha256:"  # limits may say it, a request never does


def check_request(request: RoundRequest, limits: Limits, *, budgeted: bool) -> None:
    """Refuse a request that goes beyond a holder's limits, before any record is read.

    Parameters
    ----------
    request : RoundRequest
        As it arrived.
    limits : Limits
        The holder's own.
    budgeted : bool
        Whether the holder has a budget; a release without privacy would cost more than any.

    Raises
    ------
    Refused
        With the first code that applies, in the order of this module's table.

    Notes
    -----
    Guarantee: a request that passes breaks none of the limits that bear on requests. Comparisons are written so that a
    NaN breaks them. A pure function: equal requests under equal limits get equal answers.

    Under the unit "holder" a request without noise is as it should be: the server clips and noises the whole update,
    so that noise and clipping norm of records do not apply.
    """
    if request.unit not in limits.units:
        raise refusal(OTHER_UNIT)
    if limits.tasks is not None and request.task not in limits.tasks:
        raise refusal(OTHER_TASK)
    if limits.backbones is not None and _digest(request.backbone) not in map(_digest, limits.backbones):
        raise refusal(OTHER_BACKBONE)
    if request.mechanism == "none":
        if budgeted or request.unit != "holder":
            raise refusal(NO_PRIVACY)
    else:
        _check_noise(request, limits)
    _check_metrics(request, limits)


def _check_noise(request: RoundRequest, limits: Limits) -> None:
    most, least = limits.clipping_norm_max, limits.noise_multiplier_min
    if most is not None and not request.clipping_norm <= most:
        raise refusal(LARGE_CLIPPING_NORM)
    if least is not None and not request.noise_multiplier >= least:
        raise refusal(LITTLE_NOISE)


def _check_metrics(request: RoundRequest, limits: Limits) -> None:
    noise, release = request.metrics_noise, limits.release
    if noise is not None and not (release.metrics and noise >= release.metrics_noise_multiplier_min):
        raise refusal(NO_METRICS)


def _digest(text: str) -> str:
    return text.removeprefix(_ALGORITHM)
