"""What a data holder's process keeps between messages: features, targets, the trained part, its trainer, its ledger.

In a simulation in one process, the engine puts it here once for all holders. Any other process (a Ray worker, `flwr
run`) prepares it from the recipe when the first message arrives, from the feature cache if that is warm. A data holder
of a deployment is named by the node's own config, and prepared from its own file: deployed.py.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flwr.app import Context

from fedhead.client.admission import Admission
from fedhead.client.holder import digest_of
from fedhead.client.placing import place
from fedhead.client.together import Together
from fedhead.client.training import Trainer
from fedhead.common.config import RunConfig, from_json
from fedhead.common.config.limits import Limits
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import (
    Labelled,
    Split,
    default_cache,
    featurize,
    load_backbone_for,
    make_trainable,
    read_split,
)
from fedhead.common.privacy.ledger import Ledger
from fedhead.common.privacy.noise import Streams, simulation_streams, system_streams
from fedhead.common.privacy.secure import choose_source
from fedhead.common.round_request import RoundRequest
from fedhead.common.tasks import make_task

log = logging.getLogger("fedhead.client")


@dataclass(frozen=True)
class Workplace:
    """All that training needs, the same for every holder of a process but for the records.

    Attributes
    ----------
    config : RunConfig
    backbone : str
        Digest of the backbone.
    trainer : Trainer
        Bound to the trained part; one round at a time.
    holders : sequence of (name, Labelled)
        By partition id.
    admission : Admission
        Limits and ledger.
    holdouts : mapping of str to Labelled
        Holder -> records that it keeps apart from training, for noised metrics.
    together : Together
        Simulated holders whose round is trained side by side; stays empty in a deployment.
    """

    config: RunConfig
    backbone: str
    trainer: Trainer
    holders: list[tuple[str, Labelled]]
    admission: Admission
    holdouts: dict[str, Labelled] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    together: Together = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "together", Together(self.trainer))

    @property
    def trainable(self) -> Trainable:
        """The trained part as one module."""
        trainable: Trainable = self.trainer.trainable
        return trainable

    @property
    def declared_records(self) -> int | None:
        """The holder's own public constant, which goes before the request's."""
        limits = self.admission.limits
        return None if limits is None else limits.release.declared_records

    def streams(self, request: RoundRequest, name: str) -> Streams:
        """The random streams of a round.

        A seed that arrives is for simulated holders: whoever sent it can draw the noise again.
        """
        admission = self.admission
        allowed = admission.simulated or (admission.limits is not None and admission.limits.allow_seeded_noise)
        if allowed and request.seed is not None:
            return simulation_streams(request.seed, name, request.round)
        coordinates = sum(value.numel() for value in self.trainable.trained().values())
        bound = Limits().exact_noise_seconds if admission.limits is None else admission.limits.exact_noise_seconds
        return system_streams(choose_source(coordinates, request.local_steps, bound))


LEDGER = "holders/ledgers.sqlite"
"""The ledger of all simulated holders, in the folder of the run or in the one that keeps the holders between runs."""


class Place(NamedTuple):
    """What a workplace was opened for.

    Attributes
    ----------
    recipe : str
        As `to_json` writes it.
    holder : str
        Path of a deployed holder's file; empty in a simulation.
    digest : str
        Of that file: one that is edited opens the holder anew, so that its budget and limits are those it names now.
    """

    recipe: str
    holder: str = ""
    digest: str = ""


_WORKPLACES: dict[Place, Workplace] = {}
_OPENING = threading.Lock()


def holder_name(number: int) -> str:
    """The name of a simulated holder, sorted by name in the order of numbers."""
    return f"holder-{number:05d}"


def offer(key: str, workplace: Workplace) -> None:
    """Keep a workplace that the engine prepared; `key` is the recipe as `to_json` writes it."""
    _WORKPLACES[Place(key)] = workplace


def withdraw(key: str) -> None:
    """Forget a workplace."""
    _WORKPLACES.pop(Place(key), None)


def workplace_of(context: Context) -> tuple[Workplace, str, Labelled]:
    """The workplace, name and records of the holder that a message is for.

    Raises
    ------
    FedheadError
        It can't be opened, or a deployed holder's file can't be read any more.
    """
    with _OPENING:
        return _workplace_of(context)


def is_open(context: Context) -> bool:
    """Whether the workplace that a message is for is there already, opened by the holder's file as it is now."""
    return _place(context) in _WORKPLACES


def _place(context: Context) -> Place:
    own = str(context.node_config.get("holder", ""))  # what the holder gave its node; a server can't set it
    return Place(str(context.run_config.get("recipe", "")), own, digest_of(Path(own)) if own else "")


def _workplace_of(context: Context) -> tuple[Workplace, str, Labelled]:
    key, place = str(context.run_config["recipe"]), _place(context)
    own = place.holder
    workplace = _WORKPLACES.get(place)
    if workplace is None:
        if own:
            from fedhead.client.deployed import deploy

            if any(other.holder == own and other.digest != place.digest for other in _WORKPLACES):
                log.info("%s has changed: read anew", Path(own).name)
            workplace = deploy(Path(own), key)
        else:
            cache, ledger = (str(context.run_config.get(name, "")) for name in ("cache", "ledger"))
            out = str(context.run_config.get("out", "")) or "runs/latest"
            workplace = prepare(
                resolve_recipe(key),
                Path(cache) if cache else default_cache(),
                Path(ledger) if ledger else Path(out) / LEDGER,
            )
        for old in _WORKPLACES.values():
            with old.lock:  # a round of it may be under way
                old.admission.close()
        _WORKPLACES.clear()
        _WORKPLACES[place] = workplace
    number = 0 if own else int(context.node_config["partition-id"])
    return workplace, *workplace.holders[number]


def resolve_recipe(text: str) -> RunConfig:
    """A recipe from run config: JSON of `to_json`, a file's path, or the name of a built-in recipe."""
    if text.lstrip().startswith("{"):
        return from_json(text)
    from fedhead.common.config import find_recipe

    return find_recipe(text)


def prepare(config: RunConfig, cache: Path | None, ledger: Path) -> Workplace:
    """A workplace of simulated holders, from the recipe alone."""
    split = read_split(config)
    backbone, _ = load_backbone_for(config, split.train)
    train = featurize(config, backbone, split.train, cache, "training features")
    trainable = make_trainable(config, backbone, make_task(config.task))
    return arrange(config, backbone.digest, trainable, train, split, ledger)


def arrange(
    config: RunConfig, digest: str, trainable: Trainable, train: Labelled, split: Split, ledger: Path | None
) -> Workplace:
    """A workplace from features, each holder's records contiguous: one copy of the features, whatever the holders.

    Parameters
    ----------
    ledger : Path or None
        The ledger of all simulated holders; None for a comparison that nobody is charged for.
    """
    names = [holder_name(number) for number in range(len(split.holders))]
    placed = place(config, train, split, names)
    admission = Admission(
        None if ledger is None else Ledger(ledger),
        config.holders.limits,
        config.holders.budget,
        {} if ledger is None else fingerprints(split),
        simulated=True,
    )
    trainer = Trainer(trainable, make_task(config.task))
    return Workplace(config, digest, trainer, placed.training, admission, placed.apart)


def fingerprints(split: Split) -> dict[str, str]:
    """Holder -> digest of its training records, whatever their order: evidence in the ledger, never what decides."""
    digests, labels = split.train.digests(), split.train.labels
    return {holder_name(number): fingerprint(digests[part], labels[part]) for number, part in enumerate(split.holders)}


def fingerprint(digests: np.ndarray, labels: np.ndarray, key: bytes = b"") -> str:
    """Digest of records, whatever their order.

    Parameters
    ----------
    digests : uint8 array, shape (N, 16)
        Of the inputs.
    labels : int64 array, shape (N,)
    key : bytes
        A secret of the holder's, in a deployment: hashes over the fingerprint leave it, and without a key whoever
        guesses the records could recompute them.
    """
    rows = np.concatenate([digests, labels.astype("<i8").view(np.uint8).reshape(len(labels), 8)], axis=1)
    ordered = rows[np.lexsort(rows.T[::-1])] if len(rows) else rows
    return blake2b(np.ascontiguousarray(ordered).tobytes(), digest_size=16, key=key).hexdigest()
