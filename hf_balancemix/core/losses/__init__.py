"""Losses on logits. All are computed in float32 whatever the autocast dtype, and take soft targets.

None changes its arguments or the gradient mode. Reductions are `"none"`, `"sum"` over all labels, `"mean"` over B K
and `"batchmean"`: sum over K, mean over B. :func:`binary_cross_entropy` and the trainers' `loss_reduction` know only
`"mean"` and that last one, and call it `"sum"`, as Eq. 1 does.
"""

from hf_balancemix.core.losses.basics import LOSS_REDUCTIONS, REDUCTIONS, binary_cross_entropy
from hf_balancemix.core.losses.distribution_balanced import db_loss
from hf_balancemix.core.losses.focusing import asymmetric_loss, focal_loss
from hf_balancemix.core.losses.large_loss import (
    LARGE_LOSS_MODES,
    large_loss,
    large_loss_entries,
    modified_labels,
    num_large_losses,
)
from hf_balancemix.core.losses.missing_labels import hill_loss, splc_loss
from hf_balancemix.core.losses.modules import AsymmetricLoss, DBLoss, FocalLoss, HillLoss, LargeLoss, SPLCLoss

__all__ = [
    "LARGE_LOSS_MODES",
    "LOSS_REDUCTIONS",
    "REDUCTIONS",
    "AsymmetricLoss",
    "DBLoss",
    "FocalLoss",
    "HillLoss",
    "LargeLoss",
    "SPLCLoss",
    "asymmetric_loss",
    "binary_cross_entropy",
    "db_loss",
    "focal_loss",
    "hill_loss",
    "large_loss",
    "large_loss_entries",
    "modified_labels",
    "num_large_losses",
    "splc_loss",
]
