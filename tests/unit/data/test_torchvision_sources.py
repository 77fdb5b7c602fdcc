"""Data sets of torchvision: parts, labels and layout of each, with stand-ins for files that a network would bring."""

from __future__ import annotations

import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhead.common.data.named import TORCHVISION
from fedhead.common.data.sources import load_records
from fedhead.common.errors import DataError


class FakeSet:
    """A set of torchvision without its files; each subclass has the constructor and the attributes of some."""

    first = 0  # the lowest label

    def made(self, train: bool, images: Any, labels: Callable[[list[int]], Any], name: str = "targets") -> None:
        sys.stdout.write("Files already downloaded")
        count = 4 if train else 2
        self.data = images(count)
        setattr(self, name, labels([self.first, self.first + 1] * (count // 2)))


def colours(count: int) -> np.ndarray:
    """(N, H, W, 3): the pixel in the first row and second column is (1, 5, 9)."""
    return np.tile(np.arange(12, dtype=np.uint8).reshape(3, 2, 2).transpose(1, 2, 0), (count, 1, 1, 1))


def greys(count: int) -> torch.Tensor:
    """(N, H, W): that pixel is 1."""
    return torch.arange(4, dtype=torch.uint8).view(2, 2).expand(count, 2, 2)


class FakeCIFAR(FakeSet):
    classes = ("cat", "dog")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.made(train, colours, list)


class FakeMNIST(FakeSet):
    classes = ("cat", "dog")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.made(train, greys, torch.tensor)


class FakeEMNIST(FakeMNIST):
    classes, first = ("N/A", "cat", "dog"), 1

    def __init__(self, root: str, split: str, train: bool, download: bool) -> None:
        assert split == "letters"
        super().__init__(root, train, download)


class FakeSVHN(FakeSet):
    def __init__(self, root: str, split: str, download: bool) -> None:
        assert split in ("train", "test")
        self.made(split == "train", lambda count: colours(count).transpose(0, 3, 1, 2), np.array, "labels")


class FakeSTL(FakeSVHN):
    classes = ("cat", "dog")


FAKES = {
    "CIFAR10": FakeCIFAR, "CIFAR100": FakeCIFAR, "MNIST": FakeMNIST, "FashionMNIST": FakeMNIST, "KMNIST": FakeMNIST,
    "EMNIST": FakeEMNIST, "SVHN": FakeSVHN, "STL10": FakeSTL,
}  # fmt: skip


class Offline:
    def __init__(self, *_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_parts_labels_and_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    import torchvision

    monkeypatch.setenv("FEDHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, name, FAKES[name])
    labels = ["1", "0"] if name == "SVHN" else ["dog", "cat"]  # SVHN's have no names
    numbers = [str(FAKES[name].first), str(FAKES[name].first + 1)]
    train = load_records(f"torchvision:{name}", {}, labels, tmp_path)
    test = load_records(f"torchvision:{name}", {}, numbers, tmp_path, split="test")
    assert (train.kind, train.labels.tolist(), test.labels.tolist()) == ("image", [1, 0, 1, 0], [0, 1])
    pixel = train.inputs([0])[0].getpixel((1, 0))
    assert pixel == ((1, 1, 1) if "MNIST" in name else (1, 5, 9))  # of SVHN and STL10, channels come first
    assert capsys.readouterr().out == ""


def test_torchvision_offline_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setenv("FEDHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    with pytest.raises(DataError, match=r"can't be downloaded \(URLError\). Connect to the network once") as caught:
        load_records("torchvision:CIFAR10", {}, ["0"], tmp_path)
    assert str(tmp_path / "cache") in str(caught.value)


def test_every_torchvision_row_exists_in_torchvision() -> None:
    import torchvision

    assert all(hasattr(torchvision.datasets, name) for name in TORCHVISION)
