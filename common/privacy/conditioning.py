"""How far a unit's clipped gradient can move with the batch that it is computed in, and weights that keep that small.

A matrix product may add up in another order where its shape is another, so that a new record changes the last bits of
the others' gradients. `lattice.ETA` has room for 2^-11 C of that: for 2^-31 C a record of 2^20, and for more where a
holder's own file promises fewer (limits.most_records). For a linear head with cross-entropy on features of
length 1, in float64, what follows is proved; for anything else nothing is.

Let D be the features, K the outputs, W the weights and the bias together, and u = 2^-53. Between two orders of the same
sums, to first order in u, a record's clipped gradient moves by at most

    2.7 u (D + 8) ||W||    outputs: an inner product of D terms, of features whose length is computed too, is off by at
                           most 1.81 u (D + 3) ||W|| over all outputs (L2); softmax halves that. Its exponents are off
                           by u times their size, at most 2 ||W||, above and below the line: 4 u ||W||. Both orders, the
                           length sqrt 2 of [x, 1], and 33/32 for a person: 2 * 1.4143 * 33/32 * (.905 (D + 3) + 4)
    3 u (K + 10)           softmax: a sum of K terms, exp within two units in the last place, the one-hot row
    u (K + D + 26) C       factor and products: half K of a norm, half D of a length, twice
    200 u (K + 2 D + 22) C instead of that for persons, whose norm comes from a sum that may cancel down to
                           `summing.CANCEL` of its terms: 1024 u (K + 2 D + 2 T + 10) C a person with T > 1 records.
                           Of N records that are covered, at most N / 2^2.5 are such persons
                           (`summing.rounding_records`)

Clipping itself moves nothing apart: it is a projection for a record, and at most 33/32 as steep for a person.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fedhead.common.errors import InputError
from fedhead.common.privacy.lattice import MOST_RECORDS

ALL: Final = 2.0**-11  # in clipping norms: what `lattice.ETA` has for all records together
LONGEST_WEIGHTS: Final = 2.0**20  # in clipping norms; of heads for which nothing is proved

_U: Final = 2.0**-53


def moved(length: float, features: int, outputs: int, clipping_norm: float, *, persons: bool = False) -> float:
    """Most that rounding moves a record's clipped gradient between two batches, for a linear head; see the module.

    Parameters
    ----------
    length : float, >= 0
        L2 norm of weights and bias together.
    features, outputs : int
        D and K.
    clipping_norm : float, > 0
    persons : bool
        Whether the unit is a person, with several records summed before they are clipped.

    Returns
    -------
    float
        L2 norm, in gradient units. Public: no record has a part in it.
    """
    return _U * (2.7 * (features + 8) * length + _fixed(features, outputs, clipping_norm, persons))


def longest_weights(
    features: int, outputs: int, clipping_norm: float, *, persons: bool = False, records: int = MOST_RECORDS
) -> float:
    """The longest weights for which `moved` is within its room, of so many records at most; below 0 where none are."""
    room = ALL / records / _U * clipping_norm - _fixed(features, outputs, clipping_norm, persons)
    return room / (2.7 * (features + 8))


def _fixed(features: int, outputs: int, clipping_norm: float, persons: bool) -> float:
    """What doesn't depend on the weights, in 2^-53."""
    of_factors = 200 * (outputs + 2 * features + 22) if persons else outputs + features + 26
    return 3 * (outputs + 10) + of_factors * clipping_norm


def check_weights(
    parameters: Sequence[Tensor],
    clipping_norm: float,
    *,
    linear: bool = False,
    persons: bool = False,
    records: int = MOST_RECORDS,
) -> None:
    """Refuse weights with which rounding, which depends on the rest of a batch, would show in gradients.

    Parameters
    ----------
    parameters : sequence of Tensor
        As they are before a step: received, or released by the step before. No record has a part in the answer. Of a
        linear head the weight (K, D), and its bias.
    clipping_norm : float, > 0
    linear : bool
        Whether it is a linear head with cross-entropy on features of length 1.
    persons : bool
        Whether the unit is a person.
    records : int, from 1 to 2^20
        A public number that records are not more than; `lattice.check_sums` holds them to it.

    Raises
    ------
    InputError
        They are too long, or not a number, or the clipping norm is too small for any.

    Notes
    -----
    Guarantee, for `linear`: `moved` is at most 2^-11 / records clipping norms, which `lattice.ETA` covers. For other
    heads nothing is proved: their weights may be up to 2^20 clipping norms long, so that gradients are not mostly
    rounding.
    """
    squares = sum(float(torch.linalg.vector_norm(p.detach())) ** 2 for p in parameters)
    if linear:
        outputs, features = parameters[0].shape
        longest = longest_weights(features, outputs, clipping_norm, persons=persons, records=records)
        if longest < 0:
            raise InputError(
                f"clipping_norm is {clipping_norm!r}: at it, rounding in gradients of {outputs} outputs and {features} "
                "features is not covered. Take a larger privacy.clipping_norm, or a smaller limits.most_records."
            )
    else:
        longest = LONGEST_WEIGHTS * clipping_norm
    if not math.sqrt(squares) <= longest:  # NaN is not <=
        raise InputError(
            f"the head's weights are longer than {longest:.6g}, up to which rounding in gradients is covered "
            f"at clipping norm {clipping_norm:g}. Start from smaller weights, take a smaller "
            "training.optimizer.learning_rate or a larger privacy.clipping_norm, or a smaller limits.most_records."
        )
