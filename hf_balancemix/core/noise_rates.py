"""How many of the given labels are wrong: a rate for each class and polarity, from out-of-fold predictions.

T01 = P(given 1 | clean 0) and T10 = P(given 0 | clean 1) of a class are read off where its clean label is all but
known: among the instances of the highest predictions nearly all are clean positives (the anchors of Dual-T and
others), in the lower half nearly none. What is given there against that is noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_given_labels, check_same_shape

_TOP, _LEAST = 0.1, 5  # anchors of T10: the share of n instances, and the fewest
_PRIOR = 50  # anchors that the other classes' T10 counts for
_BEST = 0.25  # the quantile of T10 over the classes that counts for all: hard classes have more
_LARGEST = 0.9  # T01 + T10; at 1 the given labels say nothing
_Z = 1.96


class NoiseRates(NamedTuple):
    """What :func:`estimate_noise_rates` returns; each `(3, K)` float64 in [0, 1]: estimate, and 95 % interval."""

    wrong: Tensor  # of the given positive labels, the share that is wrong
    missing: Tensor  # of the given negative labels, the share that is wrong


def estimate_noise_rates(logits: Tensor, labels: Tensor) -> NoiseRates:
    """Which share of each class's given labels is wrong, in each direction.

    For a class with n of N labels given positive, frequency v = n / N:

        T10   share of given negatives among the n / 10 instances of the highest predictions, drawn towards the lower
              quartile of all classes (as if 50 more anchors had it), because few of a rare class are predicted surely
        T01   share of given positives among the half of the instances with the lowest predictions
        pi    = (v - T01) / (1 - T01 - T10), the share of clean positives
        wrong = (1 - pi) T01 / v,   missing = pi T10 / (1 - v)

    The intervals are Wilson's for the counts of T01 and T10. T01 + T10 is cut to 0.9. That predictions are not perfect
    is in neither: a class that they hardly tell apart looks like one whose labels are wrong, and nothing in the labels
    tells the two cases apart. Where over all classes together the two kinds of anchors differ by less than two
    standard errors, the predictions say nothing, and the estimates and the lower ends are 0.

    Args:
        logits: `(N, K)` predictions of models that did not see the instance's own labels, such as
            :func:`~hf_balancemix.core.out_of_fold.out_of_fold_logits`, or anything else in their order.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown, which count nothing.

    Returns:
        :class:`NoiseRates` on the CPU; all are 0 for a class without a positive or without a negative label.

    Raises:
        ValueError: The shapes differ, or a label is none of 0, 1 and -1.
    """
    check_same_shape(logits=logits, labels=labels)
    check_given_labels(labels)
    logits, labels = logits.cpu(), labels.cpu()
    counts = torch.tensor([_anchor_counts(x, y) for x, y in zip(logits.T, labels.T, strict=True)], dtype=torch.float64)
    v, top, top_negative, low, low_positive = counts.T
    usable = (v > 0) & (v < 1)
    some = usable & (top >= _LEAST)
    common = ((top_negative + 1) / (top + 2))[some].quantile(_BEST) if some.any() else top_negative.new_zeros(())
    t10 = _wilson(top_negative + _PRIOR * common, top + _PRIOR)
    t01 = _wilson(low_positive, low)
    # More T01 means more wrong and fewer missing labels, more T10 the opposite.
    estimate, least_wrong, most_wrong = (_rates(t01[i], t10[j], v) for i, j in ((0, 0), (1, 2), (2, 1)))
    wrong = torch.stack([estimate[0], least_wrong[0], most_wrong[0]])
    missing = torch.stack([estimate[1], most_wrong[1], least_wrong[1]])
    if not _told_apart(v, top, top_negative, low, low_positive):
        wrong[:2], missing[:2] = 0, 0  # no more than the upper ends is known
    return NoiseRates(wrong.where(usable, 0), missing.where(usable, 0))


def _anchor_counts(logits: Tensor, labels: Tensor) -> tuple[float, float, float, float, float]:
    """v, and of one class's anchors at the top and at the bottom the number, and of those the labels that disagree."""
    known = labels >= 0
    given = labels[known][logits[known].argsort(descending=True, stable=True)] == 1
    n = int(given.sum())
    top = given[: max(int(_TOP * n), min(n, _LEAST))]
    low = given[len(given) // 2 :]
    v = n / max(len(given), 1)
    return v, len(top), int((~top).sum()), max(len(low), 1), int(low.sum())


def _told_apart(v: Tensor, top: Tensor, top_negative: Tensor, low: Tensor, low_positive: Tensor) -> bool:
    """Whether given labels are positive more often at the top than at the bottom, by more than chance would do."""
    apart = 1 - top_negative / top.clamp(min=1) - low_positive / low
    variance = sum((c + 1) * (n - c + 1) / (n + 2) ** 3 for c, n in ((top_negative, top), (low_positive, low)))
    return bool((v * apart).sum() > 2 * (v * v * variance).sum().sqrt())


def _wilson(successes: Tensor, trials: Tensor) -> Tensor:
    """`(3, K)`: the share, and the ends of Wilson's 95 % interval."""
    share = successes / trials
    scale = 1 + _Z**2 / trials
    centre = (share + _Z**2 / (2 * trials)) / scale
    half = _Z / scale * (share * (1 - share) / trials + (_Z / (2 * trials)) ** 2).sqrt()
    return torch.stack([share, (centre - half).clamp(min=0), (centre + half).clamp(max=1)])


def _rates(t01: Tensor, t10: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong and missing shares `(K,)`."""
    t10 = torch.minimum(t10, (_LARGEST - t01).clamp(min=0))
    pi = ((v - t01) / (1 - t01 - t10)).clamp(0, 1)
    return ((1 - pi) * t01 / v).clamp(0, 1), (pi * t10 / (1 - v)).clamp(0, 1)
