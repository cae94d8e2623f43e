r"""Train, evaluate and save a multi-label image model, with one method or with several under the same conditions.

    balancemix train                                      # a comparison on a built-in sample, about five minutes
    balancemix train --train_dir photos --train_csv labels.csv --label_column tags --separator ","
    balancemix train --dataset_name user/set --label_column tags
    balancemix train --data_dir coco --year 2017 --image_size 448 --head ml_decoder --preset paper --bf16
    balancemix train --data_format voc --data_dir voc --frozen_backbone --method bce mixup balancemix
    balancemix train --data_format voc --data_dir voc --frozen_stages 3 --method bce mixup balancemix

--config FILE takes all flags from YAML or JSON. Flags of `accelerate launch`, such as --num_processes 4 or
--config_file FILE, start several processes.
"""

from __future__ import annotations

import copy
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import set_seed
from transformers.trainer_utils import HubStrategy, TrainOutput

from hf_balancemix.audit.label_audit import ROWS_FILE, LabelAudit
from hf_balancemix.data import (
    Mislabel,
    RandomFlip,
    SinglePositive,
    class_names,
    drop_bad_images,
    given_labels,
    load_noise_map,
)
from hf_balancemix.data.images import MAX_IMAGE_PIXELS
from hf_balancemix.data.split import warn_of_copies
from hf_balancemix.frozen.backbone import FrozenBackbone, FrozenStages
from hf_balancemix.methods.registry import METHODS, check_loss_arguments, trainer_for
from hf_balancemix.models import load_model
from hf_balancemix.report import results_table
from hf_balancemix.scripts.arguments import ModelArguments, NoiseArguments, SampleArguments, parse_script
from hf_balancemix.scripts.data import DataArguments
from hf_balancemix.scripts.parser import run
from hf_balancemix.trainer import MultiLabelTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """The body of `balancemix train`, in each of its processes."""
    data, noise, model_args, args = parse_script(None, argv, __doc__, prog="balancemix train")
    check_loss_arguments(model_args.methods, args)
    use_sample = isinstance(args, SampleArguments)
    if use_sample:
        say(args, "No data given: using the built-in sample (small drawn scenes, made once into your cache).")
    with args.main_process_first():  # the other ranks then find what rank 0 has made
        train, val, left_out = usable(*data.load(args.seed), data, args.seed, args.max_image_pixels)
        train = add_noise(train, noise, data.follow_links)
    names = class_names(train)
    say(args, f"{len(train):,} training and {len(val):,} evaluation images, {len(names)} classes, noise: {noise}.")
    frozen = freeze_backbone(model_args, train, val, args)
    if frozen is not None:
        train, val = frozen.train, frozen.evaluation

    results = {}
    for method in model_args.methods:
        say(args, f"\n== {method}: {METHODS[method]}")
        parts = draw_model(method, model_args, train, args) if frozen is None else frozen.draw(args)
        parts |= {"args": args_of(method, model_args, args), "train_dataset": train, "eval_dataset": val}
        trainer = trainer_for(method, method_args=model_args.args_by_method.get(method), **parts)
        output = trainer.train(resume_from_checkpoint=args.checkpoint)
        results[method] = figures_of(trainer, output, trainer.evaluate())
        if frozen is not None:
            trainer.model = frozen.image_model(trainer.model)
        trainer.save_model()
        trainer.create_model_card()
    print_results(results, args, left_out)
    if use_sample:
        say(args, "or your own data:\n    balancemix train --help")


# ---- the steps, for scripts of one's own ----


def say(args: BalanceMixTrainingArguments, text: str) -> None:
    """Print on one of the ranks."""
    if args.process_index == 0:
        print(text)


def usable(
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
    data: DataArguments,
    seed: int,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> tuple[datasets.Dataset, datasets.Dataset, tuple[int, int]]:
    """Both data sets, limited and without undecodable images as the flags ask, and how many of these each had."""
    kept, left_out = [], []
    for dataset, limit in ((train, data.max_train_samples), (evaluation, data.max_eval_samples)):
        if limit is not None:
            dataset = dataset.shuffle(seed=seed).select(range(min(limit, len(dataset))))
        skip = data.on_bad_image == "skip"
        kept.append(drop_bad_images(dataset, max_image_pixels=max_image_pixels) if skip else dataset)
        left_out.append(len(dataset) - len(kept[-1]))
    warn_of_copies(*kept)
    return kept[0], kept[1], (left_out[0], left_out[1])


def add_noise(train: datasets.Dataset, noise: NoiseArguments, follow_links: bool = False) -> datasets.Dataset:
    """`train` with noisy `labels` and `clean_labels` beside, or as it was."""
    if noise.noise_map is not None:
        return load_noise_map(noise.noise_map, follow_links=follow_links).apply(train)
    if noise.noise == "single_positive":
        return SinglePositive(seed=noise.noise_seed).add_to(train)
    model = {"mislabel": Mislabel, "flip": RandomFlip}.get(noise.noise)
    return train if model is None else model(rate=noise.noise_rate, seed=noise.noise_seed).add_to(train)


def load_model_from(flags: ModelArguments, train: datasets.Dataset, image_size: int | None) -> tuple[Any, Any]:
    """The model that the flags describe, and its image processor; what is drawn comes from torch's generator.

    Of the training set come the names of the classes and, for the head ms_cma, which of them occur together.

    A backbone that is to be frozen gets the head that is trained on its cached features.
    """
    head, head_args = flags.head, flags.head_args
    if flags.frozen_backbone and flags.hidden_size:
        head, head_args = "mlp", {"hidden_size": flags.hidden_size}
    return load_model(
        flags.model_name_or_path or "timm/resnet50.tv_in1k",
        class_names(train),
        image_size=image_size,
        backbone_weights=flags.backbone_weights,
        pretrained=not flags.from_scratch,
        model_kwargs=flags.model_kwargs,
        head=head,
        head_args=head_args,
        train_labels=given_labels(train) if head == "ms_cma" else None,
        trust_remote_code=flags.trust_remote_code,
    )


def draw_model(
    method: str, model_args: ModelArguments, train: datasets.Dataset, args: BalanceMixTrainingArguments
) -> dict[str, Any]:
    """A trainer's `model` and `processing_class`, drawn with the run's seed; for co-teaching also a `peer`."""
    parts = {}
    if method == "co-teaching" and model_args.from_scratch:
        # Networks from scratch share no pretrained backbone, so that the second one is another draw.
        set_seed(args.seed + 1)
        parts["peer"], _ = load_model_from(model_args, train, args.image_size)
    set_seed(args.seed)
    parts["model"], parts["processing_class"] = load_model_from(model_args, train, args.image_size)
    return parts


def freeze_backbone(
    flags: ModelArguments, train: datasets.Dataset, evaluation: datasets.Dataset, args: BalanceMixTrainingArguments
) -> FrozenBackbone | FrozenStages | None:
    """What `--frozen_backbone` or `--frozen_stages` freezes, with its features of both data sets; None without.

    Raises:
        ValueError: The model has no pooled features, or could not be saved with a trained head; or it has no such
            stages.
    """
    if not flags.frozen_backbone and flags.frozen_stages is None:
        return None
    if flags.from_scratch:
        logger.warning("--from_scratch draws the frozen backbone's weights too: its features mean little.")
    set_seed(args.seed)
    data, folder = (train, evaluation, args), flags.features_folder
    load = partial(load_model_from, flags, train, args.image_size)
    if flags.frozen_stages is not None:
        return FrozenStages(load, *data, folder, num_views=flags.num_views, num_stages=flags.frozen_stages)
    frozen = FrozenBackbone(*load(), *data, folder, num_views=flags.num_views, hidden_size=flags.hidden_size)
    frozen.image_model(frozen.draw(args)["model"])  # what cannot be saved is to be refused before the training
    return frozen


def args_of(method: str, model_args: ModelArguments, args: BalanceMixTrainingArguments) -> BalanceMixTrainingArguments:
    """`args` for one of several methods: a folder of its name, and on the Hub a repository.

    For heads on cached features, nothing is pushed before the whole model is there, and passes over the data take
    large batches, which change nothing and cost no memory.
    """
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir, method))
    if args.hub_model_id and len(model_args.methods) > 1:
        args.hub_model_id = f"{args.hub_model_id}-{method.lstrip('+')}"
    if model_args.frozen_backbone:
        args.hub_strategy = HubStrategy.END
        args.per_device_eval_batch_size = max(args.per_device_eval_batch_size, 512)
    return args


def figures_of(trainer: MultiLabelTrainer, output: TrainOutput, metrics: Mapping[str, float]) -> dict[str, float]:
    """Training seconds, the evaluation's figures, the bounds of the class groups, and the newest label-quality figures
    of the log: those over the random batches of the last epoch."""
    logs = (line for line in reversed(trainer.state.log_history) if "label_clean_precision" in line)
    labels = {name: value for name, value in next(logs, {}).items() if name.startswith("label_")}
    bounds = dict(zip(("many_shot", "few_shot"), trainer.shot_bounds or (), strict=False))
    return {"seconds": output.metrics["train_runtime"]} | dict(metrics) | labels | bounds


_MAPS = {"eval_mAP": "all", "eval_mAP_many": "many", "eval_mAP_medium": "medium", "eval_mAP_few": "few"}
_OF_LABELS = {
    "label_clean_precision": "clean precision", "label_clean_recall": "clean recall",
    "label_relabel_proportion": "re-labelled", "label_relabel_accuracy": "re-labelling right",
}  # fmt: skip
_OF_POSITIVES = {f"{name}_positives": heading for name, heading in _OF_LABELS.items()}
_QUALITY = {
    "Label quality in per cent over the last epoch (Eq. 14, 15)": _OF_LABELS,
    "The same for labels that were given as positive": _OF_POSITIVES | {"label_noise_rate_positives": "given wrong"},
}


def print_results(
    results: Mapping[str, Mapping[str, float]], args: BalanceMixTrainingArguments, left_out: tuple[int, int] = (0, 0)
) -> None:
    """Print the tables and write `output_dir/results.json`, on one of the ranks.

    `results` has the figures of :func:`figures_of` by method, `left_out` the numbers of training and evaluation images
    that could not be read.
    """
    if args.process_index != 0:
        return
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
    title, first = "Evaluation mAP in per cent after the last epoch", next(iter(results.values()))
    if "many_shot" in first:
        many, few = first["many_shot"], first["few_shot"]
        title += f" (many-shot: more than {many:,} clean positive training labels, few-shot: fewer than {few:,})"
    print(f"\n{title}\n\n{results_table(results, _MAPS, percent=True, extra={'seconds': 'training seconds'})}")
    with_quality = {name: figures for name, figures in results.items() if "label_clean_precision" in figures}
    for title, columns in _QUALITY.items() if with_quality else ():
        print(f"\n{title}\n\n{results_table(with_quality, columns, percent=True)}")
    best = Path(args.output_dir, "balancemix" if "balancemix" in results else next(iter(results)))
    installed = Path(sys.executable).with_name("balancemix")  # it need not be on the PATH
    command = installed if installed.exists() and not shutil.which("balancemix") else "balancemix"
    print(f"\nModels, each with a card (README.md): {', '.join(str(Path(args.output_dir, n)) for n in results)}")
    if Path(best, ROWS_FILE).exists():
        audit = LabelAudit.load(best)
        print(f"Next, look at the {audit.num_estimated:,} labels of {best} that are probably wrong:")
        print(f"    {command} audit --model {shlex.quote(str(best))} --html report")
    print("Next, class probabilities for your own images:")
    print(f"    {command} predict --model {shlex.quote(str(best))} --images FOLDER --output scores.csv")
    if any(left_out):
        print(f"Left out because they cannot be read: {left_out[0]:,} training and {left_out[1]:,} evaluation images.")


if __name__ == "__main__":
    run(main)
