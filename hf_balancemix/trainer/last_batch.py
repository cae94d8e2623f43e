"""Batches of one instance, which some models cannot be trained on: batch norm needs more than one value a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def has_batch_of_one(
    num_instances: int, batch_size: int, num_ranks: int, drop_last: bool, num_batches: int = 0
) -> bool:
    """Whether a rank's micro-batch has a single instance.

    Args:
        num_instances: N.
        batch_size: Instances in a micro-batch of one rank.
        num_ranks: Of several, each has full batches: the first ones of the epoch are repeated in the last.
        drop_last: The last batch is left out if it is not full.
        num_batches: After so many the training ends; 0: after the last of an epoch.
    """
    if batch_size == 1:
        return True
    full, rest = divmod(num_instances, batch_size)
    return rest == 1 and num_ranks == 1 and not drop_last and not 0 < num_batches <= full


def fault_of_one_instance(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """What goes wrong in a forward pass in training mode, if anything does.

    Afterwards modes, buffers and the random state are as before.

    Args:
        model: What `forward` runs.
        forward: Gives logits `(1, ...)` of one instance.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.train()
            shape = tuple(forward().shape)
        return None if shape[:1] == (1,) else f"its logits have the shape {shape}"
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        return str(error).splitlines()[0]
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
