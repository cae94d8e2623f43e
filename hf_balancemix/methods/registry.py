"""From a method's name to its trainer; data, model, optimiser and evaluation are the caller's and the same for all."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_choice
from hf_balancemix.core.losses import AsymmetricLoss, DBLoss, FocalLoss, HillLoss, LargeLoss, MultiLabelLoss, SPLCLoss
from hf_balancemix.data.labels import given_labels
from hf_balancemix.methods.co_teaching import CoTeachingTrainer
from hf_balancemix.methods.elr import ELRSettings, ELRTrainer
from hf_balancemix.methods.losses import LargeLossTrainer, LossTrainer
from hf_balancemix.methods.nar import NARSettings, NARTrainer
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
    "elr": "early-learning regularisation: BCE, held to a moving average of earlier predictions; with Mixup",
    "nar": "elr, and labels kept, left out or flipped by the model's confidence after the warm-up; with Mixup",
    "balancemix": "minority sampler and label-wise management",
    "+minority": "Table 5: mixup with the minority sampler",
    "+clean": "Table 5: and only labels that count as clean",
    "+relabel": "Table 5: and re-labelled ones; with ambiguous ones it is balancemix",
    "balancemix-without-minority": "Table 13: both streams uniform, label-wise management",
}

_LOSSES: dict[str, type[MultiLabelLoss]] = {
    "focal": FocalLoss,
    "asl": AsymmetricLoss,
    "ll-r": LargeLoss,
    "ll-ct": LargeLoss,
    "ll-cp": LargeLoss,
    "spl-hill": HillLoss,
    "splc": SPLCLoss,
    "db-loss": DBLoss,
}
_LARGE_LOSS_MODES = {"ll-r": "reject", "ll-ct": "correct", "ll-cp": "permanent"}
_SETTINGS: dict[str, type[ELRSettings]] = {"elr": ELRSettings, "nar": NARSettings}
_TRAINERS: dict[str, type[MultiLabelTrainer]] = {
    **dict.fromkeys(METHODS, BalanceMixTrainer),
    **dict.fromkeys(_LOSSES, LossTrainer),
    "ll-cp": LargeLossTrainer,
    "bce": MultiLabelTrainer,
    "mixup": MixupTrainer,
    "co-teaching": CoTeachingTrainer,
    "t-estimator": TEstimatorTrainer,
    "elr": ELRTrainer,
    "nar": NARTrainer,
}
# BalanceMix with some of its switches set; what is not named is as the training arguments say.
_SWITCHES: dict[str, dict[str, Any]] = {
    "+minority": {"select_clean": False},
    "+clean": {"select_clean": True, "relabel": False, "ambiguous": False},
    "+relabel": {"select_clean": True, "relabel": True, "ambiguous": False},
    "balancemix-without-minority": {"minority_score": "uniform"},
}
# What an argument of a method can be: what JSON and a config file can say.
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def trainer_for(
    method: str, args: BalanceMixTrainingArguments, method_args: Mapping[str, Any] | None = None, **kwargs: Any
) -> MultiLabelTrainer:
    """The trainer of a method.

    Args:
        method: A name in `METHODS`.
        args: For all methods alike; what a method does not know, it ignores.
        method_args: The method's own: the settings of its loss, such as `{"gamma_neg": 2}` for asl, those of elr and
            nar, or `scored` of co-teaching. BalanceMix's are in `args`.
        kwargs: For the trainer: model, train_dataset, eval_dataset, processing_class, ...

    Raises:
        ValueError: Unknown method, an argument that it does not have, or a value that is refused.
    """
    own = dict(method_args or {})
    check_loss_arguments([method], args)
    check_method_args(method, own)
    if method in _LOSSES:
        train = kwargs.get("train_dataset")
        labels = given_labels(train) if method == "db-loss" and train is not None else None
        own = {"loss": _loss(method, own, labels, args.num_train_epochs, args.loss_reduction)}
    elif method in _SETTINGS:
        own = {"settings": _SETTINGS[method](**own)}
    elif method in _SWITCHES:
        args = copy.copy(args)  # not `replace`, which would take what is open for given
        vars(args).update(_SWITCHES[method])
    trainer = _TRAINERS[method](args=args, **own, **kwargs)
    trainer.method_name = method
    return trainer


def check_loss_arguments(methods: Sequence[str], args: BalanceMixTrainingArguments) -> None:
    """Raise a ValueError where a method would refuse `args.pos_weight`, because its loss is another than BCE."""
    without = [method for method in methods if method in METHODS and not _TRAINERS[method].takes_pos_weight]
    if args.pos_weight is not None and without:
        raise ValueError(
            f"pos_weight is {args.pos_weight!r}, but {', '.join(without)} has a loss of its own; leave one of them "
            "out: the methods with it are bce, mixup, balancemix and its variants, and co-teaching."
        )


def _loss(
    method: str, own: Mapping[str, Any], labels: Tensor | None, num_epochs: float = 1, reduction: str = "sum"
) -> MultiLabelLoss:
    """The loss of a method in `_LOSSES`, with what it must know of the run and of the `(N, K)` training labels."""
    settings: dict[str, Any] = {"reduction": reduction}
    if method in _LARGE_LOSS_MODES:
        settings["mode"] = _LARGE_LOSS_MODES[method]
        if "delta" not in own:  # the paper's 0.1, 0.04 and 0.05 per cent for 20, 50 and 40 epochs; a fraction is exact
            settings["delta"] = Fraction(2) / Fraction(str(num_epochs))
    if method != "db-loss":
        return _LOSSES[method](**settings, **own)
    if labels is None:
        raise ValueError("train_dataset is None; it must be given, because db-loss counts the training labels.")
    return DBLoss.from_labels(labels, **settings, **own)


def arguments_by_method(methods: Sequence[str], method_args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of those methods that have some, checked before anything is loaded.

    Args:
        methods: A run's, names in `METHODS`.
        method_args: The arguments of the one method, or a mapping from the names of methods to theirs.

    Raises:
        ValueError: As :func:`trainer_for`, or it is not clear whose the arguments are.
    """
    if not isinstance(method_args, Mapping):
        raise ValueError(f"method_args is {method_args!r}; it must map the names of arguments to their values.")
    given = dict(method_args)
    if len(methods) == 1 and given and methods[0] not in given:
        given = {methods[0]: given}
    for name, own in given.items():
        if name not in methods or not isinstance(own, dict):
            raise ValueError(
                f"method_args has {name!r}: {own!r}; for the methods {', '.join(methods)} it must map a method's name "
                'to its arguments, as in {"asl": {"gamma_neg": 4}, "focal": {"gamma": 1}}.'
            )
        check_method_args(name, own)
    return given


def check_method_args(method: str, own: Mapping[str, Any]) -> None:
    """Raise a ValueError where :func:`trainer_for` would, but for what depends on data and model."""
    check_choice("method", method, METHODS)
    known = _arguments_of(method)
    for name, value in own.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            choice = f"it must be one of {', '.join(known)}." if known else "it takes none; leave out method_args."
            advice = f"did you mean {near[0]}?" if near else choice
            raise ValueError(f"{name} is not an argument of {method}; {advice}")
        if not _is_one_of(value, known[name]):
            wanted = " or ".join(_KINDS.get(kind) or repr(kind) for kind in known[name])
            raise ValueError(f"{name} of {method} is {value!r}; it must be {wanted}.")
    if method in _LOSSES:
        _loss(method, own, torch.eye(2))  # refuses what is out of range
    elif method in _SETTINGS:
        _SETTINGS[method](**own)  # alike


def _arguments_of(method: str) -> dict[str, tuple[Any, ...]]:
    """A method's own arguments and what each can be: types, or for a choice between words the words.

    They are those of its loss's, its settings' or its trainer's constructor that have a default and a plain type, but
    for what the training arguments (the reduction) or the method's name (the mode) say already.
    """
    owner = CoTeachingTrainer if method == "co-teaching" else _LOSSES.get(method) or _SETTINGS.get(method)
    if owner is None:
        return {}
    known = {}
    for name, parameter in inspect.signature(owner, eval_str=True).parameters.items():
        hint = parameter.annotation
        kinds = tuple(kind for kind in get_args(hint) or (hint,) if kind is not Fraction)
        plain = get_origin(hint) is Literal or set(kinds) <= {*_KINDS}
        if plain and parameter.default is not parameter.empty and name not in ("reduction", "mode"):
            known[name] = kinds
    return known


def _is_one_of(value: Any, kinds: Sequence[Any]) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (isinstance(value, int) and int in kinds) or (float in kinds and math.isfinite(value))
    return any(type(value) is kind or value == kind for kind in kinds)
