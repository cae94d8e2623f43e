"""Noise maps as files: bit for bit the same labels after a round trip, and refusal of other data than they are for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets

from hf_balancemix.data.labels import class_names, label_matrix
from hf_balancemix.data.noise import ClassConditional, Compose, Mislabel, RandomFlip, SinglePositive
from hf_balancemix.data.noise_map import NoiseMap, load_noise_map

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))
NAMES = ["person", "dog", "car", "tree", "kite"]
NOISES = [
    Mislabel(0.4, seed=1),
    RandomFlip(0.2),
    SinglePositive(seed=3),
    ClassConditional(added=0.1),
    Compose([Mislabel(0.2), RandomFlip(0.1)]),
]


def make(labels: np.ndarray, ids: list | None = None, names: list[str] = NAMES, **columns: list) -> Dataset:
    """Images are files that do not exist: reading one would fail."""
    ids = list(range(100, 100 + len(labels))) if ids is None else ids
    kind = List(ClassLabel(names=names))
    features = {"image": Image(), "labels": kind, "image_id": Value("string" if isinstance(ids[0], str) else "int64")}
    stored = {"image": [f"/nowhere/{i}.jpg" for i in ids], "labels": class_lists(labels)}
    for name, matrix in columns.items():
        features[name], stored[name] = kind, class_lists(matrix)
    return Dataset.from_dict({**stored, "image_id": ids}, features=Features(features))


def class_lists(matrix: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in matrix]


def clean_labels(n: int = 200) -> np.ndarray:
    return (np.random.default_rng(0).random((n, 5)) < [0.6, 0.4, 0.3, 0.1, 0.02]).astype(np.uint8)


def mapped(dataset: Dataset, noise) -> Dataset:
    return dataset.map(noise.fit(dataset), batched=True, features=noise.features)


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return make(clean_labels())


@pytest.fixture(scope="module")
def noisy(clean) -> Dataset:
    return mapped(clean, Mislabel(0.4, seed=1))


@pytest.fixture(scope="module")
def noise_map(clean, noisy) -> NoiseMap:
    return NoiseMap.from_datasets(clean, noisy, noise=Mislabel(0.4, seed=1))


# Round trips


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_round_trip_gives_the_same_rows(tmp_path, clean, noise):
    noisy = mapped(clean, noise)
    NoiseMap.from_datasets(clean, noisy, noise=noise).save(tmp_path / "map.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["map.parquet"]
    loaded = load_noise_map(tmp_path / "map.parquet")
    applied = loaded.apply(clean)
    assert applied.features == noisy.features
    assert applied.column_names == noisy.column_names
    plain = [name for name in noisy.column_names if name != "image"]
    assert applied.select_columns(plain).to_dict() == noisy.select_columns(plain).to_dict()
    assert loaded.parameters == noise.parameters
    assert loaded.name == type(noise).__name__
    assert loaded.seed == noise.parameters.get("seed")
    assert loaded.num_instances == 200
    assert loaded.num_removed == int((label_matrix(noisy) < label_matrix(clean)).sum())
    assert loaded.num_added == int((label_matrix(noisy) > label_matrix(clean)).sum())


def test_order_of_rows_and_of_classes_is_free(tmp_path, clean, noisy, noise_map):
    noise = Mislabel(0.4, seed=1)
    other = NoiseMap.from_datasets(clean.shuffle(seed=1), noisy.shuffle(seed=2), noise=noise)
    assert other == noise_map == NoiseMap.from_datasets(noisy=noisy.shuffle(seed=3), noise=noise)
    noise_map.save(tmp_path / "a.parquet")
    other.save(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()

    shuffled = clean.shuffle(seed=4)
    applied = noise_map.apply(shuffled)
    assert applied["image_id"][:] == shuffled["image_id"][:]
    expected = dict(zip(noisy["image_id"], noisy["labels"], strict=True))
    assert dict(zip(applied["image_id"], applied["labels"], strict=True)) == expected

    order = [3, 1, 4, 0, 2]
    renamed = make(clean_labels()[:, order], names=[NAMES[k] for k in order])
    applied = noise_map.apply(renamed)
    assert class_names(applied) == class_names(applied, "clean_labels") == [NAMES[k] for k in order]
    assert torch.equal(label_matrix(applied), label_matrix(noisy)[:, order])
    as_text = make(clean_labels(), [str(i) for i in clean["image_id"]])
    assert torch.equal(label_matrix(noise_map.apply(as_text)), label_matrix(noisy))


@pytest.mark.parametrize("inner", ["int64", "float32", "bool"])
def test_multi_hot_columns(inner):
    labels = clean_labels()
    features = Features({"labels": List(Value(inner), length=5), "image_id": Value("int64")})
    clean = Dataset.from_dict({"labels": labels.astype(inner).tolist(), "image_id": range(200)}, features=features)
    noisy = mapped(clean, RandomFlip(0.2))
    applied = NoiseMap.from_datasets(clean, noisy).apply(clean)
    assert applied.features == noisy.features
    assert applied.to_dict() == noisy.to_dict()


def test_formatted_data_sets_and_their_format(clean, noisy, noise_map):
    formatted = clean.select_columns(["labels", "image_id"]).with_format("torch")
    applied = noise_map.apply(formatted)
    assert applied.format["type"] == "torch"
    assert torch.equal(label_matrix(applied), label_matrix(noisy))


def test_noise_upon_noise_keeps_the_first_clean_labels(clean, noisy):
    twice = mapped(noisy, RandomFlip(0.1, seed=5))
    second = NoiseMap.from_datasets(noisy, twice)
    assert second.apply(noisy).select_columns(["labels", "clean_labels"]).to_dict() == twice.select_columns(
        ["labels", "clean_labels"]
    ).to_dict()  # fmt: skip
    both = NoiseMap.from_datasets(noisy=twice)  # from the first clean labels to the last noisy ones
    assert torch.equal(label_matrix(both.apply(clean)), label_matrix(twice))


def test_unknown_labels(tmp_path):
    labels = clean_labels()
    unknown = (np.random.default_rng(1).random(labels.shape) < 0.4) & (labels == 0)
    clean = make(labels, unknown_labels=unknown)
    noisy = mapped(clean, RandomFlip(0.3))
    noise_map = NoiseMap.from_datasets(clean, noisy)
    applied = noise_map.apply(clean)
    assert torch.equal(label_matrix(applied), label_matrix(noisy))
    assert applied["unknown_labels"][:] == clean["unknown_labels"][:]
    with pytest.raises(ValueError, match=r"the label '\w+' of image_id \d+ is unknown in one of the data sets only"):
        NoiseMap.from_datasets(clean, noisy.remove_columns("unknown_labels"))
    with pytest.raises(ValueError, match="differ from those that the noise map was made from"):
        noise_map.apply(clean.remove_columns("unknown_labels"))


def test_nothing_changed_and_no_rows(tmp_path, clean):
    for dataset in (clean, clean.select([])):
        noise_map = NoiseMap.from_datasets(dataset, dataset)
        noise_map.save(tmp_path / "map.parquet")
        noise_map = load_noise_map(tmp_path / "map.parquet")
        assert (noise_map.num_instances, noise_map.num_removed, noise_map.num_added) == (len(dataset), 0, 0)
        assert torch.equal(label_matrix(noise_map.apply(dataset)), label_matrix(dataset))


def test_real_coco(tmp_path):
    file = DATA / "coco_labels" / "coco_multihot.npz"
    if not file.is_file():
        pytest.skip("BALANCEMIX_DATA has no coco_labels")
    with np.load(file) as archive:
        labels, ids = archive["train2014_labels"], archive["train2014_ids"]
    clean = make(labels, ids.tolist(), [f"class {k}" for k in range(80)])
    noisy_labels = Mislabel(0.4).fit(clean).apply(labels, ids)
    noise_map = NoiseMap.from_datasets(clean, make(noisy_labels, ids.tolist(), class_names(clean)))
    noise_map.save(tmp_path / "map.parquet")
    assert (tmp_path / "map.parquet").stat().st_size < 1e6
    applied = load_noise_map(tmp_path / "map.parquet").apply(clean)
    assert (label_matrix(applied).numpy() == noisy_labels).all()
    assert torch.equal(label_matrix(applied, "clean_labels"), torch.from_numpy(labels))


# What is in the file


def test_the_file_holds_what_differs_and_nothing_else(tmp_path):
    """As others read it: pandas for the rows, JSON for the rest, and the digest from its description."""
    clean = make(np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]), ["b.jpg", "a.jpg", "c.jpg"])
    noisy = make(np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]), ["b.jpg", "a.jpg", "c.jpg"])
    NoiseMap.from_datasets(clean, noisy, noise={"name": "two annotators", "seed": None}).save(tmp_path / "map.parquet")
    frame = pd.read_parquet(tmp_path / "map.parquet")
    assert list(frame.columns) == ["image_id", "class", "given", "clean", "check"]
    rows = frame.drop(columns="check").astype(object).where(frame.drop(columns="check").notna(), None)
    assert rows.to_numpy().tolist() == [
        ["a.jpg", None, None, None],
        ["b.jpg", "person", 0, 1],
        ["b.jpg", "tree", 1, 0],
        ["c.jpg", "person", 1, 0],
    ]
    assert frame["check"].nunique() == 3
    prints = sorted(
        hashlib.blake2b(name + b"\0" + bytes(row), digest_size=16).digest()
        for name, row in ((b"a.jpg", [0, 1, 0, 0, 0]), (b"b.jpg", [1, 0, 1, 0, 0]), (b"c.jpg", [0, 0, 0, 0, 0]))
    )
    assert json.loads(pq.read_schema(tmp_path / "map.parquet").metadata[b"noise_map"]) == {
        "format": 1,
        "name": "two annotators",
        "parameters": {"name": "two annotators", "seed": None},
        "seed": None,
        "num_instances": 3,
        "num_classes": 5,
        "class_names": NAMES,
        "clean_digest": hashlib.sha256(b"".join(prints)).hexdigest(),
    }
    found = load_noise_map(tmp_path / "map.parquet")
    assert repr(found) == "NoiseMap(two annotators: 1 labels removed and 2 added in 3 images, 5 classes)"


def test_a_folder_with_a_noise_map(tmp_path, noise_map):
    noise_map.save(tmp_path / "noise_map.parquet")
    assert load_noise_map(tmp_path) == noise_map


def test_a_failed_write_leaves_the_old_file(tmp_path, noise_map, monkeypatch):
    path = tmp_path / "map.parquet"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        noise_map.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["map.parquet"]
    assert path.read_bytes() == b"old"


# Other data than it was made from


def changed(row: int, k: int) -> Dataset:
    labels = clean_labels()
    labels[row, k] ^= 1
    return make(labels)


def test_other_images(clean, noise_map):
    message = r"the data set has other images than the noise map \("
    with pytest.raises(ValueError, match=message + r"it lacks 2, first image_id '103'\).*use the same data set"):
        noise_map.apply(clean.filter(lambda image_id: image_id not in (103, 150), input_columns="image_id"))
    more = make(np.ones((3, 5)), [500, 501, 502])
    with pytest.raises(ValueError, match=message + r"it also has 3, first image_id '500'"):
        noise_map.apply(concatenate_datasets([clean, more]))
    others = concatenate_datasets([clean.select(range(1, 200)), more])
    with pytest.raises(ValueError, match=r"it lacks 1, .* '100' and it also has 3, first image_id '500'"):
        noise_map.apply(others)
    with pytest.raises(ValueError, match="image_id '100' occurs 2 times in the data set; it must be unique"):
        noise_map.apply(concatenate_datasets([clean, clean.select([0])]))


def test_other_classes(noise_map):
    message = r"other classes than the noise map \(it lacks 1, first class 'kite'"
    with pytest.raises(ValueError, match=message):
        noise_map.apply(make(clean_labels()[:, :4], names=NAMES[:4]))
    with pytest.raises(ValueError, match=message + r" and it also has 1, first class 'kites'"):
        noise_map.apply(make(clean_labels(), names=[*NAMES[:4], "kites"]))


@pytest.mark.parametrize("row", [0, 57, 199])
@pytest.mark.parametrize("k", range(5))
def test_other_clean_labels(noisy, noise_map, row, k):
    """One label of 1,000 differs; where the noise changed that label, the message says it in full."""
    with pytest.raises(
        ValueError, match=f"the labels of 1 of 200 images differ .* such as image_id {100 + row}"
    ) as error:
        noise_map.apply(changed(row, k))
    known = label_matrix(noisy)[row, k] != clean_labels()[row, k]
    value = clean_labels()[row, k]
    assert (f"whose label '{NAMES[k]}' is {1 - value} instead of {value}" in str(error.value)) == bool(known)
    assert "apply the map to that data set, loaded in the same way" in str(error.value)


def test_applied_twice(noisy, noise_map):
    with pytest.raises(ValueError, match="has 'clean_labels', so its labels may be noisy already"):
        noise_map.apply(noisy)


def test_what_no_map_can_be_made_from(clean, noisy):
    with pytest.raises(TypeError, match="noisy is None; it must be the data set with noise"):
        NoiseMap.from_datasets(noisy)
    with pytest.raises(
        ValueError, match=r"noisy must have the column 'clean_labels' then; pass the clean data set, too"
    ):
        NoiseMap.from_datasets(noisy=clean)
    with pytest.raises(TypeError, match="JSON serializable"):
        NoiseMap.from_datasets(clean, noisy, noise={"matrix": np.eye(2)})
    with pytest.raises(ValueError, match=r"the noisy data set has other images than the clean one \(it lacks 1"):
        NoiseMap.from_datasets(clean, noisy.select(range(199)))
    with pytest.raises(ValueError, match="image_id '100' occurs 2 times in the clean data set"):
        NoiseMap.from_datasets(concatenate_datasets([clean, clean.select([0])]), noisy)
    with pytest.raises(ValueError, match=r"row 0: image_id is None; it must be an integer or a string"):
        NoiseMap.from_datasets(clean.map(lambda _: {"image_id": None}, features=clean.features), noisy)
    with pytest.raises(TypeError, match=r"datasets\.Dataset"):
        NoiseMap.from_datasets(clean, "noisy")


# Damaged files


def test_files_that_are_no_noise_maps(tmp_path, noise_map):
    path = tmp_path / "map.parquet"
    with pytest.raises(FileNotFoundError, match=r"no file .*map\.parquet"):
        NoiseMap.load(path)
    noise_map.save(path)
    whole, table = path.read_bytes(), pq.read_table(path)
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"map\.parquet is damaged or not a noise map"):
            load_noise_map(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(ValueError, match="is damaged or not a noise map"):
        load_noise_map(path)
    metadata = json.loads(table.schema.metadata[b"noise_map"])
    names = table["class"].to_pylist()
    first, unchanged = (next(i for i, name in enumerate(names) if (name is None) == none) for none in (False, True))
    for tampered, message in (
        (table.slice(unchanged + 1), "instead of 200"),
        (table.drop_columns("check"), "check"),
        (table.set_column(1, "class", [["ship" if i == first else name for i, name in enumerate(names)]]), "'ship'"),
        (table.set_column(2, "given", table["clean"]), "'given' and 'clean' of a row are not 0 and 1"),
        (table.take([*range(len(table)), 0]), "an image_id occurs in two places"),
        (table.take(sorted([*range(len(table)), first])), "a label is listed twice"),
        (table.take(sorted([*range(len(table)), unchanged])), "a row without a class beside others"),
    ):
        pq.write_table(tampered.replace_schema_metadata(table.schema.metadata), path)
        with pytest.raises(ValueError, match=f"is damaged or not a noise map .*{message}"):
            load_noise_map(path)
    pq.write_table(table.replace_schema_metadata({b"noise_map": json.dumps(metadata | {"format": 2})}), path)
    with pytest.raises(ValueError, match="its format is 2; it must be 1; update hf_balancemix"):
        load_noise_map(path)


def small_map(tmp_path) -> tuple[Dataset, Dataset, Path]:
    clean = make(np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]), ["b.jpg", "a.jpg", "c.jpg"])
    noisy = make(np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]), ["b.jpg", "a.jpg", "c.jpg"])
    NoiseMap.from_datasets(clean, noisy, noise={"name": "two annotators", "rate": 0.5}).save(tmp_path / "map.parquet")
    return clean, noisy, tmp_path / "map.parquet"


def other_values(column: str, value) -> list:
    texts = {"image_id": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], "class": [*NAMES, "ship"]}
    numbers = [0, 1, 2, *((value or 0) ^ 1 << bit for bit in range(8))] if column not in texts else []
    return [*({None, *texts.get(column, numbers)} - {value})]


def test_any_other_value_in_any_row_is_noticed(tmp_path):
    """Also those that make a map of their own, such as another class, or the same change of another image."""
    _, _, path = small_map(tmp_path)
    table, tried = pq.read_table(path), 0
    for column, name in enumerate(table.column_names):
        values = table[name].to_pylist()
        for row, value in enumerate(values):
            for other in other_values(name, value):
                cells = [other if i == row else cell for i, cell in enumerate(values)]
                field = table.schema.field(column)
                pq.write_table(table.set_column(column, field, pa.array(cells, field.type)), path)
                with pytest.raises(ValueError, match=r"map\.parquet is damaged or not a noise map") as error:
                    load_noise_map(path)
                assert len(str(error.value)) < 400
                tried += 1
    metadata = table.schema.metadata[b"noise_map"]
    for old, new in ((b'"rate": 0.5', b'"rate": 0.4'), (b'"dog", "car"', b'"car", "dog"'), (b"two ", b"ten ")):
        assert old in metadata
        other = table.schema.metadata | {b"noise_map": metadata.replace(old, new)}
        pq.write_table(table.replace_schema_metadata(other), path)
        with pytest.raises(ValueError, match="some value was changed after it was written"):
            load_noise_map(path)
    assert tried > 100


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("given", 1, 2, r"column 'given', row 1 is 2; it must be 0 or 1"),
        ("clean", 2, 3, r"column 'clean', row 2 is 3; it must be 0 or 1"),
        ("given", 1, None, r"column 'given', row 1 is None"),
        ("given", 0, 1, r"column 'given', row 0 is 1; .* null in a row without a class"),
        ("clean", 1, 0, r"'given' and 'clean' of a row are not 0 and 1, or 1 and 0"),
        ("class", 1, "ship", r"column 'class', row 1 is 'ship'; it must be among the class names"),
        ("class", 1, "x" * 9999, r"column 'class', row 1 is 'xxx"),
        ("image_id", 3, None, r"column 'image_id', row 3 is None; it must be a value"),
        ("class_names", None, [*NAMES[:4], NAMES[0]], "class_names has a name twice"),
        ("class_names", None, [*NAMES[:4], 5], "class_names is .* no list of names"),
        ("class_names", None, "person", "class_names is 'person', no list of names"),
        ("parameters", None, [1], r"parameters is \[1\], no mapping"),
        ("parameters", None, {"rate": float("nan")}, "JSON cannot hold its parameters"),
        ("clean_digest", None, 5, "clean_digest is 5, no SHA-256"),
        ("num_instances", None, 10**4000, "3 images instead of "),
    ],
)
def test_each_part_of_a_map_without_a_digest_is_checked_by_itself(tmp_path, column, row, value, message):
    _, _, path = small_map(tmp_path)
    table = pq.read_table(path)
    content = json.loads(table.schema.metadata[b"noise_map"])
    if row is None:
        content[column] = value
    else:
        values = table[column].to_pylist()
        values[row] = value
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    pq.write_table(table.replace_schema_metadata({b"noise_map": json.dumps(content)}), path)
    with pytest.raises(ValueError, match=f"is damaged or not a noise map .*{message}") as error:
        load_noise_map(path)
    assert len(str(error.value)) < 400


def test_a_map_that_was_written_by_hand_loads_with_a_warning(tmp_path, caplog):
    clean, noisy, path = small_map(tmp_path)
    assert torch.equal(label_matrix(load_noise_map(path).apply(clean)), label_matrix(noisy))
    assert not caplog.records
    rows = {"image_id": [*"abbc"], "class": [None, "person", "tree", "person"], "given": [None, 0, 1, 1]}
    rows |= {"image_id": ["a.jpg", "b.jpg", "b.jpg", "c.jpg"], "clean": [None, 1, 0, 0]}
    for content in ({"class_names": NAMES}, json.loads(pq.read_schema(path).metadata[b"noise_map"])):
        caplog.clear()
        pq.write_table(pa.table(rows).replace_schema_metadata({b"noise_map": json.dumps(content)}), path)
        loaded = load_noise_map(path)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "map.parquet has no digest of its rows" in record.message
        assert torch.equal(label_matrix(loaded.apply(clean)), label_matrix(noisy))
        assert torch.equal(label_matrix(loaded.correct(noisy)), label_matrix(clean))
    # What it says of the clean labels is compared with the data set's.
    rows["class"][1:3] = ["dog", "tree"]
    pq.write_table(pa.table(rows).replace_schema_metadata({b"noise_map": json.dumps({"class_names": NAMES})}), path)
    with pytest.raises(ValueError, match=r"image_id 'b\.jpg', whose label 'dog' is 0 instead of 1"):
        load_noise_map(path).apply(clean)


def test_a_folder_whose_noise_map_is_a_link_out_of_it(tmp_path):
    _, _, path = small_map(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "noise_map.parquet").symlink_to(path)
    with pytest.raises(ValueError, match="leads out of it"):
        load_noise_map(tmp_path / "folder")
    expected = load_noise_map(path)
    assert load_noise_map(tmp_path / "folder", follow_links=True) == expected
    assert load_noise_map(tmp_path / "folder" / "noise_map.parquet") == expected  # named by the user


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("no/such/file.parquet", "-", str(tmp_path / "map.parquet")):
        with pytest.raises(FileNotFoundError, match="is neither a file here nor a data set repository on the Hub"):
            load_noise_map(name)
