"""A small head on a frozen backbone: the backbone's features, and the head as a model of its own that takes them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_balancemix.models.configuration_balancemix import POOLED_HEADS
from hf_balancemix.models.features import linear_classifier, passed_through
from hf_balancemix.models.heads import MLPHead
from hf_balancemix.models.modeling_balancemix import BalanceMixForImageClassification

_NOT_OF_THE_BACKBONE = {
    "id2label", "label2id", "num_labels", "problem_type", "architectures", "dtype", "transformers_version",
    "_name_or_path", "thresholds",
}  # fmt: skip


class FeatureClassifierConfig(PreTrainedConfig):
    """Configuration of :class:`FeatureClassifier`.

    Args:
        feature_size: D, length of a feature vector.
        hidden_size: Units of the hidden layer; 0 for a linear classifier.
    """

    model_type = "balancemix_feature_classifier"

    def __init__(self, feature_size: int = 2048, hidden_size: int = 256, **kwargs: Any) -> None:
        self.feature_size, self.hidden_size = feature_size, hidden_size
        super().__init__(**kwargs)


class FeatureClassifier(PreTrainedModel):
    """Feature vectors to K logits by a hidden layer with ReLU: what is trained on cached features.

    An ordinary model: it is saved, loaded and trained as an image classifier, but for `pixel_values` `(B, D)`. With
    :func:`with_head` it becomes one that takes images.
    """

    config_class = FeatureClassifierConfig
    main_input_name = "pixel_values"
    base_model_prefix = "backbone"  # there is none: all of it is head

    def __init__(self, config: FeatureClassifierConfig) -> None:
        super().__init__(config)
        if config.hidden_size:
            self.head = MLPHead(config.feature_size, config.num_labels, config.hidden_size)
        else:
            self.head = nn.Sequential(nn.Linear(config.feature_size, config.num_labels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def pooled_features(self, pixel_values: Tensor) -> Tensor:
        """They are what it is given."""
        return pixel_values

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """Logits `(B, K)` of features `(B, D)`."""
        if pixel_values.ndim != 2:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; this head takes feature vectors (B, "
                f"{self.config.feature_size}), no images; use the whole model, which lies beside its checkpoints."
            )
        return ImageClassifierOutput(logits=self.head(pixel_values))


# Checkpoints of a frozen backbone hold such heads.
AutoConfig.register(FeatureClassifierConfig.model_type, FeatureClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(FeatureClassifierConfig, FeatureClassifier, exist_ok=True)


def _classifier(model: nn.Module) -> nn.Module:
    """What makes logits of pooled features: the head of a model of ours, else the last linear layer with K outputs."""
    if isinstance(model, BalanceMixForImageClassification):
        classifier = model.head if model.config.head in POOLED_HEADS else None
    else:
        classifier = linear_classifier(model)
    if classifier is None:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {model.config.num_labels} outputs on pooled features, "
            "so there are none to cache; choose a backbone with a linear classifier."
        )
    return classifier


def pooled_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The features that an image classifier's last linear layer sees, in evaluation mode and without gradients.

    Args:
        model: An image classifier of transformers with K labels whose logits are a linear layer's (ResNet, ConvNeXt,
            ViT, Swin, DINOv2, most of timm), or one of ours with the head linear or mlp; on one vector an image.

    Returns:
        A function from normalised images `(B, 3, S, S)` to features `(B, D)`.

    Raises:
        ValueError: The model has no such layer; from the function: its logits are not that layer's alone.
    """
    classifier = _classifier(model)
    model.eval()

    def features(images: Tensor) -> Tensor:
        seen, logits = passed_through(classifier, model, images)
        if len(seen) != 1 or seen[0][0].ndim != 2 or not torch.equal(seen[0][1], logits):
            raise ValueError(
                f"the logits of {type(model).__name__} are not those of its last linear layer alone (distilled models "
                f"have two), which sees {[tuple(x.shape) for x, _ in seen]}; it must see one vector (B, D) an image; "
                "choose a backbone with a linear classifier on pooled features."
            )
        return seen[0][0]

    return features


def with_head(model: nn.Module, trained: FeatureClassifier) -> nn.Module:
    """A copy of an image classifier with a head trained on its cached features, which gives images the same logits.

    Args:
        model: What :func:`pooled_features` gave the features of: with the head mlp of the same size for a hidden
            layer, with a linear classifier for none.
        trained: The trained head.

    Raises:
        ValueError: `model` has a classifier of another kind or size.
    """
    composed = copy.deepcopy(model)
    classifier = _classifier(composed)
    head = trained.head if trained.config.hidden_size else trained.head[0]
    try:
        classifier.load_state_dict(head.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"a head of {trained.config.hidden_size} hidden units cannot take the place of the classifier of "
            f"{type(model).__name__} ({[tuple(p.shape) for p in classifier.parameters()]}); load the model with "
            "head='mlp' for a hidden layer, or choose a backbone with a linear classifier for none."
        ) from error
    return composed


def backbone_digest(model: nn.Module) -> str:
    """As :func:`digest_of`, of all weights but those of a classifier's last linear layer."""
    head = {id(p) for p in _classifier(model).parameters()}
    return digest_of(model, lambda name, tensor: id(tensor) not in head)


def digest_of(model: nn.Module, counts: Callable[[str, Tensor], bool]) -> str:
    """A digest of a classifier's config (label names apart) and of the parameters and buffers that count."""
    config = getattr(model.config, "backbone_config", model.config)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(model).__name__} {getattr(config, 'architecture', '')}".encode())
    if isinstance(config, TimmWrapperConfig):
        settings = config.model_args or {}  # caches without any were made before they counted
    else:
        settings = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_OF_THE_BACKBONE}
    if settings:
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if counts(name, tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
