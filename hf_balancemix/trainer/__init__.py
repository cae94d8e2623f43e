"""Trainers for multi-label images, and the knobs of these."""

from hf_balancemix.trainer.multilabel import BalanceMixTrainer, MultiLabelTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments, MultiLabelTrainingArguments

__all__ = [
    "BalanceMixTrainer",
    "BalanceMixTrainingArguments",
    "MultiLabelTrainer",
    "MultiLabelTrainingArguments",
]
