"""What a data holder shows to Prometheus on its own machine: rounds, refusals, seconds, budget, its two processes.

    fedhead_holder_rounds_total{outcome}                    released, refused
    fedhead_holder_refusals_total{code}                     the fixed codes of common/refusals.py
    fedhead_holder_training_seconds                         histogram, of rounds that were released
    fedhead_holder_preparing_seconds                        the last time that records were made ready
    fedhead_holder_budget_epsilon{domain,kind}              spent, left
    fedhead_holder_online                                   1 while the server answers
    fedhead_holder_restarts_total{process}                  node, executor
    fedhead_holder_up{process}                              1 while it runs

Nothing of a record is among them. Seconds and budget are the holder's own all the same: how long training takes depends
on how many records there are. So they stay on loopback.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedhead.common.config.names import is_name
from fedhead.common.operations.metrics import OTHER, one_of
from fedhead.common.refusals import TEXTS

OUTCOMES: Final = ("released", "refused")
PROCESSES: Final = ("node", "executor")
MOST_DOMAINS: Final = 64  # domains are named in holder.toml, one or two of them; a bound all the same

_CODES: Final = frozenset(map(str, TEXTS))
_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class HolderFigures:
    """Counts the events that a holder's two processes report; may be called from any thread.

    Attributes
    ----------
    registry : CollectorRegistry
        For `fedhead.common.operations.metrics.serve_metrics`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rounds = Counter(
            "fedhead_holder_rounds", "Rounds that were answered.", ("outcome",), registry=self.registry
        )
        self._refusals = Counter(
            "fedhead_holder_refusals", "Refusals by their code.", ("code",), registry=self.registry
        )
        self._training = Histogram(
            "fedhead_holder_training_seconds",
            "Seconds a released round took.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._preparing = Gauge(
            "fedhead_holder_preparing_seconds", "Seconds it last took to make records ready.", registry=self.registry
        )
        self._budget = Gauge(
            "fedhead_holder_budget_epsilon", "Epsilon by the ledger.", ("domain", "kind"), registry=self.registry
        )
        self._online = Gauge("fedhead_holder_online", "1 while the server answers.", registry=self.registry)
        self._restarts = Counter(
            "fedhead_holder_restarts", "Processes that were started again.", ("process",), registry=self.registry
        )
        self._up = Gauge("fedhead_holder_up", "1 while a process runs.", ("process",), registry=self.registry)
        self._domains = set[str]()
        self._lock = threading.Lock()
        for process in PROCESSES:  # there from the start: an alert on a figure that is missing never fires
            self._up.labels(process).set(0)
            self._restarts.labels(process)
        for outcome in OUTCOMES:
            self._rounds.labels(outcome)

    def event(self, event: Mapping[str, Any]) -> None:
        """Count one event of the node process or the executor.

        Parameters
        ----------
        event : mapping
            ``event`` and its fields; one that is not known, or has other fields, changes nothing.
        """
        match event.get("event"):
            case "round":
                self._round(event)
            case "prepared":
                if (seconds := _number(event.get("seconds"))) is not None:
                    self._preparing.set(seconds)
            case "budget":
                self._spent(event)
            case "online":
                self._online.set(1)
            case "offline":
                self._online.set(0)
            case _:
                pass

    def restarted(self, process: str) -> None:
        """Count one restart of a process, ``node`` or ``executor``."""
        self._restarts.labels(one_of(process, PROCESSES)).inc()

    def up(self, process: str, running: bool) -> None:
        """Say whether a process runs, ``node`` or ``executor``. Without a node process the server does not answer."""
        self._up.labels(one_of(process, PROCESSES)).set(float(running))
        if process == "node" and not running:
            self._online.set(0)

    def _round(self, event: Mapping[str, Any]) -> None:
        outcome, code, seconds = event.get("outcome"), event.get("code"), _number(event.get("seconds"))
        self._rounds.labels(one_of(outcome, OUTCOMES)).inc()
        if outcome == "released" and seconds is not None:
            self._training.observe(seconds)
        if outcome == "refused":
            self._refusals.labels(one_of(str(code), _CODES)).inc()

    def _spent(self, event: Mapping[str, Any]) -> None:
        domain = event.get("domain")
        with self._lock:
            if (
                not isinstance(domain, str)
                or not is_name(domain)
                or (domain not in self._domains and len(self._domains) >= MOST_DOMAINS)
            ):
                domain = OTHER
            else:
                self._domains.add(domain)
            for kind in ("spent", "left"):
                value = _number(event.get(kind))
                # What is unknown is not 0: an alert on a used-up budget must not fire for it.
                self._budget.labels(domain, kind).set(math.nan if value is None else value)


def _number(value: Any) -> float | None:
    """A number of at least 0, "inf" as infinite, or None."""
    if value == "inf":
        return math.inf
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None
