"""The methods of the paper's tables by name: a loss, or a trainer where a loss is not enough."""

from hf_balancemix.methods.co_teaching import CoTeachingTrainer
from hf_balancemix.methods.losses import LargeLossTrainer, LossTrainer
from hf_balancemix.methods.registry import METHODS, trainer_for
from hf_balancemix.methods.t_estimator import (
    TEstimatorTrainer,
    estimate_transition_matrices,
    importance_reweighted_bce,
)

__all__ = [
    "METHODS",
    "CoTeachingTrainer",
    "LargeLossTrainer",
    "LossTrainer",
    "TEstimatorTrainer",
    "estimate_transition_matrices",
    "importance_reweighted_bce",
    "trainer_for",
]
