"""Faults of a recipe in the words of a person: setting, value, rule, remedy, one line each."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_RULES: Mapping[str, str] = {
    "greater_than": "it must be more than {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than": "it must be less than {lt:g}",
    "less_than_equal": "it must be at most {le:g}",
    "finite_number": "it must be a finite number",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "dict_type": "it must be a table",
    "model_type": "it must be a table",
    "model_attributes_type": "it must be a table",
    "literal_error": "it must be one of {expected}",
    "union_tag_invalid": "its kind must be one of {expected_tags}",
    "union_tag_not_found": "it must have a kind",
    "too_short": "it must have at least {min_length} entries",
    "too_long": "it must have at most {max_length} entries",
    "string_too_short": "it must have at least {min_length} characters",
    "string_too_long": "it must have at most {max_length} characters",
    "string_pattern_mismatch": "it must have the form {pattern}",
}
_FORMS: Mapping[str, str] = {
    r"^[^\x00]+$": "it must be a path",
    r"^\S+:[0-9]{1,5}$": "it must be a host, a colon and a port, such as 127.0.0.1:8443",
    r"^[a-z]+:[^\x00]+$": "it must be a kind, a colon and a path, such as csv:records.csv",
    r"^[a-z]+:.+$": "it must be a kind, a colon and a path, such as csv:records.csv",
    r"^[\w.-]+$": "it must be letters, digits, dots, dashes and underscores",
    r"^[0-9a-f]{64}$": "it must be 64 hexadecimal digits in lower case",
    r"^module:[\w.]+:\w+$": "it must have the form module:package.module:name",
    r"^(sha256:)?[0-9a-f]{64}$": "it must be 64 hexadecimal digits in lower case, after sha256: or alone",
}
"""What a pattern of the schema means, for those who don't read patterns."""
_REMEDIES: Mapping[str, str] = {
    "task.labels": 'List every label of the data, such as labels = ["negative", "positive"].',
    "model.backbone": "Name one, such as torchvision:resnet18 or transformers:distilbert-base-uncased.",
    "model.sha256": "Give the 64 hexadecimal digits that sha256sum prints for the weights file, in lower case.",
    "data.source": "Give one such as csv:reviews.csv, parquet:records.parquet or imagefolder:images.",
    "privacy.epsilon": 'Give a positive value such as 3.0; for a run without privacy set privacy.mechanism = "none".',
    "privacy.noise_multiplier": 'Give a positive value, or set privacy.epsilon and run "fedhead plan RECIPE".',
    "privacy.delta": "Give a small positive value such as 1e-5, well below one over the number of records.",
    "privacy.sample_rate": "Give the share of records a step takes, such as 0.05.",
    "privacy.clipping_norm": "Give a positive value such as 1.0.",
    "training.rounds": "Give a positive whole number such as 60.",
}


def show(value: Any) -> str:
    """A setting's value as it would be typed in TOML, cut short when long."""
    if isinstance(value, bool):
        return str(value).lower()
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def setting_name(location: Sequence[str | int], raw: Any) -> str:
    """The setting as typed, `privacy.epsilon` or `task.labels[2]`, without the tags that pydantic puts in."""
    name, here, tagged = "", raw, False
    for index, part in enumerate(location):
        if isinstance(part, int):
            name += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
            continue
        # `sizes` may be a tag and a setting of one table: the tag comes first, once.
        again = isinstance(here, dict) and part in here and part not in location[index + 1 :]
        if isinstance(here, dict) and not again and not tagged and part in _tags(here):
            tagged = True
            continue
        tagged = False
        shown = part if re.fullmatch(r"[\w-]+", part) else json.dumps(part)  # as TOML wants it typed
        name += f".{shown}" if name else shown
        here = here.get(part) if isinstance(here, dict) else None
    return name


def _tags(table: Mapping[str, Any]) -> tuple[str, ...]:
    """What pydantic may call the kind of a table; one that doesn't say has the default kind of its place."""
    kind = table.get("kind")
    if kind is None:
        return ("linear", "iid", "sgd", "fedavgm")
    return ("module",) if isinstance(kind, str) and kind.startswith("module:") else (str(kind),)


def fault(setting: str, value: Any, rule: str, remedy: str) -> str:
    """One line: setting, value, rule, remedy."""
    return f"{setting} is {show(value)}: {rule}. {remedy}"


def faults_of(
    error: ValidationError, raw: Mapping[str, Any], known: Mapping[str, Sequence[str]], page: str = "docs/recipes.md"
) -> list[str]:
    """Every fault of a failed validation, in the order of the file.

    Parameters
    ----------
    error : ValidationError
    raw : mapping
        The file as read.
    known : mapping
        Keys that each table may have, by the table's dotted name; for spelling hints.
    page : str
        The page of the documentation that lists the settings.
    """
    return [_line(item, raw, known, page) for item in error.errors()]


def _line(item: ErrorDetails, raw: Mapping[str, Any], known: Mapping[str, Sequence[str]], page: str) -> str:
    name = setting_name(item["loc"], raw)
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "missing":
        return f"{name} is missing: it must be given. {_remedy(name, page)}"
    if kind == "extra_forbidden":
        table, _, key = name.rpartition(".")
        near = difflib.get_close_matches(key, known.get(table, ()), 1, 0.5)
        hint = f'Did you mean "{near[0]}"?' if near else f"Remove it; {page} lists every setting."
        return f"{name} is {show(value)}: there is no such setting. {hint}"
    if kind in ("union_tag_invalid", "union_tag_not_found") and isinstance(value, dict):
        name, value = f"{name}.kind", value.get("kind")
    rule = _FORMS.get(str(context.get("pattern"))) or _RULES.get(kind)
    text = rule.format(**context) if rule else str(item["msg"])[:1].lower() + str(item["msg"])[1:]
    return fault(name, value, text, _remedy(name, page))


def _remedy(name: str, page: str) -> str:
    return _REMEDIES.get(name.split("[", maxsplit=1)[0], f"{page} shows what it may be.")
