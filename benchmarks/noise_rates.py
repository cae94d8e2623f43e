"""How much is wrong: estimators of the shares of wrong and missing labels, against noise that is known.

    python benchmarks/noise_rates.py --data_dir VOC2012_SMALL --backbone_weights FILE [--seeds 3]

Linear heads predict the given labels of VOC2012 out of fold, on features of a frozen backbone, un-augmented. From the
same predictions each estimator says for each class which share of its given positive labels is wrong, and which of its
given negative ones. Of the classes with ten positive labels in both halves the table shows, over all seeds: the wrong
share of all given positives, as it is and as estimated; the mean error over the classes; the missing labels to each
given positive one, likewise; and in how many classes the truth lies in the interval.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_balancemix import Mislabel, RandomFlip, SinglePositive, load_model, load_voc
from hf_balancemix.core import estimate_noise_rates, out_of_fold_logits, principal_components
from hf_balancemix.data import ViewMaker, class_names, given_labels
from hf_balancemix.files import cache_folder
from hf_balancemix.frozen.cache import ROW_COLUMN, cache_features
from hf_balancemix.frozen.head import backbone_digest, pooled_features
from hf_balancemix.methods import estimate_transition_matrices
from hf_balancemix.report import markdown_table

Rates = tuple[Tensor, Tensor]
"""Wrong shares of given positives and of given negatives, each `(K,)`."""

NOISES: dict[str, Callable[[int], datasets.Dataset | None]] = {
    "clean": lambda seed: None,
    "mislabel 0.2": lambda seed: Mislabel(0.2, seed),
    "mislabel 0.4": lambda seed: Mislabel(0.4, seed),
    "flip 0.2": lambda seed: RandomFlip(0.2, seed),
    "flip 0.4": lambda seed: RandomFlip(0.4, seed),
    "single positive": lambda seed: SinglePositive(seed),
}


def of_transitions(t01: Tensor, t10: Tensor, labels: Tensor) -> Rates:
    """Both shares from P(given 1 | clean 0) and P(given 0 | clean 1)."""
    v = (labels == 1).double().mean(0)
    pi = ((v - t01) / (1 - t01 - t10).clamp(min=0.05)).clamp(0, 1)
    return ((1 - pi) * t01 / v).clamp(0, 1), (pi * t10 / (1 - v)).clamp(0, 1)


def anchors(logits: Tensor, labels: Tensor) -> Rates:
    """As `estimate_noise_rates` without drawing rare classes to the others."""
    t01, t10 = torch.zeros(labels.shape[1]).double(), torch.zeros(labels.shape[1]).double()
    for k, order in enumerate(logits.argsort(0, descending=True).T):
        given = labels[order, k] == 1
        t10[k] = (~given[: max(int(given.sum()) // 10, 5)]).double().mean()
        t01[k] = given[len(given) // 2 :].double().mean()
    return of_transitions(t01, t10, labels)


def confident_joint(logits: Tensor, labels: Tensor) -> Rates:
    """Confident learning (Northcutt et al., 2021) for each class as two classes: thresholds are mean confidences."""
    p, wrong, missing = logits.sigmoid(), [], []
    for k in range(labels.shape[1]):
        positive, q = labels[:, k] == 1, p[:, k]
        one, zero = q >= q[positive].mean(), q <= q[~positive].mean()
        wrong.append((positive & zero).sum() / (positive & (one | zero)).sum().clamp(min=1))
        missing.append((~positive & one).sum() / (~positive & (one | zero)).sum().clamp(min=1))
    return torch.stack(wrong).double(), torch.stack(missing).double()


def correlations(logits: Tensor, labels: Tensor) -> Rates:
    """The T-estimator's, on labels that the predictions agree with."""
    selected = (logits > 0) == (labels == 1)
    t = estimate_transition_matrices(labels, selected, logits.sigmoid())
    return of_transitions(t[:, 0, 1], t[:, 1, 0], labels)


def ours(logits: Tensor, labels: Tensor) -> Rates:
    rates = estimate_noise_rates(logits, labels)
    return rates.wrong[0], rates.missing[0]


ESTIMATORS = {
    "estimate_noise_rates": ours,
    "anchors alone": anchors,
    "confident joint": confident_joint,
    "label correlations": correlations,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="with VOCdevkit/VOC2012")
    parser.add_argument("--model_name_or_path", default="tf_efficientnet_lite0", help="a timm architecture")
    parser.add_argument("--backbone_weights", required=True)
    parser.add_argument("--image_size", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache_dir", default=str(cache_folder() / "features"))
    asked = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()

    train, val = load_voc(asked.data_dir, "2012", "train"), load_voc(asked.data_dir, "2012", "val")
    model, processor = load_model(
        asked.model_name_or_path, class_names(train), image_size=asked.image_size,
        backbone_weights=asked.backbone_weights,
    )  # fmt: skip
    views = ViewMaker(asked.image_size, 0, resample=int(processor.resample))
    features, cached, _ = cache_features(
        asked.cache_dir, pooled_features(model), backbone_digest(model), train, val, views, processor.image_mean,
        processor.image_std,
    )  # fmt: skip
    components = principal_components(features[torch.from_numpy(cached.with_format("numpy")[ROW_COLUMN][:]).long()])
    clean = given_labels(train)
    counted = ((clean == 1).sum(0) >= 10) & ((given_labels(val) == 1).sum(0) >= 10)

    rows = [["noise", "estimator", "wrong", "estimated", "error", "missing", "estimated", "error", "in the interval"]]
    for noise, make in tqdm(NOISES.items(), unit="noise", dynamic_ncols=True):
        figures: dict[str, list[list[float]]] = {name: [] for name in ESTIMATORS}
        for seed in range(asked.seeds):
            model_of_noise = make(seed)
            given = clean if model_of_noise is None else given_labels(model_of_noise.add_to(train))
            logits = out_of_fold_logits(components, (given == 1).float(), torch.ones(given.shape), seed=seed)
            positive, negative = (given == 1).double(), (given == 0).double()
            n, n0 = positive.sum(0), negative.sum(0)
            wrong = (positive * (clean == 0)).sum(0) / n.clamp(min=1)
            missing = (negative * (clean == 1)).sum(0) / n0.clamp(min=1)
            rates = estimate_noise_rates(logits, given)
            held = [
                ((rate[1] <= true) & (true <= rate[2]))[counted].double().mean().item()
                for rate, true in zip(rates, (wrong, missing), strict=True)
            ]
            for name, estimator in ESTIMATORS.items():
                line = []
                for estimate, true, count in zip(estimator(logits, given), (wrong, missing), (n, n0), strict=True):
                    by_class = (estimate - true).abs() * count / n.clamp(min=1)
                    line += [float((x * count)[counted].sum() / n[counted].sum()) for x in (true, estimate)]
                    line.append(by_class[counted].mean().item())
                figures[name].append([*line, np.mean(held) if estimator is ours else float("nan")])
        for name, lines in figures.items():
            mean = np.mean(lines, axis=0)
            rows.append(
                [noise, name, *(f"{x:.2f}" for x in mean[:-1]), "-" if np.isnan(mean[-1]) else f"{mean[-1]:.0%}"]
            )
    print(markdown_table(rows, pad=False))


if __name__ == "__main__":
    main()
