"""Detection sets, tags and CSV files to the package's columns; what can be wrong with each."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix import describe
from hf_balancemix.data.adapters import from_csv, from_detection, from_tags
from hf_balancemix.data.coco import load_coco
from hf_balancemix.data.labels import class_names, label_matrix

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))
STRINGS = List(Value("string"))
CLASSES = List(ClassLabel(names=["dog", "cat", "ant"]))


def draw(folder: Path, *names: str) -> list[str]:
    """Images on disk."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (6, 5), (40 * number, 0, 0)).save(folder / name)
    return [str(folder / name) for name in names]


@pytest.fixture
def images(tmp_path) -> list[str]:
    return draw(tmp_path / "images", "a.png", "b.png", "c.png")


def make(images: list[str], feature: object, values: list, column: str = "tags", **ids) -> Dataset:
    features = {"image": Image(), column: feature} | {name: Value(kind) for name, (kind, _) in ids.items()}
    columns = {"image": images, column: values} | {name: column for name, (_, column) in ids.items()}
    return Dataset.from_dict(columns, features=Features(features))


def named_labels(dataset: Dataset) -> list[set[str]]:
    names = class_names(dataset)
    return [{names[k] for k in row} for row in dataset["labels"]]


# from_detection

BOX = [0.0, 0.0, 2.0, 2.0]
DICT_OF_LISTS = {"bbox": List(List(Value("float32"), length=4)), "category": CLASSES}
LIST_OF_DICTS = List({"bbox": List(Value("float32"), length=4), "category": CLASSES.feature})


def objects(*categories: list, form: str) -> list:
    if form == "dict of lists":
        return [{"bbox": [BOX] * len(row), "category": row} for row in categories]
    return [[{"bbox": BOX, "category": category} for category in row] for row in categories]


@pytest.mark.parametrize(("form", "feature"), [("dict of lists", DICT_OF_LISTS), ("list of dicts", LIST_OF_DICTS)])
def test_detection_sets_of_both_forms(images, form, feature):
    dataset = make(images, feature, objects([1, 1, 0], [], [2], form=form), "objects")
    found = from_detection(dataset)
    assert found.features == {"image": Image(), "labels": CLASSES, "image_id": Value("string")}
    assert found["labels"][:] == [[0, 1], [], [2]]
    assert found["image_id"][:] == ["a.png", "b.png", "c.png"]
    assert found[2]["image"].getpixel((0, 0)) == (80, 0, 0)


@pytest.mark.parametrize(("form", "feature"), [("dict of lists", DICT_OF_LISTS), ("list of dicts", LIST_OF_DICTS)])
def test_detection_follows_selected_and_shuffled_rows(images, form, feature):
    dataset = make(images, feature, objects([1, 1, 0], [], [2], form=form), "objects")
    twice = datasets.concatenate_datasets([dataset, dataset.select([2, 0])])
    assert from_detection(twice)["labels"][:] == [[0, 1], [], [2], [2], [0, 1]]
    for rows in ([2, 0], [1, 2], [0, 2, 1]):
        found = from_detection(dataset.select(rows))
        assert found["labels"][:] == [[[0, 1], [], [2]][row] for row in rows]
        assert found["image_id"][:] == [["a.png", "b.png", "c.png"][row] for row in rows]
        assert [row["image"].getpixel((0, 0))[0] // 40 for row in found] == rows


def test_detection_with_strings_integers_and_other_names_of_columns(images):
    strings = {"label": List(Value("string"))}
    dataset = make(images, strings, [{"label": ["pear", "fig"]}, {"label": []}, {"label": ["fig"]}], "things")
    found = from_detection(dataset, objects="things", category="label")
    assert class_names(found) == ["fig", "pear"]
    assert found["labels"][:] == [[0, 1], [], [0]]
    integers = {"label": List(Value("int64"))}
    dataset = make(images, integers, [{"label": [1, 0, 1]}, {"label": []}, {"label": [2]}], "things")
    found = from_detection(dataset, objects="things", category="label", names=["x", "y", "z"])
    assert named_labels(found) == [{"x", "y"}, set(), {"z"}]
    with pytest.raises(ValueError, match="the classes are int64 ids; they must have names"):
        from_detection(dataset, objects="things", category="label")
    with pytest.raises(ValueError, match="row 2 has 2; it must be a class id, a whole number from 0 to 1"):
        from_detection(dataset, objects="things", category="label", names=["x", "y"])


def test_names_reorder_the_classes_of_a_class_label(images):
    dataset = make(images, DICT_OF_LISTS, objects([1, 0], [], [2], form="dict of lists"), "objects")
    found = from_detection(dataset, names=["ant", "bee", "cat", "dog"])
    assert found["labels"][:] == [[2, 3], [], [0]]
    with pytest.raises(
        ValueError, match=r"column 'objects', field 'category', row 2 has 'ant'; it must be one of the 2 classes"
    ):
        from_detection(dataset, names=["cat", "dog"])
    assert from_detection(dataset.select([0, 1]), names=["cat", "dog"])["labels"][:] == [[0, 1], []]


def test_hostile_detection_sets(images):
    good = objects([1], [], [2], form="dict of lists")
    dataset = make(images, DICT_OF_LISTS, good, "objects")
    with pytest.raises(ValueError, match=r"columns are \['image', 'objects'\]; 'things' must be among them"):
        from_detection(dataset, objects="things")
    with pytest.raises(ValueError, match=r"the fields \['bbox', 'category'\]; 'label' must be among them.*category="):
        from_detection(dataset, category="label")
    with pytest.raises(TypeError, match=r"field 'bbox': a class is of the type List.*; it must be a string"):
        from_detection(dataset, category="bbox")
    with pytest.raises(TypeError, match=r"a dict of lists or a list of dicts.*use from_tags\(dataset, column='tags'"):
        from_detection(make(images, STRINGS, [["a"], [], []]), objects="tags")
    with pytest.raises(ValueError, match="row 1 is None; it must be a list of class names"):
        from_detection(make(images, LIST_OF_DICTS, [[], None, []], "objects"))
    with pytest.raises(ValueError, match="row 1 is None; it must be a list of class names"):
        from_detection(make(images, DICT_OF_LISTS, [good[0], None, good[2]], "objects"))
    with pytest.raises(ValueError, match="row 0 has None; it must be a class id"):
        from_detection(make(images, DICT_OF_LISTS, objects([None], [], [], form="dict of lists"), "objects"))
    with pytest.raises(TypeError, match=r"is a DatasetDict; it must be a datasets\.Dataset"):
        from_detection(datasets.DatasetDict(train=dataset))
    with pytest.raises(ValueError, match=r"columns are \['img', 'objects'\]; 'image' must be among them"):
        from_detection(dataset.rename_column("image", "img"))


# from_tags


def test_tags_as_lists_of_strings_class_labels_ids_and_split_strings(images):
    expected = [{"cat", "dog"}, set(), {"ant"}]
    for feature, values, arguments in (
        (STRINGS, [["dog", "cat", "dog"], [], ["ant"]], {}),
        (CLASSES, [[1, 0], [], [2]], {}),
        (List(Value("int32")), [[1, 0], [], [2]], {"names": ["dog", "cat", "ant"]}),
        (Value("string"), ["dog, cat,", "", " ant "], {"separator": ","}),
        (Value("large_string"), ["dog cat", " ", "ant"], {"separator": " "}),
    ):
        found = from_tags(make(images, feature, values), **arguments)
        assert named_labels(found) == expected
        assert found.column_names == ["image", "labels", "image_id"]
    assert class_names(from_tags(make(images, STRINGS, [["b"], ["c"], ["a"]]))) == ["a", "b", "c"]


def test_names_fix_the_order_and_what_is_outside_is_an_error(images):
    dataset = make(images, STRINGS, [["dog"], [], ["ant", "cat"]], "keywords")
    found = from_tags(dataset, "keywords", names=["emu", "dog", "cat", "ant"])
    assert class_names(found) == ["emu", "dog", "cat", "ant"]
    assert found["labels"][:] == [[1], [], [2, 3]]
    with pytest.raises(
        ValueError, match="column 'keywords', row 2 has 'ant'; it must be one of the 2 classes 'cat', 'dog'"
    ):
        from_tags(dataset, "keywords", names=["cat", "dog"])
    with pytest.raises(ValueError, match="names has 'cat' more than once"):
        from_tags(dataset, "keywords", names=["cat", "dog", "cat"])
    for wrong in ("cat", [], ["cat", ""], ["cat", 3]):
        with pytest.raises(TypeError, match=r"names is .*; it must be a list of class names"):
            from_tags(dataset, "keywords", names=wrong)


@pytest.mark.parametrize(
    ("feature", "values", "arguments", "error", "message"),
    [
        (STRINGS, [["a"], None, []], {}, ValueError, "row 1 is None; it must be a list of class names"),
        (
            STRINGS,
            [["a"], ["a", None], []],
            {},
            ValueError,
            r"row 1 is \['a', None\]; it must be a list of class names",
        ),
        (STRINGS, [["a"], ["a", ""], []], {}, ValueError, r"row 1 is \['a', ''\]; it must be a list of class names"),
        (STRINGS, [[], [], []], {}, ValueError, "row 0 and all after are without a class"),
        (
            STRINGS,
            [["a"], [], []],
            {"separator": ","},
            ValueError,
            r"separator is ',' .*; it must be .* None for lists",
        ),
        (Value("string"), ["a", "b", None], {"separator": ","}, ValueError, "row 2 is None; it must be a list"),
        (Value("string"), ["a", "b", "c"], {}, ValueError, r"separator is None .*pass separator=','"),
        (
            Value("int64"),
            [1, 2, 3],
            {},
            TypeError,
            "column 'tags': a class is of the type None; it must be a string, a ClassLabel or an integer id",
        ),
        (
            List(Value("float32")),
            [[1], [2], [3]],
            {},
            TypeError,
            r"column 'tags': a class is of the type Value\('float32'\)",
        ),
        (STRINGS, [["a"], [], []], {"column": "labels"}, ValueError, "'labels' must be among them"),
    ],
)
def test_hostile_tags(images, feature, values, arguments, error, message):
    with pytest.raises(error, match=message):
        from_tags(make(images, feature, values), **arguments)


# image_id of a Dataset


def test_image_ids_are_kept(images):
    for kind, ids in (("int64", [7, 3, 5]), ("string", ["x", "y", "007"])):
        found = from_tags(make(images, STRINGS, [["a"], [], []], image_id=(kind, ids)))
        assert found["image_id"][:] == ids
        assert found.features["image_id"] == Value(kind)


def test_without_ids_and_own_file_names_rows_are_numbered(tmp_path, caplog):
    paths = draw(tmp_path, "x/a.png", "y/a.png")
    with caplog.at_level(logging.WARNING):
        assert from_tags(make(paths, STRINGS, [["a"], []]))["image_id"][:] == [0, 1]
    assert "Not every row has a file name of its own" in caplog.text
    caplog.clear()
    embedded = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    assert from_tags(make(embedded, STRINGS, [["a"], []]))["image_id"][:] == [0, 1]
    assert not caplog.text
    archived = [image | {"path": f"zip://{i}.png::/x/all.zip"} for i, image in enumerate(embedded)]
    assert from_tags(make(archived, STRINGS, [["a"], []]))["image_id"][:] == ["0.png", "1.png"]


def test_hostile_image_ids_and_images(images):
    rows = [["a"], [], []]
    with pytest.raises(
        ValueError, match=r"image_id '4' occurs 2 times in the data set; it must be unique.*remove_columns"
    ):
        from_tags(make(images, STRINGS, rows, image_id=("int64", [4, 5, 4])))
    with pytest.raises(ValueError, match="row 1: image_id is None; it must be an integer or a string"):
        from_tags(make(images, STRINGS, rows, image_id=("string", ["a", None, "b"])))
    with pytest.raises(ValueError, match=r"row 0: image_id is 1\.0; it must be an integer or a string"):
        from_tags(make(images, STRINGS, rows, image_id=("float64", [1.0, 2.0, 3.0])))
    with pytest.raises(ValueError, match="column 'image', row 1 is None; it must be an image"):
        from_tags(make([images[0], None, images[2]], STRINGS, rows))


def test_images_are_not_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    found = from_tags(make([str(tmp_path / "a.png")], STRINGS, [["a"]]))
    assert found["labels"][:] == [[0]]


# from_csv


@pytest.fixture
def folder(tmp_path) -> Path:
    draw(tmp_path, "a.png", "b.png", "c.png", "sub/a.png")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "labels.csv").write_bytes(text.encode())
    return folder / "labels.csv"


def test_multi_hot_columns(folder):
    found = from_csv(write(folder, "file_name,dog,cat\nb.png,1,0\nsub/a.png,0,0\na.png,1.0, 1\n"))
    assert found.features == {
        "image": Image(mode="RGB"),
        "labels": List(ClassLabel(names=["dog", "cat"])),
        "image_id": Value("string"),
    }
    assert found["labels"][:] == [[0], [], [0, 1]]
    assert found["image_id"][:] == ["b.png", "sub/a.png", "a.png"]
    assert found[0]["image"].getpixel((0, 0)) == (40, 0, 0)
    assert found.info.dataset_name == "labels"


def test_unknown_labels_are_negative_or_masked(folder, caplog):
    file = write(folder, "file_name,dog,cat\na.png,1,\nb.png,?,0\nc.png,-1,1\nsub/a.png,0,-1.0\n")
    with caplog.at_level(logging.INFO, logger="hf_balancemix"):
        found = from_csv(file)
    assert found["labels"][:] == [[0], [], [1], []]
    assert "unknown_labels" not in found.column_names
    assert "4 of 8 labels are unknown and become negative" in caplog.text
    masked = from_csv(file, unknown="masked")
    assert masked["labels"][:] == found["labels"][:]
    assert masked.features["unknown_labels"] == masked.features["labels"]
    assert label_matrix(masked, "unknown_labels").tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert (describe(masked).num_unknown, describe(masked).negatives.tolist()) == (4, [1, 1])
    known = from_csv(write(folder, "file_name,dog\na.png,1\n"), unknown="masked")
    assert known["unknown_labels"][:] == [[]]


def test_names_choose_and_order_the_columns(folder):
    file = write(folder, "file_name,split,dog,cat,ant\na.png,train,1,0,1\nb.png,val,0,0,0\n")
    assert from_csv(file, names=["ant", "dog"])["labels"][:] == [[0, 1], []]
    with pytest.raises(
        ValueError, match=r"line 2, column 'split' is 'train'; it must be 0, 1 or unknown.*is no class, list"
    ):
        from_csv(file)
    with pytest.raises(ValueError, match=r"line 1: no column 'emu' in the header .*correct names"):
        from_csv(file, names=["emu"])


def test_label_column_with_names(folder):
    file = write(folder, 'file_name,tags\na.png,dog | cat\nb.png,\nc.png,"cat|ant, big|cat"\n')
    found = from_csv(file, label_column="tags", separator="|")
    assert class_names(found) == ["ant, big", "cat", "dog"]
    assert found["labels"][:] == [[1, 2], [], [0, 1]]
    found = from_csv(file, label_column="tags", separator="|", names=["dog", "cat", "ant, big", "emu"])
    assert found["labels"][:] == [[0, 1], [], [1, 2]]
    with pytest.raises(
        ValueError, match=r"labels.csv, line 4, column 'tags' has 'ant, big'; it must be one of the 2 classes"
    ):
        from_csv(file, label_column="tags", separator="|", names=["dog", "cat"])


def test_label_column_with_ids(folder):
    file = write(folder, "file_name,ids\na.png,2 0\nb.png,\nc.png,1\n")
    found = from_csv(file, label_column="ids", separator=" ", class_ids=True, names=["x", "y", "z"])
    assert named_labels(found) == [{"x", "z"}, set(), {"y"}]
    with pytest.raises(
        ValueError, match="line 2, column 'ids' has '2'; it must be a class id, a whole number from 0 to 1"
    ):
        from_csv(file, label_column="ids", separator=" ", class_ids=True, names=["x", "y"])
    with pytest.raises(ValueError, match="names is None; with class_ids it must be the class names"):
        from_csv(file, label_column="ids", separator=" ", class_ids=True)


def test_other_folder_columns_suffix_delimiter_ids_and_byte_order_mark(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists")
    file = write(elsewhere, "\ufeffphoto;image_id;dog\r\nb;77;1\r\n\r\nsub/a;3;0\r\n")
    found = from_csv(file, folder, image_column="photo", suffix=".png", delimiter=";")
    assert found["image_id"][:] == ["77", "3"]
    assert found["labels"][:] == [[0], []]
    assert found[0]["image"].size == (6, 5)


def test_relative_paths_survive_a_change_of_folder(folder, monkeypatch, tmp_path_factory):
    write(folder, "file_name,dog\na.png,1\n")
    monkeypatch.chdir(folder)
    found = from_csv("labels.csv", ".")
    monkeypatch.chdir(tmp_path_factory.mktemp("else"))
    assert found[0]["image"].size == (6, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows below its header"),
        ("file_name,dog\n", "no rows below its header"),
        ("file_name,dog\na.png,1\nb.png\n", r"labels\.csv, line 3: 1 cells, but the header has 2"),
        ("file_name,dog\na.png,1\nb.png,1,0\n", r"line 3: 3 cells, but the header has 2"),
        ('file_name,dog\na.png,1\nb.png,"1\nc.png,0\n', "line 3: malformed CSV"),
        ('file_name,dog\n"a"x.png,1\n', "line 2: malformed CSV"),
        ("file_name,dog,cat,dog\na.png,1,0,1\n", "line 1: the header names 'dog' more than once"),
        ("file_name,dog,\na.png,1,0\n", "line 1: column 3 of the header has no name"),
        ("file_name\na.png\n", "line 1: no class among the columns 'file_name'"),
        ("name,dog\na.png,1\n", "line 1: no column 'file_name' in the header 'name', 'dog'; correct image_column"),
        ("file_name,dog\na.png,1\nb.png,2\n", "line 3, column 'dog' is '2'; it must be 0, 1 or unknown"),
        ("file_name,dog\na.png,nan\n", "line 2, column 'dog' is 'nan'; it must be"),
        ("file_name,dog\na.png,1\nb.png,1\na.png,0\n", "line 4: 'a.png' in column .* first in line 2"),
        ("file_name,image_id,dog\na.png,7,1\nb.png,7,1\n", "line 3: '7' in column 'image_id' a second time"),
        ("file_name,image_id,dog\na.png,7,1\n,8,1\n", "line 3: column 'file_name' is empty"),
        ("file_name,image_id,dog\na.png,,1\n", "line 2: column 'image_id' is empty"),
        ("file_name,dog\n../a.png,1\n", r"line 2: the file name is '\.\./a\.png'; it must be a plain path"),
        ("file_name,dog\nsub/../a.png,1\n", "line 2: the file name"),
        ("file_name,dog\n/etc/passwd,1\n", "line 2: the file name"),
        ("file_name,dog\nsub\\a.png,1\n", "line 2: the file name"),
        ('file_name,dog\n"a.png\nb",0\na.png,9\n', "line 4, column 'dog' is '9'"),
    ],
)  # fmt: skip
def test_hostile_files(folder, text, message):
    with pytest.raises(ValueError, match=message):
        from_csv(write(folder, text))


def test_not_utf8(folder):
    (folder / "labels.csv").write_bytes("file_name,löwe\na.png,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv is not UTF-8 text"):
        from_csv(folder / "labels.csv")


def test_absent_files(folder, caplog):
    file = write(folder, "file_name,dog\na.png,1\nno.png,1\nsub/b.png,0\nc.png,0\n")
    with pytest.raises(FileNotFoundError, match=r"2 of 4 images .*: no\.png, sub/b\.png\..* The first is in line 3\."):
        from_csv(file)
    with caplog.at_level(logging.WARNING):
        found = from_csv(file, on_bad_image="skip")
    assert (found["image_id"][:], found["labels"][:]) == (["a.png", "c.png"], [[0], []])
    assert "2 of 4 images" in caplog.text
    with pytest.raises(FileNotFoundError, match="no CSV file"):
        from_csv(folder / "none.csv")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        from_csv(file, folder / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unknown": "zero"}, "unknown is 'zero'; it must be one of 'negative', 'masked'"),
        ({"on_bad_image": "drop"}, "on_bad_image is 'drop'; it must be one of"),
        ({"separator": ","}, "pass label_column"),
        ({"class_ids": True, "names": ["a"]}, "pass label_column"),
        ({"label_column": "tags"}, "separator is None; it must be what stands between classes"),
        (
            {"label_column": "tags", "separator": "|", "unknown": "masked"},
            "unknown is 'masked'; it must be 'negative' with label_column",
        ),
        ({"label_column": "none", "separator": "|"}, "no column 'none' in the header .*; correct label_column"),
    ],
)
def test_hostile_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_csv(write(folder, "file_name,tags\na.png,x\n"), **arguments)


def test_a_changed_label_changes_the_fingerprint(folder):
    first = from_csv(write(folder, "file_name,dog\na.png,1\n"))._fingerprint
    assert from_csv(write(folder, "file_name,dog\na.png,0\n"))._fingerprint != first


# Real data


@pytest.mark.skipif(not (DATA / "voc2012_small").is_dir(), reason="BALANCEMIX_DATA has no voc2012_small")
def test_real_voc_labels():
    file = DATA / "voc2012_small" / "labels.csv"
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in rows[0] if name not in ("image_id", "split")]
    images = DATA / "voc2012_small" / "VOCdevkit" / "VOC2012" / "JPEGImages"
    found = from_csv(file, images, image_column="image_id", suffix=".jpg", names=names)
    assert len(found) == 3_426
    assert found["image_id"][:] == [row["image_id"] for row in rows]
    assert np.array_equal(label_matrix(found), [[int(row[name]) for name in names] for row in rows])
    assert found[0]["image"].mode == "RGB"


@pytest.mark.skipif(not (DATA / "coco_sample").is_dir(), reason="BALANCEMIX_DATA has no coco_sample")
def test_real_coco_objects_give_the_labels_of_the_loader():
    root = DATA / "coco_sample"
    document = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    categories = sorted(document["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    name_of = {category["id"]: category["name"] for category in categories}
    rows = {image["id"]: (image["file_name"], []) for image in document["images"]}
    for annotation in document["annotations"]:
        rows[annotation["image_id"]][1].append(name_of[annotation["category_id"]])
    rows = {image_id: row for image_id, row in rows.items() if row[1]}
    detection = make(
        [str(root / "val2017" / name) for name, _ in rows.values()],
        {"category": List(ClassLabel(names=names))},
        [{"category": classes} for _, classes in rows.values()],
        "objects",
        image_id=("int64", list(rows)),
    )
    found, expected = from_detection(detection), load_coco(root, split="val")
    for column in ("labels", "image_id"):
        assert found[column][:] == expected[column][:]
    assert class_names(found) == class_names(expected)
