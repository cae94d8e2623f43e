"""A Trainer whose checkpoints are whole or not there, and whose resumed runs load what was saved."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from hf_balancemix.core.distributed import broadcast_buffers
from hf_balancemix.files import one_line, quote
from hf_balancemix.models.peft_models import (
    base_digest,
    has_adapters,
    is_peft_model,
    load_adapters,
    stored_adapters,
    without_card_of_peft,
)
from hf_balancemix.models.strangers import check_folder
from hf_balancemix.trainer import checkpoints
from hf_balancemix.trainer.hub import HubTrainer
from hf_balancemix.trainer.interruption import EVALUATION_DUE
from hf_balancemix.trainer.non_finite import FiniteTrainer
from hf_balancemix.trainer.same_run import changed_arguments, refused_changes
from hf_balancemix.trainer.sole_run import sole_run

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
STATE_FILE = "balancemix_state.safetensors"
ARGUMENTS_FILE = "training_args.json"
_SHOULD_BE_EQUAL = ("global_batch_size", "ranks", "settings", "images")
CHECKPOINT_FORMAT = 2  # 1, which was not written, has tables of all labels


class ResumableTrainer(FiniteTrainer):
    """Trainer with whole checkpoints.

    A manifest is written last, after a barrier and before any push; only checkpoints that it fits are resumed from,
    kept or counted in rotation. Weights come back through `from_pretrained`. No pickled arguments are written. Of a
    `peft.PeftModel` a checkpoint holds the adapters; the model under them must be the same when a run is resumed.
    """

    model: nn.Module
    _not_pushed = (*HubTrainer._not_pushed, RUN_FILE, STATE_FILE, checkpoints.MANIFEST)
    _hidden_arguments: dict[str, Any] | None = None  # what `args` do not say while a checkpoint is being written
    _kept_arguments: Mapping[str, Any] = MappingProxyType({})  # of the checkpoint, and used instead of those of `args`
    _base: tuple[nn.Module, str] | None = None  # a PeftModel, and the digest of its frozen weights

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; with `resume_from_checkpoint=True` from the last whole checkpoint in `output_dir`, if there is one.

        Raises:
            ValueError: The checkpoint is not whole, or it belongs to another data set, N, K or seed; or an argument
                that was changed since the trainer was made is refused; or another run trains into the folder, or
                nothing can be written there.
        """
        self._read_arguments()
        with self._sole_run(args[0] if args else kwargs.get("trial")):
            return self._train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _sole_run(self, trial: Any) -> Iterator[None]:
        """Must be called on every rank: one of them holds the folder for all."""
        with ExitStack() as stack:
            problem = None
            if self.args.should_save:
                weights = (*self.model.parameters(), *self.model.buffers()) if self.model is not None else ()
                num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
                try:
                    stack.enter_context(sole_run(Path(self._get_output_dir(trial)), num_bytes))
                except ValueError as error:
                    problem = error
            if self._on_any_rank(problem):
                raise problem or ValueError("output_dir cannot be used, as the message of another rank says.")
            yield

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._kept_arguments = {}
        self._base = None  # which may have been changed since the last training
        checkpoint = None
        if resume_from_checkpoint is True:
            with self.args.main_process_first(local=False):
                checkpoint = checkpoints.last_whole_checkpoint(self._output_dir)
            if checkpoint is None:
                logger.info("No whole checkpoint in %s: training starts from the beginning.", self._output_dir)
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
            logger.info("Resuming from %s.", checkpoint)
        if self.model is not None:  # as it is between the trials of hyperparameter_search
            self._drop_thresholds(self.model)
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _read_arguments(self) -> None:
        """Called before each training, by `args` that may have changed since the last one."""

    def _drop_thresholds(self, model: nn.Module) -> None:
        """Thresholds are of the weights on which they were tuned, which training changes."""
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        tuned = [config for config in configs if getattr(config, "thresholds", None) is not None]
        for config in tuned:
            config.thresholds = None
        if tuned:
            logger.warning(
                "the model's thresholds were tuned on the weights before this training and are removed from its "
                "config; tune them anew (tune_thresholds)."
            )

    def _run_facts(self) -> dict[str, Any]:
        """What must be the same when a run is resumed; `global_batch_size`, `ranks`, `settings` and `images` should
        be."""
        raise NotImplementedError

    def _checkpoint_facts(self) -> dict[str, Any]:
        facts = self._run_facts()
        if is_peft_model(self.model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            if self._base is None or self._base[0] is not self.model:
                self._base = (self.model, base_digest(self.model))
            facts["base_weights"] = self._base[1]
        return facts

    def _check_checkpoint(self, checkpoint: Path) -> None:
        problem = checkpoints.check(checkpoint)
        if problem is None and not (checkpoint / RUN_FILE).is_file():
            problem = f"{RUN_FILE} is missing."
        if problem is not None:
            raise ValueError(
                f"cannot resume from {checkpoint}: {problem[:-1]}; it must be whole; pass another, or True, the last."
            )
        own, arguments = self._checkpoint_facts(), checkpoint / ARGUMENTS_FILE
        with _reading(checkpoint):
            saved = json.loads((checkpoint / RUN_FILE).read_text())
            old = json.loads(arguments.read_text()) if arguments.is_file() else {}
            for facts in (saved, old, saved.get("settings") or {}):
                dict(facts)  # else it is another file of that name
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            check_folder(checkpoint)
            for file in checkpoint.glob("*.safetensors"):
                with safe_open(file, "pt"):
                    pass
        if (version := saved.get("format", 1)) != CHECKPOINT_FORMAT:
            raise ValueError(
                f"cannot resume from {checkpoint}: another version of hf_balancemix wrote it, in format "
                f"{quote(version)}; it must be in format {CHECKPOINT_FORMAT}; resume with that version, or start in "
                "another output_dir."
            )
        new = json.loads(json.dumps(self.args.to_dict()))
        refused = [name for name in own if name not in _SHOULD_BE_EQUAL and saved.get(name) != own[name]]
        then, now = (saved, own) if refused else (old, new)
        for name in refused or refused_changes(old, new):
            raise ValueError(
                f"cannot resume from {checkpoint}: its {name} is {quote(then.get(name))}, this run's is "
                f"{quote(now[name])}; they must be equal; resume with the data and settings of the checkpoint, or "
                "start in another output_dir."
            )
        saved, own = ({**facts, **(facts.get("settings") or {})} for facts in (saved, own))
        known = [name for name in own if name != "settings" and name in saved]
        changes = {name: (saved[name], own[name], True) for name in known if saved[name] != own[name]}
        changes |= {name: (*values, is_used) for name, *values, is_used in changed_arguments(old, new)}
        self._kept_arguments = {name: then for name, (then, _, is_used) in changes.items() if not is_used}
        for name, (then, now, is_used) in changes.items() if self.is_world_process_zero() else ():
            text = "%s was %s at the checkpoint and is %s now: %s is used from here on, and the run is not exactly %s."
            which, result = (now, "what it would have been") if is_used else (then, "what was asked for")
            logger.warning(text, name, quote(then), quote(now), quote(which), result)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with without_card_of_peft(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self._output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to load
            values = self.args.to_dict() | dict(self._kept_arguments) | (self._hidden_arguments or {})
            (folder / ARGUMENTS_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights(f"at step {self.state.global_step}, where a checkpoint was to be written")
        # A resumed run gives every rank the checkpoint's batch-norm statistics, which are the first rank's.
        broadcast_buffers(self.model)
        checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            checkpoints.remove_manifest(checkpoint)  # a resumed run may write the same step again
            (checkpoint / EVALUATION_DUE).unlink(missing_ok=True)
        # Trainer rotates before a manifest could be there, so that a kill in between could leave nothing whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._hidden_arguments = {"save_total_limit": limit}
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._hidden_arguments = limit, None
        self._seal(checkpoint)
        if self.args.should_save and limit:
            best = self.state.best_model_checkpoint
            checkpoints.rotate(checkpoint.parent, limit, keep=[checkpoint] + ([Path(best)] if best else []))

    def _seal(self, checkpoint: Path) -> None:
        """Must be called on every rank: write the manifest once all ranks have written their files."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save and not (checkpoint / checkpoints.MANIFEST).exists():
            checkpoints.write_manifest(checkpoint)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._run_state()
        if self.args.should_save:
            Path(output_dir, RUN_FILE).write_text(json.dumps(self._checkpoint_facts(), indent=2) + "\n")
            if state:
                save_file({name: value.contiguous() for name, value in state.items()}, Path(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                file = Path(checkpoint, STATE_FILE)
                self._load_run_state(load_file(file) if file.is_file() else {})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _run_state(self) -> dict[str, Tensor]:
        """Called on every rank: what the method remembers, as tensors."""
        return {}

    def _load_run_state(self, state: dict[str, Tensor]) -> None:
        pass

    def _reset_run_state(self) -> None:
        """Called on every rank before the first step of a training, which may not be the trainer's first: forget."""

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # Stock Trainer goes on with the epoch in which `max_steps` ended, by one step.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _reading(resume_from_checkpoint):
            load_weights = self._load_weights(resume_from_checkpoint, model)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_weights()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: keys that Trainer does not find are found by `_load_weights`, or refused by it."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        load_weights = self._load_weights(self.state.best_model_checkpoint)
        super()._load_best_model()
        load_weights()

    def _load_weights(self, checkpoint: str | None, model: nn.Module | None = None) -> Callable[[], Any]:
        """Refuse weights that do not fit, before anything changes; what is returned loads them.

        transformers#48805: keys that are renamed on save are not found again by Trainer's plain load_state_dict.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return lambda: None
        own: Any = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        if is_peft_model(own):
            adapters, found = stored_adapters(own, str(checkpoint))
        elif has_adapters(str(checkpoint)):
            raise ValueError(
                f"{checkpoint} holds adapters of peft, and the trainer's model is a {type(own).__name__}; it must be "
                "a PeftModel; make it with peft.get_peft_model as for the checkpoint's run."
            )
        else:
            loaded, info = type(own).from_pretrained(
                checkpoint,
                config=copy.deepcopy(own.config),
                dtype=own.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
            )
            found = {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")}
        # What does not come from the file would be random, without an error.
        if any(found.values()):
            names = sorted(name if isinstance(name, str) else name[0] for keys in found.values() for name in keys)
            counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in found.items())
            raise ValueError(
                f"{checkpoint} holds other weights than those of the trainer's {type(own).__name__}: {counts} "
                f"tensors ({', '.join(names[:3])}, ...). Needed is a checkpoint of the same architecture and sizes: "
                "build the model as the checkpoint's config.json says, or start in another output_dir."
            )
        if is_peft_model(own):
            return lambda: load_adapters(own, adapters)
        return lambda: own.load_state_dict(loaded.state_dict())


@contextmanager
def _reading(checkpoint: str | Path | None) -> Iterator[None]:
    """What a damaged file of a checkpoint makes its readers raise, as one sentence; one that names it stays."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(checkpoint) in str(error):
            raise
        start = f"cannot resume from {checkpoint} ("
        end = "); it must be as it was written; pass another, or True, the last."
        text = f"{type(error).__name__}: {error}"
        raise ValueError(start + one_line(text, max(60, 390 - len(start + end))) + end) from error
