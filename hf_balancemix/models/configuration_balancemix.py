"""The config of a backbone with a multi-label head. It is shipped with remote code: no import of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

POOLED_HEADS = ("linear", "mlp")
HEADS = (*POOLED_HEADS, "ml_decoder", "q2l")
_LARGEST = 1_000_000  # no width, resolution or number of classes of an image model comes near
_DEEPEST = 1_000
# Arguments with which timm.create_model would read or fetch another file than the repository's own.
_READS_FILES = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class BalanceMixConfig(PreTrainedConfig):
    """Config of :class:`BalanceMixForImageClassification`.

    Args:
        backbone_config: Config of the backbone, any that `AutoModel` builds an image model from (timm's as
            `TimmWrapperConfig`), or that config as a dict.
        in_channels: Channels of the backbone's features (its pooled output for the heads linear and mlp).
        head: `"linear"`, `"mlp"`, `"ml_decoder"` or `"q2l"`.
        head_args: Arguments of the head's class beyond `in_channels` and `num_labels`.
        thresholds: K probabilities; a class is predicted where its probability is above. None: 0.5 each.

    Raises:
        ValueError: An unknown head, thresholds that are not K probabilities, or sizes that no image model has.
    """

    model_type = "balancemix"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        in_channels: int = 1,
        head: str = "linear",
        head_args: dict[str, Any] | None = None,
        thresholds: Sequence[float] | None = None,
        problem_type: str = "multi_label_classification",
        **kwargs: Any,
    ) -> None:
        check_sizes({"in_channels": in_channels, "head_args": head_args or {}, **kwargs})
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
        if isinstance(backbone_config, dict):
            check_sizes(backbone_config)
            kind = backbone_config.get("model_type")
            if kind not in CONFIG_MAPPING or kind == self.model_type:
                raise ValueError(
                    f"backbone_config has model_type {kind!r}; an image backbone of transformers is needed."
                )
            backbone_config = CONFIG_MAPPING[kind].from_dict(backbone_config)
        elif backbone_config is not None:
            check_sizes(backbone_config.to_dict())
        self.backbone_config = backbone_config
        self.in_channels = in_channels
        self.head = head
        self.head_args = dict(head_args or {})
        self.thresholds = None if thresholds is None else [float(t) for t in thresholds]
        super().__init__(problem_type=problem_type, **kwargs)


def check_sizes(config: Mapping[Any, Any], where: str = "") -> None:
    """Refuse a config whose numbers no image model has, before anything of that size is made.

    Args:
        config: A config's dict, nested ones included.
        where: Name of the config within a larger one.

    Raises:
        ValueError: A number above a million, more than a thousand layers, or a timm argument that reads other files.
    """
    for key, value in config.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping):
            check_sizes(value, f"{name}.")
            bad = sorted(set(value) & set(_READS_FILES)) if key == "model_args" else []
            if bad:
                raise ValueError(f"the config's {name} has {', '.join(bad)}, which read other files; remove them.")
            continue
        deep = "layers" in name or "depth" in name
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        if deep and len(numbers) > _DEEPEST:
            raise ValueError(f"the config's {name} has {len(numbers)} entries; at most {_DEEPEST} are accepted.")
        nested = {f"{key}[{i}]": entry for i, entry in enumerate(numbers) if isinstance(entry, list | tuple | Mapping)}
        check_sizes(nested, where)
        limit = _DEEPEST if deep else _LARGEST
        for number in numbers:
            if isinstance(number, int | float) and abs(number) > limit and "theta" not in name:
                raise ValueError(
                    f"the config says {name}={number:g}, and no image model has more than {limit:,}; its config.json "
                    "is damaged or malicious. Load another model."
                )
        if key == "architecture" and isinstance(value, str) and ":" in value:
            raise ValueError(f"the config's {name} is {value!r}; the bare name of a timm architecture is needed.")
