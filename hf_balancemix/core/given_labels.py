"""The given labels of a whole training set, as compressed rows: memory follows the positive and the unknown labels.

In the `(N, K)` :class:`scipy.sparse.csr_array` of int8, 1 is a positive label and -1 an unknown one; what is not
stored is a negative label. `labels[index].toarray()` are the dense rows of a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.checks import check_given_labels


def compressed_labels(labels: Tensor | csr_array) -> csr_array:
    """Given labels as compressed rows, the classes of each in order; those that are so already come back as they are.

    Args:
        labels: `(N, K)` in {0, 1}, or -1 where unknown, any dtype; dense, or sparse of scipy.

    Raises:
        ValueError: It is not an (N, K) matrix of 0, 1 and -1.
    """
    if isinstance(labels, Tensor):
        if labels.ndim != 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; they must be (N, K); pass one row for each instance."
            )
        check_given_labels(labels)
        return csr_array(labels.to("cpu", torch.int8).numpy())
    ready = labels.format == "csr" and labels.dtype == np.int8 and labels.has_canonical_format
    if not (ready and labels.data.all()):
        check_given_labels(torch.from_numpy(labels.tocoo().data))
        labels = csr_array(labels, dtype=np.int8, copy=True)
        labels.sum_duplicates()
        labels.eliminate_zeros()
    check_given_labels(torch.from_numpy(labels.data))
    return labels


def label_rows(labels: csr_array, index: Tensor) -> Tensor:
    """`(B, K)` int8 labels of some instances, `(B,)` int64 on any device."""
    return torch.from_numpy(labels[index.cpu().numpy()].toarray())


def labels_at(labels: csr_array, instance: Tensor, label_class: Tensor) -> Tensor:
    """`(M,)` int8 labels by instance and class, `(M,)` each, on the CPU."""
    if not len(instance):
        return torch.zeros(0, dtype=torch.int8)
    at = (place.numpy().astype(np.int64) for place in (instance, label_class))  # scipy refuses the memory of others
    return torch.from_numpy(np.asarray(labels[tuple(at)]))


def stored_places(labels: csr_array) -> tuple[Tensor, Tensor, Tensor]:
    """Row, class and value, `(M,)` int64, int64 and int8, of the labels that are stored; row by row."""
    rows = np.repeat(np.arange(labels.shape[0]), np.diff(labels.indptr))
    return torch.from_numpy(rows), torch.from_numpy(labels.indices).long(), torch.from_numpy(labels.data)


def unknown_places(labels: csr_array) -> tuple[Tensor, Tensor]:
    """Row and class, `(M,)` int64 each, of the unknown labels; row by row."""
    at = np.flatnonzero(labels.data < 0)
    rows = np.searchsorted(labels.indptr, at, side="right") - 1
    return torch.from_numpy(rows), torch.from_numpy(labels.indices[at]).long()


def label_counts(labels: csr_array) -> tuple[Tensor, Tensor]:
    """`(K,)` int64 each: negative labels and positive labels of each class."""
    n, k = labels.shape
    stored = np.bincount(labels.indices, minlength=k)
    positive = np.bincount(labels.indices[labels.data == 1], minlength=k)
    return torch.from_numpy(n - stored), torch.from_numpy(positive)


def same_labels(labels: csr_array, others: csr_array) -> bool:
    """Whether two are equal."""
    parts = ((one.indptr, one.indices, one.data) for one in (labels, others))
    return labels.shape == others.shape and all(map(np.array_equal, *parts))
