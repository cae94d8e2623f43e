"""Figures against hand-computed and scikit-learn's, real COCO and VOC; the split against random ones."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.metrics import multilabel_confusion_matrix

from hf_balancemix.data.describe import describe, iterative_split
from hf_balancemix.data.noise import Mislabel, SinglePositive

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))


def make(labels, names=None, ids=None, **others) -> datasets.Dataset:
    """A data set without images from (N, K) matrices of 0 and 1."""
    names = names or [f"class {k}" for k in range(np.shape(labels)[1])]
    feature = datasets.List(datasets.ClassLabel(names=list(names)))
    columns = {
        name: [np.flatnonzero(row).tolist() for row in matrix] for name, matrix in {"labels": labels, **others}.items()
    }
    features = dict.fromkeys(columns, feature)
    columns["image_id"] = list(range(len(labels))) if ids is None else list(ids)
    features["image_id"] = datasets.Value("string" if isinstance(columns["image_id"][0], str) else "int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def random_labels(seed: int, rows: int, classes: int) -> np.ndarray:
    """Long-tailed."""
    rng = np.random.default_rng(seed)
    return (rng.random((rows, classes)) < np.geomspace(0.5, 0.005, classes)).astype(np.uint8)


# describe

LABELS = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_figures_computed_by_hand():
    found = describe(make(LABELS, ["ant", "bee", "cat"]), many=2, few=1)
    assert (found.names, found.num_instances, found.num_classes) == (["ant", "bee", "cat"], 4, 3)
    assert found.positives.tolist() == [3, 1, 0]
    assert found.negatives.tolist() == [1, 3, 4]
    assert found.labels_per_instance.tolist() == [1, 2, 1]
    assert found.mean_labels == 1.0
    assert found.class_imbalance == 3.0  # "cat" has none and is left out
    assert found.empty_classes == ["cat"]
    assert found.positive_negative_imbalance == 2.0
    assert found.group_sizes == {"many": 1, "medium": 1, "few": 1}
    assert found.groups["few"].tolist() == [False, False, True]
    assert (found.num_unknown, found.noise) == (0, None)


def test_unknown_labels_are_not_negative():
    unknown = np.array([[0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    found = describe(make(LABELS, unknown_labels=unknown))
    assert found.positives.tolist() == [3, 1, 0]
    assert found.negatives.tolist() == [0, 2, 2]
    assert found.num_unknown == 4
    assert found.positive_negative_imbalance == 1.0
    assert "unknown labels: 4 (33.3%)" in str(found)


def test_noise_equals_scikit_learns_confusion_matrix():
    clean = random_labels(0, 300, 6)
    given = clean ^ (np.random.default_rng(1).random(clean.shape) < 0.1)
    noise = describe(make(given, clean_labels=clean)).noise
    tn, fp, fn, tp = multilabel_confusion_matrix(clean, given).reshape(6, 4).T
    np.testing.assert_allclose(noise.positive_to_negative, fn / (fn + tp))
    np.testing.assert_allclose(noise.negative_to_positive, fp / (fp + tn))
    np.testing.assert_allclose(noise.per_class, (fp + fn) / 300)
    assert noise.overall == pytest.approx(
        {
            "all": (clean != given).mean(),
            "positive_to_negative": fn.sum() / clean.sum(),
            "negative_to_positive": fp.sum() / (1 - clean).sum(),
        }
    )


def test_noise_counts_known_labels_only_and_groups_count_clean_ones():
    clean = np.array([[1, 1], [1, 0], [0, 0]])
    given = np.array([[0, 1], [0, 1], [1, 0]])
    unknown = np.array([[1, 0], [0, 0], [0, 0]])
    found = describe(make(given, clean_labels=clean, unknown_labels=unknown), many=1, few=1)
    assert found.noise.clean_positives.tolist() == [1, 1]  # the first label of class 0 is not known
    assert found.noise.lost.tolist() == [1, 0]
    assert found.noise.gained.tolist() == [1, 1]
    assert found.groups["many"].tolist() == [True, False]  # 2 and 1 clean positive labels
    assert found.positives.tolist() == [1, 2]


def test_a_class_without_clean_positives_has_no_rate():
    noise = describe(make([[0, 1], [1, 1]], clean_labels=[[0, 1], [0, 1]])).noise
    np.testing.assert_array_equal(noise.positive_to_negative, [np.nan, 0])
    np.testing.assert_array_equal(noise.negative_to_positive, [0.5, np.nan])


def test_text_has_every_class_of_a_small_set_and_the_ends_of_a_large_one():
    text = str(describe(make(LABELS, ["ant", "bee", "cat"], clean_labels=LABELS)))
    assert "4 instances, 3 classes, 4 positive labels (1.00 an instance)" in text
    assert "class imbalance (Eq. 12) 3.0, negative to positive labels (Eq. 13) 2.0" in text
    assert "no positive label, so left out of Eq. 12: cat" in text
    assert "0: 1  1: 2  2: 1" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["ant", "bee", "cat"]
    large = str(describe(make(random_labels(0, 400, 100))))
    assert "... 76 more" in large
    assert len(large.splitlines()) < 35


def test_hostile_columns():
    with pytest.raises(ValueError, match="few=5 is above many=4"):
        describe(make(LABELS), many=4, few=5)
    with pytest.raises(ValueError, match="row 1: class 'b' is in 'labels' and in 'unknown_labels'"):
        describe(make([[1, 0], [0, 1]], ["a", "b"], unknown_labels=[[0, 1], [0, 1]]))
    other = make(LABELS).add_column(
        "clean_labels", [[0]] * 4, feature=datasets.List(datasets.ClassLabel(names=["else"]))
    )
    with pytest.raises(ValueError, match="'labels' and 'clean_labels' have different classes"):
        describe(other)
    with pytest.raises(TypeError, match="pass one of its splits"):
        describe(datasets.DatasetDict(train=make(LABELS)))


@pytest.mark.parametrize("case", ["plain", "noise", "no noise at all", "no labels", "no rows", "wide", "one class"])
def test_plot_draws_every_case_without_a_warning(tmp_path, case):
    labels = random_labels(0, 60, {"wide": 200, "one class": 1}.get(case, 7))
    others = {"clean_labels": labels} if case == "no noise at all" else {}
    if case == "noise":
        others = {"clean_labels": labels ^ (np.random.default_rng(0).random(labels.shape) < 0.2)}
    if case == "no labels":
        labels = labels * 0
    dataset = make(labels, **others)
    description = describe(dataset.select([]) if case == "no rows" else dataset, many=20, few=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = description.plot(tmp_path / "figure.png")
        assert str(description)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 2 + bool(others)


def test_plot_shows_the_counts_from_the_commonest_to_the_rarest():
    counts, _, noise = describe(make(LABELS, list("abc"), clean_labels=LABELS), many=2, few=1).plot().axes
    assert sorted((bar.get_x(), bar.get_height()) for bar in counts.patches) == [(-0.4, 3), (0.6, 1), (1.6, 0)]
    assert [label.get_text() for label in noise.get_xticklabels()] == ["a", "b", "c"]


# iterative_split


def ids_of(parts) -> list[list]:
    return [part["image_id"][:] for part in parts]


def test_parts_are_a_partition_of_the_asked_sizes_in_the_order_of_the_rows():
    dataset = make(random_labels(0, 200, 8))
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
        large, small = iterative_split(make(labels), [0.9, 0.1], seed=seed)
        assert describe(small).positives.tolist() == [50, 10, 3, 1]
        assert describe(large).positives.tolist() == [450, 90, 27, 9]


def test_depends_on_ids_seed_and_labels_only():
    labels = random_labels(0, 120, 5)
    dataset = make(labels)
    first = [set(part) for part in ids_of(iterative_split(dataset, [80, 40], seed=1))]
    shuffled = dataset.shuffle(seed=7)
    assert [set(part) for part in ids_of(iterative_split(shuffled, [80, 40], seed=1))] == first
    as_text = make(labels, ids=map(str, range(120)))
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
    labels = random_labels(3, 2_000, 20)
    parts = [np.array(ids) for ids in ids_of(iterative_split(make(labels), [0.8, 0.2]))]
    found = share_deviations(labels, parts)
    chance = np.mean([share_deviations(labels, random_parts(2_000, [1_600, 400], seed)) for seed in range(20)], axis=0)
    assert (found.mean(1) < chance.mean(1) / 5).all()
    assert np.abs(labels[parts[1]].sum(0) - 0.2 * labels.sum(0)).max() < 3  # instances


def test_unknown_labels_are_stratified_too():
    rng = np.random.default_rng(0)
    labels = random_labels(3, 1_000, 6)
    unknown = (1 - labels) & (rng.random(labels.shape) < np.linspace(0.05, 0.6, 6))
    plain = make(labels, ids=range(1_000))
    masked = make(labels, unknown_labels=unknown)
    for matrix in (labels, unknown):
        parts = [np.array(ids) for ids in ids_of(iterative_split(masked, [0.7, 0.3]))]
        chance = np.mean([share_deviations(matrix, random_parts(1_000, [700, 300], seed)) for seed in range(20)])
        assert share_deviations(matrix, parts).mean() < chance / 3
    no_unknown = make(labels, unknown_labels=0 * labels)
    assert ids_of(iterative_split(no_unknown, [0.7, 0.3])) == ids_of(iterative_split(plain, [0.7, 0.3]))


def test_instances_without_labels_fill_the_parts():
    labels = np.zeros((30, 2), dtype=int)
    labels[:4, 0] = 1
    parts = iterative_split(make(labels), [15, 15])
    assert [describe(part).positives.tolist() for part in parts] == [[2, 0], [2, 0]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([10, 10], r"sizes=\[10, 10\] sum to 20: positive integers that sum to 24"),
        ([0.5, 0.4], "sum to 0.9"),
        ([12, 0.5], "positive integers that sum to 24, or positive fractions that sum to 1"),
        ([24, 0], "are required"),
        ([25, -1], "are required"),
        ([True, 23], "are required"),
        ([], "are required"),
        (["12", "12"], "are required"),
        ([float("nan"), 1.0], "are required"),
        ([0.99, 0.01], "leave a part empty"),
    ],
)
def test_hostile_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        iterative_split(make(random_labels(0, 24, 3)), sizes)


def test_hostile_ids_and_seed():
    dataset = make(random_labels(0, 24, 3))
    with pytest.raises(ValueError, match=r"no 'image_id' among the columns \['labels'\]"):
        iterative_split(dataset.remove_columns("image_id"), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"image_id is not unique \(12 values in 24 rows\)"):
        iterative_split(make(random_labels(0, 24, 3), ids=[i // 2 for i in range(24)]), [0.5, 0.5])
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        iterative_split(dataset, [0.5, 0.5], seed=-1)


# Real data

needs_coco = pytest.mark.skipif(not (DATA / "coco_labels").is_dir(), reason="BALANCEMIX_DATA has no coco_labels")
needs_voc = pytest.mark.skipif(not (DATA / "voc2007_labels").is_dir(), reason="BALANCEMIX_DATA has no voc2007_labels")


def coco(split: str) -> tuple[np.ndarray, datasets.Dataset]:
    with np.load(DATA / "coco_labels" / "coco_multihot.npz") as arrays:
        labels = arrays[f"{split}_labels"]
        return labels, make(labels, arrays["classes"].tolist(), arrays[f"{split}_ids"].tolist())


@needs_coco
@pytest.mark.parametrize(
    ("split", "rows", "class_imbalance", "positive_negative"),
    [("train2014", 82_081, 352.9, 26.2), ("val2017", 4_952, 336.6, 26.1)],
)
def test_real_coco(split, rows, class_imbalance, positive_negative):
    labels, dataset = coco(split)
    found = describe(dataset)
    assert (found.num_instances, found.num_classes) == (rows, 80)
    assert found.positives.tolist() == labels.sum(0, dtype=int).tolist()
    assert round(found.class_imbalance, 1) == class_imbalance
    assert round(found.positive_negative_imbalance, 1) == positive_negative
    if split == "train2014":
        assert found.group_sizes == {"many": 1, "medium": 72, "few": 7}


@needs_voc
@pytest.mark.parametrize(
    ("difficult", "class_imbalance", "positive_negative"), [("negative", 20.92, 12.72), ("positive", 21.60, 11.67)]
)
def test_real_voc(difficult, class_imbalance, positive_negative):
    with np.load(DATA / "voc2007_labels" / "voc2007_labels.npz") as arrays:
        labels = arrays["trainval_labels"]
    found = describe(make(labels >= (0 if difficult == "positive" else 1)))
    assert round(found.class_imbalance, 2) == class_imbalance
    assert round(found.positive_negative_imbalance, 2) == positive_negative


@needs_voc
def test_real_voc_with_difficult_ones_unknown():
    with np.load(DATA / "voc2007_labels" / "voc2007_labels.npz") as arrays:
        labels = arrays["trainval_labels"]
    found = describe(make(labels == 1, unknown_labels=labels == 0))
    assert found.num_unknown == (labels == 0).sum()
    assert found.positive_negative_imbalance == pytest.approx((labels == -1).sum() / (labels == 1).sum())


@needs_coco
def test_real_coco_noise():
    _, dataset = coco("val2017")
    for noise in (Mislabel(rate=0.4, seed=0).fit(dataset), SinglePositive(seed=0).fit(dataset)):
        noisy = dataset.map(noise, batched=True, features=noise.features)
        found = describe(noisy)
        lost = sum(len(set(a) - set(b)) for a, b in zip(noisy["clean_labels"], noisy["labels"], strict=True))
        assert found.noise.lost.sum() == lost
        assert found.group_sizes == describe(dataset).group_sizes
    assert found.noise.overall["negative_to_positive"] == 0
    assert found.mean_labels == 1.0


@needs_coco
def test_real_coco_split():
    labels, dataset = coco("train2014")
    row_of = {image_id: row for row, image_id in enumerate(dataset["image_id"])}
    parts = [np.array([row_of[i] for i in ids]) for ids in ids_of(iterative_split(dataset, [0.8, 0.1, 0.1]))]
    chance = share_deviations(labels, random_parts(len(labels), [len(part) for part in parts], 0))
    found = share_deviations(labels, parts)
    assert (found.mean(1) < chance.mean(1) / 15).all()
    assert found.max() < 0.02
