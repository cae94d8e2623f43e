"""Detection sets and tags to the package's columns; what can be wrong with each."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix.data.adapters import from_detection, from_tags
from hf_balancemix.data.coco import load_coco
from hf_balancemix.data.labels import class_names, given_labels

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


@pytest.mark.parametrize("form", ["dict of lists", "list of dicts"])
def test_objects_of_two_classes_are_no_zeros_and_ones(images, form):
    two = ClassLabel(names=["dog", "cat"])
    feature = {"category": List(two)} if form == "dict of lists" else List({"category": two})
    for rows, expected in (
        ([[0, 0, 1], [1], [0]], [[0, 1], [1], [0]]),
        ([[0, 0], [1, 1], [0, 1]], [[0], [1], [0, 1]]),
    ):
        things = [{"category": row} if form == "dict of lists" else [{"category": k} for k in row] for row in rows]
        assert from_detection(make(images, feature, things, "objects"))["labels"][:] == expected


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
        (Value("string"), ["['dog', 'cat']", "[]", '["ant"]'], {}),
        (List(Value("int32")), [[1, 1, 0], [0, 0, 0], [0, 0, 1]], {"names": ["dog", "cat", "ant"]}),
    ):
        found = from_tags(make(images, feature, values), **arguments)
        assert named_labels(found) == expected
        assert found.column_names == ["image", "labels", "image_id"]
    assert class_names(from_tags(make(images, STRINGS, [["b"], ["c"], ["a"]]))) == ["a", "b", "c"]


def test_zeros_and_ones_of_every_type_with_what_is_unknown(images):
    names = ["x", "y", "z"]
    for kind, rows in (
        ("float32", [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        ("bool", [[True, False, True], [False, False, False], [False, True, False]]),
    ):
        found = from_tags(make(images, List(Value(kind)), rows), names=names)
        assert (class_names(found), found["labels"][:]) == (names, [[0, 2], [], [1]])
        assert found.column_names == ["image", "labels", "image_id"]
    for kind, unknown in (("float32", -1.0), ("float32", float("nan")), ("int64", -1), ("int64", None)):
        found = from_tags(make(images, List(Value(kind)), [[1, unknown, 0], [0, 1, 0], [unknown, 0, 1]]), names=names)
        assert given_labels(found).tolist() == [[1, -1, 0], [0, 1, 0], [-1, 0, 1]]
    # Ids of a ClassLabel count through its own names, whatever order is asked for.
    found = from_tags(make(images, CLASSES, [[1, 0, 1], [0, 0, 0], [0, 1, 0]]), names=["ant", "cat", "dog"])
    assert named_labels(found) == [{"dog", "ant"}, set(), {"cat"}]
    with pytest.raises(ValueError, match="there must be one for each of 3 classes; correct names"):
        from_tags(make(images, List(Value("bool")), [[True, False, True]] * 3), names=["x", "y"])


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
            r"separator is ',' .*; it must be None for lists",
        ),
        (Value("string"), ["a", "b", None], {"separator": ","}, ValueError, "row 2 is None; it must be a list"),
        (Value("string"), ["a", "b", "c"], {}, ValueError, r"separator is None and .*row 0 is 'a'; pass"),
        (
            Value("string"),
            ["['a'", "b", "c"],
            {"separator": ","},
            ValueError,
            r"row 0 is .* it must be a list such as",
        ),
        (
            List(Value("int8")),
            [[0, 1], [0, 0], [1]],
            {"names": ["x", "y"]},
            ValueError,
            r"row 1 is \[0, 0\].*for each of the 2",
        ),
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
            ValueError,
            r"column 'tags', row 1 has 2\.0; it must be of 0 and 1",
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


# Real data


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
