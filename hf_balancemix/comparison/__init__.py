"""The methods of the paper's tables by name, and what scripts need to run them side by side."""

from hf_balancemix.comparison.co_teaching import CoTeachingTrainer
from hf_balancemix.comparison.experiment import ExperimentArguments, ModelArguments, NoiseArguments, run_methods
from hf_balancemix.comparison.loss_methods import LargeLossTrainer, LossTrainer
from hf_balancemix.comparison.methods import METHODS, trainer_for
from hf_balancemix.comparison.t_estimator import (
    TEstimatorTrainer,
    estimate_transition_matrices,
    importance_reweighted_bce,
)

__all__ = [
    "METHODS",
    "CoTeachingTrainer",
    "ExperimentArguments",
    "LargeLossTrainer",
    "LossTrainer",
    "ModelArguments",
    "NoiseArguments",
    "TEstimatorTrainer",
    "estimate_transition_matrices",
    "importance_reweighted_bce",
    "run_methods",
    "trainer_for",
]
