"""One threshold a class: found on held-out data, kept in the config, used wherever labels are wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from hf_balancemix.core.evaluation import evaluation_mode
from hf_balancemix.data.images import MAX_IMAGE_PIXELS, bad_images, decode
from hf_balancemix.data.labels import class_names, given_labels, has_class_names, label_matrix
from hf_balancemix.data.views import undecoded_images

logger = logging.getLogger(__name__)

DEFAULT = 0.5
NEVER = 1.0  # labels are predicted where the probability is above, and none is above 1


def best_thresholds(
    probabilities: np.ndarray, targets: np.ndarray, min_precision: float | None = None
) -> list[float | None]:
    """The best threshold of each class, as :func:`tune_thresholds` says; None for a class without positives.

    A threshold lies half-way between two probabilities that occur, so that it does not hang on the last bit of one.

    Args:
        probabilities: `(N, K)` in [0, 1].
        targets: `(N, K)`: 1 positive, 0 negative, -1 unknown (left out).
    """
    thresholds: list[float | None] = []
    for p, y in zip(np.asarray(probabilities, np.float64).T, np.asarray(targets).T, strict=True):
        p, y = p[y >= 0], y[y >= 0]
        if not (y == 1).any():
            thresholds.append(None)
            continue
        # Cut j predicts all instances from the j-th lowest probability on; the curve ends with a point without a cut.
        precision, recall, values = precision_recall_curve(y == 1, p)
        precision, recall = precision[:-1], recall[:-1]
        if min_precision is None:
            f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
            good = np.flatnonzero(f1 >= f1.max() * (1 - 1e-14))[-1:]  # equal F1 differ by a rounding error
        else:
            good = np.flatnonzero(precision >= min_precision)[:1]
        lower = np.concatenate(([0.0], values[:-1]))
        middle = (lower + values) / 2
        cuts = np.where(middle < values, middle, lower)  # between neighbouring floats there is none
        thresholds.append(float(cuts[good[0]]) if len(good) else NEVER)
    return thresholds


def tune_thresholds(
    logits_or_model: np.ndarray | Tensor | nn.Module,
    dataset: datasets.Dataset,
    *,
    processor: Any | None = None,
    min_precision: float | None = None,
    batch_size: int = 32,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> list[float]:
    """Thresholds that suit a data set which was not trained on; a model keeps them as `config.thresholds`.

    Args:
        logits_or_model: A model, or its logits `(N, K)` on `dataset`, such as `trainer.predict(dataset).predictions`.
        dataset: With `labels`, and for a model `image`. Noisy labels would give thresholds that repeat the noise.
        processor: The model's image processor.
        min_precision: None maximises each class's F1 (among equals by the highest threshold); a number in (0, 1] takes
            the lowest threshold with at least that precision here, 1.0 (never predicted) where there is none.
        batch_size: Images at a time.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`.

    Returns:
        K thresholds in [0, 1]; a label is predicted where its probability is above. 0.5, with a warning, for classes
        without a positive in `dataset`.

    Raises:
        ValueError: Bad `min_precision`, logits of another shape or not finite, other classes, or no processor.
    """
    if min_precision is not None and not 0 < min_precision <= 1:
        raise ValueError(
            f"min_precision is {min_precision}; it must be above 0 and at most 1; leave it out to maximise F1."
        )
    names, targets = class_names(dataset), given_labels(dataset).numpy()
    if "clean_labels" in dataset.column_names and not np.array_equal(
        targets, label_matrix(dataset, "clean_labels").numpy()
    ):
        logger.warning("the data set's labels are noisy (they differ from clean_labels), and thresholds follow them.")
    if isinstance(logits_or_model, nn.Module):
        config = logits_or_model.config
        own = [config.id2label[k] for k in range(config.num_labels)]
        if own != names and (has_class_names(dataset) or len(own) != len(names)):
            raise ValueError(
                f"the model's classes are {', '.join(own[:3])}, ...; they must be the data set's, "
                f"{', '.join(names[:3])}, ...; use the data set that belongs to the model."
            )
        options = {"batch_size": batch_size, "max_image_pixels": max_image_pixels}
        probabilities = predict_probabilities(logits_or_model, dataset, processor, **options)
    else:
        logits = torch.as_tensor(logits_or_model)
        if tuple(logits.shape) != targets.shape or not torch.isfinite(logits).all():
            raise ValueError(
                f"logits are {' x '.join(map(str, logits.shape))} values, {int((~torch.isfinite(logits)).sum())} of "
                f"them not finite; they must be {targets.shape[0]} x {targets.shape[1]} finite values, a row an "
                "instance; pass trainer.predict(dataset).predictions."
            )
        probabilities = logits.double().sigmoid()
    found = best_thresholds(probabilities.numpy(), targets, min_precision)
    empty = [name for name, threshold in zip(names, found, strict=True) if threshold is None]
    never = [name for name, threshold in zip(names, found, strict=True) if threshold == NEVER]
    told = {
        f"no positive label of %d classes (%s) to tune on; their threshold is {DEFAULT}.": empty,
        f"no threshold gives %d classes (%s) a precision of {min_precision}; they will never be predicted.": never,
    }
    for message, classes in told.items():
        if classes:
            logger.warning(message, len(classes), ", ".join(classes[:5]))
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
            f"config.thresholds is {str(thresholds)[:80]}; it must be {len(names)} numbers in [0, 1], one a class; "
            "run tune_thresholds again or set it to None."
        )
    return dict(zip(names, map(float, thresholds), strict=True))


def iter_probabilities(
    model: nn.Module,
    images: datasets.Dataset | Iterable[Any],
    processor: Any | None,
    *,
    batch_size: int = 32,
    on_bad_image: str = "error",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[tuple[list[int], Tensor]]:
    """Sigmoid probabilities of one batch of images after the other.

    Args:
        model: Any multi-label image classifier of transformers. It runs in evaluation mode, and stays as it was.
        images: A data set with `image`, or paths, bytes or PIL images.
        processor: The model's image processor.
        batch_size: Images at a time.
        on_bad_image: `"error"`, or `"skip"` to leave out images that are absent or cannot be decoded, with a warning.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`, which also says what is a bad image.

    Yields:
        `(indices, probabilities)`: the places in `images` of a batch's images, and `(len(indices), K)` float64 in
        [0, 1] on the CPU.

    Raises:
        ValueError: No processor, a model with softmax outputs, or an image that cannot be decoded.
        FileNotFoundError: An image is gone.
    """
    if model.config.problem_type != "multi_label_classification":
        raise ValueError(
            f"the model's problem_type is {model.config.problem_type!r}, whose outputs are no independent "
            "probabilities; it must be 'multi_label_classification'; use a model trained by this package."
        )

    def probabilities(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).logits.double().sigmoid()

    options: dict[str, Any] = {"on_bad_image": on_bad_image, "max_image_pixels": max_image_pixels}
    yield from iter_outputs(model, probabilities, images, processor, batch_size=batch_size, **options)


def iter_outputs(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    images: datasets.Dataset | Iterable[Any],
    processor: Any | None,
    *,
    batch_size: int,
    on_bad_image: str,
    max_image_pixels: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """As :func:`iter_probabilities`, of what `forward` makes of a batch of `pixel_values`, on the CPU."""
    if processor is None:
        raise ValueError(
            "processor is None; it must be the model's image processor; load it by AutoImageProcessor.from_pretrained."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more; 32 is usual.")
    images = undecoded_images(images)["image"] if isinstance(images, datasets.Dataset) else list(images)
    parameter, bad = next(model.parameters()), []
    for start in tqdm(range(0, len(images), batch_size), desc="Predicting", disable=len(images) <= batch_size):
        batch = {}
        for index in range(start, min(start + batch_size, len(images))):
            try:
                batch[index] = decode(images[index], max_image_pixels=max_image_pixels)
            except (ValueError, FileNotFoundError):
                if on_bad_image != "skip":
                    raise
                bad.append(index)
        if not batch:
            continue
        pixels = processor(list(batch.values()), return_tensors="pt")["pixel_values"]
        with torch.no_grad(), evaluation_mode(model):
            output = forward(pixels.to(parameter.device, parameter.dtype))
        yield list(batch), output.cpu()
    if bad:
        logger.warning("%s; they are left out.", bad_images(bad, images))


def predict_probabilities(
    model: nn.Module,
    images: datasets.Dataset | Iterable[Any],
    processor: Any | None,
    *,
    batch_size: int = 32,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Tensor:
    """Sigmoid probabilities `(N, K)`, float64, of all images; see :func:`iter_probabilities`."""
    options = {"batch_size": batch_size, "max_image_pixels": max_image_pixels}
    batches = iter_probabilities(model, images, processor, **options)
    none = torch.zeros(0, model.config.num_labels, dtype=torch.float64)
    return torch.cat([none, *(probabilities for _, probabilities in batches)])


def predict_labels(
    model: nn.Module, images: datasets.Dataset | Iterable[Any], processor: Any | None, **options: Any
) -> list[list[str]]:
    """The names of each image's labels, those above the thresholds of `model.config`, the most probable first.

    Arguments (`options`, too) and errors are those of :func:`predict_probabilities` and :func:`class_thresholds`.
    """
    thresholds = class_thresholds(model.config)
    rows = predict_probabilities(model, images, processor, **options).tolist()
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
            f"outputs are scores of {len(scores)} labels, and the model has {len(thresholds)} classes; call the "
            f"pipeline with top_k={len(thresholds)} and pass the config of its model."
        )
    return _above(scores, thresholds)


def _above(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    return sorted((name for name in scores if scores[name] > thresholds[name]), key=lambda name: -scores[name])
