"""What all label noise shares: fitting, the map over batches, the streams of draws, and the record for model cards."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import datasets
import numpy as np
import torch

from hf_balancemix.data.labels import check_unknown_column, given_labels, is_class_list, mark_unknown, multi_hot
from hf_balancemix.data.noise.draws import NUMBER_ROWS, checked_seed, hashed, id_words, plain_ids, read_ids, uniform

logger = logging.getLogger(__name__)

_LABELS_AT_A_TIME = 2**20  # which bounds the memory to a few times 8 MB
_NOISE_PREFIX = "Noise: "  # of a line of a data set's description: the noise's name and parameters as JSON


def record_noise(dataset: datasets.Dataset, parameters: Mapping[str, Any]) -> datasets.Dataset:
    """`dataset`, whose description now says, for model cards, which noise its labels have; it is changed in place.

    The `parameters` are the name and the arguments of the noise, of what JSON can hold.
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
            except (ValueError, RecursionError):
                continue
            if isinstance(noise, dict):
                return noise
    return None


def without_recorded_noise(description: str | None) -> str:
    """A data set's description without the lines of :func:`record_noise`."""
    return "\n".join(line for line in (description or "").splitlines() if not line.startswith(_NOISE_PREFIX))


class LabelNoise:
    """Noise on the labels of a data set. A kind of noise is a subclass that defines `_disturb`.

    Its public attributes are its arguments, which define the noise.

    Args:
        seed: Seed of the draws, at least 0.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = checked_seed(seed)
        self._counts: tuple[int, ...] = ()  # N_k of the fitted data set; empty before `fit`
        self._class_list = True
        self._features = ""  # JSON: its pickle, which `map` hashes for the cache, is the same for the same features

    @property
    def parameters(self) -> dict[str, Any]:
        """The name and the arguments, which together define the noise, for logs and model cards."""
        return {"name": type(self).__name__} | {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __repr__(self) -> str:
        name, *arguments = self.parameters.items()
        return f"{name[1]}({', '.join(f'{key}={reprlib.repr(value)}' for key, value in arguments)})"

    @property
    def features(self) -> datasets.Features:
        """The fitted data set's features plus `clean_labels` of the type of `labels`: for `map(features=...)`."""
        self._check_fitted()
        return datasets.Features.from_dict(json.loads(self._features))

    def add_to(self, dataset: datasets.Dataset, **map_options: Any) -> datasets.Dataset:
        """Fit on `dataset`, map over it with `map_options`, and record the noise in its description, for model cards.

        Returns the data set with noisy `labels`, the clean ones as `clean_labels`. See :meth:`fit`.
        """
        self.fit(dataset)
        options = {"desc": f"Noise: {type(self).__name__}"} | map_options
        return record_noise(dataset.map(self, batched=True, features=self.features, **options), self.parameters)

    def fit(self, dataset: datasets.Dataset) -> Self:
        """Count the positive labels of each class.

        Args:
            dataset: The training set, with `labels` (class list or multi-hot), `image_id` and, if any,
                `unknown_labels`.

        Returns:
            The noise itself.

        Raises:
            TypeError, ValueError: As :func:`hf_balancemix.data.given_labels`; or there is no valid `image_id`, or the
                noise cannot act on so many classes.
        """
        ids = read_ids(dataset)
        if (unique := len(set(map(str, ids)))) < len(ids):
            message = "image_id is not unique (%d values in %d rows): rows with the same image_id get the same draws."
            logger.warning(message, unique, len(ids))
        given = given_labels(dataset).numpy()
        check_unknown_column(dataset)
        self._fit(given, ids)
        features = dataset.features.copy()
        features.setdefault("clean_labels", features["labels"])
        self._features = json.dumps(features.to_dict())
        self._class_list = is_class_list(features["labels"])
        return self

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Disturb a batch; the function for `datasets.Dataset.map(..., batched=True)`.

        Args:
            batch: The columns `labels` and `image_id` of B instances, as lists; its `clean_labels`, if any, stay, and
                so do the labels in its `unknown_labels`.

        Returns:
            `labels`, disturbed, and `clean_labels`, each in the form of the fitted data set's labels.

        Raises:
            ValueError: Not fitted, a column is absent, the batch is one row, or labels do not fit the K classes.
        """
        self._check_fitted()
        for column, fix in (("labels", "map over the data set that was fitted"), ("image_id", NUMBER_ROWS)):
            if column not in batch:
                raise ValueError(f"the batch's columns are {list(batch)}; '{column}' must be among them; {fix}.")
        if np.ndim(batch["image_id"]) == 0:
            raise ValueError(f"{self!r} was called with one row; it must be a batch; use map(noise, batched=True).")
        unknown = None if batch.get("unknown_labels") is None else self._matrix(batch, "unknown_labels")
        noisy = self.apply(self._matrix(batch, "labels"), batch["image_id"], unknown)
        labels = [np.flatnonzero(row).tolist() for row in noisy] if self._class_list else noisy.tolist()
        return {"labels": labels, "clean_labels": batch.get("clean_labels", batch["labels"])}

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
            ValueError: Not fitted, or the shapes, the values, or the ids are others than these.
        """
        self._check_fitted()
        given = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
        num_classes = len(self._counts)
        if given.ndim != 2 or given.shape[1] != num_classes:
            raise ValueError(
                f"labels has the shape {given.shape}; it must be (N, {num_classes}), as fitted; fit the noise anew."
            )
        if not ((given == 0) | (given == 1)).all():
            raise ValueError("labels has other values than 0 and 1; it must be multi-hot; see data.labels.multi_hot.")
        ids = plain_ids(image_ids)
        if len(ids) != len(given):
            raise ValueError(f"image_ids has {len(ids)} values; it must have one for each of the {len(given)} rows.")
        given = mark_unknown(given, np.zeros_like(given) if unknown is None else np.asarray(unknown))
        noisy = (self._noisy(given, ids) == 1).astype(np.uint8)
        return torch.from_numpy(noisy) if isinstance(labels, torch.Tensor) else noisy

    def _matrix(self, batch: Mapping[str, Any], column: str) -> np.ndarray:
        """(B, K) uint8 of a batch's label column."""
        one_hot = not self._class_list
        return multi_hot(batch[column], len(self._counts), column=column, one_hot_input=one_hot).numpy()

    def _fit(self, given: np.ndarray, ids: list[int | str]) -> None:
        """Fit on (N, K) int8 labels of 0, 1 and -1, and N ids."""
        self._counts = tuple((given == 1).sum(0).tolist())

    def _noisy(self, given: np.ndarray, ids: list[int | str]) -> np.ndarray:
        """Noisy copy of (N, K) int8 labels of 0, 1 and -1."""
        words, step = id_words(ids), max(1, _LABELS_AT_A_TIME // given.shape[1])
        parts = [slice(start, start + step) for start in range(0, len(given), step)]
        return np.concatenate([given[:0], *(self._disturb(given[part], words[part]) for part in parts)])

    def _disturb(self, given: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Noisy copy of (B, K) int8 labels of 0, 1 and -1; (B,) uint64 words stand for the images."""
        raise NotImplementedError

    def _uniform(self, purpose: str, words: np.ndarray, classes: np.ndarray | int) -> np.ndarray:
        """Draws in [0, 1) for (image, class) pairs; the name, the seed and the purpose choose the stream."""
        return uniform(hashed(f"{type(self).__name__}/{self.seed}/{purpose}"), words, classes)

    def _check_fitted(self) -> None:
        if not self._counts:
            raise ValueError(f"{self!r} is not fitted; it must know the data set; call .fit(train_dataset) first.")
