"""BalanceMix as plain PyTorch: torch only, no Trainer, no data set, no file.

N: training instances. K: classes. B: instances in a batch. Labels are (.., K) in {0, 1}.
"""

from hf_balancemix.core.balance_mix import BalanceMix, BalanceMixSettings, SuspiciousLabels
from hf_balancemix.core.judge import JudgedLabels, judge_labels
from hf_balancemix.core.keys import keyed_generator, keyed_rng, keyed_seed
from hf_balancemix.core.label_management import RefinedLabels, Reliability, refine_labels
from hf_balancemix.core.loss_histogram import LossHistogram, label_losses
from hf_balancemix.core.loss_mixture import MIXTURE_PRESETS, LossMixtures, MixtureSettings
from hf_balancemix.core.losses import (
    asymmetric_loss,
    binary_cross_entropy,
    db_loss,
    focal_loss,
    hill_loss,
    large_loss,
    splc_loss,
)
from hf_balancemix.core.mixing import minority_mixup, mix_images, mix_labels, mix_refined_labels, mixing_coefficient
from hf_balancemix.core.noise_rates import NoiseRates, estimate_noise_rates, wrong_probability
from hf_balancemix.core.out_of_fold import out_of_fold_logits, principal_components
from hf_balancemix.core.sampling import (
    EpochSampler,
    PairKey,
    PairSampler,
    class_confidences,
    class_lift,
    effective_sample_size,
    instance_scores,
    sampling_weights,
    systematic_resample,
)

__all__ = [
    "MIXTURE_PRESETS",
    "BalanceMix",
    "BalanceMixSettings",
    "EpochSampler",
    "JudgedLabels",
    "LossHistogram",
    "LossMixtures",
    "MixtureSettings",
    "NoiseRates",
    "PairKey",
    "PairSampler",
    "RefinedLabels",
    "Reliability",
    "SuspiciousLabels",
    "asymmetric_loss",
    "binary_cross_entropy",
    "class_confidences",
    "class_lift",
    "db_loss",
    "effective_sample_size",
    "estimate_noise_rates",
    "focal_loss",
    "hill_loss",
    "instance_scores",
    "judge_labels",
    "keyed_generator",
    "keyed_rng",
    "keyed_seed",
    "label_losses",
    "large_loss",
    "minority_mixup",
    "mix_images",
    "mix_labels",
    "mix_refined_labels",
    "mixing_coefficient",
    "out_of_fold_logits",
    "principal_components",
    "refine_labels",
    "sampling_weights",
    "splc_loss",
    "systematic_resample",
    "wrong_probability",
]
