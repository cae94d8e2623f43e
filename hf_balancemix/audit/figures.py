"""Figures of an audit: pure functions to a matplotlib Figure, without pyplot and its global state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from hf_balancemix.audit.label_audit import KINDS, LabelAudit
from hf_balancemix.audit.report import drawn_ranks, mean_over_rank, places, read_rows, thumbnails, wrong_indeed
from hf_balancemix.data.files import first_few
from hf_balancemix.data.images import MAX_IMAGE_PIXELS
from hf_balancemix.data.views import undecoded_images
from hf_balancemix.report.figures import missing_glyphs_allowed, new_figure, short_name

# The directions by the given value, in the order in which they are drawn.
_KINDS = {1: KINDS[1], 0: KINDS[0]}
_COLOURS = {1: "#D55E00", 0: "#0072B2"}
_WORDS = {1: "present", 0: "absent"}
_MAX_CLASSES = 10  # of a sheet, unless they are named
# Of a sheet, in inches.
_CELL, _THUMBNAIL, _ROW, _HEADING, _TITLE, _MARGIN = 1.3, 1.2, 2.05, 0.48, 0.45, 0.2
_PIXELS = 200  # an inch of a thumbnail


def surest_figure(
    audit: LabelAudit,
    dataset: datasets.Dataset | None = None,
    *,
    classes: Sequence[str] | None = None,
    per_class: int = 4,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Figure:
    """A sheet of the surest wrong and missing labels, a row a class, as Figure 8 of the paper.

    On the left are wrong positives, on the right missing labels, with their scores. An image that cannot be read is a
    grey box, and warned of.

    Args:
        audit: The audit.
        dataset: The audited data set, to take the images from; by default they are read from the files that the audit
            names.
        classes: Names, in the order to be drawn; by default the 10 that have the surest labels.
        per_class: Images of a class and direction, at most.
        max_image_pixels: As of :func:`~hf_balancemix.data.decode`.

    Returns:
        The figure.

    Raises:
        ValueError: The audit has no rows or lacks a class, the data set lacks an image or a label of it, or
            `per_class` is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; it must be at least 1; 4 is usual.")
    rows = _rows(audit)
    present = list(dict.fromkeys(rows["class"]))  # those of the surest labels first
    names = present[:_MAX_CLASSES] if classes is None else list(dict.fromkeys(classes))
    known = [c.name for c in audit.classes]
    if not names or not set(names) <= set(known):
        absent = [name for name in names if name not in known]
        problem = (
            f"classes has {first_few(absent, 3)}, of which the audit knows nothing" if absent else "classes is empty"
        )
        raise ValueError(f"{problem}; it must be some of {first_few(known)}; correct it, or leave it out.")
    numbers: dict[tuple[str, int], list[int]] = defaultdict(list)  # of the rows that are shown
    for number, key in enumerate(zip(rows["class"], rows["given"], strict=True)):
        if len(numbers[key]) < per_class:
            numbers[key].append(number)
    cells = [(name, given, numbers[name, given]) for name in names for given in _KINDS]
    shown = [number for *_, some in cells for number in some]
    columns = {name: [values[number] for number in shown] for name, values in rows.items()}
    images = columns["image"]
    if dataset is not None:
        place, _ = places(dataset, columns)
        images = undecoded_images(dataset).select(place)["image"]
    size = round(_THUMBNAIL * _PIXELS)
    pictures = thumbnails(images, columns["image_id"], size, lambda _, image: np.asarray(image), max_image_pixels)
    picture_of = dict(zip(shown, pictures, strict=True))

    half = max(per_class * _CELL, 2.6)  # inches
    width, height = 3 * _MARGIN + 2 * half, _TITLE + _ROW * len(names) + _MARGIN
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))  # whose units are inches, from the top left
    title = "The surest wrong labels and their scores"
    if classes is None and len(present) > len(names):
        title += f" ({len(names)} of {len(present)} classes)"
    axes.text(_MARGIN, _TITLE / 2, title, fontsize=11, va="center")
    for i, (name, given, some) in enumerate(cells):
        left, top = _MARGIN + (half + _MARGIN) * (i % 2), _TITLE + _ROW * (i // 2)
        _draw_heading(axes, left, top, short_name(name, int(half * 12)), given, bool(some))
        for k, number in enumerate(some):
            x, y = left + k * _CELL, top + _HEADING
            _draw_thumbnail(axes, x, y, picture_of[number])
            score = f"{rows['score'][number]:.2f}"
            axes.text(x + _THUMBNAIL / 2, y + _THUMBNAIL + 0.04, score, fontsize=8, ha="center", va="top")
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # imshow has set others
    return figure


def rates_figure(audit: LabelAudit, per_class_ap: Sequence[float | None]) -> Figure:
    """The estimated share of wrong labels, with its interval, against the average precision; a point a class.

    On the left wrong positives, on the right missing labels. Points are named where there is room, those of the
    highest rates first.

    Args:
        audit: The audit.
        per_class_ap: Of its K classes, fractions in [0, 1]; None or NaN for a class without positive labels. Such a
            class, or one whose rate is not estimated, is left out and counted in the title.

    Returns:
        The figure.

    Raises:
        ValueError: `per_class_ap` is not one a class, or no class is left.
    """
    if len(per_class_ap) != len(audit.classes):
        raise ValueError(
            f"there are {len(per_class_ap)} per_class_ap for {len(audit.classes)} classes of the audit; each must "
            "be one a class; pass those of the same classes."
        )
    ap = np.array(per_class_ap, dtype=np.float64)  # None becomes NaN
    rates_of = {1: _per_cents([c.wrong for c in audit.classes]), 0: _per_cents([c.missing for c in audit.classes])}
    kept_of = {given: np.flatnonzero(np.isfinite(rates[:, 0] + ap)) for given, rates in rates_of.items()}
    if not any(map(len, kept_of.values())):
        raise ValueError(
            "no class of the audit has an estimated share of wrong labels and an average precision; one must have "
            "both; pass an audit by a pre-trained model, of classes of at least 50 positive labels."
        )
    figure = new_figure(11, 4.6)
    panels = dict(zip(_KINDS, figure.subplots(1, 2, sharex=True), strict=True))
    for given, axes in panels.items():
        kept = kept_of[given]
        rates = rates_of[given][kept]
        lengths = np.abs(rates[:, 1:] - rates[:, :1]).T
        axes.errorbar(ap[kept], rates[:, 0], lengths, fmt="none", ecolor=_COLOURS[given], alpha=0.3, linewidth=1)
        axes.plot(ap[kept], rates[:, 0], "o", color=_COLOURS[given], markersize=4)
        title = f"{_KINDS[given].capitalize()}s: {len(kept)} of {len(ap)} classes"
        if len(kept) < len(ap):
            title += ", the others without an estimate or AP"
        axes.set_title(title, fontsize=9)
        labels = "positive" if given else "negative"
        axes.set(xlabel="average precision", ylabel=f"wrong {labels} labels, estimated (%)")
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.02 * top, top)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    with missing_glyphs_allowed():
        figure.draw_without_rendering()  # so that points have places
        for given, axes in panels.items():
            rates = rates_of[given][:, 0]
            kept = kept_of[given][np.argsort(-rates[kept_of[given]], kind="stable")]
            names = [short_name(audit.classes[k].name, 24) for k in kept]
            _name_points(axes, np.column_stack([ap[kept], rates[kept]]), names)
    return figure


def precision_figure(audit: LabelAudit, dataset: datasets.Dataset) -> Figure:
    """Which share of the first labels of the audit is wrong indeed, over their number; dashed, what their scores say.

    A line for wrong positives, one for missing labels, and one for both together. Where a line runs above the dashed
    one of its colour, more of the labels are wrong than the scores say.

    Args:
        audit: The audit.
        dataset: The audited data set with `clean_labels`; labels that are unknown there are left out.

    Returns:
        The figure.

    Raises:
        ValueError: The audit has no rows, the data set has no `clean_labels` or knows none of these labels, or it is
            another one.
    """
    if "clean_labels" not in dataset.column_names:
        problem = f"the data set has no column 'clean_labels' (it has {first_few(dataset.column_names)})"
        raise ValueError(f"{problem}; precision needs the labels without noise; pass a data set that has both.")
    rows = _rows(audit)
    wrong = wrong_indeed(dataset, rows, *places(dataset, rows))
    known = ~np.isnan(wrong)
    if not known.any():
        problem = f"'clean_labels' of the data set are unknown for all {len(wrong)} labels of the audit"
        raise ValueError(f"{problem}; at least one must be known; pass a data set with clean labels.")
    given, score = np.array(rows["given"]), np.array(rows["score"], dtype=np.float64)
    lines = [(f"{_KINDS[value]}s", _COLOURS[value], known & (given == value)) for value in _KINDS]
    lines = [line for line in lines if line[2].any()]
    if len(lines) > 1:
        lines.append(("both", "black", known))
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    for name, colour, mask in lines:
        ranks = drawn_ranks(int(mask.sum()))
        precision, said = (mean_over_rank(values[mask])[ranks - 1] for values in (wrong, score))
        style: dict[str, Any] = {"color": colour, "linewidth": 1.2, "marker": "o" if len(ranks) < 20 else None}
        axes.plot(
            ranks, precision, label=f"{name}: {100 * precision[-1]:.0f} % of {ranks[-1]:,}", markersize=2.5, **style
        )
        axes.plot(ranks, said, linestyle="--", markersize=2, **style)
    axes.plot([], [], color="0.4", linestyle="--", linewidth=1.2, label="dashed: mean score")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylim=(-0.02, 1.02), xlabel="labels, the surest first", ylabel="share that is wrong indeed")
    axes.set_title("Precision over rank", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _rows(audit: LabelAudit) -> dict[str, list[Any]]:
    if len(audit.rows) == 0:
        raise ValueError(
            "the audit has no rows; it must have a suspicious label to draw; there is nothing to look at."
        )
    return read_rows(audit)


def _per_cents(rates: Sequence[tuple[float, float, float] | None]) -> np.ndarray:
    """`(K, 3)`; NaN where there is no estimate."""
    return 100 * np.array([rate or (np.nan,) * 3 for rate in rates], dtype=np.float64).reshape(-1, 3)


def _draw_heading(axes: Any, left: float, top: float, name: str, given: int, any_rows: bool) -> None:
    axes.text(left, top + 0.04, name, fontsize=9, weight="bold", va="top", parse_math=False)
    direction = f"given {_WORDS[given]}, suggested {_WORDS[1 - given]}" if any_rows else f"no {_KINDS[given]}"
    axes.text(left, top + 0.24, direction, fontsize=8, va="top", color=_COLOURS[given] if any_rows else "0.5")


def _draw_thumbnail(axes: Any, x: float, y: float, picture: np.ndarray | None) -> None:
    """In the middle of its square, in its proportions."""
    if picture is None:
        axes.add_patch(Rectangle((x, y), _THUMBNAIL, _THUMBNAIL, color="0.85"))
        middle = (x + _THUMBNAIL / 2, y + _THUMBNAIL / 2)
        axes.text(*middle, "no image", fontsize=8, color="0.4", ha="center", va="center")
        return
    high, wide = np.array(picture.shape[:2]) * _THUMBNAIL / max(picture.shape[:2])
    x, y = x + (_THUMBNAIL - wide) / 2, y + (_THUMBNAIL - high) / 2
    axes.imshow(picture, extent=(x, x + wide, y + high, y))


def _name_points(axes: Any, points: np.ndarray, names: Sequence[str]) -> None:
    """Write names beside the points, right, left, above or below, where they lie on no point, name or edge."""
    renderer = axes.figure.canvas.get_renderer()
    inside, point_size = axes.bbox, 72 / axes.figure.dpi
    at = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in at]
    for (x, y), point, name in zip(at, points, names, strict=True):
        text = axes.annotate(
            name, point, (0, 0), textcoords="offset points", fontsize=7, parse_math=False, va="bottom", ha="left",
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        wide, high = box.width, box.height
        for dx, dy in ((5, -high / 2), (-5 - wide, -high / 2), (-wide / 2, 5), (-wide / 2, -5 - high)):
            moved = Bbox.from_bounds(x + dx, y + dy, wide, high)
            within = (
                inside.x0 <= moved.x0 and moved.x1 <= inside.x1 and inside.y0 <= moved.y0 and moved.y1 <= inside.y1
            )
            if within and not moved.count_overlaps(taken):
                text.set_position((dx * point_size, dy * point_size))
                taken.append(moved)
                break
        else:
            text.remove()
