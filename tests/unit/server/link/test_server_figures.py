"""The server's figures: what is counted, what can't be made to grow, and that a look never fails."""

import logging
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from fedhead.common.operations.metrics import OTHER
from fedhead.server.keys import make_keys
from fedhead.server.link.figures import PREFIX, ROUTES, STATES, ServerFigures

PAGE = Path(__file__).parents[4] / "docs" / "deploy.md"

RUN = {
    "schema": 1, "name": "r", "state": "running", "round": 3, "rounds": 20, "holders": ["st-mary", "st-jude"],
    "updated": 1_800_000_000.5,
}  # fmt: skip


def samples(figures: ServerFigures) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (one.name, tuple(one.labels.values())): one.value
        for family in figures.registry.collect()
        for one in family.samples
    }


def test_requests_are_counted_by_route_and_status():
    figures = ServerFigures()
    figures.request("/v1/fleet/pull-messages", 200, 100, 3000, 1.5)
    figures.request("pull-messages", 200, 10, 0, 0.5)
    figures.request("/v1/fleet/push-object", 401, 5, 0, 0.01)
    found = samples(figures)
    assert found["fedhead_server_requests_total", ("pull-messages", "200")] == 2
    assert found["fedhead_server_requests_total", ("push-object", "401")] == 1
    assert found["fedhead_server_received_bytes_total", ()] == 115
    assert found["fedhead_server_sent_bytes_total", ()] == 3000
    assert found["fedhead_server_request_seconds_sum", ("pull-messages",)] == 2.0


def test_nobody_outside_makes_the_registry_grow():
    figures = ServerFigures()
    figures.request("x", 200, 0, 0, 0.0)
    figures.request("x", 1, 0, 0, 0.0)
    before = len(samples(figures))
    for number in range(500):
        figures.request(f"/v1/fleet/{number}", 200, 0, 0, 0.0)
        figures.request(f"/v1/fleet/pull-messages/{number}\n", 10_000 + number, 0, 0, 0.0)
        figures.request(PREFIX * number, 0, 0, 0, 0.0)
    assert len(samples(figures)) == before
    assert samples(figures)["fedhead_server_requests_total", (OTHER, "200")] == 501


def test_routes_are_those_of_flower():
    from flwr.superlink.routers.fleet.router import router

    paths = {route.path.rpartition("/")[2] for route in router.routes}
    assert paths >= ROUTES
    assert paths - ROUTES == {"register-node", "unregister-node"}


def test_odd_numbers_lower_no_counter():
    figures = ServerFigures()
    figures.request("x", 200, -5, -5, -1.0)
    assert samples(figures)["fedhead_server_received_bytes_total", ()] == 0


def test_holders_and_the_run_are_asked_for_at_each_look():
    figures, online = ServerFigures(), [1]
    figures.watch(lambda: (online[0], 2), lambda: RUN)
    assert samples(figures)["fedhead_server_nodes", ("online",)] == 1
    online[0] = 2
    found = samples(figures)
    assert found["fedhead_server_nodes", ("online",)] == 2
    assert found["fedhead_server_nodes", ("registered",)] == 2
    assert found["fedhead_run_round", ()] == 3
    assert found["fedhead_run_rounds", ()] == 20
    assert found["fedhead_run_holders", ()] == 2
    assert found["fedhead_run_updated_timestamp_seconds", ()] == 1_800_000_000.5
    assert [found["fedhead_run_state", (state,)] for state in (*STATES, OTHER)] == [0, 1, 0, 0, 0, 0]


def test_without_a_run_there_are_no_figures_of_one():
    figures = ServerFigures()
    assert not [name for name, _ in samples(figures) if name.startswith(("fedhead_run", "fedhead_server_nodes"))]
    figures.watch(lambda: (0, 2), lambda: None)
    assert not [name for name, _ in samples(figures) if name.startswith("fedhead_run")]


def test_what_can_not_be_had_is_left_out_and_said_once(caplog):
    figures = ServerFigures()

    def busy():
        raise RuntimeError("database is locked")

    figures.watch(busy, lambda: RUN)
    with caplog.at_level(logging.WARNING, logger="fedhead.server.link.figures"):
        for _ in range(3):
            found = samples(figures)
            assert found["fedhead_run_round", ()] == 3
            assert ("fedhead_server_nodes", ("online",)) not in found
    assert len(caplog.records) == 1


@given(
    st.dictionaries(
        st.sampled_from([*RUN, "x"]),
        st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(), st.lists(st.text(), max_size=3)),
    )
)
def test_any_run_file_can_be_looked_at(run):
    figures = ServerFigures()
    figures.watch(lambda: (0, 0), lambda: run)
    shown = generate_latest(figures.registry).decode()
    assert "fedhead_server_nodes" in shown
    states = {labels[0] for name, labels in samples(figures) if name == "fedhead_run_state"}
    assert states <= {*STATES, OTHER}


def test_the_end_of_the_certificate(tmp_path):
    import datetime

    found = make_keys(tmp_path / "keys", ["st-mary"])
    figures = ServerFigures()
    figures.certificate(tmp_path / "keys" / "server.crt")
    ends = datetime.datetime.fromisoformat(found["server"]["ends"]).timestamp()
    assert samples(figures)["fedhead_certificate_expiry_timestamp_seconds", ()] == ends
    for bad in (tmp_path / "none.crt", tmp_path / "keys" / "server.key"):
        figures.certificate(bad)
        assert ("fedhead_certificate_expiry_timestamp_seconds", ()) not in samples(figures)


def test_many_threads_lose_nothing():
    figures = ServerFigures()

    def ask():
        for _ in range(500):
            figures.request("pull-messages", 200, 1, 1, 0.0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(figures)["fedhead_server_received_bytes_total", ()] == 2000


def test_the_page_names_every_figure(tmp_path):
    make_keys(tmp_path / "keys", ["st-mary"])
    figures = ServerFigures()
    figures.watch(lambda: (0, 2), lambda: RUN)
    figures.certificate(tmp_path / "keys" / "server.crt")
    figures.request("x", 200, 0, 0, 0.0)
    page = PAGE.read_text(encoding="utf-8")
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in figures.registry.collect()
        if not family.name.endswith("_created")
    }
    assert len(names) == 11
    assert [name for name in names if f"`{name}" not in page] == []


def test_a_look_through_the_endpoint(tmp_path):
    import socket
    import urllib.request

    from fedhead.common.operations.metrics import serve_metrics

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    figures = ServerFigures()
    figures.watch(lambda: (1, 2), lambda: RUN)
    close = serve_metrics(f"127.0.0.1:{port}", figures.registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
            shown = reply.read().decode()
    finally:
        close()
    assert 'fedhead_server_nodes{state="online"} 1.0' in shown
    assert pytest.approx(3.0) == float(shown.split("\nfedhead_run_round ")[1].split("\n")[0])
