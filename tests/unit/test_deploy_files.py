"""deploy/ and docs/deploy.md without a deployment: units, container file, and settings are what the program takes."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from fedhead.cli import app
from fedhead.client.holder import HolderFile, make_holder
from fedhead.common.config import make_config
from fedhead.server.keys import make_keys
from fedhead.server.server_file import ServerFile, make_server
from fedhead.server.submitting.deployable import deployable

ROOT = Path(__file__).parents[2]
DEPLOY, PAGE = ROOT / "deploy", ROOT / "docs" / "deploy.md"
UNITS = ("serve", "join")
GRACE = 20  # seconds that `join` lets a round end in


def unit(command: str) -> dict[str, list[str]]:
    """Settings of a unit's file; a setting may be there several times."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / f"fedhead-{command}.service").read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def tables(start: str) -> dict:
    """A settings file in the page, by its first comment."""
    (body,) = [
        body
        for body in re.findall(r"^~~~toml\n(.*?)^~~~$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if body.startswith(start)
    ]
    return tomllib.loads(body)


# Units


@pytest.mark.parametrize("command", UNITS)
def test_a_unit_runs_a_command_that_there_is(command):
    (line,) = unit(command)["ExecStart"]
    program, name, path, *options = line.split()
    assert program == "/opt/fedhead/bin/fedhead"
    assert name == command
    assert path.startswith("/etc/fedhead/")
    there = typer.main.get_command(app).commands[name]
    known = {option for parameter in there.params for option in parameter.opts}
    assert options
    assert set(options) <= known
    assert [parameter for parameter in there.params if parameter.required and parameter.param_type_name == "argument"]


@pytest.mark.parametrize("command", UNITS)
def test_a_unit_gives_a_round_its_time_to_end(command):
    found = unit(command)
    assert found["KillSignal"] == ["SIGTERM"]
    assert found["KillMode"] == ["mixed"]  # not to the children: the supervisor ends them, after the round
    assert int(found["TimeoutStopSec"][0]) > GRACE + 10
    assert found["Restart"] == ["on-failure"]
    assert found["RestartPreventExitStatus"] == ["2"]


def test_serve_reads_its_keys_again_on_reload():
    assert unit("serve")["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert "ExecReload" not in unit("join")


@pytest.mark.parametrize("command", UNITS)
def test_a_unit_may_write_one_folder_and_has_no_rights(command):
    found = unit(command)
    for name, value in {
        "User": "fedhead", "ProtectSystem": "strict", "ReadWritePaths": "/var/lib/fedhead", "NoNewPrivileges": "yes",
        "PrivateTmp": "yes", "ProtectHome": "yes", "CapabilityBoundingSet": "", "UMask": "0077", "LimitCORE": "0",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX", "StateDirectoryMode": "0700",
    }.items():  # fmt: skip
        assert found[name] == [value], name
    # PyTorch compiles kernels in memory and reads /proc/cpuinfo
    assert "MemoryDenyWriteExecute" not in found
    assert "ProcSubset" not in found
    written = [entry.partition("=")[2] for line in found["Environment"] for entry in line.split()]
    assert written
    assert all(path.startswith("/var/lib/fedhead") for path in written)


@pytest.mark.parametrize("command", UNITS)
def test_systemd_takes_the_unit(command, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    program = tmp_path / "fedhead"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = (DEPLOY / f"fedhead-{command}.service").read_text(encoding="utf-8")
    path = tmp_path / f"fedhead-{command}.service"
    path.write_text(text.replace("/opt/fedhead/bin/fedhead", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert said == []
    path.write_text(text.replace("ProtectSystem=strict", "ProtectSystem=nonsense\nNoSuchSetting=1"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert len([line for line in done.stderr.splitlines() if path.name in line]) >= 2  # it does look


# Container


def test_the_image_has_all_that_the_package_is_made_of():
    lines = (DEPLOY / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = set(settings["tool"]["setuptools"]["package-dir"].values())
    assert folders | {"pyproject.toml", settings["project"]["readme"], "LICENSE"} == set(copied)


def test_the_image_runs_fedhead_as_somebody_else_than_root():
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert 'ENTRYPOINT ["fedhead"]' in lines
    assert "ARG BASE=python:3.11-slim" in lines
    assert [line for line in lines if line.startswith("FROM ")] == ["FROM ${BASE} AS wheel", "FROM ${BASE}"]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert all(int(part) > 0 for user in users for part in user.split(":"))
    assert lines.index(f"USER {users[-1]}") < lines.index('ENTRYPOINT ["fedhead"]')
    assert not re.search(r"https?://|--index-url|--trusted-host", text)


# The page


def test_the_servers_file_in_the_page_can_be_used(tmp_path):
    make_keys(tmp_path / "keys", ["st-mary", "st-jude"])
    file = make_server(tables("# server.toml"), tmp_path)
    assert list(file.public_keys) == ["st-mary", "st-jude"]


def test_the_holders_file_in_the_page_can_be_used(tmp_path):
    found = tables("# holder.toml")
    assert found["limits"]["backbones"] == ["sha256:..."]
    found["limits"]["backbones"] = ["sha256:" + "0" * 64]
    for name in ("ca.crt", "st-mary.key"):
        (tmp_path / name).touch(mode=0o600)
    assert make_holder(found, tmp_path).name == "st-mary"
    assert set(found) <= set(HolderFile.model_fields)


def test_the_recipe_in_the_page_can_be_deployed(tmp_path):
    make_keys(tmp_path / "keys", ["st-mary", "st-jude"])
    server = make_server(tables("# server.toml"), tmp_path)
    (body,) = [
        body
        for body in re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if body.startswith("# tumours.toml")
    ]
    config = deployable(make_config(tomllib.loads(body)), server)
    assert config.holders.count == 2
    assert config.privacy.epsilon <= tables("# holder.toml")["budget"]["per_run"]["epsilon"]
    assert sorted(config.task.labels) == sorted(tables("# holder.toml")["data"]["labels"])


def test_the_page_has_every_setting_of_the_server():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*)\|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    shown = {
        name: "required" if field.is_required() else f"`{field.default}`" if field.default is not None else ""
        for name, field in ServerFile.model_fields.items()
    }
    assert {name: text.strip() for name, text in rows.items() if name in shown} == shown


def test_commands_in_the_page_have_options_that_there_are():
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ").replace(" --server\n", " --server ")
    commands = re.findall(r"(?:^|[`(/ ])fedhead ((?:[a-z]+ )[^\n`#|;]*)", text, re.MULTILINE)
    found = [command.split() for command in commands]
    top = typer.main.get_command(app).commands
    checked = 0
    for name, *words in found:
        if name not in top:
            continue
        there = top[name]
        if hasattr(there, "commands") and words:
            assert words[0] in there.commands, words
            there = there.commands[words[0]]
        known = {option for parameter in there.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, (name, words)
        checked += 1
    assert checked > 15
