"""Every knob of the trainers, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_balancemix.core import MIXTURE_PRESETS, BalanceMixSettings
from hf_balancemix.core.balance_mix import CLEAN_PROBABILITY_SOURCES, JUDGES, PREDICTION_SOURCES
from hf_balancemix.core.losses import LOSS_REDUCTIONS
from hf_balancemix.core.sampling import MINORITY_SCORES
from hf_balancemix.data.images import MAX_IMAGE_PIXELS
from hf_balancemix.trainer.pos_weight import check_pos_weight


def _argument(help_text: str, default: Any = None, **metadata: Any) -> Any:
    """A field; where it is left None and the preset has a value for it, `__post_init__` sets that."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class MultiLabelTrainingArguments(TrainingArguments):
    """Arguments of :class:`MultiLabelTrainer`, beside those of `transformers.TrainingArguments`.

    `preset` sets the fields below that the user leaves open. A value that is given, by a flag or in a config file,
    always wins: flag > config file > preset.

    > Parameters that control the preset and the optimiser

    preset (`str`, defaults to `"default"`): `"paper"` is the recipe that the paper prints: SGD on a cosine, without
        gradient clipping. `"default"` is what measured best (docs/choices.md). `"ml-decoder"` is the recipe that ASL
        and ML-Decoder were published with, which the paper's Table 6 builds on: Adam, one cycle of the learning rate,
        averaged weights, cutout, pixels in [0, 1]. Their values are in :attr:`PRESETS`.
    global_batch_size (`int`): instances in one optimiser step over all ranks and accumulation steps;
        `per_device_train_batch_size` follows from it unless that is given.
    optim, lr_scheduler_type (`str`): those of transformers, and `"adam"`: `torch.optim.Adam`, whose weight decay is
        part of the gradient; and `"one_cycle"`: torch's `OneCycleLR`, which rises to `learning_rate` in the first
        `warmup_steps` (a share of all steps if below 1) and then falls to almost 0, while momentum, or Adam's first
        beta, does the opposite. `lr_scheduler_kwargs` go to it.
    decay_vectors (`bool`): weight decay also acts on parameters of one dimension, such as the weights of batch norm,
        as it does in Trainer (which leaves out biases and layer norms alone).
    ema_decay (`float`, in [0, 1)): evaluate and save an exponential moving average of the weights, see
        :class:`~hf_balancemix.trainer.averaging.WeightAverage`; 0: none.
    loss_reduction (`str`): `"sum"` over the classes as printed (Eq. 1, 10), or `"mean"`; both average over the batch.

    > Parameters that control images and evaluation

    image_size (`int`, *optional*): side in pixels of the square that each image is resized to, without keeping its
        aspect ratio, in training and in evaluation; by default the size of the image processor.
    max_image_pixels (`int`): images of more pixels, width x height, are not decoded, in training and in evaluation.
    normalise (`bool`): subtract the image processor's mean and divide by its standard deviation, channel by channel;
        False: the model sees pixels in [0, 1], in training and in the image processor that is saved. Features of a
        frozen backbone are always computed with the image processor's.
    cutout (`float`, in [0, 1]): side of a square that is painted over in each training image before RandAugment, as a
        share of the image's; 0: none.
    channels_last (`bool`, defaults to `False`): memory format of model and images; convolutions are often much faster.
    hflip (`bool`): mirror every other training view, left to right.
    random_resized_crop (`float`, in [0, 1]): a training view is a random part of the image, of this share of its area
        or more; 0: none. Crop, mirror, cutout and RandAugment follow each other.
    pos_weight (`str`, `float` or list of `float`, *optional*): factor on the losses of positive labels in training,
        for methods whose loss is BCE (others refuse it): one number, one a class, or `"balanced"`: the number of known
        negative training labels over that of positive ones, class by class, and 1 where a class lacks either.
        `eval_loss`, and the losses by which labels are judged, have no such factor.
    on_nan (`str`, defaults to `"stop"`): a step whose logits or loss are not finite, on any rank, ends the training
        with an error; `"skip"`: it changes nothing, and is counted in the logs (`skipped_steps`).
    randaugment_num_ops, randaugment_magnitude (`int`): operations a view, and their strength from 0 to 30.
    many_shot, few_shot (`int`): class groups by the number of clean positive training labels: above `many_shot` a
        class is many-shot, below `few_shot` few-shot. By default the paper's 10,000 and 1,000 for its data sets; else
        so that a third of the classes is in each group, see :func:`~hf_balancemix.metrics.shot_bounds`.
    dataset_title (`str`, *optional*): what the model card calls the data; by default the recorded name, that of the
        folder or on the Hub.

    Other defaults than in `TrainingArguments`: the presets', and `remove_unused_columns`, which must stay False.

    Raises:
        ValueError: A value out of range, an unknown preset, or a global batch size that the ranks cannot share.
    """

    _SGD: ClassVar[dict[str, Any]] = {
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
        "num_train_epochs": 20.0,
        "global_batch_size": 64,
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": _SGD,
        "paper": _SGD,
        "ml-decoder": _SGD
        | {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "one_cycle",
            "warmup_steps": 0.2,
            "optim": "adam",
            "optim_args": None,
            "decay_vectors": False,
            "ema_decay": 0.9997,
            "normalise": False,
            "cutout": 0.5,
            "num_train_epochs": 40.0,
            "global_batch_size": 56,
        },
    }

    preset: str = _argument(
        "Where values come from that are not given: 'default' is what measured best, 'paper' the paper's recipe, "
        "'ml-decoder' that of ML-Decoder.",
        "default",
    )
    learning_rate: float = _argument("Learning rate: the first one, or for one_cycle the highest.")
    lr_scheduler_type: str = _argument(
        "How the learning rate changes: one of transformers' schedules, or 'one_cycle' (up and down once)."
    )
    warmup_steps: float = _argument("Steps in which the learning rate rises; below 1: their share of all steps.")
    optim: str = _argument("Optimiser: one of transformers', or 'adam' (its weight decay is part of the gradient).")
    optim_args: str | None = _argument("Arguments of the optimiser, such as 'momentum=0.9'.")
    weight_decay: float = _argument("Weight decay.")
    decay_vectors: bool = _argument(
        "Weight decay also on parameters of one dimension, such as the weights of batch norm."
    )
    ema_decay: float = _argument(
        "Evaluate and save an exponential moving average of the weights with this decay, in [0, 1); 0: none. It "
        "starts as the first weights and needs many more than 1 / (1 - decay) steps to leave them: lower it for short "
        "runs."
    )
    max_grad_norm: float = _argument("Largest norm of the gradient, which is scaled down to it; 0: any.")
    num_train_epochs: float = _argument("Passes over the training set.")
    per_device_train_batch_size: int = _argument(
        "Instances in a batch of one device. Default: its share of the global batch size."
    )
    global_batch_size: int = _argument("Instances in one optimiser step, over all ranks and accumulation steps.")
    loss_reduction: str = _argument(
        "Sum of the loss over the classes, as printed (Eq. 1, 10), or its mean; both average over the batch.",
        choices=[*LOSS_REDUCTIONS],
    )
    image_size: int | None = _argument(
        "Images are resized to a square of so many pixels a side. Default: the image processor's."
    )
    max_image_pixels: int = _argument(
        "Images of more pixels, width x height, are not decoded: they count as bad images.", MAX_IMAGE_PIXELS
    )
    normalise: bool = _argument(
        "Subtract the image processor's mean from the pixels and divide by its standard deviation; false: the model "
        "sees pixels in [0, 1], and the image processor that is saved says so."
    )
    cutout: float = _argument(
        "Paint over a square of each training image before RandAugment, with this share of its side; 0: none."
    )
    hflip: bool = _argument("Mirror every other training view, left to right.", False)
    random_resized_crop: float = _argument(
        "Each training view is a random part of the image, of at least this share of its area, in (0, 1]; 0: none.",
        0.0,
    )
    channels_last: bool = _argument("Memory format of convolutional networks; often much faster.", False)
    pos_weight: str | None = _argument(
        "Factor on the losses of positive labels, for methods whose loss is BCE: 'balanced' (negative over positive "
        "training labels, class by class), one number, or a JSON list of one a class. Evaluation losses have none."
    )
    on_nan: str = _argument(
        "At a step whose logits or loss are not finite: 'stop' with an error, or 'skip' the step, which is counted "
        "in the logs.",
        "stop",
        choices=["stop", "skip"],
    )
    randaugment_num_ops: int = _argument("RandAugment operations on each training view.", 2)
    randaugment_magnitude: int = _argument("Strength of RandAugment, 0 to 30.", 9)
    many_shot: int | None = _argument(
        "Classes with more clean positive training labels are many-shot. Default: the paper's 10000 for its data "
        "sets; else the count that a third of the classes is above."
    )
    few_shot: int | None = _argument(
        "Classes with fewer clean positive training labels are few-shot. Default: the paper's 1000 for its data "
        "sets; else the count that a third of the classes is below."
    )
    dataset_title: str | None = _argument(
        "What the model card calls the data. Default: the folder's name, or that on the Hub."
    )
    remove_unused_columns: bool = _argument("Must stay false: views are made of the image column.", False)

    def __post_init__(self) -> None:
        if self.preset not in self.PRESETS:
            raise ValueError(f"preset is {self.preset!r}; it must be one of {', '.join(self.PRESETS)}.")
        values = dict(self.PRESETS[self.preset])
        if "optim_args" in values and self.optim is not None and self.optim != values["optim"]:
            del values["optim_args"]  # SGD's momentum means nothing to the optimiser that was asked for
        if self.lr_scheduler_type is not None and self.lr_scheduler_type != values["lr_scheduler_type"]:
            values["warmup_steps"] = 0  # a share of one cycle means nothing to the schedule that was asked for
        asked, given = self.global_batch_size, self.per_device_train_batch_size
        # Not a field: scripts that know the noise may still choose for what the user left open.
        self.unset = frozenset(name for name in values if getattr(self, name) is None)
        for name in self.unset:
            setattr(self, name, values[name])
        self._check()
        self.per_device_train_batch_size = given or 1
        # Names that TrainingArguments refuses, each with one that it takes meanwhile.
        own = {}
        for name, new, known in (("optim", "adam", "adamw_torch"), ("lr_scheduler_type", "one_cycle", "linear")):
            if getattr(self, name) == new:
                own[name] = new
                setattr(self, name, known)
        super().__post_init__()
        for name, new in own.items():
            setattr(self, name, new)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns that it does nothing
        self._share_batch(given, asked)
        self._preset = self.preset

    def _check(self) -> None:
        """Raise a ValueError where a value is out of range."""
        check_pos_weight(self.pos_weight)
        area = "the least share of the image's area"
        columns = "False, as views are made of the image column; leave it out"
        for name, possible, required in (
            ("remove_unused_columns", not self.remove_unused_columns, columns),
            ("on_nan", self.on_nan in ("stop", "skip"), "'stop' or 'skip'"),
            (
                "logging_nan_inf_filter",
                self.logging_nan_inf_filter or self.on_nan == "stop",
                "True with on_nan='skip', or one such step would spoil all losses that are logged; leave it out",
            ),
            (
                "many_shot",
                self.many_shot is None or self.few_shot is None or self.many_shot >= self.few_shot,
                f"at least few_shot, {self.few_shot}; change either",
            ),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1); 0 averages nothing"),
            ("max_image_pixels", self.max_image_pixels >= 1, "at least 1; 89478485 is usual"),
            ("cutout", 0 <= self.cutout <= 1, "a share of the image's side, in [0, 1]; 0 paints nothing over"),
            ("random_resized_crop", 0 <= self.random_resized_crop <= 1, f"{area}, in (0, 1]; 0 crops nothing"),
        ):
            if not possible:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {required}.")

    def _share_batch(self, given: int | None, asked: int | None) -> None:
        """Make `per_device_train_batch_size`, as `given`, and `global_batch_size`, as `asked` for, fit each other."""
        shares = max(self.world_size, 1) * self.gradient_accumulation_steps
        if given is None:
            if self.global_batch_size % shares:
                raise ValueError(
                    f"global_batch_size is {self.global_batch_size}; it must be a multiple of {self.world_size} ranks "
                    f"x {self.gradient_accumulation_steps} accumulation steps; change one of them, or set "
                    "per_device_train_batch_size."
                )
            self.per_device_train_batch_size = self.global_batch_size // shares
        elif asked not in (None, given * shares):
            raise ValueError(
                f"global_batch_size is {asked}; it must be per_device_train_batch_size {given} x {shares} (ranks and "
                "accumulation steps); leave one of them out."
            )
        self.global_batch_size = self.per_device_train_batch_size * shares
        self._shared = (self.per_device_train_batch_size, self.global_batch_size)

    def settle(self) -> None:
        """Called by a trainer before each training: what was changed since is checked as when it is first set.

        Raises:
            ValueError: A value out of range, or another `preset`, which would no longer set anything.
        """
        if self.preset != self._preset:
            raise ValueError(
                f"preset was {self._preset!r} and is now {self.preset!r}; it must be given when the arguments are "
                "made, as it sets others; make new ones."
            )
        self._check()
        given, asked = self.per_device_train_batch_size, self.global_batch_size
        self._share_batch(
            None if given == self._shared[0] else given,
            None if asked == self._shared[1] else asked,
        )


@dataclass
class BalanceMixTrainingArguments(MultiLabelTrainingArguments):
    """Arguments of :class:`BalanceMixTrainer`; the method's own are the fields of
    :class:`~hf_balancemix.core.BalanceMixSettings`, where each is explained with its equation.

    NOTE `warmup_steps` is the learning rate's warm-up; the method's is `label_warmup_epochs`. Where that is left open
    and the epochs are not the preset's, or `max_steps` ends the training, it is a quarter of the epochs, at least 1.
    """

    _OURS: ClassVar[dict[str, Any]] = {
        f.name: f.default
        for f in fields(BalanceMixSettings)
        # All but the reduction of every loss, and those that have the same default in every preset.
        if f.name
        not in ("loss_reduction", "max_missing", "select_clean", "relabel", "ambiguous", "clean_probability_source")
    }
    _PRINTED: ClassVar[dict[str, Any]] = {
        "judge": "network",
        "max_missing": 0.0,
        "partner_reliability": False,
        "mixture_preset": "sklearn",
        "monotone": False,
        "prediction_source": "views",
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": MultiLabelTrainingArguments.PRESETS["default"] | _OURS,
        "paper": MultiLabelTrainingArguments.PRESETS["paper"] | _OURS | _PRINTED,
        "ml-decoder": MultiLabelTrainingArguments.PRESETS["ml-decoder"] | _OURS | {"label_warmup_epochs": 10},
    }

    label_warmup_epochs: int | None = _argument(
        "First epochs, in which all given labels are trained on as they are; fewer than all. Default: a quarter of "
        "the epochs, at least 1, where these are not the preset's."
    )
    minority_score: str = _argument(
        "By what the minority sampler prefers instances: 'paper' (Eq. 3), 'positive' (mean confidence in the classes "
        "of the positive labels) or 'uniform' (it prefers none).",
        choices=[*MINORITY_SCORES],
    )
    judge: str = _argument(
        "Whose losses say which labels are clean: 'cross_fit', heads on the features of the backbone before training, "
        "that never saw the label, or 'network', the trained network itself, as printed; for one from scratch.",
        choices=[*JUDGES],
    )
    select_clean: bool = _argument(
        "Judge each label; false: train on the given labels (ablation).", BalanceMixSettings.select_clean
    )
    relabel: bool = _argument(
        "Change labels that are not clean and that the model contradicts with confidence (Eq. 9).",
        BalanceMixSettings.relabel,
    )
    ambiguous: bool = _argument(
        "Weigh ambiguous labels by their clean probability (Eq. 10); false: leave them out (ablation).",
        BalanceMixSettings.ambiguous,
    )
    trust_positives: bool = _argument(
        "All positive labels count as clean: for labels without noise, and single positive labels."
    )
    max_missing: float | None = _argument(
        "At most so many times as many negative labels of a class as it has positive ones can count as not clean; 0: "
        "any number, as printed, for which all labels are remembered, 40 bytes each. Default: as many as the judge "
        "estimates; 0.5 where the network judges."
    )
    relabel_threshold: float = _argument(
        "Probability from which the model is confident, eps of Eq. 9, in [0.5, 1]; the paper has 0.55 for single "
        "positive labels."
    )
    mixup_alpha: float = _argument("alpha of Mixup's Beta distribution (Eq. 5); 0: nothing is mixed.")
    partner_reliability: bool = _argument(
        "In a mix each label weighs by its own reliability; false: both by the random instance's, as printed."
    )
    lambda_per_batch: bool = _argument(
        "One lambda of Mixup for a rank's micro-batch instead of one for each pair.", False
    )
    mixture_preset: str = _argument(
        "When the fit of the mixtures stops, and the least variance: as DivideMix or as scikit-learn.",
        choices=[*MIXTURE_PRESETS],
    )
    monotone: bool = _argument(
        "Correct the clean probability so that it never rises with the loss; Eq. 8 has no correction."
    )
    clean_probability_source: str = _argument(
        "'scan' remembers the clean probabilities of labels that may be wrong; 'views' computes them from a step's "
        "own losses and remembers none; prediction_source is then 'views', too.",
        BalanceMixSettings.clean_probability_source,
        choices=[*CLEAN_PROBABILITY_SOURCES],
    )
    prediction_source: str = _argument(
        "What re-labels (f(x) of Eq. 9): 'scan', the predictions of the last pass over the training set, at no cost, "
        "or 'views', predictions of two RandAugment views in every step, as printed.",
        choices=[*PREDICTION_SOURCES],
    )

    def __post_init__(self) -> None:
        if self.clean_probability_source == "views":  # nothing else predicts the views, or sees them
            self.prediction_source = self.prediction_source or "views"
            self.judge = self.judge or "network"
        open_warmup = self.label_warmup_epochs is None
        super().__post_init__()
        self._default_warmup: int | None = None
        if open_warmup and self.max_steps > 0:  # how many epochs that is, a trainer knows
            self.label_warmup_epochs = None
        elif open_warmup:
            self.label_warmup_epochs = self._default_warmup = self._warmup_of(self.num_train_epochs)

    def _warmup_of(self, num_epochs: float) -> int:
        """The preset's for as many epochs as the preset has; else a quarter of them, and at least 1."""
        preset = self.PRESETS[self.preset]
        same = num_epochs == preset["num_train_epochs"]
        return preset["label_warmup_epochs"] if same else max(1, int(num_epochs / 4))

    def settle_warmup(self, num_epochs: float) -> int:
        """Called by a trainer before each training: `label_warmup_epochs`, set for so many epochs if it is open."""
        warmup = self.label_warmup_epochs
        if warmup is None or warmup == self._default_warmup:
            warmup = self.label_warmup_epochs = self._default_warmup = self._warmup_of(num_epochs)
        return warmup

    def _check(self) -> None:
        super()._check()
        self.balance_mix_settings()  # raises on bad values

    def balance_mix_settings(self) -> BalanceMixSettings:
        """The method's settings as `core` takes them."""
        values = {f.name: getattr(self, f.name) for f in fields(BalanceMixSettings)}
        # An open warm-up is settled before a training begins.
        return BalanceMixSettings(**{name: value for name, value in values.items() if value is not None})
