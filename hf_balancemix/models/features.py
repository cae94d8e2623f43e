"""What a classifier sees of an image: the pooled features of its backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_balancemix.models.peft_models import is_peft_model


def pooled_features_of(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A function from normalised images to what the model's classifier sees of them, one vector an image.

    Args:
        model: An image classifier of transformers with K labels, or a `peft.PeftModel` of one. One with a method
            `pooled_features` says itself what they are (ours do); of others it is what the last linear layer with K
            outputs sees, averaged over tokens if there are several.

    Returns:
        From `pixel_values` as the model takes them to features `(B, D)`, without gradients and in the mode that the
        model is in; or None where there is no such layer.
    """
    own: Any = model.get_base_model() if is_peft_model(model) else model
    if hasattr(own, "pooled_features"):
        return torch.no_grad()(own.pooled_features)
    layers = [
        module
        for name, module in own.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == own.config.num_labels and "lora_" not in name
    ]
    if not layers:
        return None

    def features(pixel_values: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            with torch.no_grad():
                own(pixel_values=pixel_values)
        finally:
            hook.remove()
        return seen[-1].flatten(1, -2).mean(1) if seen[-1].ndim > 2 else seen[-1]

    return features
