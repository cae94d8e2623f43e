"""How many of the given labels are wrong: a rate for each class and polarity, from out-of-fold predictions.

T01 = P(given 1 | clean 0) and T10 = P(given 0 | clean 1) of a class are read off where its clean label is all but
known: among the instances of the highest predictions nearly all are clean positives (the anchors of Dual-T and
others), in the lower half nearly none. What is given there against that is noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.checks import check_given_labels, check_same_shape
from hf_balancemix.core.given_labels import compressed_labels, label_counts

_TOP, _LEAST = 0.1, 5  # anchors of T10: the share of n instances, and the fewest
_PRIOR = 50  # anchors that the other classes' T10 counts for
_BEST = 0.25  # the quantile of T10 over the classes that counts for all: hard classes have more
_OWN = 0.25  # how much a class's own T01 counts beside that of its frequency, where labels are ordered
_LARGEST = 0.9  # T01 + T10; at 1 the given labels say nothing
_Z = 1.96


class NoiseRates(NamedTuple):
    """What :func:`estimate_noise_rates` returns; each `(3, K)` float64 in [0, 1]: estimate, and 95 % interval."""

    wrong: Tensor  # of the given positive labels, the share that is wrong
    missing: Tensor  # of the given negative labels, the share that is wrong


def estimate_noise_rates(logits: Tensor, labels: Tensor) -> NoiseRates:
    """Which share of each class's given labels is wrong, in each direction.

    For a class with n of N labels given positive, frequency v = n / N::

        T10   share of given negatives among the n / 10 instances of the highest predictions, drawn towards the lower
              quartile of all classes (as if 50 more anchors had it), because few of a rare class are predicted surely
        T01   share of given positives among the half of the instances with the lowest predictions
        pi    = (v - T01) / (1 - T01 - T10), the share of clean positives
        wrong = (1 - pi) T01 / v,   missing = pi T10 / (1 - v)

    The intervals are Wilson's for the counts of T01 and T10, and reach as low as those of the tenth of the lowest and
    the n / 40 of the highest predictions, where few labels even of a hard class disagree unless they are wrong. T01 +
    T10 is cut to 0.9. That predictions are not perfect is not in the estimates: a class that they hardly tell apart
    looks like one whose labels are wrong, and nothing in the labels tells the two cases apart. Where over all classes
    together the two kinds of anchors differ by less than two standard errors, the predictions say nothing, and the
    estimates and the lower ends are 0.

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
    return rates_of_anchors(anchor_counts(logits, labels))


def anchor_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """What :func:`estimate_noise_rates` counts of each of k classes, `(k, 9)` float64; `(N, k)` logits and labels."""
    counts = [_anchor_counts(x, y) for x, y in zip(logits.T, labels.T, strict=True)]
    return torch.tensor(counts, dtype=torch.float64)


def rates_of_anchors(counts: Tensor) -> NoiseRates:
    """:func:`estimate_noise_rates` of the `(K, 9)` :func:`anchor_counts` of all classes."""
    v, top, top_negative, topmost, topmost_negative, low, low_positive, lowest, lowest_positive = counts.T
    usable = (v > 0) & (v < 1)
    some = usable & (top >= _LEAST)
    common = ((top_negative + 1) / (top + 2))[some].quantile(_BEST) if some.any() else top_negative.new_zeros(())
    t10 = _wilson(top_negative + _PRIOR * common, top + _PRIOR)
    t01 = _wilson(low_positive, low)
    t10[1] = torch.minimum(t10[1], _wilson(topmost_negative, topmost)[1])
    t01[1] = torch.minimum(t01[1], _wilson(lowest_positive, lowest)[1])
    # More T01 means more wrong and fewer missing labels, more T10 the opposite.
    estimate, least_wrong, most_wrong = (_rates(t01[i], t10[j], v) for i, j in ((0, 0), (1, 2), (2, 1)))
    wrong = torch.stack([estimate[0], least_wrong[0], most_wrong[0]])
    missing = torch.stack([estimate[1], most_wrong[1], least_wrong[1]])
    if not _told_apart(v, top, top_negative, low, low_positive):
        wrong[:2], missing[:2] = 0, 0  # no more than the upper ends is known
    return NoiseRates(wrong.where(usable, 0), missing.where(usable, 0))


def wrong_probability(labels: Tensor, probability: Tensor, rates: NoiseRates) -> Tensor:
    """How probable it is that each given label is wrong, by Bayes' rule in class-conditional noise.

    With q = P(clean 1 | image), and T01 and T10 of :func:`estimate_noise_rates` as the rates imply them:

        given 1:  (1 - q) T01 / ((1 - q) T01 + q (1 - T10))
        given 0:  q T10 / (q T10 + (1 - q) (1 - T01))

    So a label against which the image speaks is a wrong one only as far as labels of its class are wrong at all. But
    the rates of one class are known too badly to order the labels of many by them. So log T01 is 1/4 the class's own
    and 3/4 what its frequency v lets expect: a + b log v, 0 <= b <= 1, fitted to all classes, each weighted by its
    number of positive labels. T10 is one for all, the lower quartile of the classes, as hard ones seem to have more.

    Args:
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown.
        probability: `(N, K)` in [0, 1], q, such as :attr:`JudgedLabels.probability`, of models that did not see the
            label. What is not finite says nothing.
        rates: Of the same classes.

    Returns:
        `(N, K)` float32 in [0, 1] on the CPU; 0 where a label is unknown, or `probability` not finite.

    Raises:
        ValueError: The shapes differ, or a label is none of 0, 1 and -1.

    Example:
        >>> rates = NoiseRates(wrong=torch.full((3, 1), 0.5), missing=torch.zeros(3, 1))  # of two positives, one
        >>> given, q = torch.tensor([1, 1, 0, 0]), torch.tensor([0.1, 0.9, 0.1, 0.9])
        >>> wrong_probability(given[:, None], q[:, None], rates).flatten()
        tensor([0.7500, 0.0357, 0.0000, 0.0000])
    """
    check_same_shape(labels=labels, probability=probability)
    check_given_labels(labels)
    return wrong_by_rates(labels.cpu(), probability.cpu(), *transition_rates(labels, rates))


def wrong_by_rates(labels: Tensor, probability: Tensor, t01: Tensor, t10: Tensor) -> Tensor:
    """:func:`wrong_probability` of some of the classes, with their T01 `(k,)` and the T10 of all."""
    q = probability.double()
    known = (labels >= 0) & q.isfinite()
    return wrong_posterior(labels == 1, q.nan_to_num(0.5), t01, t10).where(known, 0).float()


def transition_rates(labels: Tensor | csr_array, rates: NoiseRates) -> tuple[Tensor, Tensor]:
    """T01 `(K,)` and T10 `()`, float64, of :func:`wrong_probability`; `labels` as :func:`compressed_labels` takes."""
    m, n = (count.double() for count in label_counts(compressed_labels(labels)))
    wrong, missing = rates.wrong[0].cpu() * n, rates.missing[0].cpu() * m  # labels
    clean_positive, clean_negative = n - wrong + missing, m - missing + wrong
    t01, t10 = (wrong / clean_negative.clamp(min=1e-9)).clamp(max=1), (missing / clean_positive).clamp(max=1)
    t01 = (t01**_OWN * _by_frequency(t01, n / (n + m).clamp(min=1), n) ** (1 - _OWN)).clamp(max=_LARGEST)
    some = clean_positive > 0
    return t01, t10[some].quantile(_BEST) if some.any() else t10.new_zeros(())


def wrong_posterior(positive: Tensor, q: Tensor, t01: Tensor, t10: Tensor) -> Tensor:
    """The formulas of :func:`wrong_probability`, element by element; `positive` is where given labels are 1."""
    q = q.clamp(1e-7, 1 - 1e-7)  # 1 would be sure whatever the rates
    of_wrong = torch.where(positive, (1 - q) * t01, q * t10)
    of_right = torch.where(positive, q * (1 - t10), (1 - q) * (1 - t01))
    return of_wrong / (of_wrong + of_right).clamp(min=1e-12)


def _by_frequency(t01: Tensor, v: Tensor, n: Tensor) -> Tensor:
    """T01 of each class by its frequency v: as v^b, b from 0 (as of flips) to 1 (a share of the positive labels)."""
    some = (t01 > 0) & (v > 0)
    weight = n * some / (n * some).sum().clamp(min=1)
    x, y = (torch.where(some, value, 1.0).log() for value in (v, t01))
    at, mean = (weight * x).sum(), (weight * y).sum()
    slope = (weight * (x - at) * (y - mean)).sum() / (weight * (x - at) ** 2).sum().clamp(min=1e-12)
    return (mean + slope.clamp(0, 1) * (x - at)).exp()


def _anchor_counts(logits: Tensor, labels: Tensor) -> list[float]:
    """v; and the number of one class's anchors, and of labels that disagree: at the top, in the surest quarter
    of these, in the lower half, in the lowest tenth."""
    known = labels >= 0
    given = labels[known][logits[known].argsort(descending=True, stable=True)] == 1
    n, num_known = int(given.sum()), len(given)
    tops = [~given[: max(int(share * n), min(n, _LEAST))] for share in (_TOP, _TOP / 4)]
    bottoms = [given[num_known // 2 :], given[num_known - num_known // 10 :]]
    counts = [(max(len(part), 1), int(part.sum())) for part in (*tops, *bottoms)]
    return [n / max(num_known, 1), *(value for pair in counts for value in pair)]


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
