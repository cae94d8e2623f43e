"""Mixup as all methods of the paper's comparison have it, and the pass over the training set that some learn from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_balancemix.core import EpochSampler, PairSampler, minority_mixup
from hf_balancemix.core.distributed import all_reduce_sum
from hf_balancemix.core.given_labels import label_rows
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs
from hf_balancemix.trainer.checks import check_warmup, epochs_of
from hf_balancemix.trainer.multilabel import MultiLabelTrainer
from hf_balancemix.trainer.scan import scan
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

logger = logging.getLogger(__name__)


class MixupTrainer(MultiLabelTrainer):
    """Trains on pairs of instances, mixed: itself plain Mixup, and the base of each method that mixes.

    Subclasses have another loss (:meth:`_loss`), choose the second instance of a pair (:meth:`_partner_weights`), or
    learn from a pass over the training set (:meth:`_end_epoch`). With `args.mixup_alpha=0` nothing is mixed, and each
    instance is alone in its row. The loss of evaluations is BCE, as every method's.

    Arguments are those of :class:`MultiLabelTrainer`; `args` are :class:`BalanceMixTrainingArguments`, of which
    `mixup_alpha` and `lambda_per_batch` are used.

    Attributes:
        warmup_epochs: `args.label_warmup_epochs`, on the given labels; at least 1, because nothing is known before.
        statistics_epoch: The epoch that :meth:`_end_epoch` last prepared; 0 at first.
    """

    args: BalanceMixTrainingArguments
    method_name = "mixup"
    _arguments_class = BalanceMixTrainingArguments
    statistics_epoch = 0

    def _read_arguments(self) -> None:
        super()._read_arguments()
        if self.train_labels is None:
            return
        num_epochs = epochs_of(self.args, self.train_labels.shape[0])
        self.warmup_epochs = max(self.args.settle_warmup(num_epochs), 1)
        if self._ends_warmup:
            check_warmup(self.warmup_epochs, num_epochs)

    @property
    def _ends_warmup(self) -> bool:
        """Whether the method does after the warm-up what it does not do in it."""
        return False

    # ---- pairs ----

    def _partner_weights(self) -> Tensor:
        """`(N,)` float64 sampling probabilities of the second instance of a pair, which comes with its labels."""
        n = self._num_instances
        return torch.full((n,), 1 / n, dtype=torch.float64)

    def _make_sampler(self) -> EpochSampler:
        if self.args.mixup_alpha == 0:
            return super()._make_sampler()
        return PairSampler(self._num_instances, self.views.seed, weights=lambda: self._partner_weights())

    def _training_pairs(self, **options: Any) -> TrainingPairs:
        return super()._training_pairs(mixup_alpha=self.args.mixup_alpha, **options)

    def _labels(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        """`(B, K)` labels of the random instances (prefix "") or of their partners ("minority_")."""
        return inputs[f"{prefix}labels"]

    def _lam(self, inputs: dict[str, Tensor]) -> Tensor:
        """`(B,)` lambda of Eq. 5."""
        return inputs["lam"][:1].expand_as(inputs["lam"]) if self.args.lambda_per_batch else inputs["lam"]

    def _step(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Mixed images and the method's loss on mixed labels (Eq. 5)."""
        images, targets = inputs["pixel_values"], self._labels(inputs, "")
        if "lam" in inputs:
            partners = inputs["minority_pixel_values"], self._labels(inputs, "minority_")
            images, targets = minority_mixup(images, partners[0], targets, partners[1], self._lam(inputs))
        return images, targets, lambda logits: self._loss(logits, targets, inputs)

    # ---- between epochs ----

    def _begin_epoch(self, epoch: int) -> None:
        super()._begin_epoch(epoch)
        self._prepare_epoch(epoch)

    def _prepare_epoch(self, epoch: int) -> None:
        # After resuming in the middle of an epoch its statistics are there already; made again they would differ.
        if epoch > self.statistics_epoch:
            self._end_epoch(epoch)
            self.statistics_epoch = epoch

    def _end_epoch(self, epoch: int) -> None:
        """Must be called on every rank: learn what `epoch`, about to begin, needs.

        It runs once before each epoch but the first, and at the start of that epoch, so that a checkpoint of the last
        step of the epoch before, which is written before Trainer's `on_epoch_end`, leads to the very same.
        """

    def _scan(
        self, observe: Callable[[Tensor, Tensor], None], model: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Must be called on every rank: `observe` gets the logits of every training instance once; see `scan`.

        Logits that are not finite are an error, or with `args.on_nan="skip"` a warning. `model`, from normalised
        images to features `(B, ...)`, takes the place of the trainer's and its logits.
        """

        def logits_of(images: Tensor) -> Tensor:
            return self.model(pixel_values=images, **self._forward_options).logits

        def forward(batch: dict[str, Tensor]) -> Tensor:
            images = self._normalise(batch["pixel_values"].to(self.args.device, non_blocking=True))
            return (model or logits_of)(images)

        # A rank that left alone would keep the others waiting in a forward pass that all must call alike.
        alone = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        num_bad = scan(
            forward,
            self.model,
            PlainInstances(self.train_dataset, self.views, self.train_labels),
            observe,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            show_progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            told_to_stop=lambda: alone and self._signals.received is not None,
            worker_init_fn=self._signals.in_worker(),
        )
        self._stop_if_asked()
        if num_bad:
            self._check_weights(f"in the scan after step {self.state.global_step}")
            what = "logits" if model is None else "features"
            text = (
                f"the {what} of {num_bad} of {self._num_instances} instances are not finite in the scan after "
                f"step {self.state.global_step}"
            )
            if self.args.on_nan == "stop":
                raise ValueError(f"{text}; they must be; look for damaged images, or pass on_nan='skip'.")
            if self.is_world_process_zero():
                logger.warning("%s: what is learned from them is left out.", text)

    def _scan_table(
        self,
        row: Callable[[Tensor, Tensor], Tensor],
        model: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Must be called on every rank: `(N, C)` of `dtype`, a row for each instance, the same on every rank.

        `row` makes `(B, C)` floats of logits `(B, ...)` and given labels `(B, K)`, all on the CPU; `model`
        is as for :meth:`_scan`.
        """
        labels = self._training_labels
        tables: list[Tensor] = []  # one, as soon as C is known

        def observe(index: Tensor, logits: Tensor) -> None:
            index = index.cpu()
            rows = row(logits.detach().float().cpu(), label_rows(labels, index)).to(dtype)
            if not tables:
                tables.append(rows.new_zeros(labels.shape[0], rows.shape[1]))
            tables[0][index] = rows

        self._scan(observe, model)
        return all_reduce_sum(tables[0])  # exact: of each number at most one rank holds more than 0

    # ---- checkpoints ----

    def _run_state(self) -> dict[str, Tensor]:
        return {"epoch": torch.tensor(self.statistics_epoch)}

    def _reset_run_state(self) -> None:
        self.statistics_epoch = 0

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        self.statistics_epoch = int(state["epoch"])
