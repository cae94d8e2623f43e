"""The minority sampler (Eq. 2-4) and the stream of keys that pairs it with the random sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.utils.data import Sampler

from hf_balancemix.core.checks import check_choice, check_range, check_same_shape
from hf_balancemix.core.given_labels import compressed_labels, label_counts
from hf_balancemix.core.keys import keyed_generator

MINORITY_SCORES = ("paper", "positive", "uniform")


def class_confidences(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2: the mean confidence of every class in its positive and in its negative labels.

    Args:
        probabilities: `(N, K)` float in [0, 1], the model's sigmoid outputs.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown: these count nowhere.

    Returns:
        `(P, A)`, each `(K,)` float64: P(k) is the mean of f(x)_k over positive labels, A(k) the mean of 1 - f(x)_k
        over negative labels; 1 where a class has none.

    Raises:
        ValueError: The shapes differ, or the probability of a known label is NaN or outside [0, 1].

    Example:
        >>> P, A = class_confidences(torch.tensor([[0.9], [0.5], [0.2]]), torch.tensor([[1], [1], [0]]))
        >>> round(P.item(), 4), round(A.item(), 4)
        (0.7, 0.8)
    """
    return confidences_from_sums(*confidence_sums(probabilities, labels))


# Probabilities are summed as integers of this unit: exact, hence the same in any order and on any number of ranks.
# 2^31 instances fit into 63 bits.
CONFIDENCE_UNIT = 2**32
_ROWS_AT_ONCE = 1 << 18  # of compressed labels


def confidence_sums(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sufficient statistics of Eq. 2, to be added over batches and ranks.

    Args:
        probabilities: `(B, K)` float in [0, 1].
        labels: `(B, K)` given labels in {0, 1}, or -1 where unknown: these count nowhere.

    Returns:
        `(sums, counts)`, each `(2, K)` int64, row 0 for negative and row 1 for positive labels; sums of the confidence
        in the given label in units of 2^-32.
    """
    check_same_shape(probabilities=probabilities, labels=labels)
    positive, negative = labels == 1, labels == 0
    p = probabilities.double()
    bad = ~((p >= 0) & (p <= 1)) & (positive | negative)
    if bad.any():
        raise ValueError(
            f"probabilities hold {p[bad][0]:g}; each must be in [0, 1]; pass the sigmoid of finite logits."
        )
    confidence = (torch.where(positive, p, 1 - p) * CONFIDENCE_UNIT).round().long()
    sums = torch.stack([(confidence * negative).sum(0), (confidence * positive).sum(0)])
    return sums, torch.stack([negative.sum(0), positive.sum(0)])


def confidences_from_sums(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2 from the totals of :func:`confidence_sums`: `(P, A)`, each `(K,)` float64."""
    negative, positive = torch.where(counts > 0, sums.double() / CONFIDENCE_UNIT / counts.clamp(min=1), 1.0)
    return positive, negative


def instance_scores(labels: Tensor | csr_array, positive: Tensor, negative: Tensor, score: str = "paper") -> Tensor:
    """Eq. 3: how confidently the model knows each instance's labels; a low score marks a minority instance.

    Args:
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown; dense, or a :class:`scipy.sparse.csr_array`. The
            score is that of the known labels, so that their number does not count; an instance without any is neutral:
            it gets the harmonic mean of the other scores, with which Eq. 4 draws it with the probability 1 / N.
        positive, negative: `(K,)` P(k) and A(k) in [0, 1].
        score: `"paper"`: Eq. 3 as printed, the sum over classes of P(k) where the label is 1 and A(k) where it is 0;
            K times their mean where some are unknown.
            With many classes the negative terms drown the positive ones and Eq. 4 becomes almost uniform.
            `"positive"`: the mean of P(k) over the instance's positive labels; an instance without any counts as
            fully known (1). `"uniform"`: 1 for every instance, i.e. no minority sampler.

    Returns:
        `(N,)` float64, positive.

    Raises:
        ValueError: Unknown `score`.

    Example:
        >>> labels = torch.tensor([[1, 0], [0, 1]])
        >>> P, A = torch.tensor([0.9, 0.1]), torch.tensor([0.8, 0.9])
        >>> [round(s, 4) for s in instance_scores(labels, P, A).tolist()]
        [1.8, 0.9]
    """
    check_choice("minority_score", score, MINORITY_SCORES)
    rows = compressed_labels(labels)
    num_instances, num_classes = rows.shape
    if score == "uniform":
        return torch.ones(num_instances, dtype=torch.float64)
    P, A = positive.double().numpy(), negative.double().numpy()
    # As if all labels were negative ones, and what the stored labels change; for "positive" nothing but these.
    all_negative = A.sum() if score == "paper" else 0.0
    of_value = np.stack([0 * P, P - A, -A] if score == "paper" else [0 * P, P, 0 * A])  # of 0, 1 and, the last, -1
    sums, num_positive, num_known = np.empty((3, num_instances))
    for piece, row, label_class, value in _pieces(rows):
        length = piece.stop - piece.start
        changes = of_value[value, label_class]
        sums[piece] = all_negative + np.bincount(row, changes, length)
        num_positive[piece] = np.bincount(row, value == 1, length)
        num_known[piece] = num_classes - np.bincount(row, value == -1, length)
    scores, known = torch.from_numpy(sums), torch.from_numpy(num_known)
    if score == "paper":
        scores *= num_classes / known.clamp(min=1)  # times 1 where all are known
    else:
        count = torch.from_numpy(num_positive)
        scores = torch.where(count > 0, scores / count.clamp(min=1), 1.0)
    # A class that the model gives no probability at all must not take the whole epoch.
    scores = scores.clamp(min=1e-3)
    judged = known > 0
    neutral = 1 / (1 / scores[judged]).mean() if judged.any() else 1.0
    return torch.where(judged, scores, neutral)


def sampling_weights(scores: Tensor) -> Tensor:
    """Eq. 4: sampling probabilities, inverse to the scores.

    Args:
        scores: `(N,)` positive floats.

    Returns:
        `(N,)` float64, sum 1.

    Raises:
        ValueError: A score is not a positive finite number.
    """
    bad = ~((scores > 0) & torch.isfinite(scores))
    if bad.any():
        raise ValueError(
            f"scores hold {scores[bad][0]:g}; each must be positive and finite; pass those of instance_scores."
        )
    inverse = 1 / scores.double()
    return inverse / inverse.sum()


def systematic_resample(weights: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Draw instances by weight so that each one comes floor or ceil of `num_draws * weight` times, in random order.

    Args:
        weights: `(N,)` float64 probabilities, sum 1.
        num_draws: How many to draw.
        generator: CPU generator; the only source of randomness.

    Returns:
        `(num_draws,)` int64 indices. With uniform weights and `num_draws = N`: a permutation.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    edges = weights.double().cumsum(0)
    edges = edges / edges[-1] * num_draws
    # Point i lies at i + offset; an instance gets the points between its edges. Rounding to 2^-20 of a draw keeps a
    # cumulative sum that is off in its last bits from moving a point across an edge that it should touch exactly.
    first = torch.ceil(((edges - offset) * 2**20).round() / 2**20).clamp(0, num_draws).long()
    first[-1] = num_draws
    counts = torch.diff(first, prepend=first.new_zeros(1))
    indices = torch.repeat_interleave(torch.arange(len(weights)), counts)
    return indices[torch.randperm(num_draws, generator=generator)]


def effective_sample_size(weights: Tensor) -> float:
    """Kish's effective sample size over N, in (0, 1]: 1 means uniform sampling."""
    w = weights.double()
    return float(w.sum() ** 2 / (w.square().sum() * len(w)))


def class_lift(weights: Tensor, labels: Tensor | csr_array) -> Tensor:
    """How often each class is drawn relative to uniform sampling.

    Args:
        weights: `(N,)` sampling probabilities, sum 1.
        labels: `(N, K)` in {0, 1}, the clean labels where they are known; -1 (unknown) counts as 0; dense or sparse.

    Returns:
        `(K,)` float64; 1 = as often as uniform, NaN for a class without positive labels.
    """
    rows, w = compressed_labels(labels), weights.double().numpy()
    num_instances, num_classes = rows.shape
    drawn = np.zeros(num_classes)
    for piece, row, label_class, value in _pieces(rows):
        drawn += np.bincount(label_class, w[piece][row] * (value == 1), num_classes)
    return torch.from_numpy(drawn) * num_instances / label_counts(rows)[1]


def _pieces(labels: csr_array) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Some instances at a time: which, and the row among them, the class and the value of their stored labels."""
    for first in range(0, labels.shape[0], _ROWS_AT_ONCE):
        piece = slice(first, min(first + _ROWS_AT_ONCE, labels.shape[0]))
        start = labels.indptr[piece.start : piece.stop + 1]
        stored = slice(start[0], start[-1])
        row = np.repeat(np.arange(len(start) - 1), np.diff(start))
        yield piece, row, labels.indices[stored], labels.data[stored]


class PairKey(NamedTuple):
    """What a data loader's worker gets: all that the random choices of one pair depend on."""

    epoch: int
    random: int  # index of the random instance
    minority: int | None  # index of the minority instance; None for methods without a second stream


class EpochSampler(Sampler[PairKey]):
    """The random sampler: a new permutation of `range(num_instances)` every epoch, as keys.

    The order is a pure function of `(seed, epoch)`. Whoever runs the epochs calls `set_epoch` before `iter`; the epoch
    travels in the key, so workers that hold an old copy of the data set still see it. It is not a `RandomSampler`:
    Accelerate would replace one by its own. Every rank iterates the whole sampler and takes its share of batches.

    Args:
        num_instances: N.
        seed: Any int.
    """

    def __init__(self, num_instances: int, seed: int) -> None:
        check_range("num_instances", num_instances, 1)
        self.num_instances, self.seed, self.epoch = num_instances, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_instances

    def _permutation(self) -> Iterator[int]:
        generator = keyed_generator(self.seed, self.epoch, "random")
        return _integers(torch.randperm(self.num_instances, generator=generator))

    def __iter__(self) -> Iterator[PairKey]:
        epoch = self.epoch
        for index in self._permutation():
            yield PairKey(epoch, index, None)


class PairSampler(EpochSampler):
    """The random sampler paired with the minority sampler (Algorithm 1): N keys an epoch, one minority instance each.

    Args:
        num_instances: N.
        seed: Any int.
        weights: Called at the start of each epoch; gives the `(N,)` float64 sampling probabilities of Eq. 4. They must
            be the same, bit for bit, on every rank.
    """

    def __init__(self, num_instances: int, seed: int, weights: Callable[[], Tensor]) -> None:
        super().__init__(num_instances, seed)
        self.weights = weights

    def __iter__(self) -> Iterator[PairKey]:
        epoch = self.epoch
        generator = keyed_generator(self.seed, epoch, "minority")
        minority = systematic_resample(self.weights(), self.num_instances, generator)
        for pair in zip(self._permutation(), _integers(minority), strict=True):
            yield PairKey(epoch, *pair)


def _integers(values: Tensor) -> Iterator[int]:
    """Those of a 1-D tensor; never a list of them all, which takes 40 bytes each."""
    return chain.from_iterable(part.tolist() for part in values.split(1 << 16))
