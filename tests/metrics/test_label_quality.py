from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from hf_balancemix.metrics import LabelQuality, count_label_quality, label_quality

CLEAN, RELABELED, AMBIGUOUS = 0, 1, 2
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _batch(seed: int, b: int = 16, k: int = 9, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(b, k, generator=generator) < 0.2
    given = clean ^ (torch.rand(b, k, generator=generator) < 0.2)
    reliability = torch.randint(0, 3, (b, k), generator=generator, dtype=torch.uint8)
    guess = torch.rand(b, k, generator=generator) < 0.5
    refined = torch.where(reliability == RELABELED, guess, given)
    return given.to(dtype), clean.to(dtype), refined.to(dtype), reliability


def _slow_figures(batches: list[Batch]) -> dict[str, float]:
    """Label by label, straight from the definitions; NaN where the denominator is 0."""
    figures = {}
    for suffix in ("", "_positives"):
        labels = [
            tuple(int(tensor[i, j]) for tensor in batch)
            for batch in batches
            for i in range(batch[0].shape[0])
            for j in range(batch[0].shape[1])
            if suffix == "" or batch[0][i, j] == 1
        ]
        selected = [given == clean for given, clean, _, r in labels if r == CLEAN]
        truly_clean = [r == CLEAN for given, clean, _, r in labels if given == clean]
        relabeled = [refined == clean for _, clean, refined, r in labels if r == RELABELED]
        for name, hits in {
            "clean_precision": selected,
            "clean_recall": truly_clean,
            "relabel_accuracy": relabeled,
            "relabel_proportion": [r == RELABELED for *_, r in labels],
            "ambiguous_proportion": [r == AMBIGUOUS for *_, r in labels],
            "noise_rate": [given != clean for given, clean, *_ in labels],
        }.items():
            figures[name + suffix] = sum(hits) / len(hits) if hits else math.nan
    return figures


def test_hand_computed_figures():
    given = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    clean = torch.tensor([[1, 0, 0, 0, 0, 0, 1, 1]])
    relia = torch.tensor([[0, 0, 1, 0, 0, 2, 1, 1]], dtype=torch.uint8)
    refin = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 0]])
    assert label_quality(count_label_quality(given, clean, refin, relia)) == pytest.approx(
        {
            "clean_precision": 3 / 4,
            "clean_recall": 3 / 4,
            "relabel_proportion": 3 / 8,
            "relabel_accuracy": 2 / 3,
            "ambiguous_proportion": 1 / 8,
            "noise_rate": 4 / 8,
            "clean_precision_positives": 1 / 2,
            "clean_recall_positives": 1.0,
            "relabel_proportion_positives": 1 / 3,
            "relabel_accuracy_positives": 1.0,
            "ambiguous_proportion_positives": 0.0,
            "noise_rate_positives": 2 / 3,
        }
    )


def test_counts_are_split_by_the_given_polarity():
    given, clean, refined, reliability = _batch(0)
    counts = count_label_quality(given, clean, refined, reliability)
    assert (counts.shape, counts.dtype) == ((2, 7), torch.int64)
    assert counts[:, 0].tolist() == [int((given == 0).sum()), int((given == 1).sum())]
    assert counts[1, 1] == int((clean[given == 1] == 1).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.bfloat16])
def test_equals_the_slow_version_over_many_batches(dtype):
    batches = [_batch(seed, dtype=dtype) for seed in range(5)] + [_batch(9, b=1, k=1, dtype=dtype)]
    quality = LabelQuality()
    for batch in batches:
        quality.update(*batch)
    assert quality.compute() == pytest.approx(_slow_figures(batches), abs=1e-12)


def test_mixed_dtypes_as_a_training_step_has_them():
    given, clean, refined, reliability = _batch(1)
    expected = count_label_quality(given, clean, refined, reliability)
    assert torch.equal(count_label_quality(given, clean.to(torch.uint8), refined.bool(), reliability.long()), expected)


def test_figures_without_a_denominator_are_left_out():
    assert label_quality(torch.zeros(2, 7, dtype=torch.int64)) == {}
    zero = torch.zeros(3, 2)
    figures = label_quality(count_label_quality(zero, zero, zero, torch.full((3, 2), CLEAN)))
    assert figures == {
        "clean_precision": 1.0,
        "clean_recall": 1.0,
        "relabel_proportion": 0.0,
        "ambiguous_proportion": 0.0,
        "noise_rate": 0.0,
    }


def test_counts_merge_in_any_split_and_order():
    whole = _batch(3, b=20)
    parts = [[tensor[rows] for tensor in whole] for rows in (slice(7, 20), slice(0, 3), slice(3, 7))]
    assert torch.equal(sum(count_label_quality(*part) for part in parts), count_label_quality(*whole))


def test_state_survives_saving_and_goes_on():
    quality, resumed, straight = LabelQuality(), LabelQuality(), LabelQuality()
    quality.update(*_batch(4))
    state = quality.state_dict()
    quality.update(*_batch(5))  # the state taken before is a copy
    resumed.update(*_batch(8))  # forgotten on loading
    resumed.load_state_dict(state)
    state["counts"].zero_()
    resumed.update(*_batch(6))
    for seed in (4, 6):
        straight.update(*_batch(seed))
    assert torch.equal(resumed.counts, straight.counts)
    assert resumed.compute() == straight.compute()


def test_reset_and_reduce_in_a_single_process():
    quality = LabelQuality()
    quality.update(*_batch(4))
    expected = quality.compute()
    quality.reduce()
    quality.reduce()
    assert quality.compute() == expected
    quality.reset()
    assert quality.compute() == {}


def test_bad_shapes_and_types():
    given, clean, refined, reliability = _batch(0)
    with pytest.raises(ValueError, match=r"clean \(3, 9\).*same shape"):
        count_label_quality(given, clean[:3], refined, reliability)
    with pytest.raises(TypeError, match=r"float32; it must be integer codes"):
        count_label_quality(given, clean, refined, reliability.float())
    with pytest.raises(TypeError, match=r"bool; it must be integer codes"):
        count_label_quality(given, clean, refined, reliability.bool())


@pytest.mark.parametrize(("which", "value"), [(0, -1.0), (0, 0.5), (0, math.nan), (3, 3), (3, 255)])
def test_labels_and_codes_out_of_range_show_in_the_figures(which, value):
    batch = _batch(0)
    batch[which][2, 3] = value
    quality = LabelQuality()
    quality.update(*batch)
    quality.update(*_batch(1))
    with pytest.raises(ValueError, match=r"each label must be one of these.*\[0, 1, 2\]"):
        quality.compute()


def test_bad_states():
    with pytest.raises(ValueError, match=r"\['count'\]; it must have the tensor 'counts'"):
        LabelQuality().load_state_dict({"count": torch.zeros(2, 7, dtype=torch.int64)})
    for counts in (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 7)):
        with pytest.raises(ValueError, match=r"int64 of shape \(2, 7\)"):
            LabelQuality().load_state_dict({"counts": counts})


_RANK = """
    import sys, torch, torch.distributed as dist
    from hf_balancemix.metrics import LabelQuality
    sys.path.insert(0, sys.argv[1])
    from test_label_quality import _batch

    rank, world = int(sys.argv[3]), 2
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=world)
    assert dist.get_world_size() == 2
    quality = LabelQuality()
    seeds = [0, 1, 2, 3, 4]
    for seed in seeds[rank::world][:2]:
        quality.update(*_batch(seed))
    try:
        quality.state_dict()
        raise SystemExit("unreduced state was given")
    except RuntimeError as error:
        assert "reduce() on every rank" in str(error)
    quality.reduce()
    quality.reduce()                                   # a second time changes nothing
    resumed = LabelQuality()
    resumed.load_state_dict(quality.state_dict())      # as both ranks do from one checkpoint
    if rank == 0:                                      # the other rank has an update less
        resumed.update(*_batch(4))
    resumed.reduce()
    expected = LabelQuality()
    for seed in seeds:
        expected.update(*_batch(seed))
    assert torch.equal(resumed.counts, expected.counts), (rank, resumed.counts, expected.counts)
    assert resumed.compute() == expected.compute()
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.dist
def test_two_ranks_count_what_one_process_counts(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(_RANK))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), os.path.dirname(__file__), str(tmp_path / "store"), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
