"""Any image backbone with one of the heads of heads.py or a linear one. Shipped with remote code: siblings only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_balancemix import POOLED_HEADS, BalanceMixConfig
from .heads import MLDecoderHead, MLPHead, MSCMAHead, Query2LabelHead


class BalanceMixForImageClassification(PreTrainedModel):
    """A backbone of transformers or timm with a multi-label head.

    The heads linear and mlp stand on the backbone's own pooling (where it has none, its class token, else the mean).
    ML-Decoder sees all features, class token included; Query2Label the feature map alone; MS-CMA that map and those of
    the two stages before it. Of CLIP, SigLIP and the like the backbone is the vision tower.

    Attributes:
        backbone: As `AutoModel` builds it, without a random pooler.
        head: `nn.Linear`, :class:`MLPHead`, :class:`MLDecoderHead`, :class:`Query2LabelHead` or :class:`MSCMAHead`.
        include_code: What `save_pretrained` does unless told.
    """

    config_class = BalanceMixConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    include_code = False

    def __init__(self, config: BalanceMixConfig) -> None:
        if config.backbone_config is None:
            raise ValueError(
                "backbone_config is None; it must be the config of a backbone; make the model with "
                "hf_balancemix.model_from_backbone."
            )
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = build_backbone(config.backbone_config)
        heads = {
            "linear": nn.Linear,
            "mlp": MLPHead,
            "ml_decoder": MLDecoderHead,
            "q2l": Query2LabelHead,
            "ms_cma": MSCMAHead,
        }
        self.head = heads[config.head](config.in_channels, config.num_labels, **config.head_args)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MLPHead | MLDecoderHead | Query2LabelHead | MSCMAHead):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers initialises custom classes leaf by leaf only, which would pass the heads' own drawing by.
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of `PreTrainedModel`, from safetensors unless `use_safetensors=False`, and bit for bit what was saved."""
        kwargs.setdefault("use_safetensors", True)
        loaded = super().from_pretrained(*args, **kwargs)
        own_memory(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_code: bool | None = None, **kwargs: Any
    ) -> None:
        """As of `PreTrainedModel`; with `include_code` also the code, which `trust_remote_code=True` takes."""
        if not (self.include_code if include_code is None else include_code):
            return super().save_pretrained(save_directory, *args, **kwargs)
        # On these two objects only: the classes, and models saved later, stay as they are.
        known = getattr(self.config, "auto_map", None)
        self.is_remote_code = lambda: True
        self._auto_class, self.config._auto_class = "AutoModelForImageClassification", "AutoConfig"
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.is_remote_code, self._auto_class, self.config._auto_class
            if known is None:  # else a later save without the code would point to files that are not there
                del self.config.auto_map

    def pooled_features(self, pixel_values: Tensor) -> Tensor:
        """`(N, C)` of images `(N, 3, H, W)`: the backbone's own pooling, whatever the head sees."""
        return backbone_features(self.backbone, "linear", pixel_values.to(self.dtype))

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits `(N, K)` of images `(N, 3, H, W)`; with `labels` `(N, K)` in [0, 1] (-1: unknown) their mean BCE."""
        config = self.config
        logits = self.head(backbone_features(self.backbone, config.head, pixel_values.to(self.dtype), config.stages))
        loss = None
        if labels is not None:
            known = (labels >= 0).float()
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float() * known, weight=known)
        return ImageClassifierOutput(loss=loss, logits=logits)


def own_memory(model: nn.Module) -> None:
    """Copy a loaded model's tensors out of the mapped file.

    They lie unaligned there: results would differ in the last bit from those of the model that was saved, and saving
    to the same folder would write over them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """How to build a backbone without the pooler that ViT's and DeiT's classifiers do not have."""
    return {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}


def image_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Of CLIP, SigLIP and others that see images and text, the config of the vision tower; any other as it is."""
    tower = getattr(config, "vision_config", None)
    return config if backbone_class(type(tower)) is None else tower


def backbone_class(config: type) -> Any:
    """What makes a backbone of such a config: `AutoModel`, or the class of a vision tower that it does not know, such
    as BLIP's; None where there is none."""
    if config in MODEL_MAPPING:
        return AutoModel
    name = config.__name__
    return getattr(transformers, f"{name.removesuffix('Config')}Model", None) if "Vision" in name else None


def naflex_inputs(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor]:
    """Images `(N, C, H, W)` of one size as SigLIP2's NaFlex models take them: patches, all of which count."""
    patches = pixel_values.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # N C h w P P
    n, _, h, w = patches.shape[:4]
    return {
        "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).reshape(n, h * w, -1),
        "pixel_attention_mask": patches.new_ones(n, h * w, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[h, w]] * n, device=patches.device),
    }


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The backbone of a config, with weights drawn anew."""
    kind = backbone_class(type(config)) or AutoModel  # whose error says what it knows
    if kind is AutoModel:
        return AutoModel.from_config(config, **without_pooler(config))
    return kind._from_config(config)


def backbone_features(
    backbone: PreTrainedModel, head: str, pixel_values: Tensor, stages: Sequence[int] = ()
) -> Tensor | list[Tensor]:
    """What the head is given: `(N, C)` pooled for linear and mlp, else a map `(N, C, H, W)` or a sequence `(N, T, C)`.

    For ms_cma it is a list of maps: those of the hidden states `stages`, and the one that q2l is given.

    Raises:
        ValueError: Query2Label or MS-CMA needs a map, and the backbone's sequence cannot be made one.
    """
    output = _run(backbone, pixel_values, hidden=head == "ms_cma")
    features = output.last_hidden_state
    if head in POOLED_HEADS:
        pooled = getattr(output, "pooler_output", None)
        if pooled is None and features.ndim == 4:
            pooled = features.mean((2, 3))
        elif pooled is None:  # some, such as SigLIP, have no class token
            tokens = [getattr(m, name, None) for m in backbone.modules() for name in ("cls_token", "class_embedding")]
            pooled = features.mean(1) if all(token is None for token in tokens) else features[:, 0]
        return pooled.flatten(1)
    if head == "ml_decoder" and features.ndim == 3:
        return features
    last = _last_map(backbone, features, pixel_values)
    return [*(_hidden(output)[index] for index in stages), last] if head == "ms_cma" else last


def find_stages(backbone: PreTrainedModel, pixel_values: Tensor) -> list[int]:
    """Which hidden states hold the last map of the two stages before the last one: of the two next larger sizes.

    Args:
        backbone: Any.
        pixel_values: `(N, 3, H, W)`, large enough for the sizes of its maps to differ.

    Returns:
        Two indices, the larger map's first; one where there is but one such size, none where there is no larger map.

    Raises:
        ValueError: As :func:`backbone_features`.
    """
    timm_model = getattr(backbone, "timm_model", None)
    if timm_model is not None and not hasattr(timm_model, "forward_intermediates"):
        return []
    output = _run(backbone, pixel_values, hidden=True)
    smallest = _last_map(backbone, output.last_hidden_state, pixel_values).shape[-2:].numel()
    last_of_size = {x.shape[-2:].numel(): index for index, x in enumerate(_hidden(output)) if x.ndim == 4}
    sizes = sorted(size for size in last_of_size if size > smallest)[:2]
    return [last_of_size[size] for size in reversed(sizes)]


def _run(backbone: PreTrainedModel, pixel_values: Tensor, hidden: bool) -> Any:
    """The backbone's output for images, where asked for with its hidden states."""
    inputs = {"pixel_values": pixel_values}
    if backbone.config.model_type == "siglip2_vision_model":
        inputs = naflex_inputs(pixel_values, backbone.config.patch_size)
    return backbone(**inputs, **({"output_hidden_states": True} if hidden else {}))


def _hidden(output: Any) -> Sequence[Tensor]:
    """All hidden states, as maps where the backbone gives them as maps too (Swin's are sequences)."""
    maps = getattr(output, "reshaped_hidden_states", None)
    return (getattr(output, "hidden_states", None) if maps is None else maps) or ()


def _last_map(backbone: PreTrainedModel, features: Tensor, pixel_values: Tensor) -> Tensor:
    """The backbone's last features as a map `(N, C, H, W)`."""
    timm_model = getattr(backbone, "timm_model", None)
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(timm_model, "output_fmt", None) == "NHWC" else features
    kind = backbone.config.model_type
    stages, depths = getattr(timm_model, "feature_info", None), getattr(backbone.config, "depths", None)
    stride = stages[-1]["reduction"] if stages else getattr(backbone.config, "patch_size", None)
    if kind == "dinov3_convnext":  # whose config does not say it
        stride = 4
    if isinstance(stride, int):
        if depths:  # hierarchical ones merge patches and pad, the others leave out what is over
            stride *= 2 ** (len(depths) - 1)
        h, w = (-(-side // stride) if depths else side // stride for side in pixel_values.shape[-2:])
        if h * w <= features.shape[1]:  # class tokens come first
            return features[:, features.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))
    raise ValueError(
        f"{kind} gives {features.shape[1]} tokens for {tuple(pixel_values.shape[-2:])} pixels, "
        "of which no map can be made; use the head ml_decoder, which needs none."
    )
