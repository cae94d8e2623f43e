"""Pushes to the Hub that cannot harm a run. What is promised, none of it by transformers' Trainer:

- A push is one commit of a repository that loads: model, image processor, arguments, card, and the model's code where
  asked for; no pickles.
- Its files are first set aside in `output_dir/_push`, as a file that grows meanwhile would lose the whole push.
- What fails, be it the Hub, the network or the disk, is a warning without the token; the next push makes up for it.
- At the end of `train`, in `push_to_hub` and when the process ends, rank 0 waits for the newest push, for half of
  `ddp_timeout` at most. One that failed is tried once more; what is not on the Hub then is an error with the command
  that pushes it later. (A request that is never answered has no limit of its own; while files are sent without hf_xet,
  it does keep the process from ending.)
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_token, validate_repo_id
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_balancemix.files import is_temporary
from hf_balancemix.report.model_card import CARD_FILE, MARK, is_own_text, write_model_card

logger = logging.getLogger(__name__)

CREATION = 15.0  # seconds that a run waits for its repository before it starts all the same
LAST_CHECKPOINT = "last-checkpoint"  # where strategy "checkpoint" keeps it in the repository
_LINKED_FROM = 2**20  # bytes; smaller files are copied
# The names that from_pretrained looks for: one that an earlier push left behind could be loaded instead of ours.
# An adapter_config.json is enough for that: adapters would be put on a model that they are merged into.
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)


def describe(error: Exception, token: str | bool | None) -> str:
    """An error in one line without any token: neither `token`, nor the one that huggingface_hub finds itself."""
    text = f"{type(error).__name__}: {error}"
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "<token>").replace(repr(secret)[1:-1], "<token>")
    return " ".join(re.sub(r"hf_\w{8,}", "<token>", text).split()).rstrip(".") + "."


def stale_files(theirs: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Files of a repository that must go when `ours` are committed: other weights, and a last checkpoint's rest."""
    ours, start = set(ours), f"{LAST_CHECKPOINT}/"
    replaced = any(name.startswith(start) for name in ours)
    old = [name for name in theirs if _WEIGHTS.fullmatch(name) or (replaced and name.startswith(start))]
    return [name for name in old if name not in ours]


def set_aside(source: Path, target: Path, skip: Iterable[str] = (), link: bool = False) -> None:
    """Put the files below `source` also into `target`, where later changes of the originals do not reach them.

    What matches the patterns `skip`, linked folders and files that `whole_file` has not finished are left out. With
    `link` large files are linked where the file system can: the originals may then be deleted, but not written to.
    """
    skipped = shutil.ignore_patterns(*skip)

    def left_out(folder: str, names: list[str]) -> set[str]:
        paths = [Path(folder, name) for name in names]
        kept = {path.name for path in paths if path.is_file() or (path.is_dir() and not path.is_symlink())}
        return {name for name in names if name not in kept or is_temporary(name)} | skipped(folder, names)

    def copy(file: str, to: str) -> None:
        if link and os.path.getsize(file) >= _LINKED_FROM:
            with suppress(OSError):  # no hard links here
                return os.link(os.path.realpath(file), to)
        shutil.copyfile(file, to)

    shutil.copytree(source, target, ignore=left_out, copy_function=copy, dirs_exist_ok=True)


@dataclass
class Push:
    """What is to be one commit."""

    folder: Path  # its files, which nobody changes any more; removed when they are, or newer ones will be, on the Hub
    title: str
    revision: str | None  # the branch; None: main
    future: Future[CommitInfo | None] = field(default_factory=Future)  # never raises: None where there is no commit


@dataclass
class HubRepository:
    """A model repository on the Hub that a run is pushed to. Failures are logged: nothing here raises."""

    repo_id: str  # "user/name", or "name" for the owner of the token
    args: TrainingArguments
    api: HfApi
    private: bool | None  # for a repository that is made here; None: as its owner's settings say
    pushes: list[Push] = field(default_factory=list)  # the newest one, after those that have not ended
    keeps_card: bool = False  # somebody's own, as was said

    def __post_init__(self) -> None:
        self.workdir = Path(self.args.output_dir or ".", "_push")  # may hold remains of an earlier run
        self.patience = self.args.ddp_timeout / 2  # the other ranks would take a rank 0 that waits longer for dead
        # Not atexit, which is too late: uploads of huggingface_hub schedule futures, which Python refuses by then.
        threading._register_atexit(self.finish)  # type: ignore[attr-defined]

    @contextmanager
    def reported(self, what: str) -> Iterator[None]:
        """Turns a failure in the block into a warning."""
        try:
            yield
        except Exception as error:
            reason = describe(error, self.api.token)
            logger.warning("%s failed (%s), which does not affect the run: %s", what, self.repo_id, reason)

    def create(self) -> None:
        """Make the repository on the Hub if it is not there; after `CREATION` seconds in the background."""
        thread = threading.Thread(
            target=self.reported("Creating the repository on the Hub")(self._create), daemon=True
        )
        thread.start()
        thread.join(min(CREATION, self.patience))

    def _create(self) -> None:
        # Said here, because the HTTP client logs such a token.
        if isinstance(self.api.token, str) and not re.fullmatch(r"[!-~]+", self.api.token):
            raise ValueError("hub_token holds a blank or the like; it must not; pass it as the Hub shows it")
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id

    def push(self, title: str, revision: str | None, fill: Callable[[Path], None]) -> Push | None:
        """Push what `fill` puts into a folder, in the background; None where it cannot."""
        self.pushes = [push for push in self.pushes if not push.future.done()]
        for path in set(self.workdir.glob("*")) - {push.folder for push in self.pushes}:
            shutil.rmtree(path, ignore_errors=True)
        push = Push(self.workdir / str(time.time_ns()), title, revision)
        with self.reported(f"Setting aside {title!r} for the Hub"):
            push.folder.mkdir(parents=True)
            fill(push.folder)
            self.pushes.append(push)
            self._start(push)
            return push
        return None

    def _start(self, push: Push) -> None:
        earlier = [other.future for other in self.pushes if other is not push]
        future = push.future = Future()

        def run() -> None:
            wait(earlier)
            info = None
            if push is self.pushes[-1] or self.args.hub_always_push:
                with self.reported(f"Push {push.title!r} to the Hub"):
                    info = self._commit(push)
            if info is not None or push is not self.pushes[-1]:
                shutil.rmtree(push.folder, ignore_errors=True)
            future.set_result(info)

        # Not HfApi.run_as_future: when Python ends, it waits for that, for ever where a request is never answered.
        threading.Thread(target=run, daemon=True).start()

    def _commit(self, push: Push) -> CommitInfo:
        paths = [path for path in sorted(push.folder.rglob("*")) if path.is_file()]
        ours = {path.relative_to(push.folder).as_posix(): path for path in paths}
        if not ours:  # which the client would take for nothing new
            raise FileNotFoundError(f"{push.folder} holds no file any more")
        self._create()
        theirs = self.api.list_repo_files(self.repo_id, revision=push.revision)
        if CARD_FILE in theirs and CARD_FILE in ours and MARK in ours[CARD_FILE].read_text("utf-8", "replace"):
            url = hf_hub_url(self.repo_id, CARD_FILE, revision=push.revision)
            response = get_session().get(url, headers=build_hf_headers(token=self.api.token)).raise_for_status()
            if is_own_text(response.text):
                if not self.keeps_card:
                    logger.warning("README.md of %s is somebody's own and stays; remove it for ours.", self.repo_id)
                self.keeps_card = True
                del ours[CARD_FILE]
        operations: list[CommitOperationAdd | CommitOperationDelete]
        operations = [CommitOperationAdd(name, path) for name, path in ours.items()]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale_files(theirs, ours)]
        # Not upload_folder, which may make several commits of a folder.
        return self.api.create_commit(self.repo_id, operations, commit_message=push.title, revision=push.revision)

    def finish(self) -> None:
        """Wait for the newest push, try once more if it failed, and say what is not on the Hub then."""
        if not self.pushes:
            return
        push, end = self.pushes[-1], time.monotonic() + self.patience
        if not push.future.done():
            logger.info("Waiting for the push to %s ...", self.repo_id)
        if wait([push.future], self.patience).done and push.future.result() is None:
            self._start(push)
            wait([push.future], max(0.0, end - time.monotonic()))
        ended = push.future.done()
        if ended and push.future.result() is not None:
            return
        words = ["hf", "upload", self.repo_id, str(push.folder), "."]
        words += ["--private"] * bool(self.private) + (["--revision", push.revision] if push.revision else [])
        why = "its push failed" if ended else "its push is under way, and given up when this process ends"
        text = "The Hub does not have the last state of this run (%s, %s): %s. To push it later: %s"
        logger.error(text, self.repo_id, push.title, why, shlex.join(words))
        if ended:
            self.pushes.clear()


class HubTrainer(Trainer):
    """Trainer whose every push is a repository that loads, and whose failed pushes harm nothing.

    The arguments `push_to_hub` and `hub_*` mean what they mean to Trainer. With the strategies "checkpoint" and
    "all_checkpoints" the same commit brings the whole checkpoint. While a push is under way, the newest save waits for
    its turn; with `hub_always_push`, every save does.
    """

    # Files in a checkpoint that are not the model's, and what else does not belong at the root of a repository.
    _not_pushed: tuple[str, ...] = ("*.bin", "*.pt", "*.pth", "trainer_state.json", "checkpoint-*", LAST_CHECKPOINT)
    _not_pushed += ("_*", ".*", "label_audit.*")  # an audit names files of its owner
    _repository: HubRepository | None = None  # rank 0 only
    hub_model_id: str | None  # type: ignore[assignment]  # Trainer says None only

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir or ".")

    @property
    def saved_model(self) -> nn.Module:
        """The bare model that `save_model` writes."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository if it is not there; where that fails, a warning, and the next push tries again.

        Raises:
            ValueError: `hub_model_id` cannot be the name of a repository.
        """
        repo_id = self.args.hub_model_id or self._output_dir.absolute().name
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            text = f"hub_model_id is {repo_id!r}; it must be a name that the Hub takes ({error}); pass user/name."
            raise ValueError(text) from None
        if self.is_world_process_zero():
            token = token or self.args.hub_token
            api = HfApi(token=token and token.strip(), library_name="hf_balancemix")
            private = self.args.hub_private_repo if private is None else private
            self._repository = HubRepository(repo_id, self.args, api, private)
            self._repository.create()
            self.hub_model_id = self._repository.repo_id

    def push_to_hub(  # type: ignore[override]  # there is not always a commit
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        include_code: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo | None] | None:
        """Save the model to `output_dir`, and push that folder as one commit. Must be called on every rank.

        Everything in the folder is pushed but checkpoints, names that begin with `_` or `.`, and pickles.

        Args:
            commit_message, blocking, revision, private: As Trainer's. It waits for half of `args.ddp_timeout` at most.
            token: From now on instead of `args.hub_token`.
            include_code: From now on save the code of this package's model class beside the weights, so that
                `trust_remote_code=True` loads it where the package is not installed. For the pushes in mid-training
                set `model.include_code = True` before.
            **kwargs: Trainer's for a card. They have no effect: the card is written from what was recorded.

        Returns:
            The commit, or with `blocking=False` a Future of it. None where the push failed or takes too long, which
            is logged with what to do, where a newer one took its place, and on all ranks but the first.
        """
        if kwargs:
            logger.warning("push_to_hub ignores %s: the card is written from what was recorded.", ", ".join(kwargs))
        if self._repository is None:
            self.init_hf_repo(token, private)
        model: Any = self.saved_model
        if include_code and hasattr(model, "include_code"):
            model.include_code = True
        self.save_model(_internal_call=True)
        repository = self._repository
        if repository is None:
            return None
        if token is not None:
            repository.api.token = token.strip()

        def fill(folder: Path) -> None:
            self._begin_push(repository, self._output_dir)
            set_aside(self._output_dir, folder, skip=self._not_pushed)

        push = repository.push(commit_message or "End of training", revision or self.args.hub_revision, fill)
        if push is None or not blocking:
            return None if push is None else push.future
        self._finish_current_push()
        return push.future.result() if push.future.done() else None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md into `output_dir`, on rank 0. Trainer's arguments have no effect."""
        if self.is_world_process_zero():
            write_model_card(self, self._output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        repository, strategy, checkpoint = self._repository, self.args.hub_strategy, Path(checkpoint_folder)
        if repository is None or strategy == HubStrategy.END:
            return

        def fill(folder: Path) -> None:
            self._set_model_aside(checkpoint, folder)
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                name = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else checkpoint.name
                set_aside(checkpoint, folder / name, link=True)
            own = self._output_dir / CARD_FILE
            if own.is_file() and is_own_text(own.read_text("utf-8", "replace")):
                shutil.copyfile(own, folder / CARD_FILE)
            self._begin_push(repository, folder)

        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        step = f"epoch {int(self.state.epoch or 0)}" if by_epoch else f"step {self.state.global_step}"
        repository.push(f"Training in progress, {step}", self.args.hub_revision, fill)

    def _begin_push(self, repository: HubRepository, folder: Path) -> None:
        with repository.reported("Writing the card"):
            write_model_card(self, folder)
        with repository.reported("A callback before the push"):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def _set_model_aside(self, checkpoint: Path, folder: Path) -> None:
        """Called on rank 0 only: put the model of a checkpoint into the folder of a push."""
        set_aside(checkpoint, folder, skip=self._not_pushed, link=True)

    def _finish_current_push(self) -> None:
        if self._repository is not None:
            self._repository.finish()
            self.hub_model_id = self._repository.repo_id
