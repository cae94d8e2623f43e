"""From decisions about labels to corrected data.

A decision is about one label, that is an image and a class. The decisions file, which the review page writes, is CSV
in UTF-8 with a row for each and the columns `image_id`, `class`, `given` (1 or 0: the label that was looked at),
`decision` ("wrong": the given label is wrong; "right"; "unsure"), `reviewer` and `time` (ISO 8601, UTC).

    corrected = apply_corrections(dataset, "decisions.csv")
    corrected = apply_corrections(dataset, "decisions.csv", audit=audit, min_score=0.95)
    Corrections.of("decisions.csv").to_noise_map(dataset).save("corrections.parquet")  # to share, without the images
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa

from hf_balancemix.audit.label_audit import LabelAudit
from hf_balancemix.data.csv_file import CsvTable
from hf_balancemix.data.files import first_few
from hf_balancemix.data.labels import class_names, given_labels, with_changed_labels, with_rows
from hf_balancemix.data.noise import read_ids
from hf_balancemix.data.noise_map import NoiseMap
from hf_balancemix.data.tags import bit_of
from hf_balancemix.files import quote

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]
DECISIONS = ("wrong", "right", "unsure")
COLUMNS = ("image_id", "class", "given", "decision", "reviewer", "time")
_ROWS_AT_A_TIME = 4096  # whose (rows, K) labels are read at once

PROVENANCE = datasets.List(
    {
        "class": datasets.Value("string"),
        "given": datasets.Value("int8"),
        "corrected": datasets.Value("int8"),
        "by": datasets.Value("string"),
        "time": datasets.Value("string"),
    }
)
"""Type of the column `corrections` of corrected data: of each changed label, who changed what, and when."""


class Decided(NamedTuple):
    """One label that was decided about."""

    image_id: str
    class_name: str
    given: int
    """1 or 0."""
    corrected: int
    """1 or 0; as `given` where the label stays."""
    by: str
    """The reviewer, or that it was the audit's score, not reviewed."""
    time: str
    """ISO 8601; empty where it is not known."""


@dataclass(frozen=True)
class Corrections:
    """What was decided about the labels of a data set. Make it with `Corrections.of`."""

    labels: list[Decided]
    """Each label once, also those that stay as they are."""

    @classmethod
    def of(
        cls,
        decisions: str | os.PathLike[str] | Rows | LabelAudit | None = None,
        *,
        audit: Rows | LabelAudit | None = None,
        min_score: float | None = None,
    ) -> Corrections:
        """Read decisions, an audit's scores, or both.

        Args:
            decisions: The decisions file, a `datasets.Dataset` with its columns or a list of such dicts; reviewer and
                time may be absent. Without reviewed labels an audit can stand here.
            audit: A `LabelAudit`, or its rows (a `datasets.Dataset` or a list of dicts).
            min_score: Labels whose score in the audit is at least this, in (0, 1], and that nobody has decided about
                are taken as wrong. What a reviewer has decided stands, "unsure" too. It goes with an audit.

        Raises:
            FileNotFoundError: There is no such decisions file.
            ValueError: A row or an argument is not as described, there are none, two decisions disagree about a label,
                or no score is that high.
        """
        if decisions is not None and not isinstance(decisions, (str, os.PathLike)):
            decisions = _rows_of(decisions)
            if _has_column(decisions, "score") and not _has_column(decisions, "decision"):
                if audit is not None:
                    raise ValueError("decisions is an audit, and so is audit; there must be one; leave out audit=...")
                decisions, audit = None, decisions
        if (audit is None) != (min_score is None):
            found = "an audit is given without min_score" if min_score is None else f"min_score is {min_score}"
            raise ValueError(f"{found}; an audit and min_score must go together; pass both, or decisions alone.")
        if decisions is None and audit is None:
            raise ValueError("decisions and audit are None; one must be given; pass the decisions file.")
        labels = {} if decisions is None else _decided(decisions)
        if audit is not None and min_score is not None:
            labels |= {key: label for key, label in _unreviewed(audit, min_score).items() if key not in labels}
        return cls(list(labels.values()))

    @property
    def changed(self) -> list[Decided]:
        """Those whose given label is wrong."""
        return [label for label in self.labels if label.corrected != label.given]

    def apply(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Correct the labels of the data set that was reviewed. It needs memory for N ids and the decisions.

        Args:
            dataset: With `labels` (class list or multi-hot) and `image_id`, rows in any order.

        Returns:
            The data set with corrected `labels`, in the same form; the given ones as `given_labels`; and for each
            image, as `corrections`, a list of `{"class", "given", "corrected", "by", "time"}`, one for each changed
            label. Where the data set has been corrected before, `given_labels` stay and `corrections` go on.

        Raises:
            ValueError: A decision is about an image, a class or a given label that the data set does not have; all are
                checked first, and the message says how many.
            TypeError: `dataset` is not a `datasets.Dataset`, or its labels are of an unknown type.
        """
        rows, classes = label_positions(dataset, self.labels, "the decisions")
        before = _provenance(dataset)
        keep = np.array([label.corrected != label.given for label in self.labels])
        entries: dict[int, list[dict[str, Any]]] = {}
        for row, label in zip(rows[keep].tolist(), self.changed, strict=True):
            entry = {"class": label.class_name, **label._asdict()}
            entries.setdefault(row, before[row].as_py()).append({name: entry[name] for name in PROVENANCE.feature})
        values = [label.corrected for label in self.changed]
        result = with_changed_labels(dataset, rows[keep], classes[keep], values, beside="given_labels")
        columns = result.column_names
        result = result.with_format(None)
        if "corrections" in columns:
            result = result.remove_columns("corrections")
        result = result.add_column("corrections", with_rows(before, entries), feature=PROVENANCE)
        result = result.select_columns(list(dict.fromkeys([*columns, "corrections"])))
        return result.with_format(dataset.format["type"], **dataset.format["format_kwargs"])

    def to_noise_map(self, dataset: datasets.Dataset) -> NoiseMap:
        """The corrections as a noise map, which can be saved, pushed to the Hub and applied without the images.

        In it the corrected labels are the clean ones, and the given ones the noisy. Whoever has the same given data
        gets the corrected ones from `noise_map.correct(dataset)`; `noise_map.apply` makes the given of the corrected.
        Its parameters say how many labels were changed by whom, and when; which by whom stays in `corrections`.

        Args:
            dataset: The data set that was reviewed, with its given labels.

        Raises:
            ValueError, TypeError: As `apply`.
        """
        by = Counter("audit, not reviewed" if label.by.endswith(_NOT_REVIEWED) else label.by for label in self.changed)
        times = [label.time for label in self.changed if label.time]
        when = {"from": min(times, default=None), "to": max(times, default=None)}
        parameters = {"name": "Corrections", "by": dict(by)} | when
        given = dataset.select_columns([name for name in _LABEL_COLUMNS if name in dataset.features])
        return NoiseMap.from_datasets(clean=self.apply(given), noisy=given, noise=parameters)


_NOT_REVIEWED = ", not reviewed"
_LABEL_COLUMNS = ("image_id", "labels", "unknown_labels")


def apply_corrections(
    dataset: datasets.Dataset,
    decisions: str | os.PathLike[str] | Rows | LabelAudit | None = None,
    *,
    audit: Rows | LabelAudit | None = None,
    min_score: float | None = None,
) -> datasets.Dataset:
    """Correct the labels of a data set by a reviewer's decisions, by an audit's scores, or both.

    Args:
        dataset: The data set that was audited, with `labels` and `image_id`.
        decisions, audit, min_score: See :meth:`Corrections.of`.

    Returns:
        The data set with corrected `labels`, `given_labels` and `corrections`: see :meth:`Corrections.apply`.

    Raises:
        FileNotFoundError, ValueError, TypeError: As these two.

    Example:
        >>> given = datasets.Dataset.from_dict({"labels": [[1, 0]], "image_id": [7]})
        >>> decision = {"image_id": 7, "class": "LABEL_0", "given": 1, "decision": "wrong", "reviewer": "ann"}
        >>> apply_corrections(given, [decision])[0]["corrections"]
        [{'class': 'LABEL_0', 'given': 1, 'corrected': 0, 'by': 'ann', 'time': ''}]
    """
    return Corrections.of(decisions, audit=audit, min_score=min_score).apply(dataset)


def label_positions(dataset: datasets.Dataset, labels: Sequence[Decided], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes, int64, of L labels in the data set; ValueError unless it has these given labels.

    `what` says what the labels come from, for the message. An integer image_id and its decimal string are the same.
    """
    row_of = {str(value): row for row, value in enumerate(read_ids(dataset, unique=True))}
    names = class_names(dataset)
    class_of = {name: k for k, name in enumerate(names)}
    for kind, known, found, needed in (
        ("an image_id", row_of, [label.image_id for label in labels], f"one of its {len(row_of)}"),
        ("a class", class_of, [label.class_name for label in labels], f"one of {first_few(names)}"),
    ):
        unknown = [value for value in found if value not in known]
        if unknown:
            first = first_few(list(dict.fromkeys(unknown)), 3)
            problem = f"{len(unknown)} of {len(labels)} rows of {what} have {kind} that the data set lacks: {first}"
            raise ValueError(f"{problem}; it must be {needed}; use the data set that was audited, loaded alike.")
    rows = np.array([row_of[label.image_id] for label in labels], dtype=np.int64)
    classes = np.array([class_of[label.class_name] for label in labels], dtype=np.int64)
    given, stored = np.array([label.given for label in labels]), np.empty(len(labels), dtype=np.int8)
    order = np.argsort(rows, kind="stable")
    for start in range(0, len(order), _ROWS_AT_A_TIME):
        part = order[start : start + _ROWS_AT_A_TIME]
        used, position = np.unique(rows[part], return_inverse=True)
        columns = [name for name in _LABEL_COLUMNS if name in dataset.features]
        stored[part] = given_labels(dataset.select_columns(columns).select(used)).numpy()[position, classes[part]]
    wrong = np.flatnonzero(stored != given)
    if len(wrong):
        firsts = [
            f"image_id {quote(labels[i].image_id)}, class {quote(labels[i].class_name)}: {given[i]} instead of "
            + ("unknown" if stored[i] < 0 else str(stored[i]))
            for i in wrong[:3]
        ]
        problem = f"{len(wrong)} of {len(labels)} rows of {what} have another given label than the data set"
        first = "; ".join(firsts) + ("; ..." if len(wrong) > 3 else "")
        raise ValueError(f"{problem} ({first}); it must be the same; use the data set as it was when it was audited.")
    return rows, classes


def _rows_of(audit: Any) -> Any:
    return audit.rows if isinstance(audit, LabelAudit) else audit


def _has_column(rows: Any, name: str) -> bool:
    """Whether a data set, or a list of dicts by its first, has a column."""
    if isinstance(rows, datasets.Dataset):
        return name in rows.column_names
    return isinstance(rows, Sequence) and len(rows) > 0 and isinstance(rows[0], Mapping) and name in rows[0]


def _read_rows(rows: Any, what: str, columns: Sequence[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Where each row of a decisions file, a data set or a list of dicts stands, and its cells; at least one."""
    if isinstance(rows, (str, os.PathLike)):
        yield from _read_file(Path(rows), columns)
        return
    if isinstance(rows, datasets.Dataset):
        present = [name for name in (*columns, "reviewer", "time") if name in rows.column_names]
        rows = rows.select_columns(present).with_format(None)
    elif not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        found = f"{what} are a {type(rows).__name__}"
        raise TypeError(f"{found}; they must be a file, a datasets.Dataset or a list of dicts; pass one of them.")
    if len(rows) == 0:
        raise ValueError(f"{what} have no row; they must have one for each label; pass the ones that were made.")
    for number, row in enumerate(rows):
        if absent := [name for name in columns if row.get(name) is None]:
            needed = f"it must have {', '.join(columns)}; add what is missing"
            raise ValueError(f"{what}, row {number} has no {first_few(absent)}; {needed}.")
        yield f"{what}, row {number}", dict(row)


def _read_file(file: Path, columns: Sequence[str]) -> Iterable[tuple[str, dict[str, Any]]]:
    if not file.is_file():
        raise FileNotFoundError(f"no decisions file {file}; it must be what the review page saved; check the path.")
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline()
    table = CsvTable(file, max(",;\t", key=header.count))  # Excel writes what its country's lists are written with
    for name in columns:
        table.column(name, "the header")
    for line, row in zip(table.lines, table.rows, strict=True):
        yield f"{file}, line {line}", dict(zip(table.header, row, strict=True))


def _checked(where: str, row: Mapping[str, Any]) -> tuple[str, str, int]:
    """The label that a row is about: image_id as text, class, given."""
    given = bit_of(row["given"])
    if given not in (0, 1):
        raise ValueError(f"{where}: given is {quote(row['given'])}; it must be 1 or 0; correct it.")
    if type(row["image_id"]) not in (int, str):
        raise ValueError(
            f"{where}: image_id is {quote(row['image_id'])}; it must be an integer or a string; correct it."
        )
    return str(row["image_id"]), str(row["class"]), given


def _decided(decisions: Any) -> dict[tuple[str, str], Decided]:
    """By image_id and class."""
    labels: dict[tuple[str, str], Decided] = {}
    words: dict[tuple[str, str], str] = {}
    disagree = []
    for where, row in _read_rows(decisions, "the decisions", COLUMNS[:4]):
        image_id, name, given = _checked(where, row)
        word = row["decision"]
        if word not in DECISIONS:
            raise ValueError(
                f"{where}: decision is {quote(word)}; it must be one of {', '.join(DECISIONS)}; correct it."
            )
        reviewer, time = (str(row.get(column) or "") for column in COLUMNS[4:])
        corrected = 1 - given if word == "wrong" else given
        label = Decided(image_id, name, given, corrected, reviewer or "a reviewer", time)
        first = labels.setdefault((image_id, name), label)
        if words.setdefault((image_id, name), word) != word or first.given != given:
            disagree.append(f"{where}: image_id {quote(image_id)}, class {quote(name)}")
    if disagree:
        problem = f"{len(disagree)} decisions disagree with one before about the same label (the first: {disagree[0]})"
        raise ValueError(f"{problem}; a label must have one decision; remove the others.")
    return labels


def _unreviewed(audit: Any, min_score: float) -> dict[tuple[str, str], Decided]:
    """By image_id and class, the labels of an audit whose score is at least this, as wrong."""
    if not 0 < min_score <= 1:
        raise ValueError(f"min_score is {min_score}; it must be in (0, 1]; 0.95 takes only sure ones.")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels, highest = {}, 0.0
    for where, row in _read_rows(_rows_of(audit), "the audit", ("image_id", "class", "given", "score")):
        if not isinstance(row["score"], int | float | np.floating) or not 0 <= row["score"] <= 1:
            raise ValueError(f"{where}: score is {quote(row['score'])}; it must be a number in [0, 1]; correct it.")
        highest = max(highest, float(row["score"]))
        if np.float32(row["score"]) >= np.float32(min_score):  # as the audit keeps it
            image_id, name, given = _checked(where, row)
            by = f"audit, score {row['score']:.3g}{_NOT_REVIEWED}"
            labels[image_id, name] = Decided(image_id, name, given, 1 - given, by, now)
    if not labels:
        found = f"min_score is {min_score} and the highest score of the audit {highest:.3f}"
        raise ValueError(f"{found}; some must be as high; lower it or leave it out.")
    return labels


def _provenance(dataset: datasets.Dataset) -> pa.Array:
    """The column `corrections`, or one of N empty lists."""
    if "corrections" not in dataset.features:
        kind = datasets.Features(corrections=PROVENANCE).arrow_schema.field("corrections").type
        return pa.array([[]] * len(dataset), kind)
    if dataset.features["corrections"] != PROVENANCE:
        found = f"column 'corrections' is {quote(dataset.features['corrections'])}"
        raise ValueError(f"{found}; it must be what apply_corrections makes, or absent; rename the column.")
    return dataset.select_columns(["corrections"]).with_format("arrow")[:]["corrections"].combine_chunks()
