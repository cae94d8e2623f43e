"""Image processors that squash: what is saved with a model is exactly what it was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_balancemix.data.views import BICUBIC, BILINEAR


def squash_processor(
    processor: Any | None = None, image_size: int | None = None, normalise: bool = True
) -> ViTImageProcessor:
    """An image processor that squashes to S x S and normalises as `processor` does.

    Args:
        processor: Any image processor of transformers, timm's wrapper included; None: ImageNet's mean and standard
            deviation.
        image_size: S; by default the size of `processor`.
        normalise: False: mean 0 and standard deviation 1, that is pixels in [0, 1].

    Returns:
        A processor that `AutoImageProcessor.from_pretrained` loads and pipelines use.

    Raises:
        ValueError: Neither `image_size` nor the processor says a size.
    """
    timm_config = getattr(processor, "data_config", None)
    if timm_config is not None:  # TimmWrapperImageProcessor cannot be saved itself
        mean, std, size = timm_config["mean"], timm_config["std"], timm_config["input_size"][-1]
        resample = BILINEAR if timm_config.get("interpolation") == "bilinear" else BICUBIC
    else:
        mean = getattr(processor, "image_mean", None) or IMAGENET_DEFAULT_MEAN
        std = getattr(processor, "image_std", None) or IMAGENET_DEFAULT_STD
        resample = getattr(processor, "resample", None)
        resample = BICUBIC if resample is None else int(resample)
        size = _side(getattr(processor, "crop_size", None)) or _side(getattr(processor, "size", None))
        if getattr(processor, "max_num_patches", None):  # SigLIP2's, for images of any shape
            size = math.isqrt(processor.max_num_patches) * processor.patch_size
        normalise = normalise and bool(processor is None or getattr(processor, "do_normalize", True))  # None means no
    if not normalise:
        mean, std = [0.0] * 3, [1.0] * 3
    size = image_size or size
    if not size:
        raise ValueError(
            "image_size is None, and no image processor says one; it must be the pixels a side that images are "
            "squashed to; pass image_size (--image_size)."
        )
    return ViTImageProcessor(
        size={"height": size, "width": size}, resample=resample, image_mean=list(mean), image_std=list(std)
    )


def _side(size: Any) -> int | None:
    """Of a size as image processors have it: a number, or a mapping or object with a height or a shortest edge."""
    if size is None or isinstance(size, int):
        return size
    values = size if isinstance(size, Mapping) else vars(size)
    return values.get("height") or values.get("shortest_edge")
