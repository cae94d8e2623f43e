"""Mixing a random batch with a minority batch: images and labels (Eq. 5), and the reliability of the labels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_range
from hf_balancemix.core.keys import keyed_rng
from hf_balancemix.core.label_management import RefinedLabels


def mixing_coefficient(alpha: float, *key: int | str) -> float:
    """lambda of Eq. 5 as a pure function of `key`: max(l, 1 - l) with l ~ Beta(alpha, alpha).

    Args:
        alpha: Beta parameter, finite and >= 0 (the paper uses 4). 0 means no mixing: lambda = 1.
        key: Words, e.g. `(seed, epoch, random index)`.

    Returns:
        float in [0.5, 1].
    """
    check_range("alpha", alpha, 0)
    if alpha == 0:
        return 1.0
    with keyed_rng(*key, "lambda"):
        if 0.01 <= alpha <= 1e6:
            drawn = _beta(alpha).sample().item()
        else:  # whose two gamma variates leave float32; their logarithms do not
            drawn = _log_gamma(alpha).sub(_log_gamma(alpha)).sigmoid().item()
    return max(drawn, 1 - drawn)


def _log_gamma(alpha: float) -> Tensor:
    """The logarithm of a Gamma(alpha, 1) variate, float64: Gamma(alpha) is Gamma(alpha + 1) U^(1 / alpha)."""
    concentration = torch.tensor(alpha + 1, dtype=torch.float64)
    uniform = torch.rand((), dtype=torch.float64)
    return (
        torch.distributions.Gamma(concentration, torch.ones_like(concentration)).sample().log() + uniform.log() / alpha
    )


@cache  # making one takes longer than drawing from it
def _beta(alpha: float) -> torch.distributions.Beta:
    return torch.distributions.Beta(alpha, alpha)


def mix_images(random: Tensor, minority: Tensor, lam: Tensor) -> Tensor:
    """Eq. 5 for images: x = lambda x_R + (1 - lambda) x_M; at lambda = 1 it is `random`, bit for bit.

    Args:
        random, minority: `(B, C, H, W)` float, normalised; or features `(B, D)`. So is what is returned.
        lam: `(B,)` float in [0.5, 1].

    Raises:
        ValueError: The shapes do not fit together.
    """
    return _mix(random, minority, lam, "images")


def mix_labels(random: Tensor, minority: Tensor, lam: Tensor) -> Tensor:
    """Eq. 5 for labels: t = lambda t_R + (1 - lambda) t_M. Refined ones are mixed by :func:`mix_refined_labels`.

    Args:
        random, minority: `(B, K)` float in [0, 1]; -1 where unknown.
        lam: `(B,)` float in [0.5, 1].

    Raises:
        ValueError: The shapes do not fit together.

    Returns:
        The same shape and dtype; -1 (unknown) where either label is. At lambda = 1 it is `random`, bit for bit.
    """
    mixed = _mix(random, minority, lam, "labels")
    # At lambda = 1 the minority instance is not there.
    return mixed.masked_fill((random < 0) | ((minority < 0) & (lam.view(-1, 1) < 1)), -1)


def minority_mixup(
    random_images: Tensor, minority_images: Tensor, random_labels: Tensor, minority_labels: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. 5 on given labels: `(images, labels)` of :func:`mix_images` and :func:`mix_labels`."""
    return mix_images(random_images, minority_images, lam), mix_labels(random_labels, minority_labels, lam)


def _mix(random: Tensor, minority: Tensor, lam: Tensor, name: str) -> Tensor:
    if random.shape != minority.shape or lam.shape != random.shape[:1]:
        raise ValueError(
            f"the shapes of both {name} and lambda are {tuple(random.shape)}, {tuple(minority.shape)} and "
            f"{tuple(lam.shape)}; they must be (B, ...), the same and (B,); pass a partner and a lambda for each."
        )
    if not (random.is_floating_point() and minority.is_floating_point()):
        raise TypeError(
            f"{name} are {random.dtype} and {minority.dtype}; they must be floating point to be mixed; pass x.float()."
        )
    # lerp, not a sum of two products: at lambda = 1 it gives the random instance exactly.
    return torch.lerp(minority, random, lam.to(random.dtype).view(-1, *[1] * (random.ndim - 1)))


def mix_refined_labels(
    random: RefinedLabels, minority: RefinedLabels, lam: Tensor, partner_reliability: bool = True
) -> tuple[Tensor, Tensor]:
    """The labels of Eq. 5 after label-wise management, and their weights for Eq. 10.

    The paper takes the reliability of a mixed label from the random instance alone: a label of the minority instance
    that is probably wrong then counts fully, and one that is right may count for nothing. With `partner_reliability`
    each label keeps its own: BCE is linear in its target, so

        lambda w_R BCE(f, t_R) + (1 - lambda) w_M BCE(f, t_M) = w BCE(f, t)
        with w = lambda w_R + (1 - lambda) w_M and t = (lambda w_R t_R + (1 - lambda) w_M t_M) / w.

    Args:
        random, minority: Of B random instances and of their partners, `(B, K)`.
        lam: `(B,)` float in [0.5, 1].
        partner_reliability: False: as printed.

    Returns:
        `(labels, weights)`, each `(B, K)` float32; labels in [0, 1], or -1 where unknown (as printed: where either of
        both is; else where both are).

    Example:
        >>> code, lam = torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([0.6])
        >>> sure = RefinedLabels(torch.tensor([[0.0]]), code, torch.tensor([[1.0]]))
        >>> doubtful = RefinedLabels(torch.tensor([[1.0]]), code, torch.tensor([[0.1]]))
        >>> [round(x.item(), 4) for x in mix_refined_labels(sure, doubtful, lam)]
        [0.0625, 0.64]
        >>> [round(x.item(), 4) for x in mix_refined_labels(sure, doubtful, lam, partner_reliability=False)]
        [0.4, 1.0]
    """
    if not partner_reliability:
        return mix_labels(random.labels, minority.labels, lam), random.weight
    lam = lam.to(random.weight.dtype).view(-1, 1)
    # An unknown label has the weight 0.
    of_random, of_minority = lam * random.weight, (1 - lam) * minority.weight
    weight = of_random + of_minority
    labels = (of_random * random.labels + of_minority * minority.labels) / weight.clamp(min=1e-12)
    return labels.clamp(0, 1).masked_fill((random.labels < 0) & (minority.labels < 0), -1), weight
