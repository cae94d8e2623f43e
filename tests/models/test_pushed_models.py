"""Every kind of model, pushed to the stand-in for the Hub and loaded by name in a new process, bit for bit."""

from __future__ import annotations

import json

import torch
from hub_standin import HubStandin
from test_modeling import CLASSES, images, logits, our_models, plain_models, shaken

from hf_balancemix.models.processing import squash_processor

PUSH = """
import sys
from pathlib import Path
from huggingface_hub import HfApi

api = HfApi()
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    api.create_repo(f"user/{file.stem}")
    api.upload_folder(repo_id=f"user/{file.stem}", folder_path=file.with_suffix(""))
"""

LOAD = """
import json, sys
from pathlib import Path
import torch
from transformers import pipeline
from hf_balancemix import load_trained, pipeline_labels

report = {}
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    name = f"user/{file.stem}"
    model, processor = load_trained(name)
    pixels, expected = torch.load(file, weights_only=True)
    with torch.no_grad():
        same = torch.equal(model(pixel_values=pixels).logits, expected)
    config = model.config
    report[file.stem] = [same, list(config.id2label.values()), config.problem_type, config.thresholds]
# By name, as a user does: the last one of theirs and of ours.
from PIL import Image
for name in sys.argv[2:]:
    answers = pipeline("image-classification", model=f"user/{name}")(Image.new("RGB", (40, 30)), top_k=3)
    assert len(answers) == 3 and all(0 < a["score"] < 1 for a in answers), answers
    assert sorted(a["label"] for a in answers) == sorted(report[name][1])
    assert set(pipeline_labels(answers, model.config)) <= set(report[name][1])
print(json.dumps(report))
"""


def test_pushed_models_have_the_same_logits_in_a_new_process(tmp_path):
    names = {}
    for number, (name, (model, size)) in enumerate((plain_models() | our_models()).items()):
        repo = f"m{number:02}"
        names[repo] = name
        shaken(model)
        model.config.id2label = dict(enumerate(CLASSES))
        model.config.label2id = {label: k for k, label in enumerate(CLASSES)}
        if hasattr(model.config, "label_names"):
            model.config.label_names = CLASSES
        model.config.thresholds = [0.1, 1 / 3, 0.5]
        model.save_pretrained(tmp_path / repo)
        squash_processor(image_size=size).save_pretrained(tmp_path / repo)
        torch.save((images(size), logits(model, size)), tmp_path / f"{repo}.pt")
    first, last = min(names), max(names)
    with HubStandin() as hub:
        hub.run(PUSH, tmp_path, home=tmp_path / "one")
        report = json.loads(hub.run(LOAD, tmp_path, first, last, home=tmp_path / "two").splitlines()[-1])
        assert hub.unknown == []
    assert report.keys() == names.keys()
    for repo, (same, labels, problem_type, thresholds) in report.items():
        assert same, names[repo]
        assert (labels, problem_type) == (CLASSES, "multi_label_classification")
        assert thresholds == [0.1, 1 / 3, 0.5]
