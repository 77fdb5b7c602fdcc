"""What all tables of a recipe, and of a data holder's own file, have in common; and how such files are read."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, TypeAdapter, ValidationError

from fedhead.common.errors import ConfigError

_LARGEST: Final = 1 << 20  # bytes; a recipe has a few thousand, and a device may have no end


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


def read_toml(path: Path, name: str, remedy: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        What the command calls it, such as RECIPE.
    remedy : str
        What to do where there is no such file.

    Raises
    ------
    ConfigError
        With one line that begins with the name and the path.
    """
    content = read_bytes(path, name, remedy)
    try:
        # Editors of some systems begin a file with a byte order mark.
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError([f'{name} is "{path}": it must be text in UTF-8. Save it in that encoding.']) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f'{name} is "{path}": it is no valid TOML ({error}). Correct that line.']) from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond all bounds
        raise ConfigError([f'{name} is "{path}": it is no valid TOML. Correct it.']) from error


def read_bytes(path: Path, name: str, remedy: str) -> bytes:
    """The bytes of such a file; parameters and errors as those of `read_toml`."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise ConfigError([f'{name} is "{path}": there is no such file. {remedy}']) from error
    except OSError as error:
        raise ConfigError([f'{name} is "{path}": it can\'t be read ({error.strerror}). Check the file.']) from error
    if len(content) > _LARGEST:
        rule = f"it must have at most {_LARGEST >> 20} MiB"
        raise ConfigError([f'{name} is "{path}": {rule}. Check that it is the right file.'])
    return content


def part_of(model: type[BaseModel], name: str, raw: Mapping[str, Any]) -> Any:
    """One setting or table of a file, validated alone.

    Returns
    -------
    Any
        Its default when it is not in the file; None when it has faults of its own, or must be given and isn't.
    """
    info = model.model_fields[name]
    if name not in raw:
        return None if info.is_required() else info.get_default(call_default_factory=True)
    try:
        return _adapter(model, name).validate_python(raw[name])
    except ValidationError:
        return None


@lru_cache(maxsize=64)
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    info = model.model_fields[name]
    hint: Any = info.annotation
    return TypeAdapter(Annotated[hint, info])


def tables_of(annotation: Any) -> list[type[BaseModel]]:
    """The tables that a setting may hold: one, or one for each kind of a union."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None and not get_args(annotation):
        return []
    if get_origin(annotation) in (list, dict, tuple):
        return []
    return [table for part in get_args(annotation) for table in tables_of(part)]


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """The keys that each table may have, by the table's dotted name; those of all its kinds."""
    known: dict[str, list[str]] = {prefix: list(model.model_fields)}
    for name, info in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        for table in tables_of(info.annotation):
            for key, keys in known_keys(table, path).items():
                known[key] = sorted({*known.get(key, []), *keys})
    return known
