"""Any tagged or detection data set, as `image`, `labels` and `image_id`.

The result has the columns of this package's loaders: `image` (datasets.Image, not decoded here), `labels`
(List(ClassLabel), the present classes in ascending order) and `image_id` (unique).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_balancemix.data.files import first_few
from hf_balancemix.data.labels import class_names, column_feature, is_class_list, stored_labels
from hf_balancemix.data.noise import read_ids
from hf_balancemix.data.tags import checked_names, class_lists, is_multi_hot, split_tags
from hf_balancemix.data.views import undecoded_images
from hf_balancemix.files import quote

logger = logging.getLogger(__name__)


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
            f"column '{objects}' is {quote(feature)}; it must be a dict of lists or a list of dicts, one for each "
            f"object; for a plain column of class lists use from_tags(dataset, column='{objects}')."
        )
    if category not in fields:
        found = f"column '{objects}' has the fields {quote(list(fields))}"
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
    where = f"column '{objects}', field '{category}'"
    return _labelled(dataset, lists, category_feature, names, where, zeros_and_ones=False)


def from_tags(
    dataset: datasets.Dataset,
    column: str = "tags",
    separator: str | None = None,
    names: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Turn a column of tags into labels.

    Args:
        dataset: One split, with `image` (datasets.Image) and the tags of each image.
        column: Name of the column of tags: lists of strings, of ClassLabels or of integer ids; strings: what
            `separator` splits, or a written list, `['a', 'b']`; or lists of a 0 or 1 for each of the classes in
            `names`, or -1, NaN or None where it is unknown.
        separator: What stands between the tags of a string, such as ",". Spaces around a tag are dropped, and so are
            empty tags: an empty string is an image without labels.
        names: As in `from_detection`.

    Returns:
        A `datasets.Dataset` with `image`, `labels` and `image_id`, as `from_detection`, and `unknown_labels` where
        some are.

    Raises:
        TypeError, ValueError: As `from_detection`, or `separator` is missing or out of place.

    Example:
        >>> from_tags(dataset, column="keywords", separator=";")  # doctest: +SKIP
    """
    undecoded_images(dataset)
    feature = column_feature(dataset, column, "name the one that holds the tags (column=...)")
    tags = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()

    def where(row: int) -> str:
        return f"column '{column}', row {row}"

    if not _is_string(feature):
        if separator is not None:
            needed = "it must be None for lists; leave it out"
            raise ValueError(f"separator is {quote(separator)} and column '{column}' is {quote(feature)}; {needed}.")
        kind = getattr(getattr(feature, "feature", None), "pa_type", pa.null())
        integer = pa.types.is_integer(kind) and not is_class_list(feature)
        if (
            (pa.types.is_floating(kind) or pa.types.is_boolean(kind))
            or (integer and names is not None and is_multi_hot(tags, checked_names(names), where))
        ):  # fmt: skip
            return from_multi_hot(dataset, column, names)
        return _labelled(dataset, tags, getattr(feature, "feature", None), names, f"column '{column}'")
    lists = [
        None if text is None else split_tags(text, separator, partial(where, row)) for row, text in enumerate(tags)
    ]
    return _labelled(dataset, lists, feature, names, f"column '{column}'")


def from_multi_hot(
    dataset: datasets.Dataset, column: str = "labels", names: Sequence[str] | None = None
) -> datasets.Dataset:
    """As `from_tags`, of a column that has a 0 or 1 for each class, or -1, NaN or None where it is unknown.

    `names` are those of the K classes in the column's order; default `LABEL_0`, ...
    """
    labels = stored_labels(dataset, column).numpy()
    names = checked_names(names) or class_names(dataset, column)
    if len(names) != labels.shape[1]:
        found = f"column '{column}' has {labels.shape[1]} values a row, and names are {first_few(names)}"
        raise ValueError(f"{found}; there must be one for each of {labels.shape[1]} classes; correct names.")
    unknown = [np.flatnonzero(row).tolist() for row in labels < 0]
    return _assembled(dataset, names, [np.flatnonzero(row).tolist() for row in labels == 1], unknown)


def _labelled(
    dataset: datasets.Dataset,
    tags: list[list[Any] | None],
    feature: Any,
    names: Sequence[str] | None,
    what: str,
    zeros_and_ones: bool = True,
) -> datasets.Dataset:
    """`image`, `labels` and `image_id` of a data set, from the tags of each row and the feature of one tag."""
    names, name_of = checked_names(names), None
    if isinstance(feature, datasets.ClassLabel):
        name_of = dict(enumerate(feature.names))
        names = feature.names if names is None else names
    elif isinstance(feature, datasets.Value) and pa.types.is_integer(feature.pa_type):
        if names is None:
            raise ValueError(f"{what}: the classes are {feature.dtype} ids; they must have names; pass names=[...].")
        name_of = dict(enumerate(names))
    elif not _is_string(feature):
        needed = "it must be a string, a ClassLabel or an integer id; convert the column"
        raise TypeError(f"{what}: a class is of the type {quote(feature)}; {needed}.")
    names, labels = class_lists(tags, names, lambda row: f"{what}, row {row}", name_of, zeros_and_ones)
    return _assembled(dataset, names, labels)


def _assembled(
    dataset: datasets.Dataset, names: list[str], labels: list[list[int]], unknown: list[list[int]] | None = None
) -> datasets.Dataset:
    """`image`, `labels`, `image_id` and, where there are unknown classes, `unknown_labels` of N images."""
    image_ids = _image_ids(dataset)
    columns = ["image", "image_id"] if image_ids is None else ["image"]
    result = dataset.with_format(None).select_columns(columns)
    classes = datasets.List(datasets.ClassLabel(names=names))
    result = result.add_column("labels", labels, feature=classes)
    if image_ids is not None:
        result = result.add_column("image_id", image_ids)
    result = result.select_columns(["image", "labels", "image_id"])
    return result.add_column("unknown_labels", unknown, feature=classes) if unknown and any(unknown) else result


def with_image_ids(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set with a unique `image_id`: its own, else the file names, else row numbers."""
    image_ids = _image_ids(dataset)
    return dataset if image_ids is None else dataset.add_column("image_id", image_ids)


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


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
