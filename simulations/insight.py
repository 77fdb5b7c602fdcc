"""What the simulator, and nobody in a deployment, knows of a run: each holder's records, labels and accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fedhead.client import workplace
from fedhead.common.config.schema import ColumnPartition
from fedhead.common.data.persons import names_of
from fedhead.common.preparation import make_trainable
from fedhead.common.results import Result
from fedhead.common.tasks import make_task
from fedhead.server.evaluation import left_out, load_state, outputs_of
from fedhead.simulations.logs import FILE as HOLDERS_LOG
from fedhead.simulations.prepared import Prepared
from fedhead.simulations.show import refusals_of


def holders_of(prepared: Prepared, folder: Path) -> list[dict[str, Any]]:
    """What the simulator, and nobody in a deployment, knows of each holder: records, labels, accuracy."""
    config, split = prepared.config, prepared.split
    task = make_task(config.task)
    trainable = make_trainable(config, prepared.backbone, task)
    load_state(trainable, load_file(folder / "model" / "head.safetensors"))
    held_out = bool(split.holder_tests)
    source, rows = (prepared.test, split.holder_tests) if held_out else (prepared.train, split.holders)
    outputs, usable = outputs_of(trainable, source), source.features.finite().numpy()
    partition = config.holders.partition
    values = split.train.column(partition.column) if isinstance(partition, ColumnPartition) else None
    found = []
    for number, (part, test) in enumerate(zip(split.holders, rows, strict=True)):
        counts = np.bincount(split.train.labels[part], minlength=len(config.task.labels))
        mine = torch.from_numpy(test[usable[test]])
        found.append(
            {
                "name": workplace.holder_name(number),
                "records": len(part),
                **({} if split.persons is None else {"persons": len(split.persons[number])}),
                **({} if values is None else {"value": str(values[part[0]])}),
                "labels": dict(zip(config.task.labels, counts.tolist(), strict=True)),
                "metrics": task.metrics(outputs[mine], source.targets[mine]) if len(mine) else {},
                "metrics_on": "held-out records" if held_out else "its own training records",
            }
        )
    return found


def notes_of(prepared: Prepared, result: Result) -> list[str]:
    """What a reader of the result should know."""
    notes = []
    if result.declared_records["origin"] != "recipe":
        notes.append(
            f"data.declared_records was not given: {result.declared_records['value']} was taken from the size of the "
            "simulated data. A deployment needs a public constant, because the true count is a release."
        )
    if prepared.config.privacy.mechanism == "none":
        notes.append("This run had no privacy: nothing was clipped, no noise was added, epsilon is infinite.")
    else:
        if prepared.config.privacy.unit == "holder":
            notes.append(
                "What is protected is each holder's whole update, and the server adds the noise: it sees every update "
                "and is trusted to do so. Which holders were asked and answered is not hidden."
            )
        notes.append(
            "Noise came from the seed, as in every simulation: for whoever knows it, epsilon is infinite. Deployed "
            "holders draw it on their own machine."
        )
    notes += _persons_notes(prepared)
    corrupt = int((~prepared.train.features.finite()).sum())
    if corrupt:
        records = "training record" if corrupt == 1 else "training records"
        notes.append(f"{corrupt} {records} could not be read or gave no finite features; they count as zero.")
    notes += left_out(prepared.test)
    missing = sum(one["times"] for one in refusals_of(result.rounds))
    if missing:
        are = "update is" if missing == 1 else "updates are"
        notes.append(f"{missing} {are} missing; {HOLDERS_LOG} in the folder has what each holder wrote.")
    return notes


def _persons_notes(prepared: Prepared) -> list[str]:
    """What epsilon doesn't say of persons."""
    privacy, split = prepared.config.privacy, prepared.split
    if privacy.person is None or privacy.unit == "holder" or privacy.mechanism == "none":
        return []
    if privacy.unit == "record":
        return [
            f'Every epsilon here is for one record. privacy.person is "{privacy.person}": somebody with several '
            'records is protected less than it says. Set privacy.unit = "person" for figures that hold for persons.'
        ]
    names = names_of(split.train, privacy.person)
    _, holders = np.unique(np.concatenate([np.unique(names[part]) for part in split.holders]), return_counts=True)
    several = int((holders > 1).sum())
    if not several:
        return []
    return [
        f"{several} persons have records at more than one holder: each of them pays the sum of what those holders "
        "spent, which is more than any epsilon here. Holders can't know that of each other."
    ]
