"""What a data set is like, to print and to draw."""

from __future__ import annotations

import os

import datasets
from matplotlib.figure import Figure

from hf_balancemix.data.describe import Description
from hf_balancemix.report.figures import class_figure


class DrawableDescription(Description):
    """A :class:`~hf_balancemix.data.Description` that draws itself."""

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the class counts, the labels per instance and, where it is known, the realised noise.

        Returns the figure, which belongs to no window; at `path` it is saved too, as PNG, PDF or SVG by its ending.
        """
        figure = class_figure(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def describe(dataset: datasets.Dataset, many: int | None = None, few: int | None = None) -> DrawableDescription:
    """Describe the labels of a data set; no image is read.

    Args:
        dataset: With `labels`, optionally `unknown_labels` and `clean_labels`.
        many, few: A class with more positive labels than `many` is many-shot, with fewer than `few` few-shot. By
            default those of :func:`~hf_balancemix.metrics.shot_bounds`.

    Returns:
        The figures, to be printed, or drawn with `.plot("figure.png")`.

    Raises:
        TypeError, ValueError: As `data.labels.given_labels` for the label columns; `few` is above `many`.

    Example:
        >>> print(describe(load_coco("coco")))  # doctest: +SKIP
    """
    return DrawableDescription.of(dataset, many, few)
