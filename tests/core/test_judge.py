"""Labels judged by heads that never saw them: how many are called wrong, which, and what cannot be judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_balancemix.core import (
    BalanceMix,
    BalanceMixSettings,
    estimate_noise_rates,
    judge_labels,
    label_losses,
    out_of_fold_logits,
    principal_components,
)


def case(noise: float = 0.3, n: int = 1_000, k: int = 4, seed: int = 0):
    """Features that show the classes, and labels of which some positive ones were moved to another class."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.rand(n, k, generator=g) < torch.linspace(0.5, 0.15, k)
    features = 4 * clean.float() @ torch.randn(k, 16, generator=g) + torch.randn(n, 16, generator=g)
    wrong = clean & (torch.rand(n, k, generator=g) < noise)
    given = clean & ~wrong
    given[wrong.nonzero()[:, 0], torch.randint(k, (int(wrong.sum()),), generator=g)] = True
    return features, given.to(torch.int8), clean


def test_wrong_labels_are_found_and_right_ones_are_left():
    features, given, clean = case()
    judged = judge_labels(features, given)
    is_clean, right = judged.p_clean > 0.5, (given == 1) == clean
    for polarity in (0, 1):
        own = given == polarity
        assert right[own & is_clean].float().mean() > 0.94
        assert is_clean[own & right].float().mean() > 0.94
        assert (~right)[own & ~is_clean].float().mean() > 0.8


def test_as_many_labels_are_called_wrong_as_are_estimated_to_be():
    features, given, _ = case()
    judged = judge_labels(features, given)
    for polarity, rate in ((1, judged.rates.wrong[0]), (0, judged.rates.missing[0])):
        called = ((judged.p_clean <= 0.5) & (given == polarity)).sum(0)
        assert (called - rate * (given == polarity).sum(0)).abs().max() <= 3  # the width of a bin


def test_few_clean_labels_are_called_wrong():
    features, given, _ = case(noise=0.0)
    assert (judge_labels(features, given).p_clean > 0.5).float().mean() > 0.99


def test_features_that_tell_nothing_judge_nobody(caplog):
    _, given, _ = case()
    noise = torch.randn(len(given), 8, generator=torch.Generator().manual_seed(9))
    assert (judge_labels(noise, given).p_clean == 1).all()
    assert "the features do not tell the classes apart" in caplog.text


def test_the_parts_are_those_of_one_round():
    features, given, _ = case()
    judged = judge_labels(features, given, num_rounds=1, seed=5)
    logits = out_of_fold_logits(principal_components(features), given.float(), torch.ones(given.shape), seed=5)
    assert torch.equal(judged.probability, logits.double().sigmoid().float())
    for one, other in zip(judged.rates, estimate_noise_rates(logits, given), strict=True):
        assert torch.equal(one, other)
    losses = label_losses(logits, given)
    for k in range(given.shape[1]):  # the larger the loss, the less probable
        own = given[:, k] == 1
        order = losses[own, k].argsort()
        assert (judged.p_clean[own, k][order].diff() <= 1e-6).all()


def test_more_rounds_judge_by_the_labels_as_refined():
    features, given, clean = case(noise=0.45)
    wrong = (given == 1) & ~clean
    once, more = (judge_labels(features, given, num_rounds=rounds) for rounds in (1, 3))
    assert not torch.equal(once.p_clean, more.p_clean)
    assert all(torch.equal(a, b) for a, b in zip(once.rates, more.rates, strict=True))
    assert more.p_clean[wrong].mean() <= once.p_clean[wrong].mean() + 0.01


def test_a_limit_to_the_missing_takes_the_place_of_the_estimate_for_negative_labels_alone():
    features, given, _ = case()
    free, limited, none = (judge_labels(features, given, num_rounds=1, max_missing=m) for m in (0, 0.05, None))
    negative, n = given == 0, (given == 1).sum(0)
    assert torch.equal(free.p_clean[~negative], none.p_clean[~negative])
    assert torch.equal(limited.p_clean[~negative], none.p_clean[~negative])
    doubted = ((limited.p_clean < 1) & negative).sum(0)
    assert (doubted <= 0.05 * n + 3).all()
    expected = free.mixtures.clean_probability(label_losses(torch.logit(free.probability.double()), given), given)
    assert torch.allclose(free.p_clean[negative], expected[negative], atol=1e-3)


def test_unknown_labels_and_features_that_are_not_finite_judge_nobody():
    features, given, _ = case()
    given[5] = -1
    features[7] = float("nan")
    judged = judge_labels(features, given)
    assert (judged.p_clean[7] == 0).all()
    others = torch.ones(len(given), dtype=torch.bool)
    others[[5, 7]] = False
    changed_features, changed = features.clone(), given.clone()
    changed[7] = 1 - changed[7]
    again = judge_labels(changed_features, changed)
    assert torch.equal(again.p_clean[others], judged.p_clean[others])
    assert torch.isfinite(judged.p_clean).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 2)}, r"features have shape \(3, 2\)"),
        ({"features": torch.zeros(1_000, 2, 2)}, "pass one vector for each instance"),
        ({"num_folds": 1}, "num_folds is 1"),
        ({"num_folds": 1_001}, "num_folds is 1001"),
        ({"num_rounds": 0}, "num_rounds is 0"),
        ({"features": torch.zeros(1_000, 0)}, r"features have shape \(1000, 0\)"),
        ({"labels": torch.full((1_000, 4), 3)}, "labels hold 3; each must be 0, 1 or -1"),
        ({"labels": torch.full((1_000, 4), 0.5)}, "labels hold 0.5"),
        ({"max_missing": -0.5}, "max_missing is -0.5"),
    ],
)
def test_what_cannot_be_judged_is_said(change, message):
    features, given, _ = case()
    with pytest.raises(ValueError, match=message):
        judge_labels(**({"features": features, "labels": given} | change))


@pytest.mark.dist
def test_two_ranks_judge_as_one(tmp_path):
    worker = Path(__file__).with_name("judge_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    for folder, start in (("one", [sys.executable]), ("two", torchrun)):
        (tmp_path / folder).mkdir()
        done = subprocess.run(
            [*start, str(worker), str(tmp_path / folder)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, *ranks = (torch.load(tmp_path / name, weights_only=True) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))
    for rank in ranks:
        assert all(torch.equal(a, b) for a, b in zip(one, rank, strict=True))
    assert (one[0] <= 0.5).any()


# ---- in BalanceMix ----


def judged_state(**changes):
    features, given, _ = case()
    state = BalanceMix(given, BalanceMixSettings(label_warmup_epochs=1, **changes))
    state.judge(features, seed=3)
    return features, given, state


def test_a_state_keeps_what_was_judged_through_its_epochs_and_its_checkpoints():
    features, given, state = judged_state()
    judged = judge_labels(features, given, seed=3)
    p_clean, every = judged.p_clean.half().float(), torch.arange(len(given))
    assert torch.equal(state.clean_probability(every), p_clean)
    state.observe(torch.arange(len(given)), torch.randn(given.shape, generator=torch.Generator().manual_seed(0)))
    state.end_epoch(1)
    assert torch.equal(state.clean_probability(every), p_clean)  # the network's losses say nothing
    assert torch.equal(state.loss_histogram.cells, judged.loss_histogram.cells)
    other = BalanceMix(given, state.settings)
    other.load_state_dict(state.state_dict())
    assert torch.equal(other.clean_probability(every), p_clean)
    assert all(torch.equal(a, b) for a, b in zip(other.noise_rates, judged.rates, strict=True))
    index = torch.arange(10)
    refined = [s.refine(index, given[:10]) for s in (state, other)]
    assert all(torch.equal(a, b) for a, b in zip(*refined, strict=True))
    state.reset()
    assert state.noise_rates is None
    assert (state.clean_probability(every) == 1).all()


def test_labels_that_nobody_judged_are_not_refined():
    _, given, _ = case()
    state = BalanceMix(given)
    with pytest.raises(ValueError, match="the labels were not judged"):
        state.refine(torch.arange(3), given[:3])
    for settings in (BalanceMixSettings(judge="network"), BalanceMixSettings(select_clean=False)):
        with pytest.raises(ValueError, match="leave the call out"):
            BalanceMix(given, settings).judge(torch.zeros(len(given), 2))
    with pytest.raises(ValueError, match='set judge to "network"'):
        BalanceMixSettings(clean_probability_source="views", prediction_source="views")
