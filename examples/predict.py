"""Class probabilities for a folder of images, as CSV; with the labels above the model's thresholds, if it has any.

python examples/predict.py --model outputs/sample/balancemix --images FOLDER --output scores.csv
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_balancemix.data import decode
from hf_balancemix.models import class_thresholds, load_trained
from hf_balancemix.scripts.parser import run

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name of a saved model.")
    parser.add_argument("--images", required=True, type=Path, help="Folder with images (sub-folders too).")
    parser.add_argument("--output", type=Path, default=Path("scores.csv"), help="CSV to write.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--on_bad_image", choices=["error", "skip"], default="error")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"batch_size is {args.batch_size}; it must be 1 or more.")
    if not args.images.is_dir():
        raise FileNotFoundError(f"{args.images} is not a folder; pass the folder that holds the images.")
    files = sorted(file for file in args.images.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(f"{args.images} holds no image ({', '.join(sorted(SUFFIXES))}); pass another folder.")

    model, processor = load_trained(args.model)
    model.to(args.device)
    if model.config.problem_type != "multi_label_classification":
        raise ValueError(
            f"{args.model} is a {model.config.problem_type or 'single-label'} model, whose outputs are no independent "
            "probabilities; pass a model trained by this package."
        )
    thresholds = class_thresholds(model.config)
    labelled = getattr(model.config, "thresholds", None) is not None

    skipped = 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    part = args.output.with_name(args.output.name + ".part")  # under its own name only when whole
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["file", *(["labels"] if labelled else []), *thresholds])
        for start in tqdm(range(0, len(files), args.batch_size), desc="Predicting"):
            kept, images = [], []
            for file in files[start : start + args.batch_size]:
                try:
                    images.append(decode(file))
                except ValueError:
                    if args.on_bad_image == "error":
                        part.unlink()
                        raise
                    skipped += 1
                else:
                    kept.append(file)
            if not images:
                continue
            inputs = processor(images, return_tensors="pt").to(args.device)
            with torch.no_grad():
                probabilities = model(**inputs).logits.float().sigmoid().cpu()
            for file, row in zip(kept, probabilities.tolist(), strict=True):
                above = [name for (name, t), p in zip(thresholds.items(), row, strict=True) if p > t]
                labels = [";".join(above)] if labelled else []
                writer.writerow([file.relative_to(args.images).as_posix(), *labels, *(f"{p:.6f}" for p in row)])
    os.replace(part, args.output)
    print(f"{len(files) - skipped} images written to {args.output}, {skipped} skipped.")


if __name__ == "__main__":
    run(main)
