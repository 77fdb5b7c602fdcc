"""A small backbone with the fields of the real one, and the means to watch and disturb it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhead.common.data.records import Records


@dataclass
class FakeBackbone:
    kind: str = "text"
    ragged: bool = False
    digest: str = "d" * 64
    preprocessing: str = '{"max_length": 8}'
    scale: float = 1.0
    name: str = "module:fake:backbone"
    dim: int = 3
    tail: None = None
    batches: list[int] = field(default_factory=list)
    before_forward: Callable[[int], None] = lambda _: None
    threads: set[int] = field(default_factory=set)

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        self.threads.add(threading.get_ident())
        assert all(one is not None for one in inputs)
        if self.kind == "image" and self.ragged:
            inputs = ["x" * one.getpixel((0, 0))[0] for one in inputs]  # as many tokens as the image is bright
        if self.kind == "text" or self.ragged:
            lengths = torch.tensor([len(one) for one in inputs])
            codes = torch.zeros(len(inputs), int(lengths.max()))
            for row, one in enumerate(inputs):
                codes[row, : len(one)] = torch.tensor([float(ord(letter)) for letter in one])
            return {"codes": codes, "lengths": lengths}
        return {"values": torch.from_numpy(np.stack([np.asarray(one, dtype=np.float32).ravel()[:3] for one in inputs]))}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        assert torch.is_inference_mode_enabled()
        self.before_forward(len(self.batches))
        if "values" in batch:
            self.batches.append(len(batch["values"]))
            return batch["values"] * self.scale, None
        codes, lengths = batch["codes"], batch["lengths"]
        self.batches.append(len(codes))
        tokens = torch.stack([codes, codes**2, -codes], dim=-1) * self.scale
        return (tokens, lengths) if self.ragged else (tokens.sum(1), None)

    def cost(self, inputs: list[Any]) -> list[int] | None:
        return [len(one) for one in inputs] if self.kind == "text" else None


def sentences(count: int = 37) -> Records:
    texts = [chr(97 + i % 26) * (1 + (i * 7) % 11) + str(i) for i in range(count)]
    return Records.from_memory("text", texts, [0] * count)


def expected(records: Records, scale: float = 1.0) -> Tensor:
    """What the fake backbone makes of each sentence, alone."""
    codes = [torch.tensor([float(ord(letter)) for letter in one]) for one in records.inputs(slice(None))]
    return torch.stack([torch.stack([c, c**2, -c], -1).sum(0) * scale for c in codes])
