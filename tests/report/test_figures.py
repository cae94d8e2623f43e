"""The figures: what is drawn is what was given."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from hf_balancemix.core import LossHistogram, LossMixtures
from hf_balancemix.metrics import class_groups
from hf_balancemix.report.figures import (
    ClassMixtures,
    figure_pixels,
    figure_png,
    mixture_figure,
    per_class_ap_figure,
    training_curves_figure,
)

NAMES = ["$\\frac", "a\nb", "<script>", "x" * 100, "狗"]  # the first is no formula


def bars(figure):
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(names, [round(bar.get_width(), 6) for bar in axes.patches], strict=False))


def test_bars_are_the_classes_that_have_an_ap_best_first():
    figure = per_class_ap_figure(NAMES, [0.5, None, 0.9, float("nan"), 0.2])
    assert list(bars(figure).items()) == [("<script>", 0.9), ("$\\frac", 0.5), ("狗", 0.2)]
    assert figure_png(figure).startswith(b"\x89PNG")


def test_long_and_broken_names_are_one_short_line():
    shown = list(bars(per_class_ap_figure(NAMES, [0.5, 0.4, 0.3, 0.2, 0.1])))
    assert shown[1] == "a b"
    assert shown[3] == "x" * 39 + "…"


def test_of_many_classes_the_best_and_the_worst_are_shown():
    ap = np.linspace(0, 1, 200)
    figure = per_class_ap_figure([str(k) for k in range(200)], ap)
    shown = [int(name) for name in bars(figure)]
    assert shown == [*range(199, 159, -1), *range(39, -1, -1)]
    assert "of 200" in figure.axes[0].get_title()


def test_groups_have_a_legend_and_colours():
    figure = per_class_ap_figure(list("abc"), [0.3, 0.2, 0.1], class_groups([20_000, 5_000, 5]))
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["many-shot", "medium-shot", "few-shot"]
    assert len({bar.get_facecolor() for bar in figure.axes[0].patches[:3]}) == 3


def test_names_without_figures_are_refused():
    with pytest.raises(ValueError, match="2 class_names for 1 per_class_ap"):
        per_class_ap_figure(["a", "b"], [0.1])


def test_curves_show_what_was_logged_and_nothing_else():
    log = [
        {"loss": 3.0, "epoch": 1.0, "step": 5},
        {"eval_mAP": 0.3, "eval_mAP_few": 0.1, "eval_loss": 2.0, "epoch": 1.0, "step": 5},
        {"loss": float("nan"), "epoch": 2.0, "step": 10},
        {"eval_mAP": 0.4, "eval_loss": 1.0, "epoch": 2.0, "step": 10},
        {"eval_mAP": 0.5, "eval_loss": 0.9, "epoch": 2.0, "step": 10},
        {"train_runtime": 3.0, "epoch": 2.0, "step": 10},
    ]
    figure = training_curves_figure(log)
    panels = {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes
    }
    assert panels == {
        "loss": {"training": [[1, 3]], "evaluation": [[1, 2], [2, 0.9]]},
        "mAP": {"all": [[1, 0.3], [2, 0.5]], "few": [[1, 0.1]]},
    }
    assert training_curves_figure([{"train_runtime": 3.0, "step": 0}]) is None


def mixtures(separated=True):
    generator = torch.Generator().manual_seed(0)
    losses = torch.cat([torch.rand(900, 1, generator=generator) / 2, 3 + torch.rand(100, 1, generator=generator)])
    labels = torch.ones(1000, 1)
    histogram = LossHistogram(1)
    histogram.update(losses, labels)
    m = LossMixtures.fit_histogram(histogram, "dividemix")
    counts = histogram.counts[:, 0].numpy()
    parts = [x[:, 0].numpy() for x in (m.means, m.variances, m.weights, m.separated)]
    return ClassMixtures("$cat$", *parts, counts=counts), losses.numpy()


def test_a_mixture_is_drawn_as_densities_over_its_histogram():
    shown, losses = mixtures()
    figure = mixture_figure([shown])
    negative, positive = figure.axes
    assert negative.get_title() == "$cat$: given negative, 0"
    assert "not separated" in negative.texts[0].get_text()
    assert positive.get_title() == "$cat$: given positive, 1,000"
    stairs = positive.patches[0].get_data()
    expected, _ = np.histogram(losses, stairs.edges)
    # The bins of the histogram are cut at other places, by at most their width.
    drawn = stairs.values * np.diff(stairs.edges) * 1000
    assert abs(drawn.cumsum() - expected.cumsum()).max() < 30
    x = positive.lines[0].get_xdata()
    area = {line.get_label(): np.trapezoid(line.get_ydata(), x) for line in positive.lines}
    assert area["clean"] == pytest.approx(0.9, abs=0.1)  # a little of it lies below 0
    assert area["noisy"] == pytest.approx(0.1, abs=0.02)


def test_a_mixture_without_its_histogram_is_drawn_too():
    shown, _ = mixtures()
    without = ClassMixtures("cat", shown.means, shown.variances, shown.weights, shown.separated)
    figure = mixture_figure([without, shown])
    assert len(figure.axes) == 4
    assert not figure.axes[1].patches
    assert len(figure.axes[1].lines) == 2
    with pytest.raises(ValueError, match="no class"):
        mixture_figure([])


def test_the_same_figure_gives_the_same_bytes():
    first, again = (figure_png(per_class_ap_figure(NAMES, [0.5, 0.4, 0.3, 0.2, 0.1])) for _ in range(2))
    assert first == again
    pixels = figure_pixels(per_class_ap_figure(["a"], [0.5]))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert len(np.unique(pixels)) > 2


def test_pyplot_is_not_touched(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it would fail
    assert figure_png(per_class_ap_figure(["a"], [0.5]))
