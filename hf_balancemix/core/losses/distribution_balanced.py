"""Distribution-balanced loss for long tails (Wu et al., ECCV 2020)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_range
from hf_balancemix.core.losses._base import MultiLabelLoss, power, prepare, reduce


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
    reduction: str = "sum",
) -> Tensor:
    """DB loss: re-balanced weights, negative-tolerant logits, focal.

    Of N instances n_k are positive for class k.

    - Weight of a label of an instance with the labels t: w_k = alpha + sigmoid(beta (r_k - mu)) with
      r_k = (1 / n_k) / sum_j (t_j / n_j). An instance without a positive label has r = infinity: w = 1 + alpha (for
      beta = 0 all weights are alpha + 1/2).
    - z_k = x_k - (kappa / s) ln(N / n_k - 1) with s = `negative_scale`.
    - A positive costs w (1 - sigmoid(z))^gamma (-ln sigmoid(z)), a negative (w / s) sigmoid(s z)^gamma
      (-ln sigmoid(-s z)); both times `focal_scale`. A soft target t costs t times the one and 1 - t times the other.

    n_k is taken within [1, N - 1], so that classes without positives or without negatives stay finite. The published
    setting draws class-aware batches as well, which is the sampler's business and not the loss's.

    Args:
        logits, targets, reduction: As :func:`binary_cross_entropy`, which also says what is returned and raised. An
            unknown label is no part of r.
        class_counts, num_instances: `(K,)`, n_k over the training set, and N >= 2.
        alpha, beta: Least weight and the weight's steepness, both >= 0.
        mu: r at which the weight is alpha + 1/2: 0.2 for COCO-MLT, 0.3 for VOC-MLT.
        negative_scale: s > 0: 2 for COCO-MLT, 5 for VOC-MLT.
        kappa: Size of the logits' shift.
        gamma, focal_scale: Focus, >= 0, differentiated; and a factor on everything.
    """
    check_range("num_instances", num_instances, 2)
    check_range("alpha", alpha, 0)
    check_range("beta", beta, 0)
    for name, value in (("mu", mu), ("kappa", kappa), ("focal_scale", focal_scale)):
        check_range(name, value, -math.inf)
    check_range("gamma", gamma, 0)
    if not 0 < negative_scale < math.inf:
        raise ValueError(f"negative_scale is {negative_scale}; it must be positive and finite.")
    x, t, known = prepare(logits, targets)
    if class_counts.shape != x.shape[1:]:
        raise ValueError(f"class_counts has the shape {tuple(class_counts.shape)}; it must be ({x.shape[1]},).")
    counts = class_counts.to(x).clamp(1, num_instances - 1)
    inverse = 1 / counts
    # Not a matrix product, which autocast would compute in half precision.
    ratio = inverse / (t * inverse).sum(1, keepdim=True)
    ratio = ratio.clamp(max=torch.finfo(x.dtype).max)  # beta may be 0
    weight = alpha + (beta * (ratio - mu)).sigmoid()
    z = x - kappa / negative_scale * (num_instances / counts - 1).log()
    scaled = negative_scale * z
    positive = -power((-z).sigmoid(), gamma) * F.logsigmoid(z)
    negative = -power(scaled.sigmoid(), gamma) * F.logsigmoid(-scaled) / negative_scale
    return reduce(focal_scale * weight * (t * positive + (1 - t) * negative), known, reduction)


@dataclass(eq=False, repr=False)
class DBLoss(MultiLabelLoss):
    """:func:`db_loss` as an object; see :class:`MultiLabelLoss`. The settings are the function's."""

    class_counts: Tensor
    num_instances: int
    _: KW_ONLY
    alpha: float = 0.1
    beta: float = 10.0
    mu: float = 0.2
    negative_scale: float = 2.0
    kappa: float = 0.05
    gamma: float = 2.0
    focal_scale: float = 2.0
    reduction: str = "sum"

    citation = """@inproceedings{wu2020distribution,
  title     = {Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets},
  author    = {Wu, Tong and Huang, Qingqiu and Liu, Ziwei and Wang, Yu and Lin, Dahua},
  booktitle = {European Conference on Computer Vision},
  year      = {2020}
}"""

    @classmethod
    def from_labels(cls, labels: Tensor, **settings: Any) -> DBLoss:
        """With the class counts of `(N, K)` given training labels in {0, 1}, or -1 where unknown."""
        return cls((labels == 1).sum(0), len(labels), **settings)

    def forward(self, logits: Tensor, targets: Tensor, epoch: int = 0) -> Tensor:
        return db_loss(logits, targets, self.class_counts, **self.settings)
