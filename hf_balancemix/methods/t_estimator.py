"""T-estimator (Li et al., NeurIPS 2022; arXiv 2309.12706): a noise transition matrix for each class.

T_k[i, j] = P(given label of class k is j | its clean label is i).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_balancemix.core import label_losses
from hf_balancemix.core.checks import check_same_shape
from hf_balancemix.core.distributed import broadcast
from hf_balancemix.core.losses._base import prepare, reduce
from hf_balancemix.methods.co_teaching import min_max, select_clean_labels
from hf_balancemix.trainer.mixup import MixupTrainer

_SOURCES = ("identity", "dual_t", "correlation")
_RECORDED_EPOCHS = 5  # of the warm-up, its last: losses are averaged over them


def estimate_transition_matrices(
    labels: Tensor, selected: Tensor, probabilities: Tensor | None = None, *, min_selected: int = 50
) -> Tensor:
    """Transition matrices of K binary labels by label correlations, without a look at any clean label.

    For class i and each other class k, with joint frequencies n_ab of the given labels (a: of i, b: of k), and c_ab
    the frequency of k's given label b among the selected labels a of i, which are taken to be clean:

        pi = (n00 + n10 - c00) / (c10 - c00)                       share of clean positives of i, from k
        P1b = pi c1b, P0b = (1 - pi) c0b                           clean label of i with given label of k
        D = P00 P11 - P01 P10
        T01 = -(P10 n11 - P11 n10) / D, T10 = (P00 n01 - P01 n00) / D

    Each k with pi in [0, 1], T01 and T10 in [0, 1] (values in (-0.3 / K, 0) count as 0) and T01 + T10 < 1 is a
    candidate; the one that fits the equations of all k with pi in [0, 1] best (smallest sum of absolute residuals) is
    taken. A class without one, or with fewer than `min_selected` selected positive or negative labels, falls back on
    Dual-T (Yao et al., NeurIPS 2020): the anchor points' probabilities times the row-normalised confusion matrix of
    prediction and given label. Where that is not defined either (a polarity is never predicted), or would call labels
    wrong more often than right, the matrix is the identity: the class is learned as given.

    The estimate relies on the correlation with at least one other class; it is far off for an independent one.

    Args:
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown.
        selected: `(N, K)` bool, given labels that are probably clean.
        probabilities: `(N, K)` in [0, 1], the model's after the warm-up, for Dual-T; None leaves that fallback out.
        min_selected: Fewest selected labels of each polarity that frequencies are taken from.

    Returns:
        `(K, 2, 2)` float64 on the CPU; finite, rows sum to 1, T[0, 1] + T[1, 0] < 1.

    Raises:
        ValueError: Shapes differ or a label is none of 0, 1 and -1.
    """
    check_same_shape(labels=labels, selected=selected, **({} if probabilities is None else {"p": probabilities}))
    if not bool(((labels == 0) | (labels == 1) | (labels == -1)).all()):
        raise ValueError(
            "labels hold values other than 0, 1 and -1; they must be given labels, -1 where unknown; pass those, not "
            "mixed ones."
        )
    return _estimate(labels, selected, probabilities, min_selected)[0]


def _estimate(
    labels: Tensor, selected: Tensor, probabilities: Tensor | None, min_selected: int
) -> tuple[Tensor, Tensor]:
    """The matrices, and where each comes from, `(K,)` indices into `_SOURCES`; the input is not checked."""
    num_classes = labels.shape[1]
    labels = labels.cpu()
    given = torch.stack([labels == 0, labels == 1]).double()  # (2, N, K)
    chosen = given * selected.cpu()
    joint = torch.einsum("ani,bnk->ikab", given, given)
    conditional = torch.einsum("ani,bnk->ikab", chosen, given)
    # Counts of 0 give NaN, and NaN fails every comparison below.
    joint = joint / joint.sum((2, 3), keepdim=True)
    conditional = conditional / conditional.sum(3, keepdim=True)
    enough = (chosen.sum(1) >= min_selected).all(0)

    matrices = torch.eye(2, dtype=torch.float64).repeat(num_classes, 1, 1)
    source = torch.zeros(num_classes, dtype=torch.int64)
    for i in range(num_classes):
        rates, name = _by_correlation(joint[i], conditional[i], i) if enough[i] else None, "correlation"
        if rates is None and probabilities is not None:
            rates, name = _by_dual_t(labels[:, i], probabilities[:, i].cpu().double()), "dual_t"
        if rates is not None:
            up, down = rates
            matrices[i] = torch.tensor([[1 - up, up], [down, 1 - down]], dtype=torch.float64)
            source[i] = _SOURCES.index(name)
    return matrices, source


def _by_correlation(n: Tensor, c: Tensor, own: int) -> tuple[float, float] | None:
    """(T01, T10) of one class from its `(K, 2, 2)` frequencies n_ab, c_ab with every class; None: no candidate."""
    num_classes = len(n)
    pi = (n[:, 0, 0] + n[:, 1, 0] - c[:, 0, 0]) / (c[:, 1, 0] - c[:, 0, 0])
    p00, p01 = ((1 - pi) * c[:, 0, b] for b in (0, 1))
    p10, p11 = (pi * c[:, 1, b] for b in (0, 1))
    d = p00 * p11 - p01 * p10
    up = -(p10 * n[:, 1, 1] - p11 * n[:, 1, 0])  # times 1 / d
    down = p00 * n[:, 0, 1] - p01 * n[:, 0, 0]
    usable = (pi >= 0) & (pi <= 1) & torch.isfinite(up) & torch.isfinite(down)
    usable[own] = False

    def rounded(rate: Tensor) -> Tensor:
        return torch.where((rate > -0.3 / num_classes) & (rate < 0), 0.0, rate)

    t01, t10 = rounded(up / d), rounded(down / d)
    candidates = (usable & (t01 >= 0) & (t10 >= 0) & (t01 + t10 < 1)).nonzero().squeeze(1)
    if not len(candidates):
        return None
    residual = (t01[candidates, None] * d - up).abs() + (t10[candidates, None] * d - down).abs()
    best = candidates[residual[:, usable].sum(1).argmin()]
    return float(t01[best]), float(t10[best])


def _by_dual_t(labels: Tensor, probabilities: Tensor) -> tuple[float, float] | None:
    """(T01, T10) of one class by Dual-T; None where it is not defined."""
    known = (labels >= 0) & torch.isfinite(probabilities)
    positive, p = (labels[known] == 1).double(), probabilities[known]
    predicted = p >= 0.5
    if not predicted.any() or predicted.all():
        return None
    confusion = torch.stack([positive[~predicted].mean(), positive[predicted].mean()])  # P(given 1 | prediction)
    anchors = torch.stack([p.min(), p.max()])  # P(prediction 1 | clean 0 and 1)
    given_positive = (1 - anchors) * confusion[0] + anchors * confusion[1]
    t01, t10 = float(given_positive[0]), float(1 - given_positive[1])
    return (t01, t10) if t01 + t10 < 1 else None


def importance_reweighted_bce(
    logits: Tensor, targets: Tensor, matrices: Tensor, *, max_weight: float = 10.0, reduction: str = "sum"
) -> Tensor:
    """Binary cross-entropy on given labels, weighted by P(label is clean so) / P(label is given so) at the model.

    With p = sigmoid(logit) for the clean label, P(given 1) = p T11 + (1 - p) T01 and P(given 0) likewise, the weight
    is p / P(given 1) for a positive label and (1 - p) / P(given 0) for a negative one. No gradient flows through it.
    A soft target y (Mixup) is y times the loss of a positive label plus 1 - y times that of a negative one.

    Args:
        logits, targets, reduction: As :func:`~hf_balancemix.core.binary_cross_entropy`, which also says what is
            returned and raised; always computed in float32.
        matrices: `(K, 2, 2)`, T[k, i, j] = P(given j | clean i), rows sum to 1.
        max_weight: Larger weights are cut to this.
    """
    x, y, known = prepare(logits.float(), targets)
    if matrices.shape != (x.shape[1], 2, 2):
        raise ValueError(f"the shape of matrices {tuple(matrices.shape)} must be (K, 2, 2), with K = {x.shape[1]}.")
    with torch.no_grad():
        t = matrices.to(x.device, torch.float32)
        odds = x.clamp(-30, 30).exp()  # of a clean positive label; finite, so that nothing below is 0 / 0
        positive = (1 / (t[:, 1, 1] + t[:, 0, 1] / odds)).clamp(max=max_weight)
        negative = (1 / (t[:, 0, 0] + t[:, 1, 0] * odds)).clamp(max=max_weight)
    losses = y * positive * F.softplus(-x) + (1 - y) * negative * F.softplus(x)
    return reduce(losses, known, reduction)


def scaled_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every given label of the training set, scaled to [0, 1] for each class and given value.

    Args:
        logits: `(N, K)` of the whole training set, any floating dtype.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown.

    Returns:
        `(N, K)` float32, each set's of :func:`~hf_balancemix.methods.co_teaching.min_max`; 0 where unknown.
    """
    losses, scaled = label_losses(logits, labels.clamp(min=0)), torch.zeros(logits.shape)
    for value in (0, 1):
        own = labels == value
        scaled = torch.where(own, min_max(losses.masked_fill(~own, float("nan"))), scaled)
    return scaled


class TEstimatorTrainer(MixupTrainer):
    """T-estimator: warm-up, selection, transition matrices, importance reweighting; with Mixup, as in the paper.

    Warm-up: the first `label_warmup_epochs` epochs minimise Eq. 1 on the given labels. After each of the last five a
    pass over the training set records the scaled losses; after the last, labels whose average the mixtures call clean
    are selected and the matrices estimated, once. From then on: :func:`importance_reweighted_bce`.

    The reference holds 10 % of the training data out, only to find the epoch whose predictions Dual-T is to use. Here
    it is the last of the warm-up, and nothing is held out. No matrix is given any of its true zeros.

    Arguments are those of :class:`MixupTrainer`; of `args`, `label_warmup_epochs` and `monotone` are used, too.

    Attributes:
        matrices: `(K, 2, 2)` float64; identities until the warm-up is over.
        min_selected: For :func:`estimate_transition_matrices`.
    """

    method_name = "t-estimator"
    citation = """@inproceedings{li2022estimating,
  title     = {Estimating Noise Transition Matrix with Label Correlations for Noisy Multi-Label Learning},
  author    = {Li, Shikun and Xia, Xiaobo and Zhang, Hansong and Zhan, Yibing and Ge, Shiming and Liu, Tongliang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}"""
    min_selected = 50
    _loss_is_the_method = True
    _ends_warmup = True
    takes_pos_weight = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        n, k = (0, 0) if self.train_labels is None else self.train_labels.shape
        self.matrices = torch.eye(2, dtype=torch.float64).repeat(k, 1, 1)
        self._recorded = torch.zeros(n, k)  # sum of scaled losses; empty once the matrices are estimated

    def _end_epoch(self, epoch: int) -> None:
        if epoch > self.warmup_epochs or epoch <= self.warmup_epochs - _RECORDED_EPOCHS:
            return
        logits = self._scan_table(lambda logits, labels: logits)
        self._recorded += scaled_losses(logits, self._dense_labels())
        if epoch < self.warmup_epochs:
            return
        labels, mean = self._dense_labels(), self._recorded / min(_RECORDED_EPOCHS, self.warmup_epochs)
        selected = select_clean_labels(mean, labels, self.args.monotone)
        matrices, source = _estimate(labels, selected, logits.double().sigmoid(), self.min_selected)
        # Broadcast: the counts are equal on every rank, their quotients over unlike machines need not be.
        self.matrices = broadcast(matrices)
        self._recorded = self._recorded[:0]
        logs = {f"t_classes_{name}": int((source == i).sum()) for i, name in enumerate(_SOURCES)}
        self.log(logs | {"t_up_mean": matrices[:, 0, 1].mean().item(), "t_down_mean": matrices[:, 1, 0].mean().item()})

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if self.statistics_epoch < self.warmup_epochs:
            return super()._loss(logits, targets, inputs)
        return importance_reweighted_bce(logits, targets, self.matrices, reduction=self.args.loss_reduction)

    def _run_state(self) -> dict[str, Tensor]:
        return super()._run_state() | {"matrices": self.matrices, "recorded_losses": self._recorded}

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self._forget()

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        self.matrices, self._recorded = state["matrices"], state["recorded_losses"]
