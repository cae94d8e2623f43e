"""Any tagged or detection data set, or a CSV file beside a folder of images, as `image`, `labels` and `image_id`.

The result has the columns of this package's loaders: `image` (datasets.Image, not decoded here), `labels`
(List(ClassLabel), the present classes in ascending order), `image_id` (unique) and, from a CSV file, `unknown_labels`.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_balancemix.data.files import absolute, check_choice, check_plain_path, first_few, first_repeat, image_dataset
from hf_balancemix.data.labels import column_feature
from hf_balancemix.data.noise import read_ids
from hf_balancemix.data.views import undecoded_images

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
        ValueError: A column or field is absent, a row lacks an image or a class or has one outside `names`, or
            `image_id` is not unique, or neither integers nor strings.
    """
    undecoded_images(dataset)
    feature = column_feature(dataset, objects, "name the one that holds the objects (objects=...)")
    fields = feature if isinstance(feature, dict) else getattr(feature, "feature", None)
    if not isinstance(fields, dict):
        raise TypeError(
            f"column '{objects}' is {feature}; it must be a dict of lists or a list of dicts, one for each object; "
            f"for a plain column of class lists use from_tags(dataset, column='{objects}')."
        )
    if category not in fields:
        found = f"column '{objects}' has the fields {list(fields)}"
        raise ValueError(f"{found}; '{category}' must be among them; pass the one that holds the class: category=...")
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
        names: As in `from_detection`.

    Returns:
        A `datasets.Dataset` with `image`, `labels` and `image_id`, as `from_detection`.

    Raises:
        TypeError, ValueError: As `from_detection`, or `separator` is missing or out of place.

    Example:
        >>> from_tags(dataset, column="keywords", separator=";")  # doctest: +SKIP
    """
    undecoded_images(dataset)
    feature = column_feature(dataset, column, "name the one that holds the tags (column=...)")
    tags = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if _is_string(feature) != (separator is not None):
        raise ValueError(
            f"separator is {separator!r} and column '{column}' is {feature}; it must be what stands between the tags "
            "of a string, and None for lists; pass separator=',' or leave it out."
        )
    if separator is None:
        return _labelled(dataset, tags, getattr(feature, "feature", None), names, f"column '{column}'")
    lists = [None if text is None else _split(text, separator) for text in tags]
    return _labelled(dataset, lists, feature, names, f"column '{column}'")


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
        on_bad_image: "error", or "skip" to leave out images that are listed but absent, with a warning.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels`, `image_id` (string: the column
        `image_id`, else the cell of `image_column`) and, with `unknown="masked"`, `unknown_labels`. Rows keep the
        order of the file.

    Raises:
        ValueError: An argument is none of its choices, or the file is malformed; the message names line and column.
        FileNotFoundError: The file, the folder or an image is absent.
    """
    check_choice("unknown", unknown, ("negative", "masked"))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    names = _checked_names(names)
    file = absolute(file)
    image_dir = file.parent if image_dir is None else absolute(image_dir)
    if not file.is_file():
        raise FileNotFoundError(f"no CSV file {file}; check the path.")
    if not image_dir.is_dir():
        raise FileNotFoundError(f"no image folder {image_dir}; pass the folder that the file names start from.")

    table = _Table(file, delimiter)
    cells = table.column(image_column, "image_column")
    files = [cell and cell + suffix for cell in cells]
    table.check_unique(files, image_column)
    for line, name in zip(table.lines, files, strict=True):
        check_plain_path(name, f"{file}, line {line}: the file name")
    image_ids = cells
    if "image_id" in table.header and image_column != "image_id":
        image_ids = table.column("image_id")
        table.check_unique(image_ids, "image_id")

    unknown_lists: list[list[int]] | None = None
    if label_column is not None:
        names, lists = _label_column(table, label_column, separator, class_ids, names, unknown)
    elif separator is not None or class_ids:
        raise ValueError("label_column is None; it must be given with separator or class_ids; pass label_column=...")
    else:
        names, codes = _multi_hot_columns(table, names, (image_column, "image_id"))
        lists = [np.flatnonzero(row).tolist() for row in codes == 1]
        number = int((codes == _UNKNOWN).sum())
        if unknown == "masked":
            unknown_lists = [np.flatnonzero(row).tolist() for row in codes == _UNKNOWN]
        elif number:
            logger.info("%s: %d of %d labels are unknown and become negative.", file.name, number, codes.size)

    try:
        return image_dataset(
            [(image_dir, files, file)],
            lists,
            image_ids,
            names,
            on_bad_image=on_bad_image,
            unknown_labels=unknown_lists,
            name=file.stem,
            source=file.name,
        )
    except FileNotFoundError as error:
        line = next(line for line, name in zip(table.lines, files, strict=True) if not (image_dir / name).is_file())
        raise FileNotFoundError(f"{error} The first is in line {line}.") from None


def _labelled(
    dataset: datasets.Dataset, tags: list[list[Any] | None], feature: Any, names: Sequence[str] | None, what: str
) -> datasets.Dataset:
    """`image`, `labels` and `image_id` of a data set, from the tags of each row and the feature of one tag."""
    names, name_of = _checked_names(names), None
    if isinstance(feature, datasets.ClassLabel):
        name_of = dict(enumerate(feature.names))
        names = feature.names if names is None else names
    elif isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type):
        if names is None:
            raise ValueError(f"{what}: the classes are {feature.dtype} ids; they must have names; pass names=[...].")
        name_of = dict(enumerate(names))
    elif not _is_string(feature):
        needed = "it must be a string, a ClassLabel or an integer id; convert the column"
        raise TypeError(f"{what}: a class is of the type {feature}; {needed}.")
    names, labels = _class_lists(tags, names, lambda row: f"{what}, row {row}", name_of)

    image_ids = _image_ids(dataset)
    columns = ["image", "image_id"] if image_ids is None else ["image"]
    result = dataset.with_format(None).select_columns(columns)
    result = result.add_column("labels", labels, feature=datasets.List(datasets.ClassLabel(names=names)))
    if image_ids is not None:
        result = result.add_column("image_id", image_ids)
    return result.select_columns(["image", "labels", "image_id"])


def _image_ids(dataset: datasets.Dataset) -> list[str] | list[int] | None:
    """The ids to add: file names, else row numbers; None where the data set has unique ids. Reads no image.

    ValueError where its ids are not unique, or a row has no image.
    """
    parts = undecoded_images(dataset).flatten()
    paths = parts.select_columns(["image.path"]).with_format("arrow")[:]["image.path"]
    if parts.data["image.bytes"].null_count:  # else every row has its bytes, and there is no need to read any
        for row in np.flatnonzero(paths.is_null()):
            if parts[int(row)]["image.bytes"] is None:
                raise ValueError(f"column 'image', row {row} is None; it must be an image; drop the row.")
    if "image_id" in dataset.column_names:
        read_ids(dataset, unique=True)
        return None
    # The base name: the same on every machine. Archives are written as member::archive.
    files = [os.path.basename((path or "").split("::")[0]) for path in paths.to_pylist()]
    if all(files) and len(set(files)) == len(files):
        return files
    if any(files):
        logger.warning("Not every row has a file name of its own: image_id is the row number.")
    return list(range(len(files)))


class _Table:
    """The cells of a CSV file as text, and the line that each row starts in."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self.file = file
        self.lines: list[int] = []
        self.rows: list[list[str]] = []
        start = 1
        try:
            with open(file, encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream, delimiter=delimiter, strict=True)
                self.header = [name.strip() for name in next(reader, [])]
                start = reader.line_num + 1
                for row in reader:
                    if row and len(row) != len(self.header):
                        problem = f"{len(row)} cells, but the header has {len(self.header)}; it must be as many"
                        fix = f"put cells that hold the delimiter {delimiter!r} in quotes"
                        raise ValueError(f"{file}, line {start}: {problem}; {fix}.")
                    if row:  # a blank line has no cells
                        self.lines.append(start)
                        self.rows.append(row)
                    start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{file}, line {start}: malformed CSV ({error}); repair the row's quotes.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8.") from error
        if twice := sorted(name for name, number in Counter(self.header).items() if name and number > 1):
            raise ValueError(f"{file}, line 1: the header names {first_few(twice)} more than once; rename one.")
        if not self.rows:
            raise ValueError(f"{file} has no rows below its header; there must be one for each image; add them.")

    def column(self, name: str, argument: str = "names") -> list[str]:
        """The cells under a heading; `argument` is what named it, for the message."""
        if name not in self.header:
            header = f"{self.file}, line 1: no column {name!r} in the header {first_few(self.header)}"
            raise ValueError(f"{header}; correct {argument}, or the delimiter.")
        index = self.header.index(name)
        return [row[index].strip() for row in self.rows]

    def check_unique(self, cells: Sequence[str], column: str) -> None:
        """Raises ValueError unless each cell is filled in, and with another text than the others."""
        if "" in cells:
            line = self.lines[cells.index("")]
            raise ValueError(f"{self.file}, line {line}: column '{column}' is empty; fill it in or drop the row.")
        if repeat := first_repeat(cells):
            first, second = (self.lines[row] for row in repeat)
            problem = f"{cells[repeat[1]]!r} in column '{column}' a second time, first in line {first}"
            raise ValueError(f"{self.file}, line {second}: {problem}; each must be in one row; remove the other.")


def _label_column(
    table: _Table, column: str, separator: str | None, class_ids: bool, names: list[str] | None, unknown: str
) -> tuple[list[str], list[list[int]]]:
    if not separator:
        raise ValueError(f"separator is {separator!r}; it must be what stands between classes; pass for instance '|'.")
    if unknown == "masked":
        raise ValueError("unknown is 'masked'; it must be 'negative' with label_column, where no label is unknown.")
    if class_ids and names is None:
        raise ValueError("names is None; with class_ids it must be the class names in the order of the ids.")
    name_of = {str(k): name for k, name in enumerate(names or [])} if class_ids else None
    tags = [_split(cell, separator) for cell in table.column(column, "label_column")]
    return _class_lists(tags, names, lambda row: f"{table.file}, line {table.lines[row]}, column '{column}'", name_of)


def _multi_hot_columns(table: _Table, names: list[str] | None, others: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The class names and `(N, K)` uint8 codes 0, 1 and _UNKNOWN."""
    if names is None:
        names = [name for name in table.header if name not in others]
        if "" in names:
            number = table.header.index("") + 1
            raise ValueError(f"{table.file}, line 1: column {number} of the header has no name; name the class.")
        if not names:
            columns = first_few(table.header)
            raise ValueError(f"{table.file}, line 1: no class among the columns {columns}; add a column.")
    codes = []
    for name in names:
        cells = table.column(name)
        try:
            codes.append(np.fromiter(map(_CODES.__getitem__, cells), dtype=np.uint8, count=len(cells)))
        except KeyError as error:
            line = table.lines[cells.index(error.args[0])]
            found = f"{table.file}, line {line}, column '{name}' is {error.args[0]!r}"
            needed = f"0, 1 or unknown (empty, -1 or ?); if '{name}' is no class, list the class columns in names"
            raise ValueError(f"{found}; it must be {needed}.") from None
    return names, np.stack(codes, axis=1)


def _class_lists(
    tags: Sequence[Sequence[Any] | None],
    names: list[str] | None,
    where: Callable[[int], str],
    name_of: dict[Any, str] | None = None,
) -> tuple[list[str], list[list[int]]]:
    """Names of the K classes (those that occur, sorted, unless they are given), and each row's in ascending order.

    The tags are names, or ids if there is a `name_of` to look them up in; `where` names a row, for messages.
    """
    rows: list[set[str]] = []
    for row, classes in enumerate(tags):
        if classes is None or (name_of is None and not all(classes)):
            needed = "it must be a list of class names, empty where there is none"
            raise ValueError(f"{where(row)} is {classes!r}; {needed}; drop the row.")
        try:
            rows.append(set(classes) if name_of is None else {name_of[value] for value in classes})
        except KeyError as error:
            needed = f"it must be a class id, a whole number from 0 to {len(name_of or ()) - 1}"
            raise ValueError(f"{where(row)} has {error.args[0]!r}; {needed}; correct it.") from None
    names = sorted(set().union(*rows)) if names is None else names
    if not names:
        raise ValueError(f"{where(0)} and all after are without a class; there must be one; pass names=[...].")
    index = {name: k for k, name in enumerate(names)}
    for row, found in enumerate(rows):
        if other := found - index.keys():
            needed = f"it must be one of the {len(names)} classes {first_few(names)}"
            raise ValueError(f"{where(row)} has {min(other)!r}; {needed}; add it to names.")
    return names, [sorted(index[name] for name in found) for found in rows]


def _checked_names(names: Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or len(names) == 0:
        raise TypeError(f"names is {names!r}; it must be a list of class names; pass for instance ['cat', 'dog'].")
    if repeat := first_repeat(names):
        raise ValueError(f"names has {names[repeat[0]]!r} more than once; each class must be there once; remove one.")
    return list(names)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _split(text: str, separator: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(separator)) if tag]
