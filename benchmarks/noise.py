"""Noise on the labels of 82,081 images and 80 classes (COCO train2014): vectorised against a plain Python loop.

    python benchmarks/noise.py

Takes COCO's own labels from $BALANCEMIX_DATA (default ../shared/data) and, where that is absent, made-up ones of the
same size and imbalance. The loop goes through the labels with `random.random()`, as one would write it. In a further
run, not timed, it takes this package's draws instead and has to give the same labels. `map` is `datasets.Dataset.map`
in one process, with its reading and writing. Times are the best of three, of one for the loop.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_balancemix.data.noise import LabelNoise, Mislabel, RandomFlip, SinglePositive, id_words
from hf_balancemix.report import results_table

ROWS, CLASSES, RATE = 82_081, 80, 0.4
DATA = Path(os.environ.get("BALANCEMIX_DATA", Path(__file__).parents[1] / "../shared/data"))
Labels = list[list[int]]
Draw = Callable[[str, int, int], float]  # of the purpose, the row and the class


def real_or_synthetic() -> tuple[np.ndarray, np.ndarray, str]:
    """(N, K) labels, (N,) ids, and where they are from."""
    file = DATA / "coco_labels" / "coco_multihot.npz"
    if file.is_file():
        with np.load(file) as archive:
            return archive["train2014_labels"], archive["train2014_ids"], "COCO train2014"
    rng = np.random.default_rng(0)
    share = np.geomspace(0.3, 0.3 / 353, CLASSES)  # COCO's ratio of the commonest class to the rarest
    return (rng.random((ROWS, CLASSES)) < share).astype(np.uint8), np.arange(ROWS), "synthetic"


def mislabel_loop(labels: Labels, counts: list[int], draw: Draw) -> Labels:
    noisy = []
    for n, row in enumerate(labels):
        weights = [0 if label else count for label, count in zip(row, counts, strict=True)]
        cumulative, new, arrivals = list(accumulate(weights)), row[:], []
        for i, label in enumerate(row):
            if label and draw("move", n, i) < RATE and cumulative[-1]:
                point = int(draw("target", n, i) * cumulative[-1])
                arrivals.append(next(j for j, end in enumerate(cumulative) if end > point))
                new[i] = 0
        for j in arrivals:
            new[j] = 1
        noisy.append(new)
    return noisy


def flip_loop(labels: Labels, counts: list[int], draw: Draw) -> Labels:
    return [
        [1 - label if draw("flip", n, k) < RATE else label for k, label in enumerate(row)]
        for n, row in enumerate(labels)
    ]


def single_positive_loop(labels: Labels, counts: list[int], draw: Draw) -> Labels:
    noisy = []
    for n, row in enumerate(labels):
        positives = [k for k, label in enumerate(row) if label]
        kept = positives[int(draw("keep", n, 0) * len(positives))] if positives else -1
        noisy.append([int(k == kept) for k in range(len(row))])
    return noisy


def seconds(function: Callable[[], Any], times: int = 1) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def measure(noise: LabelNoise, loop: Callable[..., Labels], labels: np.ndarray, dataset: datasets.Dataset) -> dict:
    ids = dataset["image_id"][:]
    noise.fit(dataset)
    rows, counts = labels.tolist(), labels.sum(0).tolist()

    words = id_words(ids)[:, None]
    draws = {key: noise._uniform(key, words, np.arange(CLASSES)) for key in ("move", "target", "flip", "keep")}
    same = loop(rows, counts, lambda purpose, n, k: draws[purpose][n, k])
    if not np.array_equal(noise.apply(labels, ids), same):
        raise RuntimeError(f"{noise!r}: the loop and the vectorised noise give different labels.")

    vectorised = seconds(lambda: noise.apply(labels, ids), 3)
    plain = seconds(lambda: loop(rows, counts, lambda *_: random.random()))
    with tempfile.TemporaryDirectory() as folder:

        def run_map() -> None:
            file = f"{folder}/{time.monotonic_ns()}.arrow"
            dataset.map(noise, batched=True, features=noise.features, load_from_cache_file=False, cache_file_name=file)

        mapped = seconds(run_map, 3)
    return {"apply": vectorised, "map": mapped, "loop": plain, "ratio": plain / vectorised}


def main() -> None:
    datasets.disable_progress_bars()
    labels, ids, source = real_or_synthetic()
    names = datasets.List(datasets.ClassLabel(names=[f"class {k}" for k in range(CLASSES)]))
    dataset = datasets.Dataset.from_dict(
        {"labels": [np.flatnonzero(row).tolist() for row in labels], "image_id": ids.tolist()},
        features=datasets.Features(labels=names, image_id=datasets.Value("int64")),
    )
    results = {
        f"{type(noise).__name__}": measure(noise, loop, labels, dataset)
        for noise, loop in (
            (Mislabel(RATE), mislabel_loop),
            (RandomFlip(RATE), flip_loop),
            (SinglePositive(), single_positive_loop),
        )
    }
    print(f"{len(labels):,} x {CLASSES} labels ({source}), {labels.sum():,} positive, seconds:\n")
    columns = {"apply": "vectorised", "map": "map", "loop": "plain loop"}
    print(results_table(results, columns, extra={"ratio": "loop / vectorised"}))


if __name__ == "__main__":
    main()
