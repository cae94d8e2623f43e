"""The minority sampler against slow obvious versions and hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from hf_balancemix.core import (
    EpochSampler,
    PairSampler,
    class_confidences,
    class_lift,
    effective_sample_size,
    instance_scores,
    keyed_generator,
    keyed_rng,
    keyed_seed,
    sampling_weights,
    systematic_resample,
)
from hf_balancemix.core.sampling import confidence_sums, confidences_from_sums


def random_case(n=50, k=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, generator=g), (torch.rand(n, k, generator=g) < 0.3).long()


def test_class_confidences_equal_a_plain_loop():
    p, t = random_case()
    P, A = class_confidences(p, t)
    for k in range(7):
        positive = [p[i, k].item() for i in range(50) if t[i, k] == 1]
        negative = [1 - p[i, k].item() for i in range(50) if t[i, k] == 0]
        assert P[k].item() == pytest.approx(sum(positive) / len(positive), abs=1e-9)
        assert A[k].item() == pytest.approx(sum(negative) / len(negative), abs=1e-9)


def test_class_confidences_do_not_depend_on_order_or_split():
    p, t = random_case(n=1000)
    whole = torch.cat(class_confidences(p, t))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole, torch.cat(class_confidences(p[order], t[order])))
    parts = [confidence_sums(p[i::3], t[i::3]) for i in range(3)]
    merged = [sum(part[j] for part in parts) for j in (0, 1)]
    assert torch.equal(whole, torch.cat(confidences_from_sums(*merged)))


def test_a_class_without_positives_or_negatives_is_finite():
    P, A = class_confidences(torch.full((4, 2), 0.3), torch.tensor([[0, 1]] * 4))
    assert P.tolist() == pytest.approx([1.0, 0.3])
    assert A.tolist() == pytest.approx([0.7, 1.0])


@pytest.mark.parametrize("score", ["paper", "positive"])
def test_scores_equal_a_plain_loop(score):
    p, t = random_case()
    P, A = class_confidences(p, t)
    got = instance_scores(t, P, A, score)
    for i in range(50):
        terms = [P[k].item() if t[i, k] else A[k].item() for k in range(7)]
        if score == "positive":
            terms = [P[k].item() for k in range(7) if t[i, k]]
            expected = sum(terms) / len(terms) if terms else 1.0
        else:
            expected = sum(terms)
        assert got[i].item() == pytest.approx(expected)


def test_weights_are_inverse_to_scores_and_uniform_where_asked():
    weights = sampling_weights(torch.tensor([1.0, 2.0, 4.0]))
    assert weights.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    _, t = random_case()
    ones = torch.ones(7)
    uniform = sampling_weights(instance_scores(t, ones, ones, "uniform"))
    assert torch.equal(uniform, torch.full((50,), 1 / 50, dtype=torch.float64))


@pytest.mark.parametrize("score", ["paper", "positive"])
def test_instances_without_a_known_label_are_drawn_as_often_as_uniformly(score):
    p, t = random_case(n=5000, k=20)
    P, A = class_confidences(p, t)
    alone = instance_scores(t[4:], P, A, score)
    t[:4] = -1
    scores = instance_scores(t, P, A, score)
    assert sampling_weights(scores)[:4].tolist() == pytest.approx([1 / 5000] * 4, rel=1e-12)
    assert torch.equal(scores[4:], alone)
    unknown = torch.full((3, 20), -1)
    assert sampling_weights(instance_scores(unknown, P, A, score)).tolist() == pytest.approx([1 / 3] * 3)


def test_the_number_of_known_labels_does_not_drive_the_draw():
    # 10 % of 20 labels are known: an eighth of the instances have none, and others from 1 to 8.
    p, t = random_case(n=4000, k=20)
    t = t.masked_fill(torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) > 0.1, -1)
    flat = torch.full((20,), 0.5)  # all labels are known equally well: no instance is a minority one
    weights = sampling_weights(instance_scores(t, flat, flat, "paper"))
    assert weights.tolist() == pytest.approx([1 / 4000] * 4000, rel=1e-9)
    weights = sampling_weights(instance_scores(t, *class_confidences(p, t), "paper"))
    known = (t >= 0).sum(1)
    for number in (0, 1, 2, 3, 4):
        assert weights[known == number].mean().item() * 4000 == pytest.approx(1, abs=0.05)


def test_the_score_with_unknown_labels_is_the_mean_over_the_known_ones():
    labels = torch.tensor([[1, 0, -1, -1], [1, 0, 0, 1], [-1, -1, -1, 0]])
    P, A = torch.tensor([0.2, 0.9, 0.9, 0.6]), torch.tensor([0.9, 0.8, 0.4, 0.7])
    expected = [4 * (0.2 + 0.8) / 2, 0.2 + 0.8 + 0.4 + 0.6, 4 * 0.7]
    assert instance_scores(labels, P, A).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1])
def test_confidences_of_no_probability_are_refused_unless_the_label_is_unknown(bad):
    p, t = torch.tensor([[0.5], [bad]]), torch.tensor([[1], [0]])
    with pytest.raises(ValueError, match=r"probabilities hold .*; each must be in \[0, 1\]"):
        class_confidences(p, t)
    P, A = class_confidences(p, torch.tensor([[1], [-1]]))
    assert (P.item(), A.item()) == (0.5, 1.0)


def test_eq_4_as_printed_is_nearly_uniform_with_many_classes():
    # What docs/choices.md says of the printed score: with K = 80 the negative terms drown the positive ones.
    g = torch.Generator().manual_seed(0)
    t = (torch.rand(5000, 80, generator=g) < torch.logspace(-0.9, -2.8, 80)).long()
    P, A = torch.linspace(0.8, 0.1, 80), torch.full((80,), 0.97)
    few = slice(60, 80)
    printed = sampling_weights(instance_scores(t, P, A, "paper"))
    positive = sampling_weights(instance_scores(t, P, A, "positive"))
    assert effective_sample_size(printed) > 0.999
    assert class_lift(printed, t)[few].nanmean() < 1.05
    assert class_lift(positive, t)[few].nanmean() > 1.2


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="positive and finite"):
        sampling_weights(torch.tensor([1.0, bad]))


def test_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match="minority_score is 'rare'"):
        instance_scores(torch.ones(1, 1), torch.ones(1), torch.ones(1), "rare")


@pytest.mark.parametrize("draws", [1000, 317])
def test_systematic_draws_are_floor_or_ceil_of_the_expectation(draws):
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    weights /= weights.sum()
    for seed in range(5):
        drawn = systematic_resample(weights, draws, keyed_generator(seed))
        counts = torch.bincount(drawn, minlength=1000)
        assert len(drawn) == draws
        assert bool((counts >= (weights * draws - 1e-5).floor()).all())
        assert bool((counts <= (weights * draws + 1e-5).ceil()).all())


def test_systematic_draws_have_the_right_mean():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    counts = sum(torch.bincount(systematic_resample(weights, 3, keyed_generator(s)), minlength=4) for s in range(4000))
    # 12,000 draws; the standard error of a share is below 0.007 (4 of them: 0.02).
    assert (counts / 12_000).tolist() == pytest.approx(weights.tolist(), abs=0.02)


def test_a_uniform_draw_of_n_is_a_permutation():
    drawn = systematic_resample(torch.full((997,), 1 / 997, dtype=torch.float64), 997, keyed_generator(1))
    assert sorted(drawn.tolist()) == list(range(997))
    assert drawn.tolist() != list(range(997))


def test_epochs_reproduce_differ_and_cover_everything():
    weights = sampling_weights(torch.linspace(1, 5, 40))
    sampler, again = (PairSampler(40, seed=3, weights=lambda: weights) for _ in range(2))
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        epochs.append(list(sampler))
        assert epochs[-1] == list(again)
        assert sorted(key.random for key in epochs[-1]) == list(range(40))
        assert {key.epoch for key in epochs[-1]} == {epoch}
    assert [k.random for k in epochs[0]] != [k.random for k in epochs[1]]
    assert [k.minority for k in epochs[0]] != [k.minority for k in epochs[1]]


def test_weights_are_read_when_an_epoch_starts_not_before():
    weights = [torch.full((10,), 0.1, dtype=torch.float64)]
    sampler = PairSampler(10, seed=0, weights=lambda: weights[0])
    weights[0] = torch.eye(10, dtype=torch.float64)[7]
    assert {key.minority for key in sampler} == {7}


def test_all_methods_see_the_random_stream_in_the_same_order():
    uniform = torch.full((30,), 1 / 30, dtype=torch.float64)
    plain, paired = EpochSampler(30, seed=5), PairSampler(30, seed=5, weights=lambda: uniform)
    assert [k.random for k in plain] == [k.random for k in paired]
    assert {k.minority for k in plain} == {None}


def test_keyed_draws_are_pinned_and_leave_the_global_state_alone():
    # A change here changes every run of every user: it needs a new major version.
    assert keyed_seed(0, 1, "random") == 8012899268276674079
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with keyed_rng("a", 1):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with keyed_rng("a", 1):
        assert torch.equal(torch.rand(2), inside)
