"""COCO and every data set in its layout: images in a folder, labels from an instances JSON."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets

from hf_balancemix.data.files import (
    absolute,
    check_choice,
    check_layout,
    first_repeat,
    image_dataset,
    plain_path,
)

logger = logging.getLogger(__name__)


def load_coco(
    root: str | os.PathLike[str],
    split: str = "train",
    year: int = 2017,
    keep_unlabelled: bool = False,
    on_bad_image: str = "error",
) -> datasets.Dataset:
    """Load one split of a data set in COCO's official layout as a multi-label data set.

    The layout is `root/annotations/instances_{split}{year}.json` and the images it lists under
    `root/{split}{year}/`. A class is present in an image if at least one annotation says so; crowd annotations count.
    The K classes are ordered by category id. The images keep the order of the JSON and are decoded on access.

    Args:
        root: The folder that holds `annotations/` and the image folders.
        split: "train" or "val".
        year: 2014 or 2017.
        keep_unlabelled: Keep the images without an annotation. By default they are dropped, as ASL and ML-Decoder do.
        on_bad_image: "error", or "skip" to leave out images that are listed but absent, with a warning.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels` (List(ClassLabel), the present
        classes in ascending order) and `image_id` (int64, or string where the JSON has strings).

    Raises:
        ValueError: An argument is none of its choices, the JSON is not valid or contradicts itself, or no image is
            left.
        FileNotFoundError: The root, the annotation file, the image folder or an image is absent.
    """
    check_choice("split", split, ("train", "val"))
    check_choice("year", year, (2014, 2017))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    root = absolute(root)
    annotation_file = root / "annotations" / f"instances_{split}{year}.json"
    image_dir = root / f"{split}{year}"
    check_layout(
        (
            ("folder", root, root.is_dir()),
            ("annotation file", annotation_file, annotation_file.is_file()),
            ("image folder", image_dir, image_dir.is_dir()),
        ),
        f"COCO's layout is expected:\n"
        f"  {root}/\n"
        f"    annotations/{annotation_file.name}\n"
        f"    {image_dir.name}/  (the images that the annotation file lists)\n"
        f"Point to the folder that holds both, or choose another split or year.",
    )

    content = _read_json(annotation_file)
    class_of, names = _categories(content, annotation_file)
    image_ids = _ids(content, "images", annotation_file)
    file_names = _values(content, "images", "file_name", (str,), annotation_file)
    files = dict(zip(image_ids, file_names, strict=True))
    for index, name in enumerate(files.values()):
        plain_path(name, f"{annotation_file}: images[{index}]: the file_name")
    present = _present_classes(content, files, class_of, annotation_file)

    kept = [image_id for image_id in files if keep_unlabelled or present[image_id]]
    if not kept:
        problem = f"none of the {len(files)} images has an annotation; one must have"
        raise ValueError(f"{annotation_file}: {problem}; pass keep_unlabelled=True to keep images without labels.")
    if len(kept) < len(files):
        logger.info("%s: dropped %d images without an annotation.", annotation_file.name, len(files) - len(kept))
    return image_dataset(
        [(image_dir, [files[image_id] for image_id in kept], annotation_file)],
        [sorted(present[image_id]) for image_id in kept],
        kept,
        names,
        on_bad_image=on_bad_image,
        name="coco",
        source=f"{root.name}/{split}{year} in COCO layout",
    )


def _read_json(file: Path) -> dict[str, list[Any]]:
    """The parsed JSON: an object whose 'images', 'annotations' and 'categories' are lists."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream, object_hook=_without_outline)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        raise ValueError(f"{file} is {problem}; it may be cut off; copy it again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); copy it again.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list '{key}'; it must be in COCO's instances format; use such a file.")
    return content


def _without_outline(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)  # most of COCO's file: without it the parsed object is a fraction of the size
    return record


def _values(content: dict[str, list[Any]], part: str, key: str, kinds: tuple[type, ...], file: Path) -> list[Any]:
    """What each record of a part of the file has under a key; ValueError unless all are of these kinds."""
    values = []
    wanted = " or ".join({int: "an integer", str: "a string"}[kind] for kind in kinds)
    for index, record in enumerate(content[part]):
        if not isinstance(record, dict):
            raise ValueError(f"{file}: {part}[{index}] is {record!r}; it must be an object with the {key}; repair it.")
        value = record.get(key)
        if type(value) not in kinds:  # exact types: True is no id
            raise ValueError(f"{file}: {part}[{index}] has the {key} {value!r}; it must be {wanted}; repair it.")
        values.append(value)
    return values


def _ids(content: dict[str, list[Any]], part: str, file: Path) -> list[int | str]:
    """The ids of all records of a part: all integers or all strings, no one twice."""
    ids = _values(content, part, "id", (int, str), file)
    for index, value in enumerate(ids):
        if type(value) is not type(ids[0]):
            both = f"{part}[0] has the id {ids[0]!r} and {part}[{index}] {value!r}"
            raise ValueError(f"{file}: {both}; they must be all integers or all strings; convert one kind.")
    if repeat := first_repeat(ids):
        record = f"{part}[{repeat[1]}]"
        raise ValueError(
            f"{file}: {record} has the id {ids[repeat[1]]!r} a second time; it must be unique; remove one."
        )
    return ids


def _categories(content: dict[str, list[Any]], file: Path) -> tuple[dict[int | str, int], list[str]]:
    """Category id to class index, and the class names; in the order of the ids."""
    ids, names = _ids(content, "categories", file), _values(content, "categories", "name", (str,), file)
    if not ids:
        raise ValueError(f"{file}: 'categories' is empty; it must have at least one class; list them.")
    if repeat := first_repeat(names):
        first, second = (ids[index] for index in repeat)
        named = f"are both named {names[repeat[0]]!r}"
        raise ValueError(f"{file}: categories {first!r} and {second!r} {named}; names must differ; rename one.")
    class_of = {category_id: k for k, category_id in enumerate(sorted(ids))}
    return class_of, [names[ids.index(category_id)] for category_id in class_of]


def _present_classes(
    content: dict[str, list[Any]], files: dict[int | str, str], class_of: dict[int | str, int], file: Path
) -> dict[int | str, set[int]]:
    """Image id to the classes that its annotations name."""
    present: dict[int | str, set[int]] = {image_id: set() for image_id in files}
    image_ids = _values(content, "annotations", "image_id", (int, str), file)
    category_ids = _values(content, "annotations", "category_id", (int, str), file)
    for index, (image_id, category_id) in enumerate(zip(image_ids, category_ids, strict=True)):
        if image_id not in present:
            raise ValueError(
                f"{file}: annotations[{index}] has the image_id {image_id!r}; it must be in 'images'; list the image."
            )
        if category_id not in class_of:
            found = f"{file}: annotations[{index}] has the category_id {category_id!r}"
            known = f"{len(class_of)} ids, {min(class_of)!r} to {max(class_of)!r}"
            raise ValueError(f"{found}; it must be in 'categories' ({known}); list the category.")
        present[image_id].add(class_of[category_id])
    return present
