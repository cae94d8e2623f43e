"""How to split a data set so that each part is like the whole."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import datasets
import numpy as np

from hf_balancemix.data.labels import given_labels
from hf_balancemix.data.noise.draws import checked_seed, hashed, id_words, read_ids, uniform


def iterative_split(
    dataset: datasets.Dataset, sizes: Sequence[int] | Sequence[float], seed: int = 0
) -> list[datasets.Dataset]:
    """Split a data set so that each part has its share of every class.

    Iterative stratification after Sechidis, Tsoumakas and Vlahavas (ECML PKDD 2011), with exact sizes. The class with
    the fewest positive labels left is dealt out first, each of its instances to the part that lacks most of that
    class, then to the part with most room, then by a draw; instances without positive labels go where there is most
    room. Unknown labels (`unknown_labels`) are no negatives: among the instances without positive labels they are
    dealt out in the same way, so that they keep their shares as far as those instances can even them out.

    The parts are a function of `sizes`, `seed` and the instances' ids and labels: neither the order of the rows nor
    the machine matters. Rows keep their order within a part.

    Args:
        dataset: With `labels` and a unique `image_id`, optionally `unknown_labels`.
        sizes: The parts' sizes: integers that sum to N, or fractions that sum to 1.
        seed: Seed of the order and of the draws, at least 0.

    Returns:
        The parts, in the order of `sizes`.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or a label column is of another type.
        ValueError: `sizes` are not all positive integers or all positive fractions, do not sum to N or 1, or leave a
            part empty; `image_id` is absent or not unique; labels as in `describe`.

    Example:
        >>> train, val = iterative_split(dataset, [0.9, 0.1])  # doctest: +SKIP
    """
    key = hashed(f"iterative_split/{checked_seed(seed)}")
    given = given_labels(dataset).numpy()
    counts = _part_sizes(sizes, len(given))
    words = id_words(read_ids(dataset, unique=True))
    order = np.argsort(uniform(key, words, 0), kind="stable")
    tie_breaks = uniform(key, words, 1)
    unknown = given < 0
    columns = np.hstack([given == 1, unknown[:, unknown.any(axis=0)]])
    part = np.empty(len(given), dtype=np.int64)
    part[order] = _deal(columns[order], given.shape[1], counts, tie_breaks[order].tolist())
    return [dataset.select(np.flatnonzero(part == j)) for j in range(len(counts))]


def _deal(columns: np.ndarray, num_classes: int, sizes: list[int], tie_breaks: list[float]) -> np.ndarray:
    """`(N,)` int64: the part of each instance; the `sizes` of the parts sum to N, `tie_breaks` are N draws in [0, 1).

    `columns`, `(N, L)` bool, are what to stratify: `num_classes` of positive labels, then those of unknown ones.
    """
    left = columns.sum(axis=0, dtype=np.int64)
    wanted = np.outer(sizes, left)  # in units of 1 / N, so that all of it is exact
    room = list(sizes)
    part = np.full(len(columns), -1, dtype=np.int64)

    def deal(i: int, lack: list[int], present: np.ndarray) -> None:
        most = max((lack[j], room[j]) for j in range(len(room)) if room[j])
        equal = [j for j in range(len(room)) if (lack[j], room[j]) == most]
        best = equal[int(tie_breaks[i] * len(equal))]
        part[i] = best
        room[best] -= 1
        wanted[best, present] -= len(columns)

    while left.any():
        group = left[:num_classes] if left[:num_classes].any() else left
        rarest = int(np.where(group > 0, group, len(columns) + 1).argmin())
        members = np.flatnonzero(columns[:, rarest] & (part < 0))
        left -= columns[members].sum(axis=0, dtype=np.int64)
        for i in members.tolist():
            deal(i, wanted[:, rarest].tolist(), np.flatnonzero(columns[i]))
    nothing = np.empty(0, dtype=np.int64)
    for i in np.flatnonzero(part < 0).tolist():
        deal(i, [0] * len(room), nothing)
    return part


def _part_sizes(sizes: Sequence[Any], num_instances: int) -> list[int]:
    sizes = [size.item() if isinstance(size, np.generic) else size for size in sizes]
    needed = f"they must be positive integers that sum to {num_instances}, or positive fractions that sum to 1"
    if not sizes or any(isinstance(size, bool) or not isinstance(size, Real) or not float(size) > 0 for size in sizes):
        raise ValueError(f"sizes is {sizes}; {needed}; correct them.")
    whole = [isinstance(size, Integral) for size in sizes]
    if any(whole) != all(whole) or abs(sum(sizes) - (num_instances if all(whole) else 1)) > 1e-6:
        raise ValueError(f"sizes is {sizes}, which sum to {sum(sizes):g}; {needed}; add a part for what is left.")
    if all(whole):
        return sizes
    exact = np.array(sizes) * num_instances
    counts = np.floor(exact + 1e-6).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: num_instances - counts.sum()]  # largest remainders
    counts[largest] += 1
    if not counts.all():
        raise ValueError(f"sizes is {sizes}, which leaves a part empty; none must be; give it a larger fraction.")
    return counts.tolist()
