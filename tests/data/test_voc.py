"""The VOC loader on devkits made here, on what can be wrong with one, and on the real labels of both years."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Image, List, Value
from PIL import Image as PILImage

from hf_balancemix.data.labels import class_names, label_matrix
from hf_balancemix.data.voc import VOC_CLASSES, load_voc

DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[2] / "../shared/data"))
NPZ_2007 = DATA / "voc2007_labels" / "voc2007_labels.npz"
NPZ_2012 = DATA / "voc2012_small" / "voc2012_trainval_labels_all11540.npz"
CAT, DOG, PERSON, TRAIN = (VOC_CLASSES.index(name) for name in ("cat", "dog", "person", "train"))

# image id to its objects: (class name, difficult)
OBJECTS = {
    "000007": [("cat", 0), ("cat", 1), ("person", 1), ("person", 1)],
    "000003": [("train", 0), ("dog", 0)],
    "000005": [("dog", 1)],
    "000001": [],
}


def annotation(objects: list[tuple[str, int]]) -> str:
    """Like the official ones: with a part, which has a name too, in every person."""
    text = "<annotation>\n\t<folder>VOC2007</folder>\n\t<source><annotation>PASCAL VOC2007</annotation></source>\n"
    for name, difficult in objects:
        part = "\t\t<part>\n\t\t\t<name>head</name>\n\t\t</part>\n" if name == "person" else ""
        text += f"\t<object>\n\t\t<name>{name}</name>\n\t\t<difficult>{difficult}</difficult>\n{part}\t</object>\n"
    return text + "</annotation>\n"


def write_lists(folder: Path, split: str, ids: list[str], values: np.ndarray) -> None:
    """ImageSets/Main of one split; values is (N, 20) with 1, 0 and -1."""
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    (main / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    for k, name in enumerate(VOC_CLASSES):
        lines = (f"{image_id} {value:2d}\n" for image_id, value in zip(ids, values[:, k].tolist(), strict=True))
        (main / f"{name}_{split}.txt").write_text("".join(lines))


def write(devkit: Path, year: str = "2007", split: str = "trainval", objects: dict = OBJECTS) -> Path:
    folder = devkit / f"VOC{year}"
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    values = np.full((len(objects), 20), -1)
    for row, (image_id, found) in enumerate(objects.items()):
        for name in {name for name, _ in found}:
            values[row, VOC_CLASSES.index(name)] = int(any(other == name and not hard for other, hard in found))
        (folder / "Annotations" / f"{image_id}.xml").write_text(annotation(found))
        PILImage.new("L" if row else "RGB", (8, 6), 50 * row).save(folder / "JPEGImages" / f"{image_id}.jpg")
    write_lists(folder, split, list(objects), values)
    return folder


def remove_class_files(folder: Path) -> None:
    for file in (folder / "ImageSets" / "Main").glob("*_*.txt"):
        file.unlink()


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path / "VOCdevkit")
    return tmp_path


@pytest.fixture
def folder(root) -> Path:
    return root / "VOCdevkit" / "VOC2007"


@pytest.fixture
def annotations(folder) -> Path:
    """The annotations of a devkit without class files."""
    remove_class_files(folder)
    return folder / "Annotations"


EXPECTED = {
    "positive": ([[CAT, PERSON], [DOG, TRAIN], [DOG], []], None),
    "negative": ([[CAT], [DOG, TRAIN], [], []], None),
    "ignore": ([[CAT], [DOG, TRAIN], [], []], [[PERSON], [], [DOG], []]),
}


@pytest.mark.parametrize("source", ["class files", "annotations"])
@pytest.mark.parametrize("difficult", EXPECTED)
def test_columns_and_labels(root, folder, source, difficult):
    if source == "class files":
        shutil.rmtree(folder / "Annotations")
    else:
        remove_class_files(folder)
    dataset = load_voc(root, difficult=difficult)
    classes = List(ClassLabel(names=list(VOC_CLASSES)))
    labels, unknown = EXPECTED[difficult]
    expected = {"image": Image(mode="RGB"), "labels": classes, "image_id": Value("string")}
    if unknown is not None:
        expected["unknown_labels"] = classes
        assert dataset["unknown_labels"][:] == unknown
        assert not (label_matrix(dataset) * label_matrix(dataset, "unknown_labels")).any()
    assert dataset.features == expected
    assert dataset["labels"][:] == labels
    assert dataset["image_id"][:] == list(OBJECTS)  # the order of the list, which is not sorted here
    assert dataset.info.dataset_name == root.name  # few images: not VOC itself
    assert (dataset.info.config_name, dataset.split) == ("2007", "trainval")


def test_classes_are_in_the_order_of_voc():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert VOC_CLASSES[0] == "aeroplane"
    assert VOC_CLASSES[-1] == "tvmonitor"


def test_the_default_counts_difficult_objects_as_positive(root):
    assert load_voc(root)["labels"][:] == EXPECTED["positive"][0]


def test_some_class_files_are_not_enough(root, folder):
    (folder / "ImageSets/Main/dog_trainval.txt").unlink()
    assert load_voc(root)["labels"][:] == EXPECTED["positive"][0]
    shutil.rmtree(folder / "Annotations")
    with pytest.raises(
        FileNotFoundError, match=r"labels: 1 of the 20 class files, such as dog_trainval\.txt, are absent.*Annotations"
    ):
        load_voc(root)


def test_class_files_may_have_another_order(root, folder):
    file = folder / "ImageSets/Main/cat_trainval.txt"
    file.write_text("\n".join(reversed(file.read_text().splitlines())).replace(" ", "\t") + "\r\n\n")
    assert load_voc(root)["labels"][:] == EXPECTED["positive"][0]


def test_an_object_without_difficult_is_not_difficult(root, annotations):
    text = annotation([("dog", 1)]).replace("<difficult>1</difficult>", "")
    (annotations / "000005.xml").write_text(text)
    assert load_voc(root, difficult="negative")["labels"][:][2] == [DOG]


def test_images_are_decoded_to_rgb_on_access_only(root, folder):
    assert [(row["image"].mode, row["image"].size) for row in load_voc(root)] == [("RGB", (8, 6))] * 4
    (folder / "JPEGImages/000003.jpg").write_bytes(b"\xff\xd8 cut off")
    dataset = load_voc(root)
    with pytest.raises(OSError, match="identify"):
        dataset[1]


def test_root_may_be_the_devkit_and_relative(root, monkeypatch):
    first = load_voc(root)
    assert load_voc(root / "VOCdevkit")._fingerprint == first._fingerprint
    monkeypatch.chdir(root.parent)
    dataset = load_voc(root.name)
    monkeypatch.chdir("/")
    assert dataset[0]["image"].size == (8, 6)


@pytest.mark.parametrize(("year", "split"), [("2007", "train"), ("2007", "test"), ("2012", "val"), (2012, "trainval")])
def test_years_and_splits(tmp_path, year, split):
    write(tmp_path, str(year), split)
    assert load_voc(tmp_path, year=year, split=split)["labels"][:] == EXPECTED["positive"][0]


def test_both_years_have_their_own_ids(root):
    second = {"2008_000002": [("dog", 0), ("tvmonitor", 1)], "2011_000999": [("train", 0)]}
    remove_class_files(write(root / "VOCdevkit", "2012", objects=second))
    dataset = load_voc(root, year="2007+2012", difficult="ignore")
    assert dataset["image_id"][:] == [*OBJECTS, *second]
    assert dataset["labels"][:] == [*EXPECTED["ignore"][0], [DOG], [TRAIN]]
    assert dataset["unknown_labels"][:] == [*EXPECTED["ignore"][1], [19], []]
    assert dataset[5]["image"].size == (8, 6)

    write(root / "VOCdevkit", "2012", objects={**second, "000005": []})
    with pytest.raises(ValueError, match=r"VOC2012.*trainval\.txt: the id '000005' is also in .* must be unique"):
        load_voc(root, year="2007+2012")


@pytest.mark.parametrize("source", ["class files", "annotations"])
def test_changed_file_changed_rows(root, folder, source):
    if source == "annotations":
        remove_class_files(folder)
    first = load_voc(root)
    assert load_voc(root)._fingerprint == first._fingerprint
    write(root / "VOCdevkit", objects={**OBJECTS, "000001": [("cat", 0)]})
    if source == "annotations":
        remove_class_files(folder)
    second = load_voc(root)
    assert second["labels"][:][3] == [CAT]
    assert second._fingerprint != first._fingerprint


# What can be wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"year": "2010"}, r"year is '2010'; it must be one of '2007', '2012', '2007\+2012'"),
        ({"split": "validation"}, r"split is 'validation'; it must be one of 'train', 'val', 'trainval', 'test'"),
        ({"difficult": True}, r"difficult is True; it must be one of 'positive', 'ignore', 'negative'"),
        ({"on_bad_image": "ignore"}, r"on_bad_image is 'ignore'; it must be one of 'error', 'skip'"),
        (
            {"year": "2012", "split": "test"},
            r"year is '2012'; it must be '2007' .* VOC2012's test set were never published",
        ),
        ({"year": "2007+2012", "split": "test"}, r"year is '2007\+2012'; it must be '2007' with split='test'"),
    ],
)
def test_wrong_arguments(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_voc(root, **arguments)


@pytest.mark.parametrize(
    ("take_away", "message"),
    [
        ("VOCdevkit/VOC2007", r"no folder .*VOC2007\."),
        ("VOCdevkit/VOC2007/ImageSets", r"no list of the split .*Main/trainval\.txt\."),
        ("VOCdevkit/VOC2007/ImageSets/Main/trainval.txt", r"no list of the split .*Main/trainval\.txt\."),
        ("VOCdevkit/VOC2007/JPEGImages", r"no image folder .*JPEGImages\."),
    ],
)
def test_missing_parts_show_the_expected_tree(root, take_away, message):
    (root / take_away).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_voc(root)
    assert f"{root}/VOCdevkit/\n    VOC2007/\n      ImageSets/Main/trainval.txt" in str(caught.value)


def test_missing_root_and_missing_split(root):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere\."):
        load_voc(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no list of the split .*Main/test\.txt\."):
        load_voc(root, split="test")
    with pytest.raises(FileNotFoundError, match=r"no folder .*VOC2012\."):
        load_voc(root, year="2007+2012")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty"),
        ("000007\n000003\n000007\n", r", line 3: the id '000007' was listed in line 1"),
        ("000007 1\n", r", line 1 is '000007 1'; it must be an image id"),
        ("000007\n\n000003\n", r", line 2 is ''; it must be an image id"),
        ("000007\n../000003\n", r", line 2 is '../000003'; it must be an image id"),
        ("/etc/000007\n", r", line 1 is '/etc/000007'; it must be an image id"),
        ("..\\000007\n", r", line 1 is .*; it must be an image id"),
        ("..\n", r", line 1 is '\.\.'; it must be an image id"),
        ("00\x000007\n", r", line 1 is .*; it must be an image id"),
    ],
)
def test_malformed_list_of_the_split(root, folder, content, message):
    (folder / "ImageSets/Main/trainval.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"Main/trainval\.txt{message}| {message}"):
        load_voc(root)


def test_text_that_is_not_utf8(root, folder):
    (folder / "ImageSets/Main/trainval.txt").write_bytes(b"000007\n000003\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"trainval\.txt, line 3: not UTF-8 text"):
        load_voc(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000003 2", r", line 2 is '000003 2'; it must be an id and a label: 1, 0 .* or -1"),
        ("000003 1.0", r", line 2 is '000003 1\.0'; it must be an id and a label"),
        ("000003", r", line 2 is '000003'; it must be an id and a label"),
        ("000003 1 1", r", line 2 is '000003 1 1'; it must be an id and a label"),
        ("", r", line 2 is ''; it must be an id and a label"),
        ("000007 1", r", line 2: the id '000007' is listed a second time"),
        ("000009 1", r", line 2: the id '000009' is not in trainval\.txt"),
        (None, r": 1 of the 4 ids in trainval\.txt have no label here, such as '000003'"),
    ],
)
def test_malformed_class_files(root, folder, line, message):
    file = folder / "ImageSets/Main/dog_trainval.txt"
    lines = file.read_text().splitlines()
    lines[1:2] = [] if line is None else [line]
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"Main/dog_trainval\.txt{message}"):
        load_voc(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"000005\.xml, line 1: not well-formed XML \(no element found\)"),
        (annotation([("dog", 0)])[:160], r"000005\.xml, line \d: not well-formed XML"),
        ("<annotation>\n<object>\n</annotation>", r"000005\.xml, line 3: .*\(mismatched tag\)"),
        ("<annotation>&dog;</annotation>", r"000005\.xml, line 1: .*\(undefined entity\)"),
        ("<html></html>", r"000005\.xml: the outer element is <html>; it must be <annotation>"),
        (
            annotation([("dog", 0), ("zebra", 0)]),
            r"000005\.xml: object\[1\] is named 'zebra'; it must be one of the 20 cl",
        ),
        ("<annotation><object/></annotation>", r"000005\.xml: object\[0\] is named ''"),
        (annotation([("dog", 2)]), r"000005\.xml: object\[0\] has difficult='2'; it must be 0 or 1"),
    ],
)
def test_malformed_annotations(root, annotations, text, message):
    (annotations / "000005.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_voc(root)


BOMB = "".join(f'<!ENTITY e{i} "{10 * f"&e{i - 1};"}">\n' for i in range(1, 12))


@pytest.mark.parametrize(
    "doctype",
    [
        f'<!DOCTYPE annotation [\n<!ENTITY e0 "dog">\n{BOMB}]>',
        '<!DOCTYPE annotation [<!ENTITY e11 SYSTEM "SECRET">]>',
        '<!DOCTYPE annotation [<!ENTITY % p SYSTEM "SECRET"> %p;]>',
        '<!DOCTYPE annotation SYSTEM "SECRET">',
        "<!DOCTYPE annotation>",
    ],
)
def test_entities_are_neither_expanded_nor_fetched(root, annotations, doctype, monkeypatch):
    secret = root / "secret.txt"
    secret.write_text("dog")
    text = f"<?xml version='1.0'?>\n{doctype}\n<annotation><object><name>&e11;</name></object></annotation>"
    bad = annotations / "000005.xml"
    bad.write_text(text.replace("SECRET", secret.as_uri()))
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file) or read_bytes(file))
    with pytest.raises(ValueError, match=r"000005\.xml, line 2: the XML declares a DTD") as caught:
        load_voc(root)
    assert "dogdog" not in str(caught.value)
    assert secret not in read
    bad.write_bytes(bad.read_text().encode("utf-16"))
    with pytest.raises(ValueError, match=r"000005\.xml, line 2: the XML declares a DTD"):
        load_voc(root)


@pytest.mark.parametrize("text", ["Unspecified", "", " 0 ", "false"])
def test_other_ways_to_write_not_difficult(root, annotations, text):
    expected = load_voc(root, difficult="negative")["labels"][:]
    file = annotations / "000005.xml"
    file.write_text(file.read_text().replace("<difficult>0</difficult>", f"<difficult>{text}</difficult>"))
    assert load_voc(root, difficult="negative")["labels"][:] == expected


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        ("latin-1", "ISO-8859-1"),
        ("utf-16", "UTF-16"),
        ("gb18030", "GB18030"),
        ("utf-8-sig", "utf-8"),
        ("utf-8", "utf-16"),
    ],
)
def test_declared_encodings(root, annotations, encoding, declared):
    expected = load_voc(root)["labels"][:]
    file = annotations / "000005.xml"
    text = file.read_text().replace("<annotation>", "<annotation><owner>J\u00fcrgen</owner>")
    file.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>\n{text}'.encode(encoding))
    assert load_voc(root)["labels"][:] == expected
    file.write_bytes(f'<?xml version="1.0" encoding="klingon"?>\n{text}'.encode())
    with pytest.raises(ValueError, match=r"000005\.xml: the encoding 'klingon' is not known"):
        load_voc(root)


def test_classes_of_ones_own_and_other_image_endings(root, annotations, tmp_path):
    own = tmp_path / "own"
    annotations.parent.rename(own)  # Annotations/, ImageSets/ and JPEGImages/ without a devkit around
    for file in (own / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<name>dog</name>", "<name>wolf</name>"))
    for file in [*(own / "JPEGImages").iterdir()]:
        with PILImage.open(file) as image:
            image.save(file.with_suffix(".png"))
        file.unlink()
        file.with_suffix(".json").write_text("{}")  # as labelling tools leave beside an image
    wolf = [name if name != "dog" else "wolf" for name in VOC_CLASSES]
    found = load_voc(own, names=wolf[::-1])
    assert class_names(found) == wolf[::-1]
    assert any(class_names(found).index("wolf") in row for row in found["labels"])
    assert found[0]["image"].mode == "RGB"
    assert load_voc(own, "2007+2012", names=wolf)["image_id"][:] == found["image_id"][:]  # once: it has no years
    named = r"is named 'wolf'; it must be one of the 19 classes .*names=\[\.\.\.\]; there are 'cat', .*'wolf'"
    with pytest.raises(ValueError, match=named):
        load_voc(own, names=[name for name in wolf if name != "wolf"])


def test_ids_without_annotation(root, annotations):
    (annotations / "000001.xml").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 4 ids have no annotation in .*Annotations: 000001\.xml is absent"
    ):
        load_voc(root)


def test_absent_images(root, folder, caplog):
    (folder / "JPEGImages/000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images .*JPEGImages: 000003\.jpg\..*on_bad_image='skip'"):
        load_voc(root)
    with caplog.at_level(logging.WARNING):
        dataset = load_voc(root, difficult="ignore", on_bad_image="skip")
    assert dataset["image_id"][:] == ["000007", "000005", "000001"]
    assert dataset["labels"][:] == [[CAT], [], []]
    assert dataset["unknown_labels"][:] == [[PERSON], [DOG], []]
    assert "1 of 4 images" in caplog.text
    for file in (folder / "JPEGImages").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 4 images"):
        load_voc(root, on_bad_image="skip")


# Real labels


@pytest.mark.skipif(not (DATA / "voc2012_small").is_dir(), reason="BALANCEMIX_DATA has no voc2012_small")
@pytest.mark.parametrize("split", ["train", "val", "trainval"])
def test_real_voc2012_equals_its_table(split):
    dataset = load_voc(DATA / "voc2012_small", year="2012", split=split)
    with open(DATA / "voc2012_small" / "labels.csv", newline="") as stream:
        rows = {row["image_id"]: row for row in csv.DictReader(stream) if row["split"] in split}
    assert len(dataset) == {"train": 2401, "val": 1025, "trainval": 3426}[split]
    assert set(dataset["image_id"][:]) == set(rows)
    names = class_names(dataset)
    expected = [[int(rows[image_id][name]) for name in names] for image_id in dataset["image_id"][:]]
    assert label_matrix(dataset).tolist() == expected
    assert dataset[0]["image"].mode == "RGB"


@pytest.fixture(scope="module")
def real_root(tmp_path_factory) -> Path:
    """The real lists of both years, without images."""
    if not NPZ_2007.is_file() or not NPZ_2012.is_file():
        pytest.skip("BALANCEMIX_DATA has no voc2007_labels or no voc2012_small")
    root = tmp_path_factory.mktemp("voc")
    stored = np.load(NPZ_2007), np.load(NPZ_2012)
    parts = [
        ("2007", stored[0]["trainval_ids"], stored[0]["trainval_labels"]),
        ("2012", stored[1]["ids"], 2 * stored[1]["labels"].astype(int) - 1),
    ]
    for year, ids, values in parts:
        (root / f"VOC{year}" / "JPEGImages").mkdir(parents=True)
        write_lists(root / f"VOC{year}", "trainval", ids.tolist(), values)
    return root


@pytest.fixture
def without_images(monkeypatch) -> None:
    """As if every image existed: 16,551 files are slow to make."""
    monkeypatch.setattr("hf_balancemix.data.files.present_files", lambda folder, names, *_: [True] * len(names))


def imbalance(matrix: np.ndarray) -> tuple[float, float]:
    """Eq. 12 and Eq. 13."""
    counts = matrix.sum(0, dtype=np.int64)
    return round(counts.max() / counts.min(), 2), round((matrix.size - counts.sum()) / counts.sum(), 2)


@pytest.mark.parametrize(
    ("difficult", "figures"),
    [("negative", (20.92, 12.72)), ("ignore", (20.92, 12.72)), ("positive", (21.60, 11.67))],
)
def test_real_voc2007_figures(real_root, without_images, difficult, figures):
    dataset = load_voc(real_root, year="2007", split="trainval", difficult=difficult)
    assert len(dataset) == 5011
    assert imbalance(label_matrix(dataset).numpy()) == figures
    if difficult == "ignore":
        values = np.load(NPZ_2007)["trainval_labels"]
        np.testing.assert_array_equal(label_matrix(dataset, "unknown_labels"), values == 0)
        np.testing.assert_array_equal(label_matrix(dataset), values == 1)


def test_real_2007_and_2012_are_the_16551_images(real_root, without_images):
    dataset = load_voc(real_root, year="2007+2012", split="trainval")
    assert len(dataset) == len(set(dataset["image_id"][:])) == 16551
    stored = np.load(NPZ_2007), np.load(NPZ_2012)
    expected = np.concatenate([stored[0]["trainval_labels"] >= 0, stored[1]["labels"] == 1])
    np.testing.assert_array_equal(label_matrix(dataset), expected)
    assert imbalance(label_matrix(dataset).numpy()) == (15.29, 11.91)


def test_real_annotations_equal_the_class_files(real_root, without_images, tmp_path):
    """XML written from the real matrix of VOC2007, with a difficult object beside every third other one."""
    stored = np.load(NPZ_2007)
    ids, values = stored["trainval_ids"][::5], stored["trainval_labels"][::5]
    folders = [tmp_path / name / "VOC2007" for name in ("lists", "xml")]
    for folder in folders:
        (folder / "JPEGImages").mkdir(parents=True)
        (folder / "Annotations").mkdir()
        write_lists(folder, "trainval", ids.tolist(), values)
    remove_class_files(folders[1])
    for image_id, row in zip(ids.tolist(), values, strict=True):
        objects = [(VOC_CLASSES[k], int(row[k] == 0)) for k in np.flatnonzero(row >= 0)[::-1]]
        objects += [(name, 1) for name, _ in objects[::3]]
        (folders[1] / "Annotations" / f"{image_id}.xml").write_text(annotation(objects))
    for difficult in EXPECTED:
        from_lists, from_xml = (load_voc(folder.parent, difficult=difficult) for folder in folders)
        assert from_lists["image_id"][:] == from_xml["image_id"][:] == ids.tolist()
        for column in set(from_lists.column_names) - {"image", "image_id"}:
            assert from_lists[column][:] == from_xml[column][:]
