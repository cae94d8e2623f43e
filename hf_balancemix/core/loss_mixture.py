"""The 2K Gaussian mixtures fitted on the losses of every label (Eq. 7-8).

For every class k and polarity l in {0, 1} the paper fits one two-component, one-dimensional Gaussian mixture on the
losses {BCE(f(x)_k, l) : t_k = l} of the whole training set, and calls the posterior of the component with the smaller
mean, at a label's own loss, the label's clean probability p_G. Here all are fitted at once, on histograms; the slow,
obvious version is `tests/core/exact_em.py`. Words and axes are those of `loss_histogram.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import checked_num_classes, checked_positive
from hf_balancemix.core.loss_histogram import LossHistogram, bin_moments

_SETS_AT_ONCE = 80  # work is done in pieces that stay in the cache
_VALUES_AT_ONCE = 1 << 18

_MIN_VALUES = 5
_MIN_DISTANCE = 1e-3  # of the means, in units of the larger standard deviation
_MIN_LABELS = 1e-3  # a component that holds fewer (weight x values) has no weight
_EPS = 10 * torch.finfo(torch.float64).eps  # scikit-learn adds as much to every component's number of values


@dataclass(frozen=True)
class MixtureSettings:
    """When EM stops, and the floor of the variances. They are part of the method: they move the clean set.

    Args:
        max_iter: Largest number of EM iterations, at least 1; this and the others are a ValueError out of their range.
        tol: EM of a set stops when its mean log-likelihood changes by less than this, >= 0; 0 runs all iterations.
        reg_covar: Added to every variance, at least 1e-12 (the square of the histogram's resolution).
    """

    max_iter: int
    tol: float
    reg_covar: float

    def __post_init__(self) -> None:
        if not (isinstance(self.max_iter, int) and self.max_iter >= 1):
            raise ValueError(f"max_iter is {self.max_iter!r}; it must be an integer of at least 1.")
        if not (math.isfinite(self.tol) and self.tol >= 0):
            raise ValueError(f"tol is {self.tol!r}; it must be a finite number of at least 0 (0: run all iterations).")
        if not (math.isfinite(self.reg_covar) and self.reg_covar >= 1e-12):
            raise ValueError(f"reg_covar is {self.reg_covar!r}; it must be finite and at least 1e-12, e.g. 1e-6.")


MIXTURE_PRESETS = {
    "dividemix": MixtureSettings(max_iter=10, tol=1e-2, reg_covar=5e-4),
    "sklearn": MixtureSettings(max_iter=100, tol=1e-3, reg_covar=1e-6),
}


@dataclass(frozen=True, eq=False)
class LossMixtures:
    """The 2K fitted mixtures (Eq. 7), and the clean probabilities that they give (Eq. 8); on the CPU.

    The first axis is the polarity (0: negative labels, 1: positive labels), the last the component, sorted by mean.

    Args:
        means, variances, weights: `(2, K, 2)` float64; variances include `reg_covar`, weights sum to 1.
        separated: `(2, K)` bool. False where two components mean nothing: fewer than 5 values (or none), all values
            equal, means that coincide (closer than 1e-3 of the larger standard deviation), a component that holds no
            value, or a small-mean component that would call no value of its set clean. All labels of such a set are
            clean.
        num_iter: `(2, K)` int64, EM iterations run.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor
    separated: Tensor
    num_iter: Tensor

    @classmethod
    def fit(cls, losses: Tensor, labels: Tensor, settings: str | MixtureSettings) -> LossMixtures:
        """Fit on the losses of all instances at once.

        Args:
            losses: `(N, K)`, any floating dtype, at least 0. Those that are not finite are left out.
            labels: `(N, K)`, given labels in {0, 1}.
            settings: A name in `MIXTURE_PRESETS`, or a :class:`MixtureSettings`.

        Raises:
            TypeError, ValueError: As :meth:`LossHistogram.update`, or `settings` names no preset.

        Example:
            >>> losses = torch.cat([torch.rand(90, 1), 5 + torch.rand(10, 1)])
            >>> labels = torch.ones(100, 1)
            >>> (LossMixtures.fit(losses, labels, "dividemix").clean_probability(losses, labels) > 0.5).sum()
            tensor(90)
        """
        histogram = LossHistogram(checked_num_classes(losses, "losses"), device=losses.device)
        histogram.update(losses, labels)
        return cls.fit_histogram(histogram, settings)

    @classmethod
    def fit_histogram(cls, histogram: LossHistogram, settings: str | MixtureSettings) -> LossMixtures:
        """Fit on the losses of all instances, counted batch by batch and summed over ranks; see :meth:`fit`."""
        if not isinstance(settings, MixtureSettings):
            if settings not in MIXTURE_PRESETS:
                raise ValueError(
                    f"settings is {settings!r}; it must be one of {sorted(MIXTURE_PRESETS)}, or a MixtureSettings, "
                    "e.g. MixtureSettings(max_iter=100, tol=1e-3, reg_covar=1e-6)."
                )
            settings = MIXTURE_PRESETS[settings]
        sets = histogram.cells.cpu().transpose(1, 2).flatten(1, 2)
        fits = [_fit_sets(cells, settings) for cells in sets.split(_SETS_AT_ONCE, dim=1)]
        return cls(*(torch.cat(parts).unflatten(0, (2, -1)) for parts in zip(*fits, strict=True)))

    @torch.no_grad()
    def clean_probability(self, losses: Tensor, labels: Tensor, monotone: bool = True) -> Tensor:
        """Posterior of the component with the smaller mean, at each label's loss: p_G (Eq. 8).

        Eq. 8 as printed is not monotone: where the variances differ, the wider component wins on both sides, so that a
        huge loss can be "clean" or a tiny one noisy. `monotone=True` corrects this in a second step: the log-odds are
        a parabola in the loss, and Eq. 8 is evaluated at the loss clamped to the side of the vertex where they fall.

        Args:
            losses: `(N, K)`, any floating dtype. A loss that is not finite is not clean: its probability is 0.
            labels: `(N, K)`, given labels in {0, 1}.
            monotone: Never let a larger loss of the same set be cleaner. False: Eq. 8 as printed.

        Returns:
            `(N, K)` float32 in [0, 1], on the device of `losses`. 1 for labels of sets that are not `separated`.

        Raises:
            TypeError, ValueError: As :meth:`LossHistogram.update`.
        """
        num_classes = checked_num_classes(losses, "losses", self.means.shape[1])
        positive = checked_positive(labels, losses, "losses")
        sets = [x.to(losses.device) for x in self._sets()]
        p_clean = torch.empty(losses.shape, dtype=torch.float32, device=losses.device)
        rows = max(1, _VALUES_AT_ONCE // num_classes)  # bounds the float64 temporaries
        for x, t, out in zip(losses.split(rows), positive.split(rows), p_clean.split(rows), strict=True):
            out.copy_(_clean(x, [torch.where(t, of_set[1], of_set[0]) for of_set in sets], monotone))
        return p_clean

    def of_classes(self, some: slice) -> LossMixtures:
        """The mixtures of some of the classes."""
        return LossMixtures(*(getattr(self, field.name)[:, some] for field in fields(self)))

    def clean_probability_of(
        self, losses: Tensor, positive: Tensor, label_class: Tensor, monotone: bool = True
    ) -> Tensor:
        """:meth:`clean_probability` of single labels: losses, which are positive, and their classes, `(M,)` each."""
        set_of_label = positive.long() * self.means.shape[1] + label_class
        sets = [x.flatten() for x in self._sets()]
        p_clean = torch.empty(len(losses), dtype=torch.float32)
        parts = (x.split(_VALUES_AT_ONCE) for x in (losses, set_of_label, p_clean))
        for x, at, out in zip(*parts, strict=True):
            out.copy_(_clean(x, [of_set[at] for of_set in sets], monotone))
        return p_clean

    def _sets(self) -> list[Tensor]:
        """What :func:`_clean` needs of each set, `(2, K)` each."""
        falling = _falling_range(self.means, self.variances)
        return [*_log_odds(self.means, self.variances, self.weights), *falling, self.separated]

    def state_dict(self) -> dict[str, Tensor]:
        """The five tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> LossMixtures:
        """The mixtures whose `state_dict` this is; a ValueError where a tensor is missing or of another shape."""
        num_classes = state["means"].shape[1] if state.get("means", torch.empty(0)).dim() == 3 else 0
        names = [field.name for field in fields(cls)]
        for name in names:
            want = (2, num_classes) if name in ("separated", "num_iter") else (2, num_classes, 2)
            got = tuple(state[name].shape) if name in state else "missing"
            if got != want:
                raise ValueError(
                    f"'{name}' of the mixtures' state is {got}; it must be a tensor of shape {want}; resume from a "
                    "checkpoint that holds it."
                )
        return cls(**{name: state[name] for name in names})


def _log_odds(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log(w_0 N_0(x) / (w_1 N_1(x))) = constant + slope y + curve y^2 with y = x - at; `(..., 2)` -> four `(...)`."""
    at, distance = means[..., 0], means[..., 1] - means[..., 0]
    precision = 1 / variances
    constant = (
        torch.log(weights[..., 0] / weights[..., 1])
        + 0.5 * torch.log(variances[..., 1] * precision[..., 0])
        + 0.5 * distance**2 * precision[..., 1]
    )
    return at, constant, -distance * precision[..., 1], 0.5 * (precision[..., 1] - precision[..., 0])


def _falling_range(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """The losses between which the log-odds fall: below the vertex of a wider first component, else above it."""
    excess = variances[..., 0] - variances[..., 1]
    vertex = means[..., 0] + (means[..., 1] - means[..., 0]) * variances[..., 0] / excess
    return torch.where(excess < 0, vertex, -torch.inf), torch.where(excess > 0, vertex, torch.inf)


def _clean(losses: Tensor, of_labels: list[Tensor], monotone: bool) -> Tensor:
    """Eq. 8 at losses, with what :meth:`LossMixtures._sets` gives of each label's set, in their shape."""
    at, constant, slope, curve, low, high, separated = of_labels
    y = losses.double()
    if monotone:
        y = y.clamp(low, high)
    y = y - at
    clean = torch.sigmoid(constant + y * (slope + y * curve))
    return torch.where(separated, clean, 1.0).masked_fill_(~torch.isfinite(losses), 0.0)


class _Bins(NamedTuple):
    """The bins of S sets, `(S, B)` float64 each."""

    number: Tensor
    mean: Tensor  # of the bin's values, from the set's mean
    spread: Tensor  # sum of the squared distances from the bin's mean
    steepest: Tensor  # 2 / standard deviation in the bin, see _e_step


class _Sums(NamedTuple):
    """Moment sums of a component, or of a whole set: sum of r, of r x and of r x^2, `(S,)` float64 each."""

    number: Tensor
    moment: Tensor
    square: Tensor


def _centered_bins(cells: Tensor) -> tuple[_Bins, Tensor]:
    """The bins of `(3, S, bins)` int64 cells, without those that no set uses, and the sets' means `(S,)`."""
    number, mean, variance = bin_moments(cells)
    center = (number * mean).sum(1) / number.sum(1).clamp(min=1)
    return _Bins(number, mean - center[:, None], number * variance, 2 * variance.rsqrt()), center


def _fit_sets(cells: Tensor, settings: MixtureSettings) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mixtures of S sets, from `(3, S, B)` int64 cells: the five tensors of LossMixtures, `(S, ...)`."""
    bins, center = _centered_bins(cells)
    num_values = bins.number.sum(1)
    # One component, where there are not two to fit.
    total = _moments(bins, torch.ones_like(bins.number))
    means = torch.zeros(len(center), 2, dtype=torch.float64)
    variances = (total.square / num_values.clamp(min=1) + settings.reg_covar)[:, None].repeat(1, 2)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(center), 1)
    num_iter = torch.zeros(len(center), dtype=torch.int64)

    rows = ((num_values >= _MIN_VALUES) & ((bins.number > 0).sum(1) >= 2)).nonzero().squeeze(1)
    if len(rows):
        fitted = _em(_Bins(*(x[rows] for x in bins)), settings)
        for whole, part in zip((means, variances, weights, num_iter), fitted, strict=True):
            whole[rows] = part

    order = means.argsort(dim=1, stable=True)
    means, variances, weights = (x.gather(1, order) for x in (means, variances, weights))
    separated = (
        (means[:, 1] - means[:, 0] >= _MIN_DISTANCE * variances.amax(1).sqrt())
        & (weights.amin(1) * num_values >= _MIN_LABELS)
        & _calls_some_clean(bins, means, variances, weights)
    )
    return means + center[:, None], variances, weights, separated, num_iter


def _calls_some_clean(bins: _Bins, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Whether at least one value of each set is clean, by Eq. 8 as printed and by the monotone correction."""
    at, constant, slope, curve = (x[:, None] for x in _log_odds(means, variances, weights))
    y = torch.minimum(bins.mean, _falling_range(means, variances)[1][:, None]) - at
    return ((constant + y * (slope + y * curve) > 0) & (bins.number > 0)).any(1)


def _em(bins: _Bins, settings: MixtureSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EM of S sets side by side, with scikit-learn's conventions: means, variances, weights `(S, 2)`, iterations.

    A set leaves the computation when it has converged, so it stops where it would stop alone.
    """
    num_sets = len(bins.number)
    result = [torch.empty(num_sets, 2, dtype=torch.float64) for _ in range(3)]
    num_iter = torch.empty(num_sets, dtype=torch.int64)
    running = torch.arange(num_sets)
    bound = torch.full((num_sets,), -torch.inf, dtype=torch.float64)
    total = _moments(bins, torch.ones_like(bins.number))
    means, variances, weights = _m_step(_moments(bins, _two_means(bins)), total, settings.reg_covar)
    for iteration in range(1, settings.max_iter + 1):
        previous = bound
        first, bound = _e_step(bins, total, means, variances, weights)
        means, variances, weights = _m_step(first, total, settings.reg_covar)
        done = (bound - previous).abs() < settings.tol
        if iteration == settings.max_iter:
            done = torch.ones_like(done)
        if done.any():
            for whole, part in zip(result, (means, variances, weights), strict=True):
                whole[running[done]] = part[done]
            num_iter[running[done]] = iteration
            on = ~done
            running, bound = running[on], bound[on]
            means, variances, weights = means[on], variances[on], weights[on]
            bins, total = _Bins(*(x[on] for x in bins)), _Sums(*(x[on] for x in total))
            if not len(running):
                break
    return result[0], result[1], result[2], num_iter


def _two_means(bins: _Bins) -> Tensor:
    """Hard responsibilities `(S, B)` of the first component: the exact 2-means split of the bins (Otsu's)."""
    left = bins.number.cumsum(1)
    right = left[:, -1:] - left
    left_sum = (bins.number * bins.mean).cumsum(1)  # all sum to 0
    between = torch.where((left > 0) & (right > 0), left_sum**2 / (left * right), -1.0)
    split = between.argmax(1, keepdim=True)
    return (torch.arange(bins.number.shape[1]) <= split).double()


def _moments(bins: _Bins, responsibility: Tensor) -> _Sums:
    """Moment sums where all values of a bin have one responsibility."""
    first = responsibility * bins.number * bins.mean
    return _Sums(
        (responsibility * bins.number).sum(1), first.sum(1), (first * bins.mean + responsibility * bins.spread).sum(1)
    )


def _m_step(first: _Sums, total: _Sums, reg_covar: float) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances, weights `(S, 2)` from the first component's sums; the second's are what remains."""
    count, moment, square = (torch.stack([x, whole - x], 1) for x, whole in zip(first, total, strict=True))
    count = count.clamp(min=0) + _EPS
    means = moment / count
    variances = (square / count - means**2).clamp(min=0) + reg_covar
    return means, variances, count / count.sum(1, keepdim=True)


def _e_step(bins: _Bins, total: _Sums, means: Tensor, variances: Tensor, weights: Tensor) -> tuple[_Sums, Tensor]:
    """Moment sums of the first component, and the mean log-likelihood, `(S,)`.

    A value's responsibility r is the sigmoid of its log-odds a. Its sums over the n values of a bin are taken to
    second order around their mean (d: distance from it, v: variance in the bin, q = r (1 - r)):
    sum of r = n r + n v r'' / 2 with r'' = q ((1 - 2 r) a'^2 + a''), sum of r d = n v q a', sum of r d^2 = n v r.
    """
    n, m, nv, steepest = bins
    at, constant, slope, curve = (x[:, None] for x in _log_odds(means, variances, weights))
    y = m - at
    a1 = torch.addcmul(slope, curve, y)
    a = torch.addcmul(constant, a1, y)
    # Where a component is narrower than a bin the expansion means nothing: |a'| sd <= 2 and 0 <= sum of r <= n keep
    # its sums within their bounds.
    a1 = a1.mul_(2).sub_(slope).clamp_(-steepest, steepest)
    r = torch.sigmoid(a)
    q = torch.addcmul(r, r, r, value=-1).mul_(nv)
    tilt = q * a1
    bend = a1.mul_(tilt)
    sum_r = (n * r).addcmul_(0.5 - r, bend).addcmul_(curve, q).clamp_(min=0).minimum(n)
    sum_rd2 = (nv * r).sum(1)
    sum_rx = torch.addcmul(tilt, sum_r, m)
    first = _Sums(sum_r.sum(1), sum_rx.sum(1), sum_rx.add_(tilt).mul_(m).sum(1) + sum_rd2)
    # log(w_0 N_0 + w_1 N_1) = log(w_1 N_1) + softplus(a), and softplus'' = q a'^2 + r a''. The first term is a
    # parabola: exact from the sums of the whole set.
    soft = F.softplus(a, threshold=40).mul_(n).sum(1) + 0.5 * bend.sum(1) + curve[:, 0] * sum_rd2
    mean, variance, weight = means[:, 1], variances[:, 1], weights[:, 1]
    square = total.square - 2 * mean * total.moment + mean**2 * total.number
    rest = total.number * (torch.log(weight) - 0.5 * torch.log(2 * math.pi * variance)) - 0.5 * square / variance
    return first, (soft + rest) / total.number
