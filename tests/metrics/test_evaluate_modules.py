"""The `evaluate` modules: loaded offline from the package, with the numbers of hf_balancemix.metrics."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score

from hf_balancemix.core.citation import CITATION
from hf_balancemix.metrics import LabelQuality, evaluate_path, evaluation_figures

NAMES = ["label_quality", "multilabel_map"]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    # evaluate copies a module's code into its cache before it imports it.
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "metrics"))
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
        yield


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 4)), (rng.random((60, 4)) < 0.3).astype(int)
    labels[:, 3] = 0
    return logits, labels


def test_map_has_the_numbers_of_the_package_and_of_scikit_learn(predictions):
    logits, labels = predictions
    options = {"class_counts": [20_000, 5_000, 10, 10], "threshold": 0.3}
    metric = evaluate.load(evaluate_path("multilabel_map"))
    figures = metric.compute(predictions=logits, references=labels, class_names=list("abcd"), **options)
    expected = [average_precision_score(labels[:, k], logits[:, k]) for k in range(3)]
    assert figures["per_class_ap"] == pytest.approx([*expected, None])
    assert figures["skipped"] == ["d"]
    assert figures["mAP"] == pytest.approx(np.mean(expected))
    for name, value in evaluation_figures(logits, labels, **options)[0].items():
        assert figures[name] == value


def test_map_in_batches_of_tensors_is_the_same(predictions):
    logits, labels = predictions
    metric = evaluate.load(evaluate_path("multilabel_map"))
    for part in (slice(0, 7), slice(7, 60)):
        metric.add_batch(predictions=torch.tensor(logits[part]), references=torch.tensor(labels[part]).float())
    metric.add(predictions=[9.0, 0.0, 0.0, 0.0], references=[-1, -1, -1, -1])  # unknown: counts nowhere
    assert metric.compute()["mAP"] == evaluation_figures(logits, labels)[0]["mAP"]


def test_label_quality_has_the_numbers_of_the_package():
    rng = torch.Generator().manual_seed(0)
    given, clean = (torch.randint(0, 2, (50, 3), generator=rng) for _ in range(2))
    reliability = torch.randint(0, 3, (50, 3), generator=rng)
    refined = torch.where(reliability == 1, 1 - given, given)
    figures = evaluate.load(evaluate_path("label_quality")).compute(
        given=given, clean=clean, refined=refined, reliability=reliability
    )
    quality = LabelQuality()
    quality.update(given, clean, refined, reliability)
    assert figures == quality.compute()
    selected = reliability == 0
    assert figures["clean_precision"] == pytest.approx(
        (selected & (given == clean)).sum().item() / selected.sum().item()
    )
    assert figures["relabel_accuracy"] == pytest.approx((refined == clean)[reliability == 1].float().mean().item())


def test_bad_input_is_a_clear_error():
    metric = evaluate.load(evaluate_path("multilabel_map"))
    with pytest.raises(ValueError, match="no predictions"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
        metric.compute(predictions=[[0.1, float("nan")], [0.2, 0.3]], references=[[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="predictions has rows of unequal length"):
        metric.compute(predictions=[[0.1, 0.2], [0.2]], references=[[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="other than 0 and 1, the first 2"):
        metric.compute(predictions=[[0.1, 0.2]], references=[[1, 2]])
    quality = evaluate.load(evaluate_path("label_quality"))
    with pytest.raises(ValueError, match="no given"):
        quality.compute(given=[], clean=[], refined=[], reliability=[])
    with pytest.raises(ValueError, match="clean has values other than 0 and 1"):
        quality.compute(given=[[1]], clean=[[-1]], refined=[[1]], reliability=[[0]])
    with pytest.raises(ValueError, match="each label must be one of these"):
        quality.compute(given=[[1]], clean=[[1]], refined=[[1]], reliability=[[7]])


def test_an_error_does_not_spoil_the_next_computation():
    metric = evaluate.load(evaluate_path("multilabel_map"))
    with pytest.raises(ValueError, match="NaN"):
        metric.compute(predictions=[[float("nan")]], references=[[1]])
    assert metric.compute(predictions=[[1.0], [0.0]], references=[[1], [0]])["mAP"] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_a_space(name, tmp_path):
    folder = Path(evaluate_path(name))
    assert {f.name for f in folder.iterdir() if f.is_file()} == {
        f"{name}.py",
        "app.py",
        "README.md",
        "requirements.txt",
    }
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert metadata["sdk"] == "gradio"
    assert metadata["app_file"] == "app.py"
    assert {"evaluate", "metric"} <= set(metadata["tags"])
    assert {"evaluate>=0.4.3", "hf_balancemix"} == set((folder / "requirements.txt").read_text().split())
    ast.parse((folder / "app.py").read_text())
    # A Space's folder is called otherwise: its page loads the file beside it.
    shutil.copytree(folder, tmp_path / "app")
    loaded = evaluate.load(str(tmp_path / "app" / f"{name}.py"))
    assert loaded.description
    assert loaded.citation == CITATION


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_what_happens(name):
    code = Path(evaluate_path(name), "README.md").read_text().split("```python\n")[1].split("```")[0]
    *lines, call = [line for line in code.splitlines() if line and not line.startswith("#")]
    scope: dict = {}
    exec("\n".join(lines), scope)
    figures = eval(call, scope)
    shown = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# {")]
    if shown:
        assert figures == ast.literal_eval(shown[0])
    else:
        assert figures["clean_precision"] == 1.0


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="label_quality, multilabel_map"):
        evaluate_path("accuracy")
