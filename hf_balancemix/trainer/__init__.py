"""Trainers for multi-label images, and the knobs of these."""

from hf_balancemix.trainer.balancemix import BalanceMixTrainer
from hf_balancemix.trainer.interruption import TrainingInterrupted
from hf_balancemix.trainer.mixup import MixupTrainer
from hf_balancemix.trainer.multilabel import MultiLabelTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments, MultiLabelTrainingArguments

__all__ = [
    "BalanceMixTrainer",
    "BalanceMixTrainingArguments",
    "MixupTrainer",
    "MultiLabelTrainer",
    "MultiLabelTrainingArguments",
    "TrainingInterrupted",
]
