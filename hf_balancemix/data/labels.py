"""Label columns: from what a `datasets.Dataset` stores to an (N, K) matrix of 0, 1 and, where unknown, -1; compressed
rows first, so that only who asks for a dense one has N x K numbers.

Two forms are understood. A *class list* is `List(ClassLabel(names=...))`, the ids of the classes that are present in
an instance; it is what this package's loaders make, because the class names travel with the data. A *multi-hot*
column is a list of K zeros and ones (integers, floats or booleans) for each instance; in `labels`, -1, NaN and None
in it are unknown labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from scipy.sparse import csr_array

from hf_balancemix.files import quote

# Of class lists, and of multi-hot columns.
_ROWS_AT_ONCE, _VALUES_AT_ONCE = 1 << 16, 1 << 23


def column_feature(dataset: Any, column: str, fix: str) -> Any:
    """The feature of a column; TypeError where `dataset` is no `datasets.Dataset`, ValueError (which ends in `fix`)
    where it has no such column."""
    if not isinstance(dataset, datasets.Dataset):
        fix_type = "pass one of its splits" if isinstance(dataset, dict) else "load it with streaming=False"
        raise TypeError(f"the data set is a {type(dataset).__name__}; it must be a datasets.Dataset; {fix_type}.")
    if column not in dataset.features:
        raise ValueError(
            f"the data set's columns are {quote(dataset.column_names)}; '{column}' must be among them; {fix}."
        )
    return dataset.features[column]


def is_class_list(feature: Any) -> bool:
    """Tell whether a feature is a list of class ids with names, `List(ClassLabel(...))`."""
    return isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(
        feature.feature, datasets.ClassLabel
    )


def class_names(dataset: datasets.Dataset, column: str = "labels") -> list[str]:
    """Names of the K classes of a label column, in the order of their ids.

    Returns:
        The K names of the column's ClassLabel; `"LABEL_0"`, `"LABEL_1"`, ... for a multi-hot column.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`, or the column is neither a class list nor multi-hot.
        ValueError: The column is absent, or it is multi-hot and no row tells its length.
    """
    feature = _label_feature(dataset, column)
    if not is_class_list(feature):
        return [f"LABEL_{k}" for k in range(_multi_hot_length(dataset, feature, column))]
    if not feature.feature.names:
        raise ValueError(
            f"column '{column}' is {quote(feature)}; its classes must have names; give ClassLabel(names=[...])."
        )
    return list(feature.feature.names)


def has_class_names(dataset: datasets.Dataset) -> bool:
    """Whether the `labels` column says what its classes are called; a multi-hot one does not."""
    return is_class_list(dataset.features["labels"])


def sparse_labels(dataset: datasets.Dataset, column: str = "labels") -> csr_array:
    """A label column as compressed rows, read through Arrow some rows at a time; no image is decoded.

    Args:
        dataset: A `datasets.Dataset`, also after `select`, `shuffle` or `concatenate_datasets`.
        column: Name of the label column. Of `labels` also what is unknown is read, as by :func:`given_labels`.

    Returns:
        (N, K) int8 array in which 1 and, for unknown labels, -1 are stored; the classes of a row in order.

    Raises:
        TypeError, ValueError: As :func:`given_labels`, or for another column as :func:`label_matrix`.
    """
    labels = _read(dataset, column, unknown=column == "labels")
    if column == "labels" and "unknown_labels" in dataset.features:
        unknown = _read(dataset, "unknown_labels", unknown=False)
        _check_unknown((labels == 1).multiply(unknown).nonzero(), class_names(dataset))
        labels = labels - unknown
        labels.data = labels.data.clip(min=-1)  # an unknown label that stands in both columns
    return labels


def label_matrix(dataset: datasets.Dataset, column: str = "labels") -> torch.Tensor:
    """The label column as a dense matrix, read as by :func:`sparse_labels`.

    Args:
        dataset: A `datasets.Dataset`.
        column: Name of the label column.

    Returns:
        (N, K) uint8 tensor of 0 and 1, rows in the order of the data set.

    Raises:
        TypeError, ValueError: As `class_names`; a row is not a valid label list (see `multi_hot`); or `labels` is
            there, too, and has other classes.
    """
    return torch.from_numpy(_read(dataset, column, unknown=False).toarray().view(np.uint8))


def given_labels(dataset: datasets.Dataset) -> torch.Tensor:
    """The `labels` column with what is unknown: -1, NaN and None of a multi-hot column, and of either form the classes
    that a column `unknown_labels` lists.

    Returns:
        (N, K) int8 tensor of 0, 1 and -1 (unknown).

    Raises:
        TypeError, ValueError: As `label_matrix`; or a class is both present and unknown in an instance.
    """
    return torch.from_numpy(sparse_labels(dataset).toarray())


def stored_labels(dataset: datasets.Dataset, column: str) -> torch.Tensor:
    """(N, K) int8 of 0, 1 and, where a multi-hot column has -1, NaN or None, -1; errors as `label_matrix`."""
    return torch.from_numpy(_read(dataset, column, unknown=True).toarray())


def check_unknown_column(dataset: datasets.Dataset) -> None:
    """Raise a ValueError where unknown labels stand in `labels` itself, which noise would write over as 0."""
    if is_class_list(dataset.features["labels"]):  # which has no room for them: it need not be read
        return
    if (_read(dataset, "labels", unknown=True).data < 0).any():
        raise ValueError(
            "column 'labels' has -1, NaN or None for unknown labels; with noise it must have 0 there, and 1 in a "
            "column 'unknown_labels' of the same form; move them with dataset.map."
        )


def _read(dataset: datasets.Dataset, column: str, unknown: bool) -> csr_array:
    """(N, K) int8 of 0, 1 and, where `unknown` allows it, -1."""
    feature, names = _label_feature(dataset, column), class_names(dataset, column)
    if column != "labels" and "labels" in dataset.features and names != class_names(dataset):
        raise ValueError(
            f"column '{column}' has other classes than 'labels'; both must have the same, in the same order; use "
            f"dataset.cast_column('{column}', dataset.features['labels'])."
        )
    rows = dataset.select_columns([column]).with_format("arrow")
    at_once = _ROWS_AT_ONCE if is_class_list(feature) else max(1, _VALUES_AT_ONCE // len(names))
    parts = [
        _read_rows(rows[first : first + at_once][column].combine_chunks(), feature, len(names), column, first, unknown)
        for first in range(0, len(dataset), at_once)
    ]
    if not parts:
        return csr_array((0, len(names)), dtype=np.int8)
    counts = np.concatenate([[0], *(np.diff(part.indptr) for part in parts)])
    stored = [np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "indices")]
    start = counts.cumsum().astype(np.int32 if len(stored[0]) < 2**31 else np.int64)
    return csr_array((*stored, start), shape=(len(dataset), len(names)))


def _read_rows(lists: pa.Array, feature: Any, num_classes: int, column: str, first: int, unknown: bool) -> csr_array:
    """Those of :func:`_read` from row `first` on."""
    if lists.null_count:
        _raise_not_a_list(column, first + int(np.flatnonzero(lists.is_null())[0]), None)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    values = lists.flatten()  # respects the offset of a sliced array, which `.values` does not
    if is_class_list(feature):
        unknown = False  # what is not known of class ids stands in `unknown_labels`
    absent = np.asarray(values.is_null()) if values.null_count else np.zeros(len(values), dtype=bool)
    if absent.any() and not unknown:
        _raise_bad_value(column, first + _row_of(lengths, int(absent.argmax())), None, is_class_list(feature))
    values = values.fill_null(False if pa.types.is_boolean(values.type) else 0).to_numpy(zero_copy_only=False)
    if is_class_list(feature):
        return _from_class_ids(values, lengths, num_classes, column, first)
    if unknown:
        absent |= (values == -1) | (values != values)  # NaN is unlike itself
        values = np.where(absent, 0, values)
    matrix = _from_zeros_and_ones(values, lengths, num_classes, column, first).view(np.int8)
    return csr_array(np.where(absent.reshape(matrix.shape), np.int8(-1), matrix))


def mark_unknown(labels: np.ndarray, unknown: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
    """(N, K) int8 of 0, 1 and -1: labels of 0 and 1, and -1 where `unknown`, of that shape, is true or 1.

    ValueError where the shapes differ or a label is both present and unknown; the message has the class from `names`.
    """
    if unknown.shape != labels.shape:
        raise ValueError(f"unknown has the shape {unknown.shape}; it must be {labels.shape}; give each label a value.")
    _check_unknown(((unknown != 0) & (labels == 1)).nonzero(), names)
    return np.where(unknown != 0, -1, labels).astype(np.int8)


def _check_unknown(both: tuple[np.ndarray, ...], names: Sequence[str] | None) -> None:
    """ValueError where some labels, by row and class, are both present and unknown."""
    for row, k in zip(*both, strict=True):
        name = f"class {quote(names[k] if names else str(k))}"
        raise ValueError(f"row {row}: {name} is in 'labels' and in 'unknown_labels'; it must be in one; remove it.")


def multi_hot(
    rows: Iterable[Sequence[int]], num_classes: int, *, column: str = "labels", one_hot_input: bool = False
) -> torch.Tensor:
    """Label lists as a matrix.

    Args:
        rows: N lists (or 1-D arrays or tensors) of the ids of the present classes.
        num_classes: K.
        column: Name of the label column, for messages.
        one_hot_input: The rows are K zeros and ones each, and are only checked.

    Returns:
        (N, K) uint8 tensor of 0 and 1.

    Raises:
        ValueError: A row is not a list, holds anything but integers, a class id outside `[0, K)` or one twice, a
            multi-hot value other than 0 and 1, or not K of them. The message names column, row and value.

    Example:
        >>> multi_hot([[2, 0], []], num_classes=3)
        tensor([[1, 0, 1],
                [0, 0, 0]], dtype=torch.uint8)
    """
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            _raise_not_a_list(column, index, row)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    flat = [value.item() if hasattr(value, "item") else value for value in chain.from_iterable(rows)]
    allowed = (int, float, bool) if one_hot_input else (int,)  # exact types: True is no class id
    for position, value in enumerate(flat):
        if type(value) not in allowed:
            _raise_bad_value(column, _row_of(lengths, position), value, not one_hot_input)
    values = np.array(flat, dtype=None if flat else np.int64)
    if one_hot_input:
        return torch.from_numpy(_from_zeros_and_ones(values, lengths, num_classes, column))
    return torch.from_numpy(_from_class_ids(values, lengths, num_classes, column).toarray().view(np.uint8))


def with_changed_labels(
    dataset: datasets.Dataset, rows: Sequence[int], classes: Sequence[int], values: Sequence[int], beside: str
) -> datasets.Dataset:
    """The data set with other values of L of its labels, in the same form; rows without one of them stay as they are.

    Args:
        dataset: With `labels`.
        rows, classes, values: L positions, each of them once, in the (N, K) labels, and the 0 or 1 to be there.
        beside: Name of the column in which the old labels are kept, last; where it exists, it stays as it is.
    """
    feature = dataset.features["labels"]
    column = dataset.select_columns(["labels"]).with_format("arrow")[:]["labels"].combine_chunks()
    changes: dict[int, dict[int, int]] = {}
    for row, k, value in zip(rows, classes, values, strict=True):
        changes.setdefault(int(row), {})[int(k)] = int(value)
    new_rows = {}
    for row, change in changes.items():
        old = column[row].as_py()
        if is_class_list(feature):
            present = ({*old} | {k for k, value in change.items() if value}) - {k for k in change if not change[k]}
            new_rows[row] = sorted(present)
        else:
            kind = bool if pa.types.is_boolean(feature.feature.pa_type) else int
            new_rows[row] = [kind(change[k]) if k in change else value for k, value in enumerate(old)]
    has_beside = beside in dataset.features
    result = dataset.with_format(None)
    result = result.remove_columns("labels") if has_beside else result.rename_column("labels", beside)
    # An Arrow array, as `datasets` takes seconds for the fingerprint of 100,000 lists.
    result = result.add_column("labels", with_rows(column, new_rows), feature=feature)
    result = result.select_columns([*dataset.column_names, *([] if has_beside else [beside])])
    return result.with_format(dataset.format["type"], **dataset.format["format_kwargs"])


def with_rows(column: pa.Array, rows: Mapping[int, Any]) -> pa.Array:
    """The N values of a column with others in some rows, of its type."""
    take = np.arange(len(column))
    take[list(rows)] = len(column) + np.arange(len(rows))
    return pa.concat_arrays([column, pa.array(list(rows.values()), column.type)]).take(pa.array(take))


def _label_feature(dataset: datasets.Dataset, column: str) -> Any:
    fix = f"rename the one that holds the labels: dataset.rename_column(..., '{column}')"
    feature = column_feature(dataset, column, fix)
    if not is_class_list(feature):
        inner = getattr(feature, "feature", None)
        storage = inner.pa_type if isinstance(inner, datasets.Value) else pa.null()
        if not (pa.types.is_integer(storage) or pa.types.is_floating(storage) or pa.types.is_boolean(storage)):
            needed = "it must be List(ClassLabel(names=[...])) or a list of K numbers 0 or 1"
            fix = f"dataset.cast_column('{column}', List(ClassLabel(names=[...])))"
            raise TypeError(f"column '{column}' is {quote(feature)}; {needed}; use {fix}.")
    return feature


def _multi_hot_length(dataset: datasets.Dataset, feature: Any, column: str) -> int:
    length = getattr(feature, "length", -1)
    if length < 0:
        if len(dataset) == 0:
            problem = f"column '{column}' is {quote(feature)} in a data set without rows"
            raise ValueError(f"{problem}; its number of classes must be known; use List(ClassLabel(names=[...])).")
        first = dataset.select_columns([column]).with_format("arrow")[0:1][column][0]
        if not first.is_valid:
            _raise_not_a_list(column, 0, None)
        length = len(first)
    if length == 0:
        raise ValueError(f"column '{column}', row 0 is empty; it must have a 0 or 1 for each class; give the values.")
    return length


def _row_of(lengths: np.ndarray, position: int) -> int:
    """The row that holds the flat position."""
    return int(np.searchsorted(np.cumsum(lengths), position, side="right"))


def _raise_not_a_list(column: str, row: int, value: Any) -> None:
    needed = "it must be a list, empty (or K zeros) for an instance without labels"
    raise ValueError(f"column '{column}', row {row} is {quote(value)}; {needed}; drop the row.")


def _raise_bad_value(column: str, row: int, value: Any, class_list: bool) -> None:
    if class_list:
        needed = "class ids (whole numbers from 0); if the rows are multi-hot, pass one_hot_input=True"
    else:
        reading = "in the column 'labels' also -1, NaN or None for unknown; " if column == "labels" else ""
        needed = f"0 and 1; {reading}if they are class ids, cast_column('{column}', List(ClassLabel(names=[...])))"
    raise ValueError(f"column '{column}', row {row} has {quote(value)}; it must be of {needed}.")


def _from_class_ids(ids: np.ndarray, lengths: np.ndarray, num_classes: int, column: str, first: int = 0) -> csr_array:
    outside = np.flatnonzero((ids < 0) | (ids >= num_classes))
    if len(outside):
        row = first + _row_of(lengths, outside[0])
        found = f"column '{column}', row {row} has the class id {int(ids[outside[0]])}"
        raise ValueError(f"{found}; it must be in 0..{num_classes - 1} for K = {num_classes} classes; correct the id.")
    start = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    stored = np.ones(len(ids), dtype=np.int8), ids.astype(np.int32), start
    labels = csr_array(stored, shape=(len(lengths), num_classes))
    if not labels.has_canonical_format:
        labels.sort_indices()
        labels.sum_duplicates()
    if labels.nnz != len(ids):
        rows = np.repeat(np.arange(len(lengths)), lengths)
        row, twice = Counter(zip(rows.tolist(), ids.tolist(), strict=True)).most_common(1)[0][0]
        found = f"column '{column}', row {first + row} lists the class id {twice} more than once"
        raise ValueError(f"{found}; it must be there once; use sorted(set(ids)).")
    return labels


def _from_zeros_and_ones(
    values: np.ndarray, lengths: np.ndarray, num_classes: int, column: str, first: int = 0
) -> np.ndarray:
    """(N, K) uint8."""
    wrong = np.flatnonzero(lengths != num_classes)
    if len(wrong):
        found = f"column '{column}', row {first + int(wrong[0])} has {int(lengths[wrong[0]])} values"
        fix = f"if they are class ids, dataset.cast_column('{column}', List(ClassLabel(names=[...])))"
        raise ValueError(f"{found}; there must be one for each of the K = {num_classes} classes; {fix}.")
    bad = np.flatnonzero(~((values == 0) | (values == 1)))  # NaN is neither
    if len(bad):
        _raise_bad_value(column, first + _row_of(lengths, bad[0]), values[bad[0]].item(), class_list=False)
    return values.astype(np.uint8).reshape(len(lengths), num_classes)
