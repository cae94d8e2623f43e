"""From a method's name to its trainer; data, model, optimiser and evaluation are the caller's and the same for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_balancemix.trainer import BalanceMixTrainer, MultiLabelTrainer
from hf_balancemix.training_args import BalanceMixTrainingArguments

METHODS = {
    "bce": "binary cross-entropy on RandAugment views, no Mixup (the paper's Default)",
    "mixup": "bce with Mixup: both streams uniform, given labels",
    "balancemix": "minority sampler and label-wise management",
}


def trainer_for(method: str, args: BalanceMixTrainingArguments, **kwargs: Any) -> MultiLabelTrainer:
    """The trainer of a method.

    Args:
        method: A name in `METHODS`.
        args: For all methods alike; what a method does not know, it ignores.
        kwargs: For the trainer: model, train_dataset, eval_dataset, processing_class, ...

    Raises:
        ValueError: Unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if method == "bce":
        return MultiLabelTrainer(args=args, **kwargs)
    if method == "mixup":
        args = replace(args, minority_score="uniform", select_clean=False)
    return BalanceMixTrainer(args=args, **kwargs)
