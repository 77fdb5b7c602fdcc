"""Backbones of a user's own: records that are mixed, and code that changes under the same weights."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from fedhead.common.config.schema import FeatureSettings, ModelSettings
from fedhead.common.data.records import Records
from fedhead.common.errors import ModelError
from fedhead.common.features import extract
from fedhead.common.models.backbones import load_backbone

CODE = """
import torch
from torch import nn

class Times(nn.Module):
    input_kind, feature_dim = "vector", 4
    def forward(self, x):
        return x * 2

class Mixing(nn.Module):
    input_kind, image_size = "image", 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    def forward(self, x):
        return self.body(x).mean((2, 3))

class MixingTexts(nn.Module):
    input_kind = "text"
    def collate(self, texts):
        return {"sizes": torch.tensor([[float(len(text)), 1.0] for text in texts])}
    def forward(self, sizes):
        return sizes / sizes.amax(0)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code):
        (folder / "own_backbones_under_test.py").write_text(code)
        sys.modules.pop("own_backbones_under_test", None)
        importlib.invalidate_caches()

    write(CODE)
    yield write
    sys.modules.pop("own_backbones_under_test", None)


def load(name):
    return load_backbone(ModelSettings(backbone=f"module:own_backbones_under_test:{name}"), Path())


@pytest.mark.parametrize("name", ["Mixing", "MixingTexts"])
def test_a_backbone_that_mixes_records_is_refused(own, name):
    with pytest.raises(ModelError, match="alone and in a batch"):
        load(name)


def test_features_are_computed_anew_when_the_code_changes(own, tmp_path):
    records = Records.from_memory("vector", np.arange(12.0).reshape(3, 4))
    first = extract(load("Times"), records, tmp_path / "cache", FeatureSettings())
    own(CODE.replace("x * 2", "x * 3"))
    second = extract(load("Times"), records, tmp_path / "cache", FeatureSettings())
    np.testing.assert_allclose(second.values.numpy(), 1.5 * first.values.numpy())


def test_the_digest_stays_while_the_code_does(own):
    digest = load("Times").digest
    own(CODE)
    assert load("Times").digest == digest
