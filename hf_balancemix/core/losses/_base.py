"""What every loss here shares: the protocol of a loss object, the reductions, and a few numerical helpers."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_balancemix.core.checks import check_choice, check_same_shape

LOSS_REDUCTIONS = ("sum", "mean")  # those that give a scalar
REDUCTIONS = (*LOSS_REDUCTIONS, "none")


@dataclass(eq=False, repr=False)
class MultiLabelLoss(nn.Module):
    """A loss that owns its settings and its citation: what a trainer, a model card and the command line need of it.

    The protocol of all losses is `loss(logits, targets, epoch)`, with logits `(B, K)`, targets `(B, K)` in [0, 1]
    (mixed labels are soft; -1 where unknown) and the epoch counted from 0, which most of them ignore; it returns a
    float32 (float64 for float64 logits) scalar that is a mean over B. What a loss must know of the training data it
    gets when it is made.

    A subclass is a dataclass. Its fields with a default are the settings, in plain types (bool, int, float, str or
    None); tensors become buffers. What its `forward` refuses, it refuses when it is made.

    Attributes:
        citation: BibTeX of the paper; None where there is none to cite.
    """

    citation: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__init__()
        num_classes = 1
        for name, value in [(field.name, getattr(self, field.name)) for field in fields(self)]:
            if isinstance(value, Tensor):
                delattr(self, name)
                self.register_buffer(name, value.clone())
                num_classes = len(value)
        zeros = torch.zeros(1, num_classes)
        self(zeros, zeros, 0)  # refuses bad settings now, and not in the first step

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, by name, without tensors."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self._buffers}

    @property
    def changed_settings(self) -> dict[str, Any]:
        """Those that differ from their defaults, but for the reduction, which is the trainer's."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return {
            name: value
            for name, value in self.settings.items()
            if name in defaults and name != "reduction" and value != defaults[name]
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def prepare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(B, K)` logits in float32 (float64 stays) and targets alike, both 0 where unknown, and which are known.

    So what stands at an unknown label changes nothing, be it infinite or NaN. Targets can be of any dtype; whole
    numbers above 1 (such as -1 in uint8) are a ValueError.
    """
    check_same_shape(logits=logits, targets=targets)
    if not (targets.is_floating_point() or targets.dtype == torch.bool) and (targets > 1).any():
        raise ValueError(
            f"targets hold {int(targets.max())}; each must be in [0, 1], or -1 (unknown) in a signed type."
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = targets >= 0
    return logits.masked_fill(~known, 0), targets.to(logits.dtype).masked_fill(~known, 0), known


def reduce(losses: Tensor, known: Tensor, reduction: str) -> Tensor:
    """`(B, K)` losses with 0 for unknown labels, or the mean over B of their sum (`"sum"`) or mean (`"mean"`) over K.

    Unknown labels stay in the denominators, so that gradients do not depend on how a batch is split over ranks and
    accumulation steps. An empty batch costs 0.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    losses = losses.masked_fill(~known, 0)
    if reduction == "none":
        return losses
    if losses.numel() == 0:
        return losses.sum()  # a mean would be NaN
    return (losses.sum(1) if reduction == "sum" else losses.mean(1)).mean()


def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """`base ** exponent` for base in [0, 1], whose gradient is finite at 0 for exponents below 1 as well."""
    return base.clamp(min=torch.finfo(base.dtype).tiny) ** exponent
