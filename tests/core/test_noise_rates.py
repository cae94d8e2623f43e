"""The shares of wrong and missing labels against noise that is known, class by class."""

from __future__ import annotations

import pytest
import torch

from hf_balancemix.core import estimate_noise_rates


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
