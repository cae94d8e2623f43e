"""Transition matrices, importance reweighting and the trainer round them."""

from __future__ import annotations

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import arguments, flat, make_dataset, stop_after, tiny_vit
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_balancemix.data import given_labels
from hf_balancemix.methods import estimate_transition_matrices, importance_reweighted_bce, t_estimator, trainer_for


def correlated_labels(n: int, up: float, down: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clean labels of six correlated classes, and given ones with P(1 | clean 0) = up and P(0 | clean 1) = down."""
    rng = np.random.default_rng(seed)
    loadings = np.array([[1.5, 0, 0], [1.2, 0.8, 0], [0, 1.5, 0.5], [0, 0, 1.5], [-1.2, 0, 0.8], [0.6, 0.6, 0.6]])
    scores = rng.normal(size=(n, 3)) @ loadings.T + 0.7 * rng.normal(size=(n, 6))
    clean = (scores > np.quantile(scores, 0.7, axis=0)).astype(int)
    u = rng.random(clean.shape)
    return clean, np.where(clean == 1, u >= down, u < up).astype(int)


def correlated_data(folder: Path) -> datasets.Dataset:
    """192 images with noisy labels of five correlated classes."""
    images = make_dataset(folder, 192, size=16)
    _, given = correlated_labels(192, 0.15, 0.1)
    lists = [np.flatnonzero(row[:5]).tolist() for row in given]
    return images.map(lambda row, i: {"labels": lists[i]}, with_indices=True, features=images.features)


# ---- the estimate ----


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.3), (0.2, 0.2)])
def test_known_transitions_are_recovered(up, down):
    clean, given = correlated_labels(40_000, up, down)
    selected = (clean == given) & (np.random.default_rng(1).random(given.shape) < 0.7)
    T = estimate_transition_matrices(torch.tensor(given), torch.tensor(selected)).numpy()
    assert T.dtype == np.float64
    assert np.abs(T[:, 0, 1] - up).max() < 0.04
    assert np.abs(T[:, 1, 0] - down).max() < 0.04
    assert np.allclose(T.sum(2), 1, atol=1e-12)


def slow_matrices(labels, selected, probabilities, min_selected) -> tuple[np.ndarray, list[str]]:
    """The estimate again: by counting, and by solving the linear systems that its formulas solve."""
    n, num_classes = labels.shape
    matrices, sources = [], []
    for i in range(num_classes):
        a_of, b_of, det = {}, {}, {}
        for k in range(num_classes):
            both = [(labels[r, i], labels[r, k]) for r in range(n) if labels[r, i] >= 0 and labels[r, k] >= 0]
            joint = np.array([[sum(pair == (a, b) for pair in both) for b in (0, 1)] for a in (0, 1)]) / len(both)
            c = np.zeros((2, 2))
            for a in (0, 1):
                of_k = [labels[r, k] for r in range(n) if selected[r, i] and labels[r, i] == a and labels[r, k] >= 0]
                c[a] = [of_k.count(b) / len(of_k) if of_k else np.nan for b in (0, 1)]
            if k == i or np.isnan(c).any():
                continue
            # P(given k = 0) = (1 - pi) c00 + pi c10
            pi = np.linalg.solve([[c[1, 0] - c[0, 0]]], [joint[:, 0].sum() - c[0, 0]])[0]
            if not 0 <= pi <= 1:
                continue
            P = c * np.array([[1 - pi], [pi]])  # P(clean i = a, given k = b)
            # P(given i = 1, given k = b) = T01 P0b + T11 P1b for both b
            t01, t11 = np.linalg.solve(P.T, joint[1])
            a_of[k], b_of[k], det[k] = t01, 1 - t11, np.linalg.det(P)

        def rounded(x, k=num_classes):
            return 0.0 if -0.3 / k < x < 0 else x

        best = None
        enough = min((selected[:, i] & (labels[:, i] == a)).sum() for a in (0, 1)) >= min_selected
        for k in a_of if enough else []:
            a, b = rounded(a_of[k]), rounded(b_of[k])
            if a < 0 or b < 0 or a + b >= 1:
                continue
            residual = sum(abs(det[m]) * (abs(a - a_of[m]) + abs(b - b_of[m])) for m in a_of)
            if best is None or residual < best[0]:
                best = residual, a, b
        if best is not None:
            a, b = best[1:]
            matrices.append([[1 - a, a], [b, 1 - b]])
            sources.append("correlation")
            continue
        rows = [r for r in range(n) if labels[r, i] >= 0]
        confusion = np.zeros((2, 2))
        for r in rows:
            confusion[int(probabilities[r, i] >= 0.5), labels[r, i]] += 1
        p = [probabilities[r, i] for r in rows]
        anchors = np.array([[1 - min(p), min(p)], [1 - max(p), max(p)]])
        dual = None
        if (confusion.sum(1) > 0).all():
            dual = anchors @ (confusion / confusion.sum(1, keepdims=True))
        usable = dual is not None and dual[0, 1] + dual[1, 0] < 1
        matrices.append(dual if usable else np.eye(2))
        sources.append("dual_t" if usable else "identity")
    return np.array(matrices), sources


@pytest.mark.parametrize("unknown", [0.0, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_equals_a_slow_one(seed, unknown):
    clean, given = correlated_labels(500, 0.15, 0.25, seed)
    rng = np.random.default_rng(seed + 10)
    selected = rng.random(given.shape) < np.where(clean == given, 0.8, 0.1)
    given[rng.random(given.shape) < unknown] = -1
    selected &= given >= 0
    selected[given[:, 2] == 1, 2] = False  # no selected positive: Dual-T
    selected[given[:, 3] == 0, 3] = False  # no selected negative, and never predicted: identity
    selected[np.flatnonzero(given[:, 4] == 1)[40:], 4] = False  # too few selected positives
    probabilities = np.clip(0.7 * clean + 0.3 * rng.random(given.shape), 0.02, 0.97)
    probabilities[:, 3] *= 0.4
    slow, sources = slow_matrices(given, selected, probabilities, min_selected=30)
    assert sources[2:5] == ["dual_t", "identity", "dual_t"]
    assert sources.count("correlation") >= 2
    T, source = t_estimator._estimate(
        torch.tensor(given), torch.tensor(selected), torch.tensor(probabilities), min_selected=30
    )
    assert [t_estimator._SOURCES[s] for s in source] == sources
    assert np.abs(T.numpy() - slow).max() < 1e-9


def assert_usable(T: torch.Tensor) -> None:
    assert torch.isfinite(T).all()
    assert (T >= 0).all()
    assert torch.allclose(T.sum(2), torch.ones_like(T[:, 0]), atol=1e-12, rtol=0)
    assert (T[:, 0, 1] + T[:, 1, 0] < 1).all()


@pytest.mark.parametrize("n", [1, 5, 2000])
def test_too_few_positives_unknown_or_nan_stay_finite(n):
    _, given = correlated_labels(n, 0.1, 0.3)
    given = torch.tensor(given)
    given[:, 0] = 0  # no positive label
    given[3:, 1] = 0  # at most three
    given[:, 2] = -1  # nothing known
    given[:, 3] = 1
    probabilities = torch.rand(given.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probabilities[:, 4] = float("nan")
    for selected in (torch.ones_like(given).bool(), torch.zeros_like(given).bool()):
        for p in (None, probabilities):
            T = estimate_transition_matrices(given, selected, p)
            assert_usable(T)
            x = torch.tensor([[0.0] * 6, [1e4] * 6, [-1e4] * 6], requires_grad=True)
            importance_reweighted_bce(x, torch.tensor([[1.0] * 6, [0.0] * 6, [1.0] * 6]), T).backward()
            assert torch.isfinite(x.grad).all()
    assert torch.equal(estimate_transition_matrices(given, selected), torch.eye(2).double().repeat(6, 1, 1))


def test_a_dual_t_that_is_worse_than_chance_is_not_used():
    # Predictions against the labels would give T01 + T10 > 1, which turns labels round.
    labels = torch.tensor([[1], [1], [0], [0]] * 10)
    wrong = torch.where(labels == 1, 0.05, 0.95)
    T = estimate_transition_matrices(labels, labels > 5, wrong)
    assert torch.equal(T[0], torch.eye(2, dtype=torch.float64))


def test_bad_input_of_the_estimate_is_refused():
    labels = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"\(4, 2\), \(4, 3\)"):
        estimate_transition_matrices(labels, torch.zeros(4, 3).bool())
    with pytest.raises(ValueError, match="other than 0, 1 and -1"):
        estimate_transition_matrices(labels + 0.5, torch.zeros(4, 2).bool())


# ---- the loss ----


def slow_loss(x: np.ndarray, y: np.ndarray, T: np.ndarray, weights_at: np.ndarray, max_weight: float) -> float:
    total = 0.0
    for b in range(x.shape[0]):
        for k in range(x.shape[1]):
            if y[b, k] < 0:
                continue
            p, q = 1 / (1 + math.exp(-weights_at[b, k])), 1 / (1 + math.exp(-x[b, k]))
            given_1 = p * T[k, 1, 1] + (1 - p) * T[k, 0, 1]
            given_0 = p * T[k, 1, 0] + (1 - p) * T[k, 0, 0]
            total -= y[b, k] * min(p / given_1, max_weight) * math.log(q)
            total -= (1 - y[b, k]) * min((1 - p) / given_0, max_weight) * math.log(1 - q)
    return total / x.shape[0]


def example(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(6, 5)) * 2, rng.random((6, 5))
    y[:3] = y[:3] > 0.5  # hard, then soft labels
    y[rng.random(y.shape) < 0.15] = -1
    up, down = rng.random(5) * 0.4, rng.random(5) * 0.4
    up[0], down[0] = 0.005, 0.94  # weights that are cut
    return x, y, np.stack([np.stack([1 - up, up], 1), np.stack([down, 1 - down], 1)], 1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_and_gradient_agree_with_the_formula(reduction):
    x, y, T = example()
    scale = 1.0 if reduction == "sum" else 1 / 5
    logits = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    loss = importance_reweighted_bce(logits, torch.tensor(y), torch.tensor(T), reduction=reduction)
    x = logits.detach().double().numpy()  # as rounded
    assert loss.item() == pytest.approx(scale * slow_loss(x, y, T, x, 10.0), rel=1e-6)
    assert slow_loss(x, y, T, x, 10.0) != slow_loss(x, y, T, x, 100.0)  # some weight is cut
    loss.backward()
    numeric, step = np.zeros_like(x), 1e-5
    for at in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[at] = step
        numeric[at] = (slow_loss(x + moved, y, T, x, 10.0) - slow_loss(x - moved, y, T, x, 10.0)) / (2 * step)
    assert np.abs(logits.grad.numpy() - scale * numeric).max() < 1e-6
    assert (logits.grad.numpy()[y < 0] == 0).all()


def test_identities_give_plain_bce_and_soft_labels_are_mixed_linearly():
    x, y, T = (torch.tensor(v, dtype=torch.float32) for v in example(1))
    hard = y.clamp(min=0)
    plain = binary_cross_entropy_with_logits(x, hard, reduction="none").sum(1).mean()
    with_identities = importance_reweighted_bce(x, hard, torch.eye(2).repeat(5, 1, 1))
    assert with_identities.item() == pytest.approx(plain.item(), rel=1e-6)
    one, other = (hard > 0.5).float(), (hard < 0.3).float()
    mixed = importance_reweighted_bce(x, 0.7 * one + 0.3 * other, T)
    parts = 0.7 * importance_reweighted_bce(x, one, T) + 0.3 * importance_reweighted_bce(x, other, T)
    assert mixed.item() == pytest.approx(parts.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits_stay_finite(dtype):
    zero_rates = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.4, 0.6]], [[0.6, 0.4], [0.0, 1.0]]])
    x = torch.tensor([[6e4], [-6e4], [0.0]], dtype=dtype).repeat(2, 3).requires_grad_()
    y = torch.tensor([1.0] * 3 + [0.0] * 3)[:, None].repeat(1, 3)
    loss = importance_reweighted_bce(x, y, zero_rates)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_bad_input_of_the_loss_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"matrices \(2, 2, 2\)"):
        importance_reweighted_bce(x, x, torch.eye(2).repeat(2, 1, 1))
    with pytest.raises(ValueError, match="reduction is 'max'"):
        importance_reweighted_bce(x, x, torch.eye(2).repeat(3, 1, 1), reduction="max")


# ---- selection ----


def test_losses_are_scaled_for_each_class_and_given_value():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0], [0.5, 0.0], [9.0, 0.0]])
    labels = torch.tensor([[1, 1], [1, 1], [0, 1], [0, 1], [-1, 1]])
    scaled = t_estimator.scaled_losses(logits, labels)
    assert torch.equal(scaled[:, 0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(scaled[:, 1], torch.zeros(5))  # equal losses


def test_of_losses_that_are_all_but_equal_all_labels_are_selected():
    logits = torch.zeros(400, 3)
    logits[:, 0] += 1e-6 * (torch.arange(400) % 4)
    logits[:, 1] += 1e-4 * (torch.arange(400) % 4)
    logits[:, 2] += 2.0 * (torch.arange(400) % 4 > 1)
    labels = (torch.arange(400) % 2)[:, None].expand(-1, 3)
    selected = t_estimator.select_clean_labels(t_estimator.scaled_losses(logits, labels), labels)
    assert selected[:, :2].all()
    assert torch.equal(selected[:, 2], (logits[:, 2] > 1) == labels[:, 2].bool())


def test_selected_are_the_labels_of_the_small_losses_of_their_own_set():
    generator = torch.Generator().manual_seed(0)
    losses = 0.1 * torch.rand(400, 1, generator=generator)
    labels = (torch.arange(400) % 2)[:, None]
    losses[:40] += 0.8  # among positive labels large losses are larger
    losses[:40:2] -= 0.4
    labels[399] = -1
    selected = t_estimator.select_clean_labels(losses, labels).squeeze(1)
    assert not selected[:40].any()
    assert selected[40:399].all()
    assert not selected[399]


# ---- the trainer ----


def run(folder, data, epochs=3, model=None, method="t-estimator", **changes):
    values = {"num_train_epochs": epochs, "per_device_train_batch_size": 16, "label_warmup_epochs": 1}
    args = arguments(folder, **values | changes)
    trainer = trainer_for(method, args, model=model or tiny_vit(dropout=0.2), train_dataset=data, eval_dataset=data)
    trainer.min_selected = 10
    return trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return correlated_data(tmp_path_factory.mktemp("t") / "images")


def test_the_warm_up_is_mixup_and_reweighting_begins_after_it(data, tmp_path):
    ends = {}
    for method, warmup in (("mixup", 2), ("t-estimator", 2), ("t-estimator", 1)):
        trainer = run(tmp_path, data, epochs=3, method=method, label_warmup_epochs=warmup)
        trainer.add_callback(stop_after(2))
        trainer.train()
        ends[method, warmup] = flat(trainer.model)
    assert torch.equal(ends["mixup", 2], ends["t-estimator", 2])
    assert not torch.equal(ends["t-estimator", 1], ends["t-estimator", 2])
    assert_usable(trainer.matrices)
    assert not torch.equal(trainer.matrices, torch.eye(2).double().repeat(5, 1, 1))
    logged = [line for line in trainer.state.log_history if "t_up_mean" in line]
    assert [line["epoch"] for line in logged] == [1]
    assert sum(logged[0][f"t_classes_{name}"] for name in t_estimator._SOURCES) == 5
    assert 0 < trainer.evaluate()["eval_mAP"] <= 1


def test_matrices_come_from_the_models_own_scans(data, tmp_path):
    # At learning rate 0 all scans of the warm-up are the same, and everything can be computed again from outside.
    trainer = run(tmp_path, data, epochs=4, label_warmup_epochs=3, learning_rate=0.0, model=tiny_vit())
    trainer.train()
    logits, labels = torch.tensor(trainer.predict(data).predictions), given_labels(data)
    assert trainer.matrices.shape == (5, 2, 2)
    selected = t_estimator.select_clean_labels(t_estimator.scaled_losses(logits, labels), labels)
    expected = estimate_transition_matrices(labels, selected, logits.double().sigmoid(), min_selected=10)
    assert not torch.equal(expected, torch.eye(2).double().repeat(5, 1, 1))
    assert torch.allclose(trainer.matrices, expected, atol=1e-5, rtol=0)


def test_only_the_last_five_warm_up_epochs_are_recorded(data, tmp_path):
    trainer = run(tmp_path, data, epochs=8, label_warmup_epochs=7)
    scanned, now = [], 0
    trainer._scan_table = lambda row: (scanned.append(now), torch.zeros(192, 5))[1]
    for now in range(1, 9):
        trainer._end_epoch(now)
    assert scanned == [3, 4, 5, 6, 7]


def resumable(folder, data, seed=0):
    options = {"epochs": 4, "label_warmup_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    return run(folder, data, model=tiny_vit(dropout=0.2, seed=seed), **options)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    trainer = resumable(tmp_path_factory.mktemp("whole"), data)
    trainer.train()
    return trainer


# 12 steps an epoch. In the warm-up before and after its first scan, at its end before the scan, after it.
@pytest.mark.parametrize("step", [8, 16, 24, 28])
def test_a_resumed_run_is_bit_equal(data, whole, step):
    resumed = resumable(whole.args.output_dir, data, seed=9)
    resumed.args.save_strategy = "no"
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert whole.state.global_step == resumed.state.global_step == 48
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert not torch.equal(whole.matrices, torch.eye(2).double().repeat(5, 1, 1))
    for name, value in whole._run_state().items():
        assert torch.equal(value, resumed._run_state()[name]), name


def test_a_class_without_positives_is_learned_as_given(tmp_path):
    data = make_dataset(tmp_path / "images", 24)
    data = data.map(lambda row: {"labels": [k for k in row["labels"] if k != 2]}, features=data.features)
    trainer = run(tmp_path / "out", data, per_device_train_batch_size=4)
    trainer.train()
    assert torch.equal(trainer.matrices[2], torch.eye(2, dtype=torch.float64))
    assert torch.isfinite(flat(trainer.model)).all()
