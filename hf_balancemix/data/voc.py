"""PASCAL VOC 2007 and 2012 from the official VOCdevkit: labels from the class files, or from the XML annotations."""

from __future__ import annotations

import codecs
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import datasets
from PIL import Image

from hf_balancemix.data.files import (
    absolute,
    check_choice,
    check_layout,
    check_line,
    check_lines_differ,
    first_few,
    image_dataset,
    name_of_folder,
    read_lines,
)
from hf_balancemix.data.tags import checked_names
from hf_balancemix.files import check_inside, one_line, quote

logger = logging.getLogger(__name__)

_OFFICIAL_IMAGES = {
    ("2007", "train"): 2_501, ("2007", "val"): 2_510, ("2007", "trainval"): 5_011, ("2007", "test"): 4_952,
    ("2012", "train"): 5_717, ("2012", "val"): 5_823, ("2012", "trainval"): 11_540,
}  # fmt: skip

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# Converters write all of these.
_DIFFICULT = {"1": True, "true": True, "0": False, "false": False, "": False, "unspecified": False}
Classes = list[list[int]]  # of each image, ascending


def load_voc(
    root: str | os.PathLike[str],
    year: str | int = "2007",
    split: str = "trainval",
    difficult: str = "positive",
    on_bad_image: str = "error",
    names: Sequence[str] | None = None,
    follow_links: bool = False,
) -> datasets.Dataset:
    """Load one split of PASCAL VOC, or of another data set in the layout of its devkit, as a multi-label data set.

    The image ids come from `VOC{year}/ImageSets/Main/{split}.txt`, the images from `VOC{year}/JPEGImages/`. The labels
    come from `ImageSets/Main/{class}_{split}.txt` or, unless all 20 class files exist, from `Annotations/{id}.xml`;
    both hold the same labels. The 20 classes are in VOC's order (alphabetical), the images in the order of the list.

    `year="2007+2012", split="trainval"` is the training set of most papers, 5,011 + 11,540 = 16,551 images, tested on
    `year="2007", split="test"`. The rows of 2007 come first. The ids are VOC's own, such as "000005" in 2007 and
    "2008_000002" in 2012; one that occurs in both years is an error.

    Args:
        root: The folder that holds `VOCdevkit/`, or `VOCdevkit` itself, which holds `VOC2007/` and `VOC2012/`. With
            `names` also the folder that holds `ImageSets/`, `Annotations/` and `JPEGImages/` itself.
        year: "2007", "2012" or "2007+2012".
        split: "train", "val", "trainval" or "test". The labels of VOC2012's test set were never published.
        difficult: What a class is in an image where all of its objects are marked as difficult: "positive",
            "negative" or "ignore" (VOC's evaluation rule): listed in the column `unknown_labels`. The paper's ratios
            (Eq. 12 and 13: 14 and 13) fit "negative" on "2007+2012" (14.5 and 12.8; "positive" gives 15.3 and 11.9).
        on_bad_image: "error", or "skip" to leave out images that are listed but absent, with a warning.
        names: The classes, in their order, where they are not VOC's.
        follow_links: Read files where links lead out of the root.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels` (List(ClassLabel), the present
        classes in ascending order), `image_id` (string) and, for `difficult="ignore"`, `unknown_labels`
        (List(ClassLabel), never a class that is in `labels`).

    Raises:
        ValueError: An argument is none of its choices, a file is malformed or contradicts another, or a link leads out
            of the root; XML with a DTD is refused.
        FileNotFoundError: A folder, the list of the split, the labels, an annotation or an image is absent.
    """
    year = str(year)
    check_choice("year", year, ("2007", "2012", "2007+2012"))
    check_choice("split", split, ("train", "val", "trainval", "test"))
    check_choice("difficult", difficult, ("positive", "ignore", "negative"))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    classes = VOC_CLASSES if names is None else tuple(checked_names(names) or ())
    if split == "test" and year != "2007" and names is None:
        raise ValueError(
            f"year is {year!r}; it must be '2007' with split='test', as the labels of VOC2012's test set were never "
            "published; pass year='2007', or split='val'."
        )
    root = absolute(root)
    check = partial(check_inside, root=root, follow_links=follow_links)
    sources: list[tuple[Path, list[str], Path]] = []
    image_ids: list[str] = []
    certain: Classes = []
    doubtful: Classes = []
    for one_year in year.split("+"):
        folder, absent = _year_folder(root, one_year, split, classes)
        ids_file = folder / "ImageSets" / "Main" / f"{split}.txt"
        if any(ids_file == listed_in for _, _, listed_in in sources):
            continue  # a folder without years
        check(ids_file)
        check(folder / "JPEGImages")
        ids = _read_ids(ids_file)
        if twice := set(image_ids).intersection(ids):
            problem = f"the id {quote(min(twice))} is also in the split of the other year; ids must be unique"
            raise ValueError(f"{ids_file}: {problem}; restore the official lists, or load one year.")
        sources.append((folder / "JPEGImages", _image_files(folder / "JPEGImages", ids), ids_file))
        if absent:
            logger.info("%s: %s is absent, labels are read from Annotations.", folder.name, absent[0])
            found = _from_annotations(folder / "Annotations", ids, classes, check)
        else:
            found = _from_class_files(folder / "ImageSets" / "Main", split, ids, classes, check)
        certain += found[0]
        doubtful += found[1]
        image_ids += ids

    official = names is None and len(image_ids) == sum(_OFFICIAL_IMAGES.get((y, split), 0) for y in year.split("+"))
    labels = certain
    if difficult == "positive":
        labels = [sorted(a + b) for a, b in zip(certain, doubtful, strict=True)]
    return image_dataset(
        sources,
        labels,
        image_ids,
        classes,
        unknown_labels=doubtful if difficult == "ignore" else None,
        on_bad_image=on_bad_image,
        root=root,
        follow_links=follow_links,
        name="voc" if official else name_of_folder(root),
        config=year,
        split=split,
        source=f"{'PASCAL VOC' if official else root.name} {year} {split}, difficult={difficult!r}",
    )


def _year_folder(root: Path, year: str, split: str, classes: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder VOC{year}, in which all that the split needs exists, and the class files that are absent from it."""
    devkit = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    folder = devkit / f"VOC{year}"
    if classes is not VOC_CLASSES and not folder.is_dir() and (root / "JPEGImages").is_dir():
        folder = root
    main = folder / "ImageSets" / "Main"
    class_files = [f"{name}_{split}.txt" for name in classes]
    absent = [name for name in class_files if not (main / name).is_file()]
    check_layout(
        (
            ("folder", root, root.is_dir()),
            ("folder", folder, folder.is_dir()),
            ("list of the split", main / f"{split}.txt", (main / f"{split}.txt").is_file()),
            ("image folder", folder / "JPEGImages", (folder / "JPEGImages").is_dir()),
            (
                f"labels: {len(absent)} of the {len(classes)} class files, such as {(absent or [''])[0]}, are "
                f"absent from {main}, and so is the folder",
                folder / "Annotations",
                not absent or (folder / "Annotations").is_dir(),
            ),
        ),
        f"The layout of the VOCdevkit is expected:\n"
        f"  {devkit}/\n"
        f"    VOC{year}/\n"
        f"      ImageSets/Main/{split}.txt  (the image ids)\n"
        f"      ImageSets/Main/{class_files[0]}, ... (the labels, one file a class)\n"
        f"      Annotations/  (an XML file an image; needed where class files are absent)\n"
        f"      JPEGImages/  (the images)\n"
        f"Point to the folder that holds VOC{year} (or VOCdevkit), or choose another split or year.",
    )
    return folder, absent


def _read_ids(file: Path) -> list[str]:
    ids = read_lines(file)
    for number, image_id in enumerate(ids, start=1):
        good = len(image_id.split()) == 1 and set(image_id).isdisjoint("/\\\0") and image_id not in (".", "..")
        check_line(good, file, number, image_id, "an image id, such as '000005' of JPEGImages/000005.jpg")
    check_lines_differ(ids, file, "id")
    return ids


def _image_files(folder: Path, ids: list[str]) -> list[str]:
    """The file of each id, whatever its ending; `{id}.jpg` where that exists, or none does."""
    others: dict[str, str] = {}
    endings = Image.registered_extensions()  # tools write .json, .txt or .xml beside an image
    for file in sorted(os.listdir(folder)):
        stem, ending = os.path.splitext(file)
        if ending == ".jpg" or (stem not in others and ending.lower() in endings):
            others[stem] = file
    return [others.get(image_id, f"{image_id}.jpg") for image_id in ids]


def _from_class_files(
    main: Path, split: str, ids: list[str], classes: Sequence[str], check: Callable[[Path], None]
) -> tuple[Classes, Classes]:
    """For each image the classes that are present, and those of which it has difficult objects only."""
    row_of = {image_id: row for row, image_id in enumerate(ids)}
    certain: Classes = [[] for _ in ids]
    doubtful: Classes = [[] for _ in ids]
    for k, name in enumerate(classes):
        file = main / f"{name}_{split}.txt"
        check(file)
        unread = dict(row_of)
        for number, line in enumerate(read_lines(file), start=1):
            image_id, *values = line.split() or [""]
            good = values in (["1"], ["0"], ["-1"])
            check_line(good, file, number, line, "an id and a label: 1, 0 (difficult objects only) or -1")
            row = unread.pop(image_id, None)
            if row is None:
                problem = "is listed a second time" if image_id in row_of else f"is not in {split}.txt"
                raise ValueError(f"{file}, line {number}: the id {quote(image_id)} {problem}; remove the line.")
            if values != ["-1"]:
                (certain if values == ["1"] else doubtful)[row].append(k)
        if unread:
            problem = (
                f"{len(unread)} of the {len(ids)} ids in {split}.txt have no label here, such as {quote(min(unread))}"
            )
            raise ValueError(f"{file}: {problem}; each must have one; copy the file again.")
    return certain, doubtful


def _from_annotations(
    folder: Path, ids: list[str], classes: Sequence[str], check: Callable[[Path], None]
) -> tuple[Classes, Classes]:
    """The same as :func:`_from_class_files`, from the objects of each image."""
    check(folder)
    files = set(os.listdir(folder))
    if missing := [f"{image_id}.xml" for image_id in ids if f"{image_id}.xml" not in files]:
        first = one_line(missing[0], 60)
        problem = f"{len(missing)} of {len(ids)} ids have no annotation in {folder}: {first} is absent"
        raise FileNotFoundError(f"{problem}; copy all there, or the {len(classes)} class files into ImageSets/Main.")
    certain: Classes = []
    doubtful: Classes = []
    paths = [folder / f"{image_id}.xml" for image_id in ids]
    for path in paths:
        check(path)
    for path in paths:
        objects = _objects(path, classes, paths)
        easy = {k for k, is_difficult in objects if not is_difficult}
        certain.append(sorted(easy))
        doubtful.append(sorted({k for k, _ in objects} - easy))
    return certain, doubtful


def _objects(file: Path, classes: Sequence[str], files: Sequence[Path]) -> list[tuple[int, bool]]:
    """Class, and whether it is difficult, of each object in an annotation; `files` are all of them, for messages."""
    root = _parse_xml(file)
    if root.tag != "annotation":
        found = f"the outer element is <{one_line(root.tag, 60)}>"
        raise ValueError(f"{file}: {found}; it must be <annotation>; copy the file again.")
    objects = []
    for index, element in enumerate(root.findall("object")):  # not the parts inside, which have names too
        name = element.findtext("name", "").strip()
        if name not in classes:
            needed = f"one of the {len(classes)} classes ({one_line(classes[0], 40)}, ...)"
            others = (one for xml in files for one in _parse_xml(xml).findall("object"))
            there = sorted({other.findtext("name", "").strip() for other in others})
            found = one_line(first_few(there, 50, 60), 60)
            fix = f"correct it, or pass this data set's classes: names=[...]; there are {found}"
            raise ValueError(f"{file}: object[{index}] is named {quote(name)}; it must be {needed}; {fix}.")
        flag = _DIFFICULT.get(text := element.findtext("difficult", "0").strip().lower())
        if flag is None:
            raise ValueError(f"{file}: object[{index}] has difficult={quote(text)}; it must be 0 or 1; correct it.")
        objects.append((classes.index(name), flag))
    return objects


def _parse_xml(file: Path) -> ElementTree.Element:
    """The outer element of an XML file, which may not declare a DTD: so no entity is expanded or fetched."""

    def refuse(*_: object) -> None:
        problem = "the XML declares a DTD, which can define entities; it must not; remove the DOCTYPE"
        raise ValueError(f"{file}, line {parser.CurrentLineNumber}: {problem}.")

    content = _utf8_of_xml(file)
    # Before ElementTree, whose own parser would go on to expand entities after a doctype handler has raised.
    parser = expat.ParserCreate("UTF-8")
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        problem = f"not well-formed XML ({expat.ErrorString(error.code)}); it may be cut off"
        raise ValueError(f"{file}, line {error.lineno}: {problem}; copy it again.") from error
    return ElementTree.fromstring(content, ElementTree.XMLParser(encoding="UTF-8"))


def _utf8_of_xml(file: Path) -> bytes:
    """The content of an XML file in UTF-8, from the encoding of its byte order mark or its declaration."""
    content = file.read_bytes()
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", content[:200])
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif declared and not content.startswith(codecs.BOM_UTF8):
        encoding = declared[1].decode("ascii")
        if encoding.lower().startswith(("utf-16", "utf-32")):
            encoding = "utf-8"  # of these the declaration would not be ASCII: .NET writes it over UTF-8
    try:
        if codecs.lookup(encoding).name in ("idna", "punycode"):  # no encodings of texts, and hours for a long one
            raise LookupError
        return content.decode(encoding).encode()
    except LookupError as error:
        raise ValueError(
            f"{file}: the encoding {quote(encoding)} is not known; it must be; save it as UTF-8."
        ) from error
    except UnicodeError as error:
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise ValueError(f"{file}, line {line}: not {encoding} text; copy the file again.") from error
