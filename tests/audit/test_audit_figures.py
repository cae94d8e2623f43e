"""The audit's figures: what is drawn, and where."""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings

import datasets
import numpy as np
import pytest
from conftest import NAMES, label_dataset, make_dataset
from PIL import Image
from test_report import audit_of, rows_of

from hf_balancemix.audit import precision_figure, rates_figure, surest_figure
from hf_balancemix.report.figures import figure_pixels, figure_png

HOSTILE = ["$x", "a_b{", "$\\frac$", "<b>", "狗"]  # no formulas


def texts(axes):
    return [text.get_text() for text in axes.texts]


# The sheet


def test_a_sheet_has_a_row_a_class_with_wrong_positives_on_the_left_and_missing_labels_on_the_right(tmp_path, caplog):
    dataset = make_dataset(tmp_path / "images", 10)
    features = dataset.features
    labels = [[0]] * 5 + [[1]] * 5
    dataset = dataset.remove_columns("labels").add_column("labels", labels, feature=features["labels"])
    for number, colour in ((0, "red"), (1, "lime"), (5, "blue")):
        Image.new("RGB", (40, 20), colour).save(tmp_path / "images" / f"{number:03}.png")
    (tmp_path / "images" / "002.png").write_bytes(b"no image")
    # ant is given to the images 0, 1, 2 and lacks in 5; only bee has nothing that is missing.
    audit = audit_of(rows_of(dataset, (5, 1), (1, 0), (0, 0), (5, 0), (2, 0)))
    with caplog.at_level(logging.WARNING, "hf_balancemix"):
        figure = surest_figure(audit, dataset, per_class=3)
    [axes] = figure.axes
    assert "1 of 5 images" in caplog.text
    shown = texts(axes)
    assert shown[1:] == [
        "bee", "given present, suggested absent", "0.90", "bee", "no missing label",
        "ant", "given present, suggested absent", "0.89", "0.88", "no image", "0.86",
        "ant", "given absent, suggested present", "0.87",
    ]  # fmt: skip
    # Each image is as wide as a cell, twice as wide as high, and below the heading of its class and kind.
    bee, first, second, missing = (image.get_extent() for image in axes.images)
    for left, right, bottom, top in (bee, first, second, missing):
        assert right - left == pytest.approx(1.2)
        assert bottom - top == pytest.approx(0.6)
    heading = {(t.get_text(), t.get_position()[0] > 3): t.get_position() for t in axes.texts}
    assert bee[0] == first[0] == pytest.approx(heading["ant", False][0])
    assert missing[0] == pytest.approx(heading["ant", True][0])
    assert first[2:] == second[2:] == missing[2:]
    assert second[0] >= first[1]
    assert bee[2] < heading["ant", False][1] < first[3]
    # And the pixels there are those of the image.
    pixels = figure_pixels(figure)
    for (left, right, bottom, top), colour in zip(
        (bee, first, second, missing), ((0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 0, 255)), strict=True
    ):
        drawn = pixels[round(50 * (bottom + top)), round(50 * (left + right))]
        assert drawn == pytest.approx(np.array(colour), abs=3)


def test_a_sheet_reads_files_without_a_data_set_and_shows_the_classes_and_as_many_as_are_asked_for(tmp_path):
    make_dataset(tmp_path / "images", 1)
    file = str(tmp_path / "images" / "000.png")
    audit = audit_of([(n, file, "cat" if n else "dog", 1, 0.9 - n / 100) for n in range(9)])
    assert len(surest_figure(audit).axes[0].images) == 1 + 4
    figure = surest_figure(audit, classes=["elk", "cat"], per_class=2)
    [axes] = figure.axes
    assert len(axes.images) == 2
    assert texts(axes)[1:4] == ["elk", "no wrong positive", "elk"]
    many = audit_of([(n, file, str(n), 1, 0.9 - n / 100) for n in range(12)], [str(n) for n in range(12)])
    axes = surest_figure(many, per_class=1).axes[0]
    assert "10 of 12 classes" in texts(axes)[0]
    assert "11" not in texts(axes)
    assert not surest_figure(audit, classes=["elk"]).axes[0].images  # a class that nobody suspects


# Rates against average precision


def rates(names, wrong, missing):
    audit = audit_of([], names)
    classes = [
        dataclasses.replace(c, wrong=w, missing=m) for c, w, m in zip(audit.classes, wrong, missing, strict=True)
    ]
    return dataclasses.replace(audit, classes=classes)


def test_rates_are_points_with_intervals_and_names_and_classes_without_one_are_counted():
    wrong = [(0.2, 0.1, 0.4), None, (0.1, 0.05, 0.1), (0.3, 0.3, 0.3), None]
    missing = [(0.02, 0.0, 0.03)] + [None] * 4
    left, right = rates_figure(rates(NAMES, wrong, missing), [0.5, 0.6, 0.9, None, float("nan")]).axes
    assert left.lines[0].get_xydata() == pytest.approx(np.array([[0.5, 20], [0.9, 10]]))
    intervals = [path.vertices.tolist() for path in left.collections[0].get_paths()]
    assert np.array(intervals) == pytest.approx(np.array([[[0.5, 10], [0.5, 40]], [[0.9, 5], [0.9, 10]]]))
    assert {text.get_text(): text.xy for text in left.texts} == {"ant": (0.5, 20), "cat": (0.9, 10)}
    assert "2 of 5 classes, the others without" in left.get_title()
    assert right.lines[0].get_xydata() == pytest.approx(np.array([[0.5, 2]]))
    assert "1 of 5 classes, the others without" in right.get_title()


def test_names_lie_on_no_point_and_on_no_other_name():
    rng = np.random.default_rng(0)
    names = [f"class number {k}" for k in range(40)]
    values = [(rate, rate, rate) for rate in rng.random(40)]
    figure = rates_figure(rates(names, values, values), rng.random(40))
    png = figure_png(figure)
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert 5 < len(boxes) < 40
        points = axes.transData.transform(axes.lines[0].get_xydata())
        assert not any(box.contains(*point) for box in boxes for point in points)
        assert not any(box.count_overlaps(boxes[:k]) for k, box in enumerate(boxes))
        assert all(axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) for box in boxes)
    assert figure_png(figure) == png


# Precision over rank


def test_precision_over_rank_and_dashed_the_mean_score():
    given = [[1, 0], [1, 0], [1, 0], [1, 0]]
    clean = [[0, 0], [1, 1], [0, 0], [1, 0]]
    dataset = label_dataset(given, ["a", "b"], clean_labels=clean)
    # In the order of the scores: wrong, right (both given), missing, wrong (given).
    rows = [(0, 0.9), (1, 0.8), (1, 0.7), (2, 0.5)]
    kinds = [("a", 1), ("a", 1), ("b", 0), ("a", 1)]
    audit = audit_of([(i, None, *kind, p) for (i, p), kind in zip(rows, kinds, strict=True)], ["a", "b"])
    lines = [line.get_xydata() for line in precision_figure(audit, dataset).axes[0].lines]
    expected = [
        [[1, 1], [2, 1 / 2], [3, 2 / 3]],  # wrong positives
        [[1, 0.9], [2, 0.85], [3, 2.2 / 3]],
        [[1, 1]],  # missing labels
        [[1, 0.7]],
        [[1, 1], [2, 1 / 2], [3, 2 / 3], [4, 3 / 4]],  # both
        [[1, 0.9], [2, 0.85], [3, 0.8], [4, 2.9 / 4]],
    ]
    assert len(lines) == len(expected) + 1  # and the dashed one of the legend
    for drawn, points in zip(lines, expected, strict=False):
        assert drawn == pytest.approx(np.array(points))


# All


def test_names_with_signs_of_formulas_and_of_other_scripts_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it would fail
    dataset = make_dataset(tmp_path / "images", 5, names=HOSTILE)  # image i has class i
    audit = audit_of([(100 + k, None, name, 1, 0.5) for k, name in enumerate(HOSTILE)], HOSTILE, wrong=(0.1, 0, 0.2))
    clean = dataset.add_column("clean_labels", dataset["labels"][:], feature=dataset.features["labels"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet, by_class = surest_figure(audit, dataset), rates_figure(audit, [0.1, 0.3, 0.5, 0.7, 0.9])
        for figure in (sheet, by_class, precision_figure(audit, clean)):
            assert figure_png(figure).startswith(b"\x89PNG")
    assert set(HOSTILE) <= set(texts(sheet.axes[0]))
    assert set(HOSTILE) == set(texts(by_class.axes[0]))


def test_what_cannot_be_drawn_is_refused_in_one_sentence(dataset):
    audit = audit_of(rows_of(dataset, (0, 0)))
    clean = dataset.add_column("clean_labels", dataset["labels"][:], feature=dataset.features["labels"])
    nothing_known = datasets.Dataset.from_dict({"image_id": [7], "labels": [[1, 0]], "clean_labels": [[-1, -1]]})
    about_it = audit_of([(7, None, "LABEL_0", 1, 0.9)], ["LABEL_0", "LABEL_1"])
    for draw, problem in (
        (lambda: surest_figure(audit_of([])), "has no rows"),
        (lambda: precision_figure(audit_of([]), clean), "has no rows"),
        (lambda: precision_figure(audit, dataset), "no column 'clean_labels'"),
        (lambda: precision_figure(about_it, nothing_known), "unknown for all 1 labels"),
        (lambda: precision_figure(audit, clean.select(range(5, 9))), "data set lacks"),
        (lambda: surest_figure(audit, dataset.select(range(5, 9))), "data set lacks"),
        (lambda: surest_figure(audit, classes=["ant", "yak"]), "yak"),
        (lambda: surest_figure(audit, classes=[]), "classes is empty"),
        (lambda: surest_figure(audit, per_class=0), "per_class is 0"),
        (lambda: rates_figure(audit, [0.5]), "1 per_class_ap for 5 classes"),
        (lambda: rates_figure(audit, [0.5] * 5), "no class of the audit"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            draw()
        assert "\n" not in str(error.value)
