"""BalanceMix as a Trainer: the steps and epochs of Algorithm 1 on `core.BalanceMix`, and no maths."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_balancemix.audit.label_audit import LabelAudit, make_audit
from hf_balancemix.core import BalanceMix, RefinedLabels, class_lift, effective_sample_size, mix_images
from hf_balancemix.core.balance_mix import BYTES_A_LABEL
from hf_balancemix.core.evaluation import evaluation_mode
from hf_balancemix.core.given_labels import label_counts, same_labels
from hf_balancemix.data.labels import sparse_labels
from hf_balancemix.data.training_data import TrainingPairs
from hf_balancemix.metrics import LabelQuality
from hf_balancemix.models.features import pooled_features_of
from hf_balancemix.trainer.mixup import MixupTrainer

logger = logging.getLogger(__name__)


class BalanceMixTrainer(MixupTrainer):
    """BalanceMix (Song, Kim, Lee; AAAI 2024): Algorithm 1 for unbalanced, wrong or missing labels.

    Before the training, small heads on the features of the backbone as it is then judge every label, none of them one
    that it saw: for each class and for positive and negative labels apart, a mixture of two Gaussians is fitted on
    their losses, and it is estimated how many are wrong (with `args.judge="network"`, as printed, the losses are the
    network's own, of each epoch). Every epoch begins with a pass over the training set. From its confidences follows
    the probability with which the minority sampler draws each instance, and its predictions re-label. After a warm-up
    each label of a batch is trusted, changed or weighed down; images and labels are then mixed.

    A network from scratch has no features worth judging by: `args.judge="network"` is for it. So is judged, too, with
    a line in the log, where the model has no linear classifier, unless `args.judge` was given.

    Arguments are those of :class:`MultiLabelTrainer`; `args` are :class:`BalanceMixTrainingArguments`. Where
    `train_dataset` has `clean_labels`, label-quality figures (Eq. 14, 15) are logged every epoch; the method never
    sees them. A `compute_loss_func` gets labels that are refined (Eq. 9) and mixed, without their weights: it replaces
    Eq. 10, so that an ambiguous label counts like any other.

    Attributes:
        balance_mix: :class:`~hf_balancemix.core.BalanceMix`, the method's state; absent without `train_dataset`.
    """

    method_name = "balancemix"
    balance_mix: BalanceMix

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.quality = LabelQuality()
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None and self.args.select_clean:
            logger.warning("compute_loss_func gets refined labels without their weights: ambiguous ones count fully.")

    def _read_arguments(self) -> None:
        super()._read_arguments()
        settings = self.args.balance_mix_settings()
        judged = settings.cross_fits and self.train_labels is not None and self.model is not None
        if judged and pooled_features_of(self.model) is None:
            problem = f"{type(self.model).__name__} has no linear layer with {self._num_classes} outputs"
            if "judge" not in self.args.unset:
                raise ValueError(
                    f"judge is 'cross_fit', and {problem}; it must have one, by whose input labels are judged; set "
                    "judge='network'."
                )
            logger.info("%s: its own losses judge the labels (judge='network').", problem)
            settings = replace(settings, judge="network")
        # Only then: what stands in a state of the same settings is forgotten, or loaded, when training begins.
        if self.train_labels is not None and (
            not hasattr(self, "balance_mix") or self.balance_mix.settings != settings
        ):
            if settings.remembers_all_labels:
                _check_memory(*self.train_labels.shape)
            self.balance_mix = BalanceMix(self.train_labels, settings)

    @property
    def _ends_warmup(self) -> bool:
        return self.args.select_clean

    # ---- the audit ----

    def label_audit(self) -> datasets.Dataset:
        """Which given labels are probably wrong: one row a label, the surest first; at any time after the judging.

        Returns:
            The columns are those of :attr:`LabelAudit.rows <hf_balancemix.audit.LabelAudit>`. `prediction` is that of
            the last scan: after training, of the final weights (with `ema_decay` not of their average).

        Raises:
            ValueError: The run manages no labels, has not judged them yet, or keeps no table of them; or the rows of
                `train_dataset` are other ones by now, or have no `image_id` that tells them apart.
        """
        return self._label_audit().rows

    def _label_audit(self) -> LabelAudit:
        state = self.balance_mix
        suspicious = state.suspicious_labels()
        labels = sparse_labels(self.train_dataset)
        if not same_labels(labels, state.labels):
            rows, trained = labels.shape[0], state.labels.shape[0]
            found = f"train_dataset has {rows} rows, and not the labels of the {trained} trained on"
            raise ValueError(f"{found}; it must be the trainer's first; set it back, all rows in their order.")
        return make_audit(
            self.train_dataset,
            self.class_names or [str(k) for k in range(state.labels.shape[1])],
            state.labels,
            suspicious,
            state.noise_rates,
            state.loss_counts,
            state.mixtures,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; after training with label management the audit is written beside the model."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not self.is_in_train and self._has_audit:
            try:
                audit = self._label_audit()
            except ValueError as error:  # the training is not lost
                logger.warning("No label audit is written beside the model: %s", error)
            else:
                audit.save(output_dir or self._output_dir)

    @property
    def _has_audit(self) -> bool:
        return hasattr(self, "balance_mix") and self.balance_mix.has_suspicious_labels

    # ---- a step ----

    def _partner_weights(self) -> Tensor:
        return self.balance_mix.weights

    def _training_pairs(self, **options: Any) -> TrainingPairs:
        two_views_from = self.warmup_epochs if self._predicts_in_steps else None
        return super()._training_pairs(clean_labels=self.clean_labels, two_views_from=two_views_from, **options)

    def _step(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """A step of Algorithm 1: Mixup on the given labels in the warm-up; then refine both batches (Eq. 9), mix them
        (Eq. 5), and Eq. 10 on the result."""
        if not self.balance_mix.settings.manages_labels(self.balance_mix.epoch):
            return super()._step(inputs)
        images, random = inputs["pixel_values"], self._refine(inputs, "")
        targets, weight = random.labels, random.weight
        if "lam" in inputs:
            lam = self._lam(inputs)
            targets, weight = self.balance_mix.mix_labels(random, self._refine(inputs, "minority_"), lam)
            images = mix_images(images, inputs["minority_pixel_values"], lam)
        if "clean_labels" in inputs:
            # An unknown label counts as a given negative one, which is what it would be without the mark.
            given, labels = inputs["labels"].clamp(min=0), random.labels.clamp(min=0)
            self.quality.update(given, inputs["clean_labels"], labels, random.reliability)
        return images, targets, lambda logits: self.balance_mix.loss(logits, targets, weight, self.pos_weight)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.balance_mix.loss(logits, targets, None, self.pos_weight)

    @property
    def _predicts_in_steps(self) -> bool:
        settings = self.balance_mix.settings
        return settings.select_clean and settings.prediction_source == "views"

    def _refine(self, inputs: dict[str, Tensor], prefix: str) -> RefinedLabels:
        probabilities = self._mean_over_views(inputs, prefix) if self._predicts_in_steps else None
        return self.balance_mix.refine(inputs[f"{prefix}index"], inputs[f"{prefix}labels"], probabilities)

    def _mean_over_views(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        """`(B, K)` mean of f over two views (Eq. 9)."""
        # self.model, as Trainer evaluates with: under DDP the bare module, so no reducer and no broadcast of buffers.
        with torch.no_grad(), evaluation_mode(self.model):
            first, second = (
                self.model(pixel_values=inputs[f"{prefix}{name}"]).logits.float().sigmoid()
                for name in ("pixel_values", "second_view")
            )
            return (first + second) / 2

    # ---- between epochs ----

    def _begin_epoch(self, epoch: int) -> None:
        super()._begin_epoch(epoch)
        if self.state.global_step == 0 and self.balance_mix.settings.cross_fits:
            self._judge()

    def _judge(self) -> None:
        """Must be called on every rank, before the first step: judge the labels by the backbone's features."""
        state, model = self.balance_mix, pooled_features_of(self.model)
        assert model is not None  # looked at when the arguments were read
        # In half precision, of which 65,520 and more is infinite: such an instance is left out.
        features = self._scan_table(lambda x, labels: x, model, torch.float16)
        show = not self.args.disable_tqdm and self.is_world_process_zero()
        with tqdm(desc="Judging labels", unit="fold", leave=False, dynamic_ncols=True, disable=not show) as bar:
            # MPS has no float64.
            device = "cpu" if self.args.device.type == "mps" else self.args.device
            state.judge(features.to(device), seed=self.views.seed, on_fold=bar.update)
        assert state.noise_rates is not None
        negative, positive = (count.double() for count in label_counts(state.labels))
        wrong, missing = state.noise_rates.wrong[0] @ positive, state.noise_rates.missing[0] @ negative
        n = positive.sum().clamp(min=1)
        self.log({"noise_rate_wrong": float(wrong / n), "noise_rate_missing": float(missing / n)})

    def _end_training(self) -> None:
        # The last scan: final label quality. An epoch that training ended within counts as one.
        self._prepare_epoch(math.ceil(self.state.epoch))

    def _end_epoch(self, epoch: int) -> None:
        """Algorithm 1's end of an epoch."""
        self.quality.reduce()
        logs = {f"label_{name}": value for name, value in self.quality.compute().items()}
        if self.balance_mix.settings.needs_scan:
            self._scan(self.balance_mix.observe)  # before anything changes: a signal may end the run in it
            self.balance_mix.end_epoch(epoch)
            logs |= self._sampler_logs()
        self.quality.reset()
        if logs:
            self.log(logs)

    def _sampler_logs(self) -> dict[str, float]:
        """What the sampler and the mixtures made of the scan: effective sample size, draws a class group, mean p_G."""
        state = self.balance_mix
        known = self._training_labels if self.clean_labels is None else self.clean_labels
        logs = {"sampler_effective_size": effective_sample_size(state.weights)}
        lift = class_lift(state.weights, known).numpy()
        for name, group in (self.class_groups or {}).items():
            if np.isfinite(lift[group]).any():
                logs[f"sampler_lift_{name}"] = float(np.nanmean(lift[group]))
        if state.settings.remembers_labels:
            logs["p_clean_mean"], logs["p_clean_mean_positives"] = state.mean_clean_probability()
        return logs

    # ---- checkpoints ----

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"settings": asdict(self.balance_mix.settings)}

    def _run_state(self) -> dict[str, Tensor]:
        self.quality.reduce()
        quality = {f"quality.{name}": value for name, value in self.quality.state_dict().items()}
        return self.balance_mix.state_dict() | quality | super()._run_state()

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self.balance_mix.reset()
        self.quality.reset()

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        quality = {k.removeprefix("quality."): v for k, v in state.items() if k.startswith("quality.")}
        self.balance_mix.load_state_dict(state)
        self.quality.load_state_dict(quality)


def _check_memory(num_instances: int, num_classes: int) -> None:
    """Says how much memory a run needs that remembers all labels; a ValueError where the machine has less."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, of which each remembers all
    needed = num_instances * num_classes * BYTES_A_LABEL * ranks / 1e9
    text = f"max_missing is 0, so that all {num_instances:,} x {num_classes:,} labels are remembered"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if hasattr(os, "sysconf") else math.inf
    if needed > memory:
        raise ValueError(
            f"{text}, which needs {needed:,.1f} GB of memory; it must be at most the {memory:,.1f} GB "
            "that there are; set max_missing=0.5, or clean_probability_source='views'."
        )
    logger.info("%s, which needs %.1f GB of memory; max_missing=0.5 needs far less.", text, needed)
