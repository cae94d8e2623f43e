"""Label noise of known kind and rate: mislabelling (Eq. 11), random flips, a single positive, a transition matrix.

A noise map is fitted on a training set, from which it keeps the class counts and the features, and is then mapped
over it. The noisy labels replace `labels`; the clean ones stay beside them as `clean_labels`:

    noise = Mislabel(rate=0.4, seed=0).fit(train)
    noisy = train.map(noise, batched=True, features=noise.features)

`Mislabel(rate=0.4, seed=0).add_to(train)` does both, and records the noise with the data set for the model card.

Every draw is a pure function of (seed, image_id, class): a counter-based generator is keyed by hashes of the seed and
of the image_id, so that the result depends neither on the order of the rows, nor on batch size, `num_proc` or shards,
nor on the version of NumPy. Mapping a noise map over labels that are noisy already treats those as the labels to
disturb and keeps the first `clean_labels`; take another seed then, or the two maps use the same draws. `Compose` does
so for several at once.

Labels that the data set calls unknown (column `unknown_labels`) never change: they neither move nor are moved to.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Self

import datasets
import numpy as np
import torch

from hf_balancemix.data.labels import class_names, given_labels, is_class_list, multi_hot

logger = logging.getLogger(__name__)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CELLS = 2**20  # labels at a time, which bounds the memory to a few times 8 MB

_NOISE_PREFIX = "Noise: "  # of a line of a data set's description: the noise's name and parameters as JSON


def record_noise(dataset: datasets.Dataset, parameters: Mapping[str, Any]) -> datasets.Dataset:
    """`dataset`, whose description now says which noise its labels have; model cards read it there.

    Args:
        dataset: As `map` or `NoiseMap.apply` returned it. It is changed in place.
        parameters: Name and arguments of the noise, of what JSON can hold.
    """
    lines = without_recorded_noise(dataset.info.description).splitlines()
    dataset.info.description = "\n".join([*lines, _NOISE_PREFIX + json.dumps(dict(parameters))])
    return dataset


def recorded_noise(dataset: datasets.Dataset) -> dict[str, Any] | None:
    """What :func:`record_noise` wrote; None where nothing, or nothing legible, was written."""
    for line in (dataset.info.description or "").splitlines():
        if line.startswith(_NOISE_PREFIX):
            try:
                noise = json.loads(line.removeprefix(_NOISE_PREFIX))
            except ValueError:
                continue
            if isinstance(noise, dict):
                return noise
    return None


def without_recorded_noise(description: str | None) -> str:
    """A data set's description without the lines of :func:`record_noise`."""
    return "\n".join(line for line in (description or "").splitlines() if not line.startswith(_NOISE_PREFIX))


class LabelNoise:
    """What the noise maps share: fitting, the map over batches, and the draws. Subclasses define `_disturb`."""

    needs_unique_ids = False  # where the result is defined by the fitted set as a whole

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
        arguments = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    @property
    def features(self) -> datasets.Features:
        """The fitted data set's features plus `clean_labels` of the type of `labels`: for `map(features=...)`."""
        self._check_fitted()
        return datasets.Features.from_dict(json.loads(self._features))

    def add_to(self, dataset: datasets.Dataset, **map_options: Any) -> datasets.Dataset:
        """Fit on `dataset`, map over it, and record the noise in the result's description, for the model card.

        Args:
            dataset: With `labels` and `image_id`.
            map_options: For `datasets.Dataset.map`, such as `num_proc`.

        Returns:
            The data set with noisy `labels`, the clean ones as `clean_labels`.
        """
        self.fit(dataset)
        options = {"desc": f"Noise: {type(self).__name__}"} | map_options
        return record_noise(dataset.map(self, batched=True, features=self.features, **options), self.parameters)

    def fit(self, dataset: datasets.Dataset) -> Self:
        """Count the positive labels of each class; some kinds of noise also decide here what the data set as a whole
        determines.

        Args:
            dataset: The training set, with the columns `labels` (class list or multi-hot) and `image_id`, and
                optionally `unknown_labels`.

        Returns:
            The noise map itself.

        Raises:
            ValueError: A column is absent, `labels` is not valid (see `data.labels.label_matrix`), or an image_id
                occurs twice where the noise needs unique ones.
            TypeError: `dataset` is not a `datasets.Dataset`, or `labels` is of another type.
        """
        num_classes = len(class_names(dataset))
        ids = read_ids(dataset)
        self._check_num_classes(num_classes)
        if (unique := len(set(map(str, ids)))) < len(ids):
            if self.needs_unique_ids:
                twice = Counter(map(str, ids)).most_common(1)[0][0]
                raise ValueError(
                    f"{self!r} needs unique ids, but image_id {twice!r} occurs twice: remove one of the rows."
                )
            logger.warning(
                "image_id is not unique (%d values in %d rows): rows with the same image_id get the same draws.",
                unique,
                len(ids),
            )
        given = given_labels(dataset).numpy()
        unknown = given < 0 if "unknown_labels" in dataset.features else None
        self._fit_labels((given == 1).view(np.uint8), unknown, ids)
        features = dataset.features.copy()
        features.setdefault("clean_labels", features["labels"])
        self._features = json.dumps(features.to_dict())
        self._class_list = is_class_list(features["labels"])
        return self

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Disturb a batch; the function for `datasets.Dataset.map(..., batched=True)`.

        Args:
            batch: The columns `labels` and `image_id` of B instances, as lists; if it has `clean_labels`, they stay,
                and if it has `unknown_labels`, these labels stay as they are.

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
        form = {"num_classes": len(self._counts), "one_hot_input": not self._class_list}
        unknown = batch.get("unknown_labels")
        if unknown is not None:
            unknown = multi_hot(unknown, **form, column="unknown_labels").numpy()
        noisy = self.apply(multi_hot(given, **form).numpy(), image_ids, unknown)
        labels = [np.flatnonzero(row).tolist() for row in noisy] if self._class_list else noisy.tolist()
        return {"labels": labels, "clean_labels": batch.get("clean_labels", given)}

    def apply(
        self,
        labels: np.ndarray | torch.Tensor,
        image_ids: Iterable[int | str],
        unknown: np.ndarray | torch.Tensor | None = None,
    ) -> np.ndarray | torch.Tensor:
        """Disturb a label matrix.

        Args:
            labels: (N, K) matrix of 0 and 1.
            image_ids: N integers or strings. An integer and its decimal string are the same id.
            unknown: (N, K) matrix, true or 1 where a label (0 in `labels`) is not known. By default all are known.

        Returns:
            (N, K) uint8 matrix of 0 and 1, an array or a (CPU) tensor as `labels` is.

        Raises:
            ValueError: Not fitted, a shape that does not fit, other values than 0 and 1, a label both 1 and unknown,
                or ids that are neither integers nor strings.
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
        ids = _as_ids(image_ids)
        if len(ids) != len(array):
            raise ValueError(f"one image_id for each of the {len(array)} rows is required, got {len(ids)}.")
        if unknown is not None:
            unknown = np.asarray(unknown).astype(bool)
            if unknown.shape != array.shape:
                raise ValueError(f"unknown must have the shape {array.shape} of labels, got {unknown.shape}.")
            both = (unknown & (array == 1)).any(1)
            if both.any():
                raise ValueError(
                    f"image_id {ids[int(both.argmax())]!r} has a class that is both present and unknown: remove it "
                    f"from labels or from unknown_labels."
                )
        noisy = self._noisy(array.astype(np.uint8), unknown, ids)
        return torch.from_numpy(noisy) if isinstance(labels, torch.Tensor) else noisy

    def _noisy(self, labels: np.ndarray, unknown: np.ndarray | None, ids: list[int | str]) -> np.ndarray:
        """Noisy (N, K) uint8 labels, from checked ones."""
        words = id_words(ids)
        self._check_rows(labels, words, ids)
        noisy = [np.empty((0, labels.shape[1]), np.uint8)]
        for part in _chunks(*labels.shape):
            noisy.append(self._disturb(labels[part], _negative(labels, unknown, part), words[part]))
        return np.concatenate(noisy)

    def _disturb(self, labels: np.ndarray, negative: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Noisy copy of (B, K) uint8 labels; negative is (B, K) bool, labels known to be 0; words is (B,) uint64."""
        raise NotImplementedError

    def _fit_labels(self, labels: np.ndarray, unknown: np.ndarray | None, ids: list[int | str]) -> None:
        """Fit on (N, K) uint8 labels, with (N, K) bool where they are unknown, and N ids."""
        self._counts = tuple(labels.sum(0, dtype=np.int64).tolist())

    def _check_rows(self, labels: np.ndarray, words: np.ndarray, ids: list[int | str]) -> None:
        """Hook for noise that knows the images it was fitted on."""

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
        exact_count: Move exactly `round(rate * N_i)` of the fitted data set's positive labels of each class i (half
            to even; all that have a target where those are fewer) instead of each on its own: those with the smallest
            draws. `fit` keeps one threshold a class; the numbers are exact on the fitted data set, whose ids must be
            unique.

    Raises:
        ValueError: `rate` or `seed` is out of range; `fit` is given a data set with a single class.
    """

    def __init__(self, rate: float, seed: int = 0, exclude_present: bool = True, exact_count: bool = False) -> None:
        super().__init__(seed)
        self.rate = _checked_rate(rate)
        self.exclude_present = bool(exclude_present)
        self.exact_count = self.needs_unique_ids = bool(exact_count)
        self._thresholds: tuple[float, ...] = ()

    def _arguments(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "seed": self.seed,
            "exclude_present": self.exclude_present,
            "exact_count": self.exact_count,
        }

    def _fit_labels(self, labels: np.ndarray, unknown: np.ndarray | None, ids: list[int | str]) -> None:
        super()._fit_labels(labels, unknown, ids)
        if not self.exact_count:
            return
        words, counts = id_words(ids), np.array(self._counts)
        draws: list[list[np.ndarray]] = [[] for _ in counts]
        for part in _chunks(*labels.shape):
            negative = _negative(labels, unknown, part)
            rows, classes = np.nonzero(labels[part])
            targets = ((negative if self.exclude_present else negative | (labels[part] == 1)) & (counts > 0)).sum(1)
            possible = targets[rows] > (0 if self.exclude_present else 1)  # i itself is no target
            rows, classes = rows[possible], classes[possible]
            drawn = self._uniform("move", words[part][rows], classes)
            for k in np.unique(classes):
                draws[k].append(drawn[classes == k])
        self._thresholds = tuple(
            _nth_smallest(np.concatenate(drawn) if drawn else np.empty(0), round(self.rate * count))
            for drawn, count in zip(draws, self._counts, strict=True)
        )

    def _check_num_classes(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(
                f"{self!r} needs at least 2 classes, since a label moves to another class; the data set has "
                f"{num_classes}. Use RandomFlip for a single class."
            )

    def _disturb(self, labels: np.ndarray, negative: np.ndarray, words: np.ndarray) -> np.ndarray:
        counts = np.array(self._counts, dtype=np.int64)
        rows, classes = np.nonzero(labels)
        drawn = self._uniform("move", words[rows], classes)
        moved = drawn <= np.array(self._thresholds)[classes] if self.exact_count else drawn < self.rate
        rows, classes = rows[moved], classes[moved]
        allowed = negative if self.exclude_present else negative | (labels == 1)
        noisy = labels.copy()
        targets = [np.empty((0, 2), np.int64)]
        for part in _chunks(len(rows), len(counts)):
            row, source = rows[part], classes[part]
            # Integer weights: their sums are exact, in whatever order they are added.
            weights = np.where(allowed[row], counts, 0)
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

    def _disturb(self, labels: np.ndarray, negative: np.ndarray, words: np.ndarray) -> np.ndarray:
        flips = self._uniform("flip", words[:, None], np.arange(labels.shape[1])) < self.rate
        return labels ^ (flips & (negative | (labels == 1))).astype(np.uint8)


class SinglePositive(LabelNoise):
    """Missing labels: one positive label of each instance, drawn uniformly, is kept; the others become negative.

    Instances without a positive label stay as they are.

    `protocol="cole2021"` is the published draw of Cole et al. (CVPR 2021), label by label: the images with a positive
    label, their ids sorted as strings, are gone through with one `numpy.random.RandomState(seed)`, which shuffles the
    positive labels of each (the first is kept) and then its negative ones (none is kept, but that consumes random
    numbers). The draw of an image so depends on all others, and on the order of the classes: fit on the whole split,
    with classes in the published order (COCO by category id, VOC by name). `fit` keeps the class of every image (12
    bytes each: 1 MB for COCO), and the noise then maps over those images only. Unknown labels count as negative.

    Args:
        seed: Seed of the draws, at least 0. By default 0; with "cole2021" the published 1200, and at most 2^32 - 1.
        protocol: "keyed", draws by image id as in all noise here, or "cole2021".

    Raises:
        ValueError: `seed` or `protocol` is none of these; with "cole2021", an image that was not fitted, or not with
            these labels.
    """

    def __init__(self, seed: int | None = None, protocol: str = "keyed") -> None:
        if protocol not in ("keyed", "cole2021"):
            raise ValueError(f"protocol must be 'keyed' or 'cole2021', got {protocol!r}.")
        self.protocol = protocol
        self.needs_unique_ids = protocol == "cole2021"
        super().__init__((1200 if protocol == "cole2021" else 0) if seed is None else seed)
        if protocol == "cole2021" and self.seed >= 2**32:
            raise ValueError(
                f"seed must be below 2^32 with protocol 'cole2021', got {seed!r}. 1200 is the published one."
            )
        self._words = np.empty(0, np.uint64)  # of the fitted ids, ascending
        self._kept = np.empty(0, np.int32)  # the class that each keeps, -1 for none

    def _arguments(self) -> dict[str, Any]:
        return {"seed": self.seed, "protocol": self.protocol}

    def _fit_labels(self, labels: np.ndarray, unknown: np.ndarray | None, ids: list[int | str]) -> None:
        super()._fit_labels(labels, unknown, ids)
        if self.protocol != "cole2021":
            return
        rng = np.random.RandomState(self.seed)
        kept = np.full(len(labels), -1, np.int32)
        for row in sorted(range(len(ids)), key=lambda row: str(ids[row])):
            positives = np.flatnonzero(labels[row])
            if len(positives):
                rng.shuffle(positives)
                rng.shuffle(np.arange(labels.shape[1] - len(positives)))
                kept[row] = positives[0]
        words = id_words(ids)
        order = np.argsort(words)
        self._words, self._kept = words[order], kept[order]

    def _check_rows(self, labels: np.ndarray, words: np.ndarray, ids: list[int | str]) -> None:
        if self.protocol != "cole2021":
            return
        kept = self._kept_classes(words)
        is_one = labels[np.arange(len(ids)), kept.clip(min=0)] == 1
        wrong = np.flatnonzero(np.where(kept >= 0, ~is_one, (kept == -2) | labels.any(1)))
        if len(wrong):
            what = "is not one of the images" if kept[wrong[0]] == -2 else "has other labels than the image"
            raise ValueError(
                f"image_id {ids[wrong[0]]!r} {what} that {self!r} was fitted on. Its draw depends on the whole data "
                f"set: fit the noise on all that it is mapped over."
            )

    def _kept_classes(self, words: np.ndarray) -> np.ndarray:
        """(B,) classes; -1 for none, -2 for images that were not fitted."""
        if not len(self._words):
            return np.full(len(words), -2, np.int32)
        position = np.searchsorted(self._words, words).clip(max=len(self._words) - 1)
        return np.where(self._words[position] == words, self._kept[position], -2)

    def _disturb(self, labels: np.ndarray, negative: np.ndarray, words: np.ndarray) -> np.ndarray:
        if self.protocol == "cole2021":
            return labels * (np.arange(labels.shape[1]) == self._kept_classes(words)[:, None]).astype(np.uint8)
        number = labels.sum(axis=1, dtype=np.int64)
        kept = np.floor(self._uniform("keep", words, 0) * number).astype(np.int64)
        rank = labels.cumsum(axis=1, dtype=np.int64) - 1  # of a positive among the positives of its row
        return labels * (rank == kept[:, None]).astype(np.uint8)


class ClassConditional(LabelNoise):
    """Noise with given probabilities for every class, as counted on real annotators: an explicit transition matrix.

    Each positive label i of an instance, on its own, is recorded as class j instead with probability `matrix[i][j]`
    (i then is 0 and j is 1, whether or not j was present), is lost with probability `missing[i]` (i then is 0), and
    stays otherwise; the diagonal of the matrix is a probability to stay, too. Each negative label j, on its own, is
    added with probability `added[j]`. A label that would move to an unknown one stays. As with `Mislabel`, labels
    arrive after all have left, and several that arrive at one class share it.

    Args:
        matrix: (K, K) probabilities, from the class of the row to the class of the column, both in the order of the
            data set's classes. By default no label moves.
        missing: Probability that a positive label is lost (1 to 0), in [0, 1]: one number, or one for each class.
        added: Probability that a negative label is added (0 to 1), in [0, 1]: one number, or one for each class.
        seed: Seed of the draws, at least 0.

    Raises:
        ValueError: A probability is outside [0, 1], a row of the matrix and its `missing` sum to more than 1, or the
            shapes do not fit one another; `fit` is given a data set with another number of classes.

    Example:
        >>> ClassConditional([[0.9, 0.1], [0.0, 1.0]], added=[0.0, 0.05])
        ClassConditional(matrix=[[0.9, 0.1], [0.0, 1.0]], missing=0.0, added=[0.0, 0.05], seed=0)
    """

    def __init__(
        self,
        matrix: Sequence[Sequence[float]] | np.ndarray | None = None,
        missing: float | Sequence[float] | np.ndarray = 0.0,
        added: float | Sequence[float] | np.ndarray = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        # Lists of floats, not arrays, as their pickle, which `map` hashes for the cache, is by value.
        self.matrix = None if matrix is None else _probabilities("matrix", matrix, (2,))
        self.missing = _probabilities("missing", missing, (0, 1))
        self.added = _probabilities("added", added, (0, 1))
        sizes = {np.shape(value)[0] for value in (self.matrix, self.missing, self.added) if np.ndim(value)}
        if len(sizes) > 1 or (matrix is not None and np.shape(self.matrix)[0] != np.shape(self.matrix)[1]):
            raise ValueError(
                f"a (K, K) matrix, and a number or K numbers for missing and added, are required; got the shapes "
                f"{np.shape(self.matrix)}, {np.shape(self.missing)} and {np.shape(self.added)}. Give all the same K."
            )
        self._num_classes = sizes.pop() if sizes else None
        if matrix is not None:
            total = np.sum(self.matrix, axis=1) + self.missing
            if (total > 1 + 1e-9).any():  # rows that are meant to sum to 1 may exceed it by a rounding
                row = int(total.argmax())
                raise ValueError(
                    f"row {row} of the transition matrix sums to {np.sum(self.matrix[row]):g}, with missing to "
                    f"{total[row]:g}; at most 1 is possible. Lower its entries, the diagonal (to stay) among them."
                )

    def _arguments(self) -> dict[str, Any]:
        return {"matrix": self.matrix, "missing": self.missing, "added": self.added, "seed": self.seed}

    def _check_num_classes(self, num_classes: int) -> None:
        if self._num_classes not in (None, num_classes):
            raise ValueError(
                f"{self!r} is for {self._num_classes} classes, the data set has {num_classes}: give one row and one "
                f"column for each class of the data set, in its order."
            )

    def _disturb(self, labels: np.ndarray, negative: np.ndarray, words: np.ndarray) -> np.ndarray:
        num_classes = labels.shape[1]
        matrix = np.zeros((num_classes, num_classes)) if self.matrix is None else np.array(self.matrix)
        missing = np.broadcast_to(self.missing, num_classes)
        ends = np.concatenate([matrix, missing[:, None]], axis=1).cumsum(axis=1)
        rows, classes = np.nonzero(labels)
        drawn = self._uniform("move", words[rows], classes)
        targets = np.empty(len(rows), np.int64)  # K: lost; K + 1: stays
        for k in np.unique(classes):
            targets[classes == k] = np.searchsorted(ends[k], drawn[classes == k], side="right")
        lost, moved = targets == num_classes, (targets < num_classes) & (targets != classes)
        moved[moved] = (negative | (labels == 1))[rows[moved], targets[moved]]  # not to an unknown label
        noisy = labels.copy()
        noisy[rows[lost | moved], classes[lost | moved]] = 0
        noisy[rows[moved], targets[moved]] = 1
        if np.any(self.added):
            noisy |= negative & (self._uniform("add", words[:, None], np.arange(num_classes)) < self.added)
        return noisy


class Compose(LabelNoise):
    """Several kinds of noise one after another, each fitted on what the one before it makes of the data set.

    `clean_labels` are those from before the first. The given noise objects are copied, not fitted themselves.

    Args:
        noises: One or more, in the order in which they act. Two of one kind need different seeds.

    Raises:
        ValueError: None given, or two of the same kind with the same seed, which would draw the same numbers.
        TypeError: One of them is not noise of this module.

    Example:
        >>> Compose([Mislabel(0.2), SinglePositive(seed=1)]).parameters["name"]
        'Compose'
    """

    def __init__(self, noises: Sequence[LabelNoise]) -> None:
        super().__init__(seed=0)  # not used: the parts have their own
        for noise in noises:
            if not isinstance(noise, LabelNoise):
                raise TypeError(f"Compose is given noise such as Mislabel(0.2), got {noise!r}.")
        parts = [part for noise in noises for part in (noise.noises if isinstance(noise, Compose) else [noise])]
        if not parts:
            raise ValueError("Compose needs at least one noise, got none: pass for instance [Mislabel(0.2)].")
        kinds = [(type(part).__name__, part.seed) for part in parts]
        for name, seed in kinds:
            if kinds.count((name, seed)) > 1:
                raise ValueError(
                    f"two {name} with the seed {seed} would draw the same numbers: give each a seed of its own."
                )
        self.noises = copy.deepcopy(parts)
        self.needs_unique_ids = any(part.needs_unique_ids for part in parts)

    @property
    def parameters(self) -> dict[str, Any]:
        return {"name": type(self).__name__, "noises": [noise.parameters for noise in self.noises]}

    def __repr__(self) -> str:
        return f"Compose({self.noises!r})"

    def _check_num_classes(self, num_classes: int) -> None:
        for noise in self.noises:
            noise._check_num_classes(num_classes)

    def _fit_labels(self, labels: np.ndarray, unknown: np.ndarray | None, ids: list[int | str]) -> None:
        super()._fit_labels(labels, unknown, ids)
        for noise in self.noises:
            noise._fit_labels(labels, unknown, ids)
            labels = noise._noisy(labels, unknown, ids)

    def _noisy(self, labels: np.ndarray, unknown: np.ndarray | None, ids: list[int | str]) -> np.ndarray:
        for noise in self.noises:
            labels = noise._noisy(labels, unknown, ids)
        return labels


def read_ids(dataset: datasets.Dataset) -> list[int | str]:
    """The column `image_id` as a list; ValueError where it is absent or holds neither integers nor strings."""
    if "image_id" not in dataset.features:
        raise ValueError(_no_image_id(dataset.column_names))
    return _as_ids(dataset.select_columns(["image_id"]).with_format("arrow")[:]["image_id"].to_pylist())


def id_words(image_ids: Iterable[int | str]) -> np.ndarray:
    """Hash image ids to (N,) uint64 words; an integer and its decimal string give the same word."""
    return np.array([_word(str(value)) for value in _as_ids(image_ids)], dtype=np.uint64)


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


def _as_ids(image_ids: Iterable[int | str]) -> list[int | str]:
    """A list of plain integers and strings."""
    image_ids = image_ids.tolist() if hasattr(image_ids, "tolist") else list(image_ids)
    image_ids = [value.item() if hasattr(value, "item") else value for value in image_ids]
    for row, value in enumerate(image_ids):
        if type(value) not in (int, str):
            raise ValueError(
                f"row {row}: image_id must be an integer or a string, got {value!r}. "
                f"Convert the column, for instance to its file names."
            )
    return image_ids


def _negative(labels: np.ndarray, unknown: np.ndarray | None, part: slice) -> np.ndarray:
    """Where a part of the labels is known to be 0."""
    return (labels[part] == 0) if unknown is None else (labels[part] == 0) & ~unknown[part]


def _nth_smallest(draws: np.ndarray, n: int) -> float:
    """The largest of the n smallest draws, all of them if they are fewer; below every draw for n = 0."""
    n = min(n, len(draws))
    return float(np.partition(draws, n - 1)[n - 1]) if n else -1.0


def _probabilities(name: str, value: Any, ndims: tuple[int, ...]) -> Any:
    """A float or (nested) list of floats in [0, 1] with one of these numbers of dimensions."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    inside = (array >= 0) & (array <= 1)  # NaN is not
    if array.ndim not in ndims or array.size == 0 or not inside.all():
        shapes = " or ".join({0: "a number", 1: "K numbers", 2: "a (K, K) matrix"}[ndim] for ndim in ndims)
        got = f"shape {array.shape}" if inside.all() else f"{array[~inside].flat[0]:g} in {reprlib.repr(value)}"
        raise ValueError(f"{name} must be {shapes} of probabilities in [0, 1], got {got}.")
    return array.tolist()


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
