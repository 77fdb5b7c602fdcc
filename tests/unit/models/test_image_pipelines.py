"""Images on their way into a backbone: any size and kind, one by one, as an image processor's settings say."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fedhead.common.errors import DataError
from fedhead.common.models.images import ImagePipeline
from fedhead.common.models.pipelines import pipeline_of


def test_images_of_many_sizes_and_kinds_do_not_touch_each_other():
    pipeline = ImagePipeline((16,), (16, 16))
    random = np.random.default_rng(0)
    color = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = random.integers(0, 256, (9, 9), dtype=np.uint8)
    images = [
        color,
        grey,
        Image.fromarray(color[::-1]),
        Image.fromarray(grey),
        Image.fromarray(grey).convert("P"),
        grey[:, :, None],
    ]
    together = pipeline.collate(images)["values"]
    assert together.shape == (6, 3, 16, 16)
    for image, values in zip(images, together, strict=True):
        torch.testing.assert_close(pipeline.collate([image])["values"][0], values, atol=0, rtol=0)
    torch.testing.assert_close(together[1], together[3])
    same = pipeline.collate([color, color[:, ::-1].copy()])["values"]
    torch.testing.assert_close(same[0], together[0], atol=0, rtol=0)


def test_normalisation():
    pipeline = ImagePipeline(None, None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    values = pipeline.collate([np.full((2, 2, 3), 51, np.uint8)])["values"]
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor([(0.2 - 0.1) / 0.5, 0.0, -0.1]))


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)])
def test_what_is_no_image(bad):
    with pytest.raises(DataError, match="something else than images"):
        ImagePipeline((16,), (16, 16)).collate([bad])


def test_sizes_that_nothing_brings_to_one():
    with pytest.raises(DataError, match=r"Set model\.image\.size"):
        ImagePipeline(None, None).collate([np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)])


def test_image_processor_settings():
    pipeline = pipeline_of(
        {
            "do_resize": True, "size": {"shortest_edge": 20}, "do_center_crop": True,
            "crop_size": {"height": 16, "width": 18}, "do_rescale": True, "rescale_factor": 1 / 127.5,
            "do_normalize": True, "image_mean": [1.0] * 3, "image_std": [1.0] * 3, "resample": 3,
        }
    )  # fmt: skip
    assert (pipeline.resize, pipeline.crop, pipeline.interpolation) == ((20,), (16, 18), "bicubic")
    values = pipeline.collate([np.full((30, 30), 255, np.uint8)])["values"]  # 255 / 127.5 - 1 = 1
    torch.testing.assert_close(values, torch.ones(1, 3, 16, 18))
    assert pipeline_of({"do_resize": False}) == ImagePipeline(None, None, (0.0,) * 3, (1.0,) * 3)


def test_texts_and_vectors_do_not_wait_for_torchvision():
    """It takes seconds to load, at a server, at a holder and in every command."""
    code = (
        "import sys, fedhead.common.models.encoders, fedhead.common.models.modules, fedhead.server.app; "
        "print('torchvision' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
