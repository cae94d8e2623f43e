"""From a method's name to its trainer; data, model, optimiser and evaluation are the caller's and the same for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_balancemix.methods.citations import CITATIONS
from hf_balancemix.methods.co_teaching import CoTeachingTrainer
from hf_balancemix.methods.losses import LARGE_LOSS_METHODS, LOSS_METHODS, loss_trainer
from hf_balancemix.methods.t_estimator import TEstimatorTrainer
from hf_balancemix.trainer import BalanceMixTrainer, MixupTrainer, MultiLabelTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

METHODS = {
    "bce": "binary cross-entropy on RandAugment views, no Mixup (the paper's Default)",
    "mixup": "bce with Mixup: both streams uniform, given labels",
    "focal": "focal loss on Mixup",
    "asl": "asymmetric loss on Mixup",
    "ll-r": "large-loss rejection: the largest losses of negative labels are left out",
    "ll-ct": "large-loss correction: they count as positive for this step",
    "ll-cp": "large-loss correction for good: they become positive",
    "spl-hill": "Hill loss on Mixup, for missing labels",
    "splc": "SPLC loss on Mixup, for missing labels: confident negatives count as positive",
    "db-loss": "distribution-balanced loss on Mixup, for unbalanced classes",
    "co-teaching": "two networks, each learns from the instances that its peer's mixture calls clean; with Mixup",
    "t-estimator": "transition matrices by label correlation after the warm-up, then reweighting; with Mixup",
    "balancemix": "minority sampler and label-wise management",
    "+minority": "Table 5: mixup with the minority sampler",
    "+clean": "Table 5: and only labels that count as clean",
    "+relabel": "Table 5: and re-labelled ones; with ambiguous ones it is balancemix",
    "balancemix-without-minority": "Table 13: both streams uniform, label-wise management",
}

# BalanceMix with some of its switches set; what is not named is as the arguments say.
_SWITCHES: dict[str, dict[str, Any]] = {
    "+minority": {"select_clean": False},
    "+clean": {"select_clean": True, "relabel": False, "ambiguous": False},
    "+relabel": {"select_clean": True, "relabel": True, "ambiguous": False},
    "balancemix-without-minority": {"minority_score": "uniform"},
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
    trainer = _trainer(method, args, **kwargs)
    trainer.method_name, trainer.citation = method, CITATIONS.get(method)
    return trainer


def _trainer(method: str, args: BalanceMixTrainingArguments, **kwargs: Any) -> MultiLabelTrainer:
    if method == "bce":
        return MultiLabelTrainer(args=args, **kwargs)
    if method == "mixup":
        return MixupTrainer(args=args, **kwargs)
    if method == "co-teaching":
        return CoTeachingTrainer(args=args, **kwargs)
    if method == "t-estimator":
        return TEstimatorTrainer(args=args, **kwargs)
    if method in LOSS_METHODS or method in LARGE_LOSS_METHODS:
        return loss_trainer(method, args, **kwargs)
    if method in _SWITCHES:
        args = replace(args, **_SWITCHES[method])
    return BalanceMixTrainer(args=args, **kwargs)
