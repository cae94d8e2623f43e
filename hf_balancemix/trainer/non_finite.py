"""What is not finite is noticed: logits, losses and weights that hold NaN or an infinity."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import TrainOutput

from hf_balancemix.core.distributed import all_reduce_sum, world
from hf_balancemix.trainer.interruption import InterruptibleTrainer

logger = logging.getLogger(__name__)

_ADVICE = "lower learning_rate, train in float32, or look for damaged images and labels"


def non_finite_weight(model: nn.Module, buffers: bool = True) -> str | None:
    """The name of the first parameter that is not finite, or buffer that holds NaN; None if there is none.

    Of parameters that are spread over the ranks (FSDP, ZeRO-3) only this rank's share is looked at.
    """
    # A buffer may hold an infinity on purpose, as masks of attention do.
    tests = {name: ~_share(p).detach().isfinite().all() for name, p in model.named_parameters()}
    tests |= {name: b.isnan().any() for name, b in model.named_buffers() if buffers and b.is_floating_point()}
    if not tests:
        return None
    found = torch.stack([test.to(next(iter(tests.values())).device) for test in tests.values()])
    return None if not found.any() else [*tests][int(found.int().argmax())]


def _share(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


class FiniteTrainer(InterruptibleTrainer):
    """Trainer that stops at a step whose logits or loss are not finite, or with `args.on_nan="skip"` leaves it out.

    A step is one of the optimiser, over all ranks and accumulation steps, and all ranks decide alike. One that is left
    out is counted and logged (`skipped_steps`, since the line before); weights, buffers, optimiser and average stay as
    they were. Weights that are not finite are neither saved nor pushed. An overflow of float16's scaled gradients is
    no such step: the scaler leaves it out as ever.
    """

    args: Any
    model: nn.Module
    _flags: Tensor | None = None  # `(2,)` bool: logits, losses of the step so far that are not finite
    _buffers: list[Tensor] | None = None  # before the step
    _num_steps = _num_skipped = 0  # since the loss was logged

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; a ValueError where it leaves weights that are not finite."""
        self._flags = self._buffers = None
        self._num_steps = self._num_skipped = 0
        output = super().train(*args, **kwargs)
        self._check_weights("at the end of training")
        return output

    def _watch(self, logits: Tensor | None = None, loss: Tensor | None = None) -> None:
        """Remember whether they are finite, without waiting for the device."""
        values = [torch.zeros((), device=self.args.device) if x is None else x.detach() for x in (logits, loss)]
        flags = torch.stack([~x.isfinite().all() for x in values])
        self._flags = flags if self._flags is None else self._flags | flags

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Trainer's; the last micro-batch of a step decides on it."""
        if self.args.on_nan == "skip" and self._buffers is None:
            self._buffers = [buffer.clone() for buffer in self.model.buffers()]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch(loss=loss)
        if self.accelerator.sync_gradients:
            self._check_step()
            self._flags = self._buffers = None
        return loss

    def _check_step(self) -> None:
        """Must be called on every rank, after a step's gradients were made and before they are used."""
        self._num_steps += 1
        flags: Tensor = self._flags  # type: ignore[assignment]
        # One exchange a step: whether a rank was told to end goes with it.
        logits, loss, *received = all_reduce_sum(torch.cat([flags.long(), self._received()])).tolist()
        self._agree(received)
        if not (logits or loss):
            return
        names = [name for name, bad in (("logits", logits), ("loss", loss)) if bad]
        text = (
            f"the {' and the '.join(names)} of step {self.state.global_step + 1} (epoch {self.state.epoch or 0:.2f})"
        )
        for buffer, before in zip(self.model.buffers(), self._buffers or (), strict=False):
            buffer.copy_(before)
        weight = non_finite_weight(self.model, buffers=False)  # of buffers the step itself may have spoilt some
        if self.args.on_nan == "stop" or self._on_any_rank(weight):
            text += "" if weight is None else f", and before it {weight}, a weight of the model,"
            fix = "" if self.args.on_nan == "skip" else ", or leave out such steps (on_nan='skip')"
            raise ValueError(f"{text} are not finite; they must be; {_ADVICE}{fix}.")
        if world()[0] == 0:
            logger.warning("%s are not finite: the step is skipped.", text)
        self._skip_step()

    def _skip_step(self) -> None:
        """Must be called on every rank: the step's gradients have no effect."""
        self._num_skipped += 1
        for parameter in self.model.parameters():
            if parameter.grad is None:
                continue
            if self.accelerator.scaler is None:
                parameter.grad = None  # optimisers do not touch such a parameter
            else:
                parameter.grad.fill_(torch.nan)  # the scaler then leaves out the step, and minds if there are none

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; its loss, which passes over what is not finite, is left out where nothing else was."""
        if "loss" in logs:
            if self._num_skipped:
                logs["skipped_steps"] = self._num_skipped
                if self._num_skipped == self._num_steps:
                    del logs["loss"]
            self._num_steps = self._num_skipped = 0
        super().log(logs, start_time)

    # ---- weights ----

    @staticmethod
    def _on_any_rank(problem: object) -> bool:
        """Must be called on every rank: whether any has a problem."""
        return bool(all_reduce_sum(torch.tensor(int(problem is not None))))

    def _check_weights(self, when: str) -> None:
        """Must be called on every rank."""
        weight = non_finite_weight(self.model)
        if self._on_any_rank(weight):
            raise _refusal(weight, when)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; a ValueError where a weight is not finite, as in `push_to_hub`."""
        weight = non_finite_weight(self.model)
        # With FSDP and DeepSpeed all ranks come here, each with its share; else it may be one, with all weights.
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._on_any_rank(weight) if spread else weight is not None:
            raise _refusal(weight, "to be saved")
        super().save_model(output_dir, _internal_call)


def _refusal(weight: str | None, when: str) -> ValueError:
    return ValueError(
        f"the model's {weight or 'weights on another rank'} is not finite {when}; it must be; go back to an earlier "
        f"checkpoint, and {_ADVICE}."
    )
