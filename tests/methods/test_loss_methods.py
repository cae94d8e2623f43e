"""The trainers of the methods that are a loss, and the names of the ablations."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NAMES, arguments, flat, tiny_resnet, tiny_vit, with_unknown_class
from loss_worker import main as run_worker
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_balancemix import AsymmetricLoss, LargeLoss, MultiLabelTrainer, MultiLabelTrainingArguments
from hf_balancemix.core import (
    asymmetric_loss,
    binary_cross_entropy,
    db_loss,
    focal_loss,
    hill_loss,
    large_loss,
    minority_mixup,
    splc_loss,
)
from hf_balancemix.data import given_labels
from hf_balancemix.methods import METHODS, LargeLossTrainer, LossTrainer, trainer_for
from hf_balancemix.report.model_card import card_facts, render_model_card
from hf_balancemix.trainer.resumable import STATE_FILE

K = len(NAMES)


def end(method, dataset, args, method_args=None):
    trainer = trainer_for(method, args, method_args, model=tiny_vit(), train_dataset=dataset)
    trainer.train()
    return flat(trainer.model)


def test_a_loss_of_ones_own_that_is_bce_is_mixup_and_unmixed_is_bce(dataset, tmp_path):
    def loss(logits, labels, epoch):
        return binary_cross_entropy(logits, labels)

    for alpha, method in ((4.0, "mixup"), (0.0, "bce")):
        args = arguments(tmp_path / method, mixup_alpha=alpha)
        trainer = LossTrainer(loss=loss, args=args, model=tiny_vit(), train_dataset=dataset)
        trainer.train()
        assert torch.equal(flat(trainer.model), end(method, dataset, args))


NONE = {"reduction": "none"}
FORMULAS = {
    "focal": lambda x, t, epoch, n: focal_loss(x, t, 1.5, 0.3, **NONE),
    "asl": lambda x, t, epoch, n: asymmetric_loss(x, t, 3.0, 1.0, 0.1, False, **NONE),
    "spl-hill": lambda x, t, epoch, n: hill_loss(x, t, 1.7, 0.5, 1.0, **NONE),
    "splc": lambda x, t, epoch, n: splc_loss(x, t, epoch, 0.4, 0.5, 1.0, 2, **NONE),
    "db-loss": lambda x, t, epoch, n: db_loss(x, t, n, 24, mu=0.3, negative_scale=5.0, **NONE),
    "ll-r": lambda x, t, epoch, n: large_loss(x, t, 2 * epoch, "reject", **NONE),  # 10 per cent of 4 x 5 an epoch
    "ll-ct": lambda x, t, epoch, n: large_loss(x, t, 2 * epoch, "correct", **NONE),
    "ll-cp": lambda x, t, epoch, n: large_loss(x, t, 2 * min(epoch, 1), "correct", **NONE),
}
SETTINGS = {
    "focal": {"gamma": 1.5, "alpha": 0.3},
    "asl": {"gamma_neg": 3.0, "gamma_pos": 1.0, "margin": 0.1, "detach_weight": False},
    "spl-hill": {"lam": 1.7, "margin": 0.5, "gamma": 1.0},
    "splc": {"threshold": 0.4, "margin": 0.5, "gamma": 1.0, "first_epoch": 2},
    "db-loss": {"mu": 0.3, "negative_scale": 5.0},
    "ll-r": {"delta": 10.0},
    "ll-ct": {"delta": 10.0},
    "ll-cp": {"delta": 10.0},
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("method", FORMULAS)
def test_a_step_is_the_loss_of_the_mixed_batch_with_the_settings(method, reduction, dataset, tmp_path):
    args = arguments(tmp_path, loss_reduction=reduction)
    trainer = trainer_for(method, args, SETTINGS[method], model=tiny_vit(), train_dataset=dataset)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    images, labels = minority_mixup(
        batch["pixel_values"], batch["minority_pixel_values"], batch["labels"], batch["minority_labels"], batch["lam"]
    )
    assert ((labels > 0) & (labels < 1)).any()
    counts = torch.tensor([sum(k in row for row in dataset["labels"]) for k in range(K)])
    seen = []
    for epoch in (0, 1, 2):
        trainer.train_sampler.set_epoch(epoch)
        logits = trainer.model(pixel_values=images).logits
        expected = FORMULAS[method](logits, labels, epoch, counts).sum() / (4 if reduction == "sum" else 4 * K)
        (slopes,) = torch.autograd.grad(expected, trainer.model.classifier.weight)
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        (gradient,) = torch.autograd.grad(loss, trainer.model.classifier.weight)
        assert torch.equal(outputs.logits, logits)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(gradient, slopes, rtol=1e-4, atol=1e-7)
        seen.append(loss.item())
        if method == "ll-cp":
            trainer.corrected.zero_()
    # What the epoch changes: nothing but the share of large losses and, from the third on, SPLC's rule.
    assert (seen[0] != seen[1]) == (method in ("ll-r", "ll-ct", "ll-cp"))
    assert (seen[1] != seen[2]) == (method in ("ll-r", "ll-ct", "splc"))


def test_the_epoch_that_a_loss_gets_is_the_samplers_also_after_resuming_within_one(dataset, tmp_path):
    epochs = []

    def loss(logits, labels, epoch):
        epochs.append(epoch)
        return binary_cross_entropy(logits, labels)

    args = arguments(tmp_path, save_strategy="steps", save_steps=8)
    for resume, expected in ((False, [0] * 6 + [1] * 6), (True, [1] * 4)):  # 6 steps an epoch
        trainer = LossTrainer(loss=loss, args=args, model=tiny_vit(), train_dataset=dataset)
        epochs.clear()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8") if resume else None)
        assert epochs == expected


def test_large_losses_of_none_are_mixup(dataset, tmp_path):
    mixup = end("mixup", dataset, arguments(tmp_path))
    for method in ("ll-r", "ll-ct", "ll-cp"):
        assert torch.equal(end(method, dataset, arguments(tmp_path), {"delta": 0.0}), mixup)
        assert not torch.equal(end(method, dataset, arguments(tmp_path), {"delta": 50}), mixup)


@pytest.mark.parametrize(("epochs", "delta"), [(20, 0.1), (50, 0.04), (40, 0.05), (10, 0.2)])
def test_the_default_delta_is_the_papers(epochs, delta, dataset, tmp_path):
    args = arguments(tmp_path, num_train_epochs=epochs)
    trainer = trainer_for("ll-r", args, model=tiny_vit(), train_dataset=dataset)
    assert trainer.loss.delta * 1000 == round(delta * 1000)


def record(trainer):
    """Every step's batch, logits and the labels that its loss was computed on."""
    steps, loss, compute = [], trainer._loss, trainer.compute_loss

    def traced_loss(logits, labels, index):
        steps[-1] |= {"logits": logits.detach().double(), "mixed": labels.clone()}
        return loss(logits, labels, index)

    def traced_step(model, inputs, *args, **kwargs):
        steps.append({"epoch": trainer.train_sampler.epoch, **inputs})
        return compute(model, inputs, *args, **kwargs)

    trainer._loss, trainer.compute_loss = traced_loss, traced_step
    return steps


def test_permanent_corrections_replayed_step_by_step(dataset, tmp_path):
    # Workers that live on hold the labels of the start for ever.
    args = arguments(
        tmp_path, num_train_epochs=3, dataloader_num_workers=2, dataloader_persistent_workers=True
    )  # fmt: skip
    trainer = trainer_for("ll-cp", args, {"delta": 12.0}, model=tiny_vit(), train_dataset=dataset)
    given = given_labels(dataset).bool()
    steps = record(trainer)
    trainer.train()
    expected, met, few = torch.zeros_like(given), 0, 0
    for step in steps:
        now = given | expected
        met += int(expected[step["index"]].sum() + expected[step["minority_index"]].sum())
        lam = step["lam"][:, None]
        mixed = lam * now[step["index"]].float() + (1 - lam) * now[step["minority_index"]].float()
        assert torch.allclose(step["mixed"], mixed, atol=1e-6)
        if step["epoch"] == 0:
            continue
        neither = ~now[step["index"]] & ~now[step["minority_index"]]
        losses = {
            (i, k): math.log1p(math.exp(step["logits"][i, k].item()))
            for i, k in neither.nonzero().tolist()
        }  # fmt: skip
        ranked = sorted(losses.values(), reverse=True)
        few += len(ranked) < 3
        k_th = ranked[2] if len(ranked) >= 3 else -math.inf  # 12 per cent of 4 x 5, rounded up
        for (i, k), loss in losses.items():
            if loss > k_th + 1e-9:
                expected[step["index"][i], k] = True
    assert len(steps) == 18
    assert torch.equal(trainer.corrected, expected)
    assert met > 0  # corrected labels came back in later steps
    assert 0 < few < 12  # the steps with fewer candidates than k, and the others
    assert not (trainer.corrected & given).any()
    assert trainer.state.log_history[-1]["large_loss_corrected"] == expected.sum()


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_permanent_corrections_are_in_the_checkpoint(dataset, tmp_path):
    def make(name, **changes):
        args = arguments(tmp_path / name, num_train_epochs=3, **changes)
        return trainer_for("ll-cp", args, {"delta": 12.0}, model=tiny_vit(dropout=0.3), train_dataset=dataset)

    whole = make("whole")
    whole.train()
    killed = make("killed", save_strategy="steps", save_steps=9)
    killed.add_callback(Stop(11))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 18
    assert torch.equal(whole.corrected, resumed.corrected)
    assert whole.corrected.any()
    assert torch.equal(flat(whole.model), flat(resumed.model))
    # In the middle of the second epoch, with some corrections made already.
    saved = load_file(tmp_path / "killed" / "checkpoint-9" / STATE_FILE)["corrected"]
    assert 0 < saved.sum() < whole.corrected.sum()


def test_another_mode_is_not_resumed(dataset, tmp_path):
    args = arguments(tmp_path, num_train_epochs=1, save_strategy="epoch")
    end("ll-ct", dataset, args)
    for method, message in (
        ("ll-r", "method is 'll-ct', this run's is 'll-r'"),
        ("ll-cp", "trainer is 'LossTrainer'"),
    ):
        trainer = trainer_for(method, args, model=tiny_vit(), train_dataset=dataset)
        with pytest.raises(ValueError, match=f"its {message}"):
            trainer.train(resume_from_checkpoint=True)


@pytest.mark.dist
def test_two_ranks_make_the_corrections_of_one_process_with_twice_the_batch(tmp_path):
    run_worker(tmp_path / "one", 8)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    start += ["--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    done = subprocess.run(
        [*start, str(Path(__file__).parent / "loss_worker.py"), str(tmp_path / "two"), "4"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, *ranks = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("one/across-0.pt", "two/across-0.pt", "two/across-1.pt")
    )
    assert [run["world"] for run in (one, *ranks)] == [1, 2, 2]
    assert one["corrected"].sum() == 2 * 4 * 3  # 10 per cent of 8 x 5 are 4, of which 3 are strictly above
    for rank in ranks:
        assert torch.equal(rank["corrected"], one["corrected"])
        assert torch.allclose(rank["parameters"], one["parameters"], atol=1e-5, rtol=0)
    for alone, first, second in zip(one["steps"], *(rank["steps"] for rank in ranks), strict=True):
        for name in ("index", "labels"):
            assert torch.equal(alone[name], torch.cat([first[name], second[name]])), name
        assert torch.allclose(alone["loss"], (first["loss"] + second["loss"]) / 2, atol=1e-5)
    # A rule of each rank's own depends on how many there are, but all still hold the same corrections.
    own = torch.load(tmp_path / "one/own-0.pt", weights_only=True)
    apart = [torch.load(tmp_path / f"two/own-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(own["corrected"], one["corrected"])
    assert torch.equal(apart[0]["corrected"], apart[1]["corrected"])
    assert torch.equal(apart[0]["parameters"], apart[1]["parameters"])
    assert apart[0]["corrected"].sum() == 2 * 4 * 2  # of the 2 of each rank 1


def test_unknown_labels_have_no_loss_and_are_never_corrected(dataset, tmp_path):
    args = arguments(tmp_path, num_train_epochs=3)
    trainer = trainer_for("ll-cp", args, {"delta": 100.0}, model=tiny_resnet(), train_dataset=dataset)
    trainer.train_labels = with_unknown_class(trainer.train_labels, 2)
    before = trainer.model.classifier[1].weight[2].clone()
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert not trainer.corrected[:, 2].any()
    assert trainer.corrected[:, 0].any()
    assert torch.equal(trainer.model.classifier[1].weight[2], before)


def test_ablations_by_name(dataset, tmp_path):
    def settings(method):
        args = arguments(tmp_path, minority_score="positive")
        made = trainer_for(method, args, model=tiny_vit(), train_dataset=dataset).balance_mix.settings
        return made.minority_score, made.select_clean, made.relabel, made.ambiguous

    rows = ("+minority", "+clean", "+relabel", "balancemix", "balancemix-without-minority")
    assert set(rows) <= set(METHODS)
    assert settings(rows[0])[:2] == ("positive", False)
    assert [settings(row) for row in rows[1:]] == [
        ("positive", True, False, False),
        ("positive", True, True, False),
        ("positive", True, True, True),
        ("uniform", True, True, True),
    ]


def test_evaluation_reports_bce_for_all(dataset, tmp_path):
    losses = []
    for method in ("bce", "asl", "ll-cp"):
        trainer = trainer_for(method, arguments(tmp_path), model=tiny_vit(), train_dataset=dataset)
        losses.append(trainer.evaluate(dataset)["eval_loss"])
    assert losses[0] == losses[1] == losses[2]


def test_a_trainer_speaks_of_its_loss(dataset, tmp_path):
    loss = AsymmetricLoss(gamma_neg=2)
    trainer = LossTrainer(loss=loss, args=arguments(tmp_path), model=tiny_vit(), train_dataset=dataset)
    assert (trainer.method_name, trainer.citation) == ("AsymmetricLoss", AsymmetricLoss.citation)
    text = render_model_card(card_facts(trainer))
    assert "| gamma_neg (AsymmetricLoss) | 2 |" in text
    assert "Ridnik, Tal" in text
    assert "gamma_pos" not in text


def test_what_is_refused_before_training(dataset, tmp_path):
    given = {"model": tiny_vit(), "train_dataset": dataset}
    with pytest.raises(ValueError, match="margin is 2"):
        trainer_for("asl", arguments(tmp_path), {"margin": 2.0}, **given)
    with pytest.raises(ValueError, match="delta is -1"):
        trainer_for("ll-r", arguments(tmp_path), {"delta": -1.0}, **given)
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 5\)"):
        LossTrainer(loss=lambda x, t, epoch: x, args=arguments(tmp_path), **given)
    with pytest.raises(ValueError, match="mode is 'reject'; it must be 'permanent'"):
        LargeLossTrainer(loss=LargeLoss(), args=arguments(tmp_path), **given)
    with pytest.raises(ValueError, match="db-loss counts the training labels"):
        trainer_for("db-loss", arguments(tmp_path), model=tiny_vit())
    with pytest.raises(ValueError, match="method is 'asl2'"):
        trainer_for("asl2", arguments(tmp_path), **given)
    plain = MultiLabelTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, image_size=16
    )
    with pytest.raises(TypeError, match="args is MultiLabelTrainingArguments; it must be BalanceMix"):
        LargeLossTrainer(loss=LargeLoss(mode="permanent"), args=plain, **given)
    assert isinstance(trainer_for("asl", arguments(tmp_path), model=tiny_vit()), MultiLabelTrainer)
