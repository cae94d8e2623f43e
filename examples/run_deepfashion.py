r"""Train BalanceMix on DeepFashion's fine-grained attributes (26 classes) with the paper's settings.

    accelerate launch examples/run_deepfashion.py --data_dir DIR --image_size 448 --preset paper \
        --noise flip --noise_rate 0.2

DIR is the Category and Attribute Prediction benchmark with Anno_fine/ and Img/. The paper's 16,000 training images are
train+val, its 4,000 test images the test split. The images may not be passed on: push no data set made from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_balancemix import load_deepfashion
from hf_balancemix.scripts.parser import parse_arguments, run
from hf_balancemix.scripts.train import ExperimentArguments, ModelArguments, NoiseArguments, run_methods


@dataclass
class DataArguments(NoiseArguments):
    """Which images and which noise."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder with Anno_fine/ and Img/. Required."})
    train_split: str = field(default="train+val", metadata={"choices": ["train", "train+val"]})
    eval_split: str = field(default="test", metadata={"choices": ["val", "test"]})


@dataclass
class DeepFashionArguments(ExperimentArguments):
    """The paper's settings for DeepFashion; a preset gives way to every flag."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: values | {"num_train_epochs": 40, "label_warmup_epochs": 5, "global_batch_size": 64}
        for name, values in ExperimentArguments.PRESETS.items()
    }

    output_dir: str = field(default="outputs/deepfashion", metadata={"help": "Where models and checkpoints go."})


def main(argv: list[str] | None = None) -> None:
    types = (DataArguments, ModelArguments, DeepFashionArguments)
    data, model, args = parse_arguments(types, argv, description=__doc__)
    if data.data_dir is None:
        raise ValueError("--data_dir is not given; pass the folder that holds Anno_fine/ and Img/.")
    if args.process_index == 0:
        print(
            f"Training on DeepFashion {data.train_split}, evaluating on {data.eval_split} (fine-grained attributes)."
        )

    def load() -> list[Any]:
        splits = (data.train_split, data.eval_split)
        return [load_deepfashion(data.data_dir, split=split, on_bad_image=data.on_bad_image) for split in splits]

    run_methods(load, data, model, args)


if __name__ == "__main__":
    run(main)
