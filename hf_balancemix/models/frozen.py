"""A small head on a frozen backbone: the backbone's features, and the head as a model of its own that takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


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

    An ordinary model: it is saved, loaded and trained as an image classifier, but for `pixel_values` `(B, D)`.
    """

    config_class = FeatureClassifierConfig
    main_input_name = "pixel_values"
    base_model_prefix = "backbone"  # there is none: all of it is head

    def __init__(self, config: FeatureClassifierConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        hidden = [nn.Linear(config.feature_size, width), nn.ReLU()] if width else []
        self.head = nn.Sequential(*hidden, nn.Linear(width or config.feature_size, config.num_labels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        """Logits `(B, K)` of features `(B, D)`."""
        return ImageClassifierOutput(logits=self.head(pixel_values))


AutoConfig.register(FeatureClassifierConfig.model_type, FeatureClassifierConfig)
AutoModelForImageClassification.register(FeatureClassifierConfig, FeatureClassifier)


def pooled_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The features that an image classifier's last linear layer sees, in evaluation mode and without gradients.

    Args:
        model: An image classifier of transformers with K labels whose logits come from a linear layer on one feature
            vector an image (ResNet, ConvNeXt, ViT, Swin, DINOv2, most of timm).

    Returns:
        A function from normalised images `(B, 3, S, S)` to features `(B, D)`.

    Raises:
        ValueError: The model has no such layer (such as a transformer decoder's head).
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {model.config.num_labels} outputs, so there are no "
            "pooled features to cache; choose a backbone with a linear classifier."
        )
    classifier = layers[-1]
    model.eval()

    def features(images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        try:
            with torch.no_grad():
                model(pixel_values=images)
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0].ndim != 2:
            shapes = [tuple(x.shape) for x in seen]
            raise ValueError(
                f"the classifier of {type(model).__name__} sees inputs of shape {shapes}; needed is one feature "
                "vector an image, (B, D). Choose a backbone with a linear classifier on pooled features."
            )
        return seen[0]

    return features


def backbone_digest(model: nn.Module) -> str:
    """A digest of a classifier's architecture and of all weights but those of its last linear layer."""
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    head = {id(p) for p in classifier[-1].parameters()} if classifier else set()
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(model).__name__} {getattr(model.config, 'architecture', '')}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in head:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
