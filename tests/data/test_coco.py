"""The COCO loader on a tiny data set in the official layout, on what can be wrong with one, and on real COCO."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix.data.coco import load_coco
from hf_balancemix.data.labels import class_names, given_labels, label_matrix

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))


def content() -> dict:
    """Categories out of order, a crowd annotation, repeated classes, an image without annotation."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 30, "file_name": "c.jpg"},
            {"id": 10, "file_name": "a.jpg"},
            {"id": 20, "file_name": "b.jpg"},
            {"id": 40, "file_name": "d.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "iscrowd": 0, "segmentation": [[0, 0, 1, 1]]},
            {"id": 2, "image_id": 10, "category_id": 7, "iscrowd": 0},
            {"id": 3, "image_id": 10, "category_id": 2, "iscrowd": 1},
            {"id": 4, "image_id": 30, "category_id": 90, "iscrowd": 0},
            {"id": 5, "image_id": 40, "category_id": 2, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "car"}, {"id": 2, "name": "dog"}, {"id": 7, "name": "cat"}],
    }


def write(root: Path, content: dict, split: str = "train", year: int = 2017) -> Path:
    folder = root / f"{split}{year}"
    folder.mkdir(parents=True)
    for color, image in enumerate(content["images"]):
        path = folder / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L" if color else "RGB", (8, 8), 60 * color).save(path)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}{year}.json").write_text(json.dumps(content))
    return root


def rewrite(root: Path, content: object) -> None:
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "coco", content())


def test_columns_classes_and_labels(root):
    dataset = load_coco(root)
    assert dataset.features == {
        "image": Image(mode="RGB"),
        "labels": List(ClassLabel(names=["dog", "cat", "car"])),
        "image_id": Value("int64"),
    }
    assert dataset["image_id"][:] == [30, 10, 40]  # the JSON's order, 20 has no annotation
    assert dataset["labels"][:] == [[2], [0, 1], [0]]
    assert (dataset.info.dataset_name, dataset.split) == ("coco (not the official set)", "train")


def test_images_are_decoded_to_rgb_on_access_only(root):
    dataset = load_coco(root)
    assert [(row["image"].mode, row["image"].size) for row in dataset] == [("RGB", (8, 8))] * 3
    (root / "train2017" / "c.jpg").write_bytes(b"\xff\xd8 cut off")
    dataset = load_coco(root)
    assert label_matrix(dataset).tolist() == [[0, 0, 1], [1, 1, 0], [1, 0, 0]]
    with pytest.raises(OSError, match="identify"):
        dataset[0]


def test_keep_unlabelled(root):
    dataset = load_coco(root, keep_unlabelled=True)
    assert dataset["image_id"][:] == [30, 10, 20, 40]
    assert dataset["labels"][:] == [[2], [0, 1], [], [0]]


@pytest.mark.parametrize(("split", "year"), [("val", 2017), ("train", 2014), ("val", 2014)])
def test_other_splits_and_years(tmp_path, split, year):
    document = content()
    for image in document["images"]:
        image["file_name"] = f"COCO_{split}{year}_{image['id']:012d}.jpg"
    dataset = load_coco(str(write(tmp_path, document, split, year)), split=split, year=year)
    assert dataset["labels"][:] == [[2], [0, 1], [0]]
    assert dataset[0]["image"].size == (8, 8)


def test_string_ids_and_nested_file_names(tmp_path):
    document = content()
    for image in document["images"]:
        image.update(id=f"img{image['id']}", file_name=f"{image['id']}/{image['file_name']}")
    for annotation in document["annotations"]:
        annotation["image_id"] = f"img{annotation['image_id']}"
    dataset = load_coco(write(tmp_path, document))
    assert dataset.features["image_id"] == Value("string")
    assert dataset["image_id"][:] == ["img30", "img10", "img40"]
    assert dataset[1]["image"].size == (8, 8)


def test_relative_root_survives_a_change_of_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_coco("coco")
    monkeypatch.chdir("/")
    assert dataset[0]["image"].size == (8, 8)


def test_same_files_same_fingerprint_changed_file_changed_rows(root):
    first = load_coco(root)
    assert load_coco(root)._fingerprint == first._fingerprint
    document = content()
    document["annotations"].pop()
    rewrite(root, document)
    second = load_coco(root)
    assert second["image_id"][:] == [30, 10]
    assert second._fingerprint != first._fingerprint


# What can be wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, r"split is 'validation'; it must be one of 'train', 'val'"),
        ({"split": "test"}, r"split is 'test'; it must be one of 'train', 'val'"),
        ({"year": 2015}, r"year is 2015; it must be one of 2014, 2017"),
        ({"on_bad_image": "ignore"}, r"on_bad_image is 'ignore'; it must be one of 'error', 'skip'"),
    ],
)
def test_wrong_arguments(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_coco(root, **arguments)


@pytest.mark.parametrize(
    ("take_away", "message"),
    [
        ("", r"no folder .*coco\."),
        ("train2017", r"no image folder .*train2017\."),
        ("annotations/instances_train2017.json", r"no annotation file .*instances_train2017\.json\."),
    ],
)
def test_missing_parts_show_the_expected_tree(root, take_away, message):
    (root / take_away).rename(root.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_coco(root)
    assert f"{root}/\n    annotations/instances_train2017.json\n    train2017/" in str(caught.value)


def test_annotation_file_cut_off(root):
    file = root / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text()[:200])
    with pytest.raises(
        ValueError, match=r"instances_train2017\.json is not valid JSON at line 1, column \d+ .*cut off"
    ):
        load_coco(root)
    file.write_text("")
    with pytest.raises(ValueError, match="line 1, column 1"):
        load_coco(root)
    file.write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match="is not Unicode text"):
        load_coco(root)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda c: [c], "images"),
        (lambda c: None, "images"),
        (lambda c: {**c, "images": {}}, "images"),
        (lambda c: {k: v for k, v in c.items() if k != "annotations"}, "annotations"),
        (lambda c: {k: v for k, v in c.items() if k != "categories"}, "categories"),
    ],
)
def test_not_an_instances_file(root, change, missing):
    rewrite(root, change(content()))
    with pytest.raises(ValueError, match=rf"instances_train2017\.json has no list '{missing}'"):
        load_coco(root)


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "..\\a.jpg", "C:\\a.jpg", "", "x/", "a\0"]
)
def test_file_names_that_leave_the_folder(root, name):
    document = content()
    document["images"][2]["file_name"] = name  # an image without annotation is checked as well
    rewrite(root, document)
    with pytest.raises(
        ValueError, match=r"images\[2\]: the file_name is .*; it must be a plain path inside the image folder"
    ):
        load_coco(root)


@pytest.mark.parametrize(
    ("part", "index", "update", "message"),
    [
        ("images", 2, {"id": 10}, r"images\[2\] has the id 10 a second time"),
        ("images", 2, {"id": "20"}, r"images\[0\] has the id 30 and images\[2\] '20'.*all integers or all strings"),
        ("images", 2, {"id": 20.0}, r"images\[2\] has the id 20\.0; it must be an integer or a string"),
        ("images", 2, {"file_name": None}, r"images\[2\] has the file_name None; it must be a string"),
        ("annotations", 3, {"image_id": 31}, r"annotations\[3\] has the image_id 31; it must be in 'images'"),
        (
            "annotations",
            3,
            {"image_id": [30]},
            r"annotations\[3\] has the image_id \[30\]; it must be an integer or a string",
        ),
        ("annotations", 3, {"category_id": 3}, r"annotations\[3\] has the category_id 3; .*3 ids, 2 to 90"),
        (
            "annotations",
            3,
            {"category_id": None},
            r"annotations\[3\] has the category_id None; it must be an integer or a string",
        ),
        ("categories", 2, {"name": "dog"}, r"categories 2 and 7 are both named 'dog'"),
        ("categories", 2, {"id": 90}, r"categories\[2\] has the id 90 a second time"),
        ("categories", 2, {"name": 5}, r"categories\[2\] has the name 5; it must be a string"),
    ],
)
def test_records_that_contradict_the_file(root, part, index, update, message):
    document = content()
    document[part][index].update(update)
    rewrite(root, document)
    with pytest.raises(ValueError, match=rf"instances_train2017\.json: {message}"):
        load_coco(root)


def test_records_of_another_shape(root):
    document = content()
    document["annotations"][1] = 5
    rewrite(root, document)
    with pytest.raises(ValueError, match=r"annotations\[1\] is 5; it must be an object with the image_id"):
        load_coco(root)


def test_nothing_to_learn_from(root):
    rewrite(root, {**content(), "categories": [], "annotations": []})
    with pytest.raises(ValueError, match="'categories' is empty"):
        load_coco(root)
    rewrite(root, {**content(), "annotations": []})
    with pytest.raises(ValueError, match=r"none of the 4 images has an annotation.*keep_unlabelled=True"):
        load_coco(root)
    assert len(load_coco(root, keep_unlabelled=True)) == 4


def test_absent_images(root, caplog):
    (root / "train2017" / "a.jpg").unlink()
    (root / "train2017" / "b.jpg").unlink()  # has no annotation, so it is not needed
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images listed in .*train2017: a\.jpg\..*on_bad_image='skip'"):
        load_coco(root)
    with pytest.raises(FileNotFoundError, match=r"2 of 4 images .*: a\.jpg, b\.jpg\."):
        load_coco(root, keep_unlabelled=True)
    with caplog.at_level(logging.WARNING):
        dataset = load_coco(root, on_bad_image="skip")
    assert dataset["image_id"][:] == [30, 40]
    assert "1 of 3 images" in caplog.text
    assert "a.jpg" in caplog.text


def test_a_folder_in_the_place_of_an_image_is_absent(root):
    (root / "train2017" / "a.jpg").unlink()
    (root / "train2017" / "a.jpg").mkdir()
    with pytest.raises(FileNotFoundError, match="1 of 3 images"):
        load_coco(root)


def test_all_images_absent_is_an_error_also_when_skipping(root):
    for file in (root / "train2017").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"3 of 3 images .*: c\.jpg, a\.jpg, d\.jpg\."):
        load_coco(root, on_bad_image="skip")


# Real COCO

# what tools export


def export(root: Path, json_file: str, image_folder: str, document: dict, encoding: str = "utf-8") -> Path:
    """The images of a document and its JSON, wherever a tool puts them."""
    for color, image in enumerate(document["images"]):
        path = root / image_folder / image.get("file_name", image.get("coco_url", "").split("org/")[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (8, 8), (60 * color, 0, 0)).save(path)
    (root / json_file).parent.mkdir(parents=True, exist_ok=True)
    (root / json_file).write_text(json.dumps(document), encoding=encoding)
    return root


@pytest.mark.parametrize(
    ("json_file", "image_folder", "split"),
    [
        ("train/_annotations.coco.json", "train", "train"),  # Roboflow
        ("valid/_annotations.coco.json", "valid", "val"),
        ("Train/_annotations.coco.json", "Train", "train"),
        ("_annotations.coco.json", "", "train"),
        ("annotations/instances_default.json", "images", "train"),  # CVAT
        ("annotations/instances_default.json", "images/default", "train"),
        ("annotations/instances_Validation.json", "images/Validation", "val"),
        ("result.json", "images", "train"),  # Label Studio
        ("train.json", "train", "train"),
        ("annotations/val.json", "images/val", "val"),
    ],
)
def test_layouts_of_tools_are_found(tmp_path, json_file, image_folder, split):
    root = export(tmp_path / "export", json_file, image_folder, content())
    found = load_coco(root, split=split)
    assert found["image_id"][:] == [30, 10, 40]
    assert found[1]["image"].getpixel((0, 0)) == (60, 0, 0)
    other = "val" if split == "train" else "train"  # what names one split, or none, is never the other's data, too
    with pytest.raises(
        FileNotFoundError, match=rf"(?s)no annotation file .*{Path(json_file).name}.*pass annotations= and images="
    ):
        load_coco(root, split=other)
    named = load_coco(root, split=other, annotations=json_file, images=image_folder or ".")
    assert named["labels"][:] == found["labels"][:]


def test_file_and_folder_by_name_and_more_than_one_candidate(tmp_path):
    root = export(tmp_path / "export", "a.json", "pictures", content())
    with pytest.raises(FileNotFoundError, match=r"a\.json lists 'c\.jpg', which is in none of .*pass its folder"):
        load_coco(root)
    assert len(load_coco(root, images="pictures")) == 3
    (root / "b.json").write_text((root / "a.json").read_text())
    with pytest.raises(ValueError, match=r"has 2 files that could be meant: a\.json, b\.json; pass one: annotations="):
        load_coco(root, images="pictures")
    elsewhere = load_coco(tmp_path, annotations=root / "b.json", images=root / "pictures")
    assert len(elsewhere) == 3
    for wrong, message in (
        ({"annotations": "c.json"}, "annotations is .*c.json"),
        ({"images": "x"}, "images is .*x;"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_coco(root, **{"annotations": "a.json"} | wrong)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    root = export(tmp_path / "export", "train.json", "train", content(), encoding)
    assert len(load_coco(root)) == 3


def test_backslashes_of_windows_are_read(tmp_path):
    document = content()
    root = export(tmp_path / "export", "result.json", "", document)
    for image in document["images"]:
        (root / "images").mkdir(exist_ok=True)
        (root / image["file_name"]).rename(root / "images" / image["file_name"])
        image["file_name"] = f"images\\{image['file_name']}"
    (root / "result.json").write_text(json.dumps(document))
    assert load_coco(root)[0]["image"].size == (8, 8)


def test_the_unused_supercategory_of_all_is_no_class(tmp_path, caplog):
    document = content()
    for category in document["categories"]:
        category["supercategory"] = "things"
    document["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    with caplog.at_level(logging.INFO, logger="hf_balancemix"):
        found = load_coco(export(tmp_path / "a", "train.json", "train", document))
    assert class_names(found) == ["dog", "cat", "car"]
    assert "category 0, 'things', is the supercategory of all others and no annotation uses it" in caplog.text
    same_name = content() | {"categories": [{"id": 2, "name": "pet", "supercategory": "pet"}]}
    same_name["annotations"] = [{"image_id": 10, "category_id": 2}]
    same_name["categories"].append({"id": 0, "name": "pet", "supercategory": "none"})
    assert class_names(load_coco(export(tmp_path / "b", "train.json", "train", same_name))) == ["pet"]
    document["annotations"].append({"image_id": 10, "category_id": 0})
    assert class_names(load_coco(export(tmp_path / "c", "train.json", "train", document)))[0] == "things"
    document["annotations"][-1]["category_id"] = [0]
    for category in document["categories"]:
        category["supercategory"] = ["things"]
    with pytest.raises(
        ValueError, match=r"annotations\[5\] has the category_id \[0\]; it must be an integer or a str"
    ):
        load_coco(export(tmp_path / "e", "train.json", "train", document))
    plain = content()  # an unused class is a class: in a small part of COCO many have no annotation
    plain["categories"] += [{"id": 95, "name": "vase", "supercategory": "indoor"}]
    assert len(class_names(load_coco(export(tmp_path / "d", "train.json", "train", plain)))) == 4


def test_lvis_lists_what_was_looked_for_in_vain(tmp_path):
    document = content()
    for image, absent in zip(document["images"], ([2], [90], [2, 7], []), strict=True):
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": absent, "not_exhaustive_category_ids": [7]}
    root = export(tmp_path / "lvis", "annotations/lvis_v1_train.json", "", document)
    found = load_coco(root)
    assert (class_names(found), found["image_id"][:]) == (["dog", "cat", "car"], [30, 10, 40])
    assert given_labels(found).tolist() == [[0, -1, 1], [1, 1, 0], [1, -1, -1]]
    (root / "images").mkdir(exist_ok=True)
    for file in [*root.rglob("*.jpg")]:
        file.rename(root / "images" / file.name)  # the folder of the URL is not there
    assert given_labels(load_coco(root, images="images")).tolist() == given_labels(found).tolist()
    document["images"][0]["neg_category_ids"] = [[2]]
    (root / "annotations" / "lvis_v1_train.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"images\[0\] has the neg_category_ids \[\[2\]\]"):
        load_coco(root, images="images")
    document["images"][0]["neg_category_ids"] = [1]
    (root / "annotations" / "lvis_v1_train.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"images\[0\] has the neg_category_ids \[1\]"):
        load_coco(root, images="images")


@pytest.mark.skipif(not (DATA / "coco_sample").is_dir(), reason="BALANCEMIX_DATA has no coco_sample")
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_equals_an_independent_count(split):
    dataset = load_coco(DATA / "coco_sample", split=split)
    document = json.loads((DATA / "coco_sample" / "annotations" / f"instances_{split}2017.json").read_text())
    name_of = {category["id"]: category["name"] for category in document["categories"]}
    assert class_names(dataset) == [name_of[k] for k in sorted(name_of)]
    assert len(dataset) == len({a["image_id"] for a in document["annotations"]})

    pairs = {(a["image_id"], name_of[a["category_id"]]) for a in document["annotations"]}
    names = class_names(dataset)
    found = {
        (image_id, names[k]) for image_id, ids in zip(dataset["image_id"], dataset["labels"], strict=True) for k in ids
    }
    assert found == pairs
    assert dict(zip(names, label_matrix(dataset).sum(0).tolist(), strict=True)) == {
        name: Counter(name for _, name in pairs)[name] for name in names
    }
    assert dataset[0]["image"].mode == "RGB"
