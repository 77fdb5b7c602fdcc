"""Backbones of transformers: text encoders and image networks, pooled to one feature vector a record.

The cut, counted in encoder layers from the end: the BERT family and the ViT family (`CUTS`). Behind the cut a final
norm, and a pooler that is used, train along. DeBERTa can't be cut: it sends relative positions, which have no record,
through the same layers as the tokens, and a record's gradient would be wrong.

Shapes: B records, T tokens, H width of a token vector.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from fedhead.common.config.schema import ModelSettings
from fedhead.common.errors import ModelError
from fedhead.common.models.cut import Frozen, Tail, check_depth, no_cut, prepare
from fedhead.common.models.hub import hub_folder, quiet
from fedhead.common.models.images import ImagePipeline
from fedhead.common.models.network import Network, Pipeline
from fedhead.common.models.pipelines import TextPipeline, processor_pipeline
from fedhead.common.models.weights import check_pin, resolve, weights_file

CUTTABLE = "transformers' BERT family (bert, roberta, distilbert, MiniLM, electra, mpnet) and ViT family"


@dataclass(frozen=True)
class Layers:
    """Where a family keeps its encoder layers, and the norm that follows them."""

    container: str
    name: str
    norm: str | None = None


CUTS: Mapping[str, Layers] = {
    "bert": Layers("encoder", "layer"),
    "roberta": Layers("encoder", "layer"),
    "xlm-roberta": Layers("encoder", "layer"),
    "camembert": Layers("encoder", "layer"),
    "electra": Layers("encoder", "layer"),
    "mpnet": Layers("encoder", "layer"),
    "distilbert": Layers("transformer", "layer"),
    "vit": Layers("", "layers", "layernorm"),
    "deit": Layers("", "layers", "layernorm"),
}

# Of a configuration, what the forward pass in eval mode doesn't depend on.
IRRELEVANT = frozenset(
    [
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "id2label",
        "label2id",
        "problem_type",
        "initializer_range",
        "initializer_factor",
        "classifier_dropout",
        "gradient_checkpointing",
        "tie_word_embeddings",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "qa_dropout",
        "seq_classif_dropout",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "bos_token_id",
        "eos_token_id",
        "_attn_implementation",
    ]
)


class Pool(nn.Module):
    """Token vectors -> one feature vector a record.

    Parameters
    ----------
    kind : str
        ``mean`` over the record's own tokens (of an image: over its patches), ``cls`` the first token, ``pooler`` the
        network's own pooler.
    pooler : nn.Module or None
        For ``pooler``.
    prefix : int
        Tokens in front of an image's patches.
    """

    def __init__(
        self, kind: Literal["mean", "cls", "pooler"], pooler: nn.Module | None = None, prefix: int = 0
    ) -> None:
        super().__init__()
        self.kind = kind
        self.pooler = pooler
        self.prefix = prefix

    def forward(self, values: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, T, H), lengths (B,) or None -> (B, H)."""
        if self.pooler is not None:
            pooled: Tensor = self.pooler(values)
            return pooled
        if self.kind == "cls":
            return values[:, 0]
        if lengths is None:
            return values[:, self.prefix :].mean(dim=1)
        inside = positions(lengths, values.shape[1]).unsqueeze(-1)  # (B, T, 1)
        return values.masked_fill(~inside, 0.0).sum(dim=1) / lengths.clamp(min=1).unsqueeze(-1)


def positions(lengths: Tensor, width: int) -> Tensor:
    """True where a record has a token: (B,) -> bool (B, T). An empty record counts as one token, so nothing is NaN."""
    return torch.arange(width, device=lengths.device) < lengths.clamp(min=1).unsqueeze(-1)


class Encoder(nn.Module):
    """The uncut network: a batch -> (B, D)."""

    def __init__(self, model: Any, pooling: Literal["mean", "cls", "pooler"], prefix: int) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.pool = Pool(pooling, prefix=prefix)

    def forward(self, values: Tensor | None = None, **batch: Tensor) -> Tensor:
        """Images (B, 3, S, S), or tokens by name, each (B, T) -> (B, D)."""
        out = self.model(pixel_values=values) if values is not None else self.model(**batch)
        if self.pooling == "pooler":
            pooled: Tensor = out.pooler_output
            return pooled.flatten(1)
        hidden: Tensor = out.last_hidden_state
        if hidden.ndim == 4:  # a convolutional network's map (B, C, H, W)
            hidden = hidden.flatten(2).transpose(1, 2)
        features: Tensor = self.pool(hidden, None if values is not None else batch["attention_mask"].sum(dim=1))
        return features


class _Lower(nn.Module):
    """The network without its last layers: a batch -> (values (B, T, H), lengths (B,) of texts or None)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor | None = None, **batch: Tensor) -> tuple[Tensor, Tensor | None]:
        if values is not None:
            return self.model(pixel_values=values).last_hidden_state, None
        return self.model(**batch).last_hidden_state, batch["attention_mask"].sum(dim=1)


class TextTail(Tail):
    """The last layers of a text encoder and the pooling; the attention mask comes from the lengths."""

    def __init__(self, container: nn.Module, config: Any, pool: Pool) -> None:
        super().__init__()
        self.container = container
        self.config = config
        self.pool = pool

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, H), (B,) -> (B, D). What stands behind a record's length is not looked at."""
        if lengths is None:
            lengths = torch.full((len(values),), values.shape[1], device=values.device)
        inside = positions(lengths, values.shape[1])
        mask = create_bidirectional_mask(self.config, values, inside.long())
        hidden = self.container(values, attention_mask=mask)[0]
        features: Tensor = self.pool(hidden, lengths)
        return features


class ImageTail(Tail):
    """The last layers of a vision transformer, its final norm and the pooling."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module, pool: Pool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.pool = pool

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, H) -> (B, D)."""
        for layer in self.layers:
            values = layer(values)
        features: Tensor = self.pool(self.norm(values), None)
        return features


def cut_encoder(encoder: Encoder, name: str, unfreeze: int) -> tuple[Frozen, Tail]:
    """Cut an encoder before its last `unfreeze` layers; takes `encoder` apart."""
    model = encoder.model
    where = CUTS.get(model.config.model_type)
    if where is None:
        raise no_cut(name, unfreeze, CUTTABLE)
    container = model.get_submodule(where.container)
    layers = list(getattr(container, where.name))
    check_depth(unfreeze, len(layers))
    at = len(layers) - unfreeze
    pool = Pool(encoder.pooling, model.pooler if encoder.pooling == "pooler" else None, encoder.pool.prefix)
    tail: Tail
    shared: list[nn.Module] = []
    if where.norm is None:
        upper = copy.copy(container)  # the container's own forward, over the last layers only
        upper._modules = dict(container._modules)
        setattr(upper, where.name, nn.ModuleList(layers[at:]))
        shared = [child for child_name, child in upper.named_children() if child_name != where.name]
        tail = TextTail(upper, model.config, pool)
    else:
        tail = ImageTail(layers[at:], getattr(model, where.norm), pool)
        setattr(model, where.norm, nn.Identity())
    setattr(container, where.name, nn.ModuleList(layers[:at]))
    if hasattr(model, "pooler"):
        model.pooler = None
    return Frozen(_Lower(model)), prepare(tail, keep_frozen=shared)


def load_transformers(settings: ModelSettings, base: Path, vector_size: int | None) -> Network:
    """The network behind ``transformers:ID_OR_PATH``; see `load_backbone`."""
    name = settings.backbone.partition(":")[2]
    if settings.weights is not None:
        shown = f'model.weights is "{settings.weights}"'
        folder = resolve(settings.weights, base)
        if folder.is_file():
            file, folder = folder, folder.parent
            if file != weights_file(folder):
                raise ModelError(
                    f"{shown}: transformers loads the folder's {weights_file(folder).name} instead. Put this file into "
                    "a folder of its own, under that name and with its config.json."
                )
    else:
        shown = f'model.backbone is "{settings.backbone}"'
        folder = base / name if (base / name / "config.json").is_file() else hub_folder(name, settings.backbone)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{shown}: the folder has no config.json. Name a folder saved with save_pretrained().")
    if settings.sha256 is not None:
        check_pin(weights_file(folder), settings.sha256)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            model, info = transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, weights_only=True, output_loading_info=True, **local
            )
    except Exception as error:  # whatever the library makes of a folder that it can't use
        raise ModelError(
            f"{shown}: transformers can't load it ({type(error).__name__}). It takes config.json and "
            "model.safetensors of an architecture that transformers itself has; code in a folder never runs."
        ) from error
    _check_complete(info, settings.pooling, shown)
    pipeline: Pipeline
    if model.main_input_name == "input_ids":
        pipeline = TextPipeline.load(folder, settings.max_length, model, shown, local)
    elif model.main_input_name == "pixel_values":
        pipeline = processor_pipeline(folder, model.config, settings.image, shown, local).override(settings.image)
    else:
        raise ModelError(f"{shown}: it takes {model.main_input_name}, not texts or images. Choose another backbone.")
    return as_network(model, settings.backbone, settings.pooling, pipeline)


def _check_complete(info: Mapping[str, Any], pooling: str, shown: str) -> None:
    missing = sorted(name for name in info["missing_keys"] if pooling == "pooler" or not name.startswith("pooler"))
    if missing or info["mismatched_keys"]:
        raise ModelError(
            f"{shown}: {len(missing)} tensors are missing and {len(info['mismatched_keys'])} have another shape. "
            'Use complete weights, and set model.pooling = "mean" if the pooler is what is missing.'
        )


def as_network(model: Any, name: str, pooling: Literal["mean", "cls", "pooler"], pipeline: Pipeline) -> Network:
    """A model of transformers, ready to be cut; a pooler that is not used is dropped, out of the digest too."""
    shown = f'model.backbone is "{name}"'
    if getattr(model.config, "is_encoder_decoder", False) or getattr(model.config, "is_decoder", False):
        raise ModelError(f"{shown}: it is not an encoder. Choose one, such as bert, roberta, distilbert or vit.")
    pooler = getattr(model, "pooler", None)
    if pooling == "pooler" and pooler is None:
        raise ModelError(f'model.pooling is "pooler": {model.config.model_type} has none. Choose "mean" or "cls".')
    if pooling != "pooler" and pooler is not None:
        model.pooler = None
    embeddings = getattr(model, "embeddings", None)
    prefix = sum(getattr(embeddings, token, None) is not None for token in ("cls_token", "distillation_token"))
    prefix += getattr(model.config, "num_register_tokens", 0) or 0
    encoder = Encoder(model.eval(), pooling, prefix)
    relevant = {key: value for key, value in model.config.to_diff_dict().items() if key not in IRRELEVANT}
    return Network(
        kind="image" if isinstance(pipeline, ImagePipeline) else "text",
        body=encoder,
        pipeline=pipeline,
        architecture="transformers:" + json.dumps(relevant, sort_keys=True, default=str),
        cut=lambda unfreeze: cut_encoder(encoder, name, unfreeze),
        features={"pooling": pooling},
    )
