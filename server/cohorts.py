"""Which holders are asked in which round.

A cohort takes the holders that were asked least so far, ties broken by a keyed hash, so that after R rounds of k out
of n holders nobody was asked more than ceil(R k / n) times. That number, known beforehand, is what the noise is
planned for. No privacy amplification is claimed from cohorts, because the coordinator knows who took part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedhead.common.planned import most_participations


class Cohorts:
    """The schedule of cohorts; the same for the same set of names, whatever their order.

    Parameters
    ----------
    holders : sequence of str
        Names, each once.
    per_round : int
        Holders asked in a round.
    seed : int
    """

    def __init__(self, holders: Sequence[str], per_round: int, seed: int) -> None:
        self.holders = sorted(holders)
        self.per_round = min(per_round, len(self.holders))
        self.seed = seed
        self._asked = dict.fromkeys(self.holders, 0)
        self._rounds: list[list[str]] = []

    def of_round(self, number: int) -> list[str]:
        """The holders asked in a round (from 1), sorted by name."""
        if self.per_round == len(self.holders):
            return list(self.holders)
        while len(self._rounds) < number:
            self._rounds.append(self._next(len(self._rounds) + 1))
        return list(self._rounds[number - 1])

    def participations(self, rounds: int) -> int:
        """Most rounds, out of `rounds`, in which any one holder is asked."""
        return most_participations(rounds, len(self.holders), self.per_round)

    def _next(self, number: int) -> list[str]:
        def key(name: str) -> tuple[int, bytes]:
            text = f"{self.seed}/{number}/{name}".encode()
            return self._asked[name], hashlib.blake2b(text, digest_size=16).digest()

        chosen = sorted(sorted(self.holders, key=key)[: self.per_round])
        for name in chosen:
            self._asked[name] += 1
        return chosen
