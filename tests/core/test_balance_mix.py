"""The run's state: what it learns from a scan, what it refuses, and that it comes back whole."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from hf_balancemix.core import (
    BalanceMix,
    BalanceMixSettings,
    LossMixtures,
    Reliability,
    class_confidences,
    keyed_generator,
    label_losses,
    minority_mixup,
)


def case(n=400, k=3, seed=0):
    """Logits of a good model, and given labels of which some positive ones are wrong."""
    g = torch.Generator().manual_seed(seed)
    clean = (torch.rand(n, k, generator=g) < 0.3).long()
    logits = (2.0 * clean - 1) * 3 + torch.randn(n, k, generator=g)
    flipped = torch.rand(n, k, generator=g) < 0.1
    return logits, torch.where(flipped, 1 - clean, clean), clean


def p_clean_of(state):
    return state.clean_probability(torch.arange(state.labels.shape[0]))


NETWORK = BalanceMixSettings(judge="network")
VIEWS = BalanceMixSettings(judge="network", prediction_source="views")


def observed(state, logits, order=None, batch=64):
    order = torch.arange(len(logits)) if order is None else order
    for index in order.split(batch):
        state.observe(index, logits[index])
    return state


def test_a_scan_gives_the_parts_own_results():
    logits, given, _ = case()
    state = observed(BalanceMix(given, BalanceMixSettings(judge="network", max_missing=0)), logits)
    state.end_epoch(1)
    P, A = class_confidences(logits.double().sigmoid(), given)
    assert torch.equal(state.positive_confidence, P)
    assert torch.equal(state.negative_confidence, A)
    losses = label_losses(logits, given)
    expected = LossMixtures.fit(losses, given, "dividemix").clean_probability(losses, given).half()
    assert torch.equal(p_clean_of(state), expected.float())
    assert state.epoch == 1
    assert state.weights.sum().item() == pytest.approx(1)


def test_wrong_labels_are_found_and_repaired():
    logits, given, clean = case()
    state = observed(BalanceMix(given, NETWORK), logits)
    state.end_epoch(1)
    refined = state.refine(torch.arange(400), given.float())
    wrong = given != clean
    trusted = refined.reliability == Reliability.CLEAN
    assert (given == clean)[trusted].float().mean() > 0.99
    assert trusted[wrong].float().mean() < 0.05
    relabeled = refined.reliability == Reliability.RELABELED
    assert relabeled.sum() > 0
    assert (refined.labels == clean)[relabeled].float().mean() > 0.95


def test_the_order_of_a_scan_does_not_matter():
    logits, given, _ = case()
    one, two = (BalanceMix(given, NETWORK) for _ in range(2))
    observed(one, logits).end_epoch(1)
    observed(two, logits, torch.randperm(400, generator=torch.Generator().manual_seed(1)), batch=7).end_epoch(1)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("index", [list(range(399)), [*range(400), 5]])
def test_a_scan_that_misses_or_repeats_an_instance_is_refused(index):
    logits, given, _ = case()
    state = observed(BalanceMix(given, NETWORK), logits, torch.tensor(index))
    with pytest.raises(RuntimeError, match=f"observed instances is {len(index)} over all ranks; it must be 400"):
        state.end_epoch(1)
    assert state.epoch == 0
    observed(state, logits).end_epoch(1)  # and a whole one afterwards counts


def test_state_comes_back_and_goes_on_the_same():
    logits, given, _ = case()
    state = observed(BalanceMix(given, NETWORK), logits)
    state.end_epoch(4)
    other = BalanceMix(given, NETWORK)
    other.load_state_dict({k: v.clone() for k, v in state.state_dict().items()})
    assert other.epoch == 4
    for name, value in state.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    index = torch.tensor([3, 77, 399])
    for a, b in zip(*(s.refine(index, given[index]) for s in (state, other)), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_size_is_refused_and_changes_nothing():
    logits, given, _ = case()
    small = observed(BalanceMix(given[:100], NETWORK), logits[:100])
    small.end_epoch(1)
    state = BalanceMix(given, NETWORK)
    with pytest.raises(ValueError, match="weights is of shape"):
        state.load_state_dict(small.state_dict())
    assert state.epoch == 0


def hard_case(n=2000, k=3, seed=0):
    """Few positive labels, some missing ones, and as usual far more hard negative ones than either."""
    g = torch.Generator().manual_seed(seed)
    given = (torch.rand(n, k, generator=g) < torch.tensor([0.02, 0.05, 0.1])).to(torch.int8)
    hard = (given == 0) & (torch.rand(n, k, generator=g) < 0.2)
    logits = torch.where(given == 1, 3.0, torch.where(hard, -1.0, -6.0)) + 0.5 * torch.randn(n, k, generator=g)
    return logits, given


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("source", ["scan", "views"])
def test_no_more_labels_of_a_class_are_called_missing_than_it_may_lack(source, ratio):
    logits, given = hard_case()
    given[:40, 1] = -1  # unknown labels are none of these
    settings = replace(VIEWS, max_missing=ratio, clean_probability_source=source)
    limited, free = (BalanceMix(given, s) for s in (settings, replace(settings, max_missing=0)))
    for state in (limited, free):
        observed(state, logits).end_epoch(1)
    index = torch.arange(len(given))
    clean, printed = (s.refine(index, given.float(), logits.sigmoid()).reliability == 0 for s in (limited, free))
    losses = label_losses(logits, given.clamp(min=0))
    positive, negative = given == 1, given == 0
    assert torch.equal(clean[positive], printed[positive])
    for k in range(given.shape[1]):
        allowed = math.ceil(Fraction(str(ratio)) * int(positive[:, k].sum()))
        left = negative[:, k] & ~clean[:, k]
        assert allowed <= left.sum() <= 1.1 * allowed + 2 < 0.7 * (negative & ~printed)[:, k].sum()
        assert losses[left, k].min() >= losses[negative[:, k] & clean[:, k], k].max() * (1 - 1 / 64)
        assert (left & ~printed[:, k]).sum() == left.sum()


def test_a_class_without_positive_labels_lacks_none():
    logits, given = hard_case()
    given[:, 0] = 0
    state = observed(BalanceMix(given, NETWORK), logits)
    state.end_epoch(1)
    assert p_clean_of(state)[:, 0].eq(1).all()
    assert not p_clean_of(state)[:, 1].eq(1).all()


def test_the_limit_travels_in_the_state():
    logits, given = hard_case()
    settings = replace(VIEWS, clean_probability_source="views")
    state, other = BalanceMix(given, settings), BalanceMix(given, settings)
    observed(state, logits).end_epoch(1)
    assert (state.missing_loss_threshold > 0).all()
    other.load_state_dict(state.state_dict())
    index, p = torch.arange(len(given)), logits.sigmoid()
    for a, b in zip(state.refine(index, given, p), other.refine(index, given, p), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("missing", ["entries.judged", "loss_counts"])
def test_the_state_of_a_version_without_an_audit_is_refused(missing):
    _, given, clean = case()
    judged = BalanceMix(given)
    judged.judge(clean.float(), seed=0)
    state = {name: value for name, value in judged.state_dict().items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} is absent, as another version of hf_balancemix wrote it"):
        BalanceMix(given).load_state_dict(state)


def test_the_state_of_a_version_with_tables_is_refused_in_one_sentence():
    _, given, _ = case()
    state = BalanceMix(given, NETWORK).state_dict() | {"clean_probability": torch.ones(400, 3)}
    with pytest.raises(ValueError, match="tables of all labels, as an older version of hf_balancemix wrote it"):
        BalanceMix(given, NETWORK).load_state_dict(state)


def test_a_state_without_one_of_its_tensors_is_refused_and_changes_nothing():
    logits, given, _ = case()
    state = observed(BalanceMix(given, NETWORK), logits)
    state.end_epoch(1)
    whole, other = state.state_dict(), BalanceMix(given, NETWORK)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    learned = [name for name in whole if not name.startswith("mixtures.")]
    assert "missing_loss_threshold" in learned
    for missing in [*learned, "mixtures.means"]:
        with pytest.raises(ValueError, match=f"{missing.removeprefix('mixtures.')}'? .*is (absent|missing)"):
            other.load_state_dict({name: value for name, value in whole.items() if name != missing})
        assert other.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_limit_beyond_all_labels_is_none_and_one_that_was_lifted_is_gone():
    logits, given = hard_case()
    free, wide, lifted = (BalanceMix(given, replace(NETWORK, max_missing=m)) for m in (0, 1e6, 0))
    limited = observed(BalanceMix(given, NETWORK), logits)
    limited.end_epoch(1)
    lifted.load_state_dict(limited.state_dict())  # a run that is resumed with another setting
    for state in (free, wide, lifted):
        observed(state, logits).end_epoch(2)
    assert (p_clean_of(free) < 0.5).sum() > (p_clean_of(limited) < 0.5).sum()
    assert torch.equal(p_clean_of(free), p_clean_of(wide))
    assert torch.equal(p_clean_of(free), p_clean_of(lifted))


def test_before_the_first_scan_everything_is_uniform_and_clean():
    _, given, _ = case()
    state = BalanceMix(given, NETWORK)
    assert torch.equal(state.weights, torch.full((400,), 1 / 400, dtype=torch.float64))
    refined = state.refine(torch.arange(5), given[:5])
    assert (refined.reliability == Reliability.CLEAN).all()
    assert torch.equal(refined.labels, given[:5].float())
    assert refined.weight.eq(1).all()


def test_predictions_of_the_scan_decide_as_the_same_predictions_of_a_step():
    logits, given, _ = case()
    kept = observed(BalanceMix(given, NETWORK), logits)
    step = observed(BalanceMix(given, VIEWS), logits)
    for state in (kept, step):
        state.end_epoch(1)
    index = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:50]
    one = kept.refine(index, given[index])
    two = step.refine(index, given[index], logits[index].sigmoid().half().float())
    assert (one.reliability == Reliability.RELABELED).any()
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    other = BalanceMix(given, kept.settings)
    other.load_state_dict(kept.state_dict())
    remembered, f = p_clean_of(other) < 1, other.scan_probability(torch.arange(400))
    assert torch.equal(f[remembered], logits.double().sigmoid().half().float()[remembered])
    without = BalanceMix(given, replace(VIEWS, clean_probability_source="views"))
    for one, state in ((without, kept), (kept, without)):
        with pytest.raises(ValueError, match=r"entries of single labels are .*clean_probability_source among them"):
            one.load_state_dict(state.state_dict())


def test_predictions_must_come_from_where_the_settings_say():
    _, given, _ = case()
    labels = given[:5]
    with pytest.raises(ValueError, match="are absent; with prediction_source 'views' they must be given"):
        BalanceMix(given, VIEWS).refine(torch.arange(5), labels)
    scan = BalanceMix(given, NETWORK)
    with pytest.raises(ValueError, match="are given; with prediction_source 'scan' they must be absent"):
        scan.refine(torch.arange(5), labels, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="nothing is predicted in a step"):
        BalanceMixSettings(judge="network", clean_probability_source="views")


def test_without_label_management_there_is_nothing_to_refine():
    _, given, _ = case()
    with pytest.raises(ValueError, match="select_clean is False; it must be True where labels are refined"):
        BalanceMix(given, BalanceMixSettings(select_clean=False)).refine(torch.arange(5), given[:5])


def test_reset_forgets_everything():
    logits, given, _ = case()
    state = observed(BalanceMix(given, NETWORK), logits)
    state.end_epoch(2)
    state.observe(torch.arange(3), logits[:3])
    state.reset()
    for (name, a), b in zip(state.state_dict().items(), BalanceMix(given, NETWORK).state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    observed(state, logits).end_epoch(1)  # the three are not counted


def test_p_clean_from_views_needs_no_table_and_agrees_on_the_same_losses():
    logits, given, _ = case()
    table = observed(BalanceMix(given, VIEWS), logits)
    views = observed(BalanceMix(given, replace(VIEWS, clean_probability_source="views")), logits)
    for state in (table, views):
        state.end_epoch(1)
    assert len(views.entries) == 0
    index = torch.arange(400)
    a, b = (s.refine(index, given, logits.sigmoid()) for s in (table, views))
    assert (a.reliability == b.reliability).float().mean() > 0.995


def test_warm_up_and_the_first_epoch_manage_no_labels():
    settings = BalanceMixSettings(label_warmup_epochs=2)
    assert [settings.manages_labels(e) for e in range(4)] == [False, False, True, True]
    assert not BalanceMixSettings(label_warmup_epochs=0).manages_labels(0)
    assert not replace(settings, select_clean=False).manages_labels(3)
    assert not BalanceMixSettings(select_clean=False, minority_score="uniform").needs_scan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relabel_threshold": 0.3}, r"relabel_threshold is 0.3"),
        ({"mixup_alpha": -1}, "mixup_alpha is -1"),
        ({"max_missing": -0.5}, r"max_missing is -0.5; it must lie in \[0, 1e6\] \(0: no limit\)"),
        ({"max_missing": float("inf")}, "max_missing is inf"),
        ({"minority_score": "x"}, "minority_score is 'x'"),
        ({"label_warmup_epochs": -1}, "label_warmup_epochs is -1"),
        ({"mixture_preset": "best"}, "mixture_preset is 'best'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BalanceMixSettings(**change)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0, 2]]), "labels hold 2; each must be 0, 1 or -1"),
        (torch.tensor([[0, 0.5]]), "labels hold 0.5; each"),
        (torch.tensor([[float("nan"), 1]]), "labels hold nan; each"),
        (torch.ones(3), r"labels have shape \(3,\); they must be \(N, K\)"),
        (torch.ones(0, 2), r"shape \(0, 2\)"),
        (torch.ones(2, 0), r"shape \(2, 0\)"),
    ],
)
def test_bad_label_matrices_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        BalanceMix(labels)


def test_unknown_labels_change_nothing_that_is_known():
    # Marking labels unknown must give what leaving them out of every set gives.
    logits, given, _ = case()
    marked = given.clone()
    unknown = torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    marked[unknown] = -1
    state = observed(BalanceMix(marked, NETWORK), logits)
    state.end_epoch(1)
    for k in range(3):
        known = ~unknown[:, k]
        alone = observed(BalanceMix(given[known, k : k + 1], NETWORK), logits[known, k : k + 1])
        alone.end_epoch(1)
        assert state.positive_confidence[k] == alone.positive_confidence[0]
        assert state.negative_confidence[k] == alone.negative_confidence[0]
        assert torch.equal(p_clean_of(state)[known, k], p_clean_of(alone)[:, 0])
    assert p_clean_of(state)[unknown].eq(0).all()


def test_an_unknown_label_is_set_where_the_model_is_confident_and_ignored_elsewhere():
    state = BalanceMix(torch.tensor([[-1, -1, -1]]), VIEWS)
    refined = state.refine(torch.tensor([0]), torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[0.99, 0.01, 0.5]]))
    assert refined.labels.tolist() == [[1, 0, -1]]
    assert refined.weight.tolist() == [[1, 1, 0]]


def test_an_unknown_label_has_no_gradient_whichever_half_of_the_mix_it_is_in():
    images = torch.zeros(2, 1, 1, 1)
    _, targets = minority_mixup(
        images, images, torch.tensor([[1.0, -1.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 1.0]]),
        torch.tensor([0.75, 0.75]),
    )  # fmt: skip
    assert targets.tolist() == [[0.75, -1.0], [-1.0, 0.25]]
    logits = torch.zeros(2, 2, requires_grad=True)
    BalanceMix(torch.ones(1, 2)).loss(logits, targets).backward()
    assert (logits.grad == 0).tolist() == [[False, True], [True, False]]


def test_logits_that_are_not_finite_are_left_out_and_said(caplog):
    labels, logits = torch.tensor([[1, 0], [1, 0], [0, 1]] * 4), torch.randn(12, 2, generator=keyed_generator(0))
    bad = logits.clone()
    bad[0, 0], bad[4, 1], bad[5, 1] = math.nan, math.inf, -math.inf
    state, without = BalanceMix(labels, NETWORK), labels.clone()
    without[0, 0] = without[4, 1] = without[5, 1] = -1
    other = BalanceMix(without, NETWORK)
    state.observe(torch.arange(12), bad)
    other.observe(torch.arange(12), logits)
    assert not caplog.messages
    state.end_epoch(1)
    assert caplog.messages == ["3 of 24 logits that were observed before epoch 1 are not finite and were left out."]
    other.end_epoch(1)
    for name in ("positive_confidence", "negative_confidence", "missing_loss_threshold"):
        assert torch.equal(getattr(state, name), getattr(other, name)), name
    assert torch.equal(p_clean_of(state), p_clean_of(other))
    assert state.weights.isfinite().all()
    assert state.scan_probability(torch.tensor([0]))[0, 0] == 0.5
