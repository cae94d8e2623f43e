r"""Train BalanceMix on any multi-label image data set: from the Hub, or a folder of images with a CSV.

    accelerate launch examples/run_multilabel.py --dataset_name user/set --label_column tags
    accelerate launch examples/run_multilabel.py --dataset_name user/boxes --objects_column objects
    accelerate launch examples/run_multilabel.py --train_dir images --train_csv train.csv \
        --label_column labels --separator ","

A CSV has a column `file_name`, and either --label_column or one 0/1 column a class. Without an evaluation split, a
tenth of the training set is held out, stratified by labels, before any noise is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets

from hf_balancemix import from_csv, from_detection, from_tags, iterative_split
from hf_balancemix.data import class_names
from hf_balancemix.scripts.parser import parse_arguments, run
from hf_balancemix.scripts.train import ExperimentArguments, ModelArguments, NoiseArguments, run_methods


@dataclass
class DataArguments(NoiseArguments):
    """Which images and which noise."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a saved folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its training split."})
    eval_split: str | None = field(default=None, metadata={"help": "Its evaluation split. Default: held out."})
    train_dir: str | None = field(default=None, metadata={"help": "Instead: folder with the training images."})
    train_csv: str | None = field(default=None, metadata={"help": "Their labels. Default: labels.csv in the folder."})
    eval_dir: str | None = field(default=None, metadata={"help": "Folder with the evaluation images."})
    eval_csv: str | None = field(default=None, metadata={"help": "Their labels. Default: labels.csv in the folder."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images (Hub) or file names (CSV). Default: image, file_name."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column with the labels of an image."})
    objects_column: str | None = field(default=None, metadata={"help": "Column with the objects, for detection data."})
    category_field: str = field(default="category", metadata={"help": "Field of an object with its class."})
    separator: str | None = field(default=None, metadata={"help": "What separates the labels in a text column."})
    unknown: str = field(
        default="negative",
        metadata={"help": "Empty cells of 0/1 columns: negative, or no label.", "choices": ["negative", "masked"]},
    )
    held_out: float = field(default=0.1, metadata={"help": "Share held out where there is no evaluation data."})


@dataclass
class MultiLabelArguments(ExperimentArguments):
    """Any data set: no settings of the paper apply."""

    output_dir: str = field(default="outputs/multilabel", metadata={"help": "Where models and checkpoints go."})


def from_folder(data: DataArguments, folder: str, csv: str | None, names: list[str] | None = None) -> datasets.Dataset:
    return from_csv(
        csv or Path(folder, "labels.csv"),
        folder,
        image_column=data.image_column or "file_name",
        label_column=data.label_column,
        separator=data.separator,
        names=names,
        unknown=data.unknown,
        on_bad_image=data.on_bad_image,
    )


def from_hub(data: DataArguments, split: str, names: list[str] | None = None) -> datasets.Dataset:
    if Path(data.dataset_name).is_dir() and Path(data.dataset_name, "dataset_dict.json").exists():
        dataset = datasets.load_from_disk(data.dataset_name)[split]
    else:
        dataset = datasets.load_dataset(data.dataset_name, data.dataset_config, split=split)
    if data.image_column not in (None, "image"):
        dataset = dataset.rename_column(data.image_column, "image")
    if data.objects_column is not None:
        return from_detection(dataset, objects=data.objects_column, category=data.category_field, names=names)
    if data.label_column is not None:
        return from_tags(dataset, column=data.label_column, separator=data.separator, names=names)
    return dataset  # with `labels` as this package makes them


def load(data: DataArguments, seed: int) -> list[datasets.Dataset]:
    if (data.dataset_name is None) == (data.train_dir is None):
        raise ValueError("pass either --dataset_name (Hub) or --train_dir (a folder of images with a CSV).")
    if data.train_dir is not None:
        train = from_folder(data, data.train_dir, data.train_csv)
        val = data.eval_dir and from_folder(data, data.eval_dir, data.eval_csv, class_names(train))
    else:
        train = from_hub(data, data.train_split)
        val = data.eval_split and from_hub(data, data.eval_split, class_names(train))
    if val:
        return [train, val]
    return iterative_split(train, [1 - data.held_out, data.held_out], seed=seed)


def main(argv: list[str] | None = None) -> None:
    types = (DataArguments, ModelArguments, MultiLabelArguments)
    data, model, args = parse_arguments(types, argv, description=__doc__)
    run_methods(lambda: load(data, args.seed), data, model, args)


if __name__ == "__main__":
    run(main)
