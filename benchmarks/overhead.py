"""Seconds an epoch of BCE, Mixup and BalanceMix on the built-in sample, and where they go.

    python benchmarks/overhead.py [--num_train 512] [--rounds 3]

All methods run in one process, one epoch after the other in turns, on the same model, images and batch size; the
table shows medians over the rounds and the ratio to BCE. BalanceMix is measured after its warm-up. Parts:
data: waiting for the loader (without workers: decoding, resizing, RandAugment); views: label-wise management, with
the forward passes of two views where it has them (`--prediction_source views`); step: the rest of a training step;
scan: the pass over the training set; mixture fit: Eq. 2-8 from the scan.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback

from hf_balancemix import BalanceMixTrainingArguments, Mislabel, load_coco, load_model, make_scenes
from hf_balancemix.data import class_names
from hf_balancemix.methods import trainer_for
from hf_balancemix.report import markdown_table

PARTS = ("data", "views", "step", "scan", "mixture fit")


class Clock:
    """Adds up the seconds of named parts, without what is measured inside them under another name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[list[Any]] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._running.append([time.perf_counter(), 0.0])
            try:
                return function(*args, **kwargs)
            finally:
                start, inner = self._running.pop()
                spent = time.perf_counter() - start
                self.seconds[name] += spent - inner
                if self._running:
                    self._running[-1][1] += spent

        return timed


def one_epoch(method: str, args: BalanceMixTrainingArguments, network: str, train: Any) -> dict[str, float]:
    """Train two epochs and give the seconds of the second, whose scan and label management are BalanceMix's own."""
    torch.manual_seed(0)
    model, processor = load_model(network, class_names(train), image_size=args.image_size, pretrained=False)
    trainer = trainer_for(method, args, model=model, train_dataset=train, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    clock, marks = Clock(), []
    trainer.training_step = clock.wrap("step", trainer.training_step)
    trainer.get_batch_samples = clock.wrap("data", trainer.get_batch_samples)
    begin = trainer._begin_epoch

    def begin_epoch(epoch: int) -> None:
        marks.append((time.perf_counter(), dict(clock.seconds)))
        begin(epoch)

    trainer._begin_epoch = begin_epoch
    if method == "balancemix":
        trainer._refine = clock.wrap("views", trainer._refine)
        trainer._scan = clock.wrap("scan", trainer._scan)
        for name in ("observe", "end_epoch"):
            setattr(trainer.balance_mix, name, clock.wrap("mixture fit", getattr(trainer.balance_mix, name)))
    trainer._end_training = lambda: marks.append((time.perf_counter(), dict(clock.seconds)))
    trainer.train()
    (start, before), (end, after) = marks[1], marks[2]
    parts = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in PARTS}
    return parts | {"epoch": end - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_train", type=int, default=512, help="Training images of the sample to use.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", default="test_resnet", help="timm architecture, drawn anew.")
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()

    train = load_coco(make_scenes(), split="train")
    train = train.select(range(min(options.num_train, len(train))))
    noise = Mislabel(rate=0.4, seed=0).fit(train)
    train = train.map(noise, batched=True, features=noise.features)
    with tempfile.TemporaryDirectory() as folder:
        args = BalanceMixTrainingArguments(
            output_dir=folder, num_train_epochs=2, label_warmup_epochs=1, image_size=64,
            per_device_train_batch_size=options.batch_size, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True,
            per_device_eval_batch_size=64,
        )  # fmt: skip
        results: dict[str, list[dict[str, float]]] = defaultdict(list)
        rows = {
            "bce": ("bce", args),
            "mixup": ("mixup", args),
            "balancemix": ("balancemix", args),
            "balancemix, two views": ("balancemix", replace(args, prediction_source="views")),
        }
        for name in tqdm([*rows] * options.rounds, desc="Epochs"):
            method, own = rows[name]
            results[name].append(one_epoch(method, replace(own), options.network, train))

    names = (*PARTS, "epoch")
    medians = {m: {p: statistics.median(r[p] for r in rows) for p in names} for m, rows in results.items()}
    base = medians["bce"]["epoch"]
    print(f"\n{len(train)} images, {options.network}, 64 px, batch {options.batch_size}, "
          f"{torch.get_num_threads()} threads, median of {options.rounds} rounds; seconds an epoch\n")  # fmt: skip
    table = [["method", *PARTS, "other", "epoch", "ratio to bce"]]
    for method, row in medians.items():
        other = row["epoch"] - sum(row[p] for p in PARTS)
        numbers = [*(row[p] for p in PARTS), other, row["epoch"], row["epoch"] / base]
        table.append([method, *(f"{number:.2f}" for number in numbers)])
    print(markdown_table(table, pad=False))


if __name__ == "__main__":
    main()
