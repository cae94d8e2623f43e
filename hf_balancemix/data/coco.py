"""COCO and every data set in its layout: images in a folder, labels from an instances JSON."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_balancemix.data.files import (
    absolute,
    check_choice,
    check_layout,
    first_few,
    first_repeat,
    image_dataset,
    name_of_folder,
    plain_path,
    read_json,
)
from hf_balancemix.data.sample import SCENES_FILE
from hf_balancemix.files import check_inside, one_line, quote

logger = logging.getLogger(__name__)

_OFFICIAL_IMAGES = {("train", 2017): 118_287, ("val", 2017): 5_000, ("train", 2014): 82_783, ("val", 2014): 40_504}
_SPLIT_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test", "testing"}}
_OTHER_TASKS = {"captions", "keypoints", "panoptic", "stuff", "info"}  # other files of COCO's
_OFFICIAL = re.compile(r"instances_(train|val)(2014|2017)\.json")


def load_coco(
    root: str | os.PathLike[str],
    split: str = "train",
    year: int = 2017,
    keep_unlabelled: bool = False,
    on_bad_image: str = "error",
    annotations: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
) -> datasets.Dataset:
    """Load one split of a data set in COCO's format as a multi-label data set.

    The official layout is `root/annotations/instances_{split}{year}.json` and the images it lists under
    `root/{split}{year}/`. Without it the file is looked for in `root`, `root/annotations` and the folder of the split
    (Roboflow's `train/_annotations.coco.json`, CVAT's `annotations/instances_default.json`, Label Studio's
    `result.json`, LVIS), and the images where the first of them are. A file that names no split is training data.

    A class is present in an image if at least one annotation says so; crowd annotations count. The K classes are
    ordered by category id. A category that no annotation uses and that is the supercategory of all others, as Roboflow
    writes it, is no class. The images keep the order of the JSON and are decoded on access.

    Args:
        root: The folder that holds annotations and images.
        split: "train" or "val".
        year: 2014 or 2017, of the official layout.
        keep_unlabelled: Keep the images without an annotation. By default they are dropped, as ASL and ML-Decoder do.
        on_bad_image: "error", or "skip" to leave out images that are listed but absent, with a warning.
        annotations: The JSON file, where it cannot be found; a path of its own or in `root`.
        images: The folder that the file names start from, likewise.
        follow_links: Read files where links or '..' lead out of the root, or of `images` where that lies elsewhere.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels` (List(ClassLabel), the present
        classes in ascending order), `image_id` (int64, or string where the JSON has strings) and, where the images
        list the classes that were looked for in vain (LVIS's `neg_category_ids`), `unknown_labels`: all but these and
        the present ones.

    Raises:
        ValueError: An argument is none of its choices, more than one file could be meant, the JSON is not valid or
            contradicts itself, no image is left, or a link leads out of the root.
        FileNotFoundError: The root, the annotation file, the image folder or an image is absent.
    """
    check_choice("split", split, ("train", "val"))
    check_choice("year", year, (2014, 2017))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    root = absolute(root)
    annotation_file = _annotation_file(root, split, year, annotations)
    inside = root if annotation_file.is_relative_to(root) else annotation_file.parent
    check_inside(annotation_file, inside, follow_links)
    content = _read_json(annotation_file)
    class_of, names = _categories(content, annotation_file)
    image_ids = _ids(content, "images", annotation_file)
    file_names = [
        plain_path(name, f"{annotation_file}: images[{index}]: the file_name", follow_links)
        for index, name in enumerate(_file_names(content, annotation_file))
    ]
    image_dir = _image_folder(root, split, year, annotation_file, images, file_names[:20])
    if images is not None and not _any_file(image_dir, file_names[:20]):
        # The folder of a URL, such as train2017, or of a tool's file names can be the given one itself.
        bare = [os.path.basename(name) for name in file_names]
        if _any_file(image_dir, bare[:20]) and not first_repeat(bare):
            file_names = bare
    files = dict(zip(image_ids, file_names, strict=True))
    present = _present_classes(content, files, class_of, annotation_file)
    unknown = _unknown_classes(content, present, class_of, annotation_file)

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
        root=root if images is None or image_dir.is_relative_to(root) else image_dir,
        follow_links=follow_links,
        unknown_labels=None if unknown is None else [unknown[image_id] for image_id in kept],
        **_origin(root, annotation_file, split, year, len(names), len(files)),
    )


def _origin(
    root: Path, annotation_file: Path, split: str, year: int, num_classes: int, num_images: int
) -> dict[str, Any]:
    """Name, source, configuration and split for `image_dataset`: COCO is called so only where it is all there."""
    if (root / SCENES_FILE).is_file():
        source = "scenes that hf_balancemix has drawn (make_scenes), no photographs"
        return {"name": "drawn sample of hf_balancemix", "source": source, "split": split}
    inside = annotation_file.is_relative_to(root)
    shown = f"{root.name}/{annotation_file.relative_to(root)}" if inside else annotation_file.name
    official = num_classes == 80 and num_images == _OFFICIAL_IMAGES[split, year]
    return {
        "name": "coco" if official else name_of_folder(root),
        "source": f"{shown}, in COCO's format",
        "config": str(year) if official else None,
        "split": split,
    }


def _annotation_file(root: Path, split: str, year: int, given: str | os.PathLike[str] | None) -> Path:
    """The JSON file of a split."""
    if given is not None:
        file = root / given if (root / given).is_file() else absolute(given)
        if not file.is_file():
            raise FileNotFoundError(f"annotations is {file}; it must be a file in COCO's format; correct the path.")
        return file
    official = root / "annotations" / f"instances_{split}{year}.json"
    if official.is_file():
        return official
    every_word = sorted(set().union(*_SPLIT_WORDS.values()))
    inner = sorted(folder for folder in root.glob("*") if folder.name.lower() in ("annotations", *every_word))
    of_split, neutral, others = [], [], []
    for file in (file for folder in [root, *inner] for file in sorted(folder.glob("[!.]*.json"))):  # no ._ of a Mac
        words = set(re.split(r"[^a-z]+", str(file.relative_to(root)).lower()))
        if _OFFICIAL.fullmatch(file.name) or words & _OTHER_TASKS:
            continue
        if words & _SPLIT_WORDS[split]:
            of_split.append(file)
        elif any(words & named for named in _SPLIT_WORDS.values()):
            others.append(file)
        else:
            neutral.append(file)
    found = of_split or (neutral if split == "train" else [])
    if len(found) > 1:
        several = one_line(", ".join(str(file.relative_to(root)) for file in found[:5]))
        raise ValueError(f"{root} has {len(found)} files that could be meant: {several}; pass one: annotations=...")
    if found:
        return found[0]
    layout = _layout(root, split, year)
    if there_is := [str(file.relative_to(root)) for file in others + neutral]:
        layout = f"There is {', '.join(there_is[:5])}, not named after the split. {layout}"
    what, absent = ("annotation file", official) if root.is_dir() else ("folder", root)
    raise FileNotFoundError(f"no {what} {absent}. {layout}")


def _image_folder(
    root: Path, split: str, year: int, file: Path, given: str | os.PathLike[str] | None, names: Sequence[str]
) -> Path:
    """The folder that the file names start from: where one of these, the first ones, is."""
    official = root / f"{split}{year}"
    if given is not None:
        folder = root / given if (root / given).is_dir() else absolute(given)
        if not folder.is_dir():
            raise FileNotFoundError(f"images is {folder}; it must be the folder of the images; correct the path.")
        return folder
    if file == root / "annotations" / f"instances_{split}{year}.json" and official.is_dir():
        return official
    of_split = sorted(_SPLIT_WORDS[split])
    tried = [file.parent, file.parent / "images", root / "images", *(root / "images" / word for word in of_split)]
    tried += [root / "images" / file.stem.rpartition("_")[2], *(root / word for word in of_split), official, root]
    for folder in tried:
        if _any_file(folder, names):
            return folder
    if _OFFICIAL.fullmatch(file.name):
        check_layout((("image folder", official, official.is_dir()),), _layout(root, split, year))
    several = first_few([os.path.relpath(folder, root) for folder in dict.fromkeys(tried) if folder.is_dir()])
    first = quote(names[0]) if names else "no image"
    where = f"in none of the folders {several} of {root}"
    raise FileNotFoundError(f"{file} lists {first}, which is {where}; pass its folder: images=...")


def _any_file(folder: Path, names: Sequence[str]) -> bool:
    return any(os.path.isfile(folder / name) for name in names)  # Path.is_file raises where a name is too long


def _layout(root: Path, split: str, year: int) -> str:
    return (
        f"COCO's layout is expected:\n"
        f"  {root}/\n"
        f"    annotations/instances_{split}{year}.json\n"
        f"    {split}{year}/  (the images that the annotation file lists)\n"
        f"Point to the folder that holds both, choose another split or year, or pass annotations= and images= (flags "
        f"--annotations, --images, and with eval_ before for the evaluation set)."
    )


def _read_json(file: Path) -> dict[str, list[Any]]:
    """The parsed JSON: an object whose 'images', 'annotations' and 'categories' are lists."""
    content = read_json(file, leave_out="segmentation")  # most of COCO's file, and of the memory for what is parsed
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list '{key}'; it must be in COCO's instances format; use such a file.")
    return content


def _values(content: dict[str, list[Any]], part: str, key: str, kinds: tuple[type, ...], file: Path) -> list[Any]:
    """What each record of a part of the file has under a key; ValueError unless all are of these kinds."""

    def where(index: int) -> str:
        return f"{file}: {part}[{index}]"

    values = []
    wanted = " or ".join({int: "an integer", str: "a string"}[kind] for kind in kinds)
    for index, record in enumerate(content[part]):
        if not isinstance(record, dict):
            raise ValueError(f"{where(index)} is {quote(record)}; it must be an object with the {key}; repair it.")
        value: Any = record.get(key)
        if type(value) not in kinds:  # exact types: True is no id
            raise ValueError(f"{where(index)} has the {key} {quote(value)}; it must be {wanted}; repair it.")
        if not (_is_text(value) if isinstance(value, str) else -(2**63) <= value < 2**63):  # what a column can hold
            needed = "it must be of whole characters, or an integer of 64 bits"
            raise ValueError(f"{where(index)} has the {key} {quote(value)}; {needed}; repair it.")
        values.append(value)
    return values


def _is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8; JSON can name half of a surrogate pair."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _ids(content: dict[str, list[Any]], part: str, file: Path) -> list[int | str]:
    """The ids of all records of a part: all integers or all strings, no one twice."""
    ids = _values(content, part, "id", (int, str), file)
    for index, value in enumerate(ids):
        if type(value) is not type(ids[0]):
            both = f"{part}[0] has the id {quote(ids[0])} and {part}[{index}] {quote(value)}"
            raise ValueError(f"{file}: {both}; they must be all integers or all strings; convert one kind.")
    if repeat := first_repeat(ids):
        record = f"{part}[{repeat[1]}]"
        raise ValueError(
            f"{file}: {record} has the id {quote(ids[repeat[1]])} a second time; it must be unique; remove one."
        )
    return ids


def _file_names(content: dict[str, list[Any]], file: Path) -> list[str]:
    """Each image's `file_name`, or where none has one the end of its `coco_url`, folder and name, as LVIS has it."""
    if any(isinstance(record, dict) and "file_name" in record for record in content["images"]):
        return _values(content, "images", "file_name", (str,), file)
    if not any(isinstance(record, dict) and "coco_url" in record for record in content["images"]):
        return _values(content, "images", "file_name", (str,), file)
    return ["/".join(url.split("/")[-2:]) for url in _values(content, "images", "coco_url", (str,), file)]


def _categories(content: dict[str, list[Any]], file: Path) -> tuple[dict[int | str, int], list[str]]:
    """Category id to class index, and the class names; in the order of the ids."""
    ids, names = _ids(content, "categories", file), _values(content, "categories", "name", (str,), file)
    if not ids:
        raise ValueError(f"{file}: 'categories' is empty; it must have at least one class; list them.")
    if (root := _root_category(content)) is not None:
        logger.info(
            "%s: category %s, %s, is the supercategory of all others and no annotation uses it: it is no class.",
            *(file.name, quote(ids[root]), quote(names[root])),
        )
        ids, names = ids[:root] + ids[root + 1 :], names[:root] + names[root + 1 :]
    if repeat := first_repeat(names):
        first, second = (ids[index] for index in repeat)
        named = f"are both named {quote(names[repeat[0]])}"
        raise ValueError(
            f"{file}: categories {quote(first)} and {quote(second)} {named}; names must differ; rename one."
        )
    name_of = dict(zip(ids, names, strict=True))
    class_of = {category_id: k for k, category_id in enumerate(sorted(ids))}
    return class_of, [name_of[category_id] for category_id in class_of]


def _root_category(content: dict[str, list[Any]]) -> int | None:
    """The position of the category that is the supercategory of all others and that no annotation uses."""
    records = content["categories"]
    parents = Counter(parent for record in records if isinstance(parent := record.get("supercategory"), str))
    values = (record.get("category_id") for record in content["annotations"] if isinstance(record, dict))
    used = {value for value in values if type(value) in (int, str)}  # annotations are not checked yet
    for index, record in enumerate(records):
        children = parents[record["name"]] - (record.get("supercategory") == record["name"])
        if 0 < children == len(records) - 1 and record["id"] not in used:
            return index
    return None


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
                f"{file}: annotations[{index}] has the image_id {quote(image_id)}; it must be in 'images'; list it."
            )
        if category_id not in class_of:
            found = f"{file}: annotations[{index}] has the category_id {quote(category_id)}"
            known = f"{len(class_of)} ids, {quote(min(class_of))} to {quote(max(class_of))}"
            raise ValueError(f"{found}; it must be in 'categories' ({known}); list the category.")
        present[image_id].add(class_of[category_id])
    return present


def _unknown_classes(
    content: dict[str, list[Any]],
    present: dict[int | str, set[int]],
    class_of: dict[int | str, int],
    file: Path,
) -> dict[int | str, list[int]] | None:
    """Image id to the classes of which nothing is known, where images list what they are without (LVIS); else None."""
    if not any("neg_category_ids" in record for record in content["images"]):
        return None
    unknown = {}
    for index, record in enumerate(content["images"]):
        absent = record.get("neg_category_ids")
        if not isinstance(absent, list) or any(type(v) not in (int, str) or v not in class_of for v in absent):
            needed = "it must be a list of category ids; correct it"
            raise ValueError(f"{file}: images[{index}] has the neg_category_ids {quote(absent)}; {needed}.")
        known = present[record["id"]] | {class_of[value] for value in absent}
        unknown[record["id"]] = [k for k in range(len(class_of)) if k not in known]
    return unknown
