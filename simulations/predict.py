"""Labels and probabilities for new records, from files, folders or standard input.

Inputs are read and answered in batches: neither a large file's images nor its answers are held in memory at once.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

import numpy as np

from fedhead.common.config.places import path_from
from fedhead.common.data.image_folder import image_endings
from fedhead.common.data.inputs import decode_image
from fedhead.common.data.sources import load_records
from fedhead.common.errors import DataError, InputError
from fedhead.common.models.saved import Model, load_model, vector_size

TABLES: Final = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
STDIN: Final = "-"
BLOCK: Final = 512  # texts read at once; those of one block are sorted by length into even batches
FEW: Final = 32  # images read at once: decoded photographs are large


@dataclass(frozen=True)
class Block:
    """Some inputs: a name each, and the input itself, None where it can't be decoded."""

    names: list[str]
    inputs: list[Any]


def predict_file(
    model_dir: str | Path,
    inputs: Sequence[str],
    out: Path | None = None,
    as_json: bool = False,
    *,
    column: str | None = None,
    weights: str | None = None,
    allow_modules: bool = False,
    batch_size: int = 64,
) -> int:
    """Write labels and probabilities of all inputs.

    Parameters
    ----------
    model_dir : path
        The folder `model/` of a run, or the run's folder.
    inputs : sequence of str
        Each a csv, json, jsonl or parquet file; for images also image files and folders of them; for texts also `-`,
        standard input with one text a line.
    out : path, optional
        Written aside and renamed; default: standard output, as the answers come.
    as_json : bool
        One JSON object instead of CSV.
    column : str, optional
        The column of a table that holds the input; default: `text`, `image` or `vector`, whichever the model takes.
    weights : str, optional
        Where the backbone's weights are on this machine, as in `load_model`, but from the current folder.
    allow_modules : bool
        As in `load_model`.
    batch_size : int
        Inputs in one batch through the backbone.

    Returns
    -------
    int
        How many inputs got no label.

    Raises
    ------
    InputError
        When the model can't be loaded or an input can't be read. All paths are looked at before the first answer.

    Notes
    -----
    CSV columns: `input` (the row from 1, or the file's name), `label`, `p_<label>` for each label. An image that can't
    be decoded has an empty label, and a warning on standard error.
    """
    inputs = [str(path_from(given, Path())) if given.startswith("~") else given for given in inputs]
    _check_paths(inputs)
    if weights is not None and not weights.startswith("pkg://"):
        path = path_from(weights, Path.cwd())  # typed in a shell, not in a recipe
        if not path.exists():
            raise InputError(f'--weights is "{weights}": there is no such file or folder. Check the path.')
        weights = str(path)
    model = load_model(model_dir, weights=weights, allow_modules=allow_modules)
    blocks = _blocks(inputs, model.backbone.kind, column, vector_size(model.backbone))
    # The first block is read before anything is written: a wrong column leaves no half-written output behind.
    first = next(blocks, None)
    missing = 0
    try:
        with _target(out) as stream:
            writer: _Writer = (_Json if as_json else _Csv)(stream, model.labels)
            for block in itertools.chain([] if first is None else [first], blocks):
                missing += _answer(model, block, writer, batch_size)
            writer.close()
            stream.flush()
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return missing


def _answer(model: Model, block: Block, writer: _Writer, batch_size: int) -> int:
    """Write the answers of a block; gives how many inputs got no label."""
    good = [row for row, given in enumerate(block.inputs) if given is not None]
    labels, probabilities = model.predict([block.inputs[row] for row in good], batch_size)
    answers = dict(zip(good, zip(labels, probabilities, strict=True), strict=True))
    missing = 0
    for row, name in enumerate(block.names):
        label, found = answers.get(row, ("", None))
        if not label:
            missing += 1
            why = "can't be decoded" if row not in answers else "gives no finite probabilities"
            print(f'warning: input "{name}" {why}; its label is left empty.', file=sys.stderr)  # noqa: T201
        writer.write(name, label, None if not label else found)
    return missing


class _Writer(Protocol):
    def write(self, name: str, label: str, probabilities: np.ndarray | None) -> None: ...

    def close(self) -> None: ...


class _Csv:
    """One line an input."""

    def __init__(self, stream: TextIO, labels: Sequence[str]) -> None:
        self._writer = csv.writer(stream, lineterminator="\n")
        self._writer.writerow(["input", "label", *(f"p_{label}" for label in labels)])
        self._count = len(labels)

    def write(self, name: str, label: str, probabilities: np.ndarray | None) -> None:
        shown = [""] * self._count if probabilities is None else [f"{value:.6g}" for value in probabilities]
        self._writer.writerow([name, label, *shown])

    def close(self) -> None:
        """Nothing is left to write."""


class _Json:
    """One object: labels, and an entry an input."""

    def __init__(self, stream: TextIO, labels: Sequence[str]) -> None:
        self._stream, self._labels, self._sign = stream, labels, "\n"
        stream.write(f'{{"labels": {json.dumps(list(labels))},\n"predictions": [')

    def write(self, name: str, label: str, probabilities: np.ndarray | None) -> None:
        shown = None if probabilities is None else dict(zip(self._labels, probabilities.tolist(), strict=True))
        entry = {"input": name, "label": label or None, "probabilities": shown}
        self._stream.write(self._sign + json.dumps(entry, allow_nan=False))
        self._sign = ",\n"

    def close(self) -> None:
        self._stream.write("\n]}\n")


@contextmanager
def _target(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    aside = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        # a file's name may be bytes that are no UTF-8: they come out as they are
        with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            yield stream
        os.replace(aside, out)
    except OSError as error:
        raise InputError(
            f'--out is "{out}": it can\'t be written ({type(error).__name__}). Name another file.'
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _check_paths(inputs: Sequence[str]) -> None:
    if not inputs:
        raise InputError(
            "INPUT is missing: it must be given. Name a file, a folder of images, or - for standard input."
        )
    if list(inputs).count(STDIN) > 1:
        raise InputError('INPUT is "-" twice: standard input can be read once. Remove one.')
    for given in inputs:
        if given != STDIN and not Path(given).exists():
            raise InputError(f'INPUT is "{given}": there is no such file or folder. Check the path.')


def _blocks(inputs: Sequence[str], kind: str, column: str | None, size: int | None) -> Iterator[Block]:
    """All inputs, in order; named by their row or file, and by the file too when there are several."""
    alone = len(inputs) == 1
    for given in inputs:
        suffix = Path(given).suffix.lower()
        if given == STDIN:
            if kind != "text":
                raise InputError(
                    f'INPUT is "-": this model takes {kind}s, and standard input gives texts. Name a file.'
                )
            yield from _lines(sys.stdin, "" if alone else "-:")
        elif Path(given).is_dir():
            if kind != "image":
                raise InputError(f'INPUT is "{given}": it is a folder, and this model takes {kind}s. Name a file.')
            yield from _folder(Path(given), alone)
        elif suffix in TABLES:
            yield from _table(given, TABLES[suffix], kind, column, size, "" if alone else f"{given}:")
        elif kind == "image" and suffix in image_endings():
            yield Block([given], [_open(Path(given))])
        else:
            images = "an image, a folder of images, " if kind == "image" else ""
            raise InputError(
                f'INPUT is "{given}": for {kind}s it must be {images}a csv, json, jsonl or parquet file'
                f"{', or -' if kind == 'text' else ''}. Name such a file."
            )


def _table(path: str, source: str, kind: str, column: str | None, length: int | None, prefix: str) -> Iterator[Block]:
    try:
        records = load_records(f"{source}:{path}", {kind: column or kind}, None, Path.cwd(), setting="INPUT")
    except DataError as error:  # told in a recipe's words; this command has others
        told = str(error).replace(f"INPUT.columns.{kind}", "--column")
        raise DataError(told.replace(f'INPUT.source is "{source}:', 'INPUT is "')) from error
    if length is not None and len(records):  # all are of one length
        found = records.inputs(slice(0, 1))[0].size
        if found != length:
            raise DataError(
                f'--column is "{column or kind}": it gives vectors of length {found}, and this model takes vectors of '
                f"length {length}. Name the columns that the model was trained on."
            )
    size = FEW if kind == "image" else BLOCK
    for start in range(0, len(records), size):
        stop = min(start + size, len(records))
        yield Block([f"{prefix}{row + 1}" for row in range(start, stop)], records.inputs(slice(start, stop)))


def _lines(stream: TextIO, prefix: str) -> Iterator[Block]:
    row = 0
    while lines := list(itertools.islice(stream, BLOCK)):
        texts = [line.rstrip("\r\n") for line in lines]
        yield Block([f"{prefix}{row + number + 1}" for number in range(len(texts))], texts)
        row += len(texts)


def _folder(folder: Path, alone: bool) -> Iterator[Block]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in image_endings() and path.is_file())
    if not paths:
        raise InputError(f'INPUT is "{folder}": it holds no image. Name a folder with png, jpg or other image files.')
    for start in range(0, len(paths), FEW):
        part = paths[start : start + FEW]
        names = [str(path.relative_to(folder) if alone else path) for path in part]
        yield Block(names, [_open(path) for path in part])


def _open(path: Path) -> Any:
    try:
        return decode_image(path.read_bytes())
    except OSError:
        return None
