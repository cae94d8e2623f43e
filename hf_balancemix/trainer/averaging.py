"""A moving average of the weights: what is evaluated and saved, while training goes on from the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from hf_balancemix.core.distributed import broadcast_buffers
from hf_balancemix.trainer.resumable import ResumableTrainer
from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments

AVERAGE_FILE = "ema.safetensors"


def check_average(trainer: AveragingTrainer) -> None:
    """A ValueError where the model cannot be averaged, or not be evaluated and resumed then."""
    model, problem = trainer.model, None
    if not isinstance(model, PreTrainedModel):
        problem = f"the trainer has a {type(model).__name__}, and only a single model of transformers is averaged"
    elif trainer.model_init is not None:
        problem = "with model_init the model is made anew by each training; pass the model itself"
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        problem = "FSDP and DeepSpeed keep parts of the weights on each process, of which no average is made"
    elif trainer.args.save_only_model:
        problem = "save_only_model leaves the average out of the checkpoints"
    elif any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        problem = "the model's weights are in half precision, which loses such small steps; load it in float32"
    if problem is not None:
        decay = trainer.args.ema_decay
        raise ValueError(f"ema_decay is {decay}, but {problem}. Set ema_decay to 0, which averages nothing.")


class WeightAverage(TrainerCallback):
    """Exponential moving average of all parameters and buffers of a model.

    It starts as the weights before the first step, and after every optimiser step becomes
    `decay * average + (1 - decay) * weights`, with the same decay from the first step on, as ASL and ML-Decoder were
    published with (Ben-Baruch et al., ICCV 2021; Ridnik et al., WACV 2023). That holds for batch-norm statistics, too;
    of what is not floating point (counters, index tables) the average has the present value.

    There is an average (`active`) from the start of a training to its end, when it takes the place of the weights of
    `model`, the bare model that is trained, in float32. `decay` is in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.active = self._in_place = self._loaded = False
        lerp = get_ema_multi_avg_fn(decay)

        def update(averages: PARAM_LIST, values: PARAM_LIST, num_averaged: Tensor | int) -> None:
            if averages[0].is_floating_point():
                lerp(averages, values, num_averaged)
            else:  # a mean of integers would be rounded down, 7 and 7 to 6
                for average, value in zip(averages, values, strict=True):
                    average.copy_(value)

        self.skip_next = False  # the next step of the optimiser does nothing
        self._average = AveragedModel(model, multi_avg_fn=update, use_buffers=True).requires_grad_(False)

    def _start(self) -> None:
        # With bf16_full_eval Trainer moves the model to the GPU only when training begins.
        self._average.module.to(next(self.model.parameters()).device)
        self._average.n_averaged.zero_()
        self._average.update_parameters(self.model)  # the first one copies
        self.active = True

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The training that begins next, or goes on, has this average."""
        self._start()
        self._average.module.load_state_dict(state)
        self._loaded = True

    def state_dict(self) -> dict[str, Tensor]:
        """The average, with the names of the model's state dict; a copy on the CPU."""
        state = self._average.module.state_dict()
        return {name: value.to("cpu", copy=True).contiguous() for name, value in state.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights, if there are any; afterwards its own again."""
        if not self.active or self._in_place:
            yield
            return
        self._swap()
        self._in_place = True
        try:
            yield
        finally:
            self._swap()
            self._in_place = False

    def _swap(self) -> None:
        own, theirs = (chain(module.parameters(), module.buffers()) for module in (self.model, self._average.module))
        for one, other in zip(own, theirs, strict=True):
            one.data, other.data = other.data, one.data  # optimiser and DDP keep hold of the parameter itself

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self._loaded:
            self._start()
        self._loaded = False

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if not self.skip_next:
            self._average.update_parameters(self.model)
        self.skip_next = False

    def on_train_end(self, args, state, control, **kwargs) -> None:
        broadcast_buffers(self._average.module)  # every rank averaged its own batch-norm statistics
        self.model.load_state_dict(self._average.module.state_dict())
        self.active = self._loaded = False


class AveragingTrainer(ResumableTrainer):
    """Trainer that evaluates, saves and pushes the average of the weights where `args.ema_decay` asks for one.

    In a checkpoint `model.safetensors` has the weights from which training goes on, and `ema.safetensors` their
    average; a push in mid-training has the average as its model, and after training it is left in the model.
    """

    args: MultiLabelTrainingArguments
    _average: WeightAverage | None = None

    def _begin_averaging(self) -> None:
        """To be called after other callbacks were added, whose work at the end is with the weights themselves."""
        if self.args.ema_decay == (0 if self._average is None else self._average.decay):
            return
        if self._average is not None:
            self.remove_callback(self._average)
            self._average = None
        if self.args.ema_decay:
            check_average(self)
            self._average = WeightAverage(self.model, self.args.ema_decay)
            self.add_callback(self._average)

    def _skip_step(self) -> None:
        super()._skip_step()
        if self._average is not None:
            self._average.skip_next = True

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside the block the model has its averaged weights, if there are any."""
        return nullcontext() if self._average is None else self._average.in_place()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the averaged weights if there are any, and the same batch-norm statistics on every rank."""
        with self._averaged():
            broadcast_buffers(self.model)
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with nullcontext() if self._hidden_arguments else self._averaged():  # a checkpoint has the weights themselves
            super()._save(output_dir, state_dict)

    def _set_model_aside(self, checkpoint: Path, folder: Path) -> None:
        if self._average is None:
            return super()._set_model_aside(checkpoint, folder)
        with self._averaged():  # what the card's figures are of
            super()._save(str(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            save_file(self._average.state_dict(), Path(output_dir, AVERAGE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_average(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str | None) -> None:
        if self._average is not None and checkpoint is not None:
            self._average.load_state_dict(load_file(Path(checkpoint, AVERAGE_FILE)))
