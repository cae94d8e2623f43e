"""The audit of any data set by any classifier: by its own predictions, or by heads that did not see the label."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_balancemix import audit_labels

NAMES = ["red", "green", "blue"]


class Colours(nn.Module):
    """Says which of three channels of an image are bright, in an order of its own; what it sees are the channels."""

    def __init__(self, names=("blue", "red", "green"), problem_type="multi_label_classification"):
        super().__init__()
        self.names = names
        self.config = type("Config", (), {})()
        self.config.num_labels, self.config.id2label = len(names), dict(enumerate(names))
        self.config.problem_type = problem_type
        self.classifier = nn.Linear(3, len(names))
        with torch.no_grad():
            self.classifier.weight.copy_(
                12 * torch.eye(3)[[NAMES.index(name) if name in NAMES else 2 for name in names]]
            )
            self.classifier.bias.fill_(-6)

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.classifier(pixel_values.mean((2, 3))))


def processor(images, return_tensors):
    return {"pixel_values": torch.stack([torch.tensor(np.array(x)).permute(2, 0, 1) / 255 for x in images])}


@pytest.fixture
def scenes(tmp_path):
    """400 images of bright and dark channels, and their labels, of which 40 are missing and 30 are wrong."""
    rng = np.random.default_rng(0)
    clean = rng.random((400, 3)) < 0.4
    paths = []
    for i, row in enumerate(clean):
        pixels = np.where(row, 200, 50) + rng.integers(-45, 45, (4, 4, 3))
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
    given = clean.copy()
    for value, count in ((True, 40), (False, 30)):
        places = np.argwhere(clean == value)
        for i, k in places[rng.choice(len(places), count, replace=False)]:
            given[i, k] = not value
    features = datasets.Features(
        image=datasets.Image(),
        labels=datasets.List(datasets.ClassLabel(names=NAMES)),
        image_id=datasets.Value("string"),
    )
    columns = {
        "image": paths,
        "labels": [np.flatnonzero(row).tolist() for row in given],
        "image_id": [f"image {i}" for i in range(400)],
    }
    return datasets.Dataset.from_dict(columns, features=features), clean, given


@pytest.mark.parametrize("folds", [None, 4])
def test_wrong_and_missing_labels_are_found_with_their_direction(scenes, folds):
    data, clean, given = scenes
    audit = audit_labels(Colours(), data, processor, folds=folds)
    wrong = {(f"image {i}", NAMES[k], int(given[i, k])) for i, k in np.argwhere(clean != given)}
    sure = audit.rows.filter(lambda row: row["score"] > 0.5)
    found = set(zip(sure["image_id"][:], sure["class"][:], sure["given"][:], strict=True))
    assert len(found & wrong) >= 0.9 * len(wrong)
    assert len(found & wrong) >= 0.9 * len(found)
    assert {(row["kind"], row["given"], row["suggested"]) for row in sure} == {
        ("wrong positive", 1, 0),
        ("missing label", 0, 1),
    }
    if folds:  # heads fitted to the labels know how sure they are; the model above is a guess
        assert audit.num_estimated == pytest.approx(len(wrong), rel=0.3)
    for k, known in enumerate(audit.classes):
        share = (~clean & given)[:, k].sum() / given[:, k].sum()
        assert known.wrong[1] - 0.02 <= share <= known.wrong[2] + 0.02
        assert (known.name, known.positives) == (NAMES[k], given[:, k].sum())


def test_an_image_that_cannot_be_read_is_an_error_or_left_out(scenes, tmp_path):
    data, _, _ = scenes
    (tmp_path / "7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"7\.png"):
        audit_labels(Colours(), data, processor)
    for folds in (None, 4):
        audit = audit_labels(Colours(), data, processor, folds=folds, on_bad_image="skip")
        assert "image 7" not in audit.rows["image_id"][:]
        assert len(audit.rows)


def test_a_data_set_without_ids_is_named_by_row(scenes):
    data, _, given = scenes
    rows = audit_labels(Colours(), data.remove_columns("image_id"), processor).rows
    top = rows[0]
    assert given[top["image_id"], NAMES.index(top["class"])] == top["given"]


def test_what_cannot_be_audited_is_refused(scenes):
    data, _, _ = scenes
    with pytest.raises(ValueError, match=r"3 classes and the data set 3, and not both have 'blue'"):
        audit_labels(Colours(("violet", "red", "green")), data, processor)
    with pytest.raises(ValueError, match="problem_type"):
        audit_labels(Colours(problem_type="single_label_classification"), data, processor)
    for folds in (1, 401, 2.5):
        with pytest.raises(ValueError, match=rf"folds is {folds}; it must be a whole number in \[2, 400\]"):
            audit_labels(Colours(), data, processor, folds=folds)
    with pytest.raises(ValueError, match="processor is None"):
        audit_labels(Colours(), data)
