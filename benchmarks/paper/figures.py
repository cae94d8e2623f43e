"""The paper's Figures 3, 4, 6 and 7 from plain numbers; each function gives a matplotlib figure of no window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.numbers import mean_and_error, pearson
from hf_balancemix.metrics import class_groups
from hf_balancemix.report.figures import GROUP_COLOURS, new_figure

# Told apart by the colour-blind, too.
_METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def confidence_against_ap(
    panels: Mapping[str, Sequence[tuple[str, float, float]]], names: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Figure 3: is a class that the model is less confident in also one that it is worse at?

    Args:
        panels: By title, a `(group, confidence P(k), average precision)` for each class, both in [0, 1].
        names: By title, the classes' names, written beside the points.
    """
    figure, axes = _panels(len(panels), 4.6, 4.0)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for group, colour in GROUP_COLOURS.items():
            of_group = [(c, ap) for g, c, ap in points if g == group]
            if of_group:
                axis.scatter(*zip(*of_group, strict=True), c=colour, label=f"{group}-shot", s=24)
        for name, (_, confidence, ap) in zip((names or {}).get(title, ()), points, strict=False):
            axis.annotate(
                name.replace("$", r"\$"), (confidence, ap), fontsize=6, xytext=(2, 2), textcoords="offset points"
            )
        r = pearson([c for _, c, _ in points], [ap for *_, ap in points])
        axis.set(title=f"{title}: r = {r:.2f}", xlabel="confidence P(k)", ylabel="average precision")
        axis.legend(fontsize=7, loc="lower right")
    return figure


def rank_pentagon(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Figure 4: the rank of each method in each set-up, on a polygon with a corner a set-up; outside is best.

    Args:
        panels: By title, ranks by method and set-up. A method is drawn where it has a rank in every set-up.
    """
    figure, axes = _panels(len(panels), 4.6, 4.6, polar=True)
    for axis, (title, by_method) in zip(axes, panels.items(), strict=True):
        corners = list(dict.fromkeys(c for row in by_method.values() for c in row))
        angles = [math.pi / 2 - 2 * math.pi * i / max(len(corners), 1) for i in range(len(corners))]
        worst = max((r for row in by_method.values() for r in row.values()), default=1.0)
        for i, (method, row) in enumerate(by_method.items()):
            if set(row) == set(corners):
                outward = [worst + 1 - row[c] for c in corners]
                line = {"color": _METHOD_COLOURS[i % len(_METHOD_COLOURS)], "label": method}
                axis.plot([*angles, angles[0]], [*outward, outward[0]], marker="o", markersize=3, **line)
        axis.set_xticks([a % (2 * math.pi) for a in angles], corners, fontsize=8)
        steps = range(1, math.ceil(worst) + 1)
        axis.set_yticks([worst + 1 - s for s in steps], [f"{s}" for s in steps], fontsize=6)
        axis.set_ylim(0, worst + 0.5)
        axis.set_title(title)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return figure


def sampling_over_epochs(panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> Figure:
    """Figure 6: how likely the minority sampler draws minority and majority classes, relative to uniform sampling.

    Args:
        panels: By title, the lift of each class group (1 is uniform) by epoch, a value a run.
    """
    figure, axes = _panels(len(panels), 4.6, 3.4)
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for group, by_epoch in groups.items():
            epochs = sorted(by_epoch)
            middle = np.array([mean_and_error(by_epoch[e])[0] for e in epochs])
            spread = np.array([mean_and_error(by_epoch[e])[1] or 0.0 for e in epochs])
            axis.plot(epochs, middle, color=GROUP_COLOURS[group], label=f"{group}-shot")
            axis.fill_between(epochs, middle - spread, middle + spread, color=GROUP_COLOURS[group], alpha=0.2)
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="epoch", ylabel="sampling probability / uniform")
        axis.legend(fontsize=7)
    return figure


def class_counts_figure(panels: Mapping[str, Sequence[int]], many: int, few: int) -> Figure:
    """Figure 7: positive labels of each class, from the commonest to the rarest, with the lines between the groups.

    Args:
        panels: By title, the number of positive training labels of each class.
        many: Classes above it are many-shot.
        few: Classes below it are few-shot.
    """
    figure, axes = _panels(len(panels), 5.0, 3.4)
    for axis, (title, counts) in zip(axes, panels.items(), strict=True):
        counts = np.sort(np.asarray(counts))[::-1]
        groups = class_groups(counts, many, few)
        colours = [GROUP_COLOURS[name] for k in range(len(counts)) for name, mask in groups.items() if mask[k]]
        axis.bar(range(len(counts)), np.maximum(counts, 0.5), color=colours, width=0.9)
        axis.set_yscale("log")
        for bound, text in ((many, "many"), (few, "few")):
            if counts.min(initial=bound) <= bound <= counts.max(initial=bound):
                axis.axhline(bound, color="black", linewidth=0.8, linestyle="--")
                axis.annotate(f"{text}: {bound:,}", (len(counts) - 1, bound), fontsize=7, ha="right", va="bottom")
        sizes = ", ".join(f"{mask.sum()} {name}" for name, mask in groups.items())
        axis.set(title=f"{title}: {sizes}", xlabel="class by rank", ylabel="positive labels")
    return figure


def _panels(number: int, width: float, height: float, polar: bool = False) -> tuple[Figure, list[Axes]]:
    figure = new_figure(width * max(number, 1), height, dpi=150)
    kind = {"projection": "polar"} if polar else {}
    return figure, [figure.add_subplot(1, number, i + 1, **kind) for i in range(number)]
