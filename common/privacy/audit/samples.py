"""Questions about which records took part in which step: is each in with the claimed probability, by itself?

Epsilon under sampling holds for Poisson sampling only; shuffled batches of fixed size were audited at 4 to 10 times
the epsilon that is claimed for them (arXiv:2411.10614).

    s[t, i]   record i took part in step t; independent, each with probability `rate`, if all is right
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy import sparse

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.findings import Question
from fedhead.common.privacy.audit.laws import IntArray, corrected, count_p, dispersion_p

_PAIRED: Final = 300  # steps of which all pairs are compared: the first ones


def sample_questions(sampled: Sequence[IntArray], records: int, rate: float) -> list[Question]:
    """Ask whether samples were drawn as Poisson sampling does.

    Parameters
    ----------
    sampled : sequence of int arrays, length T
        Each step's records, numbered from 0; in any order; may be empty.
    records : int, >= 1
    rate : float, in (0, 1]
        Probability of each record in each step, as accounted.

    Returns
    -------
    list of Question
        The same names for the same shape and rate. Each p-value is valid for Poisson sampling: exact binomial tails
        or a bound above (`laws.dispersion_p`).

    Raises
    ------
    InputError
        No step, no record, a rate outside (0, 1], or a record's number outside [0, records).
    """
    _check(sampled, records, rate)
    members = _members(sampled, records)
    sizes = np.diff(members.indptr).astype(np.int64)  # (T,), each record counted once a step
    repeats = sum(len(step) for step in sampled) - members.nnz
    asked = [_repeats(repeats), _batch_mean(sizes, records, rate)]
    if rate == 1:
        return asked
    asked.append(_batch_spread(sizes, records, rate))
    asked.append(_participation(members, rate))
    if len(sampled) > 1:
        asked.append(_overlap(members, sizes, rate))
        asked.append(_repeated_batch(members[:_PAIRED], sizes[:_PAIRED], rate))
    if records > 1:
        asked.append(_neighbours(members, rate))
    return asked


def _check(sampled: Sequence[IntArray], records: int, rate: float) -> None:
    if not len(sampled):
        raise InputError("sampled is empty: it must hold each step's records. Pass one array a step.")
    if records < 1:
        raise InputError(f"records is {records}: it must be at least 1. Give the number of records that can be drawn.")
    if not 0 < rate <= 1:
        raise InputError(f"rate is {rate}: it must be above 0 and at most 1. Give the accounted sampling rate.")
    for number, step in enumerate(sampled):
        if len(step) and not (step.min() >= 0 and step.max() < records):
            raise InputError(
                f"sampled[{number}] goes beyond the {records} records: a record's number must be from 0 to "
                f"{records - 1}. Number the records of the audited data set from 0."
            )


def _members(sampled: Sequence[IntArray], records: int) -> sparse.csr_array:
    """(T, records): 1 where a record took part, 0 elsewhere."""
    rows = np.repeat(np.arange(len(sampled), dtype=np.int64), [len(step) for step in sampled])
    index = np.concatenate([np.asarray(step, dtype=np.int64) for step in sampled])
    rows, index = np.divmod(np.unique(rows * records + index), records)
    ends = np.searchsorted(rows, np.arange(len(sampled) + 1))
    return sparse.csr_array((np.ones(len(index), dtype=np.int64), index, ends), shape=(len(sampled), records))


def _repeats(repeats: int) -> Question:
    return Question(
        "sample-repeats",
        "Records drawn twice in one step",
        f"{repeats}",
        0.0 if repeats else 1.0,
        "No record was taken twice in one step.",
        f"Records were taken more than once in one step ({repeats} times): such a record weighs more than the noise "
        "was made for.",
    )


def _batch_mean(sizes: IntArray, records: int, rate: float) -> Question:
    mean, expected = float(sizes.mean()), records * rate
    more = mean > expected
    return Question(
        "batch-mean",
        "Sampling rate",
        f"{mean:.4g} records in a step on average, {expected:.4g} expected",
        float(count_p(int(sizes.sum()), records * len(sizes), rate)),
        "Records were drawn as often as the claim says.",
        f"Records were drawn {'more' if more else 'less'} often than the claim says: {mean / records:.3g} of them in a "
        f"step instead of {rate:.3g}."
        + (" Each record is seen more often than was accounted for." if more else " Another sampling is at work."),
    )


def _batch_spread(sizes: IntArray, records: int, rate: float) -> Question:
    expected = records * rate * (1 - rate)
    found = float(((sizes - records * rate) ** 2).mean())
    if sizes.min() == sizes.max() and len(sizes) > 1:
        bad = (
            f"Every step had the same number of records ({sizes[0]}): batches of a fixed size were used, but epsilon "
            "was computed for sampling in which each record is drawn by itself."
        )
    else:
        bad = (
            f"The number of records in a step varies {'less' if found < expected else 'more'} than it does when each "
            "record is drawn by itself: epsilon was computed for another way of sampling."
        )
    return Question(
        "batch-variance",
        "Number of records in a step",
        f"variance {found:.4g}, {expected:.4g} expected",
        dispersion_p(sizes, records, rate),
        "The number of records varies from step to step as it must when each record is drawn by itself.",
        bad,
    )


def _participation(members: sparse.csr_array, rate: float) -> Question:
    steps, records = members.shape
    counts = np.asarray(members.sum(axis=0), dtype=np.int64).ravel()  # (N,)
    expected = steps * rate * (1 - rate)
    found = float(((counts - steps * rate) ** 2).mean())
    extremes = count_p(np.array([counts.min(), counts.max()]), steps, rate)
    single = min(1.0, records * float(extremes.min()))
    p_spread = dispersion_p(counts, steps, rate)
    if single < p_spread:
        bad = "A record took part far more or far less often than chance allows: records aren't treated alike."
    elif found < expected:
        bad = (
            "All records took part nearly the same number of times, as in shuffled batches that go through the data "
            "set in turn: epsilon was computed for sampling in which each record is drawn by itself."
        )
    else:
        bad = "Some records took part more often than others beyond chance: they are protected less than claimed."
    return Question(
        "participation",
        "Steps that each record was in",
        f"variance {found:.4g}, {expected:.4g} expected; from {counts.min()} to {counts.max()} of {steps} steps",
        min(1.0, 2 * min(single, p_spread)),
        "How often each record took part varies as it must when each is drawn by itself.",
        bad,
    )


def _overlap(members: sparse.csr_array, sizes: IntArray, rate: float) -> Question:
    """Given every second step, each of its records is in the next with the claimed probability: exactly binomial."""
    common = np.asarray(members[:-1].multiply(members[1:]).sum(axis=1), dtype=np.int64).ravel()  # (T - 1,)
    p_values = [count_p(common[k::2].sum(), sizes[:-1][k::2].sum(), rate) for k in (0, 1) if len(common) > k]
    found, expected = float(common.sum()), float(sizes[:-1].sum()) * rate
    if found < expected:
        bad = (
            f"Consecutive steps share fewer records than chance makes them ({found:.0f} instead of about "
            f"{expected:.0f}), as in shuffled batches: who was in a step tells who isn't in the next."
        )
    else:
        bad = (
            f"Consecutive steps share more records than chance makes them ({found:.0f} instead of about "
            f"{expected:.0f}): samples are used again instead of drawn anew."
        )
    return Question(
        "batch-overlap",
        "Records shared by consecutive steps",
        f"{found:.0f}, about {expected:.4g} expected",
        corrected(p_values),
        "Who was in a step says nothing about who is in the next.",
        bad,
    )


def _repeated_batch(members: sparse.csr_array, sizes: IntArray, rate: float) -> Question:
    """Given one step, how many of its records another shares is exactly binomial; corrected for all pairs."""
    common = (members @ members.T).toarray()
    first, second = np.triu_indices(len(sizes), 1)
    p_values = count_p(common[first, second], sizes[first], rate)
    worst = int(p_values.argmin())
    i, j, shared = int(first[worst]), int(second[worst]), int(common[first[worst], second[worst]])
    return Question(
        "repeated-batch",
        "Records shared by any two steps",
        f"furthest off: steps {i + 1} and {j + 1} share {shared}, about {sizes[i] * rate:.4g} expected",
        corrected([p_values]),
        "No two steps have their records in common, or apart, beyond chance.",
        f"Steps {i + 1} and {j + 1} share {shared} records where chance gives about {sizes[i] * rate:.3g}: samples are "
        "used again, or divided up, instead of drawn anew.",
    )


def _neighbours(members: sparse.csr_array, rate: float) -> Question:
    """Every second pair of neighbours is in a step together with probability rate^2, by itself: exactly binomial."""
    steps = members.shape[0]
    columns = members.tocsc()
    together = np.asarray(columns[:, :-1].multiply(columns[:, 1:]).sum(axis=0), dtype=np.int64).ravel()  # (N - 1,)
    p_values = [
        count_p(together[k::2].sum(), steps * len(together[k::2]), rate**2) for k in (0, 1) if len(together) > k
    ]
    found, expected = float(together.sum()), steps * len(together) * rate**2
    return Question(
        "neighbouring-records",
        "Records drawn together",
        f"{found:.0f} neighbours in one step, about {expected:.4g} expected",
        corrected(p_values),
        "Records that stand next to each other are drawn independently.",
        f"Records that stand next to each other are drawn {'together' if found > expected else 'apart'} beyond chance: "
        "records are taken in blocks or in turn, not each by itself.",
    )
