"""The model card: what was trained, on what, how well, and how to run it, from what the trainer has recorded.

A fact that was not recorded is left out or said to be not recorded. Everything that is printed is escaped unless this
module made it (`Markup`), so that a class named `<script>` or `| a |` is a name and nothing else.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from scipy.sparse import csr_array
from transformers import Trainer, TrainingArguments

from hf_balancemix import __version__
from hf_balancemix.core.citation import CITATION
from hf_balancemix.core.given_labels import label_counts
from hf_balancemix.data.noise import recorded_noise, without_recorded_noise
from hf_balancemix.files import whole_file
from hf_balancemix.report.figures import (
    ClassMixtures,
    figure_png,
    mixture_figure,
    per_class_ap_figure,
    training_curves_figure,
)

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
CLASSES_FILE = "classes.csv"  # beside the card where there are too many classes for its table
_ALL_SHOWN, _SHOWN = 60, 20  # so many classes make one table; of more, so many of each end are shown
_PEFT_TITLE = "# Model Card for Model ID"  # of the empty template that peft writes beside an adapter
MARK = "<!-- Written by hf_balancemix, anew at each save. Remove this line to keep a text of your own. -->"
# In an evaluation's line of `state.log_history`, after its prefix ("eval_"): K fractions, None for a skipped class.
PER_CLASS_AP = "per_class_ap"

_METRICS = {
    "mAP": "mAP, all classes",
    "mAP_many": "mAP, many-shot classes",
    "mAP_medium": "mAP, medium-shot classes",
    "mAP_few": "mAP, few-shot classes",
    "CF1": "CF1 at 0.5",
    "OF1": "OF1 at 0.5",
}
_METRIC_TYPES = {"mAP": "mean_average_precision", "CF1": "f1", "OF1": "f1"}
_NO_METRICS = {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
_FILE_FORMATS = {"imagefolder", "parquet", "arrow", "csv", "json", "webdataset", "generator", "text", "pandas"}
# Arguments of transformers that change what is learned; of ours all are shown.
_SHOWN_ARGUMENTS = (
    "max_steps", "gradient_accumulation_steps", "lr_scheduler_kwargs", "warmup_steps", "adam_beta1", "adam_beta2",
    "adam_epsilon", "bf16", "fp16", "tf32", "seed", "data_seed", "full_determinism", "torch_compile",
    "gradient_checkpointing", "dataloader_drop_last", "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip


def write_model_card(trainer: Trainer, folder: str | os.PathLike[str]) -> Path:
    """Write `README.md` and its figures for the weights that the trainer holds now, and for a model of many classes
    `classes.csv`. To be called on one process.

    Each file appears under its name only when whole, the card last. A README.md without the line `MARK` is somebody's
    own text and stays.

    Args:
        trainer: `MultiLabelTrainer` or a subclass, at any time: before, while and after training.
        folder: Where the card goes; made if it is absent.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = folder / CARD_FILE
    if card.exists() and is_own_text(card.read_text(encoding="utf-8", errors="replace")):
        logger.info("%s was not written by hf_balancemix and stays as it is.", card)
        return card
    facts = card_facts(trainer)
    for name, figure in _figures(facts).items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with whole_file(folder / name) as temporary:
                temporary.write_bytes(figure_png(figure))
            facts["figures"].add(name)
    if facts["classes"]["tables"].keys() == {None}:
        (folder / CLASSES_FILE).unlink(missing_ok=True)
    else:
        with (
            whole_file(folder / CLASSES_FILE) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(_class_rows(facts))
    with whole_file(card) as temporary:
        temporary.write_bytes(render_model_card(facts).encode())
    return card


def is_own_text(text: str) -> bool:
    """Whether a card is somebody's own, which stays: neither ours nor the empty template that peft writes."""
    return MARK not in text and _PEFT_TITLE not in text.splitlines()


def render_model_card(facts: Mapping[str, Any]) -> str:
    """The text of the card, metadata on top, from what `card_facts` gives."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_balancemix.report"),
        undefined=jinja2.StrictUndefined,
        finalize=escape_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "literal": _literal, "code": Markup}
    environment.filters["interval"] = _interval
    text = environment.get_template("model_card.md").render(**facts, mark=Markup(MARK), paper=Markup(CITATION))
    return f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}"


def card_data(facts: Mapping[str, Any]) -> ModelCardData:
    """The card's metadata, with every recorded figure of the evaluations in its model-index."""

    def split(evaluation: Mapping[str, Any]) -> str | None:
        # Readers of a model-index take for one what does not differ in this, the type, configuration and revision.
        data, others = evaluation["data"], [other["data"] for other in facts["evaluations"]]
        keys = ("hub_id", "name", "config", "split", "revision")
        same = [other for other in others if all(other[key] == data[key] for key in keys)]
        return data["split"] if len(same) == 1 else evaluation["name"]

    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Multi-label image classification",
            dataset_type=data["hub_id"] or _slug(data["name"]) or "unknown",
            dataset_name=" ".join(
                [data["name"] or "not recorded", *([f"({evaluation['name']})"] if evaluation["name"] else [])]
            ),
            dataset_config=data["config"],
            dataset_split=split(evaluation),
            dataset_revision=data["revision"],
            metric_type=_METRIC_TYPES.get(name.split("_")[0], _slug(name)),
            metric_name=_METRICS.get(name, name),
            metric_value=float(value),
        )
        for evaluation in facts["evaluations"]
        for data in [evaluation["data"]]
        for name, value in evaluation["metrics"].items()
    ]
    train = facts["train"]
    return ModelCardData(
        base_model=facts["base_model"],
        datasets=train["hub_id"] if train else None,
        library_name="transformers" if facts["adapter"] is None else "peft",
        pipeline_tag="image-classification",
        tags=["multi-label-classification", "hf_balancemix", *(["label-noise"] if train and train["noisy"] else [])],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=facts["name"],
        eval_results=results or None,
    )


def card_facts(trainer: Trainer) -> dict[str, Any]:
    """Everything the card says, for its template."""
    args, state, model = trainer.args, trainer.state, trainer.saved_model
    adapter = _adapter(model)
    if adapter is not None:
        model = model.get_base_model()
    names = trainer.class_names or [model.config.id2label[k] for k in range(model.config.num_labels)]
    evaluations = _evaluations(trainer)
    shown = next((e for e in evaluations if e["per_class_ap"] is not None), {"per_class_ap": None, "name": None})
    per_class = shown["per_class_ap"]
    balance_mix = getattr(trainer, "balance_mix", None)
    fitted = balance_mix is not None and balance_mix.mixtures is not None
    judged = _judged_labels(balance_mix) if fitted else None
    repository = _repo_id(getattr(trainer, "hub_model_id", None) or args.hub_model_id)
    thresholds, citation = getattr(model.config, "thresholds", None), getattr(trainer, "citation", None)
    settings = None if balance_mix is None else balance_mix.settings
    mixes = trainer.method_name != "bce" and getattr(args, "mixup_alpha", 0) > 0
    changed = changed_arguments(args, trainer._arguments_class)
    if settings is not None:
        changed |= {f.name: getattr(args, f.name) for f in dataclasses.fields(settings)}
    elif mixes:
        changed["mixup_alpha"] = args.mixup_alpha
    changed |= {f"{name} ({trainer.method_name})": v for name, v in getattr(trainer, "method_settings", {}).items()}
    packages = ("torchvision", "transformers", "accelerate", "datasets", "timm")
    versions = {"hf_balancemix": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    given = _positives(trainer.train_labels)
    return {
        "name": (repository or Path(args.output_dir or ".").absolute().name).split("/")[-1] or "model",
        "repository": Markup(repository or "PATH/TO/THIS/FOLDER"),
        "base_model": _base_model(model.config) or (adapter and adapter["base"]),
        "adapter": adapter,
        "architecture": type(model).__name__,
        "backbone": getattr(model.config, "architecture", None),  # timm's name
        "head": getattr(model.config, "head", None),
        "needs_package": type(model).__module__.startswith("hf_balancemix"),
        "remote_code": bool(getattr(model, "include_code", False)),
        "figures_note": trainer.figures_note,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "image_size": trainer.views.image_size,
        "cached_views": getattr(trainer.views, "num_views", None),  # of a frozen backbone
        "frozen_stages": getattr(trainer.views, "frozen", None),
        "class_names": names,
        "thresholds": thresholds if thresholds and len(thresholds) == len(names) else None,
        "train": _describe(trainer.train_dataset, args.dataset_title, trainer.train_labels, trainer.clean_labels),
        "evaluations": evaluations,
        "per_class_ap": per_class,
        "classes": {"tables": _class_tables(len(names), per_class, given), "file": Markup(CLASSES_FILE)},
        "per_class_of": shown["name"],
        "groups": trainer.class_groups,
        "shot_bounds": trainer.shot_bounds,
        "given": given,
        "clean": _positives(trainer.clean_labels),
        "judged": judged,
        "noise": _noise_rates(balance_mix),
        "suspicious": _suspicious(balance_mix),
        "label_figures": newest_line(state.log_history, "label_noise_rate"),
        "estimated_noise": newest_line(state.log_history, "noise_rate_wrong"),
        "sampler": newest_line(state.log_history, "sampler_effective_size"),
        "state": state,
        "mixtures": chosen_mixtures(balance_mix, names, good_and_bad_class(balance_mix, per_class)) if fitted else [],
        "trainer": type(trainer).__name__,
        "method": trainer.method_name,
        "mixes": mixes,
        "own_loss": trainer.compute_loss_func is not None,
        "own_views": trainer.train_transform is not None,
        "managed": settings is not None
        and settings.select_clean
        and (state.epoch or 0) > settings.label_warmup_epochs,
        "citation": Markup(citation.replace("```", "")) if citation else None,
        "settings": settings,
        "args": args.to_dict(),
        "changed": changed,
        "in_training": bool(trainer.is_in_train) and 0 < state.global_step < state.max_steps,
        "train_runtime": (newest_line(state.log_history, "train_runtime") or {}).get("train_runtime"),
        "hardware": _hardware(args),
        "versions": versions | {name: importlib.metadata.version(name) for name in packages},
        "metric_names": _METRICS,
        "figures": set(),
    }


def escape_markdown(value: Any) -> Any:
    """Text that Markdown, a table of it and HTML show as it is; numbers and `Markup` pass."""
    if isinstance(value, (Markup, int, float, jinja2.Undefined)):
        return value
    text = " ".join(str(value).split())
    dotless = "www" in text.lower()  # GitHub makes links of these
    return Markup("".join(_escape_character(c, dotless) for c in text))


def _escape_character(character: str, dotless: bool) -> str:
    category = unicodedata.category(character)
    if category[0] == "C":  # control characters, and those that turn the direction of writing
        return "\N{REPLACEMENT CHARACTER}"
    safe = category[0] in "LMN" or character in " ,-" or (character == "." and not dotless)
    return character if safe else f"&#{ord(character)};"


def changed_arguments(args: TrainingArguments, base: type) -> dict[str, Any]:
    """The arguments that change what is learned and whose value is not the default, by name.

    The defaults are those of `base`, the trainer's class of arguments, and not of a subclass such as a script's; of a
    field that a preset sets, that of the preset "default". No path and no token is among them.
    """
    values = args.to_dict()
    preset = base.PRESETS["default"]
    hidden = TrainingArguments.__dataclass_fields__.keys() - preset.keys() - set(_SHOWN_ARGUMENTS)
    hidden |= {"per_device_train_batch_size", "remove_unused_columns"}  # which follow from others
    hidden |= {"dataset_title"}
    changed = {}
    for field in dataclasses.fields(base):
        if field.name in hidden:
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        default = preset.get(field.name) if default is None else default
        default, value = getattr(default, "value", default), values[field.name]
        if value != default and (value or default):  # {} and None are alike
            changed[field.name] = value
    return changed


def newest_line(log_history: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    """The last line of the log that has `key`."""
    return next((line for line in reversed(log_history) if key in line), None)


def chosen_mixtures(balance_mix: Any, names: Sequence[str], classes: Mapping[str, int]) -> list[ClassMixtures]:
    """The fitted mixtures of some classes, with their losses' histograms where `core.BalanceMix` has kept them.

    Of `names` there are K; `classes` are indices by what to call them, such as "best AP".
    """
    m = balance_mix.mixtures
    # `loss_histogram` is that of the newest scan; a run that was resumed has none until the next one.
    histogram = getattr(balance_mix, "loss_histogram", None)
    counts = None if histogram is None else histogram.counts.cpu().numpy()
    return [
        ClassMixtures(
            f"{names[k]} ({what})",
            *(x[:, k].cpu().numpy() for x in (m.means, m.variances, m.weights, m.separated)),
            counts=None if counts is None else counts[:, k],
        )
        for what, k in classes.items()
    ]


def good_and_bad_class(balance_mix: Any, per_class_ap: Sequence[float | None] | None) -> dict[str, int]:
    """The classes of highest and lowest average precision, or of confidence P(k) where no AP was recorded."""
    if _any_known(per_class_ap):
        values, what = np.array(per_class_ap, dtype=np.float64), "AP"  # None becomes NaN
    else:
        values, what = balance_mix.positive_confidence.numpy(), "confidence P(k)"
    best, worst = int(np.nanargmax(values)), int(np.nanargmin(values))
    return {f"highest {what}": best} | ({f"lowest {what}": worst} if worst != best else {})


def _any_known(values: Sequence[float | None] | None) -> bool:
    return values is not None and any(value is not None for value in values)


def _figures(facts: Mapping[str, Any]) -> dict[str, Any]:
    names, ap, groups = facts["class_names"], facts["per_class_ap"], facts["groups"]
    return {
        "per_class_ap.png": per_class_ap_figure(names, ap, groups) if _any_known(ap) else None,
        "training_curves.png": training_curves_figure(facts["state"].log_history),
        "mixtures.png": mixture_figure(facts["mixtures"]) if facts["mixtures"] else None,
    }


def _evaluations(trainer: Trainer) -> list[dict[str, Any]]:
    """For each evaluation set the figures that belong to the present weights, or the newest ones."""
    args, state, lines = trainer.args, trainer.state, trainer.state.log_history
    best_loaded = bool(
        not trainer.is_in_train and args.load_best_model_at_end and state.best_model_checkpoint and state.global_step
    )
    searched = [lines]
    if best_loaded:
        # Evaluated after training, when the best weights were back, or when they were saved.
        end = max((i for i, line in enumerate(lines) if "train_runtime" in line), default=-1)
        searched = [lines[end + 1 :], [line for line in lines if line["step"] == state.best_global_step]]
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {None: trainer.eval_dataset}
    found = []
    for name, dataset in sets.items():
        prefix = "eval_" if name is None else f"eval_{name}_"
        line = next((line for part in searched if (line := newest_line(part, f"{prefix}runtime"))), None)
        if line is None:
            continue
        values = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
        metrics = {k: v for k, v in values.items() if k not in _NO_METRICS and isinstance(v, (int, float))}
        order = (*_METRICS, *sorted(metrics.keys() - _METRICS.keys()))
        ap = values.get(PER_CLASS_AP)
        step = state.best_global_step if best_loaded else line["step"]
        found.append(
            {
                "name": name,
                "data": _describe(dataset, args.dataset_title),
                "metrics": {key: metrics[key] for key in order if key in metrics},
                "step": step,
                "epoch": next((line["epoch"] for line in lines if line["step"] == step and "epoch" in line), None),
                "weights": "best" if best_loaded else "last" if step == state.global_step else "earlier",
                "per_class_ap": None if ap is None or len(ap) != len(trainer.class_names or ap) else ap,
            }
        )
    return found


def _describe(dataset: Any, title: str | None, given: Any = None, clean: Any = None) -> dict[str, Any] | None:
    """What is recorded about a data set, called `title` or by the name that was recorded; `given` and `clean` are its
    label matrices where they are at hand."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    info = dataset.info
    file = next(iter(info.download_checksums or {}), "")
    source = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", file)
    facts = {
        "name": _line(title) or (source[1] if source else _recorded_name(info.dataset_name)),
        "hub_id": _repo_id(source[1]) if source else None,
        "revision": source[2] if source else None,
        "config": _line(info.config_name),
        "split": _line(dataset.split),
        "description": _line(without_recorded_noise(info.description)[:500]),
        "num_instances": len(dataset),
        "noise": recorded_noise(dataset),
        "noisy": "clean_labels" in dataset.column_names,
    }
    if given is not None:
        facts["num_positives"] = int((given.data == 1).sum())
        facts["num_unknown"] = int((given.data < 0).sum())
        if clean is not None:
            both = int((given == 1).multiply(clean).sum())
            unknown = int((given == -1).multiply(clean).sum())
            facts["num_added"] = facts["num_positives"] - both
            facts["num_removed"] = int(clean.sum()) - both - unknown
            facts["noisy"] = bool(facts["num_added"] or facts["num_removed"])
    return facts


def _recorded_name(name: str | None) -> str | None:
    """Without those that `datasets` gives to all data of one file format."""
    return None if name in _FILE_FORMATS else _line(name)


def _adapter(model: Any) -> dict[str, Any] | None:
    """Of a model of peft: what its adapter is, and the base model that it belongs to; None for any other model."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    if config is None or not hasattr(model, "get_base_model"):
        return None
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    targets = config.target_modules if hasattr(config, "target_modules") else None
    return {
        "kind": kind,
        "settings": {
            "rank": getattr(config, "r", None),
            "alpha": getattr(config, "lora_alpha", None),
            "targets": ", ".join(sorted(targets)) if isinstance(targets, set | list) else targets,
        },
        "num_trained": sum(trained),
        "base": None if Path(base := config.base_model_name_or_path or "").exists() else _repo_id(base),
    }


def _positives(labels: csr_array | None) -> list[int] | None:
    return None if labels is None else label_counts(labels)[1].tolist()


def _judged_labels(balance_mix: Any) -> list[list[int]] | None:
    """Of each class the given negative, and the given positive labels with p_G of at most 0.5; None without p_G."""
    return balance_mix.distrusted_counts().tolist() if balance_mix.settings.remembers_labels else None


def _suspicious(balance_mix: Any) -> tuple[int, int] | None:
    """How many labels an audit lists, and how many of them are wrong as their scores say; None without an audit."""
    if balance_mix is None or not balance_mix.has_suspicious_labels:
        return None
    score = balance_mix.suspicious_labels().score
    return len(score), round(float(score.double().sum()))


def _noise_rates(balance_mix: Any) -> dict[str, list[list[float]]] | None:
    """Estimated shares of wrong and of missing labels of each class, with their intervals; None without."""
    if balance_mix is None or balance_mix.noise_rates is None:
        return None
    return {name: rates.T.tolist() for name, rates in balance_mix.noise_rates._asdict().items()}


def _class_tables(
    num_classes: int, per_class_ap: Sequence[float | None] | None, given: Sequence[int] | None
) -> dict[str | None, list[int]]:
    """Which classes the card shows, as indices by title: all in their order without one, or of many those that a
    reader looks for."""
    if num_classes <= _ALL_SHOWN:
        return {None: list(range(num_classes))}
    tables: dict[str | None, list[int]] = {}
    if per_class_ap is not None and _any_known(per_class_ap):
        known = [k for k, ap in enumerate(per_class_ap) if ap is not None]
        worst = sorted(known, key=lambda k: per_class_ap[k] or 0.0)
        tables["The lowest average precisions"] = worst[:_SHOWN]
        tables["The highest"] = worst[::-1][:_SHOWN]
    if given is not None:
        tables["The rarest classes"] = sorted(range(num_classes), key=lambda k: given[k])[:_SHOWN]
    return tables or {"The first classes": list(range(_SHOWN))}


def _class_rows(facts: Mapping[str, Any]) -> list[list[Any]]:
    """All that the card's table can say of each class, a row each below the names of the columns; fractions, and an
    empty cell where nothing is recorded."""
    names, groups, noise = facts["class_names"], facts["groups"] or {}, facts["noise"] or {}
    judged = facts["judged"] or [None, None]
    columns: dict[str, Sequence[Any] | None] = {
        "class": names,
        "average_precision": facts["per_class_ap"],
        "group": [next((group for group, mask in groups.items() if mask[k]), None) for k in range(len(names))],
        "given_positives": facts["given"],
        "clean_positives": facts["clean"],
        "given_positives_judged_not_clean": judged[1],
        "threshold": facts["thresholds"],
    }
    for name in ("wrong", "missing"):
        for i, end in enumerate(("", "_low", "_high")):
            columns[f"estimated_{name}{end}"] = noise and [rates[i] for rates in noise[name]]
    filled = {name: values for name, values in columns.items() if values}
    return [list(filled), *map(list, zip(*filled.values(), strict=True))]


def _base_model(config: Any) -> str | None:
    """The repository on the Hub that the weights came from, or where a head was put on a backbone, the backbone's."""
    for part in (config, getattr(config, "backbone_config", None)):
        source = _repo_id(getattr(part, "name_or_path", None))
        if source and "/" in source and not Path(source).exists():
            return source
    return None


def _hardware(args: TrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    threads = f", threads: {torch.get_num_threads()}" if args.device.type == "cpu" else ""
    return f"{args.world_size} x {args.device.type.upper()} ({platform.machine()}{threads})"


def _repo_id(name: str | None) -> str | None:
    """The name if it can be a repository's on the Hub."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _line(value: Any) -> str | None:
    """One line of text; None where there is none."""
    return " ".join(str(value).split()) or None if value is not None else None


def _slug(name: str | None) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", (name or "").lower()).strip("-")


def _literal(names: Sequence[str]) -> str:
    """A list of strings as Python writes it; nothing in it ends a block of code."""
    return Markup(json.dumps(list(names)).replace("`", "\\u0060"))


def _percent(fraction: float | None) -> str:
    return Markup("not recorded") if fraction is None or not np.isfinite(fraction) else Markup(f"{100 * fraction:.1f}")


def _interval(rate: Sequence[float]) -> str:
    """An estimate and the ends of its interval, in per cent."""
    estimate, low, high = (100 * value for value in rate)
    return Markup(f"{estimate:.0f} ({low:.0f} to {high:.0f})")


def _number(value: float | None) -> str:
    if value is None:
        return Markup("not recorded")
    return Markup(f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
