"""The reference page of every setting, made from the schema: docs/recipes.md is this module's output."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedhead.common.config.schema import RunConfig
from fedhead.common.config.tables import tables_of

_HEADER = """# Recipes: every setting

This page is generated from the schema by `just docs`; a test holds it to the code.

A recipe is a TOML file. `[task]`, `[model]`, `[data]` and `privacy.epsilon` alone make a sensible run. Paths are
relative to the recipe's folder. `--set privacy.epsilon=1` overrides a setting from the command line, and
`--set privacy.epsilon=` takes it out. Unknown keys, wrong types and impossible combinations are all reported at once.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    parts = [_HEADER]
    for name, info in RunConfig.model_fields.items():
        parts.append(f"\n## [{name}]\n\n{_sentence(info.description)}\n")
        parts += _section(name, info)
    return "".join(parts)


def _section(name: str, info: FieldInfo) -> Iterator[str]:
    tables = tables_of(info.annotation)
    for table in tables:
        if len(tables) > 1:
            yield f"\n### {name}.kind = {_kind(table)}\n\n{_first_line(table)}\n"
        yield "\n| setting | type | default | meaning |\n|---|---|---|---|\n"
        nested: list[tuple[str, FieldInfo]] = []
        for key, field in table.model_fields.items():
            path = f"{name}.{key}"
            if tables_of(field.annotation):
                nested.append((path, field))
            yield f"| `{path}` | {_type(field)} | {_default(field)} | {field.description} |\n"
        for path, field in nested:
            several = len(tables_of(field.annotation)) > 1
            yield "" if several else f"\n### {path}\n\n{_sentence(field.description)}\n"
            yield from _section(path, field)


def _kind(table: type[BaseModel]) -> str:
    default = table.model_fields["kind"].annotation
    values = get_args(default)
    return f'"{values[0]}"' if values else '"module:package.module:name"'


def _first_line(table: type[BaseModel]) -> str:
    return (inspect.getdoc(table) or "").splitlines()[0]


def _sentence(text: str | None) -> str:
    return text or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_none=True, exclude_defaults=value.model_fields_set == set())
        kind = getattr(value, "kind", None)
        return f"`{kind}`" if kind else (f"`{_toml(given)}`" if given else "see below")
    if value is None:
        return ""
    return f"`{value}`" if isinstance(value, str) else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(inner)}' for key, inner in value.items())} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): ""}


def _type(field: FieldInfo) -> str:
    shown = _type_name(field.annotation)
    rules = [
        f"{sign} {_bound(getattr(rule, name))}"
        for rule in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(rule, name, None) is not None
    ]
    return f"{shown} {', '.join(rules)}".strip()


def _bound(value: float) -> str:
    """A whole number in full: rounded to six digits a bound is another one."""
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _type_name(annotation: Any) -> str:
    if tables_of(annotation):
        return "table"
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin in (list, tuple):
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return "table"
    names = [f"`{arg}`" if isinstance(arg, str) else _type_name(arg) for arg in args]
    return ", ".join(dict.fromkeys(name for name in names if name))


def main(arguments: list[str]) -> int:
    """`python -m fedhead.common.config.reference PAGE [--check]`: write the page, or say whether it is up to date."""
    path = Path(arguments[0])
    if "--check" not in arguments:
        path.write_text(reference(), encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == reference():
        return 0
    sys.stderr.write(f"{path} is not what the schema says: run `just docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
