"""What data loaders iterate: pairs of augmented instances by key, plain instances by index, and their collator."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.utils.data import Dataset

from hf_balancemix.core.given_labels import compressed_labels
from hf_balancemix.core.mixing import mixing_coefficient
from hf_balancemix.core.sampling import PairKey
from hf_balancemix.data.images import MAX_IMAGE_PIXELS, bad_images, decode
from hf_balancemix.data.labels import sparse_labels
from hf_balancemix.data.views import Views, undecoded_images

logger = logging.getLogger(__name__)


def drop_bad_images(
    dataset: datasets.Dataset, num_proc: int | None = None, *, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> datasets.Dataset:
    """Decode every image once, with a progress bar, and leave out the rows whose file is absent or cannot be decoded.

    Args:
        dataset: With `image`.
        num_proc: Processes that decode; None: this one.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`, which also says what is a bad image.

    Returns:
        The data set without them; the number and the first names are logged as a warning.

    Raises:
        ValueError: No image is left.
    """

    def check(row: dict[str, Any]) -> dict[str, bool]:
        try:
            decode(row["image"], max_image_pixels=max_image_pixels)
        except (ValueError, FileNotFoundError):
            return {"good": False}
        return {"good": True}

    images = undecoded_images(dataset)
    options = {"num_proc": num_proc, "load_from_cache_file": False, "desc": "Checking images"}
    kept = np.asarray(images.map(check, remove_columns=["image"], **options)["good"], dtype=bool)
    if kept.all():
        return dataset
    bad = np.flatnonzero(~kept).tolist()
    problem = bad_images(bad, images["image"])
    if not kept.any():
        raise ValueError(f"{problem}; nothing is left to use; replace the files.")
    logger.warning("%s; they are left out.", problem)
    return dataset.select(np.flatnonzero(kept))


class TrainingPairs(Dataset):
    """Augmented instances by :class:`~hf_balancemix.core.sampling.PairKey`.

    Every random choice is a pure function of (seed, epoch, random index of the pair, role, view): an instance that is
    drawn twice in an epoch gets different views, and what a step sees does not depend on workers, ranks or resuming.

    Args:
        dataset: With `image` and `labels`, optionally `clean_labels`.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown: dense, or compressed rows of scipy.
        views: Makes the views.
        clean_labels: The same of the clean ones, or None.
        two_views_from: First epoch in which each instance has two views (label-wise management); None: never.
        mixup_alpha: alpha of Eq. 5.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        labels: Tensor | csr_array,
        views: Views,
        *,
        clean_labels: Tensor | csr_array | None = None,
        two_views_from: int | None = None,
        mixup_alpha: float = 0.0,
    ) -> None:
        self.images = views.images(dataset)
        self.labels, self.views = compressed_labels(labels), views
        self.clean_labels = None if clean_labels is None else compressed_labels(clean_labels)
        self.two_views_from, self.mixup_alpha = two_views_from, mixup_alpha

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: PairKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[PairKey]) -> list[dict[str, Any]]:
        # One Arrow access for both halves of the batch.
        indices = [key.random for key in keys] + [key.minority for key in keys if key.minority is not None]
        images = dict(zip(indices, self.images[indices]["image"], strict=True))
        labels = _rows_of(self.labels, indices)
        clean_labels = {} if self.clean_labels is None else _rows_of(self.clean_labels, [key.random for key in keys])
        rows = []
        for key in keys:
            row = self._instance(images[key.random], labels, key, key.random, role="random", prefix="")
            if self.clean_labels is not None:
                row["clean_labels"] = clean_labels[key.random]
            if key.minority is not None:
                row |= self._instance(
                    images[key.minority], labels, key, key.minority, role="minority", prefix="minority_"
                )
                row["lam"] = torch.tensor(mixing_coefficient(self.mixup_alpha, self.views.seed, *key[:2]))
            rows.append(row)
        return rows

    def _instance(
        self, image: Any, labels: dict[int, Tensor], key: PairKey, index: int, role: str, prefix: str
    ) -> dict[str, Tensor]:
        two = self.two_views_from is not None and key.epoch >= self.two_views_from
        views = self.views.augmented(image, key.epoch, key.random, role, num_views=2 if two else 1)
        row = {
            f"{prefix}pixel_values": views[0],
            f"{prefix}labels": labels[index],
            f"{prefix}index": torch.tensor(index),
        }
        if two:
            row[f"{prefix}second_view"] = views[1]
        return row


class PlainInstances(Dataset):
    """Un-augmented instances by index, for the scan, evaluation and prediction.

    Rows have `pixel_values` `(3, S, S)` uint8, `index`, and `labels` `(K,)` float32 in {0, 1}, or -1
    where unknown, if the data set has labels.
    """

    def __init__(self, dataset: datasets.Dataset, views: Views, labels: csr_array | None = None) -> None:
        self.images = views.images(dataset)
        if labels is None and "labels" in dataset.column_names:
            labels = sparse_labels(dataset)
        self.views, self.labels = views, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        images = self.images[list(indices)]["image"]
        labels = {} if self.labels is None else _rows_of(self.labels, indices)
        rows = []
        for index, image in zip(indices, images, strict=True):
            row = {"pixel_values": self.views.plain(image), "index": torch.tensor(index)}
            if self.labels is not None:
                row["labels"] = labels[index]
            rows.append(row)
        return rows


def _rows_of(labels: csr_array, indices: Sequence[int]) -> dict[int, Tensor]:
    """Of each index its labels, `(K,)` float32."""
    rows = torch.from_numpy(labels[np.asarray(indices)].toarray()).float()
    return dict(zip(indices, rows, strict=True))


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack each column: `pixel_values` `(B, 3, S, S)` uint8, `labels` `(B, K)` float32, `index` `(B,)` int64, ..."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
