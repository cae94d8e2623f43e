from __future__ import annotations

import logging
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import NAMES, arguments, make_dataset, tiny_vit
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from hf_balancemix import MultiLabelTrainer
from hf_balancemix.data import given_labels
from hf_balancemix.metrics import (
    RunningFigures,
    average_precision,
    class_groups,
    evaluation_figures,
    mean_average_precision,
    precision_recall_f1,
    shot_bounds,
)
from hf_balancemix.trainer import multilabel


def _random(seed: int, n: int = 200, k: int = 7, distinct: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < np.linspace(0.02, 0.6, k)).astype(np.int64)
    labels[0] = 1
    scores = rng.normal(size=(n, k)) + labels
    if distinct is not None:
        scores = np.round(scores * distinct) / distinct
    return scores, labels


def _slow_average_precision(scores: list[float], labels: list[int]) -> float:
    """Sum over thresholds of precision times the gain in recall, in exact fractions."""
    total, average, recall = sum(labels), Fraction(0), Fraction(0)
    for threshold in sorted(set(scores), reverse=True):
        found = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        average += (Fraction(sum(found), total) - recall) * Fraction(sum(found), len(found))
        recall = Fraction(sum(found), total)
    return float(average)


# ---------------------------------------------------------------------------------------------------------- groups


def test_group_bounds_are_medium():
    groups = class_groups([10_001, 10_000, 1_000, 999, 0])
    assert groups["many"].tolist() == [True, False, False, False, False]
    assert groups["medium"].tolist() == [False, True, True, False, False]
    assert groups["few"].tolist() == [False, False, False, True, True]
    assert all(mask.dtype == bool for mask in groups.values())


def test_groups_partition_the_classes():
    counts = np.random.default_rng(0).integers(0, 30, size=500)
    groups = class_groups(torch.tensor(counts), many=20, few=5)
    assert (sum(mask.astype(int) for mask in groups.values()) == 1).all()


@pytest.mark.parametrize(
    ("counts", "match"),
    [([[1, 2]], r"shape \(1, 2\)"), ([1, -1], "negative"), ([1.0, np.nan], "non-finite"), (["a"], "one number a")],
)
def test_groups_reject_bad_counts(counts, match):
    with pytest.raises(ValueError, match=match):
        class_groups(counts)


def test_groups_reject_crossed_bounds():
    with pytest.raises(ValueError, match="few is 100 and many is 10"):
        class_groups([1], many=10, few=100)


def test_bounds_by_the_counts_put_a_third_of_the_classes_into_each_group():
    counts = [40, 3, 17, 90, 8, 25, 61, 12, 5]
    bounds = shot_bounds(counts)
    assert bounds == (25, 12)
    assert [int(mask.sum()) for mask in class_groups(counts, *bounds).values()] == [3, 3, 3]
    assert shot_bounds(counts[::-1]) == bounds
    assert shot_bounds([0, 0, *counts]) == bounds  # classes without positives are few-shot, and bound nothing
    assert shot_bounds([50] * 8) is shot_bounds([7, 900]) is shot_bounds([0, 0, 0]) is None


def test_bounds_that_are_given_win_and_the_papers_hold_for_its_data_where_they_tell_classes_apart():
    counts = [45_000, 20_000, 5_000, 4_000, 700, 100]
    assert shot_bounds(counts) == (5_000, 4_000)
    assert shot_bounds(counts, of_paper=True) == (10_000, 1_000)
    assert shot_bounds([90, 60, 30], of_paper=True) == (60, 60)  # a small part of it
    assert shot_bounds(counts, 50, 40, of_paper=True) == (50, 40)
    assert shot_bounds(counts, many=300) == (300, 300)
    assert shot_bounds(counts, few=8_000) == (8_000, 8_000)
    assert shot_bounds([50, 50], few=60) == (60, 60)


# ------------------------------------------------------------------------------------------------------------- mAP


def test_hand_computed_average_precision():
    # Ranked 1 0 1 1 0: precisions at the positives 1/1, 2/3, 3/4.
    result = mean_average_precision([[0.9], [0.8], [0.7], [0.6], [0.5]], [[1], [0], [1], [1], [0]])
    assert result["mAP"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3, abs=1e-12)


def test_hand_computed_average_precision_with_ties():
    # Thresholds: {1}: 0 of 1 positive; {1, 2, 3} tied: 2 of 4, recall 2/3; last: 3 of 5.
    result = mean_average_precision([[9.0], [3.0], [3.0], [3.0], [1.0]], [[0], [1], [0], [1], [1]])
    assert result["mAP"] == pytest.approx(2 / 3 * 2 / 4 + 1 / 3 * 3 / 5, abs=1e-12)


def test_all_scores_equal_gives_the_share_of_positives():
    result = mean_average_precision(np.zeros((8, 1)), [[1]] * 3 + [[0]] * 5)
    assert result["mAP"] == pytest.approx(3 / 8, abs=1e-12)


@pytest.mark.parametrize("distinct", [None, 4, 1])
def test_equals_the_slow_version_and_sklearn(distinct):
    scores, labels = _random(1, distinct=distinct)
    result = mean_average_precision(scores, labels)
    slow = [_slow_average_precision(scores[:, k].tolist(), labels[:, k].tolist()) for k in range(labels.shape[1])]
    np.testing.assert_allclose(result["per_class_ap"], slow, atol=1e-12)
    assert result["mAP"] == pytest.approx(average_precision_score(labels, scores, average="macro"), abs=1e-12)
    assert result["per_class_ap"].dtype == np.float64
    assert type(result["mAP"]) is float


def test_does_not_depend_on_the_order_of_instances():
    scores, labels = _random(2, distinct=1)
    expected = mean_average_precision(scores, labels)["per_class_ap"]
    by_label = np.argsort(labels[:, 0], kind="stable")
    for order in (by_label, by_label[::-1], np.random.default_rng(0).permutation(len(scores))):
        np.testing.assert_array_equal(mean_average_precision(scores[order], labels[order])["per_class_ap"], expected)


def test_depends_on_order_of_scores_only():
    scores, labels = _random(3)
    expected = mean_average_precision(scores, labels)["per_class_ap"]
    for monotone in (1 / (1 + np.exp(-scores)), scores * 1e200, np.exp(scores) - 5):
        np.testing.assert_array_equal(mean_average_precision(monotone, labels)["per_class_ap"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_float_type_give_the_figures_of_their_values(dtype):
    scores, labels = _random(4)
    scores = torch.tensor(scores).to(dtype).requires_grad_()
    expected = average_precision_score(labels, scores.detach().double().numpy(), average=None)
    result = mean_average_precision(scores, torch.tensor(labels, dtype=torch.float32))
    np.testing.assert_allclose(result["per_class_ap"], expected, atol=1e-12)


def test_float16_of_the_whole_range_is_ranked_right():
    scores = np.array([[60000.0], [-60000.0], [50000.0]], dtype=np.float16)  # near its largest value, 65504
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_average_precision(scores, [[1], [0], [0]])["mAP"] == 1.0


def test_integer_and_boolean_scores_and_labels():
    labels = np.array([[True], [False], [True]])
    assert mean_average_precision(labels, labels)["mAP"] == 1.0
    assert mean_average_precision(np.array([[3], [2], [1]]), labels)["mAP"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinite_scores_rank_first_and_last_and_tie(dtype):
    inf = np.inf
    scores = np.array([[inf], [inf], [2.0], [-inf], [-inf]], dtype=dtype)
    labels = [[1], [0], [1], [1], [0]]
    finite = np.array([[9.0], [9.0], [2.0], [-9.0], [-9.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_average_precision(scores, labels)["mAP"] == mean_average_precision(finite, labels)["mAP"]
        assert mean_average_precision(np.array([[inf], [-inf]], dtype=dtype), [[1], [0]])["mAP"] == 1.0


def test_inputs_are_not_changed():
    scores, labels = _random(5)
    scores[0, 0] = np.inf
    before = scores.copy(), labels.copy()
    evaluation_figures(scores, labels)
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_classes_without_positives_are_skipped_and_named(caplog):
    scores, labels = _random(6, k=4)
    labels[:, [1, 3]] = 0
    names = ["cat", "skipped-dog", "car", "skipped-bus"]
    with caplog.at_level(logging.WARNING):
        result = mean_average_precision(scores, labels, class_names=names)
        mean_average_precision(scores, labels, class_names=names)
    assert result["skipped"] == ["skipped-dog", "skipped-bus"]
    assert mean_average_precision(scores, labels)["skipped"] == [1, 3]
    assert np.isnan(result["per_class_ap"]).tolist() == [False, True, False, True]
    assert result["mAP"] == pytest.approx(average_precision_score(labels[:, [0, 2]], scores[:, [0, 2]]), abs=1e-12)
    assert [record.message for record in caplog.records if "skipped-dog" in record.message] == [
        "2 of 4 classes have no positive label here and are skipped in mAP: skipped-dog, skipped-bus"
    ]


def test_group_means_and_groups_without_a_scorable_class():
    scores, labels = _random(7, k=5)
    labels[:, 4] = 0  # the only few-shot class
    counts = [500, 400, 50, 40, 3]
    result = mean_average_precision(scores, labels, class_counts=counts, many=100, few=10)
    assert result["mAP_many"] == pytest.approx(result["per_class_ap"][:2].mean(), abs=1e-12)
    assert result["mAP_medium"] == pytest.approx(result["per_class_ap"][2:4].mean(), abs=1e-12)
    assert result["mAP_few"] is None
    assert result["mAP"] == pytest.approx(result["per_class_ap"][:4].mean(), abs=1e-12)
    assert not {"mAP_many", "mAP_medium", "mAP_few"} & mean_average_precision(scores, labels).keys()


def test_nothing_to_score_is_not_an_error():
    for labels in (np.zeros((4, 2)), np.zeros((0, 2))):
        result = mean_average_precision(np.zeros(labels.shape), labels, class_counts=[1, 2])
        assert (result["mAP"], result["mAP_few"], result["skipped"]) == (None, None, [0, 1])


def test_every_label_positive_is_perfect():
    assert mean_average_precision(np.random.default_rng(0).normal(size=(5, 2)), np.ones((5, 2)))["mAP"] == 1.0


@pytest.mark.parametrize(
    ("scores", "labels", "match"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), r"scores is of shape \(3, 2\) and labels of shape \(3, 4\)"),
        (np.zeros(3), np.zeros(3), r"scores is of shape \(3,\)"),
        (np.zeros((3, 2), dtype=complex), np.zeros((3, 2)), "complex128"),
        ([["a"]], [[1]], "real numbers"),
        (np.zeros((2, 0)), np.zeros((2, 0)), "at least one class"),
        (np.zeros((2, 2)), [[1, -2], [0, -2]], "2 values other than 0 and 1, the first -2"),
        (np.zeros((1, 2)), [[1, 0.5]], "1 values other than 0 and 1, the first 0.5"),
        (np.zeros((1, 2)), [[1, np.nan]], "1 values other than 0 and 1, the first nan"),
        (np.zeros((1, 2)), torch.tensor([[1, 255]], dtype=torch.uint8), "the first 255"),
    ],
)
def test_bad_input_is_named(scores, labels, match):
    with pytest.raises(ValueError, match=match):
        mean_average_precision(scores, labels)


def test_nan_scores_are_counted_by_rows_and_classes():
    scores, labels = _random(8, n=10, k=5)
    scores[2, 1] = scores[2, 3] = scores[7, 1] = scores[8, 1] = np.nan
    with pytest.raises(ValueError, match="scores is NaN in 3 of 10 rows and 2 of 5 classes"):
        mean_average_precision(scores, labels)
    with pytest.raises(ValueError, match="logits is NaN in 3 of 10 rows and 2 of 5 classes"):
        evaluation_figures(torch.tensor(scores).bfloat16(), labels)


def test_wrong_number_of_names_or_counts():
    with pytest.raises(ValueError, match="class_names has 3 entries for 2 classes"):
        mean_average_precision(np.zeros((1, 2)), np.ones((1, 2)), class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="class_counts has 1 entries for 2 classes"):
        mean_average_precision(np.zeros((1, 2)), np.ones((1, 2)), class_counts=[5])


# ----------------------------------------------------------------------------------------------- precision, recall, F1


def test_hand_computed_precision_recall_f1():
    probabilities = [[0.9, 0.9, 0.1], [0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.1, 0.9, 0.1]]
    labels = [[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 0]]
    # Class 0: 1 right of 2 predicted and 3 positive; class 1: 1 of 2 and 1; class 2: 0 of 0 and 1.
    figures = precision_recall_f1(probabilities, labels)
    cp, cr = (1 / 2 + 1 / 2 + 0) / 3, (1 / 3 + 1 + 0) / 3
    assert figures == pytest.approx(
        {"CP": cp, "CR": cr, "CF1": 2 * cp * cr / (cp + cr), "OP": 2 / 4, "OR": 2 / 5, "OF1": 4 / 9}, abs=1e-12
    )


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.97])
def test_precision_and_recall_equal_sklearn(threshold):
    scores, labels = _random(9, k=9)
    labels[:, 3] = 0  # no positives: 0 in the means over classes
    probabilities = 1 / (1 + np.exp(-2 * scores))
    figures = precision_recall_f1(probabilities, labels, threshold=threshold)
    predicted = (probabilities > threshold).astype(int)
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    micro = precision_recall_fscore_support(labels, predicted, average="micro", zero_division=0)
    assert [figures["CP"], figures["CR"]] == pytest.approx(macro[:2], abs=1e-12)
    assert [figures["OP"], figures["OR"], figures["OF1"]] == pytest.approx(micro[:3], abs=1e-12)
    assert figures["CF1"] == pytest.approx(2 * macro[0] * macro[1] / (macro[0] + macro[1]), abs=1e-12)


def test_nothing_predicted_and_nothing_positive_give_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in (np.zeros((3, 2)), np.ones((3, 2)), np.zeros((0, 2))):
            assert set(precision_recall_f1(np.zeros(labels.shape), labels).values()) == {0.0}


def test_the_threshold_itself_is_negative():
    assert precision_recall_f1([[0.5]], [[1]])["OR"] == 0.0
    assert precision_recall_f1([[0.50001]], [[1]])["OR"] == 1.0


def test_logits_are_not_taken_for_probabilities():
    with pytest.raises(ValueError, match=r"between -3 and 2; .*sigmoid"):
        precision_recall_f1([[2.0, -3.0]], [[1, 0]])


# -------------------------------------------------------------------------------------------------------- flat figures


def test_flat_figures_equal_their_parts_and_leave_out_empty_groups():
    scores, labels = _random(10, k=4)
    counts = [20_000, 15_000, 10, 20]
    figures, _ = evaluation_figures(scores.astype(np.float32), labels, class_counts=counts)
    assert set(figures) == {"mAP", "mAP_many", "mAP_few", "CF1", "OF1"}
    assert all(type(value) is float for value in figures.values())
    parts = mean_average_precision(scores.astype(np.float32), labels, class_counts=counts)
    assert [figures[name] for name in ("mAP", "mAP_many", "mAP_few")] == [
        parts[name] for name in ("mAP", "mAP_many", "mAP_few")
    ]
    f1 = precision_recall_f1((scores > 0).astype(float), labels)  # probability > 0.5 where the logit is positive
    assert (figures["CF1"], figures["OF1"]) == pytest.approx((f1["CF1"], f1["OF1"]), abs=1e-12)
    assert set(evaluation_figures(scores, labels)[0]) == {"mAP", "CF1", "OF1"}


def test_the_means_and_the_classes_average_precision_are_of_one_pass():
    scores, labels = _random(11, k=5)
    labels[:, 2] = 0
    means, per_class_ap = evaluation_figures(scores, labels, class_counts=[9, 9, 5, 1, 1], many=8, few=2)
    expected = [average_precision_score(labels[:, k], scores[:, k]) for k in (0, 1, 3, 4)]
    assert np.delete(per_class_ap, 2).tolist() == expected
    assert np.isnan(per_class_ap[2])
    assert [means["mAP"], means["mAP_many"]] == pytest.approx([np.mean(expected), np.mean(expected[:2])])
    assert "mAP_medium" not in means


def test_a_trainer_computes_each_class_once_an_evaluation_and_says_once_what_is_skipped(caplog, monkeypatch, tmp_path):
    dataset = make_dataset(tmp_path, names=["once-a", "once-b", "once-c"])
    without_b = dataset.filter(lambda row: 1 not in row["labels"])
    args = arguments(tmp_path / "out")
    trainer = MultiLabelTrainer(model=tiny_vit(3), args=args, train_dataset=dataset, eval_dataset=without_b)
    calls = []

    def counted(*args):
        calls.append(args)
        return average_precision_score(*args)

    monkeypatch.setattr(average_precision, "average_precision_score", counted)
    with caplog.at_level(logging.WARNING):
        for evaluations in (1, 2):
            trainer.evaluate()
            assert len(calls) == 2 * evaluations  # of three classes one has no positive label
    assert [record.message for record in caplog.records if "skipped in mAP" in record.message] == [
        "1 of 3 classes have no positive label here and are skipped in mAP: once-b"
    ]
    assert trainer.state.log_history[-1]["eval_per_class_ap"][1] is None


def test_flat_figures_at_another_threshold():
    # Probabilities 0.88 and 0.95: only the second is above 0.9.
    figures, _ = evaluation_figures([[2.0], [3.0]], [[1], [1]], threshold=0.9)
    assert figures["OF1"] == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_map_is_taken_before_the_sigmoid_saturates():
    logits = np.array([[40.0], [30.0], [20.0]], dtype=np.float32)  # all 1.0 after a float32 sigmoid
    assert evaluation_figures(logits, [[1], [0], [0]])[0]["mAP"] == 1.0


def test_extreme_logits_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures, _ = evaluation_figures(np.array([[1e30, -1e30], [-np.inf, np.inf]]), [[1, 0], [0, 1]])
    assert figures == {"mAP": 1.0, "CF1": 1.0, "OF1": 1.0}


def test_unknown_labels_count_nowhere():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 3)), rng.integers(0, 2, (60, 3))
    labels[::4, 1] = -1
    result = mean_average_precision(scores, labels)
    known = labels[:, 1] >= 0
    assert result["per_class_ap"][1] == average_precision_score(labels[known, 1], scores[known, 1])
    assert result["per_class_ap"][0] == average_precision_score(labels[:, 0], scores[:, 0])
    probabilities = rng.random((60, 1))
    some = labels[:, 1:2]
    assert precision_recall_f1(probabilities, some) == precision_recall_f1(probabilities[known], some[known])


# ---- batch by batch ----


def running(logits, labels, size=7, **options):
    figures = RunningFigures(labels.shape[1])
    for start in range(0, len(labels), size):
        figures.update(logits[start : start + size], labels[start : start + size])
    return figures.compute(**options)


@pytest.mark.parametrize("scale", [0.03, 0.3, 3, 10])
def test_figures_batch_by_batch_are_those_of_all_at_once(scale):
    rng = np.random.default_rng(0)
    labels = (rng.random((4000, 5)) < [0.5, 0.2, 0.05, 0.01, 0]).astype(int)
    logits = scale * (rng.normal(size=labels.shape) + labels - 2).astype(np.float32)
    labels[rng.random(labels.shape) < 0.1] = -1
    options = {"class_counts": [5, 4, 3, 2, 1], "many": 4, "few": 2}
    expected, ap = evaluation_figures(logits, labels, **options)
    found, running_ap = running(logits, labels, **options)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-3)
    assert (found["CF1"], found["OF1"]) == (expected["CF1"], expected["OF1"])
    np.testing.assert_array_equal(np.isnan(running_ap), np.isnan(ap))


def test_logits_that_lie_in_bins_of_their_own_are_counted_exactly():
    rng = np.random.default_rng(1)
    labels = (rng.random((500, 3)) < 0.3).astype(int)
    logits = rng.integers(-40, 40, labels.shape) / 4 + rng.choice(
        [0, np.inf, -np.inf], labels.shape, p=[0.98, 0.01, 0.01]
    )
    _, expected = evaluation_figures(logits, labels)
    np.testing.assert_allclose(running(logits, labels)[1], expected, atol=1e-12)


@pytest.mark.parametrize("by", ["size", "argument"])
def test_a_trainer_counts_a_large_evaluation_batch_by_batch(tmp_path, monkeypatch, by):
    dataset = make_dataset(tmp_path / "images")
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "out", batch_eval_metrics=by == "argument"),
        train_dataset=dataset, eval_dataset=dataset,
    )  # fmt: skip
    logits = trainer.predict(dataset).predictions
    expected, ap = running(logits, given_labels(dataset), size=24)
    if by == "size":
        monkeypatch.setattr(multilabel, "_AT_ONCE", len(dataset) * len(NAMES) - 1)
    monkeypatch.setattr(multilabel, "evaluation_figures", None)  # nothing is done at once
    for _ in range(2):
        found = trainer.evaluate()
        assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert trainer.state.log_history[-1]["eval_per_class_ap"] == pytest.approx(ap.tolist())
    assert trainer.args.batch_eval_metrics == (by == "argument")
