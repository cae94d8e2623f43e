"""Large losses mean missing labels (Kim et al., "Large Loss Matters", CVPR 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_choice, check_range
from hf_balancemix.core.distributed import gather, world
from hf_balancemix.core.losses._base import MultiLabelLoss, prepare
from hf_balancemix.core.losses.binary_cross_entropy import binary_cross_entropy


def num_large_losses(num_labels: int, epochs: int, delta: float | Fraction) -> int:
    """How many labels are modified: ceil(num_labels * epochs * delta / 100), in exact arithmetic.

    Args:
        num_labels: B K of the batch, positives included.
        epochs: For rejection and temporary correction the epoch counted from 0, so that the share grows by delta per
            cent an epoch and the first epoch changes nothing. For permanent correction 1 in every epoch but the first.
        delta: In per cent; a float counts as the decimal number that it prints as.

    Returns:
        int in [0, num_labels].

    Raises:
        ValueError: `delta` or `epochs` is negative.

    Example:
        >>> num_large_losses(16 * 80, 9, 0.2)  # 1.8 % of 1,280 are 23.04
        24
        >>> num_large_losses(1000, 10, 0.07)  # in floats 1000 * 10 * 0.07 / 100 is a little more than 7
        7
    """
    if epochs < 0 or not 0 <= delta < math.inf:
        raise ValueError(f"epochs is {epochs} and delta is {delta}; both must be 0 or more, and finite.")
    return min(math.ceil(num_labels * epochs * Fraction(str(delta)) / 100), num_labels)


def large_loss_entries(
    logits: Tensor, labels: Tensor, num_modified: int, *, strict: bool = False, across_ranks: bool = False
) -> Tensor:
    """Which labels of the batch have a large loss.

    Candidates are the labels that are exactly 0: negative or unobserved ones, under Mixup those that neither image
    has. Those whose BCE is at least the `num_modified`-th largest of the candidates' are taken; equal ones together,
    so ties can make it more. Where there are fewer candidates, all are taken. Positive, mixed and unknown labels
    never are.

    Args:
        logits: `(B, K)`, any float dtype.
        labels: `(B, K)` in [0, 1]; -1 where unknown.
        num_modified: k >= 0.
        strict: Only those above the k-th largest, as the permanent correction has it; for k = 1 none, and still all
            where there are fewer candidates than k.
        across_ranks: k counts over the batches of all ranks together, which must be equally large; every rank must
            call. Otherwise each rank's batch is on its own, and what is taken depends on how many ranks there are.

    Returns:
        `(B, K)` bool.

    Raises:
        ValueError: Shapes differ or `num_modified` is negative.
    """
    check_range("num_modified", num_modified, 0)
    x, _, _ = prepare(logits.detach(), labels)
    candidates = labels == 0
    if num_modified == 0:
        return torch.zeros_like(candidates)
    losses = (-F.logsigmoid(-x)).masked_fill(~candidates, -math.inf)
    pool = gather(losses.flatten()) if across_ranks else losses.flatten()
    if pool.numel() == 0:
        return candidates
    threshold = pool.topk(min(num_modified, pool.numel())).values[-1]  # -inf: more than there are candidates
    return candidates & (losses > threshold if strict else losses >= threshold)


def large_loss(
    logits: Tensor,
    labels: Tensor,
    num_modified: int,
    mode: str = "reject",
    across_ranks: bool = False,
    reduction: str = "sum",
) -> Tensor:
    """LL-R and LL-Ct: BCE in which the labels with a large loss are left out or count as positive, this time only.

    Args:
        logits, labels, reduction: As :func:`binary_cross_entropy`, which also says what is returned and raised;
            published is the mean.
        num_modified: k >= 0; see `num_large_losses`.
        mode: `"reject"`: their loss is 0, the denominators of the reductions stay; `"correct"`: it is BCE(x, 1).
        across_ranks: As `large_loss_entries`, which says which labels these are.
    """
    check_choice("mode", mode, ("reject", "correct"))
    modified = large_loss_entries(logits, labels, num_modified, across_ranks=across_ranks)
    return _modified_bce(logits, labels, modified, mode, reduction)


def _modified_bce(logits: Tensor, labels: Tensor, modified: Tensor, mode: str, reduction: str) -> Tensor:
    labels = labels if labels.is_floating_point() else labels.float()  # others may not hold -1
    targets = labels.masked_fill(modified, -1 if mode == "reject" else 1)  # -1 has no loss
    return binary_cross_entropy(logits, targets, reduction=reduction)


@dataclass(eq=False, repr=False)
class LargeLoss(MultiLabelLoss):
    """LL-R, LL-Ct and LL-Cp as an object: their share of labels grows with the epoch; see :class:`MultiLabelLoss`.

    Args:
        delta: Per cent of a batch's labels that are modified more each epoch, >= 0; a fraction is exact. The first
            epoch, 0, modifies none. Published: 0.2 for 10 epochs; in BalanceMix's tables 2 / number of epochs.
        mode: `"reject"` (LL-R) and `"correct"` (LL-Ct) as :func:`large_loss`. `"permanent"` (LL-Cp) corrects delta per
            cent in every epoch but the first; of those, :meth:`entries` with `strict=True` are to become positive for
            good, which is the caller's business.
        across_ranks: Rank the losses of all ranks' batches together, so that a run does not depend on how many share
            it; every rank must call. False: each rank its own, as published code under DistributedDataParallel.
    """

    citation = """@inproceedings{kim2022large,
  title     = {Large Loss Matters in Weakly Supervised Multi-Label Classification},
  author    = {Kim, Youngwook and Kim, Jae Myung and Akata, Zeynep and Lee, Jungwoo},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}"""
    delta: float | Fraction = 0.2
    mode: str = "reject"
    across_ranks: bool = True
    reduction: str = "sum"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("reject", "correct", "permanent"))
        super().__post_init__()

    def entries(self, logits: Tensor, targets: Tensor, epoch: int, strict: bool = False) -> Tensor:
        """`(B, K)` bool: the labels that are modified in this epoch; `strict` as :func:`large_loss_entries`."""
        num_labels = logits.numel() * (world()[1] if self.across_ranks else 1)
        num_modified = num_large_losses(num_labels, min(epoch, 1) if self.mode == "permanent" else epoch, self.delta)
        return large_loss_entries(logits, targets, num_modified, strict=strict, across_ranks=self.across_ranks)

    def forward(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        return _modified_bce(logits, targets, self.entries(logits, targets, epoch), self.mode, self.reduction)
