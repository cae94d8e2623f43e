"""The audit of any data set by any trained classifier, without our training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from hf_balancemix.audit.label_audit import LabelAudit, make_audit, references
from hf_balancemix.core.balance_mix import SUSPICIOUS, SuspiciousLabels
from hf_balancemix.core.judge import JudgedClasses, judge_in_blocks
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import LossMixtures
from hf_balancemix.core.noise_rates import (
    NoiseRates,
    anchor_counts,
    rates_of_anchors,
    transition_rates,
    wrong_by_rates,
)
from hf_balancemix.data.images import MAX_IMAGE_PIXELS
from hf_balancemix.data.labels import class_names, sparse_labels
from hf_balancemix.models.features import pooled_features_of
from hf_balancemix.models.thresholds import iter_outputs, iter_probabilities

_VALUES_AT_ONCE = 1 << 24  # beside the predictions of all labels, in float64


def audit_labels(
    model: nn.Module,
    dataset: datasets.Dataset,
    processor: object | None = None,
    *,
    folds: int | None = None,
    batch_size: int = 32,
    on_bad_image: str = "error",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    seed: int = 0,
) -> LabelAudit:
    """Which labels of a data set are probably wrong, as a trained classifier sees them, in one pass over the images.

    Args:
        model: An image classifier of transformers (or timm, wrapped by it). Without `folds`, one for several labels an
            image, with the classes of the data set; best one that was not trained on these labels, as a model has
            learned some wrong ones by heart.
        dataset: With `image`, `labels` and, if rows are to be named by more than their number, `image_id`.
        processor: The model's image processor.
        folds: At least 2: instead of the model's own predictions, those of linear heads on the pooled features of its
            backbone, trained on the other folds (:func:`~hf_balancemix.core.judge_labels`). The backbone should not
            have been trained on these labels, and the classes of the model need not be those of the data set.
        batch_size: Images at a time.
        on_bad_image: `"error"`, or `"skip"`: labels of an image that cannot be decoded are not suspicious.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`.
        seed: Of the folds.

    Returns:
        The audit. `epochs_distrusted` is 0; `prediction` is what the labels were judged by.

    Raises:
        ValueError: The model has other classes, has softmax outputs, or no pooled features (`folds`); an image cannot
            be decoded; `folds` is no number of folds.
        FileNotFoundError: An image is gone.
    """
    names, labels = class_names(dataset), sparse_labels(dataset)
    references(dataset, np.arange(0))  # whether its ids will do, not only once the model has run
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "on_bad_image": on_bad_image,
        "max_image_pixels": max_image_pixels,
    }
    found: list[list[Tensor]] = []

    def take(some: slice, of_some: JudgedClasses) -> None:
        q = of_some.probability.double().masked_fill(bad[:, None], torch.nan)
        t01, t10 = transition_rates(labels, of_some.rates)
        scores = wrong_by_rates(of_some.labels, q, t01[some], t10)
        place = instance, column = (scores >= SUSPICIOUS).nonzero(as_tuple=True)
        found.append([instance, column + some.start, scores[place], q[place].float(), of_some.p_clean[place]])

    if folds is None:
        q = torch.full(labels.shape, torch.nan, dtype=torch.float64)
        order = _order_of_classes(model, names)
        for indices, probabilities in iter_probabilities(model, dataset, processor, **options):
            q[indices] = probabilities[:, order]
        bad = torch.zeros(len(q), dtype=torch.bool)
        rates, mixtures, histogram = _judge_by(q, labels, take)
    else:
        num_instances = labels.shape[0]
        if not isinstance(folds, int) or not 2 <= folds <= num_instances:
            required = f"it must be a whole number in [2, {num_instances}], up to one for each image; 5 is usual"
            raise ValueError(f"folds is {folds!r}; {required}.")
        features = _features(model, dataset, processor, **options)
        bad = ~features.isfinite().all(1)
        rates, mixtures, histogram = judge_in_blocks(features, labels, take, num_folds=folds, seed=seed)
    instance, label_class, scores, prediction, p_clean = (torch.cat(parts) for parts in zip(*found, strict=True))
    epochs = torch.zeros(len(instance), dtype=torch.int32)
    suspicious = SuspiciousLabels(instance, label_class, scores, prediction, p_clean, epochs)
    return make_audit(dataset, names, labels, suspicious, rates, histogram.coarse_counts, mixtures)


def _judge_by(
    q: Tensor, labels: csr_array, take: Callable[[slice, JudgedClasses], object]
) -> tuple[NoiseRates, LossMixtures, LossHistogram]:
    """As :func:`~hf_balancemix.core.judge.judge_in_blocks`, by `(N, K)` float64 predictions; NaN: there are none."""
    num_instances, num_classes = labels.shape
    width, columns = max(1, _VALUES_AT_ONCE // num_instances), labels.tocsc()
    blocks = [slice(first, min(first + width, num_classes)) for first in range(0, num_classes, width)]
    histogram, anchors = LossHistogram(num_classes), []

    def of(some: slice) -> tuple[Tensor, Tensor, Tensor]:
        given = torch.from_numpy(columns[:, some].toarray(order="C"))
        known = q[:, some].isfinite() & (given >= 0)
        return given, known, torch.logit(q[:, some].nan_to_num(0.5), 1e-7)

    for some in blocks:
        given, known, logits = of(some)
        histogram.cells[:, some] = LossHistogram.of_labels(logits, given == 1, known).cells
        anchors.append(anchor_counts(logits, given.masked_fill(~known, -1)))
    rates, mixtures = rates_of_anchors(torch.cat(anchors)), LossMixtures.fit_histogram(histogram, "dividemix")
    for some in blocks:
        given, _, logits = of(some)
        losses = label_losses(logits, given == 1)
        p_clean = mixtures.of_classes(some).clean_probability(losses, given == 1, monotone=True)
        take(some, JudgedClasses(given, p_clean, q[:, some], rates))
    return rates, mixtures, histogram


def _order_of_classes(model: nn.Module, names: list[str]) -> list[int]:
    """For each class of the data set its place in the model's outputs."""
    config: Any = model.config
    theirs = [config.id2label[k] for k in range(config.num_labels)]
    if sorted(theirs) != sorted(names):
        absent = sorted(set(names) - set(theirs))[:3] or sorted(set(theirs) - set(names))[:3]
        raise ValueError(
            f"the model has {len(theirs)} classes and the data set {len(names)}, and not both have "
            f"{', '.join(map(repr, absent))}; they must have the same; pass a model of these classes, or folds=5, "
            "which needs a backbone only."
        )
    return [theirs.index(name) for name in names]


def _features(model: nn.Module, dataset: datasets.Dataset, processor: object | None, **options: Any) -> Tensor:
    """`(N, D)` float32 pooled features; NaN for images that were left out."""
    pooled = pooled_features_of(model)
    if pooled is None:
        raise ValueError(
            f"{type(model).__name__} has no linear classifier, by whose inputs labels could be judged; it must have "
            "one with folds; pass another model, or leave out folds."
        )
    batches = list(iter_outputs(model, lambda pixels: pooled(pixels).float(), dataset, processor, **options))
    width = batches[0][1].shape[1] if batches else 1
    features = torch.full((len(dataset), width), torch.nan)
    for indices, values in batches:
        features[indices] = values
    return features
