"""How images and vectors become batches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedhead.common.config.schema import ImageSettings
from fedhead.common.errors import DataError
from fedhead.common.models.cut import VALUES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePipeline:
    """Resize, crop in the centre, scale to [0, 1], normalise.

    Attributes
    ----------
    resize : tuple of int or None
        One number: the shorter side in pixels; two: height and width. None: leave as is.
    crop : tuple of int or None
        Height and width in pixels, after resizing; smaller images are padded with black.
    mean, std : tuple of float
        Red, green, blue, on the scale [0, 1].
    interpolation : str
        As torchvision names it, such as ``bilinear``; always with antialiasing.
    """

    resize: tuple[int, ...] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"

    def override(self, settings: ImageSettings) -> ImagePipeline:
        """This pipeline with what ``[model.image]`` gives; a size resizes the shorter side to it and crops a square."""
        values: dict[str, Any] = asdict(self)
        if settings.size is not None:
            values |= {"resize": (settings.size,), "crop": (settings.size, settings.size)}
        if settings.mean is not None:
            values["mean"] = tuple(settings.mean)
        if settings.std is not None:
            values["std"] = tuple(settings.std)
        return ImagePipeline(**values)

    def describe(self) -> dict[str, Any]:
        """All settings, for the cache key."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def probe(self) -> dict[str, Tensor]:
        """A batch of one black image."""
        height, width = self.crop or (self.resize if self.resize and len(self.resize) == 2 else (224, 224))
        return self.collate([np.zeros((height, width, 3), np.uint8)])

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """B images -> ``{"values": float32 (B, 3, H, W)}``.

        Parameters
        ----------
        inputs : list
            PIL images, or uint8 arrays (H, W) or (H, W, 3). Grey is repeated to three channels.

        Raises
        ------
        DataError
            When an array has another type or shape, or sizes differ and nothing brings them to one.

        Notes
        -----
        Images of one size are resized together; a record's values don't depend on what else is in the batch.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        arrays = [_array(image) for image in inputs]
        for index, array in enumerate(arrays):
            groups[array.shape].append(index)
        done: dict[int, Tensor] = {}
        for members in groups.values():
            stack = torch.from_numpy(np.stack([arrays[index] for index in members]))  # (b, H, W[, 3])
            stack = stack.unsqueeze(1) if stack.ndim == 3 else stack.permute(0, 3, 1, 2)  # (b, 1 or 3, H, W)
            pixels = self._shape(stack)
            if len(groups) == 1:
                return {VALUES: self._normalise(pixels.expand(-1, 3, -1, -1))}
            done |= dict(zip(members, pixels.expand(-1, 3, -1, -1), strict=True))
        if len({tuple(image.shape) for image in done.values()}) > 1:
            raise DataError("model.image.size is not set: images have different sizes. Set model.image.size.")
        return {VALUES: self._normalise(torch.stack([done[index] for index in range(len(arrays))]))}

    def cost(self, inputs: list[Any]) -> list[int] | None:
        """All images cost the same."""
        return None

    def _shape(self, pixels: Tensor) -> Tensor:
        # here, because it takes a second or two that texts and vectors should not pay for
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, resize

        if self.resize is not None and tuple(pixels.shape[-2:]) != self.resize:
            mode = InterpolationMode(self.interpolation)
            pixels = resize(pixels, list(self.resize), interpolation=mode, antialias=True)
        if self.crop is not None and tuple(pixels.shape[-2:]) != self.crop:
            pixels = center_crop(pixels, list(self.crop))
        return pixels

    def _normalise(self, pixels: Tensor) -> Tensor:
        scale = 1 / (255 * torch.tensor(self.std))
        shift = torch.tensor(self.mean) / torch.tensor(self.std)
        # Channels last: convolutions on a CPU are up to twice as fast on it.
        values = pixels.float().contiguous(memory_format=torch.channels_last)
        return values.mul_(scale.view(3, 1, 1)).sub_(shift.view(3, 1, 1))


def _array(image: Any) -> np.ndarray:
    if isinstance(image, Image.Image):
        array = np.array(image if image.mode in ("RGB", "L") else image.convert("RGB"))
    else:
        array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise DataError(
            "data.columns.image holds something else than images: they must be pictures or uint8 arrays of shape "
            "(H, W) or (H, W, 3). Name another column, or convert it."
        )
    return array


@dataclass(frozen=True)
class VectorPipeline:
    """Vectors as they are.

    Attributes
    ----------
    size : int
        Length of each vector.
    """

    size: int

    def describe(self) -> dict[str, Any]:
        """All settings, for the cache key."""
        return {"size": self.size}

    def probe(self) -> dict[str, Tensor]:
        """A batch of one zero vector."""
        return {VALUES: torch.zeros(1, self.size)}

    def collate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """B vectors (V,) -> ``{"values": float32 (B, V)}``."""
        values = np.stack([np.asarray(vector, dtype=np.float32).reshape(-1) for vector in inputs])
        if values.shape[1] != self.size:
            raise DataError(
                f"data.columns.vector holds vectors of length {values.shape[1]}: the backbone takes {self.size}. "
                "Name another column."
            )
        return {VALUES: torch.from_numpy(values)}

    def cost(self, inputs: list[Any]) -> list[int] | None:
        """All vectors cost the same."""
        return None
