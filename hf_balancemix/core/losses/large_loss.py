"""Large losses mean missing labels (Kim et al., "Large Loss Matters", CVPR 2022)."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.distributed import gather
from hf_balancemix.core.losses.basics import prepare, reduce

LARGE_LOSS_MODES = ("reject", "correct")


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
    if epochs < 0 or not delta >= 0:
        raise ValueError(f"epochs is {epochs} and delta {delta}; neither may be negative.")
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
    if num_modified < 0:
        raise ValueError(f"num_modified is {num_modified}; it must be 0 or more.")
    x, _, _ = prepare(logits.detach(), labels)
    candidates = labels == 0
    if num_modified == 0:
        return torch.zeros_like(candidates)
    losses = (-F.logsigmoid(-x)).masked_fill(~candidates, -math.inf)
    pool = gather(losses.flatten()) if across_ranks else losses.flatten()
    threshold = pool.topk(min(num_modified, pool.numel())).values[-1]  # -inf: more than there are candidates
    return candidates & (losses > threshold if strict else losses >= threshold)


def large_loss(
    logits: Tensor, labels: Tensor, num_modified: int, mode: str = "reject", reduction: str = "mean"
) -> Tensor:
    """LL-R and LL-Ct: BCE in which the labels with a large loss are left out or count as positive, this time only.

    Which labels, and what happens to ties and soft labels: :func:`large_loss_entries`, of which this is the form for
    one rank's batch; how many: :func:`num_large_losses`.

    Args:
        logits: `(B, K)`, any float dtype; computed in float32, float64 stays.
        labels: `(B, K)` in [0, 1]; -1 where unknown: weight 0.
        num_modified: k >= 0.
        mode: `"reject"`: their loss is 0, the denominators of the reductions stay; `"correct"`: it is BCE(x, 1).
        reduction: As :func:`focal_loss`. The published code takes the mean.

    Returns:
        float32 (or float64) scalar; `(B, K)` for `"none"`.

    Raises:
        ValueError: Shapes differ, or the mode or reduction is unknown.
    """
    modified = large_loss_entries(logits, labels, num_modified)
    x, t, known = prepare(logits, modified_labels(labels, modified, mode))
    return reduce(F.binary_cross_entropy_with_logits(x, t, reduction="none"), known, reduction)


def modified_labels(labels: Tensor, modified: Tensor, mode: str) -> Tensor:
    """`labels` with 1 (`"correct"`) or -1 (`"reject"`: weight 0, as for unknown ones) where `modified`.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in LARGE_LOSS_MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(LARGE_LOSS_MODES)}.")
    return labels.masked_fill(modified, 1 if mode == "correct" else -1)
