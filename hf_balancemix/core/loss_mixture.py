"""Loss statistics and the 2K Gaussian mixtures fitted on them (Eq. 6-8).

For every class k and polarity l in {0, 1} the paper fits one two-component, one-dimensional Gaussian mixture on the
losses {BCE(f(x)_k, l) : t_k = l} of the whole training set, and calls the posterior of the component with the smaller
mean, at a label's own loss, the label's clean probability p_G.

Here all 2K mixtures are fitted at once, on histograms: :func:`label_losses` -> :class:`LossHistogram` (one pass over
the training set, memory independent of N) -> :class:`LossMixtures`. :func:`exact_em` is the slow, obvious version.

K is the number of classes, N that of instances; "set" means the losses of one (polarity, class) pair, so there are 2K
sets; index 0 of the polarity axis is negative labels, 1 is positive labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.distributed import all_reduce_sum

# Bins are cut by the float32 bits of (loss + 2^-14): the exponent and the top 6 mantissa bits name the bin, the low 17
# mantissa bits are the position in it. Adding 2^-14 makes the bins equally wide (2^-20) near zero instead of endlessly
# finer, so that the range starts at 0 and nothing has to be clamped there.
_SHIFT = 2.0**-14
_OFFSET_BITS = 17
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
_FIRST_BIN = (127 - 14) << 6  # what the bits of 2^-14 read after the offset is shifted out
_NUM_BINS = 18 << 6  # 18 powers of two, up to 2^4, of 64 bins
_LARGEST = 16 * (1 - 2.0**-24)  # the last float32 below 2^4; a larger loss (probability under 1.2e-7) counts as this

# Work is done in pieces that stay in the cache. A set has at most one value in a row, so a piece's sums stay below
# 2^31 (offsets) and 2^48 (squares), exact in float64 too.
_ROWS_AT_ONCE = 1 << 14
_VALUES_AT_ONCE = 1 << 18
_SETS_AT_ONCE = 80

_MIN_VALUES = 5
_MIN_DISTANCE = 1e-3  # of the means, in units of the larger standard deviation
_MIN_LABELS = 1e-3  # a component that holds fewer (weight x values) has no weight
_EPS = 10 * torch.finfo(torch.float64).eps  # scikit-learn adds as much to every component's number of values


@dataclass(frozen=True)
class MixtureSettings:
    """When EM stops, and the floor of the variances. They are part of the method: they move the clean set.

    Args:
        max_iter: Largest number of EM iterations, at least 1.
        tol: EM of a set stops when its mean log-likelihood changes by less than this; 0 runs all iterations.
        reg_covar: Added to every variance, at least 1e-12 (the square of the histogram's resolution).

    Raises:
        ValueError: If a value is out of its range.
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
DEFAULT_MIXTURE_SETTINGS = "dividemix"


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every label as given (the elements of Eq. 6's sets), without reduction.

    Args:
        logits: `(..., K)`, any floating dtype.
        labels: `(..., K)`, given labels in {0, 1}, any dtype.

    Returns:
        `(..., K)` float32 losses, at least 0. A logit that is NaN gives NaN.

    Raises:
        TypeError: If `logits` is not floating point.
        ValueError: If the shapes differ, or a label is neither 0 nor 1.

    Example:
        >>> label_losses(torch.tensor([[0.0, 100.0]]), torch.tensor([[1, 0]]))
        tensor([[  0.6931, 100.0000]])
    """
    positive = _checked_labels(logits, labels, "logits")
    # Rounded from float64: the last bit of a float32 softplus depends on where in a batch the value stands.
    logits = logits.double()
    return F.softplus(torch.where(positive, -logits, logits), threshold=40).float()


class LossHistogram:
    """Histograms of the 2K sets of losses (Eq. 6), filled batch by batch, in int64.

    A bin keeps the number of its values, and the sum and the sum of squares of their positions in the bin as integers
    (17-bit fixed point). Integer sums are exact, so the order of the batches and the number of ranks that share the
    work change no bit of the mixtures. A bin's sum of squares stays under 2^63 up to 2^29 = 5.4e8 instances.
    Losses above 16 count as 16; losses that are not finite are left out and counted. Bins are 1.6 % of the loss wide;
    the fit is that of the values themselves (posteriors to 1e-3) unless a peak of losses is narrower than its bin.

    Args:
        num_classes: K.
        device: Where the counts are kept; best the device of the losses.

    Raises:
        ValueError: If `num_classes` is not a positive integer.

    Example:
        >>> histogram = LossHistogram(num_classes=2)
        >>> histogram.update(torch.rand(100, 2), torch.randint(0, 2, (100, 2)))
        >>> histogram.fit("dividemix").means.shape
        torch.Size([2, 2, 2])
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None) -> None:
        if not (isinstance(num_classes, int) and num_classes >= 1):
            raise ValueError(f"num_classes is {num_classes!r}; it must be an integer of at least 1.")
        self.num_classes = num_classes
        # First axis: count, sum of offsets, sum of squared offsets.
        self._cells = torch.zeros(3, num_classes, 2, _NUM_BINS, dtype=torch.int64, device=device)
        self._dropped = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def num_values(self) -> Tensor:
        """`(2, K)` int64: how many losses each set has."""
        return self._cells[0].sum(-1).t()

    @property
    def num_dropped(self) -> int:
        """How many losses were left out because they were not finite."""
        return int(self._dropped)

    @torch.no_grad()
    def update(self, losses: Tensor, labels: Tensor) -> None:
        """Add a batch of losses.

        Args:
            losses: `(B, K)`, any floating dtype; losses as of :func:`label_losses` (a value below 0 counts as 0).
            labels: `(B, K)`, given labels in {0, 1}, any dtype.

        Raises:
            TypeError: If `losses` is not floating point.
            ValueError: If a shape is not `(B, K)`, or a label is neither 0 nor 1.
        """
        positive = _checked_labels(losses, labels, "losses", self.num_classes)
        losses, positive = losses.to(self._cells.device), positive.to(self._cells.device)
        finite = None if torch.isfinite(losses.sum(dtype=torch.float32)) else torch.isfinite(losses)
        rows = min(max(1, len(losses)), _ROWS_AT_ONCE)
        classes = max(1, _VALUES_AT_ONCE // rows)
        for row in range(0, len(losses), rows):
            for first in range(0, self.num_classes, classes):
                piece = slice(row, row + rows), slice(first, first + classes)
                keep = None if finite is None else finite[piece]
                self._add(losses[piece], positive[piece], keep, self._cells[:, first : first + classes].view(3, -1))

    def _add(self, losses: Tensor, positive: Tensor, keep: Tensor | None, state: Tensor) -> None:
        """Add losses of some classes to their part of the cells, `(3, cells)`."""
        num_cells = state.shape[1]
        bins, offsets = _quantize(losses)
        of_class = torch.arange(0, num_cells, 2 * _NUM_BINS, dtype=torch.int32, device=losses.device)
        cells = bins.add_(of_class - _FIRST_BIN).add_(positive.to(torch.int32), alpha=_NUM_BINS)
        if keep is None:
            cells, offsets = cells.reshape(-1), offsets.reshape(-1)
        else:
            cells, offsets = cells[keep], offsets[keep]
            self._dropped += (~keep).sum()
        if cells.device.type != "cpu" or len(cells) < num_cells:
            cells, offsets = cells.long(), offsets.long()
            state[0].index_add_(0, cells, torch.ones_like(cells))
            state[1].index_add_(0, cells, offsets)
            state[2].index_add_(0, cells, offsets * offsets)
        else:  # the same sums, several times faster where there are many values; deterministic on the CPU only
            offsets = offsets.double()
            squares = torch.bincount(cells, offsets * offsets, num_cells)
            packed = torch.bincount(cells, offsets.add_(1 << 31), num_cells).long()  # counts and offsets in one pass
            state[0] += packed >> 31
            state[1] += packed & ((1 << 31) - 1)
            state[2] += squares.long()

    def tail(self, polarity: int, counts: Tensor) -> Tensor:
        """Where the largest losses of each class begin, to the width of a bin.

        Args:
            polarity: 0: of negative labels, 1: of positive ones.
            counts: `(K,)` how many of each class's losses, at least 0, any dtype; they need not be whole.

        Returns:
            `(K,)` float64: the lower edge of the bin that holds the `counts`-th largest loss, so that about as many
            are not below it. inf where `counts` is 0; 0 where the set has fewer.

        Example:
            >>> histogram = LossHistogram(num_classes=1)
            >>> histogram.update(torch.tensor([[0.5], [1.0], [2.0], [4.0]]), torch.zeros(4, 1))
            >>> histogram.tail(0, torch.tensor([2]))
            tensor([1.9999], dtype=torch.float64)
        """
        from_the_top = self._cells[0, :, polarity].flip(-1).cumsum(-1)
        counts = counts.to(from_the_top.device, torch.float64)
        enough = _NUM_BINS - 1 - (from_the_top < counts[:, None]).sum(-1)
        bits = (enough.clamp(min=0).to(torch.int32) + _FIRST_BIN) << _OFFSET_BITS
        edge = (bits.view(torch.float32).double() - _SHIFT).clamp(min=0)
        return edge.masked_fill(enough < 0, 0.0).masked_fill(counts <= 0, math.inf).cpu()

    def reduce(self) -> None:
        """Sum the histograms of all ranks (must be called on every rank, once, after the last update).

        Does nothing when `torch.distributed` is not initialised.
        """
        for counts in (self._cells, self._dropped):
            counts.copy_(all_reduce_sum(counts))

    def fit(self, settings: str | MixtureSettings = DEFAULT_MIXTURE_SETTINGS) -> LossMixtures:
        """Fit all 2K mixtures (Eq. 7), on the CPU in float64.

        Args:
            settings: A name in `MIXTURE_PRESETS`, or a :class:`MixtureSettings`.

        Returns:
            The mixtures, on the CPU.

        Raises:
            ValueError: If `settings` names no preset.
        """
        settings = _resolve_settings(settings)
        cells = self._cells.cpu().transpose(1, 2).flatten(1, 2)
        fits = [_fit_sets(part, settings) for part in cells.split(_SETS_AT_ONCE, dim=1)]
        return LossMixtures(*(torch.cat(parts).unflatten(0, (2, -1)) for parts in zip(*fits, strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        """The counts: `cells` `(3, K, 2, bins)` and `dropped` `(1,)`, int64."""
        return {"cells": self._cells, "dropped": self._dropped}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the counts of another histogram of as many classes.

        Raises:
            ValueError: If a tensor is missing, or is that of another number of classes.
        """
        for name, own in self.state_dict().items():
            got = f"{state[name].dtype} {tuple(state[name].shape)}" if name in state else "missing"
            if got != f"{own.dtype} {tuple(own.shape)}":
                raise ValueError(
                    f"'{name}' of the histogram's state is {got}; with {self.num_classes} classes it must be "
                    f"{own.dtype} {tuple(own.shape)}. Load it into a histogram of the num_classes it was saved with."
                )
            own.copy_(state[name])


@dataclass(frozen=True, eq=False)
class LossMixtures:
    """The 2K fitted mixtures (Eq. 7), and the clean probabilities that they give (Eq. 8).

    The first axis is the polarity (0: negative labels, 1: positive labels), the last the component, sorted by mean.

    Args:
        means: `(2, K, 2)` float64, the smaller first.
        variances: `(2, K, 2)` float64, `reg_covar` included.
        weights: `(2, K, 2)` float64, they sum to 1.
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
    def fit(
        cls, losses: Tensor, labels: Tensor, settings: str | MixtureSettings = DEFAULT_MIXTURE_SETTINGS
    ) -> LossMixtures:
        """Fit on the losses of all instances at once: :class:`LossHistogram`, updated and fitted.

        Args:
            losses: `(N, K)`, any floating dtype, at least 0. Those that are not finite are left out.
            labels: `(N, K)`, given labels in {0, 1}.
            settings: A name in `MIXTURE_PRESETS`, or a :class:`MixtureSettings`.

        Returns:
            The mixtures, on the CPU.

        Raises:
            TypeError: If `losses` is not floating point.
            ValueError: If the shapes differ or are not `(N, K)`, a label is neither 0 nor 1, or `settings` names no
                preset.

        Example:
            >>> losses = torch.cat([torch.rand(90, 1), 5 + torch.rand(10, 1)])
            >>> labels = torch.ones(100, 1)
            >>> (LossMixtures.fit(losses, labels).clean_probability(losses, labels) > 0.5).sum()
            tensor(90)
        """
        settings = _resolve_settings(settings)
        histogram = LossHistogram(_checked_shape(losses, "losses"), device=losses.device)
        histogram.update(losses, labels)
        return histogram.fit(settings)

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
            TypeError: If `losses` is not floating point.
            ValueError: If a shape is not `(N, K)`, or a label is neither 0 nor 1.
        """
        num_classes = self.means.shape[1]
        positive = _checked_labels(losses, labels, "losses", num_classes)
        separated = self.separated.to(losses.device)
        odds = [x.to(losses.device) for x in _log_odds(self.means, self.variances, self.weights)]
        falling = [x.to(losses.device) for x in _falling_range(self.means, self.variances)]
        p_clean = torch.empty(losses.shape, dtype=torch.float32, device=losses.device)
        rows = max(1, _VALUES_AT_ONCE // num_classes)  # bounds the float64 temporaries
        for x, t, out in zip(losses.split(rows), positive.split(rows), p_clean.split(rows), strict=True):
            ignored = ~torch.isfinite(x)
            x = x.double()
            if monotone:
                x = x.clamp(*(_of_label(bound, t) for bound in falling))
            at, constant, slope, curve = (_of_label(coefficient, t) for coefficient in odds)
            y = x - at
            clean = torch.sigmoid(constant + y * (slope + y * curve))
            out.copy_(torch.where(_of_label(separated, t), clean, 1.0).masked_fill_(ignored, 0.0))
        return p_clean

    def to(self, device: torch.device | str) -> LossMixtures:
        """The same mixtures with their tensors on `device`."""
        return LossMixtures(**{name: x.to(device) for name, x in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The five tensors by name."""
        return {name: getattr(self, name) for name in _MIXTURE_TENSORS}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> LossMixtures:
        """The mixtures whose `state_dict` this is.

        Raises:
            ValueError: If a tensor is missing or has the wrong shape.
        """
        num_classes = state["means"].shape[1] if state.get("means", torch.empty(0)).dim() == 3 else 0
        for name, has_components in _MIXTURE_TENSORS.items():
            want = (2, num_classes, 2) if has_components else (2, num_classes)
            if name not in state or tuple(state[name].shape) != want:
                got = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"'{name}' of the mixtures' state is {got}; it must be a tensor of shape {want}.")
        return cls(**{name: state[name] for name in _MIXTURE_TENSORS})


_MIXTURE_TENSORS = {"means": True, "variances": True, "weights": True, "separated": False, "num_iter": False}


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


def _of_label(parameter: Tensor, positive: Tensor) -> Tensor:
    """The element of `(2, K)` that belongs to each of `(B, K)` labels."""
    return torch.where(positive, parameter[1], parameter[0])


def _quantize(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Bin (counted from `_FIRST_BIN`) and position in it, int32. Of a loss that is not finite: anything."""
    bits = (losses.float() + _SHIFT).clamp(_SHIFT, _LARGEST).view(torch.int32)
    return bits >> _OFFSET_BITS, bits & _OFFSET_MASK


class _Bins(NamedTuple):
    """The bins of S sets, `(S, B)` float64 each."""

    count: Tensor
    mean: Tensor  # of the bin's values, from the set's mean
    spread: Tensor  # sum of the squared distances from the bin's mean
    steepest: Tensor  # 2 / standard deviation in the bin, see _e_step


class _Sums(NamedTuple):
    """Moment sums of a component, or of a whole set: sum of r, of r x and of r x^2, `(S,)` float64 each."""

    count: Tensor
    first: Tensor
    second: Tensor


def _bin_statistics(cells: Tensor) -> tuple[_Bins, Tensor]:
    """The bins of `(3, S, B)` int64 cells, without those that no set uses, and the sets' means `(S,)`."""
    used = (cells[0] > 0).any(0)
    used[0] = True  # leaves one where all sets are empty
    bits = (torch.arange(_NUM_BINS, dtype=torch.int32) + _FIRST_BIN) << _OFFSET_BITS
    low = bits.view(torch.float32).double()[used]
    step = torch.exp2(torch.floor(torch.log2(low)) - 6 - _OFFSET_BITS)  # from one float32 to the next
    count, offset, square = cells[:, :, used].double()
    some = count.clamp(min=1)
    offset = offset / some
    mean = low - _SHIFT + offset * step
    variance = (square / some - offset**2).clamp(min=0) * step**2
    center = (count * mean).sum(1) / count.sum(1).clamp(min=1)
    return _Bins(count, mean - center[:, None], count * variance, 2 * variance.rsqrt()), center


def _fit_sets(cells: Tensor, settings: MixtureSettings) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mixtures of S sets, from `(3, S, B)` int64 cells: the five tensors of LossMixtures, `(S, ...)`."""
    bins, center = _bin_statistics(cells)
    num_values = bins.count.sum(1)
    # One component, where there are not two to fit.
    total = _moments(bins, torch.ones_like(bins.count))
    means = torch.zeros(len(center), 2, dtype=torch.float64)
    variances = (total.second / num_values.clamp(min=1) + settings.reg_covar)[:, None].repeat(1, 2)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(center), 1)
    num_iter = torch.zeros(len(center), dtype=torch.int64)

    rows = ((num_values >= _MIN_VALUES) & ((bins.count > 0).sum(1) >= 2)).nonzero().squeeze(1)
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
    return ((constant + y * (slope + y * curve) > 0) & (bins.count > 0)).any(1)


def _em(bins: _Bins, settings: MixtureSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EM of S sets side by side, with scikit-learn's conventions: means, variances, weights `(S, 2)`, iterations.

    A set leaves the computation when it has converged, so it stops where it would stop alone.
    """
    num_sets = len(bins.count)
    result = [torch.empty(num_sets, 2, dtype=torch.float64) for _ in range(3)]
    num_iter = torch.empty(num_sets, dtype=torch.int64)
    running = torch.arange(num_sets)
    bound = torch.full((num_sets,), -torch.inf, dtype=torch.float64)
    total = _moments(bins, torch.ones_like(bins.count))
    parameters = _m_step(_moments(bins, _two_means(bins)), total, settings.reg_covar)
    for iteration in range(1, settings.max_iter + 1):
        previous = bound
        first, bound = _e_step(bins, total, *parameters)
        parameters = _m_step(first, total, settings.reg_covar)
        done = (bound - previous).abs() < settings.tol
        if iteration == settings.max_iter:
            done = torch.ones_like(done)
        if done.any():
            for whole, part in zip(result, parameters, strict=True):
                whole[running[done]] = part[done]
            num_iter[running[done]] = iteration
            on = ~done
            running, bound = running[on], bound[on]
            parameters = tuple(x[on] for x in parameters)
            bins, total = _Bins(*(x[on] for x in bins)), _Sums(*(x[on] for x in total))
            if not len(running):
                break
    return *result, num_iter


def _two_means(bins: _Bins) -> Tensor:
    """Hard responsibilities `(S, B)` of the first component: the exact 2-means split of the bins (Otsu's)."""
    left = bins.count.cumsum(1)
    right = left[:, -1:] - left
    left_sum = (bins.count * bins.mean).cumsum(1)  # all sum to 0
    between = torch.where((left > 0) & (right > 0), left_sum**2 / (left * right), -1.0)
    split = between.argmax(1, keepdim=True)
    return (torch.arange(bins.count.shape[1]) <= split).double()


def _moments(bins: _Bins, responsibility: Tensor) -> _Sums:
    """Moment sums where all values of a bin have one responsibility."""
    first = responsibility * bins.count * bins.mean
    return _Sums(
        (responsibility * bins.count).sum(1), first.sum(1), (first * bins.mean + responsibility * bins.spread).sum(1)
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
    square = total.second - 2 * mean * total.first + mean**2 * total.count
    rest = total.count * (torch.log(weight) - 0.5 * torch.log(2 * math.pi * variance)) - 0.5 * square / variance
    return first, (soft + rest) / total.count


class ExactMixture(NamedTuple):
    """A mixture of :func:`exact_em`: `(2,)` float64 each, the smaller mean first; and the iterations run."""

    means: Tensor
    variances: Tensor
    weights: Tensor
    num_iter: int


def exact_em(values: Tensor, settings: str | MixtureSettings = DEFAULT_MIXTURE_SETTINGS) -> ExactMixture:
    """Slow, obvious float64 EM on the values of one set: the reference for :class:`LossMixtures`.

    It starts where the histograms' EM starts: from the best split into two at an edge between two bins.

    Args:
        values: Losses of one set, 1-D, any floating dtype. Those that are not finite are left out.
        settings: A name in `MIXTURE_PRESETS`, or a :class:`MixtureSettings`.

    Returns:
        The two components.

    Raises:
        ValueError: If the values do not fall into two bins at least.
    """
    settings = _resolve_settings(settings)
    values = values[torch.isfinite(values)]
    bins, _ = _quantize(values)
    x = values.double()
    splits = [bins <= last for last in bins.unique()[:-1]]
    if not splits:
        raise ValueError(f"All of the {len(x)} values are in one bin; EM needs values that differ by a few percent.")

    def squared_error(left: Tensor) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in (x[left], x[~left])))

    def m_step(responsibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = responsibility.sum(1) + _EPS
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


def _resolve_settings(settings: str | MixtureSettings) -> MixtureSettings:
    if isinstance(settings, MixtureSettings):
        return settings
    if settings not in MIXTURE_PRESETS:
        raise ValueError(
            f"settings is {settings!r}; it must be one of {sorted(MIXTURE_PRESETS)}, or a MixtureSettings, "
            "e.g. MixtureSettings(max_iter=100, tol=1e-3, reg_covar=1e-6)."
        )
    return MIXTURE_PRESETS[settings]


def _checked_labels(values: Tensor, labels: Tensor, name: str, num_classes: int | None = None) -> Tensor:
    """The labels as bool, on their device, after a look at shapes, dtype and values."""
    if num_classes is not None:
        _checked_shape(values, name, num_classes)
    if not values.is_floating_point():
        raise TypeError(f"{name} are {values.dtype}; they must be floating point, e.g. {name}.float().")
    if labels.shape != values.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and {name} {tuple(values.shape)}; they must be the same, "
            "one label for each value."
        )
    positive = labels.bool()
    if not torch.equal(positive.to(labels.dtype), labels):
        raise ValueError("labels hold values other than 0 and 1; pass the given labels, not mixed or soft ones.")
    return positive


def _checked_shape(values: Tensor, name: str, num_classes: int | None = None) -> int:
    """K, of `(N, K)` values."""
    if values.dim() != 2 or values.shape[1] != (num_classes or values.shape[1]) or values.shape[1] == 0:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}; they must be (instances, {num_classes or 'classes'}), "
            "one column for each class."
        )
    return values.shape[1]
