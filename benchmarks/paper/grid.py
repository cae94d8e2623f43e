"""The runner of the paper's tables: runs the cells that are not finished, and renders those that are.

In `jobs_dir`:

    setup-DATASET.json        what all cells of the data set have in common; another setup needs another folder
    cells/DATASET/NAME.json   a finished cell, whole; never run again
    work/DATASET/NAME/        checkpoints of an unfinished one, and its log
    table1.md, table1.csv, figure3.png, ...
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout
from tqdm.auto import tqdm

from benchmarks.paper.cell import BUSY, GridData, Setup, cell_from_json, run_cell, setup_from_json, write_json
from benchmarks.paper.numbers import as_csv, markdown
from benchmarks.paper.tables import TABLES, Cell, entries_of, figure_of
from hf_balancemix.files import is_temporary, whole_file
from hf_balancemix.report.figures import figure_png

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]  # from where `benchmarks.paper` is imported

RunCell = Callable[[Cell, Path, Path], None]  # given the cell, its work folder and the file that it writes


@dataclass
class CellsByOutcome:
    """What became of the cells that were not finished when :func:`run_cells` was called."""

    ran: list[Cell] = field(default_factory=list)
    """Finished now."""
    failed: dict[Cell, str] = field(default_factory=dict)
    """With the error."""
    busy: list[Cell] = field(default_factory=list)
    """Another process is at them."""
    not_begun: list[Cell] = field(default_factory=list)
    """As `max_cells` or `max_minutes` was reached."""


class GridFolder:
    """The folder of a grid."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()

    def result_file(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.dataset / f"{cell.name}.json"

    def work_folder(self, cell: Cell) -> Path:
        return self.folder / "work" / cell.dataset / cell.name

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell's JSON is there; it is written whole or not at all."""
        return self.result_file(cell).is_file()

    def results(self) -> dict[Cell, dict[str, Any]]:
        """The finished cells of every data set. A file that cannot be read is left out with a warning."""
        found = {}
        for file in sorted(self.folder.glob("cells/*/*.json")):
            if is_temporary(file.name):  # of a process that was killed
                continue
            try:
                result = json.loads(file.read_text(encoding="utf-8"))
                found[cell_from_json(result["cell"])] = result
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s is left out: it is no result of a cell (%r).", file, error)
        return found

    def stored_setup(self, dataset: str) -> Setup | None:
        """The setup of the data set's cells, with the name alone of the file with the weights; None without cells."""
        facts = self._setup_facts(dataset)
        if facts is None:
            return None
        weights = facts["backbone_weights"]
        return setup_from_json(facts | {"backbone_weights": weights and weights["file"]})

    def check_setup(self, setup: Setup) -> None:
        """Remember the setup with the first cell; afterwards it must stay the same.

        Raises:
            ValueError: It differs from that of the cells that are there.
        """
        facts, stored = setup.facts(), self._setup_facts(setup.dataset)
        if stored is None:
            write_json(self._setup_file(setup.dataset), facts)
            return
        changed = [name for name in facts if stored.get(name) != facts[name]]
        if changed:
            differences = "; ".join(f"{n} was {stored.get(n)!r} and is {facts[n]!r}" for n in changed)
            raise ValueError(
                f"{self.folder} holds cells of another setup: {differences}. Their numbers cannot be compared: "
                "pass the same flags, or another --jobs_dir."
            )

    def _setup_file(self, dataset: str) -> Path:
        return self.folder / f"setup-{dataset}.json"

    def _setup_facts(self, dataset: str) -> dict[str, Any] | None:
        file = self._setup_file(dataset)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run_cells(
    cells: Sequence[Cell],
    grid: GridFolder,
    run: RunCell,
    *,
    max_cells: int | None = None,
    max_minutes: float | None = None,
    show_progress: bool = True,
) -> CellsByOutcome:
    """Run the cells that are not finished, one after another.

    A cell that fails does not stop the others; the next call tries it again.

    Args:
        cells: In the order in which they are wanted.
        grid: Its folder.
        run: Runs one cell.
        max_cells: Begin no more than so many.
        max_minutes: Begin none after so many minutes.
        show_progress: Show a bar over the whole grid.
    """
    outcome, began = CellsByOutcome(), time.monotonic()
    finished = sum(map(grid.is_finished, cells))
    bar = tqdm(total=len(cells), initial=finished, unit="cell", dynamic_ncols=True, disable=not show_progress)
    with bar:
        for cell in cells:
            if grid.is_finished(cell):
                continue
            begun = len(outcome.ran) + len(outcome.failed)
            over = max_minutes is not None and time.monotonic() - began >= 60 * max_minutes
            if over or (max_cells is not None and begun >= max_cells):
                outcome.not_begun.append(cell)
                continue
            bar.set_description(f"{cell.dataset} {cell.name}")
            try:
                run(cell, grid.work_folder(cell), grid.result_file(cell))
                outcome.ran.append(cell)
                bar.update()
            except Timeout:
                outcome.busy.append(cell)
            except Exception as error:  # whatever goes wrong in one cell, the others are wanted
                logger.exception("The cell %s failed.", cell.name)
                outcome.failed[cell] = f"{type(error).__name__}: {error}"
        bar.set_description("grid")
    return outcome


def in_this_process(setup: Setup, data: GridData) -> RunCell:
    """Cells on cached features are done in seconds or minutes, many of which a process of their own would take to
    start and to find the cache."""

    def run(cell: Cell, folder: Path, out: Path) -> None:
        run_cell(cell, setup, data, folder, out)

    return run


def launched(setup: Setup, data_dir: str | None, cache_dir: str, accelerate_config: str | None) -> RunCell:
    """Each cell under `accelerate launch`, with its output in `log.txt` beside its checkpoints."""
    configured = ["--config_file", accelerate_config] if accelerate_config else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", *configured, "-m", "benchmarks.paper.cell"]

    def run(cell: Cell, folder: Path, out: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        places = {"data_dir": data_dir, "cache_dir": cache_dir, "folder": str(folder), "out": str(out)}
        write_json(folder / "job.json", {"cell": asdict(cell), "setup": asdict(setup), **places})
        log = folder / "log.txt"
        with open(log, "a", encoding="utf-8") as stream:
            status = _wait([*launch, str(folder / "job.json")], stream)
        if status == BUSY:
            raise Timeout(str(folder))
        if status != 0 or not out.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"exit status {status}; {lines[-1] if lines else 'no output'} (see {log})")

    return run


def _wait(command: list[str], stream: Any) -> int:
    # A session of its own, so that the launcher and its ranks can be ended together.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )
    try:
        with _as_interrupt(signal.SIGTERM):
            return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


@contextmanager
def _as_interrupt(number: int) -> Iterator[None]:
    """A polite request to end reaches the `except` above."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def render(
    grid: GridFolder,
    setup: Setup,
    tables: Sequence[int],
    figures: Sequence[int],
    methods: Sequence[str] | None = None,
    class_counts: Sequence[int] | None = None,
) -> list[Path]:
    """Write the tables (Markdown, CSV) and figures (PNG) of the finished cells into the grid's folder.

    Args:
        grid: Its folder.
        setup: Whose data set is shown.
        tables: Numbers in `TABLES`.
        figures: Numbers in `FIGURES`. One that no cell says anything about is not written.
        methods: Rows of the tables; all by default.
        class_counts: Positive training labels of each class; by default those in a finished cell.

    Returns:
        The files.
    """
    results, written = grid.results(), []
    of_dataset = [result for cell, result in results.items() if cell.dataset == setup.dataset]
    for number in tables:
        table = TABLES[number]
        entries = entries_of(table, setup.dataset, results, methods, setup.grid_settings)
        quoted = "" if setup.dataset in table.datasets else f" ({table.datasets[0]})"
        note = " ".join(filter(None, [_conditions(setup, of_dataset), table.note]))
        text = markdown(f"Table {number}: {table.title}", entries, note, f"paper{quoted}")
        for suffix, content in ((".md", text), (".csv", as_csv(entries))):
            file = grid.folder / f"table{number}{suffix}"
            with whole_file(file) as temporary:
                temporary.write_text(content, encoding="utf-8")
            written.append(file)
    if class_counts is None and of_dataset:
        class_counts = of_dataset[0]["class_counts"]
    for number in figures:
        drawn = figure_of(number, setup.dataset, results, class_counts, setup.many_shot, setup.few_shot)
        if drawn is None:
            logger.warning("Figure %d is not drawn: none of its cells is finished.", number)
            continue
        file = grid.folder / f"figure{number}.png"
        with whole_file(file) as temporary:
            temporary.write_bytes(figure_png(drawn))
        written.append(file)
    return written


def _conditions(setup: Setup, results: Sequence[dict[str, Any]]) -> str:
    """What a reader must know of our numbers."""
    network = f"{setup.model_name_or_path}, {setup.image_size} pixels"
    if setup.frozen_stages is not None:
        network += f", the first {setup.frozen_stages} stages frozen: {setup.num_views} cached views"
    if setup.frozen_backbone:
        network += f", frozen: {setup.num_views} cached views, a head of {setup.hidden_size} hidden units"
    elif setup.head != "linear":
        network += f", head {setup.head}"
    parts = [
        "mAP in per cent after the last epoch, mean ± standard error (number of runs)",
        f"ours: {setup.dataset}, {network}",
        f"many-shot: more than {setup.many_shot:,} positive training labels, few-shot: fewer than {setup.few_shot:,}",
    ]
    if results:
        seconds = sorted(result["seconds"]["train"] for result in results)
        parts += [
            f"{len(results[0]['eval_classes'])} of {len(results[0]['class_names'])} classes count",
            f"median training time {seconds[len(seconds) // 2]:.0f} s a run",
        ]
    return "; ".join(parts) + "."
