"""Losses on logits, one paper a file: the function, and an object that owns its settings and its citation.

All are computed in float32 whatever the autocast dtype, take soft targets, and change neither their arguments nor the
gradient mode. The words for a reduction are the command line's: `"sum"` over K and mean over B, as Eq. 1 and 10 are
printed; `"mean"` over B and K; `"none"`. Every object is called as `loss(logits, targets, epoch)`; see
:class:`MultiLabelLoss`.
"""

from hf_balancemix.core.losses._base import LOSS_REDUCTIONS, REDUCTIONS, MultiLabelLoss
from hf_balancemix.core.losses.asymmetric import AsymmetricLoss, asymmetric_loss
from hf_balancemix.core.losses.binary_cross_entropy import binary_cross_entropy
from hf_balancemix.core.losses.distribution_balanced import DBLoss, db_loss
from hf_balancemix.core.losses.focal import FocalLoss, focal_loss
from hf_balancemix.core.losses.large_loss import LargeLoss, large_loss, large_loss_entries, num_large_losses
from hf_balancemix.core.losses.missing_labels import HillLoss, SPLCLoss, hill_loss, splc_loss

__all__ = [
    "LOSS_REDUCTIONS",
    "REDUCTIONS",
    "AsymmetricLoss",
    "DBLoss",
    "FocalLoss",
    "HillLoss",
    "LargeLoss",
    "MultiLabelLoss",
    "SPLCLoss",
    "asymmetric_loss",
    "binary_cross_entropy",
    "db_loss",
    "focal_loss",
    "hill_loss",
    "large_loss",
    "large_loss_entries",
    "num_large_losses",
    "splc_loss",
]
