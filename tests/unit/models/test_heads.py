import pytest
import torch
from torch import nn

from fedhead.common.config.schema import LinearHead, MLPHead, ModuleHead
from fedhead.common.errors import ConfigError, ModelError
from fedhead.common.models.heads import HEADS, make_head
from fedhead.common.models.trainable import check_supported

ROWS = {"linear": LinearHead(), "mlp": MLPHead(kind="mlp", hidden=[8], dropout=0.5)}


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_maps_the_last_dimension_and_starts_near_zero(kind):
    head = make_head(ROWS[kind], 6, 3).eval()
    features = nn.functional.normalize(torch.randn(4, 6), dim=1)
    assert head(features).shape == (4, 3)
    assert head(features.unsqueeze(1)).shape == (4, 1, 3)
    assert head(features).abs().max() < 0.01
    check_supported(head)


def test_linear_head_is_zero_and_draws_nothing():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    head = make_head(LinearHead(), 6, 3)
    assert torch.equal(torch.rand(1), expected)
    assert all((parameter == 0).all() for parameter in head.parameters())
    assert make_head(LinearHead(bias=False), 6, 3).bias is None


def test_mlp_is_what_the_recipe_says():
    settings = MLPHead(kind="mlp", hidden=[8, 5], activation="tanh", dropout=0.25)
    layers = list(make_head(settings, 6, 3))
    assert [type(layer).__name__ for layer in layers] == [
        "Linear", "Tanh", "Dropout", "Linear", "Tanh", "Dropout", "Linear",
    ]  # fmt: skip
    assert [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)] == [(8, 6), (5, 8), (3, 5)]
    assert layers[2].p == 0.25


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_gradients_reach_the_first_layer_from_the_start(activation):
    torch.manual_seed(0)
    head = make_head(MLPHead(kind="mlp", hidden=[8], activation=activation), 6, 3)
    nn.functional.cross_entropy(head(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    assert head[0].weight.grad.abs().max() > 0


def test_the_same_seed_gives_the_same_head():
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return make_head(ROWS["mlp"], 6, 3)[0].weight

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_own_head():
    head = make_head(ModuleHead(kind="module:torch.nn:Linear", options={"bias": False}), 6, 3)
    assert isinstance(head, nn.Linear)
    assert head.training


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("module:torch.nn:Bilinear", r"must take \(features, outputs\)"),
        ("module:builtins:max", "must return a torch.nn.Module, not int"),
        ("module:fractions:Fraction", "must return a torch.nn.Module, not Fraction"),
    ],
)
def test_own_heads_that_are_none(reference, message):
    with pytest.raises(ModelError, match=message) as error:
        make_head(ModuleHead(kind=reference), 6, 3)
    assert "\n" not in str(error.value)


def test_own_head_with_the_wrong_number_of_outputs():
    # LazyLinear(6, 3) would read 3 as its bias and gives 6 outputs.
    with pytest.raises(ModelError, match=r"must map \(B, 6\) to \(B, 3\)"):
        make_head(ModuleHead(kind="module:torch.nn:LazyLinear"), 6, 3)


def test_unknown_own_head():
    with pytest.raises(ConfigError, match=r"model.head.kind"):
        make_head(ModuleHead(kind="module:torch.nn:NoSuchHead"), 6, 3)
