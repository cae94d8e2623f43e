"""Variants of BalanceMix side by side, paired by seed: what raises mAP under noise, of rare classes too, and what not.

    python benchmarks/variants.py --data_dir VOC2012_SMALL --backbone_weights FILE [--noise mislabel-0.4] [--seeds 10]
    python benchmarks/variants.py --sample [--variants reference "score: uniform" ...]

A plain training loop on `hf_balancemix.core`, in which variants that the trainers do not offer are a line or two each.
The backbone is a frozen MobileNetV2, whose features of each image and of six RandAugment views of it are kept, and a
head of 256 hidden units is trained (AdamW 1e-3, 20 epochs, warm-up 5, batch 32); or, with --sample, a small ResNet is
trained from scratch on twelve kept views of the built-in sample (AdamW 4e-3, 32 epochs, warm-up 22). Runs with one
seed share noise, initial weights, order and lambdas. The table shows the difference to the first variant, with its
standard error over the seeds, in points of mAP; every run is a line of --out, and runs that are there are not done
again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import sem
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_balancemix import Mislabel, RandomFlip, SinglePositive, load_coco, load_model, load_voc, make_scenes
from hf_balancemix.core import (
    BalanceMixSettings,
    LossHistogram,
    LossMixtures,
    Reliability,
    binary_cross_entropy,
    effective_sample_size,
    instance_scores,
    label_losses,
    minority_mixup,
    mix_refined_labels,
    refine_labels,
    sampling_weights,
)
from hf_balancemix.core.sampling import confidence_sums, confidences_from_sums, systematic_resample
from hf_balancemix.data import ViewMaker, class_names, given_labels, label_matrix
from hf_balancemix.files import cache_folder
from hf_balancemix.frozen.cache import ROW_COLUMN, cache_features
from hf_balancemix.frozen.head import backbone_digest, pooled_features
from hf_balancemix.metrics import class_groups, mean_average_precision
from hf_balancemix.report import markdown_table

GROUPS = ("all", "many", "medium", "few")
NOISES: dict[str, Callable[[float, int], Any]] = {
    "mislabel": Mislabel,
    "flip": RandomFlip,
    "single": lambda rate, seed: SinglePositive(seed),
}


@dataclass(frozen=True)
class Variant:
    """What differs from the reference: the trainers' defaults, but as printed with two views predicted in each step
    and without a limit to the labels that may be missing.

    `settings` are those of the trainers; the rest is tried here only.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    method: str = "balancemix"
    """Or `"bce"`, `"mixup"`."""
    score: str | None = None
    """Sampling by `"class"`: an instance's weight is the sum over its positive labels of n_k^-power, with labels
    weighted by p_G and refined after the warm-up, n_k their sum; `"confidence"`: of P(k)^-power on these labels."""
    power: float = 1.0
    loss_average: float = 0.0
    """The mixtures see a moving average of the scans' losses."""
    prediction_average: float = 0.0
    """Eq. 9 takes the mean of the step's predictions and a moving average of the scans'."""
    weight_average: float = 0.0
    """A moving average of the weights predicts and is evaluated."""
    class_eps: float = 0.0
    """eps for setting to 1 is lowered for classes of low confidence: 0.5 + (eps - 0.5) (P(k) / max P)^class_eps."""
    pooled: float = 0.0
    """p_G of a positive label is n / (n + pooled) of its class's mixture, the rest one of all classes together."""
    boost: float = 0.0
    """Positive labels weigh (max n / n_k)^boost in the loss: rare classes without drawing them more often."""
    beside: float = 0.0
    """To a positive label's loss is added the largest negative one of its instance: a wrong label beside a missing."""
    agreed: str = ""
    """Labels that count as clean whatever p_G says: `"negative"`: negative ones with f < 0.5, `"both"`: also positive
    ones with f > 0.5, `"confidence"`: negative ones with f < P(k), the threshold of confident learning."""
    doubt: bool = False
    """Ambiguous negative labels weigh 1 - f where that is more than p_G."""
    lambda_per_batch: bool = False


VARIANTS: dict[str, Variant] = {
    "reference": Variant(),
    "bce": Variant(method="bce"),
    "mixup": Variant(method="mixup"),
    "reliability of the random instance": Variant({"partner_reliability": False}),
    "reliability of the random instance, predictions of the scan": Variant(
        {"partner_reliability": False, "prediction_source": "scan"}
    ),
    "score: uniform": Variant({"minority_score": "uniform"}),
    "score: positive": Variant({"minority_score": "positive"}),
    "score: class, power 0.25": Variant(score="class", power=0.25),
    "score: class, power 0.5": Variant(score="class", power=0.5),
    "score: class, power 1": Variant(score="class", power=1.0),
    "score: confidence, power 1": Variant(score="confidence"),
    "boost 0.25": Variant(boost=0.25),
    "boost 0.5": Variant(boost=0.5),
    "loss average 0.7": Variant(loss_average=0.7),
    "prediction average 0.7": Variant(prediction_average=0.7),
    "weight average 0.99": Variant(weight_average=0.99),
    "weight average 0.998": Variant(weight_average=0.998),
    "class eps": Variant(class_eps=1.0),
    "eps 0.9": Variant({"relabel_threshold": 0.9}),
    "eps 0.8": Variant({"relabel_threshold": 0.8}),
    "eps 0.85": Variant({"relabel_threshold": 0.85}),
    "eps 0.85, weight average 0.998": Variant({"relabel_threshold": 0.85}, weight_average=0.998),
    "eps 0.85, weight average 0.998, class power 0.25": Variant(
        {"relabel_threshold": 0.85}, weight_average=0.998, score="class", power=0.25
    ),
    "eps 0.85, weight average 0.998, loss beside 0.5": Variant(
        {"relabel_threshold": 0.85}, weight_average=0.998, beside=0.5
    ),
    "eps 0.85, weight average 0.998, loss beside 1": Variant(
        {"relabel_threshold": 0.85}, weight_average=0.998, beside=1.0
    ),
    "eps 0.85, weight average 0.998, loss beside 1, without ambiguous": Variant(
        {"relabel_threshold": 0.85, "ambiguous": False}, weight_average=0.998, beside=1.0
    ),
    "eps 0.85, weight average 0.998, without ambiguous": Variant(
        {"relabel_threshold": 0.85, "ambiguous": False}, weight_average=0.998
    ),
    "pooled mixtures": Variant(pooled=50.0),
    "loss beside 0.5": Variant(beside=0.5),
    "loss beside 1": Variant(beside=1.0),
    "mixtures: sklearn": Variant({"mixture_preset": "sklearn"}),
    "predictions of the scan": Variant({"prediction_source": "scan"}),
    "p_G at the views' losses": Variant({"clean_probability_source": "views"}),
    "lambda per batch": Variant(lambda_per_batch=True),
    "warm-up 3": Variant({"label_warmup_epochs": 3}),
    "warm-up 8": Variant({"label_warmup_epochs": 8}),
    "without re-labelling": Variant({"relabel": False}),
    "without ambiguous": Variant({"ambiguous": False}),
    "clean alone": Variant({"relabel": False, "ambiguous": False}),
    "minority sampler alone": Variant({"select_clean": False}),
    "trusting positives": Variant({"trust_positives": True}),
    "negatives below P(k) kept": Variant(agreed="confidence"),
    "negatives below P(k) kept, eps 0.9": Variant({"relabel_threshold": 0.9}, agreed="confidence"),
    "negatives below 0.5 kept": Variant(agreed="negative"),
    "negatives below 0.5 kept, eps 0.9": Variant({"relabel_threshold": 0.9}, agreed="negative"),
    "negatives below 0.5, positives above kept": Variant(agreed="both"),
    "negatives weigh 1 - f": Variant(doubt=True),
    "at most 0.25 n missing": Variant({"max_missing": 0.25}),
    "at most 0.5 n missing": Variant({"max_missing": 0.5}),
    "at most 1 n missing": Variant({"max_missing": 1.0}),
    "at most 0.25 n missing, eps 0.9": Variant({"max_missing": 0.25, "relabel_threshold": 0.9}),
    "at most 0.5 n missing, eps 0.9": Variant({"max_missing": 0.5, "relabel_threshold": 0.9}),
    "at most 0.5 n missing, eps 0.85, weight average 0.998, loss beside 0.5": Variant(
        {"max_missing": 0.5, "relabel_threshold": 0.85}, weight_average=0.998, beside=0.5
    ),
}


@dataclass
class Task:
    """Inputs of a small network for every instance, and how it is trained."""

    features: Tensor
    """`(M, D)`; the rows of an instance stand together: un-augmented first, then its views."""
    rows: Tensor
    """`(N,)` first row of each training instance."""
    evaluation: Tensor
    """`(N_eval, D)`."""
    train: datasets.Dataset
    labels: Tensor
    """`(N_eval, K)`."""
    groups: dict[str, np.ndarray]
    num_views: int
    network: Callable[[], nn.Module]
    learning_rate: float
    num_epochs: int
    usual: dict[str, Any]
    """Settings of BalanceMix."""

    def given(self, noise: str, seed: int) -> Tensor:
        """`(N, K)` training labels with the noise."""
        if noise == "clean":
            return given_labels(self.train)
        kind, _, rate = noise.partition("-")
        return given_labels(NOISES[kind](float(rate or 0), seed).add_to(self.train))


def _task(cache: str, backbone: Any, digest: str, train: Any, val: Any, views: ViewMaker, processor: Any,
          groups: tuple[int, int], num_views: int, **how: Any) -> Task:  # fmt: skip
    features, train, val = cache_features(
        cache, backbone, digest, train, val, views, processor.image_mean, processor.image_std, num_views=num_views
    )
    rows, val_rows = (torch.from_numpy(d.with_format("numpy")[ROW_COLUMN][:]).long() for d in (train, val))
    labels = given_labels(val)
    counts = (label_matrix(train) == 1).sum(0).numpy()
    counted = np.minimum(counts, (labels == 1).sum(0).numpy()) >= 10
    masks = {"all": counted} | {name: mask & counted for name, mask in class_groups(counts, *groups).items()}
    train = train.select_columns(["image_id", "labels"])
    features = features.clone()
    return Task(features, rows, features[val_rows], train, labels, masks, num_views, **how)


def voc_task(data_dir: str, weights: str, cache: str) -> Task:
    """A head on frozen features of VOC2012."""
    train, val = load_voc(data_dir, "2012", "train"), load_voc(data_dir, "2012", "val")
    names = class_names(train)
    model, processor = load_model("mobilenetv2_100", names, image_size=128, backbone_weights=weights)
    return _task(
        cache, pooled_features(model), backbone_digest(model), train, val,
        ViewMaker(128, 0, resample=int(processor.resample)), processor, (400, 150), 6,
        network=lambda: nn.Sequential(nn.Linear(1280, 256), nn.ReLU(), nn.Linear(256, len(names))),
        learning_rate=1e-3, num_epochs=20, usual={"label_warmup_epochs": 5, "mixup_alpha": 4.0},
    )  # fmt: skip


def sample_task(cache: str) -> Task:
    """The demo's network, from scratch, on the pixels of the built-in sample."""
    train, val = load_coco(make_scenes(), split="train"), load_coco(make_scenes(), split="val")
    widths = {"channels": [24, 48, 96, 192], "stem_width": 16}

    def load() -> tuple[Any, Any]:
        return load_model("resnet10t", class_names(train), image_size=48, pretrained=False, model_kwargs=widths)

    class OnPixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load()[0].timm_model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.view(-1, 3, 48, 48).contiguous(memory_format=torch.channels_last))

    processor = load()[1]
    return _task(
        cache, lambda images: images.flatten(1), "pixels", train, val,
        ViewMaker(48, 0, resample=int(processor.resample)), processor, (300, 150), 12,
        network=lambda: OnPixels().to(memory_format=torch.channels_last), learning_rate=4e-3, num_epochs=32,
        usual={"label_warmup_epochs": 22, "mixup_alpha": 0.2},
    )  # fmt: skip


def sampling(
    variant: Variant, s: BalanceMixSettings, y: Tensor, p_clean: Tensor, f: Tensor, P: Tensor, A: Tensor
) -> Tensor:
    """`(N,)` sampling probabilities: Eq. 3-4, or the variant's own on refined labels."""
    if variant.score is None:
        return sampling_weights(instance_scores(y, P, A, s.minority_score))
    p_clean, f, t, eps = p_clean.double(), f.double(), (y == 1).double(), s.relabel_threshold
    doubtful = torch.where(f > eps, 1.0, torch.where(f < 1 - eps, 0.0, t * p_clean))
    t = torch.where(p_clean > 0.5, t, doubtful)
    n = t.sum(0)
    if variant.score == "class":
        value = torch.where(n > 0, n.clamp(min=1e-9), torch.inf)
    else:
        value = ((f * t).sum(0) / n.clamp(min=1e-9)).clamp(min=1e-2)
    weights = t @ value**-variant.power
    weights = weights + 1e-3 * weights.mean() + 1e-12
    return weights / weights.sum()


def p_clean_of(variant: Variant, s: BalanceMixSettings, losses: Tensor, y: Tensor) -> tuple[Tensor, LossMixtures]:
    """`(N, K)` p_G of every label, and the mixtures."""

    def fit(losses: Tensor, labels: Tensor) -> tuple[Tensor, LossMixtures, LossHistogram]:
        histogram = LossHistogram(losses.shape[1])
        histogram.update(losses, labels)
        mixtures = LossMixtures.fit_histogram(histogram, s.mixture_preset)
        return mixtures.clean_probability(losses, labels, monotone=s.monotone), mixtures, histogram

    positive = y == 1
    if variant.beside:
        worst = losses.masked_fill(positive, 0).amax(1, keepdim=True)
        losses = torch.where(positive, losses + variant.beside * worst, losses)
    p, mixtures, histogram = fit(losses, y)
    if variant.pooled:
        of_positives = losses[positive][:, None]
        pool = fit(of_positives, torch.ones_like(of_positives))[1]
        pooled = pool.clean_probability(losses.reshape(-1, 1), torch.ones(losses.numel(), 1)).view_as(p)
        share = (n := positive.sum(0).float()) / (n + variant.pooled)
        p = torch.where(positive, share * p + (1 - share) * pooled, p)
    if s.max_missing:
        threshold = histogram.threshold_of_largest(0, s.max_missing * positive.sum(0).double())
        p = p.masked_fill(~positive & (losses < threshold), 1.0)
    return p, mixtures


def run(task: Task, variant: Variant, y: Tensor, noise: str, seed: int) -> dict[str, float]:
    """One training run on the given labels `y`: mAP by class group, and what became of the positive labels."""
    (N, K), given = y.shape, y.float()
    settings = task.usual | {"judge": "network", "prediction_source": "views", "max_missing": 0.0}
    settings |= {"trust_positives": noise in ("clean", "single")}
    settings |= {"relabel_threshold": 0.55} if noise == "single" else {}
    s = BalanceMixSettings(**settings | variant.settings)
    torch.manual_seed(seed)
    network = task.network()
    g = torch.Generator().manual_seed(1000 + seed)
    batch = 32
    steps = math.ceil(N / batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=task.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * task.num_epochs)
    average = copy.deepcopy(network).requires_grad_(False) if variant.weight_average else None
    predictor = network if average is None else average
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    p_clean, f, mixtures, boost, eps = torch.ones(N, K), torch.zeros(N, K), None, torch.ones(K), torch.ones(K)
    mean_loss, mean_f, norm = torch.zeros(N, K), None, 0.0

    def predict(inputs: Tensor) -> Tensor:
        predictor.eval()
        with torch.no_grad():
            logits = torch.cat([predictor(part) for part in inputs.split(2048)])
        predictor.train()
        return logits

    def views(index: Tensor, two: bool) -> tuple[Tensor, ...]:
        first = torch.randint(task.num_views, (len(index),), generator=g)
        other = (first + 1 + torch.randint(task.num_views - 1, (len(index),), generator=g)) % task.num_views
        rows = task.rows[index] + 1
        return (task.features[rows + first], *((task.features[rows + other],) if two else ()))

    def refine(index: Tensor, q: Tensor) -> Any:
        p = p_clean[index]
        if s.clean_probability_source == "views":
            p = mixtures.clean_probability(label_losses(torch.logit(q, 1e-6), y[index]), y[index])
        if variant.agreed:
            agrees = (y[index] == 0) & (q < (P if variant.agreed == "confidence" else 0.5))
            if variant.agreed == "both":
                agrees |= (y[index] == 1) & (q > 0.5)
            p = p.masked_fill(agrees, 1.0)
        refined = refine_labels(
            given[index], p, q, s.relabel_threshold, relabel=s.relabel, ambiguous=s.ambiguous,
            trust_positives=s.trust_positives,
        )  # fmt: skip
        if variant.doubt:
            doubtful = (refined.reliability == Reliability.AMBIGUOUS.value) & (y[index] == 0)
            refined = refined._replace(
                weight=torch.where(doubtful, torch.maximum(refined.weight, 1 - q), refined.weight)
            )
        if variant.class_eps:
            extra = (refined.reliability == Reliability.AMBIGUOUS.value) & (q > eps)
            refined = refined._replace(
                labels=refined.labels.masked_fill(extra, 1), weight=refined.weight.masked_fill(extra, 1)
            )
        return refined

    for epoch in range(task.num_epochs):
        manages = variant.method == "balancemix" and s.manages_labels(epoch)
        if variant.method == "balancemix" and epoch > 0:
            logits = predict(task.features[task.rows])
            f, losses = logits.sigmoid(), label_losses(logits, y)
            P, A = confidences_from_sums(*confidence_sums(f, y))
            if variant.loss_average:
                keep = variant.loss_average
                mean_loss, norm = keep * mean_loss + (1 - keep) * losses, keep * norm + 1 - keep
                losses = mean_loss / norm
            if variant.prediction_average:
                mean_f = f if mean_f is None else torch.lerp(f, mean_f, variant.prediction_average)
                f = mean_f
            if s.select_clean:
                p_clean, mixtures = p_clean_of(variant, s, losses, y)
            of_positives = (y == 1) * (p_clean if manages else torch.ones_like(p_clean))
            boost = ((n := of_positives.sum(0).clamp(min=1)).max() / n) ** variant.boost
            confidence = (f * of_positives).sum(0) / of_positives.sum(0).clamp(min=1e-6)
            eps = 0.5 + (s.relabel_threshold - 0.5) * (confidence / confidence.max()) ** variant.class_eps
            trusted = p_clean if manages else torch.ones_like(p_clean)
            weights = sampling(variant, s, y, trusted, f, P, A)
        order = torch.randperm(N, generator=g)
        uniform = variant.method != "balancemix"
        partners = torch.randperm(N, generator=g) if uniform else systematic_resample(weights, N, g)
        lam = torch.distributions.Beta(s.mixup_alpha, s.mixup_alpha).sample((N,))
        lam = torch.maximum(lam, 1 - lam)
        if variant.lambda_per_batch:
            lam = lam[torch.arange(N) // batch * batch]
        for r, m, part in zip(order.split(batch), partners.split(batch), lam.split(batch), strict=True):
            in_steps = manages and s.prediction_source == "views"
            x, t, w = views(r, in_steps), given[r], None
            images = x[0]
            if variant.method != "bce":
                other = views(m, in_steps)
                images, t = minority_mixup(x[0], other[0], t, given[m], part)
                if manages:
                    if in_steps:
                        q = predict(torch.cat([*x, *other])).sigmoid().chunk(4)
                        q_r, q_m = (q[0] + q[1]) / 2, (q[2] + q[3]) / 2
                        if variant.prediction_average:
                            q_r, q_m = (q_r + f[r]) / 2, (q_m + f[m]) / 2
                    else:
                        q_r, q_m = f[r], f[m]
                    t, w = mix_refined_labels(refine(r, q_r), refine(m, q_m), part, s.partner_reliability)
            if variant.boost:
                raised = 1 + t * (boost - 1)
                w = raised if w is None else w * raised
            loss = binary_cross_entropy(network(images), t, w, "sum")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if average is not None:
                done = epoch * steps
                keep = min(variant.weight_average, (1 + done) / (10 + done))
                for one, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                    one.copy_(torch.lerp(new, one, keep) if one.is_floating_point() else new)

    ap = mean_average_precision(predict(task.evaluation).numpy(), task.labels.numpy())["per_class_ap"]
    figures = {name: float(np.nanmean(ap[mask])) for name, mask in task.groups.items() if mask.any()}
    figures["sampler_effective_size"] = effective_sample_size(weights)
    if s.select_clean and variant.method == "balancemix":
        few, right = torch.from_numpy(task.groups["few"]), label_matrix(task.train) == 1
        positive, kept = (y == 1)[:, few], ((y == 1) & (p_clean > 0.5))[:, few]
        figures["few_precision"] = ((kept & right[:, few]).sum() / kept.sum().clamp(min=1)).item()
        figures["few_recall"] = ((kept & right[:, few]).sum() / (positive & right[:, few]).sum().clamp(min=1)).item()
    return figures


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mAP of each variant, and its difference to the first one."""
    reference = next(iter(results.values()))
    groups = [group for group in GROUPS if group in reference[0]]
    rows = [["variant", *groups, "few: precision / recall of clean", "ESS"]]
    for name, runs in results.items():
        cells = []
        for group in groups:
            value = 100 * np.array([run[group] for run in runs])
            apart = value - 100 * np.array([run[group] for run in reference[: len(runs)]])
            error = sem(apart) if len(apart) > 1 else 0.0
            difference = "" if runs is reference else f" ({apart.mean():+.2f} ± {error:.2f})"
            cells.append(f"{value.mean():.2f}{difference}")
        kept = [np.mean([run[k] for run in runs]) for k in ("few_precision", "few_recall") if k in runs[0]]
        cells.append(" / ".join(f"{100 * k:.0f}" for k in kept) or "-")
        cells.append(f"{np.mean([run['sampler_effective_size'] for run in runs]):.2f}")
        rows.append([name, *cells])
    return markdown_table(rows, pad=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--data_dir")
    parser.add_argument("--backbone_weights")
    parser.add_argument("--noise", default="mislabel-0.4", help="such as mislabel-0.4, flip-0.2, single, clean")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--cache_dir", default=str(cache_folder() / "features"))
    parser.add_argument("--out", type=Path, default=Path("outputs/variants.jsonl"))
    asked = parser.parse_args(argv)
    if not asked.sample and not (asked.data_dir and asked.backbone_weights):
        parser.error("pass --data_dir (with VOCdevkit/VOC2012) and --backbone_weights (MobileNetV2's), or --sample")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    task = (
        sample_task(asked.cache_dir)
        if asked.sample
        else voc_task(asked.data_dir, asked.backbone_weights, asked.cache_dir)
    )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    key = "sample" if asked.sample else "voc2012"
    lines = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.is_file() else []
    done = {(x["data"], x["noise"], x["variant"], x["seed"]): x for x in lines}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in asked.variants}
    for seed in tqdm(range(asked.seeds), unit="seed", dynamic_ncols=True, mininterval=10):
        y = task.given(asked.noise, seed)
        for name in asked.variants:
            where = (key, asked.noise, name, seed)
            if where not in done:
                figures = run(task, VARIANTS[name], y, asked.noise, seed)
                done[where] = dict(zip(("data", "noise", "variant", "seed"), where, strict=True)) | figures
                with asked.out.open("a") as stream:
                    stream.write(json.dumps(done[where]) + "\n")
            results[name].append(done[where])
    print(table(results))


if __name__ == "__main__":
    main()
