"""What a run learns, with every number of all N x K labels at hand: slow, obvious, and the reference for `BalanceMix`,
which remembers few of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from hf_balancemix.core import (
    LossHistogram,
    LossMixtures,
    class_confidences,
    estimate_noise_rates,
    label_losses,
    out_of_fold_logits,
    principal_components,
    refine_labels,
    wrong_probability,
)
from hf_balancemix.core.noise_rates import transition_rates, wrong_posterior


def scores(labels, P, A, score):
    """Eq. 3, `(N,)`."""
    known, positive = (labels >= 0).double().sum(1), (labels == 1).double()
    total = positive @ P
    if score == "paper":
        total = (total + (labels == 0).double() @ A) * labels.shape[1] / known.clamp(min=1)
    else:
        total = torch.where(positive.sum(1) > 0, total / positive.sum(1).clamp(min=1), 1.0)
    total = total.clamp(min=1e-3)
    return torch.where(known > 0, total, 1 / (1 / total[known > 0]).mean())


def scanned(labels, logits, settings, more_suspicious=100):
    """After one scan with the network as judge: tables `(N, K)` of p_G, f(x) and how suspicious a label is."""
    dropped = ~logits.isfinite()
    known = (labels >= 0) & ~dropped
    f = logits.masked_fill(dropped, 0).double().sigmoid()
    P, A = class_confidences(f, labels.masked_fill(dropped, -1))
    positive = (labels == 1) & known
    losses = label_losses(logits.float(), positive).masked_fill(~known, torch.nan)
    histogram = LossHistogram(labels.shape[1])
    histogram.update(losses, positive)
    mixtures = LossMixtures.fit_histogram(histogram, settings.mixture_preset)
    p_clean = mixtures.clean_probability(losses, positive, monotone=settings.monotone)
    max_missing = 0.5 if settings.max_missing is None else settings.max_missing
    looked_at = known | ~known
    if max_missing:
        n = histogram.num_values[1]
        limit = histogram.threshold_of_largest(0, max_missing * n.double())
        p_clean = p_clean.masked_fill(~positive & (losses < limit), 1.0)
        looked_at = (labels == 1) | ~(losses < limit.minimum(histogram.threshold_of_largest(0, n + more_suspicious)))
    p_clean, f = p_clean.half(), f.half()
    score = (((1 - p_clean.float()) + (f.float() - labels.clamp(min=0)).abs()) / 2).masked_fill(labels < 0, 0)
    return SimpleNamespace(
        P=P, A=A, weights=1 / scores(labels, P, A, settings.minority_score), histogram=histogram, mixtures=mixtures,
        p_clean=p_clean, f=f, score=score.masked_fill(~looked_at, 0),
    )  # fmt: skip


def judged(features, labels, settings, seed):
    """After the heads have judged: tables `(N, K)`."""
    finite = features.isfinite().all(1)
    known, given, positive = (labels >= 0) & finite[:, None], labels.clamp(min=0).float(), labels == 1
    x = principal_components(features.masked_fill(~finite[:, None], 0))
    targets, weights = given, known.float()
    for number in range(3):
        logits = out_of_fold_logits(x, targets, weights, seed=seed + number)
        if number == 0:
            rates = estimate_noise_rates(logits, labels.masked_fill(~known, -1))
        losses, histogram = label_losses(logits, positive), LossHistogram(labels.shape[1])
        histogram.update(losses.masked_fill(~known, torch.nan), positive)
        mixtures = LossMixtures.fit_histogram(histogram, settings.mixture_preset)

        def eq8(losses, positive, mixtures=mixtures):
            p = mixtures.clean_probability(losses, positive, monotone=settings.monotone)
            return p.double().clamp(1e-9, 1 - 1e-9)

        shares = rates.missing[0], rates.wrong[0]
        cuts = [histogram.threshold_of_largest(i, shares[i] * histogram.num_values[i]) for i in (0, 1)]
        at_cuts = [eq8(c.clamp(max=16).float()[None], torch.full((1, len(c)), bool(i))) for i, c in enumerate(cuts)]
        cut, at_cut, separated = (torch.where(positive, x[1], x[0]) for x in (cuts, at_cuts, mixtures.separated))
        p = eq8(losses, positive)
        p_clean = (torch.logit(p) - torch.logit(at_cut)).sigmoid().clamp(max=0.5).float()
        p_clean = p_clean.where((losses >= cut) & separated, 1.0)
        if settings.max_missing is not None:
            limit = settings.max_missing * histogram.num_values[1] if settings.max_missing else cuts[0] * 0 + 1e9
            may_be_missing = losses >= histogram.threshold_of_largest(0, limit)
            p_clean = torch.where(positive, p_clean, p.float().where(may_be_missing, 1.0))
        p_clean = p_clean.masked_fill(~finite[:, None], 0.0)
        q = logits.double().sigmoid().float()
        refined = refine_labels(labels, p_clean, q, 0.9)
        targets, weights = refined.labels.clamp(min=0), refined.weight * known
    candidate = wrong_probability(labels, q, rates) >= 0.01
    p_clean = p_clean.half()
    return SimpleNamespace(p_clean=p_clean, q=q, candidate=candidate, rates=rates, histogram=histogram)


def suspicion(labels, found, f=None):
    """`(N, K)` scores of what :func:`judged` found, and of the network's f(x) where it was scanned."""
    x = torch.logit(found.q.double(), 1e-6)
    if f is not None:
        x = (x + torch.logit(f.double(), 2.0**-12)) / 2
    score = wrong_posterior(labels == 1, x.sigmoid(), *transition_rates(labels, found.rates)).float()
    return score.masked_fill(~found.candidate, 0)
