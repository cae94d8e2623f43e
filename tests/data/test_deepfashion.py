"""The DeepFashion loader on the official layout, made here, and on what can be wrong with it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix.data.deepfashion import load_deepfashion
from hf_balancemix.data.labels import class_names, label_matrix

# the official attributes in their order, with the number of their type
ATTRIBUTES = [
    *((name, 1) for name in ("floral", "graphic", "striped", "embroidered", "pleated", "solid", "lattice")),
    *((name, 2) for name in ("long_sleeve", "short_sleeve", "sleeveless")),
    *((name, 3) for name in ("maxi_length", "mini_length", "no_dress")),
    *((name, 4) for name in ("crew_neckline", "v_neckline", "square_neckline", "no_neckline")),
    *((name, 5) for name in ("denim", "chiffon", "cotton", "leather", "faux", "knit")),
    *((name, 6) for name in ("tight", "loose", "conventional")),
]
NAMES = [name for name, _ in ATTRIBUTES]
SIZES = {"train": 7, "val": 3, "test": 4}


def paths_of(split: str) -> list[str]:
    return [f"img/Sheer_{split}_Blouse-{i // 3}/img_{i:08d}.jpg" for i in range(SIZES[split])]


def rows_of(split: str) -> np.ndarray:
    """Zeros and ones; the first row of each split has no attribute."""
    rows = np.random.default_rng(len(split)).integers(0, 2, (SIZES[split], 26))
    rows[0] = 0
    return rows


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "deepfashion"
    (root / "Anno_fine").mkdir(parents=True)
    text = "26\nattribute_name  attribute_type\n"
    text += "".join(f"{name:<18} {kind}\n" for name, kind in ATTRIBUTES)
    (root / "Anno_fine" / "list_attr_cloth.txt").write_text(text)
    for split in SIZES:
        (root / "Anno_fine" / f"{split}.txt").write_text("\n".join(paths_of(split)))  # no newline at the end
        lines = (" ".join(map(str, row)) + " \n" for row in rows_of(split))  # a space at the end, as in the original
        (root / "Anno_fine" / f"{split}_attr.txt").write_text("".join(lines))
        for color, path in enumerate(paths_of(split)):
            (root / "Img" / path).parent.mkdir(parents=True, exist_ok=True)
            PILImage.new("L" if color else "RGB", (6, 8), 30 * color).save(root / "Img" / path)
    return root


@pytest.fixture
def annotations(root) -> Path:
    return root / "Anno_fine"


def replace_line(file: Path, number: int, line: str | None) -> None:
    lines = file.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    file.write_text("\n".join(lines))


@pytest.mark.parametrize("split", ["train", "val", "test", "train+val"])
def test_columns_classes_and_labels(root, split):
    dataset = load_deepfashion(root, split=split)
    assert dataset.features == {
        "image": Image(mode="RGB"),
        "labels": List(ClassLabel(names=NAMES)),
        "image_id": Value("string"),
    }
    assert len(class_names(dataset)) == 26
    parts = split.split("+")
    assert dataset["image_id"][:] == [path for part in parts for path in paths_of(part)]
    np.testing.assert_array_equal(label_matrix(dataset), np.concatenate([rows_of(part) for part in parts]))
    assert {(row["image"].mode, row["image"].size) for row in dataset} == {("RGB", (6, 8))}
    assert dataset.info.dataset_name == "deepfashion (not the official set)"
    assert str(dataset.split) == split


def test_the_default_is_train(root):
    assert len(load_deepfashion(root)) == SIZES["train"]


def test_images_may_lie_under_the_root_and_are_decoded_on_access_only(root):
    (root / "Img" / "img").rename(root / "img")
    shutil.rmtree(root / "Img")
    (root / paths_of("val")[1]).write_bytes(b"\xff\xd8 cut off")
    dataset = load_deepfashion(root, "val")
    assert dataset[0]["image"].size == (6, 8)
    with pytest.raises(OSError, match="identify"):
        dataset[1]


def test_relative_root_survives_a_change_of_folder(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    dataset = load_deepfashion("deepfashion", "test")
    monkeypatch.chdir("/")
    assert dataset[0]["image"].size == (6, 8)


def test_names_with_spaces(root, annotations):
    replace_line(annotations / "list_attr_cloth.txt", 5, "abstract chevron print\t1")
    assert class_names(load_deepfashion(root))[2] == "abstract chevron print"


def test_changed_file_changed_rows(root, annotations):
    first = load_deepfashion(root, "val")
    assert load_deepfashion(root, "val")._fingerprint == first._fingerprint
    replace_line(annotations / "val_attr.txt", 1, "1 " + "0 " * 25)
    second = load_deepfashion(root, "val")
    assert second["labels"][:][0] == [0]
    assert second._fingerprint != first._fingerprint


# What can be wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trainval"}, r"split is 'trainval'; it must be one of 'train', 'val', 'test', 'train\+val'"),
        ({"on_bad_image": None}, r"on_bad_image is None; it must be one of 'error', 'skip'"),
    ],
)
def test_wrong_arguments(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_deepfashion(root, **arguments)


@pytest.mark.parametrize(
    ("take_away", "message"),
    [
        ("", r"no folder .*deepfashion\."),
        ("Anno_fine", r"no folder .*Anno_fine\."),
        ("Anno_fine/list_attr_cloth.txt", r"no file .*list_attr_cloth\.txt\."),
        ("Anno_fine/train.txt", r"no file .*Anno_fine/train\.txt\."),
        ("Anno_fine/val_attr.txt", r"no file .*Anno_fine/val_attr\.txt\."),
        ("Img", r"no image folder .*Img/img\."),
    ],
)
def test_missing_parts_show_the_expected_tree(root, take_away, message):
    (root / take_away).rename(root.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_deepfashion(root, "train+val")
    assert f"{root}/\n    Anno_fine/list_attr_cloth.txt" in str(caught.value)
    assert "    Anno_fine/val.txt, Anno_fine/val_attr.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (
            1,
            "attribute_name  attribute_type",
            r", line 1 is 'attribute_name  attribute_type'; it must be the number of attributes",
        ),
        (1, "27", r": line 1 announces 27 attributes, 26 follow from line 3 on"),
        (2, None, r": line 1 announces 26 attributes, 25 follow from line 3 on"),
        (28, None, r": line 1 announces 26 attributes, 25 follow from line 3 on"),
        (5, "striped", r", line 5 is 'striped'; it must be a name and the number of its type"),
        (5, "striped one", r", line 5 is 'striped one'; it must be a name and the number of its type"),
        (5, "", r", line 5 is ''; it must be a name"),
        (5, "floral 1", r", line 5: the attribute 'floral' was listed in line 3"),
    ],
)
def test_malformed_attributes(root, annotations, line, text, message):
    replace_line(annotations / "list_attr_cloth.txt", line, text)
    with pytest.raises(ValueError, match=rf"list_attr_cloth\.txt{message}"):
        load_deepfashion(root)


def test_empty_files(root, annotations):
    (annotations / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val\.txt is empty"):
        load_deepfashion(root, "val")
    for content in ("", "0\nattribute_name  attribute_type\n"):
        (annotations / "list_attr_cloth.txt").write_text(content)
        with pytest.raises(
            ValueError, match=r"list_attr_cloth\.txt.*(must be the number of attributes|announces 0 attributes)"
        ):
            load_deepfashion(root, "train")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../a.jpg", r"'\.\./a\.jpg'; it must be a plain path inside the image folder"),
        ("/etc/a.jpg", r"'/etc/a\.jpg'; it must be a plain path"),
        ("img/../../a.jpg", r"; it must be a plain path"),
        ("img\\..\\a.jpg", r"; it must be a plain path"),
        ("img/a\0.jpg", r"; it must be a plain path"),
        ("img/", r"'img/'; it must be a plain path"),
        ("", r"''; it must be a plain path"),
        (paths_of("val")[0], r"was listed in val\.txt, line 1; .*remove one"),
    ],
)
def test_bad_image_paths(root, annotations, path, message):
    replace_line(annotations / "val.txt", 2, path)
    with pytest.raises(ValueError, match=rf"Anno_fine/val\.txt, line 2: .*{message}"):
        load_deepfashion(root, "val")


def test_an_image_in_two_splits(root, annotations):
    replace_line(annotations / "val.txt", 2, paths_of("train")[4])
    with pytest.raises(ValueError, match=r"val\.txt, line 2: the image .* was listed in train\.txt, line 5;"):
        load_deepfashion(root, "train+val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ".join("0" * 27), r", line 3 has 27 values; there must be one for each of the 26 attributes"),
        (" ".join("0" * 25), r", line 3 has 25 values"),
        ("", r", line 3: 0 values|has 2 rows"),
        ("0 " * 24 + "2 -1", r", line 3 has '2' for the attribute 'loose' \(value 25\); it must be 0 or 1"),
        ("-1 " + "0 " * 25, r", line 3 has '-1' for the attribute 'floral' \(value 1\)"),
        ("0 " * 25 + "1.0", r", line 3 has '1\.0' for the attribute 'conventional'"),
        (None, r" has 2 rows and val\.txt 3 images"),
        (" ".join("0" * 26) + "\n" + " ".join("0" * 26), r" has 4 rows and val\.txt 3 images"),
    ],
)
def test_malformed_rows(root, annotations, text, message):
    replace_line(annotations / "val_attr.txt", 3, text)
    with pytest.raises(ValueError, match=rf"val_attr\.txt({message})| {message}"):
        load_deepfashion(root, "val")


def test_text_that_is_not_utf8(root, annotations):
    (annotations / "val.txt").write_bytes(b"img/a.jpg\nimg/\xe9.jpg\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: not UTF-8 text"):
        load_deepfashion(root, "val")


def test_absent_images(root, caplog):
    (root / "Img" / paths_of("val")[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images listed in .*val\.txt .*on_bad_image='skip'"):
        load_deepfashion(root, "train+val")
    with caplog.at_level(logging.WARNING):
        dataset = load_deepfashion(root, "val", on_bad_image="skip")
    assert "1 of 3 images" in caplog.text
    assert dataset["image_id"][:] == [paths_of("val")[0], paths_of("val")[2]]
    np.testing.assert_array_equal(label_matrix(dataset), rows_of("val")[[0, 2]])
