"""What all tables of a recipe have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator


class Table(BaseModel):
    """A table of the recipe: unknown keys are faults, values are never coerced across types, and it can't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def by_kind(default: str) -> Discriminator:
    """Choose among tables by their `kind`; one that doesn't say is of the default kind.

    Kinds of the user's own, `module:package.module:name`, go to the table tagged "module".
    """

    def kind_of(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
        return "module" if isinstance(kind, str) and kind.startswith("module:") else kind

    return Discriminator(kind_of)
