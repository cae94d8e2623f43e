"""Labels as compressed rows: what goes in comes out, whatever form it has, and nothing else goes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array, csc_array, csr_array

from hf_balancemix.core import BalanceMix
from hf_balancemix.core.given_labels import (
    compressed_labels,
    label_counts,
    label_rows,
    labels_at,
    same_labels,
    stored_places,
    unknown_places,
)

DENSE = torch.tensor([[1, 0, -1], [0, 0, 0], [-1, 1, 1], [0, -1, 0]])


@pytest.mark.parametrize("form", [csr_array, csc_array, coo_array])
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32])
def test_any_form_is_the_same_labels(form, dtype):
    found = compressed_labels(form(DENSE.numpy().astype(dtype)))
    assert found.dtype == np.int8
    assert same_labels(found, compressed_labels(DENSE))
    assert found.toarray().tolist() == DENSE.tolist()
    assert torch.equal(label_rows(found, torch.tensor([2, 0])), DENSE[[2, 0]].to(torch.int8))
    assert [count.tolist() for count in label_counts(found)] == [(v == DENSE).sum(0).tolist() for v in (0, 1)]
    instance, label_class = (DENSE * 0 + 1).nonzero(as_tuple=True)
    assert torch.equal(labels_at(found, instance, label_class), DENSE.flatten().to(torch.int8))
    for places, mask in ((stored_places(found)[:2], DENSE != 0), (unknown_places(found), DENSE < 0)):
        assert all(map(torch.equal, places, mask.nonzero(as_tuple=True)))


def test_zeros_that_are_stored_and_classes_out_of_order_are_put_right():
    stored = np.array([1, 0, -1, 1, 1, -1], dtype=np.int8), np.array([0, 1, 2, 2, 1, 0]), np.array([0, 3, 3, 6, 6])
    given = csr_array(stored, shape=(4, 3))
    assert same_labels(compressed_labels(given), compressed_labels(DENSE[[0, 1, 2, 1]]))
    assert given.nnz == 6  # the caller's own is as it was


@pytest.mark.parametrize("value", [2, -2, 0.5, np.nan])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"labels hold .*; each must be 0, 1 or -1"):
        BalanceMix(csr_array(np.array([[0, value], [1, 0]])))
    with pytest.raises(ValueError, match=r"labels have shape \(2, 0\)"):
        BalanceMix(csr_array((2, 0)))
