"""Reader of a folder of images, one subfolder a label.

The label is the name of an image's own folder. A reader that numbers the folders that it finds would give other labels
to all images as soon as the only one of a class is missing, as it may be at any data holder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from fedhead.common.data.loaded import Loaded, Request, as_column, text_of
from fedhead.common.data.paths import folder_of
from fedhead.common.errors import DataError

_PARTS, _FILE = ("train", "test"), "file_name"
_NOT_READ = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}  # Pillow knows their names alone, or needs another program


def load_imagefolder(request: Request) -> Loaded:
    """A folder of images, one subfolder a label; with subfolders `train` or `test`, the part that is asked for.

    Returns
    -------
    Loaded
        Columns `image`, paths, and `label`: the name of the first folder on the way to the image, "" for none. In the
        order of the paths. A `metadata.csv` or `metadata.jsonl` in the folder adds columns, by its `file_name`.

    Raises
    ------
    DataError
        It isn't a folder, or holds no image, or not the part that is asked for.

    Notes
    -----
    Guarantee: a record's label depends on its own path alone. Files and folders whose names begin with "." or "__" are
    left out, as programs keep their own things there.
    """
    folder = _part(folder_of(request), request)
    paths = sorted(_images(folder))
    if not paths:
        raise DataError(f"{request.shown}: it holds no image. Give a folder with one subfolder a label.")
    labels = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    columns = {"image": [str(folder / path) for path in paths], "label": labels, **_described(folder, paths, request)}
    return Loaded(len(paths), {name: as_column(values) for name, values in columns.items()}, folder=folder)


def _described(folder: Path, paths: Sequence[Path], request: Request) -> dict[str, list[Any]]:
    """Further columns, such as a person, of a file beside the images whose column `file_name` holds their paths."""
    from fedhead.common.data.files import load_csv
    from fedhead.common.data.json_file import load_json

    for name, read in (("metadata.csv", load_csv), ("metadata.jsonl", load_json)):
        if (folder / name).is_file():
            table = read(replace(request, name=str(folder / name), shown=f"{request.shown}: {name}"))
            if _FILE not in table.columns:
                raise DataError(f"{request.shown}: {name} has no column {_FILE}. Add one, with each image's path.")
            rows = {text_of(path): row for row, path in enumerate(table.columns[_FILE].tolist())}
            order = [rows.get(path.as_posix()) for path in paths]
            further = {column: table.columns[column].tolist() for column in table.columns if column != _FILE}
            return {
                column: [None if row is None else values[row] for row in order] for column, values in further.items()
            }
    return {}


def _part(folder: Path, request: Request) -> Path:
    parts = [name for name in _PARTS if (folder / name).is_dir()]
    if not parts:
        return folder
    if request.split not in parts:
        raise DataError(
            f'{request.shown}: it has no part "{request.split}", and a part "{parts[0]}". Give a folder with that '
            "part, or one that holds the labels' folders."
        )
    return folder / request.split


def _images(folder: Path) -> Iterator[Path]:
    """Paths of images below a folder, relative to it; links are followed, each folder is entered once."""
    entered = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if _is_shown(name))
        for name in files:
            if _is_shown(name) and os.path.splitext(name)[1].lower() in image_endings():
                yield Path(place, name).relative_to(folder)


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "__"))


@cache
def image_endings() -> frozenset[str]:
    """How the names of image files end, with the dot and in small letters: of the formats that Pillow reads itself."""
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in Image.OPEN and kind not in _NOT_READ)
