"""Any backbone with K multi-label outputs: from a folder, from the Hub, or from timm by name and a weights file."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from hf_balancemix.models.configuration_balancemix import BalanceMixConfig, check_sizes
from hf_balancemix.models.modeling_balancemix import (
    BalanceMixForImageClassification,
    backbone_features,
    build_backbone,
    without_pooler,
)
from hf_balancemix.models.processing import squash_processor
from hf_balancemix.models.weights import load_timm_state, read_state, split_head

logger = logging.getLogger(__name__)


_MOST_PARAMETERS = 10_000_000_000


def load_model(
    name_or_path: str,
    class_names: Sequence[str],
    *,
    image_size: int | None = None,
    backbone_weights: str | Path | None = None,
    pretrained: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    head: str | None = None,
    head_args: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A multi-label image classifier and the processor that squashes its images.

    Args:
        name_or_path: A folder saved by `save_pretrained`, a Hub name (`microsoft/resnet-50`, `timm/resnet50.tv_in1k`),
            or, with `backbone_weights` or `pretrained=False`, a timm architecture (`resnet50`, or with the
            normalisation of certain weights `resnet50.tv_in1k`).
        class_names: Names of the K classes.
        image_size: Side of the squash in pixels; by default what the model was made for. A timm transformer is resized
            to it (its position embedding is interpolated).
        backbone_weights: A `.safetensors`, `.pth` or `.pt` file with the timm backbone's state dict. Weights of
            another number of classes are left out; any other mismatch is an error.
        pretrained: False draws the weights anew.
        model_kwargs: Arguments of `timm.create_model`, for timm architectures.
        head: `"mlp"`, `"ml_decoder"` or `"q2l"` puts that head on the backbone, see
            :class:`BalanceMixForImageClassification`; `"linear"` is the plain model. None: plain, or the head that a
            saved BalanceMix model has.
        head_args: Arguments of the head's class.

    Returns:
        `(model, processor)`; the model is float32, with `problem_type="multi_label_classification"`.

    Raises:
        FileNotFoundError: `backbone_weights` does not exist, or there is no such folder or Hub name (or no network).
        ValueError: There is no such architecture or head, the weights do not belong to it or are no safetensors, the
            config has sizes that no model has, the model does not take images of `image_size`, or class names are
            absent or repeated.
    """
    labels = _labels(class_names)
    from_hub = backbone_weights is None and pretrained
    if head in (None, "linear") and head_args:
        raise ValueError(f"head_args is {head_args}, and the plain linear head takes none; set head as well.")
    if from_hub and (head in (None, "linear") or _is_ours(name_or_path)):
        _no_model_kwargs(name_or_path, model_kwargs)
        model = _from_pretrained(name_or_path, labels, head, head_args)
        processor = _own_processor(name_or_path, model)
    elif head in (None, "linear"):
        model = _from_timm(name_or_path, labels, backbone_weights, model_kwargs or {}, image_size)
        processor = _timm_defaults(model)
    else:
        model = model_from_backbone(
            BalanceMixForImageClassification,
            name_or_path,
            list(labels["label2id"]),
            head=head,
            head_args=head_args,
            weights=backbone_weights,
            pretrained=pretrained,
            model_kwargs=model_kwargs,
            image_size=image_size,
        )
        processor = _own_processor(name_or_path, model) if from_hub else _timm_defaults(model)
    config = model.config
    # TimmWrapper keeps a checkpoint's own names, and would save those under `label_names`.
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    if hasattr(config, "label_names"):
        config.label_names = list(class_names)
    if image_size is None and processor is None:
        image_size = getattr(getattr(config, "backbone_config", config), "image_size", None)
    processor = squash_processor(processor, image_size)
    size = processor.size["height"]
    _resize_timm(model, size)
    check_image_size(model, size)
    return model, processor


def load_trained(name_or_path: str) -> tuple[PreTrainedModel, Any]:
    """A classifier as it was trained and saved, in evaluation mode, and its image processor.

    Nothing of the repository is executed, pickled weights are not loaded, and a config of absurd sizes is refused
    before anything is allocated.

    Args:
        name_or_path: A folder or Hub name.

    Raises:
        FileNotFoundError, ValueError: There is no such model, it has no safetensors or no image processor, or its
            config and weights do not belong together.
    """
    problem = f"cannot load a model and its image processor from {name_or_path}"
    with _explained(problem, "Pass the folder that the training wrote, or its name on the Hub."):
        _check_parameters(_checked_config(name_or_path), name_or_path)
        model = AutoModelForImageClassification.from_pretrained(name_or_path, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    _own_memory(model)
    return model.eval(), processor


def model_from_backbone(
    cls: type[BalanceMixForImageClassification],
    name_or_config: str | PreTrainedConfig,
    id2label: Mapping[int, str] | Sequence[str],
    *,
    head: str,
    head_args: dict[str, Any] | None,
    weights: str | Path | None,
    pretrained: bool,
    model_kwargs: dict[str, Any] | None,
    image_size: int | None = None,
) -> BalanceMixForImageClassification:
    """The work of `BalanceMixForImageClassification.from_backbone`, which see; `image_size` as in `load_model`."""
    names = [id2label[k] for k in sorted(id2label)] if isinstance(id2label, Mapping) else id2label
    labels = _labels(names)
    BalanceMixConfig(head=head, head_args=head_args)  # raises before anything is loaded
    state, head_state = split_head(read_state(Path(weights))) if weights is not None else (None, {})
    if isinstance(name_or_config, PreTrainedConfig):
        _no_model_kwargs("a config", model_kwargs)
        config = copy.deepcopy(name_or_config)
        check_sizes(config.to_dict())
        with _explained("cannot build the backbone", "Pass the config of an image model that transformers builds."):
            _check_parameters(config, None, AutoModel)
        if isinstance(config, TimmWrapperConfig):
            backbone = _timm_backbone(config, state, weights)
        elif state is None:
            backbone = build_backbone(config)
        else:
            backbone = _filled(type(build_backbone(config)), None, config, str(weights), state_dict=state)
    elif state is None and pretrained:
        _no_model_kwargs(name_or_config, model_kwargs)
        with _loading(name_or_config):
            config = _checked_config(name_or_config)
            if isinstance(config, BalanceMixConfig):
                raise ValueError(
                    f"it is a BalanceMix model with the head {config.head}, not a backbone; leave head out (--head) "
                    "to go on with it, or name a backbone"
                )
            _check_parameters(config, name_or_config, AutoModel)
            backbone = _filled(AutoModel, name_or_config, config, name_or_config)
    else:
        architecture = _architecture(name_or_config)
        arguments = _sized(architecture, model_kwargs or {}, image_size if weights is None else None)
        config = TimmWrapperConfig(architecture=architecture, model_args=arguments)
        backbone = _timm_backbone(config, state, weights)
    channels = _channels(backbone, head)
    backbone.config.num_labels = 1  # else it carries the class names of its pretraining
    config = BalanceMixConfig(backbone.config, in_channels=channels, head=head, head_args=head_args, **labels)
    try:
        model = cls(config)
    except TypeError as error:
        raise ValueError(f"the head {head} cannot be built with {head_args or 'its defaults'}: {error}") from error
    model.backbone.load_state_dict(backbone.state_dict())
    own = model.head.state_dict()
    if head_state and {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in head_state.items()}:
        model.head.load_state_dict(head_state)
    elif head_state:
        logger.warning("%s holds a head of another kind or number of classes; the head is drawn anew.", weights)
    return model


def check_image_size(model: nn.Module, size: int) -> None:
    """Say before training starts that a model does not take S x S images.

    Args:
        model: Any image classifier of transformers.
        size: S.

    Raises:
        ValueError: It does not; names the size that it was made for, if known.
    """
    training = [module.training for module in model.modules()]
    parameter = next(model.parameters(), torch.zeros(0))
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        config = getattr(model, "config", None)
        own = getattr(getattr(config, "backbone_config", config), "image_size", None)
        hint = f"{own}, its own" if own else "the size that it was made for"
        raise ValueError(
            f"the model takes no images of {size} x {size} pixels ({error}); set image_size to {hint}."
        ) from error
    finally:
        for module, was in zip(model.modules(), training, strict=True):
            module.training = was


# ---- folders and Hub names ----


def _labels(class_names: Sequence[str]) -> dict[str, Any]:
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(f"class_names holds {len(class_names)} names; one or more, all different, are needed.")
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "num_labels": len(class_names),
        "problem_type": "multi_label_classification",
    }


def _no_model_kwargs(name: str, model_kwargs: dict[str, Any] | None) -> None:
    if model_kwargs:
        raise ValueError(
            f"model_kwargs is {model_kwargs}, but {name} brings its own config; model_kwargs go with "
            "backbone_weights or pretrained=False."
        )


@contextmanager
def _explained(problem: str, advice: str) -> Iterator[None]:
    """Errors of transformers as one sentence that says what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{problem} ({str(error).splitlines()[0]}). {advice}") from error


def _loading(name: str) -> AbstractContextManager[None]:
    return _explained(
        f"cannot load the model {name!r}",
        "Pass a folder that save_pretrained wrote (with model.safetensors: pickled weights are not loaded) or, with a "
        "network, a Hub name; offline also a timm architecture with backbone_weights (--backbone_weights FILE) or "
        "pretrained=False (--from_scratch).",
    )


def _checked_config(name: str) -> PreTrainedConfig:
    """A stored config, after a look at its numbers: some configs are big already before any weight is made."""
    values = PreTrainedConfig.get_config_dict(name)[0]
    check_sizes(values)
    if values.get("model_type") == "balancemix_feature_classifier":  # of hf_balancemix.frozen
        raise ValueError(
            "it is a head on cached features, as checkpoints of --frozen_backbone are, and takes no images; the "
            "folder that the checkpoints are in holds the whole model once the run is over"
        )
    return AutoConfig.from_pretrained(name)


def _check_parameters(config: PreTrainedConfig, name: str | None, kind: Any = AutoModelForImageClassification) -> None:
    """Refuse a config that describes a far larger model than its weights, of which most would be drawn anew.

    `kind` is the auto class that will build it; `name` is None where a config comes without weights.
    """
    with torch.device("meta"):
        described = kind.from_config(config)
    count = sum(parameter.numel() for parameter in described.parameters())
    stored = None if name is None else _stored_bytes(name)
    if count > _MOST_PARAMETERS or (stored is not None and count > 2 * stored + 100_000_000):
        held = "" if stored is None else f", and its weights hold {stored:,} bytes"
        raise ValueError(f"its config describes a model of {count:,} parameters{held}; it is damaged or malicious")


def _stored_bytes(name: str) -> int | None:
    """Size of the safetensors of a folder, or of a Hub name's where they are in the cache already."""
    if Path(name).is_dir():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    file = try_to_load_from_cache(name, "model.safetensors")
    return Path(file).stat().st_size if isinstance(file, str) else None


def _is_ours(name: str) -> bool:
    with _loading(name):
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type") == BalanceMixConfig.model_type


def _from_pretrained(
    name_or_path: str, labels: dict[str, Any], head: str | None, head_args: dict[str, Any] | None
) -> PreTrainedModel:
    with _loading(name_or_path):
        stored = _checked_config(name_or_path)
        own_head = stored.head if isinstance(stored, BalanceMixConfig) else None
        if own_head is not None and (
            head not in (None, own_head) or (head_args or stored.head_args) != stored.head_args
        ):
            raise ValueError(
                f"it was saved with the head {own_head}, {stored.head_args}; asked for is {head}, {head_args or {}}. "
                "Leave both out (--head, --head_args)"
            )
        _check_parameters(stored, name_or_path)
        model, info = AutoModelForImageClassification.from_pretrained(
            name_or_path,
            **labels,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
        )
    _own_memory(model)
    # Anything but a head of another K would stay random without notice.
    k = labels["num_labels"]
    bad = [name for name, old, new in info["mismatched_keys"] if new[0] != k or old[1:] != new[1:]]
    if own_head is not None:  # how a decoder head's tensors depend on K is its own affair
        bad = [name for name in bad if stored.num_labels == k or not name.startswith("head.")]
    if bad:
        raise ValueError(
            f"{name_or_path}: {len(bad)} tensors of its weights do not fit its config ({', '.join(sorted(bad)[:3])}). "
            "Pass a folder whose config.json and weights belong together."
        )
    same_head = stored.num_labels == k and not info["missing_keys"]
    same_names = same_head and [stored.id2label[i] for i in range(k)] == list(labels["label2id"])
    if same_head and not same_names:
        logger.warning(
            "%s was trained for %d classes with other names or in another order (%s, ...); its head is kept, as a "
            "start for %s, ...",
            name_or_path, k, stored.id2label[0], labels["id2label"][0],
        )  # fmt: skip
    if not same_names and getattr(model.config, "thresholds", None) is not None:
        model.config.thresholds = None  # of other classes
    return model


def _own_memory(model: nn.Module) -> None:
    # Loaded tensors lie unaligned in the mapped file: results would differ in the last bit from those of the model
    # that was saved, and saving to the same folder would write over them.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _own_processor(name_or_path: str, model: PreTrainedModel) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):
        logger.warning("%s has no image processor; normalising as its architecture or ImageNet does.", name_or_path)
        return _timm_defaults(model)


# ---- timm ----


def _architecture(name: str) -> str:
    architecture = name.removeprefix("timm/")  # with its tag, which says how images are normalised
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no architecture {architecture!r}, and with backbone_weights or from scratch one is needed"
            + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models().")
        )
    return architecture


def _sized(architecture: str, model_kwargs: dict[str, Any], size: int | None) -> dict[str, Any]:
    """`model_kwargs` with `img_size` where the architecture is built for one size; weights are resized later."""
    with _buildable(architecture, model_kwargs):
        fixed = timm.get_pretrained_cfg(architecture).fixed_input_size
    return {"img_size": size, **model_kwargs} if size is not None and fixed else dict(model_kwargs)


@contextmanager
def _buildable(architecture: str, model_kwargs: dict[str, Any] | None) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = f" with {model_kwargs}" if model_kwargs else ""
        raise ValueError(f"timm cannot build {architecture}{given}: {error}") from error


def _from_timm(
    name: str, labels: dict[str, Any], weights: str | Path | None, model_kwargs: dict[str, Any], size: int | None
) -> PreTrainedModel:
    architecture = _architecture(name)
    model_kwargs = _sized(architecture, model_kwargs, size if weights is None else None)
    with _buildable(architecture, model_kwargs):
        config = TimmWrapperConfig(architecture=architecture, model_args=dict(model_kwargs), **labels)
        model = AutoModelForImageClassification.from_config(config)
        _draw_as_timm(model.timm_model, config, labels["num_labels"])
    if weights is not None:
        _draw_classifier(model.timm_model)
        file = Path(weights)
        load_timm_state(model.timm_model, read_state(file), file, architecture)
    return model


def _timm_backbone(
    config: TimmWrapperConfig, state: dict[str, Tensor] | None, weights: str | Path | None
) -> PreTrainedModel:
    with _buildable(config.architecture, config.model_args):
        backbone = build_backbone(config)
        _draw_as_timm(backbone.timm_model, config, 0)
    if state is not None:
        load_timm_state(backbone.timm_model, state, Path(weights), config.architecture)
    return backbone


def _draw_as_timm(model: nn.Module, config: TimmWrapperConfig, num_classes: int) -> None:
    # TimmWrapper draws every weight anew with standard deviation 0.02, which trains far worse than timm's own.
    drawn = timm.create_model(config.architecture, num_classes=num_classes, **(config.model_args or {}))
    model.load_state_dict(drawn.state_dict())


def _draw_classifier(model: nn.Module) -> None:
    # As torch draws linear layers and timm's `reset_classifier` leaves them. The initialisation of whole networks can
    # be far larger (EfficientNet's and MobileNet's by K: logits beyond 10); its gradients would spoil the backbone.
    classifiers = model.get_classifier()  # distilled models have two
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for module in classifier.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


class _TimmDefaults:
    def __init__(self, data_config: dict[str, Any]) -> None:
        self.data_config = data_config


def _timm_defaults(model: PreTrainedModel) -> _TimmDefaults | None:
    wrapper = _timm_wrapper(model)
    return None if wrapper is None else _TimmDefaults(dict(wrapper.timm_model.pretrained_cfg))


def _timm_wrapper(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part of a model that wraps a timm model, if there is one."""
    inner = model.backbone if isinstance(model, BalanceMixForImageClassification) else model
    return inner if isinstance(inner.config, TimmWrapperConfig) else None


def _resize_timm(model: PreTrainedModel, size: int) -> None:
    """Interpolate the position embedding of a timm model for S x S images, and note the size in the config."""
    wrapper = _timm_wrapper(model)
    if wrapper is None:
        return
    config, timm_model = wrapper.config, wrapper.timm_model
    native = timm_model.pretrained_cfg["input_size"][-1]
    current = (config.model_args or {}).get("img_size", native)
    if size == current or not timm_model.pretrained_cfg.get("fixed_input_size"):
        return
    timm_model.set_input_size(img_size=(size, size))
    config.model_args = (config.model_args or {}) | {"img_size": size}
    num_classes = model.config.num_labels if wrapper is model else 0
    with torch.device("meta"):  # what from_pretrained will build from the config
        rebuilt = timm.create_model(config.architecture, num_classes=num_classes, **config.model_args)
    shapes = {name: value.shape for name, value in timm_model.state_dict().items()}
    if shapes != {name: value.shape for name, value in rebuilt.state_dict().items()}:
        raise ValueError(
            f"{config.architecture} cannot be resized from {current} to {size}; set image_size={current}."
        )


# ---- backbones ----


def _filled(cls: type, name: str | None, config: PreTrainedConfig, source: str, **kwargs: Any) -> PreTrainedModel:
    """A backbone loaded through `from_pretrained`, which knows how keys are renamed; nothing may be left random."""
    backbone, info = cls.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        **without_pooler(config),
        **kwargs,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the backbone {config.model_type} ({', '.join(missing[:3])}); "
            "pass the weights that belong to its config."
        )
    _own_memory(backbone)
    return backbone


def _channels(backbone: PreTrainedModel, head: str) -> int:
    """Channels of what the head is given, found by showing the backbone an image."""
    if isinstance(backbone.config, TimmWrapperConfig):
        cfg = backbone.timm_model.pretrained_cfg
        native = cfg["input_size"][-1] if cfg.get("fixed_input_size") else 64
        size = (backbone.config.model_args or {}).get("img_size", native)
    else:
        size = getattr(backbone.config, "image_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    with torch.no_grad():
        features = backbone_features(backbone.eval(), head, torch.zeros(1, 3, height, width))
    return features.shape[-1 if features.ndim == 3 else 1]
