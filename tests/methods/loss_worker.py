"""LL-Cp on as many ranks as torchrun starts, first with one rule for all ranks, then with one a rank.

    torchrun --nproc_per_node 2 tests/methods/loss_worker.py FOLDER BATCH

Rank r writes FOLDER/across-r.pt and FOLDER/own-r.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import arguments, flat, make_dataset, tiny_vit

from hf_balancemix.core.distributed import leave_process_group
from hf_balancemix.methods import trainer_for


def main(folder: Path, batch: int) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data = make_dataset(folder / f"images-{rank}-of-{ranks}", 32)
    for name, across in (("across", True), ("own", False)):
        args = arguments(
            folder / name, num_train_epochs=3, per_device_train_batch_size=batch,
            **({"ddp_backend": "gloo"} if ranks > 1 else {}),
        )  # fmt: skip
        own = {"delta": 10.0, "across_ranks": across}
        trainer = trainer_for("ll-cp", args, own, model=tiny_vit(), train_dataset=data)
        steps, loss = [], trainer._loss

        def traced(logits, labels, inputs, steps=steps, loss=loss):
            value = loss(logits, labels, inputs)
            steps.append({"index": inputs["index"].clone(), "labels": labels.clone(), "loss": value.detach().clone()})
            return value

        trainer._loss = traced
        trainer.train()
        final = {"world": args.world_size, "corrected": trainer.corrected, "parameters": flat(trainer.model)}
        torch.save(final | {"steps": steps}, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave_process_group()
