"""The losses of every label (Eq. 6's sets), counted in histograms.

K is the number of classes, N that of instances; "set" means the losses of one (polarity, class) pair, so there are 2K
sets; index 0 of a polarity axis is negative labels, 1 is positive labels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core.checks import checked_num_classes, checked_positive
from hf_balancemix.core.distributed import all_reduce_sum

# Bins are cut by the float32 bits of (loss + 2^-14): the exponent and the top 6 mantissa bits name the bin, the low 17
# mantissa bits are the position in it. Adding 2^-14 makes the bins equally wide (2^-20) near zero instead of endlessly
# finer, so that the range starts at 0 and nothing has to be clamped there.
_SHIFT = 2.0**-14
_OFFSET_BITS = 17
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
_FIRST_BIN = (127 - 14) << 6  # what the bits of 2^-14 read after the offset is shifted out
_NUM_BINS = 18 << 6  # 18 powers of two, up to 2^4, of 64 bins
NUM_COARSE_BINS = _NUM_BINS // 32
_LARGEST = 16 * (1 - 2.0**-24)  # the last float32 below 2^4; a larger loss (probability under 1.2e-7) counts as this

# Work is done in pieces that stay in the cache. A set has at most one value in a row, so a piece's sums stay below
# 2^31 (offsets) and 2^48 (squares), exact in float64 too.
_ROWS_AT_ONCE = 1 << 14
_VALUES_AT_ONCE = 1 << 18


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every label as given (the elements of Eq. 6's sets), without reduction.

    Args:
        logits: `(..., K)`, any floating dtype.
        labels: `(..., K)`, given labels in {0, 1}, any dtype.

    Returns:
        `(..., K)` float32 losses, at least 0. A logit that is NaN gives NaN.

    Raises:
        TypeError, ValueError: `logits` are not floating point, the shapes differ, or a label is neither 0 nor 1.
    """
    positive = checked_positive(labels, logits, "logits")
    # Rounded from float64: the last bit of a float32 softplus depends on where in a batch the value stands.
    logits = logits.double()
    return F.softplus(torch.where(positive, -logits, logits), threshold=40).float()


def bin_edges() -> Tensor:
    """`(bins + 1,)` float64: where each bin of a :class:`LossHistogram` begins, and the end of the last; 0 to 16."""
    bits = (torch.arange(_NUM_BINS + 1, dtype=torch.int32) + _FIRST_BIN) << _OFFSET_BITS
    return bits.view(torch.float32).double() - _SHIFT


class LossHistogram:
    """Histograms of the 2K sets of losses (Eq. 6), filled batch by batch, in int64.

    A bin keeps the number of its values, and the sum and the sum of squares of their positions in the bin as integers
    (17-bit fixed point). Integer sums are exact, so the order of the batches and the number of ranks that share the
    work change no bit of the mixtures. A bin's sum of squares stays under 2^63 up to 2^29 = 5.4e8 instances.
    Losses above 16 count as 16; losses that are not finite are left out. Bins are 1.6 % of the loss wide;
    the fit is that of the values themselves (posteriors to 1e-3) unless a peak of losses is narrower than its bin.

    Args:
        num_classes: K, an integer of at least 1; others are a ValueError.
        device: Where the counts are kept; best the device of the losses.

    Attributes:
        cells: `(3, K, 2, bins)` int64: number, sum of positions and sum of squared positions of the values in each
            bin; see :func:`bin_moments`.

    Example:
        >>> histogram = LossHistogram(num_classes=2)
        >>> histogram.update(torch.rand(100, 2), torch.randint(0, 2, (100, 2)))
        >>> histogram.num_values.sum()
        tensor(200)
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None) -> None:
        if not (isinstance(num_classes, int) and num_classes >= 1):
            raise ValueError(f"num_classes is {num_classes!r}; it must be an integer of at least 1.")
        self.num_classes = num_classes
        self.cells = torch.zeros(3, num_classes, 2, _NUM_BINS, dtype=torch.int64, device=device)

    @classmethod
    def of_labels(cls, logits: Tensor, positive: Tensor, known: Tensor) -> LossHistogram:
        """The losses of some classes' known labels: logits, which are positive and which known, `(N, k)` each."""
        histogram = cls(logits.shape[1])
        histogram.update(label_losses(logits, positive).masked_fill(~known, math.nan), positive)
        return histogram

    @property
    def counts(self) -> Tensor:
        """`(2, K, bins)` int64: how many losses each set has in each bin; where bins lie: :func:`bin_edges`."""
        return self.cells[0].transpose(0, 1)

    @property
    def num_values(self) -> Tensor:
        """`(2, K)` int64: how many losses each set has."""
        return self.counts.sum(-1)

    @property
    def coarse_counts(self) -> Tensor:
        """`(2, K, 36)` int64: :attr:`counts` in bins for people, two for each doubling; edges: every 32nd of
        :func:`bin_edges`."""
        return self.counts.unflatten(-1, (-1, 32)).sum(-1)

    @torch.no_grad()
    def update(self, losses: Tensor, labels: Tensor) -> None:
        """Add a batch of losses.

        Args:
            losses: `(B, K)`, any floating dtype; losses as of :func:`label_losses` (a value below 0 counts as 0).
            labels: `(B, K)`, given labels in {0, 1}, any dtype.

        Raises:
            TypeError, ValueError: As :func:`label_losses`, or a shape is not `(B, K)`.
        """
        checked_num_classes(losses, "losses", self.num_classes)
        positive = checked_positive(labels, losses, "losses")
        losses, positive = losses.to(self.cells.device), positive.to(self.cells.device)
        finite = None if torch.isfinite(losses.sum(dtype=torch.float32)) else torch.isfinite(losses)
        rows = min(max(1, len(losses)), _ROWS_AT_ONCE)
        classes = max(1, _VALUES_AT_ONCE // rows)
        for row in range(0, len(losses), rows):
            for first in range(0, self.num_classes, classes):
                piece = slice(row, row + rows), slice(first, first + classes)
                keep = None if finite is None else finite[piece]
                _add(losses[piece], positive[piece], keep, self.cells[:, first : first + classes].view(3, -1))

    @torch.no_grad()
    def update_negative(self, losses: Tensor, some: slice) -> None:
        """Add the losses `(B, k)` of some classes, finite, all of negative labels; faster than :meth:`update`."""
        of_class = torch.arange(0, losses.shape[1] * _NUM_BINS, _NUM_BINS, dtype=torch.int32)
        for part in losses.split(_ROWS_AT_ONCE):
            bins, offsets = _bins_and_offsets(part)
            added = _counted(bins.add_(of_class).flatten(), offsets.flatten(), losses.shape[1] * _NUM_BINS)
            self.cells[:, some, 0] += added.view(3, -1, _NUM_BINS)

    @torch.no_grad()
    def update_positive(self, losses: Tensor, label_class: Tensor) -> None:
        """Add single losses of positive labels, finite, and their classes, `(M,)` each."""
        bins, offsets = (x.long() for x in _bins_and_offsets(losses))
        at = (2 * label_class + 1) * _NUM_BINS + bins
        for moment, values in zip(self.cells, (torch.ones_like(offsets), offsets, offsets * offsets), strict=True):
            moment.view(-1).index_add_(0, at, values)

    def threshold_of_largest(self, polarity: int, counts: Tensor, some: slice = slice(None)) -> Tensor:
        """Where the largest losses of each class begin, to the width of a bin.

        Args:
            polarity: 0: of negative labels, 1: of positive ones.
            counts: `(..., k)` how many of each class's losses, at least 0, any dtype; they need not be whole.
            some: Which k classes; all by default.

        Returns:
            `(..., k)` float64 on the CPU: the lower edge of the bin that holds the `counts`-th largest loss; inf where
            `counts` is 0; 0 where the set has fewer.

        Example:
            >>> histogram = LossHistogram(num_classes=1)
            >>> histogram.update(torch.tensor([[0.5], [1.0], [2.0], [4.0]]), torch.zeros(4, 1))
            >>> histogram.threshold_of_largest(0, torch.tensor([2]))
            tensor([1.9999], dtype=torch.float64)
        """
        from_the_top = self.counts[polarity, some].flip(-1).cumsum(-1)
        counts = counts.to(from_the_top.device, torch.float64)
        enough = _NUM_BINS - 1 - (from_the_top < counts[..., None]).sum(-1)  # -1: the set has fewer
        thresholds = bin_edges()[enough.clamp(min=0).cpu()]
        return thresholds.masked_fill(counts.cpu() <= 0, math.inf)

    def reduce(self) -> None:
        """Must be called on every rank, once, after the last update: sum the histograms of all ranks."""
        self.cells = all_reduce_sum(self.cells)


def bin_moments(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and variance of the values in the bins of S sets.

    Args:
        cells: `(3, S, bins)` int64 on the CPU, of a :class:`LossHistogram`.

    Returns:
        Three `(S, B)` float64, of the B bins that any of the sets uses (and the first). Of a bin without values the
        mean is its lower edge and the variance 0.
    """
    used = (cells[0] > 0).any(0)
    used[0] = True  # leaves one where all sets are empty
    edges = bin_edges()
    low, step = edges[:-1][used], edges.diff()[used] / (1 << _OFFSET_BITS)
    number, offset, square = cells[:, :, used].double()
    some = number.clamp(min=1)
    offset = offset / some
    return number, low + offset * step, (square / some - offset**2).clamp(min=0) * step**2


def _bins_and_offsets(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Bin and place in it, int32; of a loss that is not finite any."""
    bits = (losses.float() + _SHIFT).clamp(_SHIFT, _LARGEST).view(torch.int32)
    return (bits >> _OFFSET_BITS).sub_(_FIRST_BIN), bits & _OFFSET_MASK


def _add(losses: Tensor, positive: Tensor, keep: Tensor | None, state: Tensor) -> None:
    """Add losses of some classes, `(rows, classes)`, to their part of a histogram's cells, `(3, their cells)`."""
    num_cells = state.shape[1]
    bins, offsets = _bins_and_offsets(losses)
    of_class = torch.arange(0, num_cells, 2 * _NUM_BINS, dtype=torch.int32, device=losses.device)
    cells = bins.add_(of_class).add_(positive.to(torch.int32), alpha=_NUM_BINS)
    cells, offsets = (x.reshape(-1) if keep is None else x[keep] for x in (cells, offsets))
    if cells.device.type != "cpu" or len(cells) < num_cells:
        cells, offsets = cells.long(), offsets.long()
        state[0].index_add_(0, cells, torch.ones_like(cells))
        state[1].index_add_(0, cells, offsets)
        state[2].index_add_(0, cells, offsets * offsets)
    else:
        state += _counted(cells, offsets, num_cells)


def _counted(cells: Tensor, offsets: Tensor, num_cells: int) -> Tensor:
    """`(3, cells)` int64 moments of the values: those of `index_add_`, several times faster where there are many
    values; deterministic on the CPU only."""
    offsets = offsets.double()
    squares = torch.bincount(cells, offsets * offsets, num_cells)
    packed = torch.bincount(cells, offsets.add_(1 << 31), num_cells).long()  # counts and offsets in one pass
    return torch.stack([packed >> 31, packed & ((1 << 31) - 1), squares.long()])
