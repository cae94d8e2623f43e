"""Any tagged or detection data set, or a CSV file beside a folder of images, as `image`, `labels` and `image_id`.

The result has the columns of this package's loaders: `image` (datasets.Image, not decoded here), `labels`
(List(ClassLabel), the present classes in ascending order), `image_id` (unique) and, from a CSV file with labels that
are not known, optionally `unknown_labels` of the type of `labels`.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_balancemix.data.files import absolute, check_choice, image_dataset, is_plain_path, present_files
from hf_balancemix.data.training_data import undecoded_images

logger = logging.getLogger(__name__)

_UNKNOWN = 2
_CODES = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "": _UNKNOWN, "?": _UNKNOWN, "-1": _UNKNOWN, "-1.0": _UNKNOWN}


def from_detection(
    dataset: datasets.Dataset,
    objects: str = "objects",
    category: str = "category",
    names: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Turn a detection data set into a multi-label one: a class is present if at least one object is of it.

    Args:
        dataset: One split, with `image` (datasets.Image) and the objects of each image, as a dict of lists
            (`{"bbox": [...], "category": [...]}`) or a list of dicts (`[{"bbox": ..., "category": ...}, ...]`).
        objects: Name of the column of objects.
        category: Name of the field that holds an object's class: a ClassLabel, a string, or an integer id.
        names: Fixes the K classes and their order. Default: those of the ClassLabel, or the strings that occur,
            sorted: pass `class_names(train)` then, so that other splits get the same classes. Integer ids need it.

    Returns:
        A `datasets.Dataset` with `image`, `labels` and `image_id`. An existing `image_id` is kept; else it is the
        image's file name, or the row number where not all rows have a file name of their own.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or the objects or categories are of another type.
        ValueError: A column or field is absent; a row has no image, no list of objects, an object without class, or a
            class outside `names` (the message names row and class); `image_id` is not unique, or neither integers nor
            strings.
    """
    undecoded_images(dataset)
    feature = _column_feature(dataset, objects, "objects")
    fields = feature if isinstance(feature, dict) else getattr(feature, "feature", None)
    if not isinstance(fields, dict):
        raise TypeError(
            f"column '{objects}' is {feature}; a dict of lists or a list of dicts, one for each object, is required. "
            f"For a plain column of class lists use from_tags(dataset, column='{objects}')."
        )
    if category not in fields:
        raise ValueError(
            f"the objects of column '{objects}' have the fields {list(fields)}, not '{category}'. "
            f"Name the one that holds the class with category=..."
        )
    column = dataset.select_columns([objects]).with_format("arrow")[:][objects]
    if fields is feature:
        category_feature = getattr(feature[category], "feature", None)
        lists = pc.struct_field(column, category).to_pylist()
    else:
        category_feature = fields[category]
        flat = iter(pc.struct_field(pc.list_flatten(column), category).to_pylist())
        lengths = pc.list_value_length(column).to_pylist()
        lists = [None if length is None else list(islice(flat, length)) for length in lengths]
    return _labelled(dataset, lists, category_feature, names, f"column '{objects}', field '{category}'")


def from_tags(
    dataset: datasets.Dataset,
    column: str = "tags",
    separator: str | None = None,
    names: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Turn a column of tags into labels.

    Args:
        dataset: One split, with `image` (datasets.Image) and the tags of each image.
        column: Name of the column of tags: lists of strings, of ClassLabels or of integer ids, or strings that
            `separator` splits.
        separator: What stands between the tags of a string, such as ",". Spaces around a tag are dropped, and so are
            empty tags: an empty string is an image without labels.
        names: Fixes the K classes and their order. Default: those of the ClassLabel, or the strings that occur,
            sorted: pass `class_names(train)` then, so that other splits get the same classes. Integer ids need it.

    Returns:
        A `datasets.Dataset` with `image`, `labels` and `image_id`, see `from_detection`.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or the column is of another type.
        ValueError: A column is absent, a row has no image or no tags (None), a tag is empty or outside `names` (the
            message names row and tag), `separator` is missing or out of place; `image_id` is not unique, or neither
            integers nor strings.

    Example:
        >>> from_tags(dataset, column="keywords", separator=";")  # doctest: +SKIP
    """
    undecoded_images(dataset)
    feature = _column_feature(dataset, column, "tags")
    lists = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    is_text = _is_string(feature)
    if is_text != (separator is not None):
        raise ValueError(
            f"column '{column}' is {feature}, got separator={separator!r}. "
            + (
                "A string of tags needs the separator between them, such as separator=','."
                if is_text
                else "A separator splits strings only: leave it out."
            )
        )
    if is_text:
        lists = [None if text is None else _split(text, separator) for text in lists]
    tag_feature = feature if is_text else getattr(feature, "feature", None)
    return _labelled(dataset, lists, tag_feature, names, f"column '{column}'")


def from_csv(
    file: str | os.PathLike[str],
    image_dir: str | os.PathLike[str] | None = None,
    *,
    image_column: str = "file_name",
    suffix: str = "",
    label_column: str | None = None,
    separator: str | None = None,
    class_ids: bool = False,
    names: Sequence[str] | None = None,
    unknown: str = "negative",
    delimiter: str = ",",
    on_bad_image: str = "error",
) -> datasets.Dataset:
    """Load a CSV file that lists images and their labels. The first line is the header; the text is UTF-8.

    The labels are multi-hot columns, one for each class, unless `label_column` is given:

        file_name,cat,dog                  file_name,tags
        a.jpg,1,0                          a.jpg,cat
        b.jpg,1,?                          b.jpg,cat|dog

    Args:
        file: The CSV file.
        image_dir: The folder that the file names start from. Default: the folder of the CSV file.
        image_column: Header of the column of file names.
        suffix: Added to each file name, such as ".jpg" where the column holds names without one.
        label_column: Header of the one column that lists the present classes; an empty cell is an image without
            labels. Default: every column but those of `image_column` and `image_id` is a class, its header the name.
        separator: What stands between the classes in `label_column`, such as "|" or " "; required with it.
        class_ids: `label_column` holds ids, which count through `names` from 0, not names.
        names: Fixes the K classes and their order: of multi-hot columns those to use, of a label column all that may
            occur (by default those that do, sorted: pass `class_names(train)` for other splits).
        unknown: What an empty cell, `-1` or `?` in a multi-hot column is: "negative", as in the paper, or "masked":
            listed in the column `unknown_labels`, so that it takes no part.
        delimiter: Between the columns: ",", ";" or a tab.
        on_bad_image: What to do about images that are listed but absent: "error", or "skip" to leave them out with a
            warning that counts them.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels`, `image_id` (string: the column
        `image_id`, else the cell of `image_column`) and, with `unknown="masked"`, `unknown_labels`. Rows keep the
        order of the file.

    Raises:
        ValueError: An argument is none of its choices, or the file is malformed: named with its line and column are
            a row of another length than the header, broken quotes, a header that names a column twice or not at all,
            a cell that is neither 0, 1 nor unknown, a class outside `names`, an id or a file a second time, an id
            without file name, a file name that leaves the folder.
        FileNotFoundError: The file, the folder or an image is absent.
    """
    check_choice("unknown", unknown, ("negative", "masked"))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    _check_label_arguments(label_column, separator, class_ids, names, unknown)
    names = _checked_names(names)
    file = absolute(file)
    image_dir = file.parent if image_dir is None else absolute(image_dir)
    if not file.is_file():
        raise FileNotFoundError(f"no CSV file {file}. Check the path.")
    if not image_dir.is_dir():
        raise FileNotFoundError(f"no image folder {image_dir}. Pass the folder that the file names start from.")

    table = _Table(file, delimiter)
    cells = table.column(image_column, "image_column")
    files = [cell and cell + suffix for cell in cells]
    table.check_unique(files, image_column)
    for line, name in zip(table.lines, files, strict=True):
        if not is_plain_path(name):
            raise ValueError(
                f"{file}, line {line}: the file name {name!r} is not a plain path inside the image folder. "
                f"Use a relative path with '/' and without '..', such as 'images/0001.jpg'."
            )
    image_ids = cells
    if "image_id" in table.header and image_column != "image_id":
        image_ids = table.column("image_id")
        table.check_unique(image_ids, "image_id")

    unknown_lists = None
    if label_column is not None:
        names, lists = _label_column(table, label_column, separator, class_ids, names)
    else:
        names, codes = _multi_hot_columns(table, names, (image_column, "image_id"))
        lists = [np.flatnonzero(row).tolist() for row in codes == 1]
        number = int((codes == _UNKNOWN).sum())
        if unknown == "masked":
            unknown_lists = [np.flatnonzero(row).tolist() for row in codes == _UNKNOWN]
        elif number:
            logger.info("%s: %d of %d labels are unknown and become negative.", file.name, number, codes.size)

    try:
        kept = np.flatnonzero(present_files(image_dir, files, file, on_bad_image))
    except FileNotFoundError as error:
        absent = (name for name in files if not os.path.isfile(os.path.join(image_dir, name)))
        line = table.lines[files.index(next(absent))]
        raise FileNotFoundError(f"{error} The first is in line {line}.") from None
    return image_dataset(
        [os.path.join(image_dir, files[i]) for i in kept],
        [lists[i] for i in kept],
        [image_ids[i] for i in kept],
        names,
        unknown_labels=None if unknown_lists is None else [unknown_lists[i] for i in kept],
        name=file.stem,
        description=f"{file.name}, {len(kept)} images, {len(names)} classes",
    )


# ------------------------------------------------------------------------------------- from a datasets.Dataset


def _column_feature(dataset: datasets.Dataset, column: str, argument: str) -> Any:
    if column not in dataset.features:
        raise ValueError(
            f"no column '{column}' in the data set, which has {dataset.column_names}. "
            f"Name the one that holds the {argument}."
        )
    return dataset.features[column]


def _labelled(
    dataset: datasets.Dataset,
    lists: list[list[Any] | None],
    feature: Any,
    names: Sequence[str] | None,
    what: str,
) -> datasets.Dataset:
    """`image`, `labels` and `image_id` of a data set, from the tags of each row and the feature of one tag."""
    names = _checked_names(names)

    def where(row: int) -> str:
        return f"{what}, row {row}"

    if isinstance(feature, datasets.ClassLabel):
        lists = _named(lists, dict(enumerate(feature.names)), where)
        names = feature.names if names is None else names
    elif isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type):
        if names is None:
            raise ValueError(f"{what}: the classes are {feature.dtype} ids; pass their names in order, names=[...].")
        lists = _named(lists, dict(enumerate(names)), where)
    elif not _is_string(feature):
        raise TypeError(f"{what}: a list of strings, ClassLabels or integer ids is required; see dataset.features.")
    names, labels = _class_lists(lists, names, where)

    image_ids = _image_ids(dataset)
    columns = ["image", "image_id"] if image_ids is None else ["image"]
    result = dataset.with_format(None).select_columns(columns)
    result = result.add_column("labels", labels, feature=datasets.List(datasets.ClassLabel(names=names)))
    if image_ids is not None:
        result = result.add_column("image_id", image_ids)
    return result.select_columns(["image", "labels", "image_id"])


def _image_ids(dataset: datasets.Dataset) -> list[str] | list[int] | None:
    """The ids to add: file names, else row numbers; None where the data set has (good) ids."""
    paths = _image_paths(dataset)
    if "image_id" not in dataset.column_names:
        # The base name: the same on every machine. Archives are written as member::archive.
        files = [os.path.basename((path or "").split("::")[0]) for path in paths]
        if all(files) and len(set(files)) == len(files):
            return files
        if any(files):
            logger.warning("Not every row has a file name of its own: image_id is the row number.")
        return list(range(len(files)))
    ids = dataset.select_columns(["image_id"]).with_format("arrow")[:]["image_id"]
    fix = "Repair the column, or have ids made: dataset.remove_columns('image_id')."
    if not (pa.types.is_integer(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise ValueError(f"column 'image_id' is of type {ids.type}; integers or strings are required. {fix}")
    seen: dict[Any, int] = {}
    for row, value in enumerate(ids.to_pylist()):
        if value is None:
            raise ValueError(f"column 'image_id', row {row}: expected an id, got None. {fix}")
        if value in seen:
            raise ValueError(f"column 'image_id': rows {seen[value]} and {row} both have {value!r}. {fix}")
        seen[value] = row
    return None


def _image_paths(dataset: datasets.Dataset) -> list[str | None]:
    """Path of each image, None where there is none; reads no image.

    Raises:
        ValueError: A row has no image.
    """
    parts = undecoded_images(dataset).flatten()
    paths = parts.select_columns(["image.path"]).with_format("arrow")[:]["image.path"]
    if parts.data["image.bytes"].null_count:  # else every row has its bytes, and there is no need to read any
        for row in np.flatnonzero(paths.is_null()):
            if parts[int(row)]["image.bytes"] is None:
                raise ValueError(f"column 'image', row {row}: no image. Drop the row: dataset.filter(...).")
    return paths.to_pylist()


# -------------------------------------------------------------------------------------------- from a CSV file


class _Table:
    """The cells of a CSV file as text, and the line that each row starts in."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self.file, self.lines, self.rows = file, [], []
        start = 1
        try:
            with open(file, encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream, delimiter=delimiter, strict=True)
                self.header = [name.strip() for name in next(reader, [])]
                start = reader.line_num + 1
                for row in reader:
                    if row and len(row) != len(self.header):
                        raise ValueError(
                            f"{file}, line {start}: {len(row)} cells, but the header has {len(self.header)}. "
                            f"Repair the row, put cells that hold the delimiter {delimiter!r} in quotes, or pass "
                            f"another delimiter."
                        )
                    if row:  # a blank line has no cells
                        self.lines.append(start)
                        self.rows.append(row)
                    start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{file}, line {start}: malformed CSV ({error}). Repair the row's quotes.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error
        twice = sorted(name for name, number in Counter(self.header).items() if name and number > 1)
        if twice:
            raise ValueError(f"{file}, line 1: the header names {_few(twice)} more than once. Rename or remove one.")
        if not self.rows:
            raise ValueError(f"{file} has no rows below its header. A header and a row for each image are required.")

    def column(self, name: str, argument: str = "names") -> list[str]:
        if name not in self.header:
            raise ValueError(
                f"{self.file}, line 1: no column {name!r} in the header {_few(self.header)}. "
                f"Correct {argument}, or the delimiter."
            )
        index = self.header.index(name)
        return [row[index].strip() for row in self.rows]

    def check_unique(self, cells: Sequence[str], column: str) -> None:
        seen: dict[str, int] = {}
        for line, cell in zip(self.lines, cells, strict=True):
            if not cell:
                raise ValueError(f"{self.file}, line {line}: column '{column}' is empty. Fill it in or drop the row.")
            if cell in seen:
                raise ValueError(
                    f"{self.file}, line {line}: {cell!r} in column '{column}' a second time, first in line "
                    f"{seen[cell]}. List each image in one row."
                )
            seen[cell] = line


def _check_label_arguments(
    label_column: str | None, separator: str | None, class_ids: bool, names: Sequence[str] | None, unknown: str
) -> None:
    if label_column is None:
        if separator is not None or class_ids:
            raise ValueError("separator and class_ids describe a label column: pass label_column=... with them.")
        return
    if not separator:
        raise ValueError(f"label_column={label_column!r} needs the separator of its classes, such as separator='|'.")
    if class_ids and names is None:
        raise ValueError("class_ids=True needs the class names in the order of the ids: names=[...].")
    if unknown == "masked":
        raise ValueError("unknown='masked' needs multi-hot columns; in a label column nothing is unknown.")


def _label_column(
    table: _Table, column: str, separator: str, class_ids: bool, names: Sequence[str] | None
) -> tuple[list[str], list[list[int]]]:
    def where(row: int) -> str:
        return f"{table.file}, line {table.lines[row]}, column '{column}'"

    lists = [_split(cell, separator) for cell in table.column(column, "label_column")]
    if class_ids:
        lists = _named(lists, {str(k): name for k, name in enumerate(names)}, where)
    return _class_lists(lists, names, where)


def _multi_hot_columns(
    table: _Table, names: Sequence[str] | None, others: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The class names and `(N, K)` uint8 codes 0, 1 and _UNKNOWN."""
    if names is None:
        names = [name for name in table.header if name not in others]
        if "" in names:
            raise ValueError(
                f"{table.file}, line 1: column {table.header.index('') + 1} of the header has no name. "
                f"Name the class, or pass the class columns in names."
            )
        if not names:
            raise ValueError(f"{table.file}, line 1: no class among the columns {_few(table.header)}. Add a column.")
    codes = []
    for name in names:
        cells = table.column(name)
        try:
            codes.append(np.fromiter(map(_CODES.__getitem__, cells), dtype=np.uint8, count=len(cells)))
        except KeyError as error:
            line = table.lines[cells.index(error.args[0])]
            raise ValueError(
                f"{table.file}, line {line}, column '{name}': {error.args[0]!r} is not 0, 1 or unknown (empty, -1 "
                f"or ?). Correct it; if '{name}' is no class, list the class columns in names."
            ) from None
    return list(names), np.stack(codes, axis=1)


# ----------------------------------------------------------------------------------------------------- classes


def _named(
    lists: Sequence[Sequence[Any] | None], names: dict[Any, str], where: Callable[[int], str]
) -> list[list[str] | None]:
    """Ids to names."""
    result = []
    for row, ids in enumerate(lists):
        try:
            result.append(None if ids is None else [names[value] for value in ids])
        except KeyError as error:
            raise ValueError(
                f"{where(row)}: {error.args[0]!r} is no class id, a whole number from 0 to {len(names) - 1}. "
                f"Correct it, or give all names."
            ) from None
    return result


def _class_lists(
    lists: Sequence[Sequence[str] | None], names: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[list[str], list[list[int]]]:
    """Names of the K classes (those that occur, sorted, unless they are given), and each row's in ascending order."""
    for row, tags in enumerate(lists):
        if tags is None:
            raise ValueError(f"{where(row)}: expected a list of classes, got None. Without labels, it is empty.")
        if None in tags or "" in tags:
            raise ValueError(f"{where(row)}: a class of {tags!r} is empty. Remove it or name the class.")
    names = sorted(set(chain.from_iterable(lists))) if names is None else list(names)
    if not names:
        raise ValueError(f"no class in any of the {len(lists)} rows, {where(0)} and after. Pass names=[...].")
    index = {name: k for k, name in enumerate(names)}
    labels = []
    for row, tags in enumerate(lists):
        try:
            labels.append(sorted({index[tag] for tag in tags}))
        except KeyError as error:
            raise ValueError(
                f"{where(row)}: {error.args[0]!r} is none of the {len(names)} classes {_few(names)}. "
                f"Correct it or add it to names."
            ) from None
    return names, labels


def _checked_names(names: Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or len(names) == 0:
        raise TypeError(f"names must be a list of class names, got {names!r}.")
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if twice:
        raise ValueError(f"names lists {_few(twice)} more than once. Name each class once.")
    return list(names)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _split(text: str, separator: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(separator)) if tag]


def _few(values: Sequence[Any], number: int = 5) -> str:
    return ", ".join(map(repr, values[:number])) + (", ..." if len(values) > number else "")
