"""The compared methods by name: a loss, or a trainer where a loss is not enough."""

from hf_balancemix.methods.co_teaching import CoTeachingTrainer
from hf_balancemix.methods.elr import ELRSettings, ELRTrainer, elr_loss, updated_targets
from hf_balancemix.methods.losses import LargeLossTrainer, LossTrainer
from hf_balancemix.methods.nar import NARSettings, NARTrainer, handled_labels
from hf_balancemix.methods.registry import METHODS, trainer_for
from hf_balancemix.methods.t_estimator import (
    TEstimatorTrainer,
    estimate_transition_matrices,
    importance_reweighted_bce,
)

__all__ = [
    "METHODS",
    "CoTeachingTrainer",
    "ELRSettings",
    "ELRTrainer",
    "LargeLossTrainer",
    "LossTrainer",
    "NARSettings",
    "NARTrainer",
    "TEstimatorTrainer",
    "elr_loss",
    "estimate_transition_matrices",
    "handled_labels",
    "importance_reweighted_bce",
    "trainer_for",
    "updated_targets",
]
