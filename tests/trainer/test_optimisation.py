"""Adam as ASL was trained with it, and one cycle of the learning rate, step by step as torch alone does them."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import arguments, flat, tiny_resnet, tiny_vit
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import OneCycleLR
from transformers import TrainerCallback

from hf_balancemix import MultiLabelTrainer

STEPS = 12  # 24 instances in batches of 4, two epochs


class Pulse(TrainerCallback):
    """Learning rate and first momentum of every step, as the optimiser is about to use them."""

    def __init__(self, die_at: int | None = None) -> None:
        self.steps: list[tuple[float, float]] = []
        self.die_at = die_at

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        (now,) = {(g["lr"], g["betas"][0] if "betas" in g else g["momentum"]) for g in optimizer.param_groups}
        self.steps.append(now)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.die_at:
            raise KeyboardInterrupt


def trained(dataset, folder, model=None, die_at=None, resume=None, **changes):
    trainer = MultiLabelTrainer(
        model=tiny_resnet() if model is None else model, args=arguments(folder, **changes), train_dataset=dataset
    )
    pulse = Pulse(die_at)
    trainer.add_callback(pulse)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, pulse.steps


# ---- Adam ----


def asl_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Vectors and biases do not decay; after `add_weight_decay` of ASL's training code."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        (no_decay if len(parameter.shape) == 1 or name.endswith(".bias") else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_adam_is_torchs_with_the_decay_in_the_gradient_and_none_on_vectors(make, dataset, tmp_path):
    settings = {"optim": "adam", "learning_rate": 1e-3, "weight_decay": 0.3, "adam_beta2": 0.98, "adam_epsilon": 1e-6}
    settings |= {"lr_scheduler_type": "constant", "decay_vectors": False}
    trainer, _ = trained(dataset, tmp_path / "a", make(), **settings)
    assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) is torch.optim.Adam

    model = make().train()
    optimiser = torch.optim.Adam(asl_groups(model, 0.3), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    source = MultiLabelTrainer(model=make(), args=arguments(tmp_path / "b"), train_dataset=dataset)
    loader = source.get_train_dataloader()
    for epoch in range(2):
        source.train_sampler.set_epoch(epoch)
        for rows in loader:
            inputs = source._prepare_inputs(rows)
            logits = model(pixel_values=inputs["pixel_values"]).logits
            loss = binary_cross_entropy_with_logits(logits, inputs["labels"], reduction="sum") / len(logits)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.testing.assert_close(flat(trainer.model), flat(model), rtol=1e-4, atol=1e-5)
    # The decay is that of Adam, not of AdamW, and it matters.
    decoupled, _ = trained(dataset, tmp_path / "c", make(), **settings | {"optim": "adamw_torch"})
    assert (flat(decoupled.model) - flat(model)).abs().max() > 1e-3


@pytest.mark.parametrize("decay_vectors", [True, False])
@pytest.mark.parametrize("optim", ["adam", "sgd"])
def test_decay_vectors_says_whether_batch_norm_decays(optim, decay_vectors, dataset, tmp_path):
    args = arguments(tmp_path, optim=optim, decay_vectors=decay_vectors, weight_decay=0.25)
    trainer = MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(names)
    for name, parameter in trainer.model.named_parameters():
        expected = 0.0 if name.endswith("bias") else 0.25
        if parameter.ndim == 1 and not decay_vectors:
            expected = 0.0
        assert decay[name] == expected, name
    assert decay["resnet.embedder.embedder.normalization.weight"] == (0.25 if decay_vectors else 0.0)


# ---- one cycle ----


def torch_alone(adam: bool, steps: int = STEPS, max_lr: float = 0.05, **options) -> list[tuple[float, float]]:
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    optimiser = torch.optim.Adam(parameter) if adam else torch.optim.SGD(parameter, lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimiser, max_lr=max_lr, total_steps=steps, **options)
    found = []
    for _ in range(steps):
        (group,) = optimiser.param_groups
        found.append((group["lr"], group["betas"][0] if adam else group["momentum"]))
        optimiser.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"optim": "adam", "warmup_steps": 0.2}, {"pct_start": 0.2}),
        ({"optim": "sgd", "warmup_steps": 0.5}, {"pct_start": 0.5}),
        ({"optim": "adam", "warmup_steps": 3}, {"pct_start": 0.25}),
        ({"optim": "adam"}, {"pct_start": 0.0}),  # the default preset has no warm-up
        (
            {"optim": "adam", "warmup_steps": 0.4, "lr_scheduler_kwargs": {"anneal_strategy": "linear",
             "div_factor": 10.0, "final_div_factor": 5.0, "cycle_momentum": False}},
            {"pct_start": 0.4, "anneal_strategy": "linear", "div_factor": 10.0, "final_div_factor": 5.0,
             "cycle_momentum": False},
        ),
        (
            {"optim": "adam", "warmup_steps": 0.4, "lr_scheduler_kwargs": {"pct_start": 0.75, "max_lr": 0.2}},
            {"pct_start": 0.75, "max_lr": 0.2},  # what goes to it wins
        ),
    ],
)  # fmt: skip
def test_one_cycle_is_torchs_at_every_step(changes, options, dataset, tmp_path):
    _, steps = trained(dataset, tmp_path, lr_scheduler_type="one_cycle", **changes)
    assert steps == torch_alone(changes["optim"] == "adam", **options)
    assert len(steps) == STEPS


def test_one_cycle_counts_optimiser_steps(dataset, tmp_path):
    _, steps = trained(
        dataset, tmp_path, lr_scheduler_type="one_cycle", optim="adam", warmup_steps=0.5, gradient_accumulation_steps=3
    )
    assert steps == torch_alone(True, 4, pct_start=0.5)


@pytest.mark.parametrize(
    ("warmup", "steps"), [(1, 12), (0.25, 4), (12, 12), (99, 5), (2, 2), (0.5, 2), (0.2, 1), (1, 1), (11.5, 12)]
)
def test_one_cycle_with_hardly_a_rise_or_hardly_a_fall(warmup, steps, dataset, tmp_path):
    """Of lengths of one step and of none torch divides by zero."""
    _, found = trained(
        dataset, tmp_path, lr_scheduler_type="one_cycle", optim="adam", warmup_steps=warmup, max_steps=steps
    )
    rates = [rate for rate, _ in found]
    assert len(rates) == steps
    assert all(0 < rate <= 0.05 + 1e-12 for rate in rates)
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    if warmup >= steps > 2:  # it rises for as long as it can
        assert top == steps - 2
        assert rates[top] == pytest.approx(0.05)


def test_one_cycle_goes_on_in_the_middle_and_cannot_be_made_longer(dataset, tmp_path):
    recipe = {"preset": "ml-decoder", "ema_decay": 0.0, "learning_rate": 0.05}
    recipe |= {"save_strategy": "steps", "save_steps": 2}
    whole, steps = trained(dataset, tmp_path / "whole", **recipe)
    assert steps == torch_alone(True, pct_start=0.2)
    with pytest.raises(KeyboardInterrupt):
        trained(dataset, tmp_path / "killed", die_at=9, **recipe)
    resumed, later = trained(dataset, tmp_path / "killed", tiny_resnet(seed=1), resume=True, **recipe)
    assert later == steps[8:]
    assert torch.equal(flat(resumed.model), flat(whole.model))
    for longer in ({"num_train_epochs": 3}, {"max_steps": 20}):
        with pytest.raises(ValueError, match=f"cannot resume from .*: its {next(iter(longer))} is .*, this run's is"):
            trained(dataset, tmp_path / "killed", resume=True, **recipe | longer)
    cosine = recipe | {"lr_scheduler_type": "cosine"}
    trained(dataset, tmp_path / "cosine", **cosine)
    longer, _ = trained(dataset, tmp_path / "cosine", resume=True, **cosine | {"num_train_epochs": 3})
    assert longer.state.global_step == 18


def test_a_share_of_the_steps_warms_up_other_schedules_too(dataset, tmp_path):
    _, steps = trained(dataset, tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=0.25)
    assert [rate for rate, _ in steps] == pytest.approx([0.05 * min(i / 3, 1) for i in range(STEPS)])
    assert len(set(itertools.chain(*steps[3:]))) == 2  # the rate and the momentum
