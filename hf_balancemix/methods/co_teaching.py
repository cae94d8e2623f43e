"""Co-teaching (Han et al., NeurIPS 2018) for multi-label images, as in the paper's tables: two networks in one run.

After the warm-up every epoch begins with a pass over the training set. For each network a two-component Gaussian
mixture on the mean losses of the instances (DivideMix; Li, Socher, Hoi, ICLR 2020) says which instances are clean, and
each network then learns from the instances that its peer calls clean.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_balancemix.core import LossMixtures, label_losses
from hf_balancemix.core.checks import check_choice
from hf_balancemix.core.keys import keyed_rng
from hf_balancemix.core.losses import binary_cross_entropy
from hf_balancemix.trainer.checks import check_model
from hf_balancemix.trainer.mixup import MixupTrainer
from hf_balancemix.trainer.training_args import BalanceMixTrainingArguments

logger = logging.getLogger(__name__)

PEER_FOLDER = "peer"
Scored = Literal["first", "second", "mean"]

_SAME_LOSS = 1e-3  # losses that differ by no more say the same: probabilities with a ratio below 1.0011


def instance_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of each instance over its known labels.

    Args:
        logits: `(B, ..., K)`, any floating dtype; `...` may hold several networks.
        labels: `(B, K)` given labels in {0, 1}, or -1 where unknown.

    Returns:
        `(B, ...)` float64; NaN for an instance without a known label.
    """
    labels = labels.to(logits.device).view(len(labels), *[1] * (logits.ndim - 2), -1).expand(logits.shape)
    known = (labels >= 0).double()
    return (label_losses(logits, labels.clamp(min=0)).double() * known).sum(-1) / known.sum(-1)


def min_max(values: Tensor) -> Tensor:
    """Each column of `(N, C)` losses scaled to [0, 1], as DivideMix scales losses before the fit.

    A column whose values are all but equal, none more than 0.001 from another, becomes 0: its rounding errors are not
    to be parted into clean and noisy ones. Values that are not finite stay as they are and count for nothing.
    """
    finite = torch.isfinite(values)
    low = values.masked_fill(~finite, torch.inf).amin(0)
    high = values.masked_fill(~finite, -torch.inf).amax(0)
    width = high - low
    scaled = (values - low) / torch.where(width > _SAME_LOSS, width, torch.inf)
    return torch.where(finite, scaled, values)


def select_clean_labels(losses: Tensor, labels: Tensor, monotone: bool = True) -> Tensor:
    """Clean labels (posterior over 0.5), `(N, K)` bool, by a mixture of each class and given value; as DivideMix.

    Where two components mean nothing (see :class:`~hf_balancemix.core.LossMixtures`), all labels are clean.

    Args:
        losses: `(N, K)` in [0, 1], scaled as by :func:`min_max`; those that are not finite are not clean.
        labels: `(N, K)` given labels in {0, 1}, or -1 where unknown: these are not clean.
        monotone: Never let a larger loss be cleaner; False is the raw posterior.
    """
    losses, labels = losses.masked_fill(labels < 0, float("nan")), labels.clamp(min=0)
    mixtures = LossMixtures.fit(losses, labels, "dividemix")
    return mixtures.clean_probability(losses, labels, monotone=monotone) > 0.5


def clean_instances(losses: Tensor, monotone: bool = True) -> Tensor:
    """Which instances each network calls clean, `(N, C)` bool: :func:`select_clean_labels` of the scaled losses.

    Args:
        losses: `(N, C)` mean losses of N instances under C networks, any floating dtype.
        monotone: As there.

    Example:
        >>> losses = torch.tensor([[0.1], [0.12], [0.11], [0.13], [0.9], [1.0]])
        >>> clean_instances(losses).squeeze(1).tolist()
        [True, True, True, True, False, False]
    """
    return select_clean_labels(min_max(losses), torch.ones_like(losses), monotone)  # as a class for each network


def second_network(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A network like `model` whose classifier is drawn anew: the same (pretrained) backbone, another start.

    Every parameter outside the backbone, as `base_model_prefix` names it (for timm models: timm's classifier), is
    drawn by the architecture's own initialisation, as a pure function of `seed`. Buffers, such as the label embeddings
    of MS-CMA, are `model`'s.

    Raises:
        ValueError: It cannot be told where the classifier is; `model` must be one of transformers.
    """
    head: list[str] = []
    if isinstance(model, PreTrainedModel):
        with keyed_rng(seed, "second network"):
            drawn = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
        if hasattr(model, "timm_model"):
            names = getattr(model.timm_model, "pretrained_cfg", {}).get("classifier") or ()
            prefixes = tuple(f"timm_model.{name}." for name in ([names] if isinstance(names, str) else names))
            head = [name for name in drawn if name.startswith(prefixes)]
        else:
            head = [name for name in drawn if not name.startswith(model.base_model_prefix + ".")]
    if not head:
        raise ValueError(
            f"model is a {type(model).__name__}, whose classifier cannot be told from its backbone; it must be one of "
            "transformers' or timm's image classifiers; else make a second one and pass it as peer=..."
        )
    second = copy.deepcopy(model)
    second.load_state_dict({name: drawn[name] for name in head}, strict=False)
    return second


class TwoNetworks(nn.Module):
    """Two image classifiers of one architecture behind one forward pass.

    Args:
        first, second: The networks.
        scored: Whose logits count in evaluation: `"first"`, `"second"`, or the `"mean"` of both.
    """

    def __init__(self, first: nn.Module, second: nn.Module, scored: Scored = "first") -> None:
        super().__init__()
        check_choice("scored", scored, get_args(Scored))
        if first is second:
            raise ValueError("peer is the same object as model; it must be a second model; pass one, or no peer.")
        self.first, self.second, self.scored = first, second, scored

    @property
    def ordered(self) -> tuple[nn.Module, nn.Module]:
        """The network that is saved as the model (the first where the mean is scored), and its peer."""
        return (self.second, self.first) if self.scored == "second" else (self.first, self.second)

    @property
    def config(self) -> Any:
        """Of the network that is saved as the model."""
        return self.ordered[0].config

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As the networks' own."""
        for network in (self.first, self.second):
            network.activation_checkpointing_enable(**kwargs)

    def forward(self, pixel_values: Tensor, both: bool = False) -> ImageClassifierOutput:
        """`logits` `(B, K)` of what is scored, or with `both` `(B, 2, K)` of the first and the second network."""
        if both or self.scored == "mean":
            logits = torch.stack([net(pixel_values=pixel_values).logits for net in (self.first, self.second)], 1)
            return ImageClassifierOutput(logits=logits if both else logits.float().mean(1))
        return ImageClassifierOutput(logits=self.ordered[0](pixel_values=pixel_values).logits)


class CoTeachingTrainer(MixupTrainer):
    """Co-teaching with instance-level mixtures; both networks see the same mixed batches.

    The loss is the sum of the networks' binary cross-entropies (Eq. 1), each over the batch with the weight 0 for what
    the peer does not call clean. The denominator stays the size of the batch: an epoch is one pass over the clean set,
    and neither ranks nor accumulation steps change a gradient. (The original's is what is kept: docs/choices.md.)
    Partners in Mixup are drawn from the instances that both networks call clean.

    `trainer.model` is a :class:`TwoNetworks`. What is saved, to checkpoints and by `save_model`, is one ordinary
    model, the scored network (the first where the mean is scored), with its peer in the folder `peer`.

    Arguments are those of :class:`MixupTrainer`; of `args`, `label_warmup_epochs` and `monotone` are used, too.

    Args:
        scored: The network that is evaluated and saved: `"first"` or `"second"`; `"mean"` evaluates the mean of both
            networks' logits and saves the first.
        peer: The second network, of the same architecture and with another start; by default that of
            :func:`second_network`. For networks from scratch draw a second model.

    Attributes:
        clean: `(N, 2)` bool, what the first and the second network call clean; all in the warm-up.

    Raises:
        ValueError: FSDP or DeepSpeed, which split a model, is on.
    """

    method_name = "co-teaching"
    citation = """@inproceedings{han2018coteaching,
  title     = {Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels},
  author    = {Han, Bo and Yao, Quanming and Yu, Xingrui and Niu, Gang and Xu, Miao and Hu, Weihua and Tsang, Ivor and
               Sugiyama, Masashi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2018}
}"""
    _forward_options: ClassVar[dict[str, Any]] = {"both": True}
    _loss_is_the_method = True
    _ends_warmup = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: BalanceMixTrainingArguments | None = None,
        *others: Any,
        scored: Scored = "first",
        peer: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or self._arguments_class(output_dir="outputs")
        if model is None:
            raise ValueError(
                "model is None; it must be a model, as model_init draws one network and co-teaching has two; pass "
                "model=, and peer= for the second."
            )
        networks = TwoNetworks(model, peer or second_network(model, args.seed), scored)
        super().__init__(networks, args, *others, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP or DeepSpeed is on; co-teaching needs one process or DDP; switch both off.")
        self.method_settings = {} if scored == "first" else {"scored": scored}  # for model cards
        check_model(networks.ordered[1], self.class_names)
        if networks.scored == "mean":
            self.figures_note = (
                "The figures of evaluations are those of the mean of the logits of two networks. This model is one of "
                "them, the first, and its own figures were not recorded; its peer is in the folder peer."
            )
        num_instances = 0 if self.train_labels is None else self.train_labels.shape[0]
        self.clean = torch.ones(num_instances, 2, dtype=torch.bool)

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"scored": self.model.scored}

    # ---- training ----

    def _partner_weights(self) -> Tensor:
        both = self.clean.all(1).double()
        # Without an instance that both call clean: any, and pairs with an unclean partner weigh 0.
        return both / both.sum() if both.any() else super()._partner_weights()

    def _end_epoch(self, epoch: int) -> None:
        if epoch < self.warmup_epochs:
            return
        losses = self._scan_table(instance_losses)
        self.clean = clean_instances(losses, monotone=self.args.monotone)
        columns = {"first": self.clean[:, 0], "second": self.clean[:, 1], "both": self.clean.all(1)}
        self.log({f"clean_instances_{name}": clean.double().mean().item() for name, clean in columns.items()})

    def instance_weights(self, inputs: dict[str, Tensor]) -> Tensor:
        """`(B, 2)` float: 1 where the first (second) network is to learn from a pair, because its peer calls both
        instances clean, else 0."""
        clean = self.clean.flip(1)
        both = clean[inputs["index"].cpu()]
        if "minority_index" in inputs:
            both &= clean[inputs["minority_index"].cpu()]
        return both.to(inputs["labels"].device, torch.float32)

    def _loss(self, logits: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return sum(
            binary_cross_entropy(
                own, targets, weight[:, None].expand_as(targets), self.args.loss_reduction, self.pos_weight
            )
            for own, weight in zip(logits.unbind(1), self.instance_weights(inputs).unbind(1), strict=True)
        )

    # ---- checkpoints ----

    @property
    def saved_model(self) -> nn.Module:
        """The network that `save_model` writes beside its peer."""
        model = super().saved_model
        return model.ordered[0] if isinstance(model, TwoNetworks) else model

    def _run_state(self) -> dict[str, Tensor]:
        return super()._run_state() | {"clean": self.clean}

    def _reset_run_state(self) -> None:
        super()._reset_run_state()
        self.clean = torch.ones_like(self.clean)

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        super()._load_run_state(state)
        self.clean = state["clean"]

    @contextmanager
    def _as_model(self, network: nn.Module) -> Iterator[None]:
        """Inside the block `self.model` is one ordinary model, which Trainer knows how to save and load."""
        networks, self.model = self.model, network
        try:
            yield
        finally:
            self.model = networks

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model, peer = self.model.ordered
        with self._as_model(model):
            super()._save(output_dir)
        if self.args.should_save:
            peer.save_pretrained(Path(output_dir or self.args.output_dir, PEER_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folders = (Path(resume_from_checkpoint), Path(resume_from_checkpoint, PEER_FOLDER))
        for network, folder in zip(self.model.ordered, folders, strict=True):
            with self._as_model(network):
                super()._load_from_checkpoint(str(folder))

    def _load_best_model(self) -> None:
        logger.info("Loading both networks of the best checkpoint, %s.", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)
