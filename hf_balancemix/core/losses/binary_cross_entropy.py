"""Binary cross-entropy (Eq. 1 and 10)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_same_shape
from hf_balancemix.core.losses._base import prepare, reduce


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    reduction: str = "sum",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Eq. 1, and Eq. 10 when `weight` is given: BCE over the classes, averaged over the batch.

    Args:
        logits: `(B, K)`, any float dtype; computed in float32, float64 stays.
        targets: `(B, K)` in [0, 1], any dtype; mixed labels are soft. -1 where unknown: such a label has the weight 0,
            whatever its logit.
        weight: `(B, K)` in [0, 1]: 1 for clean and re-labelled labels, p_G for ambiguous ones. None means 1.
        pos_weight: `(K,)`, positive: factor on the losses of positive labels (of a soft target, on that share), as in
            torch's `binary_cross_entropy_with_logits`. None means 1.
        reduction: `"sum"` over the K classes and mean over B, as printed; `"mean"` over B and K; `"none"`.

    Returns:
        float32 (or float64) scalar, 0 for an empty batch; `(B, K)` for `"none"`.

    Raises:
        ValueError: Shapes differ, the reduction is unknown, or a setting is out of its range.

    Example:
        >>> import torch
        >>> round(binary_cross_entropy(torch.zeros(4, 3), torch.ones(4, 3)).item(), 4)  # 3 ln 2
        2.0794
    """
    x, t, known = prepare(logits, targets)
    if weight is not None:
        check_same_shape(logits=logits, weight=weight)
        weight = weight.masked_fill(~known, 0)
    if pos_weight is not None:
        if pos_weight.shape != x.shape[1:]:
            raise ValueError(f"pos_weight has the shape {tuple(pos_weight.shape)}; it must be ({x.shape[1]},).")
        pos_weight = pos_weight.to(x)
    losses = F.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight, reduction="none")
    return reduce(losses, known, reduction)
