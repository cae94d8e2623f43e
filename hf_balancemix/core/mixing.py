"""Mixing a random batch with a minority batch (Eq. 5)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_balancemix.core.keys import keyed_rng


def mixing_coefficient(alpha: float, *key: int | str) -> float:
    """lambda of Eq. 5 as a pure function of `key`: max(l, 1 - l) with l ~ Beta(alpha, alpha).

    Args:
        alpha: Beta parameter >= 0 (the paper uses 4). 0 means no mixing: lambda = 1.
        key: Words, e.g. `(seed, epoch, random index)`.

    Returns:
        float in [0.5, 1].
    """
    if alpha == 0:
        return 1.0
    with keyed_rng(*key, "lambda"):
        drawn = _beta(alpha).sample().item()
    return max(drawn, 1 - drawn)


@cache  # making one takes longer than drawing from it
def _beta(alpha: float) -> torch.distributions.Beta:
    return torch.distributions.Beta(alpha, alpha)


def minority_mixup(
    random_images: Tensor, minority_images: Tensor, random_labels: Tensor, minority_labels: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. 5: x = lambda x_R + (1 - lambda) x_M, and the same for the labels.

    Args:
        random_images: `(B, C, H, W)` float, normalised.
        minority_images: The same shape.
        random_labels: `(B, K)` float in [0, 1], refined; -1 where unknown.
        minority_labels: The same shape.
        lam: `(B,)` float in [0.5, 1].

    Returns:
        `(images, labels)` of the same shapes; a mixed label is -1 (unknown) where either of its labels is.

    Raises:
        ValueError: The shapes do not fit together.
    """
    if (
        random_images.shape != minority_images.shape
        or random_labels.shape != minority_labels.shape
        or lam.shape != random_images.shape[:1]
        or len(random_labels) != len(lam)
    ):
        raise ValueError(
            f"cannot mix images {tuple(random_images.shape)} with {tuple(minority_images.shape)} and labels "
            f"{tuple(random_labels.shape)} with {tuple(minority_labels.shape)} by lambda {tuple(lam.shape)}; needed: "
            "two equal (B, C, H, W), two equal (B, K) and (B,)."
        )
    by_image = lam.to(random_images.dtype).view(-1, *[1] * (random_images.ndim - 1))
    by_label = lam.to(random_labels.dtype).view(-1, 1)
    # lerp, not a sum of two products: at lambda = 1 it gives the random instance exactly.
    images = torch.lerp(minority_images, random_images, by_image)
    labels = torch.lerp(minority_labels, random_labels, by_label)
    return images, labels.masked_fill((random_labels < 0) | (minority_labels < 0), -1)
