"""A CSV file beside a folder of images, as `image`, `labels`, `image_id` and, where some are, `unknown_labels`."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from hf_balancemix.data.files import (
    absolute,
    check_choice,
    first_few,
    first_repeat,
    image_dataset,
    name_of_folder,
    plain_path,
)
from hf_balancemix.data.tags import bit_of, checked_names, class_lists, split_tags
from hf_balancemix.files import check_inside, one_line, quote

logger = logging.getLogger(__name__)

_UNKNOWN, _BLANK = 2, 3
_WORDS = {"true": 1, "yes": 1, "false": 0, "no": 0, "?": _UNKNOWN}
_WORDS |= dict.fromkeys(("", "nan", "na", "n/a", "<na>", "null", "none"), _BLANK)


def from_csv(
    file: str | os.PathLike[str],
    image_dir: str | os.PathLike[str] | None = None,
    *,
    image_column: str = "file_name",
    suffix: str = "",
    label_column: str | None = None,
    separator: str | None = None,
    class_ids: bool = False,
    names: Sequence[str] | None = None,
    confidence_column: str | None = None,
    positive_from: float = 0.5,
    unknown: str | None = None,
    blank: str | None = None,
    group_column: str | None = None,
    delimiter: str = ",",
    on_bad_image: str = "error",
    follow_links: bool = False,
) -> datasets.Dataset:
    """Load a CSV file that lists images and their labels. The first line is the header; the text is UTF-8.

    The labels are multi-hot columns, one for each class, unless `label_column` is given:

        file_name,cat,dog                  file_name,tags
        a.jpg,1,0                          a.jpg,cat
        b.jpg,1,?                          b.jpg,cat|dog

    or, with `confidence_column`, one row for each label that is known, as Open Images has them:

        ImageID,LabelName,Confidence
        a,/m/01yrx,1
        a,/m/0bt9lr,0

    Values are read, not texts: 1, 1.0, 1.00, True and yes are the same, and `['cat', 'dog']`, as pandas writes lists,
    is two classes.

    Args:
        file: The CSV file.
        image_dir: The folder that the file names start from. Default: the folder of the CSV file.
        image_column: Header of the column of file names.
        suffix: Added to each file name, such as ".jpg" where the column holds names without one.
        label_column: Header of the one column that lists the present classes; an empty cell is an image without
            labels. Default: every column but those of `image_column` and `image_id` is a class, its header the name.
        separator: What stands between the classes in `label_column`, such as "|" or " "; required with it unless its
            cells are written lists.
        class_ids: `label_column` holds ids, which count through `names` from 0, or a 0 or 1 for each of `names`.
        names: Fixes the K classes and their order: of multi-hot columns those to use, of a label column all that may
            occur (by default those that do, sorted: pass `class_names(train)` for other splits).
        confidence_column: Header of the column of confidences in [0, 1], where each row is an image and one class in
            `label_column`. A confidence of 0 is a negative label, `positive_from` or more a positive one; what lies
            between and labels without a row are unknown.
        positive_from: The least confidence of a positive label, in (0, 1].
        unknown: What `-1` or `?` in a multi-hot column is: "negative" (the default, as in the paper) or "masked":
            listed in the column `unknown_labels`, so that it takes no part. With `confidence_column` labels that are
            not known are masked unless this is "negative".
        blank: What an empty cell or `nan` in a multi-hot column is: "negative" (not mentioned) or "masked".
            Default: as `unknown`.
        group_column: Header of a column to keep beside, such as a patient's, for `iterative_split(groups=...)`.
        delimiter: Between the columns: ",", ";" or a tab.
        on_bad_image: "error", or "skip" to leave out images that are listed but absent, with a warning.
        follow_links: Read a CSV file that is a link out of its folder, and images where links or '..' lead out of that
            folder, or of `image_dir` where that lies elsewhere.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels`, `image_id` (string: the column
        `image_id`, else the cell of `image_column`) and, where something is "masked", `unknown_labels`. Rows keep the
        order of the file.

    Raises:
        ValueError: An argument is none of its choices, the file is malformed (the message names line and column), or a
            link leads out of the folder.
        FileNotFoundError: The file, the folder or an image is absent.
    """
    for name, value in (("unknown", unknown), ("blank", blank)):
        check_choice(name, value, (None, "negative", "masked"))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    if len(delimiter) != 1:
        raise ValueError(f"delimiter is {quote(delimiter)}; it must be one character, such as ',', ';' or a tab.")
    if group_column in ("image", "labels", "image_id", "unknown_labels"):
        raise ValueError(
            f"group_column is {quote(group_column)}, a column of the data set already; rename it in the file."
        )
    _check_arguments(label_column, separator, class_ids, confidence_column, positive_from, unknown, blank)
    names = checked_names(names)
    file = absolute(file)
    image_dir = file.parent if image_dir is None else absolute(image_dir)
    if not file.is_file():
        raise FileNotFoundError(f"no CSV file {file}; check the path.")
    root = file.parent if image_dir.is_relative_to(file.parent) else image_dir
    for path, folder in ((file, file.parent), (image_dir, root)):
        check_inside(path, folder, follow_links)
    if not image_dir.is_dir():
        raise FileNotFoundError(f"no image folder {image_dir}; pass the folder that the file names start from.")

    table = CsvTable(file, delimiter)
    image_ids = cells = table.column(image_column, "image_column")
    unknown_lists: list[list[int]] | None = None
    rows = list(range(len(cells)))
    groups = [] if group_column is None else table.column(group_column, "group_column")
    if confidence_column is not None:
        rows = sorted({cell: row for row, cell in reversed([*enumerate(cells)])}.values())
        names, lists, unknown_lists = _rows_of_labels(
            table, cells, table.column(label_column or "", "label_column"), confidence_column, positive_from, names
        )
        if unknown == "negative":
            unknown_lists = None
        image_ids = cells = [cells[row] for row in rows]
        lines = [table.lines[row] for row in rows]
        if "" in cells:
            raise ValueError(f"{file}, line {lines[cells.index('')]}: column '{image_column}' is empty; fill it in.")
    else:
        lines = table.lines
        table.check_unique(cells, image_column)
        if "image_id" in table.header and image_column != "image_id":
            image_ids = table.column("image_id")
            table.check_unique(image_ids, "image_id")
        if label_column is not None:
            names, lists = _label_column(table, label_column, separator, class_ids, names)
        else:
            names, codes = _multi_hot_columns(table, names, (image_column, "image_id", group_column))
            lists = [np.flatnonzero(row).tolist() for row in codes == 1]
            masked = np.zeros_like(codes, dtype=bool)
            for code, choice in ((_UNKNOWN, unknown), (_BLANK, blank or unknown)):
                found = codes == code
                if choice == "masked":
                    masked |= found
                elif found.any():
                    what = "empty" if code == _BLANK else "unknown"
                    text = "%s: %d of %d labels are %s and become negative."
                    logger.info(text, file.name, found.sum(), codes.size, what)
            if "masked" in (unknown, blank):
                unknown_lists = [np.flatnonzero(row).tolist() for row in masked]

    files = [
        plain_path(cell + suffix, f"{file}, line {line}: the file name", follow_links)
        for line, cell in zip(lines, cells, strict=True)
    ]
    try:
        return image_dataset(
            [(image_dir, files, file)],
            lists,
            image_ids,
            names,
            on_bad_image=on_bad_image,
            root=root,
            follow_links=follow_links,
            unknown_labels=unknown_lists,
            others=None if group_column is None else {group_column: [groups[row] for row in rows]},
            name=name_of_folder(image_dir),
            source=file.name,
        )
    except FileNotFoundError as error:
        line = next(line for line, name in zip(lines, files, strict=True) if not os.path.isfile(image_dir / name))
        raise FileNotFoundError(f"{error} The first is in line {line}.") from None


def _check_arguments(
    label_column: str | None,
    separator: str | None,
    class_ids: bool,
    confidence_column: str | None,
    positive_from: float,
    unknown: str | None,
    blank: str | None,
) -> None:
    """A ValueError for what would have no effect in one of the three forms, or is missing."""
    if label_column is None and (separator is not None or class_ids or confidence_column is not None):
        needed = "it must be given with separator, class_ids or confidence_column"
        raise ValueError(f"label_column is None; {needed}; pass label_column=...")
    if not 0 < positive_from <= 1:
        raise ValueError(
            f"positive_from is {quote(positive_from)}; it must be a confidence in (0, 1]; 0.5 is the default."
        )
    if confidence_column is None and positive_from != 0.5:
        raise ValueError(f"positive_from is {positive_from}; it needs confidence_column; pass it or leave this out.")
    if confidence_column is not None and (separator is not None or class_ids):
        raise ValueError("separator or class_ids is given; with confidence_column a row has one class; leave it out.")
    if label_column is not None:
        for name, value in (("unknown", unknown), ("blank", blank)):
            if value is not None and (confidence_column is None or name == "blank") and value != "negative":
                needed = "it must be left out with label_column, where no label is unknown"
                raise ValueError(f"{name} is {quote(value)}; {needed}.")


class CsvTable:
    """The cells of a CSV file as text, and the line that each row starts in."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self.file = file
        self.lines: list[int] = []
        self.rows: list[list[str]] = []
        start = 1
        try:
            with open(file, encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream, delimiter=delimiter, strict=True)
                self.header = [name.strip() for name in next(reader, [])]
                start = reader.line_num + 1
                for row in reader:
                    if row and len(row) != len(self.header):
                        problem = f"{len(row)} cells, but the header has {len(self.header)}; it must be as many"
                        fix = f"put cells that hold the delimiter {quote(delimiter)} in quotes"
                        raise ValueError(f"{file}, line {start}: {problem}; {fix}.")
                    if row:  # a blank line has no cells
                        self.lines.append(start)
                        self.rows.append(row)
                    start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {start}: malformed CSV ({one_line(error)}); repair the row's quotes."
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({one_line(error)}); save it as UTF-8.") from error
        if twice := sorted(name for name, number in Counter(self.header).items() if name and number > 1):
            raise ValueError(f"{file}, line 1: the header names {first_few(twice)} more than once; rename one.")
        self._position = {name: i for i, name in reversed([*enumerate(self.header)])}  # of the first, if unnamed
        if not self.rows:
            raise ValueError(f"{file} has no rows below its header; there must be at least one; add the rows.")

    def column(self, name: str, argument: str = "names") -> list[str]:
        """The cells under a heading; `argument` is what named it, for the message."""
        if name not in self._position:
            header = f"{self.file}, line 1: no column {quote(name)} in the header {first_few(self.header)}"
            raise ValueError(f"{header}; correct {argument}, or the delimiter.")
        index = self._position[name]
        return [row[index].strip() for row in self.rows]

    def check_unique(self, cells: Sequence[str], column: str) -> None:
        """Raises ValueError unless each cell is filled in, and with another text than the others."""
        if "" in cells:
            line = self.lines[cells.index("")]
            raise ValueError(f"{self.file}, line {line}: column '{column}' is empty; fill it in or drop the row.")
        if repeat := first_repeat(cells):
            first, second = (self.lines[row] for row in repeat)
            problem = f"{quote(cells[repeat[1]])} in column '{column}' a second time, first in line {first}"
            raise ValueError(f"{self.file}, line {second}: {problem}; each must be in one row; remove the other.")


def _label_column(
    table: CsvTable, column: str, separator: str | None, class_ids: bool, names: list[str] | None
) -> tuple[list[str], list[list[int]]]:
    if class_ids and names is None:
        raise ValueError("names is None; with class_ids it must be the class names in the order of the ids.")
    name_of = dict(enumerate(names or [])) if class_ids else None

    def where(row: int) -> str:
        return f"{table.file}, line {table.lines[row]}, column '{column}'"

    cells = ["" if cell.lower() in ("nan", "<na>") else cell for cell in table.column(column, "label_column")]
    tags = [split_tags(cell, separator, partial(where, row)) for row, cell in enumerate(cells)]
    return class_lists(tags, names, where, name_of)


def _rows_of_labels(
    table: CsvTable, images: list[str], classes: list[str], column: str, positive_from: float, names: list[str] | None
) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Class names, and of each image in the order of its first row the positive and the unknown classes."""
    names = sorted({name for name in classes if name}) if names is None else names
    index = {name: k for k, name in enumerate(names)}
    labels: dict[str, dict[int, int]] = {image: {} for image in images}
    confidences = table.column(column, "confidence_column")
    for line, image, name, text in zip(table.lines, images, classes, confidences, strict=True):
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            needed = "it must be a confidence from 0 to 1; correct it"
            raise ValueError(f"{table.file}, line {line}, column '{column}' is {quote(text)}; {needed}.")
        if name not in index:
            needed = f"it must be one of the {len(names)} classes {first_few(names)}; add it to names"
            raise ValueError(f"{table.file}, line {line} has the class {quote(name)}; {needed}.")
        label = 1 if value >= positive_from else 0 if value == 0 else -1
        if labels[image].setdefault(index[name], label) != label:
            needed = "each label must be one of them; remove a row"
            raise ValueError(
                f"{table.file}, line {line}: {quote(name)} of {quote(image)} is present and not present; {needed}."
            )
    positive = [sorted(k for k, label in known.items() if label == 1) for known in labels.values()]
    every = range(len(names))
    return names, positive, [[k for k in every if known.get(k, -1) < 0] for known in labels.values()]


def _multi_hot_columns(
    table: CsvTable, names: list[str] | None, others: Sequence[str | None]
) -> tuple[list[str], np.ndarray]:
    """The class names and `(N, K)` uint8 codes 0, 1, _UNKNOWN and _BLANK."""
    if names is None:
        names = [name for name in table.header if name not in others]
        if "" in names:
            number = table.header.index("") + 1
            raise ValueError(f"{table.file}, line 1: column {number} of the header has no name; name the class.")
        if not names:
            columns = first_few(table.header)
            raise ValueError(f"{table.file}, line 1: no class among the columns {columns}; add a column.")
    codes = []
    for name in names:
        cells = table.column(name)
        code_of = {cell: _code(cell) for cell in set(cells)}
        if bad := next((cell for cell in cells if code_of[cell] is None), None):
            line = table.lines[cells.index(bad)]
            found = f"{table.file}, line {line}, column {quote(name)} is {quote(bad)}"
            needed = "0, 1, True, False or unknown (empty, -1 or ?)"
            fix = "if it is no class, list those that are in names (--class_names of the scripts)"
            raise ValueError(f"{found}; it must be {needed}; {fix}.")
        codes.append(np.array([code_of[cell] for cell in cells], dtype=np.uint8))
    return names, np.stack(codes, axis=1)


def _code(cell: str) -> int | None:
    """0, 1, _UNKNOWN or _BLANK by the value that a cell's text stands for; None for another."""
    if (code := _WORDS.get(cell.lower())) is not None:
        return code
    bit = bit_of(cell)
    return _UNKNOWN if bit == -1 else bit
