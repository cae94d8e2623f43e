"""Other people's formats: what they document is what is written and read.

The forms were also checked with the tools themselves: cleanlab 2.9.0 made the issues of both forms, FiftyOne 1.22.1's
importer read the samples, and label-studio-sdk 2.1.2 validated the configuration, the tasks and the predictions.
"""

from __future__ import annotations

import json
import os
from xml.etree import ElementTree

import datasets
import numpy as np
import pytest
from conftest import label_dataset

from hf_balancemix.audit import (
    apply_corrections,
    from_cleanlab,
    from_fiftyone,
    from_label_studio,
    label_studio_config,
    save_json,
    to_cleanlab,
    to_fiftyone,
    to_label_studio,
)

NAMES = ["cat, small", 'the "dog" & <b>', "two\nlines", "木"]
LABELS = [[0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.fixture(params=[[7, 8, 9, 10], ["a.jpg", "я/b.jpg", "c", "7"]], ids=["int64", "string"])
def dataset(request, tmp_path) -> datasets.Dataset:
    """4 images that are files, which nothing opens."""
    files = [tmp_path / f"images/{i}.jpg" for i in range(4)]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    plain = label_dataset(LABELS, NAMES, request.param).add_column("image", list(map(str, files)))
    return plain.cast_column("image", datasets.Image())


def audit_of(dataset) -> list[dict]:
    """Image 3 lacks class 3, image 0 has no class 1 and, perhaps, class 0; the surest first."""
    return [
        {"image_id": dataset["image_id"][row], "class": NAMES[k], "given": LABELS[row][k], "score": score}
        for row, k, score in ((3, 3, 0.99), (0, 1, 0.9), (0, 0, 0.6))
    ]


# cleanlab


def test_cleanlab_gets_lists_and_its_issues_of_any_form_become_an_audit(tmp_path, dataset):
    assert to_cleanlab(dataset) == [[1, 2], [1], [0], []]
    predictions = np.array([[0.1, 0.2, 0.9, 0.1], [0.1, 0.9, 0.1, 0.6], [0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.95]])
    mask = np.zeros((4, 4), dtype=bool)
    mask[[0, 1, 3], [1, 3, 3]] = True
    ranked = [np.array([], dtype=int), np.array([0]), np.array([], dtype=int), np.array([3, 1])]
    audit = from_cleanlab(dataset, mask, predictions)
    rows = list(audit.rows)
    assert rows == list(from_cleanlab(dataset, ranked, predictions.tolist()).rows)
    assert rows == list(from_cleanlab(dataset, (ranked, ["labels"], ["probabilities"]), predictions).rows)
    found = [(row["image_id"], row["class"], row["given"], row["suggested"], row["kind"], row["rank"]) for row in rows]
    ids = dataset["image_id"]
    assert found == [
        (ids[3], "木", 0, 1, "missing label", 1),
        (ids[0], NAMES[1], 1, 0, "wrong positive", 1),
        (ids[1], "木", 0, 1, "missing label", 2),
    ]
    assert [row["score"] for row in rows] == pytest.approx([0.95, 0.8, 0.6])
    assert rows[0]["image"] == str(tmp_path / "images/3.jpg")
    assert [(audit.name, audit.positives, audit.wrong) for audit in audit.classes][1] == (NAMES[1], 2, None)
    assert to_cleanlab(apply_corrections(dataset, audit, min_score=0.8)) == [[2], [1], [0], [3]]


def test_cleanlab_issues_of_images_or_of_other_data_are_refused(dataset):
    predictions = np.full((4, 4), 0.5)
    for issues, message in (
        (np.array([True, False, False, True]), "issues name images, not labels"),
        (np.array([3, 0]), "issues name images, not labels"),
        (np.zeros((5, 4), dtype=bool), r"a mask of \(4, 4\) or 4 lists of positions below 4"),
        ([np.array([4]), [], [], []], "positions below 4"),
        ([[], [], []], "positions below 4"),
    ):
        with pytest.raises(ValueError, match=message):
            from_cleanlab(dataset, issues, predictions)
    with pytest.raises(ValueError, match=r"pred_probs have the shape \(4, 3\)"):
        from_cleanlab(dataset, np.zeros((4, 4), dtype=bool), predictions[:, :3])
    unknown = label_dataset([[1, 0]], ["a", "b"], unknown_labels=[[0, 1]])
    with pytest.raises(ValueError, match="row 0: the label 'b' is unknown"):
        to_cleanlab(unknown)


# FiftyOne


def test_fiftyone_samples_are_as_documented_and_tagged_labels_become_decisions(tmp_path, dataset):
    save_json(to_fiftyone(dataset, audit_of(dataset)), tmp_path / "samples.json")
    content = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert list(content) == ["samples"]
    first = content["samples"][0]
    assert first["filepath"] == str(tmp_path / "images/0.jpg")
    assert first["tags"] == ["missing label", "wrong positive"]
    assert first["labels"] == {
        "_cls": "Classifications",
        "classifications": [{"_cls": "Classification", "tags": [], "label": name} for name in NAMES[1:3]],
    }
    assert first["label_audit"]["classifications"][0] == {
        "_cls": "Classification",
        "tags": ["wrong positive"],
        "label": NAMES[1],
        "confidence": 0.9,
        "given": 1,
    }
    assert [sample["tags"] for sample in content["samples"][1:]] == [[], [], ["missing label"]]
    with pytest.raises(ValueError, match="no label in 'label_audit' has a tag that is a decision"):
        from_fiftyone(tmp_path)

    # As the App and the export leave it: ids, private fields, null for an empty field, dates in MongoDB's JSON.
    first["label_audit"]["classifications"][0] |= {"_id": {"$oid": "6b09"}, "tags": ["wrong positive", "wrong", "me"]}
    first["label_audit"]["classifications"][1]["tags"].append("right")
    first |= {"_id": {"$oid": "6b0a"}, "metadata": None, "last_modified_at": {"$date": "2026-11-27T09:30:00Z"}}
    content["samples"][1]["label_audit"] = None
    content["samples"][3] |= {"last_modified_at": {"$date": 1795771800000}}
    content["samples"][3]["label_audit"]["classifications"][0]["tags"] = ["wrong"]
    save_json(content, tmp_path / "samples.json")
    decisions = from_fiftyone(tmp_path, reviewer="ann")
    assert decisions == from_fiftyone(content, reviewer="ann")
    assert [(row["decision"], row["time"], row["reviewer"]) for row in decisions] == [
        ("wrong", "2026-11-27T09:30:00Z", "ann"),
        ("right", "2026-11-27T09:30:00Z", "ann"),
        ("wrong", "2026-11-27T09:30:00Z", "ann"),
    ]
    assert to_cleanlab(apply_corrections(dataset, decisions)) == [[2], [1], [0], [3]]

    first["label_audit"]["classifications"][0]["tags"].append("unsure")
    with pytest.raises(ValueError, match="has the tags 'wrong', 'unsure'; it must have one of them"):
        from_fiftyone(content)
    for bad in ({"labels": {"a": [0]}}, {"samples": [{"filepath": "a.jpg", "label_audit": {"classifications": [1]}}]}):
        with pytest.raises(ValueError, match="is not one of to_fiftyone's samples"):
            from_fiftyone(bad)


# Label Studio


def annotation(*choices: str, by=10, cancelled=False) -> dict:
    """As https://labelstud.io/guide/task_format shows an annotation, with the result of a Choices tag."""
    value = {"id": "audit-0", "from_name": "labels", "to_name": "image", "type": "choices", "origin": "prediction"}
    return {
        "id": 1001,
        "result": [value | {"value": {"choices": list(choices)}}] if choices else [],
        "was_cancelled": cancelled,
        "ground_truth": False,
        "created_at": "2021-03-09T22:16:08.728353Z",
        "updated_at": "2021-03-09T22:16:08.728378Z",
        "lead_time": 4.288,
        "result_count": 0,
        "task": 1,
        "completed_by": by,
    }


def test_label_studio_tasks_are_as_documented_and_submitted_choices_become_decisions(tmp_path, dataset):
    def url(path: str) -> str:
        return "/data/local-files/?d=" + os.path.relpath(path, tmp_path)

    tasks = to_label_studio(dataset, audit_of(dataset), url)
    ids = dataset["image_id"][:]
    assert [task["data"]["image_id"] for task in tasks] == [ids[3], ids[0]]  # the surest first
    assert tasks[1]["data"]["image"] == "/data/local-files/?d=images/0.jpg"
    assert tasks[1]["predictions"] == [
        {
            "model_version": "label audit",
            "score": 0.9,
            "result": [
                {
                    "id": "audit-1",
                    "type": "choices",
                    "from_name": "labels",
                    "to_name": "image",
                    "value": {"choices": [NAMES[0], NAMES[2]]},
                }
            ],
        }
    ]
    assert tasks[0]["data"]["question"] == "木: missing label? (0.99)"

    # The annotator agrees about image 3; of image 0 one suspicion is right, one is not, and class 3 is there, too.
    tasks[0] |= {"id": 1, "annotations": [annotation("木"), annotation(cancelled=True)]}
    tasks[1] |= {"id": 2, "annotations": [annotation(NAMES[2], "木", by={"id": 3, "email": "ann@example.com"})]}
    tasks.append({"id": 3, "data": {"image": "other"}, "annotations": []})
    save_json(tasks, tmp_path / "export.json")
    decisions = from_label_studio(tmp_path / "export.json")
    assert [(row["image_id"], row["class"], row["given"], row["decision"], row["reviewer"]) for row in decisions] == [
        (ids[3], "木", 0, "wrong", "10"),
        (ids[0], NAMES[1], 1, "wrong", "ann@example.com"),
        (ids[0], NAMES[0], 0, "right", "ann@example.com"),
        (ids[0], "木", 0, "wrong", "ann@example.com"),
    ]
    corrected = apply_corrections(dataset, decisions)
    assert to_cleanlab(corrected) == [[2, 3], [1], [0], [3]]
    assert corrected["corrections"][3][0]["time"] == "2021-03-09T22:16:08.728378Z"

    tasks[0]["annotations"].append(annotation())  # a second annotator chose nothing
    with pytest.raises(ValueError, match="1 decisions disagree with one before"):
        apply_corrections(dataset, from_label_studio(tasks))
    for bad, message in (
        ([{"data": {"image": "a"}, "annotations": [annotation("cat")]}], "is not one of to_label_studio's tasks"),
        ([{"image": "a", "labels": "cat"}], "export the project in the format JSON"),
        ([{"data": {}, "annotations": [annotation(cancelled=True)]}], "no task has an annotation"),
    ):
        with pytest.raises(ValueError, match=message):
            from_label_studio(bad)


def test_label_studio_configuration_has_each_class_as_a_choice():
    view = ElementTree.fromstring(label_studio_config(NAMES))
    assert [choice.get("value") for choice in view.iter("Choice")] == NAMES
    choices = view.find("Choices")
    assert choices.attrib["choice"] == "multiple"
    assert choices.attrib["toName"] == view.find("Image").attrib["name"] == "image"


def test_label_studio_leaves_labels_alone_that_were_not_given(tmp_path):
    (tmp_path / "0.jpg").touch()
    partial = label_dataset([[1, 0, 0]], list("abc"), unknown_labels=[[0, 0, 1]])
    partial = partial.add_column("image", [str(tmp_path / "0.jpg")]).cast_column("image", datasets.Image())
    [task] = to_label_studio(partial, [{"image_id": 0, "class": "a", "given": 1, "score": 0.9}], str)
    [decision] = from_label_studio([task | {"annotations": [annotation("a", "c")]}])
    assert (decision["class"], decision["decision"]) == ("a", "right")


# All of them


def test_audits_of_other_data_images_without_files_and_bad_files_are_refused(tmp_path, dataset):
    other = audit_of(dataset)
    other[1]["given"] = 0
    inside = dataset.remove_columns("image").add_column("image", [{"path": "a.jpg", "bytes": b"x"}] * 4)
    inside = inside.cast_column("image", datasets.Image())
    for write in (to_fiftyone, lambda dataset, audit: to_label_studio(dataset, audit, str)):
        with pytest.raises(ValueError, match="1 of 3 rows of the audit have another given label"):
            write(dataset, other)
        with pytest.raises(ValueError, match="the audit is empty"):
            write(dataset, [])
        with pytest.raises(ValueError, match=r"the image of image_id .* is not a file"):
            write(inside, audit_of(dataset))
    (tmp_path / "bad.json").write_text("image_id,class\n")
    for read in (from_fiftyone, from_label_studio):
        with pytest.raises(FileNotFoundError, match="no file"):
            read(tmp_path / "absent.json")
        with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
            read(tmp_path / "bad.json")
