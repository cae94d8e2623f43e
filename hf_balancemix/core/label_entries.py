"""What is remembered of single labels: a few of N x K, as compressed rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LabelEntries:
    """M of N x K labels, by instance and class; every other label is clean."""

    start: Tensor
    """`(N + 1,)` int64: the entries of instance i are those from `start[i]` to `start[i + 1]`."""
    label_class: Tensor
    """`(M,)` in [0, K), rising in an instance; of :func:`class_dtype`."""
    p_clean: Tensor
    """`(M,)` float16, p_G; 0 of an unknown label."""
    prediction: Tensor
    """`(M,)` float16, f(x) in the last scan; 0.5 before the first, and where it was not finite."""
    judged: Tensor
    """`(M,)` float32: the judge's probability that the class is present, where the label may turn out to be
    suspicious, else -1; empty where the network judges."""
    widest: int
    """The most entries of an instance."""

    @classmethod
    def of(
        cls,
        num_instances: int,
        instance: Tensor,
        label_class: Tensor,
        p_clean: Tensor,
        prediction: Tensor,
        judged: Tensor | None = None,
    ) -> LabelEntries:
        """Entries in any order of the instances, of each in that of its classes; `instance` is `(M,)` integers."""
        columns = [label_class, p_clean, prediction, p_clean.new_zeros(0).float() if judged is None else judged]
        if (instance.diff() < 0).any():
            order = torch.from_numpy(np.argsort(instance.numpy(), kind="stable"))
            columns = [column[order] if len(column) else column for column in columns]
        return cls._of_lengths(torch.bincount(instance, minlength=num_instances), *columns)

    @classmethod
    def _of_lengths(cls, lengths: Tensor, *columns: Tensor) -> LabelEntries:
        start = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=start[1:])
        return cls(start, **dict(zip(_COLUMNS, columns, strict=True)), widest=int(lengths.max()))

    def of_none(self) -> LabelEntries:
        """None of the entries."""
        none = [getattr(self, name)[:0] for name in _COLUMNS]
        return LabelEntries._of_lengths(torch.zeros(len(self.start) - 1, dtype=torch.int64), *none)

    def __len__(self) -> int:
        return len(self.label_class)

    @property
    def instance(self) -> Tensor:
        """`(M,)` int64, on the CPU."""
        return torch.repeat_interleave(torch.arange(len(self.start) - 1), self.start.cpu().diff())

    def to(self, device: torch.device | str) -> LabelEntries:
        if self.start.device == torch.device(device):
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in ("start", *_COLUMNS)})

    def places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Where the entries of some instances are; no device waits for it.

        Args:
            index: `(B,)` int64, on the device of the entries.

        Returns:
            `(B, widest)` int64 into the entries: an instance with fewer has its last again, one without has any. And
            `(B, 1)` bool: whether it has one.
        """
        first, last = self.start[index][:, None], self.start[index + 1][:, None] - 1
        place = (first + torch.arange(self.widest, device=index.device)).minimum(last)
        return place.clamp(0, max(0, len(self) - 1)), last >= first

    def flat_places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of all entries of some instances, `(B,)` int64, the row in `index`, and where they are; on the CPU."""
        first = self.start[index]
        lengths = self.start[index + 1] - first
        row = torch.repeat_interleave(torch.arange(len(index)), lengths)
        return row, torch.arange(len(row)) - (lengths.cumsum(0) - lengths - first)[row]

    def rows(self, index: Tensor, name: str, num_classes: int, otherwise: float) -> Tensor:
        """`(B, K)` float32 of a column for some instances; `otherwise` where there is no entry."""
        index = index.to(self.start.device)
        rows = torch.full((len(index), num_classes), otherwise, device=index.device)
        place, some = self.places(index)
        label_class = self.label_class[place].long()
        # An instance without entries is written what it has.
        return rows.scatter_(1, label_class, getattr(self, name)[place].float().where(some, otherwise))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors on the CPU; of :attr:`start` the numbers of entries, as small as they can be."""
        lengths = self.start.cpu().diff().to(self.label_class.dtype)
        return {"lengths": lengths} | {name: getattr(self, name).cpu() for name in _COLUMNS}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> LabelEntries:
        """The entries whose `state_dict` this is."""
        return cls._of_lengths(state["lengths"].long(), *(state[name].clone() for name in _COLUMNS))


def class_dtype(num_classes: int) -> torch.dtype:
    """The smallest integers that K classes, and their number, fit into."""
    return torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32


_COLUMNS = ("label_class", "p_clean", "prediction", "judged")
