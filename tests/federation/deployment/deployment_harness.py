"""A federation of real processes on loopback, with TLS and node keys: its files, its commands, and what it left."""

import contextlib
import io
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from deployment_processes import PATIENCE, Process, end_all, figures_at, until
from deployment_proxy import Proxy
from sklearn.datasets import load_digits

from fedhead.cli import main
from fedhead.common.privacy.ledger import Entry, Ledger
from fedhead.server.keys import make_keys

LABELS = [str(digit) for digit in range(10)]
RECIPE: dict[str, Any] = {
    "task": {"labels": LABELS},
    "model": {"backbone": "module:torch.nn:Identity"},
    "data": {"source": "json:elsewhere.json", "declared_records": 300, "test": {"source": "json:test.json"}},
    "privacy": {"epsilon": 3.0},
    "training": {"rounds": 4},
    "run": {"evaluate_every": 1},
}
SERVER: dict[str, Any] = {"least_holders": 1, "round_deadline": 60.0, "holders_deadline": 120.0}
HOLDER: dict[str, Any] = {
    "data": {"source": "json:records.json", "labels": LABELS},
    "budget": {"domain": "wards", "epsilon": 8.0, "delta": 1e-5},
    "limits": {"modules": ["torch.nn:Identity"]},
    "storage": {"folder": "state"},
}


class Federation:
    """A server, its data holders, and one recipe.

    Parameters
    ----------
    folder : Path
    holders : sequence of str
        Names; each gets a key, records and a holder.toml.
    records : int
        Of each holder.
    recipe, server, holder : mapping, optional
        Changes to RECIPE, SERVER and HOLDER; nested tables are merged.
    """

    def __init__(
        self,
        folder: Path,
        holders: Sequence[str] = ("north", "south"),
        *,
        records: int = 300,
        recipe: Mapping[str, Any] | None = None,
        server: Mapping[str, Any] | None = None,
        holder: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.holders, self.mark = folder, list(holders), uuid.uuid4().hex
        self.public, self.control, self.figures = free_ports(3)
        self.processes: list[Process] = []
        self.proxies: dict[str, Proxy] = {}
        self.server: Process | None = None
        self.options: list[str] = []  # of every serve and join
        folder.mkdir(parents=True, exist_ok=True)
        make_keys(folder / "keys", self.holders)
        vectors, labels = digits()
        write_records(folder / "test.json", vectors[-300:], labels[-300:])
        for number, name in enumerate(self.holders):
            mine = np.arange(number * records, (number + 1) * records) % (len(labels) - 300)
            (folder / name).mkdir(exist_ok=True)
            write_records(folder / name / "records.json", vectors[mine], labels[mine])
            self.write_holder(name, holder)
        self.write_server(server)
        self.write_recipe(recipe)

    # ------------------------------------------------------------------------------------------------------ the files

    @property
    def server_file(self) -> Path:
        return self.folder / "server.toml"

    def holder_file(self, name: str) -> Path:
        return self.folder / name / "holder.toml"

    def write_server(self, changes: Mapping[str, Any] | None = None) -> None:
        fields = {
            "address": f"127.0.0.1:{self.public}", "control": f"127.0.0.1:{self.control}",
            "metrics": f"127.0.0.1:{self.figures}", "certificates": "keys", "state": "link",
            "holders": [f"keys/{name}.pub" for name in self.holders], **SERVER,
        }  # fmt: skip
        write_toml(self.server_file, merged(fields, changes or {}))

    def write_holder(self, name: str, changes: Mapping[str, Any] | None = None) -> None:
        port = self.proxies[name].port if name in self.proxies else self.public
        fields = {
            "name": name, "server": f"127.0.0.1:{port}", "ca": "../keys/ca.crt", "key": f"../keys/{name}.key", **HOLDER,
        }  # fmt: skip
        write_toml(self.holder_file(name), merged(fields, changes or {}))

    def write_recipe(self, changes: Mapping[str, Any] | None = None, name: str = "recipe.toml") -> Path:
        write_toml(self.folder / name, merged(RECIPE, changes or {}))
        return self.folder / name

    def through_proxy(self, name: str, changes: Mapping[str, Any] | None = None) -> Proxy:
        """Have a holder reach the server through a proxy of ours; before it joins."""
        self.proxies[name] = Proxy(self.public)
        self.write_holder(name, changes)
        return self.proxies[name]

    # -------------------------------------------------------------------------------------------------- the processes

    def start(self, name: str, *arguments: str | Path) -> Process:
        """Run a command of fedhead."""
        process = Process(name, [str(one) for one in arguments], self.folder / "orders" / name, self.mark)
        self.processes.append(process)
        return process

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """A command that asks or refuses, in the process of the test: one of its own would import for seconds."""
        before = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["fedhead", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            sys.argv = before[0]
            for number, handler in before[1].items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())

    def serve(self) -> Process:
        """Start the server; it answers when this returns."""
        self.server = server = self.start("serve", "serve", self.server_file, *self.options)
        until(lambda: self.answers() or not server.alive, what="serve answers")
        assert server.alive, server.text()
        return server

    def answers(self) -> bool:
        """Whether the server takes connections."""
        for port in (self.public, self.control):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                return False
        return True

    def join(self, *names: str) -> list[Process]:
        """Start data holders."""
        return [self.start(name, "join", self.holder_file(name), *self.options) for name in names]

    def online(self) -> int:
        """How many data holders the server's figures show as connected."""
        return int(figures_at(self.figures).get('fedhead_server_nodes{state="online"}', -1))

    def up(self, *names: str) -> dict[str, Process]:
        """A server and data holders, all connected when this returns."""
        self.serve()
        found = dict(zip(names or self.holders, self.join(*(names or self.holders)), strict=True))
        self.all_online(found)
        return found

    def all_online(
        self, processes: Mapping[str, Process], number: int | None = None, seconds: float = PATIENCE
    ) -> None:
        """Wait until so many data holders are connected, by default these; none of the processes may have ended."""

        def there() -> bool:
            for process in processes.values():
                assert process.alive, process.text()
            return self.online() >= (number or len(processes))

        until(there, seconds, "all holders are online")

    def submit(self, out: str = "out", *arguments: str, recipe: Path | None = None) -> Process:
        """Start a run and leave it going."""
        recipe = recipe or self.folder / "recipe.toml"
        return self.start(
            f"submit-{out}", "submit", recipe, "--server", self.server_file, "--out", self.folder / out, *arguments
        )

    def order(self, name: str, role: str, point: str, what: str = "kill") -> Path:
        """Have a process of `name` end (or stop) when it next comes to a failpoint; the file is gone then."""
        path = self.folder / "orders" / name / f"{role}.{point}"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name("aside")
        aside.write_text(what)
        aside.rename(path)
        return path

    def close(self) -> None:
        """End everything."""
        end_all(self.mark)
        for process in self.processes:
            process.popen.wait(30)
        for proxy in self.proxies.values():
            proxy.close()

    # ---------------------------------------------------------------------------------------------- what they left

    def state(self) -> dict[str, Any]:
        """What run.json says of the run under way; empty before there is one."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "link" / "run.json").read_text())
            return found
        except FileNotFoundError:
            return {}

    def rounds_done(self, process: Process) -> int:
        """Rounds that the run of a submit has finished; -1 before the first has begun."""
        found = self.state()
        begun = found.get("pid") == process.popen.pid and found["state"] != "waiting"
        return int(found["round"]) if begun else -1

    def after_round(self, process: Process, number: int, seconds: float = PATIENCE) -> None:
        """Wait until the run of a submit has finished this round; 0: until it has begun."""

        def done() -> bool:
            assert process.alive or self.rounds_done(process) >= number, process.text()
            return self.rounds_done(process) >= number

        until(done, seconds, f"round {number} of {process.name}")

    def until_state(self, process: Process, state: str) -> None:
        """Wait until the run of a submit says that it is in this state."""
        until(lambda: self.state().get("pid") == process.popen.pid and self.state()["state"] == state, what=state)

    def phase(self) -> str:
        """Where the round under way is, as the server's database has it; for runs that ask all holders.

        "between" the rounds, "asked" where a holder has not got its request yet, "training" where all have and none has
        answered, "answering" where some have.
        """
        with contextlib.closing(sqlite3.connect(self.folder / "link" / "link.sqlite", timeout=60)) as database:
            rows = database.execute(
                "SELECT delivered_at != '', EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id = m.message_id)"
                " FROM message_ins AS m WHERE message_type = 'train' AND group_id ="
                " (SELECT group_id FROM message_ins WHERE message_type = 'train' ORDER BY created_at DESC LIMIT 1)"
            ).fetchall()
        answered = sum(reply for _, reply in rows)
        if answered == len(rows):
            return "between"
        if answered or len(rows) < len(self.holders):  # the rows of a reply that was fetched are gone
            return "answering"
        return "training" if all(delivered for delivered, _ in rows) else "asked"

    def result(self, out: str = "out") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / out / "result.json").read_text())
        return found

    def ledger(self, name: str) -> Path:
        return self.folder / name / "state" / "ledger.sqlite"

    def entries(self, name: str) -> list[Entry]:
        """All rows of a holder's ledger, its chain checked."""
        with Ledger(self.ledger(name), create=False, read_only=True) as ledger:
            ledger.verify()
            return list(ledger.entries())

    def charges(self, name: str) -> dict[int, Counter[str]]:
        """Round -> how often it was reserved, released, abandoned; of the ledger's last run."""
        entries = self.entries(name)
        reserves = {one.sequence: one for one in entries if one.kind == "reserve"}
        last = max(reserves.values(), key=lambda one: one.sequence).run if reserves else ""
        found: dict[int, Counter[str]] = {}
        for one in entries:
            of = one if one.kind == "reserve" else reserves.get(one.of or 0)
            if of is not None and of.run == last and of.round is not None:
                found.setdefault(of.round, Counter())[one.kind] += 1
        return found

    def spent(self, name: str) -> float:
        """Epsilon that a holder's ledger says was spent in all."""
        from fedhead.simulations.budgets import read_budgets

        (domain,) = read_budgets([self.ledger(name)])["domains"]
        return float(domain["spent"]["epsilon"])

    def audited(self, *names: str) -> None:
        """Every ledger passes its audit."""
        from fedhead.simulations.audit.ledgers import audit_ledgers

        for name in names or self.holders:
            found = audit_ledgers([self.ledger(name)])
            assert found["passed"], found


# ------------------------------------------------------------------------------------------------------------ the files


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 pictures of digits as vectors of 64 numbers from 0 to 1, in a fixed random order, and their labels."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.data[order] / 16, found.target[order].astype(str)


def write_records(path: Path, vectors: np.ndarray, labels: np.ndarray) -> None:
    """One record a line."""
    rows = zip(vectors.tolist(), labels.tolist(), strict=True)
    path.write_text("\n".join(json.dumps({"vector": vector, "label": label}) for vector, label in rows))


def merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with changes; None takes a setting away."""
    found = dict(fields)
    for name, value in changes.items():
        before = found.get(name)
        found[name] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return {name: value for name, value in found.items() if value is not None}


def write_toml(path: Path, fields: Mapping[str, Any]) -> None:
    """Nested settings as a TOML file, every top-level table as one; whoever reads it has the old one or the new."""
    plain = [f"{name} = {_value(value)}" for name, value in fields.items() if not isinstance(value, Mapping)]
    tables = [
        "\n".join([f"[{name}]", *(f"{key} = {_value(one)}" for key, one in value.items())])
        for name, value in fields.items()
        if isinstance(value, Mapping)
    ]
    aside = path.with_suffix(".aside")
    aside.write_text("\n".join([*plain, *tables]) + "\n")
    aside.rename(path)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)
