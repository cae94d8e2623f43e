"""From a stored image to the uint8 tensors that a model's inputs are made of; augmentation is keyed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from hf_balancemix.core.keys import keyed_rng, keyed_seed
from hf_balancemix.data.images import MAX_IMAGE_PIXELS, decode
from hf_balancemix.data.labels import column_feature

BICUBIC = int(Image.Resampling.BICUBIC)
BILINEAR = int(Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> Tensor:
    """`(3, H, W)` uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def undecoded_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """The `image` column alone, as path or bytes, so that decoding happens in the worker and once.

    Raises:
        TypeError: Not a `datasets.Dataset` (an IterableDataset cannot be indexed by two samplers).
        ValueError: No `image` column of type `datasets.Image`.
    """
    feature = column_feature(dataset, "image", "rename the one that holds images: rename_column(..., 'image')")
    if not isinstance(feature, datasets.Image):
        fix = "dataset.cast_column('image', datasets.Image())"
        raise ValueError(f"column 'image' is {feature}; it must be a datasets.Image; use {fix}.")
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
        hflip: Mirror every other view, left to right.
        random_resized_crop: A view is a random part of the image, of this share of its area or more (in (0, 1]) and
            with sides of 3 to 4 at most, squashed like a whole one; 0: none.
        transform: In place of RandAugment: any function of the squashed RGB PIL image, to what :func:`as_view` takes.
            The global generators of torch, NumPy and `random` are seeded for it; one of its own is not.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`.
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
        hflip: bool = False,
        random_resized_crop: float = 0.0,
        transform: Callable[[Image.Image], Any] | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1 pixel; pass for instance 448.")
        if not 0 <= magnitude <= 30 or num_ops < 0:
            needed = "RandAugment must have 0 or more operations of a magnitude of 0 to 30"
            raise ValueError(f"num_ops is {num_ops} and magnitude {magnitude}; {needed}; change one.")
        if not 0 <= cutout <= 1:
            raise ValueError(f"cutout is {cutout}; it must be a share of the image's side in [0, 1]; 0 is none.")
        if not 0 <= random_resized_crop <= 1:
            needed = "it must be the least share of the image's area, in (0, 1]; 0 is none"
            raise ValueError(f"random_resized_crop is {random_resized_crop}; {needed}.")
        self.image_size, self.seed, self.resample, self.cutout = image_size, seed, resample, cutout
        self.hflip, self.random_resized_crop, self.transform = hflip, random_resized_crop, transform
        self.max_image_pixels = max_image_pixels
        # On PIL images: several times faster on a CPU than on tensors. It draws from torch's global generator only.
        self.augment = v2.RandAugment(num_ops=num_ops, magnitude=magnitude)

    @classmethod
    def from_arguments(
        cls, args: Any, processor: Any, seed: int, transform: Callable[[Image.Image], Any] | None = None
    ) -> Self:
        """Views of the size and by the filter of an image processor, with the augmentation of training arguments."""
        return cls(
            processor.size["height"],
            seed,
            resample=int(processor.resample),
            num_ops=args.randaugment_num_ops,
            magnitude=args.randaugment_magnitude,
            cutout=args.cutout,
            hflip=args.hflip,
            random_resized_crop=args.random_resized_crop,
            transform=transform,
            max_image_pixels=args.max_image_pixels,
        )

    def images(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The column that views are made from; see :func:`undecoded_images`."""
        return undecoded_images(dataset)

    def squash(self, image: Any) -> Image.Image:
        """Decode and resize, without keeping the aspect ratio."""
        return self._resize(decode(image, max_image_pixels=self.max_image_pixels))

    def _resize(self, image: Image.Image, box: tuple[int, int, int, int] | None = None) -> Image.Image:
        return image.resize((self.image_size, self.image_size), Image.Resampling(self.resample), box)

    def plain(self, image: Any) -> Tensor:
        """The un-augmented view, `(3, S, S)` uint8."""
        return to_tensor(self.squash(image))

    def augmented(self, image: Any, *key: int | str, num_views: int) -> list[Tensor]:
        """Views of one image by crop, mirror, cutout and RandAugment or `transform`, each `(3, S, S)` uint8.

        They are a pure function of the image, the seed and `key`.
        """
        decoded = decode(image, max_image_pixels=self.max_image_pixels)
        squashed = None if self.random_resized_crop else self._resize(decoded)
        views = []
        for view in range(num_views):
            words = (self.seed, *key, view)
            with keyed_rng(*words):
                made = self._random_crop(decoded) if squashed is None else squashed
                if self.hflip and torch.rand(()) < 0.5:
                    made = ImageOps.mirror(made)
                if self.cutout:
                    made = cut_out(made, self.cutout)
                if self.transform is None:
                    views.append(to_tensor(self.augment(made)))
            if self.transform is not None:
                with _all_keyed(*words, "transform"):
                    views.append(as_view(self.transform(made.copy()), self.image_size))
        return views

    def _random_crop(self, image: Image.Image) -> Image.Image:
        scale = [self.random_resized_crop, 1.0]
        top, left, height, width = v2.RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3])
        return self._resize(image, (left, top, left + width, top + height))

    def draws_by_key(self) -> bool:
        """Whether `transform` draws what it draws from the generators that are seeded for it; it is called twice.

        Raises:
            TypeError, ValueError: As :func:`as_view`.
        """
        noise = np.random.default_rng(0).integers(0, 256, (self.image_size, self.image_size, 3), dtype=np.uint8)
        first, second = (self.augmented(Image.fromarray(noise), "trial", num_views=1)[0] for _ in range(2))
        return torch.equal(first, second)


@contextmanager
def _all_keyed(*words: int | str) -> Iterator[None]:
    """`keyed_rng`, for the global generators of NumPy and `random`, too."""
    seed, states = keyed_seed(*words), (np.random.get_state(), random.getstate())
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        with keyed_rng(*words):
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def as_view(image: Any, size: int) -> Tensor:
    """`(3, S, S)` uint8 of what a transform returned: a PIL image, an `(S, S, 3)` array or a `(3, S, S)` tensor.

    Arrays and tensors are uint8, or floating point in [0, 1].

    Raises:
        TypeError: It is something else, or of another dtype.
        ValueError: Another shape, or values that are not in [0, 1].
    """
    needed = f"a PIL image of {size} x {size} pixels, a ({size}, {size}, 3) array or a (3, {size}, {size}) tensor"
    if isinstance(image, Image.Image):
        view = to_tensor(image.convert("RGB"))
    elif isinstance(image, np.ndarray):
        view = torch.from_numpy(np.array(image))
        if view.ndim == 3:
            view = view.permute(2, 0, 1)
    elif isinstance(image, Tensor):
        view = image.detach().cpu().as_subclass(Tensor)
    else:
        fix = "return its 'image'" if isinstance(image, dict) else "return one"
        raise TypeError(f"train_transform returned a {type(image).__name__}; it must be {needed}; {fix}.")
    if view.shape != (3, size, size):
        found = f"of size {image.size}" if isinstance(image, Image.Image) else f"of shape {tuple(image.shape)}"
        raise ValueError(
            f"train_transform returned a {type(image).__name__} {found}; it must be {needed}; resize to that in it, "
            "or set image_size."
        )
    if view.is_floating_point():
        if not bool(((view >= 0) & (view <= 1)).all()):
            raise ValueError(
                f"train_transform returned values from {view.min().item():g} to {view.max().item():g}; floating point "
                "must lie in [0, 1]; leave normalisation out of it, as the trainer does that."
            )
        view = (view * 255).round().to(torch.uint8)
    if view.dtype != torch.uint8:
        raise TypeError(
            f"train_transform returned values of {view.dtype}; they must be uint8, or floating point in [0, 1]; "
            "convert them."
        )
    return view.contiguous()


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
