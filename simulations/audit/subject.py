"""What the mechanism's audit runs: a recipe's production training path, ready to be asked for rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedhead.client.admission import Admission, event_of_request
from fedhead.client.app import step_plan
from fedhead.client.auditing.canaries import Canaries, craft, entry_weight
from fedhead.client.auditing.planted import PlantedCanaries, linear_layers, most_planted, plant
from fedhead.client.gradients import ClosedForm
from fedhead.client.training import CHUNK, StepPlan, Trainer
from fedhead.client.workplace import Workplace, holder_name
from fedhead.common.config import RunConfig
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.preparation import Labelled, featurize, load_backbone_for, make_trainable, read_split
from fedhead.common.privacy.events import Event
from fedhead.common.privacy.noise import Streams
from fedhead.common.round_request import RoundRequest
from fedhead.common.tasks import Task, make_task
from fedhead.server.desk import declared_records
from fedhead.server.requests import make_plan
from fedhead.simulations.afford import most_asked

LEAST_NOISE: Final = 1e-3  # noise multiplier: rounding, of about 1e-6 clipping norms, would show in less noise
MOST_NUMBERS: Final = 60_000_000  # residuals that are kept: half a gigabyte
MOST_GRADIENTS: Final = 4_000_000_000  # numbers of gradients, one after the other, that the reference takes: a minute
MOST_PLANTED: Final = 512  # canaries, unless more are asked for; half as many more records that each step takes


class NotAudited(InputError):
    """The recipe is sound, and its mechanism is none that canaries can audit."""


@dataclass(frozen=True)
class Subject:
    """What is audited: a recipe's production training path, ready to be asked for rounds.

    `width` is the length of the head's feature vectors. `planted` says that canaries are crafted gradients, not crafted
    records: wherever clipping has no closed form.
    """

    config: RunConfig
    request: RoundRequest
    plan: StepPlan
    rounds: int
    task: Task
    make: Callable[[], Trainable]
    real: Labelled
    width: int
    planted: bool
    streams: Callable[[int], Streams]
    place: Callable[[Admission], Workplace]

    @property
    def events(self) -> list[Event]:
        """What the rounds are charged with: the claim."""
        return [event_of_request(self.request)] * self.rounds


def why_not(config: RunConfig) -> str | None:
    """Why a recipe's mechanism can't be audited, in one line with a remedy; None if it can."""
    privacy = config.privacy
    if privacy.mechanism == "none":
        return 'privacy.mechanism is "none": there is no noise to audit. Set it to "full-batch" or "poisson".'
    if privacy.unit == "holder":
        return (
            "privacy.unit is \"holder\": its noise is the server's, and no holder's training has any. Audit the units "
            '"record" and "person".'
        )
    return None


@contextmanager
def refusals() -> Iterator[None]:
    """What the auditor's parts refuse is no fault of the recipe."""
    try:
        yield
    except InputError as fault:
        raise NotAudited(str(fault)) from fault


def check_seed(seed: int | None) -> None:
    """Refuse a seed that no generator takes."""
    if seed is not None and seed < 0:
        raise InputError(f"--seed is {seed}: it must be at least 0. Leave it out for a deployment's noise.")


def make_subject(config: RunConfig, records: int, seed: int | None, cache: Path) -> Subject:
    """A holder's training path for a recipe, on some of its records.

    Raises
    ------
    InputError
        The records or the model can't be used, or the head can't be audited.
    """
    task = make_task(config.task)
    split = read_split(config)
    declared, _ = declared_records(config, split.units)
    rows = np.concatenate(split.holders) if split.persons is None else split.persons[0].rows
    offsets = None if split.persons is None else split.persons[0].offsets[: records + 1]
    rows = rows[:records] if offsets is None else rows[: offsets[-1]]
    chosen = split.train.select(rows)
    backbone, _ = load_backbone_for(config, chosen)
    real = featurize(config, backbone, chosen, cache, "features")
    if offsets is not None:
        real = real.by_person(offsets)

    def make() -> Trainable:
        made = make_trainable(config, backbone, task)
        return made if seed is not None else made.double()

    head = make()
    planted = not ClosedForm.fits(head, task)
    if planted and not linear_layers(head):
        raise NotAudited(
            "model.head is not audited by canaries: their gradients are planted in trained linear layers, and it has "
            "none. Use torch.nn.Linear in it."
        )
    request = make_plan(config, "audit", backbone.digest, declared, most_asked(config)).request(1)
    request = request.model_copy(update={"seed": seed})
    # counts are a release of their own, on records kept apart; training is what is audited
    request = request.model_copy(update={"metrics_noise": None, "plan_counts": None})

    def place(admission: Admission) -> Workplace:
        return Workplace(config, backbone.digest, Trainer(make(), task), [], admission)

    idle = place(Admission(None, simulated=seed is not None))

    def streams(number: int) -> Streams:
        return idle.streams(request.model_copy(update={"round": number}), holder_name(0))

    numbers = sum(p.numel() for p in head.trained().values()) * request.local_steps
    taken = numbers * max(1, int(len(real) * (config.privacy.sample_rate or 1.0)))
    rounds = max(1, min(most_asked(config), MOST_NUMBERS // numbers, MOST_GRADIENTS // taken))
    plan = step_plan(request, declared, CHUNK)
    if plan.noise_multiplier < LEAST_NOISE:
        raise NotAudited(
            f"privacy.noise_multiplier is {plan.noise_multiplier:g}: below {LEAST_NOISE:g} rounding would be taken for "
            "wrong noise. Audit the recipe with more noise."
        )
    return Subject(config, request, plan, rounds, task, make, real, backbone.dim, planted, streams, place)


def canaries_for(subject: Subject, number: int | None, generator: np.random.Generator) -> Canaries | PlantedCanaries:
    """Canaries for a subject: so many, or as many as there are features, or a bounded number of crafted gradients.

    Raises
    ------
    InputError
        More than there are places.
    """
    most = most_canaries(subject)
    if number is not None and not 1 <= number <= most:
        each = "a trained number" if subject.planted else "a feature"
        raise InputError(
            f"--canaries is {number}: it must be from 1 to {most}, because each takes {each} for itself. Leave it "
            f"out for {'the most' if most <= MOST_PLANTED or not subject.planted else MOST_PLANTED}."
        )
    return crafted(subject, number or (min(most, MOST_PLANTED) if subject.planted else most), generator)


def most_canaries(subject: Subject) -> int:
    """As many as there are places of their own."""
    return most_planted(linear_layers(subject.make())) if subject.planted else subject.real.features.shape[-1]


def crafted(subject: Subject, number: int, generator: np.random.Generator) -> Canaries | PlantedCanaries:
    """So many canaries of the kind that a subject takes."""
    if not subject.planted:
        return crafted_records(subject, number, generator)
    with refusals():
        return plant(
            number,
            subject.make(),
            subject.real.features,
            subject.task.outputs,
            clipping_norm=subject.plan.clipping_norm,
            records_per_person=_per_person(subject.config),
            generator=generator,
        )


def crafted_records(subject: Subject, number: int, generator: np.random.Generator) -> Canaries:
    """So many canaries that are crafted feature vectors."""
    return craft(
        number,
        subject.real.features.shape[-1],
        subject.task.outputs,
        normalize=subject.config.model.features.normalize,
        clipping_norm=subject.plan.clipping_norm,
        records_per_person=_per_person(subject.config),
        generator=generator,
    )


def takes_records(subject: Subject) -> bool:
    """Whether crafted feature vectors show in a column of their own: a trained linear layer reads them, and no dropout
    comes behind it."""
    try:
        entry_weight(subject.make())
    except InputError:
        return False
    return True


def _per_person(config: RunConfig) -> int | None:
    return config.privacy.records_per_person if config.privacy.unit == "person" else None
