"""Co-teaching, T-estimator and NAR (with ELR in it), one after the other, in one process or two under torchrun.

    torchrun --nproc_per_node 2 tests/methods/two_ranks_worker.py FOLDER --batch 8

Each rank writes FOLDER/final-RANK.pt: parameters, and the method's state, which it has compared with the others'.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from conftest import arguments, flat, tiny_vit
from test_t_estimator import correlated_data

from hf_balancemix.core.distributed import leave_process_group
from hf_balancemix.methods import trainer_for


def train_both(folder: Path, batch: int) -> dict[str, dict]:
    """Parameters, state and mAP of each method after a warm-up epoch and one more, on this process's rank."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    data = correlated_data(folder / f"images-{rank}")
    final = {}
    for method in ("co-teaching", "t-estimator", "nar"):
        args = arguments(
            folder / method,
            num_train_epochs=2,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=7,
            learning_rate=0.02,
            **({"ddp_backend": "gloo"} if ranks > 1 else {}),
        )
        # So that in the one epoch after the warm-up labels are left out and flipped.
        own = {"drop_negative": 0.3, "flip_negative": 0.4, "min_share": 0.0} if method == "nar" else {}
        trainer = trainer_for(method, args, own, model=tiny_vit(), train_dataset=data, eval_dataset=data)
        trainer.min_selected = 10  # of T-estimator
        trainer.train()
        assert trainer.args.world_size == ranks
        state = trainer._run_state()
        if ranks > 1:
            states = [None] * ranks
            dist.all_gather_object(states, state)
            for name, value in state.items():
                assert all(torch.equal(value, other[name]) for other in states), f"{name} differs between ranks"
        final[method] = {"parameters": flat(trainer.model), "state": state, "mAP": trainer.evaluate()["eval_mAP"]}
    return final


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.save(train_both(options.folder, options.batch), options.folder / f"final-{os.environ.get('RANK', 0)}.pt")
    leave_process_group()
