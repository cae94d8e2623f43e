"""What BalanceMix costs beside the network on a large training set: peak memory, seconds an epoch, bytes a checkpoint.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--instances 1000000] [--classes 1000] [--judge network]
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/scale.py     # each rank does its share

There are no images and no network: labels are drawn (class sizes fall as 1 / rank; a fifth of the positive labels is
wrong), and so are logits, whose drawing is not counted. An epoch is its scan (`observe`, `end_epoch`), the keys of the
sampler, and for each step the labels of both batches, refined and mixed. Memory is the peak of the process over what
it has after the imports. Seconds are of the processor, so that other programs on the machine do not count.

With `--judge cross_fit`, heads judge once before the training, which needs features. What they find is drawn here,
too; `--judge_features D` measures that step itself, on N x D drawn features, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import csr_array

from hf_balancemix.core import BalanceMix, BalanceMixSettings, NoiseRates, PairSampler
from hf_balancemix.core.distributed import leave_process_group, world
from hf_balancemix.core.given_labels import label_counts, label_rows, stored_places
from hf_balancemix.core.loss_histogram import LossHistogram
from hf_balancemix.core.loss_mixture import LossMixtures
from hf_balancemix.report import markdown_table

MB = 1 << 20


class Clock:
    """Seconds of the processor by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start


def draw_labels(n: int, k: int, per_instance: int, seed: int = 0) -> tuple[csr_array, csr_array]:
    """Given labels, and the clean ones among the given positive ones."""
    rng = np.random.default_rng(seed)
    share = np.cumsum(1 / np.arange(1, k + 1))
    indices, right, lengths = [], [], []
    for first in range(0, n, 1 << 16):
        rows = min(1 << 16, n - first)
        drawn = np.sort(np.searchsorted(share, rng.random((rows, per_instance), dtype=np.float32) * share[-1]), 1)
        new = np.diff(drawn, axis=1, prepend=-1) > 0  # a class drawn twice is there once
        indices.append(drawn[new].astype(np.int32))
        right.append(rng.random(len(indices[-1])) > 0.2)
        lengths.append(new.sum(1))
    start = np.concatenate([[0], *lengths]).cumsum().astype(np.int32)
    columns = np.concatenate(indices)
    given = csr_array((np.ones(len(columns), dtype=np.int8), columns, start), shape=(n, k))
    return given, np.concatenate(right)


class Logits:
    """Of a network that has learned the clean labels: about calibrated, and unsure of some."""

    def __init__(self, labels: csr_array, right: np.ndarray) -> None:
        self.labels, self.right = labels, right
        share = (label_counts(labels)[1] + 1) / (labels.shape[0] + 2)
        self.frequency = torch.logit(share).float() - 1.5
        self.noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 1.7

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        k = self.labels.shape[1]
        # The same numbers again and again, each time from another place on, as drawing takes longer than the rest.
        at = (torch.arange(len(index)) * k + int(index[0]) * 7919) % (len(self.noise) - k)
        logits = self.noise.unfold(0, k, 1)[at] + self.frequency
        row, label_class, _ = stored_places(self.labels[index.numpy()])
        start, stop = (torch.from_numpy(self.labels.indptr[index.numpy() + i]).long() for i in (0, 1))
        place = torch.cat([torch.arange(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)])
        logits[row, label_class] += 9.0 * torch.from_numpy(self.right)[place]
        return logits


def judge_drawn(state: BalanceMix, right: np.ndarray) -> None:
    """As after `judge`: the wrong labels, a tenth of the others and a missing label for each 10 positive ones."""
    rng = np.random.default_rng(1)
    n, k = state.labels.shape
    instance, label_class, _ = stored_places(state.labels)
    doubted = torch.from_numpy(~right | (rng.random(len(right)) < 0.1))
    missing = len(right) // 10
    instance = torch.cat([instance[doubted].int(), torch.from_numpy(np.sort(rng.integers(n, size=missing))).int()])
    label_class = torch.cat([label_class[doubted].int(), torch.from_numpy(rng.integers(k, size=missing)).int()])
    p_clean = torch.rand(len(instance)).half() / 2
    state._remember(instance, label_class, p_clean, torch.full_like(p_clean, 0.5), torch.rand(len(instance)))
    state.loss_histogram = LossHistogram(k)
    state.mixtures = LossMixtures.fit_histogram(state.loss_histogram, "dividemix")
    state.noise_rates = NoiseRates(torch.full((3, k), 0.2), torch.full((3, k), 0.001))


def one_epoch(state: BalanceMix, logits: Logits, batch: int, scan_share: float, step_share: float) -> dict[str, float]:
    """Seconds of each part on this rank; of the scan and of the steps only a share."""
    clock, (n, _), (rank, num_ranks) = Clock(), state.labels.shape, world()
    own = torch.arange(rank, n, num_ranks)
    for index in own[: int(scan_share * len(own))].split(batch):
        x = logits(index)
        with clock("scan: observe"):
            state.observe(index, x)
    state._observed().num_observed = len(own)
    with clock("scan: end_epoch"):
        state.end_epoch(1)
    with clock("sampler's keys"):
        sampler = PairSampler(n, 0, lambda: state.weights)
        pairs = np.fromiter((value for key in sampler for value in (key.random, key.minority)), np.int32, 2 * n)
    pairs = torch.from_numpy(pairs.reshape(n, 2)[rank::num_ranks])
    for part in pairs[: int(step_share * len(pairs))].long().split(batch):
        with clock("steps: labels of both batches"):
            labels = [label_rows(state.labels, index).float() for index in part.T]
        with clock("steps: refine and mix"):
            refined = [state.refine(index, given) for index, given in zip(part.T, labels, strict=True)]
            state.mix_labels(*refined, torch.full((len(part),), 0.7))
    return dict(clock.seconds)


def resident(peak: bool) -> float:
    """MB of memory of this process, now or at most so far."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--instances", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--positives", type=int, default=8, help="Drawn for an instance; a class twice counts once.")
    parser.add_argument("--judge", choices=["network", "cross_fit"], default="network")
    parser.add_argument("--max_missing", type=float, help="0: as printed, with a table of all labels.")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--scan_share", type=float, default=1.0, help="Of the scan that is measured.")
    parser.add_argument("--step_share", type=float, default=1.0, help="Of the steps that is measured.")
    parser.add_argument("--judge_features", type=int, default=0, help="Measure the judging by N x D features instead.")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = BalanceMixSettings(judge=args.judge, max_missing=args.max_missing, label_warmup_epochs=1)
    before = resident(peak=False)

    labels, right = draw_labels(args.instances, args.classes, args.positives)
    state = BalanceMix(labels, settings)
    if args.judge_features:
        features = torch.randn(args.instances, args.judge_features, generator=torch.Generator().manual_seed(0))
        clock = Clock()
        with clock("judge"):
            state.judge(features)
        seconds = clock.seconds
    else:
        if args.judge == "cross_fit":
            judge_drawn(state, right)
        seconds = one_epoch(state, Logits(labels, right), args.batch, args.scan_share, args.step_share)
    rank, num_ranks = world()
    peak = resident(peak=True) - before
    if rank == 0:
        saved = state.state_dict()
        of_entries = sum(value.nbytes for name, value in saved.items() if name.startswith("entries."))
        rows = [
            ["instances x classes, ranks", f"{args.instances:,} x {args.classes:,}, {num_ranks}"],
            ["positive labels", f"{labels.nnz:,}"],
            ["labels remembered", f"{len(state.entries):,}"],
            ["peak memory of a rank, over the imports (MB)", f"{peak:,.0f}"],
            *([name, f"{value:,.1f} s"] for name, value in seconds.items()),
            ["share of the scan, and of the steps", f"{args.scan_share}, {args.step_share}"],
            ["together", f"{sum(seconds.values()):,.1f} s"],
            ["checkpoint: of the labels remembered, each (bytes)", f"{of_entries / max(len(state.entries), 1):.2f}"],
            ["checkpoint: all of the method's state (MB)", f"{sum(x.nbytes for x in saved.values()) / MB:,.1f}"],
        ]
        print(markdown_table([[args.judge, "measured"], *rows]))
    leave_process_group()


if __name__ == "__main__":
    main()
