r"""Train BalanceMix on COCO, or, without --data_dir, on the built-in sample beside BCE and Mixup.

    accelerate launch examples/run_coco.py
    accelerate launch examples/run_coco.py --data_dir DIR --year 2017 --model_name_or_path timm/resnet50.tv_in1k \
        --image_size 448 --noise mislabel --noise_rate 0.4 --preset paper --bf16 --output_dir outputs/coco

Every field below, and every training argument, is a flag; --config FILE takes them from YAML or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_balancemix import load_coco, make_scenes
from hf_balancemix.scripts.parser import parse_arguments, run
from hf_balancemix.scripts.train import ExperimentArguments, ModelArguments, NoiseArguments, run_methods


@dataclass
class DataArguments(NoiseArguments):
    """Which images and which noise."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with train2017/, val2017/, annotations/. None: the built-in sample."}
    )
    year: int = field(default=2017, metadata={"help": "COCO year.", "choices": [2014, 2017]})
    keep_unlabelled: bool = field(default=False, metadata={"help": "Keep images without any label."})


@dataclass
class CocoArguments(ExperimentArguments):
    """The paper's settings for COCO; a preset gives way to every flag."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: values | {"num_train_epochs": 50, "label_warmup_epochs": 10, "global_batch_size": 64}
        for name, values in ExperimentArguments.PRESETS.items()
    }
    # Published for COCO, with epochs and batch of its own.
    PRESETS["ml-decoder"] = ExperimentArguments.PRESETS["ml-decoder"] | {"label_warmup_epochs": 10}

    output_dir: str = field(default="outputs/coco", metadata={"help": "Where models and checkpoints go."})


@dataclass
class SampleArguments(CocoArguments):
    """What the built-in sample is learned with, from scratch, in a few minutes on two cores.

    Chosen on a sample drawn with another seed (`make_scenes(seed=1)`). A network from scratch learns slowly, hence
    AdamW, the long warm-up, and weaker mixing than the paper's alpha of 4, for Mixup and BalanceMix alike.
    """

    _SCHEDULE: ClassVar[dict[str, Any]] = {
        "num_train_epochs": 32,
        "label_warmup_epochs": 22,
        "global_batch_size": 32,
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": CocoArguments.PRESETS["paper"] | _SCHEDULE,
        "ml-decoder": CocoArguments.PRESETS["ml-decoder"] | _SCHEDULE,
        "default": CocoArguments.PRESETS["default"]
        | _SCHEDULE
        | {
            "optim": "adamw_torch_fused",
            "optim_args": None,
            "learning_rate": 4e-3,
            "mixup_alpha": 0.2,
        },
    }

    output_dir: str = field(default="outputs/sample", metadata={"help": "Where models and checkpoints go."})
    channels_last: bool = field(default=True, metadata={"help": "Memory format of convolutional networks."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that make the views."})
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep them between epochs."})
    many_shot: int = field(default=300, metadata={"help": "Classes with more positive training labels are many-shot."})
    few_shot: int = field(default=150, metadata={"help": "Classes with fewer are few-shot."})
    eval_strategy: str = field(default="no", metadata={"help": "When to evaluate before the end."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint."})
    save_steps: float = field(default=0.25, metadata={"help": "Steps, or share of the run, between two."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=470, metadata={"help": "Steps between two lines of training loss."})


def parse(argv: list[str] | None) -> tuple[DataArguments, ModelArguments, CocoArguments]:
    data, model, args = parse_arguments((DataArguments, ModelArguments, CocoArguments), argv, description=__doc__)
    if data.data_dir is None:  # the same flags again, with the sample's defaults
        data, model, args = parse_arguments((DataArguments, ModelArguments, SampleArguments), argv)
        data.noise = data.noise or "mislabel"
        if model.model_name_or_path is None:
            model.model_name_or_path, model.from_scratch = "resnet10t", True
            model.model_kwargs = '{"channels": [24, 48, 96, 192], "stem_width": 16}'
        model.method = model.method or ["bce", "mixup", "balancemix"]
        args.image_size = args.image_size or 48
    return data, model, args


def main(argv: list[str] | None = None) -> None:
    data, model, args = parse(argv)
    main_process = args.process_index == 0
    if data.data_dir is None and main_process:
        print("No --data_dir given: using the built-in sample (small drawn scenes, made once into your cache).")

    def load() -> list[Any]:
        root = data.data_dir or make_scenes()
        options = {"keep_unlabelled": data.keep_unlabelled, "on_bad_image": data.on_bad_image}
        return [load_coco(root, split=split, year=data.year, **options) for split in ("train", "val")]

    run_methods(load, data, model, args)
    if data.data_dir is None and main_process:
        print("or your own data in COCO format:\n    accelerate launch examples/run_coco.py --data_dir DIR --help")


if __name__ == "__main__":
    run(main)
