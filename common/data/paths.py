"""Paths as they stand in a recipe: relative to the recipe's folder, or inside an installed package."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from fedhead.common.config.places import in_package, path_from
from fedhead.common.data.loaded import Request
from fedhead.common.errors import DataError

SCHEME = "pkg://"


def resolve_path(text: str, base: Path, setting: str) -> Path:
    """The file or folder that a recipe names.

    Parameters
    ----------
    text : str
        A path, relative to `base` or absolute, or `pkg://PACKAGE/FILE`.
    base : Path
        The recipe's folder.
    setting : str
        The setting's name and value as typed, for the error.

    Raises
    ------
    DataError
        When the package isn't installed or nothing is there.

    Notes
    -----
    A package is found, never imported: none of its code runs.
    """
    if not text.startswith(SCHEME):
        path = path_from(text, base)
        if not path.exists():
            raise DataError(
                f"{setting}: there is no such file or folder ({path}). Paths start at the recipe's folder; check it."
            )
        return path
    found = in_package(text.removeprefix(SCHEME))
    if found is None:
        raise DataError(f'{setting} is "{text}": it must be pkg://PACKAGE/FILE, a file in the package. Name that.')
    package, inside = found
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise DataError(f'{setting}: the package "{package}" isn\'t installed. Install it, or give a path.')
    for folder in spec.submodule_search_locations:
        if (Path(folder) / inside).exists():
            return Path(folder) / inside
    raise DataError(f'{setting}: the package "{package}" has no file "{inside}". Check the name inside the package.')


def file_of(request: Request) -> Path:
    """The file that a source names.

    Raises
    ------
    DataError
        It isn't there, is a folder, or is empty.
    """
    path = resolve_path(request.name, request.base, request.shown)
    if not path.is_file():
        raise DataError(f"{request.shown}: it must be a file. Name a file in the folder.")
    if path.stat().st_size == 0:
        raise DataError(f"{request.shown}: the file is empty. Check how it was written.")
    return path


def folder_of(request: Request) -> Path:
    """The folder that a source names.

    Raises
    ------
    DataError
        It isn't there, or is a file.
    """
    path = resolve_path(request.name, request.base, request.shown)
    if not path.is_dir():
        raise DataError(f"{request.shown}: it must be a folder. Name the folder that holds the data.")
    return path


def cache_folder() -> Path:
    """The user's cache folder for public data sets: `$FEDHEAD_CACHE`, or `fedhead` in the system's cache folder."""
    chosen = os.environ.get("FEDHEAD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedhead"
