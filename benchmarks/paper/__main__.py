r"""Fill the paper's tables (1 to 15) and figures (3, 4, 6, 7) with numbers of your own.

    python -m benchmarks.paper --table 1 --data_dir DIR --seeds 3 --jobs_dir outputs/paper
    python -m benchmarks.paper --table 1 2 3 --dataset voc2012 --data_dir DIR --frozen_backbone --image_size 224
    python -m benchmarks.paper --table 1 --figure 3 4 6 --jobs_dir outputs/paper --render_only

A table is a grid of training runs, its cells. Finished cells are never run again, and one that was stopped goes on
from its last checkpoint: run the same command as often as needed. With --frozen_backbone a small head is trained on
cached features of the backbone, which takes seconds to minutes a cell; with --frozen_stages N all but the first N
stages, on cached activations, which takes minutes. --render_only needs no data and no weights: it shows the finished
cells of --jobs_dir.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from benchmarks.paper.cell import SOURCES, GridData, Setup
from benchmarks.paper.grid import GridFolder, in_this_process, launched, render, run_cells
from benchmarks.paper.tables import FIGURES, TABLES, cells_of
from hf_balancemix import BalanceMixTrainingArguments
from hf_balancemix.methods import METHODS
from hf_balancemix.scripts.arguments import NetworkArguments
from hf_balancemix.scripts.parser import flag, parse_arguments, run


@dataclass
class GridArguments(NetworkArguments):
    """What to reproduce, on which data and with which network."""

    help_group = "options"

    table: list[int] | None = flag(None, "Tables of the paper, 1 to 15.")
    figure: list[int] | None = flag(None, f"Figures: {', '.join(map(str, FIGURES))}.")
    dataset: str | None = flag(None, "Default: the table's own in the paper.", [*SOURCES])
    data_dir: str | None = flag(None, "Folder of the data set; the sample needs none.")
    methods: list[str] | None = flag(None, f"Only these rows of the tables, or further ones: {', '.join(METHODS)}.")
    noises: list[str] | None = flag(None, "Only these, such as clean mislabel-0.4 flip-0.2 single-positive.")
    seeds: int = flag(3, "Runs of each cell, with the seeds 0, 1, ...; also of the noise.")
    jobs_dir: str = flag("outputs/paper", "Where results, checkpoints and tables go.")
    render_only: bool = flag(False, "Run nothing; tables and figures of what is finished.")
    max_cells: int | None = flag(None, "Begin no more than so many runs.")
    max_minutes: float | None = flag(None, "Begin no run after so many minutes.")
    accelerate_config: str | None = flag(
        None, "Config file of `accelerate launch`, such as examples/accelerate_configs/*."
    )

    model_name_or_path: str = flag(
        "timm/resnet50.tv_in1k", "Hub name, folder, or with --backbone_weights or --from_scratch a timm architecture."
    )
    head: str = flag("ml_decoder", "A frozen backbone brings its own.", ["ml_decoder", "q2l", "ms_cma", "linear"])
    image_size: int = flag(448, "Images are squashed to so many pixels a side.")

    preset: str = flag("default", "Of the training arguments.", [*BalanceMixTrainingArguments.PRESETS])
    set: list[str] | None = flag(None, "Training arguments of every run: --set num_train_epochs=10 bf16=true.")
    many_shot: int | None = flag(None, "More positive training labels: many-shot class. Default: 10000, sample 300.")
    few_shot: int | None = flag(None, "Fewer positive training labels: few-shot class. Default: 1000, sample 150.")
    min_positives: int = flag(1, "mAP counts classes with so many positives in training and evaluation set each.")
    eval_classes: list[str] | None = flag(None, "Instead: mAP counts these classes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, numbers, known in (("table", self.table, TABLES), ("figure", self.figure, FIGURES)):
            unknown = [n for n in numbers or () if n not in known]
            if unknown:
                raise ValueError(f"--{option} {unknown[0]} is not known; choose from {', '.join(map(str, known))}.")
        if not self.table and not self.figure:
            raise ValueError("say what to reproduce: --table N ... or --figure N ...")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be 1 or more.")


def training_settings(assignments: list[str] | None) -> dict[str, Any]:
    """`["bf16=true"]` as `{"bf16": True}`; values are JSON or text."""
    fields = {f.name for f in dataclasses.fields(BalanceMixTrainingArguments)}
    settings: dict[str, Any] = {}
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        if not equals or name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "see examples/run_coco.py --help-all for the names."
            raise ValueError(f"--set {assignment}: NAME=VALUE with the name of a training argument is needed; {hint}")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    return settings


def setup_of(asked: GridArguments) -> Setup:
    """What the flags say that all cells have in common."""
    wanted = [TABLES[n] for n in asked.table or ()] + [FIGURES[n] for n in asked.figure or ()]
    dataset = asked.dataset or wanted[0].datasets[0]
    source = SOURCES[dataset]
    if asked.backbone_weights is not None and not Path(asked.backbone_weights).is_file():
        raise FileNotFoundError(f"backbone weights {asked.backbone_weights} do not exist; pass a state dict's file.")
    return Setup(
        dataset=dataset,
        model_name_or_path=asked.model_name_or_path,
        head="linear" if asked.frozen_backbone else asked.head,
        backbone_weights=asked.backbone_weights and str(Path(asked.backbone_weights).absolute()),
        from_scratch=asked.from_scratch,
        model_kwargs=asked.model_kwargs or {},
        image_size=asked.image_size,
        frozen_backbone=asked.frozen_backbone,
        frozen_stages=asked.frozen_stages,
        num_views=asked.num_views,
        hidden_size=asked.hidden_size,
        preset=asked.preset,
        settings=training_settings(asked.set),
        many_shot=source.many_shot if asked.many_shot is None else asked.many_shot,
        few_shot=source.few_shot if asked.few_shot is None else asked.few_shot,
        min_positives=asked.min_positives,
        eval_classes=tuple(asked.eval_classes) if asked.eval_classes else None,
    )


def main(argv: list[str] | None = None) -> None:
    program = "python -m benchmarks.paper"
    (asked,) = parse_arguments((GridArguments,), argv, description=__doc__, prog=program)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    datasets.disable_progress_bars()  # the grid has one
    setup, grid = setup_of(asked), GridFolder(asked.jobs_dir)
    if asked.render_only:
        setup = grid.stored_setup(setup.dataset) or setup
    tables = [TABLES[n] for n in asked.table or ()]
    figures = [FIGURES[n] for n in asked.figure or ()]
    cells = cells_of(tables, setup.dataset, range(asked.seeds), asked.methods, setup.grid_settings)
    for cell in cells_of(figures, setup.dataset, range(asked.seeds)):
        if cell not in cells and (not asked.methods or cell.method in asked.methods):
            cells.append(cell)
    if asked.noises:
        unknown = sorted(set(asked.noises) - (known := {cell.noise_name for cell in cells}))
        if unknown:
            raise ValueError(f"noise {', '.join(unknown)} is none of these tables'; choose from {', '.join(known)}.")
        cells = [cell for cell in cells if cell.noise_name in asked.noises]
    cells.sort(key=lambda cell: cell.seed)  # a first run of everything before the second of anything
    if setup.is_frozen and any(cell.model for cell in cells):
        raise ValueError("Table 6 compares whole networks; leave out --frozen_backbone or --frozen_stages.")

    counts, failed = None, False
    if not asked.render_only:
        data_dir = asked.data_dir and str(Path(asked.data_dir).expanduser().absolute())
        cache_dir = str(asked.features_folder)
        data = GridData(setup, data_dir, cache_dir)  # says which files are absent, before anything runs
        counts = data.class_counts().tolist()
        data.eval_classes()
        grid.check_setup(setup)
        if setup.is_frozen:
            run_one = in_this_process(setup, data)
        else:
            run_one = launched(setup, data_dir, cache_dir, asked.accelerate_config)
        outcome = run_cells(cells, grid, run_one, max_cells=asked.max_cells, max_minutes=asked.max_minutes)
        done = sum(map(grid.is_finished, cells))
        print(f"{len(outcome.ran)} cells run now, {done} of {len(cells)} finished.")
        for cell, problem in outcome.failed.items():
            print(f"failed: {cell.dataset} {cell.name}: {problem}", file=sys.stderr)
        if outcome.busy:
            print(f"{len(outcome.busy)} cells are being run by another process.")
        if outcome.not_begun:
            print("--max_cells or --max_minutes is reached; the same command goes on.")
        failed = bool(outcome.failed)
    for file in render(grid, setup, asked.table or [], asked.figure or [], asked.methods, counts):
        print(file)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
