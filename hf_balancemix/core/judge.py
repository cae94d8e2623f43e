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
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.checks import check_range
from hf_balancemix.core.distributed import broadcast
from hf_balancemix.core.given_labels import compressed_labels
from hf_balancemix.core.label_management import refine_labels
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import LossMixtures, MixtureSettings
from hf_balancemix.core.noise_rates import NoiseRates, anchor_counts, rates_of_anchors
from hf_balancemix.core.out_of_fold import OutOfFoldHeads, principal_components

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
    labels: Tensor | csr_array,
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
    labels = compressed_labels(labels)
    p_clean, probability = torch.empty(labels.shape), torch.empty(labels.shape)

    def keep(some: slice, of_some: JudgedClasses) -> None:
        p_clean[:, some], probability[:, some] = of_some.p_clean, of_some.probability

    judged = judge_in_blocks(
        features, labels, keep, mixtures=mixtures, monotone=monotone, max_missing=max_missing, num_folds=num_folds,
        num_rounds=num_rounds, seed=seed, on_fold=on_fold,
    )  # fmt: skip
    return JudgedLabels(p_clean, probability, *judged)


class JudgedClasses(NamedTuple):
    """What is found of k classes; each `(N, k)`."""

    labels: Tensor
    """int8, as given."""
    p_clean: Tensor
    """float32, as in :class:`JudgedLabels`."""
    probability: Tensor
    """As there, or float64."""
    rates: NoiseRates
    """Of all classes."""


@torch.no_grad()
def judge_in_blocks(
    features: Tensor,
    labels: csr_array,
    take: Callable[[slice, JudgedClasses], object],
    *,
    mixtures: str | MixtureSettings = "dividemix",
    monotone: bool = True,
    max_missing: float | None = None,
    num_folds: int = NUM_FOLDS,
    num_rounds: int = NUM_ROUNDS,
    seed: int = 0,
    on_fold: Callable[[], object] = lambda: None,
) -> tuple[NoiseRates, LossMixtures, LossHistogram]:
    """:func:`judge_labels`, some classes at a time: `take` gets each block, and nothing is `(N, K)`.

    Across classes go only numbers of each class. So in every round all blocks are fitted first, and predicted with
    again once these are known.
    """
    n, num_classes = labels.shape
    if features.ndim != 2 or len(features) != n or features.shape[1] == 0:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; they must be (N, D) with N = {n} as the labels "
            "and D >= 1; pass one vector for each instance."
        )
    check_range("num_rounds", num_rounds, 1)
    check_range("max_missing", max_missing or 0, 0)
    finite = features.isfinite().all(1).cpu()  # a row that is not would turn all axes to itself
    # Broadcast: the axes need not be the same, bit for bit, on unlike machines.
    components = broadcast(principal_components(features.masked_fill(~finite.to(features.device)[:, None], 0)))
    columns = labels.tocsc()

    def given_of(some: slice) -> tuple[Tensor, Tensor]:
        given = torch.from_numpy(columns[:, some].toarray(order="C"))
        return given, (given >= 0) & finite[:, None]

    refined: dict[int, _Changes] = {}  # by the first class of a block
    for number in range(num_rounds):
        heads = OutOfFoldHeads(components, num_folds=num_folds, seed=seed + number, on_fold=on_fold)
        blocks, fitted_heads, anchors = heads.blocks(num_classes), [], []
        histogram = LossHistogram(num_classes)
        for some in blocks:
            given, known = given_of(some)
            targets, weights = given.clamp(min=0).float(), known.float()
            if number:
                refined[some.start].apply(targets, weights)
            logits, fitted = heads.fit(targets, weights)
            fitted_heads.append(fitted)
            if number == 0:
                anchors.append(anchor_counts(logits, given.masked_fill(~known, -1)))
            histogram.cells[:, some] = LossHistogram.of_labels(logits, given == 1, known).cells
        if number == 0:
            rates = rates_of_anchors(torch.cat(anchors))
            if not any(rate[0].any() for rate in rates):
                logger.warning(
                    "the features do not tell the classes apart, so that all labels count as clean; a network from "
                    'scratch needs judge="network".'
                )
        fitted_mixtures = LossMixtures.fit_histogram(histogram, mixtures)
        limits = _limits(rates, fitted_mixtures, histogram, monotone, max_missing)
        for some, fitted in zip(blocks, fitted_heads, strict=True):
            (given, known), logits = given_of(some), heads.predict(fitted)
            losses, of_some = label_losses(logits, given == 1), _Limits(*(x[..., some] for x in limits))
            p_clean = _as_many_as(of_some, fitted_mixtures.of_classes(some), losses, given == 1, monotone)
            p_clean = p_clean.masked_fill(~finite[:, None], 0.0)
            # Rounded from float64, as the last bit of float32 depends on where in a block the value stands.
            probability = logits.double().sigmoid().float()
            if number == num_rounds - 1:
                take(some, JudgedClasses(given, p_clean, probability, rates))
            else:
                again = refine_labels(given, p_clean, probability, _CONFIDENT)
                refined[some.start] = _Changes.of(given, known, again.labels, again.weight)
    return rates, fitted_mixtures, histogram


class _Changes(NamedTuple):
    """Where the targets and weights of a round differ from the given labels, `(M,)` each."""

    row: Tensor
    column: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def of(cls, given: Tensor, known: Tensor, labels: Tensor, weight: Tensor) -> _Changes:
        row, column = (((labels != given) | (weight != 1)) & known).nonzero(as_tuple=True)
        return cls(row, column, labels[row, column], weight[row, column])

    def apply(self, targets: Tensor, weights: Tensor) -> None:
        targets[self.row, self.column], weights[self.row, self.column] = self.target, self.weight


class _Limits(NamedTuple):
    """What p_G needs to know of each class, `(2, K)` by polarity, or `(K,)`."""

    cut: Tensor
    """float64, the loss from which on as many labels are wrong as the rates say."""
    at_cut: Tensor
    """float32, Eq. 8 there."""
    may_be_missing: Tensor
    """`(1, K)` float64, the loss from which on a negative label may be; NaN: the rate says which."""


def _limits(
    rates: NoiseRates, mixtures: LossMixtures, histogram: LossHistogram, monotone: bool, max_missing: float | None
) -> _Limits:
    shares = rates.missing[0], rates.wrong[0]
    cuts = [histogram.threshold_of_largest(i, shares[i] * histogram.num_values[i]) for i in (0, 1)]
    at_cut = [
        mixtures.clean_probability(c.clamp(max=16).float()[None], torch.full((1, len(c)), bool(i)), monotone=monotone)
        for i, c in enumerate(cuts)
    ]
    limit = torch.full_like(cuts[0], torch.nan)
    if max_missing is not None:
        most = max_missing * histogram.num_values[1] if max_missing else torch.full_like(cuts[0], torch.inf)
        limit = histogram.threshold_of_largest(0, most)
    return _Limits(torch.stack(cuts), torch.cat(at_cut), limit[None])


def _as_many_as(limits: _Limits, mixtures: LossMixtures, losses: Tensor, positive: Tensor, monotone: bool) -> Tensor:
    """`(N, k)` p_G, of which as many are at most 1/2 as the rates say, the others 1.

    In each set p_G is Eq. 8, shifted in its log-odds to 1/2 at the loss from which on labels are wrong: the mixture
    gives the order and the slope, the rate the place.
    """

    def by_set(of_sets: Tensor) -> Tensor:
        return torch.where(positive, of_sets[1], of_sets[0])

    p_clean = mixtures.clean_probability(losses, positive, monotone=monotone)
    p, p_at_cut = (x.double().clamp(1e-9, 1 - 1e-9) for x in (p_clean, by_set(limits.at_cut)))
    shifted = torch.sigmoid(torch.logit(p) - torch.logit(p_at_cut)).clamp(max=0.5).float()
    wrong = (losses >= by_set(limits.cut)) & by_set(mixtures.separated)
    judged = shifted.where(wrong, 1.0)
    if limits.may_be_missing.isnan().all():
        return judged
    return torch.where(positive, judged, p.float().where(losses >= limits.may_be_missing, 1.0))
