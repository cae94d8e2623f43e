"""ELR: the moving average, the regulariser, and the trainer that mixes both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import NAMES, arguments, flat, tiny_resnet, tiny_vit, with_unknown_class
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_balancemix.core import binary_cross_entropy
from hf_balancemix.data import given_labels
from hf_balancemix.methods import ELRSettings, ELRTrainer, elr_loss, trainer_for, updated_targets
from hf_balancemix.report.model_card import card_facts, render_model_card

# ---- the average ----


def test_the_average_by_hand():
    t = torch.zeros(1, 2)
    t = updated_targets(t, torch.tensor([[0.5, 1.0]]), 0.7)
    assert t.tolist() == [[pytest.approx(0.15), pytest.approx(0.3 * 0.9999)]]
    t = updated_targets(t, torch.tensor([[0.1, 0.0]]), 0.7)
    assert t.tolist() == [[pytest.approx(0.7 * 0.15 + 0.03), pytest.approx(0.21 * 0.9999 + 0.3 * 0.0001)]]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
def test_the_average_is_the_weighted_sum_of_what_was_predicted(beta):
    history = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    t = torch.zeros(5, 3)
    for p in history:
        t = updated_targets(t, p, beta)
    expected = sum((1 - beta) * beta ** (5 - n) * history[n].double() for n in range(6))
    assert torch.allclose(t.double(), expected, atol=1e-6)
    assert t.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_changes_nothing_of_its_label(bad):
    t = torch.tensor([[0.2, 0.4]])
    assert updated_targets(t, torch.tensor([[bad, 0.4]]), 0.5).tolist() == t.tolist()


# ---- the loss ----


def test_the_loss_by_hand():
    # p = 0.5 and 0.8; the regulariser is log(1 - 0.5 0.6) + log(1 - 0.8 0.25).
    logits, labels = torch.tensor([[0.0, math.log(4)]]), torch.tensor([[1.0, 0.0]])
    loss = elr_loss(logits, labels, torch.tensor([[0.6, 0.25]]), lam=2.0)
    assert loss.item() == pytest.approx(math.log(2) + math.log(5) + 2 * (math.log(0.7) + math.log(0.8)))


def random_batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.random((7, 4)).round(1)
    labels[rng.random((7, 4)) < 0.2] = -1
    return 4 * rng.normal(size=(7, 4)), labels, 0.9999 * rng.random((7, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 7), ("mean", 28)])
def test_the_loss_is_a_loop_over_the_known_labels(reduction, divisor, dtype):
    x, y, t = random_batch()
    total = 0.0
    for i, k in np.ndindex(7, 4):
        if y[i, k] >= 0:
            p = 1 / (1 + math.exp(-x[i, k]))
            total += -y[i, k] * math.log(p) - (1 - y[i, k]) * math.log(1 - p) + 3 * math.log(1 - p * t[i, k])
    logits, labels, targets = (torch.tensor(a, dtype=dtype) for a in (x, y, t))
    loss = elr_loss(logits, labels, targets, reduction=reduction)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(total / divisor, rel=1e-5 if dtype == torch.float32 else 1e-12)


def regulariser_gradient(logits, targets, lam=3.0):
    """That of the loss less that of BCE, for each label."""
    x = logits.clone().requires_grad_()
    labels = torch.zeros_like(x)
    loss = elr_loss(x, labels, targets, lam) - binary_cross_entropy(x, labels)
    return torch.autograd.grad(len(x) * loss, x)[0]


def test_the_regulariser_pulls_towards_what_was_predicted_before():
    x, _, t = (torch.tensor(a) for a in random_batch(1))
    gradient, p = regulariser_gradient(x, t), x.sigmoid()
    assert torch.allclose(gradient, -3 * t * p * (1 - p) / (1 - t * p))
    assert (gradient < 0).all()  # a step raises the logit, and the more, the larger t is
    assert (regulariser_gradient(x, 0.5 * t) > gradient).all()
    assert torch.equal(regulariser_gradient(x, 0 * t), torch.zeros_like(x))
    assert torch.allclose(regulariser_gradient(x, t, lam=0.5), gradient / 6)


def test_a_label_that_was_predicted_early_is_not_unlearned_and_others_are_learned_as_given():
    # All are given as negative: where t is high the logit rises nevertheless, where it is low it falls.
    x = torch.full((1, 3), 2.0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.9, 0.05, 0.0]], dtype=torch.float64)
    elr_loss(x, torch.zeros(1, 3), t).backward()
    assert (x.grad[0] < 0).tolist() == [True, False, False]


@pytest.mark.parametrize(("lam", "share"), [(3.0, 0.101), (1.0, 0.5)])
def test_a_label_that_can_only_be_guessed_rests_below_1_only_in_rare_classes(lam, share):
    # docs/choices.md: of instances that look alike, a share q is given as positive, and t has become what p is.
    p = torch.arange(0.001, 1, 0.001, dtype=torch.float64)[:, None]
    for q, rests in ((share - 0.001, True), (share + 0.001, False)):
        x = p.logit().requires_grad_()
        elr_loss(x, torch.full_like(x, q), p, lam).backward()
        assert bool((x.grad > 0).any()) == rests


def test_without_a_strength_or_a_past_it_is_bce():
    x, y, t = (torch.tensor(a) for a in random_batch(2))
    expected = binary_cross_entropy(x, y)
    assert torch.equal(elr_loss(x, y, t, lam=0.0), expected)
    assert torch.equal(elr_loss(x, y, torch.zeros_like(t)), expected)


def test_unknown_labels_count_nothing():
    x, y, t = (torch.tensor(a) for a in random_batch(3))
    y[:, 1] = -1
    other = x.clone()
    other[:, 1] = torch.tensor([math.nan, math.inf, -math.inf, 9.0, 1.0, -5.0, 0.0])
    other.requires_grad_()
    loss = elr_loss(other, y, t)
    loss.backward()
    assert torch.equal(loss, elr_loss(x, y, t))
    assert (other.grad[:, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits_stay_finite(dtype):
    x = torch.tensor([[6e4, -6e4, 6e4, -6e4]], dtype=dtype, requires_grad=True)
    loss = elr_loss(x, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.full((1, 4), 0.9999), lam=7.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_bad_input_and_settings_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"logits, targets are \(2, 3\), \(3, 2\)"):
        elr_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2))
    for own, message in (
        ({"lam": -1.0}, "lam is -1.0; it must be finite and at least 0."),
        ({"lam": math.inf}, "lam of elr is inf; it must be a number."),
        ({"beta": 1.5}, r"beta is 1.5; it must be in \[0, 1\]."),
        ({"lamb": 1.0}, "lamb is not an argument of elr; did you mean lam?"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for("elr", arguments(tmp_path), own, model=tiny_vit(), train_dataset=dataset)


# ---- the trainer ----


def run(folder, data, own=None, method="elr", model=None, **changes):
    args = arguments(folder, **{"num_train_epochs": 3} | changes)
    return trainer_for(method, args, own, model=model or tiny_vit(dropout=0.2), train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_is_the_loss_of_the_mixed_images_labels_and_averages(reduction, dataset, tmp_path):
    trainer = run(tmp_path, dataset, {"lam": 2.0}, model=tiny_vit(), loss_reduction=reduction)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.targets = 0.99 * torch.rand(24, 5, generator=torch.Generator().manual_seed(0))
    loss = trainer.compute_loss(trainer.model, batch)
    expected = 0.0
    for i in range(4):
        lam, own, partner = batch["lam"][i], batch["index"][i], batch["minority_index"][i]
        image = lam * batch["pixel_values"][i] + (1 - lam) * batch["minority_pixel_values"][i]
        label = lam * batch["labels"][i] + (1 - lam) * batch["minority_labels"][i]
        t = lam * trainer.targets[own] + (1 - lam) * trainer.targets[partner]
        logits = trainer.model(pixel_values=image[None]).logits[0]
        both = binary_cross_entropy_with_logits(logits, label, reduction="none")
        both = both + 2 * (1 - logits.sigmoid() * t).log()
        expected = expected + (both.sum() if reduction == "sum" else both.mean()) / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_unmixed_an_image_has_its_own_average(dataset, tmp_path):
    trainer = run(tmp_path, dataset, model=tiny_vit(), mixup_alpha=0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.targets = 0.99 * torch.rand(24, 5, generator=torch.Generator().manual_seed(0))
    logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    expected = elr_loss(logits, batch["labels"], trainer.targets[batch["index"]])
    assert torch.allclose(trainer.compute_loss(trainer.model, batch), expected)


def test_averages_are_of_the_models_own_predictions_once_an_epoch(dataset, tmp_path):
    # At learning rate 0 all predictions are the same: after n epochs the average is (1 - beta^n) p.
    trainer = run(tmp_path, dataset, {"beta": 0.6}, learning_rate=0.0, num_train_epochs=4)
    trainer.train()
    p = torch.tensor(trainer.predict(dataset).predictions).sigmoid()
    assert torch.allclose(trainer.targets, (1 - 0.6**3) * p, atol=1e-5)  # none after the last epoch


def test_it_is_mixup_without_a_strength_and_in_the_first_epoch(dataset, tmp_path):
    ends = {}
    for name, method, own, epochs in (
        ("mixup", "mixup", None, 3), ("lam 0", "elr", {"lam": 0.0}, 3), ("elr", "elr", None, 3),
        ("mixup, 1", "mixup", None, 1), ("elr, 1", "elr", None, 1),
    ):  # fmt: skip
        trainer = run(tmp_path, dataset, own, method, num_train_epochs=epochs)
        trainer.train()
        ends[name] = flat(trainer.model)
    assert torch.equal(ends["mixup"], ends["lam 0"])
    assert not torch.equal(ends["mixup"], ends["elr"])
    assert torch.equal(ends["mixup, 1"], ends["elr, 1"])


# 6 steps an epoch. In the first epoch, at an epoch's end before its scan, in the middle of one.
@pytest.mark.parametrize("method", ["elr", "nar"])
@pytest.mark.parametrize(("arch", "step"), [("vit", 4), ("resnet", 6), ("vit", 9), ("resnet", 15)])
def test_a_resumed_run_is_bit_equal(method, arch, step, dataset, tmp_path):
    own = {"lam": 2.0} | (
        {"drop_negative": 0.4, "drop_positive": 0.3, "flip_positive": 0.2} if method == "nar" else {}
    )

    def start(seed=0):
        model = tiny_vit(dropout=0.2, seed=seed) if arch == "vit" else tiny_resnet(seed=seed)
        return run(tmp_path, dataset, own, method, model, save_strategy="steps", save_steps=step, max_grad_norm=1.0)

    whole, resumed = start(), start(seed=9)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert whole.state.global_step == resumed.state.global_step == 18
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert whole.targets.any()
    assert method == "elr" or not torch.equal(whole.labels, given_labels(whole.train_dataset))
    for name, value in whole._run_state().items():
        assert torch.equal(value, resumed._run_state()[name]), name


def test_resuming_with_other_settings_is_told(dataset, tmp_path, caplog):
    run(tmp_path, dataset, num_train_epochs=2, save_strategy="epoch").train()
    run(tmp_path, dataset, {"lam": 1.0}, num_train_epochs=2).train(resume_from_checkpoint=True)
    assert "lam was 3.0 at the checkpoint and is 1.0 now" in caplog.text


@pytest.mark.parametrize("method", ["elr", "nar"])
def test_accumulation_changes_nothing(method, dataset, tmp_path):
    ends = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = run(
            tmp_path, dataset, method=method, model=tiny_vit(), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        ends.append((flat(trainer.model), trainer.targets))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-5)
    assert torch.allclose(ends[0][1], ends[1][1], atol=1e-5)


@pytest.mark.parametrize("method", ["elr", "nar"])
def test_a_class_of_unknown_labels_is_not_learned(method, dataset, tmp_path):
    trainer = run(tmp_path, dataset, method=method, model=tiny_resnet(), weight_decay=0.0)
    trainer.train_labels = with_unknown_class(trainer.train_labels, 2)
    before = trainer.model.classifier[1].weight.clone()
    trainer.train()
    moved = (trainer.model.classifier[1].weight != before).any(1)
    assert moved.tolist() == [True, True, False, True, True]


def test_the_card_names_settings_and_paper(dataset, tmp_path):
    trainer = ELRTrainer(
        settings=ELRSettings(lam=7), args=arguments(tmp_path), model=tiny_vit(), train_dataset=dataset
    )
    text = render_model_card(card_facts(trainer))
    assert "| lam (elr) | 7 |" in text
    assert "beta (elr)" not in text
    assert "Niles-Weed" in text
    assert len(NAMES) == trainer.targets.shape[1]
