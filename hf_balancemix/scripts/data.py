"""The kinds of data that the scripts take: their flags, and how each is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

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
from hf_balancemix.data.adapters import from_multi_hot, with_image_ids
from hf_balancemix.data.files import absolute, first_few
from hf_balancemix.data.labels import is_class_list
from hf_balancemix.data.views import undecoded_images
from hf_balancemix.files import check_inside, check_links, one_line, quote
from hf_balancemix.scripts.parser import flag

Pair = tuple[datasets.Dataset, datasets.Dataset]
"""Training and evaluation set."""


@dataclass
class DataArguments:
    """How much of the data to use, and what to do with images that cannot be read."""

    help_group = "data"

    on_bad_image: str = flag("error", "Absent or truncated images: stop, or leave out and count.", ["error", "skip"])
    follow_links: bool = flag(False, "Read files where links or '..' lead out of the data's folder.")
    max_train_samples: int | None = flag(None, "Use only so many training images.")
    max_eval_samples: int | None = flag(None, "Use only so many evaluation images.")

    @property
    def holds_out(self) -> bool:
        """Whether the evaluation set of `load` is a share of the training data."""
        return False

    def load(self, seed: int) -> Pair:
        raise NotImplementedError

    def load_to_audit(self, seed: int) -> datasets.Dataset:
        """All training data, with what `load` holds out of it."""
        if self.max_eval_samples is not None:
            raise ValueError(
                f"max_eval_samples is {self.max_eval_samples}; an audit is of the training data, so that it must be "
                "left out; pass --max_train_samples."
            )
        pair = self.load(seed)
        dataset = datasets.concatenate_datasets(list(pair)) if self.holds_out else pair[0]
        if self.max_train_samples is not None:
            dataset = dataset.shuffle(seed=seed).select(range(min(self.max_train_samples, len(dataset))))
        return dataset


def _check_share(held_out: float) -> None:
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be a share in (0, 1); pass for instance 0.1.")


def _hold_out(dataset: datasets.Dataset, share: float, seed: int, groups: str | None = None) -> Pair:
    train, evaluation = iterative_split(dataset, [1 - share, share], seed=seed, groups=groups)
    return train, evaluation


@dataclass
class CocoData(DataArguments):
    """Data in COCO's layout or as tools export it in COCO's format, or the built-in sample."""

    data_dir: str | None = flag(
        None,
        "Folder with train2017/, val2017/, annotations/, or an export of Roboflow, CVAT, Label Studio, ... Default: "
        "the built-in sample, with defaults of its own.",
    )
    annotations: str | None = flag(None, "The JSON file of the training set. Default: looked for in the folder.")
    images: str | None = flag(None, "Folder of the training images. Default: where the first of them are.")
    eval_annotations: str | None = flag(None, "The JSON file of the evaluation set. Default: looked for.")
    eval_images: str | None = flag(None, "Folder of the evaluation images. Default: where the first of them are.")
    held_out: float | None = flag(None, "Instead of an evaluation set: the share of the training set to hold out.")
    year: int = flag(2017, "COCO year.", [2014, 2017])
    keep_unlabelled: bool = flag(False, "Keep images without any label.")

    def __post_init__(self) -> None:
        if self.held_out is not None:
            _check_share(self.held_out)
        names = ("annotations", "images", "eval_annotations", "eval_images", "follow_links")
        files = [name for name in names if getattr(self, name)]
        if files and self.data_dir is None:
            raise ValueError(
                f"{files[0]} is {quote(getattr(self, files[0]))}; it needs the data's folder; pass --data_dir."
            )
        if self.held_out is not None and (self.eval_annotations or self.eval_images):
            raise ValueError("held_out is given and so is an evaluation set; it must be one of them; leave out one.")

    @property
    def holds_out(self) -> bool:
        return self.held_out is not None

    def load(self, seed: int) -> Pair:
        root = self.data_dir or make_scenes()
        options = {"year": self.year, "keep_unlabelled": self.keep_unlabelled, "on_bad_image": self.on_bad_image}
        options["follow_links"] = self.follow_links
        train = load_coco(root, split="train", annotations=self.annotations, images=self.images, **options)
        if self.held_out is not None:
            return _hold_out(train, self.held_out, seed)
        val = {"annotations": self.eval_annotations, "images": self.eval_images}
        return train, load_coco(root, split="val", **val, **options)


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
    class_names: list[str] | None = flag(None, "The classes, in their order, where they are not VOC's.")

    def __post_init__(self) -> None:
        _check_folder(self.data_dir, "VOCdevkit/")

    def load(self, seed: int) -> Pair:
        options = {"difficult": self.difficult, "on_bad_image": self.on_bad_image, "names": self.class_names}
        options["follow_links"] = self.follow_links
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
        options = {"on_bad_image": self.on_bad_image, "follow_links": self.follow_links}
        train, test = (load_deepfashion(self.data_dir, split, **options) for split in splits)
        return train, test


def _check_folder(data_dir: str | None, holds: str) -> None:
    if data_dir is None:
        raise ValueError(f"data_dir is None; it must be the folder that holds {holds}; pass --data_dir DIR.")


@dataclass
class AnyData(DataArguments):
    """A folder of images with a CSV, or a data set of the Hub."""

    _WITHOUT_EFFECT: ClassVar = {  # with a folder or without
        True: ("dataset_config", "eval_split", "objects_column"),
        False: (
            *("train_csv", "eval_dir", "eval_csv", "class_ids", "confidence_column", "positive_from"),
            *("unknown", "blank", "delimiter", "suffix"),
        ),
    }

    dataset_name: str | None = flag(None, "Data set on the Hub, or a folder that save_to_disk of datasets wrote.")
    dataset_config: str | None = flag(None, "Its configuration.")
    train_split: str = flag("train", "Its training split.")
    eval_split: str | None = flag(None, "Its evaluation split. Default: held out.")
    train_dir: str | None = flag(None, "Instead: folder with the training images.")
    train_csv: str | None = flag(None, "Their labels. Default: labels.csv in the folder.")
    eval_dir: str | None = flag(
        None, "Folder with the evaluation images. Default: the same with --eval_csv, else held out."
    )
    eval_csv: str | None = flag(None, "Their labels. Default: labels.csv in the folder.")
    image_column: str | None = flag(
        None, "Column with the images (Hub) or file names (CSV). Default: image, file_name."
    )
    label_column: str | None = flag(None, "Column with an image's labels. Default for a CSV: one 0/1 column a class.")
    class_names: list[str] | None = flag(
        None,
        "The classes, in their order: the 0/1 columns of a CSV, or all that may occur in --label_column. Default: all "
        "other columns, or what occurs.",
    )
    class_ids: bool = flag(False, "A CSV's --label_column has ids, which count through --class_names from 0.")
    objects_column: str | None = flag(None, "Column with the objects, for detection data.")
    category_field: str = flag("category", "Field of an object with its class.")
    separator: str | None = flag(None, "What separates the labels in a text column; written lists need none.")
    confidence_column: str | None = flag(
        None, "A CSV with a row for each image and label, as Open Images: its column of confidences."
    )
    positive_from: float = flag(0.5, "The least confidence of a positive label; 0 is negative, the rest unknown.")
    unknown: str | None = flag(
        None, "Cells of -1 or ? in 0/1 columns: negative (default), or no label.", ["negative", "masked"]
    )
    blank: str | None = flag(None, "Empty cells: the same. Default: as --unknown.", ["negative", "masked"])
    delimiter: str = flag(",", "What stands between the columns of a CSV.")
    suffix: str = flag("", "Ending of the image files, where a CSV has names without one, such as .jpg.")
    group_column: str | None = flag(
        None, "Column of what must not be on both sides where evaluation data is held out, such as a patient's id."
    )
    held_out: float = flag(0.1, "Share held out where there is no evaluation data.")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_dir is None):
            raise ValueError(
                f"dataset_name is {quote(self.dataset_name)}, and train_dir is {quote(self.train_dir)}; it must be "
                "one of them; pass either --dataset_name (Hub) or --train_dir (a folder of images with a CSV)."
            )
        _check_share(self.held_out)
        for name in self._WITHOUT_EFFECT[self.train_dir is not None]:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                where = "a folder with a CSV" if self.train_dir is not None else "a data set by --dataset_name"
                raise ValueError(
                    f"{name} is {quote(getattr(self, name))}; with {where} it has no effect; leave it out."
                )
        for name, needs in (("separator", "label_column"), ("category_field", "objects_column")):
            given = getattr(self, name) != self.__dataclass_fields__[name].default
            if given and getattr(self, needs) is None:
                raise ValueError(
                    f"{name} is {quote(getattr(self, name))}; without {needs} it has no effect; pass --{needs}."
                )
        if self.held_out != 0.1 and (self.eval_split or self.eval_dir or self.eval_csv):
            raise ValueError(f"held_out is {self.held_out}; with evaluation data it has no effect; leave it out.")
        if self.group_column is not None and (self.eval_csv or self.eval_split or self.eval_dir):
            needed = "it must be left out where the evaluation data is given, as nothing is held out"
            raise ValueError(f"group_column is {quote(self.group_column)}; {needed}; leave it out.")

    @property
    def holds_out(self) -> bool:
        return not (self.eval_dir or self.eval_csv or self.eval_split)

    def load(self, seed: int) -> Pair:
        """Training and evaluation set; what is held out is stratified by labels."""
        if self.train_dir is not None:
            train = self._from_folder(self.train_dir, self.train_csv)
            if self.eval_dir or self.eval_csv:
                return train, self._from_folder(self.eval_dir or self.train_dir, self.eval_csv, class_names(train))
        else:
            train = self._from_hub(self.train_split)
            if self.eval_split:
                return train, self._from_hub(self.eval_split, class_names(train))
        return _hold_out(train, self.held_out, seed, self.group_column)

    def _from_folder(self, folder: str, csv: str | None, names: Sequence[str] | None = None) -> datasets.Dataset:
        return from_csv(
            csv or Path(folder, "labels.csv"),
            folder,
            image_column=self.image_column or "file_name",
            label_column=self.label_column,
            separator=self.separator,
            class_ids=self.class_ids,
            names=names or self.class_names,
            confidence_column=self.confidence_column,
            positive_from=self.positive_from,
            unknown=self.unknown,
            blank=self.blank,
            group_column=self.group_column,
            delimiter=self.delimiter.replace("\\t", "\t"),
            suffix=self.suffix,
            on_bad_image=self.on_bad_image,
            follow_links=self.follow_links,
        )

    def _from_hub(self, split: str, names: Sequence[str] | None = None) -> datasets.Dataset:
        if Path(self.dataset_name or "").is_dir():
            check_links(self.dataset_name or "", self.follow_links)
        dataset = _load_split(self.dataset_name or "", self.dataset_config, split)
        names = names or self.class_names
        for flag_name in ("image_column", "label_column", "objects_column", "group_column"):
            column = getattr(self, flag_name)
            if column is not None and column not in dataset.column_names:
                there_are = f"the columns of the data set are {one_line(dataset.column_names)}"
                found = f"{flag_name} is {quote(column)}, and {there_are}"
                raise ValueError(f"{found}; it must be one of these; correct --{flag_name}.")
        groups = self.group_column and dataset.select_columns([self.group_column]).with_format(None)[:]
        if self.image_column not in (None, "image"):
            dataset = dataset.remove_columns([name for name in dataset.column_names if name == "image"])
            dataset = dataset.rename_column(self.image_column, "image")
        if not self.follow_links:
            _check_image_paths(dataset, self.dataset_name or "")
        if self.objects_column is not None:
            dataset = from_detection(dataset, objects=self.objects_column, category=self.category_field, names=names)
        elif self.label_column is not None:
            dataset = from_tags(dataset, column=self.label_column, separator=self.separator, names=names)
        elif "labels" not in dataset.column_names:
            found = f"the columns of the data set are {one_line(dataset.column_names)}, without 'labels'"
            raise ValueError(f"{found}; the labels must be in one of them; pass --label_column or --objects_column.")
        elif not (
            is_class_list(dataset.features["labels"]) or {"unknown_labels", "clean_labels"} & set(dataset.features)
        ):
            dataset = from_multi_hot(dataset, names=names)
        elif names is not None and names != class_names(dataset):  # the data set's own `labels`
            raise ValueError(
                f"class_names are {first_few(names)} and the data set's classes {first_few(class_names(dataset))}; "
                "they must be these; leave out --class_names, or name the column of tags with --label_column."
            )
        dataset = with_image_ids(dataset)
        if groups and self.group_column not in dataset.column_names:
            dataset = dataset.add_column(self.group_column, groups[self.group_column])
        return dataset


def _check_image_paths(dataset: datasets.Dataset, name: str) -> None:
    """Raise a ValueError where an image is a path, without bytes, that leads out of the data set's folder and of the
    caches that the Hub's files are in."""
    if not isinstance(dataset.features.get("image"), datasets.Image):
        return
    parts = undecoded_images(dataset).flatten().data
    paths = parts["image.path"].filter(parts["image.bytes"].is_null()).drop_null().to_pylist()
    roots = [absolute(name)] if Path(name).is_dir() else []
    roots += map(absolute, (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE))
    for path in paths:
        path = absolute(path)
        check_inside(path, next((root for root in roots if path.is_relative_to(root)), roots[0]))


def _load_split(name: str, config: str | None, split: str) -> datasets.Dataset:
    """A split of a data set on the Hub, of a folder of images, or of what `save_to_disk` wrote.

    Raises:
        ValueError, FileNotFoundError: No such data set, configuration or split; the message says what there is.
    """
    for file in ("dataset_dict.json", "state.json"):
        if not Path(name, file).exists():
            continue
        if config is not None:
            raise ValueError(f"dataset_config is {quote(config)}; a folder of save_to_disk has none; leave it out.")
        try:
            saved = datasets.load_from_disk(name)
        except Exception as error:  # as below
            problem = f"the data set {quote(name)} cannot be loaded ({type(error).__name__}: {one_line(error)})"
            raise ValueError(f"{problem}; it must be what save_to_disk wrote; copy it again.") from error
        if isinstance(saved, datasets.Dataset):
            if split != "train":
                needed = "a folder of one saved data set has no splits"
                raise ValueError(f"the split is {quote(split)}; {needed}; leave out --train_split and --eval_split.")
            return saved
        if split not in saved:
            raise ValueError(
                f"the split is {quote(split)}; {name} has {one_line(', '.join(saved))}; choose one of these."
            )
        return saved[split]
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # files of strangers and failed connections: of `datasets` and what it calls anything
        # An error in a row of metadata is the cause of another.
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        lines = [line.strip() for line in str(cause or error).splitlines()] or [type(error).__name__]
        # The lines after the first say what configurations there are, or how to go on.
        said = one_line(" ".join(lines if "config" in lines[0].lower() else lines[:1]), 200).rstrip(".")
        fix = "correct --dataset_name, --dataset_config or the split"
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"the data set {quote(name)} (split {quote(split)}) cannot be loaded: {said}; {fix}.") from error
