"""Keyed randomness: every random choice outside the model is a pure function of named words.

Nothing here remembers anything, so what is drawn depends neither on the order of the calls, nor on workers, ranks or
how often a run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keyed_seed(*words: int | str) -> int:
    """A 63-bit seed that is a pure function of `words`, the same on every machine and Python version.

    Args:
        words: Integers and strings, e.g. `(seed, epoch, index, "random", view)`. Their order and type count.

    Returns:
        int in [0, 2^63).

    Example:
        >>> keyed_seed(0, 1, "random") == keyed_seed(0, 1, "random")
        True
        >>> keyed_seed(1, 0) == keyed_seed(0, 1)
        False
    """
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*words: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`keyed_seed`."""
    return torch.Generator().manual_seed(keyed_seed(*words))


@contextmanager
def keyed_rng(*words: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator by `words` inside the block and put it back as it was afterwards.

    For library code that takes no generator (torchvision's RandAugment, torch.distributions). CUDA generators are not
    touched.
    """
    generator = torch.random.default_generator
    state = generator.get_state()
    generator.manual_seed(keyed_seed(*words))
    try:
        yield
    finally:
        generator.set_state(state)
