"""The flags of the scripts: which noise, which model, and training arguments with a script's defaults."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hf_balancemix.files import cache_folder, quote
from hf_balancemix.methods.registry import METHODS, arguments_by_method
from hf_balancemix.models.configuration_balancemix import HEADS
from hf_balancemix.scripts.data import AnyData, CocoData, DataArguments, DeepFashionData, VocData
from hf_balancemix.scripts.parser import flag, given_values, json_mapping, parse_arguments
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

# ---- noise ----


@dataclass
class NoiseArguments:
    """Noise on the training labels."""

    help_group = "noise"

    noise: str | None = flag(
        None,
        "Noise on the training labels. Default: none; mislabel on the built-in sample.",
        ["none", "mislabel", "flip", "single_positive"],
    )
    noise_rate: float = flag(0.4, "tau in [0, 1), for mislabel and flip.")
    noise_seed: int = flag(0, "Seed of the noise.")
    noise_map: str | None = flag(None, "Instead: a saved noise map, a parquet file or a Hub data set.")

    def __str__(self) -> str:
        name = self.noise_map or self.noise or "none"
        return f"{name} {self.noise_rate:g}" if name in ("mislabel", "flip") else name


def single_positive_settings(preset: str) -> dict[str, Any]:
    """BalanceMix's where positive labels are certainly right and most negative ones unknown.

    The paper's eps is 0.55; but for its preset it is 0.9, which measured better (docs/results.md).
    """
    return {"trust_positives": True, "relabel_threshold": 0.55 if preset == "paper" else 0.9}


FROM_SCRATCH = {"judge": "network"}
"""BalanceMix's settings for weights that were drawn, which make no features to judge by."""


# ---- models and methods ----


@dataclass
class NetworkArguments:
    """Which network, its weights, and what of it is frozen."""

    help_group = "model"

    model_name_or_path: str | None = flag(
        None,
        "Hub name (timm/resnet50.tv_in1k), folder, or with --backbone_weights or --from_scratch a timm architecture. "
        "Default: timm/resnet50.tv_in1k; a tiny network from scratch on the built-in sample.",
    )
    trust_remote_code: bool = flag(
        False, "Let the model's config bring code: of its repository, kernels, a quantization."
    )
    backbone_weights: str | None = flag(None, "File with the state dict of the timm backbone; needs no network.")
    from_scratch: bool = flag(False, "Draw the weights anew.")
    model_kwargs: Mapping[str, Any] | str | None = flag(
        None, "JSON with arguments of timm.create_model, for a timm architecture."
    )
    frozen_backbone: bool = flag(False, "Train a head on cached features: seconds a run, on any machine.")
    frozen_stages: int | None = flag(
        None,
        "Freeze the first so many stages (blocks), and train the others and the head on cached activations of the "
        "last of these: minutes a run.",
    )
    num_views: int = flag(6, "With a frozen backbone or frozen stages: cached RandAugment views of a training image.")
    hidden_size: int = flag(256, "With a frozen backbone: hidden units of the head; 0: a linear one.")
    cache_dir: str | None = flag(None, "Where features are kept. Default: ~/.cache/hf_balancemix/features.")

    def __post_init__(self) -> None:
        self.model_kwargs = json_mapping("model_kwargs", self.model_kwargs)
        if self.frozen_stages is not None:
            self._check_frozen_stages()
        if self.num_views < 1:
            raise ValueError(f"num_views is {self.num_views}; it must be 1 or more.")
        if self.hidden_size < 0:
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be 0 (a linear head) or more.")

    def _check_frozen_stages(self) -> None:
        if self.frozen_stages < 1:
            raise ValueError(f"frozen_stages is {self.frozen_stages}; it must be 1 or more; leave it out for none.")
        if self.frozen_backbone:
            raise ValueError(
                f"frozen_stages is {self.frozen_stages} and frozen_backbone is on, which freezes all stages; one of "
                "them must be left out."
            )
        if self.hidden_size != 256:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be left out with frozen_stages, as it is of the head "
                "that frozen_backbone brings; choose one with head and head_args."
            )

    @property
    def features_folder(self) -> Path:
        """`cache_dir`, or its default."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else cache_folder() / "features"


@dataclass
class MethodArguments:
    """Which methods."""

    help_group = "method"

    method: list[str] | None = flag(
        None, f"One or more of {', '.join(METHODS)}. Default: balancemix; on the built-in sample also bce and mixup."
    )
    method_args: Mapping[str, Any] | str | None = flag(
        None,
        "JSON with the method's own arguments, such as '{\"gamma_neg\": 2}' of asl, or of several by their names: "
        '\'{"asl": {"gamma_neg": 2}}\'. In a config file a mapping. BalanceMix\'s are flags.',
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise ValueError(f"method is {quote(unknown[0])}; it must be one of {', '.join(METHODS)}.")
        self.method_args = json_mapping("method_args", self.method_args)
        self.args_by_method = arguments_by_method(self.methods, self.method_args or {})  # not a field

    @property
    def methods(self) -> list[str]:
        """The methods to train with, one after the other."""
        return self.method or ["balancemix"]


@dataclass
class ModelArguments(NetworkArguments, MethodArguments):
    """Which model and which methods."""

    head: str | None = flag(None, "Default: linear (the plain model), or what a saved model has.", [*HEADS])
    head_args: Mapping[str, Any] | str | None = flag(
        None, "JSON with arguments of the head, such as '{\"num_groups\": 20}' of ml_decoder."
    )

    def __post_init__(self) -> None:
        NetworkArguments.__post_init__(self)
        MethodArguments.__post_init__(self)
        self.head_args = json_mapping("head_args", self.head_args)
        if self.frozen_backbone and (self.head is not None or self.head_args is not None):
            raise ValueError(
                f"head is {quote(self.head)}; it must be left out with frozen_backbone, which brings a head of its "
                f"own, of hidden_size ({self.hidden_size}) units; leave out head and head_args, or frozen_backbone."
            )


# ---- training ----


@dataclass
class ExperimentArguments(BalanceMixTrainingArguments):
    """Training arguments with the defaults of a script: evaluate and save every epoch, keep two checkpoints."""

    help_group = "output"

    output_dir: str = flag("outputs", "Where models and checkpoints go.")
    resume_from_checkpoint: str | None = flag(
        None,
        "'last': go on from the newest whole checkpoint in output_dir, if there is one; or a checkpoint's folder.",
    )
    eval_strategy: str = flag("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = flag("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = flag(2, "Checkpoints to keep.")
    logging_steps: float = flag(100, "Steps between two lines of training loss.")
    report_to: str | None = flag("none", "tensorboard, trackio, wandb, ...")

    @property
    def checkpoint(self) -> bool | str | None:
        """What `trainer.train(resume_from_checkpoint=...)` takes: True for the last, a folder, or None."""
        words = {"true": True, "last": True, "false": None, "none": None}
        return words.get(str(self.resume_from_checkpoint).lower(), self.resume_from_checkpoint)


# The paper's, and the built-in sample's.
SCHEDULES: dict[str, dict[str, Any]] = {
    "coco": {"num_train_epochs": 50, "label_warmup_epochs": 10, "global_batch_size": 64},
    "voc": {"num_train_epochs": 20, "label_warmup_epochs": 5, "global_batch_size": 32},
    "deepfashion": {"num_train_epochs": 40, "label_warmup_epochs": 5, "global_batch_size": 64},
    "sample": {"num_train_epochs": 32, "label_warmup_epochs": 22, "global_batch_size": 32},
}


def _presets(schedule: str) -> dict[str, dict[str, Any]]:
    """The presets with a data set's epochs and batch size."""
    return {name: values | SCHEDULES[schedule] for name, values in ExperimentArguments.PRESETS.items()}


@dataclass
class CocoArguments(ExperimentArguments):
    """The paper's settings for COCO."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _presets("coco")
    PRESETS["ml-decoder"] = ExperimentArguments.PRESETS["ml-decoder"]  # published for COCO

    output_dir: str = flag("outputs/coco", "Where models and checkpoints go.")


@dataclass
class VocArguments(ExperimentArguments):
    """The paper's settings for VOC."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _presets("voc")

    output_dir: str = flag("outputs/voc", "Where models and checkpoints go.")


@dataclass
class DeepFashionArguments(ExperimentArguments):
    """The paper's settings for DeepFashion."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _presets("deepfashion")

    output_dir: str = flag("outputs/deepfashion", "Where models and checkpoints go.")


@dataclass
class MultiLabelArguments(ExperimentArguments):
    """Any data set: no settings of the paper apply."""

    output_dir: str = flag("outputs/multilabel", "Where models and checkpoints go.")


@dataclass
class SampleArguments(ExperimentArguments):
    """What the built-in sample is learned with, from scratch, in a few minutes on two cores.

    Chosen on a sample drawn with another seed (`make_scenes(seed=1)`). A network from scratch learns slowly, hence
    AdamW, the long warm-up, and weaker mixing than the paper's alpha of 4, for Mixup and BalanceMix alike.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _presets("sample")
    PRESETS["default"] |= {"optim": "adamw_torch_fused", "optim_args": None, "learning_rate": 4e-3, "mixup_alpha": 0.2}

    output_dir: str = flag("outputs/sample", "Where models and checkpoints go.")
    image_size: int | None = flag(48, "Side in pixels that images are squashed to.")
    channels_last: bool = flag(True, "Memory format of convolutional networks.")
    dataloader_num_workers: int = flag(1, "Processes that make the views.")
    dataloader_persistent_workers: bool = flag(True, "Keep them between epochs.")
    many_shot: int = flag(300, "Classes with more positive training labels are many-shot.")
    few_shot: int = flag(150, "Classes with fewer are few-shot.")
    eval_strategy: str = flag("steps", "When to evaluate before the end: no, steps or epoch.")
    eval_steps: float | None = flag(0.25, "Steps, or share of the run, between two evaluations.")
    save_strategy: str = flag("steps", "When to save a checkpoint: no, steps, epoch or best.")
    save_steps: float = flag(0.25, "Steps, or share of the run, between two.")
    save_total_limit: int | None = flag(1, "Checkpoints to keep.")
    logging_steps: float = flag(470, "Steps between two lines of training loss.")


# ---- all of them ----

FORMATS: Mapping[str, tuple[type[DataArguments], type[ExperimentArguments]]] = {
    "coco": (CocoData, CocoArguments),
    "voc": (VocData, VocArguments),
    "deepfashion": (DeepFashionData, DeepFashionArguments),
    "any": (AnyData, MultiLabelArguments),
}


@dataclass
class FormatArguments:
    """Which kind of data."""

    help_group = "data"

    data_format: str | None = flag(
        None,
        "Kind of data, which decides on the other flags of this group: coco (without --data_dir the built-in sample), "
        "voc, deepfashion, or any: a folder of images with a CSV, or a data set of the Hub. Default: any with "
        "--train_dir or --dataset_name, else coco.",
        [*FORMATS],
    )


def chosen_format(argv: Sequence[str] | None, data_format: str | None = None) -> tuple[str, dict[str, Any]]:
    """Which of `FORMATS` the data has, if not told `data_format`, and what the flags say that tell it."""
    given = given_values(("data_format", "data_dir", "dataset_name", "train_dir"), argv)
    default = "any" if given["dataset_name"] or given["train_dir"] else "coco"
    data_format = data_format or given["data_format"] or default
    if data_format not in FORMATS:
        raise ValueError(f"data_format is {quote(data_format)}; it must be one of {', '.join(FORMATS)}.")
    return data_format, given


def parse_script(
    data_format: str | None, argv: Sequence[str] | None, description: str, prog: str | None = None
) -> tuple[Any, NoiseArguments, ModelArguments, ExperimentArguments]:
    """Data, noise, model and training arguments of a script, which logs on rank 0 from then on.

    What the user has left open is as it suits the built-in sample, if there is no other data, single-positive labels,
    if these are the noise, and a network from scratch.

    Args:
        data_format: One of `FORMATS`, or None: --data_format says it.
        argv, description, prog: As for :func:`~hf_balancemix.scripts.parser.parse_arguments`.

    Raises:
        FileNotFoundError, ValueError: As `parse_arguments`, or arguments that exclude each other.
    """
    types: list[type] = [] if data_format else [FormatArguments]
    data_format, given = chosen_format(argv, data_format)
    data_type, args_type = FORMATS[data_format]
    use_sample = data_format == "coco" and given["data_dir"] is None
    types += [data_type, NoiseArguments, ModelArguments, SampleArguments if use_sample else args_type]
    data, noise, model_args, args = parse_arguments(types, argv, description, prog)[-4:]
    if use_sample:
        noise.noise = noise.noise or "mislabel"
        model_args.method = model_args.method or ["bce", "mixup", "balancemix"]
        if model_args.model_name_or_path is None:
            model_args.model_name_or_path, model_args.from_scratch = "resnet10t", True
            model_args.model_kwargs = model_args.model_kwargs or {"channels": [24, 48, 96, 192], "stem_width": 16}
    settings = single_positive_settings(args.preset) if noise.noise == "single_positive" else {}
    if model_args.from_scratch:
        settings |= FROM_SCRATCH
    settings = {name: value for name, value in settings.items() if name in args.unset}
    if settings:
        left_open = args.unset - settings.keys()
        args = replace(args, **settings)
        args.unset = left_open
    if args.ema_decay and "co-teaching" in model_args.methods:  # not only once the others are trained
        raise ValueError(
            f"ema_decay is {args.ema_decay}; it must be 0 for co-teaching, of whose two networks only one would be "
            "averaged; set ema_decay to 0, or leave out co-teaching."
        )
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING, format="%(message)s")
    return data, noise, model_args, args
