"""Label noise of known kind and rate: mislabelling (Eq. 11), random flips, a single positive.

A noise map is fitted on a training set, from which it keeps the class counts and the features, and is then mapped
over it. The noisy labels replace `labels`; the clean ones stay beside them as `clean_labels`:

    noise = Mislabel(rate=0.4, seed=0).fit(train)
    noisy = train.map(noise, batched=True, features=noise.features)

Every draw is a pure function of (seed, image_id, class): a counter-based generator is keyed by hashes of the seed and
of the image_id, so that the result depends neither on the order of the rows, nor on batch size, `num_proc` or shards,
nor on the version of NumPy. Mapping a noise map over labels that are noisy already treats those as the labels to
disturb and keeps the first `clean_labels`; take another seed then, or the two maps use the same draws.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Self

import datasets
import numpy as np
import torch

from hf_balancemix.data.labels import class_names, is_class_list, label_matrix, multi_hot

logger = logging.getLogger(__name__)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CELLS = 2**20  # labels at a time, which bounds the memory to a few times 8 MB


class LabelNoise:
    """What the noise maps share: fitting, the map over batches, and the draws. Subclasses define `_disturb`."""

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}.")
        self.seed = int(seed)
        self._counts: tuple[int, ...] | None = None
        self._class_list = True
        self._features = ""  # JSON: its pickle, which `map` hashes for the cache, is the same for the same features

    @property
    def parameters(self) -> dict[str, Any]:
        """The name and the arguments, which together define the noise: for logs and model cards."""
        return {"name": type(self).__name__, **self._arguments()}

    def _arguments(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    @property
    def features(self) -> datasets.Features:
        """The fitted data set's features plus `clean_labels` of the type of `labels`: for `map(features=...)`."""
        self._check_fitted()
        return datasets.Features.from_dict(json.loads(self._features))

    def fit(self, dataset: datasets.Dataset) -> Self:
        """Count the positive labels of each class.

        Args:
            dataset: The training set, with the columns `labels` (class list or multi-hot) and `image_id`.

        Returns:
            The noise map itself.

        Raises:
            ValueError: A column is absent, or `labels` is not valid (see `data.labels.label_matrix`).
            TypeError: `dataset` is not a `datasets.Dataset`, or `labels` is of another type.
        """
        num_classes = len(class_names(dataset))
        if "image_id" not in dataset.features:
            raise ValueError(_no_image_id(dataset.column_names))
        self._check_num_classes(num_classes)
        ids = dataset.select_columns(["image_id"]).with_format("arrow")[:]["image_id"]
        if len(ids.unique()) < len(ids):
            logger.warning(
                "image_id is not unique (%d values in %d rows): rows with the same image_id get the same draws.",
                len(ids.unique()),
                len(ids),
            )
        self._counts = tuple(label_matrix(dataset).sum(0, dtype=torch.int64).tolist())
        features = dataset.features.copy()
        features.setdefault("clean_labels", features["labels"])
        self._features = json.dumps(features.to_dict())
        self._class_list = is_class_list(features["labels"])
        return self

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Disturb a batch; the function for `datasets.Dataset.map(..., batched=True)`.

        Args:
            batch: The columns `labels` and `image_id` of B instances, as lists; if it has `clean_labels`, they stay.

        Returns:
            `labels`, disturbed, and `clean_labels`, each in the form of the fitted data set's labels.

        Raises:
            ValueError: Not fitted, a column is absent, the batch is a single row, or labels that do not fit the K
                classes.
        """
        self._check_fitted()
        if "labels" not in batch:
            raise ValueError(f"no 'labels' among the columns {list(batch)}: map over the data set that was fitted.")
        if "image_id" not in batch:
            raise ValueError(_no_image_id(list(batch)))
        given, image_ids = batch["labels"], batch["image_id"]
        if np.ndim(image_ids) == 0:
            raise ValueError(f"one row, not a batch, was passed to {self!r}: use dataset.map(noise, batched=True).")
        clean = multi_hot(given, len(self._counts), one_hot_input=not self._class_list)
        noisy = self.apply(clean.numpy(), image_ids)
        labels = [np.flatnonzero(row).tolist() for row in noisy] if self._class_list else noisy.tolist()
        return {"labels": labels, "clean_labels": batch.get("clean_labels", given)}

    def apply(self, labels: np.ndarray | torch.Tensor, image_ids: Iterable[int | str]) -> np.ndarray | torch.Tensor:
        """Disturb a label matrix.

        Args:
            labels: (N, K) matrix of 0 and 1.
            image_ids: N integers or strings. An integer and its decimal string are the same id.

        Returns:
            (N, K) uint8 matrix of 0 and 1, an array or a (CPU) tensor as `labels` is.

        Raises:
            ValueError: Not fitted, a shape that does not fit, other values than 0 and 1, or ids that are neither
                integers nor strings.
        """
        self._check_fitted()
        array = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
        if array.ndim != 2 or array.shape[1] != len(self._counts):
            raise ValueError(
                f"labels of shape (N, {len(self._counts)}) are required, as fitted; got {array.shape}. "
                f"Fit the noise on the data set that it is mapped over."
            )
        if not ((array == 0) | (array == 1)).all():
            raise ValueError("labels must be 0 or 1 only; see hf_balancemix.data.labels.multi_hot for class ids.")
        words = id_words(image_ids)
        if len(words) != len(array):
            raise ValueError(f"one image_id for each of the {len(array)} rows is required, got {len(words)}.")
        array = array.astype(np.uint8)
        noisy = [self._disturb(array[part], words[part]) for part in _chunks(len(array), len(self._counts))]
        noisy = np.concatenate(noisy) if noisy else array
        return torch.from_numpy(noisy) if isinstance(labels, torch.Tensor) else noisy

    def _disturb(self, labels: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Noisy copy of (B, K) uint8 labels; words is (B,) uint64."""
        raise NotImplementedError

    def _uniform(self, purpose: str, words: np.ndarray, classes: np.ndarray | int) -> np.ndarray:
        """Draws in [0, 1) for (image, class) pairs; the name, the seed and the purpose choose the stream."""
        return uniform(_word(f"{type(self).__name__}/{self.seed}/{purpose}"), words, classes)

    def _check_fitted(self) -> None:
        if self._counts is None:
            raise ValueError(f"{self!r} is not fitted: call .fit(train_dataset) first.")

    def _check_num_classes(self, num_classes: int) -> None:
        """Hook for noise that needs several classes."""


class Mislabel(LabelNoise):
    """Mislabelling (Eq. 11): the presence of class i is recorded as class j.

    Each positive label i of an instance moves with probability `rate`, each on its own, to a class j drawn among the
    classes that are absent from the instance, in proportion to their counts N_j in the fitted data set. i then is 0
    and j is 1. Where several positives move to the same j they share it, so the instance has fewer positives than
    before. A class with N_j = 0 is never a target; where no target is left (all classes present) nothing moves.

    Args:
        rate: The probability tau of Eq. 11, in [0, 1). The paper uses 0.2 and 0.4.
        seed: Seed of the draws, at least 0.
        exclude_present: Draw j among the absent classes, as the paper's problem definition has it. With false, j is
            any class but i, as Eq. 11 reads literally; a j that is present already, or that moves away itself, is 1.

    Raises:
        ValueError: `rate` or `seed` is out of range; `fit` is given a data set with a single class.
    """

    def __init__(self, rate: float, seed: int = 0, exclude_present: bool = True) -> None:
        super().__init__(seed)
        self.rate = _checked_rate(rate)
        self.exclude_present = bool(exclude_present)

    def _arguments(self) -> dict[str, Any]:
        return {"rate": self.rate, "seed": self.seed, "exclude_present": self.exclude_present}

    def _check_num_classes(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(
                f"{self!r} needs at least 2 classes, since a label moves to another class; the data set has "
                f"{num_classes}. Use RandomFlip for a single class."
            )

    def _disturb(self, labels: np.ndarray, words: np.ndarray) -> np.ndarray:
        counts = np.array(self._counts, dtype=np.int64)
        rows, classes = np.nonzero(labels)
        moved = self._uniform("move", words[rows], classes) < self.rate
        rows, classes = rows[moved], classes[moved]
        noisy = labels.copy()
        targets = [np.empty((0, 2), np.int64)]
        for part in _chunks(len(rows), len(counts)):
            row, source = rows[part], classes[part]
            # Integer weights: their sums are exact, in whatever order they are added.
            weights = np.where(labels[row], 0, counts) if self.exclude_present else np.tile(counts, (len(row), 1))
            weights[np.arange(len(row)), source] = 0
            cumulative = weights.cumsum(axis=1)
            total = cumulative[:, -1]
            point = np.floor(self._uniform("target", words[row], source) * total)
            target = (cumulative <= point[:, None]).sum(axis=1)  # the first class whose sum exceeds the point
            possible = total > 0
            noisy[row[possible], source[possible]] = 0
            targets.append(np.stack([row, target], axis=1)[possible])
        noisy[tuple(np.concatenate(targets).T)] = 1  # after all have left, so that an arrival always counts
        return noisy


class RandomFlip(LabelNoise):
    """Random flips: every label, positive or negative, is inverted with probability `rate`, each on its own.

    Args:
        rate: Probability of a flip, in [0, 1).
        seed: Seed of the draws, at least 0.

    Raises:
        ValueError: `rate` or `seed` is out of range.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.rate = _checked_rate(rate)

    def _arguments(self) -> dict[str, Any]:
        return {"rate": self.rate, "seed": self.seed}

    def _disturb(self, labels: np.ndarray, words: np.ndarray) -> np.ndarray:
        flips = self._uniform("flip", words[:, None], np.arange(labels.shape[1])) < self.rate
        return labels ^ flips.astype(np.uint8)


class SinglePositive(LabelNoise):
    """Missing labels: one positive label of each instance, drawn uniformly, is kept; the others become negative.

    Instances without a positive label stay as they are.

    Args:
        seed: Seed of the draws, at least 0.

    Raises:
        ValueError: `seed` is out of range.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)

    def _disturb(self, labels: np.ndarray, words: np.ndarray) -> np.ndarray:
        number = labels.sum(axis=1, dtype=np.int64)
        kept = np.floor(self._uniform("keep", words, 0) * number).astype(np.int64)
        rank = labels.cumsum(axis=1, dtype=np.int64) - 1  # of a positive among the positives of its row
        return labels * (rank == kept[:, None]).astype(np.uint8)


def id_words(image_ids: Iterable[int | str]) -> np.ndarray:
    """Hash image ids to (N,) uint64 words; an integer and its decimal string give the same word."""
    image_ids = image_ids.tolist() if hasattr(image_ids, "tolist") else list(image_ids)
    image_ids = [value.item() if hasattr(value, "item") else value for value in image_ids]
    for row, value in enumerate(image_ids):
        if type(value) not in (int, str):
            raise ValueError(
                f"row {row}: image_id must be an integer or a string, got {value!r}. "
                f"Convert the column, for instance to its file names."
            )
    return np.array([_word(str(value)) for value in image_ids], dtype=np.uint64)


def uniform(key: int, words: np.ndarray, counters: np.ndarray | int) -> np.ndarray:
    """Counter-based draws in [0, 1) with 53 bits: SplitMix64, started at a mix of key and word, after `counter` steps.

    Args:
        key: 64-bit number that chooses the stream.
        words: uint64 array, such as from `id_words`.
        counters: Integers from 0, broadcast against `words`.

    Returns:
        float64 array of the broadcast shape.
    """
    start = _mix(words ^ np.uint64(key))
    steps = np.atleast_1d(counters).astype(np.uint64) + np.uint64(1)  # arrays wrap around, scalars would warn
    return (_mix(start + steps * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _chunks(rows: int, num_classes: int) -> list[slice]:
    step = max(1, _CELLS // num_classes)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit words (wraps around on purpose)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _checked_rate(rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, Real) or math.isnan(rate) or not 0 <= rate < 1:
        raise ValueError(f"the noise rate must be a number in [0, 1), got {rate!r}. The paper uses 0.2 and 0.4.")
    return float(rate)


def _no_image_id(columns: list[str]) -> str:
    return (
        f"no 'image_id' among the columns {columns}: the noise of an image is drawn from its id. "
        f"Add one, for instance dataset.add_column('image_id', list(range(len(dataset))))."
    )
