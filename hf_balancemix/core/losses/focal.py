"""Focal loss (Lin et al., ICCV 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_range
from hf_balancemix.core.losses._base import MultiLabelLoss, power, prepare, reduce


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None, reduction: str = "sum"
) -> Tensor:
    """Focal loss: (1 - p_t)^gamma BCE, the weight differentiated.

    p_t = t p + (1 - t) (1 - p) is the probability of the target, so that a soft target t interpolates it.

    Args:
        logits, targets, reduction: As :func:`binary_cross_entropy`, which also says what is returned and raised.
        gamma: Focus, >= 0; 0 is BCE.
        alpha: Weight of the positives in [0, 1]; negatives have 1 - alpha, soft targets lie between. None: all 1.
    """
    check_range("gamma", gamma, 0)
    x, t, known = prepare(logits, targets)
    losses = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    losses = power(t * (-x).sigmoid() + (1 - t) * x.sigmoid(), gamma) * losses
    if alpha is not None:
        check_range("alpha", alpha, 0, 1)
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    return reduce(losses, known, reduction)


@dataclass(eq=False, repr=False)
class FocalLoss(MultiLabelLoss):
    """:func:`focal_loss` as an object; see :class:`MultiLabelLoss`. The settings are the function's."""

    gamma: float = 2.0
    alpha: float | None = None
    reduction: str = "sum"

    citation = """@inproceedings{lin2017focal,
  title     = {Focal Loss for Dense Object Detection},
  author    = {Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Doll{\\'a}r, Piotr},
  booktitle = {International Conference on Computer Vision},
  year      = {2017}
}"""

    def forward(self, logits: Tensor, targets: Tensor, epoch: int = 0) -> Tensor:
        return focal_loss(logits, targets, **self.settings)
