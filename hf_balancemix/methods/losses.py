"""Trainers of the methods that are a loss: Mixup as for all methods, and another loss than BCE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_balancemix.core.distributed import gather
from hf_balancemix.core.losses import LargeLoss, MultiLabelLoss
from hf_balancemix.trainer.mixup import MixupTrainer


class LossTrainer(MixupTrainer):
    """Trains on Mixup with a loss of your choice.

    Args:
        loss: One of `hf_balancemix`'s loss objects, such as `AsymmetricLoss(gamma_neg=2)`, or any function of `(B, K)`
            logits, `(B, K)` float labels in [0, 1] (mixed ones are soft; -1 where unknown) and the epoch counted from
            0, to a scalar that is a mean over the batch.
        args, kwargs: As :class:`~hf_balancemix.MultiLabelTrainer`; `args` are
            :class:`~hf_balancemix.BalanceMixTrainingArguments`, whose `loss_reduction` is that of evaluations only.

    Raises:
        ValueError: The loss gives no scalar, or does not fit the number of classes.
    """

    _loss_is_the_method = True
    takes_pos_weight = False

    def __init__(self, *args: Any, loss: Callable[[Tensor, Tensor, int], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss.to(self.args.device) if isinstance(loss, nn.Module) else loss
        self.method_name = getattr(loss, "__name__", type(loss).__name__)  # a function's, or a class's
        self.citation = getattr(loss, "citation", None)
        if self.train_labels is not None:  # a loss that does not work is to be refused now
            zeros = torch.zeros(2, self.train_labels.shape[1], device=self.args.device)
            value = self.loss(zeros, zeros, 0)
            if value.ndim != 0:
                found = f"a tensor of shape {tuple(value.shape)}"
                raise ValueError(f"the loss gives {found}; it must give a scalar; reduce it by 'sum' or 'mean'.")

    @property
    def method_settings(self) -> dict[str, Any]:
        """What model cards say of the loss, its settings that differ from their defaults."""
        return self.loss.changed_settings if isinstance(self.loss, MultiLabelLoss) else {}

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return self.loss(logits, targets, self.train_sampler.epoch)


class LargeLossTrainer(LossTrainer):
    """LL-Cp (Kim et al., CVPR 2022): labels that :class:`~hf_balancemix.LargeLoss` corrects stay corrected.

    They become labels of the random instance of a pair, which has the larger share in Mixup; mixed labels are mixed
    from the corrected ones. A correction counts from the next step on, since a step looks labels up here.

    Args:
        loss: With the mode `"permanent"`; another is a ValueError.
        args, kwargs: As :class:`LossTrainer`.

    Attributes:
        corrected: `(N, K)` bool on the CPU, labels that were made positive; the same on every rank after each step,
            and in every checkpoint.
    """

    loss: LargeLoss

    def __init__(self, *args: Any, loss: LargeLoss, **kwargs: Any) -> None:
        if loss.mode != "permanent":
            raise ValueError(f"the loss's mode is {loss.mode!r}; it must be 'permanent'; for others use LossTrainer.")
        super().__init__(*args, loss=loss, **kwargs)
        shape = (0, 0) if self.train_labels is None else self.train_labels.shape
        self.corrected = torch.zeros(shape, dtype=torch.bool)

    def _labels(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        labels = super()._labels(inputs, prefix)
        return labels.masked_fill(self.corrected[inputs[f"{prefix}index"].cpu()].to(labels.device), 1)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        kept = self.loss.entries(logits, targets, self.train_sampler.epoch, strict=True)
        row, k = gather(kept).cpu().nonzero(as_tuple=True)
        self.corrected[gather(inputs["index"]).cpu()[row], k] = True
        return super()._loss(logits, targets, inputs)

    def _end_training(self) -> None:
        super()._end_training()
        self.log({"large_loss_corrected": float(self.corrected.sum())})

    # ---- checkpoints ----

    def _run_state(self) -> dict[str, Tensor]:
        return super()._run_state() | {"corrected": self.corrected}

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self.corrected.zero_()

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        self.corrected = state["corrected"].clone()
