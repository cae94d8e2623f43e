"""A run that is resumed with other arguments or other images says so, by name, and whose value is used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import arguments, make_dataset, tiny_vit
from PIL import Image
from transformers import TrainerCallback

from hf_balancemix import BalanceMixTrainer, BalanceMixTrainingArguments
from hf_balancemix.trainer import same_run


def a_trainer(folder, dataset, callbacks=(), **changes):
    values = {"save_strategy": "steps", "save_steps": 4, "judge": "network"} | changes
    args = arguments(folder, **values)
    return BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset, callbacks=[*callbacks])


class Watch(TrainerCallback):
    """What the first step of a training is done with."""

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.group = dict(optimizer.param_groups[0])
        control.should_save = control.should_training_stop = True


@pytest.fixture
def started(tmp_path, dataset):
    a_trainer(tmp_path / "o", dataset).train()
    return tmp_path / "o", dataset


def told(caplog):
    return {text.split()[0]: text for text in caplog.messages if "at the checkpoint and is" in text}


def test_every_field_of_the_arguments_is_in_one_list():
    names = {field.name for field in dataclasses.fields(BalanceMixTrainingArguments)}
    lists = [same_run.STAYS, same_run.CHANGES, same_run.OF_THE_BEST, same_run.REFUSED, same_run.HARMLESS]
    listed = [name for one in lists for name in one]
    assert len(listed) == len(set(listed))
    assert names - set(listed) == set()  # older versions of transformers lack some that are listed


def test_each_change_is_told_by_name_with_the_value_that_is_used(started, caplog):
    folder, dataset = started
    new = {
        "dataloader_drop_last": True, "max_grad_norm": 1.0, "num_train_epochs": 3, "bf16": True,
        "randaugment_magnitude": 3, "cutout": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "relabel_threshold": 0.7, "warmup_steps": 2,
    }  # fmt: skip
    ignored = {"learning_rate": 0.01, "weight_decay": 0.3, "optim_args": "momentum=0.1"}
    watch = Watch()
    a_trainer(folder, dataset, [watch], **new, **ignored).train(resume_from_checkpoint=True)
    lines = told(caplog)
    assert lines.keys() == new.keys() | ignored.keys()
    for name, value in new.items():
        assert f"and is {value!r} now: {value!r} is used from here on" in lines[name]
    for name, old in {"learning_rate": "0.05", "weight_decay": "0.0001", "optim_args": "'momentum=0.9'"}.items():
        assert f"{name} was {old} at the checkpoint and is {ignored[name]!r} now: {old} is used" in lines[name]
    # and that is so
    assert watch.group["initial_lr"] == 0.05
    assert watch.group["momentum"] == 0.9
    assert watch.group["weight_decay"] == 1e-4
    caplog.clear()  # what was saved since knows what was used
    again = a_trainer(folder, dataset, [Watch()], **new, **ignored)
    again.train(resume_from_checkpoint=True)
    assert told(caplog).keys() == ignored.keys()


def test_the_same_run_and_changes_without_effect_are_not_told(started, caplog):
    folder, dataset = started
    changes = {"logging_steps": 7, "save_steps": 3, "dataloader_num_workers": 1, "report_to": "none", "seed": 3}
    a_trainer(folder, dataset, [Watch()], **changes).train(resume_from_checkpoint=True)
    assert not told(caplog)


def test_other_pixels_under_the_same_ids_are_told(tmp_path, started, caplog):
    folder, dataset = started
    pixels = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "023.png")  # of the last row
    other = make_dataset(tmp_path / "other")
    a_trainer(folder, dataset, [Watch()]).train(resume_from_checkpoint=True)
    assert told(caplog).keys() == {"images"}
    caplog.clear()
    a_trainer(folder, other, [Watch()]).train(resume_from_checkpoint=True)  # the first images, in another folder
    assert not told(caplog)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torch"}, "its optim is 'sgd', this run's is 'adamw_torch'; they must be equal"),
        ({"lr_scheduler_type": "one_cycle"}, "its num_train_epochs is None|its lr_scheduler_type is 'cosine'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "its lr_scheduler_type is 'cosine'"),
    ],
)
def test_what_the_optimisers_state_cannot_be_loaded_into_is_refused(started, changes, message):
    folder, dataset = started
    trainer = a_trainer(folder, dataset)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_data_is_never_seen_twice_in_an_epoch(tmp_path, dataset):
    with pytest.raises(ValueError, match="ignore_data_skip is True; it must be False, as a resumed run"):
        a_trainer(tmp_path / "o", dataset, ignore_data_skip=True)
