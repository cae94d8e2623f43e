"""The config of a backbone with a multi-label head. It is shipped with remote code: no import of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

POOLED_HEADS = ("linear", "mlp")
HEADS = (*POOLED_HEADS, "ml_decoder", "q2l", "ms_cma")
# Arguments with which timm.create_model would read or fetch another file than the repository's own.
_READS_FILES = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class BalanceMixConfig(PreTrainedConfig):
    """Config of :class:`BalanceMixForImageClassification`.

    Args:
        backbone_config: Config of the backbone, any that `AutoModel` builds an image model from (timm's as
            `TimmWrapperConfig`), or that config as a dict.
        in_channels: Channels of the backbone's features (its pooled output for the heads linear and mlp; for ms_cma a
            list, those of each map).
        head: `"linear"`, `"mlp"`, `"ml_decoder"`, `"q2l"` or `"ms_cma"`.
        head_args: Arguments of the head's class beyond `in_channels` and `num_labels`.
        stages: Which of the backbone's hidden states the head ms_cma sees beside the last map.
        thresholds: K probabilities; a class is predicted where its probability is above. None: 0.5 each.

    Raises:
        ValueError: An unknown head or kind of backbone, or a stored timm model that would read other files.
    """

    model_type = "balancemix"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        in_channels: int | Sequence[int] = 1,
        head: str = "linear",
        head_args: dict[str, Any] | None = None,
        stages: Sequence[int] = (),
        thresholds: Sequence[float] | None = None,
        problem_type: str = "multi_label_classification",
        **kwargs: Any,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
        if isinstance(backbone_config, dict):
            check_timm_files(backbone_config)
            kind = backbone_config.get("model_type")
            if kind not in CONFIG_MAPPING or kind == self.model_type:
                raise ValueError(
                    f"the config's backbone_config has model_type {kind!r}; it must be that of an image backbone of "
                    "transformers; load another model."
                )
            backbone_config = CONFIG_MAPPING[kind].from_dict(backbone_config)
        self.backbone_config = backbone_config
        self.in_channels = in_channels if isinstance(in_channels, int) else list(in_channels)
        self.head = head
        self.head_args = dict(head_args or {})
        self.stages = list(stages)
        self.thresholds = None if thresholds is None else [float(t) for t in thresholds]
        super().__init__(problem_type=problem_type, **kwargs)


def check_timm_files(config: Mapping[str, Any]) -> None:
    """Refuse a stored config with which timm would read or fetch other files than the model's own.

    Raises:
        ValueError: An argument of timm names a file, or its architecture a place.
    """
    for key, value in config_entries(config):
        bad = sorted(set(value) & set(_READS_FILES)) if key == "model_args" and isinstance(value, Mapping) else []
        if key == "architecture" and ":" in str(value):
            bad = [str(value)]
        if bad:
            raise ValueError(
                f"the config's {key} has {', '.join(bad)}; it must name no files or places; load another model."
            )


def config_entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a config with the key that it stands under, also in lists and nested configs."""
    yield key, value
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from config_entries(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from config_entries(part, key)
