"""The state of one BalanceMix run (Algorithm 1), composed of the parts beside this file.

Before the first epoch a training loop gives features of the training set to :meth:`BalanceMix.judge` (not with
`judge="network"`). Before every other epoch it shows the whole training set to the model (evaluation mode, no
augmentation, no gradient), calls :meth:`BalanceMix.observe` with each batch and then :meth:`BalanceMix.end_epoch`. A
step calls `refine` for both batches of a pair (where `settings.manages_labels(epoch)`), `mix_labels` and `loss`;
`examples/plain_pytorch.py` is a whole loop. The caller runs the model and owns evaluation mode and autocast.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_balancemix.core.checks import check_choice, check_given_labels, check_range
from hf_balancemix.core.distributed import all_reduce_sum, broadcast
from hf_balancemix.core.judge import NUM_FOLDS, judge_labels
from hf_balancemix.core.label_management import RefinedLabels, refine_labels
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import MIXTURE_PRESETS, LossMixtures
from hf_balancemix.core.losses import LOSS_REDUCTIONS, binary_cross_entropy
from hf_balancemix.core.mixing import mix_refined_labels
from hf_balancemix.core.noise_rates import NoiseRates, transition_rates, wrong_posterior, wrong_probability
from hf_balancemix.core.sampling import (
    MINORITY_SCORES,
    confidence_sums,
    confidences_from_sums,
    instance_scores,
    sampling_weights,
)

logger = logging.getLogger(__name__)

JUDGES = ("cross_fit", "network")
CLEAN_PROBABILITY_SOURCES = ("scan", "views")
PREDICTION_SOURCES = ("scan", "views")
SUSPICIOUS = 0.1  # from which score on
_CANDIDATE = 0.01  # from which score on a label may become suspicious, as the network learns


@dataclass(frozen=True)
class BalanceMixSettings:
    """What BalanceMix can be told. Defaults are the trainer's defaults; `docs/choices.md` gives reasons and effects.

    Attributes:
        label_warmup_epochs: Epochs before label-wise management begins.
        minority_score: `"paper"` (Eq. 3 as printed), `"positive"` or `"uniform"`; see
            :func:`~hf_balancemix.core.sampling.instance_scores`.
        judge: Whose losses the mixtures are fitted on. `"cross_fit"`: those of heads on features of a pretrained
            backbone, that did not see the label (:func:`~hf_balancemix.core.judge.judge_labels`), once, before the
            training; how much is wrong is estimated. `"network"`: those of the trained network in each scan, as
            printed; for networks from scratch, which have no such features.
        select_clean: Label-wise management at all; False trains on the given labels (ablation).
        relabel: Re-label confident labels that are not clean (Eq. 9).
        ambiguous: Weigh ambiguous labels by p_G; False leaves them out.
        trust_positives: Every positive label counts as clean.
        max_missing: A class of n positive labels has at most `max_missing` n negative ones that are not clean, those
            of the largest losses (to the width of a histogram's bin); the others count as clean whatever p_G says. A
            class cannot lack many more labels than it has. 0: no limit, Eq. 8 as printed. None: as many as
            `"cross_fit"` estimates, or 0.5 with `"network"`.
        relabel_threshold: eps of Eq. 9, in [0.5, 1].
        mixup_alpha: alpha of Eq. 5; 0 does not mix.
        partner_reliability: Labels of the minority instance of a pair weigh by their own reliability, too; False takes
            the random instance's for both, as printed.
        loss_reduction: `"sum"` over classes, as printed, or `"mean"`.
        mixture_preset: Stopping rule of the mixtures, a name in `MIXTURE_PRESETS`.
        monotone: Correct the posterior so that it never rises with the loss; False is Eq. 8 as printed.
        clean_probability_source: `"scan"`: p_G of each label at the loss that its mixture was fitted on, kept as
            N x K half precision; `"views"`: at the step's own view loss, where N x K does not fit in memory, and the
            network judges.
        prediction_source: f(x) of Eq. 9. `"scan"`: the last scan's, kept as N x K half precision; `"views"`: the mean
            over two RandAugment views that the step predicts, as printed.
    """

    label_warmup_epochs: int = 5
    minority_score: str = "paper"
    judge: str = "cross_fit"
    select_clean: bool = True
    relabel: bool = True
    ambiguous: bool = True
    trust_positives: bool = False
    max_missing: float | None = None
    relabel_threshold: float = 0.975
    mixup_alpha: float = 4.0
    partner_reliability: bool = True
    loss_reduction: str = "sum"
    mixture_preset: str = "dividemix"
    monotone: bool = True
    clean_probability_source: str = "scan"
    prediction_source: str = "scan"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("minority_score", MINORITY_SCORES),
            ("judge", JUDGES),
            ("loss_reduction", LOSS_REDUCTIONS),
            ("mixture_preset", MIXTURE_PRESETS),
            ("clean_probability_source", CLEAN_PROBABILITY_SOURCES),
            ("prediction_source", PREDICTION_SOURCES),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_range("relabel_threshold", self.relabel_threshold, 0.5, 1)
        check_range("label_warmup_epochs", self.label_warmup_epochs, 0)
        if self.max_missing is not None and not 0 <= self.max_missing <= 1e6:
            raise ValueError(f"max_missing is {self.max_missing}; it must lie in [0, 1e6] (0: no limit).")
        if not 0 <= self.mixup_alpha < math.inf:
            raise ValueError(f"mixup_alpha is {self.mixup_alpha}; it must be 0 (no mixing) or positive and finite.")
        if self.clean_probability_source == "views" and self.cross_fits:
            raise ValueError(
                'clean_probability_source is "views"; it must be "scan" where judge is "cross_fit", whose heads see '
                'no views; set judge to "network".'
            )
        if self.clean_probability_source == "views" and self.prediction_source == "scan":
            raise ValueError(
                'clean_probability_source is "views"; it must be "scan" where prediction_source is, as nothing is '
                "predicted in a step then; set either of them to the other's value."
            )

    @property
    def cross_fits(self) -> bool:
        """Whether labels are judged by :meth:`BalanceMix.judge`."""
        return self.select_clean and self.judge == "cross_fit"

    @property
    def needs_scan(self) -> bool:
        """Whether anything is learned from the pass over the training set."""
        return self.select_clean or self.minority_score != "uniform"

    def manages_labels(self, epoch: int) -> bool:
        """Whether labels are refined in `epoch` (counted from 0). The first epoch has no mixtures yet."""
        return self.select_clean and epoch >= max(self.label_warmup_epochs, 1)


class SuspiciousLabels(NamedTuple):
    """The given labels that may well be wrong: M of N x K, by instance and class; all on the CPU."""

    instance: Tensor
    """`(M,)` int64 indices into the training set."""
    label_class: Tensor
    """`(M,)` int64 in [0, K)."""
    score: Tensor
    """`(M,)` float32 in [`SUSPICIOUS`, 1], how probably the label is wrong: :func:`wrong_probability`."""
    prediction: Tensor
    """`(M,)` float32 in [0, 1], the network's in the last scan, that the class is present; 0.5 before the first."""
    p_clean: Tensor
    """`(M,)` float32 in [0, 1], p_G."""
    epochs: Tensor
    """`(M,)` int32, in how many epochs of label management its p_G was at most 1/2."""


class BalanceMix:
    """All that a run remembers: tensors only, the same on every rank, whole in `state_dict`.

    Args:
        labels: `(N, K)` given labels of the whole training set in {0, 1}, or -1 where unknown.
        settings: The method's knobs.

    Raises:
        ValueError: `labels` is not an (N, K) matrix of 0, 1 and -1 with at least one instance and class.

    Attributes:
        epoch: The epoch that the statistics are for; 0 before the first :meth:`end_epoch`.
        weights: `(N,)` float64 sampling probabilities (Eq. 4), uniform at first.
        positive_confidence, negative_confidence: `(K,)` float64, P(k) and A(k) of Eq. 2; 1 at first.
        mixtures, loss_histogram: :class:`LossMixtures` and the :class:`LossHistogram` that they were fitted on; None
            before :meth:`judge`, or with the network as judge before the first :meth:`end_epoch`.
        noise_rates: The :class:`~hf_balancemix.core.NoiseRates` that :meth:`judge` estimated; None before.
        loss_counts: `(2, K, 36)` int64, the losses that the mixtures were fitted on, counted as
            :attr:`LossHistogram.coarse_counts`.
        missing_loss_threshold: `(K,)` float64, the loss from which on a negative label may be not clean, where the
            network judges; 0 at first.
        clean_probability: `(N, K)` float16, p_G of every given label; 1 at first.
        scan_probability: `(N, K)` float16 in [0, 1], f(x) in the last scan; 0.5 at first. This and the former are
            empty, `(0, K)`, unless labels are managed and `clean_probability_source` is `"scan"`.
    """

    def __init__(self, labels: Tensor, settings: BalanceMixSettings | None = None) -> None:
        if labels.ndim != 2 or 0 in labels.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; they must be (N, K) with N, K >= 1; pass the given labels "
                "of the whole training set."
            )
        check_given_labels(labels)
        self.settings = settings or BalanceMixSettings()
        self.labels = labels.to("cpu", torch.int8)
        self._keeps_tables = self.settings.select_clean and self.settings.clean_probability_source == "scan"
        self.reset()

    def reset(self) -> None:
        """Forget what was learned: everything is as before the first epoch."""
        n, k = self.labels.shape
        self.epoch = 0
        self.weights = torch.full((n,), 1 / n, dtype=torch.float64)
        self.positive_confidence = torch.ones(k, dtype=torch.float64)
        self.negative_confidence = torch.ones(k, dtype=torch.float64)
        self.mixtures: LossMixtures | None = None
        self.noise_rates: NoiseRates | None = None
        self.missing_loss_threshold = torch.zeros(k, dtype=torch.float64)
        rows = n if self._keeps_tables else 0
        self.clean_probability = torch.ones(rows, k, dtype=torch.float16)
        self.scan_probability = torch.full((rows, k), 0.5, dtype=torch.float16)
        self.loss_histogram: LossHistogram | None = None
        self.loss_counts = LossHistogram(k).coarse_counts
        # What may turn out to be suspicious: instance, class, and the judge's probability that the class is present.
        self._candidates = torch.zeros(0, 3, dtype=torch.float64)
        # In how many epochs p_G was at most 1/2; with other judges that follows from p_G, which stays as it is.
        self._epochs_distrusted = torch.zeros(0 if self.settings.cross_fits else rows, k, dtype=torch.int16)
        self._begin_observing()

    def _begin_observing(self) -> None:
        k = self.labels.shape[1]
        self._histogram = LossHistogram(k)
        self._confidences = torch.zeros(2, 2, k, dtype=torch.int64)  # sums and counts of confidence_sums
        self._num_observed = self._num_dropped = 0
        # Batches of this rank: index `(B,)`, and losses or probabilities `(B, K)`.
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._probabilities: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def judge(self, features: Tensor, *, seed: int = 0, on_fold: Callable[[], object] = lambda: None) -> None:
        """Must be called on every rank, before the first epoch, with `settings.judge="cross_fit"`: p_G of all labels.

        Args:
            features: `(N, D)` of the un-augmented instances, any floating dtype and device; of a backbone that was not
                trained on these labels.
            seed, on_fold: As of :func:`~hf_balancemix.core.judge.judge_labels`, which also says what is raised.

        Raises:
            ValueError: The settings leave judging to the network, or do not manage labels.
        """
        s = self.settings
        if not s.cross_fits:
            raise ValueError(
                f"judge is {s.judge!r} and select_clean {s.select_clean}; they must be 'cross_fit' and True where "
                "features judge; leave the call out."
            )
        judged = judge_labels(
            features,
            self.labels,
            mixtures=s.mixture_preset,
            monotone=s.monotone,
            max_missing=s.max_missing,
            num_folds=max(2, min(NUM_FOLDS, len(self.labels))),
            seed=seed,
            on_fold=on_fold,
        )
        self.clean_probability = judged.p_clean.half()
        self.mixtures, self.loss_histogram = judged.mixtures, judged.loss_histogram
        self.loss_counts = judged.loss_histogram.coarse_counts
        self.noise_rates = judged.rates
        score = wrong_probability(self.labels, judged.probability, judged.rates)
        instance, label_class = (score >= _CANDIDATE).nonzero(as_tuple=True)
        self._candidates = torch.stack([instance, label_class, judged.probability[instance, label_class]], 1).double()

    @torch.no_grad()
    def observe(self, index: Tensor, logits: Tensor) -> None:
        """Take one batch of the scan into the statistics of Eq. 2 and Eq. 6.

        Args:
            index: `(B,)` int64 indices into the training set. Over all ranks every instance comes exactly once.
            logits: `(B, K)` of the un-augmented instances in evaluation mode, any float dtype and device. One that is
                not finite is left out: its label is not clean, and f(x) is 0.5.
        """
        index, logits = index.cpu(), logits.detach().to("cpu", torch.float32)
        dropped = ~logits.isfinite()
        labels = self.labels[index].masked_fill(dropped, -1)
        probabilities = logits.masked_fill(dropped, 0).double().sigmoid()
        self._num_dropped += int(dropped.sum())
        self._confidences += torch.stack(confidence_sums(probabilities, labels))
        self._num_observed += len(index)
        if not self.settings.cross_fits:
            positive = labels == 1
            losses = label_losses(logits, positive).masked_fill(labels < 0, float("nan"))  # not in the histograms
            self._histogram.update(losses, positive)
            if self._keeps_tables:
                self._losses.append((index, losses))
        if self._keeps_tables:
            self._probabilities.append((index, probabilities.half()))

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> None:
        """Must be called on every rank, after all were observed: sampling weights and mixtures for `epoch`.

        Args:
            epoch: The epoch about to begin, from 1 on (the number of epochs after the last one).

        Raises:
            RuntimeError: More or fewer instances were observed than there are. That each came once is not looked at.
        """
        num_observed = int(all_reduce_sum(torch.tensor(self._num_observed)))
        if num_observed != len(self.labels):
            self._begin_observing()
            raise RuntimeError(
                f"the number of observed instances is {num_observed} over all ranks; it must be {len(self.labels)}; "
                "observe each instance of the training set exactly once before end_epoch."
            )
        settings = self.settings
        P, A = confidences_from_sums(*all_reduce_sum(self._confidences))
        self.positive_confidence, self.negative_confidence = P, A
        # Broadcast: P and A are equal on every rank, the matrix product over unlike machines need not be.
        self.weights = broadcast(sampling_weights(instance_scores(self.labels, P, A, settings.minority_score)))
        if not settings.cross_fits:
            self._histogram.reduce()
            self.loss_histogram = self._histogram
            self.loss_counts = self._histogram.coarse_counts
        if settings.select_clean and not settings.cross_fits:
            self.mixtures = mixtures = LossMixtures.fit_histogram(self._histogram, settings.mixture_preset)
            self.missing_loss_threshold = torch.zeros_like(self.missing_loss_threshold)
            max_missing = _MAX_MISSING if settings.max_missing is None else settings.max_missing
            if max_missing:
                most_missing = max_missing * self._histogram.num_values[1].double()
                self.missing_loss_threshold = self._histogram.threshold_of_largest(0, most_missing)
            if self._keeps_tables:
                if settings.manages_labels(self.epoch):
                    self._epochs_distrusted += (self.clean_probability.cpu() <= 0.5) & (self.labels >= 0)
                self.clean_probability = self._of_all_ranks(
                    (index, self._p_clean_at(mixtures, losses, self.labels[index] == 1))
                    for index, losses in self._losses
                )
        if self._keeps_tables:
            self.scan_probability = self._of_all_ranks(self._probabilities)
        if num_dropped := int(all_reduce_sum(torch.tensor(self._num_dropped))):
            text = "%d of %d logits that were observed before epoch %d are not finite and were left out."
            logger.warning(text, num_dropped, self.labels.numel(), epoch)
        self.epoch = epoch
        self._begin_observing()

    def _of_all_ranks(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """`(N, K)` float16, of all ranks' batches of index `(B,)` and values `(B, K)`."""
        table = torch.zeros(self.labels.shape)
        for index, values in batches:
            table[index] = values.float()
        return all_reduce_sum(table).half()

    @torch.no_grad()
    def refine(self, index: Tensor, labels: Tensor, probabilities: Tensor | None = None) -> RefinedLabels:
        """Eq. 8-9 for a batch: labels, reliabilities and weights. Outside the warm-up only.

        Args:
            index: `(B,)` int64 indices into the training set.
            labels: `(B, K)` given labels in {0, 1}, or -1 where unknown.
            probabilities: `(B, K)` in [0, 1], the mean of f over two views, on the device of `labels`, where
                `prediction_source` is `"views"`; else left out.

        Returns:
            :class:`RefinedLabels` on the device of `labels`.

        Raises:
            ValueError: `probabilities` are absent or given where they must not be, labels are not managed at all, or
                :meth:`judge` was not called.
        """
        s = self.settings
        if not s.select_clean:
            raise ValueError("select_clean is False; it must be True where labels are refined; use the given labels.")
        if (probabilities is None) != (s.prediction_source == "scan"):
            found, wanted = ("absent", "given") if probabilities is None else ("given", "absent")
            raise ValueError(
                f"probabilities are {found}; with prediction_source {s.prediction_source!r} they must be {wanted}; "
                "pass them for 'views' only."
            )
        if s.cross_fits and self.mixtures is None:
            raise ValueError(
                "the labels were not judged; they must be before they are refined; call judge with features of a "
                'pretrained backbone before the first epoch, or set judge to "network".'
            )
        if probabilities is None:
            self.scan_probability = self.scan_probability.to(labels.device)
            probabilities = self.scan_probability[index.to(labels.device)].float()
        return refine_labels(
            labels,
            self._p_clean(index, labels, probabilities),
            probabilities,
            s.relabel_threshold,
            relabel=s.relabel,
            ambiguous=s.ambiguous,
            trust_positives=s.trust_positives,
        )

    def _p_clean(self, index: Tensor, labels: Tensor, probabilities: Tensor) -> Tensor:
        if self.mixtures is None:
            return torch.ones_like(probabilities)
        if self._keeps_tables:
            self.clean_probability = self.clean_probability.to(probabilities.device)
            return self.clean_probability[index.to(probabilities.device)].float()
        losses = label_losses(torch.logit(probabilities.float(), 1e-6), labels.clamp(min=0))
        return self._p_clean_at(self.mixtures, losses.cpu(), (labels == 1).cpu()).to(probabilities.device)

    def _p_clean_at(self, mixtures: LossMixtures, losses: Tensor, positive: Tensor) -> Tensor:
        p_clean = mixtures.clean_probability(losses, positive, monotone=self.settings.monotone)
        return p_clean.masked_fill(~positive & (losses < self.missing_loss_threshold), 1.0)

    @property
    def has_suspicious_labels(self) -> bool:
        """Whether :meth:`suspicious_labels` can say anything."""
        return self.mixtures is not None and self._keeps_tables

    def suspicious_labels(self) -> SuspiciousLabels:
        """The given labels with a score of `SUSPICIOUS` or more, in the order of the instances.

        The score is :func:`wrong_probability`, of the mean log-odds of two that predict the label: the heads that did
        not see it, and the network in the last scan, which has learned by refined labels. (Each alone finds fewer.)
        Where the network judges, the score is the mean of 1 - p_G and of how far its prediction in the last scan is
        from the label. With what a network has learned by heart, no rates can be estimated, and no probability.

        Raises:
            ValueError: Nothing was judged, or no table of p_G is kept.
        """
        if self.mixtures is None:
            raise ValueError(
                "no label was judged; the labels must be before suspicious ones are asked for; set select_clean=True, "
                "and train first."
            )
        if not self._keeps_tables:
            raise ValueError(
                "clean_probability_source is 'views', which remembers no label; it must be 'scan' where suspicious "
                "labels are asked for; set it to 'scan'."
            )
        if self.settings.cross_fits:
            assert self.noise_rates is not None
            instance, label_class = self._candidates[:, :2].long().T
            x = torch.logit(self._candidates[:, 2], 1e-6)
            if self.epoch:
                # In half precision 1 is anything from 1 - 2^-12 on.
                f = self.scan_probability.cpu()[instance, label_class].double()
                x = (x + torch.logit(f, 2.0**-12)) / 2
            t01, t10 = transition_rates(self.labels, self.noise_rates)
            positive = self.labels[instance, label_class] == 1
            score = wrong_posterior(positive, x.sigmoid(), t01[label_class], t10).float()
            keep = score >= SUSPICIOUS
            instance, label_class, score = instance[keep], label_class[keep], score[keep]
        else:
            given, p_given = self.labels.clamp(min=0), self.clean_probability.cpu().float()
            scores = ((1 - p_given) + (self.scan_probability.cpu().float() - given).abs()) / 2
            scores = scores.masked_fill(self.labels < 0, 0)
            instance, label_class = (scores >= SUSPICIOUS).nonzero(as_tuple=True)
            score = scores[instance, label_class]
        prediction, p_clean = (
            table.cpu()[instance, label_class].float() for table in (self.scan_probability, self.clean_probability)
        )
        if self.settings.cross_fits:
            epochs = (p_clean <= 0.5) * max(0, self.epoch - max(self.settings.label_warmup_epochs, 1))
        else:
            epochs = self._epochs_distrusted[instance, label_class]
        return SuspiciousLabels(instance, label_class, score, prediction, p_clean, epochs.int())

    def mix_labels(self, random: RefinedLabels, minority: RefinedLabels, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5 for refined labels, and their weights; see :func:`~hf_balancemix.core.mixing.mix_refined_labels`."""
        return mix_refined_labels(random, minority, lam, self.settings.partner_reliability)

    def loss(
        self, logits: Tensor, targets: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None
    ) -> Tensor:
        """Eq. 10 (Eq. 1 where `weight` is None) on mixed instances; see :func:`binary_cross_entropy`."""
        return binary_cross_entropy(logits, targets, weight, self.settings.loss_reduction, pos_weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors on the CPU, to be kept between epochs or in the middle of one (not in the middle of a scan)."""
        state = {"epoch": torch.tensor(self.epoch)} | {name: getattr(self, name).cpu() for name in _LEARNED}
        if self.mixtures is not None:
            state |= {f"mixtures.{name}": value for name, value in self.mixtures.state_dict().items()}
        if self.noise_rates is not None:
            state |= {f"noise_rates.{name}": value for name, value in self.noise_rates._asdict().items()}
            state["candidates"] = self._candidates
        if len(self._epochs_distrusted):
            state["epochs_distrusted"] = self._epochs_distrusted
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: It belongs to a training set of another size or to other settings; nothing is changed then.
        """
        own, names = self.state_dict(), ["epoch", *_LEARNED]
        if len(self._epochs_distrusted) and "noise_rates.wrong" not in state:  # else another judge was at work before
            names.append("epochs_distrusted")
        judged = ["candidates"] if self.settings.cross_fits and "noise_rates.wrong" in state else []
        for name in (*names, *judged):
            if name not in state:
                raise ValueError(
                    f"the saved state's {name} is absent, as another version of hf_balancemix wrote it; it must be "
                    "there; resume with that version, or begin anew."
                )
            if name not in judged and state[name].shape != own[name].shape:
                raise ValueError(
                    f"the saved state's {name} is of shape {tuple(state[name].shape)}; it must be of shape "
                    f"{tuple(own[name].shape)} in this run (N, K = {tuple(self.labels.shape)}); resume with the data "
                    "set and settings of the checkpoint (clean_probability_source among them)."
                )
        if self.settings.cross_fits and "noise_rates.wrong" not in state:
            raise ValueError(
                "the saved state's noise_rates are absent, as the network judged its labels; they must be there where "
                "judge is 'cross_fit'; set judge to 'network'."
            )
        mixtures, rates = (
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for prefix in ("mixtures.", "noise_rates.")
        )
        self.mixtures = LossMixtures.from_state_dict(mixtures) if mixtures else None
        self.noise_rates = NoiseRates(**rates) if rates and self.settings.cross_fits else None
        self.epoch = int(state["epoch"])
        if self.settings.cross_fits:
            self._candidates = state["candidates"].clone()
        if "epochs_distrusted" in names:
            self._epochs_distrusted = state["epochs_distrusted"].clone()
        for name in _LEARNED:
            setattr(self, name, state[name].clone())
        self._begin_observing()  # a scan may have been given up


_MAX_MISSING = 0.5  # where the network judges; half as many as a class has is what 40 % mislabelling takes away
_LEARNED = (
    "weights", "positive_confidence", "negative_confidence", "missing_loss_threshold", "clean_probability",
    "scan_probability", "loss_counts",
)  # fmt: skip
