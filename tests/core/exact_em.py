"""Slow, obvious EM on the values of one set: the reference for the mixtures that are fitted on histograms."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_balancemix.core.loss_histogram import bin_edges
from hf_balancemix.core.loss_mixture import MixtureSettings

EPS = 10 * torch.finfo(torch.float64).eps  # scikit-learn adds as much to every component's number of values


class ExactMixture(NamedTuple):
    """`(2,)` float64 each, the smaller mean first; and the iterations run."""

    means: Tensor
    variances: Tensor
    weights: Tensor
    num_iter: int


def exact_em(values: Tensor, settings: MixtureSettings) -> ExactMixture:
    """EM in float64 on all values, started where the histograms' EM starts.

    That is the best split into two at an edge between two bins.

    Args:
        values: Losses of one set, 1-D, finite, any floating dtype, in two bins at least.
        settings: Stopping rule and floor of the variances.
    """
    x = values.double()
    bins = torch.bucketize(x, bin_edges()[1:-1], right=True)  # larger losses than the last edge are in the last bin
    splits = [bins <= last for last in bins.unique()[:-1]]

    def squared_error(left: Tensor) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in (x[left], x[~left])))

    def m_step(responsibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = responsibility.sum(1) + EPS
        means = (responsibility @ x) / count
        variances = (responsibility * (x - means[:, None]) ** 2).sum(1) / count + settings.reg_covar
        return means, variances, count / count.sum()

    left = min(splits, key=squared_error)
    means, variances, weights = m_step(torch.stack([left, ~left]).double())
    bounds = [-math.inf]
    while len(bounds) <= settings.max_iter:
        square = (x - means[:, None]) ** 2 / variances[:, None]
        log_joint = torch.log(weights / torch.sqrt(2 * math.pi * variances))[:, None] - 0.5 * square
        means, variances, weights = m_step(log_joint.softmax(0))
        bounds.append(float(log_joint.logsumexp(0).mean()))
        if abs(bounds[-1] - bounds[-2]) < settings.tol:
            break
    order = means.argsort()
    return ExactMixture(means[order], variances[order], weights[order], len(bounds) - 1)
