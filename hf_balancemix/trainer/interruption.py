"""A run that is told to end saves first: on SIGTERM and SIGUSR1, at a boundary of steps, on all ranks at the same one.

What is promised, measured and tested: docs/reliability.md. `enable_jit_checkpoint` of transformers has nothing to do
with it and is refused: it saves between a step's gradients and their use, and on the rank alone that got the signal.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from hf_balancemix.core.distributed import all_reduce_sum
from hf_balancemix.files import quote
from hf_balancemix.trainer.hub import CREATION, HubTrainer

logger = logging.getLogger(__name__)

# SLURM sends SIGUSR1 where a job asks to be warned; Windows has none.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
EVALUATION_DUE = "evaluation_due"  # a mark in a checkpoint that was written before the evaluation of its step


class TrainingInterrupted(SystemExit):
    """Ends a training that a signal stopped, after its checkpoint was written.

    A script that does not catch it ends with the exit status :attr:`code`, without a traceback, and `finally` blocks
    run; a notebook shows the line and keeps its kernel. `except Exception` does not catch it.

    Attributes:
        code: 128 plus the signal's number, as shells report it: 143 for SIGTERM, 138 for SIGUSR1 on Linux. Not 0, so
            that a scheduler does not take the run for a finished one.
        checkpoint: Where to resume from; None if no step was trained.
    """

    code: int

    def __init__(self, message: str, code: int, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.code, self.checkpoint = code, checkpoint


class StoppedMidway(BaseException):
    """Raised on all ranks alike where a training is left: after a step, or within an evaluation or a scan.

    No Exception: callbacks and libraries that go on after one must not swallow it.
    """


class StopSignals:
    """Inside the block SIGTERM and SIGUSR1 are remembered instead of ending the process; afterwards as before.

    Nothing is changed off the main thread, where Python allows no handlers, nor for a signal that somebody else
    handles or ignores.

    Attributes:
        received: The signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._in_block = multiprocessing.RawValue("b", 0)  # seen by worker processes, too

    def __reduce__(self) -> Any:  # for copies of a trainer; handlers are not copied
        return StopSignals, ()

    def __enter__(self) -> StopSignals:
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._remember)
            elif callable(signal.getsignal(number)):
                text = "%s has a handler already, which stays: have it call trainer.request_stop() to save."
                logger.warning(text, signal.Signals(number).name)
        self._in_block.value = 1
        return self

    def __exit__(self, *_: object) -> None:
        self._in_block.value = 0
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: object) -> None:
        if self.received is None:  # the first one counts; a second one, while saving, changes nothing
            self.received = number

    def in_worker(self, then: Callable[[int], object] | None = None) -> Callable[[int], None]:
        """A `worker_init_fn` of a DataLoader: signals to a whole process group leave the workers alone meanwhile.

        The step that ends needs them. They end with the process that they work for.
        """
        return partial(_spare_worker, self._in_block, then)


def _spare_worker(in_block: Any, then: Callable[[int], object] | None, worker_id: int) -> None:
    def on_sigterm(number: int, frame: object) -> None:
        if not in_block.value:
            os._exit(0)  # not needed any more

    for number in SIGNALS:
        signal.signal(number, on_sigterm if number == signal.SIGTERM else signal.SIG_IGN)
    if then is not None:
        then(worker_id)


class InterruptibleTrainer(HubTrainer):
    """Trainer that, told to end by SIGTERM or SIGUSR1 on any rank, ends the step, writes a checkpoint and leaves.

    The ranks agree where they reduce a step's flags anyway; in evaluations during the training also before each batch,
    and in scans at the end. An evaluation or a scan is broken off, and made up for by the run that resumes. Nothing
    is pushed. :meth:`train` raises :class:`TrainingInterrupted`.
    """

    _stop_signal: int | None = None  # what the ranks agreed on
    _evaluating = False  # where an evaluation may be broken off
    _evaluation_due = False  # of the step just done
    _epoch_ended = False  # all that comes before an epoch's end was done
    _has_best_weights = False  # not those of the last step
    _saved: Path | None = None  # the checkpoint that this run wrote last, or began with
    _trial: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._signals = StopSignals()
        super().__init__(*args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trainer's; a `TrainingInterrupted`, which is a SystemExit, where a signal stopped it."""
        self._stop_signal, self._trial = None, trial
        self._evaluation_due = self._evaluating = self._epoch_ended = self._has_best_weights = False
        self._saved = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        with self._signals:
            try:
                output = super().train(resume_from_checkpoint, trial, *args, **kwargs)
            except StoppedMidway:
                raise self._leave() from None
        if self._signals.received is not None:
            name = signal.Signals(self._signals.received).name
            logger.warning("%s came when the training was over, and what follows goes on; send it again.", name)
        return output

    def request_stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End the training as SIGTERM or SIGUSR1 would: from a signal handler of your own, or from another thread."""
        if signal_number not in SIGNALS:
            names = " or ".join(number.name for number in SIGNALS)
            raise ValueError(f"signal_number is {quote(signal_number)}; it must be {names}; leave it out for SIGTERM.")
        self._signals.received = int(signal_number)

    # ---- where the ranks agree ----

    def _received(self) -> Tensor:
        """`(number of SIGNALS,)` int64: 1 for the one that this rank received, to be summed over the ranks."""
        return torch.tensor([int(number == self._signals.received) for number in SIGNALS], device=self.args.device)

    def _agree(self, received: Iterable[int]) -> None:
        """Take note of what all ranks together received."""
        self._stop_signal = next((int(number) for number, ranks in zip(SIGNALS, received, strict=True) if ranks), None)

    def _asked_to_stop(self) -> bool:
        """Must be called on every rank: whether any was told to end."""
        if self._stop_signal is None:
            self._agree(all_reduce_sum(self._received()).tolist())
        return self._stop_signal is not None

    def _stop_if_asked(self) -> None:
        """Must be called on every rank, where what is unfinished can be done again."""
        if self._asked_to_stop():
            raise StoppedMidway

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called after each step, and again after each epoch."""
        control = self.control
        if self._stop_signal is not None:
            self._evaluation_due |= control.should_evaluate
            control.should_evaluate = control.should_save = False
        self._evaluating = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except StoppedMidway:
            self._evaluation_due = True
        finally:
            self._evaluating = False
        # After the last step of an epoch comes the call after the epoch first, which knows what is due then.
        last = float(self.state.epoch or 0).is_integer() or control.should_epoch_stop or control.should_training_stop
        if self._stop_signal is not None and (self._epoch_ended or not last):
            raise StoppedMidway

    def _make_up_evaluation(self) -> None:
        """Must be called on every rank, before the first step: the evaluation that an interrupted run broke off."""
        if self.state.global_step == 0:
            self._saved = None  # where auto_find_batch_size begins again
        if self._saved is None or not (self._saved / EVALUATION_DUE).exists():
            return
        self._evaluating = True
        try:
            metrics = self._evaluate(self._trial, None)
        finally:
            self._evaluating = False
        if self._determine_best_metric(metrics=metrics, trial=self._trial):
            self.state.best_model_checkpoint = str(self._saved)

    def _load_best_model(self) -> None:
        self._has_best_weights = True
        super()._load_best_model()

    # ---- leaving ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._stop_signal is None:  # there may be no time for it; the run that resumes pushes
            super()._push_from_checkpoint(checkpoint_folder)

    def _leave(self) -> TrainingInterrupted:
        """Must be called on every rank: write a checkpoint of the step just done if there is none."""
        assert self._stop_signal is not None
        begin, step = time.perf_counter(), self.state.global_step
        checkpoint = Path(self._get_output_dir(self._trial), f"checkpoint-{step}")
        there = self._saved is not None and self._saved.resolve() == checkpoint.resolve()
        if step and not there and not self._has_best_weights:
            self._save_checkpoint(self.model, self._trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self._evaluation_due and self._saved is not None and self.args.should_save:
            (self._saved / EVALUATION_DUE).touch()
        seconds = time.perf_counter() - begin
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # trackers write what they hold
        self.is_in_train = False
        if self._repository is not None:
            self._repository.patience = min(self._repository.patience, CREATION)
        name = signal.Signals(self._stop_signal).name
        if self._saved is None:
            text = f"{name} stopped the run after step {step}, and there is no checkpoint: start it again."
        elif self.args.save_only_model:
            text = f"{name} stopped the run after step {step}; {self._saved} has the model only (save_only_model)."
        else:
            text = (
                f"{name} stopped the run after step {step}; {self._saved} is whole ({seconds:.1f} s). To go on, start "
                "the same run with --resume_from_checkpoint last, or train(resume_from_checkpoint=True)."
            )
        if self.is_world_process_zero():
            logger.warning(text)
        return TrainingInterrupted(text, 128 + self._stop_signal, self._saved)
