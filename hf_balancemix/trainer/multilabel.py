"""A correct multi-label Trainer on images: overrides of Trainer's hooks, no maths.

Private hooks of transformers 5 that are relied upon, here and in averaging.py, resumable.py and hub.py, with a canary
in tests/trainer/test_trainer_hooks.py: `_get_dataloader`, `_get_train_sampler`, `_get_collator_with_removed_columns`,
`_prepare_inputs`, `_save`, `_save_checkpoint`, `_push_from_checkpoint`, `_save_optimizer_and_scheduler`,
`_load_optimizer_and_scheduler`, `_load_from_checkpoint`, `_load_best_model`, `_finish_current_push`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback

from hf_balancemix.core import EpochSampler
from hf_balancemix.core.losses import binary_cross_entropy
from hf_balancemix.data.labels import class_names, given_labels, label_matrix
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs, collate
from hf_balancemix.data.views import ViewMaker, Views, normalise
from hf_balancemix.metrics import evaluation_figures
from hf_balancemix.models.export import export_onnx
from hf_balancemix.models.processing import squash_processor
from hf_balancemix.report.model_card import PER_CLASS_AP
from hf_balancemix.report.trackers import FigureCallback
from hf_balancemix.trainer import optimisation
from hf_balancemix.trainer.averaging import AveragingTrainer
from hf_balancemix.trainer.checks import check_arguments, check_eval_dataset, check_model, check_train_dataset
from hf_balancemix.trainer.last_batch import fault_of_one_instance, has_batch_of_one
from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments


class _EpochHook(TrainerCallback):
    """`on_epoch_begin` is the one place that every start, resumed or not, passes before `iter(loader)`."""

    def __init__(self, trainer: MultiLabelTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._check_last_batch()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._begin_epoch(int(state.epoch))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.trainer._end_training()


class MultiLabelTrainer(AveragingTrainer):
    """Trains any image classifier with binary cross-entropy (Eq. 1) on RandAugment views, as stock Trainer does not:

    - The size of a gradient does not depend on the number of ranks or accumulation steps; losses are computed in
      float32.
    - Views, data order and everything else outside the model are pure functions of (seed, epoch, instance): a run that
      is resumed ends with the same parameters, bit for bit, as the same run uninterrupted.
    - A checkpoint is whole or not there; `train(resume_from_checkpoint=True)` takes the last whole one, or starts
      afresh if there is none. Weights are loaded back through `from_pretrained`, because stock Trainer silently loads
      nothing where an architecture's keys are renamed on save (ViT, Swin, DINOv2, ...).
    - `evaluate` reports mAP over all, many-, medium- and few-shot classes, CF1 and OF1.
    - With `args.ema_decay` the average of the weights is what is evaluated, saved and pushed, and left by training.

    Args:
        model: Any image classifier of transformers with K labels.
        args: :class:`MultiLabelTrainingArguments`.
        train_dataset: `datasets.Dataset` with `image` (`datasets.Image`) and `labels` (class ids as
            `List(ClassLabel)`, or multi-hot); where `clean_labels` is there too, it is used for the class groups.
        eval_dataset: The same columns. Evaluation uses `labels`.
        processing_class: Image processor of the backbone; its normalisation is kept, images are resized to
            `args.image_size`. What is saved is that.
        compute_metrics: Replaces the metrics named above.
        views: What makes the model's inputs of the instances; by default a :class:`ViewMaker` by `args` and the image
            processor. :class:`~hf_balancemix.frozen.cache.CachedViews` trains on cached features instead.

    Attributes:
        train_labels: `(N, K)` int8 given labels, 0, 1 or -1 (unknown); None without `train_dataset`.
        clean_labels: `(N, K)` uint8, where the data set has them.

    Raises:
        TypeError, ValueError: Something that would go wrong later; see the message.
    """

    args: MultiLabelTrainingArguments
    train_dataset: datasets.Dataset
    train_sampler: EpochSampler
    optimizer: Any
    lr_scheduler: Any
    _arguments_class = MultiLabelTrainingArguments
    _forward_options: ClassVar[dict[str, Any]] = {}  # of the model in training steps and scans
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
        views: Views | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or self._arguments_class(output_dir="outputs")
        check_arguments(args, self._arguments_class)
        size = args.image_size or (
            None if processing_class else getattr(getattr(model, "config", None), "image_size", None)
        )
        # Cached features were made with the normalisation of the processor.
        cached = views is not None and views.num_views is not None
        processor = squash_processor(processing_class, size, args.normalise or cached)
        self._per_class_ap: np.ndarray | None = None  # of an evaluation that was not logged yet
        self.class_names: list[str] | None = None
        self.train_labels: Tensor | None = None
        self.clean_labels: Tensor | None = None
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
        seed = args.seed if args.data_seed is None else args.data_seed
        self.views: Views = views or ViewMaker.from_arguments(args, processor, seed)
        self._mean = torch.tensor(processor.image_mean)
        self._std = torch.tensor(processor.image_std)
        self.add_callback(_EpochHook(self))
        self.add_callback(FigureCallback(self))
        self._begin_averaging()

    @property
    def _training_labels(self) -> Tensor:
        """`train_labels`, where there must be some."""
        if self.train_labels is None:
            raise ValueError("train_dataset is None; it must be a datasets.Dataset to train on; pass one.")
        return self.train_labels

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.blake2b(self._training_labels.numpy().tobytes(), digest_size=16)
        digest.update("\x1f".join(self.class_names or ()).encode())
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
            "num_instances": len(self._training_labels),
            "num_classes": self._training_labels.shape[1],
            "data": self._data_digest,
            "seed": self.args.seed,
            "data_seed": self.views.seed,
            "image_size": self.views.image_size,
            "global_batch_size": self.args.global_batch_size,
            "ranks": self.args.world_size,
        }

    # ---- data ----

    def _make_sampler(self) -> EpochSampler:
        return EpochSampler(len(self._training_labels), self.views.seed)

    def _training_pairs(self, **options: Any) -> TrainingPairs:
        return TrainingPairs(self.train_dataset, self._training_labels, self.views, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        self.train_sampler = self._make_sampler()
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Loader of collated pairs; every rank takes its share of whole pairs."""
        return self._get_dataloader(
            dataset=self._training_pairs(),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_dataloader(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dataset, datasets.Dataset):  # evaluation and prediction
            dataset = PlainInstances(dataset, self.views)
        loader: Any = super()._get_dataloader(dataset, *args, **kwargs)
        # Each iter() of a loader draws a base seed from the global generator unless it has its own; how often that
        # happens differs between an uninterrupted and a resumed run.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        return data_collator  # rows hold tensors for compute_loss, which are not arguments of the model

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = super()._prepare_inputs(inputs)
        return {name: self._normalise(x) for name, x in inputs.items()}

    def _normalise(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:  # cached features; labels
            return images
        images = images.contiguous(memory_format=self._memory_format)
        return normalise(images, self._mean.to(images.device), self._std.to(images.device))

    # ---- optimiser ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        """Trainer's, and `torch.optim.Adam` for "adam"."""
        return optimisation.adam(args) if args.optim == "adam" else Trainer.get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's: all but biases and the weights of layer norms; without `decay_vectors`, no vector at all."""
        names = super().get_decay_parameter_names(model)
        return names if self.args.decay_vectors else optimisation.without_vectors(names, model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's, and `OneCycleLR` for "one_cycle"."""
        if self.args.lr_scheduler_type != "one_cycle":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = optimisation.one_cycle(optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- training and evaluation ----

    def _check_last_batch(self) -> None:
        """A model that cannot be trained on one instance never meets one."""
        args, n, size = self.args, len(self._training_labels), self._train_batch_size
        num_batches = max(args.max_steps, 0) * args.gradient_accumulation_steps
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # whose forward pass all ranks must call alike
        if not has_batch_of_one(n, size, args.world_size, args.dataloader_drop_last, num_batches):
            return
        row = collate([PlainInstances(self.train_dataset, self.views, self.train_labels)[0]])
        images = self._normalise(row["pixel_values"].to(args.device))

        def forward() -> Tensor:
            return self.model(pixel_values=images, **self._forward_options).logits

        if (fault := fault_of_one_instance(self.model, forward)) is not None:
            which = "each batch" if size == 1 else f"the last batch of an epoch ({n} in batches of {size})"
            fix = "raise the batch size" if size == 1 else "set dataloader_drop_last=True, or another batch size"
            raise ValueError(
                f"{which} has one instance, with which {type(self.model).__name__} cannot be trained ({fault}); "
                f"it must have two or more; {fix}."
            )

    def _begin_epoch(self, epoch: int) -> None:
        if self.state.global_step == 0:  # also where auto_find_batch_size begins again
            self._reset_run_state()
        # Trainer's own set_epoch does not reach the sampler after resuming in mid-epoch on several ranks.
        self.train_sampler.set_epoch(epoch)

    def _end_training(self) -> None:
        pass

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The method's loss on a batch of instances or pairs, a scalar; Eq. 1 where no method has another."""
        images, loss_of = self._step(inputs)
        outputs = model(pixel_values=images, **self._forward_options)
        self._watch(outputs.logits)
        loss = loss_of(outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def _step(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Images `(B, 3, S, S)` of a training step, and the loss of the model's logits, as a mean over the batch."""
        return inputs["pixel_values"], lambda logits: self._loss(logits, inputs["labels"], inputs)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The method's, of the model's logits, labels `(B, K)` in [0, 1] (-1: unknown) and the whole batch."""
        return binary_cross_entropy(logits, targets, reduction=self.args.loss_reduction)

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
        loss = None if labels is None else binary_cross_entropy(logits, labels, reduction=self.args.loss_reduction)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    @property
    def class_counts(self) -> np.ndarray | None:
        """`(K,)` positive training labels a class, clean ones where they are known; None without training data."""
        labels = self.train_labels if self.clean_labels is None else self.clean_labels
        return None if labels is None else (labels == 1).sum(0).numpy()

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        means, self._per_class_ap = evaluation_figures(
            prediction.predictions,
            prediction.label_ids,
            class_counts=self.class_counts,
            many=self.args.many_shot,
            few=self.args.few_shot,
            class_names=self.class_names,
        )
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; the record of an evaluation also keeps each class's average precision, for the card."""
        super().log(logs, start_time)
        prefix = next((name.removesuffix("mAP") for name in logs if name.endswith("_mAP")), None)
        if prefix is not None and self._per_class_ap is not None:
            line: dict[str, Any] = self.state.log_history[-1]
            line[f"{prefix}{PER_CLASS_AP}"] = [None if np.isnan(ap) else float(ap) for ap in self._per_class_ap]
            self._per_class_ap = None

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
