"""From wrong labels to a better model: audit, correct, train plain BCE, beside BCE on the noisy and on the clean ones.

    python -m benchmarks.closed_loop --dataset voc2012 --data_dir VOC2012_SMALL --backbone_weights FILE \\
        --many_shot 400 --few_shot 150 --min_positives 10

BalanceMix is trained on noisy labels of a data set with cached features (as in `benchmarks.audit_scores`), and its
label audit is applied in several ways: labels whose score is at least so much, without a look at them; what a reviewer
says who answers truthfully, but only for the first 5 % of the rows; both. A new head is trained with BCE on the
corrected labels. The table shows mAP over all and over few-shot classes, with its standard error over the seeds; how
many labels were changed; and how many labels are wrong then, as a share of those that were wrong before. Every run is
a line of --out, and runs that are there are not done again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from benchmarks.audit_scores import Audited, done_runs, flags, quiet
from benchmarks.paper.numbers import mean_and_error
from hf_balancemix.audit.corrections import apply_corrections
from hf_balancemix.data import given_labels
from hf_balancemix.metrics import class_groups, mean_average_precision
from hf_balancemix.report import markdown_table

THRESHOLDS = (0.5, 0.7, 0.9)
REVIEWED = 0.05


def reviewed(rows: datasets.Dataset, train: datasets.Dataset, share: float) -> list[dict[str, Any]]:
    """The decisions of a reviewer who knows the clean labels, for the first of the rows."""
    names = train.features["clean_labels"].feature.names
    clean = dict(zip(train["image_id"], train["clean_labels"], strict=True))
    decisions = []
    for row in rows.select(range(max(1, round(share * len(rows))))):
        is_right = (names.index(row["class"]) in clean[row["image_id"]]) == bool(row["given"])
        word = "right" if is_right else "wrong"
        decisions.append({"image_id": row["image_id"], "class": row["class"], "given": row["given"], "decision": word})
    return decisions


def loop(audited: Audited, noise: str, seed: int, groups: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Of each way: mAP over all and over few-shot classes, labels changed, and share of the wrong ones left."""
    noisy = audited.noisy(noise, seed)
    trainer = audited.train("balancemix", noise, seed, noisy)
    rows, given = trainer.label_audit(), given_labels(noisy)
    decisions = reviewed(rows, noisy, REVIEWED)
    ways: dict[str, datasets.Dataset] = {"given labels": noisy, "clean labels": audited.data.train}
    for least in THRESHOLDS:
        ways[f"score >= {least}"] = apply_corrections(noisy, audit=rows, min_score=least)
    ways[f"reviewed: {REVIEWED:.0%}"] = apply_corrections(noisy, decisions)
    least = THRESHOLDS[1]
    ways[f"reviewed: {REVIEWED:.0%}, else score >= {least}"] = apply_corrections(
        noisy, decisions, audit=rows, min_score=least
    )
    wrong = int((given != audited.clean).sum())
    result = {"BalanceMix, given labels": [*_map(audited, trainer, groups), 0, 1.0]}
    for name, train in ways.items():
        labels = given_labels(train)
        trained = audited.train("bce", "clean", seed, train)
        left = int((labels != audited.clean).sum()) / max(wrong, 1)
        result[f"BCE, {name}"] = [*_map(audited, trained, groups), int((labels != given).sum()), left]
    return result


def _map(audited: Audited, trainer: Any, groups: dict[str, np.ndarray]) -> list[float]:
    prediction = trainer.predict(audited.data.evaluation)
    ap = mean_average_precision(prediction.predictions, prediction.label_ids)["per_class_ap"]
    return [float(np.nanmean(ap[mask])) if mask.any() else float("nan") for mask in groups.values()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.set_defaults(noise=["mislabel 0.2", "mislabel 0.4", "flip 0.2", "single positive"])
    parser.add_argument("--out", type=Path, default=Path("closed_loop.jsonl"), help="a line a run")
    asked = parser.parse_args(argv)
    quiet()
    audited = Audited(asked)
    few = class_groups(audited.data.class_counts(), asked.many_shot, asked.few_shot)["few"]
    groups = {"all": audited.counted.numpy(), "few": few & audited.counted.numpy()}
    wanted = [(asked.dataset, noise, seed) for seed in range(asked.seeds) for noise in asked.noise]
    runs = done_runs(asked.out)
    for dataset, noise, seed in tqdm([key for key in wanted if key not in runs], unit="run", dynamic_ncols=True):
        figures = loop(audited, noise, seed, groups)
        runs[dataset, noise, seed] = {"dataset": dataset, "noise": noise, "seed": seed, "figures": figures}
        with asked.out.open("a") as file:
            file.write(json.dumps(runs[dataset, noise, seed]) + "\n")

    table = [["noise", "trained with, on", "mAP", "few-shot", "labels changed", "wrong labels left"]]
    for noise in asked.noise:
        figures = [runs[asked.dataset, noise, seed]["figures"] for seed in range(asked.seeds)]
        for name in figures[0]:
            every, few_shot, changed, left = np.array([f[name] for f in figures], dtype=float).T
            table.append(
                [noise, name, _percent(every), _percent(few_shot), f"{changed.mean():.0f}", f"{left.mean():.0%}"]
            )
    print(markdown_table(table, 2, pad=False))


def _percent(values: np.ndarray) -> str:
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.1f}" if error is None or np.isnan(error) else f"{mean:.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
