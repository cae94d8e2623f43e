"""Classifiers and backbones that timm makes by name: drawn as timm draws them, filled from a file, resized."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig

from hf_balancemix.models.modeling_balancemix import BalanceMixForImageClassification
from hf_balancemix.models.weights import load_timm_state


def timm_config(
    name: str, model_kwargs: dict[str, Any] | None, image_size: int | None, **labels: Any
) -> TimmWrapperConfig:
    """The config of a timm architecture by its name, with or without `timm/` before it and a tag.

    Args:
        name: Of the architecture; the tag says how images are normalised.
        model_kwargs: Arguments of `timm.create_model`.
        image_size: Pixels a side of the images, for architectures that are built for one size; None: timm's own.
        labels: Of the config: names and number of the classes.
    """
    architecture = name.removeprefix("timm/")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no architecture {architecture!r}, and with backbone_weights or from scratch one is needed"
            + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models().")
        )
    arguments = dict(model_kwargs or {})
    with _buildable(architecture, arguments):
        if image_size is not None and timm.get_pretrained_cfg(architecture).fixed_input_size:
            arguments = {"img_size": image_size} | arguments
        return TimmWrapperConfig(architecture=architecture, model_args=arguments, **labels)


def timm_model(
    config: TimmWrapperConfig, kind: Any, state: dict[str, Tensor] | None = None, file: str | Path | None = None
) -> PreTrainedModel:
    """A classifier or a backbone, drawn anew or filled; a head of another number of classes is then drawn small.

    Args:
        config: As of :func:`timm_config`.
        kind: `AutoModelForImageClassification`, or `AutoModel` for a backbone.
        state, file: State dict of the timm model and where it was read; None draws the weights.

    Raises:
        ValueError: timm cannot build it, or the state dict is another architecture's.
    """
    with _buildable(config.architecture, config.model_args):
        model = kind.from_config(config)
        # TimmWrapper draws every weight anew with standard deviation 0.02, which trains far worse than timm's own.
        num_classes = model.timm_model.num_classes
        drawn = timm.create_model(config.architecture, num_classes=num_classes, **(config.model_args or {}))
        model.timm_model.load_state_dict(drawn.state_dict())
    if state is not None:
        _draw_classifier(model.timm_model)
        load_timm_state(model.timm_model, state, Path(file), config.architecture)
    return model


@contextmanager
def _buildable(architecture: str, model_args: dict[str, Any] | None) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = f" with {model_args}" if model_args else ""
        raise ValueError(f"timm cannot build {architecture}{given}: {error}") from error


def _draw_classifier(model: nn.Module) -> None:
    # As torch draws linear layers and timm's `reset_classifier` leaves them. The initialisation of whole networks can
    # be far larger (EfficientNet's and MobileNet's by K: logits beyond 10); its gradients would spoil the backbone.
    classifiers = model.get_classifier()  # distilled models have two
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for module in classifier.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def timm_defaults(model: PreTrainedModel) -> SimpleNamespace | None:
    """What timm says of its model's images, in the form of an image processor of timm's."""
    wrapper = _timm_wrapper(model)
    return None if wrapper is None else SimpleNamespace(data_config=dict(wrapper.timm_model.pretrained_cfg))


def _timm_wrapper(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part of a model that wraps a timm model, if there is one."""
    inner = model.backbone if isinstance(model, BalanceMixForImageClassification) else model
    return inner if isinstance(inner.config, TimmWrapperConfig) else None


def resize_timm(model: PreTrainedModel, size: int) -> None:
    """Interpolate the position embedding of a timm model for S x S images, and note the size in the config.

    Raises:
        ValueError: The architecture cannot be resized.
    """
    wrapper = _timm_wrapper(model)
    if wrapper is None:
        return
    config, timm_model = wrapper.config, wrapper.timm_model
    native = timm_model.pretrained_cfg["input_size"][-1]
    current = (config.model_args or {}).get("img_size", native)
    if size == current or not timm_model.pretrained_cfg.get("fixed_input_size"):
        return
    timm_model.set_input_size(img_size=(size, size))
    config.model_args = (config.model_args or {}) | {"img_size": size}
    num_classes = model.config.num_labels if wrapper is model else 0
    with torch.device("meta"):  # what from_pretrained will build from the config
        rebuilt = timm.create_model(config.architecture, num_classes=num_classes, **config.model_args)
    shapes = {name: value.shape for name, value in timm_model.state_dict().items()}
    if shapes != {name: value.shape for name, value in rebuilt.state_dict().items()}:
        raise ValueError(
            f"image_size is {size}; it must be {current}, from which {config.architecture} cannot be resized; set "
            f"image_size={current}."
        )
