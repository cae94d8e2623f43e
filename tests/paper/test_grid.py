"""The grid of the paper's tables: its cells, what is run again and what is not, and what the tables show."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, make_dataset
from filelock import Timeout
from sklearn.metrics import average_precision_score
from test_examples import EXAMPLES, error_of, make_coco

from benchmarks.paper import cell as cell_module
from benchmarks.paper.cell import GridData, Setup, Source, arguments_of, git_commit, run_cell
from benchmarks.paper.grid import GridFolder, in_this_process, launched, render, run_cells
from benchmarks.paper.numbers import (
    Entry,
    as_csv,
    markdown,
    mean_and_error,
    pearson,
    ranks,
    read_paper_numbers,
)
from benchmarks.paper.tables import (
    CLEAN,
    FIGURES,
    METHODS,
    TABLES,
    Cell,
    cell_of,
    cells_of,
    entries_of,
    figure_of,
    quality_at,
    rows_of,
)
from hf_balancemix.data import label_matrix
from hf_balancemix.files import is_temporary, process_lock
from hf_balancemix.models.label_graph import embedding_loss, label_graph

# ---- the tables as data ----


def test_every_number_of_the_paper_has_its_place():
    for number, table in TABLES.items():
        lines = [line for line in read_paper_numbers() if line["table"] == str(number)]
        expected = Counter(line["mAP_percent"] for line in lines)
        for line in read_paper_numbers(label_quality=True):
            if line["table"] == str(number):
                expected.update(value for name, value in line.items() if name.endswith("_percent"))
        entries = [e for dataset in table.datasets for e in entries_of(table, dataset, {})]
        shown = Counter(f"{e.paper:.1f}" for e in entries if e.paper is not None)
        if number == 9:  # made of the VOC numbers of three others
            assert sum(shown.values()) == 7 * 6
        else:
            assert shown == expected, number
            assert shown
    places = {(e.row, e.column): e.paper for e in entries_of(TABLES[9], "voc", {})}
    assert places["t-estimator", "mislabel 0.4"] == 89.0
    assert places["ll-ct", "single-positive"] == 89.3
    table = {(e.part, e.row, e.column): e.paper for e in entries_of(TABLES[15], "voc", {})}
    assert table["mislabel 0.4", "75 %", "re-labelling right"] == 99.0


def test_cells_are_shared_between_tables_and_have_names_of_their_own():
    cells = cells_of(TABLES.values(), "coco", range(3))
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.method for cell in cells} <= set(METHODS)
    # 7 methods at clean, mislabel and flip 0.2 and 0.4, single positive and the labels as they are
    assert len(cells_of([TABLES[n] for n in (1, 2, 3, 4)], "coco", [0])) == 7 * 7
    assert cells_of([TABLES[9]], "voc", [0, 1]) != cells_of([TABLES[10]], "voc", [0, 1])
    assert set(cells_of([TABLES[10], TABLES[11], TABLES[3]], "voc", [0])) == set(cells_of([TABLES[9]], "voc", [0]))
    usual = cells_of([TABLES[1]], "coco", [0], ["balancemix"])
    assert [c.noise_name for c in usual] == ["clean", "mislabel-0.2", "mislabel-0.4"]
    search = cells_of([TABLES[7]], "coco", [0])
    assert len(search) == 12
    assert len(set(search) & set(usual)) == 2  # eps=0.975 at both rates
    assert sum(dict(c.settings) == {} for c in search) == 3  # and eps=0.9 with single positive labels
    # where the whole grid runs with another alpha, 4 is no longer the usual one
    assert len(set(cells_of([TABLES[8]], "coco", [0], None, {"mixup_alpha": 8.0})) & set(usual)) == 1
    assert [c.seed for c in cells_of([TABLES[8]], "coco", range(2))] == [0] * 4 + [1] * 4
    assert Cell("coco", "flip", 0.4, "bce", 0).name == "flip-0.4_bce_seed0"


def test_methods_choose_rows_and_add_some():
    assert [row.name for row in rows_of(TABLES[1], ["balancemix", "focal", "bce"])] == ["bce", "balancemix", "focal"]
    assert [row.name for row in rows_of(TABLES[5], ["+ambiguous"])] == ["+ambiguous"]
    with pytest.raises(ValueError, match="method asl2 is not known"):
        rows_of(TABLES[1], ["asl2"])
    assert all(row.method is not None for table in TABLES.values() for row in table.rows)  # none is only quoted


def test_settings_of_the_paper_by_data_set_and_noise(tmp_path):
    def args(noise: str, dataset: str = "voc", cell=(), **settings):
        setup = Setup(dataset, settings={"use_cpu": True} | settings)
        return arguments_of(Cell(dataset, noise, 0.2, "balancemix", 4, tuple(cell)), setup, tmp_path)

    voc = args("mislabel")
    assert (voc.num_train_epochs, voc.label_warmup_epochs, voc.global_batch_size, voc.seed) == (20, 5, 32, 4)
    assert (voc.relabel_threshold, voc.trust_positives, voc.mixup_alpha) == (0.975, False, 4.0)
    assert args("clean", preset="paper").trust_positives
    assert not args("clean").trust_positives  # a user does not know it
    assert args("clean").relabel_threshold == 0.975
    assert args("single-positive").trust_positives
    assert args("single-positive").relabel_threshold == 0.9
    assert args("single-positive", preset="paper").relabel_threshold == 0.55
    paper = Setup("voc", preset="paper", settings={"use_cpu": True})
    cell = Cell("voc", "single-positive", 0.0, "balancemix", 0)
    assert arguments_of(cell, paper, tmp_path).relabel_threshold == 0.55
    assert not args("real-world", "deepfashion").trust_positives
    fashion = args("flip", "deepfashion")
    assert (fashion.num_train_epochs, fashion.label_warmup_epochs, fashion.global_batch_size) == (40, 5, 64)
    coco = args("flip", "coco", num_train_epochs=7)
    assert (coco.num_train_epochs, coco.label_warmup_epochs, coco.global_batch_size) == (7, 1, 64)
    assert args("single-positive", cell=[("relabel_threshold", 0.7)], relabel_threshold=0.6).relabel_threshold == 0.7


def test_table_6_is_trained_with_the_recipe_unless_the_grid_says_otherwise(tmp_path):
    cells = cells_of([TABLES[6]], "coco2014", [0])
    assert len(cells) == 11
    assert max(len(cell.name) for cell in cells) < 200  # a file name

    def args(cell: Cell, **settings):
        return arguments_of(cell, Setup("coco2014", settings={"use_cpu": True} | settings), tmp_path)

    for cell in cells:
        a = args(cell)
        assert (a.preset, a.optim, a.lr_scheduler_type, a.warmup_steps) == ("ml-decoder", "adam", "one_cycle", 0.2)
        assert (a.learning_rate, a.weight_decay, a.decay_vectors, a.optim_args) == (1e-4, 1e-4, False, None)
        assert (a.ema_decay, a.normalise, a.cutout) == (0.9997, False, 0.5)
        assert (a.num_train_epochs, a.global_batch_size, a.label_warmup_epochs) == (40, 56, 10)
        assert (a.trust_positives, a.image_size) == (False, dict(cell.model)["image_size"])
        assert a.pos_weight == ("balanced" if dict(cell.model)["head"] == "ms_cma" else None)
    assert (cells[0].method, dict(cells[0].model)["head"]) == ("bce", "ms_cma")
    # What the grid is told holds for its cells, and is part of no name.
    own = {"num_train_epochs": 2, "global_batch_size": 8, "ema_decay": 0.5}
    (cell,) = cells_of([TABLES[6]], "coco2014", [0], ["ml-decoder, resnet101@448"], own)
    assert cell.settings == (("preset", "ml-decoder"),)
    a = args(cell, **own)
    assert (a.num_train_epochs, a.global_batch_size, a.ema_decay, a.cutout) == (2, 8, 0.5, 0.5)
    assert Setup("coco2014").grid_settings == {}
    own = Setup("coco2014", preset="paper", settings={"bf16": True}).grid_settings  # `--preset paper`
    assert own == {"preset": "paper", "bf16": True}
    (cell,) = cells_of([TABLES[6]], "coco2014", [0], ["ml-decoder, resnet101@448"], own)
    assert args(cell, preset="paper").optim == "sgd"
    # All other tables' cells are as they were.
    others = cells_of([table for n, table in TABLES.items() if n != 6], "coco", [0])
    varied = {"relabel_threshold", "mixup_alpha", "minority_score"}
    assert {name for cell in others for name, _ in cell.settings} == varied
    usual = arguments_of(others[0], Setup("coco", settings={"use_cpu": True}), tmp_path)
    assert (usual.optim, usual.ema_decay, usual.normalise, usual.cutout) == ("sgd", 0.0, True, 0.0)


def test_a_cell_of_table_6_runs_and_is_judged_by_the_average(tmp_path, monkeypatch):
    setup, data = tiny_setup(monkeypatch, tmp_path)
    row = TABLES[6].rows[1]
    assert row.name == "asl, resnet101@448"
    cell = cell_of(row, CLEAN, "sample", 0, {"num_train_epochs": 1, "global_batch_size": 8, "ema_decay": 0.5})
    cell = replace(cell, model=(("model_name_or_path", "test_resnet"), ("image_size", 32), ("head", "linear")))
    setup = replace(setup, settings={"use_cpu": True, "global_batch_size": 8, "num_train_epochs": 2, "ema_decay": 0.5})
    made, make = [], cell_module.trainer_for

    def trainer_for(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(cell_module, "trainer_for", trainer_for)
    run_cell(cell, setup, data, tmp_path / "work", tmp_path / "cell.json")
    (trainer,) = made
    stored = json.loads((tmp_path / "cell.json").read_text())
    assert (stored["settings"]["optim"], stored["settings"]["ema_decay"]) == ("adam", 0.5)
    average = trainer._average.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in trainer.model.state_dict().items())
    prediction = trainer.predict(data.evaluation)
    ap = [average_precision_score(prediction.label_ids[:, k], prediction.predictions[:, k]) for k in range(5)]
    assert stored["per_class_ap"] == pytest.approx(ap)


def test_a_cell_of_ms_cma_embeds_the_labels_that_it_trains_on(tmp_path, monkeypatch):
    setup, data = tiny_setup(monkeypatch, tmp_path, image_size=64)
    row = TABLES[6].rows[0]
    assert row.name == "ms-cma, resnet101@448"
    own = {"num_train_epochs": 1, "global_batch_size": 8, "ema_decay": 0.5}
    setup = replace(setup, settings={"use_cpu": True} | own)
    made, make = [], cell_module.trainer_for

    def trainer_for(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(cell_module, "trainer_for", trainer_for)
    model = (("model_name_or_path", "test_resnet"), ("image_size", 64), ("head", "ms_cma"))
    for noise in (CLEAN, ("mislabel", 0.4)):
        cell = replace(cell_of(row, noise, "sample", 0, own), model=model)
        run_cell(cell, setup, data, tmp_path / "work", tmp_path / f"{cell.noise}.json")
    stored = json.loads((tmp_path / "clean.json").read_text())
    assert stored["settings"]["pos_weight"] == "balanced"
    assert 0 < stored["mAP"]["all"] <= 1
    graphs = [label_graph(label_matrix(trainer.train_dataset)) for trainer in made]
    losses = [[embedding_loss(t.model.head.label_embeddings.double(), graph).item() for graph in graphs] for t in made]
    assert max(losses[0][0], losses[1][1]) < 1e-3
    assert min(losses[0][1], losses[1][0]) > 0.02


# ---- means, standard errors, ranks ----


def test_means_and_errors_by_hand():
    assert mean_and_error([50.0]) == (50.0, None)
    mean, error = mean_and_error([48.0, 50.0, 55.0])
    assert mean == 51
    assert error == pytest.approx(math.sqrt((9 + 1 + 16) / 2 / 3))  # 2.0817
    with pytest.raises(ValueError, match="no value"):
        mean_and_error([])


def test_ranks_and_correlation_by_hand():
    assert ranks({"a": 0.7, "b": 0.2, "c": 0.7, "d": 0.9, "e": 0.7}) == {"a": 3, "b": 5, "c": 3, "d": 1, "e": 3}
    assert ranks({"a": 0.5}) == {"a": 1}
    # Deviations -1, 0, 1 and -2, 1, 1: r = 3 / sqrt(2 * 6).
    assert pearson([1.0, 2.0, 3.0], [5.0, 8.0, 8.0]) == pytest.approx(3 / math.sqrt(12))
    assert pearson([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(math.isnan(pearson(x, y)) for x, y in (([], []), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0])))


def result(cell: Cell, ap: dict[str, float | None], **more) -> dict:
    epochs = [
        {"epoch": 4, "sampler_lift_few": 1.2},
        {"epoch": 6, "label_clean_precision": 0.75, "label_clean_recall": 0.5, "sampler_lift_few": 1.1},
        {"epoch": 20, "label_clean_precision": 0.9, "label_relabel_proportion": 0.125},
    ]
    names = ["a", "b"]
    return {
        "cell": json.loads(json.dumps(asdict(cell))), "mAP": ap, "num_epochs": 20, "epochs": epochs,
        "class_names": names, "eval_classes": names, "class_groups": ["medium", "few"], "per_class_ap": [0.5, 0.25],
        "positive_confidence": [0.8, 0.2], "class_counts": [500, 20], "seconds": {"train": 3.0},
    } | more  # fmt: skip


def grid_of_three() -> dict[Cell, dict]:
    found = {}
    for seed, (clean, noisy) in enumerate(((0.48, 0.3), (0.50, 0.4), (0.55, None))):
        for noise, rate, value in (("clean", 0.0, clean), ("mislabel", 0.4, noisy)):
            if value is not None:
                cell = Cell("voc2012", noise, rate, "balancemix", seed)
                found[cell] = result(cell, {"all": value, "few": value / 2, "many": None})
    return found


def test_a_table_shows_mean_error_and_runs_beside_the_papers_number(tmp_path):
    found = grid_of_three()
    entries = entries_of(TABLES[1], "voc2012", found, ["bce", "balancemix"])
    assert [e.part for e in entries[:3]] == ["all classes"] * 3
    text = markdown("Table", entries, paper_heading="paper (coco)")
    (row,) = (line for line in text.split("## many-shot")[0].splitlines() if line.startswith("| balancemix"))
    cells = [part.strip() for part in row.strip("|").split("|")]
    assert cells == ["balancemix", "85.2", "51.0 ± 2.1 (3)", "84.3", "-", "81.6", "35.0 ± 5.0 (2)"]
    few = text.split("## few-shot")[1]
    assert "25.5 ± 1.0 (3)" in few
    lines = list(csv.DictReader(io.StringIO(as_csv(entries))))
    (line,) = (x for x in lines if (x["part"], x["row"], x["column"]) == ("all classes", "balancemix", "mislabel 0.4"))
    assert (line["paper"], line["mean"], line["standard_error"], line["runs"]) == ("81.6", "35.000", "5.000", "2")
    assert line["values"] == "30.000 40.000"
    one = markdown("T", [Entry("p", "r", "c", None, [12.34])])
    assert "12.3 (1)" in one


def test_the_mean_column_of_table_5_takes_whole_seeds_only():
    found = {}
    for seed in (0, 1):
        for i, (noise, rate) in enumerate(TABLES[5].noises):
            if (seed, noise) != (1, "flip"):
                cell = Cell("coco", noise, rate, "mixup", seed)
                found[cell] = result(cell, {"all": 0.1 * (i + 1)})
    (entry,) = (e for e in entries_of(TABLES[5], "coco", found) if (e.row, e.column) == ("mixup", "mean"))
    assert entry.paper == 72.5
    assert entry.ours == [pytest.approx(25.0)]


def test_label_quality_at_parts_of_the_training():
    r = result(Cell("voc", "mislabel", 0.2, "balancemix", 0), {})
    assert quality_at(r, "clean_precision", 0.25) == 0.75  # due at epoch 5, first there at 6
    assert quality_at(r, "clean_precision", 0.5) is None
    assert quality_at(r, "clean_precision", 1.0) == 0.9
    assert quality_at(r, "relabel_accuracy", 1.0) is None
    found = {Cell("voc", "mislabel", 0.2, "balancemix", s): r for s in (0, 1)}
    table = {(e.part, e.row, e.column): e for e in entries_of(TABLES[15], "voc", found)}
    entry = table["mislabel 0.2", "25 %", "clean precision"]
    assert (entry.paper, entry.ours) == (99.6, [75.0, 75.0])
    assert table["mislabel 0.2", "100 %", "re-labelled"].ours == [12.5, 12.5]


def test_figures_are_drawn_from_what_is_finished():
    found = grid_of_three()
    assert figure_of(3, "voc", found, None, 100, 10) is None
    third = figure_of(3, "voc2012", found, None, 100, 10)
    assert [axis.get_title() for axis in third.axes] == [
        "balancemix, clean: r = 1.00",
        "balancemix, mislabel 0.4: r = 1.00",
    ]
    for method, value in (("bce", 0.9), ("asl", 0.2)):
        cell = Cell("voc2012", *CLEAN, method, 0)
        found[cell] = result(cell, {"all": value})
    paper, ours = figure_of(4, "voc2012", found, None, 100, 10).axes
    radius = {line.get_label(): line.get_ydata()[0] for line in ours.lines}
    assert radius["bce"] > radius["balancemix"] > radius["asl"]  # outside is best
    by_method = {line.get_label(): line.get_ydata() for line in paper.lines}
    assert len(by_method) == 7
    assert set(by_method["balancemix"]) == {7.0}  # first in all five
    sixth = figure_of(6, "voc2012", found, None, 100, 10)
    (line, _) = sixth.axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([4, 6], [pytest.approx(1.2), pytest.approx(1.1)])
    seventh = figure_of(7, "voc2012", {}, [3, 500, 50, 200], 100, 10)
    assert [bar.get_height() for bar in seventh.axes[0].patches] == [500, 200, 50, 3]
    assert "2 many, 1 medium, 1 few" in seventh.axes[0].get_title()
    assert set(FIGURES) == {3, 4, 6, 7}


@pytest.mark.parametrize(
    ("name", "numbers", "methods"),
    [
        (
            "voc2012_frozen",
            (1, 2, 3, 5),
            "bce mixup asl co-teaching t-estimator ll-r ll-ct balancemix +minority +clean +relabel",
        ),
        ("voc2012_finetuned", (1, 2), "bce mixup asl balancemix"),
    ],
)
def test_the_tables_of_the_docs_are_those_of_their_cells(name, numbers, methods, tmp_path, monkeypatch):
    source = EXAMPLES.parent / "docs" / "results" / name
    shutil.copytree(source, tmp_path, ignore=shutil.ignore_patterns("table*", "figure*"), dirs_exist_ok=True)
    asked = ["--dataset", "voc2012", "--jobs_dir", str(tmp_path), "--methods", *methods.split(), "--render_only"]
    run_grid("--table", *map(str, numbers), *asked, monkeypatch=monkeypatch)
    assert {file.name for file in tmp_path.glob("table*")} == {file.name for file in source.glob("table*")}
    for file in tmp_path.glob("table*"):
        assert file.read_bytes() == (source / file.name).read_bytes()


# ---- running ----


def test_finished_cells_are_not_run_again_and_a_failure_stops_nothing(tmp_path):
    jobs, cells = GridFolder(tmp_path), cells_of([TABLES[8]], "coco", [0])
    asked: list[str] = []

    def run(cell: Cell, folder: Path, out: Path) -> None:
        asked.append(cell.name)
        if "alpha-2" in cell.name and len(asked) < 4:
            raise RuntimeError("too warm")
        if "alpha-8" in cell.name and len(asked) < 6:
            raise Timeout("cell.lock")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result(cell, {"all": 0.5})))

    first = run_cells(cells, jobs, run, max_cells=2, show_progress=False)
    assert (first.ran, len(first.not_begun)) == ([cells[0]], 2)
    assert first.failed == {cells[1]: "RuntimeError: too warm"}
    second = run_cells(cells, jobs, run, show_progress=False)
    assert second.ran == [cells[2]]
    assert second.busy == [cells[3]]
    third = run_cells(cells, jobs, run, show_progress=False)
    assert third.ran == [cells[1], cells[3]]
    assert len(asked) == 7
    assert run_cells(cells, jobs, run, show_progress=False).ran == []
    assert set(jobs.results()) == set(cells)
    assert run_cells(cells, GridFolder(tmp_path / "new"), run, max_minutes=0, show_progress=False).not_begun == cells


def test_another_setup_needs_another_folder(tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    setup, jobs = Setup("voc", backbone_weights=str(weights), eval_classes=("cat",)), GridFolder(tmp_path / "jobs")
    jobs.check_setup(setup)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    weights.rename(moved / "weights.pth")
    setup = replace(setup, backbone_weights=str(moved / "weights.pth"))
    jobs.check_setup(setup)
    jobs.check_setup(replace(setup, dataset="coco", image_size=3))
    with pytest.raises(ValueError, match="image_size was 448 and is 224"):
        jobs.check_setup(replace(setup, image_size=224))
    (moved / "weights.pth").write_bytes(b"2")
    with pytest.raises(ValueError, match="backbone_weights was"):
        jobs.check_setup(setup)


FLAGS = [
    "--model_name_or_path", "test_resnet", "--from_scratch", "--image_size", "32", "--many_shot", "12",
    "--few_shot", "10", "--num_views", "2", "--hidden_size", "8",
]  # fmt: skip
SHORT = ["--set", "use_cpu=true", "num_train_epochs=2", "label_warmup_epochs=1", "global_batch_size=8"]
KILLED = """
import os, pathlib, runpy, signal
replace, left = os.replace, [3]
def replace_or_die(temporary, file):
    if pathlib.Path(file).parent.name == "coco":
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, file)
os.replace = replace_or_die
runpy.run_module("benchmarks.paper", run_name="__main__")
"""


def run_grid(*argv: str, monkeypatch) -> None:
    """As `python -m benchmarks.paper ARGV`, but in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", ["paper", *argv])
    runpy.run_module("benchmarks.paper", run_name="__main__")


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make_coco(tmp_path_factory.mktemp("grid") / "coco")


def test_a_grid_that_is_killed_goes_on_where_it_was(coco, tmp_path, monkeypatch, capsys):
    jobs = tmp_path / "jobs"
    common = ["--data_dir", str(coco), "--frozen_backbone", *FLAGS, *SHORT, "--seeds", "1"]
    common += ["--cache_dir", str(tmp_path / "cache")]
    argv = ["--table", "1", "14", "--figure", "3", "6", "7", "--methods", "bce", "balancemix", *common]
    argv += ["--jobs_dir", str(jobs)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *argv], cwd=EXAMPLES.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    files = sorted((jobs / "cells" / "coco").iterdir())
    assert [is_temporary(file.name) for file in files] == [True, False, False]
    assert len(GridFolder(jobs).results()) == 2  # the third is written, but nobody was told that it is whole
    before = {file: file.stat().st_mtime_ns for file in files[1:]}
    (cache,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    made = (cache / "features.npy").stat().st_mtime_ns

    run_grid(*argv, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "4 cells run now, 6 of 6 finished." in printed
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (cache / "features.npy").stat().st_mtime_ns == made
    assert len(GridFolder(jobs).results()) == 6
    assert not list((jobs / "work").rglob("*"))[1:]  # nothing is left but the data set's folder
    names = {"table1.md", "table1.csv", "table14.md", "table14.csv", "figure3.png", "figure6.png", "figure7.png"}
    assert names <= {p.name for p in jobs.iterdir()}
    run_grid(*argv, monkeypatch=monkeypatch)
    assert "0 cells run now, 6 of 6 finished." in capsys.readouterr().out
    run_grid(*argv, "--render_only", monkeypatch=monkeypatch)
    assert "cells run now" not in capsys.readouterr().out

    stored = json.loads((jobs / "cells" / "coco" / "mislabel-0.4_balancemix_seed0.json").read_text())
    assert stored["settings"]["label_warmup_epochs"] == 1
    assert stored["versions"]["torch"]
    assert stored["seconds"]["train"] > 0
    assert [line["epoch"] for line in stored["epochs"]] == [1, 2]
    assert 0 <= stored["epochs"][1]["label_clean_precision"] <= 1
    assert str(tmp_path) not in json.dumps(stored)  # no path of this machine
    assert stored["mAP"]["all"] == pytest.approx(np.mean(stored["per_class_ap"]))
    # the seed makes everything: the same cell alone, in another folder, is the same
    again = ["--table", "14", "--noises", "mislabel-0.4", *common, "--jobs_dir", str(tmp_path / "again")]
    run_grid(*again, monkeypatch=monkeypatch)
    other = json.loads((tmp_path / "again" / "cells" / "coco" / "mislabel-0.4_balancemix_seed0.json").read_text())
    assert other["per_class_ap"] == stored["per_class_ap"]


def tiny_setup(monkeypatch, tmp_path: Path, **changes) -> tuple[Setup, GridData]:
    train, val = make_dataset(tmp_path / "t", 24), make_dataset(tmp_path / "v", 12, seed=1)
    source = Source("nothing", lambda root: (train, val), {"num_train_epochs": 3, "label_warmup_epochs": 1})
    monkeypatch.setitem(cell_module.SOURCES, "sample", source)
    settings = {"use_cpu": True, "global_batch_size": 8}
    values = {"from_scratch": True, "model_name_or_path": "test_resnet", "head": "linear", "image_size": 32}
    setup = Setup("sample", settings=settings, many_shot=12, few_shot=11, **values | changes)
    return setup, GridData(setup, None, tmp_path / "cache")


def test_cells_on_frozen_stages_share_a_cache_and_train_what_follows(tmp_path, monkeypatch):
    setup, data = tiny_setup(monkeypatch, tmp_path, frozen_stages=2, num_views=2)
    cells = [Cell("sample", "flip", 0.2, method, seed) for method, seed in (("bce", 0), ("bce", 1), ("mixup", 0))]
    run, made, scores = in_this_process(setup, data), [], []
    for i, cell in enumerate(cells):
        run(cell, tmp_path / "work", tmp_path / f"{i}.json")
        (file,) = (tmp_path / "cache").glob("*/features.npy")
        made.append(file.stat().st_mtime_ns)
        scores.append(json.loads((tmp_path / f"{i}.json").read_text()))
    assert len(set(made)) == 1
    assert np.load(file, mmap_mode="r").shape[0] == 24 * 3 + 12
    assert len({str(score["per_class_ap"]) for score in scores}) == 3  # of other seeds and methods
    assert scores[0]["setup"]["frozen_stages"] == 2
    again = GridData(setup, None, tmp_path / "cache")  # as another process would
    in_this_process(setup, again)(cells[1], tmp_path / "work", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["per_class_ap"] == scores[1]["per_class_ap"]


def test_a_grid_of_before_there_were_frozen_stages_goes_on(tmp_path):
    grid, setup = GridFolder(tmp_path), Setup("sample")
    facts = setup.facts()
    del facts["frozen_stages"]
    (tmp_path / "setup-sample.json").write_text(json.dumps(facts))
    grid.check_setup(setup)
    with pytest.raises(ValueError, match="frozen_stages was None and is 2"):
        grid.check_setup(Setup("sample", frozen_stages=2))


def test_a_cell_goes_on_from_its_checkpoint_and_counts_the_named_classes(tmp_path, monkeypatch):
    setup, data = tiny_setup(monkeypatch, tmp_path, eval_classes=("bee", "elk"))
    cell, folder, out = Cell("sample", "flip", 0.2, "balancemix", 1), tmp_path / "work", tmp_path / "cell.json"
    make, steps, seen = cell_module.trainer_for, [], []

    def trainer_for(*args, **kwargs):
        trainer = make(*args, **kwargs)
        step = trainer.training_step

        def training_step(*args, **kwargs):
            steps.append(trainer.state.global_step)
            if len(steps) == 8:
                raise MemoryError
            return step(*args, **kwargs)

        trainer.training_step = training_step
        predict = trainer.predict
        trainer.predict = lambda part: seen.append(predict(part)) or seen[-1]
        return trainer

    monkeypatch.setattr(cell_module, "trainer_for", trainer_for)
    with pytest.raises(MemoryError):
        run_cell(cell, setup, data, folder, out)
    assert not out.exists()
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    run_cell(cell, setup, data, folder, out)
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8]  # the second epoch's end was saved
    assert not folder.exists()
    run_cell(cell, setup, data, folder, out)  # finished
    assert len(steps) == 11

    stored = json.loads(out.read_text())
    ap = {
        name: average_precision_score(seen[0].label_ids[:, k], seen[0].predictions[:, k])
        for k, name in enumerate(NAMES)
    }
    assert stored["per_class_ap"] == pytest.approx([ap[name] for name in NAMES])
    assert stored["eval_classes"] == ["bee", "elk"]
    assert stored["mAP"]["all"] == pytest.approx((ap["bee"] + ap["elk"]) / 2)
    counts = dict(zip(NAMES, data.class_counts().tolist(), strict=True))
    assert {name for name in NAMES if counts[name] < 11} == {"ant", "bee", "elk"}
    assert stored["mAP"]["few"] == stored["mAP"]["all"]  # ant is few-shot too, but does not count
    assert stored["mAP"]["medium"] is None
    assert [line["epoch"] for line in stored["epochs"]] == [1, 2, 3]
    assert stored["class_counts"] == list(counts.values())
    assert asdict(cell_module.cell_from_json(stored["cell"])) == asdict(cell)


def epochs_of(method: str, tmp_path: Path, monkeypatch) -> list[dict]:
    """What the JSON of a cell says of each epoch."""
    setup, data = tiny_setup(monkeypatch, tmp_path)
    cell, out = Cell("sample", "mislabel", 0.4, method, 0), tmp_path / "cell.json"
    run_cell(cell, setup, data, tmp_path / "work", out)
    return json.loads(out.read_text())["epochs"]


def test_the_figures_that_a_method_logs_of_itself_are_kept(tmp_path, monkeypatch):
    of_method = {
        "co-teaching": {"clean_instances_first", "clean_instances_second", "clean_instances_both"},
        "t-estimator": {"t_up_mean", "t_down_mean"},
        "ll-cp": {"large_loss_corrected"},
        "nar": {"nar_left_out", "nar_made_positive", "nar_made_negative"},
        "balancemix": {"label_clean_precision", "sampler_effective_size", "p_clean_mean"},
        "bce": set(),
    }
    for method, names in of_method.items():
        epochs = epochs_of(method, tmp_path / method, monkeypatch)
        assert [line["epoch"] for line in epochs] == [1, 2, 3]
        assert all(line["loss"] > 0 for line in epochs)
        assert names <= set().union(*epochs), method
        if method == "bce":  # and nothing of Trainer's own
            assert set().union(*epochs) == {"epoch", "loss"}


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path, monkeypatch):
    setup, data = tiny_setup(monkeypatch, tmp_path)
    cell = Cell("sample", "clean", 0.0, "bce", 0)
    with process_lock(tmp_path / "work.lock"), pytest.raises(Timeout):
        run_cell(cell, setup, data, tmp_path / "work", tmp_path / "cell.json")
    run_cell(cell, setup, data, tmp_path / "work", tmp_path / "cell.json")
    assert (tmp_path / "cell.json").is_file()
    assert not (tmp_path / "work.lock").exists()


def test_the_commit_says_whether_the_code_differs_from_it(tmp_path):
    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, "-C", str(tmp_path), *command], check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    for folder in ("hf_balancemix/core", "benchmarks/paper", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("as committed")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "docs" / "file").write_text("other")
    assert git_commit(tmp_path) == commit
    for folder in ("hf_balancemix/core", "benchmarks/paper"):
        for name in ("file", "new"):
            (tmp_path / folder / name).write_text("other")
            assert git_commit(tmp_path) == f"{commit}+changes"
            git("stash", "--include-untracked")
    assert git_commit(tmp_path / "docs") is None  # a copy inside somebody else's repository


def test_min_positives_counts_both_parts(tmp_path, monkeypatch):
    setup, data = tiny_setup(monkeypatch, tmp_path)
    train, val = (np.bincount(np.concatenate(p["labels"]), minlength=5) for p in (data.train, data.evaluation))
    for least in (1, 4, 5, 9):
        data.setup = replace(setup, min_positives=least)
        assert data.eval_classes().tolist() == ((train >= least) & (val >= least)).tolist()
    data.setup = replace(setup, eval_classes=("bee", "unicorn"))
    with pytest.raises(ValueError, match="eval_classes names unicorn"):
        data.eval_classes()


def test_a_cell_under_accelerate_launch(coco, tmp_path):
    settings = {"use_cpu": True, "num_train_epochs": 1, "global_batch_size": 8}
    values = {"from_scratch": True, "model_name_or_path": "test_resnet", "head": "linear", "image_size": 32}
    setup, jobs = Setup("coco", settings=settings, **values), GridFolder(tmp_path)
    config = str(EXAMPLES / "accelerate_configs" / "cpu.yaml")
    cells = [cell_of(TABLES[1].rows[0], CLEAN, "coco", 0)]
    wrong = launched(setup, str(coco), "", str(tmp_path / "nowhere.yaml"))
    outcome = run_cells(cells, jobs, wrong, show_progress=False)
    assert "log.txt" in outcome.failed[cells[0]]
    assert run_cells(cells, jobs, launched(setup, str(coco), "", config), show_progress=False).ran == cells
    assert 0 < jobs.results()[cells[0]]["mAP"]["all"] <= 1
    assert not jobs.work_folder(cells[0]).exists()
    assert render(jobs, setup, [1], [])[0].read_text().count("| bce") == 4


def test_the_command_says_what_is_wrong(coco, tmp_path, monkeypatch, capsys):
    def message(*argv: str) -> str:
        flags = ("--jobs_dir", str(tmp_path), *argv)
        return error_of(lambda: run_grid(*flags, monkeypatch=monkeypatch), capsys)

    assert "--table N" in message()
    assert "--table 16 is not known" in message("--table", "16")
    assert "--figure 5 is not known" in message("--figure", "5")
    assert "instances_train2017.json" in message("--table", "1")
    assert "Category and Attribute" in message("--table", "4")
    assert "VOC2007" in message("--table", "10")
    assert "no folder" in message("--table", "1", "--data_dir", str(tmp_path / "nowhere"))
    assert "did you mean num_train_epochs?" in message("--table", "1", "--set", "num_train_epoch=3")
    assert "method asl2" in message("--table", "1", "--methods", "asl2")
    assert "noise mislabel-0.3 is none" in message("--table", "1", "--noises", "mislabel-0.3")
    assert "do not exist" in message("--table", "1", "--backbone_weights", "gone.pth")
    for frozen in (["--frozen_backbone"], ["--frozen_stages", "2"]):
        assert "leave out --frozen_backbone or --frozen_stages" in message("--table", "6", *frozen)
    assert "frozen_backbone is on" in message("--table", "1", "--frozen_backbone", "--frozen_stages", "2")
    assert not list(tmp_path.glob("cells"))
