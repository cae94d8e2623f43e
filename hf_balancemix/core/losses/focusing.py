"""Losses that weigh easy labels down: focal and asymmetric."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.losses.basics import check_range, power, prepare, reduce


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None, reduction: str = "mean"
) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017): (1 - p_t)^gamma BCE, the weight differentiated.

    p_t = t p + (1 - t) (1 - p) is the probability of the target, so that a soft target t interpolates it.

    Args:
        logits: `(B, K)`, any float dtype; computed in float32, float64 stays.
        targets: `(B, K)` in [0, 1]; -1 where unknown: weight 0.
        gamma: Focus, >= 0; 0 is BCE.
        alpha: Weight of the positives in [0, 1]; negatives have 1 - alpha, soft targets lie between. None: all 1.
        reduction: `"none"`, `"sum"` over all labels, `"mean"` over B K (unknown labels included) or `"batchmean"`:
            sum over K, mean over B.

    Returns:
        float32 (or float64) scalar; `(B, K)` for `"none"`.

    Raises:
        ValueError: Shapes differ, the reduction is unknown or a setting out of range.
    """
    check_range("gamma", gamma, 0)
    x, t, known = prepare(logits, targets)
    losses = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    losses = power(t * (-x).sigmoid() + (1 - t) * x.sigmoid(), gamma) * losses
    if alpha is not None:
        check_range("alpha", alpha, 0, 1)
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    return reduce(losses, known, reduction)


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    margin: float = 0.05,
    detach_weight: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """ASL (Ben-Baruch et al., ICCV 2021).

    A positive costs (1 - p)^gamma_pos (-ln p), a negative p_m^gamma_neg (-ln(1 - p_m)) with p_m = max(p - margin, 0).
    A soft target t interpolates what the weight is made of, as the published code does when it is fed mixed labels:
    p_t = t p + (1 - t) (1 - p_m), loss = (1 - p_t)^(t gamma_pos + (1 - t) gamma_neg) (-t ln p - (1 - t) ln(1 - p_m)).
    Under Mixup that is not the mean of two losses.

    There is no clamp of the probabilities at 1e-8 as in the published code, so a positive with p < 1e-8 keeps its
    gradient.

    Args:
        logits: `(B, K)`, any float dtype; computed in float32, float64 stays.
        targets: `(B, K)` in [0, 1]; -1 where unknown: weight 0.
        gamma_neg: Focus of the negatives, >= 0.
        gamma_pos: Focus of the positives, >= 0. The published class says 1, every published experiment 0.
        margin: In [0, 1]; negatives with p <= margin cost nothing.
        detach_weight: The weight is a constant for the gradient, as in the published training scripts; False
            differentiates it.
        reduction: As :func:`focal_loss`. The published code sums over all labels.

    Returns:
        float32 (or float64) scalar; `(B, K)` for `"none"`.

    Raises:
        ValueError: Shapes differ, the reduction is unknown or a setting out of range.
    """
    for name, value in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        check_range(name, value, 0)
    check_range("margin", margin, 0, 1)
    x, t, known = prepare(logits, targets)
    shifted = (x.sigmoid() - margin).clamp(min=0)  # p_m
    log_negative = (-shifted).log1p() if margin > 0 else F.logsigmoid(-x)
    losses = -t * F.logsigmoid(x) - (1 - t) * log_negative
    weight = power(t * (-x).sigmoid() + (1 - t) * shifted, t * gamma_pos + (1 - t) * gamma_neg)
    return reduce((weight.detach() if detach_weight else weight) * losses, known, reduction)
