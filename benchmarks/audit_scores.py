"""Which labels are wrong: scores of a label side by side, by how well they find the labels that noise has changed.

    python -m benchmarks.audit_scores --dataset voc2012 --data_dir VOC2012_SMALL --backbone_weights FILE \\
        --many_shot 400 --few_shot 150 --min_positives 10

Noise is added to the labels of a data set (any that `benchmarks.paper` takes). Labels are judged out of fold on
features of a pretrained backbone; heads on these features, or all but the first --frozen_stages of the network, are
trained with BCE and with BalanceMix; and every score orders the given labels, all classes together, wrong positives
and missing labels apart. The tables show, over all seeds: average precision of finding the wrong ones; precision among
the first 1 % and 5 % of the labels of that polarity; the mean of the classes' own average precisions, by group; how
often labels of a score are wrong; and the estimated noise rates of the classes, by their number of positive labels.
Every run is a line of --out, and runs that are there are not done again.
cleanlab (https://github.com/cleanlab/cleanlab, `pip install cleanlab`) is what to beat.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from benchmarks.paper.cell import GridData, Setup, arguments_of
from benchmarks.paper.tables import Cell
from hf_balancemix.core import JudgedLabels, NoiseRates, judge_labels, principal_components, wrong_probability
from hf_balancemix.core.evaluation import evaluation_mode
from hf_balancemix.data import given_labels
from hf_balancemix.files import cache_folder
from hf_balancemix.methods.registry import trainer_for
from hf_balancemix.metrics import class_groups
from hf_balancemix.models.features import pooled_features_of
from hf_balancemix.report import markdown_table
from hf_balancemix.scripts.arguments import NoiseArguments
from hf_balancemix.scripts.train import add_noise

NOISES = {
    "mislabel 0.2": ("mislabel", 0.2),
    "mislabel 0.4": ("mislabel", 0.4),
    "flip 0.2": ("flip", 0.2),
    "single positive": ("single-positive", 0.0),
    "clean": ("clean", 0.0),
}
KINDS = {"wrong": 1, "missing": 0}  # the given value
OURS = "Bayes: out of fold and BalanceMix"
_NEIGHBOURS = 50
_EDGES = np.linspace(0, 1, 11)
_SIZES = (0, 25, 50, 100, 200, 10**9)  # positive labels of a class


class Judgement(NamedTuple):
    """All that scores are made of, for one draw of the noise; each `(N, K)`."""

    given: Tensor
    judged: JudgedLabels
    bce: Tensor
    """Probabilities of a network that was trained with BCE, for its own training set."""
    bce_mean: Tensor
    """Their mean over the epochs."""
    balance_mix: Tensor
    balance_mix_mean: Tensor
    neighbours: Tensor
    """Share of the nearest other instances that have the class."""
    cross_validated: Tensor | None
    """Probabilities of scikit-learn's logistic regression; None without cleanlab."""


def against(given: Tensor, probability: Tensor) -> Tensor:
    """One minus the probability of the given value, as log-odds: `(N, K)` float64."""
    log_odds = torch.logit(probability.double(), 1e-6)
    return torch.where(given == 1, -log_odds, log_odds)


def mean_odds(*probabilities: Tensor) -> Tensor:
    """Of several predictions the one with the mean of their log-odds."""
    return torch.stack([torch.logit(p.double(), 1e-6) for p in probabilities]).mean(0).sigmoid()


def with_own_rates(given: Tensor, probability: Tensor, rates: NoiseRates) -> Tensor:
    """As :func:`wrong_probability`, but with T01 and T10 of each class as estimated."""
    positive, n = given == 1, len(given)
    wrong, missing = (rate[0] for rate in rates)
    v = positive.double().mean(0)
    pi = (v * (1 - wrong) + (1 - v) * missing).clamp(1 / n, 1 - 1 / n)
    t01, t10 = (wrong * v / (1 - pi)).clamp(1e-4, 0.9), (missing * (1 - v) / pi).clamp(1e-4, 0.9)
    return against(given, probability) + torch.where(positive, (t01 / (1 - t10)).log(), (t10 / (1 - t01)).log())


def rank_and_rate(given: Tensor, probability: Tensor, rates: NoiseRates) -> Tensor:
    """The rank within class and polarity, as far as so many labels of it are wrong: rate / (rank from the worst)."""
    score, out = against(given, probability), torch.zeros(given.shape).double()
    for value, rate in ((1, rates.wrong[0]), (0, rates.missing[0])):
        for k in range(given.shape[1]):
            rows = (given[:, k] == value).nonzero().squeeze(1)
            order = rows[score[rows, k].argsort(descending=True, stable=True)]
            out[order, k] = rate[k].double() * max(len(rows), 1) / torch.arange(1, 1 + len(rows)).double()
    return out


def scores_of(j: Judgement) -> dict[str, Tensor]:
    """Every score, `(N, K)`: the larger, the more probably is the label wrong."""
    given, rates, q = j.given, j.judged.rates, j.judged.probability
    both = mean_odds(q, j.balance_mix)
    scores = {
        OURS: wrong_probability(given, both, rates),
        "Bayes: out of fold": wrong_probability(given, q, rates),
        "Bayes: BalanceMix": wrong_probability(given, j.balance_mix, rates),
        "Bayes: out of fold and BalanceMix's mean": wrong_probability(given, mean_odds(q, j.balance_mix_mean), rates),
        "Bayes, rates of each class": with_own_rates(given, both, rates),
        "1 - p_G": 1 - j.judged.p_clean,
        "1 - p_G, then out of fold": 1 - j.judged.p_clean.double() + 1e-6 * against(given, q),
        "rank in class, by rate": rank_and_rate(given, q, rates),
        "out of fold and BalanceMix": against(given, both),
        "neighbours": against(given, j.neighbours),
        "BCE": against(given, j.bce),
        "BCE, mean over epochs": against(given, j.bce_mean),
        "BalanceMix, mean over epochs": against(given, j.balance_mix_mean),
    }
    if j.cross_validated is not None:
        sources = {"out of fold (ours)": q, "BalanceMix": j.balance_mix, "cross-validated": j.cross_validated}
        for name, probability in sources.items():
            quality, issues = _cleanlab(given, probability)
            scores[f"cleanlab: {name}"] = 1 - quality
            scores[f"cleanlab: {name}, issues first"] = 1 - quality + issues
    return scores


def _cleanlab(given: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """cleanlab's quality of every label, and which of them its filter calls an issue; both `(N, K)` float64."""
    from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
    from cleanlab.multilabel_classification.rank import get_label_quality_scores_per_class

    labels = [row.nonzero().squeeze(1).tolist() for row in given == 1]
    p = probability.double().numpy()
    quality = get_label_quality_scores_per_class(labels, p)
    return torch.from_numpy(quality), torch.from_numpy(find_multilabel_issues_per_class(labels, p, n_jobs=1)).double()


def _cross_validated(components: Tensor, given: Tensor, seed: int) -> Tensor:
    """What cleanlab's documentation recommends: held-out predictions of a one-vs-rest logistic regression."""
    model = OneVsRestClassifier(LogisticRegression(max_iter=1000))
    folds = KFold(5, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        warnings.filterwarnings("ignore", message="Label .* is present in all|Label not")
        p = cross_val_predict(model, components.numpy(), (given == 1).numpy(), cv=folds, method="predict_proba")
    return torch.from_numpy(np.asarray(p)).float()


def _nearest(features: Tensor) -> Tensor:
    """`(N, k)` rows of the other instances with the largest cosines to each."""
    unit = F.normalize(features - features.mean(0))
    nearest = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine[torch.arange(len(cosine)), start + torch.arange(len(cosine))] = -2
        nearest.append(cosine.topk(_NEIGHBOURS).indices)
    return torch.cat(nearest)


class _EveryEpoch(TrainerCallback):
    """The mean over the epochs of what a network predicts for its training set."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs, self.total, self.epochs = inputs, 0.0, 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.total, self.epochs = self.total + predicted(model, self.inputs), self.epochs + 1


@torch.no_grad()
def in_batches(model: Any, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """`(N, ...)` float32, on the CPU: what a function of the model, in evaluation mode, makes of all inputs."""
    with evaluation_mode(model):
        return torch.cat([run(x.float().to(model.device)).float().cpu() for x in inputs.split(512)])


def predicted(model: Any, inputs: Tensor) -> Tensor:
    """`(N, K)` probabilities."""
    return in_batches(model, lambda x: model(x).logits.float().sigmoid(), inputs)


class Audited:
    """A data set with cached features, or activations of the first stages; what is done for each draw of the noise.

    Args:
        asked: As :func:`flags` has them.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        frozen = asked.frozen_stages is None
        self.setup = Setup(
            dataset=asked.dataset, model_name_or_path=asked.model_name_or_path, frozen_backbone=frozen,
            frozen_stages=asked.frozen_stages, head="linear", backbone_weights=asked.backbone_weights,
            image_size=asked.image_size, many_shot=asked.many_shot, few_shot=asked.few_shot,
            min_positives=asked.min_positives,
            settings={"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-3}
            | ({"num_train_epochs": 20, "label_warmup_epochs": 5} if frozen else {"num_train_epochs": 12}),
        )  # fmt: skip
        self.data = GridData(self.setup, asked.data_dir, asked.cache_dir)
        self.folder = tempfile.mkdtemp()
        args = arguments_of(self.cell("bce", "clean", 0), self.setup, self.folder)
        self.data.freeze(args)
        self.clean = given_labels(self.data.train)
        self.counted = torch.from_numpy(self.data.eval_classes())
        network = self.data.model(self.cell("bce", "clean", 0), args, self.data.train)
        self.inputs = network["views"].features[network["views"].images(self.data.train).rows]
        self.features = self.inputs.float()
        if not frozen:
            pooled = pooled_features_of(network["model"])
            assert pooled is not None
            self.features = in_batches(network["model"], pooled, self.inputs)
        self.components, self.nearest = principal_components(self.features), _nearest(self.features)

    def cell(self, method: str, noise: str, seed: int) -> Cell:
        return Cell(self.setup.dataset, *NOISES[noise], method, seed)

    def noisy(self, noise: str, seed: int) -> datasets.Dataset:
        kind, rate = NOISES[noise]
        kind = {"single-positive": "single_positive", "clean": "none"}.get(kind, kind)
        return add_noise(self.data.train, NoiseArguments(noise=kind, noise_rate=rate, noise_seed=seed))

    def train(self, method: str, noise: str, seed: int, train: datasets.Dataset, callback: Any = None) -> Any:
        """A trainer that has trained."""
        cell = self.cell(method, noise, seed)
        args = arguments_of(cell, self.setup, self.folder)
        network = self.data.model(cell, args, train)
        trainer = trainer_for(method, args, train_dataset=train, eval_dataset=self.data.evaluation, **network)
        trainer.remove_callback(PrinterCallback)
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train()
        return trainer

    def judge(self, noise: str, seed: int, with_cleanlab: bool) -> Judgement:
        train = self.noisy(noise, seed)
        given = given_labels(train)
        predictions = []
        for method in ("bce", "balancemix"):
            epochs = _EveryEpoch(self.inputs)
            trainer = self.train(method, noise, seed, train, epochs)
            predictions += [predicted(trainer.model, self.inputs), epochs.total / epochs.epochs]
        frequency = (given == 1).float().mean(0)  # as two more neighbours, so that no share is 0 or 1
        near = (given == 1).float()[self.nearest].sum(1)
        return Judgement(
            given,
            judge_labels(self.features, given, seed=seed),
            *predictions,
            neighbours=(near + 2 * frequency) / (_NEIGHBOURS + 2),
            cross_validated=_cross_validated(self.components, given, seed) if with_cleanlab else None,
        )


def figures_of(j: Judgement, clean: Tensor, counted: Tensor, groups: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the tables show of one draw of the noise; numbers, lists and dicts only."""
    result: dict[str, Any] = {"scores": {}, "reliability": {}, "rates": []}
    scores = scores_of(j)
    for kind, value in KINDS.items():
        rows = (j.given == value) & (clean >= 0) & counted
        is_wrong = ((clean != j.given) & rows).numpy()
        mask = rows.numpy()
        if is_wrong.any():
            for name, score in scores.items():
                result["scores"].setdefault(name, {})[kind] = _found(score.numpy(), is_wrong, mask, groups)
        ours, truth = scores[OURS].numpy()[mask], is_wrong[mask]
        bins = np.digitize(ours, _EDGES[1:-1])
        result["reliability"][kind] = [
            [int((bins == i).sum()), float(ours[bins == i].sum()), int(truth[bins == i].sum())] for i in range(10)
        ]
    rates = j.judged.rates
    for kind, value, rate in (("wrong", 1, rates.wrong), ("missing", 0, rates.missing)):
        of_kind = j.given == value
        share = (of_kind & (clean != j.given)).sum(0) / of_kind.sum(0).clamp(min=1)
        for k in counted.nonzero().squeeze(1).tolist():
            positives, labels = int((j.given[:, k] == 1).sum()), int(of_kind[:, k].sum())
            result["rates"].append([kind, positives, labels, share[k].item(), *rate[:, k].tolist()])
    return result


def _found(score: np.ndarray, is_wrong: np.ndarray, rows: np.ndarray, groups: Mapping[str, np.ndarray]) -> list[Any]:
    """AP, precision at 1 % and at 5 % of the labels, and the mean AP of each group's classes (None: has none)."""
    truth, values = is_wrong[rows], score[rows]
    order = np.argsort(-values, kind="stable")
    found = [float(average_precision_score(truth, values))]
    found += [float(truth[order[: max(1, round(share * len(order)))]].mean()) for share in (0.01, 0.05)]
    for group in groups.values():
        ks = [k for k in np.flatnonzero(group) if is_wrong[:, k].any()]
        by_class = [average_precision_score(is_wrong[rows[:, k], k], score[rows[:, k], k]) for k in ks]
        found.append(float(np.mean(by_class)) if ks else None)
    return found


def done_runs(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The lines of a file of runs, by data set, noise and seed."""
    lines = map(json.loads, out.read_text().splitlines()) if out.is_file() else []
    return {(line["dataset"], line["noise"], line["seed"]): line for line in lines}


def _mean(values: Sequence[Any]) -> str:
    kept = [value for value in values if value is not None]
    return f"{100 * np.mean(kept):.1f}" if kept else "-"


def tables(runs: Mapping[tuple[str, str, int], Mapping[str, Any]], everything: bool) -> str:
    """Markdown of the runs of one data set."""
    by_noise: dict[str, list[Mapping[str, Any]]] = {}
    for (_, noise, _), run in runs.items():
        by_noise.setdefault(noise, []).append(run["figures"])
    names = list(dict.fromkeys(name for figures in by_noise.values() for f in figures for name in f["scores"]))
    settings = [
        (noise, kind)
        for noise in by_noise
        for kind in KINDS
        if any(kind in figures["scores"].get(OURS, {}) for figures in by_noise[noise])
    ]

    def of(noise: str, kind: str, name: str, column: int) -> str:
        found = [f["scores"][name][kind][column] for f in by_noise[noise] if kind in f["scores"].get(name, {})]
        return _mean(found)

    short = [["average precision", *(f"{noise}, {kind}" for noise, kind in settings)]]
    short += [[name, *(of(noise, kind, name, 0) for noise, kind in settings)] for name in names]
    parts = [markdown_table(short, pad=False)]
    full = [["noise", "kind", "score", "AP", "at 1 %", "at 5 %", "many", "medium", "few"]]
    for noise, kind in settings:
        shown = names if everything else [n for n in names if n == OURS or ("cleanlab" in n and "first" not in n)]
        full += [[noise, kind, name, *(of(noise, kind, name, i) for i in range(6))] for name in shown]
    parts.append(markdown_table(full, 3, pad=False))
    reliability = [["noise", "kind", *(f"{a:.1f} to {a + 0.1:.1f}" for a in _EDGES[:-1])]]
    for noise, figures in by_noise.items():
        for kind in KINDS:
            n, total, wrong = np.sum([f["reliability"][kind] for f in figures], axis=0).T
            some = [f"{s / c:.2f}: {w / c:.2f}" if c >= 10 else "-" for c, s, w in zip(n, total, wrong, strict=True)]
            reliability.append([noise, kind, *some])
    parts.append(markdown_table(reliability, 2, pad=False))
    rates = [["noise", "kind", "positive labels", "classes", "error", "within 5 points", "in the interval", "width"]]
    for noise, figures in by_noise.items():
        for kind in KINDS:
            rows = np.array([r[1:] for f in figures for r in f["rates"] if r[0] == kind], dtype=float)
            for low, high in pairwise(_SIZES):
                some = rows[(rows[:, 0] >= low) & (rows[:, 0] < high)]
                if len(some):
                    _, _, true, estimate, least, most = some.T
                    error = np.abs(estimate - true)
                    held = (least - 1e-9 <= true) & (true <= most + 1e-9)
                    rates.append(
                        [noise, kind, f"{low} or more" if high > 10**6 else f"{low} to {high - 1}", str(len(some)),
                         f"{error.mean():.3f}", f"{(error <= 0.05).mean():.0%}", f"{held.mean():.0%}",
                         f"{(most - least).mean():.2f}"]
                    )  # fmt: skip
    parts.append(markdown_table(rates, 3, pad=False))
    return "\n\n".join(parts)


def flags(description: str | None) -> argparse.ArgumentParser:
    """What this and the closed loop take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="voc2012", help="as benchmarks.paper takes it")
    parser.add_argument("--data_dir", help="its folder; none for the built-in sample")
    parser.add_argument("--model_name_or_path", default="tf_efficientnet_lite0", help="a timm architecture")
    parser.add_argument("--backbone_weights", required=True)
    parser.add_argument("--image_size", type=int, default=160)
    parser.add_argument("--frozen_stages", type=int, metavar="N", help="train the network behind its first N stages, "
                        "12 epochs, and not a head on frozen features")  # fmt: skip
    parser.add_argument("--many_shot", type=int, default=10_000)
    parser.add_argument("--few_shot", type=int, default=1_000)
    parser.add_argument("--min_positives", type=int, default=1, help="in both halves, for a class to count")
    parser.add_argument("--noise", nargs="+", default=list(NOISES), choices=list(NOISES), metavar="NOISE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache_dir", default=str(cache_folder() / "features"))
    return parser


def quiet() -> None:
    """The table only."""
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument("--out", type=Path, default=Path("audit_scores.jsonl"), help="a line a run")
    parser.add_argument("--without_cleanlab", action="store_true")
    parser.add_argument("--everything", action="store_true", help="every score in every table")
    asked = parser.parse_args(argv)
    if not asked.without_cleanlab:
        try:
            import cleanlab  # noqa: F401
        except ImportError:
            parser.error("cleanlab is not installed; it must be for its rows; pip install cleanlab, or pass "
                         "--without_cleanlab.")  # fmt: skip
    quiet()
    audited = Audited(asked)
    groups = class_groups(audited.data.class_counts(), asked.many_shot, asked.few_shot)
    groups = {name: mask & audited.counted.numpy() for name, mask in groups.items()}
    wanted = [(asked.dataset, noise, seed) for noise in asked.noise for seed in range(asked.seeds)]
    runs = done_runs(asked.out)
    for dataset, noise, seed in tqdm([key for key in wanted if key not in runs], unit="run", dynamic_ncols=True):
        judgement = audited.judge(noise, seed, not asked.without_cleanlab)
        figures = figures_of(judgement, audited.clean, audited.counted, groups)
        runs[dataset, noise, seed] = {"dataset": dataset, "noise": noise, "seed": seed, "figures": figures}
        with asked.out.open("a") as file:
            file.write(json.dumps(runs[dataset, noise, seed]) + "\n")
    print(tables({key: runs[key] for key in wanted}, asked.everything))


if __name__ == "__main__":
    main()
