"""Class probabilities for a folder of images, as CSV; with the labels above the model's thresholds, if it has any.

    balancemix predict --model outputs/sample/balancemix --images FOLDER --output scores.csv

A row is an image of the folder, or of a folder in it.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_balancemix.data.images import MAX_IMAGE_PIXELS, image_suffixes
from hf_balancemix.files import check_links, whole_file
from hf_balancemix.models import class_thresholds, iter_probabilities, load_trained
from hf_balancemix.scripts.parser import flag, parse_arguments


@dataclass
class PredictArguments:
    """A model, images, and where the probabilities go."""

    model: str = flag(MISSING, "Folder or Hub name of a saved model.")
    images: str = flag(MISSING, "Folder with images (sub-folders too).")
    output: str = flag("scores.csv", "CSV to write.")
    batch_size: int = flag(32, "Images at a time.")
    trust_remote_code: bool = flag(False, "Let the model's config bring code.")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "Where the model runs.")
    on_bad_image: str = flag("error", "Images that cannot be decoded: stop, or leave out.", ["error", "skip"])
    max_image_pixels: int = flag(MAX_IMAGE_PIXELS, "Images of more pixels, width x height, are not decoded.")
    follow_links: bool = flag(False, "Read images where links lead out of the folder.")


def main(argv: Sequence[str] | None = None) -> None:
    """The body of `balancemix predict`."""
    (args,) = parse_arguments((PredictArguments,), argv, __doc__, prog="balancemix predict")
    files, others = image_files(args.images, args.follow_links)
    model, processor = load_trained(args.model, trust_remote_code=args.trust_remote_code)
    options = {name: getattr(args, name) for name in ("batch_size", "on_bad_image", "max_image_pixels")}
    written = write_probabilities(args.output, model.to(args.device), processor, files, root=args.images, **options)
    print(f"{written} images written to {args.output}, {len(files) - written} skipped.{left_out(others)}")


def image_files(folder: str | os.PathLike[str], follow_links: bool = False) -> tuple[list[Path], list[Path]]:
    """The images in a folder and below it, by the endings of the formats read, and the other files, sorted by name.

    Raises:
        FileNotFoundError: It is no folder, or holds none.
        ValueError: A link leads out of it, and `follow_links` does not allow it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"images is {folder}; it must be a folder; pass the one that holds the images.")
    check_links(folder, follow_links)
    suffixes = image_suffixes()
    files: tuple[list[Path], list[Path]] = [], []
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            files[file.suffix.lower() not in suffixes].append(file)
    if not files[0]:
        needed = "it must hold images (.jpg, .png, .webp, .tif, .bmp, .gif, .avif or .jp2)"
        raise FileNotFoundError(f"images is {folder}; {needed}; pass another folder.{left_out(files[1])}")
    return files


def left_out(files: Sequence[Path]) -> str:
    """A sentence on files that are no images, with their endings; empty without any."""
    if not files:
        return ""
    endings = Counter(file.suffix.lower() or file.name for file in files).most_common(5)
    named = ", ".join(f"{n} {ending}" for ending, n in endings)
    return f" Left out: {len(files)} files that are no images of the formats read ({named})."


def write_probabilities(
    output: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: Any,
    files: Sequence[Path],
    *,
    root: str | os.PathLike[str],
    **options: Any,
) -> int:
    """Write a CSV that appears only when it is whole, with a row an image.

    Args:
        output: The file.
        model, processor, options: As for :func:`~hf_balancemix.iter_probabilities`, which also says what is refused.
            If the model has thresholds, a column says the labels, too.
        files: The images.
        root: The folder that all of them are in; they are named by their place in it.

    Returns:
        How many images were written.
    """
    thresholds = class_thresholds(model.config)
    has_labels = getattr(model.config, "thresholds", None) is not None
    written = 0
    with whole_file(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", *(["labels"] if has_labels else []), *thresholds])
        for indices, probabilities in iter_probabilities(model, files, processor, **options):
            for index, row in zip(indices, probabilities.tolist(), strict=True):
                above = [name for (name, t), p in zip(thresholds.items(), row, strict=True) if p > t]
                labels = [";".join(above)] if has_labels else []
                name = files[index].relative_to(root).as_posix()
                writer.writerow([name, *labels, *(f"{p:.6f}" for p in row)])
            written += len(indices)
    return written
