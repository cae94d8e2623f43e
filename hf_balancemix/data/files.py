"""What the loaders of image folders share: checks of arguments, paths and layout, and the data set they return."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import datasets

from hf_balancemix.files import check_inside, one_line, quote

logger = logging.getLogger(__name__)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise a ValueError unless the argument is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {quote(value)}; it must be one of {', '.join(map(repr, choices))}; choose one.")


def first_few(values: Sequence[Any], number: int = 5, length: int = 100) -> str:
    """The first values, for messages: one at least, and more as long as all have at most so many characters."""
    shown: list[str] = []
    for value in values[:number]:
        if shown and len(", ".join([*shown, quote(value)])) > length:
            break
        shown.append(quote(value))
    return ", ".join(shown) + (", ..." if len(values) > len(shown) else "")


def first_repeat(values: Iterable[Hashable]) -> tuple[int, int] | None:
    """The positions of the first value that stands there a second time; None where each stands there once."""
    seen: dict[Hashable, int] = {}
    for position, value in enumerate(values):
        first = seen.setdefault(value, position)
        if first != position:
            return first, position
    return None


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path with `~` expanded and independent of the current folder, which may change before an image is read."""
    return Path(os.path.abspath(Path(path).expanduser()))


def check_layout(parts: Iterable[tuple[str, Path, bool]], layout: str) -> None:
    """Raise a FileNotFoundError that shows the expected tree for the first (what, path, exists) that is absent."""
    for what, path, exists in parts:
        if not exists:
            raise FileNotFoundError(f"no {what} {path}. {layout}")


def plain_path(name: str, where: str, follow_links: bool = False) -> str:
    """A file name as a relative path with '/' that stays inside its folder; Windows' '\\' and a first './' are taken.

    `where` says what the name is and where it stands, for the ValueError that any other gets. With `follow_links` '..'
    is taken, too.
    """
    path = name.replace("\\", "/")
    path = path.removeprefix("./")
    drive = len(path) > 1 and path[1] == ":" and path[0].isalpha()
    refused = {"", "."} if follow_links else {"", ".", ".."}
    if "\0" in path or drive or path.startswith("/") or not refused.isdisjoint(path.split("/")):
        needed = "it must be a plain path inside the image folder, relative and without '..'"
        if ".." in path.split("/"):
            needed += " unless follow_links allows it"
        raise ValueError(f"{where} is {quote(name)}; {needed}; use for instance 'images/0001.jpg'.")
    return path


def read_json(file: Path, leave_out: str | None = None) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    `leave_out` is a key that no object keeps. ValueError, which names the file, where it is no JSON that can be read.
    """
    return parse_json(file.read_bytes(), str(file), leave_out)


def parse_json(content: bytes, name: str, leave_out: str | None = None) -> Any:
    """As :func:`read_json`, of the content of what messages call `name`."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"an object has the key {quote(twice)} twice")
        if leave_out is not None:
            record.pop(leave_out, None)
        return record

    try:
        return json.loads(content, object_pairs_hook=checked)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at line {error.lineno}, column {error.colno} ({one_line(error.msg)})"
        raise ValueError(f"{name} is {problem}; it may be cut off; copy it again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not Unicode text ({one_line(error)}); copy it again.") from error
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read; it must be as a tool writes it.") from None
    except ValueError as error:  # an integer of thousands of digits, or a key twice
        raise ValueError(f"{name} is not JSON that can be read ({one_line(error)}); correct it.") from error


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 text file without surrounding space; blank lines at the end are left out."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 text; copy or download the file again.") from error
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def check_line(good: bool, file: Path, number: int, line: str, needed: str) -> None:
    """Raise a ValueError unless a line of a text file is good; `needed` says what it must be."""
    if not good:
        raise ValueError(f"{file}, line {number} is {quote(line)}; it must be {needed}; correct the line.")


def check_lines_differ(
    values: Sequence[str], file: Path, what: str, first_line: int = 1, listed: dict[str, str] | None = None
) -> None:
    """Raise a ValueError unless a file lists something, and nothing twice, in the lines from `first_line` on.

    `listed`, which is added to, says where the files before this one list their values, which may not come again.
    """
    if not values:
        raise ValueError(f"{file} is empty; it must have one {what} a line; copy or download it again.")
    prefix = "" if listed is None else f"{file.name}, "
    listed = {} if listed is None else listed
    for line, value in enumerate(values, start=first_line):
        if value in listed:
            twice = f"the {what} {quote(value)} was listed in {listed[value]}"
            raise ValueError(f"{file}, line {line}: {twice}; it must be there once; remove one.")
        listed[value] = f"{prefix}line {line}"


def present_files(
    folder: Path, names: Sequence[str], listed_in: Path, on_bad_image: str, root: Path, follow_links: bool
) -> list[bool]:
    """For N paths relative to the folder, which `listed_in` lists, N booleans: which of them are files.

    With `on_bad_image` "skip" absent images are warned of; FileNotFoundError with "error", or if all are absent.
    ValueError where one leads out of `root`; see :func:`hf_balancemix.files.check_inside`.
    """
    parts = [os.path.split(name) for name in names]
    inners = {inner for inner, _ in parts}
    for inner in inners:
        check_inside(folder / inner, root, follow_links)
    # A folder is listed once, which is far faster than a question for each file.
    files_in = {inner: _files_in(folder / inner) for inner in inners}
    found = [base in files_in[inner] for inner, base in parts]
    for name, (inner, base) in zip(names, parts, strict=True):
        if files_in[inner].get(base):
            check_inside(folder / name, root, follow_links)
    missing = [name for name, exists in zip(names, found, strict=True) if not exists]
    if missing:
        some = one_line(", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""), 60)
        message = f"{len(missing)} of {len(names)} images listed in {listed_in} are not in {folder}: {some}."
        if on_bad_image == "error" or len(missing) == len(names):
            raise FileNotFoundError(f"{message} Copy them there, or leave them out with on_bad_image='skip'.")
        logger.warning("%s They are skipped.", message)
    return found


def image_dataset(
    sources: Sequence[tuple[Path, Sequence[str], Path]],
    labels: Sequence[list[int]],
    image_ids: Sequence[int | str],
    class_names: Sequence[str],
    *,
    on_bad_image: str,
    root: Path,
    follow_links: bool,
    unknown_labels: Sequence[list[int]] | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
    name: str,
    source: str,
    config: str | None = None,
    split: str | None = None,
) -> datasets.Dataset:
    """The data set that a loader returns; its fingerprint follows from the values, so a changed label is seen.

    Args:
        sources: Of the N images, one part after the other: the folder, the paths in it, and the file that lists them.
        labels, unknown_labels: N lists of classes in ascending order: List(ClassLabel); without the latter all labels
            are known, and the column is left out.
        image_ids: N ids, all integers (int64) or all strings.
        class_names: The K class names.
        others: More columns, of N strings each.
        on_bad_image: "error" or, to leave out images that are absent, "skip".
        root, follow_links: The folder that images must really be in, unless links may lead out of it.
        name, source: Name of the data set, and where it comes from, for its description.
        config, split: Where they are known: which of several of that name it is, such as a year; and the split.
    """
    images = [os.path.join(folder, path) for folder, paths, _ in sources for path in paths]
    present = [found for part in sources for found in present_files(*part, on_bad_image, root, follow_links)]
    classes = datasets.List(datasets.ClassLabel(names=list(class_names)))
    id_feature = datasets.Value("string" if isinstance(image_ids[0], str) else "int64")
    columns = {"image": images, "labels": labels, "image_id": image_ids, "unknown_labels": unknown_labels}
    columns |= others or {}
    features = {
        "image": datasets.Image(mode="RGB"),
        "labels": classes,
        "image_id": id_feature,
        "unknown_labels": classes,
    }
    rows = {column: list(compress(values, present)) for column, values in columns.items() if values is not None}
    features = datasets.Features({column: features.get(column, datasets.Value("string")) for column in rows})
    dataset = datasets.Dataset.from_dict(rows, features=features, split=split and datasets.NamedSplit(split))
    dataset.info.dataset_name, dataset.info.config_name = name, config
    dataset.info.description = source
    return dataset


PAPER_DATA = ("coco", "voc", "deepfashion")  # names that a loader gives to the official data only


def name_of_folder(folder: Path) -> str:
    """The name of a data set that is known by its folder alone; never that of one of the paper's."""
    name = folder.name or "data"
    return f"{name} (not the official set)" if name.lower() in PAPER_DATA else name


def _files_in(folder: Path) -> dict[str, bool]:
    """The names of the files in a folder, and whether each is a link; none where there is no such folder."""
    if not os.path.isdir(folder):  # not Path.is_dir, which raises an OSError for a name that is too long
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
