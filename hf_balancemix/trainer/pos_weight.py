"""The weight of the positive labels of each class in binary cross-entropy."""

from __future__ import annotations

import json
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.given_labels import compressed_labels, label_counts


def check_pos_weight(value: Any) -> str | list[float] | float | None:
    """`"balanced"`, one number, a list of them, or None; as text also JSON. Others are a ValueError."""
    if value is None or value == "balanced":
        return value
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
    numbers = list(parsed) if isinstance(parsed, (list, tuple)) else [parsed]
    if not numbers or not all(type(x) in (int, float) and 0 < x < float("inf") for x in numbers):
        raise ValueError(
            f"pos_weight is {value!r}; it must be 'balanced', or one positive finite number or a list of them, one a "
            "class, such as '[1, 2.5, 4]'; leave it out for 1."
        )
    return [float(x) for x in numbers] if isinstance(parsed, (list, tuple)) else float(numbers[0])


def positive_weights(value: Any, labels: Tensor | csr_array) -> Tensor | None:
    """`pos_weight` as `(K,)` float32 for K classes; None for None.

    Args:
        value: As :func:`check_pos_weight` takes it. `"balanced"`: number of negative labels over that of positive
            ones, class by class, so that both weigh the same in total; 1 for a class that lacks either.
        labels: `(N, K)` given training labels in {0, 1}; -1 (unknown) counts as neither; dense or sparse.

    Raises:
        ValueError: As there, or the list has not K numbers.

    Example:
        >>> positive_weights("balanced", torch.tensor([[1, 0], [0, 0], [0, 0], [-1, 0]]))
        tensor([2., 1.])
    """
    value, num_classes = check_pos_weight(value), labels.shape[1]
    if value is None:
        return None
    if value == "balanced":
        negative, positive = label_counts(compressed_labels(labels))
        return torch.where((positive > 0) & (negative > 0), negative / positive, 1.0).float()
    if isinstance(value, list) and len(value) != num_classes:
        raise ValueError(
            f"pos_weight holds {len(value)} numbers; it must hold {num_classes}, one a class; or pass 'balanced'."
        )
    return torch.tensor(value).expand(num_classes).clone()
