"""Two networks that teach each other: the selection, the step, and everything that holds for one network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, arguments, flat, make_dataset, stop_after, tiny_resnet, tiny_vit
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForImageClassification
from two_ranks_worker import train_both

from hf_balancemix import load_model
from hf_balancemix.methods import trainer_for
from hf_balancemix.methods.co_teaching import TwoNetworks, clean_instances, instance_losses, min_max, second_network

# ---- the selection ----


@pytest.mark.parametrize("seed", range(3))
def test_the_selection_is_scikit_learns_on_clear_data(seed):
    rng = np.random.default_rng(seed)
    losses = np.stack(
        [
            np.concatenate([rng.normal(0.3, 0.05, 700), rng.normal(1.5, 0.3, 300)]),
            np.concatenate([rng.normal(2.0, 0.1, 400), rng.normal(3.0, 0.1, 600)]),
        ],
        axis=1,
    ).clip(0)
    for network in (0, 1):
        x = losses[:, [network]]
        x = (x - x.min()) / (x.max() - x.min())
        mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(x)
        expected = mixture.predict_proba(x)[:, mixture.means_.argmin()] > 0.5
        assert 0.3 < expected.mean() < 0.8
        assert np.array_equal(clean_instances(torch.tensor(losses), monotone=False)[:, network].numpy(), expected)
        # The monotone correction changes nothing here.
        assert np.array_equal(clean_instances(torch.tensor(losses))[:, network].numpy(), expected)


@pytest.mark.parametrize("shape", [0.7, 2.0])
def test_the_settings_are_dividemixs_where_they_matter(shape):
    losses = np.random.default_rng(0).gamma(shape, 1.0, (3000, 1))
    x, ours = losses / losses.max(), clean_instances(torch.tensor(losses), monotone=False).squeeze(1).numpy()
    agreement = []
    for settings in ({"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}, {}):
        mixture = GaussianMixture(2, random_state=0, **settings).fit(x)
        agreement.append((ours == (mixture.predict_proba(x)[:, mixture.means_.argmin()] > 0.5)).mean())
    assert agreement[0] > 0.99 > agreement[1]


@pytest.mark.parametrize("values", [[1.0], [0.7] * 50, [0.0] * 50, [1.0, 2.0, 3.0]])
def test_where_two_components_mean_nothing_all_are_clean(values):
    assert clean_instances(torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.7, 20.0])
def test_losses_that_are_all_but_equal_are_all_clean(level, dtype):
    # Two clear groups, which differ by more or by less than a thousandth.
    groups = (torch.arange(100) % 2)[:, None] * torch.tensor([0.002, 0.0009]) + level
    losses = (groups + 1e-5 * torch.rand(100, 2, generator=torch.Generator().manual_seed(0))).to(dtype)
    clean = clean_instances(losses)
    assert clean[:, 1].all()
    assert torch.equal(clean[:, 0], torch.arange(100) % 2 == 0)
    assert (min_max(losses)[:, 1] == 0).all()
    # Rounding errors of equal losses, and one that is not finite.
    rounded = torch.full((100, 1), level, dtype=dtype) * (
        1 + torch.finfo(dtype).eps * (torch.arange(100)[:, None] % 3)
    )
    assert clean_instances(rounded).all()
    rounded[7] = float("nan")
    assert clean_instances(rounded).sum() == 99


def test_losses_that_are_not_finite_are_not_clean_and_do_not_disturb():
    losses = torch.cat([torch.linspace(0.1, 0.2, 50), torch.linspace(3, 3.5, 50)])[:, None]
    with_bad = torch.cat([losses, torch.tensor([[float("nan")], [float("inf")], [float("-inf")]])])
    clean = clean_instances(with_bad).squeeze(1)
    assert clean[:50].all()
    assert not clean[50:].any()
    assert torch.equal(clean[:100], clean_instances(losses).squeeze(1))
    assert torch.equal(min_max(with_bad)[:100], min_max(losses))


def test_an_instances_loss_is_its_mean_over_known_labels():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 2, 5)), rng.integers(-1, 2, (7, 5))
    labels[6] = -1
    losses = instance_losses(torch.tensor(logits), torch.tensor(labels)).numpy()
    for i, net in np.ndindex(6, 2):
        p = 1 / (1 + np.exp(-logits[i, net]))
        each = [-np.log(p[k] if labels[i, k] else 1 - p[k]) for k in range(5) if labels[i, k] >= 0]
        assert losses[i, net] == pytest.approx(np.mean(each), abs=1e-6)
    assert np.isnan(losses[6]).all()


# ---- the second network ----


@pytest.mark.parametrize("architecture", ["resnet", "vit", "timm", "ml_decoder", "ms_cma"])
def test_the_second_network_has_another_classifier_on_the_same_backbone(architecture):
    if architecture == "timm":
        model, head = load_model("test_resnet", NAMES, image_size=32, pretrained=False)[0], "timm_model.fc."
    elif architecture in ("ml_decoder", "ms_cma"):
        options = {"head": architecture, "train_labels": torch.eye(len(NAMES))}
        model = load_model("test_resnet", NAMES, image_size=32, pretrained=False, **options)[0]
        head = "head."
    else:
        model, head = (tiny_resnet() if architecture == "resnet" else tiny_vit()), "classifier."
    state = torch.get_rng_state()
    second, again, other = (second_network(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(second), flat(again))
    own, new, else_ = (m.state_dict() for m in (model, second, other))
    differing = [name for name in own if not torch.equal(own[name], new[name])]
    assert differing
    assert all(name.startswith(head) for name in differing)
    assert any(not torch.equal(new[name], else_[name]) for name in differing)
    assert "head.label_embeddings" not in differing  # of the labels, which both see
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in second.parameters()}


def test_a_second_network_that_cannot_be_made_or_does_not_fit_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="pass it as peer="):
        second_network(torch.nn.Linear(2, 2), 0)
    model = tiny_vit()
    with pytest.raises(ValueError, match="same object"):
        run(tmp_path, dataset, model=model, peer=model)
    with pytest.raises(ValueError, match="the model has 7 outputs"):
        run(tmp_path, dataset, peer=tiny_vit(7))
    with pytest.raises(ValueError, match="scored of co-teaching is 'third'"):
        run(tmp_path, dataset, scored="third")


# ---- the step ----


def run(folder, data, model=None, method="co-teaching", peer=None, scored=None, **changes):
    args = arguments(folder, **{"num_train_epochs": 3} | changes)
    own, more = {} if scored is None else {"scored": scored}, {} if peer is None else {"peer": peer}
    return trainer_for(
        method, args, own, model=model or tiny_vit(dropout=0.2), train_dataset=data, eval_dataset=data, **more
    )


def batch_of(trainer) -> dict[str, Tensor]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_each_network_learns_from_its_peers_clean_instances_and_nothing_else(reduction, dataset, tmp_path):
    trainer = run(tmp_path, dataset, model=tiny_vit(), per_device_train_batch_size=12, loss_reduction=reduction)
    batch = batch_of(trainer)
    generator = torch.Generator().manual_seed(0)
    trainer.clean = torch.rand(24, 2, generator=generator) < 0.7
    trainer.compute_loss(trainer.model, batch).backward()
    networks = [trainer.model.first, trainer.model.second]
    gradients = [[p.grad.clone() for p in network.parameters()] for network in networks]
    for network, peer in ((0, 1), (1, 0)):
        networks[network].zero_grad()
        total, learned = 0.0, 0
        for i in range(12):
            pair = (batch["index"][i], batch["minority_index"][i])
            if not all(trainer.clean[j, peer] for j in pair):
                continue
            learned += 1
            lam = batch["lam"][i]
            image = lam * batch["pixel_values"][i] + (1 - lam) * batch["minority_pixel_values"][i]
            label = lam * batch["labels"][i] + (1 - lam) * batch["minority_labels"][i]
            logits = networks[network](pixel_values=image[None]).logits[0]
            total = total + binary_cross_entropy_with_logits(logits, label, reduction=reduction)
        assert 2 <= learned <= 10
        (total / 12).backward()
        for got, parameter in zip(gradients[network], networks[network].parameters(), strict=True):
            assert torch.allclose(got, parameter.grad, atol=1e-6)
    assert not torch.equal(trainer.clean[:, 0], trainer.clean[:, 1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_network_whose_peer_calls_nothing_clean_stands_still(frozen, dataset, tmp_path, monkeypatch):
    calls = torch.ones(24, 2, dtype=torch.bool)
    calls[:, 1 - frozen] = False
    monkeypatch.setattr("hf_balancemix.methods.co_teaching.clean_instances", lambda losses, monotone: calls)
    ends = []
    for epochs in (2, 3):  # of which the first is the warm-up
        schedule = {"lr_scheduler_type": "constant", "weight_decay": 0.0, "optim_args": "momentum=0.0"}
        trainer = run(tmp_path, dataset, model=tiny_vit(), num_train_epochs=epochs, **schedule)
        trainer.train()
        ends.append([flat(trainer.model.first), flat(trainer.model.second)])
    assert torch.equal(ends[0][frozen], ends[1][frozen])
    assert not torch.equal(ends[0][1 - frozen], ends[1][1 - frozen])


def test_partners_are_drawn_from_what_both_call_clean(dataset, tmp_path):
    trainer = run(tmp_path, dataset)
    trainer.clean[:, 0] = torch.arange(24) < 16
    trainer.clean[:, 1] = torch.arange(24) >= 8
    keys = list(trainer._make_sampler())
    assert sorted(key.random for key in keys) == list(range(24))
    assert sorted(key.minority for key in keys) == sorted([*range(8, 16)] * 3)
    trainer.clean[:, 1] = ~trainer.clean[:, 0]
    assert sorted(key.minority for key in trainer._make_sampler()) == list(range(24))


def test_without_mixup_a_peers_verdict_on_the_image_alone_counts(dataset, tmp_path):
    trainer = run(tmp_path, dataset, mixup_alpha=0)
    trainer.clean[:, 0] = torch.arange(24) < 16
    trainer.clean[:, 1] = torch.arange(24) % 2 == 0
    batch = next(iter(trainer.get_train_dataloader()))
    assert "minority_index" not in batch
    peers = trainer.clean[batch["index"]].flip(1).float()
    assert torch.equal(trainer.instance_weights(batch), peers)


def test_in_the_warm_up_each_network_is_trained_like_a_single_one(dataset, tmp_path):
    options = {"num_train_epochs": 3, "label_warmup_epochs": 2}
    trainer = run(tmp_path, dataset, model=tiny_vit(), **options)
    trainer.add_callback(stop_after(2))
    starts = [trainer.model.first.state_dict(), trainer.model.second.state_dict()]
    starts = [{name: value.clone() for name, value in start.items()} for start in starts]
    trainer.train()
    assert trainer.clean.all()
    for start, network in zip(starts, (trainer.model.first, trainer.model.second), strict=True):
        single = run(tmp_path, dataset, model=tiny_vit(), method="mixup", **options)
        single.model.load_state_dict(start)
        single.add_callback(stop_after(2))
        single.train()
        assert torch.allclose(flat(single.model), flat(network), atol=1e-6)


def test_the_mixtures_see_both_networks_plain_losses(dataset, tmp_path, monkeypatch):
    # At learning rate 0 the losses can be computed again from outside.
    seen = []
    original = clean_instances
    monkeypatch.setattr(
        "hf_balancemix.methods.co_teaching.clean_instances",
        lambda losses, monotone: (seen.append(losses), original(losses, monotone))[1],
    )
    trainer = run(tmp_path, dataset, learning_rate=0.0, model=tiny_vit(dropout=0.3), label_warmup_epochs=2)
    trainer.train()
    assert len(seen) == 1  # at the start of epoch 2; none in the warm-up, none after the last epoch
    labels = torch.tensor([[float(k in row["labels"]) for k in range(5)] for row in dataset])
    for network, name in enumerate(("first", "second")):
        trainer.model.scored = name
        logits = torch.tensor(trainer.predict(dataset).predictions)
        expected = binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        assert torch.allclose(seen[0][:, network], expected, atol=1e-5)
    logged = [line for line in trainer.state.log_history if "clean_instances_both" in line]
    assert [line["epoch"] for line in logged] == [2]
    assert logged[0]["clean_instances_first"] == trainer.clean[:, 0].double().mean()


# ---- evaluation, checkpoints ----


@pytest.mark.parametrize("scored", ["first", "second", "mean"])
def test_what_is_scored_and_saved(scored, dataset, tmp_path):
    trainer = run(tmp_path, dataset, model=tiny_vit(), num_train_epochs=2, scored=scored)
    trainer.train()
    metrics = trainer.evaluate()
    scores = trainer.predict(dataset).predictions
    trainer.save_model()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    peer = AutoModelForImageClassification.from_pretrained(tmp_path / "peer")
    first, second = (peer, saved) if scored == "second" else (saved, peer)
    assert torch.equal(flat(first), flat(trainer.model.first))
    assert torch.equal(flat(second), flat(trainer.model.second))
    assert not torch.equal(flat(first), flat(second))
    assert all(type(model).__name__ == "ViTForImageClassification" for model in (first, second))
    assert [saved.config.id2label[k] for k in range(5)] == [peer.config.id2label[k] for k in range(5)] == NAMES
    images = torch.cat([trainer._prepare_inputs(b)["pixel_values"] for b in trainer.get_eval_dataloader()])
    with torch.no_grad():
        logits = [model.eval()(pixel_values=images).logits for model in (first, second)]
    expected = sum(logits) / 2 if scored == "mean" else logits[scored == "second"]
    assert np.allclose(scores, expected.numpy(), atol=1e-5)
    labels = np.array([[k in row["labels"] for k in range(5)] for row in dataset])
    mean_ap = np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in range(5)])
    assert metrics["eval_mAP"] == pytest.approx(mean_ap)
    assert not any("first" in name for name in load_file(tmp_path / "model.safetensors"))


# 24 instances in batches of 4: 6 steps an epoch. In the warm-up, at an epoch's end before its scan, in the middle.
@pytest.mark.parametrize(("arch", "step"), [("vit", 4), ("resnet", 6), ("vit", 9), ("resnet", 15)])
def test_a_resumed_run_is_bit_equal(arch, step, dataset, tmp_path):
    def start(seed=0):
        model = tiny_vit(dropout=0.2, seed=seed) if arch == "vit" else tiny_resnet(seed=seed)
        options = {"save_strategy": "steps", "save_steps": step, "eval_strategy": "epoch", "max_grad_norm": 1.0}
        return run(tmp_path, dataset, model=model, scored="second", **options)

    whole, resumed = start(), start(seed=9)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert whole.state.global_step == resumed.state.global_step == 18
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert 0 < whole.clean.float().mean() < 1
    for name, value in whole._run_state().items():
        assert torch.equal(value, resumed._run_state()[name]), name


def test_a_checkpoint_with_another_network_first_is_refused(dataset, tmp_path):
    run(tmp_path, dataset, save_strategy="epoch", num_train_epochs=2).train()
    with pytest.raises(ValueError, match="its scored is 'first', this run's is 'second'"):
        run(tmp_path, dataset, scored="second").train(resume_from_checkpoint=True)


def test_a_damaged_peer_is_found(dataset, tmp_path):
    run(tmp_path, dataset, save_strategy="epoch", num_train_epochs=2).train()
    (tmp_path / "checkpoint-6" / "peer" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"peer/model\.safetensors"):
        run(tmp_path, dataset).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_both_networks_of_the_best_epoch_are_loaded_back(dataset, tmp_path):
    trainer = run(
        tmp_path, dataset, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="mAP", greater_is_better=False, scored="mean",
    )  # fmt: skip
    trainer.train()
    best = min(line["eval_mAP"] for line in trainer.state.log_history if "eval_mAP" in line)
    assert trainer.evaluate()["eval_mAP"] == best
    folder = Path(trainer.state.best_model_checkpoint)
    for network, name in ((trainer.model.first, "."), (trainer.model.second, "peer")):
        assert torch.equal(flat(AutoModelForImageClassification.from_pretrained(folder / name)), flat(network))


def test_bf16_and_accumulation(tmp_path):
    data = make_dataset(tmp_path / "images", 32)
    ends = []
    for batch, accumulation in ((16, 1), (4, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = run(tmp_path, data, model=tiny_vit(), **options)
        trainer.train()
        ends.append(flat(trainer.model))
    assert 0 < trainer.clean.float().mean() < 1
    assert torch.allclose(*ends, atol=1e-5)
    trainer = run(tmp_path, data, bf16=True, num_train_epochs=2, scored="mean")
    trainer.train()
    assert torch.isfinite(flat(trainer.model)).all()
    assert trainer.predict(data).predictions.dtype == np.float32


def test_activation_checkpointing_reaches_both_networks():
    networks = TwoNetworks(tiny_vit(), tiny_vit())
    networks.activation_checkpointing_enable()
    assert all(network.is_gradient_checkpointing for network in (networks.first, networks.second))


# ---- two ranks ----


@pytest.mark.dist
def test_two_ranks_equal_one_process_with_twice_the_batch(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    done = subprocess.run(
        [*start, str(Path(__file__).parent / "two_ranks_worker.py"), str(tmp_path / "two"), "--batch", "8"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / "two" / f"final-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = train_both(tmp_path / "one", 16)
    for method, one in alone.items():
        first, second = (rank[method] for rank in ranks)
        assert torch.equal(first["parameters"], second["parameters"])
        assert torch.allclose(one["parameters"], first["parameters"], atol=1e-5, rtol=0)
        assert one["mAP"] == pytest.approx(first["mAP"], abs=1e-3)
        for name, value in one["state"].items():
            assert torch.allclose(value.double(), first["state"][name].double(), atol=1e-5), name
    assert 0 < alone["co-teaching"]["state"]["clean"].float().mean() < 1
    matrices = alone["t-estimator"]["state"]["matrices"]
    assert not torch.equal(matrices, torch.eye(2).double().repeat(5, 1, 1))
    labels = alone["nar"]["state"]["labels"]
    assert all((labels == value).any() for value in (-1, 0, 1))
    assert alone["nar"]["state"]["targets"].all()
