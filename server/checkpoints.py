"""Checkpoints of a run: head, strategy state, history, in one file that is replaced as a whole.

A run that goes on from a checkpoint repeats the rounds after it. In a simulation the same seed gives the same noise
again, so the repeated rounds release the same bits and the head at the end is the one of an unbroken run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedhead.common.errors import InputError
from fedhead.common.privacy.ledger import Mark
from fedhead.common.writing import write_aside
from fedhead.server.rounds import RoundRecord

FOLDER = "checkpoints"
FILE = "latest.safetensors"
# What Flower's strategies remember from round to round; the others remember nothing.
MEMORY = ("momentum_vector", "m_t", "v_t")


@dataclass(frozen=True)
class Checkpoint:
    """A run after some rounds.

    Attributes
    ----------
    recipe : str
        As `to_json` writes it.
    run : str
        Identifier of the run.
    round : int
        Rounds that are finished.
    head : mapping of str to Tensor
    memory : mapping of str to (list or dict of arrays)
        Of the strategy.
    history : list of RoundRecord
    metrics : dict of int to metrics
        Of the evaluated rounds.
    marks : mapping of str to Mark
        Holder -> the last of its ledger that was seen.
    """

    recipe: str
    run: str
    round: int
    head: Mapping[str, Tensor]
    memory: Mapping[str, Any]
    history: list[RoundRecord]
    metrics: dict[int, dict[str, float]]
    marks: Mapping[str, Mark] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Put the checkpoint in `out/checkpoints`, in place of the last one: a reader finds one or the other whole."""
        tensors = {f"head/{name}": value.detach().clone().contiguous() for name, value in self.head.items()}
        for attribute, value in self.memory.items():
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            tensors |= {f"memory/{attribute}/{key}": torch.from_numpy(np.array(array)) for key, array in pairs}
        state = {
            "recipe": self.recipe, "run": self.run, "round": self.round, "metrics": self.metrics,
            "history": [asdict(record) for record in self.history],
            "marks": {name: list(mark) for name, mark in self.marks.items()},
            "lists": [name for name, value in self.memory.items() if not isinstance(value, dict)],
        }  # fmt: skip
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / FILE, save(tensors, metadata={"state": json.dumps(state)}))

    @classmethod
    def read(cls, out: Path, recipe: str) -> Checkpoint | None:
        """The last checkpoint of a run, or None where there is none.

        Raises
        ------
        InputError
            When it is broken, or of another recipe.
        """
        path = out / FOLDER / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            memory: dict[str, dict[str, Any]] = {}
            for name, value in tensors.items():
                if name.startswith("memory/"):
                    _, attribute, key = name.split("/", 2)
                    memory.setdefault(attribute, {})[key] = value.numpy()
            found = cls(
                recipe=state["recipe"],
                run=state["run"],
                round=state["round"],
                head={name.removeprefix("head/"): value for name, value in tensors.items() if name[:5] == "head/"},
                memory={
                    name: [value[str(i)] for i in range(len(value))] if name in state["lists"] else value
                    for name, value in memory.items()
                },
                history=[RoundRecord(**record) for record in state["history"]],
                metrics={int(number): metrics for number, metrics in state["metrics"].items()},
                marks={name: Mark(*mark) for name, mark in state["marks"].items()},
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'--resume: the checkpoint "{path}" can\'t be read. Start the run anew in another folder.'
            ) from error
        if found.recipe != recipe:
            raise InputError(
                f'--resume: the checkpoint "{path}" is of another recipe or other settings. '
                "Give those of the run that was stopped, or start anew in another folder."
            )
        return found


def memory_of(strategy: FedAvg) -> dict[str, Any]:
    """What a strategy remembers: attribute -> list or dict of arrays."""
    return {name: getattr(strategy, name) for name in MEMORY if getattr(strategy, name, None)}


def remember(strategy: FedAvg, memory: Mapping[str, Any]) -> None:
    """Give a new strategy the memory of an old one of the same kind."""
    for name, value in memory.items():
        setattr(strategy, name, value)
