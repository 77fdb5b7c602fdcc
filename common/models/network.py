"""What a kind of backbone must give: an uncut network without classifier, how to feed it, and how to cut it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fedhead.common.models.cut import Frozen, Tail

Kind = Literal["text", "image", "vector"]


class Pipeline(Protocol):
    """How raw inputs become a batch."""

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """B raw inputs -> tensors by name, each with B rows; ``{"values": ...}`` when it is one tensor."""

    def cost(self, inputs: list[Any]) -> list[int] | None:
        """A cheap proxy of each input's length; None when all cost the same."""

    def describe(self) -> dict[str, Any]:
        """All that changes a batch, as JSON values."""

    def probe(self) -> dict[str, Tensor]:
        """A batch of one made-up input."""


@dataclass(frozen=True)
class Network:
    """An uncut network.

    Attributes
    ----------
    kind : str
        What goes in.
    body : nn.Module
        A batch's tensors -> (B, D).
    pipeline : Pipeline
        How raw inputs become a batch.
    architecture : str
        All that the forward pass depends on besides tensors; part of the digest.
    cut : callable
        k > 0 -> (frozen, tail). Takes `body` apart; raises ModelError when it can't.
    features : mapping
        What else turns a batch into features, such as the pooling; part of the cache key.
    """

    kind: Kind
    body: nn.Module
    pipeline: Pipeline
    architecture: str
    cut: Callable[[int], tuple[Frozen, Tail]]
    features: Mapping[str, Any] = field(default_factory=dict)
