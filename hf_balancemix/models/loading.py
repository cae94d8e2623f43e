"""Any backbone with K multi-label outputs: from a folder, from the Hub, or from timm by name and a weights file."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.utils import ADAPTER_CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file

from hf_balancemix.core.evaluation import evaluation_mode
from hf_balancemix.files import one_line, quote
from hf_balancemix.models.configuration_balancemix import HEADS, BalanceMixConfig, config_entries
from hf_balancemix.models.label_graph import label_graph_embeddings
from hf_balancemix.models.modeling_balancemix import (
    BalanceMixForImageClassification,
    backbone_class,
    backbone_features,
    build_backbone,
    find_stages,
    image_config,
    own_memory,
    without_pooler,
)
from hf_balancemix.models.peft_models import has_adapters
from hf_balancemix.models.processing import squash_processor
from hf_balancemix.models.strangers import RefusedError, check_config, check_folder
from hf_balancemix.models.timm_models import resize_timm, timm_config, timm_defaults, timm_model
from hf_balancemix.models.weights import read_state, split_head

logger = logging.getLogger(__name__)

# The most of what is made in a loop of Python, before any weight can be counted, by a part of its name in a config.
_LOOPS = {"layers": 1_000, "depth": 1_000, "num_labels": 1_000_000, "num_classes": 1_000_000}
_SOURCES = (
    "pass a folder with model.safetensors, a Hub name if there is a network, or a timm architecture with "
    "--backbone_weights FILE or --from_scratch"
)
_MOST_PIXELS = 4096  # a side, by what is stored; whoever says image_size may ask for more
# How `from_pretrained` loads here; it then gives `(model, info)`.
_WITH_INFO = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}


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
    train_labels: Tensor | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A multi-label image classifier and the processor that squashes its images.

    Args:
        name_or_path: A folder saved by `save_pretrained`, a Hub name (`microsoft/resnet-50`, `timm/resnet50.tv_in1k`),
            or, with `backbone_weights` or `pretrained=False`, a timm architecture (`resnet50`, or with the
            normalisation of certain weights `resnet50.tv_in1k`). Of CLIP, SigLIP and the like the vision tower is
            used.
        class_names: Names of the K classes.
        image_size: Pixels a side that images are squashed to; by default what the model was made for. A timm
            transformer is resized to it (its position embedding is interpolated).
        backbone_weights: A `.safetensors`, `.pth` or `.pt` file with the timm backbone's state dict. Weights of
            another number of classes are left out; any other mismatch is an error.
        pretrained: False draws the weights anew.
        model_kwargs: Arguments of `timm.create_model`, for timm architectures.
        head: `"mlp"`, `"ml_decoder"`, `"q2l"` or `"ms_cma"` puts that head on the backbone, as
            :func:`model_from_backbone`; `"linear"` is the plain model, or ours where transformers has no classifier of
            it (DINOv3). None: the same, or the head that a saved BalanceMix model has.
        head_args: Arguments of the head's class.
        train_labels: `(N, K)` of 0, 1 and -1 (unknown), as of `hf_balancemix.data.given_labels(train)`: a new head
            ms_cma makes its label embeddings of them. All others, and one that is loaded, need none.
        trust_remote_code: Let the config of `name_or_path` bring code: its repository's own, kernels of the Hub, a
            quantization. Weights are safetensors all the same.

    Returns:
        `(model, processor)`; the model is float32, with `problem_type="multi_label_classification"`.

    Raises:
        FileNotFoundError: `backbone_weights` does not exist, or there is no such folder or Hub name (or no network).
        ValueError: There is no such architecture or head, the weights do not belong to it or are no safetensors, the
            config brings code, a file of the folder is a link out of it, the config describes a far larger model than
            the weights, the model does not take images of `image_size`, or class names are absent or repeated; for
            ms_cma also: no `train_labels`, or a backbone without stages.
    """
    labels = label_settings(class_names)
    plain, from_hub = head in (None, "linear"), backbone_weights is None and pretrained
    if plain and head_args:
        raise ValueError(f"head_args is {head_args}; it must be left out for the plain linear head; set head as well.")
    if from_hub:
        _no_model_kwargs(name_or_path, model_kwargs)
    stored: dict[str, Any] = {}
    if from_hub:
        with _loading(name_or_path):
            stored = _config_values(name_or_path, trust_remote_code)
    bare = from_hub and plain and _lacks_classifier(stored)
    if bare:
        text = (
            "transformers has no classifier of %s: the linear head is ours (import hf_balancemix.models to load it)."
        )
        logger.info(text, name_or_path)
    if from_hub and ((plain and not bare) or stored.get("model_type") == BalanceMixConfig.model_type):
        model = _from_pretrained(name_or_path, labels, head, head_args, train_labels, trust_remote_code)
    elif plain and not bare:
        size = image_size if backbone_weights is None else None  # a file's weights are resized later
        timm_labelled = timm_config(name_or_path, model_kwargs, size, **labels)
        state = None if backbone_weights is None else read_state(Path(backbone_weights))
        model = timm_model(timm_labelled, AutoModelForImageClassification, state, backbone_weights)
    else:
        model = model_from_backbone(
            name_or_path,
            class_names,
            head=head or "linear",
            head_args=head_args,
            backbone_weights=backbone_weights,
            pretrained=pretrained,
            model_kwargs=model_kwargs,
            image_size=image_size,
            train_labels=train_labels,
            trust_remote_code=trust_remote_code,
        )
    processor = _own_processor(name_or_path, model, trust_remote_code) if from_hub else timm_defaults(model)
    config = model.config
    # TimmWrapper keeps a checkpoint's own names, and would save those under `label_names`.
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    if hasattr(config, "label_names"):
        config.label_names = list(class_names)
    with _loading(name_or_path, "the image processor of") if from_hub else nullcontext():
        if image_size is None and processor is None:
            image_size = _own_size(config)
        processor = squash_processor(processor, image_size)
        size = processor.size["height"]
        if from_hub:
            _check_processor(processor, _MOST_PIXELS if image_size is None else image_size)
    resize_timm(model, size)
    check_image_size(model, size)
    return model, processor


def load_trained(name_or_path: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """A classifier as it was trained and saved in a folder or on the Hub, in evaluation mode, and its image processor.

    Nothing of the repository is executed and no code is fetched, pickled weights are not loaded, and a config that
    describes a far larger model than the weights is refused before anything is allocated.

    Args:
        name_or_path: A folder, whose files must not be links that lead out of it, or a Hub name.
        trust_remote_code: As of :func:`load_model`.

    Raises:
        FileNotFoundError, ValueError: There is no such model, it has no safetensors or no image processor, its config
            brings code, or its config and weights do not belong together.
    """
    advice = "pass the folder that the training wrote, or its name on the Hub"
    with _loading(name_or_path, "a model and its image processor from", advice):
        _checked_config(name_or_path, trust_remote_code=trust_remote_code)
        load = AutoModelForImageClassification.from_pretrained
        options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": trust_remote_code}
        model, info = load(name_or_path, **options)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        _refuse_tensors([name if isinstance(name, str) else name[0] for kind in kinds for name in info[kind]])
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        _check_processor(processor, _MOST_PIXELS)
    own_memory(model)
    return model.eval(), processor


def model_from_backbone(
    name_or_config: str | PreTrainedConfig,
    class_names: Sequence[str],
    *,
    head: str = "linear",
    head_args: dict[str, Any] | None = None,
    backbone_weights: str | Path | None = None,
    pretrained: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    image_size: int | None = None,
    train_labels: Tensor | None = None,
    trust_remote_code: bool = False,
) -> BalanceMixForImageClassification:
    """A backbone with its pretrained weights and batch-norm statistics, and a head drawn anew, in float32.

    Arguments and errors are those of :func:`load_model`, but for these.

    Args:
        name_or_config: As `name_or_path` there, or a config of transformers, whose weights are drawn.
        head: `"linear"`, `"mlp"`, `"ml_decoder"`, `"q2l"` or `"ms_cma"`.
        head_args: Arguments of the head's class, such as `{"num_groups": 20}`.
        backbone_weights: Of any backbone; or a published checkpoint of ML-Decoder or Query2Label, whose head is taken
            too where it is of the same kind and K.
        image_size: Pixels a side of the images, for timm transformers that are drawn anew; by default their own.
    """
    labels = label_settings(class_names)
    BalanceMixConfig(head=head, head_args=head_args)  # raises before anything is loaded
    if head == "ms_cma":
        _check_train_labels(train_labels, len(class_names))
    config = copy.deepcopy(image_config(name_or_config)) if isinstance(name_or_config, PreTrainedConfig) else None
    from_hub = config is None and backbone_weights is None and pretrained
    if config is not None or from_hub:
        _no_model_kwargs(name_or_config if config is None else "a config", model_kwargs)
    state, head_state = None, {}
    if backbone_weights is not None:
        state, head_state = split_head(read_state(Path(backbone_weights)))
    if config is None and not from_hub:
        config = timm_config(name_or_config, model_kwargs, image_size if state is None else None)
    if from_hub:
        with _loading(name_or_config):
            whole = _checked_config(name_or_config, AutoModel, trust_remote_code)
            config = image_config(whole)
            backbone = _filled(
                backbone_class(type(config)) or AutoModel,
                name_or_config,
                config,
                name_or_config,
                tower=config is not whole,
            )
    elif isinstance(config, TimmWrapperConfig):
        backbone = timm_model(config, AutoModel, state, backbone_weights)
    elif state is None:
        backbone = build_backbone(config)
    else:
        backbone = _filled(type(build_backbone(config)), None, config, str(backbone_weights), state_dict=state)
    channels, stages = _channels(backbone, head)
    backbone.config.num_labels = 1  # else it carries the class names of its pretraining
    config = BalanceMixConfig(
        backbone.config, in_channels=channels, head=head, head_args=head_args, stages=stages, **labels
    )
    try:
        model = BalanceMixForImageClassification(config)
    except TypeError as error:
        raise ValueError(f"the head {head} cannot be built with {head_args or 'its defaults'}: {error}") from error
    model.backbone.load_state_dict(backbone.state_dict())
    own = model.head.state_dict()
    if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in head_state.items()}:
        model.head.load_state_dict(head_state)
    elif head_state:
        logger.warning("%s holds another kind of head or number of classes; the head is drawn anew.", backbone_weights)
    if head == "ms_cma":
        _embed_labels(model, train_labels)
    return model


def _check_train_labels(labels: Tensor | None, num_classes: int) -> None:
    if labels is None or labels.ndim != 2 or labels.shape[1] != num_classes:
        given = "None" if labels is None else f"a tensor of the shape {tuple(labels.shape)}"
        raise ValueError(
            f"train_labels is {given}; for a new head ms_cma it must be (N, {num_classes}), the labels of the "
            "training set; pass hf_balancemix.data.given_labels(train)."
        )


def _embed_labels(model: BalanceMixForImageClassification, labels: Tensor) -> None:
    """Set a head's label embeddings, with a seed of torch's generator as all that is drawn of a model."""
    own = model.head.label_embeddings
    own.copy_(label_graph_embeddings(labels, own.shape[1], int(torch.randint(2**31, ()))))


def check_image_size(model: nn.Module, size: int) -> None:
    """Raise a ValueError, with the size that it was made for if known, where a model does not take S x S images.

    Args:
        model: Any image classifier of transformers.
        size: S.
    """
    parameter = next(model.parameters(), torch.zeros(0))
    problem, output = "it gives no logits", None
    try:
        with torch.no_grad(), evaluation_mode(model):
            output = model(pixel_values=torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise what they like
        problem, config = one_line(error), getattr(model, "config", None)
        patches = str(getattr(config, "model_type", "")).startswith("siglip2")  # it wants those, not images
        if not isinstance(error, TypeError) and not patches and "input_ids" not in str(error):
            own = _own_size(config)
            hint = f"{own}, its own" if own else "the size that it was made for"
            raise ValueError(
                f"the model takes no images of {size} x {size} pixels ({problem}); set image_size to {hint}."
            ) from error
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"the model, a {type(model).__name__}, does not classify plain images ({problem}); it must; put a head "
            f"on it with hf_balancemix.model_from_backbone(FOLDER, class_names, head=...): {', '.join(HEADS)}."
        )


def _own_size(config: Any) -> int | None:
    """Pixels a side that a model was made for, where its config says so."""
    config = image_config(getattr(config, "backbone_config", config))
    patches, patch = getattr(config, "num_patches", None), getattr(config, "patch_size", None)
    if isinstance(patches, int) and isinstance(patch, int) and patches > 0:
        return math.isqrt(patches) * patch
    return getattr(config, "image_size", None)


# ---- folders and Hub names ----


def label_settings(class_names: Sequence[str]) -> dict[str, Any]:
    """What the config of a multi-label classifier says of its K classes; a ValueError where two have one name."""
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError(
            f"class_names holds {len(class_names)} names; it must hold one or more, all different; correct the list."
        )
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "num_labels": len(class_names),
        "problem_type": "multi_label_classification",
    }


def _no_model_kwargs(name: str, model_kwargs: dict[str, Any] | None) -> None:
    if model_kwargs:
        raise ValueError(
            f"model_kwargs is {model_kwargs}; it must be left out where {name} brings its own config; it goes with "
            "backbone_weights or pretrained=False."
        )


@contextmanager
def _loading(name: str, what: str = "the model", advice: str = _SOURCES) -> Iterator[None]:
    """Whatever transformers, timm and the readers of files raise, as one sentence that says what to do."""
    try:
        yield
    except RefusedError as error:
        raise ValueError(f"cannot load {what} {name!r} ({error}).") from error
    except Exception as error:  # they raise what they like
        start, end = f"cannot load {what} {name!r} (", f"); {advice}."
        known = isinstance(error, OSError | ValueError | RuntimeError) and str(error)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(start + one_line(text, max(60, 390 - len(start + end))) + end) from error


def _checked_config(
    name: str, kind: Any = AutoModelForImageClassification, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a folder or Hub name, unless it describes a far larger model than the weights beside it.

    The rest of such a model would be drawn, not loaded. Its parameters are counted on the meta device, where none is
    allocated; what takes long or much memory there too, in loops of Python, has a limit of its own.

    Args:
        name: The folder or Hub name, whose weights are brought into the cache.
        kind: The auto class that will build the model.
        trust_remote_code: As of :func:`load_model`.

    Raises:
        OSError: There is no such config, or the network is down.
        ValueError: It is as said, brings code, or is no config of that kind of model.
    """
    values = _config_values(name, trust_remote_code)
    if values.get("model_type") == "balancemix_feature_classifier":  # of hf_balancemix.frozen
        raise RefusedError(
            "it is a head on cached features, as checkpoints of --frozen_backbone are, and takes no images; the "
            "folder that the checkpoints are in holds the whole model once the run is over"
        )
    if values.get("model_type") == BalanceMixConfig.model_type and kind is AutoModel:
        raise RefusedError(
            f"it is a BalanceMix model with the head {one_line(values.get('head'), 40)}, not a backbone; leave head "
            "out (--head) to go on with it, or name a backbone"
        )
    if kind is AutoModelForImageClassification and _lacks_classifier(values):
        raise RefusedError(
            f"it is a {values['model_type']}, of which transformers has no classifier; put a head on it, with "
            f"load_model or model_from_backbone and one of the heads {', '.join(HEADS)} (--head)"
        )
    for key, value in config_entries(values):
        most = min((limit for part, limit in _LOOPS.items() if part in key), default=math.inf)
        if isinstance(value, int | float) and value > most:
            said = f"{one_line(key, 40)}={quote(value)}"
            raise RefusedError(f"its config says {said}; it must be at most {most:,}; load another model")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            trusted = {"trust_remote_code": trust_remote_code}
            described = build_backbone(config) if kind is AutoModel else kind.from_config(config, **trusted)
    except Exception as error:  # transformers and timm raise what they like
        text = one_line(f"{type(error).__name__}: {error}", 160)
        raise RefusedError(f"its config describes no model, {text}; load another model") from error
    ids = config.id2label if kind is AutoModelForImageClassification else {0: ""}
    if not ids or sorted(ids) != list(range(len(ids))) or not all(isinstance(name, str) for name in ids.values()):
        raise RefusedError(f"its config's id2label is {quote(ids)}; it must name the classes 0, 1, ...; correct it")
    count = sum(parameter.numel() for parameter in described.parameters())
    stored = _stored_bytes(name)
    if stored is not None and count > 2 * stored + 100_000_000:  # a new head may come on top
        raise RefusedError(
            f"its config describes a model of {count:,} parameters, and its weights hold {stored:,} bytes; it is "
            "damaged or malicious; load another model"
        )
    return config


def _stored_bytes(name: str) -> int | None:
    """Size of the safetensors of a folder or a Hub name; None where there are none, or several of a Hub name."""
    if Path(name).is_dir():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) or None
    file = _cached_file(name, "model.safetensors")
    return None if file is None else Path(file).stat().st_size


def _cached_file(name: str, file: str) -> str | None:
    """A file of a Hub name, brought into the cache; None if it has none, or `name` is a folder."""
    absent = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return None if Path(name).is_dir() else cached_file(name, file, **absent)


def _config_values(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """The config as stored, once its folder and, unless it is trusted, all that it says are found harmless."""
    if Path(name).is_dir():
        check_folder(Path(name))
    values = PreTrainedConfig.get_config_dict(name)[0]
    if not isinstance(values, dict):
        raise RefusedError(f"its config.json holds {quote(values)}; it must be an object; load another model")
    if has_adapters(name) or _cached_file(name, ADAPTER_CONFIG_NAME) is not None:
        raise RefusedError(
            "it holds adapters of peft, not a whole model; save the merged model, "
            "trainer.model.merge_and_unload(), in a folder of its own"
        )
    if not trust_remote_code:
        check_config(values)
    return values


def _lacks_classifier(values: Mapping[str, Any]) -> bool:
    """Whether transformers has the backbone of a config, but no classifier of it that takes plain images."""
    kind = values.get("model_type")
    if kind == "siglip2":  # its classifier wants patches
        return True
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or kind == BalanceMixConfig.model_type:
        return False
    config = CONFIG_MAPPING[kind]
    return config not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and backbone_class(config) is not None


def _from_pretrained(
    name_or_path: str,
    labels: dict[str, Any],
    head: str | None,
    head_args: dict[str, Any] | None,
    train_labels: Tensor | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    with _loading(name_or_path):
        stored = _checked_config(name_or_path, trust_remote_code=trust_remote_code)
        ours = isinstance(stored, BalanceMixConfig)
        if ours and (head or stored.head, head_args or stored.head_args) != (stored.head, stored.head_args):
            raise RefusedError(
                f"it was saved with the head {stored.head}, {quote(stored.head_args)}; asked for is {head}, "
                f"{quote(head_args or {})}; leave both out (--head, --head_args)"
            )
        new_graph = ours and stored.head == "ms_cma" and stored.num_labels != labels["num_labels"]
        if new_graph:
            _check_train_labels(train_labels, labels["num_labels"])
        load = AutoModelForImageClassification.from_pretrained
        options = labels | _WITH_INFO | {"trust_remote_code": trust_remote_code}
        model, info = load(name_or_path, ignore_mismatched_sizes=True, **options)
        # Anything but a head of another K would stay random without notice.
        k, own = labels["num_labels"], model.state_dict()
        bad = [name for name, old, new in info["mismatched_keys"] if new[0] != k or old[1:] != new[1:]]
        bad += [n for n in info["missing_keys"] if own[n].is_floating_point() and own[n].shape[:1] != (k,)]
        if ours:  # how a decoder head's tensors depend on K is its own affair
            bad = [name for name in bad if stored.num_labels == k or not name.startswith("head.")]
        _refuse_tensors(bad)
    own_memory(model)
    if new_graph:
        _embed_labels(model, train_labels)
    same_head = stored.num_labels == k and not info["missing_keys"]
    same_names = same_head and [stored.id2label[i] for i in range(k)] == list(labels["label2id"])
    if same_head and not same_names:
        logger.warning(
            f"{name_or_path} was trained for {k} classes with other names or in another order "
            f"({stored.id2label[0]}, ...); its head is kept, as a start for {labels['id2label'][0]}, ..."
        )
    if not same_names and getattr(model.config, "thresholds", None) is not None:
        model.config.thresholds = None  # of other classes
    return model


def _refuse_tensors(bad: Sequence[str]) -> None:
    if bad:
        names = one_line(", ".join(sorted(bad)[:3]), 100)
        raise RefusedError(
            f"{len(bad)} tensors of its weights do not fit its config ({names}); pass a "
            "folder whose config.json and weights belong together"
        )


def _check_processor(processor: Any, most: int) -> None:
    """Refuse an image processor of absurd values, or one that makes no pixels of a small image.

    Args:
        processor: Any, as loaded.
        most: The most pixels a side.
    """
    sizes = [value for size in ("size", "crop_size", "pad_size") for value in _numbers(getattr(processor, size, None))]
    if not all(isinstance(value, int) and 1 <= value <= most for value in sizes):
        raise RefusedError(
            f"its image processor has the sizes {quote(sizes)}; they must be whole numbers from 1 to {most:,}; save "
            "another beside the model"
        )
    pixels = processor([Image.new("RGB", (8, 8), "white")], return_tensors="pt")["pixel_values"]
    if not bool(pixels.isfinite().all()):
        raise RefusedError("its image processor makes pixels that are not finite; save another beside the model")


def _numbers(size: Any) -> list[Any]:
    """Those of a size as image processors have it: one, several, or a mapping or object of them."""
    if size is None or isinstance(size, int | float | str | list | tuple):
        values = size if isinstance(size, list | tuple) else [size]
    else:
        values = list((size if isinstance(size, Mapping) else vars(size)).values())
    return [value for value in values if value is not None]


def _own_processor(name_or_path: str, model: PreTrainedModel, trust_remote_code: bool) -> Any:
    try:
        with _loading(name_or_path, "the image processor of"):
            return AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        if Path(name_or_path, IMAGE_PROCESSOR_NAME).exists():  # it is damaged
            raise
        logger.warning("%s has no image processor; normalising as its architecture or ImageNet does.", name_or_path)
        return timm_defaults(model)


# ---- backbones ----


def _filled(
    cls: Any, name: str | None, config: PreTrainedConfig, source: str, tower: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A backbone loaded through `from_pretrained`, which knows how keys are renamed; nothing may be left random.

    Args:
        tower: It is the vision tower of the model in `name`.
    """
    load = partial(cls.from_pretrained, name, config=config, **without_pooler(config), **_WITH_INFO, **kwargs)
    backbone, info = load()
    if tower and info["missing_keys"]:  # not every tower's class knows what it is called in the whole
        backbone, info = load(key_mapping={r"^vision_model\.": ""})
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the backbone {config.model_type} ({', '.join(missing[:3])}); "
            "pass the weights that belong to its config."
        )
    own_memory(backbone)
    return backbone


def _channels(backbone: PreTrainedModel, head: str) -> tuple[int | list[int], list[int]]:
    """Channels of what the head is given (of each map for ms_cma), and for ms_cma the backbone's stages, found by
    showing the backbone an image."""
    if isinstance(backbone.config, TimmWrapperConfig):
        cfg = backbone.timm_model.pretrained_cfg
        native = cfg["input_size"][-1] if cfg.get("fixed_input_size") else 64
        size = (backbone.config.model_args or {}).get("img_size", native)
    else:
        size = _own_size(backbone.config) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    image, stages = torch.zeros(1, 3, height, width), []
    try:
        with torch.no_grad():
            if head == "ms_cma":
                stages = find_stages(backbone.eval(), image)
            features = backbone_features(backbone.eval(), head, image, stages)
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        if isinstance(error, ValueError) and "input_ids" not in str(error):
            raise
        raise ValueError(
            f"{backbone.config.model_type} is no backbone for the head {head} ({error}); it must give features of "
            f"images of {height} x {width} pixels; name another backbone."
        ) from error
    if head == "ms_cma":
        if not stages:
            raise ValueError(
                f"{getattr(backbone.config, 'architecture', backbone.config.model_type)} has maps of one size only; "
                "the head ms_cma needs those of two or more stages; name a backbone with stages (ResNet, ConvNeXt, "
                "Swin), or take the head q2l."
            )
        return [feature_map.shape[1] for feature_map in features], stages
    return features.shape[-1 if features.ndim == 3 else 1], []
