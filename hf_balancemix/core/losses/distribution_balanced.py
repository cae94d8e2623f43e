"""Distribution-balanced loss for long tails (Wu et al., ECCV 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.losses.basics import check_range, power, prepare, reduce


def db_loss(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    num_instances: int,
    *,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
    negative_scale: float = 2.0,
    kappa: float = 0.05,
    gamma: float = 2.0,
    focal_scale: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    """DB loss: re-balanced weights, negative-tolerant logits, focal.

    Of N instances n_k are positive for class k.

    - Weight of a label of an instance with the labels t: w_k = alpha + sigmoid(beta (r_k - mu)) with
      r_k = (1 / n_k) / sum_j (t_j / n_j). An instance without a positive label has r = infinity, w = 1 + alpha.
    - z_k = x_k - (kappa / s) ln(N / n_k - 1) with s = `negative_scale`.
    - A positive costs w (1 - sigmoid(z))^gamma (-ln sigmoid(z)), a negative (w / s) sigmoid(s z)^gamma
      (-ln sigmoid(-s z)); both times `focal_scale`. A soft target t costs t times the one and 1 - t times the other.

    n_k is taken within [1, N - 1], so that classes without positives or without negatives stay finite. The published
    setting draws class-aware batches as well, which is the sampler's business and not the loss's.

    Args:
        logits: `(B, K)`, any float dtype; computed in float32, float64 stays. They are not changed.
        targets: `(B, K)` in [0, 1]; -1 where unknown: weight 0, and no part of r.
        class_counts: `(K,)`, n_k over the training set.
        num_instances: N >= 2.
        alpha: Least weight, >= 0.
        beta: Steepness of the weight.
        mu: r at which the weight is alpha + 1/2: 0.2 for COCO-MLT, 0.3 for VOC-MLT.
        negative_scale: s > 0: 2 for COCO-MLT, 5 for VOC-MLT.
        kappa: Size of the logits' shift.
        gamma: Focus, >= 0; differentiated.
        focal_scale: Factor on everything.
        reduction: As :func:`focal_loss`.

    Returns:
        float32 (or float64) scalar; `(B, K)` for `"none"`.

    Raises:
        ValueError: Shapes do not fit, the reduction is unknown or a setting out of range.
    """
    check_range("num_instances", num_instances, 2)
    check_range("alpha", alpha, 0)
    check_range("gamma", gamma, 0)
    if not negative_scale > 0:
        raise ValueError(f"negative_scale is {negative_scale}; it must be positive.")
    x, t, known = prepare(logits, targets)
    if class_counts.shape != x.shape[1:]:
        raise ValueError(f"class_counts has the shape {tuple(class_counts.shape)}; it must be ({x.shape[1]},).")
    counts = class_counts.to(x).clamp(1, num_instances - 1)
    inverse = 1 / counts
    # Not a matrix product, which autocast would compute in half precision.
    ratio = inverse / (t * inverse).sum(1, keepdim=True)
    weight = alpha + (beta * (ratio - mu)).sigmoid()
    z = x - kappa / negative_scale * (num_instances / counts - 1).log()
    scaled = negative_scale * z
    positive = -power((-z).sigmoid(), gamma) * F.logsigmoid(z)
    negative = -power(scaled.sigmoid(), gamma) * F.logsigmoid(-scaled) / negative_scale
    return reduce(focal_scale * weight * (t * positive + (1 - t) * negative), known, reduction)
