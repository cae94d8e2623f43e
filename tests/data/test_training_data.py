"""What a data loader hands out: by key, the same whoever asks, when and in which company."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest
import torch
from conftest import NAMES, make_dataset
from torch.utils.data import DataLoader

from hf_balancemix import drop_bad_images
from hf_balancemix.core.mixing import mixing_coefficient
from hf_balancemix.core.sampling import PairKey, PairSampler
from hf_balancemix.data.labels import label_matrix, sparse_labels
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs, collate, undecoded_images
from hf_balancemix.data.views import ViewMaker, to_tensor

N, SIZE = 12, 16


@pytest.fixture
def data(tmp_path) -> datasets.Dataset:
    return make_dataset(tmp_path / "images", N)


def pairs(data: datasets.Dataset, seed: int = 3, **settings) -> TrainingPairs:
    settings = {"two_views_from": 1, "mixup_alpha": 4.0} | settings
    return TrainingPairs(data, sparse_labels(data), ViewMaker(SIZE, seed), **settings)


def assert_same_rows(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# ---- training pairs ----


def test_columns_shapes_and_types(data):
    clean = label_matrix(data)
    pair = pairs(data, clean_labels=sparse_labels(data))[PairKey(1, 4, 9)]
    image = ((3, SIZE, SIZE), torch.uint8)
    label = ((len(NAMES),), torch.float32)
    expected = {
        "pixel_values": image, "second_view": image, "labels": label, "index": ((), torch.int64),
        "minority_pixel_values": image, "minority_second_view": image, "minority_labels": label,
        "minority_index": ((), torch.int64), "lam": ((), torch.float32), "clean_labels": label,
    }  # fmt: skip
    assert {name: (tuple(value.shape), value.dtype) for name, value in pair.items()} == expected
    assert (pair["index"], pair["minority_index"]) == (4, 9)
    assert torch.equal(pair["labels"], clean[4].float())
    assert torch.equal(pair["minority_labels"], clean[9].float())
    single = pairs(data)[PairKey(1, 4, None)]
    assert sorted(single) == ["index", "labels", "pixel_values", "second_view"]


def test_a_row_depends_on_its_key_and_not_on_its_batch(data):
    source = pairs(data)
    keys = [PairKey(2, 4, 9), PairKey(2, 9, 4), PairKey(2, 0, 0)]
    together = source.__getitems__(keys)
    for key, row in zip(keys, together, strict=True):
        assert_same_rows(row, source[key])
        assert_same_rows(row, pairs(data)[key])


def test_workers_change_nothing(data):
    weights = torch.arange(1, N + 1, dtype=torch.float64) / 78
    batches = []
    for workers in (0, 2):
        sampler = PairSampler(N, seed=3, weights=lambda: weights)
        sampler.set_epoch(1)
        loader = DataLoader(pairs(data), 5, sampler=sampler, num_workers=workers, collate_fn=collate)
        batches.append(list(loader))
    assert [len(batch["index"]) for batch in batches[0]] == [5, 5, 2]
    for one, other in zip(*batches, strict=True):
        assert_same_rows(one, other)


def test_an_instance_drawn_twice_in_a_batch_is_seen_in_different_views(data):
    # Instance 4 is the minority instance of two pairs and the random instance of one of them.
    rows = pairs(data).__getitems__([PairKey(2, 4, 4), PairKey(2, 7, 4), PairKey(2, 4, 1)])
    views = [rows[0]["pixel_values"], rows[0]["minority_pixel_values"], rows[1]["minority_pixel_values"]]
    views += [rows[0]["second_view"], rows[0]["minority_second_view"], rows[1]["minority_second_view"]]
    for i, one in enumerate(views):
        for other in views[:i]:
            assert not torch.equal(one, other)
    for row in rows[:2]:
        assert torch.equal(row["minority_labels"], rows[0]["labels"])
    # The random view does not depend on the minority instance that it is paired with.
    assert torch.equal(rows[0]["pixel_values"], rows[2]["pixel_values"])
    assert rows[0]["lam"] == rows[2]["lam"]


def test_two_views_begin_with_their_epoch(data):
    def has_two(epoch: int, first: int | None) -> bool:
        row = pairs(data, two_views_from=first)[PairKey(epoch, 0, 1)]
        assert ("second_view" in row) == ("minority_second_view" in row)
        return "second_view" in row

    assert [has_two(epoch, 2) for epoch in range(4)] == [False, False, True, True]
    assert not any(has_two(epoch, None) for epoch in range(4))
    # The view that is mixed is the same, with or without a second one.
    one, two = (pairs(data, two_views_from=first)[PairKey(3, 0, 1)] for first in (None, 0))
    assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_lambda_is_a_function_of_seed_epoch_and_random_index(data):
    def lam(key: PairKey, seed: int = 3) -> float:
        return pairs(data, seed=seed)[key]["lam"].item()

    assert lam(PairKey(2, 4, 9)) == lam(PairKey(2, 4, 1))
    assert lam(PairKey(2, 4, 9)) == pytest.approx(mixing_coefficient(4.0, 3, 2, 4), abs=1e-7)
    others = [lam(PairKey(1, 4, 9)), lam(PairKey(2, 5, 9)), lam(PairKey(2, 4, 9), seed=4)]
    assert len({lam(PairKey(2, 4, 9)), *others}) == 4
    assert all(0.5 <= value <= 1 for value in others)
    assert pairs(data, mixup_alpha=0.0)[PairKey(2, 4, 9)]["lam"] == 1


def test_loading_leaves_the_global_generator_alone(data):
    state = torch.get_rng_state()
    pairs(data)[PairKey(1, 0, 1)]
    PlainInstances(data, ViewMaker(SIZE, 0))[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_selected_shuffled_and_transformed_data_sets_are_read_as_they_are(data):
    shuffled = data.shuffle(seed=1).select(range(6))
    shuffled = shuffled.with_transform(lambda rows: {"image": [None] * len(rows["image"])})
    rows = PlainInstances(shuffled, ViewMaker(20, 0))
    expected = data.shuffle(seed=1)
    for i in (5, 0):
        assert torch.equal(rows[i]["pixel_values"], to_tensor(expected[i]["image"]))  # images are 20 x 20
        assert torch.equal(rows[i]["labels"], label_matrix(expected)[i].float())


# ---- plain instances and unknown labels ----


def test_plain_instances_are_not_augmented_and_need_no_labels(data):
    row = PlainInstances(data, ViewMaker(20, seed=0))[3]
    assert sorted(row) == ["index", "labels", "pixel_values"]
    assert torch.equal(row["pixel_values"], to_tensor(data[3]["image"]))
    batch = collate(PlainInstances(data.remove_columns("labels"), ViewMaker(20, seed=1)).__getitems__([3, 1, 3]))
    assert batch["index"].tolist() == [3, 1, 3]
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert torch.equal(batch["pixel_values"][0], row["pixel_values"])
    assert "labels" not in batch


def test_unknown_labels_are_minus_one_in_every_row(data):
    features = datasets.Features(**data.features, unknown_labels=data.features["labels"])
    unknown = [[(labels[0] + 1) % 5] if len(labels) == 1 else [] for labels in data["labels"]]
    marked = data.add_column("unknown_labels", unknown).cast(features)
    assert sum(map(len, unknown)) > 2
    plain, training = PlainInstances(marked, ViewMaker(SIZE, 0)), pairs(marked)
    for i, (present, absent) in enumerate(zip(data["labels"], unknown, strict=True)):
        expected = [-1.0 if k in absent else float(k in present) for k in range(5)]
        assert plain[i]["labels"].tolist() == expected
        pair = training[PairKey(0, 0, i)]
        assert pair["minority_labels"].tolist() == expected


def test_what_is_no_data_set_with_images_is_refused(data):
    with pytest.raises(TypeError, match=r"IterableDataset; it must be a datasets\.Dataset"):
        undecoded_images(data.to_iterable_dataset())
    with pytest.raises(TypeError, match="DatasetDict"):
        undecoded_images(datasets.DatasetDict(train=data))
    with pytest.raises(ValueError, match=r"\['labels', 'image_id'\]; 'image' must be among them"):
        undecoded_images(data.remove_columns("image"))
    text = data.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"image": row["image"]["path"]}, features=datasets.Features(image=datasets.Value("string"), **{
            name: feature for name, feature in data.features.items() if name != "image"
        })
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"cast_column\('image', datasets.Image\(\)\)"):
        undecoded_images(text)


# ---- bad images ----


def paths(data: datasets.Dataset) -> list[Path]:
    return [Path(row["image"]["path"]) for row in data.cast_column("image", datasets.Image(decode=False))]


def test_bad_images_are_dropped_and_no_others(data, caplog):
    files = paths(data)
    files[2].unlink()
    files[5].write_bytes(files[5].read_bytes()[:200])
    files[7].write_bytes(b"")
    files[11].write_text("no image")
    with caplog.at_level(logging.WARNING):
        kept = drop_bad_images(data)
    assert kept["image_id"] == [100 + i for i in range(N) if i not in (2, 5, 7, 11)]
    assert kept.features == data.features
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "4 of 12" in message
    for name in ("row 2", "002.png", "005.png", "007.png", "..."):
        assert name in message
    assert [row["image"].size for row in kept] == [(20, 20)] * 8


def test_good_images_are_returned_as_they_are_without_a_word(data, caplog):
    with caplog.at_level(logging.WARNING):
        assert drop_bad_images(data) is data
    assert not caplog.records


def test_images_stored_as_bytes_are_checked_too(data, caplog):
    rows = [{"path": None, "bytes": file.read_bytes()} for file in paths(data)]
    rows[3]["bytes"] = rows[3]["bytes"][:100]
    stored = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image()))
    with caplog.at_level(logging.WARNING):
        assert len(drop_bad_images(stored)) == N - 1
    assert "row 3 (given as bytes)" in caplog.text


def test_a_data_set_of_bad_images_only_is_an_error(data):
    for file in paths(data):
        file.unlink()
    with pytest.raises(ValueError, match=r"12 of 12 images cannot be decoded.*nothing is left"):
        drop_bad_images(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_in_training_is_named(data, workers):
    file = paths(data)[6]
    file.write_bytes(b"\xff\xd8 cut")
    loader = DataLoader(PlainInstances(data, ViewMaker(SIZE, 0)), 4, num_workers=workers, collate_fn=collate)
    with pytest.raises(ValueError, match=r"cannot decode image .*006\.png"):
        list(loader)
