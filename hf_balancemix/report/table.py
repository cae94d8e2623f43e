"""Tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def markdown_table(rows: Sequence[Sequence[str]], num_left: int = 1, *, pad: bool = True) -> str:
    """A Markdown table, of which the first row is the heading.

    Args:
        rows: The cells' text, as many in each row.
        num_left: So many columns are aligned left, those of numbers after them right.
        pad: Align with spaces, for people who read the text itself; False: with the colons of Markdown.

    Example:
        >>> rows = [["method", "mAP"], ["bce", "50.0"], ["balancemix", "9.5"]]
        >>> print(markdown_table(rows))
        | method     |  mAP |
        |------------|------|
        | bce        | 50.0 |
        | balancemix |  9.5 |
        >>> print(markdown_table(rows[:2], pad=False))
        | method | mAP |
        |---|---:|
        | bce | 50.0 |
    """
    if pad:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        align = [str.ljust if i < num_left else str.rjust for i in range(len(widths))]
        rows = [[put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)] for row in rows]
        rule = ["-" * (width + 2) for width in widths]
    else:
        rule = ["---" if i < num_left else "---:" for i in range(len(rows[0]))]
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, f"|{'|'.join(rule)}|", *others])


def results_table(
    results: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, str],
    *,
    percent: bool = False,
    extra: Mapping[str, str] | None = None,
) -> str:
    """A Markdown table, a row a method.

    Args:
        results: Figures by method.
        columns: Headings by figure name. A column that no method has is left out; a missing figure is a dash.
        percent: Show fractions in [0, 1] as per cent.
        extra: Further columns, shown as whole numbers as they are.

    Example:
        >>> print(results_table({"bce": {"mAP": 0.5}}, {"mAP": "all", "few": "few"}, percent=True))
        | method |  all |
        |--------|------|
        | bce    | 50.0 |
    """
    shown = {name: heading for name, heading in columns.items() if any(name in row for row in results.values())}
    extra = {name: heading for name, heading in (extra or {}).items() if any(name in row for row in results.values())}

    def cell(row: Mapping[str, float], name: str) -> str:
        if name not in row:
            return "-"
        if name in extra:
            return f"{row[name]:.0f}"
        return f"{100 * row[name]:.1f}" if percent else f"{row[name]:.3f}"

    rows = [["method", *shown.values(), *extra.values()]]
    rows += [[method, *(cell(row, name) for name in (*shown, *extra))] for method, row in results.items()]
    return markdown_table(rows)
