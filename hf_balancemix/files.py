"""Files that are whole or not there, locks between processes, the cache folder, the rule on links that lead out of a
folder, and foreign values in messages."""

from __future__ import annotations

import os
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_TEMPORARY = ".tmp"
_HUB_REPOSITORIES = ("datasets--", "models--", "spaces--")  # first parts of their folders' names in the Hub's cache


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the temporary name under which to write a file that gets its own name only when whole.

    The temporary file stands in the same folder and keeps the suffix. After the block it reaches the disk and then
    replaces whatever is there; after an exception, and where nothing was written, it is removed and `path` stays as
    it was.

    Args:
        path: The file; its folder is made if it is absent.

    Raises:
        OSError: It cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "notes.txt")
        >>> with whole_file(file) as temporary:
        ...     _ = temporary.write_text("all of it")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('all of it', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{_TEMPORARY}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file of this name, without its folder, is one of :func:`whole_file` that was not finished."""
    return name.startswith(".") and _TEMPORARY in Path(name).suffixes


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a rename or a removal in the folder outlast a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_lock(path: str | os.PathLike[str], *, wait: bool = True) -> FileLock:
    """A lock that one process holds at a time, as a context manager; the lock of a process that dies is free again.

    Args:
        path: The lock's file; its folder is made if it is absent. It stays when the lock is released.
        wait: False: entering raises :class:`filelock.Timeout` at once where another process holds it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=-1 if wait else 0)


def check_writable(folder: str | os.PathLike[str], argument: str) -> None:
    """Make a folder, and see whether a file can be written there.

    Raises:
        ValueError: It cannot; `argument` says in the message what to change.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument} is {folder}, where nothing can be written ({error.strerror}); it must be a folder with room "
            "and the permission to write; choose another."
        ) from error


def cache_folder() -> Path:
    """Where this package keeps what it can make again: `HF_BALANCEMIX_CACHE`, or `hf_balancemix` in
    `XDG_CACHE_HOME`, or in `~/.cache`."""
    if chosen := os.environ.get("HF_BALANCEMIX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hf_balancemix").expanduser()


def check_inside(path: str | os.PathLike[str], root: str | os.PathLike[str], follow_links: bool = False) -> None:
    """Raise a ValueError where a file or folder is not really in the folder `root`: a link or '..' leads out of it.

    For what is found in a folder or named by a file of it, before it is opened. The root itself may be a link, for the
    user has named it. A snapshot in the Hub's cache may link to the blobs of its repository, as its files do.

    Args:
        path: It may be absent.
        root: The folder.
        follow_links: Allow what leads out of it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a.jpg").symlink_to("/etc/hostname")
        >>> check_inside(folder / "b.jpg", folder)
        >>> check_inside(folder / "a.jpg", folder, follow_links=True)
        >>> check_inside(folder / "a.jpg", folder)
        Traceback (most recent call last):
        ValueError: ...
    """
    if follow_links:
        return
    real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    blobs = [
        folder.parents[1] / "blobs"
        for folder in (real_root, *real_root.parents)
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith(_HUB_REPOSITORIES)
    ]
    if not any(real.is_relative_to(folder) for folder in (real_root, *blobs)):
        found = f"{quote(os.path.relpath(path, root))} in {root} leads out of it, to {quote(str(real))}"
        fix = "copy it there, or allow such links with follow_links=True (--follow_links)"
        raise ValueError(f"{found}; it must stay inside; {fix}.")


def check_links(root: str | os.PathLike[str], follow_links: bool = False) -> None:
    """:func:`check_inside` for each link in the folder `root` and the folders below it."""
    folders = [] if follow_links else [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    check_inside(entry.path, root)
                elif entry.is_dir():
                    folders.append(entry.path)


QUOTE_LENGTH = 80


def quote(value: object) -> str:
    """A value that came from a file or a user, as an error message shows it: on one line, short, whatever it is.

    Args:
        value: Anything; nesting is shown to a small depth, and a `repr` that fails is replaced by the type's name.

    Returns:
        At most :data:`QUOTE_LENGTH` characters.

    Example:
        >>> quote("person"), len(quote("x" * 10_000)), quote([[[[]]]])
        ("'person'", 80, '[[[[]]]]')
    """
    try:
        shown = _SHORT.repr(value)
    except Exception:  # an int of thousands of digits, a broken __repr__
        shown = f"<{type(value).__name__}>"
    return one_line(shown, QUOTE_LENGTH)


def one_line(text: object, length: int = 120) -> str:
    """A foreign text, such as another library's error, on one line and of at most `length` printable characters."""
    shown = " ".join(line.strip() for line in str(text)[: 10 * length].splitlines())
    shown = "".join(c if c.isprintable() else " " for c in shown).strip()
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = QUOTE_LENGTH
