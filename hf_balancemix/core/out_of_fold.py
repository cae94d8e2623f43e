"""What linear heads that never saw an instance's labels predict for it: cross-validation on frozen features.

A network that memorises believes the labels it has learned, right or wrong. A small head that was fitted on the other
folds cannot, so that its loss at a label says how well the label fits what the other instances look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import check_range, check_same_shape
from hf_balancemix.core.distributed import all_reduce_sum, world
from hf_balancemix.core.keys import keyed_generator

_PENALTIES = (0.2, 0.6, 2.0, 6.0, 20.0)  # of which each class takes what predicts its held-out labels best
_MAX_ITER = 30  # by then the logits are those of the minimum to 0.01; see tests/core/test_out_of_fold.py
_VALUES_AT_ONCE = 1 << 25


def principal_components(features: Tensor, num_components: int = 256) -> Tensor:
    """Features centred, turned to their principal axes, the strongest kept, with a mean squared length of 1.

    Args:
        features: `(N, D)`, any floating dtype and device, finite.
        num_components: Largest number of axes, at least 1.

    Returns:
        `(N, min(D, num_components))` float32 on the device of `features`; zeros where all instances are equal.

    Raises:
        ValueError: `num_components` is less than 1.
    """
    check_range("num_components", num_components, 1)
    parts = features.split(1 << 14)  # never all of them in float64
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(features)
    covariance = torch.stack([x.T @ x for x in (part.double() - mean for part in parts)]).sum(0)
    values, axes = torch.linalg.eigh(covariance)
    keep = min(len(values), num_components)
    axes = axes[:, -keep:] * (len(features) / values[-keep:].sum().clamp(min=1e-30)).sqrt()
    return torch.cat([((part.double() - mean) @ axes).float() for part in parts])


def out_of_fold_logits(
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    num_folds: int = 5,
    seed: int = 0,
    on_fold: Callable[[], object] = lambda: None,
) -> Tensor:
    """Must be called on every rank: the logits of each instance by linear heads that were fitted on the other folds.

    The heads are logistic regressions with an L2 penalty: sum over the fold's complement of weight x BCE, plus
    c / 2 times the square of the weights' norm. c is chosen for each class as the one of 0.2 to 20 with the smallest
    loss on what was held out. The ranks share the folds; what they find is the same, bit for bit, on any number of
    like machines.

    Args:
        features: `(N, D)` float32 as of :func:`principal_components`, the same on every rank.
        targets: `(N, K)` float in [0, 1].
        weights: `(N, K)` float in [0, 1]; 0 leaves a label out.
        num_folds: At least 2 and at most N.
        seed: Of the folds.
        on_fold: Called after each fold of this rank.

    Returns:
        `(N, K)` float32 logits on the CPU. A class without weighted targets of both kinds has those of its frequency.

    Raises:
        ValueError: The shapes of targets and weights differ, or `num_folds` is out of its range.
    """
    check_same_shape(targets=targets, weights=weights)
    heads = OutOfFoldHeads(features, num_folds=num_folds, seed=seed, on_fold=on_fold)
    logits = torch.empty(targets.shape)
    for some in heads.blocks(targets.shape[1]):
        logits[:, some] = heads.fit(targets[:, some], weights[:, some])[0]
    return logits


class FittedHeads(NamedTuple):
    """What :meth:`OutOfFoldHeads.fit` found for k classes, to be predicted with again."""

    of_folds: list[tuple[Tensor, Tensor]]
    """Of each fold of this rank the coefficients `(C, D, k)` and biases `(C, 1, k)` for C penalties."""
    choice: Tensor
    """`(k,)` int64, which penalty."""


class OutOfFoldHeads:
    """The heads of :func:`out_of_fold_logits` for a block of classes at a time, so that nothing is `(N, K)`.

    Args:
        features, num_folds, seed, on_fold: As there.
    """

    def __init__(
        self, features: Tensor, *, num_folds: int = 5, seed: int = 0, on_fold: Callable[[], object] = lambda: None
    ) -> None:
        n = len(features)
        check_range("num_folds", num_folds, 2, n)
        self.features, self.num_folds, self.on_fold = features, num_folds, on_fold
        order = torch.randperm(n, generator=keyed_generator(seed, "folds"))
        self.fold = torch.empty(n, dtype=torch.int64)
        self.fold[order] = torch.arange(n) % num_folds

    def blocks(self, num_classes: int) -> list[slice]:
        """Which classes to fit together; the line search of a fit is that of its whole block."""
        width = max(1, _VALUES_AT_ONCE // (len(_PENALTIES) * len(self.features)))
        return [slice(first, min(first + width, num_classes)) for first in range(0, num_classes, width)]

    def fit(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, FittedHeads]:
        """Must be called on every rank: out-of-fold logits `(N, k)`, and the heads.

        Args:
            targets, weights: `(N, k)` of one of :meth:`blocks`.
        """
        fitted, logits = [], torch.zeros(len(_PENALTIES), *targets.shape)
        for test, train in self._folds():
            x = self.features[train.to(self.features.device)]
            y, w = (table[train].to(x.device) for table in (targets, weights))
            fitted.append(_fit(x, y, w))
            logits[:, test] = self._predict(test, fitted[-1])
            self.on_fold()
        logits = all_reduce_sum(logits)
        losses = torch.stack([_bce(one, targets, weights).sum(0) for one in logits])
        heads = FittedHeads(fitted, losses.argmin(0))
        return _chosen(logits, heads.choice), heads

    def predict(self, heads: FittedHeads) -> Tensor:
        """Must be called on every rank: the logits `(N, k)` that :meth:`fit` returned, again."""
        logits = torch.zeros(len(self.features), len(heads.choice))
        for (test, _), fitted in zip(self._folds(), heads.of_folds, strict=True):
            logits[test] = _chosen(self._predict(test, fitted), heads.choice)
        return all_reduce_sum(logits)

    def _folds(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The instances that each fold of this rank holds out, and the others."""
        rank, num_ranks = world()
        for held_out in range(rank, self.num_folds, num_ranks):
            test = self.fold == held_out
            yield test.nonzero().squeeze(1), (~test).nonzero().squeeze(1)

    def _predict(self, test: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
        # For all penalties also where one is wanted: a product of another shape may differ in its last bit.
        coefficients, bias = fitted
        return (self.features[test.to(self.features.device)] @ coefficients + bias).cpu()


def _chosen(logits: Tensor, choice: Tensor) -> Tensor:
    """`(N, k)` of `(C, N, k)`, each class of its penalty."""
    return logits.gather(0, choice.expand(1, *logits.shape[1:]))[0]


def _bce(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        logits, targets.expand_as(logits), weights.expand_as(logits), reduction="none"
    )


def _fit(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients `(C, D, K)` and biases `(C, 1, K)` of K logistic regressions for each of the C penalties."""
    n = len(x)
    frequency = ((weight * y).sum(0) / weight.sum(0).clamp(min=1e-9)).clamp(1e-4, 1 - 1e-4)
    curvature = (weight.mean(0) * frequency * (1 - frequency)).clamp(min=1e-6)
    penalty = torch.tensor(_PENALTIES, device=x.device).view(-1, 1, 1) / n
    # In these units the loss is about equally curved in all directions, so that few iterations do.
    unit = ((x * x).mean(0)[:, None] * curvature + penalty).rsqrt()
    start, bias_unit = torch.logit(frequency), curvature.rsqrt()
    u = torch.zeros_like(unit).requires_grad_()
    b = torch.zeros_like(unit[:, :1]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [u, b], max_iter=_MAX_ITER, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        w = u * unit
        z = x @ w + (start + b * bias_unit)
        objective = _bce(z, y, weight).sum() / n + (penalty / 2 * w * w).sum()
        objective.backward()
        return objective

    with torch.enable_grad():
        optimizer.step(closure)
    return (u * unit).detach(), (start + b * bias_unit).detach()
