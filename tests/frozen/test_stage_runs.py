"""`--frozen_stages` at the user's door: networks trained on cached activations, ordinary models of images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments
from safetensors.torch import load_file
from test_examples import EXAMPLES, fails, make_coco, run_script
from transformers import AutoModelForImageClassification

from hf_balancemix import load_trained
from hf_balancemix.data import label_matrix, load_coco
from hf_balancemix.frozen.backbone import FrozenStages
from hf_balancemix.frozen.stages import cut_behind
from hf_balancemix.models import load_model

N, V = 2, 2
ROWS = 24 * (1 + V) + 10
COMMON = [
    "--from_scratch", "--model_name_or_path", "test_efficientnet", "--image_size", "32", "--use_cpu", "--noise",
    "mislabel", "--global_batch_size", "8", "--label_warmup_epochs", "1", "--num_train_epochs", "3",
    "--learning_rate", "0.005", "--frozen_stages", str(N), "--num_views", str(V),
]  # fmt: skip


def flags(folder: Path, name: str, *more: str) -> list[str]:
    places = ["--data_dir", str(folder / "coco"), "--cache_dir", str(folder / "cache")]
    return [*COMMON, *places, "--output_dir", str(folder / name), *more]


def caches(folder: Path) -> list[Path]:
    return list((folder / "cache").glob("*/features.npy"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_coco(folder / "coco")
    with pytest.MonkeyPatch.context() as patch:
        argv = flags(folder, "out", "--method", "bce", "balancemix", "co-teaching")
        run_script("run_coco", *argv, monkeypatch=patch)
    return folder


def predicted(folder: Path, model: Path, out: Path) -> np.ndarray:
    """`(10, 3)` probabilities of `predict.py` in a process that has trained nothing."""
    argv = ["--model", str(model), "--images", str(folder / "coco" / "val2017")]
    argv += ["--output", str(out), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "predict.py"), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out, newline="") as file:
        return np.array([row[1:] for row in list(csv.reader(file))[1:]], dtype=float)


def test_predict_gives_images_the_probabilities_that_the_trainer_saw(trained, tmp_path):
    model = trained / "out" / "balancemix"
    scores = predicted(trained, model, tmp_path / "scores.csv")
    labels = label_matrix(load_coco(trained / "coco", split="val")).numpy()
    bce = -np.where(labels == 1, np.log(scores), np.log1p(-scores)).sum(1).mean()
    figures = json.loads((trained / "out" / "results.json").read_text())["balancemix"]
    assert bce == pytest.approx(figures["eval_loss"], rel=2e-3)

    network, _ = load_trained(str(model))
    (file,) = caches(trained)
    cut_behind(network, N, 32).open(network)
    with torch.no_grad():
        logits = network(pixel_values=torch.from_numpy(np.load(file)[-10:]).float()).logits
    np.testing.assert_allclose(scores, logits.sigmoid().numpy(), atol=2e-3)
    # A checkpoint is such a model, too, of an earlier step.
    early = predicted(trained, model / "checkpoint-6", tmp_path / "early.csv")
    assert np.abs(early - scores).max() > 2e-2


def test_the_cache_is_one_of_maps_in_half_precision(trained):
    (file,) = caches(trained)
    rows = np.load(file, mmap_mode="r")
    assert rows.dtype == np.float16
    assert rows.shape[0] == ROWS
    assert rows.ndim == 4


def test_the_first_stages_stay_and_the_others_learn(trained):
    folders = [trained / "out" / name for name in ("bce", "balancemix", "co-teaching", "co-teaching/peer")]
    states = [load_file(folder / "model.safetensors") for folder in folders]
    network = AutoModelForImageClassification.from_pretrained(folders[0])
    frozen = cut_behind(network, N, 32).frozen & states[0].keys()
    assert len(frozen) > 10
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in frozen)
        trained_names = {n for n, _ in network.named_parameters()} - frozen
        assert all(not torch.equal(state[name], states[0][name]) for name in trained_names)


def test_the_card_says_what_was_trained(trained):
    card = (trained / "out" / "balancemix" / "README.md").read_text()
    assert f"| Backbone | its first {N} of 5 stages are frozen: the rest was trained on their activations of 2" in card


def test_a_run_goes_on_from_its_checkpoint_and_ends_the_same(trained, monkeypatch):
    run = trained / "out" / "balancemix"
    whole = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoint-9")
    argv = flags(trained, "out", "--method", "balancemix", "--resume_from_checkpoint", "last")
    run_script("run_coco", *argv, monkeypatch=monkeypatch)
    state = json.loads((run / "checkpoint-9" / "trainer_state.json").read_text())
    assert [line["epoch"] for line in state["log_history"] if "eval_mAP" in line] == [1, 2, 3]
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.fixture
def stages(trained, tmp_path):
    def load():
        return load_model("test_efficientnet", ["dog", "cat", "car"], image_size=32, pretrained=False)

    data = [load_coco(trained / "coco", split=split) for split in ("train", "val")]
    torch.manual_seed(5)
    return FrozenStages(load, *data, arguments(tmp_path), tmp_path / "cache", num_views=1, num_stages=N)


def test_every_draw_has_the_cached_front_and_its_seeds_tail(stages, tmp_path):
    one, again, other = (stages.draw(arguments(tmp_path, seed=seed))["model"] for seed in (3, 3, 4))
    states = [model.state_dict() for model in (one, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    differing = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    frozen = {name for name, p in one.named_parameters() if not p.requires_grad}
    assert len(frozen) > 10
    assert not differing & frozen
    assert "timm_model.classifier.weight" in differing


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path / "coco")

    def message(*more: str) -> str:
        return fails("run_coco", *flags(tmp_path, "out", *more), monkeypatch=monkeypatch, capsys=capsys)

    assert "frozen_stages is 2 and frozen_backbone is on, which freezes all stages" in message("--frozen_backbone")
    assert "hidden_size is 8; it must be left out with frozen_stages" in message("--hidden_size", "8")
    assert "frozen_stages is 0; it must be 1 or more" in message("--frozen_stages", "0")
    assert "frozen_stages is 6; it must be 1 to 5, the number of stages of test_efficientnet" in message(
        "--frozen_stages", "6"
    )
    assert "densenet121 has no list of stages" in message("--model_name_or_path", "densenet121")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**4))
    assert f"{ROWS} views of " in (said := message())
    assert "it must have room for the features" in said
    assert not caches(tmp_path)
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.dist
def test_two_ranks_end_as_one_process(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "coco", tmp_path / "coco", copy_function=shutil.copy2)
    vit = ["--model_name_or_path", "test_vit", "--method", "bce"]  # without batch norm
    run_script("run_coco", *flags(tmp_path, "one", *vit), monkeypatch=monkeypatch)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    done = subprocess.run(
        [*start, str(EXAMPLES / "run_coco.py"), *flags(tmp_path, "two", *vit, "--ddp_backend", "gloo")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "bce" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert len(caches(tmp_path)) == 1
