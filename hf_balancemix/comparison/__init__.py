"""The methods of the paper's tables by name: they differ in the method and in nothing else."""

from hf_balancemix.comparison.methods import METHODS, trainer_for

__all__ = ["METHODS", "trainer_for"]
