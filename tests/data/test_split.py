"""Splits that keep each class's share, against random ones."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import label_dataset, long_tailed_labels
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from hf_balancemix import describe
from hf_balancemix.data.split import iterative_split, warn_of_copies

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))


def ids_of(parts) -> list[list]:
    return [part["image_id"][:] for part in parts]


def test_parts_are_a_partition_of_the_asked_sizes_in_the_order_of_the_rows():
    dataset = label_dataset(long_tailed_labels(0, 200, 8))
    for sizes, expected in (
        ([150, 30, 20], [150, 30, 20]),
        ([0.75, 0.15, 0.1], [150, 30, 20]),
        ([1 / 3, 1 / 3, 1 / 3], [67, 67, 66]),
        ([1.0], [200]),
    ):
        ids = ids_of(iterative_split(dataset, sizes))
        assert [len(part) for part in ids] == expected
        assert all(part == sorted(part) for part in ids)
        assert sorted(itertools.chain(*ids)) == list(range(200))


def test_one_label_each_is_split_to_the_instance():
    labels = np.repeat(np.eye(4, dtype=int), [500, 100, 30, 10], axis=0)
    for seed in range(3):
        large, small = iterative_split(label_dataset(labels), [0.9, 0.1], seed=seed)
        assert describe(small).positives.tolist() == [50, 10, 3, 1]
        assert describe(large).positives.tolist() == [450, 90, 27, 9]


def test_depends_on_ids_seed_and_labels_only():
    labels = long_tailed_labels(0, 120, 5)
    dataset = label_dataset(labels)
    first = [set(part) for part in ids_of(iterative_split(dataset, [80, 40], seed=1))]
    shuffled = dataset.shuffle(seed=7)
    assert [set(part) for part in ids_of(iterative_split(shuffled, [80, 40], seed=1))] == first
    as_text = label_dataset(labels, ids=map(str, range(120)))
    assert [set(map(int, part)) for part in ids_of(iterative_split(as_text, [80, 40], seed=1))] == first
    assert [set(part) for part in ids_of(iterative_split(dataset, [80, 40], seed=2))] != first


def share_deviations(labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """(parts, K) distance between a class's share of the part and the part's share of the whole, relative to it."""
    shares = np.array([labels[part].sum(0) / labels.sum(0) for part in parts])
    sizes = np.array([len(part) / len(labels) for part in parts])[:, None]
    return np.abs(shares / sizes - 1)


def random_parts(rows: int, sizes: list[int], seed: int) -> list[np.ndarray]:
    return np.split(np.random.default_rng(seed).permutation(rows), np.cumsum(sizes)[:-1])


def test_classes_keep_their_shares_far_better_than_in_random_splits():
    labels = long_tailed_labels(3, 2_000, 20)
    parts = [np.array(ids) for ids in ids_of(iterative_split(label_dataset(labels), [0.8, 0.2]))]
    found = share_deviations(labels, parts)
    chance = np.mean([share_deviations(labels, random_parts(2_000, [1_600, 400], seed)) for seed in range(20)], axis=0)
    assert (found.mean(1) < chance.mean(1) / 5).all()
    assert np.abs(labels[parts[1]].sum(0) - 0.2 * labels.sum(0)).max() < 3  # instances


def test_unknown_labels_are_stratified_too():
    rng = np.random.default_rng(0)
    labels = long_tailed_labels(3, 1_000, 6)
    unknown = (1 - labels) & (rng.random(labels.shape) < np.linspace(0.05, 0.6, 6))
    plain = label_dataset(labels, ids=range(1_000))
    masked = label_dataset(labels, unknown_labels=unknown)
    for matrix in (labels, unknown):
        parts = [np.array(ids) for ids in ids_of(iterative_split(masked, [0.7, 0.3]))]
        chance = np.mean([share_deviations(matrix, random_parts(1_000, [700, 300], seed)) for seed in range(20)])
        assert share_deviations(matrix, parts).mean() < chance / 3
    no_unknown = label_dataset(labels, unknown_labels=0 * labels)
    assert ids_of(iterative_split(no_unknown, [0.7, 0.3])) == ids_of(iterative_split(plain, [0.7, 0.3]))


def test_instances_without_labels_fill_the_parts():
    labels = np.zeros((30, 2), dtype=int)
    labels[:4, 0] = 1
    parts = iterative_split(label_dataset(labels), [15, 15])
    assert [describe(part).positives.tolist() for part in parts] == [[2, 0], [2, 0]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([10, 10], r"sizes is \[10, 10\], which sum to 20; they must be positive integers that sum to 24"),
        ([0.5, 0.4], "sum to 0.9"),
        ([12, 0.5], "positive integers that sum to 24, or positive fractions that sum to 1"),
        ([24, 0], "they must be positive"),
        ([25, -1], "they must be positive"),
        ([True, 23], "they must be positive"),
        ([], "they must be positive"),
        (["12", "12"], "they must be positive"),
        ([float("nan"), 1.0], "they must be positive"),
        ([0.99, 0.01], "leaves a part empty"),
    ],
)
def test_hostile_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        iterative_split(label_dataset(long_tailed_labels(0, 24, 3)), sizes)


def test_hostile_ids_and_seed():
    dataset = label_dataset(long_tailed_labels(0, 24, 3))
    with pytest.raises(ValueError, match=r"columns are \['labels'\]; 'image_id' must be among them"):
        iterative_split(dataset.remove_columns("image_id"), [0.5, 0.5])
    with pytest.raises(ValueError, match="image_id '0' occurs 2 times in the data set; it must be unique"):
        iterative_split(label_dataset(long_tailed_labels(0, 24, 3), ids=[i // 2 for i in range(24)]), [0.5, 0.5])
    with pytest.raises(ValueError, match="seed is -1; it must be an integer of at least 0"):
        iterative_split(dataset, [0.5, 0.5], seed=-1)


@pytest.mark.skipif(not (DATA / "coco_labels").is_dir(), reason="BALANCEMIX_DATA has no coco_labels")
def test_real_coco_split():
    with np.load(DATA / "coco_labels" / "coco_multihot.npz") as arrays:
        labels, ids = arrays["train2014_labels"], arrays["train2014_ids"].tolist()
    dataset = label_dataset(labels, ids=ids)
    row_of = {image_id: row for row, image_id in enumerate(dataset["image_id"])}
    parts = [np.array([row_of[i] for i in ids]) for ids in ids_of(iterative_split(dataset, [0.8, 0.1, 0.1]))]
    chance = share_deviations(labels, random_parts(len(labels), [len(part) for part in parts], 0))
    found = share_deviations(labels, parts)
    assert (found.mean(1) < chance.mean(1) / 15).all()
    assert found.max() < 0.02


def test_groups_stay_together_and_classes_keep_their_shares():
    labels = long_tailed_labels(0, 1000, 8)
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(1000), rng.integers(1, 9, 1000))[:1000]
    dataset = label_dataset(labels).add_column("patient", [f"p{p}" for p in patients]).shuffle(seed=0)
    parts = iterative_split(dataset, [0.8, 0.2], groups="patient")
    of_part = [set(part["patient"]) for part in parts]
    assert of_part[0].isdisjoint(of_part[1])
    assert sorted(itertools.chain(*ids_of(parts))) == list(range(1000))
    assert abs(len(parts[1]) - 200) <= 8  # the largest group
    rows = [np.array(ids) for ids in ids_of(parts)]
    assert share_deviations(labels, rows)[1].mean() < 0.15
    # A split that draws whole patients and looks at no label is far from that.
    drawn = rng.permutation(patients.max() + 1)
    random_part = np.isin(patients, drawn[: len(drawn) // 5])
    random_rows = [np.flatnonzero(~random_part), np.flatnonzero(random_part)]
    assert share_deviations(labels, random_rows)[1].mean() > 2 * share_deviations(labels, rows)[1].mean()
    same = iterative_split(dataset, [0.8, 0.2], groups=dataset["patient"][:])
    assert ids_of(same) == ids_of(parts)


def test_hostile_groups():
    dataset = label_dataset(long_tailed_labels(0, 10, 3))
    for groups, message in (
        ("patient", "'patient' must be among them"),
        ([1, 2], "groups has 2 values; it must have 10"),
        ([1] * 9 + [None], "groups has None for row 9"),
        ([""] + [1] * 9, "groups has '' for row 0"),
        ([1] * 10, "groups leave part 1 of 2 empty"),
    ):
        with pytest.raises(ValueError, match=message):
            iterative_split(dataset, [0.5, 0.5], groups=groups)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_copies_of_an_image_on_both_sides_are_warned_of(tmp_path, caplog, as_bytes):
    def images(*shades: int) -> Dataset:
        rows = []
        for shade in shades:
            file = tmp_path / f"{shade}_{len(list(tmp_path.iterdir()))}.png"
            PILImage.new("RGB", (8, 8), (shade, 0, 0)).save(file)
            rows.append({"path": None, "bytes": file.read_bytes()} if as_bytes else str(file))
        return Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))

    assert warn_of_copies(images(1, 2, 3, 4), images(5, 6, 7)) == 0
    assert not caplog.records
    assert warn_of_copies(images(1, 2, 3, 4), images(5, 2, 7)) == 1
    assert "1 of 3 evaluation images are in the training set, too (the same bytes), such as " in caplog.text
