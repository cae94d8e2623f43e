"""The pass over the whole training set between epochs: every instance once, in evaluation mode, not augmented."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from hf_balancemix.core.distributed import all_reduce_sum, broadcast_buffers, world
from hf_balancemix.core.evaluation import evaluation_mode
from hf_balancemix.data.training_data import PlainInstances, collate


@torch.no_grad()
def scan(
    forward: Callable[[dict[str, Tensor]], Tensor],
    model: nn.Module,
    instances: PlainInstances,
    observe: Callable[[Tensor, Tensor], None],
    *,
    batch_size: int,
    num_workers: int = 0,
    show_progress: bool = False,
    told_to_stop: Callable[[], bool] = lambda: False,
    worker_init_fn: Callable[[int], None] | None = None,
) -> int:
    """Must be called on every rank: show every instance to the model once and hand the logits to `observe`.

    Rank r takes the instances r, r + world, ...; there is no collective inside the loop but those of a model whose
    weights are spread over the ranks (FSDP). For these all ranks run equally many forward passes: one that has an
    instance less shows the model a copy of another's, whose logits nobody sees. Neither the global random state nor
    the model changes (but for the broadcast of its buffers).

    Args:
        forward: From a collated batch to `(B, K)` logits.
        model: What `forward` runs; set to evaluation mode meanwhile.
        instances: N rows with `pixel_values` and `index`, the same on every rank.
        observe: Called with `index` `(B,)` and logits `(B, K)`; B is 0 where a batch holds a copy only.
        batch_size, num_workers: Instances a forward pass, and worker processes of the data loader.
        told_to_stop: Asked before each batch; where it says yes, on any rank, the scan is given up.
        worker_init_fn: As of a DataLoader.

    Returns:
        How many instances, over all ranks, had a logit that is not finite; 0 where the scan was given up.

    Raises:
        RuntimeError: Over all ranks, some instance did not come exactly once.
    """
    broadcast_buffers(model)
    rank, num_ranks = world()
    n = len(instances)
    own = range(rank, n, num_ranks)
    left = len(own)
    shard = Subset(instances, own if left == -(-n // num_ranks) else [*own, n - 1])
    # A generator of its own: a DataLoader would otherwise draw its base seed from the global one.
    loader = DataLoader(
        shard,
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=worker_init_fn,
    )
    given_up = False
    seen = torch.zeros(n, dtype=torch.int32)
    num_bad = torch.zeros((), dtype=torch.int64)
    with evaluation_mode(model):
        for batch in tqdm(loader, desc="Scan", leave=False, dynamic_ncols=True, disable=not show_progress):
            given_up = told_to_stop()
            if given_up:
                break
            index, logits = batch["index"][:left], forward(batch)[:left]
            left -= len(index)
            seen.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
            num_bad = num_bad.to(logits.device) + (~logits.isfinite()).flatten(1).any(1).sum()
            observe(index, logits)
    if all_reduce_sum(torch.tensor(int(given_up))):
        return 0
    seen = all_reduce_sum(seen)
    missed, again = int((seen == 0).sum()), int((seen > 1).sum())
    if missed or again:
        raise RuntimeError(
            f"the scan missed {missed} of {n} instances and saw {again} more than once; over all ranks "
            "it must see each exactly once; give every rank the same training set, whose rows are in order."
        )
    return int(all_reduce_sum(num_bad.cpu()))
