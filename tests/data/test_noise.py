"""Noise maps: the stated distributions, on made-up and on COCO's labels, and independence of everything but the id."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from hf_balancemix.data.labels import class_names, label_matrix
from hf_balancemix.data.noise import ClassConditional, Compose, Mislabel, RandomFlip, SinglePositive, id_words, uniform

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))
NAMES = ["person", "dog", "car", "tree", "kite"]
MATRIX = [
    [0.5, 0.3, 0.1, 0.0, 0.1],
    [0.0, 0.0, 0.0, 0.6, 0.2],
    [0.1, 0.1, 0.1, 0.1, 0.1],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, 0.0, 0.0],
]
MISSING = [0.0, 0.2, 0.3, 0.5, 0.0]
ADDED = [0.0, 0.1, 0.0, 0.3, 0.05]
ALL = [
    Mislabel(0.4, seed=1),
    RandomFlip(0.2, seed=1),
    SinglePositive(1),
    ClassConditional(MATRIX, MISSING, ADDED, seed=1),
    Compose([Mislabel(0.4, seed=2), RandomFlip(0.1, seed=2), SinglePositive(seed=2)]),
]


def new(noise):
    """An unfitted copy, as fitting changes the object."""
    return copy.deepcopy(noise)


def dataset_of(labels: np.ndarray, image_ids=None, names: list[str] | None = None) -> Dataset:
    features = Features(
        {
            "image": Image(),  # of files that do not exist: decoding one would fail
            "labels": List(ClassLabel(names=names or [f"class {k}" for k in range(labels.shape[1])])),
            "image_id": Value("int64" if image_ids is None else "string"),
        }
    )
    columns = {
        "image": [f"/nowhere/{i}.jpg" for i in range(len(labels))],
        "labels": [np.flatnonzero(row).tolist() for row in labels],
        "image_id": list(range(len(labels))) if image_ids is None else image_ids,
    }
    return Dataset.from_dict(columns, features=features)


def small(n: int = 300) -> Dataset:
    labels = np.random.default_rng(0).random((n, 5)) < [0.6, 0.4, 0.3, 0.1, 0.02]
    return dataset_of(labels, names=NAMES)


def noisy_by_id(dataset: Dataset) -> dict[int, list[int]]:
    return dict(zip(dataset["image_id"], dataset["labels"], strict=True))


def within(observed, expected, variance, errors: float = 4.0) -> None:
    """Every count lies within `errors` standard errors of its expectation."""
    z = (np.asarray(observed, float) - expected) / np.sqrt(variance)
    assert np.abs(z).max() < errors, f"off by {np.abs(z).max():.1f} standard errors"


# The draws


def reference_uniform(key: int, word: int, counter: int) -> float:
    """SplitMix64 as published, with Python's integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    state = mix(key ^ word)
    for _ in range(counter + 1):
        state = (state + 0x9E3779B97F4A7C15) & mask
    return (mix(state) >> 11) / 2**53


def reference_word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_draws_equal_a_plain_python_splitmix64():
    words = id_words(["9", "000000000025.jpg", "å"])
    assert words.tolist() == [reference_word(text) for text in ["9", "000000000025.jpg", "å"]]
    for key in (0, 1, 2**64 - 1):
        drawn = uniform(key, words[:, None], np.arange(4))
        assert drawn.tolist() == [[reference_uniform(key, int(word), k) for k in range(4)] for word in words]


def test_draws_are_uniform_and_uncorrelated_for_consecutive_ids_and_classes():
    n, k = 20_000, 50
    drawn = uniform(reference_word("stream"), id_words(range(n))[:, None], np.arange(k))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    cells = np.histogram(drawn, bins=100, range=(0, 1))[0]
    within(cells, n * k / 100, n * k * 0.01 * 0.99, errors=4.5)  # 100 cells
    centred = drawn - 0.5
    other = uniform(reference_word("other stream"), id_words(range(n))[:, None], np.arange(k)) - 0.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred, other)):
        within((a * b).sum(), 0, a.size / 144)  # variance of a product of two centred uniforms: (1/12)^2


def test_an_id_is_its_text_whatever_holds_it():
    expected = id_words([9, 25, 30]).tolist()
    assert id_words(["9", "25", "30"]).tolist() == expected
    assert id_words(np.array([9, 25, 30])).tolist() == expected
    assert id_words(torch.tensor([9, 25, 30])).tolist() == expected
    assert id_words([torch.tensor(9), np.int32(25), 30]).tolist() == expected
    assert id_words(np.array(["9", "25", "30"])).tolist() == expected


@pytest.mark.parametrize("value", [None, 1.0, True, b"9", (9,)])
def test_ids_of_another_type(value):
    with pytest.raises(ValueError, match=r"row 1: image_id is .*; it must be an integer or a string"):
        id_words([9, value])


GOLDEN = [  # in the order of ALL; one string an image
    ("10100", "10101", "10000", "00101", "01000"),
    ("11000", "00101", "00110", "01110", "01000"),
    ("10000", "00001", "00010", "01000", "01000"),
    ("10010", "10100", "01010", "01010", "00000"),
    ("00010", "00001", "00010", "00100", "01000"),
]


@pytest.mark.parametrize(("noise", "expected"), zip(ALL, GOLDEN, strict=True), ids=map(repr, ALL))
def test_golden_labels(noise, expected):
    """Results are published by seed: a change here needs a new name for the noise, not new numbers for the test."""
    labels = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0]])
    ids = [9, 25, 30, "a.jpg", 2**40]
    found = new(noise).fit(dataset_of(labels, [str(i) for i in ids])).apply(labels, ids)
    assert tuple("".join(map(str, row)) for row in found) == expected


def test_small_data_equals_a_slow_reference():
    dataset = small(60)
    labels = label_matrix(dataset).numpy()
    counts = labels.sum(0)

    def u(noise: str, image_id: int, k: int) -> float:
        return reference_uniform(reference_word(noise), reference_word(str(image_id)), k)

    moved, flipped, single = labels.copy(), labels.copy(), np.zeros_like(labels)
    for n, row in enumerate(labels):
        present = [k for k in range(5) if row[k]]
        absent = [k for k in range(5) if not row[k]]
        for i in present:
            weights = [int(counts[j]) for j in absent]
            if u("Mislabel/3/move", n, i) < 0.4 and sum(weights) > 0:
                point = int(u("Mislabel/3/target", n, i) * sum(weights))
                stretched = [j for j, weight in zip(absent, weights, strict=True) for _ in range(weight)]
                moved[n, i], moved[n, stretched[point]] = 0, 1
        for k in range(5):
            flipped[n, k] ^= u("RandomFlip/3/flip", n, k) < 0.2
        if present:
            single[n, present[int(u("SinglePositive/3/keep", n, 0) * len(present))]] = 1
    ids = range(60)
    np.testing.assert_array_equal(Mislabel(0.4, seed=3).fit(dataset).apply(labels, ids), moved)
    np.testing.assert_array_equal(RandomFlip(0.2, seed=3).fit(dataset).apply(labels, ids), flipped)
    np.testing.assert_array_equal(SinglePositive(seed=3).fit(dataset).apply(labels, ids), single)


def reference_draw(stream: str, image_id: int | str, k: int) -> float:
    return reference_uniform(reference_word(stream), reference_word(str(image_id)), k)


def test_class_conditional_equals_a_slow_reference():
    labels = label_matrix(small(80)).numpy()
    noisy = np.zeros_like(labels)
    for n, row in enumerate(labels):
        arrived = set()
        for i in range(5):
            if not row[i]:
                if reference_draw("ClassConditional/3/add", n, i) < ADDED[i]:
                    arrived.add(i)
                continue
            u, target = reference_draw("ClassConditional/3/move", n, i), 0
            chances = [*MATRIX[i], MISSING[i], 1.0]
            while u >= sum(chances[: target + 1]):
                target += 1
            if target != 5:
                arrived.add(i if target == 6 else target)
        noisy[n, list(arrived)] = 1
    noise = ClassConditional(MATRIX, MISSING, ADDED, seed=3).fit(small(80))
    np.testing.assert_array_equal(noise.apply(labels, range(80)), noisy)


# Distributions


def test_class_conditional_has_the_given_probabilities():
    n = 40_000
    classes = np.repeat(np.arange(5), n)
    labels = np.eye(5, dtype=np.uint8)[classes]
    noise = ClassConditional(MATRIX, MISSING, seed=0).fit(dataset_of(labels[::n]))
    noisy = noise.apply(labels, range(5 * n))
    found = np.stack([noisy[classes == i].sum(0) for i in range(5)])
    expected = np.array(MATRIX)
    expected[np.arange(5), np.arange(5)] += 1 - expected.sum(1) - MISSING
    assert (found[expected == 0] == 0).all()
    assert (found[expected == 1] == n).all()
    some = (expected > 0) & (expected < 1)
    within(found[some], n * expected[some], (n * expected * (1 - expected))[some])

    noise = ClassConditional(missing=0.3, added=ADDED, seed=0).fit(dataset_of(labels[::n]))
    noisy = noise.apply(labels, range(5 * n))
    within(noisy[labels == 1].sum(), 5 * n * 0.7, 5 * n * 0.21)
    rate = np.array(ADDED)
    within(((noisy > labels).sum(0) / 4)[rate > 0], (n * rate)[rate > 0], (n * rate * (1 - rate) / 4)[rate > 0])
    assert ((noisy > labels).sum(0)[rate == 0] == 0).all()


def test_class_conditional_moves_onto_present_classes():
    labels = np.ones((10, 2), dtype=np.uint8)
    swap = ClassConditional([[0, 1], [1, 0]]).fit(dataset_of(labels))
    assert (swap.apply(labels, range(10)) == 1).all()
    merge = ClassConditional([[0, 1], [0, 1]]).fit(dataset_of(labels))
    assert (merge.apply(labels, range(10)) == [0, 1]).all()
    assert (swap.apply(np.array([[1, 0], [0, 0]]), [0, 1]) == [[0, 1], [0, 0]]).all()


def test_mislabel_moves_single_labels_as_equation_11_says():
    """With one positive an image nothing is excluded, so rho(i->j) = tau N_j / (N_pos - N_i) holds exactly."""
    classes = np.repeat(np.arange(4), [60_000, 30_000, 9_000, 1_000])
    labels = np.eye(5, dtype=np.uint8)[classes]  # the fifth class has no positive: never a target
    noisy = Mislabel(0.4, seed=0).fit(dataset_of(labels)).apply(labels, range(len(labels)))
    assert (noisy.sum(1) == 1).all()
    found = labels.T.astype(int) @ noisy
    counts = labels.sum(0, dtype=int)
    for i in range(4):
        rho = 0.4 * counts / (counts.sum() - counts[i])
        rho[i] = 0.6
        assert found[i, 4] == 0
        within(found[i, :4], counts[i] * rho[:4], counts[i] * (rho * (1 - rho))[:4])


def test_mislabel_never_targets_present_classes():
    labels = label_matrix(small()).numpy()
    noise = Mislabel(0.9, seed=0).fit(small())
    noisy = noise.apply(labels, range(300))
    assert (noisy.sum(1) <= labels.sum(1)).all()  # shared targets shrink
    assert ((noisy > labels).sum(1) <= (noisy < labels).sum(1)).all()
    assert (noisy.sum(1)[labels.sum(1) > 0] > 0).all()  # a label moves, it does not vanish


def test_mislabel_without_a_possible_target_changes_nothing():
    labels = np.ones((200, 3), dtype=np.uint8)
    assert (Mislabel(0.9).fit(dataset_of(labels)).apply(labels, range(200)) == labels).all()
    one_class = np.eye(3, dtype=np.uint8)[np.zeros(200, dtype=int)]  # the others have N_j = 0
    assert (Mislabel(0.9).fit(dataset_of(one_class)).apply(one_class, range(200)) == one_class).all()
    nothing = np.zeros((5, 3), dtype=np.uint8)
    assert (Mislabel(0.9).fit(dataset_of(nothing)).apply(nothing, range(5)) == 0).all()


def test_random_flip_inverts_each_label_on_its_own():
    n = 50_000
    labels = np.zeros((n, 4), dtype=np.uint8)
    labels[: n // 2] = 1
    noise = RandomFlip(0.2, seed=0).fit(dataset_of(labels[:2]))
    flips = (noise.apply(labels, range(n)) != labels).astype(float)
    for half in (flips[: n // 2], flips[n // 2 :]):
        within(half.sum(0), n / 2 * 0.2, n / 2 * 0.16)
    pairs = (flips.T @ flips)[~np.eye(4, dtype=bool)]
    within(pairs, n * 0.04, n * 0.04 * 0.96)


def test_single_positive_keeps_one_drawn_uniformly():
    n = 30_000
    labels = np.tile(np.array([[1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=np.uint8), (n, 1))
    noisy = SinglePositive(seed=0).fit(dataset_of(labels[:3])).apply(labels, range(3 * n))
    assert (noisy <= labels).all()
    assert (noisy.sum(1) == np.minimum(labels.sum(1), 1)).all()
    within(noisy[0::3].sum(0)[[0, 2, 3]], n / 3, n * 2 / 9)
    within(noisy[1::3].sum(0)[[1, 3]], n / 2, n / 4)


def test_rate_zero_changes_nothing():
    labels = label_matrix(small()).numpy()
    for noise in (Mislabel(0), RandomFlip(0.0)):
        assert (noise.fit(small()).apply(labels, range(300)) == labels).all()


def test_seeds_and_kinds_draw_independently():
    labels = np.zeros((20_000, 10), dtype=np.uint8)
    fitted = dataset_of(labels[:2])
    first, second = (RandomFlip(0.2, seed).fit(fitted).apply(labels, range(20_000)).astype(float) for seed in (0, 1))
    within((first * second).sum(), labels.size * 0.04, labels.size * 0.04 * 0.96)


# Real label matrix


@pytest.fixture(scope="module")
def coco() -> tuple[np.ndarray, np.ndarray, Dataset]:
    file = DATA / "coco_labels" / "coco_multihot.npz"
    if not file.is_file():
        pytest.skip("BALANCEMIX_DATA has no coco_labels")
    with np.load(file) as archive:
        labels, ids = archive["train2014_labels"], archive["train2014_ids"]
    return labels, ids, dataset_of(labels, [str(i) for i in ids])


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_mislabel_on_coco(coco, rate):
    """Per class and direction, and for every pair of classes, against each image's own probabilities."""
    labels, ids, dataset = coco
    noisy = Mislabel(rate, seed=0).fit(dataset).apply(labels, ids)
    removed, added = (labels > noisy).astype(float), (noisy > labels).astype(float)
    y = labels.astype(float)
    counts, positives = y.sum(0), y.sum(1, keepdims=True)

    within(removed.sum(0), counts * rate, counts * rate * (1 - rate))
    target = np.where(labels, 0, counts)
    target /= target.sum(1, keepdims=True)  # probability of j for a label that moves
    arrives = 1 - (1 - rate * target) ** positives
    within(added.sum(0), arrives.sum(0), (arrives * (1 - arrives)).sum(0))

    # i gone and j there: i moved to j, or i moved elsewhere and another positive to j
    both = rate * (target + (1 - target) * (1 - (1 - rate * target) ** (positives - 1)))
    expected, variance = y.T @ both, y.T @ (both * (1 - both))
    often = expected > 25
    assert often.sum() > 500
    within((removed.T @ added)[often], expected[often], variance[often], errors=4.5)  # some thousand pairs


def test_random_flip_on_coco(coco):
    labels, ids, dataset = coco
    noisy = RandomFlip(0.2, seed=0).fit(dataset).apply(labels, ids)
    counts = labels.sum(0, dtype=float)
    within((labels > noisy).sum(0), counts * 0.2, counts * 0.16)
    within((noisy > labels).sum(0), (len(labels) - counts) * 0.2, (len(labels) - counts) * 0.16)


def test_class_conditional_on_coco(coco):
    """Eq. 11 as a matrix, with a rate for missing and for added labels."""
    labels, ids, dataset = coco
    counts = labels.sum(0, dtype=float)
    matrix = 0.2 * counts / (counts.sum() - counts[:, None]) * (1 - np.eye(80))
    noisy = ClassConditional(matrix, missing=0.1, added=0.01).fit(dataset).apply(labels, ids)
    y = labels.astype(float)
    arrives = 1 - np.exp(y @ np.log1p(-matrix))  # at least one label of the image moves to j
    zero = (1 - arrives) * np.where(labels, matrix.sum(1) + 0.1, 0.99)
    for direction in (labels == 1, labels == 0):
        changed, p = direction & (noisy != labels), np.where(labels, zero, 1 - zero) * direction
        within(changed.sum(0), p.sum(0), (p * (1 - p)).sum(0))


def test_single_positive_on_coco(coco):
    labels, ids, dataset = coco
    noisy = SinglePositive(seed=0).fit(dataset).apply(labels, ids)
    assert (noisy.sum(1) == 1).all()
    probability = labels / labels.sum(1, keepdims=True)
    # Images with a single positive add no variance.
    within(noisy.sum(0), probability.sum(0), (probability * (1 - probability)).sum(0))


# As a function for `map`


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_map_adds_noise_and_keeps_names_and_clean_labels(noise):
    dataset = small()
    noise = new(noise).fit(dataset)
    assert noise.features == {**dataset.features, "clean_labels": dataset.features["labels"]}
    noisy = dataset.map(noise, batched=True, features=noise.features)
    assert noisy.column_names == ["image", "labels", "image_id", "clean_labels"]
    assert class_names(noisy) == class_names(noisy, "clean_labels") == NAMES
    assert noisy["clean_labels"][:] == dataset["labels"][:]
    expected = noise.apply(label_matrix(dataset), dataset["image_id"])
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(label_matrix(noisy), expected)
    assert not torch.equal(label_matrix(noisy), label_matrix(dataset))
    assert noisy["labels"][:] == [sorted(row) for row in noisy["labels"]]


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_labels_depend_on_the_image_id_alone(noise):
    dataset = small()
    noise = new(noise).fit(dataset)

    def mapped(dataset: Dataset, **kwargs) -> dict[int, list[int]]:
        return noisy_by_id(dataset.map(noise, batched=True, features=noise.features, **kwargs))

    expected = mapped(dataset)
    assert len(expected) == 300
    assert mapped(dataset, batch_size=7) == expected
    assert mapped(dataset, batch_size=None) == expected
    assert mapped(dataset.shuffle(seed=5)) == expected
    assert mapped(concatenate_datasets([dataset.shard(3, index) for index in (2, 0, 1)])) == expected
    by_shards = [mapped(dataset.shard(3, index, contiguous=False)) for index in range(3)]
    assert by_shards[0] | by_shards[1] | by_shards[2] == expected


def test_two_processes_give_the_same_labels():
    dataset = small()
    noise = Mislabel(0.4, seed=0).fit(dataset)
    one = dataset.map(noise, batched=True, features=noise.features)
    two = dataset.map(noise, batched=True, features=noise.features, num_proc=2)
    assert noisy_by_id(two) == noisy_by_id(one)
    assert class_names(two, "clean_labels") == NAMES


@pytest.mark.parametrize("format_type", ["numpy", "torch", "pandas"])
def test_formatted_data_sets(format_type):
    dataset = small().remove_columns("image")
    noise = Mislabel(0.4, seed=0).fit(dataset)
    expected = dataset.map(noise, batched=True, features=noise.features)
    noisy = dataset.with_format(format_type).map(noise, batched=True, features=noise.features)
    assert torch.equal(label_matrix(noisy), label_matrix(expected))
    assert torch.equal(label_matrix(noisy, "clean_labels"), label_matrix(dataset))


@pytest.mark.parametrize("inner", ["int64", "uint8", "float32", "bool"])
@pytest.mark.parametrize("length", [-1, 5])
def test_multi_hot_columns(inner, length):
    dataset = small().remove_columns("image")
    clean = label_matrix(dataset)
    features = Features({"labels": List(Value(inner), length=length), "image_id": Value("int64")})
    columns = {"labels": clean.numpy().astype(inner).tolist(), "image_id": dataset["image_id"][:]}
    stored = Dataset.from_dict(columns, features=features)
    noise = RandomFlip(0.2, seed=0).fit(stored)
    noisy = stored.map(noise, batched=True, features=noise.features)
    assert noisy.features["labels"] == noisy.features["clean_labels"] == List(Value(inner), length=length)
    assert torch.equal(label_matrix(noisy), RandomFlip(0.2, seed=0).fit(dataset).apply(clean, dataset["image_id"]))
    assert torch.equal(label_matrix(noisy, "clean_labels"), clean)


def test_composing_keeps_the_first_clean_labels():
    dataset = small()
    first = Mislabel(0.4, seed=0).fit(dataset)
    once = dataset.map(first, batched=True, features=first.features)
    second = SinglePositive(seed=1).fit(once)
    twice = once.map(second, batched=True, features=second.features)
    assert twice.features == once.features
    assert twice["clean_labels"][:] == dataset["labels"][:]
    assert torch.equal(label_matrix(twice), second.apply(label_matrix(once), once["image_id"]))


def test_compose_maps_one_after_another():
    dataset = small()
    parts = [Mislabel(0.4, seed=2), RandomFlip(0.1, seed=2), SinglePositive(seed=2)]
    step = dataset
    for part in parts:
        step = step.map(part.fit(step), batched=True, features=part.features)
    fresh = [Mislabel(0.4, seed=2), RandomFlip(0.1, seed=2), SinglePositive(seed=2)]
    for noise in (Compose(fresh), Compose([Compose(fresh[:2]), fresh[2]])):
        noise.fit(dataset)
        noisy = dataset.map(noise, batched=True, features=noise.features)
        assert noisy.features == step.features
        assert noisy.to_dict() == step.to_dict()
        assert noisy["clean_labels"][:] == dataset["labels"][:]
    with pytest.raises(ValueError, match="is not fitted"):  # copies were
        fresh[0].features  # noqa: B018
    assert Compose([Compose(fresh[:2]), fresh[2]]).parameters == Compose(fresh).parameters


@pytest.mark.parametrize("noise", ALL, ids=repr)
@pytest.mark.parametrize("multi_hot", [False, True])
def test_unknown_labels_stay_unknown(noise, multi_hot):
    rng = np.random.default_rng(2)
    labels = label_matrix(small()).numpy()
    unknown = ((rng.random((300, 5)) < 0.5) & (labels == 0)).astype(np.uint8)
    columns = {"labels": labels, "unknown_labels": unknown}
    feature = List(Value("uint8")) if multi_hot else List(ClassLabel(names=NAMES))
    if not multi_hot:
        columns = {key: [np.flatnonzero(row) for row in value] for key, value in columns.items()}
    features = Features({"labels": feature, "unknown_labels": feature, "image_id": Value("int64")})
    dataset = Dataset.from_dict({**columns, "image_id": range(300)}, features=features)
    noise = new(noise).fit(dataset)
    noisy = dataset.map(noise, batched=True, features=noise.features)
    found = label_matrix(noisy).numpy()
    assert (found != labels).any()
    assert (found[unknown == 1] == 0).all()
    assert noisy["unknown_labels"][:] == dataset["unknown_labels"][:]
    np.testing.assert_array_equal(noise.apply(labels, range(300), torch.from_numpy(unknown)).astype(int), found)


def test_mislabel_draws_among_the_known_absent_classes():
    n = 20_000
    labels = np.tile(np.array([1, 0, 0, 0], dtype=np.uint8), (n, 1))
    unknown = np.tile([False, True, False, False], (n, 1))
    counted = dataset_of(np.repeat(np.eye(4, dtype=np.uint8), [1, 5, 3, 1], axis=0))
    found = Mislabel(0.4).fit(counted).apply(labels, range(n), unknown).sum(0)
    assert found.sum() == n
    assert found[1] == 0
    within(found[[2, 3]], n * 0.4 * np.array([0.75, 0.25]), n * np.array([0.3 * 0.7, 0.1 * 0.9]))


def test_string_ids_draw_as_their_integers():
    labels = label_matrix(small()).numpy()
    noise = Mislabel(0.4).fit(small())
    np.testing.assert_array_equal(noise.apply(labels, range(300)), noise.apply(labels, [str(i) for i in range(300)]))


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_state_hashes_by_value(noise):
    """What `map` uses to find its cache."""
    fitted = new(noise).fit(small())
    assert Hasher.hash(fitted) == Hasher.hash(pickle.loads(pickle.dumps(fitted)))
    assert Hasher.hash(fitted) == Hasher.hash(new(noise).fit(small()))
    assert Hasher.hash(fitted) != Hasher.hash(new(noise).fit(small(150)))


def test_state_is_tiny_and_hashes_by_value():
    dataset = small()
    noise = Mislabel(0.4, seed=0).fit(dataset)
    assert len(pickle.dumps(noise)) < 2000
    large = dataset_of(np.eye(5, dtype=np.uint8)[np.arange(10_000) % 5])
    assert len(pickle.dumps(Mislabel(0.4).fit(large))) < 2000
    assert Hasher.hash(noise) == Hasher.hash(pickle.loads(pickle.dumps(noise)))
    assert Hasher.hash(noise) == Hasher.hash(Mislabel(0.4, seed=0).fit(small()))
    assert Hasher.hash(noise) != Hasher.hash(Mislabel(0.4, seed=1).fit(dataset))
    assert Hasher.hash(noise) != Hasher.hash(Mislabel(0.3, seed=0).fit(dataset))
    assert Hasher.hash(noise) != Hasher.hash(Mislabel(0.4, seed=0).fit(small(150)))
    noise.features.pop("labels")  # each call gives a copy
    maps = [dataset.map(noise, batched=True, features=noise.features) for _ in range(2)]
    assert maps[0]._fingerprint == maps[1]._fingerprint


def test_parameters_and_repr():
    mislabel = {"name": "Mislabel", "rate": 0.4, "seed": 0}
    flip = {"name": "RandomFlip", "rate": 0.2, "seed": 7}
    assert Mislabel(0.4).parameters == mislabel
    assert RandomFlip(0.2, seed=7).parameters == flip
    assert SinglePositive().parameters == {"name": "SinglePositive", "seed": 0}
    given = np.array(MATRIX), np.array(MISSING), 0.25
    assert ClassConditional(*given).parameters == {
        "name": "ClassConditional", "matrix": MATRIX, "missing": MISSING, "added": 0.25, "seed": 0,
    }  # fmt: skip
    assert Compose([Mislabel(0.4), RandomFlip(0.2, seed=7)]).parameters == {
        "name": "Compose",
        "noises": [mislabel, flip],
    }
    for noise in ALL:
        assert eval(repr(noise)).parameters == noise.parameters
        assert json.loads(json.dumps(noise.parameters)) == noise.parameters
    assert len(repr(ClassConditional(np.eye(80)))) < 500  # it is part of messages


# What can be wrong


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 40, float("nan"), float("inf"), "0.4", None, True])
@pytest.mark.parametrize("kind", [Mislabel, RandomFlip])
def test_rate_outside_its_range(kind, rate):
    with pytest.raises(ValueError, match=r"rate is .*; it must be a number in \[0, 1\)"):
        kind(rate)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_seed_outside_its_range(seed):
    for kind in (Mislabel, RandomFlip, ClassConditional, SinglePositive):
        with pytest.raises(ValueError, match=r"seed is .*; it must be an integer of at least 0"):
            kind(**({"rate": 0.4} if kind in (Mislabel, RandomFlip) else {}), seed=seed)


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_use_before_fit(noise):
    noise = new(noise)
    uses = (
        lambda: noise.features,
        lambda: noise({"labels": [[0]], "image_id": [1]}),
        lambda: noise.apply(np.zeros((1, 5)), [1]),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"is not fitted; .* call \.fit\(train_dataset\) first"):
            use()


def test_image_id_is_required_and_better_unique(caplog):
    dataset = small()
    with pytest.raises(ValueError, match=r"'image_id' must be among them; .*add_column"):
        Mislabel(0.4).fit(dataset.remove_columns("image_id"))
    noise = Mislabel(0.4).fit(dataset)
    with pytest.raises(ValueError, match=r"columns are \['labels'\]; 'image_id' must be among them"):
        noise({"labels": [[0]]})
    with pytest.raises(ValueError, match=r"columns are \['image_id'\]; 'labels' must be among them"):
        noise({"image_id": [0]})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        RandomFlip(0.2).fit(concatenate_datasets([dataset, dataset]))
    assert "image_id is not unique (300 values in 600 rows)" in caplog.text


def test_map_without_batches():
    noise = Mislabel(0.4).fit(small())
    with pytest.raises(ValueError, match=r"with one row; it must be a batch.*batched=True"):
        small().map(noise, features=noise.features)


def test_mislabel_needs_two_classes_the_others_do_not():
    labels = np.ones((4, 1), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"is fitted on 1 class; it must be at least 2"):
        Mislabel(0.4).fit(dataset_of(labels))
    assert RandomFlip(0.2).fit(dataset_of(labels)).apply(labels, range(4)).shape == (4, 1)
    assert (SinglePositive().fit(dataset_of(labels)).apply(labels, range(4)) == 1).all()


def test_other_labels_than_the_fitted_ones():
    noise = Mislabel(0.4).fit(small())
    with pytest.raises(ValueError, match=r"class id 5; it must be in 0\.\.4"):
        noise({"labels": [[5]], "image_id": [0]})
    with pytest.raises(ValueError, match=r"shape \(2, 4\); it must be \(N, 5\), as fitted"):
        noise.apply(np.zeros((2, 4)), [0, 1])
    with pytest.raises(ValueError, match="labels has other values than 0 and 1"):
        noise.apply(np.full((2, 5), 2), [0, 1])
    with pytest.raises(ValueError, match="labels has other values than 0 and 1"):
        noise.apply(np.full((2, 5), np.nan), [0, 1])
    with pytest.raises(ValueError, match=r"image_ids has 1 values; it must have one for each of the 2 rows"):
        noise.apply(np.zeros((2, 5)), [0])


def probabilities(row: int, column: int, value: float, size: int = 3) -> np.ndarray:
    matrix = np.eye(size) / 2
    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"matrix": probabilities(1, 2, 0.6)},
            r"row 1 of matrix sums to 1\.1, .* at most 1",
        ),
        (
            {"matrix": np.eye(3), "missing": [0, 0, 0.1]},
            r"row 2 .* sums to 1, with missing to 1\.1",
        ),
        (
            {"matrix": probabilities(0, 1, -0.1)},
            r"with -0\.1; it must be a \(K, K\) matrix of probabilities in \[0, 1\]",
        ),
        ({"matrix": probabilities(0, 1, np.nan)}, "with nan; it must be"),
        ({"matrix": [[1, 0], [0]]}, r"\[\[1, 0\], \[0\]\] with nan"),
        ({"matrix": np.ones(3) / 3}, r"matrix is of shape \(3,\); it must be a \(K, K\) matrix"),
        ({"matrix": np.zeros((0, 0))}, r"matrix is of shape \(0, 0\)"),
        ({"matrix": np.zeros((2, 3))}, r"have the shapes \(2, 3\), \(\) and \(\)"),
        ({"matrix": np.eye(3) / 2, "missing": [0.1, 0.1]}, r"have the shapes \(3, 3\), \(2,\) and \(\)"),
        ({"missing": 1.1}, r"missing is 1\.1 .*; it must be a number or K numbers of probabilities in \[0, 1\]"),
        ({"added": [0.1, "much"]}, "added is .*; it must be a number or K numbers"),
    ],
)
def test_class_conditional_of_impossible_probabilities(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassConditional(**arguments)


def test_class_conditional_for_another_number_of_classes():
    for noise in (ClassConditional(np.eye(3)), Compose([RandomFlip(0.1), ClassConditional(added=[0.1] * 3)])):
        with pytest.raises(ValueError, match="is for 3 classes; it must be for the 5 of the data set"):
            noise.fit(small())


def test_compose_of_what_cannot_be_composed():
    with pytest.raises(ValueError, match="at least one noise"):
        Compose([])
    with pytest.raises(TypeError, match=r"noises has 0\.4; each must be noise"):
        Compose([0.4])
    with pytest.raises(ValueError, match="noises has two RandomFlip with the seed 3"):
        Compose([RandomFlip(0.1, 3), Mislabel(0.1, 3), Compose([RandomFlip(0.2, 3)])])


def test_labels_both_present_and_unknown():
    noise = RandomFlip(0.1).fit(small())
    with pytest.raises(ValueError, match="row 1: class '1' is in 'labels' and in 'unknown_labels'"):
        noise.apply(np.eye(5), range(7, 12), np.eye(5) * [[0], [1], [0], [1], [0]])
    with pytest.raises(ValueError, match=r"unknown has the shape \(5, 4\); it must be \(5, 5\)"):
        noise.apply(np.eye(5), range(5), np.zeros((5, 4)))


def test_no_rows():
    noise = Mislabel(0.4).fit(small())
    assert noise.apply(np.zeros((0, 5)), []).shape == (0, 5)
    assert noise({"labels": [], "image_id": []}) == {"labels": [], "clean_labels": []}
