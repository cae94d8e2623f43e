"""The scripts in examples/, on data made here: what a newcomer types works, or says what is wrong."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import load_example
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_balancemix.scripts.predict as predict_command
from hf_balancemix.trainer import checkpoints

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = ["dog", "cat", "car"]  # in the order of their ids
FLAGS = [
    "--from_scratch", "--model_name_or_path", "test_vit", "--image_size", "32", "--use_cpu", "--noise", "mislabel",
    "--global_batch_size", "8", "--label_warmup_epochs", "1", "--logging_steps", "1",
]  # fmt: skip


def make_coco(root: Path) -> Path:
    """24 training and 10 evaluation images of 24 pixels, three classes, each shown by its own colour channel."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 24), ("val", 10)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            name = f"{i:012}.jpg"
            present = sorted({i % 3, *np.flatnonzero(rng.random(3) < 0.3).tolist()})
            pixels = rng.integers(0, 60, (24, 24, 3))
            pixels[..., present] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{split}2017" / name)
            images.append({"id": i, "file_name": name})
            annotations += [{"id": len(annotations) + j, "image_id": i, "category_id": 10 * (k + 1)}
                            for j, k in enumerate(present)]  # fmt: skip
        categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def run_script(name: str, *argv: str, monkeypatch) -> dict:
    """As `python examples/NAME.py ARGV`, but in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), *argv])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def fails(name: str, *argv: str, monkeypatch, capsys) -> str:
    """The one line that a script with bad input ends with."""
    return error_of(lambda: run_script(name, *argv, monkeypatch=monkeypatch), capsys)


def error_of(main: Callable[[], object], capsys) -> str:
    """The one line that a command line with bad input ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = err[err.index("error: ") :].strip()
    return lines.removeprefix("error: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """One run of run_coco.py through `accelerate launch`, in processes of its own."""
    folder = tmp_path_factory.mktemp("examples")
    root = make_coco(folder / "coco")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
              str(EXAMPLES / "accelerate_configs" / "cpu.yaml")]  # fmt: skip
    done = subprocess.run(
        [*launch, str(EXAMPLES / "run_coco.py"), "--data_dir", str(root), *FLAGS, "--num_train_epochs", "2",
         "--output_dir", str(folder / "out")],
        cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {"root": root, "out": folder / "out", "stdout": done.stdout, "stderr": done.stderr}


def test_run_coco_trains_evaluates_and_saves(trained):
    out, stdout = trained["out"], trained["stdout"]
    assert "24 training and 10 evaluation images, 3 classes, noise: mislabel 0.4" in stdout
    assert "| balancemix |" in stdout
    assert "clean precision" in stdout
    assert f"balancemix predict --model {out / 'balancemix'} --images FOLDER" in stdout
    assert "Traceback" not in trained["stderr"]
    results = json.loads((out / "results.json").read_text())["balancemix"]
    assert 0 < results["eval_mAP"] <= 1
    assert 0 <= results["label_clean_precision"] <= 1
    config = json.loads((out / "balancemix" / "config.json").read_text())
    assert config["label_names"] == CLASSES
    assert config["problem_type"] == "multi_label_classification"
    assert [p.name for p in sorted((out / "balancemix").glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-6"]
    assert checkpoints.check(out / "balancemix" / "checkpoint-6") is None
    state = json.loads((out / "balancemix" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["max_steps"] == 6
    assert len([line for line in state["log_history"] if "eval_mAP" in line]) == 2
    assert len([line for line in state["log_history"] if "loss" in line]) == 6


def test_the_demo_draws_its_sample_and_compares_three_methods(tmp_path, monkeypatch, capsys):
    """`make demo`, but for a run cut short."""
    monkeypatch.setenv("HF_BALANCEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    short = ["--max_train_samples", "64", "--max_eval_samples", "60", "--num_train_epochs", "2"]
    run_script("run_coco", *short, "--label_warmup_epochs", "1", "--use_cpu", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "using the built-in sample" in printed
    assert "64 training and 60 evaluation images, 12 classes, noise: mislabel 0.4." in printed
    assert "more than 300 clean positive training labels, few-shot: fewer than 150" in printed
    assert all(f"| {method} " in printed for method in ("bce", "mixup", "balancemix"))
    assert "outputs/sample/balancemix" in printed
    assert "--data_dir DIR" in printed.splitlines()[-1]
    AutoModelForImageClassification.from_pretrained(tmp_path / "outputs" / "sample" / "balancemix")


def test_run_coco_goes_on_from_the_last_checkpoint(trained, monkeypatch, capsys):
    out = trained["out"]
    argv = ["--data_dir", str(trained["root"]), *FLAGS, "--output_dir", str(out), "--resume_from_checkpoint", "last"]
    run_script("run_coco", *argv, "--num_train_epochs", "3", monkeypatch=monkeypatch)
    state = json.loads((out / "balancemix" / "checkpoint-9" / "trainer_state.json").read_text())
    assert len([line for line in state["log_history"] if "loss" in line]) == 9  # the first six come from before
    # Of the two that were there the older one was removed (save_total_limit is 2).
    assert [p.name for p in sorted((out / "balancemix").glob("checkpoint-*"))] == ["checkpoint-6", "checkpoint-9"]
    assert "| balancemix |" in capsys.readouterr().out
    # With another noise it is another data set.
    message = fails("run_coco", *argv, "--noise_rate", "0.2", monkeypatch=monkeypatch, capsys=capsys)
    assert "cannot resume from" in message
    assert "its data is" in message


def test_run_coco_takes_a_config_file_and_several_methods_and_skips_bad_images(
    trained, tmp_path, monkeypatch, capsys, caplog
):
    root = make_coco(tmp_path / "coco")
    (root / "train2017" / f"{3:012}.jpg").unlink()
    (root / "train2017" / f"{5:012}.jpg").write_bytes(b"\xff\xd8 no image")
    values = {
        "data_dir": str(root), "on_bad_image": "skip", "method": ["bce", "mixup"], "noise": "flip", "noise_rate": 0.1,
        "from_scratch": True, "model_name_or_path": "test_resnet", "image_size": 32, "use_cpu": True,
        "global_batch_size": 8, "num_train_epochs": 1, "label_warmup_epochs": 1, "save_strategy": "no",
        "max_eval_samples": 6, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    run_script("run_coco", "--config", str(tmp_path / "config.yaml"), monkeypatch=monkeypatch)
    stdout = capsys.readouterr().out
    assert "22 training and 6 evaluation images" in stdout
    assert "| bce " in stdout
    assert "| mixup " in stdout
    assert "1 of 24 images" in caplog.text
    assert "1 of 23 images cannot be decoded: row 4" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bce", "mixup", "results.json"]


def test_run_coco_says_in_one_sentence_what_is_wrong(trained, tmp_path, monkeypatch, capsys):
    def message(*argv: str) -> str:
        return fails(
            "run_coco", "--use_cpu", "--output_dir", str(tmp_path), *argv, monkeypatch=monkeypatch, capsys=capsys
        )

    root = str(trained["root"])
    absent = message("--data_dir", str(tmp_path / "nowhere"))
    assert absent.startswith(f"no folder {tmp_path / 'nowhere'}. COCO's layout is expected")
    assert "instances_train2017.json" in absent
    assert "year" in message("--data_dir", root, "--year", "2014")
    assert "noise" in message("--data_dir", root, "--noise", "flip", "--noise_rate", "1.5")
    assert "Did you mean --noise_rate?" in message("--data_dir", root, "--noise_rat", "0.5")
    assert "24 instances, fewer than one global batch of 64" in message("--data_dir", root, *FLAGS[:5])
    assert "cannot load the model 'timm/resnet50.tv_in1k'" in message("--data_dir", root)
    assert "gone.pth do not exist" in message("--data_dir", root, *FLAGS[1:5], "--backbone_weights", "gone.pth")


# ---- predict.py ----


def rows_of(file: Path) -> tuple[list[str], dict[str, list[float]]]:
    with open(file, newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return header, {row[0]: [float(value) for value in row[1:]] for row in rows}


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Validation images in a tree, of several shapes, modes and suffixes, with a file that is no image."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for i, source in enumerate(sorted((trained["root"] / "val2017").iterdir())[:5]):
        Image.open(source).resize((24 + 7 * i, 24)).save(images / f"{i}, a.PNG")
    Image.open(source).convert("L").save(images / "more" / "grey é.jpeg")
    (images / "notes.txt").write_text("no image")
    return images


def test_predict_writes_the_models_own_probabilities(trained, folder, tmp_path, monkeypatch, capsys):
    model_folder, output = trained["out"] / "balancemix", tmp_path / "new" / "scores.csv"
    argv = ["--model", str(model_folder), "--images", str(folder), "--output", str(output), "--device", "cpu"]
    run_script("predict", *argv, "--batch_size", "4", monkeypatch=monkeypatch)
    assert "6 images written" in capsys.readouterr().out
    header, rows = rows_of(output)
    assert header == ["file", *CLASSES]
    assert list(rows) == [*(f"{i}, a.PNG" for i in range(5)), "more/grey é.jpeg"]
    processor = AutoImageProcessor.from_pretrained(model_folder)
    model = AutoModelForImageClassification.from_pretrained(model_folder).eval()
    for name, probabilities in rows.items():
        inputs = processor(Image.open(folder / name).convert("RGB"), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 32, 32)
        with torch.no_grad():
            expected = model(**inputs).logits[0].sigmoid().tolist()
        assert probabilities == pytest.approx(expected, abs=2e-6)
    assert sorted(p.name for p in output.parent.iterdir()) == ["scores.csv"]


@pytest.mark.parametrize("predict", [predict_command.main, load_example("predict").main], ids=["command", "example"])
def test_predict_takes_flags_from_a_file_and_runs_where_it_is_told(trained, folder, tmp_path, predict, capsys):
    values = {"model": str(trained["out"] / "balancemix"), "images": str(folder), "device": "cpu"}
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(values | {"output": str(tmp_path / "scores.csv")}))
    predict(["--config", str(tmp_path / "predict.yaml")])
    assert len(rows_of(tmp_path / "scores.csv")[1]) == 6
    with pytest.raises(NotImplementedError, match="meta tensor"):
        predict(["--config", str(tmp_path / "predict.yaml"), "--device", "meta"])
    assert "6 images written" in capsys.readouterr().out


def test_predict_takes_what_pillow_opens_and_counts_what_it_leaves_out(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    kinds = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.tif": "TIFF", "d.jp2": "JPEG2000", "e.avif": "AVIF"}
    for name, kind in kinds.items():
        Image.new("RGB", (24, 24), (90, 0, 0)).save(folder / name, format=kind)
    for name in ("f.heic", "g.heic", "notes", "h.eps"):
        (folder / name).write_text("%!PS-Adobe-3.0 EPSF-3.0")
    argv = ["--model", str(trained["out"] / "balancemix"), "--images", str(folder), "--device", "cpu"]
    run_script("predict", *argv, "--output", str(tmp_path / "s.csv"), monkeypatch=monkeypatch)
    assert list(rows_of(tmp_path / "s.csv")[1]) == sorted(kinds)
    left_out = "0 skipped. Left out: 4 files that are no images of the formats read (2 .heic, 1 .eps, 1 notes)."
    assert left_out in capsys.readouterr().out
    for name in kinds:
        (folder / name).unlink()
    message = fails("predict", *argv, monkeypatch=monkeypatch, capsys=capsys)
    assert "must hold images (.jpg, .png" in message
    assert "4 files" in message


def test_predict_stops_at_a_bad_image_or_skips_it(trained, folder, tmp_path, monkeypatch, capsys):
    (folder / "more" / "cut.jpg").write_bytes(b"\xff\xd8 cut")
    output = tmp_path / "scores.csv"
    argv = ["--model", str(trained["out"] / "balancemix"), "--images", str(folder), "--output", str(output)]
    argv += ["--device", "cpu", "--batch_size", "1"]
    message = fails("predict", *argv, monkeypatch=monkeypatch, capsys=capsys)
    assert "cut.jpg" in message
    assert "cannot decode" in message
    assert not list(tmp_path.glob("scores*"))
    run_script("predict", *argv, "--on_bad_image", "skip", monkeypatch=monkeypatch)
    assert "6 images written" in (out := capsys.readouterr().out)
    assert "1 skipped" in out
    assert len(rows_of(output)[1]) == 6


def test_predict_says_in_one_sentence_what_is_wrong(trained, folder, tmp_path, monkeypatch, capsys):
    def message(model: str, images: Path, *argv: str) -> str:
        flags = ["--model", model, "--images", str(images), "--output", str(tmp_path / "s.csv"), *argv]
        return fails("predict", *flags, monkeypatch=monkeypatch, capsys=capsys)

    model = str(trained["out"] / "balancemix")
    (tmp_path / "empty").mkdir()
    assert "nowhere; it must be a folder" in message(model, tmp_path / "nowhere")
    assert "empty; it must hold images" in message(model, tmp_path / "empty")
    assert "cannot load a model" in message(str(tmp_path / "empty"), folder)
    assert "cannot load a model" in message("no/model", folder)
    assert "batch_size is 0" in message(model, folder, "--batch_size", "0")
    other = tmp_path / "softmax"
    config = json.loads((trained["out"] / "balancemix" / "config.json").read_text())
    other.mkdir()
    for file in ("model.safetensors", "preprocessor_config.json"):
        (other / file).write_bytes((trained["out"] / "balancemix" / file).read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"problem_type": None}))
    assert "no independent probabilities" in message(str(other), folder)
    assert not list(tmp_path.glob("s.csv*"))


# ---- the rest ----


@pytest.mark.parametrize("name", ["run_coco", "run_voc", "run_deepfashion", "run_multilabel"])
def test_each_script_is_short_and_makes_its_trainer_in_plain_sight(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 120
    steps = [
        "add_noise(", "draw_model(", "BalanceMixTrainer(", "trainer.train(", "trainer.evaluate(",
        "trainer.save_model(", "print_results(",
    ]  # fmt: skip
    main = source[source.index("def main") :]
    assert [main.count(step) for step in steps] == [1] * len(steps)
    assert sorted(steps, key=main.index) == steps


def test_plain_pytorch_is_short_and_learns_in_spite_of_the_noise(monkeypatch, capsys):
    source = (EXAMPLES / "plain_pytorch.py").read_text()
    assert len(source.splitlines()) <= 60
    assert "transformers" not in source
    state = torch.get_rng_state()
    run_script("plain_pytorch", monkeypatch=monkeypatch)
    torch.set_rng_state(state)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert float(last.split(":")[1].split("%")[0]) > 95


def test_the_accelerate_configs_say_what_their_names_say():
    configs = {file.stem: yaml.safe_load(file.read_text()) for file in (EXAMPLES / "accelerate_configs").iterdir()}
    assert sorted(configs) == ["cpu", "multi_gpu", "one_gpu", "one_gpu_bf16"]
    assert configs["cpu"]["use_cpu"]
    assert [configs[name]["mixed_precision"] for name in sorted(configs)] == ["no", "bf16", "no", "bf16"]
    assert configs["multi_gpu"]["distributed_type"] == "MULTI_GPU"
    assert configs["multi_gpu"]["num_processes"] > 1
    from accelerate.commands.config.config_args import load_config_from_file

    for name in configs:  # Accelerate itself refuses unknown keys
        load_config_from_file(str(EXAMPLES / "accelerate_configs" / f"{name}.yaml"))
