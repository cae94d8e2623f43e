r"""Train BalanceMix on Pascal VOC with the paper's settings.

    accelerate launch examples/run_voc.py --data_dir DIR --image_size 448 --preset paper \
        --noise mislabel --noise_rate 0.4

DIR holds VOCdevkit/. The paper names no year; its class counts fit trainval of 2007+2012, tested on 2007's test split,
which is the default here. What was used is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_balancemix import load_voc
from hf_balancemix.scripts.parser import parse_arguments, run
from hf_balancemix.scripts.train import ExperimentArguments, ModelArguments, NoiseArguments, run_methods


@dataclass
class DataArguments(NoiseArguments):
    """Which images and which noise."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder with VOCdevkit/. Required."})
    train_year: str = field(default="2007+2012", metadata={"choices": ["2007", "2012", "2007+2012"]})
    train_split: str = field(default="trainval", metadata={"choices": ["train", "val", "trainval"]})
    eval_year: str = field(default="2007", metadata={"choices": ["2007", "2012"]})
    eval_split: str = field(default="test", metadata={"choices": ["train", "val", "trainval", "test"]})
    difficult: str = field(
        default="positive",
        metadata={
            "help": "Classes of which an image shows difficult objects only. The paper's class counts fit 'negative'.",
            "choices": ["positive", "ignore", "negative"],
        },
    )


@dataclass
class VocArguments(ExperimentArguments):
    """The paper's settings for VOC; a preset gives way to every flag."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: values | {"num_train_epochs": 20, "label_warmup_epochs": 5, "global_batch_size": 32}
        for name, values in ExperimentArguments.PRESETS.items()
    }

    output_dir: str = field(default="outputs/voc", metadata={"help": "Where models and checkpoints go."})


def main(argv: list[str] | None = None) -> None:
    data, model, args = parse_arguments((DataArguments, ModelArguments, VocArguments), argv, description=__doc__)
    if data.data_dir is None:
        raise ValueError("--data_dir is not given; pass the folder that holds VOCdevkit/.")
    if args.process_index == 0:
        print(f"Training on VOC{data.train_year} {data.train_split}, evaluating on VOC{data.eval_year} "
              f"{data.eval_split}; difficult objects count as {data.difficult}.")  # fmt: skip

    def load() -> list[Any]:
        options = {"difficult": data.difficult, "on_bad_image": data.on_bad_image}
        return [
            load_voc(data.data_dir, year=data.train_year, split=data.train_split, **options),
            load_voc(data.data_dir, year=data.eval_year, split=data.eval_split, **options),
        ]

    run_methods(load, data, model, args)


if __name__ == "__main__":
    run(main)
