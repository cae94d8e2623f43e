"""One training at a time writes into a folder; and what is known before it of whether it can."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hf_balancemix.files import process_lock, quote, whole_file

logger = logging.getLogger(__name__)

# Hidden, so that they are never pushed.
LOCK_FILE = ".run.lock"
HOLDER_FILE = ".run.json"
PATIENCE = 6.0  # seconds; worker processes of a run that was killed may hold its lock so long
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def sole_run(folder: Path, num_bytes: int = 0) -> Iterator[None]:
    """Inside the block no other process can enter such a block with the same folder.

    A process that dies has left it. Where the file system has no locks, a line in the log says so.

    Args:
        folder: It is made if it is absent.
        num_bytes: What a checkpoint takes at least.

    Raises:
        ValueError: Another process is in such a block, and is named; or the folder cannot be written, or has less room
            than one checkpoint takes.
    """
    with ExitStack() as stack:
        try:
            lock = process_lock(folder / LOCK_FILE, wait=False)
            free = shutil.disk_usage(folder).free
            if free < num_bytes:
                raise ValueError(
                    f"output_dir is {folder}, with {free / 1e6:,.0f} MB free; it must have room for a checkpoint, at "
                    f"least {num_bytes / 1e6:,.0f} MB; delete something, or pass another folder."
                )
            if _enter(lock, folder):
                stack.callback(lock.release)
            with whole_file(folder / HOLDER_FILE) as file:
                started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": started}))
            stack.callback((folder / HOLDER_FILE).unlink, missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"output_dir is {folder}, where nothing can be written ({error.strerror or error}); it must be a "
                "folder with room and the permission to write; pass another."
            ) from error
        yield


def _enter(lock: FileLock, folder: Path) -> bool:
    """Whether the file system has locks; then this one is held."""
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(
            f"output_dir is {folder}, into which another run is training ({_holder(folder)}); it must be of one run, "
            "as each would delete the other's checkpoints; wait for that run or end it, or pass another output_dir."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        logger.warning("The file system of %s has no locks: a second run into it would not be noticed.", folder)
        return False
    return True


def _holder(folder: Path) -> str:
    try:
        facts = json.loads((folder / HOLDER_FILE).read_text())
        return quote(f"process {facts['pid']} on {facts['host']} since {facts['since']}")[1:-1]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return "which one is not known"
