"""What lies in the folder of a saved model, read and checked before any of it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from fedhead.common.config.schema import ModelSettings, TaskSettings
from fedhead.common.errors import ModelError

SCHEMA: Final = 1
HEAD: Final = "head.safetensors"
CARD: Final = "model.json"


class Card(BaseModel):
    """What model.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: int = Field(alias="schema")
    fedhead: str
    backbone: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the backbone's architecture and weights.")
    preprocessing: dict[str, Any] = Field(description="All that turns a raw input into features besides the weights.")
    task: TaskSettings
    model: ModelSettings = Field(description="The recipe's [model]: weights, head, pooling, unfreeze, normalize, ...")
    base: str = Field(description="Where relative paths in `model` start, from this folder.")
    vector_size: int | None = Field(None, ge=1, description="Length of an input vector (vector backbones).")
    seed: int = Field(description="Of the head's first values.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of head.safetensors.")


def read_card(folder: Path, shown: str) -> Card:
    """What model.json says.

    Raises
    ------
    ModelError
        It is not there, of another schema, or not valid; the line begins with `shown`.
    """
    try:
        data = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f'{shown}: there is no {CARD} in it. Name the folder "model" of a run.') from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{shown}: its {CARD} can't be read. Restore the folder.") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, bool) or schema != SCHEMA:
        raise ModelError(
            f"{shown}: the schema of its {CARD} is {json.dumps(schema)[:20]}, this version reads {SCHEMA}. "
            "Load it with the fedhead that wrote it."
        )
    try:
        return Card.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{shown}: {where} in its {CARD} is not valid. Restore the folder.") from error


def read_head(folder: Path, card: Card, shown: str) -> dict[str, Tensor]:
    """The tensors of head.safetensors; hashed before a byte is interpreted.

    Raises
    ------
    ModelError
        It is not there, not the one that the card is of, or holds no tensors; the line begins with `shown`.
    """
    try:
        content = (folder / HEAD).read_bytes()
    except OSError as error:
        raise ModelError(f"{shown}: its {HEAD} is missing or can't be read. Restore the folder.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != card.sha256:
        raise ModelError(
            f"{shown}: {HEAD} has the sha256 {found[:12]}, {CARD} says {card.sha256[:12]}: one of them was changed. "
            "Restore the folder."
        )
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{shown}: {HEAD} holds no tensors. Restore the folder.") from error
