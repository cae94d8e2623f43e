"""What the comparison methods on Mixup share: the pairs of the method `mixup`, and a pass over the training set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_balancemix.core import EpochSampler, PairSampler, minority_mixup
from hf_balancemix.core.distributed import all_reduce_sum
from hf_balancemix.data.training_data import TrainingPairs
from hf_balancemix.trainer import MultiLabelTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments


class MixupTrainer(MultiLabelTrainer):
    """Base of methods on Mixup: views, pairs and lambdas are those of `mixup`, another loss is the subclass's.

    With `args.mixup_alpha=0` on single images, as `bce` sees them. The loss of evaluations is BCE, as every method's.

    Args:
        As :class:`MultiLabelTrainer`; `args` are :class:`BalanceMixTrainingArguments`, of which `mixup_alpha` and
            `lambda_per_batch` are used.

    Raises:
        TypeError: `args` are others.
    """

    args: BalanceMixTrainingArguments
    _forward_options: ClassVar[dict[str, Any]] = {}  # of the model in a training step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, BalanceMixTrainingArguments):
            raise TypeError(
                f"args is {type(self.args).__name__}; {type(self).__name__} needs BalanceMixTrainingArguments."
            )

    @staticmethod
    def _default_args() -> BalanceMixTrainingArguments:
        return BalanceMixTrainingArguments(output_dir="outputs")

    def _partner_weights(self) -> Tensor:
        """`(N,)` float64 sampling probabilities of the partners in Mixup."""
        n = len(self.train_labels)
        return torch.full((n,), 1 / n, dtype=torch.float64)

    def _make_sampler(self) -> EpochSampler:
        if self.args.mixup_alpha == 0:
            return super()._make_sampler()
        return PairSampler(len(self.train_labels), self.views.seed, weights=self._partner_weights)

    def _training_pairs(self) -> TrainingPairs:
        return TrainingPairs(self.train_dataset, self.train_labels, self.views, mixup_alpha=self.args.mixup_alpha)

    def _labels(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        """`(B, K)` labels of the random instances (prefix "") or of their partners ("minority_")."""
        return inputs[f"{prefix}labels"]

    def _mix(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Images `(B, 3, S, S)` and labels `(B, K)`, mixed where the batch has partners."""
        images, labels = inputs["pixel_values"], self._labels(inputs, "")
        if "lam" not in inputs:
            return images, labels
        lam = inputs["lam"][:1].expand_as(inputs["lam"]) if self.args.lambda_per_batch else inputs["lam"]
        return minority_mixup(images, inputs["minority_pixel_values"], labels, self._labels(inputs, "minority_"), lam)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The method's loss on mixed images `(B, 3, S, S)` and mixed labels `(B, K)`, a mean over the batch."""
        images, targets = self._mix(inputs)
        outputs = model(pixel_values=images, **self._forward_options)
        loss = self._loss(outputs.logits, targets, inputs)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The method's, of the model's logits, mixed labels `(B, K)` in [0, 1] (-1: unknown) and the whole batch."""
        raise NotImplementedError


class ScanningMixupTrainer(MixupTrainer):
    """Base of methods on Mixup that learn from a pass over the training set.

    Subclasses override :meth:`_end_epoch`, which runs once before each epoch but the first, resumed or not.

    Attributes:
        statistics_epoch: The epoch that :meth:`_end_epoch` last prepared; 0 at first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.statistics_epoch = 0

    @property
    def warmup_epochs(self) -> int:
        """`args.label_warmup_epochs` on the given labels; at least 1, because nothing is known before."""
        return max(self.args.label_warmup_epochs, 1)

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self.statistics_epoch = 0

    def _begin_epoch(self, epoch: int) -> None:
        super()._begin_epoch(epoch)
        # After resuming in the middle of an epoch its statistics are there already; made again they would differ.
        if epoch > self.statistics_epoch:
            self._end_epoch(epoch)
            self.statistics_epoch = epoch

    def _end_epoch(self, epoch: int) -> None:
        """Must be called on every rank: learn what `epoch`, about to begin, needs."""
        raise NotImplementedError

    def _scan_table(self, row: Callable[[Tensor, Tensor], Tensor], num_columns: int) -> Tensor:
        """Must be called on every rank: one row of numbers for each training instance, the same on every rank.

        Args:
            row: From logits `(B, ...)` and given labels `(B, K)`, both on the CPU, to `(B, num_columns)` floats.
            num_columns: C.

        Returns:
            `(N, C)` float32.
        """
        table = torch.zeros(len(self.train_labels), num_columns)
        seen = torch.zeros(len(self.train_labels), dtype=torch.int32)

        def observe(index: Tensor, logits: Tensor) -> None:
            index = index.cpu()
            table[index] = row(logits.detach().float().cpu(), self.train_labels[index]).float()
            seen.index_add_(0, index, torch.ones(len(index), dtype=torch.int32))

        self._scan(observe, **self._forward_options)
        if not bool((all_reduce_sum(seen) == 1).all()):
            raise RuntimeError("the scan did not see every training instance exactly once.")
        return all_reduce_sum(table)  # exact: of each number at most one rank holds more than 0
