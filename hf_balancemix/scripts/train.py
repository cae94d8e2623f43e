"""What the example scripts share: noise on the training labels, one run a method, and the table at the end."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from transformers import set_seed
from transformers.trainer_utils import HubStrategy

from hf_balancemix.data import (
    Mislabel,
    RandomFlip,
    SinglePositive,
    class_names,
    drop_bad_images,
    load_noise_map,
)
from hf_balancemix.frozen.backbone import FrozenArguments, FrozenBackbone
from hf_balancemix.methods.registry import METHODS, arguments_by_method, trainer_for
from hf_balancemix.models import load_model
from hf_balancemix.models.configuration_balancemix import HEADS
from hf_balancemix.report import results_table
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

logger = logging.getLogger(__name__)

_RESUME = {"true": True, "last": True, "false": None, "none": None}  # as a flag or a config file says it


@dataclass
class ExperimentArguments(BalanceMixTrainingArguments):
    """Training arguments with the defaults of a script: evaluate and save every epoch, keep two checkpoints."""

    output_dir: str = field(default="outputs", metadata={"help": "Where models and checkpoints go."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two lines of training loss."})
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, trackio, wandb, ..."})


@dataclass
class NoiseArguments:
    """Noise on the training labels, and how much of the data to use."""

    noise: str | None = field(
        default=None,
        metadata={
            "help": "Noise on the training labels. Default: none; mislabel on the built-in sample.",
            "choices": ["none", "mislabel", "flip", "single_positive"],
        },
    )
    noise_rate: float = field(default=0.4, metadata={"help": "tau in [0, 1), for mislabel and flip."})
    noise_seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    noise_map: str | None = field(
        default=None, metadata={"help": "Instead: a saved noise map, a parquet file or a Hub data set."}
    )
    on_bad_image: str = field(
        default="error",
        metadata={"help": "Absent or truncated images: stop, or leave out and count.", "choices": ["error", "skip"]},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation images."})


@dataclass
class ModelArguments(FrozenArguments):
    """Which model and which methods."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name (timm/resnet50.tv_in1k), folder, or with --backbone_weights or --from_scratch a timm "
            "architecture. Default: timm/resnet50.tv_in1k; a tiny network from scratch on the built-in sample."
        },
    )
    backbone_weights: str | None = field(
        default=None, metadata={"help": "File with the state dict of the timm backbone; needs no network."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw the weights anew."})
    model_kwargs: str | None = field(
        default=None, metadata={"help": "JSON with arguments of timm.create_model, for a timm architecture."}
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": "linear (the plain model), mlp, ml_decoder or q2l. Default: linear, or what a saved model has.",
            "choices": list(HEADS),
        },
    )
    head_args: str | None = field(
        default=None, metadata={"help": "JSON with arguments of the head, such as '{\"num_groups\": 20}'."}
    )
    method: list[str] | None = field(
        default=None,
        metadata={
            "help": f"One or more of {', '.join(METHODS)}. Default: balancemix; on the built-in sample also bce and "
            "mixup."
        },
    )
    method_args: str | None = field(
        default=None,
        metadata={
            "help": "JSON with arguments of the method's own, such as '{\"gamma_neg\": 4}' for asl; of several "
            'methods by their names: \'{"asl": {"gamma_neg": 4}}\'. In a config file a mapping.'
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.method or []) - set(METHODS))
        if unknown:
            raise ValueError(f"method {', '.join(unknown)} is not known; choose from {', '.join(METHODS)}.")
        for name in ("model_kwargs", "head_args", "method_args"):
            value = getattr(self, name)
            if value is not None:
                try:
                    json.loads(value)
                except ValueError as error:
                    raise ValueError(f"{name} is {value!r}, which is no JSON ({error}).") from None
        self.arguments_by_method(self.method or ["balancemix"])
        if self.frozen_backbone and (self.head is not None or self.head_args is not None):
            raise ValueError(
                f"head is {self.head!r}, and frozen_backbone brings a head of its own, of hidden_size "
                f"({self.hidden_size}) units; leave out head and head_args, or frozen_backbone."
            )

    def arguments_by_method(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`method_args` for each of `methods`, checked."""
        return arguments_by_method(methods, json.loads(self.method_args or "{}"))


def prepare(
    dataset: datasets.Dataset, noise: NoiseArguments, limit: int | None, seed: int
) -> tuple[datasets.Dataset, int]:
    """The first `limit` instances in a seeded order, without undecodable images if these are to be skipped.

    Returns:
        The data set, and how many instances were left out because they cannot be decoded.
    """
    if limit is not None:
        dataset = dataset.shuffle(seed=seed).select(range(min(limit, len(dataset))))
    kept = drop_bad_images(dataset) if noise.on_bad_image == "skip" else dataset
    return kept, len(dataset) - len(kept)


def single_positive_settings(preset: str) -> dict[str, Any]:
    """BalanceMix's where positive labels are certainly right and most negative ones unknown.

    The paper's eps is 0.55; but for its preset it is 0.9, which measured better (docs/results.md).
    """
    return {"trust_positives": True, "relabel_threshold": 0.55 if preset == "paper" else 0.9}


def with_settings_for(noise: NoiseArguments, args: BalanceMixTrainingArguments) -> BalanceMixTrainingArguments:
    """`args` with the settings for single-positive labels, where the user has left them open."""
    if noise.noise != "single_positive":
        return args
    return replace(args, **{k: v for k, v in single_positive_settings(args.preset).items() if k in args.unset})


def add_noise(train: datasets.Dataset, noise: NoiseArguments) -> datasets.Dataset:
    """`train` with noisy `labels` and `clean_labels` beside, or as it was."""
    if noise.noise_map is not None:
        return load_noise_map(noise.noise_map).apply(train)
    maps: dict[str | None, Callable[[], Any]] = {
        "mislabel": lambda: Mislabel(rate=noise.noise_rate, seed=noise.noise_seed),
        "flip": lambda: RandomFlip(rate=noise.noise_rate, seed=noise.noise_seed),
        "single_positive": lambda: SinglePositive(seed=noise.noise_seed),
    }
    if noise.noise not in maps:
        return train
    return maps[noise.noise]().add_to(train)


def run_methods(
    load: Callable[[], Sequence[datasets.Dataset]],
    noise: NoiseArguments,
    model_args: ModelArguments,
    args: BalanceMixTrainingArguments,
) -> dict[str, dict[str, float]]:
    """Train, evaluate and save each method under the same conditions, and print the table.

    Args:
        load: Gives the training and the evaluation set.
        noise: Noise on the training set.
        model_args: The model, drawn or loaded anew for each method, and the methods.
        args: For every method; each gets a folder of its name in `args.output_dir`.

    Returns:
        Figures by method, also written to `output_dir/results.json`.
    """
    if args.ema_decay and "co-teaching" in (model_args.method or ()):  # not only once the others are trained
        raise ValueError(
            f"ema_decay is {args.ema_decay}, but co-teaching trains two networks, and only one is averaged; leave out "
            "co-teaching, or set ema_decay to 0."
        )
    main_process = args.process_index == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    say: Callable[[str], None] = print if main_process else (lambda text: None)
    with args.main_process_first():  # the other ranks then find what rank 0 made
        train, val = load()
        train, skipped_train = prepare(train, noise, noise.max_train_samples, args.seed)
        val, skipped_val = prepare(val, noise, noise.max_eval_samples, args.seed)
        train = add_noise(train, noise)
    args = with_settings_for(noise, args)
    described = noise.noise_map or noise.noise or "none"
    if described in ("mislabel", "flip"):
        described += f" {noise.noise_rate:g}"
    say(f"{len(train):,} training and {len(val):,} evaluation images, {len(class_names(train))} classes, "
        f"noise: {described}.")  # fmt: skip

    head, head_args = model_args.head, json.loads(model_args.head_args or "{}")
    if model_args.frozen_backbone and model_args.hidden_size:
        head, head_args = "mlp", {"hidden_size": model_args.hidden_size}

    def draw_model(seed: int) -> tuple[Any, Any]:
        set_seed(seed)
        return load_model(
            model_args.model_name_or_path or "timm/resnet50.tv_in1k",
            class_names(train),
            image_size=args.image_size,
            backbone_weights=model_args.backbone_weights,
            pretrained=not model_args.from_scratch,
            model_kwargs=json.loads(model_args.model_kwargs or "{}"),
            head=head,
            head_args=head_args,
        )

    frozen: FrozenBackbone | None = None
    if model_args.frozen_backbone:
        if model_args.from_scratch:
            logger.warning("--from_scratch draws the frozen backbone's weights too: its features mean little.")
        frozen = FrozenBackbone(
            *draw_model(args.seed),
            train,
            val,
            args,
            model_args.features_folder,
            num_views=model_args.num_views,
            hidden_size=model_args.hidden_size,
        )
        train, val = frozen.train, frozen.evaluation
        frozen.image_model(frozen.draw(args)["model"])  # what cannot be saved is to be refused before the training
        args = _for_features(args)

    results: dict[str, dict[str, float]] = {}
    methods = model_args.method or ["balancemix"]
    method_args = model_args.arguments_by_method(methods)
    for method in methods:
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir, method))
        if args.hub_model_id and len(methods) > 1:  # a repository each
            own.hub_model_id = f"{args.hub_model_id}-{method.lstrip('+')}"
        given: dict[str, Any] = {}
        if frozen is not None:
            given = frozen.draw(args)
        else:
            # Networks from scratch share no pretrained backbone, so that co-teaching's second one is another draw.
            if method == "co-teaching" and model_args.from_scratch:
                given["peer"] = draw_model(args.seed + 1)[0]
            given["model"], given["processing_class"] = draw_model(args.seed)
        say(f"\n== {method}: {METHODS[method]}")
        trainer = trainer_for(method, own, method_args.get(method), train_dataset=train, eval_dataset=val, **given)
        output = trainer.train(_RESUME.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint))
        metrics = trainer.evaluate()
        if frozen is not None:  # what is saved takes images
            trainer.model = frozen.image_model(trainer.model)
        trainer.save_model()
        trainer.create_model_card()
        results[method] = {"seconds": output.metrics["train_runtime"]} | metrics | _last_label_figures(trainer)
    if main_process:
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(render(results, args))
        if skipped_train or skipped_val:
            print(
                f"Left out because they cannot be read: {skipped_train:,} training and {skipped_val:,} evaluation "
                "images."
            )
    return results


def _for_features(args: BalanceMixTrainingArguments) -> BalanceMixTrainingArguments:
    """`args` for heads on cached features: nothing is pushed before the whole model is there, and passes over the data
    take large batches, which change nothing and cost no memory."""
    args = copy.copy(args)
    args.hub_strategy = HubStrategy.END
    args.per_device_eval_batch_size = max(args.per_device_eval_batch_size, 512)
    return args


def _last_label_figures(trainer: Any) -> dict[str, float]:
    """The newest label-quality figures of the log, over the random batches of the last epoch."""
    logs = (line for line in reversed(trainer.state.log_history) if "label_clean_precision" in line)
    return {k: v for k, v in next(logs, {}).items() if k.startswith("label_")}


def render(results: dict[str, dict[str, float]], args: BalanceMixTrainingArguments) -> str:
    """The tables, where the models are, and what to do next."""
    text = [
        f"\nEvaluation mAP in per cent after the last epoch (many-shot: more than {args.many_shot:,} clean positive "
        f"training labels, few-shot: fewer than {args.few_shot:,})\n"
    ]
    columns = {"eval_mAP": "all", "eval_mAP_many": "many", "eval_mAP_medium": "medium", "eval_mAP_few": "few"}
    text.append(results_table(results, columns, percent=True, extra={"seconds": "training seconds"}))
    quality = {name: figures for name, figures in results.items() if "label_clean_precision" in figures}
    if quality:
        text.append("\nLabel quality in per cent over the last epoch (Eq. 14, 15)\n")
        columns = {
            "label_clean_precision": "clean precision",
            "label_clean_recall": "clean recall",
            "label_relabel_proportion": "re-labelled",
            "label_relabel_accuracy": "re-labelling right",
        }
        text.append(results_table(quality, columns, percent=True))
        text.append("\nThe same for labels that were given as positive\n")
        columns = {f"{name}_positives": heading for name, heading in columns.items()}
        columns["label_noise_rate_positives"] = "given wrong"
        text.append(results_table(quality, columns, percent=True))
    best = Path(args.output_dir, "balancemix" if "balancemix" in results else next(iter(results)))
    text.append(f"\nModels, each with a card (README.md): {', '.join(str(Path(args.output_dir, n)) for n in results)}")
    text.append("Next, class probabilities for your own images:")
    text.append(f"    python examples/predict.py --model {best} --images FOLDER --output scores.csv")
    return "\n".join(text)
