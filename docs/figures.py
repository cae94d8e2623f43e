"""Draws the pictures of the start page and of the README, from a real run on the built-in sample.

    python docs/figures.py

That is the BalanceMix run of `make demo` (four minutes on two cores); its folder, `outputs/figures`, is kept, and a
second call only draws. The noise is added here, so that the truth is known; the method never sees it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from hf_balancemix import BalanceMixTrainer, load_coco, make_scenes
from hf_balancemix.core import LossMixtures, Reliability
from hf_balancemix.data import class_names, label_matrix
from hf_balancemix.report.figures import figure_png, new_figure
from hf_balancemix.scripts.arguments import parse_script
from hf_balancemix.scripts.train import add_noise, draw_model

FOLDER = Path(__file__).parent / "images"
FLAGS = ["--method", "balancemix", "--output_dir", "outputs/figures", "--resume_from_checkpoint", "last"]
RIGHT, WRONG, UNSURE = "#0072B2", "#D55E00", "#7f7f7f"  # told apart by the colour-blind, too
NUM_IMAGES = 4


def run() -> BalanceMixTrainer:
    """The demo's run of BalanceMix, trained or as it was left."""
    _, noise, model_args, args = parse_script("coco", FLAGS, description=__doc__)
    root = make_scenes()
    train = add_noise(load_coco(root, split="train"), noise)
    parts = draw_model("balancemix", model_args, train, args)
    val = load_coco(root, split="val")
    trainer = BalanceMixTrainer(args=args, train_dataset=train, eval_dataset=val, **parts)
    trainer.train(resume_from_checkpoint=args.checkpoint)
    return trainer


def chosen(clean: np.ndarray, given: np.ndarray, refined: np.ndarray) -> list[int]:
    """Images of two to three given labels, one of them wrong: the first ones with which the method does best, and one
    in which the wrong label stays."""
    wrong = (given == 1) & (clean == 0)
    candidates = np.flatnonzero((wrong.sum(1) == 1) & (given.sum(1) >= 2) & (given.sum(1) <= 3))
    stays = (wrong & (refined == 1)).any(1)[candidates]
    errors = (refined != clean).sum(1)[candidates]
    best = candidates[~stays][np.argsort(errors[~stays], kind="stable")]
    return [*best[: NUM_IMAGES - 1].tolist(), *candidates[stays][:1].tolist()]


def pictures_figure(dataset: Any, index: list[int], lines: list[list[tuple[str, str]]]) -> Any:
    """The images, and below each its lines of text in colours."""
    side, gap, line, columns = 2.1, 0.15, 0.19, 2  # inches; two in a row can be read on a phone, too
    block = side + max(map(len, lines)) * line + 0.2
    width, height = columns * (side + gap) - gap, block * -(-len(index) // columns)
    figure = new_figure(width, height, dpi=110)
    figure.set_layout_engine("none")
    for place, (i, texts) in enumerate(zip(index, lines, strict=True)):
        left, top = (place % columns) * (side + gap), height - (place // columns) * block
        axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
        axes.imshow(dataset[i]["image"])
        axes.set_axis_off()
        for row, (text, colour) in enumerate(texts):
            y = top - side - 0.06 - row * line
            figure.text(left / width, y / height, text, color=colour, fontsize=9, va="top")
    return figure


def mixture_figure(mixtures: LossMixtures, logits: np.ndarray, clean: np.ndarray, k: int, name: str) -> Any:
    """The losses of one class's labels that are given as positive: what the method sees, and what is true.

    `logits` and `clean` are of the images with such a label.
    """
    losses = np.logaddexp(0, -logits[:, k])
    bars = np.linspace(0, np.quantile(losses, 0.995), 31)
    figure = new_figure(5.2, 4.8, dpi=110)
    seen, true = figure.subplots(2, 1, sharex=True, sharey=True)
    seen.hist(losses, bars, color="#c7c7c7", label=f"{len(losses)} labels given as “{name}”")
    x = np.linspace(bars[0], bars[-1], 400)
    means, deviations = mixtures.means[1, k].tolist(), mixtures.variances[1, k].sqrt().tolist()
    for label, colour, weight, mean, deviation in zip(
        ("easy: probably right", "hard: probably wrong"),
        (RIGHT, WRONG),
        mixtures.weights[1, k].tolist(),
        means,
        deviations,
        strict=True,
    ):
        height = weight * norm.pdf(x, mean, deviation) * len(losses) * (bars[1] - bars[0])
        seen.plot(x, height, color=colour, label=label)
    truth = clean[:, k] == 1
    true.hist([losses[truth], losses[~truth]], bars, stacked=True, color=[RIGHT, WRONG], label=["right", "wrong"])
    seen.set(title="what the method sees")
    true.set(title="what is true", xlabel="loss of the label")
    for axes in (seen, true):
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    seen.set_yscale("symlog", linthresh=10)
    seen.set(ylabel="number of labels", ylim=(0, None))
    return figure


def decisions_figure(given: np.ndarray, clean: np.ndarray, refined: np.ndarray, reliability: np.ndarray) -> Any:
    """What became of the labels that were given as positive: of the right ones and of the wrong ones."""
    figure = new_figure(5.2, 2.0, dpi=110)
    axes = figure.subplots()
    groups = {"wrong labels": clean == 0, "right labels": clean == 1}
    kinds = {
        "kept": (reliability == Reliability.CLEAN, RIGHT),
        "weighed down": (reliability == Reliability.AMBIGUOUS, "#c7c7c7"),
        "taken away": ((reliability == Reliability.RELABELED) & (refined == 0), WRONG),
    }
    lefts = np.zeros(len(groups))
    numbers = [int(((given == 1) & mask).sum()) for mask in groups.values()]
    names = [f"{name}\n({number:,} given)" for name, number in zip(groups, numbers, strict=True)]
    for kind, (which, colour) in kinds.items():
        shares = np.array([(which & (given == 1) & mask).sum() for mask in groups.values()]) / numbers
        axes.barh(names, shares, left=lefts, color=colour, label=kind)
        for y, (share, left) in enumerate(zip(shares, lefts, strict=True)):
            if share > 0.06:
                colour_of_text = "black" if kind == "weighed down" else "white"
                axes.text(left + share / 2, y, f"{100 * share:.0f} %", ha="center", va="center", color=colour_of_text)
        lefts += shares
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def main() -> None:
    trainer = run()
    state, dataset = trainer.balance_mix, trainer.train_dataset
    names = class_names(dataset)
    given = state.labels.toarray()
    clean = label_matrix(dataset, "clean_labels").numpy()
    everything = state.refine(torch.arange(len(given)), torch.tensor(given).float())
    refined, reliability = everything.labels.numpy(), everything.reliability.numpy()
    index = chosen(clean, given, refined)

    first, after = [], []
    for i in index:
        first.append([(names[k], "black") for k in np.flatnonzero(given[i])])
        texts = []
        for k in np.flatnonzero((given[i] == 1) | (clean[i] == 1) | (refined[i] == 1)):
            before, now, kind = given[i, k], refined[i, k], Reliability(reliability[i, k])
            mark = {
                (1, 1): "weighed down" if kind == Reliability.AMBIGUOUS else "kept",
                (1, 0): "taken away",
                (0, 1): "added",
                (0, 0): "missing, noticed" if kind == Reliability.AMBIGUOUS else "missing, unnoticed",
            }[int(before), int(now)]
            right = (now == clean[i, k]) != (kind == Reliability.AMBIGUOUS)
            texts.append((f"{names[k]}: {mark}", RIGHT if right else WRONG))
        after.append(texts)
    logits = trainer.predict(dataset).predictions
    commonest = int(given.sum(0).argmax())
    shown = given[:, commonest] == 1
    FOLDER.mkdir(exist_ok=True)
    for name, figure in {
        "given": pictures_figure(dataset, index, first),
        "mixtures": mixture_figure(state.mixtures, logits[shown], clean[shown], commonest, names[commonest]),
        "decisions": pictures_figure(dataset, index, after),
        "shares": decisions_figure(given, clean, refined, reliability),
    }.items():
        (FOLDER / f"{name}.png").write_bytes(figure_png(figure))
        print(f"{FOLDER / name}.png: {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
