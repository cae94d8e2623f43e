"""Figures of a run: pure functions from data to a matplotlib Figure, without pyplot and its global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm

from hf_balancemix.core.loss_histogram import bin_edges
from hf_balancemix.data.describe import Description, RealisedNoise, per_cent

_MAX_BARS = 80  # of one figure
_MAX_NAMES = 120  # classes whose names are readable below one another's bars
# Told apart by the colour-blind, too.
GROUP_COLOURS = {"many": "#0072B2", "medium": "#56B4E9", "few": "#D55E00"}
_COMPONENT_COLOURS = {"clean": "#0072B2", "noisy": "#D55E00"}
# The panels of the training curves: what a line is called, and its figure in `state.log_history`.
_CURVES = {
    "loss": {"training": "loss", "evaluation": "eval_loss"},
    "mAP": {"all": "eval_mAP", "many": "eval_mAP_many", "medium": "eval_mAP_medium", "few": "eval_mAP_few"},
    "label quality": {
        "clean precision": "label_clean_precision",
        "clean recall": "label_clean_recall",
        "re-labelling right": "label_relabel_accuracy",
        "re-labelled, given positive": "label_relabel_proportion_positives",
    },
}


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """A figure of so many inches with its own Agg canvas: nothing is shown or kept anywhere."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def missing_glyphs_allowed() -> Iterator[None]:
    """No warning of a class name in a script that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def figure_png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with missing_glyphs_allowed():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def figure_pixels(figure: Figure) -> np.ndarray:
    """The figure as `(height, width, 3)` uint8."""
    with Image.open(io.BytesIO(figure_png(figure))) as image:
        return np.asarray(image.convert("RGB"))


def per_class_ap_figure(
    class_names: Sequence[str], per_class_ap: Sequence[float | None], groups: Mapping[str, np.ndarray] | None = None
) -> Figure:
    """Bars of the classes' average precision, the best on top.

    Args:
        class_names: K names, shown as they are: nothing in them is read as a formula.
        per_class_ap: K fractions in [0, 1]; None or NaN for a class without positive labels, which is left out.
        groups: `(K,)` boolean masks of `metrics.class_groups`, for colours.

    Returns:
        The figure. Of more than 80 classes the 40 best and the 40 worst.

    Raises:
        ValueError: Names and figures are not as many.
    """
    if len(class_names) != len(per_class_ap):
        raise ValueError(
            f"there are {len(class_names)} class_names for {len(per_class_ap)} per_class_ap; each must be one a "
            "class; pass those of one model."
        )
    groups = {} if groups is None else groups
    ap = np.array(per_class_ap, dtype=np.float64)  # None becomes NaN
    order = np.argsort(-ap, kind="stable")[: np.isfinite(ap).sum()].tolist()  # NaN comes last
    title = "Average precision of each class"
    if len(order) > _MAX_BARS:
        half = _MAX_BARS // 2
        title += f" ({half} best and {half} worst of {len(order)})"
        order = order[:half] + order[-half:]
    colors = np.full(len(ap), "#7f7f7f", dtype=object)
    for name, mask in groups.items():
        colors[mask] = GROUP_COLOURS[name]

    figure = new_figure(7, 1.2 + 0.2 * max(len(order), 1))
    axes = figure.subplots()
    positions = np.arange(len(order))
    axes.barh(positions, ap[order], color=[colors[k] for k in order])
    axes.set_yticks(positions, [short_name(class_names[k]) for k in order], fontsize=7, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(-0.6, max(len(order), 1) - 0.4), xlabel="average precision")
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    shown = [name for name, mask in groups.items() if mask[order].any()]
    handles = [axes.barh([0], [0], color=GROUP_COLOURS[name], label=f"{name}-shot") for name in shown]
    if handles:
        axes.legend(handles=handles, fontsize=7, loc="lower right", framealpha=0.9)
    return figure


def training_curves_figure(log_history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Losses, mAP and label-quality figures of `trainer.state.log_history` over the epochs, a panel for each.

    A panel has a line of two points or more, as points alone are no curve. None where there is no panel.
    """
    curves = {}
    for panel, keys in _CURVES.items():
        lines = {shown: curve for shown, key in keys.items() if (curve := _curve(log_history, key))}
        if any(len(curve) > 1 for curve in lines.values()):
            curves[panel] = lines
    if not curves:
        return None
    figure = new_figure(4 * len(curves), 3.2)
    for axes, (panel, lines) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        for shown, curve in lines.items():
            axes.plot(*zip(*curve, strict=True), label=shown, marker="o", markersize=2.5, linewidth=1.2)
        axes.set(title=panel, xlabel="epoch")
        if panel != "loss":
            axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


@dataclass(frozen=True)
class ClassMixtures:
    """The losses of one class and the mixtures on them; the first axis is the polarity (0: negative, 1: positive).

    Attributes:
        name: What is written above the class's panels.
        means, variances, weights: `(2, 2)`, see :class:`~hf_balancemix.core.LossMixtures`.
        separated: `(2,)` bool.
        counts: `(2, bins)` numbers of losses in the bins of :func:`~hf_balancemix.core.loss_histogram.bin_edges`;
            None where they were not kept.
    """

    name: str
    means: np.ndarray
    variances: np.ndarray
    weights: np.ndarray
    separated: np.ndarray
    counts: np.ndarray | None = None


def mixture_figure(classes: Sequence[ClassMixtures]) -> Figure:
    """The histogram of the losses (Eq. 6) and the two components (Eq. 7), a row a class, a column a polarity.

    No class is a ValueError.
    """
    if not classes:
        raise ValueError("classes is of no class; it must be of at least one; pass a ClassMixtures for each.")
    figure = new_figure(9, 2.8 * len(classes))
    for row, shown in zip(figure.subplots(len(classes), 2, squeeze=False), classes, strict=True):
        for polarity, axes in enumerate(row):
            _draw_mixture(axes, shown, polarity)
    return figure


def _draw_mixture(axes: Any, shown: ClassMixtures, polarity: int) -> None:
    counts = None if shown.counts is None else np.asarray(shown.counts[polarity], dtype=np.float64)
    total = 0 if counts is None else int(counts.sum())
    number = "" if counts is None else f", {total:,}"
    axes.set_title(
        f"{short_name(shown.name)}: given {('negative', 'positive')[polarity]}{number}", fontsize=9, parse_math=False
    )
    means, deviations = shown.means[polarity], np.sqrt(shown.variances[polarity])
    limit = float((means + 4 * deviations).max())
    if total:
        edges = bin_edges().numpy()
        limit = float(edges[1:][counts.cumsum() >= 0.999 * total][0])
        centers = (edges[:-1] + edges[1:]) / 2
        heights, bars = np.histogram(centers, bins=40, range=(0, max(limit, 1e-4)), weights=counts)
        # Over all losses, not only those in range: the curves are densities of the whole set.
        axes.stairs(heights / total / np.diff(bars), bars, fill=True, color="#c7c7c7", label="losses")
    limit = max(limit, 1e-4)
    if shown.separated[polarity]:
        x = np.linspace(0, limit, 400)
        components = zip(_COMPONENT_COLOURS.items(), shown.weights[polarity], means, deviations, strict=True)
        for (name, color), weight, mean, deviation in components:
            axes.plot(x, weight * norm.pdf(x, mean, deviation), color=color, label=name)
    else:
        axes.text(0.5, 0.5, "not separated:\nall count as clean", transform=axes.transAxes, ha="center", va="center")
    # The noisy component is small beside the clean one, so the axis is logarithmic; and Gaussians fall without end.
    axes.set_yscale("log")
    top = max([line.get_ydata().max() for line in axes.lines] + [1.0])
    axes.set(xlabel="loss", ylabel="density", xlim=(0, limit), ylim=(1e-4, 10 * top))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _curve(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Epochs and values, of which the last of an epoch counts."""
    points = {line["epoch"]: line[key] for line in log_history if key in line and "epoch" in line}
    return sorted((float(epoch), float(value)) for epoch, value in points.items() if np.isfinite(value))


def short_name(name: str, length: int = 40) -> str:
    """A name in one line of at most so many characters."""
    name = " ".join(str(name).split())
    return name if len(name) <= length else f"{name[: length - 1]}…"


def class_figure(description: Description) -> Figure:
    """The class counts, the labels per instance and, where it is known, the realised noise.

    Classes go from the commonest to the rarest; a line marks the clean positive labels of each where they are known.
    """
    heights = [3.0] if description.noise is None else [3.0, 2.0]
    width = min(15.0, max(5.0, 0.13 * description.num_classes))  # inches
    figure = new_figure(width + 3.5, 4.4 if description.noise is None else 6.8)
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[width, 2.5], height_ratios=heights)
    lowest = counts = figure.add_subplot(grid[0, 0])
    _draw_counts(counts, description)
    _draw_labels_per_instance(figure.add_subplot(grid[:, 1]), description.labels_per_instance)
    if description.noise is not None:
        lowest = figure.add_subplot(grid[1, 0], sharex=counts)
        _draw_noise(lowest, description.noise, description.order)
        counts.tick_params(bottom=False, labelbottom=False)
    if description.num_classes <= _MAX_NAMES:
        names = [short_name(description.names[k]) for k in description.order]
        lowest.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    else:
        lowest.set_xlabel("class, from the commonest to the rarest")
    figure.suptitle("\n".join(description.headline), fontsize=10, x=0.01, horizontalalignment="left")
    return figure


def _draw_counts(axes: Any, description: Description) -> None:
    order = description.order
    positives, place = description.positives[order], np.arange(len(order))
    for group, mask in description.groups.items():
        inside = mask[order]
        if inside.any():
            label = "classes" if description.many is None else f"{group}-shot: {inside.sum()}"
            axes.bar(place[inside], positives[inside], color=GROUP_COLOURS[group], label=label)
    drawn = positives
    if description.noise is not None:
        clean = description.noise.clean_positives[order]
        axes.hlines(clean, place - 0.4, place + 0.4, color="black", linewidth=1.2, label="clean positive labels")
        drawn = np.concatenate([drawn, clean])
    for k in np.flatnonzero(positives == 0):
        axes.annotate("0", (k, 0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
    drawn = drawn[drawn > 0]
    bottom, top = (10 ** np.floor(np.log10(drawn.min() / 2)), 1.6 * drawn.max()) if len(drawn) else (1, 10)
    axes.set_ylim(max(bottom, 0.5), top)
    axes.set_yscale("log")
    for bound in {description.many, description.few} - {None}:
        if bottom < bound < top:
            axes.axhline(bound, color="0.35", linestyle="--", linewidth=0.8)
    axes.set(xlim=(-0.8, len(order) - 0.2), ylabel="positive labels")
    _tidy(axes, axes.yaxis, "{x:,.0f}")


def _draw_labels_per_instance(axes: Any, numbers: np.ndarray) -> None:
    axes.barh(np.arange(len(numbers)), numbers, color="0.55")
    axes.set_ylim(max(len(numbers), 6) - 0.4, -0.6)  # 0 at the top
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=3)
    axes.set(xlabel="instances", ylabel="positive labels of an instance")
    _tidy(axes, axes.xaxis, "{x:,.0f}")


def _draw_noise(axes: Any, noise: RealisedNoise, order: np.ndarray) -> None:
    drawn = []
    for name, marker, colour in (("positive to negative", "v", "#CC79A7"), ("negative to positive", "^", "#009E73")):
        attribute = name.replace(" ", "_")
        percentages = 100 * getattr(noise, attribute)
        label = f"{name}: {per_cent(noise.overall[attribute])} overall"
        axes.plot(np.arange(len(order)), percentages[order], marker, color=colour, markersize=4, label=label)
        drawn += percentages[percentages > 0].tolist()
    if drawn and max(drawn) > 20 * min(drawn):  # then rates of 0 are not shown
        axes.set_ylim(min(drawn) / 1.5, 130)
        axes.set_yscale("log")
    else:
        axes.set_ylim(-2, 102)
    axes.set_ylabel("realised noise")
    _tidy(axes, axes.yaxis, "{x:g}%")


def _tidy(axes: Any, numbers: Any, number_format: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    numbers.set_major_formatter(number_format)
    numbers.set_minor_formatter("")
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderpad=0, handlelength=1.2
        )
