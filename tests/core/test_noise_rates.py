"""The shares of wrong and missing labels against noise that is known, class by class."""

from __future__ import annotations

import pytest
import torch

from hf_balancemix.core import NoiseRates, estimate_noise_rates, wrong_probability


def noisy(n: int, pi: torch.Tensor, t01: torch.Tensor, t10: torch.Tensor, seed: int = 0):
    """Clean labels with frequency pi, given ones with the noise, and logits that all but know the clean labels."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.rand(n, len(pi), generator=g) < pi
    flips = torch.rand(n, len(pi), generator=g) < torch.where(clean, t10, t01)
    logits = torch.where(clean, 3.0, -3.0) + torch.randn(n, len(pi), generator=g)
    return logits, clean, (clean ^ flips).to(torch.int8)


def true_rates(clean, given):
    positive, negative = given == 1, given == 0
    return (positive & ~clean).sum(0) / positive.sum(0), (negative & clean).sum(0) / negative.sum(0)


@pytest.mark.parametrize("noise", [(0.0, 0.0), (0.1, 0.1), (0.02, 0.4), (0.2, 0.2), (0.0, 0.5)])
def test_known_noise_is_found(noise):
    pi = torch.tensor([0.4, 0.3, 0.25, 0.2, 0.1])
    logits, clean, given = noisy(20_000, pi, *(torch.full((5,), rate) for rate in noise))
    rates = estimate_noise_rates(logits, given)
    wrong, missing = true_rates(clean, given)
    assert (rates.wrong[0] - wrong).abs().max() < 0.03
    assert (rates.missing[0] - missing).abs().max() < 0.03


def test_noise_that_differs_from_class_to_class_is_told_apart():
    pi, t01 = torch.full((4,), 0.3), torch.tensor([0.0, 0.05, 0.1, 0.3])
    t10 = torch.tensor([0.3, 0.0, 0.1, 0.2])
    logits, clean, given = noisy(40_000, pi, t01, t10)
    rates = estimate_noise_rates(logits, given)
    wrong, missing = true_rates(clean, given)
    assert (rates.wrong[0] - wrong).abs().max() < 0.03
    assert (rates.missing[0] - missing).abs().max() < 0.05  # drawn a little towards what all classes have


def test_intervals_hold_the_truth_and_shrink_with_n():
    held, widths = [], {}
    for n in (1_000, 16_000):
        for seed in range(20):
            logits, clean, given = noisy(n, torch.full((3,), 0.3), torch.full((3,), 0.1), torch.full((3,), 0.2), seed)
            rates = estimate_noise_rates(logits, given)
            for rate, true in zip(rates, true_rates(clean, given), strict=True):
                assert ((rate[1] <= rate[0]) & (rate[0] <= rate[2])).all()
                held += ((rate[1] <= true) & (true <= rate[2])).tolist()
                widths.setdefault(n, []).append((rate[2] - rate[1]).mean().item())
    assert sum(held) / len(held) > 0.85
    assert max(widths[16_000]) < min(widths[1_000])


def test_only_the_order_of_the_predictions_matters_and_unknown_labels_do_not_count():
    logits, _, given = noisy(3_000, torch.full((2,), 0.3), torch.full((2,), 0.1), torch.full((2,), 0.1))
    expected = estimate_noise_rates(logits, given)
    for one, other in zip(expected, estimate_noise_rates(torch.exp(logits), given), strict=True):
        assert torch.equal(one, other)
    more = torch.cat([logits, torch.full((500, 2), 9.0)])
    with_unknown = estimate_noise_rates(more, torch.cat([given, torch.full((500, 2), -1, dtype=torch.int8)]))
    for one, other in zip(expected, with_unknown, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_estimated_is_zero_and_everything_is_a_rate():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    given = torch.zeros(50, 4)
    given[:, 1] = 1
    given[:, 2] = -1
    given[:2, 3] = 1
    rates = estimate_noise_rates(logits, given)
    assert (rates.wrong[:, :3] == 0).all()
    assert (rates.missing[:, :3] == 0).all()
    for rate in rates:
        assert ((rate >= 0) & (rate <= 1)).all()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_predictions_that_say_nothing_of_the_labels_call_none_of_them_wrong(share):
    none = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        given = (torch.rand(2_000, 4, generator=g) < share).float()
        rates = estimate_noise_rates(torch.randn(2_000, 4, generator=g), given)
        none += not any(rate[0].any() for rate in rates)
        assert all((rate[1] <= rate[0]).all() and (rate[0] <= rate[2]).all() for rate in rates)
    assert none >= 18  # of 20, by chance


def test_labels_must_be_given_ones_and_shapes_equal():
    with pytest.raises(ValueError, match="labels hold 2; each must be 0, 1 or -1"):
        estimate_noise_rates(torch.zeros(3, 2), torch.full((3, 2), 2))
    with pytest.raises(ValueError, match="must be the same shape"):
        estimate_noise_rates(torch.zeros(3, 2), torch.zeros(3, 3))


def test_a_label_is_probably_wrong_by_bayes_rule_and_unknown_ones_not():
    given = torch.tensor([1, 1, 0, 0, -1, 1])[:, None]
    q = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1, torch.nan])[:, None]
    # Of two positive labels one is wrong, of two negative ones one missing: T01 = T10 = 1/2.
    half = NoiseRates(*(torch.full((3, 1), 0.5).double() for _ in range(2)))
    expected = torch.tensor([0.9, 0.1, 0.1, 0.9, 0, 0])
    torch.testing.assert_close(wrong_probability(given, q, half).flatten(), expected)
    none = NoiseRates(*(torch.zeros(3, 1).double() for _ in range(2)))
    assert not wrong_probability(given, q, none).any()


def test_scores_are_the_probability_that_a_label_is_wrong():
    pi, t01 = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.2, 0.15, 0.1, 0.05])  # in proportion to v
    logits, clean, given = noisy(40_000, pi, t01, torch.full((4,), 0.2))
    weak = logits + 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    q = torch.sigmoid(6 / 5 * weak + torch.logit(pi))  # +-3 with a variance of 5
    score = wrong_probability(given, q, estimate_noise_rates(logits, given))
    for value in (0, 1):
        for low, high in ((0.05, 0.35), (0.35, 0.65), (0.65, 0.95)):
            some = (given == value) & (score >= low) & (score < high)
            assert (score[some].mean() - (clean != (given == 1))[some].double().mean()).abs() < 0.1


def test_the_interval_holds_no_noise_for_a_class_that_is_hard_but_clean():
    """A tenth of its positives looks like negatives, but seldom like the surest of them."""
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(10_000, 2, generator=g) < 0.3
    hard = clean & (torch.rand(clean.shape, generator=g) < 0.1)
    logits = (
        torch.where(clean & ~hard, 3.0, -3.0) + torch.where(hard, 1.5, 0.0) + torch.randn(clean.shape, generator=g)
    )
    wrong = estimate_noise_rates(logits, clean.to(torch.int8)).wrong
    assert (wrong[0] > 0).all()
    assert (wrong[1] < 1e-3).all()
