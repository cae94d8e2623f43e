"""What a multi-label data set is like, in figures and in a picture, and how to split it without changing that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import datasets
import numpy as np

from hf_balancemix.data.labels import class_names, label_matrix
from hf_balancemix.data.noise import id_words, uniform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_SHOWN = 24  # classes in the printed table: all of them, or the first and the last half of so many
_NAMED = 120  # classes in the figure whose names are readable
_COLOURS = {"many": "#0072B2", "medium": "#56B4E9", "few": "#D55E00"}  # told apart by the colour-blind, too


@dataclass(frozen=True, eq=False)
class RealisedNoise:
    """How the given labels differ from the clean ones, over the labels that are known. Each field is `(K,)` int64."""

    clean_positives: np.ndarray
    """Labels whose clean value is 1."""
    clean_negatives: np.ndarray
    """Labels whose clean value is 0."""
    lost: np.ndarray
    """Clean positive labels that are given as negative."""
    gained: np.ndarray
    """Clean negative labels that are given as positive."""

    @property
    def positive_to_negative(self) -> np.ndarray:
        """`(K,)` share of each class's clean positive labels that are lost; NaN where there are none."""
        return _ratio(self.lost, self.clean_positives)

    @property
    def negative_to_positive(self) -> np.ndarray:
        """`(K,)` share of each class's clean negative labels that are gained; NaN where there are none."""
        return _ratio(self.gained, self.clean_negatives)

    @property
    def per_class(self) -> np.ndarray:
        """`(K,)` share of each class's labels that are wrong."""
        return _ratio(self.lost + self.gained, self.clean_positives + self.clean_negatives)

    @property
    def overall(self) -> dict[str, float]:
        """Shares over all classes: `all` of all labels, `positive_to_negative` and `negative_to_positive`."""
        lost, gained = self.lost.sum(), self.gained.sum()
        positives, negatives = self.clean_positives.sum(), self.clean_negatives.sum()
        return {
            "all": float(_ratio(lost + gained, positives + negatives)),
            "positive_to_negative": float(_ratio(lost, positives)),
            "negative_to_positive": float(_ratio(gained, negatives)),
        }


@dataclass(frozen=True, eq=False)
class Description:
    """The figures of `describe`; `print` shows them, `plot` draws them. N instances, K classes."""

    names: list[str]
    """The K class names."""
    num_instances: int
    """N."""
    positives: np.ndarray
    """`(K,)` int64, N_k: given positive labels of each class."""
    negatives: np.ndarray
    """`(K,)` int64: given negative labels of each class; unknown labels are not among them."""
    labels_per_instance: np.ndarray
    """int64, index n: number of instances with n positive labels."""
    groups: dict[str, np.ndarray]
    """`many`, `medium`, `few`: boolean `(K,)`, by the clean positive labels where they are known, as in the paper."""
    many: int
    """A class with more positive labels is many-shot."""
    few: int
    """A class with fewer positive labels is few-shot."""
    noise: RealisedNoise | None
    """Where the data set has `clean_labels`."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.names)

    @property
    def num_unknown(self) -> int:
        """Labels that are not known."""
        return self.num_instances * self.num_classes - int(self.positives.sum() + self.negatives.sum())

    @property
    def mean_labels(self) -> float:
        """Positive labels of an instance on average; NaN where there is no instance."""
        return float(_ratio(self.positives.sum(), self.num_instances))

    @property
    def empty_classes(self) -> list[str]:
        """Names of the classes without a positive label."""
        return [name for name, number in zip(self.names, self.positives, strict=True) if number == 0]

    @property
    def class_imbalance(self) -> float:
        """CLS_Imb of Eq. 12, max N_k / min N_k.

        Over the classes that have a positive label, as it would be infinite else; `empty_classes` has the others.
        NaN where no class has one.
        """
        some = self.positives[self.positives > 0]
        return float(some.max() / some.min()) if len(some) else float("nan")

    @property
    def positive_negative_imbalance(self) -> float:
        """PN_Imb of Eq. 13, negative labels / positive labels; NaN where there are no positive ones."""
        return float(_ratio(self.negatives.sum(), self.positives.sum()))

    @property
    def group_sizes(self) -> dict[str, int]:
        """Number of `many`-, `medium`- and `few`-shot classes."""
        return {group: int(mask.sum()) for group, mask in self.groups.items()}

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *self._class_table()])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the class counts, the labels per instance and, where it is known, the realised noise.

        Args:
            path: Where to save the figure too, as PNG, PDF or SVG by its ending.

        Returns:
            The matplotlib figure, which belongs to no window.
        """
        from matplotlib.figure import Figure  # here, as the figures alone do not need it

        rows = 1 if self.noise is None else 2
        width = min(15.0, max(5.0, 0.13 * self.num_classes))  # inches
        figure = Figure(figsize=(width + 3.5, 4.4 if rows == 1 else 6.8), layout="constrained")
        grid = figure.add_gridspec(rows, 2, width_ratios=[width, 2.5], height_ratios=[3, 2][:rows])
        counts = figure.add_subplot(grid[0, 0])
        order = self._order()
        self._draw_counts(counts, order)
        self._draw_labels_per_instance(figure.add_subplot(grid[:, 1]))
        lowest = counts
        if self.noise is not None:
            lowest = figure.add_subplot(grid[1, 0], sharex=counts)
            self._draw_noise(lowest, order)
            counts.tick_params(bottom=False, labelbottom=False)
        if self.num_classes <= _NAMED:
            lowest.set_xticks(range(self.num_classes), [self.names[k] for k in order], rotation=90, fontsize=7)
        else:
            lowest.set_xlabel("class, from the commonest to the rarest")
        figure.suptitle("\n".join(self._summary()[:2]), fontsize=10, x=0.01, horizontalalignment="left")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _order(self) -> np.ndarray:
        """Class indices from the commonest to the rarest, by the counts that the groups are made of."""
        return np.argsort(-self._group_counts(), kind="stable")

    def _group_counts(self) -> np.ndarray:
        return self.positives if self.noise is None else self.noise.clean_positives

    def _group_of(self, k: int) -> str:
        return next(group for group, mask in self.groups.items() if mask[k])

    def _summary(self) -> list[str]:
        """Lines of text, the first two of which are the figure's title."""
        sizes = self.group_sizes
        lines = [
            f"{self.num_instances:,} instances, {self.num_classes:,} classes, {self.positives.sum():,} positive "
            f"labels ({self.mean_labels:.2f} an instance)",
            f"class imbalance (Eq. 12) {self.class_imbalance:.1f}, negative to positive labels (Eq. 13) "
            f"{self.positive_negative_imbalance:.1f}",
            f"{sizes['many']} many-shot (more than {self.many:,}), {sizes['medium']} medium-shot and "
            f"{sizes['few']} few-shot classes (fewer than {self.few:,} "
            f"{'' if self.noise is None else 'clean '}positive labels)",
            f"instances by number of positive labels: {self._histogram_text()}",
        ]
        if self.empty_classes:
            shown = ", ".join(self.empty_classes[:5]) + (", ..." if len(self.empty_classes) > 5 else "")
            lines.append(f"no positive label, so left out of Eq. 12: {shown} (classes: {len(self.empty_classes)})")
        if self.num_unknown:
            share = self.num_unknown / (self.num_instances * self.num_classes)
            lines.append(f"unknown labels: {self.num_unknown:,} ({share:.1%}), neither positive nor negative")
        if self.noise is not None:
            overall = self.noise.overall
            lines.append(
                f"wrong labels: {_per_cent(overall['all'])}; positive to negative "
                f"{_per_cent(overall['positive_to_negative'])}, negative to positive "
                f"{_per_cent(overall['negative_to_positive'])}"
            )
        return lines

    def _histogram_text(self) -> str:
        some = [(n, number) for n, number in enumerate(self.labels_per_instance.tolist()) if number]
        parts = [f"{n}: {number:,}" for n, number in some[:8]]
        more = sum(number for _, number in some[8:])
        return "  ".join(parts + [f"more: {more:,}"] * bool(more))

    def _class_table(self) -> list[str]:
        order = self._order().tolist()
        cut = len(order) > _SHOWN
        shown = order[: _SHOWN // 2] + order[-_SHOWN // 2 :] if cut else order
        rows = [["class", "group", "positives", "share"]]
        rows += [
            [
                self.names[k],
                self._group_of(k),
                f"{self.positives[k]:,}",
                _per_cent(_ratio(self.positives[k], self.num_instances)),
            ]
            for k in shown
        ]
        if self.noise is not None:
            rows[0] += ["clean", "pos -> neg", "neg -> pos"]
            lost, gained = self.noise.positive_to_negative, self.noise.negative_to_positive
            for row, k in zip(rows[1:], shown, strict=True):
                row += [f"{self.noise.clean_positives[k]:,}", _per_cent(lost[k]), _per_cent(gained[k])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
            for row in rows
        ]
        if cut:
            lines.insert(1 + _SHOWN // 2, f"... {len(order) - len(shown):,} more")
        return lines

    def _draw_counts(self, axes: Axes, order: np.ndarray) -> None:
        place = np.arange(self.num_classes)
        for group, mask in self.groups.items():
            own = mask[order]
            if own.any():
                label = f"{group}-shot: {own.sum()}"
                axes.bar(place[own], self.positives[order][own], width=0.8, color=_COLOURS[group], label=label)
        drawn = self.positives
        if self.noise is not None:
            clean = self.noise.clean_positives[order]
            axes.hlines(clean, place - 0.4, place + 0.4, color="black", linewidth=1.2, label="clean positive labels")
            drawn = np.concatenate([drawn, clean])
        for k in np.flatnonzero(self.positives[order] == 0):
            axes.annotate("0", (k, 0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
        drawn = drawn[drawn > 0]
        bottom, top = (10 ** np.floor(np.log10(drawn.min() / 2)), 1.6 * drawn.max()) if len(drawn) else (1, 10)
        axes.set_ylim(max(bottom, 0.5), top)
        axes.set_yscale("log")
        for bound in {self.many, self.few}:
            if bottom < bound < top:
                axes.axhline(bound, color="0.35", linestyle="--", linewidth=0.8)
        axes.set_ylabel("positive labels")
        axes.set_xlim(-0.8, self.num_classes - 0.2)
        _finish(axes, axes.yaxis, "{x:,.0f}", legend=True)

    def _draw_labels_per_instance(self, axes: Axes) -> None:
        axes.barh(np.arange(len(self.labels_per_instance)), self.labels_per_instance, height=0.8, color="0.55")
        axes.set_ylim(max(len(self.labels_per_instance), 6) - 0.4, -0.6)  # 0 at the top
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=3)
        axes.set_ylabel("positive labels of an instance")
        axes.set_xlabel("instances")
        _finish(axes, axes.xaxis, "{x:,.0f}", legend=False)

    def _draw_noise(self, axes: Axes, order: np.ndarray) -> None:
        place, overall = np.arange(self.num_classes), self.noise.overall
        drawn = []
        directions = (("positive_to_negative", "v", "#CC79A7"), ("negative_to_positive", "^", "#009E73"))
        for name, marker, colour in directions:
            per_cents = 100 * getattr(self.noise, name)[order]
            label = f"{name.replace('_', ' ')}: {_per_cent(overall[name])} overall"
            axes.plot(place, per_cents, marker, color=colour, markersize=4, label=label)
            drawn += per_cents[per_cents > 0].tolist()
        if drawn and max(drawn) > 20 * min(drawn):  # then rates of 0 are not shown
            axes.set_ylim(min(drawn) / 1.5, 130)
            axes.set_yscale("log")
        else:
            axes.set_ylim(-2, 102)
        axes.set_ylabel("realised noise")
        _finish(axes, axes.yaxis, "{x:g}%", legend=True)


def describe(dataset: datasets.Dataset, many: int = 10_000, few: int = 1_000) -> Description:
    """Describe the labels of a data set; no image is read.

    Labels in `unknown_labels` are neither positive nor negative and take no part. The figures are those of the given
    labels, `labels`; only the groups count the clean ones where the data set has `clean_labels`.

    Args:
        dataset: With `labels`, optionally `unknown_labels` and `clean_labels`.
        many: A class with more positive labels than this is many-shot.
        few: A class with fewer positive labels than this is few-shot; at most `many`.

    Returns:
        The figures: print them, or draw them with `.plot("figure.png")`.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or a label column is of another type.
        ValueError: A label column is absent or not valid (see `data.labels.label_matrix`), has other classes than
            `labels`, or lists a class as unknown that `labels` lists too; `few` is above `many`.

    Example:
        >>> print(describe(load_coco("coco")))  # doctest: +SKIP
    """
    if few > many:
        raise ValueError(f"few={few} is above many={many}; few must be at most many. Swap the two bounds.")
    names = class_names(dataset)
    labels, unknown = _known_labels(dataset)
    known = ~unknown
    positives = labels.sum(axis=0, dtype=np.int64)
    noise, clean_positives = None, positives
    if "clean_labels" in dataset.column_names:
        clean = _matrix_like(dataset, "clean_labels", labels)
        clean_positives = clean.sum(axis=0, dtype=np.int64)
        noise = RealisedNoise(
            clean_positives=(clean & known).sum(axis=0, dtype=np.int64),
            clean_negatives=(~clean & known).sum(axis=0, dtype=np.int64),
            lost=(clean & ~labels & known).sum(axis=0, dtype=np.int64),
            gained=(~clean & labels & known).sum(axis=0, dtype=np.int64),
        )
    is_many, is_few = clean_positives > many, clean_positives < few
    return Description(
        names=names,
        num_instances=len(labels),
        positives=positives,
        negatives=(~labels & known).sum(axis=0, dtype=np.int64),
        labels_per_instance=np.bincount(labels.sum(axis=1, dtype=np.int64), minlength=1),
        groups={"many": is_many, "medium": ~(is_many | is_few), "few": is_few},
        many=many,
        few=few,
        noise=noise,
    )


def iterative_split(
    dataset: datasets.Dataset, sizes: Sequence[int] | Sequence[float], seed: int = 0
) -> list[datasets.Dataset]:
    """Split a data set so that each part has its share of every class.

    Iterative stratification after Sechidis, Tsoumakas and Vlahavas (ECML PKDD 2011), with exact sizes. The class with
    the fewest positive labels left is dealt out first, each of its instances to the part that lacks most of that
    class, then to the part with most room, then by a draw; instances without positive labels go where there is most
    room. Unknown labels (`unknown_labels`) are no negatives: among the instances without positive labels they are
    dealt out in the same way, so that they keep their shares as far as those instances can even them out.

    The parts are a function of `sizes`, `seed` and the instances' ids and labels: neither the order of the rows nor
    the machine matters. Rows keep their order within a part.

    Args:
        dataset: With `labels` and a unique `image_id`, optionally `unknown_labels`.
        sizes: The parts' sizes: integers that sum to N, or fractions that sum to 1.
        seed: Seed of the order and of the draws, at least 0.

    Returns:
        The parts, in the order of `sizes`.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or a label column is of another type.
        ValueError: `sizes` are not all positive integers or all positive fractions, do not sum to N or 1, or leave a
            part empty; `image_id` is absent or not unique; labels as in `describe`.

    Example:
        >>> train, val = iterative_split(dataset, [0.9, 0.1])  # doctest: +SKIP
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}.")
    labels, unknown = _known_labels(dataset)
    sizes = _part_sizes(sizes, len(labels))
    if "image_id" not in dataset.column_names:
        raise ValueError(
            f"no 'image_id' among the columns {dataset.column_names}: the split is drawn from the ids. "
            f"Add one, for instance dataset.add_column('image_id', list(range(len(dataset))))."
        )
    ids = dataset.select_columns(["image_id"]).with_format("arrow")[:]["image_id"]
    words = id_words(ids.to_pylist())
    if len(np.unique(words)) < len(words):
        raise ValueError(
            f"image_id is not unique ({len(np.unique(words))} values in {len(words)} rows). Remove the copies, or "
            f"replace the column by row numbers."
        )
    key = int(id_words([f"iterative_split/{seed}"])[0])
    order = np.argsort(uniform(key, words, 0), kind="stable")
    tie_breaks = uniform(key, words, 1)
    columns = np.hstack([labels, unknown[:, unknown.any(axis=0)]])
    part = np.empty(len(labels), dtype=np.int64)
    part[order] = _deal(columns[order], labels.shape[1], sizes, tie_breaks[order].tolist())
    return [dataset.select(np.flatnonzero(part == j)) for j in range(len(sizes))]


def _deal(columns: np.ndarray, num_classes: int, sizes: list[int], tie_breaks: list[float]) -> np.ndarray:
    """The part of each instance.

    Args:
        columns: `(N, L)` bool, what to stratify: `num_classes` columns of positive labels, then those of unknown ones.
        num_classes: K.
        sizes: Sizes of the parts, which sum to N.
        tie_breaks: N draws in [0, 1).

    Returns:
        `(N,)` int64 index of the part.
    """
    left = columns.sum(axis=0, dtype=np.int64)
    wanted = np.outer(sizes, left)  # in units of 1 / N, so that all of it is exact
    room = list(sizes)
    part = np.full(len(columns), -1, dtype=np.int64)

    def deal(i: int, lack: list[int], present: np.ndarray) -> None:
        most = max((lack[j], room[j]) for j in range(len(room)) if room[j])
        equal = [j for j in range(len(room)) if (lack[j], room[j]) == most]
        best = equal[int(tie_breaks[i] * len(equal))]
        part[i] = best
        room[best] -= 1
        wanted[best, present] -= len(columns)

    while left.any():
        group = left[:num_classes] if left[:num_classes].any() else left
        rarest = int(np.where(group > 0, group, len(columns) + 1).argmin())
        members = np.flatnonzero(columns[:, rarest] & (part < 0))
        left -= columns[members].sum(axis=0, dtype=np.int64)
        for i in members.tolist():
            deal(i, wanted[:, rarest].tolist(), np.flatnonzero(columns[i]))
    nothing = np.empty(0, dtype=np.int64)
    for i in np.flatnonzero(part < 0).tolist():
        deal(i, [0] * len(room), nothing)
    return part


def _part_sizes(sizes: Sequence[int] | Sequence[float], num_instances: int) -> list[int]:
    sizes = [size.item() if isinstance(size, np.generic) else size for size in sizes]
    needed = f"positive integers that sum to {num_instances}, or positive fractions that sum to 1, are required"
    if not sizes or any(isinstance(size, bool) or not isinstance(size, Real) or not size > 0 for size in sizes):
        raise ValueError(f"sizes={sizes}: {needed}.")
    if all(isinstance(size, Integral) for size in sizes):
        if sum(sizes) != num_instances:
            raise ValueError(f"sizes={sizes} sum to {sum(sizes)}: {needed}. Add a part for what is left.")
        return sizes
    if any(isinstance(size, Integral) for size in sizes) or abs(sum(sizes) - 1) > 1e-6:
        raise ValueError(f"sizes={sizes} sum to {sum(sizes):g}: {needed}. Add a part for what is left.")
    exact = np.array(sizes) * num_instances
    counts = np.floor(exact + 1e-6).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: num_instances - counts.sum()]  # largest remainders
    counts[largest] += 1
    if not counts.all():
        raise ValueError(f"sizes={sizes} of {num_instances} instances leave a part empty. Give it a larger fraction.")
    return counts.tolist()


def _known_labels(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """`(N, K)` bool each: the positive labels and the unknown ones, which exclude one another."""
    labels = label_matrix(dataset).numpy().astype(bool)
    if "unknown_labels" not in dataset.column_names:
        return labels, np.zeros_like(labels)
    unknown = _matrix_like(dataset, "unknown_labels", labels)
    both = np.argwhere(labels & unknown)
    if len(both):
        row, k = both[0].tolist()
        raise ValueError(
            f"row {row}: class '{class_names(dataset)[k]}' is in 'labels' and in 'unknown_labels'. Remove it from one."
        )
    return labels, unknown


def _matrix_like(dataset: datasets.Dataset, column: str, labels: np.ndarray) -> np.ndarray:
    if class_names(dataset, column) != class_names(dataset):
        raise ValueError(f"columns 'labels' and '{column}' have different classes. Give both the same feature.")
    return label_matrix(dataset, column).numpy().astype(bool)


def _ratio(numerator: np.ndarray | int, denominator: np.ndarray | int) -> np.ndarray:
    """NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


def _per_cent(share: float) -> str:
    return "-" if np.isnan(share) else f"{share:.2%}"


def _finish(axes: Axes, numbers: Axis, number_format: str, legend: bool) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    numbers.set_major_formatter(number_format)
    numbers.set_minor_formatter("")
    axes.tick_params(labelsize=8)
    if legend:
        axes.legend(
            frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderpad=0, handlelength=1.2
        )
