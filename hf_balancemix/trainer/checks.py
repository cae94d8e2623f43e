"""What the trainers refuse, before training starts."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import compare_versions
from scipy.sparse import csr_array
from torch import nn

from hf_balancemix.core.given_labels import same_labels
from hf_balancemix.data.labels import class_names, has_class_names, sparse_labels
from hf_balancemix.data.training_data import undecoded_images
from hf_balancemix.models.loading import check_image_size
from hf_balancemix.models.peft_models import check_adapters
from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments

logger = logging.getLogger(__name__)


def check_arguments(args: Any, needed: type[MultiLabelTrainingArguments]) -> None:
    """The right class, and nothing that the samplers or the loss cannot work with."""
    if not isinstance(args, needed):
        raise TypeError(f"args is {type(args).__name__}; it must be {needed.__name__}; make one of the same values.")
    accelerator: Any = args.accelerator_config  # a dict in transformers' annotation only
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, 0, "multi-label targets are not smoothed"),
        "dispatch_batches": (accelerator.dispatch_batches or None, None, "it skips the wrong batches on resuming"),
        "even_batches": (accelerator.even_batches, True, "ranks would wait for each other for ever"),
        "train_sampling_strategy": (args.train_sampling_strategy, "random", "the samplers are the method's"),
        "ignore_data_skip": (
            args.ignore_data_skip,
            False,
            "a resumed run would see other data",
        ),
        "enable_jit_checkpoint": (args.enable_jit_checkpoint, False, "a checkpoint on SIGTERM is always written"),
    }
    for name, (value, possible, why) in refused.items():
        if value != possible:
            raise ValueError(f"{name} is {value!r}; it must be {possible!r}, as {why}; leave it out.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would use DataParallel; start with "
            "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


def check_output_dir(output_dir: str | None) -> None:
    """A folder, or one that can be made."""
    try:
        Path(output_dir or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir is {output_dir}, which cannot be made ({error.strerror}); it must be a folder where "
            "files can be written; pass another."
        ) from error


def check_engine(trainer: Any) -> None:
    """What was asked for is what runs: on a CPU Accelerate leaves out FSDP without a word, and without `use_cpu` the
    other processes, too."""
    processes, ranks = int(os.environ.get("WORLD_SIZE", 1)), trainer.args.world_size
    if "LOCAL_RANK" in os.environ and processes > 1 and ranks == 1:
        raise ValueError(
            f"{processes} processes were started, and each would train alone, as no GPU was found; they must be the "
            "ranks of one run; pass --use_cpu --ddp_backend gloo."
        )
    asked = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and ranks > 1 and not (trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled):
        raise ValueError(
            f"FSDP is asked for, and Accelerate runs DDP instead on {trainer.args.device.type.upper()}; GPUs must be "
            "there for FSDP; leave it out."
        )
    if trainer.is_deepspeed_enabled:
        if trainer.args.on_nan == "skip":
            raise ValueError(
                "on_nan is 'skip'; it must be 'stop' with DeepSpeed, whose optimizer steps before a loss is looked "
                "at; leave it out."
            )
        plugin = trainer.accelerator.state.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "stage3_gather_16bit_weights_on_model_save is false; it must be true, or no model would be saved; set "
                "it in the DeepSpeed config."
            )
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if compare_versions("accelerate", "<", "1.15") or compare_versions("torch", "<", "2.14"):
        raise ValueError(
            "FSDP is on with an older accelerate or torch, of which 1.10 and 2.7 trained other weights than one "
            "process; they must be 1.15 and 2.14 or newer; upgrade both."
        )
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP's version is {plugin.fsdp_version}; it must be 2, which is tested; set it to 2.")
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        logger.info("FSDP's state_dict_type is FULL_STATE_DICT here: of another no model would be saved.")
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # else those of the former type stay
        plugin.set_state_dict_type("FULL_STATE_DICT")


def check_trainer_options(options: dict[str, Any], compute_metrics: Any) -> None:
    """Refuse options of Trainer that would have no effect, or a wrong one."""
    if options.pop("data_collator", None) is not None:
        raise TypeError(
            "data_collator is given; it must be left out, as batches are made of pairs of views; change images by "
            "train_transform=."
        )
    if options.get("preprocess_logits_for_metrics") is not None and compute_metrics is None:
        raise ValueError(
            "preprocess_logits_for_metrics is given without compute_metrics; the trainer's own metrics must have the "
            "logits themselves; pass compute_metrics, too, or leave it out."
        )


def check_transform(train_transform: Any, views: Any) -> None:
    """Something that can be called, and that is called."""
    if train_transform is None:
        return
    if not callable(train_transform):
        raise TypeError(
            f"train_transform is {train_transform!r}; it must be a function of a PIL image; pass for instance "
            "torchvision.transforms.v2.ColorJitter(0.4)."
        )
    if views is not None:
        raise ValueError(
            "train_transform is given together with views, such as cached features, which are not made by it; it must "
            "stand alone; leave one of them out."
        )


def check_images(dataset: Any) -> None:
    """A data set with images, and without a transform, which would not be applied."""
    undecoded_images(dataset)
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform (with_transform or set_transform), which must be left out, as views are "
            "made of the image column itself; call its reset_format(), and pass the trainer train_transform=."
        )


def check_train_dataset(dataset: datasets.Dataset, labels: csr_array, args: MultiLabelTrainingArguments) -> None:
    """At least one global batch of instances with images."""
    check_images(dataset)
    num_instances = labels.shape[0]
    if num_instances < args.global_batch_size:
        raise ValueError(
            f"train_dataset has {num_instances} instances, fewer than one global batch of {args.global_batch_size}; "
            "it must have at least so many; lower the batch size."
        )


def names_of(dataset: datasets.Dataset, given: list[str] | None) -> list[str] | None:
    """The class names of a training set, or `given` where it has none (a multi-hot column); None: nobody has said.

    Raises:
        ValueError: `given` are not the data set's, or not as many as its classes.
    """
    own = class_names(dataset)
    if given is None:
        return own if has_class_names(dataset) else None
    if len(given) != len(own):
        raise ValueError(
            f"class_names holds {len(given)} names and train_dataset has {len(own)} classes; give each class a name."
        )
    if has_class_names(dataset) and given != own:
        raise ValueError(
            f"class_names ({given[:3]} ...) differ in name or order from those of train_dataset ({own[:3]} ...); they "
            "must be equal; leave class_names out."
        )
    return given


def check_eval_dataset(eval_dataset: Any, names: list[str] | None) -> None:
    """The training set's classes; warns of noisy labels. A dict of data sets is checked one by one.

    Where the names of the data set are not known, their number is compared.
    """
    if eval_dataset is None:
        return
    for dataset in eval_dataset.values() if type(eval_dataset) is dict else [eval_dataset]:
        check_images(dataset)
        own = class_names(dataset)
        if names is not None and own != names and (has_class_names(dataset) or len(own) != len(names)):
            raise ValueError(
                f"train_dataset has {len(names)} classes and eval_dataset {len(own)}, or they differ in name or order "
                f"({names[:3]} ... against {own[:3]} ...); load both with the same class list."
            )
        if "clean_labels" in dataset.column_names and not same_labels(
            sparse_labels(dataset), sparse_labels(dataset, "clean_labels")
        ):
            logger.warning(
                "eval_dataset carries noisy labels (its labels differ from its clean_labels), and metrics use the "
                "noisy ones; evaluate on clean labels to compare with the paper."
            )


def epochs_of(args: MultiLabelTrainingArguments, num_instances: int) -> float:
    """How often a training goes over the training set; a fraction where `max_steps` ends it, or was asked for."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    batches = num_instances / (args.global_batch_size // args.gradient_accumulation_steps)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return args.max_steps / max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def check_warmup(warmup_epochs: int, num_epochs: float) -> None:
    """The warm-up ends before the training does."""
    if warmup_epochs < num_epochs:
        return
    most = math.ceil(num_epochs) - 1
    fix = f"set it to {most} or less" if most > 0 else f"train for {warmup_epochs + 1} epochs or more"
    raise ValueError(
        f"label_warmup_epochs is {warmup_epochs}; it must be less than the {num_epochs:g} epochs of this training, or "
        f"no label would ever be managed; {fix}."
    )


def check_model(
    model: nn.Module, names: list[str] | None, image_size: int | None = None, num_classes: int | None = None
) -> None:
    """K outputs, and images of `image_size` are taken; sets the problem type, and the class names if there are some,
    that pipelines and users of the saved model need. None: not checked."""
    check_adapters(model)
    config = getattr(model, "config", None)
    num_labels = getattr(config, "num_labels", None)
    num_classes = num_classes if names is None else len(names)
    if None not in (num_classes, num_labels) and num_labels != num_classes:
        raise ValueError(
            f"the model has {num_labels} outputs and train_dataset {num_classes} classes; load the model with "
            f"num_labels={num_classes}."
        )
    if image_size is not None:
        check_image_size(model, image_size)
    if config is None:
        return
    if config.problem_type != "multi_label_classification":
        logger.info("Setting problem_type to 'multi_label_classification', so that pipelines use a sigmoid.")
        config.problem_type = "multi_label_classification"
    if names is None or names == (own := [config.id2label.get(k) for k in range(len(names))]):
        return
    if own != [f"LABEL_{k}" for k in range(len(names))]:
        text = "the model's classes (%s, ...) differ from the data set's (%s, ...) in name or order; these are saved."
        logger.warning(text, own[0], names[0])
    config.id2label, config.label2id = dict(enumerate(names)), {name: k for k, name in enumerate(names)}
    if hasattr(config, "label_names"):  # TimmWrapper saves these instead
        config.label_names = list(names)
