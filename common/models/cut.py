"""The cut: a network as stem, blocks and top, split so that its last k blocks train and the rest is frozen.

    batch -> stem -> block 1 ... block n-k | block n-k+1 ... block n -> top -> (B, D)
             frozen, cached at the bar       tail, trained with the head

Everything behind the cut is trained, the top's own parameters (a final norm, a pooler that is used) included, except
BatchNorm, which keeps the statistics and the affine map of pre-training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedhead.common.errors import ModelError

VALUES = "values"  # the key of a batch that is one tensor


class Frozen(nn.Module):
    """What lies before the cut: batch -> (values, lengths).

    Parameters
    ----------
    body : nn.Module
        Takes the batch's one tensor, or its tensors by name; gives values (B, *shape), or (values, lengths).

    Notes
    -----
    Guarantee: in eval mode whatever a parent is told, and no parameter asks for a gradient.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Values (B, *shape) at the cut and, for texts at a cut, lengths (B,)."""
        out = self.body(batch[VALUES]) if batch.keys() == {VALUES} else self.body(**batch)
        return out if isinstance(out, tuple) else (out, None)


class Tail(nn.Module):
    """What lies behind the cut: (values, lengths) -> (B, D). Made trainable by `prepare`."""

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features of B records."""
        raise NotImplementedError


class ChainTail(Tail):
    """Blocks and a top that need nothing but the values: (B, *shape) -> (B, D)."""

    def __init__(self, blocks: Sequence[nn.Module], top: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.top = top

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, D); `lengths` is not used."""
        features: Tensor = self.top(self.blocks(values))
        return features


@dataclass(frozen=True)
class Chain:
    """A network that can be cut: ``top(blocks(stem(x)))`` equals the network's own features."""

    stem: nn.Module
    blocks: tuple[nn.Module, ...]
    top: nn.Module


def cut_chain(chain: Chain, unfreeze: int) -> tuple[Frozen, Tail]:
    """Cut `chain` before its last `unfreeze` blocks.

    Parameters
    ----------
    chain : Chain
        Its modules are used, not copied.
    unfreeze : int, > 0
        k, the blocks that train.

    Raises
    ------
    ModelError
        When there are fewer blocks.
    """
    check_depth(unfreeze, len(chain.blocks))
    at = len(chain.blocks) - unfreeze
    frozen = Frozen(nn.Sequential(chain.stem, *chain.blocks[:at]))
    return frozen, prepare(ChainTail(chain.blocks[at:], chain.top))


def check_depth(unfreeze: int, blocks: int) -> None:
    """Refuse to unfreeze more blocks than there are."""
    if unfreeze > blocks:
        raise ModelError(
            f"model.unfreeze is {unfreeze}: the backbone has {blocks} blocks. Give a number from 0 to {blocks}."
        )


def no_cut(backbone: str, unfreeze: int, supported: str) -> ModelError:
    """The error for a network that no cut is known for."""
    return ModelError(
        f'model.unfreeze is {unfreeze}: "{backbone}" can\'t be cut, which is known for {supported}. '
        "Set model.unfreeze = 0, or choose one of those."
    )


def prepare(tail: Tail, keep_frozen: Sequence[nn.Module] = ()) -> Tail:
    """Make a tail trainable under per-record clipping.

    Parameters
    ----------
    tail : Tail
        Changed in place: attention whose weights are no leaves is replaced by an equal one, operations in place are
        turned off (hooks need the values they would overwrite), and gradients are asked for.
    keep_frozen : sequence of nn.Module
        Parts of the tail that the frozen part uses too.

    Returns
    -------
    tail : Tail
        In eval mode; `Trainable` switches the trained leaves.
    """
    for module in list(tail.modules()):
        for name, child in module.named_children():
            if type(child) is nn.MultiheadAttention:
                setattr(module, name, LeafAttention(child))
    tail.requires_grad_(True)
    for module in tail.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    for module in keep_frozen:
        module.requires_grad_(False)
    return tail.eval()


class LeafAttention(nn.Module):
    """`nn.MultiheadAttention` over (B, T, H) with its weights in four linear leaves, which Opacus has samplers for.

    Notes
    -----
    Opacus's own DPMultiheadAttention is no stand-in here: with ``batch_first=True`` it mixes heads and positions
    (opacus 1.6), and the hooks want the batch first.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ModelError(
                "model.unfreeze: this kind of attention can't be trained privately. Unfreeze fewer blocks."
            )
        if not attention.batch_first:
            raise ModelError(
                "model.unfreeze: attention must have batch_first=True to be trained. Unfreeze fewer blocks."
            )
        self.heads = attention.num_heads
        width = attention.embed_dim
        weights = attention.in_proj_weight.detach().chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        out_bias = attention.out_proj.bias
        self.out = _linear(attention.out_proj.weight.detach(), None if out_bias is None else out_bias.detach())
        self.size = width // self.heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Attend: three tensors (B, T, H) -> ((B, T, H), None). Takes no mask and gives no weights."""
        if options.get("attn_mask") is not None or options.get("key_padding_mask") is not None:
            raise ModelError("model.unfreeze: attention with a mask can't be trained here. Unfreeze fewer blocks.")
        # (B, T, H) -> (B, heads, T, H / heads)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed), None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
