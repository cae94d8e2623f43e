"""Binary cross-entropy, and what the other losses share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_REDUCTIONS = ("sum", "mean")
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Eq. 1, and Eq. 10 when `weight` is given: BCE over the classes, averaged over the batch.

    NOTE Its `"sum"` is the paper's, over the classes only; the other losses call that `"batchmean"`.

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


def prepare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float32 (float64 stays), targets in the same dtype with 0 for unknown ones, and where they are known.

    Raises:
        ValueError: Not two matrices of the same shape.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must have the same shape (B, K)."
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = targets >= 0
    return logits, targets.to(logits.dtype) * known, known


def reduce(losses: Tensor, known: Tensor, reduction: str) -> Tensor:
    """`(B, K)` losses with 0 for unknown labels, or their sum, their sum / (B K) or their sum / B.

    Unknown labels stay in the denominators, so that gradients do not depend on how a batch is split.

    Raises:
        ValueError: The reduction is unknown.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    losses = losses.masked_fill(~known, 0)
    if reduction == "none":
        return losses
    return losses.sum() / {"sum": 1, "mean": losses.numel(), "batchmean": len(losses)}[reduction]


def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """`base ** exponent` for base in [0, 1], whose gradient is finite at 0 for exponents below 1 as well."""
    return base.clamp(min=torch.finfo(base.dtype).tiny) ** exponent


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise a ValueError that names the setting unless low <= value <= high."""
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} is {value}; it must be {limits}.")
