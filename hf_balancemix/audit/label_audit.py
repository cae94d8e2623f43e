"""The label audit as rows, one a suspicious label, and as figures a class; written, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.balance_mix import SuspiciousLabels
from hf_balancemix.core.given_labels import compressed_labels, label_counts, labels_at
from hf_balancemix.core.loss_histogram import bin_edges
from hf_balancemix.core.loss_mixture import LossMixtures
from hf_balancemix.core.noise_rates import NoiseRates
from hf_balancemix.data.files import read_json
from hf_balancemix.data.noise import read_ids
from hf_balancemix.data.views import undecoded_images
from hf_balancemix.files import check_inside, one_line, quote, whole_file

ROWS_FILE, CLASSES_FILE = "label_audit.parquet", "label_audit.json"
MIN_POSITIVES = 50
"""Given positive labels of a class, of which fewer are too few to say how many of its labels are wrong."""

KINDS = ("missing label", "wrong positive")  # by the given value
_FORMAT = 1


@dataclass(frozen=True)
class ClassAudit:
    """What is known of one class's given labels."""

    name: str
    positives: int
    """Labels that are given positive."""
    negatives: int
    wrong: tuple[float, float, float] | None
    """Which share of the positive labels is wrong, as estimate and ends of the 95 % interval; None is not estimated,
    as the network judged its own labels or the class has fewer than `MIN_POSITIVES`."""
    missing: tuple[float, float, float] | None
    """Which share of the negative labels is wrong, that is, a missing label; as `wrong`."""
    histogram_positive: list[list[float]]
    """Losses of the positive labels, as edges of the bins (one more than bins) and counts; and where the mixture has
    two components, how many labels of the clean and of the noisy one it expects in each bin. `[]` where none are."""
    histogram_negative: list[list[float]]


@dataclass(frozen=True)
class LabelAudit:
    """Which given labels are probably wrong.

    Attributes:
        rows: One row a suspicious label, the surest first, with the columns

            - `image_id` (as in the data set), `image` (its path; null where it has no file of its own);
            - `class`, `given` and `suggested` (1: present, 0: absent), `kind` ("wrong positive" or "missing label");
            - `score` in [0, 1], how probably the given label is wrong (:func:`~hf_balancemix.core.wrong_probability`);
            - `p_clean` in [0, 1], p_G of Eq. 8; `prediction` in [0, 1], the model's, that the class is present;
            - `epochs_distrusted`, in how many epochs of the training p_G was at most 1/2; `rank` in its class, from 1.
        classes: The K classes, in the model's order.
    """

    rows: datasets.Dataset
    classes: list[ClassAudit]

    @property
    def num_estimated(self) -> int:
        """How many of the rows are wrong, as their scores say; what to look at first."""
        scores = self.rows.with_format("numpy")["score"][:] if len(self.rows) else np.zeros(0)
        return round(float(np.asarray(scores, dtype=np.float64).sum()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `label_audit.parquet` (the rows) and `label_audit.json` (the classes); each is whole or not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        classes = {"format": _FORMAT, "classes": [asdict(audit) for audit in self.classes]}
        with whole_file(folder / ROWS_FILE) as temporary:
            pq.write_table(self.rows.with_format("arrow")[:], temporary)
        with whole_file(folder / CLASSES_FILE) as temporary:
            temporary.write_text(json.dumps(classes, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], follow_links: bool = False) -> LabelAudit:
        """Read what :meth:`save` wrote, such as the folder of a trained model.

        Args:
            folder: Where it is.
            follow_links: Read files that are links which lead out of the folder.

        Raises:
            FileNotFoundError: There is no audit in the folder.
            ValueError: A file is none of an audit's, or leads out of the folder.
        """
        folder = Path(folder)
        for name in (ROWS_FILE, CLASSES_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is absent; it must be there, as a run of BalanceMix leaves it "
                    "beside its model; pass that folder, or make an audit with audit_labels."
                )
            check_inside(folder / name, folder, follow_links)
        try:
            rows = datasets.Dataset(pq.read_table(folder / ROWS_FILE))
            saved = read_json(folder / CLASSES_FILE)
            classes = [_class_audit(values) for values in saved["classes"]]
            types = {name: rows.features[name].dtype for name in _columns("string")}  # KeyError without one
            if saved["format"] != _FORMAT or types != {
                name: value.dtype for name, value in _columns(types["image_id"]).items()
            }:
                raise ValueError(f"format {quote(saved['format'])} with the columns {quote(rows.column_names)}")
        except (ValueError, KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
            reason = one_line(error)
            raise ValueError(
                f"{folder} holds no audit that can be read ({reason}); its {ROWS_FILE} and {CLASSES_FILE} must be as "
                "an audit wrote them; make the audit again."
            ) from None
        return cls(rows, classes)


def remove_audit(folder: str | os.PathLike[str]) -> None:
    """Remove what :meth:`LabelAudit.save` wrote, if anything."""
    for name in (ROWS_FILE, CLASSES_FILE):
        Path(folder, name).unlink(missing_ok=True)


def make_audit(
    dataset: datasets.Dataset,
    names: Sequence[str],
    labels: Tensor | csr_array,
    suspicious: SuspiciousLabels,
    rates: NoiseRates | None,
    loss_counts: Tensor | None = None,
    mixtures: LossMixtures | None = None,
) -> LabelAudit:
    """The audit of a data set.

    Args:
        dataset: Its `image_id` and `image` are what rows refer to; without the former, the number of the row.
        names: The K names.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown; dense or sparse.
        suspicious: Entries of `labels`.
        rates: Of the K classes; None where they were not estimated.
        loss_counts: `(2, K, 36)`, as :attr:`~hf_balancemix.core.LossHistogram.coarse_counts`.
        mixtures: Eq. 7, fitted on these losses; with `loss_counts`, or neither.
    """
    labels = compressed_labels(labels)
    negatives, positives = (count.tolist() for count in label_counts(labels))
    histograms: list[list[list[list[float]]]] = [[[]] * len(names)] * 2
    if loss_counts is not None and mixtures is not None:
        histograms = _histograms(loss_counts, mixtures)
    wrong, missing = ([None] * len(names),) * 2 if rates is None else (rate.T.tolist() for rate in rates)
    classes = [
        ClassAudit(
            name=name,
            positives=positives[k],
            negatives=negatives[k],
            wrong=_if_enough(wrong[k], positives[k]),
            missing=_if_enough(missing[k], positives[k]),
            histogram_positive=histograms[1][k],
            histogram_negative=histograms[0][k],
        )
        for k, name in enumerate(names)
    ]
    return LabelAudit(_rows(dataset, names, labels, suspicious), classes)


def _histograms(loss_counts: Tensor, mixtures: LossMixtures) -> list[list[list[list[float]]]]:
    """For each polarity and class what :attr:`ClassAudit.histogram_positive` holds."""
    edges = bin_edges()[::32]
    z = (edges - mixtures.means[..., None]) / mixtures.variances[..., None].sqrt()
    shares = mixtures.weights[..., None] * torch.special.ndtr(z).diff(dim=-1)
    expected = (loss_counts.sum(-1)[..., None, None] * shares).tolist()  # (2, K, 2, bins)
    return [
        [
            [edges.tolist(), counts.tolist(), *(expected[i][k] if mixtures.separated[i, k] else [])]
            if counts.any()
            else []
            for k, counts in enumerate(of_classes)
        ]
        for i, of_classes in enumerate(loss_counts)
    ]


def _if_enough(rate: list[float] | None, positives: int) -> tuple[float, float, float] | None:
    if rate is None or positives < MIN_POSITIVES:
        return None
    estimate, low, high = rate
    return estimate, low, high


def _rows(
    dataset: datasets.Dataset, names: Sequence[str], labels: csr_array, suspicious: SuspiciousLabels
) -> datasets.Dataset:
    order = np.lexsort((suspicious.label_class, suspicious.instance, -suspicious.score))
    instance, label_class, score, prediction, p_clean, epochs = (x.numpy()[order] for x in suspicious)
    given = labels_at(labels, torch.from_numpy(instance), torch.from_numpy(label_class)).numpy()
    rank = np.zeros(len(order), dtype=np.int32)
    for k in np.unique(label_class):
        rank[label_class == k] = np.arange(1, 1 + (label_class == k).sum())
    ids, images = references(dataset, instance)
    features = _columns(dataset.features["image_id"].dtype if "image_id" in dataset.column_names else "int64")
    columns = {
        "image_id": pa.array(ids, features.arrow_schema.field("image_id").type),  # a list of uint64 overflows
        "image": images,
        "class": [names[k] for k in label_class],
        "given": given,
        "suggested": 1 - given,
        "kind": [KINDS[value] for value in given],
        "score": score,
        "p_clean": p_clean,
        "prediction": prediction,
        "epochs_distrusted": epochs,
        "rank": rank,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _columns(image_id: str) -> datasets.Features:
    types = {
        "image_id": image_id, "image": "string", "class": "string", "given": "int8", "suggested": "int8",
        "kind": "string", "score": "float32", "p_clean": "float32", "prediction": "float32",
        "epochs_distrusted": "int32", "rank": "int32",
    }  # fmt: skip
    return datasets.Features({name: datasets.Value(dtype) for name, dtype in types.items()})


def references(dataset: datasets.Dataset, instance: np.ndarray) -> tuple[list[int | str], list[str | None]]:
    """Of some instances the ids, and the paths of their images; no image is opened.

    ValueError where an id is no integer or string, or two instances, of all, have the same.
    """
    unique, place = np.unique(instance, return_inverse=True)
    ids: list[int | str] = unique.tolist()
    images: list[str | None] = [None] * len(unique)
    if "image_id" in dataset.column_names:
        all_ids = read_ids(dataset, unique=True)
        ids = [all_ids[i] for i in unique]
    if isinstance(dataset.features.get("image"), datasets.Image) and len(unique):
        parts = undecoded_images(dataset).flatten().select_columns(["image.path"])  # without the bytes
        paths = parts.select(unique).with_format("arrow")[:]["image.path"].to_pylist()
        images = [path if path and Path(path).is_file() else None for path in paths]
    return [ids[i] for i in place], [images[i] for i in place]


def _class_audit(values: dict) -> ClassAudit:
    """A class's audit as JSON holds it; TypeError or ValueError for anything else."""
    rates = {key: values[key] and tuple(values[key]) for key in ("wrong", "missing")}
    audit = ClassAudit(**values | rates)
    numbers = [[audit.positives, audit.negatives], *filter(None, rates.values())]
    numbers += [*audit.histogram_positive, *audit.histogram_negative]
    if not isinstance(audit.name, str) or any(type(x) not in (int, float) for row in numbers for x in row):
        raise ValueError(f"a class is {quote(values)}")
    if any(len(rate) != 3 for rate in rates.values() if rate):
        raise ValueError(f"the rates of the class {quote(audit.name)} are {quote(rates)}")
    return audit
