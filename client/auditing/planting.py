"""Hooks that give canaries' rows of a module their crafted gradients; see planted.py.

Shapes: B units of a call, T records of a person, n rows of a call that are canaries.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedhead.client.auditing.planted import LONG, MARK, Layer, PlantedCanaries, marked, unmarked
from fedhead.common.errors import InputError
from fedhead.common.models.trainable import Trainable
from fedhead.common.tasks import Task


@dataclass
class _Call:
    """Which rows of one forward pass are canaries.

    `number` (n,) says which canary a marked row is, `row` (n,) where it lies among the rows, whose dimensions are
    `shape`: B, or B and T of persons. `upstream` (n,) is what the loss of each is multiplied by in the backward pass
    that runs.
    """

    number: Tensor
    row: Tensor
    shape: torch.Size
    upstream: Tensor


class Planting:
    """Hooks that let a module have crafted gradients in canaries' rows.

    Notes
    -----
    What a leaf's input is, and what gradient its output gets, is changed before Opacus's own hooks look, and autograd
    goes on with the same: norms and sums, in one pass or several, see one and the same record. A
    canary's outputs are cut off, so that no other layer gets a gradient of it; what enters its layer is a constant, so
    none flows further back. A path with a second pass would multiply each loss by the record's clip factor;
    the crafted gradient is multiplied by what arrives at the canary's own loss, as any other would be.
    """

    def __init__(self, canaries: PlantedCanaries, trainable: Trainable) -> None:
        self.canaries = canaries
        self.call: _Call | None = None
        trainable.register_forward_pre_hook(self._recognise)
        trainable.register_forward_hook(self._cut)
        for index, layer in enumerate(canaries.layers):
            module = trainable.get_submodule(layer.name)
            mine = torch.from_numpy(canaries.layer == index)
            module.register_forward_pre_hook(partial(self._enter, mine, layer))
            module.register_full_backward_pre_hook(partial(self._leave, mine))
        self.output, self.input = torch.from_numpy(canaries.output), torch.from_numpy(canaries.input)
        self.length = torch.from_numpy(canaries.length)

    def watched(self, task: Task) -> Task:
        """A copy of the task whose losses of canaries tell what they are multiplied by."""
        made, losses = copy.copy(task), task.losses

        def watched(outputs: Tensor, targets: Tensor) -> Tensor:
            call, flat = self.call, outputs.detach().flatten(1)
            if call is None:
                return losses(outputs, targets)
            mine = marked(flat, len(call.number))
            shown = mine.view(-1, *[1] * (outputs.dim() - 1))
            found = losses(outputs.masked_fill(shown, 0.0), targets).masked_fill(mine, 0.0)
            slots = unmarked(flat[mine, 0])

            def look(gradient: Tensor) -> None:
                call.upstream = gradient.new_zeros(len(call.number)).index_copy(0, slots, gradient[mine])

            if found.requires_grad:
                found.register_hook(look)  # type: ignore[no-untyped-call]
            return found

        object.__setattr__(made, "losses", watched)
        return made

    def _recognise(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        values = given[0]
        over = 2 if self.canaries.records is not None and values.dim() == len(self.canaries.shape) + 2 else 1
        flat = values.detach().flatten(0, over - 1)
        # of a text the first token, because padding follows
        first = flat[:, 0].flatten(1) if self.canaries.ragged and flat.shape[1:2] != (0,) else flat.flatten(1)
        found = marked(first, len(self.canaries))
        if not bool(found.any()):
            self.call = None
            return None
        row = found.nonzero()[:, 0]
        self.call = _Call(unmarked(first[row, 0]), row, values.shape[:over], values.new_zeros(len(row)))
        shape = self.canaries.shape
        ordinary = torch.linspace(-1, 1, math.prod(shape), dtype=values.dtype).view(shape)
        shown = found.view(*values.shape[:over], *[1] * (values.dim() - over))
        return (torch.where(shown, ordinary, values), *given[1:])

    def _cut(self, _: nn.Module, __: tuple[Any, ...], outputs: Tensor) -> Tensor | None:
        call = self.call
        if call is None:
            return None
        slots = torch.zeros(call.shape.numel(), dtype=outputs.dtype)
        slots[call.row] = MARK + torch.arange(len(call.row), dtype=outputs.dtype)
        slots = slots.view(*call.shape, *[1] * (outputs.dim() - len(call.shape)))
        return torch.where(slots > 0, slots, outputs)

    def _enter(self, mine: Tensor, layer: Layer, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.call
        if call is None or not torch.is_grad_enabled():
            return None
        if given[0].shape[: len(call.shape)] != call.shape:
            raise InputError(
                f"model.head or model.unfreeze is not audited by canaries: {layer.name} doesn't take records one after "
                "the other. Change that layer."
            )
        kept = mine[call.number]
        columns = self.input[call.number[kept]]
        return (_planted(given[0], call, kept, columns, torch.full((len(columns),), LONG)), *given[1:])

    def _leave(self, mine: Tensor, _: nn.Module, given: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...] | None:
        call = self.call
        if call is None:
            return None
        kept = mine[call.number]
        which = call.number[kept]
        lengths = self.length[which] / LONG * call.upstream[kept]
        return (_planted(given[0], call, kept, self.output[which], lengths), *given[1:])


def _planted(values: Tensor, call: _Call, kept: Tensor, columns: Tensor, numbers: Tensor) -> Tensor:
    """Rows with one number that is not 0, of a sequence in its first place; other rows as they are, with gradients."""
    if not len(columns):
        return values
    rows = values.flatten(0, len(call.shape) - 1)
    crafted = rows.new_zeros(len(columns), *rows.shape[1:])
    crafted.view(len(columns), -1, rows.shape[-1])[torch.arange(len(columns)), 0, columns] = numbers.to(values.dtype)
    return rows.index_copy(0, call.row[kept], crafted).view(values.shape)
