"""ELR (Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS 2020; arXiv
2007.00151) for multi-label images, a sigmoid for each class, as NAR uses it (Burgert et al., arXiv 2601.08446).

A network learns the clean labels first and the wrong ones later. What it predicted early is kept as a moving average
t of its predictions, for each instance and class, and a regulariser holds later predictions to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_balancemix.core import mix_labels
from hf_balancemix.core.checks import check_range, check_same_shape
from hf_balancemix.core.losses import binary_cross_entropy
from hf_balancemix.core.losses._base import prepare, reduce
from hf_balancemix.trainer.mixup import MixupTrainer

_EDGE = 1e-4  # predictions enter the average no nearer to 0 and 1, as published: the logarithm stays finite


@dataclass(frozen=True)
class ELRSettings:
    """The settings of ELR; the defaults are those of NAR's code, and of ELR's for CIFAR-10 with labels flipped evenly.

    Attributes:
        lam: Strength of the regulariser, finite and >= 0; 0 is plain BCE.
        beta: Share of the old average in the new one, in [0, 1].

    Raises:
        ValueError: A setting is out of its range.
    """

    lam: float = 3.0
    beta: float = 0.7

    def __post_init__(self) -> None:
        check_range("lam", self.lam, 0)
        check_range("beta", self.beta, 0, 1)

    @property
    def changed(self) -> dict[str, Any]:
        """Those that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def updated_targets(targets: Tensor, probabilities: Tensor, beta: float) -> Tensor:
    """The moving average after one more prediction: beta t + (1 - beta) p.

    Args:
        targets: `(N, K)` float32 in [0, 1); 0 before the first prediction.
        probabilities: `(N, K)` in [0, 1], cut to [0.0001, 0.9999]; where it is not finite, t stays as it is.
        beta: In [0, 1].

    Returns:
        `(N, K)` float32 in [0, 0.9999].

    Example:
        >>> updated_targets(torch.tensor([[0.0, 0.5]]), torch.tensor([[0.5, 1.0]]), 0.8)
        tensor([[0.1000, 0.6000]])
    """
    new = beta * targets + (1 - beta) * probabilities.clamp(_EDGE, 1 - _EDGE)
    return torch.where(torch.isfinite(probabilities), new, targets)


def elr_loss(logits: Tensor, labels: Tensor, targets: Tensor, lam: float = 3.0, reduction: str = "sum") -> Tensor:
    """BCE on the given labels, and lam log(1 - p t) for each label, with p = sigmoid(logit).

    The regulariser's gradient in the logit, -lam t p (1 - p) / (1 - p t), raises what was predicted high before, so
    that a positive label that is missing is not unlearned. What was predicted low it leaves alone: against positive
    labels that are wrong it does nothing (docs/choices.md). Under Mixup labels and t are soft.

    Args:
        logits, labels, reduction: As :func:`~hf_balancemix.core.binary_cross_entropy`, which also says what is
            returned and raised; the regulariser is reduced like the BCE, unknown labels (-1) have none.
        targets: `(B, K)` in [0, 1), the averages t; no gradient flows to them.
        lam: >= 0.

    Example:
        >>> logits, labels = torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> round(elr_loss(logits, labels, torch.tensor([[0.6]]), lam=1.0).item(), 4)  # ln 2 + ln 0.7
        0.3365
    """
    x, _, known = prepare(logits, labels)
    check_same_shape(logits=logits, targets=targets)
    p, t = x.sigmoid(), targets.detach().to(x)
    regulariser = reduce(torch.log1p(-p * t), known, reduction)
    return binary_cross_entropy(logits, labels, reduction=reduction) + lam * regulariser


class ELRTrainer(MixupTrainer):
    """ELR on Mixup pairs.

    Before each epoch but the first, one pass over the training set predicts every instance, un-augmented, and updates
    its average. In the paper, too, that happens once an epoch, but by the predictions of the training steps; here a
    step sees a mixed image, which is no instance's. A pair's averages are mixed like its labels, as in the paper's
    ELR+. So neither the number of ranks nor the split of a batch matters.

    Arguments are those of :class:`MixupTrainer`.

    Args:
        settings: By default those of :class:`ELRSettings`.

    Attributes:
        targets: `(N, K)` float32 on the CPU, the averages; the same on every rank, and in every checkpoint.

    Raises:
        TypeError: The settings are those of another method.
    """

    method_name = "elr"
    citation = """@inproceedings{liu2020early,
  title     = {Early-Learning Regularization Prevents Memorization of Noisy Labels},
  author    = {Liu, Sheng and Niles-Weed, Jonathan and Razavian, Narges and Fernandez-Granda, Carlos},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}"""
    _loss_is_the_method = True
    takes_pos_weight = False
    _default_settings = ELRSettings()

    def __init__(self, *args: Any, settings: ELRSettings | None = None, **kwargs: Any) -> None:
        self.settings = settings or self._default_settings
        if type(self.settings) is not type(self._default_settings):
            wanted = type(self._default_settings).__name__
            raise TypeError(f"settings is an {type(self.settings).__name__}; it must be {wanted}; pass one.")
        super().__init__(*args, **kwargs)
        self.method_settings = self.settings.changed  # for model cards
        self._forget()

    def _forget(self) -> None:
        self.targets = torch.zeros((0, 0) if self.train_labels is None else self.train_labels.shape)

    def _end_epoch(self, epoch: int) -> None:
        self._learn(self._scan_table(lambda logits, labels: logits.sigmoid()), epoch)

    def _learn(self, probabilities: Tensor, epoch: int) -> None:
        """What `epoch`, about to begin, needs of the model's `(N, K)` predictions, which every rank has alike."""
        self.targets = updated_targets(self.targets, probabilities, self.settings.beta)

    def _rows(self, table: Tensor, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        """`(B, K)` of an `(N, K)` table, for the random instances (prefix "") or their partners ("minority_")."""
        return table[inputs[f"{prefix}index"].cpu()].to(inputs["labels"].device)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        averages = self._rows(self.targets, inputs, "")
        if "lam" in inputs:
            averages = mix_labels(averages, self._rows(self.targets, inputs, "minority_"), self._lam(inputs))
        return elr_loss(logits, targets, averages, self.settings.lam, self.args.loss_reduction)

    # ---- checkpoints ----

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"settings": asdict(self.settings)}

    def _run_state(self) -> dict[str, Tensor]:
        return super()._run_state() | {"targets": self.targets}

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self._forget()

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        self.targets = state["targets"]
