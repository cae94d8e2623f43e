"""`--frozen_backbone` at the user's door: heads on cached features, and the models of images that come of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_standin import HubStandin
from safetensors.torch import load_file
from test_examples import CLASSES, EXAMPLES, fails, make_coco, rows_of, run_script
from transformers import AutoModelForImageClassification

from hf_balancemix import load_trained
from hf_balancemix.scripts.arguments import ModelArguments

V = 2
ROWS = 24 * (1 + V) + 10
COMMON = [
    "--from_scratch", "--model_name_or_path", "test_resnet", "--image_size", "32", "--use_cpu", "--noise", "mislabel",
    "--global_batch_size", "8", "--label_warmup_epochs", "1", "--num_train_epochs", "3", "--learning_rate", "0.5",
    "--frozen_backbone", "--num_views", str(V),
]  # fmt: skip


def flags(folder: Path, name: str, *more: str) -> list[str]:
    places = ["--data_dir", str(folder / "coco"), "--cache_dir", str(folder / "cache" / name.split("-")[0])]
    return [*COMMON, *places, "--output_dir", str(folder / name), *more]


def caches(folder: Path, name: str) -> dict[int, Path]:
    """Matrices of features by their number of rows."""
    files = list((folder / "cache" / name).glob("*/features.npy"))
    found = {len(np.load(file, mmap_mode="r")): file for file in files}
    assert len(found) == len(files)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Three methods with a hidden layer, and one without."""
    folder = tmp_path_factory.mktemp("frozen")
    make_coco(folder / "coco")
    with pytest.MonkeyPatch.context() as patch:
        argv = flags(folder, "mlp", "--hidden_size", "8", "--method", "bce", "balancemix", "co-teaching")
        run_script("run_coco", *argv, monkeypatch=patch)
        run_script("run_coco", *flags(folder, "linear", "--hidden_size", "0"), monkeypatch=patch)
    return folder


def head_scores(folder: Path, name: str, checkpoint: str) -> np.ndarray:
    """`(10, 3)` probabilities that a trained head gives the un-augmented cached features of the evaluation set."""
    features = np.load(caches(folder, name)[ROWS])
    state = load_file(folder / name / "balancemix" / checkpoint / "model.safetensors")
    x = features[-10:].astype(np.float64)
    for name in ("head.0", "head.2"):
        if f"{name}.weight" in state:
            x = np.maximum(x, 0) if name == "head.2" else x
            x = x @ state[f"{name}.weight"].double().numpy().T + state[f"{name}.bias"].double().numpy()
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_predict_gives_images_the_scores_of_the_trained_head(trained, name, tmp_path, monkeypatch):
    model, hidden = trained / name / "balancemix", name == "mlp"
    argv = ["--model", str(model), "--images", str(trained / "coco" / "val2017")]
    argv += ["--output", str(tmp_path / "scores.csv"), "--device", "cpu"]
    if hidden:  # in a process that has trained nothing
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "predict.py"), *argv],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run_script("predict", *argv, monkeypatch=monkeypatch)
    header, rows = rows_of(tmp_path / "scores.csv")
    assert header == ["file", *CLASSES]
    scores = np.array(list(rows.values()))
    expected = head_scores(trained, name, "checkpoint-9")
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    earlier = head_scores(trained, name, "checkpoint-6")
    assert np.abs(scores - earlier).max() > 1e-3  # it is the trained head, and it was trained
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == [
        "BalanceMixForImageClassification" if hidden else "TimmWrapperForImageClassification"
    ]


def test_methods_share_one_cache_also_with_other_noise_and_not_with_other_images(trained, monkeypatch, caplog):
    made = caches(trained, "mlp")[ROWS].stat().st_mtime_ns
    argv = flags(trained, "mlp-other", "--hidden_size", "8", "--method", "mixup", "--num_train_epochs", "1")
    run_script("run_coco", *argv, "--noise", "flip", "--noise_rate", "0.1", monkeypatch=monkeypatch)
    assert set(caches(trained, "mlp")) == {ROWS}
    run_script("run_coco", *argv, "--max_train_samples", "16", monkeypatch=monkeypatch)
    assert set(caches(trained, "mlp")) == {ROWS, 16 * (1 + V) + 10}
    assert caches(trained, "mlp")[ROWS].stat().st_mtime_ns == made
    assert "its features mean little" in caplog.text


def test_co_teachings_networks_are_two_heads_on_one_backbone(trained):
    folder = trained / "mlp" / "co-teaching"
    networks = [load_trained(str(folder))[0], AutoModelForImageClassification.from_pretrained(folder / "peer").eval()]
    one, other = (network.state_dict() for network in networks)
    assert {name for name in one if not torch.equal(one[name], other[name])} == {
        "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias",
    }  # fmt: skip
    for network, checkpoint in zip(networks, ("checkpoint-9", "checkpoint-9/peer"), strict=True):
        saved = load_file(folder / checkpoint / "model.safetensors")
        assert {name: value.shape for name, value in saved.items()} == {
            name: value.shape for name, value in network.state_dict().items() if name.startswith("head.")
        }
        assert all(torch.equal(network.state_dict()[name], value) for name, value in saved.items())


def test_the_card_is_that_of_the_whole_model(trained):
    card = (trained / "mlp" / "balancemix" / "README.md").read_text()
    assert "| Architecture | BalanceMixForImageClassification, head mlp |" in card
    assert "| Backbone | frozen: only the head was trained, on features of 2 RandAugment views of each image |" in card
    mAP = json.loads((trained / "mlp" / "results.json").read_text())["balancemix"]["eval_mAP"]
    assert f"**{100 * mAP:.1f} %**" in card


def test_a_run_goes_on_from_its_checkpoint_and_ends_the_same(trained, monkeypatch):
    run = trained / "mlp" / "bce"
    whole = load_file(run / "model.safetensors")
    for file in (run / "model.safetensors", run / "config.json"):
        file.unlink()
    shutil.rmtree(run / "checkpoint-9")
    argv = flags(trained, "mlp", "--hidden_size", "8", "--method", "bce", "--resume_from_checkpoint", "last")
    run_script("run_coco", *argv, monkeypatch=monkeypatch)
    state = json.loads((run / "checkpoint-9" / "trainer_state.json").read_text())
    assert [line["epoch"] for line in state["log_history"] if "eval_mAP" in line] == [1, 2, 3]
    again = load_file(run / "model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_head_of_ones_own_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path / "coco")

    def message(script: str, *more: str) -> str:
        return fails(script, *flags(tmp_path, "out", *more), monkeypatch=monkeypatch, capsys=capsys)

    assert "head is 'ml_decoder'; it must be left out with frozen_backbone, which brings a head of its own" in message(
        "run_coco", "--head", "ml_decoder"
    )
    assert "num_views is 0" in message("run_voc", "--num_views", "0")
    assert "hidden_size is -1" in message("run_voc", "--hidden_size", "-1")
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]
    with pytest.raises(ValueError, match="leave out head and head_args"):
        ModelArguments(frozen_backbone=True, head_args='{"num_groups": 3}')


def test_a_checkpoint_is_a_head_which_predict_refuses(trained, tmp_path, monkeypatch, capsys):
    head = trained / "mlp" / "balancemix" / "checkpoint-9"
    argv = ["--model", str(head), "--images", str(trained / "coco" / "val2017"), "--output", str(tmp_path / "s.csv")]
    message = fails("predict", *argv, monkeypatch=monkeypatch, capsys=capsys)
    assert "it is a head on cached features" in message
    assert "takes no images" in message
    assert not list(tmp_path.iterdir())
    code = (
        "import sys, hf_balancemix.frozen\nfrom transformers import AutoModelForImageClassification\n"
        "print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(head)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "FeatureClassifier\n", done.stderr[-3000:]


def test_nothing_is_pushed_before_the_whole_model_is_there(trained, tmp_path):
    argv = flags(trained, "mlp-pushed", "--hidden_size", "8", "--method", "bce", "--push_to_hub", "true")
    argv += ["--hub_model_id", "user/frozen", "--hub_strategy", "every_save", "--num_train_epochs", "2"]
    with HubStandin() as hub:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "run_coco.py"), *argv],
            env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        commit, first = hub.repositories["model", "user/frozen"].log()
    assert (commit.title, first.files.keys()) == ("Model save", {".gitattributes"})
    config = json.loads(commit.files["config.json"].content)
    assert config["architectures"] == ["BalanceMixForImageClassification"]
    assert b"user/frozen" in commit.files["README.md"].content
    saved = (trained / "mlp-pushed" / "bce" / "model.safetensors").read_bytes()
    assert commit.files["model.safetensors"].content == saved


@pytest.mark.dist
def test_two_ranks_share_the_cache_and_end_as_one_process(trained, tmp_path):
    shutil.copytree(trained / "coco", tmp_path / "coco", copy_function=shutil.copy2)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    argv = flags(tmp_path, "two", "--hidden_size", "8", "--method", "bce", "--ddp_backend", "gloo")
    done = subprocess.run(
        [*start, str(EXAMPLES / "run_coco.py"), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(caches(tmp_path, "two")) == {ROWS}
    assert done.stderr.count("Cached the features of") <= 1
    one = load_file(trained / "mlp" / "bce" / "model.safetensors")
    two = load_file(tmp_path / "two" / "bce" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
