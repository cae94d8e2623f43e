"""What the functions of `core` refuse."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise a ValueError that names the setting unless it is one of the known words."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a ValueError that names the setting unless it is finite and low <= value <= high."""
    if not (low <= value <= high and math.isfinite(value)):
        limits = f"finite and at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        limits = "finite" if low == -math.inf else limits
        raise ValueError(f"{name} is {value}; it must be {limits}.")


def check_same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError that names the tensors unless all are matrices of one shape."""
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        found = ", ".join(map(str, shapes))
        raise ValueError(
            f"the shapes of {', '.join(tensors)} are {found}; all must be the same shape (B, K); pass one number for "
            "each label."
        )


def check_given_labels(labels: Tensor) -> None:
    """Raise a ValueError with the first bad value unless all labels are 0, 1 or -1 (unknown), of any dtype."""
    invalid = (labels != 0) & (labels != 1) & (labels != -1)
    if invalid.any():
        raise ValueError(
            f"labels hold {labels[invalid][0].item():g}; each must be 0, 1 or -1 (unknown); pass the given labels, "
            "not mixed or soft ones."
        )


def checked_positive(labels: Tensor, values: Tensor, name: str) -> Tensor:
    """Which labels are positive, bool, on their device; an error unless there is a 0 or 1 for each float of `values`.

    Labels that are bool already can be nothing else, so their values are not looked at.
    """
    if not values.is_floating_point():
        raise TypeError(f"{name} are {values.dtype}; they must be floating point; pass {name}.float().")
    if labels.shape != values.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and {name} {tuple(values.shape)}; they must be the same; pass "
            "one label for each value."
        )
    positive = labels.bool()
    if labels.dtype != torch.bool and not torch.equal(positive.to(labels.dtype), labels):
        wrong = labels[positive.to(labels.dtype) != labels][0].item()
        raise ValueError(f"labels hold {wrong:g}; each must be 0 or 1; pass the given labels, not mixed or soft ones.")
    return positive


def checked_num_classes(values: Tensor, name: str, num_classes: int | None = None) -> int:
    """K of `(N, K)` values; an error if they are anything else, or another K than expected."""
    if values.dim() != 2 or values.shape[1] != (num_classes or values.shape[1]) or values.shape[1] == 0:
        raise ValueError(
            f"{name} have shape {tuple(values.shape)}; they must be (instances, {num_classes or 'classes'}); pass one "
            "column for each class."
        )
    return values.shape[1]
