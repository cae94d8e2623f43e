"""NAR (Burgert, Henkel, Demir, "Noise-Adaptive Regularization for Robust Multi-Label Remote Sensing Image
Classification", 2026; arXiv 2601.08446): labels are kept, left out or flipped by the model's confidence, with ELR.

What the paper's code decides of a label, by the last prediction p and four thresholds:

    negative: flipped where p > flip_negative, left out where p > drop_negative, else kept
    positive: flipped where p < flip_positive, left out where p < drop_positive, else kept

A label that is left out is unknown for this epoch; every epoch decides anew about the given labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_range, check_same_shape
from hf_balancemix.methods.elr import ELRSettings, ELRTrainer


@dataclass(frozen=True)
class NARSettings(ELRSettings):
    """The settings of NAR, in addition to those of ELR.

    Which are right depends on the noise: the paper chooses them for each kind. The defaults are those of the one
    complete command that is published with the code, for missing labels, and the code's own for `min_share`.

    Attributes:
        flip_negative, drop_negative: Negative labels are flipped (left out) above this probability; in [0, 1], and
            flip_negative >= drop_negative. 1 flips (leaves out) none.
        flip_positive, drop_positive: Positive labels are flipped (left out) below this; in [0, 1], and
            flip_positive <= drop_positive. 0 flips (leaves out) none.
        min_share: Positive labels are touched only in classes that more than this share of the known labels has
            positive, in [0, 1]: of rare classes they are predicted low whether or not they are right.

    Raises:
        ValueError: A setting is out of its range.
    """

    flip_negative: float = 0.94
    drop_negative: float = 0.54
    flip_positive: float = 0.0
    drop_positive: float = 0.2
    min_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip_negative", "drop_negative", "flip_positive", "drop_positive", "min_share"):
            check_range(name, getattr(self, name), 0, 1)
        for kind, wrong, order in (("negative", -1, "smaller"), ("positive", 1, "larger")):
            flip, drop = getattr(self, f"flip_{kind}"), getattr(self, f"drop_{kind}")
            if (flip - drop) * wrong > 0:
                raise ValueError(
                    f"flip_{kind} is {flip} and drop_{kind} {drop}; the first must not be the {order} one, because "
                    "what is flipped must be surer than what is left out; set both."
                )


def handled_labels(labels: Tensor, probabilities: Tensor, settings: NARSettings | None = None) -> Tensor:
    """What is learned of the given labels for now: each is kept, flipped, or left out.

    Args:
        labels: `(N, K)` given labels of the whole training set in {0, 1}, or -1 where unknown; a signed type. The
            share of positive labels of a class, which `min_share` looks at, is counted in them.
        probabilities: `(N, K)` in [0, 1], the model's, on the same device; where one is not finite the label is kept.
        settings: By default those of :class:`NARSettings`, whose `lam` and `beta` are not used here.

    Returns:
        `(N, K)` of the labels' dtype: 0, 1, or -1 where left out or unknown.

    Raises:
        ValueError: Shapes differ.

    Example:
        >>> handled_labels(torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([[0.1, 0.6, 0.95], [0.6, 0.1, 0.0]]))
        tensor([[ 0, -1,  1],
                [ 1, -1, -1]])
    """
    s, p = settings or NARSettings(), probabilities
    check_same_shape(labels=labels, probabilities=p)
    negative, positive = labels == 0, labels == 1
    positive &= positive.sum(0) > s.min_share * (labels >= 0).sum(0)
    left_out = (negative & (p > s.drop_negative)) | (positive & (p < s.drop_positive))
    handled = labels.masked_fill(left_out, -1)
    handled = handled.masked_fill(negative & (p > s.flip_negative), 1)
    return handled.masked_fill(positive & (p < s.flip_positive), 0)


class NARTrainer(ELRTrainer):
    """NAR: ELR on :func:`handled_labels`, decided anew before each epoch after the warm-up; on Mixup pairs.

    Both instances of a pair have their handled labels. A mixed label is unknown, without a loss and without a
    regulariser, where it was left out of either instance. The predictions are those that the averages of ELR get, of
    un-augmented images; the paper's code takes the ones of its training steps. The averages are of all labels, also of
    those that are left out, as there. In the first `args.label_warmup_epochs` epochs it is ELR.

    The paper's code also decides with an average of the predictions, with a threshold that grows with a class's share
    of positive labels, or with two networks; all three are off by default there, and are not here.

    Arguments are those of :class:`ELRTrainer`; `settings` are :class:`NARSettings`. Of `args`, `label_warmup_epochs`
    is used, too.

    Attributes:
        labels: `(N, K)` int8 on the CPU, what is learned in this epoch: 0, 1, or -1 where left out or unknown; the
            same on every rank, and in every checkpoint.

    Raises:
        TypeError: The settings are those of another method.
    """

    method_name = "nar"
    citation = """@misc{burgert2026nar,
  title         = {Noise-Adaptive Regularization for Robust Multi-Label Remote Sensing Image Classification},
  author        = {Burgert, Tom and Henkel, Julia and Demir, Beg{\\"u}m},
  year          = {2026},
  eprint        = {2601.08446},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CV}
}"""
    _ends_warmup = True
    _default_settings = NARSettings()
    settings: NARSettings

    def _forget(self) -> None:
        super()._forget()
        self.labels = torch.zeros(0, 0, dtype=torch.int8) if self.train_labels is None else self._dense_labels()

    def _labels(self, inputs: dict[str, Tensor], prefix: str) -> Tensor:
        return self._rows(self.labels, inputs, prefix).to(inputs["labels"])

    def _learn(self, probabilities: Tensor, epoch: int) -> None:
        super()._learn(probabilities, epoch)
        if epoch < self.warmup_epochs:
            return
        given = self._dense_labels()
        self.labels = handled_labels(given, probabilities, self.settings)
        groups = {
            "left_out": (self.labels < 0) & (given >= 0),
            "made_positive": (self.labels == 1) & (given == 0),
            "made_negative": (self.labels == 0) & (given == 1),
        }
        self.log({f"nar_{name}": group.double().mean().item() for name, group in groups.items()})

    def _run_state(self) -> dict[str, Tensor]:
        return super()._run_state() | {"labels": self.labels}

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        self.labels = state["labels"]
