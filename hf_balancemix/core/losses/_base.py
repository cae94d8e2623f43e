"""What every loss here shares: the protocol of a loss object, the reductions, and a few numerical helpers."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

LOSS_REDUCTIONS = ("sum", "mean")  # those that give a scalar
REDUCTIONS = (*LOSS_REDUCTIONS, "none")


class MultiLabelLoss(nn.Module):
    """A loss that owns its settings and its citation: what a trainer, a model card and the command line need of it.

    The protocol of all losses is `loss(logits, targets, epoch)`, with logits `(B, K)`, targets `(B, K)` in [0, 1]
    (mixed labels are soft; -1 where unknown) and the epoch counted from 0, which most of them ignore; it returns a
    float32 (float64 for float64 logits) scalar that is a mean over B. What a loss must know of the training data it
    gets when it is made.

    A subclass takes its settings as keyword arguments with defaults, in plain types (bool, int, float, str or None),
    and hands them on to this constructor, which keeps each under its name: tensors as buffers, the others as
    attributes.

    Attributes:
        citation: BibTeX of the paper; None where there is none to cite.
    """

    citation: ClassVar[str | None] = None

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._setting_names = tuple(name for name, value in settings.items() if not isinstance(value, Tensor))
        for name, value in settings.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value.clone())
            else:
                setattr(self, name, value)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, by name, without tensors."""
        return {name: getattr(self, name) for name in self._setting_names}

    @property
    def changed_settings(self) -> dict[str, Any]:
        """Those that differ from their defaults, but for the reduction, which is the trainer's."""
        known = inspect.signature(type(self)).parameters
        return {
            name: value
            for name, value in self.settings.items()
            if name != "reduction" and known[name].default not in (inspect.Parameter.empty, value)
        }

    def forward(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """The loss; see the class."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    def _refuse_bad_settings(self, num_classes: int = 1) -> None:
        """The last line of a constructor: what its function refuses is refused now, and not in the first step."""
        zeros = torch.zeros(1, num_classes)
        self(zeros, zeros, 0)


def prepare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float32 (float64 stays), targets in the same dtype with 0 for unknown ones, and where they are known.

    Raises:
        ValueError: Not two matrices of the same shape.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits have the shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; both must have the same "
            "shape (B, K)."
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = targets >= 0
    return logits, targets.to(logits.dtype) * known, known


def reduce(losses: Tensor, known: Tensor, reduction: str) -> Tensor:
    """`(B, K)` losses with 0 for unknown labels, or the mean over B of their sum (`"sum"`) or mean (`"mean"`) over K.

    Unknown labels stay in the denominators, so that gradients do not depend on how a batch is split over ranks and
    accumulation steps.

    Raises:
        ValueError: The reduction is unknown.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
    losses = losses.masked_fill(~known, 0)
    if reduction == "none":
        return losses
    return (losses.sum(1) if reduction == "sum" else losses.mean(1)).mean()


def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """`base ** exponent` for base in [0, 1], whose gradient is finite at 0 for exponents below 1 as well."""
    return base.clamp(min=torch.finfo(base.dtype).tiny) ** exponent


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise a ValueError that names the setting unless low <= value <= high."""
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} is {value}; it must be {limits}.")
