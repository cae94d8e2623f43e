"""Label columns to matrices: both stored forms, every way of rearranging rows, and what wrong rows are told."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value, concatenate_datasets
from sklearn.preprocessing import MultiLabelBinarizer

from hf_balancemix.data import labels
from hf_balancemix.data.labels import (
    class_names,
    given_labels,
    is_class_list,
    label_matrix,
    mark_unknown,
    multi_hot,
    sparse_labels,
)
from hf_balancemix.data.noise import Mislabel

NAMES = ["cat", "dog", "car", "tree"]
ROWS = [[0, 2], [], [3], [3, 1, 0], [2]]
MATRIX = MultiLabelBinarizer(classes=range(4)).fit_transform(ROWS)


def class_list(rows: list[list[int]] = ROWS) -> Dataset:
    return Dataset.from_dict({"labels": rows}, features=Features({"labels": List(ClassLabel(names=NAMES))}))


def multi_hot_column(rows, inner: str, length: int = -1) -> Dataset:
    return Dataset.from_dict({"labels": rows}, features=Features({"labels": List(Value(inner), length=length)}))


def raw(rows, feature) -> Dataset:
    """A data set whose rows are not checked by `datasets` (from_dict refuses some wrong ids itself)."""
    features = Features({"labels": feature})
    return Dataset(pa.table({"labels": pa.array(rows, type=features.arrow_schema.field("labels").type)})).cast(
        features
    )


def test_multi_hot_of_class_ids():
    matrix = multi_hot(ROWS, 4)
    assert matrix.dtype == torch.uint8
    np.testing.assert_array_equal(matrix.numpy(), MATRIX)


@pytest.mark.parametrize("convert", [np.array, torch.tensor, tuple, lambda row: [np.int64(k) for k in row]])
def test_multi_hot_accepts_arrays_tensors_and_tuples(convert):
    rows = [convert(row) if row else [] for row in ROWS]
    np.testing.assert_array_equal(multi_hot(rows, 4).numpy(), MATRIX)


def test_multi_hot_of_no_rows():
    assert multi_hot([], 4).shape == (0, 4)
    assert multi_hot([], 4, one_hot_input=True).shape == (0, 4)
    assert multi_hot([[]], 4).shape == (1, 4)


@pytest.mark.parametrize("dtype", [int, float, bool])
def test_multi_hot_input_is_passed_through(dtype):
    rows = MATRIX.astype(dtype)
    np.testing.assert_array_equal(multi_hot(rows.tolist(), 4, one_hot_input=True).numpy(), MATRIX)
    np.testing.assert_array_equal(multi_hot(torch.from_numpy(rows), 4, one_hot_input=True).numpy(), MATRIX)


@pytest.mark.parametrize(
    "dataset",
    [
        class_list(),
        Dataset.from_dict({"labels": ROWS}, features=Features({"labels": LargeList(ClassLabel(names=NAMES))})),
        multi_hot_column(MATRIX.tolist(), "int64"),
        multi_hot_column(MATRIX.tolist(), "uint8", length=4),
        multi_hot_column(MATRIX.astype(float).tolist(), "float32"),
        multi_hot_column(MATRIX.astype(bool).tolist(), "bool", length=4),
    ],
    ids=["class list", "large list", "int64", "uint8 fixed", "float32", "bool fixed"],
)
@pytest.mark.parametrize("arrange", ["plain", "select", "slice", "shuffle", "concatenate", "torch format"])
def test_label_matrix_of_every_form_and_arrangement(dataset, arrange):
    order = list(range(5))
    if arrange == "select":
        order = [4, 0, 0, 3]
        dataset = dataset.select(order)
    elif arrange == "slice":
        order = [2, 3]
        dataset = dataset.select(range(2, 4))
    elif arrange == "shuffle":
        order = Dataset.from_dict({"i": order}).shuffle(seed=3)["i"][:]
        dataset = dataset.shuffle(seed=3)
    elif arrange == "concatenate":
        order = [3, 1, 0, 1, 2, 3, 4]
        dataset = concatenate_datasets([dataset.select([3, 1]), dataset])
    elif arrange == "torch format":
        dataset = dataset.with_format("torch")
    matrix = label_matrix(dataset)
    assert matrix.dtype == torch.uint8
    np.testing.assert_array_equal(matrix.numpy(), MATRIX[order])


def test_label_matrix_of_another_column_reads_no_image():
    features = Features({"image": Image(), "clean_labels": List(ClassLabel(names=NAMES))})
    dataset = Dataset.from_dict({"image": ["/nowhere/a.jpg"] * 5, "clean_labels": ROWS}, features=features)
    np.testing.assert_array_equal(label_matrix(dataset, "clean_labels").numpy(), MATRIX)
    with pytest.raises(ValueError, match=r"columns are \['image', 'clean_labels'\]; 'labels' must be among them"):
        label_matrix(dataset)


def test_label_matrix_of_no_rows():
    assert label_matrix(class_list().select([])).shape == (0, 4)
    assert label_matrix(multi_hot_column([], "int64", length=4)).shape == (0, 4)


def test_label_matrix_of_a_hundred_thousand_shuffled_rows_is_fast():
    rows = [np.flatnonzero(row).tolist() for row in np.random.default_rng(0).random((100_000, 4)) < 0.5]
    dataset = class_list(rows).shuffle(seed=0)
    start = time.process_time()  # whatever else the machine does
    matrix = label_matrix(dataset)
    assert time.process_time() - start < 5  # about 0.5 s on one slow core
    assert int(matrix.sum()) == sum(map(len, rows))


def test_class_names():
    assert class_names(class_list()) == NAMES
    assert class_names(class_list().shuffle(seed=0)) == NAMES
    assert class_names(multi_hot_column(MATRIX.tolist(), "int64")) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert class_names(multi_hot_column([], "bool", length=2)) == ["LABEL_0", "LABEL_1"]


def test_is_class_list():
    assert is_class_list(List(ClassLabel(names=NAMES)))
    assert is_class_list(LargeList(ClassLabel(names=NAMES)))
    assert not is_class_list(List(Value("int64")))
    assert not is_class_list(ClassLabel(names=NAMES))


@pytest.mark.parametrize(
    "feature",
    [Value("int64"), ClassLabel(names=["a", "b"]), List(Value("string")), List(List(Value("int64")))],
    ids=["int", "single label", "strings", "nested"],
)
@pytest.mark.parametrize("function", [class_names, label_matrix])
def test_columns_of_another_type(function, feature):
    dataset = Dataset.from_dict({"labels": []}, features=Features({"labels": feature}))
    with pytest.raises(TypeError, match=r"column 'labels' is .*; it must be List\(ClassLabel.*cast_column"):
        function(dataset)


@pytest.mark.parametrize("function", [class_names, label_matrix])
def test_other_containers(function):
    with pytest.raises(TypeError, match=r"is a DatasetDict; it must be a datasets\.Dataset.*; pass one of its splits"):
        function(datasets.DatasetDict({"train": class_list()}))
    with pytest.raises(TypeError, match=r"is a IterableDataset; .*; load it with streaming=False"):
        function(class_list().to_iterable_dataset())


def test_unknown_number_of_classes():
    with pytest.raises(ValueError, match=r"a data set without rows; its number of classes must be known"):
        label_matrix(multi_hot_column([], "int64"))
    with pytest.raises(ValueError, match=r"column 'labels', row 0 is empty"):
        label_matrix(multi_hot_column([[]], "int64"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0], [4]], r"column 'noisy', row 1 has the class id 4; it must be in 0\.\.3"),
        ([[0], [1, -1]], r"column 'noisy', row 1 has the class id -1; it must be in 0\.\.3"),
        ([[], [2, 0, 2]], r"column 'noisy', row 1 lists the class id 2 more than once"),
        ([[0], None], r"column 'noisy', row 1 is None; it must be a list"),
        ([[0], 3], r"column 'noisy', row 1 is 3; it must be a list"),
        ([[0], "cat"], r"column 'noisy', row 1 is 'cat'; it must be a list"),
        ([[0], [1, None]], r"column 'noisy', row 1 has None; it must be of class ids"),
        ([[0], [1, 2.5]], r"column 'noisy', row 1 has 2\.5; it must be of class ids"),
        ([[], [True]], r"column 'noisy', row 1 has True; it must be of class ids .*one_hot_input=True"),
        ([["cat"]], r"column 'noisy', row 0 has 'cat'; it must be of class ids"),
    ],
)
def test_wrong_class_lists(rows, message):
    with pytest.raises(ValueError, match=message):
        multi_hot(rows, 4, column="noisy")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [0, 2]], r"column 'labels', row 1 has 2; it must be of 0 and 1; .*cast_column"),
        ([[0, 1], [0, -1]], r"column 'labels', row 1 has -1; it must be of 0 and 1"),
        ([[0, 1], [0.5, 1.0]], r"column 'labels', row 1 has 0\.5; it must be of 0 and 1"),
        ([[0, 1], [float("nan"), 1.0]], r"column 'labels', row 1 has nan; it must be of 0 and 1"),
        ([[0, 1], [None, 1]], r"column 'labels', row 1 has None; it must be of 0 and 1"),
        ([[0, 1], [1]], r"column 'labels', row 1 has 1 values; there must be one for each of the K = 2 classes"),
        ([[0, 1], None], r"column 'labels', row 1 is None; it must be a list"),
    ],
)
def test_wrong_multi_hot_rows_in_lists_and_in_arrow(rows, message):
    with pytest.raises(ValueError, match=message):
        multi_hot(rows, 2, one_hot_input=True)
    with pytest.raises(ValueError, match=message):
        label_matrix(
            raw(rows, List(Value("float64" if any(isinstance(v, float) for v in rows[1] or []) else "int64")))
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0], [-1]], r"column 'labels', row 1 has the class id -1; it must be in"),  # ClassLabel allows -1 for "none"
        ([[0], None], r"column 'labels', row 1 is None; it must be a list"),
        ([[0], [], [1, None]], r"column 'labels', row 2 has None; it must be of class ids"),
        ([[0], [], [1, 1]], r"column 'labels', row 2 lists the class id 1 more than once"),
    ],
)
def test_wrong_class_lists_in_arrow(rows, message):
    with pytest.raises(ValueError, match=message):
        label_matrix(raw(rows, List(ClassLabel(names=NAMES))))


# labels that are not known


def test_given_labels_are_minus_one_where_unknown():
    unknown = [[1], [0, 1, 2, 3], [], [2], []]
    dataset = class_list().add_column("unknown_labels", unknown, feature=List(ClassLabel(names=NAMES)))
    expected = [[-1 if k in u else int(k in row) for k in range(4)] for row, u in zip(ROWS, unknown, strict=True)]
    found = given_labels(dataset)
    assert found.dtype == torch.int8
    assert found.tolist() == expected
    assert given_labels(class_list()).tolist() == MATRIX.tolist()


def test_a_label_both_present_and_unknown():
    dataset = class_list().add_column("unknown_labels", [[], [], [], [1], []], feature=List(ClassLabel(names=NAMES)))
    with pytest.raises(ValueError, match=r"row 3: class 'dog' is in 'labels' and in 'unknown_labels'.*remove it"):
        given_labels(dataset)
    with pytest.raises(ValueError, match=r"unknown has the shape \(2, 2\); it must be \(2, 3\)"):
        mark_unknown(np.zeros((2, 3)), np.zeros((2, 2)), "abc")


@pytest.mark.parametrize("names", [["dog", "cat", "car", "tree"], ["cat", "dog", "car"], [*NAMES, "kite"]])
@pytest.mark.parametrize("column", ["unknown_labels", "clean_labels"])
def test_columns_of_other_classes_than_labels(column, names):
    dataset = class_list().add_column(column, [[]] * 5, feature=List(ClassLabel(names=names)))
    with pytest.raises(ValueError, match=f"column '{column}' has other classes than 'labels'.*cast_column"):
        given_labels(dataset) if column == "unknown_labels" else label_matrix(dataset, column)


@pytest.mark.parametrize("absent", [-1.0, float("nan"), None])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8"])
def test_unknown_labels_in_a_multi_hot_column(absent, dtype):
    if dtype == "int8" and absent != absent:
        return
    rows = [[1, absent, 0], [0, 1, absent], [1, 0, 0]]
    dataset = multi_hot_column(rows, dtype)
    assert given_labels(dataset).tolist() == [[1, -1, 0], [0, 1, -1], [1, 0, 0]]
    assert given_labels(dataset.select([1])).tolist() == [[0, 1, -1]]
    with pytest.raises(ValueError, match=r"row 0 has .*it must be of 0 and 1; in the column 'labels' also -1, NaN"):
        label_matrix(dataset)
    numbered = dataset.add_column("image_id", [0, 1, 2])
    with pytest.raises(ValueError, match="with noise it must have 0 there, and 1 in a column 'unknown_labels'"):
        Mislabel(rate=0.2, seed=0).add_to(numbered)
    marks = Features({"unknown_labels": List(Value("int64"))})["unknown_labels"]
    both = dataset.add_column("unknown_labels", [[0, 0, 1], [0, 0, 0], [0, 0, 0]], feature=marks)
    assert given_labels(both).tolist() == [[1, -1, -1], [0, 1, -1], [1, 0, 0]]


def test_labels_are_read_some_rows_at_a_time_with_the_rows_in_messages(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [sorted(rng.choice(4, rng.integers(4), replace=False).tolist()) for _ in range(23)]
    unknown = [[k for k in range(4) if k not in row][:1] for row in rows]
    forms = [raw(rows, List(ClassLabel(names=NAMES)))]
    hot = [[None if k in u else int(k in row) for k in range(4)] for row, u in zip(rows, unknown, strict=True)]
    forms += [multi_hot_column([[int(k in row) for k in range(4)] for row in rows], "int64")]
    whole = [given_labels(data) for data in forms]
    marked = given_labels(multi_hot_column(hot, "int64"))
    monkeypatch.setattr(labels, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(labels, "_VALUES_AT_ONCE", 12)
    for data, expected in zip(forms, whole, strict=True):
        found = sparse_labels(data.select(range(22, -1, -1)))
        assert found.has_sorted_indices
        assert found.toarray().tolist() == expected.flip(0).tolist()
    assert sparse_labels(multi_hot_column(hot, "int64")).toarray().tolist() == marked.tolist()
    rows[17] = [1, 1]
    with pytest.raises(ValueError, match="row 17 lists the class id 1 more than once"):
        sparse_labels(raw(rows, List(ClassLabel(names=NAMES))))
    rows[17] = [4]
    with pytest.raises(ValueError, match="row 17 has the class id 4"):
        sparse_labels(raw(rows, List(ClassLabel(names=NAMES))))
    hot[19][2] = 3
    with pytest.raises(ValueError, match="row 19 has 3"):
        sparse_labels(multi_hot_column(hot, "int64"))
