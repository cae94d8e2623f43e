"""The audit of any data set by any trained classifier, without our training."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from hf_balancemix.audit.label_audit import LabelAudit, make_audit, references
from hf_balancemix.core.balance_mix import SUSPICIOUS, SuspiciousLabels
from hf_balancemix.core.judge import judge_labels
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import LossMixtures
from hf_balancemix.core.noise_rates import estimate_noise_rates, wrong_probability
from hf_balancemix.data.images import MAX_IMAGE_PIXELS
from hf_balancemix.data.labels import class_names, given_labels
from hf_balancemix.models.features import pooled_features_of
from hf_balancemix.models.thresholds import iter_outputs, iter_probabilities


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
    names, labels = class_names(dataset), given_labels(dataset).cpu()
    references(dataset, np.arange(0))  # whether its ids will do, not only once the model has run
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "on_bad_image": on_bad_image,
        "max_image_pixels": max_image_pixels,
    }
    if folds is None:
        q = torch.full(labels.shape, torch.nan, dtype=torch.float64)
        order = _order_of_classes(model, names)
        for indices, probabilities in iter_probabilities(model, dataset, processor, **options):
            q[indices] = probabilities[:, order]
        known = q.isfinite() & (labels >= 0)
        logits, positive = torch.logit(q.nan_to_num(0.5), 1e-7), labels == 1
        losses, histogram = label_losses(logits, positive), LossHistogram(len(names))
        histogram.update(losses.masked_fill(~known, torch.nan), positive)
        mixtures = LossMixtures.fit_histogram(histogram, "dividemix")
        p_clean = mixtures.clean_probability(losses, positive, monotone=True)
        rates = estimate_noise_rates(logits, labels.masked_fill(~known, -1))
    else:
        if not isinstance(folds, int) or not 2 <= folds <= len(labels):
            required = f"it must be a whole number in [2, {len(labels)}], up to one for each image; 5 is usual"
            raise ValueError(f"folds is {folds!r}; {required}.")
        features = _features(model, dataset, processor, **options)
        judged = judge_labels(features, labels, num_folds=folds, seed=seed)
        q, p_clean, rates = judged.probability.double(), judged.p_clean, judged.rates
        histogram, mixtures = judged.loss_histogram, judged.mixtures
        q[~features.isfinite().all(1)] = torch.nan
    scores = wrong_probability(labels, q, rates)
    place = instance, label_class = (scores >= SUSPICIOUS).nonzero(as_tuple=True)
    epochs = torch.zeros(len(instance), dtype=torch.int32)
    suspicious = SuspiciousLabels(instance, label_class, scores[place], q[place].float(), p_clean[place], epochs)
    return make_audit(dataset, names, labels, suspicious, rates, histogram.coarse_counts, mixtures)


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
