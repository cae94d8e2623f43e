"""Losses for missing labels, given as negative ones: Hill and SPLC (Zhang et al., arXiv 2112.07368).

The published code sums over B, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_range
from hf_balancemix.core.losses._base import MultiLabelLoss, power, prepare, reduce

_CITATION = """@article{zhang2021simple,
  title   = {Simple and Robust Loss Design for Multi-Label Learning with Missing Labels},
  author  = {Zhang, Youcai and Cheng, Yuhao and Huang, Xinyu and Wen, Fei and Feng, Rui and Li, Yaqian and
             Guo, Yandong},
  journal = {arXiv:2112.07368},
  year    = {2021}
}"""


def _focal_positive(x: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma (-ln p)."""
    return -power((-x).sigmoid(), gamma) * F.logsigmoid(x)


def hill_loss(
    logits: Tensor, targets: Tensor, lam: float = 1.5, margin: float = 1.0, gamma: float = 2.0, reduction: str = "sum"
) -> Tensor:
    """Hill loss: probable false negatives count less.

    A positive costs (1 - q)^gamma (-ln q) with q = sigmoid(x - margin), a negative (lam - p) p^2, whose slope in
    p falls again beyond p = lam / 3. A soft target t costs t times the one and 1 - t times the other: Mixup's mean of
    the losses of its two labels.

    Args:
        logits, targets, reduction: As :func:`binary_cross_entropy`, which also says what is returned and raised.
        lam: Where the hill stands, >= 1.
        margin: Shift of the positives' logits.
        gamma: Focus of the positives, >= 0.
    """
    check_range("lam", lam, 1)
    check_range("gamma", gamma, 0)
    check_range("margin", margin, -math.inf)
    x, t, known = prepare(logits, targets)
    p = x.sigmoid()
    return reduce(t * _focal_positive(x - margin, gamma) + (1 - t) * (lam - p) * p * p, known, reduction)


def splc_loss(
    logits: Tensor,
    targets: Tensor,
    epoch: int,
    threshold: float = 0.6,
    margin: float = 1.0,
    gamma: float = 2.0,
    first_epoch: int = 1,
    reduction: str = "sum",
) -> Tensor:
    """SPLC: focal loss with a margin, in which confident negatives count as positives from the second epoch on.

    A positive costs (1 - q)^gamma (-ln q) with q = sigmoid(x - margin), a negative p^gamma (-ln(1 - p)), and from
    `first_epoch` on a negative with p > threshold costs (1 - p)^gamma (-ln p). Nothing is remembered. A soft target t
    costs t times the first and 1 - t times the second; only labels that are exactly 0 can change sides, so under
    Mixup only those that neither image has.

    Args:
        logits, targets, reduction: As :func:`binary_cross_entropy`, which also says what is returned and raised.
        epoch: Counted from 0.
        threshold: In [0, 1]; the paper uses 0.6, and 0.65 where a quarter of the labels is missing.
        margin: Shift of the positives' logits.
        gamma: Focus, >= 0; differentiated.
        first_epoch: First epoch in which negatives can change sides.
    """
    check_range("threshold", threshold, 0, 1)
    check_range("gamma", gamma, 0)
    check_range("margin", margin, -math.inf)
    x, t, known = prepare(logits, targets)
    losses = t * _focal_positive(x - margin, gamma) + (1 - t) * _focal_positive(-x, gamma)
    if epoch >= first_epoch:
        missed = (targets == 0) & (x.detach().sigmoid() > threshold)
        losses = losses.where(~missed, _focal_positive(x, gamma))
    return reduce(losses, known, reduction)


@dataclass(eq=False, repr=False)
class HillLoss(MultiLabelLoss):
    """:func:`hill_loss` as an object; see :class:`MultiLabelLoss`. The settings are the function's."""

    lam: float = 1.5
    margin: float = 1.0
    gamma: float = 2.0
    reduction: str = "sum"

    citation = _CITATION

    def forward(self, logits: Tensor, targets: Tensor, epoch: int = 0) -> Tensor:
        return hill_loss(logits, targets, **self.settings)


@dataclass(eq=False, repr=False)
class SPLCLoss(MultiLabelLoss):
    """:func:`splc_loss` as an object; see :class:`MultiLabelLoss`. The settings are the function's."""

    threshold: float = 0.6
    margin: float = 1.0
    gamma: float = 2.0
    first_epoch: int = 1
    reduction: str = "sum"

    citation = _CITATION

    def forward(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        return splc_loss(logits, targets, epoch, **self.settings)
