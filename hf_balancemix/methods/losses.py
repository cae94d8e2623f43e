"""Trainers of the methods that are a loss: Mixup as for all methods, and another loss than BCE."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hf_balancemix.core.distributed import gather
from hf_balancemix.core.losses import (
    asymmetric_loss,
    binary_cross_entropy,
    db_loss,
    focal_loss,
    hill_loss,
    large_loss_entries,
    modified_labels,
    num_large_losses,
    splc_loss,
)
from hf_balancemix.data.labels import given_labels
from hf_balancemix.trainer.mixup import MixupTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

Loss = Callable[[Tensor, Tensor, int], Tensor]

LOSS_METHODS = ("focal", "asl", "spl-hill", "splc", "db-loss")
LARGE_LOSS_METHODS = {"ll-r": "reject", "ll-ct": "correct", "ll-cp": "permanent"}


def loss_of(method: str, args: BalanceMixTrainingArguments, labels: Tensor | None = None) -> Loss:
    """The loss of a method, with the settings and the reduction of `args`.

    Args:
        method: A name in `LOSS_METHODS`.
        args: `focal_*`, `asl_*`, `hill_*`, `splc_*`, `db_*` and `loss_reduction`, whose `"sum"` is over the classes.
        labels: `(N, K)` given training labels, which db-loss counts; the others do without.

    Returns:
        A function of `(B, K)` logits, `(B, K)` labels in [0, 1] (-1: unknown) and the epoch from 0, to a scalar.

    Raises:
        ValueError: Unknown method, or no labels for db-loss.
    """
    reduction = {"sum": "batchmean", "mean": "mean"}[args.loss_reduction]
    if method == "focal":
        return lambda x, t, epoch: focal_loss(x, t, args.focal_gamma, args.focal_alpha, reduction)
    if method == "asl":
        return lambda x, t, epoch: asymmetric_loss(
            x, t, args.asl_gamma_neg, args.asl_gamma_pos, args.asl_margin, args.asl_detach_weight, reduction
        )
    if method == "spl-hill":
        return lambda x, t, epoch: hill_loss(x, t, args.hill_lam, args.hill_margin, args.hill_gamma, reduction)
    if method == "splc":
        return lambda x, t, epoch: splc_loss(
            x, t, epoch, args.splc_threshold, args.splc_margin, args.splc_gamma, args.splc_first_epoch, reduction
        )
    if method == "db-loss":
        if labels is None:
            raise ValueError("db-loss counts the training labels and there are none; pass train_dataset.")
        counts, n = (labels == 1).sum(0), len(labels)
        return lambda x, t, epoch: db_loss(
            x, t, counts.to(x.device), n, mu=args.db_mu, negative_scale=args.db_negative_scale, reduction=reduction
        )
    raise ValueError(f"method is {method!r}; it must be one of {', '.join(LOSS_METHODS)}.")


class LossTrainer(MixupTrainer):
    """Trains on Mixup with a loss of your own.

    Args:
        loss: Function of `(B, K)` logits, `(B, K)` float labels in [0, 1] (mixed ones are soft; -1 where unknown) and
            the epoch counted from 0, to a scalar that is a mean over the batch.
        args, kwargs: As :class:`~hf_balancemix.MultiLabelTrainer`; `args` are
            :class:`~hf_balancemix.BalanceMixTrainingArguments`.

    Raises:
        ValueError: The loss gives no scalar, or refuses its settings.
    """

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        if self.train_labels is not None:  # settings that it refuses are to be refused now
            zeros = torch.zeros(2, self.train_labels.shape[1])
            value = loss(zeros, zeros, 0)
            if value.ndim != 0:
                raise ValueError(
                    f"the loss gives a tensor of shape {tuple(value.shape)}; it must give a scalar. Reduce it by "
                    "'mean' or 'batchmean'."
                )

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.loss(logits, targets, self.train_sampler.epoch)


class LargeLossTrainer(MixupTrainer):
    """LL-R, LL-Ct and LL-Cp (Kim et al., CVPR 2022): the largest losses of negative labels are taken for missing
    labels.

    In epoch e (from 0) ceil(B K e delta / 100) labels of a batch are modified, for LL-Cp ceil(B K delta / 100) in
    every epoch but the first; delta is `args.large_loss_delta` in per cent an epoch, by default 2 / epochs, which is
    the paper's 0.1, 0.04 and 0.05 for 20, 50 and 40 epochs. Given positive labels are never touched, unknown ones
    have no loss.

    - Mixup: candidates are labels that neither of the two images has, by their loss on the mixed image. LL-Cp makes
      them labels of the random instance, which has the larger share; mixed labels are mixed from the corrected ones.
    - The rule is one of the batch. With `args.large_loss_across_ranks` (default) that is what all ranks hold at a
      step, so the run does not depend on how many share it; without, each rank's part on its own, as published code
      does it under DistributedDataParallel. Either way the batch of one accumulation step, not of all.
    - LL-Cp's corrections are state of the trainer, the same on every rank after each step: labels are looked up
      there when a step uses them, not in the loader's workers, so a correction counts from the next step on. It is in
      every checkpoint.

    Args:
        mode: `"reject"`, `"correct"` (this time only) or `"permanent"`.
        args, kwargs: As :class:`LossTrainer`, without a loss.

    Attributes:
        corrected: `(N, K)` bool on the CPU, labels that LL-Cp made positive.

    Raises:
        ValueError: Unknown mode, or a negative delta.
    """

    def __init__(self, *args: Any, mode: str = "reject", **kwargs: Any) -> None:
        if mode not in LARGE_LOSS_METHODS.values():
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(LARGE_LOSS_METHODS.values())}.")
        super().__init__(*args, **kwargs)
        self.mode = mode
        delta = self.args.large_loss_delta
        # A fraction, so that the paper's values are exact.
        self.delta = Fraction(2) / Fraction(str(self.args.num_train_epochs)) if delta is None else delta
        if not self.delta >= 0:
            raise ValueError(f"large_loss_delta is {delta}; it must be 0 or more, in per cent an epoch.")
        self.corrected = None if self.train_labels is None else torch.zeros(self.train_labels.shape, dtype=torch.bool)

    def _labels(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        labels = super()._labels(inputs, prefix)
        if self.mode != "permanent":
            return labels
        corrected = self.corrected[inputs[f"{prefix}index"].cpu()]
        return labels.masked_fill(corrected.to(labels.device), 1)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        epoch, across_ranks = self.train_sampler.epoch, self.args.large_loss_across_ranks
        num_labels = logits.numel() * (self.args.world_size if across_ranks else 1)
        permanent = self.mode == "permanent"
        num_modified = num_large_losses(num_labels, min(epoch, 1) if permanent else epoch, self.delta)
        modified = large_loss_entries(logits, targets, num_modified, across_ranks=across_ranks)
        if permanent and num_modified > 0:
            kept = large_loss_entries(logits, targets, num_modified, strict=True, across_ranks=across_ranks)
            row, k = gather(kept).cpu().nonzero(as_tuple=True)
            self.corrected[gather(inputs["index"]).cpu()[row], k] = True
        targets = modified_labels(targets, modified, "reject" if self.mode == "reject" else "correct")
        return binary_cross_entropy(logits, targets, reduction=self.args.loss_reduction)

    def _end_training(self) -> None:
        if self.mode == "permanent":
            self.log({"large_loss_corrected": float(self.corrected.sum())})

    # ---- checkpoints ----

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"mode": self.mode}

    def _run_state(self) -> dict[str, Tensor]:
        return super()._run_state() | ({"corrected": self.corrected} if self.mode == "permanent" else {})

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self.corrected.zero_()

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        if self.mode == "permanent":
            self.corrected = state["corrected"].clone()


def loss_trainer(method: str, args: BalanceMixTrainingArguments, **kwargs: Any) -> LossTrainer | LargeLossTrainer:
    """The trainer of a method in `LOSS_METHODS` or `LARGE_LOSS_METHODS`; `kwargs` are the trainer's."""
    if method in LARGE_LOSS_METHODS:
        return LargeLossTrainer(args=args, mode=LARGE_LOSS_METHODS[method], **kwargs)
    train = kwargs.get("train_dataset")
    labels = given_labels(train) if method == "db-loss" and train is not None else None
    return LossTrainer(args=args, loss=loss_of(method, args, labels), **kwargs)
