"""Losses on logits. All are computed in float32 whatever the autocast dtype, and take soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LOSS_REDUCTIONS = ("sum", "mean")


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Eq. 1, and Eq. 10 when `weight` is given: BCE over the classes, averaged over the batch.

    Args:
        logits: `(B, K)`, any float dtype.
        targets: `(B, K)` in [0, 1]; mixed labels are soft. -1 where unknown: such a label has the weight 0.
        weight: `(B, K)` in [0, 1]: 1 for clean and re-labelled labels, p_G for ambiguous ones. None means 1.
        reduction: `"sum"` over the K classes, as printed; `"mean"` divides by K as well. Either way the mean over B,
            so that gradients do not depend on how a batch is split over ranks and accumulation steps.

    Returns:
        float32 scalar.

    Raises:
        ValueError: Shapes differ or the reduction is unknown.

    Example:
        >>> import torch
        >>> round(binary_cross_entropy(torch.zeros(4, 3), torch.ones(4, 3)).item(), 4)  # 3 ln 2
        2.0794
    """
    if logits.shape != targets.shape or (weight is not None and weight.shape != logits.shape):
        raise ValueError(
            f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and weight "
            f"{None if weight is None else tuple(weight.shape)} must have the same shape (B, K)."
        )
    if reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(LOSS_REDUCTIONS)}.")
    targets = targets.float()
    known = (targets >= 0).float()
    weight = known if weight is None else weight * known
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(min=0), weight, reduction="none")
    return (losses.sum(1) if reduction == "sum" else losses.mean(1)).mean()
