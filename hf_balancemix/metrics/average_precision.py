"""Multi-label figures of an evaluation: mAP over all, many-, medium- and few-shot classes, CF1 and OF1.

Everything here is a pure function of arrays in memory. `N` is the number of instances, `K` the number of classes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

logger = logging.getLogger(__name__)


def class_groups(class_counts: ArrayLike, many: int = 10_000, few: int = 1_000) -> dict[str, np.ndarray]:
    """Splits the classes into many-, medium- and few-shot by their number of positive training labels.

    The paper counts the clean training labels; both bounds themselves are medium-shot.

    Args:
        class_counts: `(K,)` number of positive labels of each class, at least 0.
        many, few: a class with more positive labels than `many` is many-shot, with fewer than `few` few-shot; `few` is
            at most `many`.

    Returns:
        `{"many", "medium", "few"}`, each a boolean `(K,)` mask. Every class is in exactly one of them.

    Raises:
        ValueError: for counts that are not one finite number of at least 0 a class, or `few` above `many`.

    Example:
        >>> {name: mask.tolist() for name, mask in class_groups([45_174, 1_000, 135]).items()}
        {'many': [True, False, False], 'medium': [False, True, False], 'few': [False, False, True]}
    """
    if few > many:
        raise ValueError(f"few is {few} and many is {many}; few must be at most many; swap the two bounds.")
    counts = _to_numpy(class_counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iuf" or not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError(
            f"class_counts is {np.array2string(counts, threshold=6)} of shape {counts.shape}; it must be one number a "
            "class, shape (K,), none negative or non-finite; pass the column sums of the clean training labels."
        )
    is_many, is_few = counts > many, counts < few
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


def shot_bounds(
    class_counts: ArrayLike, many: int | None = None, few: int | None = None, *, of_paper: bool = False
) -> tuple[int, int] | None:
    """The bounds of :func:`class_groups` for a data set: those that are given, or by its class counts.

    Of the classes with positive labels, in the order of their counts, a third is rarer and a third commoner than the
    bounds, fewer where counts are equal: `few` is the count that K // 3 classes precede, `many` the count that K // 3
    classes follow.

    Args:
        class_counts: As for `class_groups`.
        many, few: The bounds that are wanted; where one is, the other goes by the counts.
        of_paper: The data set is one of the paper's, whose bounds are 10,000 and 1,000. They do not hold for a part of
            it that is so small that they would put all its classes into one group.

    Returns:
        `many` and `few`; None where the counts leave all classes in one group: fewer than three, or equal counts.

    Raises:
        ValueError: As `class_groups`.

    Example:
        >>> shot_bounds([590, 400, 300, 200, 120, 90]), shot_bounds([50, 50, 50])
        ((300, 200), None)
    """
    if many is not None and few is not None:
        return many, few
    counts = _to_numpy(class_counts)
    if of_paper and many is few is None and sum(group.any() for group in class_groups(counts).values()) > 1:
        return 10_000, 1_000
    ordered = np.sort(counts[counts > 0])
    third = len(ordered) // 3
    rare, common = (int(ordered[third]), int(ordered[-1 - third])) if len(ordered) else (0, 0)
    if many is not None:
        return many, min(rare, many)
    if few is not None:
        return max(common, few), few
    groups = class_groups(counts, common, rare)
    return (common, rare) if (groups["many"] | groups["few"]).any() else None


def mean_average_precision(
    scores: ArrayLike,
    labels: ArrayLike,
    class_counts: ArrayLike | None = None,
    many: int = 10_000,
    few: int = 1_000,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Mean over classes of scikit-learn's average precision, also by class group.

    The average precision does not interpolate and treats equal scores as one threshold, so it does not depend on the
    order of the instances. Classes without positive labels have no average precision: they are skipped in every mean,
    named in the result, and named once in the log.

    Args:
        scores: `(N, K)` logits or probabilities, as any real type, numpy array or tensor on any device. Only their
            order within a class matters. Prefer logits of a float32 head: a sigmoid saturates, half precision has few
            bits, and both make ties. Infinite scores are ranked first or last.
        labels: `(N, K)` labels, 0 or 1; -1 where unknown, which no figure counts.
        class_counts: `(K,)` positive labels of each class in the clean training set; gives the group figures.
        many, few: see `class_groups`.
        class_names: `(K,)` names to use in `skipped` instead of indices.

    Returns:
        Dictionary of `mAP` (a fraction in [0, 1]); with `class_counts` also `mAP_many`, `mAP_medium`, `mAP_few`, where
        any of the four is None if its group holds no class with a positive label; `per_class_ap`, float64 `(K,)` with
        NaN for skipped classes; `skipped`, the skipped classes in order.

    Raises:
        ValueError: for shapes that do not fit together, labels other than 0, 1 and -1, or NaN scores.

    Example:
        >>> scores = [[0.9, 0.2, 0.1], [0.8, 0.7, 0.4], [0.3, 0.1, 0.2]]
        >>> result = mean_average_precision(scores, [[1, 0, 0], [0, 1, 0], [1, 0, 0]])
        >>> round(result["mAP"], 4), result["per_class_ap"].round(4).tolist(), result["skipped"]
        (0.9167, [0.8333, 1.0, nan], [2])
    """
    scores, labels = _checked(scores, "scores", labels)
    means, per_class_ap, skipped = _average_precision(scores, labels, class_counts, many, few, class_names)
    return means | {"per_class_ap": per_class_ap, "skipped": skipped}


def precision_recall_f1(probabilities: ArrayLike, labels: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """Per-class (C) and overall (O) precision, recall and F1 of thresholded predictions.

    The convention of the multi-label literature: CP and CR are means over all K classes, a class without positive
    labels or without positive predictions counting as 0 (unlike in mAP, such a class is not left out); CF1 is the
    harmonic mean of CP and CR, which is not the mean of the classes' F1. OP, OR and OF1 pool all labels.

    Args:
        probabilities: `(N, K)` sigmoid outputs in [0, 1].
        labels: `(N, K)` labels, 0 or 1; -1 where unknown, which no figure counts.
        threshold: a label is predicted positive if its probability is above this.

    Returns:
        Dictionary of fractions `CP`, `CR`, `CF1`, `OP`, `OR`, `OF1`; 0 divided by 0 is 0.

    Raises:
        ValueError: for shapes that do not fit together, labels other than 0, 1 and -1, or values outside [0, 1].

    Example:
        >>> figures = precision_recall_f1([[0.9, 0.6], [0.8, 0.1]], [[1, 1], [0, 0]])
        >>> {name: round(value, 3) for name, value in figures.items()}
        {'CP': 0.75, 'CR': 1.0, 'CF1': 0.857, 'OP': 0.667, 'OR': 1.0, 'OF1': 0.8}
    """
    probabilities, labels = _checked(probabilities, "probabilities", labels)
    if probabilities.size and (probabilities.min() < 0 or probabilities.max() > 1):
        raise ValueError(
            f"probabilities is between {probabilities.min():.4g} and {probabilities.max():.4g}; it must be in [0, 1]; "
            "apply a sigmoid to logits first."
        )
    return _precision_recall_f1(_right_predicted_positive(probabilities, labels, threshold))


def evaluation_figures(
    logits: ArrayLike,
    labels: ArrayLike,
    class_counts: ArrayLike | None = None,
    many: int = 10_000,
    few: int = 1_000,
    threshold: float = 0.5,
    class_names: Sequence[str] | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """All figures of one evaluation; the average precision of each class is computed once.

    mAP is taken on the logits themselves, CF1 and OF1 on their float32 sigmoid. The arguments and errors are those of
    `mean_average_precision`, and `threshold` that of `precision_recall_f1`.

    Returns:
        The means, `mAP`, `mAP_many`, `mAP_medium`, `mAP_few`, `CF1`, `OF1`, as Python floats in [0, 1], of which one
        over no class is left out; and each class's average precision, float64 `(K,)`, NaN where it has no positive
        label.

    Example:
        >>> evaluation_figures([[2.0, -1.0], [-2.0, 3.0]], [[1, 0], [0, 0]], class_counts=[20_000, 500])
        ({'mAP': 1.0, 'mAP_many': 1.0, 'CF1': 0.5, 'OF1': 0.6666666666666666}, array([ 1., nan]))
    """
    logits, labels = _checked(logits, "logits", labels)
    means, per_class_ap, _ = _average_precision(logits, labels, class_counts, many, few, class_names)
    means |= _f1_figures(_f1_counts(logits, labels, threshold))
    return {name: mean for name, mean in means.items() if mean is not None}, per_class_ap


class RunningFigures:
    """The figures of :func:`evaluation_figures` batch by batch, where N x K logits are too many to keep.

    Each class's logits are counted in 8,192 bins, equally wide in asinh(16 x logit): 0.0001 wide at a logit of 0, a
    five-hundredth of it from 1 on. The average precision is scikit-learn's of the logits rounded to their bins, so
    that logits of one bin count as equal; CF1 and OF1 are exact. Takes 64 KiB a class, whatever N.

    Args:
        num_classes: K.

    Example:
        >>> figures = RunningFigures(2)
        >>> figures.update([[2.0, -1.0]], [[1, 0]])
        >>> figures.update([[-2.0, 3.0]], [[0, 0]])
        >>> figures.compute(class_counts=[20_000, 500])
        ({'mAP': 1.0, 'mAP_many': 1.0, 'CF1': 0.5, 'OF1': 0.6666666666666666}, array([ 1., nan]))
    """

    def __init__(self, num_classes: int) -> None:
        self._counts = torch.zeros(2, num_classes, _BINS, dtype=torch.int32)  # of negative and of positive labels
        self._f1 = np.zeros((3, num_classes), dtype=np.int64)

    def update(self, logits: ArrayLike, labels: ArrayLike) -> None:
        """Add a batch: `(B, K)` logits and labels, and errors, as of :func:`evaluation_figures`."""
        logits, labels = _checked(logits, "logits", labels)
        self._f1 += _f1_counts(logits, labels, 0.5)
        place = np.asinh(16 * logits.astype(np.float64)) * _BINS_PER_UNIT + _BINS / 2
        bins = place.clip(0, _BINS - 1).astype(np.int64)
        classes = np.arange(logits.shape[1])
        cells = ((labels == 1) * len(classes) + classes) * _BINS + bins
        cells = torch.from_numpy(cells[labels >= 0])
        self._counts.view(-1).index_add_(0, cells, torch.ones(len(cells), dtype=torch.int32))

    def compute(
        self,
        class_counts: ArrayLike | None = None,
        many: int = 10_000,
        few: int = 1_000,
        class_names: Sequence[str] | None = None,
    ) -> tuple[dict[str, float], np.ndarray]:
        """What :func:`evaluation_figures` returns of all batches."""
        num_classes = self._counts.shape[1]
        ap = np.full(num_classes, np.nan)
        for k in range(num_classes):
            negative, positive = self._counts[:, k].flip(1).double().numpy()
            if total := positive.sum():
                of_all = (positive + negative).cumsum()
                ap[k] = (positive * positive.cumsum() / of_all.clip(min=1)).sum() / total
        means, _ = _means(ap, class_counts, many, few, class_names)
        means |= _f1_figures(self._f1)
        return {name: mean for name, mean in means.items() if mean is not None}, ap


_BINS, _BINS_PER_UNIT = 1 << 13, 1 << 9  # so that they end at asinh(16 x logit) = 8, a logit of 93


def _average_precision(
    scores: np.ndarray,
    labels: np.ndarray,
    class_counts: ArrayLike | None,
    many: int,
    few: int,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Any], np.ndarray, list[Any]]:
    """The means by group, the classes' average precision and the skipped classes of `mean_average_precision`."""
    per_class_ap = np.full(labels.shape[1], np.nan)
    for k in np.flatnonzero((labels == 1).any(axis=0)):
        known = labels[:, k] >= 0
        per_class_ap[k] = average_precision_score(labels[known, k], scores[known, k])
    means, skipped = _means(per_class_ap, class_counts, many, few, class_names)
    return means, per_class_ap, skipped


def _means(
    per_class_ap: np.ndarray,
    class_counts: ArrayLike | None,
    many: int,
    few: int,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Any], list[Any]]:
    """The means by group and the skipped classes of `mean_average_precision`."""
    num_classes = len(per_class_ap)
    masks = {"mAP": np.ones(num_classes, dtype=bool)}
    if class_counts is not None:
        masks |= {f"mAP_{name}": mask for name, mask in class_groups(class_counts, many, few).items()}
    for name, entries in {"class_names": class_names, "class_counts": masks.get("mAP_many")}.items():
        if entries is not None and len(entries) != num_classes:
            raise ValueError(
                f"{name} has {len(entries)} entries for {num_classes} classes; it must be one a class; pass them in "
                "the order of the label columns."
            )
    is_skipped = np.isnan(per_class_ap)
    skipped = [k if class_names is None else class_names[k] for k in np.flatnonzero(is_skipped).tolist()]
    if skipped:
        _warn_skipped(tuple(skipped), num_classes)
    scored = {name: per_class_ap[mask & ~is_skipped] for name, mask in masks.items()}
    return {name: float(ap.mean()) if ap.size else None for name, ap in scored.items()}, skipped


def _f1_counts(logits: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """As :func:`_right_predicted_positive`, of the float32 sigmoid."""
    return _right_predicted_positive(torch.from_numpy(logits).float().sigmoid().numpy(), labels, threshold)


def _f1_figures(counts: np.ndarray) -> dict[str, float]:
    figures = _precision_recall_f1(counts)
    return {name: figures[name] for name in ("CF1", "OF1")}


def _right_predicted_positive(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """`(3, K)` int64: of each class the labels predicted positive rightly, predicted positive, and positive."""
    predicted, positive = (probabilities > threshold) & (labels >= 0), labels == 1
    return np.stack([matrix.sum(axis=0) for matrix in (predicted & positive, predicted, positive)])


def _precision_recall_f1(by_class: np.ndarray) -> dict[str, float]:
    figures: dict[str, float] = {}
    for letter, counts in {"C": by_class, "O": by_class.sum(axis=1, keepdims=True)}.items():
        right, *totals = counts
        # A total of 0 has none right: 0.
        precision, recall = (float((right / np.maximum(total, 1)).mean()) for total in totals)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
        figures |= {f"{letter}P": precision, f"{letter}R": recall, f"{letter}F1": f1}
    return figures


@functools.cache
def _warn_skipped(skipped: tuple[int | str, ...], num_classes: int) -> None:
    """Logs once a process, not once an evaluation, for the same classes."""
    shown = ", ".join(str(name) for name in skipped[:10]) + (", ..." if len(skipped) > 10 else "")
    logger.warning(
        "%d of %d classes have no positive label here and are skipped in mAP: %s", len(skipped), num_classes, shown
    )


def _to_numpy(values: ArrayLike) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy knows no bfloat16
    return np.asarray(values)


def _checked(scores: ArrayLike, name: str, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """`(N, K)` float32 or float64 without NaN or infinity, and `(N, K)` int8 labels of 0, 1 and -1."""
    scores, labels = _to_numpy(scores), _to_numpy(labels)
    for what, values in {name: scores, "labels": labels}.items():
        if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind not in "biuf":
            raise ValueError(
                f"{what} is of shape {values.shape} and type {values.dtype}; it must be real numbers of shape (N, K), "
                "with at least one class; pass one row an instance and one column a class."
            )
    if scores.shape != labels.shape:
        raise ValueError(
            f"{name} is of shape {scores.shape} and labels of shape {labels.shape}; both must be of the same "
            "shape (N, K); check that both come from the same instances and classes."
        )
    is_nan = np.isnan(scores)
    if is_nan.any():
        rows, classes = int(is_nan.any(axis=1).sum()), int(is_nan.any(axis=0).sum())
        raise ValueError(
            f"{name} is NaN in {rows} of {len(scores)} rows and {classes} of {scores.shape[1]} classes; it must be "
            "numbers; the model has probably diverged, so lower the learning rate or look at the loss."
        )
    wrong = (labels != 0) & (labels != 1) & (labels != -1)
    if wrong.any():
        raise ValueError(
            f"labels has {int(wrong.sum())} values other than 0 and 1, the first {labels[wrong][0]}; each must be 0 "
            "(absent), 1 (present) or -1 (unknown); make 0 or 1 of soft labels first."
        )
    # From half precision too, in which the bound below would tie large scores.
    scores = scores.astype(np.result_type(scores.dtype, np.float32), copy=False)
    # scikit-learn takes no infinite score. Half the range keeps the difference of any two scores finite too.
    bound = np.finfo(scores.dtype).max / 2
    return scores.clip(-bound, bound), labels.astype(np.int8)
