"""Whether a long run stays as it was: memory, file handles, threads and time of an epoch over 200 short epochs.

    torchrun --nproc_per_node 2 -m benchmarks.soak

BalanceMix with evaluation, a checkpoint every ten epochs (two are kept) and two data loader workers, on 64 drawn
images and a tiny network. The table has, for each rank, the value after a fifth of the epochs, at the end, and the
slope of a straight line through what lies between.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_balancemix import BalanceMixTrainer, BalanceMixTrainingArguments, Mislabel
from hf_balancemix.core.distributed import leave_process_group, world
from hf_balancemix.report import markdown_table

COLUMNS = ("resident MB", "of it not shared, MB", "open files", "threads", "processes", "seconds an epoch")


class Watch(TrainerCallback):
    """A row of :data:`COLUMNS` for every epoch."""

    def __init__(self) -> None:
        self.process, self.rows, self.last = psutil.Process(), [], time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now, memory = time.perf_counter(), self.process.memory_full_info()
        files, threads = self.process.num_fds(), self.process.num_threads()
        children = len(self.process.children(recursive=True))
        self.rows.append([memory.rss / 1e6, memory.uss / 1e6, files, threads, children, now - self.last])
        self.last = now


def drawn(n: int, num_classes: int) -> datasets.Dataset:
    """Images of one colour and labels by its channels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (n, 3), dtype=np.uint8)
    images = [Image.fromarray(np.broadcast_to(c, (32, 32, 3)).copy()) for c in colours]
    labels = [[k for k in range(num_classes) if c[k % 3] > 60 + 40 * (k // 3)] for c in colours.astype(int)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "labels": datasets.List(datasets.ClassLabel(names=[f"class {k}" for k in range(num_classes)])),
            "image_id": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict({"image": images, "labels": labels, "image_id": range(n)}, features=features)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = drawn(64, 6)
    names = data.features["labels"].feature.names
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=len(names),
        id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)},
        problem_type="multi_label_classification",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rank, num_ranks = world()
        args = BalanceMixTrainingArguments(
            f"{folder}/run", num_train_epochs=asked.epochs, label_warmup_epochs=5, per_device_train_batch_size=8,
            per_device_eval_batch_size=16, image_size=32, eval_strategy="epoch", save_strategy="steps",
            save_steps=10 * max(1, 64 // (8 * num_ranks)), save_total_limit=2, dataloader_num_workers=2,
            dataloader_pin_memory=False, disable_tqdm=True, report_to="none", use_cpu=True, judge="network",
            logging_strategy="no",
        )  # fmt: skip
        watch = Watch()
        trainer = BalanceMixTrainer(
            model=ResNetForImageClassification(config), args=args, train_dataset=Mislabel(rate=0.3).add_to(data),
            eval_dataset=data, callbacks=[watch],
        )  # fmt: skip
        trainer.train()
        rank, num_ranks = world()
        rows = np.array(watch.rows)
        begin = len(rows) // 5
        slopes = [np.polyfit(np.arange(begin, len(rows)), column[begin:], 1)[0] for column in rows.T]
        table = [["rank", "", f"epoch {begin + 1}", f"epoch {len(rows)}", "slope, an epoch"]]
        for name, column, slope in zip(COLUMNS, rows.T, slopes, strict=True):
            table.append([str(rank), name, f"{column[begin]:.2f}", f"{column[-1]:.2f}", f"{slope:+.5f}"])
        print(markdown_table(table, 2, pad=False), flush=True)
    leave_process_group()


if __name__ == "__main__":
    main()
