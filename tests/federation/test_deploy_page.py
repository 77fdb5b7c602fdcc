"""docs/deploy.md on one machine, word for word, as a new user types it: two hospitals, TLS, keys, a run, an audit."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from fedhead.simulations.audit.ledgers import audit_ledgers
from fedhead.simulations.budgets import read_budgets

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
TITLE = "## Try it on one machine"
MARK = "FEDHEAD_TEST_DEPLOY_PAGE"
PORTS = ("8443", "8444")
LIMIT = 600  # seconds, for all of it: what the page promises, with room


def typed() -> str:
    """The section's commands, in order."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(f"\n{TITLE}\n") == 1
    section = re.split(r"^## ", text.partition(f"\n{TITLE}\n")[2], flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert section.count("```") == 2 * len(blocks)  # nothing in it that isn't run here
    return "\n".join(blocks)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def left_over(mark: str) -> dict[int, str]:
    """Processes that carry the mark in their environment, however they were started: pid -> command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def ended(mark: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while left_over(mark):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def mark():
    """A mark for the environment of all that a test starts; what still carries it afterwards is ended by its pid."""
    made = uuid.uuid4().hex
    yield made
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        for pid in left_over(made):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if ended(made, seconds):
            return
    pytest.fail(f"processes can't be ended: {left_over(made)}")


def environment(mark: str, folder: Path) -> dict[str, str]:
    """Of a new user, who has activated the virtual environment that fedhead is installed in."""
    home = folder / "home"
    home.mkdir()
    given = {
        name: value for name, value in os.environ.items() if not name.startswith(("FLWR", "FEDHEAD", "HF_", "XDG_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**given, MARK: mark, "PATH": path, "HOME": str(home)}


def test_the_section_is_one_script_that_bash_can_read():
    script = typed()
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    named = ("keys", "serve", "status", "check", "join", "submit", "budget", "audit ledger")
    assert [name for name in named if not re.search(rf"^fedhead {name} ", script, re.MULTILINE)] == []
    assert all(port in script for port in PORTS)
    assert script.rstrip().endswith("\nwait")


def test_what_is_left_over_is_found_and_ended(mark, tmp_path):
    """A test that can't see a process that stays would pass whatever stays."""
    script = "(setsid sleep 300 &) ; sleep 0.1"
    subprocess.run(["bash", "-c", script], env=environment(mark, tmp_path), check=True, timeout=60)
    assert [command for command in left_over(mark).values() if command.startswith("sleep 300")]


@pytest.mark.slow
def test_the_page_can_be_followed_word_for_word(mark, tmp_path):
    script = typed()
    # Other tests, or somebody's server, may have these two ports: nothing else is changed.
    for port, free in zip(PORTS, free_ports(len(PORTS)), strict=True):
        script = script.replace(port, str(free))
    folder = tmp_path / "empty"
    folder.mkdir()
    output = tmp_path / "output.txt"
    started = time.monotonic()
    with open(output, "wb") as file:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", script], cwd=folder, env=environment(mark, tmp_path), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = shell.wait(LIMIT)
        except subprocess.TimeoutExpired:
            shell.kill()
            status = None
    seconds = time.monotonic() - started
    logs = {str(path.relative_to(folder)): path.read_text(errors="replace")[-2000:] for path in folder.glob("*/*.log")}
    said = output.read_text(errors="replace")
    assert status == 0, f"status {status} after {seconds:.0f} s\n{said[-4000:]}\n{json.dumps(logs, indent=1)}"

    result = json.loads((folder / "server" / "first-run" / "result.json").read_text())
    assert len(result["rounds"]) == 20
    assert result["final"]["accuracy"] > 0.7
    assert {spent["holder"] for spent in result["privacy"]} == {"st-mary", "st-jude"}
    assert (folder / "server" / "first-run" / "model" / "head.safetensors").is_file()

    ledgers = [folder / name / "state" for name in ("st-mary", "st-jude")]
    domains = read_budgets(ledgers)["domains"]
    assert {row["holder"] for row in domains} == {"st-mary", "st-jude"}
    assert all(0 < row["spent"]["epsilon"] <= 3.0 for row in domains)
    assert [noise for row in domains for noise in row["noise"] if "seeded" in noise] == []
    assert audit_ledgers(ledgers, marks=folder / "server" / "state" / "marks.json")["passed"]
    assert sorted(path.name for path in (folder / "server" / "keys").glob("*.key")) == ["ca.key", "server.key"]

    assert ended(mark, 30), left_over(mark)
    assert "Traceback" not in said + "".join(logs.values())
