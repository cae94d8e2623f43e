"""The comparison methods' losses, against scalar arithmetic written from the papers' formulas."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction
from functools import partial

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from hf_balancemix.core import (
    asymmetric_loss,
    binary_cross_entropy,
    db_loss,
    focal_loss,
    hill_loss,
    large_loss,
    splc_loss,
)
from hf_balancemix.core.distributed import gather
from hf_balancemix.core.losses import (
    REDUCTIONS,
    AsymmetricLoss,
    DBLoss,
    FocalLoss,
    HillLoss,
    LargeLoss,
    MultiLabelLoss,
    SPLCLoss,
    large_loss_entries,
    num_large_losses,
)

COUNTS = torch.tensor([1, 40, 7, 99, 20])  # of N = 100
ALL = {
    "bce": binary_cross_entropy,
    "focal": focal_loss,
    "asl": asymmetric_loss,
    "asl-differentiated": partial(asymmetric_loss, detach_weight=False),
    "hill": hill_loss,
    "splc": partial(splc_loss, epoch=1),
    "db": partial(db_loss, class_counts=COUNTS, num_instances=100),
    "ll-r": partial(large_loss, num_modified=3),
    "ll-ct": partial(large_loss, num_modified=3, mode="correct"),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(x: float, t: float) -> float:
    return t * math.log(1 + math.exp(-x)) + (1 - t) * math.log(1 + math.exp(x))


# ---- one entry at a time; `rows` holds the targets of the instance, where a formula needs them ----


def focal_entry(x, t, gamma=2.0, alpha=None):
    p_t = t * sigmoid(x) + (1 - t) * (1 - sigmoid(x))
    share = 1.0 if alpha is None else t * alpha + (1 - t) * (1 - alpha)
    return share * (1 - p_t) ** gamma * bce(x, t)


def asl_weight(x, t, gamma_neg, gamma_pos, margin):
    p = sigmoid(x)
    q = min(1 - p + margin, 1) if margin > 0 else 1 - p
    p_t = p * t + q * (1 - t)
    return (1 - p_t) ** (gamma_pos * t + gamma_neg * (1 - t))


def asl_entry(x, t, gamma_neg=4.0, gamma_pos=0.0, margin=0.05, weight=None):
    """As published, clamped at 1e-8; `weight` is a constant if given."""
    p = sigmoid(x)
    q = min(1 - p + margin, 1) if margin > 0 else 1 - p
    base = -(t * math.log(max(p, 1e-8)) + (1 - t) * math.log(max(q, 1e-8)))
    return (asl_weight(x, t, gamma_neg, gamma_pos, margin) if weight is None else weight) * base


def hill_entry(x, t, lam=1.5, margin=1.0, gamma=2.0):
    shifted = sigmoid(x - margin)
    return t * (1 - shifted) ** gamma * -math.log(shifted) + (1 - t) * (lam * sigmoid(x) ** 2 - sigmoid(x) ** 3)


def splc_entry(x, t, epoch, threshold=0.6):
    if t == 0 and epoch >= 1 and sigmoid(x) > threshold:
        return focal_entry(x, 1.0)
    return t * focal_entry(x - 1, 1.0) + (1 - t) * focal_entry(x, 0.0)


def db_entry(x, t, k, row, counts, n, mu=0.2, s=2.0):
    positives = sum(t_j / n_j for t_j, n_j in zip(row, counts, strict=True) if t_j > 0)
    rate = math.inf if positives == 0 else 1 / counts[k] / positives
    weight = 0.1 + (1.0 if rate == math.inf else sigmoid(10 * (rate - mu)))
    z = x - math.log(n / counts[k] - 1) * 0.05 / s
    positive = focal_entry(z, 1.0) * weight
    negative = focal_entry(s * z, 0.0) * weight / s
    return 2 * (t * positive + (1 - t) * negative)


def case(kind: str, rows: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 logits in [-4, 4] and targets: hard, soft, or with unknown ones."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.rand(rows, 5, generator=g, dtype=torch.float64) * 8 - 4
    targets = (torch.rand(rows, 5, generator=g) < 0.4).double()
    if kind == "soft":
        other = (torch.rand(rows, 5, generator=g) < 0.4).double()
        targets = torch.lerp(other, targets, torch.rand(rows, 1, generator=g, dtype=torch.float64) / 2 + 0.5)
    if kind == "unknown":
        targets[torch.rand(rows, 5, generator=g) < 0.3] = -1
    return logits, targets


FORMULAS = {
    "focal": (focal_loss, focal_entry),
    "focal 3, alpha": (partial(focal_loss, gamma=3, alpha=0.25), partial(focal_entry, gamma=3, alpha=0.25)),
    "asl": (partial(asymmetric_loss, detach_weight=False), asl_entry),
    "asl 2, 1, no margin": (
        partial(asymmetric_loss, gamma_neg=2, gamma_pos=1, margin=0, detach_weight=False),
        partial(asl_entry, gamma_neg=2, gamma_pos=1, margin=0),
    ),
    "hill": (hill_loss, hill_entry),
    "hill, other": (partial(hill_loss, lam=2, margin=0.5, gamma=1), partial(hill_entry, lam=2, margin=0.5, gamma=1)),
    "splc, first epoch": (partial(splc_loss, epoch=0), partial(splc_entry, epoch=0)),
    "splc": (partial(splc_loss, epoch=1), partial(splc_entry, epoch=1)),
    "splc 0.9": (partial(splc_loss, epoch=7, threshold=0.9), partial(splc_entry, epoch=7, threshold=0.9)),
}


@pytest.mark.parametrize("kind", ["hard", "soft", "unknown"])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_the_formulas(name, kind):
    function, entry = FORMULAS[name]
    logits, targets = case(kind)
    logits.requires_grad_()
    losses = function(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    h = 1e-6
    for i in range(len(logits)):
        for k in range(logits.shape[1]):
            x, t = logits[i, k].item(), targets[i, k].item()
            expected = 0.0 if t < 0 else entry(x, t)
            slope = 0.0 if t < 0 else (entry(x + h, t) - entry(x - h, t)) / (2 * h)
            assert losses[i, k].item() == pytest.approx(expected, rel=1e-10, abs=1e-14), (x, t)
            assert gradient[i, k].item() == pytest.approx(slope, rel=1e-6, abs=1e-8), (x, t)


@pytest.mark.parametrize("kind", ["hard", "soft", "unknown"])
@pytest.mark.parametrize(("mu", "s"), [(0.2, 2.0), (0.3, 5.0)])
def test_distribution_balanced_is_the_formula(kind, mu, s):
    logits, targets = case(kind)
    targets[0] = 0  # an instance without a positive label
    logits.requires_grad_()
    function = partial(db_loss, class_counts=COUNTS, num_instances=100, mu=mu, negative_scale=s)
    losses = function(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    h = 1e-6
    for i in range(len(logits)):
        row = [max(t, 0.0) for t in targets[i].tolist()]
        for k in range(logits.shape[1]):
            x, t = logits[i, k].item(), targets[i, k].item()
            entry = partial(db_entry, t=t, k=k, row=row, counts=COUNTS.tolist(), n=100, mu=mu, s=s)
            expected = 0.0 if t < 0 else entry(x)
            slope = 0.0 if t < 0 else (entry(x + h) - entry(x - h)) / (2 * h)
            assert losses[i, k].item() == pytest.approx(expected, rel=1e-10)
            assert gradient[i, k].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_class_without_positives_or_negatives_stays_finite():
    logits, targets = case("hard")
    logits.requires_grad_()
    loss = db_loss(logits, targets, torch.tensor([0, 100, 5, 5, 5]), 100)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_detached_weight_of_asl_is_a_constant(kind):
    logits, targets = case(kind)
    logits.requires_grad_()
    losses = asymmetric_loss(logits, targets, gamma_pos=1, reduction="none")
    assert torch.equal(losses, asymmetric_loss(logits, targets, gamma_pos=1, detach_weight=False, reduction="none"))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    h = 1e-6
    for x, t, slope in zip(*(v.flatten().tolist() for v in (logits, targets, gradient)), strict=True):
        constant = asl_weight(x, t, 4.0, 1.0, 0.05)
        entry = partial(asl_entry, gamma_pos=1.0, weight=constant)
        assert slope == pytest.approx((entry(x + h, t) - entry(x - h, t)) / (2 * h), rel=1e-6, abs=1e-9)


def test_asl_gradient_of_a_negative_as_derived_by_hand():
    logits = torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None].requires_grad_()
    losses = asymmetric_loss(logits, torch.zeros(41, 1), detach_weight=False, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    for x, slope in zip(logits.flatten().tolist(), gradient.flatten().tolist(), strict=True):
        p, m = sigmoid(x), max(sigmoid(x) - 0.05, 0)
        expected = p * (1 - p) * (m**4 / (1 - m) - 4 * m**3 * math.log(1 - m)) if m > 0 else 0.0
        assert slope == pytest.approx(expected, rel=1e-10)


def test_special_cases_are_each_other():
    logits, targets = case("soft")
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    mean = {"reduction": "mean"}
    assert torch.allclose(binary_cross_entropy(logits, targets, **mean), expected, rtol=1e-12)
    assert torch.allclose(focal_loss(logits, targets, gamma=0, **mean), expected, rtol=1e-12)
    assert torch.allclose(asymmetric_loss(logits, targets, 0, 0, 0, **mean), expected, rtol=1e-12)
    assert torch.allclose(large_loss(logits, targets, 0, **mean), expected, rtol=1e-12)
    for gamma in (1, 2.5):
        same = asymmetric_loss(logits, targets, gamma, gamma, 0, detach_weight=False)
        assert torch.allclose(focal_loss(logits, targets, gamma), same, rtol=1e-12)
    ours = focal_loss(logits, targets, 2, 0.25, "none")
    assert torch.allclose(ours, sigmoid_focal_loss(logits, targets, 0.25, 2), rtol=1e-10)


# ---- what holds for each of them ----


@pytest.mark.parametrize("name", ALL)
def test_reductions(name):
    logits, targets = case("unknown")
    losses = ALL[name](logits, targets, reduction="none")
    assert losses.shape == (6, 5)
    assert losses.dtype == torch.float64
    assert (losses[targets < 0] == 0).all()
    for reduction, divisor in (("sum", 6), ("mean", 30)):
        value = ALL[name](logits, targets, reduction=reduction)
        assert value.item() == pytest.approx(sum(losses.flatten().tolist()) / divisor, rel=1e-12)
    # Whatever stands at an unknown label, it changes nothing (a large loss is never one of these).
    other = torch.where(targets < 0, 3.9, logits)
    assert torch.equal(ALL[name](other, targets, reduction="none"), losses)
    assert torch.equal(ALL[name](logits, targets), ALL[name](logits, targets, reduction="sum"))
    with pytest.raises(ValueError, match="reduction is 'max'"):
        ALL[name](logits, targets, reduction="max")
    with pytest.raises(ValueError, match="same shape"):
        ALL[name](logits, targets[:, :4])


@pytest.mark.parametrize("name", ALL)
def test_nothing_but_the_result_changes(name):
    logits, targets = case("unknown")
    logits, given = logits.float().requires_grad_(), (logits.float(), targets.clone())
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            loss = ALL[name](logits, targets)
            assert torch.is_grad_enabled() == enabled
            assert loss.requires_grad == enabled
            assert loss.dtype == torch.float32
    assert torch.equal(logits, given[0])
    assert torch.equal(targets, given[1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32_and_finite(name, dtype):
    row = torch.tensor([60000.0, -60000.0, 20.0, -20.0, 0.0])
    logits = row.repeat(4, 1).to(dtype).requires_grad_()
    targets = torch.tensor([0.0, 1.0, 0.3, -1.0])[:, None].repeat(1, 5)
    loss = ALL[name](logits, targets)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[3] == 0).all()
    assert torch.equal(loss, ALL[name](logits.float(), targets))
    linear = torch.nn.Linear(8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear(torch.ones(2, 8))
        inside = ALL[name](low, torch.full((2, 5), 0.3))
    assert low.dtype == torch.bfloat16
    assert torch.equal(inside, ALL[name](low.float(), torch.full((2, 5), 0.3)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int8, torch.int64, torch.float16, torch.float64])
def test_labels_of_any_type_are_their_numbers(name, dtype):
    logits, targets = case("hard")
    logits = logits.float()
    assert torch.equal(ALL[name](logits, targets.to(dtype)), ALL[name](logits, targets.float()))


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_label_in_an_unsigned_type_is_refused(name):
    logits, targets = case("unknown")
    with pytest.raises(ValueError, match="targets hold 255; each must be in"):
        ALL[name](logits, torch.where(targets < 0, 255, targets).to(torch.uint8))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_no_logit_of_an_unknown_label_changes_anything(name, bad):
    logits, targets = case("unknown")
    unknown = targets < 0
    reference, other = logits.clone().requires_grad_(), torch.where(unknown, bad, logits).requires_grad_()
    weights = {"weight": torch.where(unknown, bad, 0.5)} if name == "bce" else {}
    expected = {"weight": torch.full_like(logits, 0.5)} if name == "bce" else {}
    losses = [ALL[name](reference, targets, **expected), ALL[name](other, targets, **weights)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(reference.grad, other.grad)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_empty_batch_costs_nothing_and_has_a_gradient(name, reduction):
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = ALL[name](logits, torch.zeros(0, 5), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("margin", [1e-300, 1e-8, 1e-3, 0.05, 0.7, 1.0])
def test_asl_has_its_margin_however_small(margin):
    # log(1 - max(p - m, 0)) with 1 - p as sigmoid(-x), which is exact, in float64.
    row = [-80.0, -9.0, -1.0, -1e-3, 0.0, 1e-3, 2.0, 10.0, 16.0, 40.0, 90.0]
    expected = []
    for x in row:
        q = sigmoid(-x) + margin
        expected.append(0.0 if q >= 1 else -math.log1p(-(sigmoid(x) - margin)) if x < 0 else -math.log(q))
    for dtype, rel in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        logits = torch.tensor([row], dtype=dtype, requires_grad=True)
        losses = asymmetric_loss(logits, torch.zeros(1, len(row)), gamma_neg=0, margin=margin, reduction="none")
        assert losses[0].tolist() == pytest.approx(expected, rel=rel, abs=1e-7)
        losses.sum().backward()
        assert logits.grad.isfinite().all()


def test_db_loss_without_steepness_weighs_all_alike():
    logits, targets = case("hard")
    targets[0] = 0  # no positive label: r is infinite
    counts = COUNTS
    loss = db_loss(logits, targets, counts, 100, alpha=0.2, beta=0, kappa=0, gamma=0, negative_scale=1, focal_scale=1)
    assert loss.item() == pytest.approx(0.7 * binary_cross_entropy(logits, targets).item(), rel=1e-12)


def test_gradients_where_a_published_clamp_would_have_stopped_them():
    logits = torch.tensor([[-60.0, -100.0]], requires_grad=True)
    asymmetric_loss(logits, torch.ones(1, 2)).backward()
    assert logits.grad.tolist() == [[-1.0, -1.0]]
    # An exponent below 1 has an infinite derivative at a weight of 0, which p < margin gives.
    logits = torch.tensor([[-9.0, -3.0, -1.0]], requires_grad=True)
    asymmetric_loss(logits, torch.zeros(1, 3), gamma_neg=0.5, detach_weight=False).backward()
    assert logits.grad[0, 0] == 0
    assert torch.isfinite(logits.grad).all()


def test_settings_out_of_range_are_refused():
    logits, targets = case("hard")
    for call, message in (
        (partial(focal_loss, gamma=-1), "gamma is -1"),
        (partial(focal_loss, alpha=2), r"alpha is 2; it must be in \[0, 1\]"),
        (partial(asymmetric_loss, gamma_neg=float("nan")), "gamma_neg is nan"),
        (partial(asymmetric_loss, margin=1.5), "margin is 1.5"),
        (partial(hill_loss, lam=0.5), "lam is 0.5"),
        (partial(splc_loss, epoch=0, threshold=60), "threshold is 60"),
        (partial(db_loss, class_counts=COUNTS, num_instances=1), "num_instances is 1"),
        (partial(db_loss, class_counts=COUNTS, num_instances=9, negative_scale=0), "negative_scale is 0"),
        (partial(db_loss, class_counts=COUNTS[:2], num_instances=9), r"class_counts has the shape \(2,\)"),
        (partial(db_loss, class_counts=COUNTS, num_instances=9, beta=-1), "beta is -1"),
        (partial(db_loss, class_counts=COUNTS, num_instances=9, beta=math.inf), "beta is inf; it must be finite and"),
        (partial(db_loss, class_counts=COUNTS, num_instances=9, mu=math.nan), "mu is nan; it must be finite"),
        (partial(hill_loss, margin=math.inf), "margin is inf; it must be finite"),
        (partial(focal_loss, gamma=math.inf), "gamma is inf; it must be finite and at least 0"),
        (partial(large_loss, num_modified=-1), "num_modified is -1"),
        (partial(large_loss, num_modified=1, mode="drop"), "mode is 'drop'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(logits, targets)


# ---- large losses ----


def brute_force(logits, labels, k, strict=False) -> set[tuple[int, int]]:
    """The rule in words: sort the candidates' losses, look up the k-th, take what is as large."""
    losses = {
        (i, j): math.log1p(math.exp(logits[i, j].item()))
        for i in range(len(logits))
        for j in range(logits.shape[1])
        if labels[i, j] == 0
    }
    ranked = sorted(losses.values(), reverse=True)
    if k == 0 or not ranked:
        return set()
    if k > len(ranked):
        return set(losses)
    return {at for at, loss in losses.items() if (loss > ranked[k - 1] if strict else loss >= ranked[k - 1])}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft", "unknown"])
def test_exactly_the_entries_of_the_rule_are_modified(kind, ties):
    sizes = set()
    for seed in range(10):
        logits, labels = case(kind, seed=seed)
        logits = logits.round() if ties else logits
        for k in (0, 1, 2, 5, 11, 30, 1000):
            for strict in (False, True):
                entries = large_loss_entries(logits, labels, k, strict=strict)
                assert {tuple(at) for at in entries.nonzero().tolist()} == brute_force(logits, labels, k, strict)
                assert not entries[labels != 0].any()
                sizes.add(int(entries.sum()) - k if not strict else 0)
    assert (max(sizes) > 0) == ties  # equal losses are taken together, and only then is it more than k


def test_the_loss_with_modified_entries():
    logits, labels = case("unknown")
    modified = brute_force(logits, labels, 4)
    assert len(modified) == 4
    for mode in ("reject", "correct"):
        x = logits.clone().requires_grad_()
        losses = large_loss(x, labels, 4, mode, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        for i in range(len(logits)):
            for j in range(logits.shape[1]):
                value, t = logits[i, j].item(), labels[i, j].item()
                if (i, j) in modified:
                    t = -1 if mode == "reject" else 1
                assert losses[i, j].item() == pytest.approx(0 if t < 0 else bce(value, t), rel=1e-10)
                assert gradient[i, j].item() == pytest.approx(0 if t < 0 else sigmoid(value) - t, rel=1e-10)
        mean = large_loss(logits, labels, 4, mode, reduction="mean").item()  # the rejected stay in the denominator
        assert mean == pytest.approx(losses.sum().item() / 30)


def test_the_number_of_modified_labels_is_exact():
    for thousandths, delta in ((100, 0.1), (200, 0.2), (40, 0.04), (70, 0.07)):  # of one per cent
        for labels in (32 * 20, 64 * 80, 1000):
            for epoch in range(50):
                assert num_large_losses(labels, epoch, delta) == -(-labels * epoch * thousandths // 100_000)
    # The paper's last epochs: 1.90, 1.96 and 1.95 per cent.
    assert [num_large_losses(10_000, e, d) for e, d in ((19, 0.1), (49, 0.04), (39, 0.05))] == [190, 196, 195]
    assert num_large_losses(10_000, 39, Fraction(2, 40)) == 195
    assert num_large_losses(40, 3, 90) == 40
    assert num_large_losses(5120, 0, 5) == 0
    with pytest.raises(ValueError, match="delta is -1"):
        num_large_losses(10, 1, -1)


def test_one_process_gathers_its_own():
    x = torch.rand(3, 2)
    assert torch.equal(gather(x), x)


# ---- objects ----

OBJECTS = (FocalLoss, AsymmetricLoss, HillLoss, SPLCLoss, partial(DBLoss, COUNTS, 100), LargeLoss)
FUNCTIONS = (focal_loss, asymmetric_loss, hill_loss, splc_loss, db_loss, large_loss)


def test_objects_are_the_functions():
    logits, targets = case("soft")
    for module, expected in (
        (FocalLoss(1.5, 0.3, "none"), focal_loss(logits, targets, 1.5, 0.3, "none")),
        (AsymmetricLoss(3, 1, 0.1, False), asymmetric_loss(logits, targets, 3, 1, 0.1, False)),
        (HillLoss(1.7, 0.5, 1, "mean"), hill_loss(logits, targets, 1.7, 0.5, 1, "mean")),
        (DBLoss(COUNTS, 100, mu=0.3), db_loss(logits, targets, COUNTS, 100, mu=0.3)),
    ):
        for epoch in (0, 5):  # all are called alike
            assert torch.equal(module(logits, targets, epoch), expected)
        assert torch.equal(module(logits, targets), expected)
    for epoch in (0, 3):
        expected = splc_loss(logits, targets, epoch, 0.7, 0.5, 1.0, 2)
        assert torch.equal(SPLCLoss(0.7, 0.5, 1.0, 2)(logits, targets, epoch), expected)
        expected = large_loss(logits, targets, epoch, "correct")  # 10 / 3 per cent of 30 labels an epoch
        assert torch.equal(LargeLoss(Fraction(10, 3), "correct")(logits, targets, epoch), expected)
        expected = large_loss(logits, targets, min(epoch, 1), "correct")
        assert torch.equal(LargeLoss(Fraction(10, 3), "permanent")(logits, targets, epoch), expected)
    assert repr(HillLoss()) == "HillLoss(lam=1.5, margin=1.0, gamma=2.0, reduction=sum)"


@pytest.mark.parametrize(("make", "function"), zip(OBJECTS, FUNCTIONS, strict=True))
def test_an_object_has_its_functions_defaults(make, function):
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    for name, value in make().settings.items():
        if name in defaults and name != "across_ranks":  # a function on its own must not wait for other ranks
            assert defaults[name] in (value, inspect.Parameter.empty), name
    assert make().settings.keys() >= defaults.keys() - {"logits", "targets", "labels", "epoch"} - {
        "class_counts", "num_modified",
    }  # fmt: skip


FIRST_AUTHORS = ("Lin, Tsung-Yi", "Ridnik, Tal", "Zhang, Youcai", "Zhang, Youcai", "Wu, Tong", "Kim, Youngwook")


@pytest.mark.parametrize(("make", "author"), zip(OBJECTS, FIRST_AUTHORS, strict=True))
def test_an_object_tells_its_settings_and_whom_to_cite(make, author):
    loss = make()
    assert isinstance(loss, MultiLabelLoss)
    assert loss.changed_settings == {}
    assert make(reduction="mean").changed_settings == {}  # the trainer's, for all methods alike
    assert loss.citation.startswith("@")
    assert loss.citation.count("{") == loss.citation.count("}")
    assert re.search(rf"author += {{{author} and ", loss.citation)


def test_settings_are_kept_under_their_names():
    loss = AsymmetricLoss(gamma_neg=2, margin=0.05)
    assert (loss.gamma_neg, loss.gamma_pos, loss.margin) == (2, 0.0, 0.05)
    assert loss.changed_settings == {"gamma_neg": 2}
    labels = torch.tensor([[1, 0], [1, -1], [0, 1], [1, 0]])
    counted = DBLoss.from_labels(labels, mu=0.3)
    assert counted.class_counts.tolist() == [3, 1]
    assert counted.num_instances == 4
    assert list(counted.state_dict()) == ["class_counts"]  # moves with the module
    assert counted.changed_settings == {"mu": 0.3}


def test_an_object_refuses_bad_settings_when_it_is_made():
    for make, message in (
        (partial(FocalLoss, alpha=2), r"alpha is 2; it must be in \[0, 1\]"),
        (partial(AsymmetricLoss, margin=1.5), "margin is 1.5"),
        (partial(HillLoss, lam=0.5), "lam is 0.5"),
        (partial(SPLCLoss, threshold=60), "threshold is 60"),
        (partial(DBLoss, COUNTS, 100, negative_scale=0), "negative_scale is 0"),
        (partial(LargeLoss, mode="drop"), "mode is 'drop'; it must be one of reject, correct, permanent"),
        (partial(LargeLoss, delta=-1), "delta is -1"),
        (partial(HillLoss, reduction="batchmean"), "reduction is 'batchmean'; it must be one of sum, mean, none"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_same_word_is_the_same_reduction():
    logits, targets = case("unknown")
    for reduction in REDUCTIONS:
        expected = binary_cross_entropy(logits, targets, reduction=reduction)
        of_none = LargeLoss(reduction=reduction)(logits, targets, 0)
        assert torch.equal(of_none, expected)
        assert torch.allclose(focal_loss(logits, targets, 0, None, reduction), expected, rtol=1e-12)
