import pytest
import torch
from opacus.optimizers.optimizer import _generate_noise

from fedhead.common.privacy.noise import TorchNoise


@pytest.mark.parametrize("shape", [(10, 512), (10,), (1,), (3, 4, 5)])
@pytest.mark.parametrize("std", [1e-3, 1.3])
def test_the_draws_are_those_of_opacus(shape, std):
    total = torch.randn(shape)
    given = {"noise_multiplier": std / 0.25, "clipping_norm": 0.25}
    mine = TorchNoise(torch.Generator().manual_seed(3)).add(total, **given)
    noise = _generate_noise(std=std, reference=total, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mine, noise + total)
    assert not torch.equal(mine, TorchNoise(torch.Generator().manual_seed(4)).add(total, **given))
