"""Heads on the other folds, against scikit-learn's logistic regression and by what cross-validation must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from hf_balancemix.core import keyed_generator, out_of_fold_logits, principal_components
from hf_balancemix.core.out_of_fold import _PENALTIES, _fit


def case(n: int = 300, d: int = 12, k: int = 4, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    labels = (torch.randn(n, k, generator=g) + 2 * x[:, :k] > torch.linspace(-0.5, 2, k)).float()
    return principal_components(x), labels


def test_principal_components_are_scikit_learns_but_for_signs_and_scale():
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 30) + 5
    ours = principal_components(x.half(), 8)
    theirs = PCA(8).fit_transform(x.half().double().numpy())[:, ::-1]
    theirs = theirs / np.sqrt((theirs**2).sum(1).mean())
    assert np.allclose(np.abs(ours.numpy()), np.abs(theirs), atol=1e-5)
    assert ours.double().square().sum(1).mean().item() == pytest.approx(1, abs=1e-5)
    assert ours.dtype == torch.float32


def test_equal_instances_have_no_components():
    assert principal_components(torch.ones(7, 5), 2).abs().max() < 1e-6


@pytest.mark.parametrize("penalty", range(len(_PENALTIES)))
def test_a_head_is_scikit_learns_logistic_regression(penalty):
    x, labels = case()
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    coefficients, bias = _fit(x, labels, weight)
    for k in range(labels.shape[1]):
        reference = LogisticRegression(C=1 / _PENALTIES[penalty], tol=1e-10, max_iter=1000)
        reference.fit(x.numpy(), labels[:, k].numpy(), sample_weight=weight[:, k].numpy())
        logits = x @ coefficients[penalty, :, k] + bias[penalty, 0, k]
        assert np.allclose(logits.numpy(), reference.decision_function(x.numpy()), atol=1e-2)


def test_an_instances_own_label_changes_nothing_of_its_own_prediction_but_that_of_others():
    x, labels = case()
    weights = torch.ones_like(labels)
    before = out_of_fold_logits(x, labels, weights, seed=3)
    changed = labels.clone()
    changed[17, 1] = 1 - changed[17, 1]
    after = out_of_fold_logits(x, changed, weights, seed=3)
    # Which penalty is chosen may depend on the label, as a number a class; here it does not.
    assert after[17, 1] == before[17, 1]
    assert (after[:, 1] != before[:, 1]).float().mean() > 0.7  # all but its fold


def test_labels_of_weight_zero_do_not_count():
    x, labels = case()
    weights = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) > 0.3).float()
    noise = torch.where(weights > 0, labels, 1 - labels)
    assert torch.equal(out_of_fold_logits(x, labels, weights), out_of_fold_logits(x, noise, weights))


def test_folds_are_of_equal_size_and_depend_on_the_seed():
    x, labels = case()
    weights = torch.ones_like(labels)
    one, again, other = (out_of_fold_logits(x, labels, weights, seed=s) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    calls = []
    out_of_fold_logits(x, labels, weights, num_folds=3, on_fold=lambda: calls.append(1))
    assert len(calls) == 3


def test_classes_in_pieces_are_predicted_as_at_once(monkeypatch):
    x, labels = case()
    weights = torch.ones_like(labels)
    whole = out_of_fold_logits(x, labels, weights)
    monkeypatch.setattr("hf_balancemix.core.out_of_fold._VALUES_AT_ONCE", len(_PENALTIES) * len(x))
    assert torch.allclose(out_of_fold_logits(x, labels, weights), whole, atol=2e-2)


def test_classes_that_nothing_can_be_learned_of_have_their_frequency():
    x, _ = case()
    labels = torch.zeros(len(x), 3)
    labels[:, 1] = 1
    labels[:3, 2] = 1
    weights = torch.ones_like(labels)
    weights[:, 2] = 0
    logits = out_of_fold_logits(x, labels, weights)
    assert torch.isfinite(logits).all()
    assert (logits[:, 0] < -5).all()
    assert (logits[:, 1] > 5).all()


def test_the_global_generator_is_left_alone():
    x, labels = case()
    before = torch.get_rng_state()
    out_of_fold_logits(x, labels, torch.ones_like(labels))
    assert torch.equal(before, torch.get_rng_state())
    assert keyed_generator(0, "folds").initial_seed() != 0


def test_numbers_out_of_range_are_refused():
    x, labels = case()
    weights = torch.ones_like(labels)
    with pytest.raises(ValueError, match="num_components is 0"):
        principal_components(x, 0)
    for folds in (1, len(x) + 1):
        with pytest.raises(ValueError, match=f"num_folds is {folds}"):
            out_of_fold_logits(x, labels, weights, num_folds=folds)
    with pytest.raises(ValueError, match="must be the same shape"):
        out_of_fold_logits(x, labels, weights[:, :2])
