"""What the server shows to Prometheus: data holders, requests, the run under way, the end of its certificate.

fedhead_server_nodes{state}                             online, registered
fedhead_server_requests_total{route,status}             requests at the public port
fedhead_server_request_seconds{route}                   how long they took; pull-messages waits for messages
fedhead_server_received_bytes_total                     bodies, without headers and TLS
fedhead_server_sent_bytes_total
fedhead_run_round, fedhead_run_rounds                   rounds done, rounds of the run
fedhead_run_holders                                     data holders in it
fedhead_run_state{state}                                1 for the state that it is in, else 0
fedhead_run_updated_timestamp_seconds                   Unix time of the last round
fedhead_certificate_expiry_timestamp_seconds            Unix time
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeGuard

from cryptography import x509
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedhead.common.operations.metrics import OTHER, one_of

log = logging.getLogger(__name__)

PREFIX: Final = "/v1/fleet/"
ROUTES: Final = frozenset(
    {
        "activate-node", "confirm-message-received", "deactivate-node", "get-fab", "get-run", "pull-messages",
        "pull-object", "push-messages", "push-object", "send-node-heartbeat",
    }
)  # fmt: skip
STATES: Final = ("waiting", "running", "finished", "failed", "stopped")

_STATUSES: Final = frozenset(str(status.value) for status in HTTPStatus)
_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 20, 30, 60)

Nodes = Callable[[], tuple[int, int]]
Run = Callable[[], Mapping[str, Any] | None]


class ServerFigures:
    """Counts what the public port does, and asks for the rest when somebody looks.

    Attributes
    ----------
    registry : CollectorRegistry
        For `fedhead.common.operations.metrics.serve_metrics`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "fedhead_server_requests", "Requests at the public port.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "fedhead_server_request_seconds", "Seconds a request took; pull-messages waits for messages.", ("route",),
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._received = Counter(
            "fedhead_server_received_bytes", "Bytes of requests' bodies at the public port.", registry=self.registry
        )
        self._sent = Counter(
            "fedhead_server_sent_bytes", "Bytes of replies' bodies at the public port.", registry=self.registry
        )
        self._watched = _Watched()
        self.registry.register(self._watched)

    def request(self, route: str, status: int, received: int, sent: int, seconds: float) -> None:
        """Count one request at the public port; may be called from any thread.

        Parameters
        ----------
        route : str
            Path, or its last part. What is not one of Flower's Fleet routes counts as ``other``.
        status : int
            HTTP status of the reply; ``other`` if there is no such status.
        received, sent : int
            Bytes of the bodies, at least 0.
        seconds : float
            From the first byte of the request to the last of the reply.
        """
        label = one_of(route.removeprefix(PREFIX), ROUTES)
        self._requests.labels(label, one_of(str(status), _STATUSES)).inc()
        self._seconds.labels(label).observe(max(0.0, seconds))
        self._received.inc(max(0, received))
        self._sent.inc(max(0, sent))

    def watch(self, nodes: Nodes, run: Run) -> None:
        """Say where the other figures come from; both are called at every look, in the thread of the endpoint.

        Parameters
        ----------
        nodes : callable
            Numbers of data holders online, and registered.
        run : callable
            What run.json says; None if there is no run.
        """
        self._watched.nodes, self._watched.run = nodes, run

    def certificate(self, path: Path) -> None:
        """Take down when the certificate ends that the public port shows: the one read at its start, not a newer file.

        Parameters
        ----------
        path : Path
            A certificate in PEM. One that can't be read has no figure.
        """
        try:
            found = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            self._watched.expiry = None
        else:
            self._watched.expiry = found.not_valid_after_utc.timestamp()


class _Watched(Collector):
    """Figures that are looked up when somebody asks; one that can't be had is left out, and the rest is there."""

    def __init__(self) -> None:
        self.nodes: Nodes | None = None
        self.run: Run | None = None
        self.expiry: float | None = None
        self._lacking = set[str]()

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry would otherwise look everything up to learn the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Look everything up."""
        if self.nodes is not None:
            yield from self._asked("nodes", self.nodes, _of_nodes)
        if self.run is not None:
            yield from self._asked("run", self.run, _of_run)
        if self.expiry is not None:
            yield _gauge("fedhead_certificate_expiry_timestamp_seconds", "When the certificate ends.", self.expiry)

    def _asked(self, what: str, ask: Callable[[], Any], tell: Callable[[Any], Iterator[Metric]]) -> list[Metric]:
        try:
            found = list(tell(ask()))
        except Exception:  # a look must not fail as a whole because a file is half there or a database is busy
            if what not in self._lacking:  # once, not at every look
                log.warning("metrics: figures of the %s can't be had", what, exc_info=True)
            self._lacking.add(what)
            return []
        self._lacking.discard(what)
        return found


def _of_nodes(found: tuple[int, int]) -> Iterator[Metric]:
    family = GaugeMetricFamily("fedhead_server_nodes", "Data holders.", labels=("state",))
    online, registered = found
    family.add_metric(("online",), online)
    family.add_metric(("registered",), registered)
    yield family


def _of_run(found: Mapping[str, Any] | None) -> Iterator[Metric]:
    if found is None:
        return
    for name, help_text, value in (
        ("round", "Rounds that are done.", found.get("round")),
        ("rounds", "Rounds of the run.", found.get("rounds")),
        ("holders", "Data holders in the run.", _length(found.get("holders"))),
        ("updated_timestamp_seconds", "When the last round ended.", found.get("updated")),
    ):
        if _is_number(value):
            yield _gauge(f"fedhead_run_{name}", help_text, value)
    family = GaugeMetricFamily("fedhead_run_state", "1 for the state that the run is in.", labels=("state",))
    state = one_of(found.get("state"), STATES)
    for name in (*STATES, OTHER):
        family.add_metric((name,), float(name == state))
    yield family


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=value)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
