"""Eq. 9-10 label by label, against a plain loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_balancemix.core import Reliability, refine_labels


def one(t, p, q, eps, relabel, ambiguous, trust):
    """The rule in plain Python: (label, reliability, weight)."""
    if p > 0.5 or (trust and t == 1):
        return t, Reliability.CLEAN, 1.0
    if relabel and q > eps:
        return 1, Reliability.RELABELED, 1.0
    if relabel and q < 1 - eps:
        return 0, Reliability.RELABELED, 1.0
    return t, Reliability.AMBIGUOUS, p if ambiguous else 0.0


@pytest.mark.parametrize(("relabel", "ambiguous", "trust"), itertools.product([True, False], repeat=3))
@pytest.mark.parametrize("eps", [0.5, 0.55, 0.975, 1.0])
def test_every_case_equals_the_rule(eps, relabel, ambiguous, trust):
    values = (0.0, 0.02, 0.25, 0.46, 0.5, 0.54, 0.75, 0.98, 1.0)
    cases = [(t, p, q) for t in (0, 1) for p in values for q in values]
    t, p, q = (torch.tensor(column).float().view(-1, 3) for column in zip(*cases, strict=True))
    got = refine_labels(t, p, q, eps, relabel=relabel, ambiguous=ambiguous, trust_positives=trust)
    for i, case in enumerate(cases):
        label, reliability, weight = one(*case, eps, relabel, ambiguous, trust)
        assert got.labels.view(-1)[i] == label, case
        assert got.reliability.view(-1)[i] == reliability, case
        assert got.weight.view(-1)[i].item() == pytest.approx(weight), case


def test_inputs_stay_as_they_were_and_half_precision_is_taken():
    t, p, q = torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)
    got = refine_labels(t, p.half(), q.bfloat16(), 0.975)
    assert t.eq(1).all()
    assert got.labels.dtype == got.weight.dtype == torch.float32
    assert got.reliability.dtype == torch.uint8


def test_bad_thresholds_and_shapes_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"threshold is 0.4"):
        refine_labels(x, x, x, 0.4)
    with pytest.raises(ValueError, match="same shape"):
        refine_labels(x, x[:1], x, 0.975)
