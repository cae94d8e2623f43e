"""Bit for bit what comes of tables of all labels, though few are remembered: any judge, order, batches, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dense_oracle as dense
import pytest
import torch
from scipy.sparse import csr_array

from hf_balancemix.core import (
    BalanceMix,
    BalanceMixSettings,
    keyed_generator,
    mix_refined_labels,
    observed,
    out_of_fold,
    refine_labels,
    systematic_resample,
)

N, K = 400, 6
NETWORK = BalanceMixSettings(judge="network", label_warmup_epochs=1, relabel_threshold=0.9)
JUDGED = BalanceMixSettings(label_warmup_epochs=1, relabel_threshold=0.9)


def case(seed):
    """Features, given labels of which some are wrong or unknown, and logits of three scans of which some are bad."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.rand(N, K, generator=g) < torch.linspace(0.03, 0.3, K)
    labels = torch.where(torch.rand(N, K, generator=g) < 0.1, ~clean & (torch.rand(N, K, generator=g) < 0.3), clean)
    labels = labels.to(torch.int8).masked_fill(torch.rand(N, K, generator=g) < 0.05, -1)
    features = 2.0 * clean @ torch.randn(K, 12, generator=g) + torch.randn(N, 12, generator=g)
    logits = [(2.0 * clean - 1) * scale - 1 + 2 * torch.randn(N, K, generator=g) for scale in (0.5, 1.5, 3)]
    for scan in logits[1:]:
        scan[torch.rand(N, K, generator=g) < 0.01] = torch.nan
        scan[3, 1], scan[4, 2], scan[5] = torch.inf, -torch.inf, torch.nan
    if seed % 2:
        labels[:, 0], labels[labels[:, 1] == 1, 1] = -1, 0  # a class that nobody knows, and one without a positive
    return features, labels, logits


@pytest.fixture
def small_pieces(monkeypatch):
    """All that is done in pieces is done in many; and what is kept of a scan is pruned again and again."""
    monkeypatch.setattr(observed, "_VALUES_AT_ONCE", 500)
    monkeypatch.setattr(observed, "_ROWS_AT_ONCE", 64)
    monkeypatch.setattr(observed, "_VALUES_OF_A_BLOCK", 128)
    monkeypatch.setattr(observed, "_FEWEST_TO_PRUNE", 20)
    monkeypatch.setattr(observed, "_MORE_SUSPICIOUS", 3)
    monkeypatch.setattr(out_of_fold, "_VALUES_AT_ONCE", 5 * N * 4)


def scan(state, logits, epoch, seed):
    g = keyed_generator(seed, epoch)
    for index in torch.randperm(N, generator=g).split(int(torch.randint(1, 200, (), generator=g))):
        state.observe(index, logits[index])
    state.end_epoch(epoch)


def check_steps(state, labels, p_clean, f):
    """Refined labels, weights and mixtures of random batches."""
    s = state.settings
    for epoch in range(3):
        random, minority = torch.randint(N, (2, 50), generator=keyed_generator(epoch))
        of_batches = []
        for index in (random, minority):
            given = labels[index].float()
            options = {"relabel": s.relabel, "ambiguous": s.ambiguous, "trust_positives": s.trust_positives}
            expected = refine_labels(given, p_clean[index], f[index], s.relabel_threshold, **options)
            found = state.refine(index, given, f[index].float() if s.prediction_source == "views" else None)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
            of_batches.append((found, expected))
        lam = torch.rand(50, generator=keyed_generator(epoch, "lam")) / 2 + 0.5
        (one, a), (two, b) = of_batches
        mixed = mix_refined_labels(a, b, lam, s.partner_reliability)
        assert all(torch.equal(x, y) for x, y in zip(state.mix_labels(one, two, lam), mixed, strict=True))


def check_audit(state, score, p_clean, f, distrusted):
    found = state.suspicious_labels()
    at = instance, label_class = (score >= 0.1).nonzero(as_tuple=True)
    assert torch.equal(found.instance, instance)
    assert torch.equal(found.label_class, label_class)
    for column, table in ((found.score, score), (found.prediction, f), (found.p_clean, p_clean)):
        assert torch.equal(column, table[at].float())
    assert torch.equal(found.epochs, distrusted[at].int())
    assert len(instance) > 10


def check_learned(state, labels, expected):
    assert torch.equal(state.positive_confidence, expected.P)
    assert torch.equal(state.negative_confidence, expected.A)
    weights = expected.weights / expected.weights.sum()  # the order of the sums is another one
    torch.testing.assert_close(state.weights, weights, rtol=1e-13, atol=0)
    draws = [systematic_resample(w, N, keyed_generator(1)) for w in (state.weights, weights)]
    assert torch.equal(*draws)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"max_missing": 0.2, "trust_positives": True},
        {"max_missing": 3.0, "ambiguous": False},
        {"max_missing": 0.0, "monotone": False, "mixture_preset": "sklearn", "partner_reliability": False},
        {"prediction_source": "views", "relabel": False, "minority_score": "positive"},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_network_judges_as_with_tables(seed, change):
    _, labels, logits = case(seed)
    settings = replace(NETWORK, **change)
    given = csr_array(labels.numpy()) if seed == 2 else labels
    state = BalanceMix(given, settings)
    check_steps(state, labels, torch.ones(N, K), torch.full((N, K), 0.5))
    distrusted = torch.zeros(N, K, dtype=torch.int64)
    for epoch, of_scan in enumerate(logits, start=1):
        scan(state, of_scan, epoch, seed)
        expected = dense.scanned(labels, of_scan, settings, more_suspicious=3)
        check_learned(state, labels, expected)
        assert torch.equal(state.loss_histogram.cells, expected.histogram.cells)
        assert all(map(torch.equal, state.mixtures.state_dict().values(), expected.mixtures.state_dict().values()))
        p_clean = expected.p_clean.masked_fill(labels < 0, 0)
        assert torch.equal(state.clean_probability(torch.arange(N)), p_clean.float())
        check_steps(state, labels, p_clean, expected.f)
        check_audit(state, expected.score, p_clean, expected.f, distrusted)
        distrusted += (expected.p_clean <= 0.5) & (labels >= 0)  # counted once the epoch is over
        if epoch == 2:  # as after a kill
            saved, state = state.state_dict(), BalanceMix(given, settings)
            state.load_state_dict({name: value.clone() for name, value in saved.items()})


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("change", [{}, {"max_missing": 0.3}, {"max_missing": 0.0, "prediction_source": "views"}])
def test_heads_judge_as_with_tables(change):
    seed = len(change)
    features, labels, logits = case(seed)
    features[7] = torch.nan
    settings = replace(JUDGED, **change)
    expected = dense.judged(features, labels, settings, seed=5)
    state = BalanceMix(labels, settings)
    state.judge(features, seed=5)
    assert torch.equal(state.loss_histogram.cells, expected.histogram.cells)
    p_clean = expected.p_clean.masked_fill(labels < 0, 0)
    assert torch.equal(state.clean_probability(torch.arange(N)), p_clean.float())
    f, doubted = torch.full((N, K), 0.5, dtype=torch.float16), (p_clean <= 0.5).int()
    check_steps(state, labels, p_clean, f)
    check_audit(state, dense.suspicion(labels, expected), p_clean, f, 0 * doubted)
    for epoch, of_scan in enumerate(logits, start=1):
        scan(state, of_scan, epoch, seed)
        scanned = dense.scanned(labels, of_scan, settings)
        check_learned(state, labels, scanned)
        check_steps(state, labels, p_clean, scanned.f)
        check_audit(state, dense.suspicion(labels, expected, scanned.f), p_clean, scanned.f, doubted * (epoch - 1))
        if epoch == 2:
            saved, state = state.state_dict(), BalanceMix(labels, settings)
            state.load_state_dict(saved)


def test_figures_of_all_labels_are_those_of_the_table():
    _, labels, logits = case(0)
    state = BalanceMix(labels, NETWORK)
    scan(state, logits[1], 1, 0)
    p, known = dense.scanned(labels, logits[1], NETWORK).p_clean.double(), labels >= 0
    assert state.mean_clean_probability() == pytest.approx((p[known].mean().item(), p[labels == 1].mean().item()))
    expected = [((p <= 0.5) & (labels == value)).sum(0) for value in (0, 1)]
    assert torch.equal(state.distrusted_counts(), torch.stack(expected))


def test_memory_follows_the_positive_labels():
    n, k = 4_000, 300
    g = torch.Generator().manual_seed(0)
    labels = torch.rand(n, k, generator=g) < 0.01
    state = BalanceMix(labels, NETWORK)
    state.observe(torch.arange(n), torch.where(labels, 1.0, -5.0) + 2 * torch.randn(n, k, generator=g))
    state.end_epoch(1)
    assert 0 < len(state.entries) < 2.1 * (labels.sum() + 100 * k) < 0.1 * n * k
    size = sum(value.nbytes for name, value in state.state_dict().items() if name.startswith("entries."))
    assert size < 8 * len(state.entries)


@pytest.mark.dist
def test_two_ranks_learn_as_one(tmp_path):
    worker = Path(__file__).with_name("balance_mix_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    for folder, start in (("one", [sys.executable]), ("two", torchrun)):
        (tmp_path / folder).mkdir()
        done = subprocess.run(
            [*start, str(worker), str(tmp_path / folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, *ranks = (torch.load(tmp_path / name, weights_only=True) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))
    for rank in ranks:
        for of_one, of_rank in zip(one, rank, strict=True):
            assert of_one.keys() == of_rank.keys()
            for name, value in of_one.items():
                assert torch.equal(value, of_rank[name]), name
