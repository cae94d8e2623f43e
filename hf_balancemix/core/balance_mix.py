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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from hf_balancemix.core.checks import check_choice, check_range
from hf_balancemix.core.distributed import all_reduce_sum, broadcast, gather_ragged
from hf_balancemix.core.given_labels import compressed_labels, label_counts, labels_at, unknown_places
from hf_balancemix.core.judge import NUM_FOLDS, JudgedClasses, judge_in_blocks
from hf_balancemix.core.label_entries import LabelEntries, class_dtype
from hf_balancemix.core.label_management import RefinedLabels, Reliability, refine_labels
from hf_balancemix.core.loss_histogram import NUM_COARSE_BINS, LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import MIXTURE_PRESETS, LossMixtures
from hf_balancemix.core.losses import LOSS_REDUCTIONS, binary_cross_entropy
from hf_balancemix.core.mixing import mix_refined_labels
from hf_balancemix.core.noise_rates import NoiseRates, transition_rates, wrong_by_rates, wrong_posterior
from hf_balancemix.core.observed import ObservedScan
from hf_balancemix.core.sampling import MINORITY_SCORES, confidences_from_sums, instance_scores, sampling_weights

logger = logging.getLogger(__name__)

JUDGES = ("cross_fit", "network")
CLEAN_PROBABILITY_SOURCES = ("scan", "views")
PREDICTION_SOURCES = ("scan", "views")
BYTES_A_LABEL = 40  # at the peak of an epoch's end, where all labels are remembered (`benchmarks/scale.py`)
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
            class cannot lack many more labels than it has, and only these are remembered. 0: no limit, Eq. 8 as
            printed, for which all N x K are. None: as many as `"cross_fit"` estimates, or 0.5 with `"network"`.
        relabel_threshold: eps of Eq. 9, in [0.5, 1].
        mixup_alpha: alpha of Eq. 5; 0 does not mix.
        partner_reliability: Labels of the minority instance of a pair weigh by their own reliability, too; False takes
            the random instance's for both, as printed.
        loss_reduction: `"sum"` over classes, as printed, or `"mean"`.
        mixture_preset: Stopping rule of the mixtures, a name in `MIXTURE_PRESETS`.
        monotone: Correct the posterior so that it never rises with the loss; False is Eq. 8 as printed.
        clean_probability_source: `"scan"`: p_G of each label at the loss that its mixture was fitted on, remembered of
            the labels that may be not clean; `"views"`: at the step's own view loss, where nothing is remembered of a
            single label, and the network judges.
        prediction_source: f(x) of Eq. 9. `"scan"`: the last scan's, remembered of the same labels; `"views"`: the mean
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
    def remembers_labels(self) -> bool:
        """Whether p_G and f(x) of single labels are kept from one pass over the training set to the next."""
        return self.select_clean and self.clean_probability_source == "scan"

    @property
    def remembers_all_labels(self) -> bool:
        """Whether these are all N x K: any negative label may be not clean."""
        return self.remembers_labels and self.max_missing == 0

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
    """All that a run remembers, the same on every rank, whole in `state_dict`.

    Of single labels it remembers those that are unknown or may be wrong; every other one is clean (p_G = 1). So its
    memory follows the number of positive labels, not N x K, unless `settings.remembers_all_labels`.

    Args:
        labels: `(N, K)` given labels of the whole training set in {0, 1}, or -1 where unknown; dense, or a
            :class:`scipy.sparse.csr_array` in which 0 is not stored.
        settings: The method's knobs.

    Raises:
        ValueError: `labels` is not an (N, K) matrix of 0, 1 and -1 with at least one instance and class.

    Attributes:
        labels: `(N, K)` :class:`scipy.sparse.csr_array` of int8, the given labels.
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
        entries: The :class:`~hf_balancemix.core.label_entries.LabelEntries` that are remembered; none unless
            `settings.remembers_labels`. :meth:`clean_probability` and :meth:`scan_probability` look them up.
    """

    def __init__(self, labels: Tensor | csr_array, settings: BalanceMixSettings | None = None) -> None:
        if labels.ndim != 2 or 0 in labels.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; they must be (N, K) with N, K >= 1; pass the given labels "
                "of the whole training set."
            )
        self.settings = settings or BalanceMixSettings()
        self.labels = compressed_labels(labels)
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
        self.loss_histogram: LossHistogram | None = None
        self.loss_counts = torch.zeros(2, k, NUM_COARSE_BINS, dtype=torch.int64)
        instance, label_class = unknown_places(self.labels)
        p_clean = torch.zeros(len(instance), dtype=torch.float16)
        self._remember(instance, label_class, p_clean, p_clean + 0.5)
        if not self.settings.remembers_labels:
            self._set_entries(self.entries.of_none())
        # In how many epochs p_G was at most 1/2; with other judges that follows from p_G, which stays as it is.
        self._epochs_distrusted = csr_array((n, k), dtype=np.int16)
        self._scan: ObservedScan | None = None

    def _remember(
        self,
        instance: Tensor,
        label_class: Tensor,
        p_clean: Tensor,
        prediction: Tensor,
        judged: Tensor | None = None,
    ) -> None:
        n, k = self.labels.shape
        self._set_entries(LabelEntries.of(n, instance, label_class.to(class_dtype(k)), p_clean, prediction, judged))

    def _set_entries(self, entries: LabelEntries) -> None:
        self.entries = self._entries_of_steps = entries  # the latter on the device of the last step

    def clean_probability(self, index: Tensor) -> Tensor:
        """`(B, K)` float32 in [0, 1], p_G of the labels of some instances, `(B,)` int64; 0 where unknown."""
        return self.entries.rows(index.cpu(), "p_clean", self.labels.shape[1], otherwise=1.0)

    def scan_probability(self, index: Tensor) -> Tensor:
        """`(B, K)` float32 in [0, 1], f(x) in the last scan of some instances, `(B,)` int64; NaN where it was not
        remembered, as the label is clean."""
        return self.entries.rows(index.cpu(), "prediction", self.labels.shape[1], otherwise=math.nan)

    def mean_clean_probability(self) -> tuple[float, float]:
        """The mean of p_G over the known labels, and over the positive ones; 1 where there are none."""
        given = labels_at(self.labels, self.entries.instance, self.entries.label_class.long())
        doubt = 1 - self.entries.p_clean.double()
        negatives, positives = (int(count.sum()) for count in label_counts(self.labels))
        known = float(doubt[given >= 0].sum()) / max(negatives + positives, 1)
        return 1 - known, 1 - float(doubt[given == 1].sum()) / max(positives, 1)

    def distrusted_counts(self) -> Tensor:
        """`(2, K)` int64: of each class the negative, and the positive labels with p_G of at most 1/2."""
        label_class = self.entries.label_class.long()
        given = labels_at(self.labels, self.entries.instance, label_class)
        distrusted = self.entries.p_clean <= 0.5
        counts = [label_class[distrusted & (given == value)] for value in (0, 1)]
        return torch.stack([torch.bincount(of_value, minlength=self.labels.shape[1]) for of_value in counts])

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
        found: list[list[Tensor]] = []

        def take(some: slice, of_some: JudgedClasses) -> None:
            t01, t10 = transition_rates(self.labels, of_some.rates)
            score = wrong_by_rates(of_some.labels, of_some.probability, t01[some], t10)
            p_clean = of_some.p_clean.half().masked_fill(of_some.labels < 0, 0)
            candidate = score >= _CANDIDATE
            at = instance, column = ((p_clean < 1) | candidate).nonzero(as_tuple=True)
            judged = of_some.probability[at].masked_fill(~candidate[at], -1)
            found.append([instance, (column + some.start).to(class_dtype(self.labels.shape[1])), p_clean[at], judged])

        rates, mixtures, histogram = judge_in_blocks(
            features,
            self.labels,
            take,
            mixtures=s.mixture_preset,
            monotone=s.monotone,
            max_missing=s.max_missing,
            num_folds=max(2, min(NUM_FOLDS, self.labels.shape[0])),
            seed=seed,
            on_fold=on_fold,
        )
        instance, label_class, p_clean, judged = (torch.cat(parts) for parts in zip(*found, strict=True))
        self._remember(instance, label_class, p_clean, torch.full_like(p_clean, 0.5), judged)
        self.mixtures, self.loss_histogram, self.noise_rates = mixtures, histogram, rates
        self.loss_counts = histogram.coarse_counts

    @torch.no_grad()
    def observe(self, index: Tensor, logits: Tensor) -> None:
        """Take one batch of the scan into the statistics of Eq. 2 and Eq. 6.

        Args:
            index: `(B,)` int64 indices into the training set. Over all ranks every instance comes exactly once.
            logits: `(B, K)` of the un-augmented instances in evaluation mode, any float dtype and device. One that is
                not finite is left out: its label is not clean, and f(x) is 0.5.
        """
        self._observed().add(index, logits)

    def _observed(self) -> ObservedScan:
        if self._scan is None:
            s = self.settings
            keeps_losses = s.remembers_labels and not s.cross_fits
            self._scan = ObservedScan(
                self.labels,
                self.entries if s.cross_fits else None,
                counts_losses=not s.cross_fits,
                max_missing=self._max_missing if keeps_losses else None,
            )
        return self._scan

    @property
    def _max_missing(self) -> float:
        """Where the network judges."""
        return _MAX_MISSING if self.settings.max_missing is None else self.settings.max_missing

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> None:
        """Must be called on every rank, after all were observed: sampling weights and mixtures for `epoch`.

        Args:
            epoch: The epoch about to begin, from 1 on (the number of epochs after the last one).

        Raises:
            RuntimeError: More or fewer instances were observed than there are. That each came once is not looked at.
        """
        scan, self._scan = self._observed(), None
        scan.finish()
        num_observed, num_dropped = all_reduce_sum(torch.tensor([scan.num_observed, scan.num_dropped])).tolist()
        n, k = self.labels.shape
        if num_observed != n:
            raise RuntimeError(
                f"the number of observed instances is {num_observed} over all ranks; it must be {n}; "
                "observe each instance of the training set exactly once before end_epoch."
            )
        settings = self.settings
        P, A = confidences_from_sums(*all_reduce_sum(torch.stack([scan.sums, scan.counts])))
        self.positive_confidence, self.negative_confidence = P, A
        # Broadcast: P and A are equal on every rank, the sums over unlike machines need not be.
        self.weights = broadcast(sampling_weights(instance_scores(self.labels, P, A, settings.minority_score)))
        if scan.histogram is not None:
            scan.histogram.reduce()
            self.loss_histogram = scan.histogram
            self.loss_counts = scan.histogram.coarse_counts
            if settings.select_clean:
                self._judge_by(scan, scan.histogram)
        elif settings.remembers_labels:
            predictions = all_reduce_sum(scan.predictions.float()).half()  # of each at most one rank has more than 0
            self._set_entries(replace(self.entries, prediction=predictions))
        if num_dropped:
            text = "%d of %d logits that were observed before epoch %d are not finite and were left out."
            logger.warning(text, num_dropped, n * k, epoch)
        self.epoch = epoch

    def _judge_by(self, scan: ObservedScan, histogram: LossHistogram) -> None:
        """The mixtures on the network's losses, and with them the entries."""
        self.mixtures = LossMixtures.fit_histogram(histogram, self.settings.mixture_preset)
        positives = histogram.num_values[1]
        self.missing_loss_threshold = torch.zeros_like(self.missing_loss_threshold)
        if self._max_missing:
            most_missing = self._max_missing * positives.double()
            self.missing_loss_threshold = histogram.threshold_of_largest(0, most_missing)
        if not self.settings.remembers_labels:
            return
        if self.settings.manages_labels(self.epoch):
            self._count_distrusted()
        least, found = scan.least_kept(histogram, positives), []
        self._set_entries(self.entries.of_none())  # not the old ones beside the new
        while scan.kept:
            labels = scan.kept.pop().of_at_least(least)
            label_class, positive = labels.label_class.long(), labels.given == 1
            p_clean = self._p_clean_at(labels.loss, positive, label_class).half()
            score = _score(labels.given, p_clean, labels.prediction)
            keep = (p_clean < 1) | (score >= SUSPICIOUS)
            found.append([x[keep] for x in (labels.instance, labels.label_class, p_clean, labels.prediction)])
        none = [torch.zeros(0, dtype=dtype) for dtype in (torch.int32, class_dtype(len(least)), *[torch.float16] * 2)]
        columns = [torch.cat(parts) for parts in zip(none, *found[::-1], strict=True)]
        found.clear()
        self._remember(*map(gather_ragged, columns))

    def _count_distrusted(self) -> None:
        instance, label_class = self.entries.instance, self.entries.label_class.long()
        distrusted = (self.entries.p_clean <= 0.5) & (labels_at(self.labels, instance, label_class) >= 0)
        lengths = torch.bincount(instance[distrusted], minlength=self.labels.shape[0])
        start = np.concatenate([[0], lengths.cumsum(0).numpy()]).astype(np.int32)
        once = np.ones(start[-1], dtype=np.int16), label_class[distrusted].int().numpy(), start
        self._epochs_distrusted = self._epochs_distrusted + csr_array(once, shape=self.labels.shape)

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
        options = {"relabel": s.relabel, "ambiguous": s.ambiguous, "trust_positives": s.trust_positives}
        if not s.remembers_labels:
            assert probabilities is not None
            p_clean = self._p_clean_of_views(labels, probabilities)
            return refine_labels(labels, p_clean, probabilities, s.relabel_threshold, **options)
        entries = self._entries_of_steps = self._entries_of_steps.to(labels.device)
        place, some = entries.places(index.to(labels.device))
        label_class = entries.label_class[place].long()
        if probabilities is None:
            of_entries = entries.prediction[place].float().where(some, 0.5)
        else:
            of_entries = probabilities.gather(1, label_class)
        p_clean = entries.p_clean[place].float().where(some, 1.0)
        refined = refine_labels(labels.gather(1, label_class), p_clean, of_entries, s.relabel_threshold, **options)
        # Every other label is clean, or ambiguous where it is unknown.
        weight = (labels >= 0).float()
        reliability = (labels < 0).to(torch.uint8).mul_(Reliability.AMBIGUOUS.value)
        return RefinedLabels(
            labels.float().scatter(1, label_class, refined.labels),
            reliability.scatter_(1, label_class, refined.reliability),
            weight.scatter_(1, label_class, refined.weight),
        )

    def _p_clean_of_views(self, labels: Tensor, probabilities: Tensor) -> Tensor:
        if self.mixtures is None:
            return torch.ones_like(probabilities)
        losses = label_losses(torch.logit(probabilities.float(), 1e-6), labels.clamp(min=0)).cpu()
        positive = (labels == 1).cpu()
        p_clean = self.mixtures.clean_probability(losses, positive, monotone=self.settings.monotone)
        p_clean = p_clean.masked_fill(~positive & (losses < self.missing_loss_threshold), 1.0)
        return p_clean.to(probabilities.device)

    def _p_clean_at(self, losses: Tensor, positive: Tensor, label_class: Tensor) -> Tensor:
        """`(M,)` p_G of single labels, by their losses, whether they are positive, and their classes."""
        assert self.mixtures is not None
        p_clean = self.mixtures.clean_probability_of(losses, positive, label_class, self.settings.monotone)
        return p_clean.masked_fill(~positive & (losses < self.missing_loss_threshold[label_class]), 1.0)

    @property
    def has_suspicious_labels(self) -> bool:
        """Whether :meth:`suspicious_labels` can say anything."""
        return self.mixtures is not None and self.settings.remembers_labels

    def suspicious_labels(self) -> SuspiciousLabels:
        """The given labels with a score of `SUSPICIOUS` or more, in the order of the instances.

        The score is :func:`wrong_probability`, of the mean log-odds of two that predict the label: the heads that did
        not see it, and the network in the last scan, which has learned by refined labels. (Each alone finds fewer.)
        Where the network judges, the score is the mean of 1 - p_G and of how far its prediction in the last scan is
        from the label. With what a network has learned by heart, no rates can be estimated, and no probability. Of a
        class of n positive labels the n + 100 negative ones of the largest losses are looked at, or `max_missing` n
        where that is more.

        Raises:
            ValueError: Nothing was judged, or no p_G is remembered.
        """
        if self.mixtures is None:
            raise ValueError(
                "no label was judged; the labels must be before suspicious ones are asked for; set select_clean=True, "
                "and train first."
            )
        if not self.settings.remembers_labels:
            raise ValueError(
                "clean_probability_source is 'views', which remembers no label; it must be 'scan' where suspicious "
                "labels are asked for; set it to 'scan'."
            )
        entries = self.entries
        instance, label_class = entries.instance, entries.label_class.long()
        given = labels_at(self.labels, instance, label_class)
        if self.settings.cross_fits:
            assert self.noise_rates is not None
            x = torch.logit(entries.judged.double(), 1e-6)
            if self.epoch:
                # In half precision 1 is anything from 1 - 2^-12 on.
                x = (x + torch.logit(entries.prediction.double(), 2.0**-12)) / 2
            t01, t10 = transition_rates(self.labels, self.noise_rates)
            score = wrong_posterior(given == 1, x.sigmoid(), t01[label_class], t10).float()
            score = score.masked_fill(entries.judged < 0, 0)  # which are no candidates
        else:
            score = _score(given, entries.p_clean, entries.prediction)
        keep = score >= SUSPICIOUS
        instance, label_class, p_clean = instance[keep], label_class[keep], entries.p_clean[keep].float()
        if self.settings.cross_fits:
            epochs = (p_clean <= 0.5) * max(0, self.epoch - max(self.settings.label_warmup_epochs, 1))
        else:
            epochs = labels_at(self._epochs_distrusted, instance, label_class)
        return SuspiciousLabels(
            instance, label_class, score[keep], entries.prediction[keep].float(), p_clean, epochs.int()
        )

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
        if self.settings.remembers_labels:
            state |= {f"entries.{name}": value for name, value in self.entries.state_dict().items()}
            if not self.settings.cross_fits:
                state |= {f"distrusted.{name}": value for name, value in _compressed(self._epochs_distrusted).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: It belongs to a training set of another size, to other settings or to another version; nothing
                is changed then.
        """
        if "clean_probability" in state:
            raise ValueError(
                "the saved state holds tables of all labels, as an older version of hf_balancemix wrote it; it must "
                "hold single ones; resume with that version, or begin anew."
            )
        own, remembers = self.state_dict(), self.settings.remembers_labels
        if remembers != any(name.startswith("entries.") for name in state):
            found, wanted = ("absent", "there") if remembers else ("there", "absent")
            raise ValueError(
                f"the saved state's entries of single labels are {found}; they must be {wanted} in this run; resume "
                "with the settings of the checkpoint (clean_probability_source among them)."
            )
        judged_by_network = "noise_rates.wrong" not in state
        # Else another judge was at work before, and no epoch counts.
        needed = [name for name in own if not name.startswith("distrusted.") or judged_by_network]
        for name in needed:
            if name.startswith(("mixtures.", "noise_rates.")):
                continue
            if name not in state:
                raise ValueError(
                    f"the saved state's {name} is absent, as another version of hf_balancemix wrote it; it must be "
                    "there; resume with that version, or begin anew."
                )
            if (name in _LEARNED or name.endswith("lengths")) and state[name].shape != own[name].shape:
                raise ValueError(
                    f"the saved state's {name} is of shape {tuple(state[name].shape)}; it must be of shape "
                    f"{tuple(own[name].shape)} in this run (N, K = {tuple(self.labels.shape)}); resume with the data "
                    "set of the checkpoint."
                )
        if self.settings.cross_fits and judged_by_network:
            raise ValueError(
                "the saved state's noise_rates are absent, as the network judged its labels; they must be there where "
                "judge is 'cross_fit'; set judge to 'network'."
            )
        mixtures, rates, entries, distrusted = (
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for prefix in ("mixtures.", "noise_rates.", "entries.", "distrusted.")
        )
        self.mixtures = LossMixtures.from_state_dict(mixtures) if mixtures else None
        self.noise_rates = NoiseRates(**rates) if rates and self.settings.cross_fits else None
        self.epoch = int(state["epoch"])
        if remembers:
            loaded = LabelEntries.from_state_dict(entries)
            if not self.settings.cross_fits:
                loaded = replace(loaded, judged=loaded.judged[:0])
                if judged_by_network:
                    self._epochs_distrusted = _of_compressed(distrusted, self.labels.shape)
            self._set_entries(loaded)
        for name in _LEARNED:
            setattr(self, name, state[name].clone())
        self._scan = None  # it may have been given up


def _score(given: Tensor, p_clean: Tensor, prediction: Tensor) -> Tensor:
    """Where the network judges: `(M,)` float32 in [0, 1], how suspicious single labels are."""
    score = ((1 - p_clean.float()) + (prediction.float() - given.clamp(min=0)).abs()) / 2
    return score.masked_fill(given < 0, 0)


def _compressed(counts: csr_array) -> dict[str, Tensor]:
    dtype = class_dtype(counts.shape[1])
    return {
        "lengths": torch.from_numpy(np.diff(counts.indptr)).to(dtype),
        "label_class": torch.from_numpy(counts.indices).to(dtype),
        "epochs": torch.from_numpy(counts.data),
    }


def _of_compressed(state: dict[str, Tensor], shape: tuple[int, int]) -> csr_array:
    start = np.concatenate([[0], state["lengths"].long().cumsum(0).numpy()]).astype(np.int32)
    return csr_array((state["epochs"].clone().numpy(), state["label_class"].int().numpy(), start), shape=shape)


_MAX_MISSING = 0.5  # where the network judges; half as many as a class has is what 40 % mislabelling takes away
_LEARNED = ("weights", "positive_confidence", "negative_confidence", "missing_loss_threshold", "loss_counts")
