"""The built-in recipes that need no network, as they ship, with real weights and real records."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fedhead import load
from fedhead.common.config import find_recipe
from fedhead.common.results import Result
from fedhead.simulations.simulate import simulate


@pytest.mark.slow
def test_quickstart_from_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedhead", "simulate", "quickstart", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=True, timeout=900,
    )  # fmt: skip
    result = Result.read(tmp_path / "run")
    assert 0.77 < result.final["accuracy"] < result.baseline["accuracy"] + 0.01
    assert result.final["auc_roc"] > 0.86
    assert result.baseline["accuracy"] > 0.81
    assert result.majority["accuracy"] < 0.55
    assert len(result.privacy) == 5
    assert all(2.99 < entry["epsilon"] <= 3.0 and entry["delta"] == 1e-5 for entry in result.privacy)
    for shown in (
        "private head",
        "same head without privacy",
        "majority class",
        "AUC-ROC",
        "epsilon",
        "time: features",
    ):
        assert shown in done.stdout, shown
    assert str(tmp_path / "run") in done.stdout
    assert done.stderr == ""
    labels, _ = load(tmp_path / "run" / "model").predict(["thank you so much, great flight", "worst service ever"])
    assert labels == ["positive", "negative"]


@pytest.mark.slow
def test_digits_without_noise_are_the_same_for_every_split(tmp_path):
    """Small images, so that it takes seconds; features are computed once and shared by both runs."""
    heads = []
    for name, partition in (("iid", '{kind="iid"}'), ("skewed", '{kind="dirichlet", alpha=0.1}')):
        config = find_recipe(
            "digits",
            [
                "model.image.size=32", "training.rounds=10", "run.baseline=false", "privacy.mechanism=none",
                "privacy.epsilon=", f"holders.partition={partition}",
            ],
        )  # fmt: skip
        result = simulate(config, tmp_path / name, state=tmp_path / "state")
        assert result.final["accuracy"] > 0.3
        state = load_file(tmp_path / name / "model" / "head.safetensors")
        heads.append(torch.cat([state[key].flatten() for key in sorted(state)]))
    assert (heads[0] - heads[1]).abs().max() < 1e-5 * heads[0].abs().max()
