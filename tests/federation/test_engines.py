"""The same apps on several engines: the same head from the same seed."""

import pytest
import torch
from safetensors.torch import load_file

from fedhead.simulations.simulate import simulate

pytest.importorskip("ray", reason="the extra `simulation` is not installed")


def head_of(folder):
    state = load_file(folder / "model" / "head.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.mark.slow
def test_ray_gives_the_same_bits_as_one_process(tiny, tmp_path):
    config = tiny(
        {
            "holders.count": 4, "holders.per_round": 3, "training.rounds": 3, "training.local_steps": 2,
            "run.exact": True, "privacy.mechanism": "poisson", "privacy.sample_rate": 0.2,
        }
    )  # fmt: skip
    state = tmp_path / "state"
    one = simulate(config, tmp_path / "one", state=state)
    ray = simulate(config, tmp_path / "ray", state=state, engine="ray")
    assert torch.equal(head_of(tmp_path / "one"), head_of(tmp_path / "ray"))
    assert one.final == ray.final
    assert [entry["events"] for entry in one.privacy] == [entry["events"] for entry in ray.privacy]
