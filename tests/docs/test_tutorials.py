"""The tutorials, as they are written, on small images: what a reader types works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import transformers as tf
from conftest import tiny_resnet
from docs_tutorial import FROM_SCRATCH, SHORT, TUTORIALS, run
from hub_standin import HubStandin
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_balancemix import LabelAudit, from_csv, squash_processor

IN_PYTHON = "global_batch_size=8, use_cpu=True, disable_tqdm=True"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with `photos`, 60 images whose colour is their label (every tenth is wrong), and small networks."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "photos").mkdir()
    lines = ["file_name,tags"]
    rng = np.random.default_rng(0)
    for i in range(60):
        kind = i % 3
        pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
        pixels[..., kind] += 150
        Image.fromarray(pixels).save(folder / "photos" / f"{i:04}.jpg")
        names = ["red", "green", "blue"]
        lines.append(f"{i:04}.jpg,{names[(kind + (i % 10 == 0)) % 3]}{';any' if i % 2 else ''}")
    (folder / "photos/labels.csv").write_text("\n".join(lines) + "\n")
    single = [line.split(";")[0] for line in lines[1:]]
    (folder / "single.csv").write_text("\n".join(["file_name,tag", *single]) + "\n")
    cells = [
        f"{i:04}.jpg,{int(i % 3 == 0)},{int(i % 3 == 1) if i % 4 else ''},{'' if i % 5 else 0}" for i in range(60)
    ]
    (folder / "findings.csv").write_text("\n".join(["file_name,red,green,blue", *cells]) + "\n")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 32, "patch_size": 16}
    text = tower | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name, model in {
        "network": tiny_resnet(),
        "dinov3": tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**tower)),
        # google/siglip2-base-patch16-224 has the architecture of SigLIP; Siglip2Model is of the NaFlex variants.
        "siglip2": tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=tower)),
    }.items():
        model.save_pretrained(folder / name)
        squash_processor(image_size=32).save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _there(photos, monkeypatch):
    monkeypatch.chdir(photos)
    monkeypatch.setenv("HF_BALANCEMIX_CACHE", str(photos / "cache"))


def explained_keys() -> re.Pattern[str]:
    """What docs/guides/logs.md explains: `eval_mAP_many`, `_few` are two keys, and `train_*` are many."""
    page = (TUTORIALS.parent / "guides/logs.md").read_text(encoding="utf-8")
    keys: list[str] = []
    for code in re.findall(r"`([\w*]+)`", page):
        ending = code.startswith("_") and keys
        keys.append(keys[-1].rsplit("_", 1)[0] + code if ending else code)
    return re.compile("|".join(key.replace("*", r"\w*") + "(_positives)?" for key in keys))


def test_your_own_folder_and_csv(capsys):
    names = run(
        "own_data",
        flags=[*SHORT, *FROM_SCRATCH],
        replace={
            '"timm/resnet50.tv_in1k"': '"network"',
            "image_size=224": "image_size=32",
            "num_train_epochs=20": f"num_train_epochs=2, {IN_PYTHON}",
        },
    )
    printed = capsys.readouterr().out
    assert "60 instances, 4 classes" in printed
    assert "| balancemix |" in printed
    assert len(Path("scores.csv").read_text().splitlines()) == 61
    assert json.loads(Path("outputs/balancemix/config.json").read_text())["thresholds"]
    assert len(names["labels"]) == len(names["held_out"])
    assert Path("outputs/mine/model.safetensors").is_file()
    logged = {key for line in names["trainer"].state.log_history for key in line}
    assert {"noise_rate_wrong", "sampler_effective_size", "eval_mAP"} <= logged
    assert [key for key in sorted(logged) if not explained_keys().fullmatch(key)] == []


def test_from_a_noisy_folder_to_corrected_labels(capsys):
    rows = []

    def review(code: str) -> None:
        """What the page saves: here the reviewer finds every listed label wrong."""
        if "apply_corrections" not in code:
            return
        rows.extend(LabelAudit.load("outputs/balancemix").rows)
        lines = [f"{r['image_id']},{r['class']},{r['given']},wrong,ann,2026-01-01T00:00:00Z" for r in rows]
        Path("decisions.csv").write_text("\n".join(["image_id,class,given,decision,reviewer,time", *lines]))

    run("audit", "## From a noisy folder", flags=[*SHORT, *FROM_SCRATCH], before=review)
    printed = capsys.readouterr().out
    assert "that are probably wrong:" in printed
    assert printed.count("Suspicious labels:") == 2
    assert Path("report/index.html").is_file()
    assert Path("suspicious.csv").read_text().startswith("image_id,image,class,given,suggested,kind,score,")
    from datasets import load_from_disk

    corrected = load_from_disk("corrected")
    given = from_csv("photos/labels.csv", "photos", label_column="tags", separator=";")
    assert rows
    assert sum(map(len, corrected["corrections"][:])) == len(rows)
    assert corrected["given_labels"][:] == given["labels"][:]
    assert corrected["labels"][:] != given["labels"][:]


def test_partial_and_single_positive_labels(capsys):
    names = run("missing_labels", flags=[*SHORT, *FROM_SCRATCH])
    printed = capsys.readouterr().out
    assert "60 labels of 90" in printed
    assert names["photos"][1]["unknown_labels"] == [2]
    assert "| elr " in printed
    arguments = json.loads(Path("outputs/single/balancemix/training_args.json").read_text())
    assert arguments["trust_positives"]
    assert arguments["relabel_threshold"] == 0.9


def test_a_big_backbone_frozen_with_lora_and_in_full(capsys):
    run(
        "backbones",
        flags=SHORT,
        replace={
            "facebook/dinov3-vits16-pretrain-lvd1689m": "dinov3",
            "google/siglip2-base-patch16-224": "siglip2",
            "--frozen_backbone": "--frozen_backbone --num_views 1",
            "num_train_epochs=10": f"num_train_epochs=2, {IN_PYTHON}",
        },
    )
    assert all(f"| {method} " in capsys.readouterr().out for method in ("asl",))
    for folder in ("outputs/frozen/balancemix", "outputs/lora/merged", "outputs/full/balancemix"):
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)


@pytest.mark.slow
@pytest.mark.dist
def test_several_processes_and_a_run_that_was_stopped():
    weights = Path("outputs/balancemix/model.safetensors")
    uninterrupted = []

    def stop(code: str) -> None:
        """As if the run had died in its last epoch."""
        if "--resume_from_checkpoint" in code:
            uninterrupted.append(load_file(weights))
            last, other = sorted(weights.parent.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
            assert int(last.name.split("-")[1]) > int(other.name.split("-")[1])
            shutil.rmtree(last)
            weights.unlink()

    shutil.rmtree("outputs", ignore_errors=True)
    run("several_gpus", flags=[*SHORT, *FROM_SCRATCH], before=stop)
    resumed = load_file(weights)
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted[0].items())


def test_the_model_and_the_audit_are_published(tmp_path, photos):
    Path("decisions.csv").write_text(
        "image_id,class,given,decision,reviewer,time\n0000.jpg,green,1,wrong,ann,2026-01-01T00:00:00Z\n"
    )
    shutil.rmtree("outputs", ignore_errors=True)
    shutil.rmtree("report", ignore_errors=True)
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n"
        f"from docs_tutorial import run; names = run('hub', flags={[*SHORT, *FROM_SCRATCH]!r})\n"
        "print(names['corrected']['labels'][0], names['photos']['labels'][0])"
    )
    with HubStandin() as hub:
        printed = hub.run(code, home=tmp_path).splitlines()
        assert {"README.md", "config.json", "model.safetensors"} <= set(
            hub.repositories["model", "user/birds"].log()[0].files
        )
        assert hub.repositories["model", "user/birds"].private
        assert hub.repositories["space", "user/birds-audit"].private
        assert "noise_map.parquet" in hub.repositories["dataset", "user/birds-corrections"].log()[0].files
        assert hub.unknown == []
    assert printed[-1] == "[] [2]"


def test_a_loop_of_ones_own(capsys):
    run("own_loop", replace={"N, K, EPOCHS, BATCH = 2000, 9, 12, 50": "N, K, EPOCHS, BATCH = 1000, 9, 6, 50"})
    given, refined = [float(word[:-1]) for word in capsys.readouterr().out.split() if word.endswith("%")]
    assert refined > given + 2


def test_noise_maps(dataset):
    """Not a tutorial, but a page of code."""
    dataset.save_to_disk("sample")
    names = run(
        "../guides/noise_maps",
        replace={'load_coco(make_scenes(), split="train")': '__import__("datasets").load_from_disk("sample")'},
    )
    assert names["again"]["labels"][:] == names["noisy"]["labels"][:] != names["train"]["labels"][:]


NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_keeps_what_it_showed(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert path.stat().st_size < 600_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(path.parents[2]))
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    before, after = re.findall(r"wrong labels for each true one: (\S+) before, (\S+) after", text)[0]
    assert float(after) < float(before)
