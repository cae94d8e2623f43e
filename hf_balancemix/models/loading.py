"""Any backbone with K multi-label outputs: from a folder, from the Hub, or from timm by name and a weights file."""

from __future__ import annotations

import difflib
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_balancemix.models.processing import squash_processor

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str,
    class_names: Sequence[str],
    *,
    image_size: int | None = None,
    backbone_weights: str | Path | None = None,
    pretrained: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A multi-label image classifier and the processor that squashes its images.

    Args:
        name_or_path: A folder saved by `save_pretrained`, a Hub name (`microsoft/resnet-50`, `timm/resnet50.tv_in1k`),
            or, with `backbone_weights` or `pretrained=False`, a timm architecture (`resnet50`, or with the
            normalisation of certain weights `resnet50.tv_in1k`).
        class_names: Names of the K classes.
        image_size: Side of the squash in pixels; by default what the model was made for. A timm transformer is resized
            to it (its position embedding is interpolated).
        backbone_weights: A `.safetensors`, `.pth` or `.pt` file with the timm backbone's state dict. Weights of
            another number of classes are left out; any other mismatch is an error.
        pretrained: False draws the weights anew.
        model_kwargs: Arguments of `timm.create_model`, for timm architectures.

    Returns:
        `(model, processor)`; the model is float32, with `problem_type="multi_label_classification"`.

    Raises:
        FileNotFoundError: `backbone_weights` does not exist, or there is no such folder or Hub name (or no network).
        ValueError: There is no such architecture, the weights do not belong to it, it does not take images of
            `image_size`, or class names are absent or repeated.
    """
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(f"class_names holds {len(class_names)} names; one or more, all different, are needed.")
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "num_labels": len(class_names),
        "problem_type": "multi_label_classification",
    }
    if backbone_weights is None and pretrained:
        if model_kwargs:
            raise ValueError(
                f"model_kwargs is {model_kwargs}, but {name_or_path} brings its own config; model_kwargs go with "
                "backbone_weights or pretrained=False."
            )
        model, processor = _from_pretrained(name_or_path, labels)
    else:
        model, processor = _from_timm(name_or_path, labels, backbone_weights, model_kwargs or {}, image_size)
    config = model.config
    # TimmWrapper keeps a checkpoint's own names, and would save those under `label_names`.
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    if hasattr(config, "label_names"):
        config.label_names = list(class_names)
    if image_size is None and processor is None:
        image_size = getattr(config, "image_size", None)
    processor = squash_processor(processor, image_size)
    _fit_image_size(model, processor.size["height"])
    return model, processor


def _from_pretrained(name_or_path: str, labels: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    try:
        stored = AutoConfig.from_pretrained(name_or_path)
        model, info = AutoModelForImageClassification.from_pretrained(
            name_or_path, **labels, ignore_mismatched_sizes=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"cannot load the model {name_or_path!r} ({str(error).splitlines()[0]}). Pass a folder that "
            "save_pretrained wrote or, with a network, a Hub name; offline also a timm architecture with "
            "backbone_weights (--backbone_weights FILE) or pretrained=False (--from_scratch)."
        ) from error
    # Loaded tensors lie unaligned in the mapped file: results would differ in the last bit from those of the model
    # that was saved, and saving to the same folder would write over them.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    # Anything but a head of another K would stay random without notice.
    k = labels["num_labels"]
    bad = [name for name, old, new in info["mismatched_keys"] if new[0] != k or old[1:] != new[1:]]
    if bad:
        raise ValueError(
            f"{name_or_path}: {len(bad)} tensors of its weights do not fit its config ({', '.join(sorted(bad)[:3])}). "
            "Pass a folder whose config.json and weights belong together."
        )
    same_head = stored.num_labels == k and not info["missing_keys"]
    if same_head and [stored.id2label[i] for i in range(k)] != list(labels["label2id"]):
        logger.warning(
            "%s was trained for %d classes with other names or in another order (%s, ...); its head is kept, as a "
            "start for %s, ...",
            name_or_path, k, stored.id2label[0], labels["id2label"][0],
        )  # fmt: skip
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):
        processor = _timm_defaults(model) if isinstance(model, TimmWrapperForImageClassification) else None
        logger.warning("%s has no image processor; normalising as its architecture or ImageNet does.", name_or_path)
    return model, processor


def _from_timm(
    name: str, labels: dict[str, Any], weights: str | Path | None, model_kwargs: dict[str, Any], size: int | None
) -> tuple[PreTrainedModel, Any]:
    architecture = name.removeprefix("timm/")  # with its tag, which says how images are normalised
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no architecture {architecture!r}, and with backbone_weights or from scratch one is needed"
            + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models().")
        )
    try:
        if weights is None and size is not None and timm.get_pretrained_cfg(architecture).fixed_input_size:
            model_kwargs = {"img_size": size} | model_kwargs
        config = TimmWrapperConfig(architecture=architecture, model_args=dict(model_kwargs), **labels)
        model = AutoModelForImageClassification.from_config(config)
        # TimmWrapper draws every weight anew with standard deviation 0.02, which trains far worse than timm's own.
        drawn = timm.create_model(architecture, num_classes=labels["num_labels"], **model_kwargs)
        model.timm_model.load_state_dict(drawn.state_dict())
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = f" with {model_kwargs}" if model_kwargs else ""
        raise ValueError(f"timm cannot build {architecture}{given}: {error}") from error
    if weights is not None:
        _load_backbone(model.timm_model, Path(weights), architecture)
    return model, _timm_defaults(model)


class _TimmDefaults:
    def __init__(self, data_config: dict[str, Any]) -> None:
        self.data_config = data_config


def _timm_defaults(model: PreTrainedModel) -> _TimmDefaults:
    return _TimmDefaults(dict(model.timm_model.pretrained_cfg))


def _load_backbone(model: torch.nn.Module, file: Path, architecture: str) -> None:
    state = _read_state(file)
    own = model.state_dict()
    head = tuple(name + "." for name in _classifier_names(model))
    state = {
        name: value
        for name, value in state.items()
        if not (name.startswith(head) and name in own and own[name].shape != value.shape)
    }
    bad = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    # Converted and old files have no counters of batches, which matter only for batch norm without momentum.
    absent = [
        name for name in own if name not in state and not name.startswith(head) and "num_batches_tracked" not in name
    ]
    if bad or absent:
        raise ValueError(
            f"{file} does not hold the weights of {architecture}: {len(absent)} of its tensors are absent "
            f"({', '.join(absent[:3])}) and {len(bad)} do not fit ({', '.join(bad[:3])}). Pass the matching file."
        )
    model.load_state_dict(state, strict=False)
    logger.info("Loaded %d tensors of %s from %s.", len(state), architecture, file)


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"backbone weights {file} do not exist; pass the file of a state dict.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"backbone weights {file} cannot be read ({type(error).__name__}); they must be a state dict, saved as "
            ".safetensors or by torch.save without other objects. Copy the file again or convert it."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"backbone weights {file} hold no state dict; needed is a dict of tensors by name, bare or under "
            "'state_dict'. Save model.state_dict()."
        )
    return state


def _classifier_names(model: torch.nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fit_image_size(model: PreTrainedModel, size: int) -> None:
    """Let the model take S x S images, or say before training starts that it does not."""
    if isinstance(model, TimmWrapperForImageClassification):
        _resize_timm(model, size)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, size, size))
    except (ValueError, RuntimeError, AssertionError) as error:
        own = getattr(model.config, "image_size", None)
        hint = f"{own}, its own" if own else "the size that it was made for"
        raise ValueError(
            f"the model takes no images of {size} x {size} pixels ({error}); set image_size to {hint}."
        ) from error
    finally:
        model.train(training)


def _resize_timm(model: TimmWrapperForImageClassification, size: int) -> None:
    config, timm_model = model.config, model.timm_model
    native = timm_model.pretrained_cfg["input_size"][-1]
    current = (config.model_args or {}).get("img_size", native)
    if size == current or not timm_model.pretrained_cfg.get("fixed_input_size"):
        return
    timm_model.set_input_size(img_size=(size, size))
    config.model_args = (config.model_args or {}) | {"img_size": size}
    with torch.device("meta"):  # what from_pretrained will build from the config
        rebuilt = timm.create_model(config.architecture, num_classes=config.num_labels, **config.model_args)
    shapes = {name: value.shape for name, value in timm_model.state_dict().items()}
    if shapes != {name: value.shape for name, value in rebuilt.state_dict().items()}:
        raise ValueError(
            f"{config.architecture} cannot be resized from {current} to {size}; set image_size={current}."
        )
