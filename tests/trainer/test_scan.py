"""The scan sees every instance once, as it is, and leaves no trace."""

from __future__ import annotations

import multiprocessing as mp
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import NAMES, make_dataset, tiny_resnet
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_balancemix.core.distributed import broadcast_buffers
from hf_balancemix.core.evaluation import evaluation_mode
from hf_balancemix.data.training_data import PlainInstances
from hf_balancemix.data.views import ViewMaker
from hf_balancemix.models import model_from_backbone
from hf_balancemix.models.features import pooled_features_of
from hf_balancemix.trainer.scan import scan

N = 11


@pytest.fixture
def instances(tmp_path) -> PlainInstances:
    return PlainInstances(make_dataset(tmp_path / "images", N), ViewMaker(16, seed=0))


def run_scan(model: nn.Module, instances: PlainInstances, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    seen = []
    scan(
        lambda batch: model(pixel_values=batch["pixel_values"].float() / 255).logits,
        model,
        instances,
        lambda index, logits: seen.append((index, logits)),
        **{"batch_size": 4} | options,
    )
    return seen


def moved_statistics(seed: int = 0) -> nn.Module:
    """A small ResNet whose batch-norm statistics are not the initial ones, so that modes matter."""
    model = tiny_resnet(seed=seed)
    model.train()
    model(pixel_values=torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return model


@pytest.mark.parametrize("workers", [0, 2])
def test_every_instance_is_seen_once_with_the_models_own_logits(instances, workers):
    model = moved_statistics()
    seen = run_scan(model, instances, num_workers=workers)
    assert [len(index) for index, _ in seen] == [4, 4, 3]
    assert torch.cat([index for index, _ in seen]).tolist() == list(range(N))
    pixels = torch.stack([instances[i]["pixel_values"] for i in range(N)]).float() / 255
    with torch.no_grad(), evaluation_mode(model):
        expected = model(pixel_values=pixels).logits
    logits = torch.cat([logits for _, logits in seen])
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not logits.requires_grad


def test_batch_size_does_not_matter(instances):
    model = moved_statistics()
    one = torch.cat([logits for _, logits in run_scan(model, instances, batch_size=1)])
    all_at_once = torch.cat([logits for _, logits in run_scan(model, instances, batch_size=64)])
    assert torch.allclose(one, all_at_once, atol=1e-6)


def test_modes_come_back_as_they_were_and_frozen_parts_stay_frozen(instances):
    model = moved_statistics()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    during = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: during.extend(m.training for m in module.modules()), with_kwargs=True
    )
    run_scan(model, instances)
    hook.remove()
    assert during
    assert not any(during)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_modes_come_back_after_an_error(instances):
    model = moved_statistics()

    def stop(index, logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(lambda batch: torch.zeros(len(batch["index"]), 5), model, instances, stop, batch_size=4)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_random_state_nor_model_changes(instances, workers):
    model = moved_statistics()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before["resnet.embedder.embedder.normalization.running_mean"].abs().sum() > 0
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    run_scan(model, instances, num_workers=workers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_the_bar_is_shown_only_where_asked_for(instances, capfd):
    run_scan(moved_statistics(), instances)
    assert "Scan" not in capfd.readouterr().err
    run_scan(moved_statistics(), instances, show_progress=True)
    assert "Scan: " in capfd.readouterr().err


def on_two_ranks(work: Callable[[int], object], folder: Path) -> list:
    """What `work(rank)` gives on each of two processes of one group."""

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        queue.put((rank, work(rank)))
        dist.barrier()
        dist.destroy_process_group()

    # Forked, which spares two imports of transformers; the children use one thread.
    context = mp.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [results[0], results[1]]


@pytest.mark.dist
@pytest.mark.parametrize("num_instances", [N, 1])
def test_two_ranks_cover_all_instances_once_with_rank_0s_statistics(tmp_path, num_instances):
    data = PlainInstances(make_dataset(tmp_path / "images", num_instances), ViewMaker(16, seed=0))
    single = moved_statistics(seed=0)
    expected = torch.cat([logits for _, logits in run_scan(single, data)])

    def work(rank: int) -> tuple[list, list, list]:
        model = moved_statistics(seed=0)
        with torch.no_grad():  # as after a training step: the same parameters, other statistics
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.add_(rank)
        seen = run_scan(model, data)
        buffers = torch.cat([buffer.flatten().float() for buffer in model.buffers()])
        order = [i for index, _ in seen for i in index.tolist()]
        return order, [row for _, logits in seen for row in logits.tolist()], buffers.tolist()

    results = on_two_ranks(work, tmp_path)
    shards = [order for order, *_ in results]
    assert shards == [list(range(0, num_instances, 2)), list(range(1, num_instances, 2))]
    for shard, (_, logits, _) in zip(shards, results, strict=True):
        assert torch.allclose(torch.tensor(logits).view(-1, 5), expected[shard], atol=1e-6)
    assert results[0][2] == results[1][2]


@pytest.mark.dist
def test_a_model_whose_weights_are_spread_over_the_ranks_is_scanned_by_all_alike(tmp_path):
    # 9 instances on two ranks, 4 a batch: the first rank has two batches, the second one and a copy.
    data = PlainInstances(make_dataset(tmp_path / "images", 9), ViewMaker(16, seed=0))
    model = model_from_backbone(tiny_resnet().config, NAMES).eval()
    pixels = torch.stack([data[i]["pixel_values"] for i in range(9)]).float() / 255
    with torch.no_grad():
        expected = model(pixels).logits, model.pooled_features(pixels)

    def work(rank: int) -> list:
        fully_shard(model.head)
        fully_shard(model)
        assert model.head.weight.to_local().numel() < model.head.weight.numel()
        results = []
        for run in (lambda images: model(pixel_values=images).logits, pooled_features_of(model)):
            seen = []
            scan(
                lambda batch, run=run: run(batch["pixel_values"].float() / 255),
                model,
                data,
                lambda index, rows, seen=seen: seen.extend(zip(index.tolist(), rows.tolist(), strict=True)),
                batch_size=4,
            )
            results.append(dict(seen))
        return results

    ranks = on_two_ranks(work, tmp_path)
    for rows, *found in zip(expected, *ranks, strict=True):
        assert [sorted(seen) for seen in found] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
        both = found[0] | found[1]
        assert torch.allclose(torch.tensor([both[i] for i in range(9)]), rows, atol=1e-6)


def test_without_ranks_the_buffers_are_left_alone():
    model = moved_statistics()
    before = [buffer.clone() for buffer in model.buffers()]
    broadcast_buffers(model)
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


class Renamed(PlainInstances):
    """Rows that give themselves out for others: `index` is that of another row."""

    def __init__(self, instances: PlainInstances, names: list[int]) -> None:
        self.__dict__.update(instances.__dict__)
        self.names = names

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        rows = super().__getitems__(indices)
        return [row | {"index": torch.tensor(self.names[i])} for i, row in zip(indices, rows, strict=True)]


@pytest.mark.parametrize(
    ("names", "missed", "again"),
    [([0, 0, *range(2, N)], 1, 1), ([3] * N, N - 1, 1), ([*range(N - 2), 0, 1], 2, 2)],
)
def test_a_scan_in_which_an_instance_does_not_come_exactly_once_is_refused(instances, names, missed, again):
    model = moved_statistics()
    message = f"the scan missed {missed} of {N} instances and saw {again} more than once"
    with pytest.raises(RuntimeError, match=message):
        run_scan(model, Renamed(instances, names))
    assert all(module.training for module in model.modules())
    assert len(run_scan(model, Renamed(instances, list(reversed(range(N)))))) == 3  # in any order


@pytest.mark.dist
@pytest.mark.parametrize(
    ("names", "message"),
    [
        # Rank 0 sees rows 0, 2, ..., rank 1 the others: what is missed or comes twice no rank knows alone.
        ([1, *range(1, N)], f"the scan missed 1 of {N} instances and saw 1 more than once"),
        ([1, 0, *range(2, N)], ""),
    ],
)
def test_instances_are_counted_over_all_ranks(tmp_path, names, message):
    data = PlainInstances(make_dataset(tmp_path / "images", N), ViewMaker(16, seed=0))

    def work(rank: int) -> str:
        try:
            run_scan(moved_statistics(), Renamed(data, names))
        except RuntimeError as error:
            return str(error)
        return ""

    first, second = on_two_ranks(work, tmp_path)
    assert first == second
    assert first.startswith(message)
    assert bool(first) == bool(message)
