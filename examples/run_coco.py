"""Train BalanceMix on COCO, or, without --data_dir, on the built-in sample beside BCE and Mixup.

    accelerate launch examples/run_coco.py
    accelerate launch examples/run_coco.py --data_dir DIR --year 2017 --model_name_or_path timm/resnet50.tv_in1k \
        --image_size 448 --noise mislabel --noise_rate 0.4 --preset paper --bf16 --output_dir outputs/coco

Every field below, and every training argument, is a flag; --config FILE takes them from YAML or JSON.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
from transformers import set_seed
from transformers.trainer_utils import is_main_process

from hf_balancemix import BalanceMixTrainingArguments, drop_bad_images, load_coco, load_model, make_scenes
from hf_balancemix.cli import parse_arguments, run
from hf_balancemix.comparison import METHODS, trainer_for
from hf_balancemix.data import Mislabel, RandomFlip, SinglePositive, class_names
from hf_balancemix.report import results_table

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Which images and which noise."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with train2017/, val2017/, annotations/. None: the built-in sample."}
    )
    year: int = field(default=2017, metadata={"help": "COCO year.", "choices": [2014, 2017]})
    keep_unlabelled: bool = field(default=False, metadata={"help": "Keep images without any label."})
    on_bad_image: str = field(
        default="error",
        metadata={"help": "Absent or truncated images: stop, or leave out and count.", "choices": ["error", "skip"]},
    )
    noise: str | None = field(
        default=None,
        metadata={
            "help": "Noise on the training labels. Default: none; mislabel on the built-in sample.",
            "choices": ["none", "mislabel", "flip", "single_positive"],
        },
    )
    noise_rate: float = field(default=0.4, metadata={"help": "tau in [0, 1), for mislabel and flip."})
    noise_seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation images."})


@dataclass
class ModelArguments:
    """Which model and which methods."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name (timm/resnet50.tv_in1k), folder, or with --backbone_weights or --from_scratch a timm "
            "architecture. Default: a tiny network from scratch on the built-in sample, else timm/resnet50.tv_in1k."
        },
    )
    backbone_weights: str | None = field(
        default=None, metadata={"help": "File with the state dict of the timm backbone; needs no network."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw the weights anew."})
    method: list[str] | None = field(
        default=None,
        metadata={
            "help": f"One or more of {', '.join(METHODS)}. Default: all on the built-in sample, else balancemix."
        },
    )


@dataclass
class CocoArguments(BalanceMixTrainingArguments):
    """The paper's settings for COCO; a preset gives way to every flag."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: values | {"num_train_epochs": 50, "label_warmup_epochs": 10, "global_batch_size": 64}
        for name, values in BalanceMixTrainingArguments.PRESETS.items()
    }

    output_dir: str = field(default="outputs/coco", metadata={"help": "Where models and checkpoints go."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two lines of training loss."})


@dataclass
class SampleArguments(CocoArguments):
    """What the built-in sample is learned with in a few minutes on two cores."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: values
        | {"num_train_epochs": 20, "label_warmup_epochs": 5, "global_batch_size": 32, "learning_rate": 0.05}
        for name, values in BalanceMixTrainingArguments.PRESETS.items()
    }

    output_dir: str = field(default="outputs/sample", metadata={"help": "Where models and checkpoints go."})
    many_shot: int = field(default=300, metadata={"help": "Classes with more positive training labels are many-shot."})
    few_shot: int = field(default=60, metadata={"help": "Classes with fewer are few-shot."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=200, metadata={"help": "Steps between two lines of training loss."})


def load_data(data: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    root = data.data_dir or make_scenes()
    splits = []
    for split, limit in (("train", data.max_train_samples), ("val", data.max_eval_samples)):
        dataset = load_coco(
            root,
            split=split,
            year=data.year,
            keep_unlabelled=data.keep_unlabelled,
            on_bad_image=data.on_bad_image,
        )
        if limit is not None:
            dataset = dataset.shuffle(seed=seed).select(range(min(limit, len(dataset))))
        splits.append(drop_bad_images(dataset) if data.on_bad_image == "skip" else dataset)
    train, val = splits
    noise = {
        "none": lambda: None,
        "mislabel": lambda: Mislabel(rate=data.noise_rate, seed=data.noise_seed),
        "flip": lambda: RandomFlip(rate=data.noise_rate, seed=data.noise_seed),
        "single_positive": lambda: SinglePositive(seed=data.noise_seed),
    }[data.noise]()
    if noise is not None:
        noise = noise.fit(train)
        train = train.map(noise, batched=True, features=noise.features, desc=f"Noise: {data.noise}")
    return train, val


def parse(argv: list[str] | None) -> tuple[DataArguments, ModelArguments, CocoArguments]:
    data, model, args = parse_arguments((DataArguments, ModelArguments, CocoArguments), argv, description=__doc__)
    if data.data_dir is None:  # the same flags again, with the sample's defaults
        data, model, args = parse_arguments((DataArguments, ModelArguments, SampleArguments), argv)
        data.noise = data.noise or "mislabel"
        model.from_scratch = model.from_scratch or model.model_name_or_path is None
        model.model_name_or_path = model.model_name_or_path or "test_resnet"
        args.image_size = args.image_size or 64
    data.noise = data.noise or "none"
    model.model_name_or_path = model.model_name_or_path or "timm/resnet50.tv_in1k"
    model.method = model.method or (list(METHODS) if data.data_dir is None else ["balancemix"])
    unknown = sorted(set(model.method) - set(METHODS))
    if unknown:
        raise ValueError(f"method {', '.join(unknown)} is not known; choose from {', '.join(METHODS)}.")
    return data, model, args


def main(argv: list[str] | None = None) -> None:
    data, model_args, args = parse(argv)
    main_process = is_main_process(args.process_index)
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    say = print if main_process else (lambda *_: None)
    if data.data_dir is None:
        say("No --data_dir given: using the built-in sample (small drawn scenes, made once into your cache).")
    with args.main_process_first():  # the other ranks then find what rank 0 made
        train, val = load_data(data, args.seed)
    noise = data.noise if data.noise in ("none", "single_positive") else f"{data.noise} {data.noise_rate:g}"
    say(
        f"{len(train):,} training and {len(val):,} validation images, {len(class_names(train))} classes, "
        f"noise: {noise}."
    )

    results = {}
    for method in model_args.method:
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir, method))
        set_seed(args.seed)
        model, processor = load_model(
            model_args.model_name_or_path,
            class_names(train),
            image_size=args.image_size,
            backbone_weights=model_args.backbone_weights,
            pretrained=not model_args.from_scratch,
        )
        say(f"\n== {method}: {METHODS[method]}")
        trainer = trainer_for(
            method, own, model=model, train_dataset=train, eval_dataset=val, processing_class=processor
        )
        resume = args.resume_from_checkpoint
        output = trainer.train(True if str(resume).lower() in ("true", "last") else resume)
        metrics = trainer.evaluate()
        trainer.save_model()
        results[method] = {"seconds": output.metrics["train_runtime"]} | metrics | last_label_figures(trainer)
    if main_process:
        report(results, args, data)


def last_label_figures(trainer: Any) -> dict[str, float]:
    """The newest label-quality figures of the log, over the random batches of the last epoch."""
    logs = (line for line in reversed(trainer.state.log_history) if "label_clean_precision" in line)
    return {k: v for k, v in next(logs, {}).items() if k.startswith("label_")}


def report(results: dict[str, dict[str, float]], args: CocoArguments, data: DataArguments) -> None:
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nValidation mAP in per cent after the last epoch (clean labels; many-shot: more than {args.many_shot:,} "
          f"clean positive training labels, few-shot: fewer than {args.few_shot:,})\n")  # fmt: skip
    columns = {"eval_mAP": "all", "eval_mAP_many": "many", "eval_mAP_medium": "medium", "eval_mAP_few": "few"}
    print(results_table(results, columns, percent=True, extra={"seconds": "training seconds"}))
    quality = {name: figures for name, figures in results.items() if "label_clean_precision" in figures}
    if quality:
        columns = {
            "label_clean_precision": "clean precision",
            "label_clean_recall": "clean recall",
            "label_relabel_proportion": "re-labelled",
            "label_relabel_accuracy": "re-labelling right",
            "label_clean_precision_positives": "clean precision (positives)",
            "label_clean_recall_positives": "clean recall (positives)",
            "label_relabel_accuracy_positives": "re-labelling right (positives)",
        }
        print("\nLabel quality in per cent over the last epoch (Eq. 14, 15)\n")
        print(results_table(quality, columns, percent=True))
    print(f"\nModels: {', '.join(str(Path(args.output_dir, name)) for name in results)}")
    best = "balancemix" if "balancemix" in results else next(iter(results))
    print("Next, class probabilities for your own images:\n"
          f"    python examples/predict.py --model {Path(args.output_dir, best)} --images FOLDER --output scores.csv")  # fmt: skip
    if data.data_dir is None:
        print("or your own data in COCO format:\n    accelerate launch examples/run_coco.py --data_dir DIR --help")


if __name__ == "__main__":
    run(main)
