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
    check_plain_path,
    first_repeat,
    image_dataset,
    present_files,
)

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
YEARS = (2014, 2017)


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
        on_bad_image: What to do about images that are listed but absent: "error", or "skip" to leave them out with a
            warning that counts them.

    Returns:
        A `datasets.Dataset` with the columns `image` (Image, RGB, a path until it is accessed), `labels`
        (List(ClassLabel), the present classes in ascending order) and `image_id` (int64, or string where the JSON has
        strings).

    Raises:
        ValueError: An argument is none of its choices, the JSON is not valid, lacks a part or contradicts itself, or
            no image is left; the message names the record.
        FileNotFoundError: The root, the annotation file, the image folder or an image is absent.
    """
    check_choice("split", split, SPLITS)
    check_choice("year", year, YEARS)
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
    class_of, names = _categories(content["categories"], annotation_file)
    files = _images(content["images"], annotation_file)
    present = _present_classes(content["annotations"], files, class_of, annotation_file)

    kept = [image_id for image_id in files if keep_unlabelled or present[image_id]]
    if not kept:
        raise ValueError(
            f"{annotation_file}: none of the {len(files)} images has an annotation; one must have; check the file, or "
            "pass keep_unlabelled=True to keep images without labels."
        )
    if len(kept) < len(files):
        logger.info("%s: dropped %d images without an annotation.", annotation_file.name, len(files) - len(kept))
    return image_dataset(
        [os.path.join(image_dir, files[image_id]) for image_id in kept],
        [sorted(present[image_id]) for image_id in kept],
        kept,
        names,
        present=present_files(image_dir, [files[image_id] for image_id in kept], annotation_file, on_bad_image),
        name="coco",
        source=f"{root.name}/{split}{year} in COCO layout",
    )


def _read_json(file: Path) -> dict[str, list[Any]]:
    """The parsed JSON: an object whose 'images', 'annotations' and 'categories' are lists."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream, object_hook=_without_outline)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); it may be cut off: "
            "copy or download it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); copy or download it again.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(
                f"{file} has no list '{key}'; it must be a JSON object with the lists 'images', 'annotations' and "
                "'categories' (COCO's instances format); point to such a file."
            )
    return content


def _without_outline(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)  # most of COCO's file: without it the parsed object is a fraction of the size
    return record


def _get(record: Any, key: str, kinds: tuple[type, ...], part: str, index: int, file: Path) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) not in kinds:  # exact types: True is no id
        wanted = " or ".join({int: "an integer", str: "a string"}[kind] for kind in kinds)
        if isinstance(record, dict):
            problem = f"has the {key} {value!r}; it must be {wanted}"
        else:
            problem = f"is {record!r}; it must be an object with the {key}, {wanted}"
        raise ValueError(f"{file}: {part}[{index}] {problem}; repair the file.")
    return value


def _ids(records: list[Any], part: str, file: Path) -> list[int | str]:
    """The ids of all records: all integers or all strings, no one twice."""
    ids = [_get(record, "id", (int, str), part, index, file) for index, record in enumerate(records)]
    for index, value in enumerate(ids):
        if type(value) is not type(ids[0]):
            raise ValueError(
                f"{file}: {part}[0] has the id {ids[0]!r} and {part}[{index}] {value!r}; they must be all integers or "
                "all strings; convert one kind."
            )
    if repeat := first_repeat(ids):
        index = repeat[1]
        raise ValueError(
            f"{file}: {part}[{index}] has the id {ids[index]!r} a second time; it must be unique; remove one."
        )
    return ids


def _categories(categories: list[Any], file: Path) -> tuple[dict[int | str, int], list[str]]:
    """Category id to class index, and the class names; in the order of the ids."""
    names: dict[str, int | str] = {}
    for index, category_id in enumerate(_ids(categories, "categories", file)):
        name = _get(categories[index], "name", (str,), "categories", index, file)
        if name in names:
            raise ValueError(
                f"{file}: categories {names[name]!r} and {category_id!r} are both named {name!r}; rename one."
            )
        names[name] = category_id
    if not names:
        raise ValueError(f"{file}: 'categories' is empty; it must have at least one class; list them.")
    ordered = sorted(names, key=names.__getitem__)
    return {names[name]: k for k, name in enumerate(ordered)}, ordered


def _images(images: list[Any], file: Path) -> dict[int | str, str]:
    """Image id to file name, in the order of the file."""
    files: dict[int | str, str] = {}
    for index, image_id in enumerate(_ids(images, "images", file)):
        name = _get(images[index], "file_name", (str,), "images", index, file)
        check_plain_path(name, f"{file}: images[{index}]: the file_name")
        files[image_id] = name
    return files


def _present_classes(
    annotations: list[Any], files: dict[int | str, str], class_of: dict[int | str, int], file: Path
) -> dict[int | str, set[int]]:
    """Image id to the classes that its annotations name."""
    present: dict[int | str, set[int]] = {image_id: set() for image_id in files}
    for index, annotation in enumerate(annotations):
        image_id = _get(annotation, "image_id", (int, str), "annotations", index, file)
        category_id = _get(annotation, "category_id", (int, str), "annotations", index, file)
        if image_id not in present:
            raise ValueError(
                f"{file}: annotations[{index}] has the image_id {image_id!r}; it must be in 'images'; remove the "
                "annotation or list the image."
            )
        if category_id not in class_of:
            raise ValueError(
                f"{file}: annotations[{index}] has the category_id {category_id!r}; it must be in 'categories' "
                f"({len(class_of)} ids, {min(class_of)!r} to {max(class_of)!r}); correct it or list the category."
            )
        present[image_id].add(class_of[category_id])
    return present
