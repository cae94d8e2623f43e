"""Who judges the labels: heads that never saw them, on features of a pretrained backbone, instead of the network.

The losses of a network that memorises are small at the wrong labels that it has learned, and those of one that does
not only say which labels are hard. Here the losses of Eq. 6 are those of small heads on other folds, and how many
labels can be called not clean is estimated, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_given_labels, check_range
from hf_balancemix.core.distributed import broadcast
from hf_balancemix.core.label_management import refine_labels
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import LossMixtures, MixtureSettings
from hf_balancemix.core.noise_rates import NoiseRates, estimate_noise_rates
from hf_balancemix.core.out_of_fold import out_of_fold_logits, principal_components

logger = logging.getLogger(__name__)

NUM_FOLDS, NUM_ROUNDS = 5, 3
_CONFIDENT = 0.9  # from which on a head's prediction takes the place of a label that is not clean, in the next round


class JudgedLabels(NamedTuple):
    """What :func:`judge_labels` returns, on the CPU."""

    p_clean: Tensor
    """`(N, K)` float32 in [0, 1], p_G of every given label."""
    probability: Tensor
    """`(N, K)` float32 in [0, 1]: that the class is present, by heads that did not see the instance's labels."""
    rates: NoiseRates
    """How much of the given labels is wrong, as estimated from the given labels."""
    mixtures: LossMixtures
    """Eq. 7, on the losses of `loss_histogram`."""
    loss_histogram: LossHistogram
    """The out-of-fold losses of the given labels, in the last round."""


@torch.no_grad()
def judge_labels(
    features: Tensor,
    labels: Tensor,
    *,
    mixtures: str | MixtureSettings = "dividemix",
    monotone: bool = True,
    max_missing: float | None = None,
    num_folds: int = NUM_FOLDS,
    num_rounds: int = NUM_ROUNDS,
    seed: int = 0,
    on_fold: Callable[[], object] = lambda: None,
) -> JudgedLabels:
    """Must be called on every rank: how probable it is that each given label is right, without training the network.

    1. Linear heads predict every instance out of fold (:func:`~hf_balancemix.core.out_of_fold.out_of_fold_logits`).
    2. The shares of wrong and of missing labels are estimated (:func:`estimate_noise_rates`).
    3. The mixtures of Eq. 7 are fitted on the out-of-fold losses. p_G is Eq. 8, scaled in each class and polarity so
       that as many labels as are estimated to be wrong, those of the largest losses, have at most 1/2, and 1 for the
       others; where a mixture has no two components, all have 1.
    4. The labels are refined by that, as in Eq. 9 with eps = 0.9, and step 1 and 3 done again on them.

    Args:
        features: `(N, D)` of the un-augmented instances, any floating dtype and device; of a backbone that was not
            trained on these labels. An instance whose features are not finite is left out: its labels are not clean.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown.
        mixtures, monotone: As :meth:`LossMixtures.fit` and :meth:`LossMixtures.clean_probability`.
        max_missing: In place of the estimate for negative labels: Eq. 8 as it is, for at most `max_missing` n of a
            class with n positive ones; 0: any number.
        num_folds: At least 2.
        num_rounds: How often step 1 and 3 are done, at least 1.
        seed: Of the folds.
        on_fold: Called after each fit of a fold on this rank.

    Raises:
        ValueError: A number is out of its range, there are fewer instances than folds, features are no (N, D), or a
            label is none of 0, 1 and -1.

    Example:
        >>> features = torch.cat([torch.randn(50, 2) + 4, torch.randn(50, 2) - 4])
        >>> labels = (torch.arange(100) < 50).float()[:, None]
        >>> labels[0] = 0  # a missing label
        >>> judge_labels(features, labels).p_clean.argmin()
        tensor(0)
    """
    if features.ndim != 2 or len(features) != len(labels) or features.shape[1] == 0:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; they must be (N, D) with N = {len(labels)} as the labels "
            "and D >= 1; pass one vector for each instance."
        )
    check_given_labels(labels)
    check_range("num_rounds", num_rounds, 1)
    check_range("max_missing", max_missing or 0, 0)
    labels = labels.cpu()
    finite = features.isfinite().all(1).cpu()  # a row that is not would turn all axes to itself
    known = (labels >= 0) & finite[:, None]
    given, positive = labels.clamp(min=0).float(), labels == 1
    # Broadcast: the axes need not be the same, bit for bit, on unlike machines.
    components = broadcast(principal_components(features.masked_fill(~finite.to(features.device)[:, None], 0)))

    targets, weights = given, known.float()
    for number in range(num_rounds):
        logits = out_of_fold_logits(
            components, targets, weights, num_folds=num_folds, seed=seed + number, on_fold=on_fold
        )
        if number == 0:
            rates = estimate_noise_rates(logits, labels.masked_fill(~known, -1))
            if not any(rate[0].any() for rate in rates):
                logger.warning(
                    "the features do not tell the classes apart, so that all labels count as clean; a network from "
                    'scratch needs judge="network".'
                )
        losses = label_losses(logits, positive)
        histogram = LossHistogram(labels.shape[1])
        histogram.update(losses.masked_fill(~known, float("nan")), positive)
        fitted = LossMixtures.fit_histogram(histogram, mixtures)
        p_clean = _as_many_as(rates, fitted, histogram, losses, positive, monotone, max_missing)
        p_clean = p_clean.masked_fill(~finite[:, None], 0.0)
        refined = refine_labels(labels, p_clean, logits.sigmoid(), _CONFIDENT)
        targets, weights = refined.labels.clamp(min=0), refined.weight * known
    return JudgedLabels(p_clean, logits.sigmoid(), rates, fitted, histogram)


def _as_many_as(
    rates: NoiseRates,
    mixtures: LossMixtures,
    histogram: LossHistogram,
    losses: Tensor,
    positive: Tensor,
    monotone: bool,
    max_missing: float | None,
) -> Tensor:
    """`(N, K)` p_G, of which as many are at most 1/2 as `rates` says, the others 1.

    In each set p_G is Eq. 8, shifted in its log-odds to 1/2 at the loss from which on labels are wrong: the mixture
    gives the order and the slope, the rate the place.
    """

    def p_clean(losses: Tensor, positive: Tensor) -> Tensor:
        return mixtures.clean_probability(losses, positive, monotone=monotone)

    def by_set(of_negative: Tensor, of_positive: Tensor) -> Tensor:
        return torch.where(positive, of_positive, of_negative)

    shares = rates.missing[0], rates.wrong[0]
    cuts = [histogram.threshold_of_largest(i, shares[i] * histogram.num_values[i]) for i in (0, 1)]
    at_cut = [p_clean(c.clamp(max=16).float()[None], torch.full((1, len(c)), bool(i))) for i, c in enumerate(cuts)]
    p, p_at_cut = (x.double().clamp(1e-9, 1 - 1e-9) for x in (p_clean(losses, positive), by_set(*at_cut)))
    shifted = torch.sigmoid(torch.logit(p) - torch.logit(p_at_cut)).clamp(max=0.5).float()
    wrong = (losses >= by_set(*cuts)) & by_set(*mixtures.separated)
    judged = shifted.where(wrong, 1.0)
    if max_missing is None:
        return judged
    limit = max_missing * histogram.num_values[1] if max_missing else torch.full_like(cuts[0], torch.inf)
    may_be_missing = losses >= histogram.threshold_of_largest(0, limit)
    return torch.where(positive, judged, p.float().where(may_be_missing, 1.0))
