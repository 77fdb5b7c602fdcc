"""Exchanges between a server and two data holders, real processes on loopback with TLS and node keys.

Delay: from the moment that the server has a round's requests to the moment that it has both replies, beyond the slower
training (which includes admission, ledger and noise), over 20 warm exchanges of a head of 650 numbers and again of a
million. Goal: median at most 4 s, 95 % at most 7 s.

Bytes: what each holder's connections carry within such an exchange, TLS and all headers included, idle polls between
exchanges left out; counted by a TCP proxy in front of each holder. Goal at a million float32 numbers: at most 1.05
times their size plus 16 KiB, up and down.

    python benchmarks/exchange.py [--exchanges 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "federation" / "deployment"))

from deployment_harness import LABELS, RECIPE, Federation, free_ports, write_records
from deployment_processes import until
from flwr.app import Message, MessageType, RecordDict

from fedhead.common import protocol
from fedhead.common.config import make_config, to_json
from fedhead.common.models.backbones import load_backbone
from fedhead.common.round_request import RoundRequest
from fedhead.server.server_file import load_server
from fedhead.server.submitting.session import Session

GOAL_MEDIAN, GOAL_95, GOAL_FACTOR, GOAL_FIXED = 4.0, 7.0, 1.05, 16 * 1024
SIZES = {"650 numbers": 64, "a million numbers": 100_000}  # features of a record; ten labels
WARM_UP = 2  # exchanges
TRAINED = "fedhead_holder_training_seconds"


def trained(port: int) -> tuple[int, float]:
    """How many rounds a holder has trained, and how long they took in all, by its own figures."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines()]
    found = {words[0]: float(words[-1]) for words in lines if words and words[0].startswith(TRAINED)}
    return int(found.get(f"{TRAINED}_count", 0)), found.get(f"{TRAINED}_sum", 0.0)


def measure(folder: Path, features: int, exchanges: int) -> dict[str, Any]:
    ours = Federation(folder, ["north", "south"], holder={"budget": {"epsilon": 100.0}})
    try:
        rng, ports = np.random.default_rng(0), dict[str, int]()
        for name in ours.holders:
            ports[name] = free_ports(1)[0]
            ours.through_proxy(name, {"budget": {"epsilon": 100.0}, "metrics": f"127.0.0.1:{ports[name]}"})
            vectors = rng.random((20, features)).round(2)
            write_records(ours.folder / name / "records.json", vectors, rng.choice(LABELS, 20))
        ours.up()
        config = make_config(RECIPE, base=folder)
        digest = load_backbone(config.model, folder, vector_size=features).digest
        with Session(load_server(ours.server_file), to_json(config)) as session:
            nodes = {one.name: one.node for one in session.registered()}
            found = [
                exchange(ours, session, ports, nodes, digest, features, number + 1)
                for number in range(WARM_UP + exchanges)
            ][WARM_UP:]
            session.close("completed")
    finally:
        ours.close()
    delays = sorted(one["delay"] for one in found)
    size = 4 * (features + 1) * len(LABELS)
    return {
        "parameter_bytes": size,
        "limit_bytes": GOAL_FACTOR * size + GOAL_FIXED,
        "median_seconds": statistics.median(delays),
        "seconds_95": float(np.quantile(delays, 0.95)),
        "longest_seconds": delays[-1],
        "training_seconds": statistics.median(one["training"] for one in found),
        "bytes_down": statistics.median(one["down"] for one in found),
        "bytes_up": statistics.median(one["up"] for one in found),
        "most_bytes_down": max(one["down"] for one in found),
        "most_bytes_up": max(one["up"] for one in found),
    }


def exchange(
    ours: Federation,
    session: Session,
    ports: dict[str, int],
    nodes: dict[str, int],
    digest: str,
    features: int,
    number: int,
) -> dict[str, float]:
    """One round: seconds beyond the slower training, and the most bytes of a holder."""
    time.sleep(random.Random(number).uniform(0.5, 3.0))  # exchanges must not fall into step with anybody's pauses
    rng = np.random.default_rng(number)
    import torch

    head = protocol.to_arrays({
        "head.weight": torch.from_numpy(rng.normal(0, 0.01, (len(LABELS), features))),
        "head.bias": torch.zeros(len(LABELS)),
    })  # fmt: skip
    request = RoundRequest.model_validate({
        "run": "benchmark", "round": number, "task": "classification", "backbone": digest, "mechanism": "full-batch",
        "noise_multiplier": 20.0, "clipping_norm": 0.3, "local_steps": 1, "declared_records": 300,
        "optimizer": {"kind": "sgd"}, "learning_rate": 1.0, "plan_steps": 1, "seed": 0,
    })  # fmt: skip
    content = RecordDict({protocol.ARRAYS: head, protocol.CONFIG: protocol.round_config(request)})
    before = {name: (proxy.up, proxy.down) for name, proxy in ours.proxies.items()}
    earlier = {name: trained(port) for name, port in ports.items()}
    began = time.perf_counter()
    messages = [Message(content, node, MessageType.TRAIN, ttl=300.0) for node in nodes.values()]
    replies = session.grid.send_and_receive(messages, timeout=300.0)
    seconds = time.perf_counter() - began
    carried = [(proxy.up - before[name][0], proxy.down - before[name][1]) for name, proxy in ours.proxies.items()]
    assert len(replies) == len(nodes)
    assert not any(reply.has_error() for reply in replies), [str(one.error) for one in replies if one.has_error()]
    for name, port in ports.items():
        until(lambda name=name, port=port: trained(port)[0] > earlier[name][0], what="the holder's figures")
    slowest = max(trained(port)[1] - earlier[name][1] for name, port in ports.items())
    return {
        "delay": seconds - slowest, "training": slowest,
        "up": max(up for up, _ in carried), "down": max(down for _, down in carried),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(Path(folder) / str(size), size, given.exchanges) for name, size in SIZES.items()}
    if given.json:
        print(json.dumps(found))
        return
    print(f"{'':<18} {'median':>8} {'95 %':>8} {'longest':>8} {'training':>9}   {'down':>16} {'up':>16}")
    for name, row in found.items():
        print(
            f"{name:<18} {row['median_seconds']:6.2f} s {row['seconds_95']:6.2f} s {row['longest_seconds']:6.2f} s "
            f"{row['training_seconds']:7.2f} s   {_over(row, 'down'):>16} {_over(row, 'up'):>16}"
        )
    print(f"goals              {GOAL_MEDIAN:6.2f} s {GOAL_95:6.2f} s   bytes at a million: {GOAL_FACTOR} x + 16 KiB")


def _over(row: dict[str, Any], way: str) -> str:
    """Bytes as a multiple of the parameters' size, and what is beyond it."""
    size = row["parameter_bytes"]
    return f"{row[f'bytes_{way}'] / size:.4f}x, +{(row[f'bytes_{way}'] - size) / 1024:.1f} KiB"


if __name__ == "__main__":
    main()
