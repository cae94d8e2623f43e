"""Eq. 5, 1 and 10."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce

from hf_balancemix.core import (
    RefinedLabels,
    binary_cross_entropy,
    minority_mixup,
    mix_refined_labels,
    mixing_coefficient,
)


def test_lambda_is_keyed_and_at_least_one_half():
    drawn = [mixing_coefficient(4.0, 0, 1, i) for i in range(2000)]
    assert drawn == [mixing_coefficient(4.0, 0, 1, i) for i in range(2000)]
    assert min(drawn) >= 0.5
    assert max(drawn) <= 1
    assert drawn[0] != mixing_coefficient(4.0, 0, 2, 0)
    # E max(l, 1 - l) for Beta(4, 4) is 1/2 + C(8, 4) / 2^9 = 0.63672; the standard error here is 0.0022.
    assert sum(drawn) / 2000 == pytest.approx(0.63672, abs=4 * 0.0022)


@pytest.mark.parametrize("alpha", [1e-6, 0.002, 0.02, 0.2, 1.0, 40.0, 2e6, 1e300])
def test_lambda_has_the_mean_of_its_distribution(alpha):
    # E max(l, 1 - l) = 1/2 + 4^-alpha / (alpha B(alpha, alpha)), which goes to 1/2 + 1 / sqrt(4 pi alpha).
    if alpha < 1e5:
        log_beta = 2 * math.lgamma(alpha) - math.lgamma(2 * alpha)
        excess = math.exp(-alpha * math.log(4) - log_beta) / alpha
    else:
        excess = 1 / math.sqrt(4 * math.pi * alpha)
    drawn = torch.tensor([mixing_coefficient(alpha, 0, i) for i in range(2000)], dtype=torch.float64)
    assert drawn.min() >= 0.5
    assert drawn.max() <= 1
    error = drawn.std().item() / math.sqrt(2000)
    assert drawn.mean().item() == pytest.approx(0.5 + excess, abs=4 * error + 1e-6)


@pytest.mark.parametrize("alpha", [-1.0, math.inf, math.nan])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; it must be finite and at least 0"):
        mixing_coefficient(alpha, 0)


def test_whole_numbers_cannot_be_mixed():
    x, s = torch.ones(2, 1, 2, 2), torch.ones(2, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"labels are torch.uint8 and torch.uint8; they must be floating point"):
        minority_mixup(x, x, s, s, torch.ones(2))


def test_alpha_zero_does_not_mix():
    assert mixing_coefficient(0, 1, 2) == 1.0
    x, y = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    s, t = torch.rand(3, 5), torch.rand(3, 5)
    images, labels = minority_mixup(x, y, s, t, torch.ones(3))
    assert torch.equal(images, x)
    assert torch.equal(labels, s)


def test_each_pair_is_mixed_by_its_own_lambda():
    x, y = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    s, t = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    images, labels = minority_mixup(x, y, s, t, torch.tensor([0.75, 0.5]))
    assert images.flatten(1).tolist() == [[0.75] * 4, [0.5] * 4]
    assert labels.tolist() == [[0.75, 0.25], [1.0, 0.0]]


def test_shapes_that_do_not_fit_are_refused():
    x, s = torch.ones(2, 1, 2, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"images and lambda are \(2, 1, 2, 2\), \(2, 1, 2, 2\) and \(3,\)"):
        minority_mixup(x, x, s, s, torch.ones(3))
    with pytest.raises(ValueError, match=r"labels and lambda are \(2, 3\), \(2, 2\) and \(2,\)"):
        minority_mixup(x, x, s, s[:, :2], torch.ones(2))


def test_eq_10_equals_the_sum_over_classes_written_out():
    g = torch.Generator().manual_seed(0)
    logits, targets, weight = (torch.rand(4, 3, generator=g) for _ in range(3))
    expected = 0.0
    for i in range(4):
        for k in range(3):
            p, t = 1 / (1 + math.exp(-logits[i, k].item())), targets[i, k].item()
            expected -= weight[i, k].item() * (t * math.log(p) + (1 - t) * math.log(1 - p)) / 4
    assert binary_cross_entropy(logits, targets, weight).item() == pytest.approx(expected, rel=1e-5)
    mean = binary_cross_entropy(logits, targets, weight, reduction="mean")
    assert mean.item() == pytest.approx(expected / 3, rel=1e-5)
    assert binary_cross_entropy(logits, targets, reduction="mean").item() == pytest.approx(
        torch_bce(logits, targets).item()
    )


def test_gradient_does_not_depend_on_how_a_batch_is_split():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.rand(8, 5)
    (whole,) = torch.autograd.grad(binary_cross_entropy(logits, targets), logits)
    halves = [binary_cross_entropy(logits[i : i + 4], targets[i : i + 4]) / 2 for i in (0, 4)]
    (split,) = torch.autograd.grad(sum(halves), logits)
    assert torch.allclose(whole, split, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_low_precision_logits_stay_finite(dtype):
    logits = torch.tensor([[60000.0, -60000.0, 20.0]], dtype=torch.float32).to(dtype).requires_grad_()
    loss = binary_cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_loss_stays_float32_under_autocast():
    linear = torch.nn.Linear(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear(torch.ones(2, 8))
        loss = binary_cross_entropy(logits, torch.full((2, 3), 0.3))
    assert logits.dtype == torch.bfloat16
    expected = torch_bce(logits.float(), torch.full((2, 3), 0.3), reduction="sum").item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # bfloat16 would be off by 1e-3


def test_bad_reduction_and_shapes_are_refused():
    with pytest.raises(ValueError, match="reduction is 'max'"):
        binary_cross_entropy(torch.ones(1, 2), torch.ones(1, 2), reduction="max")
    with pytest.raises(ValueError, match="same shape"):
        binary_cross_entropy(torch.ones(1, 2), torch.ones(1, 3))


def refined(labels: list[list[float]], weights: list[list[float]]) -> RefinedLabels:
    labels = torch.tensor(labels)
    return RefinedLabels(labels, torch.zeros(labels.shape, dtype=torch.uint8), torch.tensor(weights))


def test_each_label_of_a_mix_weighs_by_its_own_reliability():
    # The loss written out with two targets and two weights, and its gradient.
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()
    given = (torch.rand(2, 6, 4, generator=g) < 0.5).float()
    weights = torch.rand(2, 6, 4, generator=g)
    weights[0, 0], weights[1, 1] = 0, 0
    weights[:, 2, 3] = 0  # of a label that neither instance vouches for nothing is learned
    lam = 0.5 + 0.5 * torch.rand(6, generator=g)
    sides = [refined(given[i].tolist(), weights[i].tolist()) for i in (0, 1)]
    expected = 0.0
    for share, side in zip((lam, 1 - lam), sides, strict=True):
        losses = torch_bce(logits, side.labels.double(), reduction="none")
        expected = expected + (share[:, None] * side.weight * losses).sum() / 6
    labels, weight = mix_refined_labels(*sides, lam)
    loss = binary_cross_entropy(logits, labels, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    got, want = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    assert torch.allclose(got, want, atol=1e-6)
    assert got[2, 3] == 0


def test_as_printed_a_mixed_label_takes_the_random_instances_reliability():
    random, minority = refined([[1.0, 0.0]], [[0.3, 1.0]]), refined([[0.0, 1.0]], [[1.0, 0.0]])
    labels, weight = mix_refined_labels(random, minority, torch.tensor([0.75]), partner_reliability=False)
    assert labels.tolist() == [[0.75, 0.25]]
    assert weight.equal(random.weight)


def test_where_all_labels_are_certain_both_rules_are_eq_5():
    random, minority = refined([[1.0, 0.0, 1.0]], [[1.0] * 3]), refined([[0.0, 1.0, 1.0]], [[1.0] * 3])
    for own in (True, False):
        labels, weight = mix_refined_labels(random, minority, torch.tensor([0.625]), partner_reliability=own)
        assert labels.tolist() == [[0.625, 0.375, 1.0]]
        assert weight.tolist() == [[1.0] * 3]


def test_a_known_label_is_learned_though_its_partners_is_unknown():
    random, minority = refined([[-1.0, 1.0, -1.0]], [[0.0, 1.0, 0.0]]), refined([[1.0, -1.0, -1.0]], [[1.0, 0.0, 0.0]])
    labels, weight = mix_refined_labels(random, minority, torch.tensor([0.75]))
    assert labels.tolist() == [[1.0, 1.0, -1.0]]
    assert weight.tolist() == [[0.25, 0.75, 0.0]]
    labels, _ = mix_refined_labels(random, minority, torch.tensor([0.75]), partner_reliability=False)
    assert labels.tolist() == [[-1.0, -1.0, -1.0]]


def test_at_lambda_one_an_unknown_label_of_the_partner_takes_nothing_away():
    images, random, minority = (
        torch.zeros(2, 1, 1, 1),
        torch.tensor([[1.0, -1.0]] * 2),
        torch.tensor([[-1.0, 0.0]] * 2),
    )
    _, labels = minority_mixup(images, images, random, minority, torch.tensor([1.0, 0.9]))
    assert labels.tolist() == [[1.0, -1.0], [-1.0, -1.0]]
