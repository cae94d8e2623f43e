"""The kinds of data that the scripts take: their flags, and how each is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from hf_balancemix.data import (
    class_names,
    from_csv,
    from_detection,
    from_tags,
    iterative_split,
    load_coco,
    load_deepfashion,
    load_voc,
    make_scenes,
)
from hf_balancemix.scripts.parser import flag

Pair = tuple[datasets.Dataset, datasets.Dataset]
"""Training and evaluation set."""


@dataclass
class DataArguments:
    """How much of the data to use, and what to do with images that cannot be read."""

    help_group = "data"

    on_bad_image: str = flag("error", "Absent or truncated images: stop, or leave out and count.", ["error", "skip"])
    max_train_samples: int | None = flag(None, "Use only so many training images.")
    max_eval_samples: int | None = flag(None, "Use only so many evaluation images.")


@dataclass
class CocoData(DataArguments):
    """Data in COCO's layout, or the built-in sample."""

    data_dir: str | None = flag(
        None, "Folder with train2017/, val2017/, annotations/. Without it: the built-in sample and its own defaults."
    )
    year: int = flag(2017, "COCO year.", [2014, 2017])
    keep_unlabelled: bool = flag(False, "Keep images without any label.")

    def load(self, seed: int) -> Pair:
        root = self.data_dir or make_scenes()
        options = {"year": self.year, "keep_unlabelled": self.keep_unlabelled, "on_bad_image": self.on_bad_image}
        return load_coco(root, split="train", **options), load_coco(root, split="val", **options)


@dataclass
class VocData(DataArguments):
    """Pascal VOC. The paper names no year; its class counts fit the default, and difficult objects as negative."""

    data_dir: str | None = flag(None, "Folder with VOCdevkit/. Required.")
    train_year: str = flag("2007+2012", "Year of the training images.", ["2007", "2012", "2007+2012"])
    train_split: str = flag("trainval", "Split to train on.", ["train", "val", "trainval"])
    eval_year: str = flag("2007", "Year of the evaluation images.", ["2007", "2012"])
    eval_split: str = flag("test", "Split to evaluate on.", ["train", "val", "trainval", "test"])
    difficult: str = flag(
        "positive",
        "Classes of which an image shows difficult objects only. The paper's class counts fit 'negative'.",
        ["positive", "ignore", "negative"],
    )

    def __post_init__(self) -> None:
        _check_folder(self.data_dir, "VOCdevkit/")

    def load(self, seed: int) -> Pair:
        options = {"difficult": self.difficult, "on_bad_image": self.on_bad_image}
        return (
            load_voc(self.data_dir, year=self.train_year, split=self.train_split, **options),
            load_voc(self.data_dir, year=self.eval_year, split=self.eval_split, **options),
        )


@dataclass
class DeepFashionData(DataArguments):
    """DeepFashion's fine-grained attributes; the paper trains on train+val and evaluates on test."""

    data_dir: str | None = flag(None, "Folder with Anno_fine/ and Img/. Required.")
    train_split: str = flag("train+val", "Split to train on.", ["train", "train+val"])
    eval_split: str = flag("test", "Split to evaluate on.", ["val", "test"])

    def __post_init__(self) -> None:
        _check_folder(self.data_dir, "Anno_fine/ and Img/")

    def load(self, seed: int) -> Pair:
        splits = (self.train_split, self.eval_split)
        train, test = (load_deepfashion(self.data_dir, split, on_bad_image=self.on_bad_image) for split in splits)
        return train, test


def _check_folder(data_dir: str | None, holds: str) -> None:
    if data_dir is None:
        raise ValueError(f"data_dir is None; it must be the folder that holds {holds}; pass --data_dir DIR.")


@dataclass
class AnyData(DataArguments):
    """A folder of images with a CSV, or a data set of the Hub."""

    dataset_name: str | None = flag(None, "Data set on the Hub, or a folder that save_to_disk of datasets wrote.")
    dataset_config: str | None = flag(None, "Its configuration.")
    train_split: str = flag("train", "Its training split.")
    eval_split: str | None = flag(None, "Its evaluation split. Default: held out.")
    train_dir: str | None = flag(None, "Instead: folder with the training images.")
    train_csv: str | None = flag(None, "Their labels. Default: labels.csv in the folder.")
    eval_dir: str | None = flag(None, "Folder with the evaluation images. Default: held out.")
    eval_csv: str | None = flag(None, "Their labels. Default: labels.csv in the folder.")
    image_column: str | None = flag(
        None, "Column with the images (Hub) or file names (CSV). Default: image, file_name."
    )
    label_column: str | None = flag(None, "Column with an image's labels. Default for a CSV: one 0/1 column a class.")
    objects_column: str | None = flag(None, "Column with the objects, for detection data.")
    category_field: str = flag("category", "Field of an object with its class.")
    separator: str | None = flag(None, "What separates the labels in a text column.")
    unknown: str = flag("negative", "Empty cells of 0/1 columns: negative, or no label.", ["negative", "masked"])
    held_out: float = flag(0.1, "Share held out where there is no evaluation data.")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_dir is None):
            raise ValueError(
                f"dataset_name is {self.dataset_name!r}, and train_dir is {self.train_dir!r}; it must be one of them; "
                "pass either --dataset_name (Hub) or --train_dir (a folder of images with a CSV)."
            )

    def load(self, seed: int) -> Pair:
        """Training and evaluation set; what is held out is stratified by labels."""
        if self.train_dir is not None:
            train = self._from_folder(self.train_dir, self.train_csv)
            if self.eval_dir:
                return train, self._from_folder(self.eval_dir, self.eval_csv, class_names(train))
        else:
            train = self._from_hub(self.train_split)
            if self.eval_split:
                return train, self._from_hub(self.eval_split, class_names(train))
        train, evaluation = iterative_split(train, [1 - self.held_out, self.held_out], seed=seed)
        return train, evaluation

    def _from_folder(self, folder: str, csv: str | None, names: Sequence[str] | None = None) -> datasets.Dataset:
        return from_csv(
            csv or Path(folder, "labels.csv"),
            folder,
            image_column=self.image_column or "file_name",
            label_column=self.label_column,
            separator=self.separator,
            names=names,
            unknown=self.unknown,
            on_bad_image=self.on_bad_image,
        )

    def _from_hub(self, split: str, names: Sequence[str] | None = None) -> datasets.Dataset:
        if Path(self.dataset_name, "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(self.dataset_name)[split]
        else:
            dataset = datasets.load_dataset(self.dataset_name, self.dataset_config, split=split)
        if self.image_column not in (None, "image"):
            dataset = dataset.rename_column(self.image_column, "image")
        if self.objects_column is not None:
            return from_detection(dataset, objects=self.objects_column, category=self.category_field, names=names)
        if self.label_column is not None:
            return from_tags(dataset, column=self.label_column, separator=self.separator, names=names)
        return dataset  # with `labels` as this package makes them
