"""What the server uses of Flower: another version is refused, and a change of a part is noticed here."""

import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path

import pytest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
from flwr.superlink.config_loader import SuperLinkLifespanConfig

from fedhead.common.errors import InputError
from fedhead.server.link import environment, flower, public
from fedhead.server.link.environment import check_flower, import_flower, set_environment
from fedhead.server.link.flower import TokenPlugin


@pytest.mark.parametrize("found", ["1.40.9", "1.42.0", "1.410.0", "2.0"])
def test_another_version_is_refused_in_one_line(monkeypatch, found):
    monkeypatch.setattr(environment, "version", lambda _: found)
    with pytest.raises(InputError, match=f"flwr is version {found}") as caught:
        check_flower()
    assert "\n" not in str(caught.value)


def test_this_version_is_taken():
    check_flower()
    import_flower()


def test_a_part_that_has_another_name_is_one_line(monkeypatch):
    def gone(_):
        raise ImportError("cannot import name 'create_app'")

    monkeypatch.setattr(environment.importlib, "import_module", gone)
    with pytest.raises(InputError, match="a part that the server needs is not there") as caught:
        import_flower()
    assert "\n" not in str(caught.value)


def test_flower_keeps_its_files_with_us_and_calls_nobody(tmp_path, monkeypatch):
    for name in ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    set_environment(tmp_path / "flower")
    assert os.environ["FLWR_HOME"] == str(tmp_path / "flower")
    assert (os.environ["FLWR_TELEMETRY_ENABLED"], os.environ["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert "FLWR_INTERNAL_GRPC_FLEET_API" not in os.environ
    assert (tmp_path / "flower").stat().st_mode & 0o777 == 0o700


def test_serve_is_imported_without_flower():
    code = "import sys, fedhead.server.link.serve; print('flwr' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout == "False\n"


def test_only_two_files_of_the_package_import_flower():
    folder = Path(flower.__file__).parent
    users = {
        path.name for path in folder.glob("*.py") if "from flwr" in (text := path.read_text()) or "import flwr" in text
    }
    assert users == {"flower.py", "nodes.py"}


def test_a_token_must_be_the_one():
    plugin = TokenPlugin("a" * 64)
    good, account = plugin.validate_tokens_in_metadata([("flwr-oidc-access-token", "a" * 64)])
    assert good
    assert account is not None
    for metadata in (
        [], [("x", "")], [("x", "b" * 64)], [("x", "a" * 63)], [("x", b"a" * 65)], [("x", "\u00e9")],
        [("x", "a" * 64), ("x", "b" * 64)],
    ):  # fmt: skip
        assert plugin.validate_tokens_in_metadata(metadata) == (False, None)


def test_the_settings_of_the_application_are_those_that_are_given():
    assert {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)} == {
        "control_address", "health_server_address", "host", "port", "insecure", "certificates",
        "superexec_auth_secret", "authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log",
        "artifact_provider", "enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation",
        "ssl_ca_certfile", "ssl_certfile", "ssl_keyfile", "database", "isolation", "runtime_dependency_install",
    }  # fmt: skip


def test_the_fleet_routes_are_those_that_are_known():
    """A route that Flower adds is not let through; one that it takes away breaks nodes."""
    paths = {route.path for route in flower.fleet_router.routes}
    assert paths == {public.PREFIX + name for name in public.ROUTES | {"register-node", "unregister-node"}}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("activate_node", ["request", "state"]),
        ("pull_messages", ["request", "state", "store"]),
        ("push_messages", ["request", "state"]),
        ("push_object", ["request", "state"]),
        ("pull_object", ["request", "state"]),
        ("confirm_message_received", ["request", "state", "store"]),
    ],
)
def test_the_handlers_behind_our_own_routes(name, parameters):
    assert list(inspect.signature(getattr(flower.fleet_handlers, name)).parameters) == parameters


def test_the_columns_that_are_asked_for():
    for model, names in (
        (MessageIns, {"message_id", "dst_node_id", "delivered_at", "created_at", "ttl"}),
        (MessageRes, {"message_id", "reply_to_message_id"}),
        (Node, {"status", "online_until"}),
    ):
        assert names <= set(model.__table__.columns.keys())


def test_tasks_without_a_sign_of_life_are_looked_for_at_times_and_not_at_every_request(tmp_path, monkeypatch):
    bench = run_path(str(Path(__file__).with_name("link_bench.py")))
    looked, look = [], SqlLinkState._cleanup_expired_task_tokens
    monkeypatch.setattr(
        SqlLinkState, "_cleanup_expired_task_tokens", lambda self: (looked.append(time.monotonic()), look(self))
    )
    monkeypatch.setattr(flower, "CLEAN_UP_SECONDS", 0.3)
    state = bench["make_state"](tmp_path)
    run = bench["make_run"](state)
    requests, end = 0, time.monotonic() + 1.0
    while time.monotonic() < end:
        state.get_run_status({run})
        requests += 1
    assert requests > 10
    assert 2 <= len(looked) <= 5
    assert all(later - before >= 0.3 for before, later in itertools.pairwise(looked))
