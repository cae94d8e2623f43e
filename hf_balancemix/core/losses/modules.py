"""The losses as modules, for code that wants an object."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_balancemix.core.losses.distribution_balanced import db_loss
from hf_balancemix.core.losses.focusing import asymmetric_loss, focal_loss
from hf_balancemix.core.losses.large_loss import large_loss, num_large_losses
from hf_balancemix.core.losses.missing_labels import hill_loss, splc_loss


class _Loss(nn.Module):
    """Keeps the settings that its function is called with."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


class FocalLoss(_Loss):
    """:func:`focal_loss` of (logits, targets)."""

    def __init__(self, gamma: float = 2.0, alpha: float | None = None, reduction: str = "mean") -> None:
        super().__init__(gamma=gamma, alpha=alpha, reduction=reduction)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return focal_loss(logits, targets, **self.settings)


class AsymmetricLoss(_Loss):
    """:func:`asymmetric_loss` of (logits, targets)."""

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        margin: float = 0.05,
        detach_weight: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            gamma_neg=gamma_neg, gamma_pos=gamma_pos, margin=margin, detach_weight=detach_weight, reduction=reduction
        )

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return asymmetric_loss(logits, targets, **self.settings)


class HillLoss(_Loss):
    """:func:`hill_loss` of (logits, targets)."""

    def __init__(self, lam: float = 1.5, margin: float = 1.0, gamma: float = 2.0, reduction: str = "mean") -> None:
        super().__init__(lam=lam, margin=margin, gamma=gamma, reduction=reduction)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return hill_loss(logits, targets, **self.settings)


class SPLCLoss(_Loss):
    """:func:`splc_loss` of (logits, targets, epoch)."""

    def __init__(
        self,
        threshold: float = 0.6,
        margin: float = 1.0,
        gamma: float = 2.0,
        first_epoch: int = 1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(threshold=threshold, margin=margin, gamma=gamma, first_epoch=first_epoch, reduction=reduction)

    def forward(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        return splc_loss(logits, targets, epoch, **self.settings)


class DBLoss(_Loss):
    """:func:`db_loss` of (logits, targets); the class counts are a buffer.

    Args:
        class_counts: `(K,)` positive training labels of each class.
        num_instances: N.
        settings: The other arguments of :func:`db_loss`.
    """

    class_counts: Tensor

    def __init__(self, class_counts: Tensor, num_instances: int, **settings: Any) -> None:
        super().__init__(num_instances=num_instances, **settings)
        self.register_buffer("class_counts", class_counts.clone())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return db_loss(logits, targets, self.class_counts.to(logits.device), **self.settings)


class LargeLoss(_Loss):
    """:func:`large_loss` of (logits, labels, epoch): `delta` per cent more modified labels an epoch, from 0 on."""

    def __init__(self, delta: float = 0.2, mode: str = "reject", reduction: str = "mean") -> None:
        super().__init__(mode=mode, reduction=reduction)
        self.delta = delta

    def forward(self, logits: Tensor, labels: Tensor, epoch: int) -> Tensor:
        num_modified = num_large_losses(logits.numel(), epoch, self.delta)
        return large_loss(logits, labels, num_modified, **self.settings)
