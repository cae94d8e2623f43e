"""Canaries: what the trainers rely on in transformers and Accelerate, and flaws of theirs that overrides work around.

A failure here means that an upgrade moved a hook, or, in a test marked `fixed_upstream`, that upstream has repaired
the flaw that it describes, so the override named in the reason can go.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler, prepare_data_loader
from conftest import arguments, flat, make_dataset, tiny_resnet, tiny_vit
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import hf_balancemix.trainer.multilabel
from hf_balancemix import BalanceMixTrainer, MultiLabelTrainer
from hf_balancemix.core.sampling import EpochSampler
from hf_balancemix.trainer import MixupTrainer
from hf_balancemix.trainer.averaging import AveragingTrainer
from hf_balancemix.trainer.hub import HubTrainer
from hf_balancemix.trainer.resumable import ResumableTrainer

# Each hook with the parameters that overrides take or that are passed to it.
HOOKS = {
    "_get_dataloader": ["dataset", "description", "batch_size", "sampler_fn", "is_training"],
    "_get_train_sampler": ["train_dataset"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "_prepare_inputs": ["inputs"],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_load_rng_state": ["checkpoint"],
    "_load_scaler": ["checkpoint"],
    "_finish_current_push": [],
    "_hp_search_setup": ["trial"],
    "_issue_warnings_after_load": ["load_result"],
    "_init_training_state": ["max_steps", "num_update_steps_per_epoch", "num_train_epochs"],
    "_maybe_log_save_evaluate": [],
    "_evaluate": ["trial", "ignore_keys_for_eval"],
    "_determine_best_metric": ["metrics", "trial"],
    # public, but their signatures are ours too
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "call_model_init": ["trial"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "get_decay_parameter_names": ["model"],
    "get_optimizer_cls_and_kwargs": ["args", "model"],
    "init_hf_repo": ["token", "private"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private"],
}


TRAINERS = (HubTrainer, ResumableTrainer, AveragingTrainer, MultiLabelTrainer, MixupTrainer, BalanceMixTrainer)


def fixed_upstream(reason: str, raises: type[Exception] = AssertionError) -> pytest.MarkDecorator:
    """The test describes how it should be; it fails, in the way named, as long as upstream has the flaw."""
    return pytest.mark.xfail(reason=f"known flaw; once this passes, remove {reason}", raises=raises, strict=True)


def stock(model, folder: Path, **changes) -> Trainer:
    values = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return Trainer(model=model, args=TrainingArguments(**values | changes))


# ---- hooks ----


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_there_with_its_parameters(name):
    parameters = inspect.signature(getattr(Trainer, name)).parameters
    assert set(HOOKS[name]) <= set(parameters)
    # Whatever Trainer passes to the hook, the override takes.
    for trainer in TRAINERS:
        own = inspect.signature(getattr(trainer, name)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
        assert takes_any or list(own) == list(parameters), trainer.__name__


def test_the_modules_list_of_hooks_is_complete():
    listed = set(re.findall(r"`(_\w+)`", hf_balancemix.trainer.multilabel.__doc__))
    assert listed == {name for name in HOOKS if name.startswith("_")}
    overridden = set()
    for trainer in TRAINERS:
        overridden |= {name for name in vars(trainer) if name.startswith("_") and hasattr(Trainer, name)}
    assert {name for name in overridden if not name.startswith("__")} <= listed


def test_the_order_of_calls_in_an_epoch_and_around_a_save(tmp_path, monkeypatch):
    # An epoch's statistics must be there before its first key is drawn, and the method's state before a push.
    calls = []

    def traced(owner: type, name: str, as_name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            calls.append(as_name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    traced(MultiLabelTrainer, "_begin_epoch", "begin epoch")
    traced(EpochSampler, "__iter__", "sampler")
    traced(MultiLabelTrainer, "_save", "weights")
    traced(MultiLabelTrainer, "_save_optimizer_and_scheduler", "state")
    traced(MultiLabelTrainer, "_seal", "seal")
    traced(MultiLabelTrainer, "_end_training", "end")
    monkeypatch.setattr(HubTrainer, "_push_from_checkpoint", lambda self, folder: calls.append("push"))
    monkeypatch.setattr(HubTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(HubTrainer, "_finish_current_push", lambda self: calls.append("finish pushes"))
    monkeypatch.setattr(HubTrainer, "push_to_hub", lambda self, *args, **kwargs: None)

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append("step")

        def on_epoch_end(self, args, state, control, **kwargs):
            calls.append("epoch end")

    data = make_dataset(tmp_path / "images", 8)
    args = arguments(tmp_path / "out", save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="a/b")
    MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=data, callbacks=[Steps()]).train()
    save = ["weights", "state", "seal", "push", "seal"]
    epoch = ["begin epoch", "sampler", "step", "step", *save, "epoch end"]
    assert calls == [*epoch, *epoch, "end", "finish pushes"]


def test_our_loss_is_divided_by_the_accumulation_steps(tmp_path):
    data = make_dataset(tmp_path / "images", 8)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not trainer.model_accepts_loss_kwargs
    losses = []
    for steps in (1, 4):
        trainer.current_gradient_accumulation_steps = steps
        losses.append(trainer.training_step(trainer.model, dict(batch), num_items_in_batch=torch.tensor(32)))
    assert losses[1] == pytest.approx(losses[0].item() / 4)


def test_a_loader_takes_our_generator_and_keeps_it_when_batches_are_skipped(tmp_path):
    data = make_dataset(tmp_path / "images", 8)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=data)
    loader = trainer.get_train_dataloader()
    state = torch.get_rng_state()
    for source in (loader, skip_first_batches(loader, 1), trainer.get_eval_dataloader(data)):
        assert len(list(source)) in (1, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_our_sampler_is_not_replaced(tmp_path):
    loader = prepare_data_loader(DataLoader(range(8), sampler=EpochSampler(8, 0), batch_size=2))
    assert isinstance(loader.batch_sampler.sampler, EpochSampler)
    # While a RandomSampler would be, if seedable samplers were asked for.
    other = DataLoader(range(8), sampler=RandomSampler(range(8)), batch_size=2)
    replaced = prepare_data_loader(other, use_seedable_sampler=True)
    assert type(replaced.batch_sampler.sampler) is not RandomSampler


# ---- flaws that overrides work around ----


@fixed_upstream("ResumableTrainer._load_weights (transformers#48805)")
def test_stock_trainer_loads_a_vit_back(tmp_path):
    saved, fresh = tiny_vit(seed=1), tiny_vit(seed=2)
    saved.save_pretrained(tmp_path / "checkpoint-1")
    stock(fresh, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(flat(fresh), flat(saved))


def test_our_trainer_loads_a_vit_back(tmp_path):
    data = make_dataset(tmp_path / "images", 8)
    saved, fresh = tiny_vit(seed=1), tiny_vit(seed=2)
    saved.save_pretrained(tmp_path / "checkpoint-1")
    trainer = MultiLabelTrainer(model=fresh, args=arguments(tmp_path / "out"), train_dataset=data)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(flat(fresh), flat(saved))


def test_stock_trainer_loads_a_resnet_back(tmp_path):
    saved, fresh = tiny_resnet(seed=1), tiny_resnet(seed=2)
    saved.save_pretrained(tmp_path / "checkpoint-1")
    stock(fresh, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(flat(fresh), flat(saved))


@fixed_upstream("loss_is_scaled_for_ga and model_accepts_loss_kwargs (transformers#47688)")
def test_stock_multi_label_loss_is_divided_by_the_accumulation_steps(tmp_path):
    model = tiny_vit()
    trainer = stock(model, tmp_path)
    batch = {"pixel_values": torch.rand(4, 3, 16, 16), "labels": torch.ones(4, 5)}
    losses = []
    for steps in (1, 4):
        trainer.current_gradient_accumulation_steps = steps
        losses.append(trainer.training_step(model, dict(batch), num_items_in_batch=torch.tensor(4 * steps)).item())
    assert losses[1] == pytest.approx(losses[0] / 4)


@fixed_upstream("the whole-checkpoint search of ResumableTrainer.train")
def test_the_last_checkpoint_is_a_whole_one(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "model.safetensors").write_bytes(b"x")
    assert get_last_checkpoint(str(tmp_path)) is None


@fixed_upstream("the start from the beginning in ResumableTrainer.train", raises=ValueError)
def test_stock_trainer_starts_where_there_is_no_checkpoint(tmp_path):
    trainer = stock(tiny_vit(), tmp_path, max_steps=1)
    trainer.train_dataset = [{"pixel_values": torch.rand(3, 16, 16), "labels": torch.ones(5)}] * 2
    trainer.train(resume_from_checkpoint=True)


@fixed_upstream("the unlinking in ResumableTrainer._save")
def test_stock_trainer_writes_no_pickled_arguments(tmp_path):
    stock(tiny_vit(), tmp_path).save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "training_args.bin").exists()


@fixed_upstream("the generators in MultiLabelTrainer._get_dataloader and scan")
def test_iterating_a_loader_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    next(iter(DataLoader(range(4))))
    assert torch.equal(torch.get_rng_state(), state)


@fixed_upstream("set_epoch in MultiLabelTrainer._begin_epoch")
def test_set_epoch_reaches_the_sampler_when_resuming_on_several_ranks():
    sampler = EpochSampler(16, 0)
    shard = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), num_processes=2, process_index=0)
    loader = prepare_data_loader(DataLoader(range(16), batch_sampler=SkipBatchSampler(shard, skip_batches=1)))
    loader.set_epoch(3)
    assert sampler.epoch == 3
