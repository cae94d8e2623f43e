"""From a stored image to the uint8 tensors that a model's inputs are made of; augmentation is keyed."""

from __future__ import annotations

import io
import logging
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from hf_balancemix.core.keys import keyed_rng

logger = logging.getLogger(__name__)

BICUBIC = int(Image.Resampling.BICUBIC)
BILINEAR = int(Image.Resampling.BILINEAR)


def decode(image: Any) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag, from whatever a data set's `image` column holds.

    Args:
        image: A dict with `path` and `bytes` (an undecoded `datasets.Image`), a path, bytes, or a PIL image.

    Raises:
        ValueError: The file is no image, is cut off or is empty; names the file.
        FileNotFoundError: The file is gone.
        TypeError: `image` is something else.
    """
    name = "an image given as bytes"
    if isinstance(image, dict):
        name = image.get("path") or name
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        source: Any = io.BytesIO(image)
    elif isinstance(image, str | os.PathLike):
        source = name = os.fspath(image)
    elif isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    else:
        raise TypeError(f"image is {type(image).__name__}; a path, bytes, a PIL image or a datasets.Image is needed.")
    try:
        with Image.open(source) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # convert() would clip 16-bit grey values, not scale them
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name} does not exist; restore it or remove its row.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot decode image {name} ({error}); replace the file, or leave it out with on_bad_image='skip'."
        ) from error


def to_tensor(image: Image.Image) -> Tensor:
    """`(3, H, W)` uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ViewMaker:
    """Turns images into square uint8 views; the same squash to S x S in training, scan and evaluation.

    Args:
        image_size: S in pixels.
        seed: Seed of the augmentation.
        resample: PIL resampling filter, as the image processor names it.
        num_ops: RandAugment operations a view.
        magnitude: RandAugment magnitude, 0 to 30.
    """

    def __init__(
        self, image_size: int, seed: int, *, resample: int = BICUBIC, num_ops: int = 2, magnitude: int = 9
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be a positive number of pixels.")
        self.image_size, self.seed, self.resample = image_size, seed, resample
        # On PIL images: several times faster on a CPU than on tensors. It draws from torch's global generator only.
        self.augment = v2.RandAugment(num_ops=num_ops, magnitude=magnitude)

    def squash(self, image: Any) -> Image.Image:
        """Decode and resize, without keeping the aspect ratio."""
        return decode(image).resize((self.image_size, self.image_size), Image.Resampling(self.resample))

    def plain(self, image: Any) -> Tensor:
        """The un-augmented view, `(3, S, S)` uint8."""
        return to_tensor(self.squash(image))

    def augmented(self, image: Any, *key: int | str, num_views: int) -> list[Tensor]:
        """RandAugment views of one image, each `(3, S, S)` uint8, a pure function of the image, the seed and `key`."""
        squashed = self.squash(image)
        views = []
        for view in range(num_views):
            with keyed_rng(self.seed, *key, view):
                views.append(to_tensor(self.augment(squashed)))
        return views


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(B, 3, S, S)` uint8 -> float32, (x / 255 - mean) / std by channel; `mean`, `std` are `(3,)`."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
