"""One cell of a grid: a training run from its description to a JSON file that says all about it.

    accelerate launch -m benchmarks.paper.cell JOB.json

is how the runner starts one in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import timm
import torch
import transformers
from filelock import Timeout
from transformers import PrinterCallback, set_seed

import hf_balancemix
from benchmarks.paper.tables import Cell, settings_by_noise
from hf_balancemix.core.distributed import leave_process_group
from hf_balancemix.core.sampling import class_confidences
from hf_balancemix.data import (
    class_names,
    from_csv,
    given_labels,
    label_matrix,
    load_coco,
    load_deepfashion,
    load_voc,
    make_scenes,
)
from hf_balancemix.files import process_lock, whole_file
from hf_balancemix.frozen.backbone import FrozenBackbone, FrozenStages
from hf_balancemix.methods.registry import trainer_for
from hf_balancemix.metrics import class_groups, mean_average_precision
from hf_balancemix.scripts.arguments import FROM_SCRATCH, SCHEDULES, ModelArguments, NoiseArguments
from hf_balancemix.scripts.train import add_noise, load_model_from
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

logger = logging.getLogger(__name__)

BUSY = 75  # exit status where another process is at the cell
TrainAndEvaluation = tuple[datasets.Dataset, datasets.Dataset]


@dataclass(frozen=True)
class Source:
    """A data set that cells can be run on, with the paper's settings for it."""

    needs: str
    """The files, for people."""
    load: Callable[[str | None], TrainAndEvaluation]
    """From the data set's folder."""
    settings: Mapping[str, Any]
    many_shot: int = 10_000
    few_shot: int = 1_000


def _coco(year: int) -> Source:
    def load(root: str | None) -> TrainAndEvaluation:
        return load_coco(root, split="train", year=year), load_coco(root, split="val", year=year)

    needs = f"train{year}/, val{year}/ and annotations/instances_train{year}.json, instances_val{year}.json"
    return Source(needs, load, SCHEDULES["coco"])


def _voc(train: tuple[str, str], evaluation: tuple[str, str], needs: str) -> Source:
    def load(root: str | None) -> TrainAndEvaluation:
        # The paper's class counts fit difficult objects as negative.
        return load_voc(root, *train, difficult="negative"), load_voc(root, *evaluation, difficult="negative")

    return Source(needs, load, SCHEDULES["voc"])


def _voc2012(root: str | None) -> TrainAndEvaluation:
    return load_voc(root, "2012", "train"), load_voc(root, "2012", "val")


def _deepfashion(root: str | None) -> TrainAndEvaluation:
    return load_deepfashion(root, split="train+val"), load_deepfashion(root, split="test")


def _csv(root: str | None) -> TrainAndEvaluation:
    return from_csv(Path(root or "", "train.csv")), from_csv(Path(root or "", "val.csv"))


def _sample(root: str | None) -> TrainAndEvaluation:
    folder = root or make_scenes()
    return load_coco(folder, split="train"), load_coco(folder, split="val")


SOURCES: dict[str, Source] = {
    "coco": _coco(2017),
    "coco2014": _coco(2014),
    "voc": _voc(
        ("2007+2012", "trainval"), ("2007", "test"), "VOCdevkit/VOC2007 (trainval and test) and VOCdevkit/VOC2012"
    ),
    "voc2012": Source(
        "VOCdevkit/VOC2012 with its splits train and val",
        _voc2012,
        SCHEDULES["voc"],
    ),
    "deepfashion": Source(
        "Anno_fine/ and Img/ of the Category and Attribute Prediction benchmark",
        _deepfashion,
        SCHEDULES["deepfashion"],
    ),
    "csv": Source("train.csv and val.csv, each with file_name and one 0/1 column a class", _csv, SCHEDULES["voc"]),
    "sample": Source(
        "nothing: it is drawn",
        _sample,
        SCHEDULES["sample"] | {"mixup_alpha": 0.2},
        300,
        150,
    ),
}


@dataclass(frozen=True)
class Setup:
    """What all cells of a grid have in common."""

    dataset: str
    model_name_or_path: str = "timm/resnet50.tv_in1k"
    head: str = "ml_decoder"
    """The paper's is a transformer decoder; a frozen backbone is loaded with its plain `"linear"` one."""
    backbone_weights: str | None = None
    from_scratch: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = 448
    frozen_backbone: bool = False
    """Train a small head on cached features."""
    frozen_stages: int | None = None
    """Train all but the first so many stages on cached activations."""
    num_views: int = 6
    hidden_size: int = 256
    preset: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments."""
    many_shot: int = 10_000
    few_shot: int = 1_000
    min_positives: int = 1
    """mAP counts the classes with so many positive labels in the training and in the evaluation set."""
    eval_classes: tuple[str, ...] | None = None
    """Instead: their names."""

    @property
    def is_frozen(self) -> bool:
        """Whether cached features or activations take the place of images."""
        return self.frozen_backbone or self.frozen_stages is not None

    @property
    def grid_settings(self) -> dict[str, Any]:
        """Training arguments that were chosen for the grid; a table's own give way to them."""
        return ({} if self.preset == "default" else {"preset": self.preset}) | dict(self.settings)

    def facts(self) -> dict[str, Any]:
        """What defines the numbers: everything, but with the weights' content instead of their place."""
        facts = asdict(self)
        if self.backbone_weights is not None:
            with open(self.backbone_weights, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            facts["backbone_weights"] = {"file": Path(self.backbone_weights).name, "sha256": digest}
        return json.loads(json.dumps(facts))


class GridData:
    """What a grid's cells share: the data sets and, for a frozen backbone or stages, the features.

    Args:
        setup: The grid's.
        data_dir: Folder of the data set.
        cache_dir: Where features are kept.

    Attributes:
        train: The training set, without noise.
        evaluation: The evaluation set.
    """

    def __init__(self, setup: Setup, data_dir: str | None, cache_dir: str | os.PathLike[str]) -> None:
        self.setup, self.cache_dir = setup, cache_dir
        source = SOURCES[setup.dataset]
        if data_dir is None and setup.dataset != "sample":
            raise ValueError(f"--data_dir is not given; {setup.dataset} needs a folder with {source.needs}.")
        self.train, self.evaluation = source.load(data_dir)
        self._frozen: FrozenBackbone | FrozenStages | None = None

    def class_counts(self) -> np.ndarray:
        """`(K,)` positive labels of each class in the training set, without noise."""
        return (label_matrix(self.train) == 1).sum(0).numpy()

    def eval_classes(self) -> np.ndarray:
        """`(K,)` bool: the classes that mAP counts."""
        names = class_names(self.train)
        if self.setup.eval_classes is not None:
            unknown = sorted(set(self.setup.eval_classes) - set(names))
            if unknown:
                raise ValueError(
                    f"eval_classes names {', '.join(unknown)}, which the data set does not have; its classes are "
                    f"{', '.join(names)}."
                )
            return np.isin(names, self.setup.eval_classes)
        positives = [(given_labels(part) == 1).sum(0).numpy() for part in (self.train, self.evaluation)]
        return np.minimum(*positives) >= max(self.setup.min_positives, 1)

    def freeze(self, args: BalanceMixTrainingArguments) -> None:
        """Compute what a frozen backbone gives, once; both data sets then have a column that says where it is."""
        s = self.setup
        if s.is_frozen and self._frozen is None:
            set_seed(0)  # the same backbone in every process, even one from scratch
            data, load = (self.train, self.evaluation, args, self.cache_dir), partial(self._load_model, self.train)
            if s.frozen_stages is not None:
                self._frozen = FrozenStages(load, *data, num_views=s.num_views, num_stages=s.frozen_stages)
            else:
                self._frozen = FrozenBackbone(*load(), *data, num_views=s.num_views, hidden_size=s.hidden_size)
            self.train, self.evaluation = self._frozen.train, self._frozen.evaluation

    def model(self, cell: Cell, args: BalanceMixTrainingArguments, train: datasets.Dataset) -> dict[str, Any]:
        """The trainer's arguments `model`, `processing_class` and `views`, drawn with the cell's seed for the labels
        of `train`, after :meth:`freeze`."""
        if self._frozen is not None:
            return self._frozen.draw(args)
        set_seed(cell.seed)
        model, processor = self._load_model(train, **dict(cell.model))
        return {"model": model, "processing_class": processor}

    def _load_model(self, train: datasets.Dataset, **changes: Any) -> tuple[Any, Any]:
        s = self.setup
        options = {"model_name_or_path": s.model_name_or_path, "image_size": s.image_size, "head": s.head}
        options |= changes
        flags = ModelArguments(
            model_name_or_path=options["model_name_or_path"],
            backbone_weights=s.backbone_weights,
            from_scratch=s.from_scratch,
            model_kwargs=s.model_kwargs,
            head=None if options["head"] == "linear" or s.frozen_backbone else options["head"],
        )
        return load_model_from(flags, train, options["image_size"])


def arguments_of(cell: Cell, setup: Setup, folder: str | os.PathLike[str]) -> BalanceMixTrainingArguments:
    """A cell's training arguments: the paper's for data set and noise, over them the grid's, then the cell's own."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": cell.seed,
        "preset": setup.preset,
        "image_size": dict(cell.model).get("image_size", setup.image_size),
        "many_shot": setup.many_shot,
        "few_shot": setup.few_shot,
        "report_to": "none",
        "eval_strategy": "no",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_strategy": "epoch",
        "per_device_eval_batch_size": 64,
        "dataloader_pin_memory": torch.cuda.is_available(),  # else a warning with every loader
    }
    if setup.is_frozen:  # done in seconds or minutes: a killed cell begins again
        values |= {"save_strategy": "no", "disable_tqdm": True}
    if setup.frozen_backbone:
        values["per_device_eval_batch_size"] = 512
    usual = SOURCES[setup.dataset].settings
    values |= usual
    chosen = dict(setup.settings) | dict(cell.settings)
    if chosen.get("num_train_epochs", usual.get("num_train_epochs")) != usual.get("num_train_epochs"):
        values.pop("label_warmup_epochs", None)  # that of other epochs
    values |= settings_by_noise(cell.noise, chosen.get("preset", setup.preset))
    if setup.from_scratch:
        values |= FROM_SCRATCH
    values |= chosen
    return BalanceMixTrainingArguments(**values)


def run_cell(
    cell: Cell, setup: Setup, data: GridData, folder: str | os.PathLike[str], out: str | os.PathLike[str]
) -> None:
    """Train, evaluate and write the cell's JSON, whole or not at all; called on every rank.

    Training goes on from the last checkpoint in `folder`. What is saved there is of no use once the JSON is written,
    and is removed.

    Args:
        cell: What to run.
        setup: What all cells have in common.
        data: The data of `setup`.
        folder: For checkpoints.
        out: The JSON file.

    Raises:
        filelock.Timeout: Another process is at this cell.
    """
    folder, out = Path(folder), Path(out)
    if out.is_file():  # another process was faster
        return
    args = arguments_of(cell, setup, folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder.with_name(f"{folder.name}.lock")
    with process_lock(lock_file, wait=False) if args.process_index == 0 else nullcontext():
        began, cpu = time.monotonic(), time.process_time()
        data.freeze(args)  # before the noise: the features' column is added to data.train
        noise = {"single-positive": "single_positive"}.get(cell.noise, cell.noise)
        with args.main_process_first():
            train = add_noise(data.train, NoiseArguments(noise=noise, noise_rate=cell.rate, noise_seed=cell.seed))
        network = data.model(cell, args, train)  # after the noise: the head ms_cma is made of the labels
        trainer = trainer_for(cell.method, args, train_dataset=train, eval_dataset=data.evaluation, **network)
        if args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        trained = trainer.train(resume_from_checkpoint=args.save_strategy != "no")
        prediction = trainer.predict(data.evaluation)
        confidence = _confidence(trainer, train)
        if trainer.is_world_process_zero():
            result = _result(cell, setup, data, trainer, prediction, confidence)
            result["seconds"] = {
                "train": trained.metrics["train_runtime"],
                "all": time.monotonic() - began,
                "cpu": time.process_time() - cpu,
            }
            write_json(out, result)
            shutil.rmtree(folder, ignore_errors=True)
    if args.process_index == 0:
        lock_file.unlink(missing_ok=True)


def _confidence(trainer: Any, train: datasets.Dataset) -> torch.Tensor:
    """`(K,)` P(k) of Eq. 2 after the training, on the given labels."""
    state = getattr(trainer, "balance_mix", None)
    if state is not None and state.settings.needs_scan:
        return state.positive_confidence
    logits = torch.from_numpy(trainer.predict(train).predictions)
    labels = given_labels(train)
    return class_confidences(logits.sigmoid(), labels)[0]


def _result(
    cell: Cell, setup: Setup, data: GridData, trainer: Any, prediction: Any, confidence: torch.Tensor
) -> dict[str, Any]:
    names, counts, counted = class_names(data.train), data.class_counts(), data.eval_classes()
    ap = mean_average_precision(prediction.predictions, prediction.label_ids, class_names=names)["per_class_ap"]
    groups = class_groups(counts, setup.many_shot, setup.few_shot)
    means = {"all": counted} | {name: mask & counted for name, mask in groups.items()}
    private = ("output_dir", "logging_dir", "run_name", "hub", "push_to_hub", "_n_gpu", "local_rank")
    settings = {k: v for k, v in trainer.args.to_dict().items() if not k.startswith(private) and v is not None}
    return {
        "cell": asdict(cell),
        "setup": setup.facts(),
        "settings": settings,
        "num_epochs": int(trainer.args.num_train_epochs),
        "num_instances": [len(data.train), len(data.evaluation)],
        "class_names": names,
        "class_counts": counts.tolist(),
        "class_groups": [next(name for name, mask in groups.items() if mask[k]) for k in range(len(names))],
        "eval_classes": [name for name, is_counted in zip(names, counted, strict=True) if is_counted],
        "per_class_ap": [None if np.isnan(value) else float(value) for value in ap],
        "positive_confidence": confidence.tolist(),
        "mAP": {name: float(np.nanmean(ap[mask])) if mask.any() else None for name, mask in means.items()},
        "CF1": prediction.metrics.get("test_CF1"),
        "OF1": prediction.metrics.get("test_OF1"),
        "epochs": _by_epoch(trainer.state.log_history),
        "versions": versions(),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "ranks": trainer.args.world_size,
    }


# What Trainer logs of itself, by the names' beginnings. All else is the loss, or the method's own.
_TRAINERS_OWN = ("epoch", "step", "grad_norm", "learning_rate", "num_input", "total_flos", "train_", "eval_", "test_")


def _by_epoch(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged at the end of each epoch: the training loss and whatever figures the method has of its own, such
    as label quality; None for one that is not finite."""
    by_epoch: dict[int, dict[str, Any]] = {}
    for line in history:
        figures = {name: value for name, value in line.items() if not name.startswith(_TRAINERS_OWN)}
        kept = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        if kept and float(line["epoch"]).is_integer():
            by_epoch.setdefault(int(line["epoch"]), {}).update(kept)
    return [{"epoch": epoch, **by_epoch[epoch]} for epoch in sorted(by_epoch)]


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers may depend on."""
    packages = (hf_balancemix, torch, transformers, accelerate, datasets, timm, np)
    return {"python": platform.python_version()} | {package.__name__: package.__version__ for package in packages}


def git_commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """The commit of the repository, `+changes` where the package or the benchmarks differ from it or have files that
    are no part of it; None without a repository."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(root):  # a copy inside somebody else's repository
            return None
        changes = git("status", "--porcelain", "--", "hf_balancemix", "benchmarks")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(file: Path, value: Any) -> None:
    """The file under its name only once it is whole."""
    with whole_file(file) as temporary:
        text = json.dumps(value, indent=1, allow_nan=False, default=str)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def cell_from_json(value: Mapping[str, Any]) -> Cell:
    """The cell that `asdict` and JSON made a dict of."""
    pairs = {name: tuple((k, v) for k, v in value[name]) for name in ("settings", "model")}
    return Cell(**{**value, **pairs})


def setup_from_json(value: Mapping[str, Any]) -> Setup:
    """The setup that `asdict` and JSON made a dict of."""
    classes = value["eval_classes"]
    return Setup(**{**value, "eval_classes": None if classes is None else tuple(classes)})


def main(argv: list[str]) -> None:
    """Run the cell that a JSON file describes: `cell`, `setup`, `data_dir`, `cache_dir`, `folder`, `out`."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    cell, setup = cell_from_json(job["cell"]), setup_from_json(job["setup"])
    try:
        run_cell(cell, setup, GridData(setup, job["data_dir"], job["cache_dir"]), job["folder"], job["out"])
    except Timeout:
        sys.exit(BUSY)
    leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
