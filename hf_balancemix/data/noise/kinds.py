"""The kinds of label noise: mislabelling (Eq. 11), random flips, a single positive, a transition matrix, and several.

Noise is fitted on a training set, from which it keeps the class counts and the features, and is then mapped over it.
The noisy labels replace `labels`; the clean ones stay beside them as `clean_labels`:

    noise = Mislabel(rate=0.4, seed=0).fit(train)
    noisy = train.map(noise, batched=True, features=noise.features)

`Mislabel(rate=0.4, seed=0).add_to(train)` does both, and records the noise with the data set for the model card.

Every draw is a pure function of (seed, image_id, class): a counter-based generator is keyed by hashes of the seed and
of the image_id, so that neither the order of the rows, nor batch size, `num_proc` or shards, nor the version of NumPy
matters. Noise upon noise disturbs the noisy labels and keeps the first `clean_labels`; take another seed then, or the
two use the same draws. `Compose` does so for several at once.

Labels that the data set calls unknown (column `unknown_labels`) never change: they neither move nor are moved to.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from hf_balancemix.data.noise.base import LabelNoise


class Mislabel(LabelNoise):
    """Mislabelling (Eq. 11): the presence of class i is recorded as class j.

    Each positive label i of an instance moves with probability `rate`, each on its own, to a class j drawn among the
    classes that are absent from the instance, in proportion to their counts N_j in the fitted data set. i then is 0
    and j is 1. Where several positives move to the same j they share it, so the instance has fewer positives than
    before. A class with N_j = 0 is never a target; where no target is left (all classes present) nothing moves.

    That j is absent is how the paper defines the problem; Eq. 11, read literally, allows any class but i.

    Args:
        rate: The probability tau of Eq. 11, in [0, 1). The paper uses 0.2 and 0.4.
        seed: Seed of the draws, at least 0.

    Raises:
        ValueError: `rate` or `seed` is out of range; `fit` is given a data set with a single class.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = _checked_rate(rate)
        super().__init__(seed)

    def _fit(self, given: np.ndarray, ids: list[int | str]) -> None:
        if given.shape[1] < 2:
            needed = "it must be at least 2, as a label moves to another; use RandomFlip for a single class"
            raise ValueError(f"{self!r} is fitted on {given.shape[1]} class; {needed}.")
        super()._fit(given, ids)

    def _disturb(self, given: np.ndarray, words: np.ndarray) -> np.ndarray:
        # Integer weights: their sums are exact, in whatever order they are added.
        ends = np.where(given == 0, np.array(self._counts), 0).cumsum(axis=1)
        rows, classes = np.nonzero(given == 1)
        moves = (self._uniform("move", words[rows], classes) < self.rate) & (ends[rows, -1] > 0)
        rows, classes = rows[moves], classes[moves]
        points = np.floor(self._uniform("target", words[rows], classes) * ends[rows, -1]).astype(np.int64)
        # The target is the first class whose end exceeds the point; all rows are searched as one ascending array.
        start_of_row = (sum(self._counts) + 1) * np.arange(len(given))
        found = np.searchsorted((ends + start_of_row[:, None]).ravel(), points + start_of_row[rows], side="right")
        noisy = given.copy()
        noisy[rows, classes] = 0
        noisy[rows, found - rows * given.shape[1]] = 1  # after all have left, so that an arrival always counts
        return noisy


class RandomFlip(LabelNoise):
    """Random flips: every label, positive or negative, is inverted with probability `rate`, each on its own.

    Args:
        rate, seed: As those of :class:`Mislabel`; ValueError where one is out of range.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate = _checked_rate(rate)
        super().__init__(seed)

    def _disturb(self, given: np.ndarray, words: np.ndarray) -> np.ndarray:
        flips = self._uniform("flip", words[:, None], np.arange(given.shape[1])) < self.rate
        return np.where(flips & (given >= 0), 1 - given, given)


class SinglePositive(LabelNoise):
    """Missing labels: one positive label of each instance, drawn uniformly, is kept; the others become negative.

    Instances without a positive label stay as they are.

    Args:
        seed: Seed of the draws; ValueError unless it is at least 0.
    """

    def _disturb(self, given: np.ndarray, words: np.ndarray) -> np.ndarray:
        positive = given == 1
        kept = np.floor(self._uniform("keep", words, 0) * positive.sum(axis=1))
        rank = positive.cumsum(axis=1) - 1  # of a positive among the positives of its row
        return np.where(positive & (rank != kept[:, None]), 0, given)


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
        missing, added: Probability that a positive label is lost (1 to 0), and that a negative one is added (0 to 1),
            in [0, 1]: one number, or one for each class.
        seed: Seed of the draws, at least 0.

    Raises:
        ValueError: A probability is outside [0, 1], a row of the matrix and its `missing` sum to more than 1, or the
            shapes do not fit one another, or in `fit` the data set.

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
        # Lists of floats, not arrays, as their pickle, which `map` hashes for the cache, is by value.
        self.matrix = None if matrix is None else _probabilities("matrix", matrix, (2,))
        self.missing = _probabilities("missing", missing, (0, 1))
        self.added = _probabilities("added", added, (0, 1))
        super().__init__(seed)
        shapes = [() if value is None else np.shape(value) for value in (self.matrix, self.missing, self.added)]
        sizes = {size for shape in shapes for size in shape}
        if len(sizes) > 1:
            raise ValueError(
                f"matrix, missing and added have the shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; they must be a "
                "(K, K) matrix, and a number or K numbers each; give all the same K."
            )
        self._num_classes = sizes.pop() if sizes else None
        if self.matrix is not None:
            total = np.sum(self.matrix, axis=1) + self.missing
            if (total > 1 + 1e-9).any():  # rows that are meant to sum to 1 may exceed it by a rounding
                row = int(total.argmax())
                raise ValueError(
                    f"row {row} of matrix sums to {np.sum(self.matrix[row]):g}, with missing to {total[row]:g}; it "
                    "must be at most 1; lower its entries, the diagonal (to stay) among them."
                )

    def _fit(self, given: np.ndarray, ids: list[int | str]) -> None:
        if self._num_classes not in (None, given.shape[1]):
            needed = f"it must be for the {given.shape[1]} of the data set; give one row and one column for each"
            raise ValueError(f"{self!r} is for {self._num_classes} classes; {needed}.")
        super()._fit(given, ids)

    def _disturb(self, given: np.ndarray, words: np.ndarray) -> np.ndarray:
        num_classes = given.shape[1]
        matrix = np.zeros((num_classes, num_classes)) if self.matrix is None else np.array(self.matrix)
        missing = np.broadcast_to(self.missing, num_classes)
        ends = np.concatenate([matrix, missing[:, None]], axis=1).cumsum(axis=1)
        rows, classes = np.nonzero(given == 1)
        drawn = self._uniform("move", words[rows], classes)
        targets = np.empty(len(rows), np.int64)  # K: lost; K + 1: stays
        for k in np.unique(classes):
            targets[classes == k] = np.searchsorted(ends[k], drawn[classes == k], side="right")
        lost, moved = targets == num_classes, (targets < num_classes) & (targets != classes)
        moved[moved] = given[rows[moved], targets[moved]] >= 0  # not to an unknown label
        noisy = given.copy()
        noisy[rows[lost | moved], classes[lost | moved]] = 0
        noisy[rows[moved], targets[moved]] = 1
        if np.any(self.added):
            added = self._uniform("add", words[:, None], np.arange(num_classes)) < self.added
            noisy[added & (given == 0)] = 1
        return noisy


class Compose(LabelNoise):
    """Several kinds of noise one after another, each fitted on what the one before it makes of the data set.

    `clean_labels` are those from before the first. The noise objects that are passed are copied, not fitted
    themselves.

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
        super().__init__()  # its seed is not used: the parts have their own
        for noise in noises:
            if not isinstance(noise, LabelNoise):
                raise TypeError(f"noises has {noise!r}; each must be noise; pass for instance [Mislabel(0.2)].")
        parts = [part for noise in noises for part in (noise.noises if isinstance(noise, Compose) else [noise])]
        if not parts:
            raise ValueError("noises is empty; it must be at least one noise; pass for instance [Mislabel(0.2)].")
        kinds = [(type(part).__name__, part.seed) for part in parts]
        for name, seed in kinds:
            if kinds.count((name, seed)) > 1:
                raise ValueError(
                    f"noises has two {name} with the seed {seed}; their draws must differ; change a seed."
                )
        self.noises: list[LabelNoise] = copy.deepcopy(parts)

    @property
    def parameters(self) -> dict[str, Any]:
        return {"name": type(self).__name__, "noises": [noise.parameters for noise in self.noises]}

    def __repr__(self) -> str:
        return f"Compose({self.noises!r})"

    def _fit(self, given: np.ndarray, ids: list[int | str]) -> None:
        noisy = given
        for noise in self.noises:
            noise._fit(noisy, ids)
            noisy = noise._noisy(noisy, ids)
        super()._fit(given, ids)

    def _noisy(self, given: np.ndarray, ids: list[int | str]) -> np.ndarray:
        for noise in self.noises:
            given = noise._noisy(given, ids)
        return given


def _probabilities(name: str, value: Any, ndims: tuple[int, ...]) -> Any:
    """A float or (nested) list of floats in [0, 1] with one of these numbers of dimensions."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    inside = (array >= 0) & (array <= 1)  # NaN is not
    if array.ndim not in ndims or array.size == 0 or not inside.all():
        shapes = " or ".join({0: "a number", 1: "K numbers", 2: "a (K, K) matrix"}[ndim] for ndim in ndims)
        found = f"of shape {array.shape}" if inside.all() else f"{reprlib.repr(value)} with {array[~inside].flat[0]:g}"
        raise ValueError(f"{name} is {found}; it must be {shapes} of probabilities in [0, 1]; correct the values.")
    return array.tolist()


def _checked_rate(rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) < 1:  # NaN is not
        raise ValueError(f"the noise rate is {rate!r}; it must be a number in [0, 1); the paper uses 0.2 and 0.4.")
    return float(rate)
