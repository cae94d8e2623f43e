"""The data of `run_multilabel.py` and `balancemix train`: what is loaded, and what wrong names are told."""

from __future__ import annotations

import io
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix.data import class_names, given_labels
from hf_balancemix.scripts.data import AnyData
from hf_balancemix.scripts.predict import image_files


@pytest.fixture
def tags(tmp_path) -> Dataset:
    rng = np.random.default_rng(0)
    images = []
    for i in range(20):
        PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
        images.append(str(tmp_path / f"{i}.png"))
    columns = {"photo": images, "tags": [["cat"], ["dog", "cat"]] * 10, "patient": [i // 2 for i in range(20)]}
    features = Features({"photo": Image(), "tags": List(Value("string")), "patient": Value("int64")})
    return Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("form", ["one", "splits"])
def test_what_save_to_disk_wrote(tags, tmp_path, form):
    (tags if form == "one" else DatasetDict(train=tags)).save_to_disk(tmp_path / "saved")
    data = AnyData(dataset_name=str(tmp_path / "saved"), image_column="photo", label_column="tags", held_out=0.3)
    train, evaluation = data.load(0)
    assert (len(train), len(evaluation), class_names(train)) == (14, 6, ["cat", "dog"])
    data.group_column = "patient"
    train, evaluation = data.load(0)
    assert set(train["patient"]).isdisjoint(evaluation["patient"])
    data.train_split = "test"
    found = "a folder of one saved data set has no splits" if form == "one" else "has train; choose one of these"
    with pytest.raises(ValueError, match=f"the split is 'test'; .*{found}"):
        data.load(0)


def test_wrong_names_are_one_sentence_with_what_there_is(tags, tmp_path):
    folder = str(tmp_path / "saved")
    tags.save_to_disk(folder)
    for wrong, message in (
        ({"label_column": "tag"}, r"label_column is 'tag', and the columns of the data set are \['photo', 'tags'"),
        ({"image_column": "img"}, "image_column is 'img'"),
        ({"group_column": "person"}, "group_column is 'person'"),
        ({"dataset_config": "small"}, "dataset_config is 'small'; a folder of save_to_disk has none"),
        ({"label_column": "tags", "class_names": ["cat"]}, "has 'dog'; it must be one of the 1 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            AnyData(dataset_name=folder, **{"image_column": "photo"} | wrong).load(0)
    for wrong, message in (
        ({"suffix": ".jpg"}, "suffix is '.jpg'; with a data set by --dataset_name it has no effect"),
        ({"train_csv": "a.csv"}, "train_csv is 'a.csv'; with a data set"),
        ({"held_out": 1.0}, "held_out is 1.0; it must be a share"),
        ({"group_column": "patient", "eval_split": "val"}, "group_column is 'patient'; it must be left out where"),
    ):
        with pytest.raises(ValueError, match=message):
            AnyData(dataset_name=folder, **wrong)
    with pytest.raises(ValueError, match="objects_column is 'o'; with a folder with a CSV it has no effect"):
        AnyData(train_dir=folder, objects_column="o")


def test_a_folder_of_images_its_wrong_split_and_a_data_set_that_is_not_there(tags, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "{i}.png", "tags": ["a"]}}\n' for i in range(4)))
    for i in range(4):
        (tmp_path / f"{i}.png").rename(folder / f"{i}.png")
    data = AnyData(dataset_name=str(folder), label_column="tags", held_out=0.25)
    assert [len(part) for part in data.load(0)] == [3, 1]
    for wrong, error, message in (
        ({"train_split": "val"}, ValueError, r"Unknown split .val.. Should be one of \['train'\]; correct"),
        ({"dataset_config": "small"}, ValueError, r"'small' not found. Available: \['default'\]; correct"),
        (
            {"dataset_name": str(tmp_path / "none")},
            FileNotFoundError,
            "the data set .*none' .* cannot be loaded: Couldn't",
        ),
    ):
        with pytest.raises(error, match=message):
            AnyData(**{"dataset_name": str(folder)} | wrong).load(0)


def test_a_data_set_that_the_hub_cannot_give(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'a/b' .*cannot be loaded: Couldn't reach 'a/b' on the Hub; correct"):
        AnyData(dataset_name="a/b").load(0)


def test_every_argument_of_from_csv_is_a_flag(tags, tmp_path):
    (tmp_path / "labels.csv").write_text(
        "photo;who;age;cat;dog\n" + "".join(f"{i};p{i // 2};40;{i % 2};{'' if i else -1}\n" for i in range(20))
    )
    data = AnyData(
        train_dir=str(tmp_path), image_column="photo", suffix=".png", delimiter=";", class_names=["dog", "cat"],
        unknown="masked", blank="negative", group_column="who", held_out=0.5,
    )  # fmt: skip
    train, evaluation = data.load(0)
    assert class_names(train) == ["dog", "cat"]
    assert set(train["who"]).isdisjoint(evaluation["who"])
    assert sum((given_labels(part) < 0).sum().item() for part in (train, evaluation)) == 1
    (tmp_path / "ids.csv").write_text("file_name,ids\n" + "".join(f"{i}.png,[{i % 2}]\n" for i in range(20)))
    data = AnyData(
        train_dir=str(tmp_path), train_csv=str(tmp_path / "ids.csv"), label_column="ids", class_ids=True,
        class_names=["dog", "cat"], eval_dir=str(tmp_path), eval_csv=str(tmp_path / "ids.csv"),
    )  # fmt: skip
    assert data.load(0)[1]["labels"][:3] == [[0], [1], [0]]


def test_a_data_set_with_zeros_and_ones_trains_with_names_ids_and_what_is_unknown(tags, tmp_path):
    rows = [[1.0, 0.0, -1.0], [0.0, 1.0, float("nan")]] * 10
    dataset = tags.remove_columns("tags").add_column("labels", rows).add_column("image", tags["patient"][:])
    dataset.save_to_disk(tmp_path / "saved")
    for column, names in (("labels", ["LABEL_0", "LABEL_1", "LABEL_2"]), ("labels", ["x", "y", "z"])):
        data = AnyData(
            dataset_name=str(tmp_path / "saved"), image_column="photo", held_out=0.5,
            class_names=names if names[0] == "x" else None,
        )  # fmt: skip
        for part in data.load(0):
            assert class_names(part) == names
            assert (given_labels(part)[:, 2] == -1).all()
            assert part["image_id"][:]
            assert sorted(map(sum, given_labels(part).tolist())) == [0] * 10
        data.label_column = column
        assert class_names(data.load(0)[0]) == names


def test_evaluation_labels_of_the_same_folder_and_arguments_without_effect(tags, tmp_path):
    (tmp_path / "labels.csv").write_text("file_name,tags\n" + "".join(f"{i}.png,a|b\n" for i in range(20)))
    (tmp_path / "eval.csv").write_text("file_name,tags\n0.png,b\n")
    folder = {"train_dir": str(tmp_path), "label_column": "tags", "separator": "|"}
    assert AnyData(**folder, eval_csv=str(tmp_path / "eval.csv")).load(0)[1]["labels"][:] == [[1]]
    for wrong, message in (
        (folder | {"eval_csv": "e.csv", "held_out": 0.2}, "held_out is 0.2; with evaluation data it has no effect"),
        (folder | {"label_column": None}, "separator is '|'; without label_column it has no effect"),
        ({"dataset_name": "a", "category_field": "c"}, "category_field is 'c'; without objects_column"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            AnyData(**wrong)


def test_the_configurations_that_there_are(monkeypatch):
    def several(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", several)
    with pytest.raises(ValueError, match=r"configs: \['en', 'de'\]; correct --dataset_name"):
        AnyData(dataset_name="a/b").load(0)


def test_a_local_data_set_whose_links_lead_out_of_it_needs_follow_links(tags, tmp_path):
    folder = tmp_path / "photos"
    (folder / "train" / "ant").mkdir(parents=True)
    (tmp_path / "elsewhere.png").write_bytes(_png())
    (folder / "train" / "ant" / "0.png").symlink_to(tmp_path / "elsewhere.png")
    for options in ({"dataset_name": str(folder)}, {"train_dir": str(folder)}):
        if "train_dir" in options:
            (folder / "labels.csv").write_text("file_name,ant\ntrain/ant/0.png,1\n")
        with pytest.raises(ValueError, match=r"ant/0\.png' in .* leads out of it.*--follow_links"):
            AnyData(**options).load_to_audit(0)
    linked = AnyData(train_dir=str(folder), eval_dir=str(folder), follow_links=True).load(0)[0]
    assert linked["labels"][:] == [[0]]


@pytest.mark.parametrize("path", ["/etc/hostname", "elsewhere.png", "../elsewhere.png"])
def test_a_data_set_that_names_files_elsewhere_opens_none_of_them(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere.png").write_bytes(_png())
    (tmp_path / "set").mkdir()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": _png(), "path": "a.png"}, {"bytes": None, "path": path}], kind)
    pq.write_table(pa.table({"image": images, "tags": [["a"], ["b"]]}), tmp_path / "set" / "train.parquet")
    data = {"dataset_name": str(tmp_path / "set"), "label_column": "tags", "held_out": 0.5}
    monkeypatch.setattr(datasets, "load_dataset", _with_images(datasets.load_dataset))
    with pytest.raises(ValueError, match=r"in .*set leads out of it"):
        AnyData(**data).load_to_audit(0)
    assert len(AnyData(**data, follow_links=True).load_to_audit(0)) == 2


def _with_images(load):
    return lambda *args, **options: load(*args, **options).cast_column("image", Image())


def test_predict_reads_no_image_through_a_link_out_of_its_folder(tmp_path):
    (tmp_path / "images" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere.png").write_bytes(_png())
    (tmp_path / "images" / "a.png").write_bytes(_png())
    (tmp_path / "images" / "b.png").symlink_to("a.png")
    assert [file.name for file in image_files(tmp_path / "images")[0]] == ["a.png", "b.png"]
    (tmp_path / "images" / "inner" / "c.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match=r"inner/c\.png' in .* leads out of it"):
        image_files(tmp_path / "images")
    assert len(image_files(tmp_path / "images", follow_links=True)[0]) == 3


def _png() -> bytes:
    stream = io.BytesIO()
    PILImage.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()
