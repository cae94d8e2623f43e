"""Thresholds against a search over all of them, kept in the config, and the doors that honour them."""

from __future__ import annotations

import csv
import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, make_dataset, tiny_resnet
from sklearn.metrics import f1_score, precision_score
from transformers import AutoModelForImageClassification, ImageClassificationPipeline

from hf_balancemix.models import (
    class_thresholds,
    iter_probabilities,
    load_model,
    pipeline_labels,
    predict_labels,
    predict_probabilities,
    squash_processor,
    tune_thresholds,
)
from hf_balancemix.models.thresholds import best_thresholds

PROCESSOR = squash_processor(image_size=16)


def cuts(p: np.ndarray) -> list[float]:
    """A threshold for every way to cut the probabilities in two."""
    values = np.unique(p)
    return [values[0] - 1e-9, *((values[:-1] + values[1:]) / 2), values[-1] + 1e-9]


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_are_what_a_search_over_all_finds(seed):
    rng = np.random.default_rng(seed)
    # Few distinct values: many ties within and between classes.
    p = rng.integers(1, 9, (12, 3)) / 10 if seed % 2 else rng.random((12, 3))
    y = (rng.random((12, 3)) < 0.4).astype(int)
    y[0] = 1
    for k, threshold in enumerate(best_thresholds(p, y)):
        reached = f1_score(y[:, k], p[:, k] > threshold)
        best = max(f1_score(y[:, k], p[:, k] > cut, zero_division=0) for cut in cuts(p[:, k]))
        assert reached == best
        higher = [cut for cut in cuts(p[:, k]) if cut > threshold + 1e-6]
        assert all(f1_score(y[:, k], p[:, k] > cut, zero_division=0) < best for cut in higher if cut > p[:, k].min())
    for precision in (0.3, 0.6, 1.0):
        for k, threshold in enumerate(best_thresholds(p, y, precision)):
            good = [
                cut for cut in cuts(p[:, k]) if precision_score(y[:, k], p[:, k] > cut, zero_division=0) >= precision
            ]
            assert (threshold == 1.0) == (not good)
            assert (p[:, k] > threshold).sum() == (max((p[:, k] > cut).sum() for cut in good) if good else 0)


def test_unknown_labels_and_classes_without_positives():
    p = np.array([[0.9, 0.2], [0.8, 0.6], [0.3, 0.7], [0.1, 0.4]])
    y = np.array([[1, 0], [-1, 0], [0, -1], [-1, 0]])
    thresholds = best_thresholds(p, y)
    assert thresholds[0] == pytest.approx(0.6)  # between 0.3 and 0.9: nothing known lies in between
    assert thresholds[1] is None


def test_extreme_probabilities_and_neighbouring_floats():
    near = np.nextafter(0.5, 1)
    p = np.array([[0.0, 1.0, 0.5], [1.0, 1.0, near]])
    y = np.array([[1, 1, 0], [0, 0, 1]])
    all_above, one, between = best_thresholds(p, y)
    # All instances predicted has the best F1, but a probability of 0 is above no threshold.
    assert all_above == 0.0
    assert one == 0.5
    assert 0.5 <= between < near
    assert best_thresholds(np.array([[1.0], [1.0]]), np.array([[1], [0]]), 0.9) == [1.0]


def instances(tmp_path, num=20):
    return make_dataset(tmp_path / "images", num)


def test_a_model_is_tuned_keeps_its_thresholds_and_uses_them(tmp_path, caplog):
    dataset, model = instances(tmp_path), tiny_resnet()
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: k for k, n in enumerate(NAMES)}
    model.train()
    model.get_submodule("classifier").eval()
    state = torch.get_rng_state()
    thresholds = tune_thresholds(model, dataset, processor=PROCESSOR, batch_size=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training  # as it was found, part by part
    assert not model.get_submodule("classifier").training
    assert model.config.thresholds == thresholds
    model.eval()
    probabilities = predict_probabilities(model, dataset, PROCESSOR)
    assert probabilities.shape == (20, 5)
    assert tune_thresholds(torch.logit(probabilities), dataset) == pytest.approx(thresholds)

    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.thresholds == thresholds  # plain ResNet, to the last bit
    found = predict_labels(loaded, dataset, PROCESSOR, batch_size=3)
    assert any(found)
    for names, row in zip(found, probabilities.tolist(), strict=True):
        assert set(names) == {n for n, p, t in zip(NAMES, row, thresholds, strict=True) if p > t}
        assert sorted(names, key=lambda n: -row[NAMES.index(n)]) == names
    # Without thresholds of its own: 0.5.
    loaded.config.thresholds = None
    assert class_thresholds(loaded.config) == dict.fromkeys(NAMES, 0.5)

    # For other classes they mean nothing.
    with caplog.at_level(logging.WARNING):
        assert load_model(str(tmp_path / "model"), NAMES)[0].config.thresholds == thresholds
        assert load_model(str(tmp_path / "model"), NAMES[::-1])[0].config.thresholds is None
        assert load_model(str(tmp_path / "model"), NAMES[:3])[0].config.thresholds is None


def test_images_that_cannot_be_decoded_are_skipped_or_named(tmp_path):
    dataset, model = instances(tmp_path, 7), tiny_resnet()
    files = [image.filename for image in dataset["image"]]
    expected = predict_probabilities(model, files, PROCESSOR)
    for bad in (1, 4, 5):
        Path(files[bad]).write_bytes(b"no image")
    model.train()
    found = {}
    for indices, probabilities in iter_probabilities(model, files, PROCESSOR, batch_size=2, on_bad_image="skip"):
        assert model.training
        assert probabilities.dtype == torch.float64
        found |= dict(zip(indices, probabilities, strict=True))
    assert list(found) == [0, 2, 3, 6]
    for index, row in found.items():
        torch.testing.assert_close(row, expected[index], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=f"cannot decode image {files[1]}"):
        list(iter_probabilities(model, files, PROCESSOR))
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(iter_probabilities(model, files, PROCESSOR, batch_size=0))


def test_the_pipelines_output_becomes_labels(tmp_path):
    dataset, model = instances(tmp_path, 6), tiny_resnet()
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: k for k, n in enumerate(NAMES)}
    tune_thresholds(model, dataset, processor=PROCESSOR)
    images = [image.convert("RGB") for image in dataset["image"]]
    pipe = ImageClassificationPipeline(model=model.eval(), image_processor=PROCESSOR)
    outputs = pipe(images, top_k=5)
    expected = predict_labels(model, images, PROCESSOR)
    assert any(expected)
    assert pipeline_labels(outputs, model.config) == expected
    assert pipeline_labels(outputs[0], model.config) == expected[0]
    assert pipeline_labels([], model.config) == []
    assert pipeline_labels(outputs[0], dict.fromkeys(NAMES, 0.0)) == [o["label"] for o in outputs[0]]
    assert pipeline_labels(outputs[0], dict.fromkeys(NAMES, 1.0)) == []
    with pytest.raises(ValueError, match=r"scores of 3 labels, and the model has 5 classes; call .* top_k=5"):
        pipeline_labels(outputs[0][:3], model.config)


def test_the_example_writes_the_labels_of_a_model_with_thresholds(tmp_path):
    dataset, model = instances(tmp_path, 6), tiny_resnet()
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: k for k, n in enumerate(NAMES)}
    thresholds = tune_thresholds(model, dataset, processor=PROCESSOR)
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    spec = importlib.util.spec_from_file_location("predict", Path(__file__).parents[2] / "examples" / "predict.py")
    predict = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict)
    folders = {"--model": "model", "--images": "images", "--output": "scores.csv"}
    predict.main([str(part) for flag, name in folders.items() for part in (flag, tmp_path / name)])
    with open(tmp_path / "scores.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["file", "labels", *NAMES]
    assert any(row[1] for row in rows)
    for row in rows:
        above = [n for n, p, t in zip(NAMES, map(float, row[2:]), thresholds, strict=True) if p > t]
        assert row[1] == ";".join(above)


def test_a_precision_is_reached_or_the_class_is_never_predicted(tmp_path, caplog):
    dataset = instances(tmp_path, 20)
    targets = torch.zeros(20, 5)
    for row, labels in enumerate(dataset["labels"]):
        targets[row, labels] = 1
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) + 3 * targets
    logits[:, 4] = -5.0 * targets[:, 4]  # always wrong
    with caplog.at_level(logging.WARNING):
        thresholds = tune_thresholds(logits.numpy(), dataset, min_precision=0.8)
    assert f"1 classes ({NAMES[4]}) a precision of 0.8; they will never" in caplog.text
    assert thresholds[4] == 1.0
    predicted = logits.double().sigmoid() > torch.tensor(thresholds, dtype=torch.float64)
    for k in range(4):
        assert precision_score(targets[:, k], predicted[:, k]) >= 0.8


def test_warnings_name_classes_without_positives_and_noisy_labels(tmp_path, caplog):
    dataset = instances(tmp_path, 10)
    with caplog.at_level(logging.WARNING):
        few = dataset.map(lambda row: {"labels": [k for k in row["labels"] if k != 2]}, features=dataset.features)
        noisy = few.add_column("clean_labels", dataset["labels"], feature=dataset.features["labels"])
        assert tune_thresholds(torch.randn(10, 5), noisy)[2] == 0.5
    assert "no positive label of 1 classes (cat)" in caplog.text
    assert "labels are noisy" in caplog.text


def test_bad_input_is_one_sentence(tmp_path):
    dataset, model = instances(tmp_path, 6), tiny_resnet()
    with pytest.raises(ValueError, match=r"the model's classes are LABEL_0, .*; they must be the data set's, ant, "):
        tune_thresholds(model, dataset, processor=PROCESSOR)
    model.config.id2label = dict(enumerate(NAMES))
    with pytest.raises(ValueError, match="processor is None"):
        tune_thresholds(model, dataset)
    for wrong in (torch.zeros(5, 5), torch.zeros(6, 4), torch.full((6, 5), torch.nan)):
        with pytest.raises(ValueError, match="they must be 6 x 5 finite values"):
            tune_thresholds(wrong, dataset)
    for wrong in (0, 1.5, -1):
        with pytest.raises(ValueError, match="min_precision is"):
            tune_thresholds(torch.zeros(6, 5), dataset, min_precision=wrong)
    for wrong in ([0.5] * 4, [0.5] * 4 + [1.5], [0.5] * 4 + ["a"], 0.5, [0.5] * 4 + [float("nan")]):
        model.config.thresholds = wrong
        with pytest.raises(ValueError, match=r"config.thresholds is .*; it must be 5 numbers in \[0, 1\]"):
            class_thresholds(model.config)
    model.config.problem_type = None
    with pytest.raises(ValueError, match="no independent probabilities"):
        predict_probabilities(model, dataset, PROCESSOR)
