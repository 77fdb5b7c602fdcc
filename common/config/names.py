"""The rule for names of data holders: one for holder.toml and for every command that takes such names."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

NAME_RULE: Final = "a name must be 1 to 64 letters, digits, dots, dashes and underscores"

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]

_NAME: Final[TypeAdapter[str]] = TypeAdapter(Name, config=ConfigDict(strict=True))


def is_name(value: Any) -> bool:
    """Whether holder.toml would take this as a name; it is the same check, not one like it."""
    try:
        _NAME.validate_python(value)
    except ValidationError:
        return False
    return True
