"""CSV files to the package's columns: every form that people's files have, and what can be wrong with each."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix import describe
from hf_balancemix.data.csv_file import from_csv
from hf_balancemix.data.labels import class_names, given_labels, label_matrix

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))


def draw(folder: Path, *names: str) -> None:
    """Images on disk."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (6, 5), (40 * number, 0, 0)).save(folder / name)


def named_labels(dataset: Dataset) -> list[set[str]]:
    names = class_names(dataset)
    return [{names[k] for k in row} for row in dataset["labels"]]


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
    assert found.info.dataset_name == folder.name


def test_unknown_labels_are_negative_or_masked(folder, caplog):
    file = write(folder, "file_name,dog,cat\na.png,1,\nb.png,?,0\nc.png,-1,1\nsub/a.png,0,-1.0\n")
    with caplog.at_level(logging.INFO, logger="hf_balancemix"):
        found = from_csv(file)
    assert found["labels"][:] == [[0], [], [1], []]
    assert "unknown_labels" not in found.column_names
    assert "3 of 8 labels are unknown and become negative" in caplog.text
    assert "1 of 8 labels are empty and become negative" in caplog.text
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
        ValueError,
        match=r"line 2, column 'split' is 'train'; it must be 0, 1, True, False or unknown.*is no class, list",
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


def test_texts_of_zeros_and_ones_are_never_classes_of_that_name(folder):
    def read(*cells, **arguments):
        rows = "".join(f'{name}.png,"{cell}"\n' for name, cell in zip("abc", cells, strict=False))
        return from_csv(write(folder, f"file_name,tags\n{rows}"), label_column="tags", separator=" ", **arguments)

    names = ["x", "y", "z"]
    for cells in (
        ("1 0 1", "0 0 0"), ("1.0 0.0 1.0", "0.0 0.0 0.0"), ("True False True", "False False False"),
        ("[True, False, True]", "[0.0, 0.0, 0.0]"),
    ):  # fmt: skip
        for class_ids in (False, True):
            assert read(*cells, names=names, class_ids=class_ids)["labels"][:] == [[0, 2], []]
        with pytest.raises(ValueError, match=r"line 2, column 'tags' is .* pass names="):
            read(*cells)
    for arguments in ({}, {"names": ["x", "y"], "class_ids": True}):
        with pytest.raises(ValueError, match=r"line 2, column 'tags' is \['0', '1'\], and so are all of 0 and 1"):
            read("0 1", "1 0", **arguments)
    with pytest.raises(ValueError, match=r"line 2, column 'tags' is \['1', '-1', '0'\].* pass names="):
        read("1 -1 0", "0 0 1")
    with pytest.raises(
        ValueError, match=r"line 3, column 'tags' is .* use a column for each class, which may have unk"
    ):
        read("1 0 0", "0 -1 1", names=names)
    assert read("2.0", "0.0", names=names, class_ids=True)["labels"][:] == [[2], [0]]  # as pandas writes ids
    assert class_names(read("0 1", "1", "0")) == ["0", "1"]


@pytest.mark.parametrize("cell", ["{'x': 'cat'}", "{cat,dog}", "array(['cat'])", "[cat, dog]", "['cat'", "[None]"])
def test_a_cell_that_begins_like_a_list_and_is_none(folder, cell):
    with open(folder / "labels.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "tags"], ["a.png", "['dog']"], ["b.png", cell]])
    with pytest.raises(ValueError, match=r"line 3, column 'tags' is .*; it must be a list such as"):
        from_csv(folder / "labels.csv", label_column="tags", separator="|")
    with open(folder / "labels.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "tags"], ["a.png", "{'dog'}"], ["b.png", "set()"]])
    assert class_names(from_csv(folder / "labels.csv", label_column="tags")) == ["dog"]


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
        ("file_name,dog\na.png,1\nb.png,2\n", "line 3, column 'dog' is '2'; it must be 0, 1, True, False or unknown"),
        ("file_name,dog\na.png,1\nb.png,1\na.png,0\n", "line 4: 'a.png' in column .* first in line 2"),
        ("file_name,image_id,dog\na.png,7,1\nb.png,7,1\n", "line 3: '7' in column 'image_id' a second time"),
        ("file_name,image_id,dog\na.png,7,1\n,8,1\n", "line 3: column 'file_name' is empty"),
        ("file_name,image_id,dog\na.png,,1\n", "line 2: column 'image_id' is empty"),
        ("file_name,dog\n../a.png,1\n", r"line 2: the file name is '\.\./a\.png'; it must be a plain path"),
        ("file_name,dog\nsub/../a.png,1\n", "line 2: the file name"),
        ("file_name,dog\n/etc/passwd,1\n", "line 2: the file name"),
        ("file_name,dog\n..\\a.png,1\n", "line 2: the file name"),
        ("file_name,dog\nC:\\a.png,1\n", "line 2: the file name"),
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
        ({"unknown": "zero"}, "unknown is 'zero'; it must be one of None, 'negative', 'masked'"),
        ({"on_bad_image": "drop"}, "on_bad_image is 'drop'; it must be one of"),
        ({"delimiter": ",,"}, "delimiter is ',,'; it must be one character"),
        ({"separator": ","}, "pass label_column"),
        ({"class_ids": True, "names": ["a"]}, "pass label_column"),
        ({"label_column": "tags"}, "separator is None and .*line 2, column 'tags' is 'x'; pass what stands between"),
        ({"confidence_column": "x"}, "pass label_column"),
        ({"positive_from": 0.9}, "positive_from is 0.9; it needs confidence_column"),
        ({"label_column": "tags", "separator": "|", "blank": "masked"}, "blank is 'masked'; it must be left out"),
        ({"label_column": "tags", "separator": "|", "confidence_column": "x"}, "leave it out"),
        (
            {"label_column": "tags", "separator": "|", "unknown": "masked"},
            "unknown is 'masked'; it must be left out with label_column",
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


@pytest.mark.parametrize(
    ("cell", "value"),
    [(c, 1) for c in ("1", "1.0", "1.00", "True", "TRUE", "true", "yes", "1e0")]
    + [(c, 0) for c in ("0", "0.0", "-0", "False", "no")]
    + [(c, -1) for c in ("-1", "-1.0", "?")]
    + [(c, None) for c in ("", " ", "nan", "NaN", "NA", "<NA>", "None", "null")],
)
def test_cells_are_read_as_values(folder, cell, value):
    file = write(folder, f"file_name,dog,cat\na.png,{cell},1\n")
    assert label_matrix(from_csv(file)).tolist() == [[int(value == 1), 1]]
    for options, masked in (({"unknown": "masked", "blank": "negative"}, -1), ({"blank": "masked"}, None)):
        given = given_labels(from_csv(file, **options)).tolist()
        assert given == [[-1 if value == masked else int(value == 1), 1]]
    assert (given_labels(from_csv(file, unknown="masked")) < 0).any() == (value in (-1, None))


@pytest.mark.parametrize(
    "cells",
    [
        ["['cat', 'dog']", "[]", "['a b']"],
        ['["cat", "dog"]', "[]", '["a b"]'],
        ["('cat', 'dog')", "()", "('a b',)"],
        ["['cat' 'dog']", "[ ]", "['a b']"],  # as NumPy prints
        ["{'dog', 'cat'}", "nan", "['a b']"],
        ["['cat'\n 'dog']", "", "['a b']"],
    ],
)
def test_lists_that_others_wrote_into_a_cell(folder, cells):
    with open(folder / "labels.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "tags"], *zip(["a.png", "b.png", "c.png"], cells, strict=True)])
    for separator in (",", "|", None):
        found = from_csv(folder / "labels.csv", label_column="tags", separator=separator)
        assert named_labels(found) == [{"cat", "dog"}, set(), {"a b"}]


@pytest.mark.parametrize("cell", ["['cat', dog]", "['cat'", "[cat]", "[['cat'], ['dog']", "[{'a': 1}]"])
def test_what_begins_like_a_list_and_is_none(folder, cell):
    file = write(folder, f'file_name,tags\na.png,"[\'cat\']"\nb.png,"{cell}"\n')
    with pytest.raises(ValueError, match=r"line 3, column 'tags' is .*it must be a list such as"):
        from_csv(file, label_column="tags", separator=",")


def test_zeros_and_ones_are_no_ids(folder):
    rows = 'file_name,tags\na.png,"[1, 0, 0]"\nb.png,"[0.0, 1.0, 1.0]"\nc.png,0 0 0\n'
    options = {"label_column": "tags", "separator": " ", "names": ["x", "y", "z"]}
    for class_ids in (True, False):
        found = from_csv(write(folder, rows), class_ids=class_ids, **options)
        assert found["labels"][:] == [[0], [1, 2], []]
    ids = from_csv(write(folder, "file_name,tags\na.png,0\nb.png,0 1\n"), class_ids=True, **options)
    assert ids["labels"][:] == [[0], [0, 1]]
    with pytest.raises(ValueError, match=r"line 3, column 'tags' is \['0', '0'\].*a 0 or 1 for each of the 3 classes"):
        from_csv(write(folder, "file_name,tags\na.png,0 1\nb.png,0 0\n"), **options)
    file = write(folder, "file_name,tags\na.png,0 1\nb.png,1 0\n")
    with pytest.raises(ValueError, match=r"line 2, .*clear whether they are ids or multi-hot"):
        from_csv(file, label_column="tags", separator=" ", class_ids=True, names=["x", "y"])
    with pytest.raises(ValueError, match=r"line 2, .*pass names"):
        from_csv(write(folder, "file_name,tags\na.png,0 0 1\n"), label_column="tags", separator=" ")


def test_a_row_for_each_label_with_a_confidence(folder):
    text = "ImageID,Source,LabelName,Confidence\nb,v,cat,1\na,v,dog,0\nb,v,dog,0.0\na,m,ant,0.7\nc,m,cat,0.3\n"
    options = {"image_column": "ImageID", "suffix": ".png", "label_column": "LabelName"}
    file = write(folder, text)
    found = from_csv(file, confidence_column="Confidence", **options)
    assert (class_names(found), found["image_id"][:]) == (["ant", "cat", "dog"], ["b", "a", "c"])
    assert given_labels(found).tolist() == [[-1, 1, 0], [1, -1, 0], [-1, -1, -1]]
    strict = from_csv(file, confidence_column="Confidence", positive_from=0.9, names=["dog", "cat", "ant"], **options)
    assert given_labels(strict).tolist() == [[0, 1, -1], [0, -1, -1], [-1, -1, -1]]
    closed = from_csv(file, confidence_column="Confidence", unknown="negative", **options)
    assert given_labels(closed).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    for row, message in (
        ("b,v,cat,0", "line 7: 'cat' of 'b' is present and not present"),
        ("b,v,cat,2", "line 7, column 'Confidence' is '2'; it must be a confidence from 0 to 1"),
        ("b,v,cat,nan", "line 7, column 'Confidence' is 'nan'"),
        ("b,v,,1", "line 7 has the class ''"),
        (",v,cat,1", "line 7: column 'ImageID' is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            from_csv(write(folder, f"{text}{row}\n"), confidence_column="Confidence", **options)


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
    assert label_matrix(found).tolist() == [[int(row[name]) for name in names] for row in rows]
    assert found[0]["image"].mode == "RGB"
