"""State-dict files into modules: nothing is executed, and nothing stays random without notice."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def read_state(file: Path) -> dict[str, Tensor]:
    """A state dict, bare or under `state_dict` or `model`, from a `.safetensors` file or one of `torch.save`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"backbone weights {file} do not exist; they must be a state dict; correct the path.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise what they like
        raise ValueError(
            f"backbone weights {file} cannot be read ({type(error).__name__}); they must be a state dict, saved as "
            ".safetensors or by torch.save without other objects; copy the file again or convert it."
        ) from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"backbone weights {file} hold no state dict; they must be a dict of tensors by name, bare or under "
            "'state_dict'; save model.state_dict()."
        )
    return state


def split_head(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Backbone and decoder head of a published checkpoint of ML-Decoder or Query2Label, each by its own names.

    ML-Decoder's stands under `head.` or `fc.` of the backbone; Query2Label's beside `backbone.0.body.`. The head is
    empty where the state is that of a backbone alone.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    for prefix in ("head.", "fc."):
        if f"{prefix}decoder.duplicate_pooling" in state:
            return {name: value for name, value in state.items() if not name.startswith(prefix)}, under(prefix)
    body = under("backbone.0.body.")
    if "fc.W" in state and body:
        return body, {name: value for name, value in state.items() if not name.startswith("backbone.")}
    return state, {}


def load_timm_state(model: nn.Module, state: dict[str, Tensor], file: Path, architecture: str) -> None:
    """Fill a timm model; a classifier of another number of classes is left out.

    Names of an older version of timm or of the architecture's authors are converted as timm does.

    Raises:
        ValueError: Any other tensor is absent or does not fit.
    """
    own = model.state_dict()
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    head = tuple(f"{name}." for name in classifiers)

    def compared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        fits = {name: name in own and own[name].shape == value.shape for name, value in state.items()}
        bad = [name for name in state if not fits[name] and not name.startswith(head)]
        # Converted and old files have no counters of batches, which matter only for batch norm without momentum.
        needed = [name for name in own if not name.startswith(head) and "num_batches_tracked" not in name]
        absent = [name for name in needed if name not in state]
        return {name: value for name, value in state.items() if fits[name]}, bad, absent

    fitting, bad, absent = compared(state)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if absent and convert is not None:
        with suppress(KeyError, AttributeError, TypeError, ValueError, RuntimeError):  # no file that timm knows
            converted = compared(convert(dict(state), model))
            if not converted[1] and not converted[2]:
                fitting, bad, absent = converted
    if bad or absent:
        raise ValueError(
            f"{file} does not hold the weights of {architecture}: {len(absent)} of its tensors are absent "
            f"({', '.join(absent[:3])}) and {len(bad)} do not fit ({', '.join(bad[:3])}); pass the matching file."
        )
    model.load_state_dict(fitting, strict=False)
    logger.info("Loaded %d tensors of %s from %s.", len(fitting), architecture, file)
