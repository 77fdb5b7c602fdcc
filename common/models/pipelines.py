"""Preprocessing that comes with a folder of transformers: its tokenizer, or its image processor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from fedhead.common.config.schema import ImageSettings
from fedhead.common.errors import ModelError
from fedhead.common.models.hub import quiet
from fedhead.common.models.images import ImagePipeline

RESAMPLE = {
    0: "nearest",
    1: "bicubic",
    2: "bilinear",
    3: "bicubic",
}  # Pillow's numbers; Lanczos (1) has no tensor kernel


@dataclass(frozen=True)
class TextPipeline:
    """Texts to tokens, padded on the right to the longest of the batch.

    Attributes
    ----------
    tokenizer : a transformers tokenizer
    max_length : int
        Most tokens a text, special tokens included; what is longer is cut off.
    """

    tokenizer: Any = field(repr=False)
    max_length: int
    digest: str

    @classmethod
    def load(cls, folder: Path, max_length: int, model: nn.Module, shown: str, local: dict[str, Any]) -> TextPipeline:
        """The tokenizer in `folder`, checked against what `model` takes."""
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:  # whatever the library makes of a folder that it can't use
            raise ModelError(
                f"{shown}: its tokenizer can't be loaded ({type(error).__name__}). Add tokenizer.json to the folder."
            ) from error
        return cls.of(tokenizer, max_length, model)

    @classmethod
    def of(cls, tokenizer: Any, max_length: int, model: nn.Module) -> TextPipeline:
        """A loaded tokenizer for `model`."""
        most = _most_tokens(model)
        if most is not None and max_length > most:
            raise ModelError(
                f"model.max_length is {max_length}: the backbone takes at most {most} tokens. Give {most} or less."
            )
        if tokenizer.pad_token is None:
            raise ModelError(
                "model.backbone has a tokenizer without padding: it is not an encoder's. Choose an encoder."
            )
        tokenizer.padding_side = "right"  # lengths say where a record ends
        return cls(tokenizer, max_length, _tokenizer_digest(tokenizer))

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """B texts -> int64 tensors (B, T) by name, `attention_mask` among them."""
        batch = self.tokenizer(
            list(inputs),
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
            return_attention_mask=True,
        )
        return dict(batch)

    def cost(self, inputs: list[Any]) -> list[int] | None:
        """Characters of each text."""
        return [len(text) for text in inputs]

    def describe(self) -> dict[str, Any]:
        """Tokenizer and length."""
        return {"max_length": self.max_length, "tokenizer": self.digest}

    def probe(self) -> dict[str, Tensor]:
        """A batch of one text."""
        return self.collate(["a"])


def _most_tokens(model: nn.Module) -> int | None:
    """Tokens that the position table has room for; None when positions are relative."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    # RoBERTa and its kin count positions from behind the padding index.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over all that a tokenizer does to a text, padding and truncation aside, which change from call to call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def processor_pipeline(
    folder: Path, config: Any, settings: ImageSettings, shown: str, local: dict[str, Any]
) -> ImagePipeline:
    """The image processor in `folder`, as a pipeline; without one, ``[model.image]`` must give mean and std."""
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        side = getattr(config, "image_size", None)
        if settings.mean is None or settings.std is None or not isinstance(side, int):
            raise ModelError(
                f"{shown}: the folder has no preprocessor_config.json. Add it, or set model.image mean, std and size."
            )
        return ImagePipeline(resize=(side,), crop=(side, side))
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(folder, **local)
    except Exception as error:  # whatever the library makes of a folder that it can't use
        raise ModelError(
            f"{shown}: its image processor can't be loaded ({type(error).__name__}). Check preprocessor_config.json."
        ) from error
    return pipeline_of(processor.to_dict())


def pipeline_of(settings: dict[str, Any]) -> ImagePipeline:
    """An image processor's settings as a pipeline: (pixel * factor - mean) / std with pixels in 0..255."""
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    resize: tuple[int, ...] | None = None
    if settings.get("do_resize"):
        resize = (size["shortest_edge"],) if size.get("shortest_edge") else (size["height"], size["width"])
    factor = 255 * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0)
    normalise = settings.get("do_normalize", False)
    mean = settings["image_mean"] if normalise else (0.0, 0.0, 0.0)
    std = settings["image_std"] if normalise else (1.0, 1.0, 1.0)
    return ImagePipeline(
        resize=resize,
        crop=(crop["height"], crop["width"]) if settings.get("do_center_crop") else None,
        mean=tuple(value / factor for value in mean),
        std=tuple(value / factor for value in std),
        interpolation=RESAMPLE[int(settings.get("resample", 2))],
    )
