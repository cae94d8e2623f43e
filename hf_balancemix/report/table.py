"""Tables of results."""

from __future__ import annotations

from collections.abc import Mapping


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

    Returns:
        The table's text.

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

    lines = [["method", *shown.values(), *extra.values()]]
    lines += [[method, *(cell(row, name) for name in (*shown, *extra))] for method, row in results.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def render(line: list[str]) -> str:
        first = line[0].ljust(widths[0])
        return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([render(lines[0]), rule, *map(render, lines[1:])])
