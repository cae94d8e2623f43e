"""Short training runs that push, in a process of their own (or two under torchrun), against the stand-in for the Hub.

    python tests/trainer/push_worker.py FOLDER '[{"name": "user/a", "hub_strategy": "end", "_push": {}}, ...]'

Each run is FOLDER/<name after the slash>; what is not an argument of the trainer begins with `_`:

    _push: arguments of `push_to_hub` after training; what comes of a Future is written to FOLDER/<run>.oid
    _resume: true, or "user/name" for the last checkpoint of that repository as it was after the first save
    _ours: train this package's model class instead of one of transformers
    _card: text of a README.md that the user has put into the output folder
    _breaks: true: neither the card can be written, nor can a tracker be told of a push

Rank 0 writes FOLDER/<run>.pt (parameters, and what came out) and all that was logged to FOLDER/<run>.log.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from conftest import NAMES, arguments, flat, make_dataset, tiny_resnet, tiny_vit
from huggingface_hub import HfApi, snapshot_download
from transformers import TrainerCallback

from hf_balancemix import BalanceMixTrainer
from hf_balancemix.core.distributed import leave_process_group
from hf_balancemix.models import BalanceMixForImageClassification, model_from_backbone
from hf_balancemix.trainer import hub


def checkpoint_of(repository: str, folder: Path) -> str:
    """The last checkpoint as it was on the Hub after the first save."""
    first = HfApi().list_repo_commits(repository)[-2].commit_id
    snapshot_download(repository, revision=first, allow_patterns="last-checkpoint/*", local_dir=folder)
    return str(folder / "last-checkpoint")


def our_model() -> BalanceMixForImageClassification:
    torch.manual_seed(0)
    config = tiny_resnet().config
    return model_from_backbone(config, NAMES, head="ml_decoder")


class Broken(TrainerCallback):
    def on_push_begin(self, *args, **kwargs):
        raise RuntimeError("it is broken")


def run(folder: Path, data, name: str, **options: Any) -> None:
    push, resume, ours, card, breaks = (
        options.pop(f"_{key}", None) for key in ("push", "resume", "ours", "card", "breaks")
    )
    run_name, ranks, rank = name.split("/")[1], int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if isinstance(resume, str):
        resume = checkpoint_of(resume, folder / f"{run_name}-download")
    options = {"push_to_hub": True, "hub_model_id": name, "save_strategy": "epoch", "eval_strategy": "epoch"} | options
    if ranks > 1:
        options["ddp_backend"] = "gloo"
    if card is not None:
        (folder / run_name).mkdir()
        (folder / run_name / "README.md").write_text(card)
    trainer = BalanceMixTrainer(
        model=our_model() if ours else tiny_vit(),
        args=arguments(folder / run_name, **options),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        callbacks=[Broken()] if breaks else None,
    )
    broken_card = patch.object(hub, "write_model_card", Broken().on_push_begin)
    with broken_card if breaks else nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    result: dict[str, Any] = {"parameters": flat(trainer.model), "metrics": trainer.evaluate()}
    if push is not None:
        info = trainer.push_to_hub(**push)
        if isinstance(info, Future):  # nobody waits for it
            info.add_done_callback(lambda done: (folder / f"{run_name}.oid").write_text(done.result().oid))
        else:
            result["commit"] = info and info.oid
        trainer.evaluate()  # the other ranks go on
    if ranks > 1:
        assert dist.get_world_size() == ranks
        everyone = [None] * ranks
        dist.all_gather_object(everyone, flat(trainer.model))
        assert torch.equal(everyone[0], everyone[1])
        dist.barrier()
    if rank == 0:
        torch.save(result, folder / f"{run_name}.pt")


def main() -> None:
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    data = make_dataset(folder / f"images-{rank}", 8)
    root = logging.getLogger()
    root.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    for options in runs:
        suffix = "log" if rank == 0 else f"log-{rank}"
        handler = logging.FileHandler(folder / f"{options['name'].split('/')[1]}.{suffix}")
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        run(folder, data, **options)
        root.removeHandler(handler)
    leave_process_group()


if __name__ == "__main__":
    main()
