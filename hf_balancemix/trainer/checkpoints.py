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
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_balancemix.files import check_links, is_temporary, one_line, quote, sync_folder, whole_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_WEIGHTS = ("model", "adapter_model", "ema")
_CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]+)")


def write_manifest(directory: str | os.PathLike[str]) -> None:
    """Declares a checkpoint whole: lists its files with sizes and SHA-256 checksums in `manifest.json`.

    The manifest appears under its name only when complete, and only after the listed files have reached the disk (so
    that an older checkpoint may be deleted afterwards). An earlier manifest is replaced. Symbolic links to files are
    listed by what they point to; linked folders are not entered.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no file.
        OSError: A file cannot be read or the manifest cannot be written; no manifest is left then.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"directory is {directory}; it must be the folder of a checkpoint; save that first.")
    remove_manifest(directory)
    folders = os.walk(directory, onerror=_raise)
    paths = sorted(Path(root, name) for root, _, names in folders for name in names if not is_temporary(name))
    files = {path.relative_to(directory).as_posix(): _describe(path) for path in paths if path.is_file()}
    if not files:
        raise ValueError(f"directory is {directory}, an empty folder; it must hold a checkpoint; save that first.")
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
    """One sentence that names the first fault of a checkpoint that is not whole; None if it is.

    Only the files that the manifest lists are looked at; others may have been added since (a README by a push). With
    `content` checksums are compared, which reads every file, otherwise only sizes; and weights must be finite. No link
    in the folder may lead out of it (:func:`~hf_balancemix.files.check_inside`).
    """
    directory = Path(directory)
    if not directory.is_dir():
        return f"{directory} is not a folder."
    try:
        text = (directory / MANIFEST).read_text(encoding="ascii")
        files = {name: (entry["size"], entry["sha256"]) for name, entry in json.loads(text)["files"].items()}
    except FileNotFoundError:
        return f"It has no {MANIFEST}, so saving or deleting it was not finished."
    except OSError as error:
        return f"Its {MANIFEST} cannot be read ({error.strerror})."
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):  # no JSON, or another
        files = {}
    if not files or any(path.is_absolute() or ".." in path.parts for path in map(PurePosixPath, files)):
        return f"Its {MANIFEST} is damaged."
    name = "."
    try:
        if not _links_stay_inside(directory):
            return "It has a link that leads out of the folder, which is not followed."
        for name, (size, _) in files.items():
            path = directory / name
            if not path.is_file():
                return f"Its file {quote(name)} is missing."
            if (found := path.stat().st_size) != size:
                return f"Its file {quote(name)} has {found} bytes instead of {quote(size)}."
        if content:
            for name, (_, checksum) in files.items():
                if _checksum(directory / name) != checksum:
                    return f"The content of its file {quote(name)} differs from what was saved (checksum)."
                if (weight := _non_finite_weight(directory / name)) is not None:
                    return f"The weight {quote(weight)} in its file {quote(name)} is not finite."
    except OSError as error:
        return f"Its file {quote(name)} cannot be read ({one_line(error)})."
    return None


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, whole or not, by ascending step; empty if there is no such run."""
    paths = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    named = ((_CHECKPOINT_NAME.fullmatch(path.name), path) for path in paths)
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name and path.is_dir())]


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
        save_total_limit: As in Trainer; None, 0 and less delete nothing.
        keep: The best one, and the one just saved (it is not the newest by step if the run was resumed from an earlier
            step than its last).

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
    logger.debug("Deleted the old checkpoint %s", path)
    return True


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that it cannot read


def _describe(path: Path) -> dict[str, Any]:
    if os.name == "posix":  # elsewhere a file open for reading cannot be synced
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _checksum(path)}


def _links_stay_inside(directory: Path) -> bool:
    try:
        check_links(directory)
    except ValueError:
        return False
    return True


def _non_finite_weight(path: Path) -> str | None:
    """The first tensor of a file of weights that holds NaN or +infinity (masks hold -infinity), if there is one."""
    if not (path.suffix == ".safetensors" and path.name.startswith(_WEIGHTS)):
        return None
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                values = file.get_tensor(name)
                if (values.isnan() | (values == math.inf)).any():
                    return name
    except SafetensorError:  # whoever loads it says so
        pass
    return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
