"""The gradient paths: three ways to the same clipped sum of per-record gradients.

    closed-form   a linear head with cross-entropy: no gradient a record, about the cost of plain training
    ghost         any head: norms from Opacus's hooks, and the sum of the same backward pass
    hooks         Opacus's per-record gradients, held in memory; slow and simple, to compare with

Each adds to ``p.summed_grad`` of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedhead.client.gradients import ClosedForm, GradientPath
from fedhead.client.hooked import Ghost, Hooks
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task

PATHS: Final[Mapping[str, type[GradientPath]]] = {"closed-form": ClosedForm, "ghost": Ghost, "hooks": Hooks}


def make_path(trainable: Trainable, task: Task, name: str | None = None) -> GradientPath:
    """The gradient path of a head and task.

    Parameters
    ----------
    trainable : Trainable
    task : Task
    name : "closed-form", "ghost", "hooks" or None
        None: closed form where it is the gradient, else ghost.

    Raises
    ------
    InputError
        An unknown name, or the closed form for a head or loss it is not made for.
    """
    fits = ClosedForm.fits(trainable, task)
    if name is None:
        name = "closed-form" if fits else "ghost"
    if name not in PATHS:
        raise InputError(f"path is {name!r}: it must be one of {', '.join(PATHS)}. Leave it out for the quickest.")
    if name == "closed-form" and not fits:
        raise InputError(
            "path is 'closed-form': it needs a linear head with nothing else trained and a cross-entropy task. Use "
            "'ghost'."
        )
    return PATHS[name](trainable, task)
