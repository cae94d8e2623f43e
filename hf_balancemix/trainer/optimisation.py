"""Adam, one cycle of the learning rate, and weight decay that leaves vectors out: the parts of ML-Decoder's recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

if TYPE_CHECKING:
    from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments


def adam(args: MultiLabelTrainingArguments) -> tuple[type[torch.optim.Adam], dict[str, Any]]:
    """`torch.optim.Adam`, whose weight decay is part of the gradient, and its arguments, as Trainer takes them."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.Adam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def one_cycle(optimizer: torch.optim.Optimizer, args: MultiLabelTrainingArguments, num_steps: int) -> OneCycleLR:
    """`OneCycleLR` over `num_steps` optimiser steps; it rises for `args.warmup_steps`, a share of them if below 1.

    Momentum, or Adam's first beta, runs against the learning rate. What `args.lr_scheduler_kwargs` say wins.
    """
    rise = float(args.warmup_steps)
    rise = rise if rise < 1 else rise / num_steps
    if rise >= 1:
        rise = 1 - 1 / num_steps  # torch divides by the length of the fall
    if round(rise * num_steps, 6) == 1:
        rise = 0.0  # and by that of the rise less one step
    settings: dict[str, Any] = {"max_lr": args.learning_rate, "total_steps": num_steps, "pct_start": rise}
    given: Any = args.lr_scheduler_kwargs or {}  # a str in transformers' annotation only
    return OneCycleLR(optimizer, **settings | given)


def without_vectors(names: Iterable[str], model: nn.Module) -> list[str]:
    """`names` of parameters but for those of one dimension, such as biases and the weights of batch norm."""
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    return [name for name in names if name not in vectors]
