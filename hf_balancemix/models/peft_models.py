"""Models with adapters of peft. It is optional: nothing here imports it unless a model of it is at hand."""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)


def is_peft_model(model: Any) -> bool:
    """Whether it is a `peft.PeftModel`."""
    peft = sys.modules.get("peft")  # where it was not imported, nothing can be one
    return peft is not None and isinstance(model, peft.PeftModel)


def has_adapters(folder: str | Path) -> bool:
    """Whether a folder holds adapters of peft, not a whole model."""
    return Path(folder, ADAPTER_CONFIG_NAME).is_file()


def check_adapters(model: nn.Module) -> None:
    """Adapters that can be saved and resumed: all that training changes must be saved with them.

    Warns where the head is not: one that was drawn anew would be lost.

    Raises:
        ValueError: As said; or there are several, or it is no `PeftModel` of a model of transformers.
    """
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        return
    base = model.get_base_model() if is_peft_model(model) else None
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"the model is a {type(model).__name__} with adapters; it must be a peft.PeftModel of a model of "
            "transformers; make it with peft.get_peft_model(model, config)."
        )
    if list(adapters) != ["default"]:
        raise ValueError(
            f"the model has the adapters {', '.join(adapters)}; it must have one, named default, as others are not "
            "resumed; make it with peft.get_peft_model(model, config)."
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:  # a model to evaluate only
        return
    # Batch norm's statistics change although its weights are frozen.
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and ".original_module" not in prefix:
            trained |= {f"{prefix}.{name}": b for name, b in module.named_buffers() if b.is_floating_point()}
    saved = {value.data_ptr() for value in adapter_state(model).values()}
    lost = [name for name, value in trained.items() if value.data_ptr() not in saved]
    if lost:
        modules = [_short_name(name.rpartition(".")[0]) for name in lost]
        raise ValueError(
            f"{len(lost)} tensors that training changes ({', '.join(lost[:3])}) are not saved with the adapters; they "
            f"must be; give LoraConfig modules_to_save={sorted(set(modules))}, and the head."
        )
    head = _unsaved_head(base)
    if head is not None:
        logger.warning(
            "the adapters do not save the model's head (%s): it is not trained, and lost if it was drawn anew; give "
            "LoraConfig modules_to_save=[%r].",
            head,
            head.rpartition(".")[2],
        )


def _short_name(module: str) -> str:
    """How modules_to_save names it: its last part; two where that is a number, with which other names end too."""
    parts = module.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _unsaved_head(base: PreTrainedModel) -> str | None:
    """The head's name in a model with adapters, unless it is among their modules_to_save."""
    names = [name for name, module in base.named_modules() if getattr(module, "out_features", None) == base.num_labels]
    if base.config.model_type == "balancemix":
        names = [name for name, _ in base.named_modules() if f"{name}.".startswith("head.")]
    if not names or any(".modules_to_save." in f"{name}." for name in names):
        return None
    return "head" if base.config.model_type == "balancemix" else names[-1].split(".base_layer")[0].split(".lora_")[0]


def adapter_state(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` of a `PeftModel` writes, by the names in the file; not copied."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def stored_adapters(model: Any, folder: str | Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The adapters in a folder, and which of them do not fit the model: missing, unexpected and mismatched tensors."""
    file = Path(folder, ADAPTER_SAFE_WEIGHTS_NAME)
    stored, own = load_file(file) if file.is_file() else {}, adapter_state(model)
    both = own.keys() & stored.keys()
    return stored, {
        "missing": sorted(own.keys() - both),
        "unexpected": sorted(stored.keys() - both),
        "mismatched": sorted(name for name in both if own[name].shape != stored[name].shape),
    }


def load_adapters(model: Any, state: dict[str, Tensor]) -> None:
    """Fill a `PeftModel` with what :func:`stored_adapters` gave."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state)


def base_digest(model: nn.Module) -> str:
    """Of the frozen weights, which are not in a checkpoint of adapters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.named_parameters():
        if not value.requires_grad and ".original_module." not in name:  # a head's first draw, which is not used
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merged_copy(model: Any) -> Any:
    """A copy of the model; of a `PeftModel`, the ordinary model with the adapters merged into its weights."""
    model = copy.deepcopy(model)
    return model.merge_and_unload() if is_peft_model(model) else model


@contextmanager
def without_card_of_peft(model: nn.Module) -> Iterator[None]:
    """Inside the block a `PeftModel` is saved without its empty README.md, which would stand where our card does."""
    if not is_peft_model(model):
        yield
        return
    model.create_or_update_model_card = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.create_or_update_model_card
