"""All 2K loss mixtures at once, from histograms, against scikit-learn's GaussianMixture in a loop over the 2K sets.

    python benchmarks/loss_mixtures.py [--num_instances 82000] [--num_classes 80] [--rounds 3]

One thread, CPU seconds, both arms in one process, alternating (ours five times, their mean, then scikit-learn's
once); a ratio is the median of the rounds' ratios [smallest-largest]. Both arms start from the same parameters and
stop by the same rule; finding scikit-learn's start is not counted, nor is its k-means, which the given start replaces.
Losses are simulated: a model that is nearly calibrated on the noisy labels of long-tailed classes like MS-COCO's. Last
in the main table is a case that bins cannot resolve: without noise of the model, the losses pile up in a peak that is
narrower than a bin.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from hf_balancemix.core.loss_histogram import LossHistogram, bin_edges
from hf_balancemix.core.loss_mixture import MIXTURE_PRESETS, LossMixtures, MixtureSettings
from hf_balancemix.report import markdown_table

NOISES = ("clean", "mislabel40", "flip40")
SMALL = ((100, 1), (1_000, 1), (10_000, 1), (100, 80), (1_000, 80), (10_000, 80))


def simulate(
    noise: str, num_instances: int, num_classes: int, model_noise: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `(N, K)` float32 and given labels `(N, K)` bool; `model_noise` is the deviation of the logits' error."""
    rng = np.random.default_rng(0)
    shape = (num_instances, num_classes)
    prior = np.geomspace(0.5, 0.0016, num_classes)  # COCO: 45,000 to 130 positives in 82,000 images
    clean = rng.random(shape) < prior
    separation = rng.uniform(2, 5, num_classes)
    evidence = rng.standard_normal(shape) + separation * clean
    p = 1 / (1 + np.exp(-(np.log(prior / (1 - prior)) + separation * evidence - separation**2 / 2)))
    given = clean
    if noise == "flip40":
        given = clean ^ (rng.random(shape) < 0.4)
        p = 0.6 * p + 0.4 * (1 - p)
    elif noise == "mislabel40":  # 40 % of the positive labels move to another image, where the class is absent
        added = np.minimum(0.4 * prior / (1 - prior), 1)
        given = np.where(clean, rng.random(shape) >= 0.4, rng.random(shape) < added)
        p = 0.6 * p + added * (1 - p)
    p = np.clip(p, 1e-9, 1 - 1e-9)
    logits = np.log(p / (1 - p)) + model_noise * rng.standard_normal(shape)
    losses = np.logaddexp(0, np.where(given, -logits, logits))
    return torch.tensor(losses, dtype=torch.float32), torch.tensor(given)


def each_set(losses: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(polarity, class, which rows) of the 2K sets."""
    for k in range(losses.shape[1]):
        for polarity in (0, 1):
            yield polarity, k, labels[:, k] == bool(polarity)


def two_means(values: np.ndarray) -> list[np.ndarray] | None:
    """The best split in two at an edge between two bins: where both arms start."""
    x = np.sort(values).astype(np.float64)
    cuts = np.unique(np.searchsorted(x, bin_edges()[:-1].numpy()))  # the last bin has no end
    cuts = cuts[(cuts > 0) & (cuts < len(x))]
    if len(x) < 5 or len(cuts) == 0:
        return None  # no mixture: see LossMixtures.separated
    between = (np.cumsum(x)[cuts - 1] - cuts * x.mean()) ** 2 / (cuts * (len(x) - cuts))
    cut = cuts[between.argmax()]
    return [x[:cut], x[cut:]]


def start(parts: list[np.ndarray], reg_covar: float) -> dict:
    """scikit-learn's arguments for the M step after `two_means`."""
    total = sum(map(len, parts))
    return {
        "weights_init": [len(part) / total for part in parts],
        "means_init": [[part.mean()] for part in parts],
        "precisions_init": [[[1 / (part.var() + reg_covar)]] for part in parts],
    }


class Arms:
    """The two arms on one loss matrix."""

    def __init__(self, losses: torch.Tensor, labels: torch.Tensor) -> None:
        self.losses, self.labels = losses, labels
        self.x, self.t = losses.numpy(), labels.numpy()
        self.ours(MIXTURE_PRESETS["sklearn"])  # warm up
        self.parts = [two_means(self.x[rows, k]) for _, k, rows in each_set(self.x, self.t)]

    def ours(self, settings: MixtureSettings, repeats: int = 5) -> tuple[LossMixtures, float, float]:
        """The mixtures, the CPU seconds of counting, and of the fit: means, as they are too short to time once."""
        counting = fitting = 0.0
        for _ in range(repeats):
            begin = time.process_time()
            histogram = LossHistogram(self.losses.shape[1])
            histogram.update(self.losses, self.labels)
            counted = time.process_time()
            mixtures = LossMixtures.fit_histogram(histogram, settings)
            fitting += time.process_time() - counted
            counting += counted - begin
        return mixtures, counting / repeats, fitting / repeats

    def sklearn(self, settings: MixtureSettings, bar: tqdm) -> tuple[list[GaussianMixture | None], float]:
        """The mixtures, and the CPU seconds of the loop over the sets."""
        seconds, mixtures = 0.0, []
        for (_, k, rows), parts in zip(each_set(self.x, self.t), self.parts, strict=True):
            mixture = None
            if parts is not None:
                mixture = GaussianMixture(
                    2,
                    max_iter=settings.max_iter,
                    tol=settings.tol,
                    reg_covar=settings.reg_covar,
                    **start(parts, settings.reg_covar),
                )
                begin = time.process_time()
                mixture.fit(self.x[rows, k].astype(np.float64)[:, None])
                seconds += time.process_time() - begin
            mixtures.append(mixture)
            bar.update()
        return mixtures, seconds

    def compare(self, ours: LossMixtures, sklearn: list[GaussianMixture | None]) -> tuple[float, float, int]:
        """Share of labels with the same p > 0.5, largest difference of a posterior, sets that stopped elsewhere."""
        p = ours.clean_probability(self.losses, self.labels, monotone=False).numpy()
        same, labels, largest, stopped = 0, 0, 0.0, 0
        for (polarity, k, rows), theirs in zip(each_set(self.x, self.t), sklearn, strict=True):
            if theirs is None or not ours.separated[polarity, k]:
                continue
            q = theirs.predict_proba(self.x[rows, k].astype(np.float64)[:, None])
            q = q[:, theirs.means_[:, 0].argmin()]
            same += ((q > 0.5) == (p[rows, k] > 0.5)).sum()
            labels += len(q)
            largest = max(largest, np.abs(q - p[rows, k]).max())
            stopped += int(ours.num_iter[polarity, k]) != theirs.n_iter_
        return same / max(labels, 1), largest, stopped


@dataclass
class Row:
    """What was measured for one loss matrix and one preset."""

    whole: list[float] = field(default_factory=list)
    fit: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def add(self, counting: float, fitting: float, sklearn: float) -> None:
        self.whole.append(sklearn / (counting + fitting))
        self.fit.append(sklearn / fitting)
        self.milliseconds.append(1000 * (counting + fitting))


def ratio(values: list[float]) -> str:
    digits = 1 if min(values) < 10 else 0
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle}x [{low}-{high}]"


def fixed(settings: MixtureSettings) -> MixtureSettings:
    """The same with a fixed number of iterations."""
    return replace(settings, max_iter=min(settings.max_iter, 40), tol=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_instances", type=int, default=82_000, help="N of the main table")
    parser.add_argument("--num_classes", type=int, default=80, help="K of the main table")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of iterations is asked for

    shape = (args.num_instances, args.num_classes)
    num_sets = 2 * args.num_classes
    steps = num_sets * (len(NOISES) * len(MIXTURE_PRESETS) * (args.rounds + 1) + len(MIXTURE_PRESETS) * 2)
    steps += sum(2 * num_classes for _, num_classes in SMALL) * len(MIXTURE_PRESETS) * args.rounds
    bar = tqdm(total=steps, unit="sklearn fit", mininterval=1)

    heading = ["losses", "preset", "faster, counting + fit", "faster, fit alone", "ours, ms"]
    heading += ["same p > 0.5, with tolerance", "sets that stop elsewhere", "max difference of p, fixed iterations"]
    main_table = [heading]
    for noise in (*NOISES, "flip40, no model noise"):
        timed = noise in NOISES
        arms = Arms(*simulate(noise.split(",")[0], *shape, model_noise=0.3 if timed else 0.0))
        rows = {preset: Row() for preset in MIXTURE_PRESETS}
        agreement = {}
        for round_ in range(args.rounds if timed else 1):
            for preset, settings in MIXTURE_PRESETS.items():
                mixtures, *own = arms.ours(settings)
                theirs, seconds = arms.sklearn(settings, bar)
                rows[preset].add(*own, seconds)
                if round_ == 0:
                    agreement[preset] = arms.compare(mixtures, theirs)
        for preset, settings in MIXTURE_PRESETS.items():
            same, _, stopped = agreement[preset]
            mixtures, *_ = arms.ours(fixed(settings))
            _, largest, _ = arms.compare(mixtures, arms.sklearn(fixed(settings), bar)[0])
            row = rows[preset]
            speed = [ratio(row.whole), ratio(row.fit), f"{statistics.median(row.milliseconds):.0f}"]
            agrees = [f"{100 * same:.4f} %", f"{stopped} of {num_sets}"]
            agrees += [f"{largest:.1e} ({fixed(settings).max_iter} iterations)"]
            main_table.append([noise, preset, *(speed if timed else "---"), *agrees])

    small_table = [["N", "K", "preset", "faster, counting + fit"]]
    for num_instances, num_classes in SMALL:
        arms = Arms(*simulate("mislabel40", num_instances, num_classes))
        rows = {preset: Row() for preset in MIXTURE_PRESETS}
        for _ in range(args.rounds):
            for preset, settings in MIXTURE_PRESETS.items():
                _, *own = arms.ours(settings)
                _, seconds = arms.sklearn(settings, bar)
                rows[preset].add(*own, seconds)
        for preset, row in rows.items():
            small_table.append([f"{num_instances:,}", f"{num_classes}", preset, ratio(row.whole)])
    bar.close()
    print(f"N = {shape[0]:,}, K = {shape[1]}, {num_sets} sets, {args.rounds} rounds, one thread\n")
    print(markdown_table(main_table, num_left=len(main_table[0]), pad=False))
    print("\nWhere it gains little (mislabel40):\n")
    print(markdown_table(small_table, num_left=len(small_table[0]), pad=False))


if __name__ == "__main__":
    main()
