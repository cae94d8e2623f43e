"""How well the reliability of labels was judged, where the clean labels are known (Eq. 14 and 15).

Counts are int64 and add up, so that batches, ranks and epochs merge exactly by `+`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_balancemix.core.distributed import all_reduce_sum, world
from hf_balancemix.core.label_management import Reliability

_SHAPE = (2, 7)  # of a count tensor, see `count_label_quality`


def count_label_quality(
    given: torch.Tensor, clean: torch.Tensor, refined: torch.Tensor, reliability: torch.Tensor
) -> torch.Tensor:
    """Counts the labels of a batch by what was true of them and how they were judged.

    Does not wait for the device, so values are not looked at here: `label_quality` reports given labels other than 0
    and 1 and unknown reliability codes.

    Args:
        given: `(B, K)` given labels, 0 or 1, of any dtype.
        clean: `(B, K)` clean labels, 0 or 1, of any dtype.
        refined: `(B, K)` labels after re-labelling, 0 or 1, of any dtype.
        reliability: `(B, K)` integer codes of `Reliability`.

    Returns:
        int64 `(2, 7)` on the device of the labels. Row 0 counts the given negative labels, row 1 the given positive
        ones; columns: all; given == clean; judged CLEAN; judged CLEAN and given == clean; judged RELABELED; judged
        RELABELED and refined == clean; judged AMBIGUOUS.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if `reliability` is not of an integer dtype.
    """
    if not given.shape == clean.shape == refined.shape == reliability.shape:
        raise ValueError(
            f"given is of shape {tuple(given.shape)}, clean {tuple(clean.shape)}, refined {tuple(refined.shape)} and "
            f"reliability {tuple(reliability.shape)}; all must be of the same shape (B, K); pass those of one batch."
        )
    if reliability.dtype.is_floating_point or reliability.dtype == torch.bool:
        raise TypeError(
            f"reliability is of dtype {reliability.dtype}; it must be integer codes of Reliability; pass the "
            "reliability that refine_labels returns, not p_clean or a mask."
        )
    truly_clean = given == clean
    selected, relabeled = reliability == Reliability.CLEAN, reliability == Reliability.RELABELED
    ambiguous = reliability == Reliability.AMBIGUOUS
    counted = torch.stack(
        [truly_clean, selected, selected & truly_clean, relabeled, relabeled & (refined == clean), ambiguous]
    ).flatten(start_dim=1)
    num_positive = (given == 1).sum()
    # Negative by subtraction: a given label that is neither 0 nor 1 then shows as a label that was judged nothing.
    labels = torch.stack([given.numel() - num_positive, num_positive])
    judged = torch.stack([(counted & (given == value).flatten()).sum(dim=1) for value in (0, 1)])
    return torch.cat([labels[:, None], judged], dim=1)


def label_quality(counts: torch.Tensor) -> dict[str, float]:
    """Clean-label selection (Eq. 14) and re-labelling (Eq. 15) figures from counts.

    Negative labels are many times the positive ones and mostly easy, so every figure is given twice: over all labels,
    as in the paper, and with the suffix `_positives` over the labels that were given as positive.

    Args:
        counts: `(2, 7)` integer counts of `count_label_quality`, or a sum of such.

    Returns:
        Fractions in [0, 1], of which each is left out where its denominator is 0.
        `clean_precision` (selected and truly clean / selected), `clean_recall` (selected and truly clean / truly
        clean), `relabel_proportion` (re-labelled / all), `relabel_accuracy` (re-labelled to the clean label /
        re-labelled), `ambiguous_proportion` (ambiguous / all), `noise_rate` (given other than clean / all).

    Raises:
        ValueError: for counts of another shape, or if some label was neither CLEAN nor RELABELED nor AMBIGUOUS.
    """
    _check_counts(counts)
    figures: dict[str, float] = {}
    for suffix, row in {"": counts.sum(dim=0), "_positives": counts[1]}.items():
        labels, truly_clean, selected, selected_right, relabeled, relabeled_right, ambiguous = row.tolist()
        judged = selected + relabeled + ambiguous
        if judged != labels:
            raise ValueError(
                f"counts is of {labels} labels of which {judged} are CLEAN, RELABELED or AMBIGUOUS; each label must "
                "be one of these; check that the given labels were 0 or 1 and the reliability codes "
                f"{[code.value for code in Reliability]}."
            )
        fractions = {
            "clean_precision": (selected_right, selected),
            "clean_recall": (selected_right, truly_clean),
            "relabel_proportion": (relabeled, labels),
            "relabel_accuracy": (relabeled_right, relabeled),
            "ambiguous_proportion": (ambiguous, labels),
            "noise_rate": (labels - truly_clean, labels),
        }
        figures |= {f"{name}{suffix}": part / whole for name, (part, whole) in fractions.items() if whole}
    return figures


class LabelQuality:
    """Label-quality counters of an epoch: `update` every batch, `reduce` over ranks, `compute`, `reset`.

    A rank's own updates are kept apart until `reduce` adds those of all ranks to the common counts. So `reduce` may be
    called any number of times (before every checkpoint, say), and after it the state is the same on every rank.

    Example:
        >>> quality = LabelQuality()
        >>> given, clean = torch.tensor([[1, 0, 1]]), torch.tensor([[1, 0, 0]])
        >>> refined, reliability = torch.tensor([[1, 0, 0]]), torch.tensor([[0, 0, 1]])
        >>> quality.update(given, clean, refined, reliability)
        >>> quality.reduce()
        >>> quality.compute()["relabel_accuracy"]
        1.0
    """

    _common: torch.Tensor  # of all ranks, the same on each
    _own: torch.Tensor  # this rank's since the last `reduce`

    def __init__(self) -> None:
        self.reset()

    @property
    def counts(self) -> torch.Tensor:
        """int64 `(2, 7)`: the common counts, and this rank's since the last `reduce`."""
        return self._common.to(self._own.device) + self._own

    def update(
        self, given: torch.Tensor, clean: torch.Tensor, refined: torch.Tensor, reliability: torch.Tensor
    ) -> None:
        """Adds a batch of this rank; see `count_label_quality` for the arguments and errors."""
        batch = count_label_quality(given, clean, refined, reliability)
        self._own = self._own.to(batch.device) + batch

    def reduce(self) -> None:
        """Adds up all ranks' updates. Must be called on every rank; in a single process it changes no figure."""
        self._common = self._common.to(self._own.device) + all_reduce_sum(self._own)
        self._own = torch.zeros_like(self._own)

    def compute(self) -> dict[str, float]:
        """The figures of `label_quality`; over all ranks if `reduce` was called after the last `update`."""
        return label_quality(self.counts)

    def reset(self) -> None:
        """Sets every count to 0."""
        self._common = torch.zeros(_SHAPE, dtype=torch.int64)
        self._own = torch.zeros_like(self._common)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`{"counts": int64 (2, 7)}` on the CPU.

        Raises:
            RuntimeError: with several ranks, if there were updates after the last `reduce`: the state would differ
                between ranks, and a checkpoint would hold one rank's labels only.
        """
        if world()[1] > 1 and self._own.any():
            raise RuntimeError(
                "LabelQuality holds updates of this rank only; its state must be that of all ranks; call reduce() on "
                "every rank before state_dict()."
            )
        return {"counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replaces all counts by those of `state_dict`; call it on every rank with the same state.

        Raises:
            ValueError: if there is no int64 `(2, 7)` tensor `counts`.
        """
        if "counts" not in state:
            raise ValueError(
                f"the label-quality state has {sorted(state)}; it must have the tensor 'counts'; pass what "
                "state_dict() returned."
            )
        _check_counts(state["counts"])
        self.reset()
        self._common = state["counts"].clone()


def _check_counts(counts: torch.Tensor) -> None:
    if counts.shape != _SHAPE or counts.dtype != torch.int64:
        raise ValueError(
            f"counts is of shape {tuple(counts.shape)} and dtype {counts.dtype}; it must be int64 of shape {_SHAPE}; "
            "pass what count_label_quality returned, or a sum of it."
        )
