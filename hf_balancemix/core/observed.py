"""What one pass over the training set leaves behind, as the batches of this rank come in: sums, counts, and the losses
and predictions of few labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.given_labels import label_counts, stored_places
from hf_balancemix.core.label_entries import LabelEntries, class_dtype
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.sampling import CONFIDENCE_UNIT

# Batches wait until there are so many logits or instances, and are then counted some classes at a time, in the cache.
_VALUES_AT_ONCE = 1 << 23
_ROWS_AT_ONCE = 1 << 14
_VALUES_OF_A_BLOCK = 1 << 17
_FEWEST_TO_PRUNE = 1 << 22
_LEAST_DOUBT = 0.22  # loss of a negative label: with a prediction over 0.197 it may be suspicious, though clean
_MORE_SUSPICIOUS = 100


class KeptLabels(NamedTuple):
    """Labels of a scan with their losses, `(M,)` each."""

    instance: Tensor
    """int32."""
    label_class: Tensor
    """of :func:`class_dtype`."""
    given: Tensor
    """int8."""
    loss: Tensor
    """float32; NaN where the label is unknown or the logit not finite."""
    prediction: Tensor
    """float16."""

    def of_at_least(self, least: Tensor) -> KeptLabels:
        """Without the negative labels whose loss is less than their class's of `(K,)` float64."""
        keep = (self.given != 0) | ~(self.loss < least[self.label_class.long()])
        return self if keep.all() else KeptLabels(*(column[keep] for column in self))


class ObservedScan:
    """The sums and counts of Eq. 2 and Eq. 6 over the batches of this rank, and the labels that must be known singly.

    Args:
        labels: `(N, K)`, as :func:`~hf_balancemix.core.given_labels.compressed_labels` gives them.
        entries: Labels whose predictions are wanted; None: of none.
        counts_losses: Fill a histogram, as the network judges.
        max_missing: Keep positive and unknown labels, and the negative ones that :meth:`least_kept` says; None: none.

    Attributes:
        num_observed, num_dropped: Instances; and logits that were not finite, which count nowhere.
        sums, counts: `(2, K)` int64 each, of :func:`~hf_balancemix.core.sampling.confidence_sums`.
        histogram: The losses; None unless they are counted.
        predictions: `(M,)` float16 of `entries`: 0 where the instance was not observed, 0.5 of a logit not finite.
        kept: With `max_missing`, of each instance the labels in the order of their classes.
    """

    def __init__(
        self,
        labels: csr_array,
        entries: LabelEntries | None = None,
        counts_losses: bool = False,
        max_missing: float | None = None,
    ) -> None:
        k = labels.shape[1]
        self._labels, self._entries, self._max_missing = labels, entries, max_missing
        self.num_observed = self.num_dropped = 0
        self.sums, self.counts = torch.zeros(2, 2, k, dtype=torch.int64)
        self.histogram = LossHistogram(k) if counts_losses else None
        self.predictions = torch.zeros(0 if entries is None else len(entries), dtype=torch.float16)
        self.kept: list[KeptLabels] = []
        self._positives = label_counts(labels)[1]
        self._num_kept = self._num_left = 0  # labels kept, and left by the last pruning
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, index: Tensor, logits: Tensor) -> None:
        """A batch: `(B,)` int64 instances and `(B, K)` logits, any float dtype and device."""
        self._waiting.append((index.cpu(), logits.detach().to("cpu", torch.float32, copy=True)))
        self.num_observed += len(index)
        waiting = sum(len(index) for index, _ in self._waiting)
        if waiting >= _ROWS_AT_ONCE or waiting * self._labels.shape[1] >= _VALUES_AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Count what waits for more; after the last batch."""
        if self._waiting:
            index, logits = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            for some, rows in zip(index.split(_ROWS_AT_ONCE), logits.split(_ROWS_AT_ONCE), strict=True):
                self._count(some, rows)

    def least_kept(self, histogram: LossHistogram, positives: Tensor, some: slice = slice(None)) -> Tensor:
        """`(k,)` float64: the loss from which on a negative label of some classes, `(k,)` positives, is kept.

        These are the `max_missing` n largest losses of a class of n positive labels, which can be anything but clean;
        and where the prediction may make a label suspicious, the n + 100 largest. The more is in the histogram, the
        higher: so what falls below it during a scan is not among those at its end, of all ranks.
        """
        if not self._max_missing:
            return torch.zeros(len(positives), dtype=torch.float64)
        n = positives.double()
        counts = torch.stack([self._max_missing * n, n + _MORE_SUSPICIOUS])
        missing, suspicious = histogram.threshold_of_largest(0, counts, some)
        return missing.minimum(suspicious.clamp(min=_LEAST_DOUBT))

    def _count(self, index: Tensor, logits: Tensor) -> None:
        """Instances `(R,)` and logits `(R, K)`, which are written over."""
        num_classes = logits.shape[1]
        row, label_class, given = stored_places(self._labels[index.numpy()])
        if self._entries is not None:
            rows, places = self._entries.flat_places(index)
            found = logits[rows, self._entries.label_class[places].long()]
            self.predictions[places] = _predictions(found)
        if not logits.sum().isfinite():
            bad_row, bad_class = logits.isfinite().logical_not_().nonzero(as_tuple=True)
            self.num_dropped += len(bad_row)
            stored = torch.from_numpy(np.isin(bad_row * num_classes + bad_class, row * num_classes + label_class))
            row, label_class = torch.cat([row, bad_row[~stored]]), torch.cat([label_class, bad_class[~stored]])
            given = torch.cat([given, given.new_zeros(int((~stored).sum()))])
        # What is no negative label with a finite logit stands apart; in its place is one with the confidence 1 and the
        # loss 0, to be taken away again.
        apart = logits[row, label_class]
        logits[row, label_class] = -math.inf
        num_apart = torch.bincount(label_class, minlength=num_classes)
        self.counts[0] += len(index) - num_apart
        self.sums[0] -= num_apart * CONFIDENCE_UNIT
        found_rows, found_classes, found_losses = [], [], []
        width = max(1, _VALUES_OF_A_BLOCK // len(index))
        for first in range(0, num_classes, width):
            some = slice(first, first + width)
            x = logits[:, some].double()
            self.sums[0, some] += (1 - x.sigmoid()).mul_(CONFIDENCE_UNIT).round_().sum(0).long()  # exact, under 2^53
            if self.histogram is not None:
                losses = F.softplus(x, threshold=40).float()  # as label_losses
                self.histogram.update_negative(losses, some)
                if self._max_missing is not None:
                    least = self.least_kept(self.histogram, self._positives[some], some)
                    at = np.flatnonzero((losses >= _rounded_down(least)).numpy())
                    found_losses.append(losses.flatten()[at])
                    found_rows.append(torch.from_numpy((at // losses.shape[1]).astype(np.int32)))
                    found_classes.append(torch.from_numpy((at % losses.shape[1]).astype(np.int32)) + first)
        positive = (given == 1) & apart.isfinite()
        confidence = (apart[positive].double().sigmoid() * CONFIDENCE_UNIT).round().long()
        self.sums[1].index_add_(0, label_class[positive], confidence)
        self.counts[1] += torch.bincount(label_class[positive], minlength=num_classes)
        if self.histogram is None:
            return
        self.histogram.cells[0, :, 0, 0] -= num_apart
        apart_losses = torch.full_like(apart, torch.nan)
        apart_losses[positive] = label_losses(apart[positive], torch.ones_like(apart[positive]))
        self.histogram.update_positive(apart_losses[positive], label_class[positive])
        if self._max_missing is None:
            return
        rows, classes, losses = (torch.cat(parts) for parts in (found_rows, found_classes, found_losses))
        x = logits[rows, classes]
        real = x > -math.inf
        rows, classes, losses, x = rows[real], classes[real], losses[real], x[real]
        order = torch.cat([row * num_classes + label_class, rows.long() * num_classes + classes]).argsort()
        self._keep(
            KeptLabels(
                instance=index.int()[torch.cat([row, rows])[order]],
                label_class=torch.cat([label_class, classes])[order].to(class_dtype(num_classes)),
                given=torch.cat([given, given.new_zeros(len(rows))])[order],
                loss=torch.cat([apart_losses, losses])[order],
                prediction=_predictions(torch.cat([apart, x])[order]),
            )
        )

    def _keep(self, labels: KeptLabels) -> None:
        self.kept.append(labels)
        self._num_kept += len(labels.loss)
        if self._num_kept - self._num_left < max(self._num_left, _FEWEST_TO_PRUNE) or not self._max_missing:
            return
        assert self.histogram is not None
        least = self.least_kept(self.histogram, self._positives)
        self.kept = [labels.of_at_least(least) for labels in self.kept]
        self._num_kept = self._num_left = sum(len(labels.loss) for labels in self.kept)


def _rounded_down(values: Tensor) -> Tensor:
    """float32 of float64."""
    rounded = values.float()
    return torch.where(rounded > values, rounded.nextafter(torch.zeros(())), rounded)


def _predictions(logits: Tensor) -> Tensor:
    """float16 f(x); 0.5 of a logit that is not finite."""
    return logits.masked_fill(~logits.isfinite(), 0).double().sigmoid().half()
