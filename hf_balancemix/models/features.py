"""What a classifier sees of an image: the pooled features of its backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from hf_balancemix.models.peft_models import is_peft_model


def pooled_features_of(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A function from normalised images to what the model's classifier sees of them, one vector an image.

    Args:
        model: An image classifier of transformers with K labels, or a `peft.PeftModel` of one. One with a method
            `pooled_features` says itself what they are (ours do); of others it is what the last linear layer with K
            outputs sees, averaged over tokens if there are several.

    Returns:
        From `pixel_values` as the model takes them to features `(B, D)`, without gradients and in the mode that the
        model is in; or None where there is no such layer. It raises a ValueError where the model does not call the
        layer.
    """
    own: Any = getattr(model, "_orig_mod", model)  # a compiled graph runs no hooks
    own = own.get_base_model() if is_peft_model(own) else own
    if hasattr(own, "pooled_features"):
        if isinstance(own, FSDPModule):  # which gathers its weights before `forward` only
            register_fsdp_forward_method(own, "pooled_features")
        return torch.no_grad()(own.pooled_features)
    classifier = linear_classifier(own)
    if classifier is None:
        return None

    def features(pixel_values: Tensor) -> Tensor:
        seen, _ = passed_through(classifier, own, pixel_values)
        if not seen:
            raise ValueError(
                f"the linear layer of {type(own).__name__} with {classifier.out_features} outputs is not what makes "
                "its logits; it must be, as the labels are judged by what it sees; set judge='network'."
            )
        x = seen[-1][0]
        return x.flatten(1, -2).mean(1) if x.ndim > 2 else x

    return features


def linear_classifier(model: nn.Module) -> nn.Linear | None:
    """The last linear layer with as many outputs as the model's config has classes; None where there is none."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels and "lora_" not in name
    ]
    return layers[-1] if layers else None


@torch.no_grad()
def passed_through(
    layer: nn.Module, model: nn.Module, pixel_values: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What a layer is given and gives, for each time that it runs, while the model makes logits of `pixel_values`; and
    these logits."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    try:
        logits = model(pixel_values=pixel_values).logits
    finally:
        hook.remove()
    return seen, logits
