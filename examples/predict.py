"""Class probabilities for a folder of images, as CSV; with the labels above the model's thresholds, if it has any.

    python examples/predict.py --model outputs/sample/balancemix --images FOLDER --output scores.csv

The same as `balancemix predict`. Without a CSV: `predict_labels(model, images, processor)` of hf_balancemix gives the
labels of images, and `pipeline("image-classification", model=..., top_k=None)` of transformers the probabilities.
"""

from __future__ import annotations

from hf_balancemix import load_trained
from hf_balancemix.scripts.parser import parse_arguments, run
from hf_balancemix.scripts.predict import PredictArguments, image_files, left_out, write_probabilities


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments((PredictArguments,), argv, description=__doc__)
    files, others = image_files(args.images, args.follow_links)
    # In evaluation mode, with the thresholds that it was saved with.
    model, processor = load_trained(args.model, trust_remote_code=args.trust_remote_code)
    options = {name: getattr(args, name) for name in ("batch_size", "on_bad_image", "max_image_pixels")}
    written = write_probabilities(args.output, model.to(args.device), processor, files, root=args.images, **options)
    print(f"{written} images written to {args.output}, {len(files) - written} skipped.{left_out(others)}")


if __name__ == "__main__":
    run(main)
