"""From a stored image to the uint8 tensors that a model's inputs are made of; augmentation is keyed."""

from __future__ import annotations

import io
import os
from typing import Any, Protocol, Self

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from hf_balancemix.core.keys import keyed_rng
from hf_balancemix.data.labels import column_feature

BICUBIC = int(Image.Resampling.BICUBIC)
BILINEAR = int(Image.Resampling.BILINEAR)


def decode(image: Any) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag; transparency is dropped, 16-bit grey is scaled to 8 bits.

    Args:
        image: A dict with `path` and `bytes` (an undecoded `datasets.Image`), a path, bytes, or a PIL image.

    Raises:
        ValueError: The file is no image, is cut off, is empty, has 32-bit pixels (of unknown range) or so many that it
            may be a decompression bomb.
        FileNotFoundError: The file is gone.
        TypeError: `image` is something else.
    """
    name = "given as bytes"
    if isinstance(image, dict):
        name = image.get("path") or name
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
    elif isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "given as a PIL image"
    elif not isinstance(image, bytes):
        raise TypeError(
            f"image is a {type(image).__name__}; it must be a path, bytes, a PIL image or a datasets.Image; pass one."
        )
    try:
        if isinstance(image, Image.Image):
            return _upright_rgb(image)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _upright_rgb(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name} does not exist; restore it or remove its row.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot decode image {name} ({error}); replace the file, or leave it out with on_bad_image='skip'."
        ) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    # convert() would clip values over 255, not scale them.
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ValueError(f"pixel mode {upright.mode}, 32 bits of unknown range; 8 or 16 bits are needed")
    return upright.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """`(3, H, W)` uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def undecoded_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """The `image` column alone, as path or bytes, so that decoding happens in the worker and once.

    Raises:
        TypeError: Not a `datasets.Dataset` (an IterableDataset cannot be indexed by two samplers).
        ValueError: No `image` column of type `datasets.Image`, or a transform that would not be applied.
    """
    feature = column_feature(dataset, "image", "rename the one that holds images: rename_column(..., 'image')")
    if not isinstance(feature, datasets.Image):
        fix = "dataset.cast_column('image', datasets.Image())"
        raise ValueError(f"column 'image' is {feature}; it must be a datasets.Image; use {fix}.")
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform (with_transform or set_transform), which must be left out, as views are "
            "made of the image column itself; call its reset_format(), and pass the trainer train_transform=."
        )
    return dataset.select_columns(["image"]).with_format(None).cast_column("image", datasets.Image(decode=False))


class Views(Protocol):
    """What makes a model's inputs: :class:`ViewMaker` of images, `CachedViews` of the features of a frozen backbone.

    Attributes:
        image_size: Pixels a side of the images that views are made of.
        seed: Seed of what is random in them.
        num_views: V, where an instance has a fixed number of augmented views, normalised and computed before; else
            None.
    """

    image_size: int
    seed: int
    num_views: int | None

    def images(self, dataset: datasets.Dataset) -> Any:
        """By a list of indices, a dict whose `image` lists what :meth:`plain` and :meth:`augmented` take."""

    def plain(self, image: Any, /) -> Tensor:
        """The un-augmented view."""

    def augmented(self, image: Any, /, *key: int | str, num_views: int) -> list[Tensor]:
        """Augmented views: a pure function of the image, the seed and `key`."""


class ViewMaker:
    """Turns images into square uint8 views; the same squash to S x S in training, scan and evaluation.

    Args:
        image_size: S in pixels.
        seed: Seed of the augmentation.
        resample: PIL resampling filter, as the image processor names it.
        num_ops, magnitude: RandAugment operations a view, and their magnitude, 0 to 30.
        cutout: Side of the square that is cut out before RandAugment, as a share of S in [0, 1]; see :func:`cut_out`.
    """

    num_views: int | None = None  # as many as are asked for

    def __init__(
        self,
        image_size: int,
        seed: int,
        *,
        resample: int = BICUBIC,
        num_ops: int = 2,
        magnitude: int = 9,
        cutout: float = 0.0,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1 pixel; pass for instance 448.")
        if not 0 <= magnitude <= 30 or num_ops < 0:
            needed = "RandAugment must have 0 or more operations of a magnitude of 0 to 30"
            raise ValueError(f"num_ops is {num_ops} and magnitude {magnitude}; {needed}; change one.")
        if not 0 <= cutout <= 1:
            raise ValueError(f"cutout is {cutout}; it must be a share of the image's side in [0, 1]; 0 is none.")
        self.image_size, self.seed, self.resample, self.cutout = image_size, seed, resample, cutout
        # On PIL images: several times faster on a CPU than on tensors. It draws from torch's global generator only.
        self.augment = v2.RandAugment(num_ops=num_ops, magnitude=magnitude)

    @classmethod
    def from_arguments(cls, args: Any, processor: Any, seed: int) -> Self:
        """Views of the size and by the filter of an image processor, with the augmentation of training arguments."""
        return cls(
            processor.size["height"],
            seed,
            resample=int(processor.resample),
            num_ops=args.randaugment_num_ops,
            magnitude=args.randaugment_magnitude,
            cutout=args.cutout,
        )

    def images(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The column that views are made from; see :func:`undecoded_images`."""
        return undecoded_images(dataset)

    def squash(self, image: Any) -> Image.Image:
        """Decode and resize, without keeping the aspect ratio."""
        return decode(image).resize((self.image_size, self.image_size), Image.Resampling(self.resample))

    def plain(self, image: Any) -> Tensor:
        """The un-augmented view, `(3, S, S)` uint8."""
        return to_tensor(self.squash(image))

    def augmented(self, image: Any, *key: int | str, num_views: int) -> list[Tensor]:
        """Views of one image by cutout and RandAugment, each `(3, S, S)` uint8.

        They are a pure function of the image, the seed and `key`.
        """
        squashed = self.squash(image)
        views = []
        for view in range(num_views):
            with keyed_rng(self.seed, *key, view):
                cut = cut_out(squashed, self.cutout) if self.cutout else squashed
                views.append(to_tensor(self.augment(cut)))
        return views


def cut_out(image: Image.Image, share: float) -> Image.Image:
    """A copy with a square of one random colour, drawn from torch's global generator, as ASL was trained with.

    Its side is `share` times the image's, its centre any pixel; what lies outside the image is lost. Cutout (DeVries
    and Taylor, 2017) itself cuts out in grey.
    """
    side = int(share * image.width + 0.5)
    left, top = (int(torch.randint(size, ())) - side // 2 for size in image.size)
    colour = tuple(torch.randint(256, (3,)).tolist())
    cut = image.copy()
    cut.paste(colour, (max(left, 0), max(top, 0), min(left + side, image.width), min(top + side, image.height)))
    return cut


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(B, 3, S, S)` uint8 -> float32, (x / 255 - mean) / std by channel; `mean`, `std` are `(3,)`."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
