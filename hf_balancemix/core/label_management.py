"""Label-wise management (Eq. 9-10): which labels to trust, which to change, which to weigh down."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_range, check_same_shape


class Reliability(IntEnum):
    """What is believed of one label. Stored as uint8."""

    CLEAN = 0
    RELABELED = 1
    AMBIGUOUS = 2


class RefinedLabels(NamedTuple):
    """What :func:`refine_labels` returns; each `(B, K)`."""

    labels: Tensor  # float32 in {0, 1}; -1 where still unknown
    reliability: Tensor  # uint8 codes of Reliability
    weight: Tensor  # float32 in [0, 1], the label's weight in Eq. 10


def refine_labels(
    labels: Tensor,
    p_clean: Tensor,
    probabilities: Tensor,
    threshold: float,
    *,
    relabel: bool = True,
    ambiguous: bool = True,
    trust_positives: bool = False,
) -> RefinedLabels:
    """Eq. 9 and the weights of Eq. 10, label by label.

    A label with p_clean > 0.5 is CLEAN and kept. Otherwise the model's probability q (as printed, the mean over two
    views) decides: q > threshold makes it 1, q < 1 - threshold makes it 0, and it is RELABELED. The rest are
    AMBIGUOUS: unchanged, with weight p_clean.

    Args:
        labels: `(B, K)` given labels in {0, 1}, or -1 where unknown. An unknown label has p_clean 0: it is set where
            the model is confident, and otherwise stays -1 with the weight 0.
        p_clean: `(B, K)` in [0, 1], p_G of Eq. 8.
        probabilities: `(B, K)` in [0, 1], q.
        threshold: eps in [0.5, 1] (the paper uses 0.975). 1 never re-labels.
        relabel: False leaves labels that are not clean ambiguous (ablation).
        ambiguous: False gives ambiguous labels the weight 0 (ablation).
        trust_positives: Every positive label counts as clean (single-positive and noise-free data).

    Raises:
        ValueError: Shapes differ or the threshold is outside [0.5, 1].

    Example:
        >>> given = torch.tensor([[1.0, 1.0, 1.0]])
        >>> refined = refine_labels(given, torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([[0.5, 0.01, 0.5]]), 0.975)
        >>> refined.labels.tolist(), refined.reliability.tolist()
        ([[1.0, 0.0, 1.0]], [[0, 1, 2]])
    """
    check_same_shape(labels=labels, p_clean=p_clean, probabilities=probabilities)
    check_range("threshold", threshold, 0.5, 1)
    known = labels >= 0
    labels, p_clean, probabilities = labels.float(), p_clean.float().masked_fill(~known, 0), probabilities.float()
    clean = p_clean > 0.5
    if trust_positives:
        clean = clean | (labels > 0.5)
    confident = (probabilities > threshold) | (probabilities < 1 - threshold)
    relabeled = ~clean & confident if relabel else torch.zeros_like(clean)
    unsure = ~clean & ~relabeled
    refined = torch.where(relabeled, (probabilities > threshold).float(), labels)
    weight = torch.where(unsure, p_clean if ambiguous else torch.zeros_like(p_clean), torch.ones_like(p_clean))
    reliability = relabeled * Reliability.RELABELED.value + unsure * Reliability.AMBIGUOUS.value
    return RefinedLabels(refined, reliability.to(torch.uint8), weight)
