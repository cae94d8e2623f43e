"""Trainers for multi-label images: overrides of Trainer's hooks, no maths.

Private hooks of transformers 5 that are relied upon, here and in resumable.py and hub.py, with a canary in
tests/test_trainer_hooks.py: `_get_dataloader`, `_get_train_sampler`, `_get_collator_with_removed_columns`,
`_prepare_inputs`, `_save`, `_save_checkpoint`, `_push_from_checkpoint`, `_save_optimizer_and_scheduler`,
`_load_optimizer_and_scheduler`, `_load_from_checkpoint`, `_load_best_model`, `_finish_current_push`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback

from hf_balancemix.core import (
    BalanceMix,
    EpochSampler,
    PairSampler,
    RefinedLabels,
    class_lift,
    effective_sample_size,
    minority_mixup,
)
from hf_balancemix.core.losses import binary_cross_entropy
from hf_balancemix.data.labels import class_names, given_labels, label_matrix
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs, collate
from hf_balancemix.data.views import ViewMaker, normalise
from hf_balancemix.frozen.cache import CachedViews
from hf_balancemix.metrics import LabelQuality, class_groups, mean_average_precision, multilabel_metrics
from hf_balancemix.models.export import export_onnx
from hf_balancemix.models.processing import squash_processor
from hf_balancemix.report.model_card import MARK, write_model_card
from hf_balancemix.report.trackers import FigureCallback
from hf_balancemix.trainer.averaging import WeightAverage, check_average
from hf_balancemix.trainer.checks import check_arguments, check_eval_dataset, check_model, check_train_dataset
from hf_balancemix.trainer.resumable import ResumableTrainer
from hf_balancemix.trainer.scan import broadcast_buffers, evaluation_mode, scan
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments, MultiLabelTrainingArguments

logger = logging.getLogger(__name__)

AVERAGE_FILE = "ema.safetensors"


class _EpochHook(TrainerCallback):
    """`on_epoch_begin` is the one place that every start, resumed or not, passes before `iter(loader)`."""

    def __init__(self, trainer: MultiLabelTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._begin_epoch(int(state.epoch))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.trainer._end_training()


class MultiLabelTrainer(ResumableTrainer):
    """A correct multi-label Trainer on images, which stock Trainer is not.

    - The gradient's size does not depend on the number of ranks or accumulation steps; losses are computed in float32.
    - RandAugment views, data order and everything else outside the model are pure functions of (seed, epoch,
      instance): resuming a run gives the same parameters, bit for bit, as the run uninterrupted.
    - A checkpoint is whole or not there; `train(resume_from_checkpoint=True)` takes the last whole one, or starts
      afresh if there is none. Weights are loaded back through `from_pretrained`, because stock Trainer silently loads
      nothing where an architecture's keys are renamed on save (ViT, Swin, DINOv2, ...).
    - `evaluate` reports mAP over all, many-, medium- and few-shot classes, CF1 and OF1.
    - With `args.ema_decay` the average of the weights is what is evaluated, saved, pushed and, after training, left in
      the model. In a checkpoint `model.safetensors` has the weights from which training goes on, and `ema.safetensors`
      their average; a push in mid-training has the average as its model.

    Args:
        model: Any image classifier of transformers with K labels.
        args: :class:`MultiLabelTrainingArguments`.
        train_dataset: `datasets.Dataset` with `image` (`datasets.Image`) and `labels` (class ids as
            `List(ClassLabel)`, or multi-hot); where `clean_labels` is there too, it is used for the class groups.
        eval_dataset: The same columns. Evaluation uses `labels`.
        processing_class: Image processor of the backbone; its normalisation is kept, images are squashed to
            `args.image_size`. What is saved is that.
        compute_metrics: Replaces the metrics named above.
        views: What makes the model's inputs of the instances; by default a :class:`ViewMaker` by `args` and the image
            processor. :class:`~hf_balancemix.frozen.cache.CachedViews` trains on cached features instead.

    Raises:
        TypeError, ValueError: Something that would go wrong later; see the message.
    """

    # What cards call the method, and whom they cite beside BalanceMix.
    method_name = "bce"
    citation: str | None = None
    figures_note: str | None = None  # what cards say where the figures are not those of the saved model alone

    # The loss is a mean over the batch: Trainer is to divide it by the accumulation steps. transformers reads the
    # attribute from 5.19 on; `model_accepts_loss_kwargs`, set below, does the same before.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MultiLabelTrainingArguments | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        processing_class: Any | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        views: ViewMaker | CachedViews | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or self._default_args()
        check_arguments(args)
        size = args.image_size or (
            None if processing_class else getattr(getattr(model, "config", None), "image_size", None)
        )
        # Cached features were made with the normalisation of the processor.
        processor = squash_processor(processing_class, size, args.normalise or isinstance(views, CachedViews))
        self._per_class_ap: np.ndarray | None = None  # of an evaluation that was not logged yet
        self.class_names, self.train_labels, self.clean_labels = None, None, None
        if train_dataset is not None:
            self.class_names = class_names(train_dataset)
            self.train_labels = given_labels(train_dataset)
            if "clean_labels" in train_dataset.column_names:
                self.clean_labels = label_matrix(train_dataset, "clean_labels")
            check_train_dataset(train_dataset, self.train_labels, args)
        check_eval_dataset(eval_dataset, self.class_names)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=compute_metrics or self._compute_metrics,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        check_model(self.model, self.class_names, processor.size["height"] if views is None else None)
        self._memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model.to(memory_format=self._memory_format)
        self.views = views or ViewMaker(
            processor.size["height"],
            args.data_seed if args.data_seed is not None else args.seed,
            resample=int(processor.resample),
            num_ops=args.randaugment_num_ops,
            magnitude=args.randaugment_magnitude,
            cutout=args.cutout,
        )
        self._mean = torch.tensor(processor.image_mean)
        self._std = torch.tensor(processor.image_std)
        self.train_sampler: EpochSampler | None = None
        self.add_callback(_EpochHook(self))
        self.add_callback(FigureCallback(self))
        self._average: WeightAverage | None = None
        self._in_checkpoint = False  # while one is being written
        if args.ema_decay:
            check_average(self)
            self._average = WeightAverage(self.model, args.ema_decay)
            self.add_callback(self._average)  # the last one: what the others do at the end is with the weights as such

    @staticmethod
    def _default_args() -> MultiLabelTrainingArguments:
        return MultiLabelTrainingArguments(output_dir="outputs")

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.blake2b(self.train_labels.numpy().tobytes(), digest_size=16)
        digest.update("\x1f".join(self.class_names).encode())
        if "image_id" in self.train_dataset.column_names:
            digest.update("\x1f".join(map(str, self.train_dataset["image_id"])).encode())
        return digest.hexdigest()

    def _run_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"ema_decay": self.args.ema_decay or None}
        if self.args.lr_scheduler_type == "one_cycle":  # which cannot be longer than it was drawn
            facts |= {"num_train_epochs": self.args.num_train_epochs, "max_steps": self.args.max_steps}
        return facts | {
            "trainer": type(self).__name__,
            "method": self.method_name,
            "num_instances": len(self.train_labels),
            "num_classes": self.train_labels.shape[1],
            "data": self._data_digest,
            "seed": self.args.seed,
            "data_seed": self.views.seed,
            "image_size": self.views.image_size,
            "global_batch_size": self.args.global_batch_size,
            "ranks": self.args.world_size,
        }

    # ---- data ----

    def _make_sampler(self) -> EpochSampler:
        return EpochSampler(len(self.train_labels), self.views.seed)

    def _training_pairs(self) -> TrainingPairs:
        return TrainingPairs(self.train_dataset, self.train_labels, self.views)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        self.train_sampler = self._make_sampler()
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Loader of collated pairs; every rank takes its share of whole pairs."""
        if self.train_dataset is None:
            raise ValueError("there is no train_dataset; pass one to the trainer.")
        return self._get_dataloader(
            dataset=self._training_pairs(),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_dataloader(self, dataset: Dataset, *args: Any, **kwargs: Any) -> DataLoader:
        if isinstance(dataset, datasets.Dataset):  # evaluation and prediction
            dataset = PlainInstances(dataset, self.views)
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        # Each iter() of a loader draws a base seed from the global generator unless it has its own; how often that
        # happens differs between an uninterrupted and a resumed run.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        return data_collator  # rows hold tensors for compute_loss, which are not arguments of the model

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = super()._prepare_inputs(inputs)
        return {name: self._normalise(x) if x.dtype == torch.uint8 else x for name, x in inputs.items()}

    def _normalise(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:  # cached features
            return images
        images = images.contiguous(memory_format=self._memory_format)
        return normalise(images, self._mean.to(images.device), self._std.to(images.device))

    # ---- optimiser ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: MultiLabelTrainingArguments, model: nn.Module | None = None) -> Any:
        """Trainer's, and `torch.optim.Adam` for "adam"."""
        if args.optim != "adam":
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.Adam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's: all but biases and the weights of layer norms; without `decay_vectors`, no vector at all."""
        names = super().get_decay_parameter_names(model)
        if self.args.decay_vectors:
            return names
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
        return [name for name in names if name not in vectors]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's, and `OneCycleLR` for "one_cycle"."""
        if self.args.lr_scheduler_type != "one_cycle":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            rise = float(self.args.warmup_steps)
            rise = rise if rise < 1 else rise / num_training_steps
            if rise >= 1:
                rise = 1 - 1 / num_training_steps  # torch divides by the length of the fall
            if round(rise * num_training_steps, 6) == 1:
                rise = 0.0  # and by that of the rise less one step
            settings = {"max_lr": self.args.learning_rate, "total_steps": num_training_steps, "pct_start": rise}
            settings |= self.args.lr_scheduler_kwargs or {}
            self.lr_scheduler = OneCycleLR(optimizer or self.optimizer, **settings)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- training and evaluation ----

    def _begin_epoch(self, epoch: int) -> None:
        if self.state.global_step == 0:  # also where auto_find_batch_size begins again
            self._reset_run_state()
        # Trainer's own set_epoch does not reach the sampler after resuming in mid-epoch on several ranks.
        self.train_sampler.set_epoch(epoch)

    def _end_training(self) -> None:
        pass

    def _scan(self, observe: Callable[[Tensor, Tensor], None], **options: Any) -> None:
        """Must be called on every rank: `observe` gets the logits of every training instance once; see `scan`.

        `options` go to the model's forward.
        """

        def forward(batch: dict[str, Tensor]) -> Tensor:
            images = self._normalise(batch["pixel_values"].to(self.args.device, non_blocking=True))
            return self.model(pixel_values=images, **options).logits

        scan(
            forward,
            self.model,
            PlainInstances(self.train_dataset, self.views, self.train_labels),
            observe,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            show_progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Eq. 1 on `pixel_values` `(B, 3, S, S)` and `labels` `(B, K)`, as a mean over the batch."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = binary_cross_entropy(outputs.logits, inputs["labels"], reduction=self.args.loss_reduction)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, float32 logits `(B, K)` and labels `(B, K)`; the last two are None or absent where not asked for."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(pixel_values=inputs["pixel_values"]).logits.float()
        loss = None
        if labels is not None:
            loss = binary_cross_entropy(logits, labels, reduction=self.args.loss_reduction)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the averaged weights if there are any, and the same batch-norm statistics on every rank."""
        with self._averaged():
            broadcast_buffers(self.model)
            return super().evaluation_loop(*args, **kwargs)

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model has its averaged weights, if there are any."""
        return nullcontext() if self._average is None else self._average.in_place()

    @property
    def class_counts(self) -> np.ndarray | None:
        """`(K,)` positive training labels a class, clean ones where they are known; None without training data."""
        labels = self.train_labels if self.clean_labels is None else self.clean_labels
        return None if labels is None else (labels == 1).sum(0).numpy()

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        self._per_class_ap = mean_average_precision(prediction.predictions, prediction.label_ids)["per_class_ap"]
        return multilabel_metrics(
            prediction.predictions,
            prediction.label_ids,
            class_counts=self.class_counts,
            many=self.args.many_shot,
            few=self.args.few_shot,
            class_names=self.class_names,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A resumed run gives every rank the checkpoint's batch-norm statistics, which are the first rank's.
        broadcast_buffers(self.model)
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with nullcontext() if self._in_checkpoint else self._averaged():
            super()._save(output_dir, state_dict)

    def _set_model_aside(self, checkpoint: Path, folder: Path) -> None:
        if self._average is None:
            return super()._set_model_aside(checkpoint, folder)
        with self._averaged():  # what the card's figures are of
            super()._save(str(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            save_file(self._average.state_dict(), Path(output_dir, AVERAGE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_average(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str | None) -> None:
        if self._average is not None and checkpoint is not None:
            self._average.load_state_dict(load_file(Path(checkpoint, AVERAGE_FILE)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; the record of an evaluation also keeps each class's average precision, for the card."""
        super().log(logs, start_time)
        prefix = next((name.removesuffix("mAP") for name in logs if name.endswith("_mAP")), None)
        if prefix is not None and self._per_class_ap is not None:
            per_class = [None if np.isnan(value) else float(value) for value in self._per_class_ap]
            self.state.log_history[-1][f"{prefix}per_class_ap"] = per_class
            self._per_class_ap = None

    # ---- what others get ----

    _card_mark = MARK

    def _write_card(self, folder: Path) -> None:
        write_model_card(self, folder)

    @property
    def saved_model(self) -> nn.Module:
        """The bare model that `save_model` writes."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def export_onnx(self, path: str | Path) -> None:
        """Write the model that `save_model` writes as ONNX; see :func:`~hf_balancemix.models.export.export_onnx`.

        Must be called on every rank.
        """
        try:
            if self.is_world_process_zero():
                with self._averaged():
                    export_onnx(self.saved_model, path, self.views.image_size)
        finally:  # an error on the first rank must not leave the others waiting
            self.accelerator.wait_for_everyone()


class BalanceMixTrainer(MultiLabelTrainer):
    """BalanceMix (Song, Kim, Lee; AAAI 2024) as a Trainer: Algorithm 1 for unbalanced, wrong or missing labels.

    With `args.minority_score="uniform"` and `args.select_clean=False` it is plain Mixup.

    Args:
        As :class:`MultiLabelTrainer`; `args` are :class:`BalanceMixTrainingArguments`. Where `train_dataset` has
        `clean_labels`, label-quality figures (Eq. 14, 15) are logged every epoch; the method never sees them.

    Attributes:
        balance_mix: :class:`~hf_balancemix.core.BalanceMix`, the method's state.
    """

    args: BalanceMixTrainingArguments
    method_name = "balancemix"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, BalanceMixTrainingArguments):
            raise TypeError(
                f"args is {type(self.args).__name__}; BalanceMixTrainer needs BalanceMixTrainingArguments."
            )
        self.quality = LabelQuality()
        self.balance_mix: BalanceMix | None = None
        if self.train_labels is not None:
            self.balance_mix = BalanceMix(self.train_labels, self.args.balance_mix_settings())

    @staticmethod
    def _default_args() -> BalanceMixTrainingArguments:
        return BalanceMixTrainingArguments(output_dir="outputs")

    def _make_sampler(self) -> PairSampler:
        return PairSampler(len(self.train_labels), self.views.seed, weights=lambda: self.balance_mix.weights)

    def _training_pairs(self) -> TrainingPairs:
        settings = self.balance_mix.settings
        return TrainingPairs(
            self.train_dataset,
            self.train_labels,
            self.views,
            clean_labels=self.clean_labels,
            two_views_from=max(settings.label_warmup_epochs, 1) if self._predicts_in_steps else None,
            mixup_alpha=settings.mixup_alpha,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """A step of Algorithm 1: refine both batches (after the warm-up), mix them (Eq. 5), Eq. 10 on the result."""
        if "minority_pixel_values" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        lam = inputs["lam"][:1].expand_as(inputs["lam"]) if self.args.lambda_per_batch else inputs["lam"]
        images, targets = minority_mixup(
            inputs["pixel_values"], inputs["minority_pixel_values"], inputs["labels"], inputs["minority_labels"], lam
        )
        weight = None
        if self.balance_mix.settings.manages_labels(self.balance_mix.epoch):
            random = self._refine(inputs, "")
            minority = self._refine(inputs, "minority_")
            if "clean_labels" in inputs:
                self._count_quality(inputs, random)
            targets, weight = self.balance_mix.mix_labels(random, minority, lam)
        outputs = model(pixel_values=images)
        loss = self.balance_mix.loss(outputs.logits, targets, weight)
        return (loss, outputs) if return_outputs else loss

    @property
    def _predicts_in_steps(self) -> bool:
        settings = self.balance_mix.settings
        return settings.select_clean and settings.prediction_source == "views"

    def _refine(self, inputs: dict[str, Tensor], prefix: str) -> RefinedLabels:
        probabilities = self._of_two_views(inputs, prefix) if self._predicts_in_steps else None
        return self.balance_mix.refine(inputs[f"{prefix}index"], inputs[f"{prefix}labels"], probabilities)

    def _of_two_views(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        # self.model, as Trainer evaluates with: under DDP the bare module, so no reducer and no broadcast of buffers.
        with torch.no_grad(), evaluation_mode(self.model):
            views = (
                self.model(pixel_values=inputs[f"{prefix}{name}"]).logits.float().sigmoid()
                for name in ("pixel_values", "second_view")
            )
            return sum(views) / 2

    def _count_quality(self, inputs: dict[str, Tensor], refined: RefinedLabels) -> None:
        # An unknown label counts as a given negative one, which is what it would be without the mark.
        given, labels = inputs["labels"].clamp(min=0), refined.labels.clamp(min=0)
        self.quality.update(given, inputs["clean_labels"], labels, refined.reliability)

    # ---- epochs ----

    def _begin_epoch(self, epoch: int) -> None:
        super()._begin_epoch(epoch)
        # After resuming in the middle of an epoch its statistics are there already; made again they would differ.
        if epoch > self.balance_mix.epoch:
            self._end_epoch(epoch)

    def _end_training(self) -> None:
        epoch = int(self.state.epoch)
        if epoch > self.balance_mix.epoch:
            self._end_epoch(epoch)

    def _end_epoch(self, epoch: int) -> None:
        """Algorithm 1's end of an epoch. It runs at the start of the next one, so that a checkpoint of the last step,
        which is written before Trainer's `on_epoch_end`, leads to the very same."""
        self.quality.reduce()
        logs = {f"label_{name}": value for name, value in self.quality.compute().items()}
        self.quality.reset()
        if self.balance_mix.settings.needs_scan:
            self._scan(self.balance_mix.observe)
            self.balance_mix.end_epoch(epoch)
            logs |= self._sampler_logs()
        else:
            self.balance_mix.epoch = epoch
        if logs:
            self.log(logs)

    def _sampler_logs(self) -> dict[str, float]:
        """What the sampler and the mixtures made of the scan: effective sample size, draws a class group, mean p_G."""
        state = self.balance_mix
        known = self.train_labels if self.clean_labels is None else self.clean_labels
        logs = {"sampler_effective_size": effective_sample_size(state.weights)}
        lift = class_lift(state.weights, known).numpy()
        for name, group in class_groups(self.class_counts, self.args.many_shot, self.args.few_shot).items():
            if np.isfinite(lift[group]).any():
                logs[f"sampler_lift_{name}"] = float(np.nanmean(lift[group]))
        if len(state.clean_probability):
            p, given = state.clean_probability.float().cpu(), state.labels.cpu()
            for name, labels in (("p_clean_mean", given >= 0), ("p_clean_mean_positives", given == 1)):
                logs[name] = p[labels].mean().item() if labels.any() else 1.0
        return logs

    # ---- checkpoints ----

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"settings": asdict(self.args.balance_mix_settings())}

    def _run_state(self) -> dict[str, Tensor]:
        self.quality.reduce()
        return self.balance_mix.state_dict() | {f"quality.{k}": v for k, v in self.quality.state_dict().items()}

    def _reset_run_state(self) -> None:
        self.balance_mix.reset()
        self.quality.reset()

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        quality = {k.removeprefix("quality."): v for k, v in state.items() if k.startswith("quality.")}
        self.balance_mix.load_state_dict(state)
        self.quality.load_state_dict(quality)
