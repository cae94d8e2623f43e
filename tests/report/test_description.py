"""The picture of a data set: what is drawn is what was counted."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import label_dataset, long_tailed_labels

from hf_balancemix import describe


@pytest.mark.parametrize("case", ["plain", "noise", "no noise at all", "no labels", "no rows", "wide", "one class"])
def test_plot_draws_every_case_without_a_warning(tmp_path, case):
    labels = long_tailed_labels(0, 60, {"wide": 200, "one class": 1}.get(case, 7))
    others = {"clean_labels": labels} if case == "no noise at all" else {}
    if case == "noise":
        others = {"clean_labels": labels ^ (np.random.default_rng(0).random(labels.shape) < 0.2)}
    if case == "no labels":
        labels = labels * 0
    dataset = label_dataset(labels, **others)
    description = describe(dataset.select([]) if case == "no rows" else dataset, many=20, few=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = description.plot(tmp_path / "figure.png")
        assert str(description)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 2 + bool(others)


def test_plot_shows_the_counts_from_the_commonest_to_the_rarest():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    counts, _, noise = describe(label_dataset(labels, list("abc"), clean_labels=labels), many=2, few=1).plot().axes
    assert sorted((bar.get_x(), bar.get_height()) for bar in counts.patches) == [(-0.4, 3), (0.6, 1), (1.6, 0)]
    assert [label.get_text() for label in noise.get_xticklabels()] == ["a", "b", "c"]
