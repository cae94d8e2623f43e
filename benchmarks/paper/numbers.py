"""The paper's tables with our numbers beside its own: entries, means and standard errors, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import pearsonr, rankdata, sem

from hf_balancemix.report import markdown_table

_HERE = Path(__file__).parent


@dataclass
class Entry:
    """One number of a table, in per cent: the paper's, and ours by seed."""

    part: str
    """Which of the table's parts: a class group, or the noise of a table of label quality."""
    row: str
    column: str
    paper: float | None = None
    """None where the paper has no such number."""
    ours: list[float] = field(default_factory=list)
    """A value a finished run."""


def read_paper_numbers(label_quality: bool = False) -> list[dict[str, str]]:
    """Every mAP that the paper prints (Tables 1 to 13; Table 9 repeats Tables 3, 10 and 11), in per cent.

    Args:
        label_quality: Its figures of label quality instead (Tables 14, 15).

    Returns:
        Rows of text by column: `table`, `dataset`, `noise`, `rate`, and `method`, `class_group`, `mAP_percent`,
        `setting`; or `training_progress` and four figures.
    """
    name = "paper_label_quality.csv" if label_quality else "paper_tables.csv"
    with open(_HERE / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, s / sqrt(n) with n - 1 degrees of freedom; no error of a single value.

    Raises:
        ValueError: No value.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    if not values:
        raise ValueError("no value is given; a mean needs at least one.")
    return statistics.fmean(values), float(sem(values)) if len(values) > 1 else None


def shown(values: Sequence[float]) -> str:
    """`49.2 ± 0.3 (3)`: mean, standard error and number of runs; a dash without any."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.1f} (1)" if error is None else f"{mean:.1f} ± {error:.1f} ({len(values)})"


def markdown(title: str, entries: Sequence[Entry], note: str = "", paper_heading: str = "paper") -> str:
    """A Markdown table a part, with two columns for each of the table's: the paper's number and ours."""
    text = [f"# {title}", ""]
    if note:
        text += [note, ""]
    for part in _distinct(entry.part for entry in entries):
        of_part = [entry for entry in entries if entry.part == part]
        columns, by_place = _distinct(e.column for e in of_part), {(e.row, e.column): e for e in of_part}
        lines = [["", *(f"{column}: {who}" for column in columns for who in (paper_heading, "ours"))]]
        for row in _distinct(e.row for e in of_part):
            cells = [row]
            for column in columns:
                entry = by_place.get((row, column), Entry(part, row, column))
                cells += ["-" if entry.paper is None else f"{entry.paper:.1f}", shown(entry.ours)]
            lines.append(cells)
        text += [f"## {part}", "", markdown_table(lines, num_left=len(lines[0])), ""]
    return "\n".join(text)


def as_csv(entries: Iterable[Entry]) -> str:
    """The same, a line an entry: part, row, column, paper, mean, standard_error, runs, values."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["part", "row", "column", "paper", "mean", "standard_error", "runs", "values"])
    for e in entries:
        mean, error = mean_and_error(e.ours) if e.ours else (None, None)
        figures = ["" if x is None else f"{x:.3f}" for x in (mean, error)]
        values = " ".join(f"{x:.3f}" for x in e.ours)
        writer.writerow([e.part, e.row, e.column, "" if e.paper is None else e.paper, *figures, len(e.ours), values])
    return stream.getvalue()


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; NaN for fewer than two points or where one of them does not vary.

    Example:
        >>> round(pearson([1, 2, 3], [2, 4, 7]), 4)
        0.9934
    """
    if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    return float(pearsonr(x, y).statistic)


def ranks(values: dict[str, float]) -> dict[str, float]:
    """Rank by value, 1 for the largest; equal values share the mean of their ranks.

    Example:
        >>> ranks({"a": 3.0, "b": 5.0, "c": 3.0})
        {'a': 2.5, 'b': 1.0, 'c': 2.5}
    """
    return dict(zip(values, rankdata([-value for value in values.values()]).tolist(), strict=True))


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
