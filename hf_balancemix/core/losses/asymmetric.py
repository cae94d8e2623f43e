"""Asymmetric loss (Ridnik, Ben-Baruch et al., ICCV 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_range
from hf_balancemix.core.losses._base import MultiLabelLoss, power, prepare, reduce


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    margin: float = 0.05,
    detach_weight: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """Asymmetric loss: easy labels count less, negative ones above all.

    A positive costs (1 - p)^gamma_pos (-ln p), a negative p_m^gamma_neg (-ln(1 - p_m)) with p_m = max(p - margin, 0).
    A soft target t interpolates what the weight is made of, as the published code does when it is fed mixed labels:
    p_t = t p + (1 - t) (1 - p_m), loss = (1 - p_t)^(t gamma_pos + (1 - t) gamma_neg) (-t ln p - (1 - t) ln(1 - p_m)).
    Under Mixup that is not the mean of two losses.

    The published code sums over B, too, and clamps p at 1e-8; here a positive with p < 1e-8 keeps its gradient.

    Args:
        logits, targets, reduction: As :func:`binary_cross_entropy`, which also says what is returned and raised.
        gamma_neg, gamma_pos: Focus of the negatives and of the positives, >= 0. The published class says 1 for the
            positives, every published experiment 0.
        margin: In [0, 1]; negatives with p <= margin cost nothing.
        detach_weight: The weight is a constant for the gradient, as in the published training scripts; False
            differentiates it.
    """
    check_range("gamma_neg", gamma_neg, 0)
    check_range("gamma_pos", gamma_pos, 0)
    check_range("margin", margin, 0, 1)
    x, t, known = prepare(logits, targets)
    shifted = (x.sigmoid() - margin).clamp(min=0)  # p_m
    log_negative = F.logsigmoid(-x)
    if margin > 0:
        # ln(1 - p + margin): 1 - p is lost in 1 - p_m where p is near 1.
        confident = torch.logaddexp(log_negative, x.new_tensor(math.log(margin))).clamp(max=0)
        log_negative = torch.where(x > 0, confident, (-shifted.where(x <= 0, 0)).log1p())
    losses = -t * F.logsigmoid(x) - (1 - t) * log_negative
    weight = power(t * (-x).sigmoid() + (1 - t) * shifted, t * gamma_pos + (1 - t) * gamma_neg)
    return reduce((weight.detach() if detach_weight else weight) * losses, known, reduction)


@dataclass(eq=False, repr=False)
class AsymmetricLoss(MultiLabelLoss):
    """:func:`asymmetric_loss` as an object; see :class:`MultiLabelLoss`. The settings are the function's."""

    gamma_neg: float = 4.0
    gamma_pos: float = 0.0
    margin: float = 0.05
    detach_weight: bool = True
    reduction: str = "sum"

    citation = """@inproceedings{ridnik2021asymmetric,
  title     = {Asymmetric Loss for Multi-Label Classification},
  author    = {Ridnik, Tal and Ben-Baruch, Emanuel and Zamir, Nadav and Noy, Asaf and Friedman, Itamar and
               Protter, Matan and Zelnik-Manor, Lihi},
  booktitle = {International Conference on Computer Vision},
  year      = {2021}
}"""

    def forward(self, logits: Tensor, targets: Tensor, epoch: int = 0) -> Tensor:
        return asymmetric_loss(logits, targets, **self.settings)
