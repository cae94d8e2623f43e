"""To and from other people's tools, none of which is needed here: cleanlab, FiftyOne and Label Studio.

What they are given is plain Python, which :func:`save_json` writes where a file is needed. What comes back from people
is decisions (see `corrections`), for :func:`apply_corrections`; what comes back from cleanlab is an audit.

- cleanlab, https://docs.cleanlab.ai/stable/cleanlab/multilabel_classification/filter.html
- FiftyOne, https://docs.voxel51.com/user_guide/import_datasets.html (FiftyOneDataset, without metadata.json)
- Label Studio, https://labelstud.io/guide/predictions and https://labelstud.io/guide/task_format
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import numpy as np
import torch

from hf_balancemix.audit.corrections import DECISIONS, Decided, Rows, label_positions
from hf_balancemix.audit.label_audit import KINDS, LabelAudit, make_audit, references
from hf_balancemix.core.balance_mix import SuspiciousLabels
from hf_balancemix.data.files import absolute, first_few, parse_json
from hf_balancemix.data.labels import class_names, given_labels
from hf_balancemix.data.noise import read_ids
from hf_balancemix.files import check_inside, one_line, quote, whole_file


def save_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write what a function of this module made to a JSON file, which appears under its name only when whole.

    Raises:
        OSError: It cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


# cleanlab


def to_cleanlab(dataset: datasets.Dataset) -> list[list[int]]:
    """The `labels` of cleanlab's multi-label functions: of each image the indices of its present classes, ascending.

    Its `pred_probs` are an (N, K) array of a model's probabilities, rows and classes in the data set's order.

    Raises:
        ValueError: A label is unknown, for which cleanlab has no word.
        TypeError: As :func:`hf_balancemix.data.given_labels`.
    """
    return [np.flatnonzero(row).tolist() for row in _known_labels(dataset)]


def from_cleanlab(dataset: datasets.Dataset, issues: Any, pred_probs: Any) -> LabelAudit:
    """What cleanlab's `find_multilabel_issues_per_class` finds, as an audit: to be reviewed, or applied, as ours.

    Args:
        dataset: The N images, in the order in which cleanlab had them.
        issues: What the function returns: an (N, K) bool mask, or of each class the positions of the images whose
            label is suspicious (`return_indices_ranked_by`), alone or with the two lists that come with them.
        pred_probs: (N, K) probabilities in [0, 1], which cleanlab was given.

    Returns:
        The audit. Its scores are 1 minus the probability of the given label (cleanlab's "self_confidence"), and how
        many labels of a class are wrong is not estimated.

    Raises:
        ValueError: Shapes or values are not as described; or the issues are those of `find_label_issues`, which says
            of an image that some label is wrong, not which.
    """
    labels, names = _known_labels(dataset), class_names(dataset)
    predictions = np.asarray(pred_probs, dtype=np.float64)
    if predictions.shape != labels.shape or not ((predictions >= 0) & (predictions <= 1)).all():
        found = f"pred_probs have the shape {predictions.shape}, or values outside [0, 1]"
        raise ValueError(f"{found}; they must be {labels.shape} probabilities; pass those that cleanlab was given.")
    rows, classes = np.nonzero(_issue_mask(issues, labels.shape))
    prediction = torch.from_numpy(predictions[rows, classes]).float()
    score = torch.where(torch.from_numpy(labels[rows, classes]) == 1, 1 - prediction, prediction)
    epochs = torch.zeros(len(score), dtype=torch.int32)
    place = torch.from_numpy(rows), torch.from_numpy(classes)
    suspicious = SuspiciousLabels(*place, score, prediction, 1 - score, epochs)
    return make_audit(dataset, names, torch.from_numpy(labels), suspicious, None)


def _issue_mask(issues: Any, shape: tuple[int, ...]) -> np.ndarray:
    """(N, K) bool of any of the forms that cleanlab gives."""
    if isinstance(issues, tuple) and len(issues) == 3:
        issues = issues[0]
    columns = list(issues.T) if isinstance(issues, np.ndarray) and issues.ndim == 2 else list(issues)
    if any(np.ndim(column) != 1 for column in columns):
        raise ValueError(
            "issues name images, not labels; they must say of which class; use find_multilabel_issues_per_class."
        )
    mask = np.zeros(shape, dtype=bool)
    good = len(columns) == shape[1]
    for k, column in enumerate(columns if good else []):
        found = np.asarray(column)
        if found.dtype == bool:
            found = np.flatnonzero(found) if len(found) == shape[0] else np.array([-1])
        good &= len(found) == 0 or (found.dtype.kind in "iu" and found.min() >= 0 and found.max() < shape[0])
        if good and len(found):
            mask[found, k] = True
    if not good:
        needed = f"they must be a mask of {shape} or {shape[1]} lists of positions below {shape[0]}"
        raise ValueError(f"issues are of another number of images or classes; {needed}; pass the same data set.")
    return mask


# FiftyOne


def to_fiftyone(dataset: datasets.Dataset, audit: Rows | LabelAudit) -> dict[str, list[dict[str, Any]]]:
    """The data set and its audit for FiftyOne, as the content of a `samples.json`.

        save_json(to_fiftyone(dataset, audit), "audit/samples.json")
        fiftyone.Dataset.from_dir("audit", dataset_type=fiftyone.types.FiftyOneDataset)  # where it is installed

    A sample has the `image_id`, the given `labels`, the suspicious ones as `label_audit` (classifications with the
    score as confidence, `given` and, as a tag, "wrong positive" or "missing label") and their tags. Review it in the
    App by tagging labels of `label_audit` "wrong" (the given label is wrong), "right" or "unsure".

    Args:
        dataset: The data set that was audited; its images are files, which FiftyOne opens where they are.
        audit: A `LabelAudit` or its rows.

    Raises:
        ValueError: The audit is of another data set, or an image is not a file.
    """
    suspicious = _by_row(dataset, audit)
    names, samples = class_names(dataset), []
    labels, ids = given_labels(dataset).numpy(), read_ids(dataset)
    for row, path in enumerate(_files(dataset, range(len(dataset)))):
        found = suspicious.get(row, [])
        samples.append(
            {
                "filepath": str(absolute(path)),
                "tags": sorted({KINDS[entry["given"]] for entry in found}),
                "image_id": ids[row],
                "labels": _classifications({"label": names[k]} for k in np.flatnonzero(labels[row] == 1)),
                "label_audit": _classifications(
                    {
                        "label": entry["class"],
                        "confidence": float(entry["score"]),
                        "tags": [KINDS[entry["given"]]],
                        "given": int(entry["given"]),
                    }
                    for entry in found
                ),
            }
        )
    return {"samples": samples}


def from_fiftyone(samples: Any, *, reviewer: str = "", follow_links: bool = False) -> list[dict[str, Any]]:
    """Decisions from labels that were tagged in FiftyOne.

    Args:
        samples: What `dataset.export(..., dataset_type=fiftyone.types.FiftyOneDataset)` wrote, of a data set that
            :func:`to_fiftyone` made: the folder, its samples.json, or the content of that.
        reviewer: Who has tagged them; FiftyOne does not say it.
        follow_links: Read the samples.json of a folder where it is a link that leads out of it.

    Returns:
        A decision of each label in `label_audit` with the tag "wrong", "right" or "unsure"; its time is that of the
        last change of the image, where the export has it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such an export, no label is tagged, or one has two of the tags.
    """
    if isinstance(samples, (str, os.PathLike)) and Path(samples).is_dir():
        check_inside(Path(samples, "samples.json"), samples, follow_links)
        samples = Path(samples, "samples.json")
    content = _content(samples, "the export of FiftyOne")
    try:
        decisions = [
            {
                "image_id": sample["image_id"],
                "class": label["label"],
                "given": label["given"],
                "decision": words[0] if len(words) == 1 else words,
                "reviewer": reviewer,
                "time": _mongo_time(sample.get("last_modified_at")),
            }
            for sample in content["samples"]
            for label in (sample.get("label_audit") or {}).get("classifications", ())
            if (words := [tag for tag in label.get("tags") or () if tag in DECISIONS])
        ]
    except (AttributeError, KeyError, TypeError) as error:
        problem = (
            f"the export of FiftyOne is not one of to_fiftyone's samples ({type(error).__name__}: {one_line(error)})"
        )
        raise ValueError(f"{problem}; it must be; export the whole data set as a FiftyOneDataset.") from error
    for decision in decisions:
        if isinstance(decision["decision"], list):
            label = f"the label {quote(decision['class'])} of image_id {quote(decision['image_id'])}"
            tags = first_few(decision["decision"])
            raise ValueError(
                f"{label} has the tags {tags}; it must have one of them; remove the others and export anew."
            )
    if not decisions:
        needed = f"there must be one of {', '.join(DECISIONS)}"
        raise ValueError(f"no label in 'label_audit' has a tag that is a decision; {needed}; tag labels in the App.")
    return decisions


def _classifications(labels: Any) -> dict[str, Any]:
    return {
        "_cls": "Classifications",
        "classifications": [{"_cls": "Classification", "tags": []} | label for label in labels],
    }


def _mongo_time(value: Any) -> str:
    """ISO 8601 of a date in MongoDB's JSON, a text or milliseconds; empty where there is none."""
    value = value.get("$date") if isinstance(value, Mapping) else value
    try:
        if isinstance(value, int):
            return datetime.fromtimestamp(value / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # no date that there is
        return ""
    return value or ""


# Label Studio


def label_studio_config(names: Sequence[str]) -> str:
    """The labeling configuration that belongs to the tasks of :func:`to_label_studio`, for K class names."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value="$question")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    choices = ElementTree.SubElement(
        view, "Choices", name="labels", toName="image", choice="multiple", showInline="true"
    )
    for name in names:
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode")


def to_label_studio(
    dataset: datasets.Dataset, audit: Rows | LabelAudit, image_url: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Tasks for Label Studio: each image with a suspicious label, those of the surest first.

        save_json(to_label_studio(dataset, audit, image_url), "tasks.json")
        print(label_studio_config(class_names(dataset)))  # the project's labeling configuration

    The choices are preset to the labels as the audit suggests them; the question above the image names the suspicious
    ones. The annotator corrects the choices and submits. `data` keep what :func:`from_label_studio` needs.

    Args:
        dataset: The data set that was audited; its images are files.
        audit: A `LabelAudit` or its rows.
        image_url: From the path of an image to the address under which the annotator's browser finds it, such as
            `lambda path: "/data/local-files/?d=" + os.path.relpath(path, document_root)` for Label Studio's local
            storage, where `document_root` is its LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT.

    Raises:
        ValueError: The audit is of another data set, or an image is not a file.
    """
    suspicious = _by_row(dataset, audit)
    names, tasks = class_names(dataset), []
    labels, ids = given_labels(dataset.select(list(suspicious))).numpy(), read_ids(dataset)
    for number, (row, path) in enumerate(zip(suspicious, _files(dataset, list(suspicious)), strict=True)):
        found = suspicious[row]
        flags = {entry["class"] for entry in found}
        given = [name for name, label in zip(names, labels[number], strict=True) if label == 1]
        choices = [name for name in names if (name in given) != (name in flags)]
        result = {
            "id": f"audit-{number}",
            "from_name": "labels",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": choices},
        }
        prediction = {"model_version": "label audit", "score": float(found[0]["score"])}
        question = "; ".join(f"{entry['class']}: {KINDS[entry['given']]}? ({entry['score']:.2f})" for entry in found)
        data = {
            "image": image_url(str(absolute(path))),
            "image_id": ids[row],
            "given": given,
            "unknown": [name for name, label in zip(names, labels[number], strict=True) if label < 0],
            "suspicious": [entry["class"] for entry in found],
            "question": question,
        }
        tasks.append({"data": data, "predictions": [prediction | {"result": [result] if choices else []}]})
    return tasks


def from_label_studio(tasks: Any) -> list[dict[str, Any]]:
    """Decisions from what annotators submitted in Label Studio.

    Args:
        tasks: The project's export in the format "JSON", of tasks that :func:`to_label_studio` made: the file or its
            content.

    Returns:
        Of each submitted annotation, a decision about each suspicious label, and about any other that was changed
        (unknown ones, which were not given, are left alone). Skipped annotations and tasks without one are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such an export, or nothing was submitted.
    """
    content, decisions = _content(tasks, "the export of Label Studio"), []
    try:
        for task in content:
            data = task["data"]
            for annotation in task["annotations"]:
                if annotation.get("was_cancelled"):
                    continue
                chosen = {
                    name
                    for result in annotation["result"]
                    if result.get("from_name") == "labels"
                    for name in result["value"]["choices"]
                }
                given, by = set(data["given"]), annotation.get("completed_by", "")
                for name in [*data["suspicious"], *sorted((given ^ chosen) - {*data["suspicious"], *data["unknown"]})]:
                    decisions.append(
                        {
                            "image_id": data["image_id"],
                            "class": name,
                            "given": int(name in given),
                            "decision": "wrong" if (name in given) != (name in chosen) else "right",
                            "reviewer": str(by.get("email") or by["id"]) if isinstance(by, Mapping) else str(by),
                            "time": annotation.get("updated_at") or annotation.get("created_at") or "",
                        }
                    )
    except (AttributeError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        problem = f"the export of Label Studio is not one of to_label_studio's tasks ({found})"
        raise ValueError(f"{problem}; it must be; export the project in the format JSON.") from error
    if not decisions:
        raise ValueError("no task has an annotation; one must be submitted at least; export the project afterwards.")
    return decisions


# What they share


def _content(source: Any, what: str) -> Any:
    """Parsed JSON, of a file or as it is."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; it must be {what}; check the path.")
    try:
        return parse_json(file.read_bytes(), "it")
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({one_line(error)}); it must be {what}; export it again.") from error


def _known_labels(dataset: datasets.Dataset) -> np.ndarray:
    """(N, K) int8 of 0 and 1."""
    labels = given_labels(dataset).numpy()
    for row, k in np.argwhere(labels < 0)[:1]:
        found = f"row {row}: the label {quote(class_names(dataset)[k])} is unknown"
        raise ValueError(
            f"{found}; for cleanlab all must be known; leave out the rows or the classes with such labels."
        )
    return labels


def _by_row(dataset: datasets.Dataset, audit: Rows | LabelAudit) -> dict[int, list[dict[str, Any]]]:
    """The audit's rows of each row of the data set, in the audit's order; ValueError where it is of another."""
    rows = audit.rows if isinstance(audit, LabelAudit) else audit
    rows = rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows
    entries = [{name: entry[name] for name in ("image_id", "class", "given", "score")} for entry in rows]
    if not entries:
        raise ValueError("the audit is empty; it must have a suspicious label; there is nothing to review.")
    labels = [Decided(str(e["image_id"]), e["class"], int(e["given"]), 0, "", "") for e in entries]
    found: dict[int, list[dict[str, Any]]] = {}
    for row, entry in zip(label_positions(dataset, labels, "the audit")[0].tolist(), entries, strict=True):
        found.setdefault(row, []).append(entry)
    return found


def _files(dataset: datasets.Dataset, rows: Sequence[int]) -> list[str]:
    """The paths of the images in these rows; ValueError where one is no file."""
    ids, paths = references(dataset, np.asarray(rows))
    for image_id, path in zip(ids, paths, strict=True):
        if path is None:
            found = f"the image of image_id {quote(image_id)} is not a file"
            raise ValueError(f"{found}; the tool opens files; save the images to a folder and load them from it.")
    return [str(path) for path in paths]
