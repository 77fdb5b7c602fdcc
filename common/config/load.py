"""Reading a recipe: TOML, overrides, and every fault at once."""

from __future__ import annotations

import copy
import importlib.util
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhead.common.config.checks import CHECKS, Sections
from fedhead.common.config.faults import fault
from fedhead.common.config.files import judged
from fedhead.common.config.places import path_from
from fedhead.common.config.schema import RunConfig
from fedhead.common.config.tables import read_toml
from fedhead.common.errors import ConfigError

_RULES = tuple(lambda sections, _, check=check: check(sections) for check in CHECKS)  # none looks at the folder
_NOTHING = object()  # what `--set key=` stands for: the setting is taken out, so that it has its default


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe.

    Parameters
    ----------
    path : path
        A TOML file, `~` is the user's home; relative paths inside it start from its folder.
    overrides : sequence of str
        `a.b=value`, applied in order; the value is read as TOML, or as text where it is none. `a.b=` takes the setting
        out of the recipe.

    Raises
    ------
    ConfigError
        With every fault at once.
    """
    path = path_from(str(path), Path())
    raw = read_toml(path, "RECIPE", '"fedhead simulate --list" names the built-in recipes.')
    for override in overrides:
        _override(raw, override)
    return make_config(raw, base=path.parent)


def make_config(raw: Mapping[str, Any], base: Path | None = None) -> RunConfig:
    """A recipe from a nested mapping.

    Parameters
    ----------
    raw : mapping
        The tables of the recipe.
    base : path, optional
        Folder that relative paths start from; default: the current one.

    Raises
    ------
    ConfigError
        With every fault at once.
    """
    return judged(RunConfig, copy.deepcopy(dict(raw)), base, Sections, _RULES, "docs/recipes.md")


def to_json(config: RunConfig, *, base: bool = True) -> str:
    """A recipe as one JSON text, with the folder its paths start from; `from_json` gives it back unchanged.

    Parameters
    ----------
    base : bool
        False for a text that goes to other machines: where the recipe lies here is nobody's business there.
    """
    return json.dumps(
        {"base": str(config.base) if base else ".", "recipe": config.model_dump(mode="json")}, sort_keys=True
    )


def from_json(text: str) -> RunConfig:
    """The recipe that `to_json` wrote."""
    data = json.loads(text)
    return make_config(data["recipe"], base=Path(data["base"]))


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy with some settings changed, checked anew; keys are dotted names such as `privacy.epsilon`."""
    raw = config.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        _assign(raw, key.split("."), value, key)
    return make_config(raw, base=config.base)


def _override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(
            [f'--set is "{override}": it must have the form key=value. Give one such as privacy.epsilon=3.']
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # TOML's own error is a ValueError, as are numbers beyond all bounds
        value = text
    _assign(raw, key.strip().split("."), value if text.strip() else _NOTHING, key)


def _assign(raw: dict[str, Any], keys: list[str], value: Any, name: str) -> None:
    here = raw
    for key in keys[:-1]:
        following = here.setdefault(key, {})
        if not isinstance(following, dict):
            raise ConfigError([fault(name, value, f'"{key}" is no table of the recipe', "Check the setting's name.")])
        here = following
    if value is _NOTHING:
        here.pop(keys[-1], None)
    else:
        here[keys[-1]] = value


def builtin_recipes() -> dict[str, Path]:
    """The recipes that ship with fedhead: name -> file."""
    spec = importlib.util.find_spec("fedhead.simulations.recipes")
    folders = spec.submodule_search_locations if spec is not None else None
    return {path.stem: path for folder in folders or () for path in sorted(Path(folder).glob("*.toml"))}


def find_recipe(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe by the name of a built-in one, or by its file.

    Raises
    ------
    ConfigError
        With every fault at once.
    """
    known = builtin_recipes()
    if str(name) in known and not Path(name).is_file():  # a folder is no recipe
        return load_recipe(known[str(name)], overrides)
    return load_recipe(name, overrides)
