"""One short training run in a process of its own (or two under torchrun), which can be made to die at a given moment.

    python tests/trainer/training_worker.py FOLDER [--resume] [--kill step:3 | scan:2 | save:1 | manifest:1] ...

Rank 0 writes FOLDER/final.pt: parameters and buffers, the method's state, and what every step saw.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from conftest import arguments, flat, make_dataset, tiny_resnet, tiny_vit
from transformers import TrainerCallback

from hf_balancemix import BalanceMixTrainer, Mislabel, MultiLabelTrainer
from hf_balancemix.core.distributed import leave_process_group
from hf_balancemix.trainer import checkpoints


def arm(trainer: MultiLabelTrainer, moment: str, strike: Callable[[], None], patch: Any) -> None:
    """Strike the n-th time that a step ends (0: before the first), that a batch is evaluated or observed in a scan,
    that a file is saved, or a checkpoint sealed."""
    what, count = moment.split(":")
    left = [int(count)]

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            strike()

    if what == "step":

        class Bomb(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                left[0] += 1
                tick()

            def on_step_end(self, *args, **kwargs):
                tick()

        trainer.add_callback(Bomb())
    elif what == "scan":
        observe = trainer.balance_mix.observe

        def observe_or_die(*args):
            observe(*args)
            tick()

        patch.setattr(trainer.balance_mix, "observe", observe_or_die)
    elif what == "eval":
        prepare = trainer._prepare_inputs

        def prepare_or_die(inputs):
            if trainer._evaluating and not trainer.model.training:
                tick()
            return prepare(inputs)

        patch.setattr(trainer, "_prepare_inputs", prepare_or_die)
    elif what == "save":  # in the middle of optimizer.pt: half of it is on disk
        save = torch.save

        def save_or_die(obj, file, *args, **kwargs):
            if str(file).endswith("optimizer.pt"):
                Path(file).write_bytes(b"half of it")
                tick()
            save(obj, file, *args, **kwargs)

        patch.setattr(torch, "save", save_or_die)
    elif what == "manifest":
        write = checkpoints.write_manifest

        def write_or_die(directory):
            tick()
            write(directory)

        patch.setattr(checkpoints, "write_manifest", write_or_die)
    else:
        raise ValueError(moment)


def poisoned_batches(trainer: MultiLabelTrainer, *calls: int) -> None:
    """The images of some micro-batches, counted from 1, are infinite."""
    prepare, count = trainer._prepare_inputs, [0]

    def spoil(inputs):
        inputs = prepare(inputs)
        if trainer.model.training:
            count[0] += 1
            if count[0] in calls:
                inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], math.inf)
        return inputs

    trainer._prepare_inputs = spoil


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", choices=["resnet", "vit"], default="resnet")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--instances", type=int, default=26)
    parser.add_argument("--drop_last", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--clip", type=float, default=0.0)
    parser.add_argument("--predictions", choices=["views", "scan"], default="views")
    parser.add_argument("--judge", choices=["cross_fit", "network"], default="cross_fit")
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--norm_head", action="store_true", help="batch norm of what was pooled")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2, which Accelerate leaves out on a CPU")
    parser.add_argument("--zero", type=int, help="DeepSpeed, this stage")
    parser.add_argument("--on_nan", default="stop")
    parser.add_argument("--nan", help="RANK:N, the rank whose n-th batch of training is infinite")
    parser.add_argument("--kill")
    parser.add_argument("--kill_rank", type=int, default=0, help="-1: all; -2: its whole process group")
    parser.add_argument("--by", default="KILL")
    options = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    data = make_dataset(options.folder.parent / f"images-{options.instances}-{rank}", options.instances)
    data = data.cast_column("image", data.features["image"])
    noise = Mislabel(rate=0.4, seed=0).fit(data)
    noisy = data.map(noise, batched=True, features=noise.features, load_from_cache_file=False, keep_in_memory=True)
    engine = {"ddp_backend": "gloo"} if ranks > 1 else {}
    if options.fsdp:
        engine |= {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    if options.zero:
        zero = {"stage": options.zero, "stage3_gather_16bit_weights_on_model_save": True}
        zero["stage3_param_persistence_threshold"] = 0  # else so small a model stays whole
        sizes = "train_micro_batch_size_per_gpu train_batch_size gradient_accumulation_steps gradient_clipping"
        engine["deepspeed"] = dict.fromkeys(sizes.split(), "auto") | {"zero_optimization": zero}
    args = arguments(
        options.folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=5,
        gradient_accumulation_steps=options.accumulation,
        dataloader_drop_last=options.drop_last,
        save_strategy="steps",
        save_steps=options.save_steps,
        eval_strategy="epoch",
        save_total_limit=3,
        max_grad_norm=options.clip,
        ema_decay=options.ema,
        on_nan=options.on_nan,
        logging_strategy="epoch",
        prediction_source=options.predictions,
        judge=options.judge,
        dataloader_num_workers=options.workers,
        dataloader_persistent_workers=options.workers > 0,
        **engine,
    )
    if options.fsdp:  # the one thing that Accelerate asks before it leaves FSDP out
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = tiny_resnet() if options.arch == "resnet" else tiny_vit(dropout=options.dropout)
    if options.norm_head:
        model.classifier.insert(1, torch.nn.BatchNorm1d(16))  # after the ResNet's nn.Flatten
    trainer = BalanceMixTrainer(model=model, args=args, train_dataset=noisy, eval_dataset=data.select(range(9)))
    trace: list[dict[str, torch.Tensor]] = []
    refine, loss = trainer.balance_mix.refine, trainer.balance_mix.loss

    def traced_refine(index, labels, probabilities=None):
        refined = refine(index, labels, probabilities)
        trace.append({"index": index.clone(), "reliability": refined.reliability, "labels": refined.labels})
        return refined

    def traced_loss(logits, targets, *weights):
        value = loss(logits, targets, *weights)
        trace.append({"loss": value.detach().clone(), "targets": targets.clone()})
        return value

    trainer.balance_mix.refine, trainer.balance_mix.loss = traced_refine, traced_loss
    if options.kill and options.kill_rank in (rank, -1, -2):
        pid = 0 if options.kill_rank == -2 else os.getpid()
        # By another process: workers of a data loader end without a word by a signal from their own.
        command = ["sh", "-c", f"kill -s {options.by} {pid}"]
        arm(trainer, options.kill, lambda: [subprocess.run(command, check=False), time.sleep(1)], pytest.MonkeyPatch())
    if options.nan and rank == int(options.nan.split(":")[0]):
        poisoned_batches(trainer, int(options.nan.split(":")[1]))
    error = None
    try:
        trainer.train(resume_from_checkpoint=options.resume)
    except ValueError as caught:
        if not options.nan:
            raise
        error = str(caught)
    if ranks > 1:
        assert dist.get_world_size() == ranks
        weights = [None] * ranks
        dist.all_gather_object(weights, trainer.balance_mix.state_dict())
        for other in weights[1:]:
            for name, value in weights[0].items():
                assert torch.equal(value, other[name]), f"{name} differs between ranks"
    torch.save(
        {
            "world": trainer.args.world_size,
            "parameters": flat(trainer.model),
            "state": trainer._run_state(),
            "trace": trace,
            "error": error,
            "audit": None if error else trainer.label_audit().remove_columns("image").to_pandas().to_csv(),
            "log": trainer.state.log_history,
            "steps": trainer.state.global_step,
        },
        options.folder / f"final-{rank}.pt",
    )
    leave_process_group()


if __name__ == "__main__":
    main()
