"""Ids of images, and draws that are a pure function of (seed, image_id, class)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import datasets
import numpy as np

from hf_balancemix.data.labels import column_feature
from hf_balancemix.files import quote

NUMBER_ROWS = "number the rows: dataset.add_column('image_id', list(range(len(dataset))))"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def checked_seed(seed: Any) -> int:
    """The seed of noise or of a split; ValueError unless it is an integer of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed is {quote(seed)}; it must be an integer of at least 0; pass for instance 0.")
    return int(seed)


def read_ids(
    dataset: datasets.Dataset, *, unique: bool = False, dataset_name: str = "the data set"
) -> list[int | str]:
    """The column `image_id`; no other column is read.

    ValueError where it is absent, holds something else than integers and strings or, with `unique`, an id twice (an
    integer and its decimal string are the same); the message calls the data set `dataset_name`.
    """
    column_feature(dataset, "image_id", NUMBER_ROWS)
    ids = plain_ids(dataset.select_columns(["image_id"]).with_format("arrow")[:]["image_id"].to_pylist())
    if unique and ids:
        image_id, times = Counter(map(str, ids)).most_common(1)[0]
        if times > 1:
            problem = f"image_id {quote(image_id)} occurs {times} times in {dataset_name}; it must be unique"
            raise ValueError(f"{problem}; dataset.remove_columns('image_id') and {NUMBER_ROWS}.")
    return ids


def plain_ids(image_ids: Iterable[Any]) -> list[int | str]:
    """Ids in an array, a tensor or any iterable as integers and strings; ValueError for anything else."""
    values = image_ids.tolist() if hasattr(image_ids, "tolist") else list(image_ids)
    values = [value.item() if hasattr(value, "item") else value for value in values]
    for row, value in enumerate(values):
        if type(value) not in (int, str):  # exact types: True is no id
            raise ValueError(
                f"row {row}: image_id is {quote(value)}; it must be an integer or a string; convert the column."
            )
    return values


def id_words(image_ids: Iterable[Any]) -> np.ndarray:
    """Hash image ids to (N,) uint64 words; an integer and its decimal string give the same word."""
    return np.array([hashed(str(value)) for value in plain_ids(image_ids)], dtype=np.uint64)


def hashed(text: str) -> int:
    """A text as a number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int, words: np.ndarray, counters: np.ndarray | int) -> np.ndarray:
    """Counter-based draws in [0, 1) with 53 bits: SplitMix64, started at a mix of key and word, after `counter` steps.

    Args:
        key: 64-bit number that chooses the stream.
        words: uint64 array, such as from `id_words`.
        counters: Integers from 0, broadcast against `words`.

    Returns:
        float64 array of the broadcast shape.
    """
    start = _mix(words ^ np.uint64(key))
    steps = np.atleast_1d(counters).astype(np.uint64) + np.uint64(1)  # arrays wrap around, scalars would warn
    return (_mix(start + steps * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit words (wraps around on purpose)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
