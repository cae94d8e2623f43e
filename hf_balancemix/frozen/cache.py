"""Features of a frozen backbone, or of its first stages, computed once and kept on disk, in place of images.

What is frozen runs once over every training instance, as it is and in V RandAugment views, and over the evaluation
set; all runs then read the features. So a run sees V augmentations of an instance instead of ever new ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_balancemix.core.keys import keyed_seed
from hf_balancemix.data.images import decode
from hf_balancemix.data.views import ViewMaker, normalise, undecoded_images
from hf_balancemix.files import check_writable, process_lock

logger = logging.getLogger(__name__)

ROW_COLUMN = "feature_row"
_FEATURES, _DESCRIPTION = "features.npy", "cache.json"


class CachedViews:
    """In place of a :class:`ViewMaker`: views are rows of features, picked by the same kind of keys.

    Args:
        features: `(M, ...)` float32 or float16. The rows of a training instance stand together: un-augmented first,
            then its views.
        num_views: V, views of a training instance.
        seed: Seed of the picks; a run's own, as for a :class:`ViewMaker`.
        image_size: Side of the squashed images that the features were computed from, in pixels.
        frozen: What of the network computed them and is not trained, for model cards; None: the whole backbone.
    """

    def __init__(
        self, features: Tensor, num_views: int, seed: int, image_size: int, frozen: str | None = None
    ) -> None:
        self.features, self.num_views, self.seed, self.image_size = features, num_views, seed, image_size
        self.frozen = frozen

    def images(self, dataset: datasets.Dataset) -> _Rows:
        """Where each instance's rows begin; a ValueError where the data set has no column that says so."""
        if ROW_COLUMN not in dataset.column_names:
            raise ValueError(
                f"the data set's columns are {dataset.column_names}, without {ROW_COLUMN!r}: its features are not "
                "cached; pass the data sets that cache_features returned, or parts of them."
            )
        return _Rows(dataset.select_columns([ROW_COLUMN]).with_format("numpy")[:][ROW_COLUMN])

    def plain(self, row: int) -> Tensor:
        """Features of the un-augmented instance, `(...)` float32."""
        return self.features[row].float()

    def augmented(self, row: int, *key: int | str, num_views: int) -> list[Tensor]:
        """Features of views, each `(...)` float32, by :meth:`pick`."""
        return [self.features[row + 1 + view].float() for view in self.pick(*key, num_views=num_views)]

    def pick(self, *key: int | str, num_views: int) -> list[int]:
        """Which of the V views, each in [0, V): a pure function of the seed and `key`, none twice in the first V."""
        drawn = keyed_seed(self.seed, *key)
        picked: list[int] = []
        left: list[int] = []
        for _ in range(num_views):
            left = left or list(range(self.num_views))
            drawn, place = divmod(drawn, len(left))
            picked.append(left.pop(place))
        return picked


class _Rows:
    """First feature row by instance, in the form of a data set's `image` column."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[int]]:
        return {"image": self.rows[indices].tolist()}


def cache_features(
    folder: str | os.PathLike[str],
    backbone: Callable[[Tensor], Tensor],
    backbone_digest: str,
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
    views: ViewMaker,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    num_views: int = 6,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, datasets.Dataset, datasets.Dataset]:
    """Features of every training instance, un-augmented and in V views, and of the evaluation set.

    They are computed once for each fingerprint (the images' paths, sizes and dates or their bytes, the backbone, the
    view maker's settings and V) and kept under its name in `folder`; a folder under that name is whole. Several
    processes may ask at a time: one computes, the others wait.

    Args:
        folder: Where caches are kept.
        backbone: From normalised images `(B, 3, S, S)` float32 on `device` to features `(B, ...)`, which are kept in
            half precision if they are float16, else as float32. In evaluation mode.
        backbone_digest: Changes whenever the backbone does.
        train, evaluation: With `image`.
        views: Image size and augmentation; its seed is that of the V views.
        mean, std: Three values each, for normalisation.
        num_views: V, at least 1.
        batch_size: Views a forward pass.
        num_workers: Worker processes that make the views.
        device: Where the backbone is.

    Returns:
        `(features, train, evaluation)`: `(M, ...)` float32 or float16, mapped from the file, M = N (1 + V) + N_eval;
        the data sets have a new column that says where an instance's features begin. It goes with the instance through
        `select`, `shuffle` and `map`.

    Raises:
        ValueError: `num_views` is less than 1, the view maker has a transform, an image cannot be decoded, or the disk
            has no room for the features.
        FileNotFoundError: An image is gone.
    """
    if num_views < 1:
        raise ValueError(f"num_views is {num_views}; it must be 1 or more; 6 is the default.")
    if views.transform is not None:
        raise ValueError("the view maker has a transform, which no fingerprint can tell from another; leave it out.")
    facts = {
        "format": 1,
        "backbone": backbone_digest,
        "images": _images_digest(train, evaluation),
        "image_size": views.image_size,
        "resample": views.resample,
        "augmentation": [views.augment.num_ops, views.augment.magnitude],
        "seed": views.seed,
        "num_views": num_views,
        "normalisation": [list(map(float, mean)), list(map(float, std))],
    }
    if views.cutout:  # caches without it were made before it was there
        facts["cutout"] = views.cutout
    if views.hflip or views.random_resized_crop:
        facts["crop and mirror"] = [views.random_resized_crop, views.hflip]
    name = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    cache = Path(folder).expanduser() / f"features-{name}"
    num_rows = len(train) * (1 + num_views) + len(evaluation)
    if not _is_whole(cache, num_rows):
        check_writable(cache.parent, "the folder of cached features (--cache_dir)")
        with process_lock(cache.with_suffix(".lock")):
            if not _is_whole(cache, num_rows):  # another process may have made it meanwhile
                loaders = [
                    DataLoader(
                        _Instances(dataset, views, v),
                        max(1, batch_size // (1 + v)),
                        num_workers=num_workers,
                        collate_fn=torch.cat,
                        generator=torch.Generator(),  # else a base seed would be drawn from the global one
                    )
                    for dataset, v in ((train, num_views), (evaluation, 0))
                ]
                scale = [torch.tensor(values, device=device) for values in (mean, std)]
                features = (backbone(normalise(images.to(device), *scale)) for images in chain(*loaders))
                _write(cache, features, num_rows, facts)
    # "c": pages are read when they are used; what were written to them would stay in memory.
    features = torch.from_numpy(np.load(cache / _FEATURES, mmap_mode="c"))
    starts = np.arange(len(train)) * (1 + num_views), len(train) * (1 + num_views) + np.arange(len(evaluation))
    return features, *(_with_rows(d, s) for d, s in zip((train, evaluation), starts, strict=True))


class _Instances(Dataset):
    """The un-augmented image and V views of each instance, `(1 + V, 3, S, S)` uint8."""

    def __init__(self, dataset: datasets.Dataset, views: ViewMaker, num_views: int) -> None:
        self.images, self.views, self.num_views = undecoded_images(dataset), views, num_views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]["image"]
        augmented = self.views.augmented(image, "cached", index, num_views=self.num_views)
        return torch.stack([self.views.plain(image), *augmented])


@torch.no_grad()
def _write(cache: Path, batches: Iterator[Tensor], num_rows: int, facts: dict[str, Any]) -> None:
    """The folder under its final name, only once its files are whole and the features on the disk."""
    partial = cache.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
    first = next(batches)
    kept = torch.float16 if first.dtype == torch.float16 else torch.float32
    shape, dtype = (num_rows, *first.shape[1:]), torch.empty(0, dtype=kept).numpy().dtype
    _check_room(cache, shape, dtype)
    partial.mkdir()
    matrix, filled = np.lib.format.open_memmap(partial / _FEATURES, mode="w+", dtype=dtype, shape=shape), 0
    with tqdm(total=num_rows, desc="Features of the frozen backbone", unit="view", dynamic_ncols=True) as bar:
        for batch in chain([first], batches):
            matrix[filled : filled + len(batch)] = batch.to(kept).cpu().numpy()
            filled += len(batch)
            bar.update(len(batch))
    matrix.flush()
    del matrix
    description = facts | {"rows": num_rows, "bytes": (partial / _FEATURES).stat().st_size}
    (partial / _DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
    shutil.rmtree(cache, ignore_errors=True)
    os.replace(partial, cache)
    logger.info("Cached the features of %d views in %s.", filled, cache)


def _check_room(cache: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Say what the disk is to hold; a ValueError where it has no room. (A mapped file that finds none ends the process
    without a word.)"""
    row = math.prod(shape[1:]) * dtype.itemsize
    size, free = shape[0] * row / 1e6, shutil.disk_usage(cache.parent).free / 1e6
    what = f"{shape[0]:,} views of {row:,} bytes are {size:,.1f} MB"
    logger.info("Features of the frozen backbone: %s in %s.", what, cache.parent)
    if size > free:
        raise ValueError(
            f"{what}, and {cache.parent} has {free:,.1f} MB left; it must have room for the features of the frozen "
            "backbone; choose another folder (--cache_dir), or fewer num_views or pixels."
        )


def _is_whole(cache: Path, num_rows: int) -> bool:
    """Whether the folder holds what its description says; logs why not if it exists."""
    if not cache.is_dir():
        return False
    try:
        description = json.loads((cache / _DESCRIPTION).read_text(encoding="utf-8"))
        size = (cache / _FEATURES).stat().st_size
        if description["rows"] == num_rows and description["bytes"] == size:
            return True
        problem = f"{_FEATURES} has {size} bytes of {description['bytes']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    logger.warning("The feature cache %s is damaged (%s) and is made anew.", cache, problem)
    return False


def _images_digest(*parts: datasets.Dataset) -> str:
    """Of each image's path, size and date, or its bytes where it is stored in the data set."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"part of {len(part)};".encode())
        for row in undecoded_images(part):
            path, content = (row["image"] or {}).get("path"), (row["image"] or {}).get("bytes")
            if content is not None:
                digest.update(hashlib.blake2b(content, digest_size=16).digest())
                continue
            if path is None or not os.path.exists(path):
                decode(row["image"])  # which says so
            stat = os.stat(path)
            digest.update(f"{path}\x1f{stat.st_size}\x1f{stat.st_mtime_ns};".encode())
    return digest.hexdigest()


def _with_rows(dataset: datasets.Dataset, starts: np.ndarray) -> datasets.Dataset:
    if ROW_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(ROW_COLUMN)
    return dataset.add_column(ROW_COLUMN, starts.astype(np.int64))
