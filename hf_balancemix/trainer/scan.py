"""The pass over the whole training set between epochs: every instance once, in evaluation mode, not augmented."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from hf_balancemix.core.distributed import world
from hf_balancemix.data.training_data import collate


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is as it was (frozen parts stay frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def broadcast_buffers(model: nn.Module) -> None:
    """Must be called on every rank: give every rank the buffers of rank 0.

    Batch-norm statistics differ between ranks after a training step (DDP sends them at the next forward pass only);
    what is computed in evaluation mode would then depend on the shard. Checkpoints hold rank 0's.
    """
    if world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def scan(
    forward: Callable[[dict[str, Tensor]], Tensor],
    model: nn.Module,
    instances: Dataset,
    observe: Callable[[Tensor, Tensor], None],
    *,
    batch_size: int,
    num_workers: int = 0,
    show_progress: bool = False,
) -> None:
    """Must be called on every rank: show every instance to the model once and hand the logits to `observe`.

    Rank r takes the instances r, r + world, ..., unpadded; there is no collective inside the loop. Neither the global
    random state nor the model changes (but for the broadcast of its buffers).

    Args:
        forward: From a collated batch to `(B, K)` logits.
        model: What `forward` runs; set to evaluation mode meanwhile.
        instances: Rows with `pixel_values` and `index`.
        observe: Called with `index` `(B,)` and logits `(B, K)`.
        batch_size: Instances a forward pass.
        num_workers: Worker processes of the data loader.
        show_progress: Show a bar.
    """
    broadcast_buffers(model)
    rank, num_ranks = world()
    shard = Subset(instances, range(rank, len(instances), num_ranks))
    # A generator of its own: a DataLoader would otherwise draw its base seed from the global one.
    loader = DataLoader(
        shard, batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )
    with evaluation_mode(model):
        for batch in tqdm(loader, desc="Scan", leave=False, dynamic_ncols=True, disable=not show_progress):
            observe(batch["index"], forward(batch))
