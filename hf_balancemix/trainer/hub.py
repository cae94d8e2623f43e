"""Pushes to the Hub that cannot harm a run: a push is one commit of a repository that loads, a failure is a message.

This replaces the pushes of transformers' Trainer, which

- upload `output_dir` while it changes (a growing TensorBoard file loses the whole push) and, where `hf_xet` is
  installed, in several commits, so that a push that is killed leaves half of it;
- never read how a push in the background ended, and stop the run where the repository cannot be created;
- leave the card and a model's code out until the end, and add pickled arguments.

Here the files are first set aside in a folder of their own, `output_dir/_push/N`, which nobody changes any more. It
is removed once it is on the Hub, and stays to be pushed later where that failed.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    hf_hub_url,
    set_client_factory,
)
from huggingface_hub.utils import _http, build_hf_headers, hf_raise_for_status, validate_repo_id
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

SILENCE = 120.0  # seconds without a byte from the Hub, after which a request has failed
CREATION = 15.0  # seconds that a run waits for its repository before it starts all the same
CARD = "README.md"
LAST_CHECKPOINT = "last-checkpoint"  # where strategy "checkpoint" keeps it in the repository
_LINKED_FROM = 2**20  # bytes; smaller files are copied
_ADVICE = {
    401: "The token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN.",
    402: "The account does not cover it.",
    403: "The token may not write there: use one with write access, or another --hub_model_id.",
    404: "There is no such repository or revision, or the token may not see it.",
    429: "The Hub's rate limit is reached: it passes; save less often if it comes back.",
}
# The names that from_pretrained looks for: one that an earlier push left behind could be loaded instead of ours.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


# ---- pure functions ----


def explain(error: Exception, token: str | None = None) -> str:
    """What went wrong, in one line in which no token appears.

    Args:
        error: As `huggingface_hub` raised it. Its own text may hold the token: a broken request header is quoted.
        token: That in use, besides the one that `huggingface_hub` finds itself.
    """
    response = getattr(error, "response", None)
    if response is not None:
        detail = getattr(error, "server_message", None) or response.reason_phrase
        text = f"HTTP {response.status_code} ({detail}). {_ADVICE.get(response.status_code, '')}"
    else:
        text = f"{type(error).__name__}: {error}"
    for secret in (token, get_token()):
        if secret and (secret := secret.strip()):
            text = text.replace(secret, "<token>").replace(repr(secret)[1:-1], "<token>")
    text = re.sub(r"(?<=Bearer )[^\s'\"]+|hf_\w{8,}", "<token>", text)
    return " ".join(text.split()).rstrip(".") + "."


def stale_files(theirs: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Files of a repository that must go when `ours` are committed: other weights, and a last checkpoint's rest."""
    ours = set(ours)
    replaced = f"{LAST_CHECKPOINT}/" if any(name.startswith(f"{LAST_CHECKPOINT}/") for name in ours) else None
    return [
        name
        for name in theirs
        if name not in ours and (_WEIGHTS.fullmatch(name) or (replaced and name.startswith(replaced)))
    ]


def set_aside(source: Path, target: Path, skip: Iterable[str] = (), link: bool = False) -> None:
    """Put the files below `source` also into `target`, where later changes of the originals do not reach them.

    Args:
        source: A folder; linked folders in it are not entered.
        target: Made if absent; not in `source`, unless skipped.
        skip: Patterns of names of files and folders to leave out.
        link: Link large files instead of copying them, where the file system can. They may be deleted afterwards, but
            must not be written to.
    """
    for root, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not _matches(name, skip)]
        there = target / Path(root).relative_to(source)
        there.mkdir(parents=True, exist_ok=True)
        for path in (Path(root, name) for name in files if not _matches(name, skip)):
            if not path.is_file():
                continue
            if link and path.stat().st_size >= _LINKED_FROM:
                try:
                    os.link(path.resolve(), there / path.name)
                    continue
                except OSError:
                    pass  # no hard links here
            shutil.copyfile(path, there / path.name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# ---- requests that end ----


class _EndingClients:
    """Makes the clients of `huggingface_hub` as another factory does, with an end to every request."""

    def __init__(self, factory: Callable[[], httpx2.Client]) -> None:
        self.factory = factory

    def __call__(self) -> httpx2.Client:
        client = self.factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", []), _end_after_silence]}
        return client


def _end_after_silence(request: httpx2.Request) -> None:
    given = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: SILENCE if given.get(kind) is None else given[kind] for kind in kinds}


def end_requests() -> None:
    """Let requests of `huggingface_hub` that would wait without limit fail after `SILENCE` seconds without a byte.

    Its clients have no timeout, and some of its calls say None themselves, so that a client's own would not do. It
    has one client for the whole process: the requests of other code also end, where they have no limit of their own.
    """
    factory = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)  # there is no public way to ask for it
    if factory is not None and not isinstance(factory, _EndingClients):
        set_client_factory(_EndingClients(factory))


# ---- the repository ----


class HubRepository:
    """A model repository on the Hub that a run is pushed to, one commit a push; used on one rank only.

    Nothing here raises because of the Hub, the network or the disk. The first failure is logged as a warning, later
    ones until a push succeeds at level INFO.

    Args:
        repo_id: "user/name", or "name" for the owner of the token.
        workdir: Where folders to be pushed are made; may hold remains of an earlier run.
        token: Default: that of `hf auth login` or HF_TOKEN.
        private: For a repository that is made here. Default: what the owner's settings say.
        revision: Branch to commit to. Default: main.
        retried: When a failed push is tried again, for the message.
        mark: Text in each README.md that a run writes. One on the Hub without it was edited by somebody, and is not
            replaced by one with it. Default: any is replaced.

    Attributes:
        unpushed: The newest folder that is not on the Hub, for the next :meth:`settle`; None where all is well.

    Raises:
        ValueError: `repo_id` cannot be the name of a repository.
    """

    def __init__(
        self,
        repo_id: str,
        workdir: Path,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        retried: str = "at the next save and at the end",
        mark: str = "",
    ) -> None:
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            raise ValueError(
                f"hub_model_id is {repo_id!r}, which the Hub does not take ({error}); pass --hub_model_id user/name."
            ) from None
        self.repo_id, self.workdir, self.private, self.revision = repo_id, workdir, private, revision
        self.token = token and token.strip()
        self.unpushed: Path | None = None
        self._message = ""  # of the newest folder
        self._api = HfApi(library_name="hf_balancemix")
        self._created = False
        self._retried, self._mark = retried, mark
        self._reason: str | None = None  # of the last failure, until a success
        self._jobs: dict[Path, Future[CommitInfo | None]] = {}
        self._count = 0
        self._left = False  # nobody waits for the newest folder any more
        self._told = False  # that README.md stays

    @property
    def busy(self) -> bool:
        """Whether a push is under way or waits for one."""
        return any(not job.done() for job in self._jobs.values())

    @contextmanager
    def reported(self, what: str, final: bool = False) -> Iterator[None]:
        """Turns any failure in the block into a message; `final` leaves that to :meth:`report_missing`."""
        try:
            yield
        except Exception as error:
            first, self._reason = self._reason is None, explain(error, self.token)
            if not final and not self._left:
                logger.log(
                    logging.WARNING if first else logging.INFO,
                    "Push to the Hub failed (%s, %s): %s Training is not affected; it will be tried again %s.",
                    self.repo_id, what, self._reason, self._retried,
                )  # fmt: skip

    def create(self) -> None:
        """Make the repository on the Hub if it is not there; after `CREATION` seconds in the background."""
        job = self._api.run_as_future(self._try_create)
        wait([job], CREATION)
        if not job.done():
            logger.info("The Hub did not answer yet (%s); the run goes on.", self.repo_id)

    def _try_create(self) -> None:
        with self.reported("creating the repository"):
            self._create()
            self._reason = None

    def _create(self) -> None:
        end_requests()
        if self.token and not re.fullmatch(r"[!-~]+", self.token):
            # Said here, because the HTTP client would quote it.
            raise ValueError("the token holds a blank, a line break or another character that no token has.")
        if not self._created:
            url = self._api.create_repo(self.repo_id, token=self.token, private=self.private, exist_ok=True)
            self.repo_id, self._created = url.repo_id, True

    def new_folder(self, message: str) -> Path:
        """An empty folder for the next push. Earlier ones are removed, unless they are being pushed."""
        self.unpushed, self._message, self._left = None, message, False
        self._jobs = {folder: job for folder, job in self._jobs.items() if not job.done()}
        if self.workdir.is_dir():
            for folder in self.workdir.iterdir():
                if folder.is_dir() and folder not in self._jobs:
                    shutil.rmtree(folder, ignore_errors=True)
        self._count += 1
        while (folder := self.workdir / str(self._count)).exists():  # it could not be removed, or is not ours
            self._count += 1
        folder.mkdir(parents=True)
        return folder

    def push(self, folder: Path, message: str, final: bool = False) -> Future[CommitInfo | None]:
        """Push a folder as one commit, in the background and after those before it.

        Args:
            folder: As :meth:`new_folder` gave it, and filled since.
            message: Title of the commit.
            final: Nobody tries again: a failure is an error with the command to push later.

        Returns:
            Future that never raises: None after a failure.
        """
        self.unpushed, self._message = folder, message
        self._jobs[folder] = job = self._api.run_as_future(self._push, folder, message, final)
        return job

    def _push(self, folder: Path, message: str, final: bool) -> CommitInfo | None:
        with self.reported(message, final):
            info = self._commit(folder, message)
            if self._reason is not None:
                logger.info("Pushed to the Hub again (%s, %s).", self.repo_id, message)
            self._reason = None
            if self.unpushed == folder:
                self.unpushed = None
            shutil.rmtree(folder, ignore_errors=True)
            return info
        if final or (self._left and self.unpushed == folder):
            self.report_missing()
        return None

    def _commit(self, folder: Path, message: str) -> CommitInfo:
        ours = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if not ours:  # which the client would take for nothing new
            raise FileNotFoundError(f"{folder} holds no file any more.")
        self._create()
        place = {"repo_id": self.repo_id, "revision": self.revision, "token": self.token}
        theirs = self._api.list_repo_files(**place)
        if CARD in theirs and CARD in ours and self._keeps_card(ours[CARD]):
            del ours[CARD]
        old = stale_files(theirs, ours)
        # Not upload_folder, which makes several commits of a folder.
        return self._api.create_commit(
            operations=[
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in old),
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in ours.items()),
            ],
            commit_message=message,
            **place,
        )

    def _keeps_card(self, card: Path) -> bool:
        """Whether the README.md on the Hub is somebody's own and `card` is not."""
        if self._mark not in card.read_text(encoding="utf-8", errors="replace"):
            return False
        url = hf_hub_url(self.repo_id, CARD, revision=self.revision)
        response = get_session().get(url, headers=build_hf_headers(token=self.token, library_name="hf_balancemix"))
        hf_raise_for_status(response)
        kept = self._mark not in response.text
        if kept and not self._told:
            self._told = True
            logger.warning(
                "%s of %s was not written by this package and stays as it is; remove it there to have it written.",
                CARD, self.repo_id,
            )  # fmt: skip
        return kept

    def settle(self, timeout: float) -> None:
        """Wait for all pushes, and try once more what did not arrive.

        If it still does not, an error is logged with the command to push it later.

        Args:
            timeout: Seconds after which what is still under way is left to itself, see :meth:`leave`.
        """
        deadline = time.monotonic() + timeout
        self._wait(deadline)
        if self.unpushed is not None and not self.busy:
            self.push(self.unpushed, self._message, final=True)
            self._wait(deadline)
        elif self._message and not self.busy:
            self.report_missing()  # its files could not even be set aside
        if self.busy:
            self.leave()

    def leave(self) -> None:
        """Nobody waits for the pushes any more: say what is missing. The process does not end before they are done."""
        self._left = True
        folder = self.unpushed
        if folder is None:
            return  # it has just arrived
        job = self._jobs.get(folder)
        if job is None or job.done():
            self.push(folder, self._message, final=True)
        logger.warning(
            "The Hub does not have the last state of this run yet (%s, %s): the push is still under way, and this "
            "process ends when it is done. The run itself is whole. To push it later instead: %s",
            self.repo_id, self._message, self.command(folder),
        )  # fmt: skip

    def wait(self, timeout: float) -> None:
        """Wait for all pushes, for so many seconds at most."""
        self._wait(time.monotonic() + timeout)

    def _wait(self, deadline: float) -> None:
        if self.busy:
            logger.info("Waiting for the push to %s ...", self.repo_id)
            wait(list(self._jobs.values()), max(0.0, deadline - time.monotonic()))

    def report_missing(self) -> None:
        """Log an error if the newest folder did not arrive."""
        if self._reason is not None:
            later = self.command(self.unpushed) if self.unpushed else "trainer.push_to_hub()"
            logger.error(
                "The Hub does not have the last state of this run (%s, %s): %s The run itself is whole. To push it "
                "later: %s", self.repo_id, self._message, self._reason, later,
            )  # fmt: skip

    def command(self, folder: Path) -> str:
        """The shell command that pushes a folder."""
        words = ["hf", "upload", self.repo_id, str(folder), "."]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)


# ---- the trainer ----


class HubTrainer(Trainer):
    """Trainer whose every push is a repository that loads, and whose failed pushes harm nothing.

    The arguments `push_to_hub` and `hub_*` mean what they mean to Trainer. With the strategies "checkpoint" and
    "all_checkpoints" the same commit brings the whole checkpoint. A push that failed, or was left out because one was
    under way, is made up for by the next save, and at the end of `train`.
    """

    # Files in a checkpoint that are not the model's, and what else does not belong at the root of a repository.
    _not_pushed: tuple[str, ...] = (
        *("*.bin", "*.pt", "*.pth", "trainer_state.json"),
        *("checkpoint-*", LAST_CHECKPOINT, "_*", ".*"),
    )
    _card_mark: str = ""  # in each README.md that _write_card writes; one without it is somebody's own, and stays
    _repository: HubRepository | None = None  # rank 0 only

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository if it is not there; where that fails, a warning, and later pushes try again.

        Raises:
            ValueError: `hub_model_id` cannot be the name of a repository.
        """
        args = self.args
        repository = HubRepository(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            Path(args.output_dir, "_push"),
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision,
            retried=(
                "at the next save and at the end"
                if args.push_to_hub and args.hub_strategy != HubStrategy.END
                else "when push_to_hub or save_model is called"
            ),
            mark=self._card_mark,
        )
        if self.is_world_process_zero():
            repository.create()
            self._repository, self.hub_model_id = repository, repository.repo_id

    def push_to_hub(
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
            commit_message: Title of the commit.
            blocking: Wait until it is done, but not longer than half of `args.ddp_timeout`.
            token: Instead of `args.hub_token`.
            revision: Branch to push to, instead of `args.hub_revision`.
            private: Instead of `args.hub_private_repo`, where the repository is made now.
            include_code: From now on save the code of this package's model class beside the weights, so that
                `trust_remote_code=True` loads it where the package is not installed. Classes of transformers need
                none. For the pushes in mid-training set `model.include_code = True` before.
            **kwargs: Trainer's arguments of a model card. They have no effect: the card is written from what was
                recorded.

        Returns:
            The commit, or with `blocking=False` a Future of it. None where the push failed or takes too long, which
            is logged with what to do, and on all ranks but the first.
        """
        if kwargs:
            logger.warning("push_to_hub ignores %s: the card is written from what was recorded.", ", ".join(kwargs))
        self._announce_push()
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if include_code:
            model = getattr(self, "saved_model", None)  # of two networks, the one that is saved
            if model is None:
                model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if hasattr(model, "include_code"):
                model.include_code = True
            else:
                logger.info("%s needs no code of this package beside it.", type(model).__name__)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repository, output_dir, job = self._repository, Path(self.args.output_dir), None
        deadline = time.monotonic() + self._patience
        repository.wait(self._patience)
        if token is not None:
            repository.token = token.strip()
        repository.revision = revision or repository.revision
        commit_message = commit_message or "End of training"
        with repository.reported(commit_message, final=True):
            folder = repository.new_folder(commit_message)
            self._try_card(output_dir)
            set_aside(output_dir, folder, skip=self._not_pushed)
            job = repository.push(folder, commit_message, final=True)
        if job is None:
            repository.report_missing()
            return None
        if not blocking:
            return job
        repository.wait(deadline - time.monotonic())
        self.hub_model_id = repository.repo_id
        if not job.done():
            repository.leave()
            return None
        return job.result()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md into `output_dir`, on rank 0; a failure is logged. Trainer's arguments have no effect: the
        card is written from what was recorded."""
        if self.is_world_process_zero():
            self._try_card(Path(self.args.output_dir))

    def _announce_push(self) -> None:
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # a tracker that synchronises over the network, for one
            logger.warning("A callback failed before the push: %s", explain(error, self.args.hub_token))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._announce_push()
        repository, checkpoint = self._repository, Path(checkpoint_folder)
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        message = f"epoch {int(self.state.epoch)}" if by_epoch else f"step {self.state.global_step}"
        message = f"Training in progress, {message}"
        with repository.reported(message):
            folder = repository.new_folder(message)
            self._set_model_aside(checkpoint, folder)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                set_aside(checkpoint, folder / (LAST_CHECKPOINT if is_last else checkpoint.name), link=True)
            self._copy_own_card(folder)
            self._try_card(folder)
            if repository.busy and not self.args.hub_always_push:
                repository.unpushed = folder
            else:
                repository.push(folder, message)

    def _set_model_aside(self, checkpoint: Path, folder: Path) -> None:
        """Called on rank 0 only: put the model of a checkpoint into the folder of a push."""
        set_aside(checkpoint, folder, skip=self._not_pushed, link=True)

    def _finish_current_push(self) -> None:
        if self._repository is not None:
            self._repository.settle(self._patience)
            self.hub_model_id = self._repository.repo_id

    @property
    def _patience(self) -> float:
        """Seconds to wait for the Hub: the other ranks go on, and would take a rank 0 that waits longer for dead."""
        return self.args.ddp_timeout / 2

    def _copy_own_card(self, folder: Path) -> None:
        card = Path(self.args.output_dir, CARD)
        if card.is_file() and self._card_mark not in card.read_text(encoding="utf-8", errors="replace"):
            shutil.copyfile(card, folder / CARD)

    def _try_card(self, folder: Path) -> None:
        try:
            self._write_card(folder)
        except Exception:
            logger.warning("The model card could not be written; an earlier one stays.", exc_info=True)

    def _write_card(self, folder: Path) -> None:
        """Called on rank 0 only, before each push: write README.md, and what it shows, into a folder.

        Must not communicate with other ranks, and not draw from a global random generator.
        """
        text = "---\nlibrary_name: transformers\npipeline_tag: image-classification\n---\n\n"
        (folder / "README.md").write_text(f"{text}# {self.hub_model_id.split('/')[-1]}\n", encoding="utf-8")
