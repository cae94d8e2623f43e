"""Noise maps: the stated distributions, on made-up and on COCO's labels, and independence of everything but the id."""

from __future__ import annotations

import hashlib
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
from hf_balancemix.data.noise import Mislabel, RandomFlip, SinglePositive, id_words, uniform

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))
NAMES = ["person", "dog", "car", "tree", "kite"]
ALL = [Mislabel(0.4, seed=1), Mislabel(0.4, seed=1, exclude_present=False), RandomFlip(0.2, seed=1), SinglePositive(1)]


def new(noise):
    """An unfitted copy, as fitting changes the object."""
    return type(noise)(**{key: value for key, value in noise.parameters.items() if key != "name"})


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
    with pytest.raises(ValueError, match=r"row 1: image_id must be an integer or a string, got"):
        id_words([9, value])


GOLDEN = {
    "Mislabel(rate=0.4, seed=1, exclude_present=True)": [
        [1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 0, 0],
    ],
    "Mislabel(rate=0.4, seed=1, exclude_present=False)": [
        [1, 0, 0, 0, 0],
        [1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 1, 0, 0, 0],
    ],
    "RandomFlip(rate=0.2, seed=1)": [
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 1],
        [0, 0, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 0, 0],
    ],
    "SinglePositive(seed=1)": [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]],
}


def test_golden_labels():
    """Results are published by seed: a change here needs a new name for the noise, not new numbers for the test."""
    labels = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0]])
    ids = [9, 25, 30, "a.jpg", 2**40]
    fitted = dataset_of(labels)
    found = {repr(noise): new(noise).fit(fitted).apply(labels, ids).tolist() for noise in ALL}
    assert found == GOLDEN


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


# Distributions


def test_mislabel_moves_single_labels_as_equation_11_says():
    """With one positive an image nothing is excluded, so rho(i->j) = tau N_j / (N_pos - N_i) holds exactly."""
    classes = np.repeat(np.arange(4), [60_000, 30_000, 9_000, 1_000])
    labels = np.eye(5, dtype=np.uint8)[classes]  # the fifth class has no positive: never a target
    for exclude_present in (True, False):
        noise = Mislabel(0.4, seed=0, exclude_present=exclude_present).fit(dataset_of(labels))
        noisy = noise.apply(labels, range(len(labels)))
        assert (noisy.sum(1) == 1).all()
        found = labels.T.astype(int) @ noisy
        counts = labels.sum(0, dtype=int)
        for i in range(4):
            rho = 0.4 * counts / (counts.sum() - counts[i])
            rho[i] = 0.6
            assert found[i, 4] == 0
            within(found[i, :4], counts[i] * rho[:4], counts[i] * (rho * (1 - rho))[:4])


def test_mislabel_never_targets_present_classes_by_default():
    labels = label_matrix(small()).numpy()
    noise = Mislabel(0.9, seed=0).fit(small())
    noisy = noise.apply(labels, range(300))
    assert (noisy.sum(1) <= labels.sum(1)).all()  # shared targets shrink
    assert ((noisy > labels).sum(1) <= (noisy < labels).sum(1)).all()
    assert (noisy.sum(1)[labels.sum(1) > 0] > 0).all()  # a label moves, it does not vanish
    anywhere = Mislabel(0.9, seed=0, exclude_present=False).fit(small()).apply(labels, range(300))
    assert ((anywhere < labels).sum(1) != (noisy < labels).sum(1)).any()  # some moved onto a present class


def test_mislabel_without_a_possible_target_changes_nothing():
    labels = np.ones((200, 3), dtype=np.uint8)
    assert (Mislabel(0.9).fit(dataset_of(labels)).apply(labels, range(200)) == labels).all()
    one_class = np.eye(3, dtype=np.uint8)[np.zeros(200, dtype=int)]  # the others have N_j = 0
    for exclude_present in (True, False):
        noise = Mislabel(0.9, exclude_present=exclude_present).fit(dataset_of(one_class))
        assert (noise.apply(one_class, range(200)) == one_class).all()
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


def test_string_ids_draw_as_their_integers():
    labels = label_matrix(small()).numpy()
    noise = Mislabel(0.4).fit(small())
    np.testing.assert_array_equal(noise.apply(labels, range(300)), noise.apply(labels, [str(i) for i in range(300)]))


def test_state_is_tiny_and_hashes_by_value():
    dataset = small()
    noise = Mislabel(0.4, seed=0).fit(dataset)
    assert len(pickle.dumps(noise)) < 2000
    assert Hasher.hash(noise) == Hasher.hash(pickle.loads(pickle.dumps(noise)))
    assert Hasher.hash(noise) == Hasher.hash(Mislabel(0.4, seed=0).fit(small()))
    assert Hasher.hash(noise) != Hasher.hash(Mislabel(0.4, seed=1).fit(dataset))
    assert Hasher.hash(noise) != Hasher.hash(Mislabel(0.3, seed=0).fit(dataset))
    assert Hasher.hash(noise) != Hasher.hash(Mislabel(0.4, seed=0).fit(small(150)))
    noise.features.pop("labels")  # each call gives a copy
    maps = [dataset.map(noise, batched=True, features=noise.features) for _ in range(2)]
    assert maps[0]._fingerprint == maps[1]._fingerprint


def test_parameters_and_repr():
    assert Mislabel(0.4).parameters == {"name": "Mislabel", "rate": 0.4, "seed": 0, "exclude_present": True}
    assert RandomFlip(0.2, seed=7).parameters == {"name": "RandomFlip", "rate": 0.2, "seed": 7}
    assert SinglePositive().parameters == {"name": "SinglePositive", "seed": 0}
    for noise in ALL:
        assert eval(repr(noise)).parameters == noise.parameters


# What can be wrong


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 40, float("nan"), float("inf"), "0.4", None, True])
@pytest.mark.parametrize("kind", [Mislabel, RandomFlip])
def test_rate_outside_its_range(kind, rate):
    with pytest.raises(ValueError, match=r"noise rate must be a number in \[0, 1\), got"):
        kind(rate)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_seed_outside_its_range(seed):
    for make in (lambda: Mislabel(0.4, seed), lambda: RandomFlip(0.4, seed), lambda: SinglePositive(seed)):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0, got"):
            make()


@pytest.mark.parametrize("noise", ALL, ids=repr)
def test_use_before_fit(noise):
    noise = new(noise)
    uses = (
        lambda: noise.features,
        lambda: noise({"labels": [[0]], "image_id": [1]}),
        lambda: noise.apply(np.zeros((1, 5)), [1]),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"is not fitted: call \.fit\(train_dataset\) first"):
            use()


def test_image_id_is_required_and_better_unique(caplog):
    dataset = small()
    with pytest.raises(ValueError, match=r"no 'image_id' among the columns .*add_column"):
        Mislabel(0.4).fit(dataset.remove_columns("image_id"))
    noise = Mislabel(0.4).fit(dataset)
    with pytest.raises(ValueError, match=r"no 'image_id' among the columns"):
        noise({"labels": [[0]]})
    with pytest.raises(ValueError, match=r"no 'labels' among the columns"):
        noise({"image_id": [0]})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        RandomFlip(0.2).fit(concatenate_datasets([dataset, dataset]))
    assert "image_id is not unique (300 values in 600 rows)" in caplog.text


def test_map_without_batches():
    noise = Mislabel(0.4).fit(small())
    with pytest.raises(ValueError, match=r"one row, not a batch.*batched=True"):
        small().map(noise, features=noise.features)


def test_mislabel_needs_two_classes_the_others_do_not():
    labels = np.ones((4, 1), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"needs at least 2 classes.*has 1"):
        Mislabel(0.4).fit(dataset_of(labels))
    assert RandomFlip(0.2).fit(dataset_of(labels)).apply(labels, range(4)).shape == (4, 1)
    assert (SinglePositive().fit(dataset_of(labels)).apply(labels, range(4)) == 1).all()


def test_other_labels_than_the_fitted_ones():
    noise = Mislabel(0.4).fit(small())
    with pytest.raises(ValueError, match=r"class id 5 is outside 0\.\.4"):
        noise({"labels": [[5]], "image_id": [0]})
    with pytest.raises(ValueError, match=r"shape \(N, 5\) are required, as fitted; got \(2, 4\)"):
        noise.apply(np.zeros((2, 4)), [0, 1])
    with pytest.raises(ValueError, match="labels must be 0 or 1 only"):
        noise.apply(np.full((2, 5), 2), [0, 1])
    with pytest.raises(ValueError, match="labels must be 0 or 1 only"):
        noise.apply(np.full((2, 5), np.nan), [0, 1])
    with pytest.raises(ValueError, match=r"one image_id for each of the 2 rows is required, got 1"):
        noise.apply(np.zeros((2, 5)), [0])


def test_no_rows():
    noise = Mislabel(0.4).fit(small())
    assert noise.apply(np.zeros((0, 5)), []).shape == (0, 5)
    assert noise({"labels": [], "image_id": []}) == {"labels": [], "clean_labels": []}
