"""How to split a data set so that each part is like the whole, and what two parts share."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import datasets
import numpy as np

from hf_balancemix.data.labels import column_feature, given_labels
from hf_balancemix.data.noise.draws import checked_seed, hashed, id_words, read_ids, uniform
from hf_balancemix.data.views import undecoded_images
from hf_balancemix.files import quote

logger = logging.getLogger(__name__)


def iterative_split(
    dataset: datasets.Dataset,
    sizes: Sequence[int] | Sequence[float],
    seed: int = 0,
    groups: str | Sequence[Any] | None = None,
) -> list[datasets.Dataset]:
    """Split a data set so that each part has its share of every class.

    Iterative stratification after Sechidis, Tsoumakas and Vlahavas (ECML PKDD 2011), with exact sizes. The class with
    the fewest positive labels left is dealt out first, each of its instances to the part that lacks most of that
    class, then to the part with most room, then by a draw; instances without positive labels go where there is most
    room. Unknown labels (`unknown_labels`) are no negatives: among the instances without positive labels they are
    dealt out in the same way, so that they keep their shares as far as those instances can even them out.

    With `groups` all instances of a group, such as a patient's, go to one part, large groups first; sizes are then met
    as nearly as the groups allow.

    The parts are a function of `sizes`, `seed` and the instances' ids and labels: neither the order of the rows nor
    the machine matters. Rows keep their order within a part.

    Args:
        dataset: With `labels` and a unique `image_id`, optionally `unknown_labels`.
        sizes: The parts' sizes: integers that sum to N, or fractions that sum to 1.
        seed: Seed of the order and of the draws, at least 0.
        groups: A column of the data set, or N values: instances with the same value stay together.

    Returns:
        The parts, in the order of `sizes`.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or a label column is of another type.
        ValueError: `sizes` are not all positive integers or all positive fractions, do not sum to N or 1, or leave a
            part empty; `image_id` is absent or not unique; labels as in `describe`; or `groups` are no column or not
            N values, or too few.

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
    if groups is None:
        part[order] = _deal(columns[order], given.shape[1], counts, tie_breaks[order].tolist())
    else:
        part[order] = _deal_groups(columns[order], _group_numbers(dataset, groups, order), given.shape[1], counts)
        if empty := set(range(len(counts))) - set(part.tolist()):
            needed = "it must have at least one group for each part; split into fewer parts"
            raise ValueError(f"groups leave part {min(empty)} of {len(counts)} empty; {needed}, or by finer groups.")
    parts = [dataset.select(np.flatnonzero(part == j)) for j in range(len(counts))]
    if dataset.split is not None:
        for j, selected in enumerate(parts, start=1):  # so that nobody takes what is held out for what was trained on
            selected._split = datasets.NamedSplit(f"{dataset.split}.part{j}of{len(parts)}")
    return parts


def _group_numbers(dataset: datasets.Dataset, groups: str | Sequence[Any], order: np.ndarray) -> np.ndarray:
    """`(N,)` int64: the groups of the instances in `order`, numbered as they first occur."""
    if isinstance(groups, str):
        column_feature(dataset, groups, "pass the one that says what belongs together (groups=...)")
        groups = dataset.select_columns([groups]).with_format(None)[:][groups]
    values = list(groups)
    if len(values) != len(order):
        raise ValueError(
            f"groups has {len(values)} values; it must have {len(order)}, one for each instance; pass so."
        )
    if empty := [row for row, value in enumerate(values) if value is None or value == ""]:
        needed = "each instance must have a group; give those without one a value of their own"
        raise ValueError(f"groups has {quote(values[empty[0]])} for row {empty[0]}; {needed}.")
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(values[i], len(numbers)) for i in order], dtype=np.int64)


def _deal_groups(columns: np.ndarray, group: np.ndarray, num_classes: int, sizes: list[int]) -> np.ndarray:
    """`(N,)` int64: as `_deal`, with every instance in the part of its group, a number for each; groups come in a
    drawn order."""
    members = np.bincount(group)
    order = np.argsort(-members, kind="stable")  # what is hard to place comes first
    counts = np.zeros((len(members), columns.shape[1]), dtype=np.int64)
    np.add.at(counts, group, columns.astype(np.int64))
    part = np.empty(len(members), dtype=np.int64)
    part[order] = _deal(counts[order], num_classes, sizes, [0.0] * len(members), members[order])
    return part[group]


def _deal(
    columns: np.ndarray,
    num_classes: int,
    sizes: list[int],
    tie_breaks: list[float],
    members: np.ndarray | None = None,
) -> np.ndarray:
    """`(N,)` int64: the part of each instance; the `sizes` of the parts sum to N, `tie_breaks` are N draws in [0, 1).

    `columns`, `(N, L)` bool, are what to stratify: `num_classes` of positive labels, then those of unknown ones. With
    `members` the rows are groups of so many instances, the columns numbers, and `sizes` sum to that of all instances.
    """
    members = np.ones(len(columns), dtype=np.int64) if members is None else members
    total = int(members.sum())
    left = columns.sum(axis=0, dtype=np.int64)
    wanted = np.outer(sizes, left)  # in units of 1 / total, so that all of it is exact
    room = list(sizes)
    part = np.full(len(columns), -1, dtype=np.int64)

    def deal(i: int, lack: list[int]) -> None:
        most = max((lack[j], room[j]) for j in range(len(room)) if room[j] > 0)
        equal = [j for j in range(len(room)) if (lack[j], room[j]) == most]
        best = equal[int(tie_breaks[i] * len(equal))]
        part[i] = best
        room[best] -= int(members[i])
        wanted[best] -= total * columns[i]

    while left.any():
        group = left[:num_classes] if left[:num_classes].any() else left
        rarest = int(np.where(group > 0, group, total + 1).argmin())
        having = np.flatnonzero((columns[:, rarest] > 0) & (part < 0))
        left -= columns[having].sum(axis=0, dtype=np.int64)
        for i in having.tolist():
            deal(i, wanted[:, rarest].tolist())
    for i in np.flatnonzero(part < 0).tolist():
        deal(i, [0] * len(room))
    return part


def _part_sizes(sizes: Sequence[Any], num_instances: int) -> list[int]:
    sizes = [size.item() if isinstance(size, np.generic) else size for size in sizes]
    needed = f"they must be positive integers that sum to {num_instances}, or positive fractions that sum to 1"
    if not sizes or any(isinstance(size, bool) or not isinstance(size, Real) or not float(size) > 0 for size in sizes):
        raise ValueError(f"sizes is {quote(sizes)}; {needed}; correct them.")
    whole = [isinstance(size, Integral) for size in sizes]
    if any(whole) != all(whole) or abs(sum(sizes) - (num_instances if all(whole) else 1)) > 1e-6:
        raise ValueError(
            f"sizes is {quote(sizes)}, which sum to {sum(sizes):g}; {needed}; add a part for what is left."
        )
    if all(whole):
        return sizes
    exact = np.array(sizes) * num_instances
    counts = np.floor(exact + 1e-6).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: num_instances - counts.sum()]  # largest remainders
    counts[largest] += 1
    if not counts.all():
        raise ValueError(
            f"sizes is {quote(sizes)}, which leaves a part empty; none must be; give it a larger fraction."
        )
    return counts.tolist()


def warn_of_copies(train: datasets.Dataset, evaluation: datasets.Dataset) -> int:
    """Warn where an image of the evaluation set is in the training set, too, byte for byte; how many are.

    Only files of the same size are read whole.
    """
    images = [undecoded_images(dataset) for dataset in (train, evaluation)]
    rows: list[dict[int, list[int]]] = [defaultdict(list), defaultdict(list)]  # of each data set, by number of bytes
    for of_size, dataset in zip(rows, images, strict=True):
        for row, size in enumerate(map(_num_bytes, dataset)):
            of_size[size].append(row)
    copies = []
    for size in sorted((rows[0].keys() & rows[1].keys()) - {0}):
        known = {_digest(images[0][row]) for row in rows[0][size]}
        copies += [row for row in rows[1][size] if _digest(images[1][row]) in known]
    if copies:
        name = images[1][copies[0]]["image"]["path"] or f"the one in row {copies[0]}"
        text = (
            "%d of %d evaluation images are in the training set, too (the same bytes), such as %s: figures will be "
            "too good; leave them out of one of the two."
        )
        logger.warning(text, len(copies), len(evaluation), name)
    return len(copies)


def _num_bytes(row: dict[str, Any]) -> int:
    """0 where there is no image."""
    image = row["image"] or {}
    if image.get("bytes") is not None:
        return len(image["bytes"])
    path = image.get("path") or ""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _digest(row: dict[str, Any]) -> bytes:
    if (content := row["image"]["bytes"]) is not None:
        return hashlib.blake2b(content).digest()
    with open(row["image"]["path"], "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()
