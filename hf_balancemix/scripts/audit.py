"""Which labels of a data set are probably wrong: by what a training run kept, or by any trained model.

    balancemix audit --model outputs/multilabel/balancemix --html report
    balancemix audit --model MODEL --train_dir photos --train_csv labels.csv --label_column tags --html report
    balancemix audit --model MODEL --train_dir photos --train_csv labels.csv --folds 5 --output suspicious.csv

Without data, the audit is the one that a run with label management has left beside its model. Open report/index.html
in a browser; it needs no server and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from hf_balancemix.audit import ClassAudit, LabelAudit, audit_labels
from hf_balancemix.audit.report import push_report, write_report
from hf_balancemix.data.images import MAX_IMAGE_PIXELS
from hf_balancemix.files import quote, whole_file
from hf_balancemix.models import load_trained
from hf_balancemix.report import markdown_table
from hf_balancemix.scripts.arguments import FORMATS, FormatArguments, chosen_format
from hf_balancemix.scripts.data import DataArguments
from hf_balancemix.scripts.parser import flag, parse_arguments


@dataclass
class AuditArguments:
    """A model, and where the audit goes."""

    model: str = flag(MISSING, "Folder of a training run, or folder or Hub name of a model.")
    html: str | None = flag(None, "Folder to write, with pages to look at the labels and to decide.")
    output: str | None = flag(None, "CSV to write, one row a suspicious label.")
    folds: int | None = flag(
        None, "Judge by heads on the model's features that did not see the labels, trained on so many folds."
    )
    batch_size: int | None = flag(None, "Images at a time; 32 if it is not said.")
    max_image_pixels: int = flag(MAX_IMAGE_PIXELS, "Images of more pixels, width x height, are not decoded.")
    trust_remote_code: bool | None = flag(None, "Let the model's config bring code.")
    device: str | None = flag(None, "Where the model runs; a GPU if there is one.")
    push_to_hub: str | None = flag(None, "Hub name of a static Space, which gets the pages; it is private.")
    seed: int | None = flag(None, "Of the folds; 0 if it is not said.")

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.html is None:
            raise ValueError(
                f"push_to_hub is {quote(self.push_to_hub)}, and html is None; there must be pages to push; pass "
                "--html DIR."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """The body of `balancemix audit`."""
    args, data = parse(argv)
    for path in filter(None, (args.html, args.output)):  # not only once the model has run
        if Path(path).exists():
            raise FileExistsError(f"{path} exists; it must not, as nothing is overwritten; pass another name.")
    dataset = None if data is None else data.load_to_audit(args.seed or 0)
    audit = make(args, dataset, "error" if data is None else data.on_bad_image)
    print_audit(audit)
    if args.output is not None:
        with whole_file(args.output) as temporary:
            audit.rows.to_csv(str(temporary))
        print(f"\nAll {len(audit.rows):,} suspicious labels: {args.output}")
    if args.html is not None:
        write_report(audit, args.html, dataset, max_image_pixels=args.max_image_pixels)
        print(f"\nTo look at them and to decide, open {Path(args.html, 'index.html')} in a browser.")
    if args.push_to_hub is not None:
        print(f"On the Hub: {push_report(args.html, args.push_to_hub)}")


def parse(argv: Sequence[str] | None = None) -> tuple[AuditArguments, DataArguments | None]:
    """The flags, and where the data is, if that is said."""
    data_format, given = chosen_format(argv)
    if not any(given.values()):
        return parse_arguments((AuditArguments,), argv, __doc__, prog="balancemix audit")[0], None
    types = (AuditArguments, FormatArguments, FORMATS[data_format][0])
    args, _, data = parse_arguments(types, argv, __doc__, prog="balancemix audit")
    return args, data


def make(args: AuditArguments, dataset: datasets.Dataset | None, on_bad_image: str) -> LabelAudit:
    """The audit that a run has kept, or a new one of `dataset`."""
    if dataset is None:
        for name in ("folds", "batch_size", "trust_remote_code", "device", "seed"):
            if (value := getattr(args, name)) is not None:
                raise ValueError(f"{name} is {value!r}; it must come with data; pass --train_dir or --data_dir.")
        return LabelAudit.load(args.model)
    model, processor = load_trained(args.model, trust_remote_code=bool(args.trust_remote_code))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: getattr(args, name) for name in ("folds", "batch_size", "max_image_pixels", "seed")}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return audit_labels(model.to(device), dataset, processor, on_bad_image=on_bad_image, **options)


def print_audit(audit: LabelAudit, rows: int = 10) -> None:
    """Print what is known of each class, and the surest rows."""

    def share(rate: tuple[float, float, float] | None) -> str:
        return "not known" if rate is None else f"{100 * rate[0]:.0f} ({100 * rate[1]:.0f} to {100 * rate[2]:.0f})"

    shown = sorted(audit.classes, key=lambda c: -sum(n * (r or [0])[0] for n, r in _sides(c)))[:20]
    print("Wrong labels in per cent, estimated (and 95 % interval); the classes with most of them first\n")
    cells = [[c.name, f"{c.positives:,}", share(c.wrong), f"{c.negatives:,}", share(c.missing)] for c in shown]
    print(markdown_table([["class", "positive", "of these wrong", "negative", "of these missing"], *cells]))
    if len(audit.classes) > len(shown):
        print(f"\nand {len(audit.classes) - len(shown):,} classes more.")
    print(f"\nSuspicious labels: {len(audit.rows):,}, of which about {audit.num_estimated:,} are wrong. The surest:\n")
    first = audit.rows.select(range(min(rows, len(audit.rows))))
    cells = [[str(r["image_id"]), r["class"], r["kind"], f"{r['score']:.2f}"] for r in first]
    print(markdown_table([["image_id", "class", "kind", "score"], *cells], num_left=3))


def _sides(c: ClassAudit) -> list[tuple[int, tuple[float, float, float] | None]]:
    return [(c.positives, c.wrong), (c.negatives, c.missing)]
