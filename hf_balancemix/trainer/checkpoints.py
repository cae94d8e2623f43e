"""A checkpoint directory is whole or not there.

A checkpoint is a folder of files that are written one after another, so a run that is killed meanwhile leaves half of
it under its final name. The manifest, a list of the files with sizes and checksums, is therefore written last and
atomically: a folder whose manifest is missing, or does not fit, is not a checkpoint.

Call everything that writes here on one process only, after a barrier: once all processes have written their files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from hf_balancemix.files import is_temporary, sync_folder, whole_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]+)")


def write_manifest(directory: str | os.PathLike[str]) -> None:
    """Declares a checkpoint whole: lists its files with sizes and SHA-256 checksums in `manifest.json`.

    The manifest appears under its name only when complete, and only after the listed files have reached the disk (so
    that an older checkpoint may be deleted afterwards). An earlier manifest is replaced. Symbolic links to files are
    listed by what they point to; linked folders are not entered.

    Args:
        directory: the checkpoint folder; holds at least one file.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no file.
        OSError: if a file cannot be read or the manifest cannot be written; no manifest is left then.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"directory is {directory}; it must be the folder of a checkpoint; save that before its manifest."
        )
    remove_manifest(directory)
    files = {name: _describe(directory / name) for name in _file_names(directory)}
    if not files:
        raise ValueError(
            f"directory is {directory}, an empty folder; it must hold a checkpoint; save that before its manifest."
        )
    with whole_file(directory / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"version": 1, "files": files}, indent=1), encoding="ascii")


def remove_manifest(directory: str | os.PathLike[str]) -> None:
    """Declares a checkpoint not whole; nothing happens if it has no manifest.

    Call it before writing into a folder that may hold an earlier checkpoint, and before deleting one.
    """
    directory = Path(directory)
    if os.path.lexists(directory / MANIFEST):
        (directory / MANIFEST).unlink()
        sync_folder(directory)


def check(directory: str | os.PathLike[str], *, content: bool = True) -> str | None:
    """Says why a checkpoint is not whole.

    Only the files that the manifest lists are looked at; others may have been added since (a README by a push).

    Args:
        directory: the checkpoint folder.
        content: also compare checksums, which reads every file; otherwise only sizes.

    Returns:
        None if it is whole, else one sentence that names the first fault.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return f"{directory} is not a folder."
    try:
        with open(directory / MANIFEST, encoding="ascii") as file:
            files = _parse_manifest(json.load(file))
    except FileNotFoundError:
        return f"It has no {MANIFEST}, so saving or deleting it was not finished."
    except OSError as error:
        return f"Its {MANIFEST} cannot be read ({error.strerror})."
    except (ValueError, RecursionError):  # ValueError: also broken JSON and broken encoding
        return f"Its {MANIFEST} is damaged."
    try:
        for name, (size, _) in files.items():
            path = directory / name
            if not path.is_file():
                return f"Its file {name!r} is missing."
            if (found := path.stat().st_size) != size:
                return f"Its file {name!r} has {found} bytes instead of {size}."
        if content:
            for name, (_, checksum) in files.items():
                if _checksum(directory / name) != checksum:
                    return f"The content of its file {name!r} differs from what was saved (checksum)."
    except OSError as error:
        return f"Its file {name!r} cannot be read ({error})."
    return None


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, whole or not, by ascending step; empty if there is no such run."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), path.name))


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint of the highest step, by content; None if there is none.

    Each newer one that is passed over is logged as a warning, with the reason.
    """
    for path in reversed(list_checkpoints(output_dir)):
        fault = check(path)
        if fault is None:
            return path
        logger.warning("Passing over %s: it is not a whole checkpoint. %s", path, fault)
    return None


def rotate(
    output_dir: str | os.PathLike[str],
    save_total_limit: int | None,
    keep: Iterable[str | os.PathLike[str]] = (),
) -> list[Path]:
    """Deletes old checkpoints, so that at most `save_total_limit` whole ones stay.

    Deleted are the oldest whole ones beyond the limit, and the remains of unfinished ones older than the newest whole
    one. Never deleted are that newest one (checked by content, the others by size), anything of a higher step, which
    may be being written, and what is in `keep`; the kept ones count towards the limit, and it is exceeded where they
    are more. A checkpoint loses its manifest first, so that one whose deletion was interrupted is not taken for whole.
    One that cannot be deleted is logged and stays.

    Args:
        output_dir: the folder of the run.
        save_total_limit: as in Trainer; None, 0 and less delete nothing.
        keep: checkpoints never to delete: the best one, and the one just saved (it is not the newest by step if the
            run was resumed from an earlier step than its last).

    Returns:
        What was deleted, by ascending step.
    """
    if save_total_limit is None or save_total_limit <= 0:
        return []
    checkpoints = list_checkpoints(output_dir)
    newest = next((index for index in reversed(range(len(checkpoints))) if check(checkpoints[index]) is None), None)
    if newest is None:
        return []
    kept = {Path(path).resolve() for path in keep} | {checkpoints[newest].resolve()}
    older = checkpoints[:newest]
    whole = [path for path in older if check(path, content=False) is None]
    surplus = max(0, len(whole) + 1 - save_total_limit)
    expendable = [path for path in whole if path.resolve() not in kept][:surplus]
    remains = [path for path in older if path not in whole and path.resolve() not in kept]
    return [path for path in older if path in expendable + remains and _delete(path)]


def _delete(path: Path) -> bool:
    try:
        if path.is_symlink():
            path.unlink()  # the link only: what it points to is not ours
        else:
            remove_manifest(path)
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("Could not delete the old checkpoint %s: %s", path, error)
        return False
    logger.info("Deleted the old checkpoint %s", path)
    return True


def _step(path: Path) -> int:
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _file_names(directory: Path) -> list[str]:
    """Names of the regular files below, relative, with slashes, sorted; without the manifest, and unfinished ones."""
    names = []
    for root, _, files in os.walk(directory, onerror=_raise):
        names += [(Path(root) / file).relative_to(directory).as_posix() for file in files if not is_temporary(file)]
    return sorted(name for name in names if name != MANIFEST and (directory / name).is_file())


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that it cannot read


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if os.name == "posix":  # elsewhere a file open for reading cannot be synced
            os.fsync(file.fileno())
    return {"size": size, "sha256": checksum}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_manifest(manifest: Any) -> dict[str, tuple[int, str]]:
    """`{name: (size, checksum)}`; ValueError if the manifest is not one that `write_manifest` could have written."""
    try:
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("not a manifest") from error
    inside = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in files)
    if not files or not inside:
        raise ValueError("not a manifest of files in this folder")
    return files
