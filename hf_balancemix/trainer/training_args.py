"""Every knob of the trainers, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_balancemix.core import MIXTURE_PRESETS, BalanceMixSettings
from hf_balancemix.core.balance_mix import CLEAN_PROBABILITY_SOURCES, PREDICTION_SOURCES
from hf_balancemix.core.losses import LOSS_REDUCTIONS
from hf_balancemix.core.sampling import MINORITY_SCORES

_BY_PRESET = "Default: what the preset says."


def _preset_field(help_text: str, **metadata: Any) -> Any:
    return field(default=None, metadata={"help": f"{help_text} {_BY_PRESET}", **metadata})


@dataclass
class MultiLabelTrainingArguments(TrainingArguments):
    """Arguments of :class:`MultiLabelTrainer`: a correct multi-label Trainer on images.

    Fields whose default is None are set by `preset`. A value given by flag or in a config file always wins:
    flag > config file > preset.

    > Parameters that control the preset and the optimiser

    preset (`str`, defaults to `"default"`): `"paper"` is the paper as printed: SGD, momentum 0.9, learning rate 0.01,
        cosine, weight decay 1e-4, no gradient clipping, loss summed over the classes. `"default"` is what measured
        best (docs/choices.md). `"ml-decoder"` is the recipe that ASL and ML-Decoder were published with, which the
        paper's Table 6 builds on: Adam, one cycle of the learning rate, averaged weights, cutout, images not
        normalised, 40 epochs of batches of 56.
    global_batch_size (`int`, *optional*): instances in one optimiser step over all ranks and accumulation steps;
        `per_device_train_batch_size` follows from it unless that is given.
    optim: those of transformers, and `"adam"`, `torch.optim.Adam`, whose weight decay is part of the gradient.
    lr_scheduler_type: those of transformers, and `"one_cycle"`, torch's `OneCycleLR` with `learning_rate` as its
        maximum and `warmup_steps` (a share of all steps if below 1) as its rise; momentum, or Adam's first beta, runs
        against it. `lr_scheduler_kwargs` go to it.
    decay_vectors (`bool`): weight decay on parameters of one dimension, such as the weights of batch norm, where
        Trainer has it; False: on none of them.
    ema_decay (`float`, in [0, 1)): evaluate and save an exponential moving average of the weights, see
        :class:`~hf_balancemix.trainer.averaging.WeightAverage`; 0: none.

    > Parameters that control images and evaluation

    image_size (`int`, *optional*): images are squashed to this many pixels a side, in training and in evaluation;
        by default the size of the image processor.
    normalise (`bool`): normalise images by the image processor's mean and standard deviation; False: pixels in [0, 1],
        in training and in the image processor that is saved. Cached features of a frozen backbone are always made with
        the image processor's.
    cutout (`float`, in [0, 1]): side of the square that is cut out before RandAugment, as a share of the image's; 0:
        none.
    channels_last (`bool`, defaults to `False`): memory format of model and images; convolutions are often much faster.
    randaugment_num_ops, randaugment_magnitude: RandAugment, for every method of the paper.
    many_shot, few_shot (`int`): class groups by clean positive training labels: more than `many_shot` is many-shot,
        fewer than `few_shot` few-shot.

    NOTE defaults that differ from `TrainingArguments`: `remove_unused_columns` is False (the image column is needed),
    and those that the presets set (see :attr:`PRESETS`).

    Raises:
        ValueError: A value out of range, an unknown preset, or a global batch size that the ranks cannot share.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {
            "learning_rate": 0.01,
            "lr_scheduler_type": "cosine",
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "weight_decay": 1e-4,
            "max_grad_norm": 0.0,
            "loss_reduction": "sum",
            "warmup_steps": 0,
            "decay_vectors": True,
            "ema_decay": 0.0,
            "normalise": True,
            "cutout": 0.0,
        },
        "paper": {
            "learning_rate": 0.01,
            "lr_scheduler_type": "cosine",
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "weight_decay": 1e-4,
            "max_grad_norm": 0.0,
            "loss_reduction": "sum",
            "warmup_steps": 0,
            "decay_vectors": True,
            "ema_decay": 0.0,
            "normalise": True,
            "cutout": 0.0,
        },
        "ml-decoder": {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "one_cycle",
            "warmup_steps": 0.2,
            "optim": "adam",
            "optim_args": None,
            "weight_decay": 1e-4,
            "decay_vectors": False,
            "max_grad_norm": 0.0,
            "loss_reduction": "sum",
            "ema_decay": 0.9997,
            "normalise": False,
            "cutout": 0.5,
            "num_train_epochs": 40.0,
            "global_batch_size": 56,
        },
    }
    # Names that TrainingArguments refuses, with one that it takes meanwhile.
    _OWN_NAMES: ClassVar[dict[str, tuple[str, str]]] = {
        "optim": ("adam", "adamw_torch"),
        "lr_scheduler_type": ("one_cycle", "linear"),
    }

    preset: str = field(
        default="default", metadata={"help": "Where unset values come from: 'default', 'paper' or 'ml-decoder'."}
    )

    learning_rate: float | None = _preset_field("Initial learning rate; the highest of a one_cycle schedule.")
    lr_scheduler_type: str | None = _preset_field("Learning-rate schedule: one of transformers', or 'one_cycle'.")
    warmup_steps: float | None = _preset_field(
        "Steps in which the learning rate rises; below 1, their share of all steps."
    )
    optim: str | None = _preset_field("Optimiser: one of transformers', or 'adam' (weight decay in the gradient).")
    optim_args: str | None = _preset_field("Arguments of the optimiser, such as 'momentum=0.9'.")
    weight_decay: float | None = _preset_field("Weight decay.")
    decay_vectors: bool | None = _preset_field(
        "Weight decay also on the weights of batch norm and other one-dimensional parameters, as Trainer does."
    )
    ema_decay: float | None = _preset_field(
        "Evaluate and save an exponential moving average of the weights with this decay in [0, 1); 0: none. As "
        "published it has no warm-up: after far fewer than 1 / (1 - decay) steps it is close to the weights of the "
        "start, so lower it for short runs."
    )
    max_grad_norm: float | None = _preset_field("Gradient norm to clip at; 0 does not clip.")
    num_train_epochs: float | None = _preset_field("Epochs. 20 where no preset says.")
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size of one device. Default: the share of --global_batch_size."}
    )
    global_batch_size: int | None = _preset_field(
        "Instances in one optimiser step, over all ranks and accumulation steps. 64 where no preset says."
    )
    loss_reduction: str | None = _preset_field(
        "'sum' over the classes as printed (Eq. 1, 10), or 'mean'; both average over the batch.",
        choices=[*LOSS_REDUCTIONS],
    )

    image_size: int | None = field(
        default=None, metadata={"help": "Side in pixels that images are squashed to. Default: the image processor's."}
    )
    normalise: bool | None = _preset_field(
        "Normalise images as the image processor says; False: pixels in [0, 1], which is then saved too."
    )
    cutout: float | None = _preset_field(
        "Side of the square cut out of each training view before RandAugment, as a share of the image's; 0: none."
    )
    channels_last: bool = field(
        default=False, metadata={"help": "Memory format of convolutional networks; often much faster."}
    )
    randaugment_num_ops: int = field(default=2, metadata={"help": "RandAugment operations a view."})
    randaugment_magnitude: int = field(default=9, metadata={"help": "RandAugment magnitude, 0 to 30."})
    many_shot: int = field(
        default=10_000, metadata={"help": "Classes with more clean positive training labels are many-shot."}
    )
    few_shot: int = field(
        default=1_000, metadata={"help": "Classes with fewer clean positive training labels are few-shot."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the views are made from the image column."}
    )

    def __post_init__(self) -> None:
        if self.preset not in self.PRESETS:
            raise ValueError(f"preset is {self.preset!r}; it must be one of {', '.join(self.PRESETS)}.")
        values = {"num_train_epochs": 20.0, "global_batch_size": 64} | self.PRESETS[self.preset]
        if "optim_args" in values and self.optim is not None and self.optim != values["optim"]:
            del values["optim_args"]  # SGD's momentum means nothing to the optimiser that was asked for
        if self.lr_scheduler_type is not None and self.lr_scheduler_type != values["lr_scheduler_type"]:
            values["warmup_steps"] = 0  # a share of one cycle means nothing to the schedule that was asked for
        asked = self.global_batch_size
        # Not a field: scripts that know the noise may still choose for what the user left open.
        self.unset = frozenset(name for name in values if getattr(self, name) is None)
        for name in self.unset:
            setattr(self, name, values[name])
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True, which would drop the image column; leave it out.")
        if self.many_shot < self.few_shot:
            raise ValueError(f"many_shot ({self.many_shot}) must not be smaller than few_shot ({self.few_shot}).")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be in [0, 1), and 0 averages nothing.")
        if not 0 <= self.cutout <= 1:
            raise ValueError(f"cutout is {self.cutout}; it must be a share of the image's side, in [0, 1].")
        given = self.per_device_train_batch_size
        self.per_device_train_batch_size = given or 1
        own = {name: new for name, (new, _) in self._OWN_NAMES.items() if getattr(self, name) == new}
        for name in own:
            setattr(self, name, self._OWN_NAMES[name][1])
        super().__post_init__()
        for name, new in own.items():
            setattr(self, name, new)
        shares = max(self.world_size, 1) * self.gradient_accumulation_steps
        if given is None:
            if self.global_batch_size % shares:
                raise ValueError(
                    f"global_batch_size is {self.global_batch_size}, which {self.world_size} ranks x "
                    f"{self.gradient_accumulation_steps} accumulation steps cannot share evenly; change one of them "
                    "or set per_device_train_batch_size."
                )
            self.per_device_train_batch_size = self.global_batch_size // shares
        elif asked not in (None, given * shares):
            raise ValueError(
                f"global_batch_size is {asked}, but per_device_train_batch_size {given} x {shares} (ranks and "
                "accumulation steps) gives another; leave one of them out."
            )
        self.global_batch_size = self.per_device_train_batch_size * shares


@dataclass
class BalanceMixTrainingArguments(MultiLabelTrainingArguments):
    """Arguments of :class:`BalanceMixTrainer`; the method's own are the fields of
    :class:`~hf_balancemix.core.BalanceMixSettings`, where each is explained with its equation.

    NOTE `warmup_steps` is the learning rate's warm-up; the method's is `label_warmup_epochs`.
    """

    _METHOD: ClassVar[dict[str, Any]] = {
        "label_warmup_epochs": 5,
        "minority_score": "paper",
        "trust_positives": False,
        "relabel_threshold": 0.975,
        "mixup_alpha": 4.0,
    }
    _OURS: ClassVar[dict[str, Any]] = {
        "mixture_preset": "dividemix",
        "monotone": True,
        "max_missing": 0.5,
        "partner_reliability": True,
        "prediction_source": "scan",
    }
    _PRINTED: ClassVar[dict[str, Any]] = {
        "mixture_preset": "sklearn",
        "monotone": False,
        "max_missing": 0.0,
        "partner_reliability": False,
        "prediction_source": "views",
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": MultiLabelTrainingArguments.PRESETS["default"] | _METHOD | _OURS,
        "paper": MultiLabelTrainingArguments.PRESETS["paper"] | _METHOD | _PRINTED,
        "ml-decoder": MultiLabelTrainingArguments.PRESETS["ml-decoder"] | _METHOD | _OURS,
    }

    label_warmup_epochs: int | None = _preset_field("Epochs before label-wise management begins.")
    minority_score: str | None = _preset_field(
        "Score of the minority sampler: 'paper' (Eq. 3), 'positive' (mean P(k) over positives) or 'uniform' (none).",
        choices=[*MINORITY_SCORES],
    )
    select_clean: bool = field(
        default=True, metadata={"help": "Label-wise management; False trains on the given labels (ablation)."}
    )
    relabel: bool = field(default=True, metadata={"help": "Re-label confident labels that are not clean (Eq. 9)."})
    ambiguous: bool = field(
        default=True, metadata={"help": "Weigh ambiguous labels by p_G (Eq. 10); False leaves them out (ablation)."}
    )
    trust_positives: bool | None = _preset_field(
        "All positive labels count as clean (noise-free and single-positive data)."
    )
    max_missing: float | None = _preset_field(
        "At most this many times as many negative labels of a class as it has positive ones count as not clean; "
        "0 sets no limit, as printed."
    )
    relabel_threshold: float | None = _preset_field(
        "eps of Eq. 9 in [0.5, 1]; the paper uses 0.55 for single-positive labels."
    )
    mixup_alpha: float | None = _preset_field("alpha of Eq. 5; 0 does not mix.")
    partner_reliability: bool | None = _preset_field(
        "The minority instance's labels weigh by their own reliability, not by the random instance's as printed."
    )
    lambda_per_batch: bool = field(
        default=False, metadata={"help": "One lambda for a rank's micro-batch instead of one for each pair."}
    )
    mixture_preset: str | None = _preset_field(
        "Stopping rule and variance floor of the mixtures.", choices=[*MIXTURE_PRESETS]
    )
    monotone: bool | None = _preset_field("Correct p_G so that it never rises with the loss; Eq. 8 has no correction.")
    clean_probability_source: str = field(
        default="scan",
        metadata={
            "help": "'scan' keeps p_G as N x K half precision; 'views' computes it from the step's own losses, for "
            "data sets where N x K does not fit in memory; prediction_source is then 'views', too.",
            "choices": [*CLEAN_PROBABILITY_SOURCES],
        },
    )
    prediction_source: str | None = _preset_field(
        "f(x) of Eq. 9: 'scan' takes what the last pass over the training set predicted, which costs nothing; 'views' "
        "predicts two RandAugment views in every step, as printed.",
        choices=[*PREDICTION_SOURCES],
    )
    co_teaching_scored: str = field(
        default="first",
        metadata={
            "help": "Co-teaching only: the network that is evaluated and saved; 'mean' evaluates the mean of both "
            "networks' logits and saves the first, with its peer beside.",
            "choices": ["first", "second", "mean"],
        },
    )

    # Of the comparison methods that are a loss (methods/losses.py); the others ignore them.
    focal_gamma: float = field(default=2.0, metadata={"help": "focal: gamma >= 0."})
    focal_alpha: float | None = field(
        default=None, metadata={"help": "focal: weight of the positives in [0, 1]. Default: none."}
    )
    asl_gamma_neg: float = field(default=4.0, metadata={"help": "asl: gamma- >= 0."})
    asl_gamma_pos: float = field(default=0.0, metadata={"help": "asl: gamma+ >= 0."})
    asl_margin: float = field(default=0.05, metadata={"help": "asl: margin m in [0, 1]."})
    asl_detach_weight: bool = field(
        default=True, metadata={"help": "asl: the weight is a constant for the gradient, as in its training scripts."}
    )
    large_loss_delta: float | None = field(
        default=None,
        metadata={
            "help": "ll-r, ll-ct, ll-cp: more modified labels each epoch, in per cent of a batch's labels. Default: "
            "2 / num_train_epochs, the paper's 0.1, 0.04 and 0.05 for 20, 50 and 40 epochs."
        },
    )
    large_loss_across_ranks: bool = field(
        default=True,
        metadata={"help": "ll-r, ll-ct, ll-cp: rank the losses of all ranks' batches together; False: each its own."},
    )
    splc_threshold: float = field(
        default=0.6, metadata={"help": "splc: negatives with a probability above it count as positives."}
    )
    splc_margin: float = field(default=1.0, metadata={"help": "splc: shift of the positives' logits."})
    splc_gamma: float = field(default=2.0, metadata={"help": "splc: gamma >= 0."})
    splc_first_epoch: int = field(
        default=1, metadata={"help": "splc: first epoch, from 0, in which negatives can count as positives."}
    )
    hill_lam: float = field(
        default=1.5, metadata={"help": "spl-hill: lambda >= 1 of the negatives, (lambda - p) p^2."}
    )
    hill_margin: float = field(default=1.0, metadata={"help": "spl-hill: shift of the positives' logits."})
    hill_gamma: float = field(default=2.0, metadata={"help": "spl-hill: gamma >= 0 of the positives."})
    db_mu: float = field(default=0.2, metadata={"help": "db-loss: mu, 0.2 for COCO-MLT and 0.3 for VOC-MLT."})
    db_negative_scale: float = field(
        default=2.0, metadata={"help": "db-loss: scale of the negatives' logits, 2 for COCO-MLT and 5 for VOC-MLT."}
    )

    def __post_init__(self) -> None:
        if self.clean_probability_source == "views" and self.prediction_source is None:
            self.prediction_source = "views"  # nothing else predicts the views
        super().__post_init__()
        self.balance_mix_settings()  # raises on bad values

    def balance_mix_settings(self) -> BalanceMixSettings:
        """The method's settings as `core` takes them."""
        return BalanceMixSettings(**{f.name: getattr(self, f.name) for f in fields(BalanceMixSettings)})
