"""The collectives that the method needs, and their end. Nothing is done where torch.distributed is not in use."""

from __future__ import annotations

import atexit
import os
import sys
import threading

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """`(rank, number of ranks)`; `(0, 1)` without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Must be called on every rank: the sum of `tensor` over ranks, on its own device, same dtype and shape.

    Integers are summed exactly, and so are floats of which at most one rank holds a non-zero value.
    """
    if world()[1] == 1:
        return tensor
    # NCCL moves CUDA tensors only; gloo moves either.
    moved = tensor.clone().cuda() if dist.get_backend() == "nccl" else tensor.clone()
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def broadcast(tensor: Tensor) -> Tensor:
    """Must be called on every rank: rank 0's `tensor`, on the caller's device."""
    return all_reduce_sum(tensor if world()[0] == 0 else torch.zeros_like(tensor))


def gather(tensor: Tensor) -> Tensor:
    """Must be called on every rank: the ranks' tensors, all of one shape, one after another along the first axis."""
    rank, num_ranks = world()
    if num_ranks == 1:
        return tensor
    rows = tensor.new_zeros(num_ranks, *tensor.shape, dtype=torch.uint8 if tensor.dtype == torch.bool else None)
    rows[rank] = tensor
    return all_reduce_sum(rows).flatten(0, 1).to(tensor.dtype)


def gather_ragged(tensor: Tensor) -> Tensor:
    """Must be called on every rank: the ranks' 1-D tensors, of any lengths, one after another."""
    rank, num_ranks = world()
    if num_ranks == 1:
        return tensor
    lengths = torch.zeros(num_ranks, dtype=torch.int64)
    lengths[rank] = len(tensor)
    lengths = all_reduce_sum(lengths)
    width = tensor.element_size()
    padded = torch.zeros(int(lengths.max()) * width, dtype=torch.uint8)  # bytes: gloo does not know every dtype
    padded[: len(tensor) * width] = tensor.contiguous().view(torch.uint8)
    if dist.get_backend() == "nccl":
        padded = padded.cuda()
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(parts, padded)
    return torch.cat(
        [part[: n * width].cpu().view(tensor.dtype) for part, n in zip(parts, lengths.tolist(), strict=True)]
    )


def broadcast_buffers(model: nn.Module) -> None:
    """Must be called on every rank: give every rank the buffers of rank 0.

    Batch-norm statistics differ between ranks after a training step (DDP sends them at the next forward pass only);
    what is computed in evaluation mode would then depend on the shard. Checkpoints hold rank 0's.
    """
    if world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def leave_process_group(status: int = 0) -> None:
    """The last thing a process does; a rank of several ends in it with this exit status. Not to be called after an
    exception, when the other ranks wait elsewhere.

    Such a rank may abort when it is taken down, after its work is done: threads of Gloo and of DDP still hold tensors
    then (https://github.com/pytorch/pytorch/pull/179291). So it waits for the others, runs what was registered for the
    end, and ends without being taken down.
    """
    if world()[1] == 1:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    else:
        dist.barrier()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
