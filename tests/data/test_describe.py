"""Figures against hand-computed and scikit-learn's, real COCO and VOC."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import label_dataset, long_tailed_labels
from sklearn.metrics import multilabel_confusion_matrix

from hf_balancemix import describe
from hf_balancemix.data.noise import Mislabel, SinglePositive

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))


LABELS = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_figures_computed_by_hand():
    found = describe(label_dataset(LABELS, ["ant", "bee", "cat"]), many=2, few=1)
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
    found = describe(label_dataset(LABELS, unknown_labels=unknown))
    assert found.positives.tolist() == [3, 1, 0]
    assert found.negatives.tolist() == [0, 2, 2]
    assert found.num_unknown == 4
    assert found.positive_negative_imbalance == 1.0
    assert "unknown labels: 4 (33.3%)" in str(found)


def test_noise_equals_scikit_learns_confusion_matrix():
    clean = long_tailed_labels(0, 300, 6)
    given = clean ^ (np.random.default_rng(1).random(clean.shape) < 0.1)
    noise = describe(label_dataset(given, clean_labels=clean)).noise
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
    found = describe(label_dataset(given, clean_labels=clean, unknown_labels=unknown), many=1, few=1)
    assert found.noise.clean_positives.tolist() == [1, 1]  # the first label of class 0 is not known
    assert found.noise.lost.tolist() == [1, 0]
    assert found.noise.gained.tolist() == [1, 1]
    assert found.groups["many"].tolist() == [True, False]  # 2 and 1 clean positive labels
    assert found.positives.tolist() == [1, 2]


def test_a_class_without_clean_positives_has_no_rate():
    noise = describe(label_dataset([[0, 1], [1, 1]], clean_labels=[[0, 1], [0, 1]])).noise
    np.testing.assert_array_equal(noise.positive_to_negative, [np.nan, 0])
    np.testing.assert_array_equal(noise.negative_to_positive, [0.5, np.nan])


def test_text_has_every_class_of_a_small_set_and_the_ends_of_a_large_one():
    text = str(describe(label_dataset(LABELS, ["ant", "bee", "cat"], clean_labels=LABELS)))
    assert "4 instances, 3 classes, 4 positive labels (1.00 an instance)" in text
    assert "class imbalance (Eq. 12) 3.0, negative to positive labels (Eq. 13) 2.0" in text
    assert "no positive label, so left out of Eq. 12: cat" in text
    assert "0: 1  1: 2  2: 1" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["ant", "bee", "cat"]
    large = str(describe(label_dataset(long_tailed_labels(0, 400, 100))))
    assert "... 76 more" in large
    assert len(large.splitlines()) < 35


def test_hostile_columns():
    with pytest.raises(ValueError, match=r"few\D+5\D+many\D+4"):
        describe(label_dataset(LABELS), many=4, few=5)
    with pytest.raises(ValueError, match="row 1: class 'b' is in 'labels' and in 'unknown_labels'"):
        describe(label_dataset([[1, 0], [0, 1]], ["a", "b"], unknown_labels=[[0, 1], [0, 1]]))
    other = label_dataset(LABELS).add_column(
        "clean_labels", [[0]] * 4, feature=datasets.List(datasets.ClassLabel(names=["else"]))
    )
    with pytest.raises(ValueError, match="'clean_labels' has other classes than 'labels'"):
        describe(other)
    with pytest.raises(TypeError, match="pass one of its splits"):
        describe(datasets.DatasetDict(train=label_dataset(LABELS)))


# Real data

needs_coco = pytest.mark.skipif(not (DATA / "coco_labels").is_dir(), reason="BALANCEMIX_DATA has no coco_labels")
needs_voc = pytest.mark.skipif(not (DATA / "voc2007_labels").is_dir(), reason="BALANCEMIX_DATA has no voc2007_labels")


def coco(split: str) -> tuple[np.ndarray, datasets.Dataset]:
    with np.load(DATA / "coco_labels" / "coco_multihot.npz") as arrays:
        labels = arrays[f"{split}_labels"]
        return labels, label_dataset(labels, arrays["classes"].tolist(), arrays[f"{split}_ids"].tolist())


@needs_coco
@pytest.mark.parametrize(
    ("split", "rows", "class_imbalance", "positive_negative"),
    [("train2014", 82_081, 352.9, 26.2), ("val2017", 4_952, 336.6, 26.1)],
)
def test_real_coco(split, rows, class_imbalance, positive_negative):
    labels, dataset = coco(split)
    found = describe(dataset, many=10_000, few=1_000)
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
    found = describe(label_dataset(labels >= (0 if difficult == "positive" else 1)))
    assert round(found.class_imbalance, 2) == class_imbalance
    assert round(found.positive_negative_imbalance, 2) == positive_negative


@needs_voc
def test_real_voc_with_difficult_ones_unknown():
    with np.load(DATA / "voc2007_labels" / "voc2007_labels.npz") as arrays:
        labels = arrays["trainval_labels"]
    found = describe(label_dataset(labels == 1, unknown_labels=labels == 0))
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
