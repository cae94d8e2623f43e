"""Any backbone with K multi-label outputs: from a folder, from the Hub, or from timm by name and a weights file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig

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
            or, with `backbone_weights` or `pretrained=False`, a timm architecture (`timm/resnet50` or `resnet50`).
        class_names: Names of the K classes.
        image_size: Side of the squash in pixels; by default what the model was made for.
        backbone_weights: A `.safetensors`, `.pth` or `.pt` file with the timm backbone's state dict. Weights of
            another number of classes are left out; any other mismatch is an error.
        pretrained: False draws the weights anew.
        model_kwargs: Arguments of `timm.create_model`, for timm architectures.

    Returns:
        `(model, processor)`; the model is float32, with `problem_type="multi_label_classification"`.

    Raises:
        FileNotFoundError: `backbone_weights` does not exist.
        ValueError: The weights do not belong to the architecture.
    """
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "num_labels": len(class_names),
        "problem_type": "multi_label_classification",
    }
    if backbone_weights is None and pretrained:
        model = AutoModelForImageClassification.from_pretrained(
            name_or_path, **labels, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        # from_pretrained keeps a checkpoint's own names in some architectures (TimmWrapper).
        model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        return model, squash_processor(processor, image_size)
    architecture = name_or_path.removeprefix("timm/").split(".")[0]
    config = TimmWrapperConfig(architecture=architecture, model_args=dict(model_kwargs or {}), **labels)
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    model = AutoModelForImageClassification.from_config(config)
    data_config = dict(model.timm_model.pretrained_cfg)
    if backbone_weights is not None:
        _load_backbone(model.timm_model, Path(backbone_weights), architecture)
    processor = squash_processor(_TimmDefaults(data_config), image_size)
    return model, processor


class _TimmDefaults:
    def __init__(self, data_config: dict[str, Any]) -> None:
        self.data_config = data_config


def _load_backbone(model: torch.nn.Module, file: Path, architecture: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"backbone weights {file} do not exist; pass the file of {architecture}'s state dict.")
    if file.suffix == ".safetensors":
        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    own = model.state_dict()
    head = tuple(name + "." for name in _classifier_names(model))
    state = {
        name: value
        for name, value in state.items()
        if not (name.startswith(head) and name in own and own[name].shape != value.shape)
    }
    bad = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    absent = [name for name in own if name not in state and not name.startswith(head)]
    if bad or absent:
        raise ValueError(
            f"{file} does not hold the weights of {architecture}: {len(absent)} of its tensors are absent "
            f"({', '.join(absent[:3])}) and {len(bad)} do not fit ({', '.join(bad[:3])}). Pass the matching file."
        )
    model.load_state_dict(state, strict=False)
    logger.info("Loaded %d tensors of %s from %s.", len(state), architecture, file)


def _classifier_names(model: torch.nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
