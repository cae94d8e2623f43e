"""What the config and the folder of a model may not say where its repository is not trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_balancemix.files import check_inside, one_line, quote
from hf_balancemix.models.configuration_balancemix import check_timm_files

INDEX = "model.safetensors.index.json"
# What transformers computes by itself. Other names are of kernels, which it fetches from the Hub and imports:
# "org/repo@revision:function", but also flash_attention_2 where flash_attn is not installed.
_BUILT_IN = {
    "attn_implementation": {None, "eager", "paged|eager", "sdpa", "paged|sdpa", "flex_attention"},
    "experts_implementation": {None, "eager", "grouped_mm", "batched_mm"},
}
# Each brings code of other packages or of the Hub, changes classes of transformers, or gives other keys' values.
_REFUSED = {
    "quantization_config",
    "compression_config",
    "fusion_config",
    "kernel_config",
    "use_kernels",
    "distributed_config",
    "gguf_file",
    "attribute_map",
    "sub_configs",
    "sub_configs_defaults",
}
_NAMES = {"id2label", "label2id", "label_names"}  # of classes, which may be called anything


class RefusedError(ValueError):
    """Why a model is not loaded, and what to do, as a part of a sentence."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a stored config with which transformers or timm would fetch, import or replace code, or read other files.

    Args:
        config: As stored, with whatever is nested in it.

    Raises:
        RefusedError: As said.
        ValueError: A timm model would read other files (:func:`check_timm_files`).
    """
    check_timm_files(config)
    for node in _nodes(config):
        for key, value in node.items():
            problem = _problem(node, str(key), value)
            if problem is not None:
                raise RefusedError(
                    f"its config's {quote(str(key))} is {quote(value)}, {problem}; remove the key, or trust the "
                    "repository with trust_remote_code=True (--trust_remote_code)"
                )


def _problem(node: Mapping[str, Any], key: str, value: Any) -> str | None:
    for part, known in _BUILT_IN.items():
        # A flag, such as `_attn_implementation_autoset` of old configs, names nothing.
        named = [leaf for leaf in _leaves(value) if not isinstance(leaf, bool)]
        if part in key and not all(isinstance(leaf, str | None) and leaf in known for leaf in named):
            return "which transformers fetches or imports"
    if key in _REFUSED and value not in (None, False):
        return "with which transformers loads or replaces code"
    if key == "auto_map" and value and node.get("model_type") not in tuple(CONFIG_MAPPING):
        return "whose code is the repository's own"
    if key == "backbone" and isinstance(value, str) and ("/" in value or ":" in value):
        return "which is fetched from another repository"
    if key == "transformers_weights" and value is not None and not _is_weights_name(value):
        return "which must be the name of a .safetensors file beside it"
    if callable(getattr(PreTrainedConfig, key, None)):
        return "which is a method of transformers' configs"
    return None


def _is_weights_name(value: Any) -> bool:
    plain = isinstance(value, str) and Path(value).name == value and "\\" not in value
    return plain and value.endswith((".safetensors", ".safetensors.index.json"))


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    """The mappings in a config, but for those of class names."""
    if isinstance(value, Mapping):
        yield value
        for key, part in value.items():
            if key not in _NAMES:
                yield from _nodes(part)
    elif isinstance(value, list):
        for part in value:
            yield from _nodes(part)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    else:
        yield value


def check_folder(folder: Path) -> None:
    """Refuse a folder whose links, or whose list of parts of the weights, lead out of it; sub-folders are not read.

    Raises:
        RefusedError: As said.
        OSError: It cannot be read.
    """
    links = [path for path in folder.iterdir() if path.is_symlink()]
    parts = []
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            parts = [folder / name for name in set(weight_map.values())]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RefusedError(f"its {INDEX} is damaged ({one_line(error, 80)}); copy it again") from error
    for path in (*links, *parts):
        try:
            check_inside(path, folder)
        except ValueError as error:
            name = quote(str(path.relative_to(folder))) if path.is_relative_to(folder) else quote(str(path))
            raise RefusedError(f"its file {name} lies outside the folder; copy it there") from error
