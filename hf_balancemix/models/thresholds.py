"""One threshold a class: found on held-out data, kept in the config, used wherever labels are wanted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from hf_balancemix.data.labels import class_names, given_labels, label_matrix
from hf_balancemix.data.views import decode, undecoded_images

logger = logging.getLogger(__name__)

DEFAULT = 0.5
NEVER = 1.0  # labels are predicted where the probability is above, and none is above 1


def best_thresholds(
    probabilities: np.ndarray, targets: np.ndarray, min_precision: float | None = None
) -> list[float | None]:
    """The best threshold of each class; a label is predicted where its probability is above.

    A threshold lies half-way between two probabilities that occur, so that it does not hang on the last bit of one.

    Args:
        probabilities: `(N, K)` in [0, 1].
        targets: `(N, K)`: 1 positive, 0 negative, -1 unknown (left out).
        min_precision: None maximises F1 (among equals the highest threshold); else the lowest threshold with at least
            this precision, 1.0 (nothing is predicted) where there is none.

    Returns:
        K thresholds in [0, 1]; None for a class without positives, of which nothing can be said.
    """
    thresholds: list[float | None] = []
    for p, y in zip(np.asarray(probabilities, np.float64).T, np.asarray(targets).T, strict=True):
        p, y = p[y >= 0], y[y >= 0]
        if not (y == 1).any():
            thresholds.append(None)
            continue
        # Cut j predicts all instances from the j-th lowest probability on.
        values, place = np.unique(p, return_inverse=True)
        positives = np.bincount(place, weights=y == 1, minlength=len(values))[::-1].cumsum()[::-1]
        predicted = np.bincount(place, minlength=len(values))[::-1].cumsum()[::-1]
        if min_precision is None:
            f1 = 2 * positives / (predicted + positives[0])
            cut = len(f1) - 1 - int(f1[::-1].argmax())
        else:
            precise = np.flatnonzero(positives / predicted >= min_precision)
            cut = int(precise[0]) if len(precise) else None
        thresholds.append(NEVER if cut is None else _below(values, cut))
    return thresholds


def _below(values: np.ndarray, cut: int) -> float:
    """Half-way to the next lower value (or 0); always less than `values[cut]`, unless that is 0."""
    lower = float(values[cut - 1]) if cut else 0.0
    middle = (lower + float(values[cut])) / 2
    return middle if middle < values[cut] else lower


def tune_thresholds(
    logits_or_model: np.ndarray | Tensor | nn.Module,
    dataset: datasets.Dataset,
    *,
    processor: Any | None = None,
    min_precision: float | None = None,
    batch_size: int = 32,
) -> list[float]:
    """Thresholds that suit a data set which was not trained on; a model keeps them as `config.thresholds`.

    Args:
        logits_or_model: A model, or its logits `(N, K)` on `dataset`, such as `trainer.predict(dataset).predictions`.
        dataset: With `labels`, and for a model `image`. Noisy labels would give thresholds that repeat the noise.
        processor: The model's image processor.
        min_precision: None maximises each class's F1; a number in (0, 1] takes the lowest threshold with at least that
            precision here, 1.0 (never predicted) where no threshold has it.
        batch_size: Images at a time.

    Returns:
        K thresholds in [0, 1]; a label is predicted where its probability is above. 0.5, with a warning, for classes
        without a positive in `dataset`.

    Raises:
        ValueError: Bad `min_precision`, logits of another shape or not finite, other classes, or no processor.
    """
    if min_precision is not None and not 0 < min_precision <= 1:
        raise ValueError(
            f"min_precision is {min_precision}; it must be above 0 and at most 1, or None to maximise F1."
        )
    names, targets = class_names(dataset), given_labels(dataset).numpy()
    if "clean_labels" in dataset.column_names and not np.array_equal(
        targets, label_matrix(dataset, "clean_labels").numpy()
    ):
        logger.warning("the data set's labels are noisy (they differ from clean_labels), and thresholds follow them.")
    if isinstance(logits_or_model, nn.Module):
        config = logits_or_model.config
        own = [config.id2label[k] for k in range(config.num_labels)]
        if own != names:
            raise ValueError(
                f"the model's classes ({', '.join(own[:3])} ...) are not the data set's ({', '.join(names[:3])} ...); "
                "use the data set that belongs to the model."
            )
        probabilities = predict_probabilities(logits_or_model, dataset, processor, batch_size=batch_size)
    else:
        logits = torch.as_tensor(logits_or_model)
        if tuple(logits.shape) != targets.shape or not torch.isfinite(logits).all():
            raise ValueError(
                f"logits have the shape {tuple(logits.shape)} and {int((~torch.isfinite(logits)).sum())} values that "
                f"are not finite; needed are {targets.shape[0]} x {targets.shape[1]} finite values, a row an instance "
                "of the data set."
            )
        probabilities = logits.double().sigmoid()
    found = best_thresholds(probabilities.numpy(), targets, min_precision)
    empty = [name for name, threshold in zip(names, found, strict=True) if threshold is None]
    if empty:
        logger.warning(
            "no positive label of %d classes (%s) to tune on; their threshold is %s.",
            len(empty), ", ".join(empty[:5]), DEFAULT,
        )  # fmt: skip
    never = [name for name, threshold in zip(names, found, strict=True) if threshold == NEVER]
    if never:
        logger.warning(
            "no threshold gives %d classes (%s) a precision of %s; they will never be predicted.",
            len(never), ", ".join(never[:5]), min_precision,
        )  # fmt: skip
    thresholds = [DEFAULT if threshold is None else threshold for threshold in found]
    if isinstance(logits_or_model, nn.Module):
        logits_or_model.config.thresholds = thresholds
    return thresholds


def class_thresholds(config: PreTrainedConfig) -> dict[str, float]:
    """Threshold by class name, from a model's config; 0.5 each where it has none.

    Raises:
        ValueError: What the config holds is not one probability a class.
    """
    names = [config.id2label[k] for k in range(config.num_labels)]
    thresholds = getattr(config, "thresholds", None)
    if thresholds is None:
        return dict.fromkeys(names, DEFAULT)
    good = isinstance(thresholds, list | tuple) and len(thresholds) == len(names)
    if not good or not all(isinstance(t, int | float) and 0 <= t <= 1 for t in thresholds):
        raise ValueError(
            f"config.thresholds is {str(thresholds)[:80]}; {len(names)} numbers in [0, 1] are needed, one a class. "
            "Run tune_thresholds again or set it to None."
        )
    return dict(zip(names, map(float, thresholds), strict=True))


def predict_probabilities(
    model: nn.Module, images: datasets.Dataset | Iterable[Any], processor: Any | None, *, batch_size: int = 32
) -> Tensor:
    """Sigmoid probabilities `(N, K)`, float64, of a data set's `image` column or of paths, bytes or PIL images.

    Raises:
        ValueError: No processor, an image that cannot be decoded, or a model with softmax outputs.
    """
    if processor is None:
        raise ValueError("processor is None; pass the model's image processor (AutoImageProcessor.from_pretrained).")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
    if model.config.problem_type != "multi_label_classification":
        raise ValueError(
            f"the model's problem_type is {model.config.problem_type!r}, whose outputs are no independent "
            "probabilities; multi_label_classification is needed."
        )
    images = undecoded_images(images)["image"] if isinstance(images, datasets.Dataset) else list(images)
    parameter = next(model.parameters())
    training = [module.training for module in model.modules()]
    model.eval()
    rows = [torch.zeros(0, model.config.num_labels, dtype=torch.float64)]
    try:
        for start in tqdm(range(0, len(images), batch_size), desc="Predicting", disable=len(images) <= batch_size):
            batch = [decode(image) for image in images[start : start + batch_size]]
            pixels = processor(batch, return_tensors="pt")["pixel_values"].to(parameter.device, parameter.dtype)
            with torch.no_grad():
                rows.append(model(pixel_values=pixels).logits.double().sigmoid().cpu())
    finally:
        for module, was in zip(model.modules(), training, strict=True):
            module.training = was
    return torch.cat(rows)


def predict_labels(
    model: nn.Module, images: datasets.Dataset | Iterable[Any], processor: Any | None, *, batch_size: int = 32
) -> list[list[str]]:
    """The names of each image's labels, those above the thresholds of `model.config`, the most probable first.

    Args:
        model: Any multi-label image classifier of transformers.
        images: A data set with `image`, or paths, bytes or PIL images.
        processor: The model's image processor.
        batch_size: Images at a time.

    Raises:
        ValueError: As :func:`predict_probabilities`, or thresholds that do not belong to the classes.
    """
    thresholds = class_thresholds(model.config)
    rows = predict_probabilities(model, images, processor, batch_size=batch_size).tolist()
    return [_above(dict(zip(thresholds, row, strict=True)), thresholds) for row in rows]


def pipeline_labels(
    outputs: Sequence[Any], config: PreTrainedConfig | Mapping[str, float]
) -> list[str] | list[list[str]]:
    """Labels above the thresholds from what the image-classification pipeline gives.

        scores = pipeline("image-classification", name, top_k=model.config.num_labels)(images)
        labels = pipeline_labels(scores, model.config)

    Args:
        outputs: The pipeline's list of `{"label", "score"}` for one image, or a list of such lists.
        config: The model's config, or threshold by class name.

    Returns:
        Names, the most probable first; a list of such lists for several images.

    Raises:
        ValueError: Scores of some classes are missing (the pipeline gives five unless told `top_k`) or unknown.
    """
    thresholds = dict(config) if isinstance(config, Mapping) else class_thresholds(config)
    if not outputs or not isinstance(outputs[0], Mapping):
        return [pipeline_labels(output, thresholds) for output in outputs]
    scores = {output["label"]: output["score"] for output in outputs}
    if scores.keys() != thresholds.keys():
        raise ValueError(
            f"the pipeline gave scores of {len(scores)} labels, and the model has {len(thresholds)} classes; call the "
            f"pipeline with top_k={len(thresholds)} and pass the config of its model."
        )
    return _above(scores, thresholds)


def _above(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    return sorted((name for name in scores if scores[name] > thresholds[name]), key=lambda name: -scores[name])
