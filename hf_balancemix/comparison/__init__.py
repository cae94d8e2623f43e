"""The methods of the paper's tables by name, and what scripts need to run them side by side."""

from hf_balancemix.comparison.experiment import ModelArguments, NoiseArguments, run_methods
from hf_balancemix.comparison.methods import METHODS, trainer_for

__all__ = ["METHODS", "ModelArguments", "NoiseArguments", "run_methods", "trainer_for"]
