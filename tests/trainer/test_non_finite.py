"""What is not finite ends a run, or is left out where that was asked for; and it is never saved."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from conftest import arguments, flat, tiny_resnet, tiny_vit
from safetensors.torch import load_file, save_file
from test_resume import final, run
from training_worker import poisoned_batches
from transformers import TrainerCallback

from hf_balancemix import BalanceMixTrainer, MultiLabelTrainer
from hf_balancemix.trainer import checkpoints


class Poison(TrainerCallback):
    """One weight becomes NaN at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.classifier.weight[0, 0] = math.nan


def test_a_weight_that_becomes_nan_stops_the_run_at_the_next_step(dataset, tmp_path):
    args = arguments(tmp_path / "o", save_strategy="steps", save_steps=3, num_train_epochs=3)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset, callbacks=[Poison(4)])
    message = (
        r"the logits and the loss of step 5 \(epoch 0.67\), and before it classifier.weight, a weight of the model,"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 4
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")] == ["checkpoint-3"]
    with pytest.raises(ValueError, match=r"the model's classifier.weight is not finite to be saved"):
        trainer.save_model()
    assert not (tmp_path / "o" / "model.safetensors").exists()


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_no_checkpoint_with_such_a_weight_is_written_and_no_training_ends_with_one(on_nan, dataset, tmp_path):
    for step, changes in ((3, {"save_strategy": "steps", "save_steps": 3}), (12, {})):
        args = arguments(tmp_path / "o", on_nan=on_nan, **changes)
        trainer = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset, callbacks=[Poison(step)])
        with pytest.raises(ValueError, match=r"the model's classifier.weight is not finite at"):
            trainer.train()
        assert trainer.state.global_step == step
        assert checkpoints.list_checkpoints(tmp_path / "o") == []


def test_a_checkpoint_that_has_one_all_the_same_is_passed_over(dataset, tmp_path, caplog):
    args = arguments(tmp_path / "o", save_strategy="epoch")
    MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset).train()
    first, last = checkpoints.list_checkpoints(tmp_path / "o")
    weights = load_file(last / "model.safetensors")
    name = next(iter(sorted(weights)))
    weights[name].view(-1)[0] = math.nan
    save_file(weights, last / "model.safetensors", metadata={"format": "pt"})
    checkpoints.write_manifest(last)
    assert checkpoints.last_whole_checkpoint(tmp_path / "o") == first
    assert f"The weight '{name}' in its file 'model.safetensors' is not finite." in caplog.text
    again = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    with pytest.raises(ValueError, match=r"cannot resume from .* is not finite; it must be whole"):
        again.train(resume_from_checkpoint=str(last))


@pytest.mark.parametrize(
    "changes",
    [{}, {"optim": "adamw_torch"}, {"ema_decay": 0.5, "max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}],
)
def test_a_skipped_step_changes_nothing_and_is_counted(changes, dataset, tmp_path, caplog):
    args = arguments(
        tmp_path / "o", on_nan="skip", logging_strategy="steps", logging_steps=1, num_train_epochs=1,
        lr_scheduler_type="constant", weight_decay=0.1, **changes,
    )  # fmt: skip
    trainer = MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
    at = changes.get("gradient_accumulation_steps", 1)
    poisoned_batches(trainer, at * 2)  # the last micro-batch of the second step
    seen = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            kept = [flat(trainer.model)]
            kept += [v.flatten() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            if trainer._average is not None:
                kept += [v.flatten().float() for v in trainer._average.state_dict().values()]
            seen.append(torch.cat(kept).clone())

    trainer.add_callback(Snapshot())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    equal = [torch.equal(one, other) for one, other in itertools.pairwise(seen)]
    assert equal == [True] + [False] * (6 // at - 2)
    assert torch.isfinite(seen[-1]).all()
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert [line.get("skipped_steps") for line in lines] == [None, 1] + [None] * (6 // at - 2)
    assert ["loss" in line for line in lines] == [True, False] + [True] * (6 // at - 2)
    assert [m for m in caplog.messages if "skipped" in m] == [
        f"the logits and the loss of step 2 (epoch {at / 6:.2f}) are not finite: the step is skipped."
    ]


def test_with_stop_such_a_batch_ends_the_run_before_its_update(dataset, tmp_path):
    trainer = MultiLabelTrainer(model=tiny_resnet(), args=arguments(tmp_path / "o"), train_dataset=dataset)
    poisoned_batches(trainer, 1)
    before = torch.cat([p.flatten() for p in trainer.model.parameters()]).clone()
    with pytest.raises(ValueError, match=r"the logits and the loss of step 1 \(epoch 0.00\) are not finite"):
        trainer.train()
    assert torch.equal(before, torch.cat([p.flatten() for p in trainer.model.parameters()]))


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize(
    ("judge", "text"),
    [
        ("network", "the logits of 3 of 24 instances are not finite in the scan after step 6"),
        ("cross_fit", "the features of 3 of 24 instances are not finite in the scan after step 0"),
    ],
)
def test_what_is_not_finite_in_the_scan_is_said(judge, text, on_nan, dataset, tmp_path, caplog):
    args = arguments(tmp_path / "o", on_nan=on_nan, judge=judge)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    normalise = trainer._normalise

    def spoil(images):
        images = normalise(images)
        return images if trainer.model.training else images.index_fill(0, torch.tensor([0]), math.nan)

    trainer._normalise = spoil
    if on_nan == "stop":
        with pytest.raises(ValueError, match=text):
            trainer.train()
    else:
        trainer.train()
        assert text in caplog.text
        assert trainer.balance_mix.weights.isfinite().all()


@pytest.mark.parametrize("changes", [{"on_nan": "ignore"}, {"on_nan": "skip", "logging_nan_inf_filter": False}])
def test_settings_that_cannot_work_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="on_nan"):
        arguments(tmp_path, **changes)


@pytest.mark.dist
def test_one_rank_of_two_stops_both_and_none_waits(tmp_path):
    run(tmp_path / "o", "--instances", "16", "--epochs", "2", "--nan", "1:2", ranks=2)
    text = "the logits and the loss of step 2 (epoch 0.50) are not finite"
    for rank in (0, 1):
        assert text in final(tmp_path / "o", rank)["error"]


@pytest.mark.dist
def test_one_rank_of_two_lets_both_skip(tmp_path):
    flags = ("--instances", "16", "--epochs", "2", "--on_nan", "skip", "--nan", "1:2", "--save_steps", "3")
    run(tmp_path / "o", *flags, "--ema", "0.5", ranks=2)
    ends = [final(tmp_path / "o", rank) for rank in (0, 1)]
    assert torch.equal(ends[0]["parameters"], ends[1]["parameters"])
    assert torch.isfinite(ends[0]["parameters"]).all()
    assert [line["skipped_steps"] for line in ends[0]["log"] if "skipped_steps" in line] == [1]
