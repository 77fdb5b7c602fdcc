"""Planted gradients behind a cut: small networks of several families with 0, 1 and 2 blocks unfrozen."""

from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch

from fedhead.client.auditing.contributions import largest_contribution
from fedhead.client.auditing.exactness import largest_difference
from fedhead.client.auditing.experiment import observe
from fedhead.client.auditing.reference import Reference
from fedhead.common.config.schema import MLPHead
from fedhead.common.features import FeatureSet
from fedhead.common.models.trainable import Trainable

HERE = Path(__file__)
BENCH = run_path(str(HERE.with_name("audit_bench.py")))
Bench, planted, drawn = (BENCH[name] for name in ("Bench", "planted", "drawn"))
DROPPING = MLPHead(kind="mlp", hidden=[8, 6], dropout=0.3)
POISSON = {"mechanism": "poisson", "sample_rate": 0.5, "local_steps": 2}
CUT = run_path(str(HERE.parents[2] / "models" / "test_cut.py"))


def behind(name, unfreeze, head=DROPPING, **plan):
    """A setup whose records are values at a cut of a small network."""
    backbone = CUT["make"](name, unfreeze)
    values, lengths = backbone.forward(backbone.collate(CUT["inputs"](backbone) * 3))
    values = values + 0.3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    real = FeatureSet(values)
    if lengths is not None:
        rows = torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])
        real = FeatureSet(rows, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
    bench = Bench(head, features=backbone.dim, canaries=1, noise_multiplier=1.0, **{"chunk": 5, **plan})
    whole = bench.make

    def make():
        made = whole()
        tail = CUT["make"](name, unfreeze).tail
        return Trainable(tail if tail is None else tail.to(next(made.parameters()).dtype), True, made.head)

    bench.make, bench.real, bench.targets = make, real, torch.arange(len(real)) % 3
    return planted(bench, 40)


@pytest.mark.parametrize("plan", [{}, POISSON], ids=["full-batch", "poisson"])
@pytest.mark.parametrize("unfreeze", [0, 1, 2])
@pytest.mark.parametrize("name", ["vgg11_bn", "bert", "vit_b", "sequential"])
def test_residuals_behind_a_cut_are_the_very_noise(name, unfreeze, plan):
    setup = behind(name, unfreeze, **plan)
    if name in ("bert", "vit_b"):
        assert {layer.name.split(".")[0] for layer in setup.canaries.layers} == (
            {"head", "tail"} if unfreeze else {"head"}
        )
    found = observe(setup, 2)
    assert np.abs(found.residuals - drawn(setup, 2)).max() < 2e-5
    assert found.signal > 0.99
    assert found.replay_error == 0


@pytest.mark.parametrize("name", ["vgg11_bn", "sequential"])
def test_sums_and_contributions_behind_a_cut(name, monkeypatch):
    for unfreeze in (1, 2):
        setup = behind(name, unfreeze)
        assert largest_difference(setup).share < 0.1
        assert largest_contribution(setup).largest < 1 + 1e-5
    BENCH["clip_looser"](monkeypatch)
    assert largest_difference(setup).share > 100
    assert largest_contribution(setup).largest == pytest.approx(1.5, abs=1e-3)


def test_the_reference_takes_one_after_the_other_where_modules_need_it():
    setup = behind("vit_b", 1)
    checked, slow = (Reference(setup.make_trainable(), setup.task) for _ in range(2))
    slow._one_by_one = True
    head = setup.sent_head()
    found = [one.clipped_sum(head, setup.features, setup.targets, 0.5) for one in (checked, slow)]
    assert not checked._one_by_one
    assert found[0] == pytest.approx(found[1], abs=1e-12)
