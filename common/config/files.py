"""Files of settings, a recipe or one side's own: the folder that their paths start from, and every fault at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import PrivateAttr, ValidationError

from fedhead.common.config.faults import faults_of
from fedhead.common.config.places import path_from
from fedhead.common.config.tables import Table, known_keys, part_of
from fedhead.common.errors import ConfigError


class SettingsFile(Table):
    """A whole file of settings.

    Attributes
    ----------
    base : Path
        Folder that relative paths in the file start from.
    """

    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def base(self) -> Path:
        """Folder that relative paths in the file start from."""
        return self._base

    def path(self, text: str) -> Path:
        """A path as typed in the file: relative ones start from the file's folder."""
        return path_from(text, self.base)


File = TypeVar("File", bound=SettingsFile)
Parts = TypeVar("Parts")


def judged(
    model: type[File],
    raw: Mapping[str, Any],
    base: Path | None,
    parts: type[Parts],
    rules: Sequence[Callable[[Parts, Path], Iterable[str]]],
    page: str,
) -> File:
    """A file's settings, checked one by one and together.

    Parameters
    ----------
    model : type of SettingsFile
        What the file may say.
    raw : mapping
        What it says.
    base : Path or None
        Folder that relative paths start from; None: the current one.
    parts : dataclass
        The settings that rules look at, each None where it has faults of its own: combinations are judged over those
        that are valid in themselves, so that all faults come at once.
    rules : sequence of callable
        From the parts and the folder to the faults of their combination.
    page : str
        The page of the documentation that lists the settings.

    Returns
    -------
    SettingsFile
        Of the type of `model`.

    Raises
    ------
    ConfigError
        With every fault at once, one line each.
    """
    base = (base or Path.cwd()).resolve()
    faults: list[str] = []
    try:
        found: File | None = model.model_validate(raw)
    except ValidationError as error:
        found = None
        faults += faults_of(error, raw, known_keys(model), page)
    given = parts(**{item.name: part_of(model, item.name, raw) for item in fields(parts)})  # type: ignore[arg-type]
    for rule in rules:
        faults += rule(given, base)
    if faults or found is None:
        raise ConfigError(faults)
    found._base = base
    return found
