"""A correct multi-label Trainer on images: overrides of Trainer's hooks, no maths.

Private hooks of transformers 5 that are relied upon, here and in averaging.py, resumable.py and hub.py, with a canary
in tests/trainer/test_trainer_hooks.py: `_get_dataloader`, `_get_train_sampler`, `_get_collator_with_removed_columns`,
`_prepare_inputs`, `_save`, `_save_checkpoint`, `_push_from_checkpoint`, `_save_optimizer_and_scheduler`,
`_load_optimizer_and_scheduler`, `_load_from_checkpoint`, `_load_best_model`, `_finish_current_push`,
`_hp_search_setup`, `_issue_warnings_after_load`, `_init_training_state`, `_maybe_log_save_evaluate`, `_evaluate`,
`_determine_best_metric`, `_load_rng_state`, `_load_scaler`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import datasets
import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from hf_balancemix.audit.label_audit import remove_audit
from hf_balancemix.core import EpochSampler
from hf_balancemix.core.given_labels import label_counts
from hf_balancemix.core.losses import binary_cross_entropy
from hf_balancemix.data.describe import is_of_paper
from hf_balancemix.data.labels import class_names, sparse_labels
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs, collate
from hf_balancemix.data.views import ViewMaker, Views, normalise, undecoded_images
from hf_balancemix.metrics import RunningFigures, class_groups, evaluation_figures, shot_bounds
from hf_balancemix.models.export import export_onnx
from hf_balancemix.models.loading import label_settings
from hf_balancemix.models.processing import squash_processor
from hf_balancemix.report.model_card import PER_CLASS_AP
from hf_balancemix.report.trackers import FigureCallback
from hf_balancemix.trainer import optimisation
from hf_balancemix.trainer.averaging import AveragingTrainer
from hf_balancemix.trainer.checks import (
    check_arguments,
    check_engine,
    check_eval_dataset,
    check_images,
    check_model,
    check_output_dir,
    check_train_dataset,
    check_trainer_options,
    check_transform,
    names_of,
)
from hf_balancemix.trainer.last_batch import fault_of_one_instance, has_batch_of_one
from hf_balancemix.trainer.pos_weight import check_pos_weight, positive_weights
from hf_balancemix.trainer.resumable import CHECKPOINT_FORMAT
from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments

logger = logging.getLogger(__name__)

_AT_ONCE = 10**8  # logits that an evaluation keeps, about 1.4 GB at the peak
_ALL_RECORDED = 1000  # up to so many classes, every evaluation's record keeps their average precisions


def _no_embeddings() -> None:
    """For FSDP: Accelerate shards the layer that embeds tokens by itself. A ResNet raises an error when asked for it,
    and a ViT names a part of a layer that is sharded already."""


class _EpochHook(TrainerCallback):
    """`on_epoch_begin` is the one place that every start, resumed or not, passes before `iter(loader)`."""

    def __init__(self, trainer: MultiLabelTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._check_last_batch()
        self.trainer._make_up_evaluation()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._epoch_ended = False
        self.trainer._begin_epoch(int(state.epoch))

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self.trainer._epoch_ended = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.trainer._stop_signal is None:
            self.trainer._stop_if_asked()
            self.trainer._end_training()
            self.trainer._stop_if_asked()


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
        model: Any image classifier of transformers with K labels, or a `peft.PeftModel` of one.
        args: :class:`MultiLabelTrainingArguments`.
        train_dataset: `datasets.Dataset` with `image` (`datasets.Image`) and `labels` (class ids as
            `List(ClassLabel)`, or multi-hot); where `clean_labels` is there too, it is used for the class groups.
        eval_dataset: The same columns. Evaluation uses `labels`.
        processing_class: Image processor of the backbone; its normalisation is kept, images are resized to
            `args.image_size`. What is saved is that.
        compute_metrics: Replaces the metrics named above.
        train_transform: In place of RandAugment: any function of a training view, an RGB PIL image of
            `args.image_size` a side, to an image, array or tensor as :func:`~hf_balancemix.data.views.as_view` takes
            it, such as one of torchvision's v2. It is called with the global generators of torch, NumPy and `random`
            seeded by the view's key, so that a resumed run sees the same; a generator of its own it must seed from
            them.
        class_names: Names of the K classes, for multi-hot labels, which have none; by default the model's own.
        views: What makes the model's inputs of the instances; by default a :class:`ViewMaker` by `args` and the image
            processor. :class:`~hf_balancemix.frozen.cache.CachedViews` trains on cached features instead.

        kwargs: Those of Trainer. `model_init` draws the model anew for each training; `compute_loss_func(outputs,
            labels, num_items_in_batch)` replaces the loss in training and evaluation: it gets the model's outputs, the
            float targets `(B, K)` in [0, 1] (mixed where the method mixes; -1: unknown) and their number, B K of this
            rank's micro-batch, and gives a mean: Trainer does the rest, for any number of ranks and accumulation
            steps.

    What is changed in `args` afterwards counts from the next training on, as for Trainer: so `hyperparameter_search`
    can try any of them.

    Attributes:
        train_labels: `(N, K)` :class:`scipy.sparse.csr_array` of int8, the given labels: 1 and -1 (unknown) are
            stored; None without `train_dataset`. `train_labels.toarray()` is the dense matrix.
        clean_labels: As `train_labels`, of 1 only, where the data set has them.
        pos_weight: `(K,)` float32 of `args.pos_weight`, or None. The loss of evaluations has none.

    Raises:
        TypeError, ValueError: Something that would go wrong later; see the message.
    """

    args: MultiLabelTrainingArguments
    train_dataset: datasets.Dataset
    train_sampler: EpochSampler
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    compute_loss_func: Any
    _arguments_class = MultiLabelTrainingArguments
    _forward_options: ClassVar[dict[str, Any]] = {}  # of the model in training steps and scans
    # What cards call the method, and whom they cite beside BalanceMix.
    method_name = "bce"
    citation: str | None = None
    takes_pos_weight = True  # the loss is BCE
    figures_note: str | None = None  # what cards say where the figures are not those of the saved model alone
    _loss_is_the_method = False  # so that compute_loss_func would leave nothing of it

    # The loss is a mean over the batch: Trainer is to divide it by the accumulation steps.
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
        train_transform: Callable[[Image.Image], Any] | None = None,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or self._arguments_class(output_dir="outputs")
        check_arguments(args, self._arguments_class)
        if args.should_save:
            check_output_dir(args.output_dir or ".")
        check_trainer_options(kwargs, compute_metrics)
        check_transform(train_transform, views)
        self.train_transform = train_transform
        self._given_processor = processing_class
        self._default_size = None if processing_class else getattr(getattr(model, "config", None), "image_size", None)
        self._own_views: ViewMaker | None = None
        self._fitted_by: tuple[int | None, torch.memory_format] = (0, torch.contiguous_format)  # no model yet
        self._labelled = train_dataset
        self.views: Views = views  # type: ignore[assignment]  # made below where they are not given
        processor = self._squash_processor(args)
        self._per_class_ap: np.ndarray | None = None  # of an evaluation that was not logged yet
        self._running_figures: RunningFigures | None = None  # of an evaluation under way
        self.class_names = None if class_names is None else list(label_settings(class_names)["label2id"])
        self._num_classes: int | None = None
        self.train_labels: csr_array | None = None
        self.clean_labels: csr_array | None = None
        if train_dataset is not None:
            self.class_names = names_of(train_dataset, self.class_names)
            self.train_labels = sparse_labels(train_dataset)
            self._num_classes = self.train_labels.shape[1]
            if "clean_labels" in train_dataset.column_names:
                self.clean_labels = sparse_labels(train_dataset, "clean_labels")
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
        check_engine(self)
        self.model_accepts_loss_kwargs = False
        self.add_callback(_EpochHook(self))
        self.add_callback(FigureCallback(self))
        self._read_arguments()
        if self.class_names is None and self._num_classes is not None:
            names = getattr(getattr(self.model, "config", None), "id2label", {})
            self.class_names = [names.get(k, f"LABEL_{k}") for k in range(self._num_classes)]
        check_eval_dataset(eval_dataset, self.class_names)
        if None in (args.many_shot, args.few_shot) and (bounds := self.shot_bounds) is not None:
            logger.info("Class groups: many-shot above %d, few-shot below %d positive training labels.", *bounds)

    # ---- arguments and the model, before each training ----

    def _squash_processor(self, args: MultiLabelTrainingArguments) -> Any:
        # Cached features were made with the normalisation of the processor.
        cached = self.views is not None and self.views.num_views is not None
        size = args.image_size or self._default_size
        return squash_processor(self._given_processor, size, args.normalise or cached)

    def _read_arguments(self) -> None:
        """Everything that is made of `args`; also called when the trainer is made."""
        args = self.args
        check_arguments(args, self._arguments_class)
        args.settle()
        if self.compute_loss_func is not None and self._loss_is_the_method:
            raise ValueError(
                f"compute_loss_func is given; it must be left out, because the loss is what {type(self).__name__} "
                "consists of; use MultiLabelTrainer, MixupTrainer or BalanceMixTrainer with it."
            )
        if self.train_dataset is not self._labelled:
            raise ValueError(
                "train_dataset was replaced after the trainer was made, whose labels are those of the first; it must "
                "stay the same; make another trainer."
            )
        if self.train_labels is not None:
            check_train_dataset(self.train_dataset, self.train_labels, args)
        processor = self._squash_processor(args)
        if processor.to_dict() != self.processing_class.to_dict():
            self.processing_class = self.callback_handler.processing_class = processor
        if self.views is self._own_views:  # not the user's
            seed = args.seed if args.data_seed is None else args.data_seed
            self.views = self._own_views = ViewMaker.from_arguments(args, processor, seed, self.train_transform)
            if self.train_transform is not None and not self._own_views.draws_by_key():
                logger.warning(
                    "train_transform gives two images for one seed: it has a generator of its own, so that a resumed "
                    "run is not the same bit for bit; seed that in it by random.getrandbits(32)."
                )
        self._mean, self._std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self._train_batch_size = args.train_batch_size
        if self.model is not None and self._fitted_by != self._model_facts():  # None between trials of a search
            self._fit_model(self.model)
        self._begin_averaging()
        self._read_pos_weight()

    def _fit_model(self, model: nn.Module) -> None:
        """Check a model, and give it the names and the memory format that it is to have."""
        self._fitted_by = size, memory_format = self._model_facts()
        check_model(model, self.class_names, size, self._num_classes)
        model.to(memory_format=memory_format)
        if self.is_fsdp_enabled:
            model.get_input_embeddings = _no_embeddings  # type: ignore[assignment]

    def _model_facts(self) -> tuple[int | None, torch.memory_format]:
        """Size of the images that the model must take (None: of the user's views), and its memory format."""
        size = self._squash_processor(self.args).size["height"] if self.views is self._own_views else None
        return size, torch.channels_last if self.args.channels_last else torch.contiguous_format

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Trainer's; the model that is drawn gets what the first one got."""
        model = super().call_model_init(trial)
        self._fit_model(model)
        self._drop_thresholds(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:
            self._read_arguments()

    @property
    def _training_labels(self) -> csr_array:
        """`train_labels`, where there must be some."""
        if self.train_labels is None:
            raise ValueError("train_dataset is None; it must be a datasets.Dataset to train on; pass one.")
        return self.train_labels

    @property
    def _num_instances(self) -> int:
        return self._training_labels.shape[0]

    def _dense_labels(self) -> Tensor:
        """`(N, K)` int8, for methods that keep a table of all labels."""
        return torch.from_numpy(self._training_labels.toarray())

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        labels = self._training_labels
        for part in (labels.indptr.astype(np.int64), labels.indices.astype(np.int32), labels.data):
            digest.update(part)
        digest.update("\x1f".join(class_names(self.train_dataset)).encode())
        if "image_id" in self.train_dataset.column_names:
            digest.update("\x1f".join(map(str, self.train_dataset["image_id"])).encode())
        return digest.hexdigest()

    @cached_property
    def _images_digest(self) -> str:
        """Of the files of 16 instances, from the first to the last, as they are stored."""
        images = undecoded_images(self.train_dataset)
        digest = hashlib.blake2b(digest_size=8)
        for i in np.linspace(0, len(images) - 1, 16).astype(int):
            stored = images[int(i)]["image"] or {}
            content = stored.get("bytes")
            if content is None and stored.get("path"):
                with suppress(OSError):  # who decodes it says what is wrong
                    content = Path(stored["path"]).read_bytes()
            digest.update(hashlib.blake2b(content or b"").digest())
        return digest.hexdigest()

    def _run_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"ema_decay": self.args.ema_decay or None}
        if self.args.lr_scheduler_type == "one_cycle":  # which cannot be longer than it was drawn
            facts |= {"num_train_epochs": self.args.num_train_epochs, "max_steps": self.args.max_steps}
        return facts | {
            "format": CHECKPOINT_FORMAT,
            "pos_weight": check_pos_weight(self.args.pos_weight),
            "trainer": type(self).__name__,
            "method": self.method_name,
            "num_instances": self._num_instances,
            "num_classes": self._training_labels.shape[1],
            "data": self._data_digest,
            "images": self._images_digest,
            "seed": self.args.seed,
            "data_seed": self.views.seed,
            "image_size": self.views.image_size,
            "global_batch_size": self.args.global_batch_size,
            "ranks": self.args.world_size,
            "engine": self._engine,
        }

    @property
    def _engine(self) -> str | None:
        """What keeps parts of the weights on each process, and checkpoints in files of its own, if anything does."""
        if self.is_deepspeed_enabled:
            return f"DeepSpeed, ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP" if self.is_fsdp_enabled else None

    # ---- data ----

    def _make_sampler(self) -> EpochSampler:
        return EpochSampler(self._num_instances, self.views.seed)

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
        drop_last = self.args.dataloader_drop_last
        if isinstance(dataset, datasets.Dataset):  # evaluation and prediction, of all instances
            check_images(dataset)
            dataset = PlainInstances(dataset, self.views)
            self.args.dataloader_drop_last = False
        try:
            loader: Any = super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        # Each iter() of a loader draws a base seed from the global generator unless it has its own; how often that
        # happens differs between an uninterrupted and a resumed run.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        loader.base_dataloader.worker_init_fn = self._signals.in_worker(loader.base_dataloader.worker_init_fn)
        return loader

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        return data_collator  # rows hold tensors for compute_loss, which are not arguments of the model

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = super()._prepare_inputs(inputs)
        return {name: self._normalise(x) for name, x in inputs.items()}

    def _normalise(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:  # cached features; labels
            return images
        images = images.contiguous(memory_format=self._fitted_by[1])
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

    def _read_pos_weight(self) -> None:
        given, self.pos_weight = self.args.pos_weight, None
        if given is not None and not (self.takes_pos_weight and self.compute_loss_func is None):
            loss = "loss of its own" if self.compute_loss_func is None else "compute_loss_func"
            raise ValueError(
                f"pos_weight is {given!r}, but {type(self).__name__} has a {loss}; it must be left out there, or the "
                "method be bce, mixup, balancemix or co-teaching."
            )
        if self.train_labels is not None:
            weights = positive_weights(given, self.train_labels)
            self.pos_weight = None if weights is None else weights.to(self.args.device)

    def _check_last_batch(self) -> None:
        """A model that cannot be trained on one instance never meets one."""
        args, n, size = self.args, self._num_instances, self._train_batch_size
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
        images, targets, loss_of = self._step(inputs)
        outputs = model(pixel_values=images, **self._forward_options)
        self._watch(outputs.logits)
        loss = loss_of(outputs.logits) if self.compute_loss_func is None else self._loss_by_user(outputs, targets)
        return (loss, outputs) if return_outputs else loss

    def _loss_by_user(self, outputs: Any, targets: Tensor) -> Tensor:
        # Not Trainer's number, which is of all ranks and accumulation steps: a mean over the micro-batch is what the
        # division by the accumulation steps and the mean over the ranks need, whether a function uses the number or
        # takes a mean.
        number = torch.tensor(targets.numel(), device=targets.device)
        return self.compute_loss_func(outputs, targets, num_items_in_batch=number)

    def _step(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Images `(B, 3, S, S)` of a training step, targets `(B, K)`, and the loss of the model's logits, as a mean
        over the batch."""
        labels = inputs["labels"]
        return inputs["pixel_values"], labels, lambda logits: self._loss(logits, labels, inputs)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The method's, of the model's logits, labels `(B, K)` in [0, 1] (-1: unknown) and the whole batch."""
        return binary_cross_entropy(logits, targets, reduction=self.args.loss_reduction, pos_weight=self.pos_weight)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, float32 logits `(B, K)` and labels `(B, K)`; the last two are None or absent where not asked for."""
        if self._evaluating:
            self._stop_if_asked()
        inputs = self._prepare_inputs(inputs)
        labels, loss = inputs.get("labels"), None
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=inputs["pixel_values"])
            logits = outputs.logits.float()
            if labels is not None and self.compute_loss_func is not None:
                loss = self._loss_by_user(outputs, labels)
            elif labels is not None:
                loss = binary_cross_entropy(logits, labels, reduction=self.args.loss_reduction)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    @cached_property
    def class_counts(self) -> np.ndarray | None:
        """`(K,)` positive training labels a class, clean ones where they are known; None without training data."""
        labels = self.train_labels if self.clean_labels is None else self.clean_labels
        return None if labels is None else label_counts(labels)[1].numpy()

    @property
    def shot_bounds(self) -> tuple[int, int] | None:
        """`many_shot` and `few_shot` as they are used, see :func:`~hf_balancemix.metrics.shot_bounds`; None without
        training data, and where all classes are in one group."""
        if (counts := self.class_counts) is None:
            return None
        of_paper = is_of_paper(self.train_dataset)
        return shot_bounds(counts, self.args.many_shot, self.args.few_shot, of_paper=of_paper)

    @property
    def class_groups(self) -> dict[str, np.ndarray] | None:
        """Many-, medium- and few-shot classes as boolean `(K,)` masks; None as `shot_bounds`."""
        counts, bounds = self.class_counts, self.shot_bounds
        return None if counts is None or bounds is None else class_groups(counts, *bounds)

    def _compute_metrics(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """The figures of all instances, or with `compute_result`, as `batch_eval_metrics` has it, of one batch after
        the other: nothing but at the last."""
        bounds = self.shot_bounds
        many, few = bounds or (0, 0)
        logits, labels = prediction.predictions, cast("Tensor | np.ndarray", prediction.label_ids)
        groups = {"class_counts": None if bounds is None else self.class_counts, "many": many, "few": few}
        options: dict[str, Any] = groups | {"class_names": self.class_names}
        if compute_result is None:
            means, self._per_class_ap = evaluation_figures(logits, labels, **options)
            return means
        if self._running_figures is None:
            self._running_figures = RunningFigures(labels.shape[1])
        self._running_figures.update(logits, labels)
        if not compute_result:
            return {}
        means, self._per_class_ap = self._running_figures.compute(**options)
        self._running_figures = None
        return means

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; figures of more than 10^8 logits are counted batch by batch, and no logits are kept."""
        self._running_figures = None  # of an evaluation that was broken off
        batchwise, num_classes = self.args.batch_eval_metrics, len(self.class_names or ())
        is_large = has_length(dataloader) and self.num_examples(dataloader) * num_classes > _AT_ONCE
        own = self.compute_metrics == self._compute_metrics and description != "Prediction"
        self.args.batch_eval_metrics = batchwise or (is_large and own)
        try:
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        finally:
            self.args.batch_eval_metrics = batchwise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; the record of an evaluation also keeps each class's average precision, for the card. Of more than
        1,000 classes only the newest and the best evaluation keep it, as every checkpoint has all records.
        """
        super().log(logs, start_time)
        prefix = next((name.removesuffix("mAP") for name in logs if name.endswith("_mAP")), None)
        if prefix is not None and self._per_class_ap is not None:
            key, history = f"{prefix}{PER_CLASS_AP}", cast("list[dict[str, Any]]", self.state.log_history)
            for line in history[:-1] if len(self._per_class_ap) > _ALL_RECORDED else []:
                if line["step"] != self.state.best_global_step:
                    line.pop(key, None)
            history[-1][key] = [None if np.isnan(ap) else float(ap) for ap in self._per_class_ap]
            self._per_class_ap = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; after training, the audit of a run before is not left beside another model."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not self.is_in_train and self.state.global_step:
            remove_audit(output_dir or self._output_dir)

    def label_audit(self) -> datasets.Dataset:
        """Which given labels are probably wrong; of :class:`BalanceMixTrainer`, others raise a ValueError."""
        raise ValueError(
            f"the method is {self.method_name!r}, which judges no labels; it must be one that does; train with "
            "BalanceMixTrainer, or give the model to audit_labels."
        )

    def export_onnx(self, path: str | Path) -> None:
        """Write the model that `save_model` writes as ONNX; see :func:`~hf_balancemix.models.export.export_onnx`.

        Must be called on every rank.

        Raises:
            ValueError: FSDP or DeepSpeed is on.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP or DeepSpeed keeps parts of the weights on each process; a model must be whole to be exported; "
                "save it (save_model), and export what was saved (hf_balancemix.export_onnx)."
            )
        try:
            if self.is_world_process_zero():
                with self._averaged():
                    export_onnx(self.saved_model, path, self.views.image_size)
        finally:  # an error on the first rank must not leave the others waiting
            self.accelerator.wait_for_everyone()
