"""What the labels of a data set are like, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import datasets
import numpy as np
from numpy.typing import ArrayLike

from hf_balancemix.core.given_labels import label_counts
from hf_balancemix.data.files import PAPER_DATA
from hf_balancemix.data.labels import class_names, sparse_labels

_SHOWN = 24  # classes in the printed table: all of them, or the first and the last half of so many


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
        """Shares over all classes, `all` of all labels, `positive_to_negative` and `negative_to_positive`."""
        lost, gained = self.lost.sum(), self.gained.sum()
        positives, negatives = self.clean_positives.sum(), self.clean_negatives.sum()
        return {
            "all": float(_ratio(lost + gained, positives + negatives)),
            "positive_to_negative": float(_ratio(lost, positives)),
            "negative_to_positive": float(_ratio(gained, negatives)),
        }


@dataclass(frozen=True, eq=False)
class Description:
    """The labels of a data set of N instances and K classes in numbers; `print` shows them.

    Labels in `unknown_labels` are neither positive nor negative and take no part. The figures are those of the given
    labels, `labels`; only the groups count the clean ones where the data set has `clean_labels`.
    """

    names: list[str]
    """The K class names."""
    num_instances: int
    """N."""
    positives: np.ndarray
    """`(K,)` int64, N_k: given positive labels of each class."""
    negatives: np.ndarray
    """`(K,)` int64: given negative labels of each class; unknown labels are not among them."""
    labels_per_instance: np.ndarray
    """1-D int64, at index n the number of instances with n positive labels."""
    groups: dict[str, np.ndarray]
    """`many`, `medium`, `few`: boolean `(K,)`, by the clean positive labels where they are known, as in the paper."""
    many: int | None
    """A class with more positive labels is many-shot; None where all classes are in one group, medium-shot."""
    few: int | None
    """A class with fewer positive labels is few-shot; None as `many`."""
    noise: RealisedNoise | None
    """Where the data set has `clean_labels`."""

    @classmethod
    def of(cls, dataset: datasets.Dataset, many: int | None = None, few: int | None = None) -> Self:
        """Count the labels of a data set; see :func:`hf_balancemix.describe`."""
        from hf_balancemix.metrics import class_groups, shot_bounds  # here, as it takes scikit-learn with it

        given = sparse_labels(dataset)
        positive, unknown = given == 1, given == -1
        negatives, positives = (count.numpy() for count in label_counts(given))
        clean_positives, noise = positives, None
        if "clean_labels" in dataset.features:
            clean = sparse_labels(dataset, "clean_labels")
            kept = positive.multiply(clean).sum(axis=0)
            clean_positives = clean.sum(axis=0)
            known = clean_positives - unknown.multiply(clean).sum(axis=0)
            noise = RealisedNoise(
                clean_positives=known,
                clean_negatives=positives + negatives - known,
                lost=known - kept,
                gained=positives - kept,
            )
        bounds = shot_bounds(clean_positives, many, few, of_paper=is_of_paper(dataset))
        one_group = {name: np.full(len(positives), name == "medium") for name in ("many", "medium", "few")}
        return cls(
            names=class_names(dataset),
            num_instances=given.shape[0],
            positives=positives,
            negatives=negatives,
            labels_per_instance=np.bincount(positive.sum(axis=1), minlength=1),
            groups=class_groups(clean_positives, *bounds) if bounds else one_group,
            many=bounds and bounds[0],
            few=bounds and bounds[1],
            noise=noise,
        )

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
        return "\n".join([*self.headline, *self._summary(), "", *self._class_table()])

    @property
    def order(self) -> np.ndarray:
        """`(K,)` class indices from the commonest to the rarest, by their clean positive labels where known."""
        return np.argsort(-(self.positives if self.noise is None else self.noise.clean_positives), kind="stable")

    @property
    def headline(self) -> list[str]:
        """Two lines of text, on the size of the data set, and its imbalance."""
        return [
            f"{self.num_instances:,} instances, {self.num_classes:,} classes, {self.positives.sum():,} positive "
            f"labels ({self.mean_labels:.2f} an instance)",
            f"class imbalance (Eq. 12) {self.class_imbalance:.1f}, negative to positive labels (Eq. 13) "
            f"{self.positive_negative_imbalance:.1f}",
        ]

    def _summary(self) -> list[str]:
        sizes = self.group_sizes
        some = [(n, number) for n, number in enumerate(self.labels_per_instance.tolist()) if number]
        counts = [f"{n}: {number:,}" for n, number in some[:8]]
        if some[8:]:
            counts.append(f"more: {sum(number for _, number in some[8:]):,}")
        lines = (
            []
            if self.many is None
            else [
                f"{sizes['many']} many-shot (more than {self.many:,}), {sizes['medium']} medium-shot and "
                f"{sizes['few']} few-shot classes (fewer than {self.few:,} "
                f"{'' if self.noise is None else 'clean '}positive labels)"
            ]
        )
        lines.append(f"instances by number of positive labels: {'  '.join(counts)}")
        if self.empty_classes:
            shown = ", ".join(self.empty_classes[:5]) + (", ..." if len(self.empty_classes) > 5 else "")
            lines.append(f"no positive label, so left out of Eq. 12: {shown} (classes: {len(self.empty_classes)})")
        if self.num_unknown:
            share = self.num_unknown / (self.num_instances * self.num_classes)
            lines.append(f"unknown labels: {self.num_unknown:,} ({share:.1%}), neither positive nor negative")
        if self.noise is not None:
            wrong, lost, gained = map(per_cent, self.noise.overall.values())
            lines.append(f"wrong labels: {wrong}; positive to negative {lost}, negative to positive {gained}")
        return lines

    def _class_table(self) -> list[str]:
        order = self.order.tolist()
        cut = len(order) > _SHOWN
        shown = order[: _SHOWN // 2] + order[-_SHOWN // 2 :] if cut else order
        share = _ratio(self.positives, np.full(len(order), self.num_instances))
        columns = [
            ["class", *(self.names[k] for k in shown)],
            ["positives", *(f"{self.positives[k]:,}" for k in shown)],
            ["share", *(per_cent(share[k]) for k in shown)],
        ]
        if self.many is not None:
            groups = [next(group for group, mask in self.groups.items() if mask[k]) for k in shown]
            columns.insert(1, ["group", *groups])
        if self.noise is not None:
            lost, gained = self.noise.positive_to_negative, self.noise.negative_to_positive
            columns += [
                ["clean", *(f"{self.noise.clean_positives[k]:,}" for k in shown)],
                ["pos -> neg", *(per_cent(lost[k]) for k in shown)],
                ["neg -> pos", *(per_cent(gained[k]) for k in shown)],
            ]
        for i, column in enumerate(columns):
            width = max(map(len, column))
            columns[i] = [
                cell.ljust(width) if column[0] in ("class", "group") else cell.rjust(width) for cell in column
            ]
        lines = ["  ".join(row) for row in zip(*columns, strict=True)]
        if cut:
            lines.insert(1 + _SHOWN // 2, f"... {len(order) - len(shown):,} more")
        return lines


def is_of_paper(dataset: datasets.Dataset) -> bool:
    """Whether it is one of the paper's data sets: COCO, VOC or DeepFashion, as it was published."""
    return dataset.info.dataset_name in PAPER_DATA


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> np.ndarray:
    """NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


def per_cent(share: float) -> str:
    """A share with two decimals; a dash for NaN."""
    return "-" if np.isnan(share) else f"{share:.2%}"
