"""The paper's tables and figures as data: which cells each is made of, and what it shows of their results.

A *cell* is one training run: data set, noise, method, seed, and what a search table varies. Tables share cells: the
clean runs of Table 1 are those of Table 2.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.figures import (
    class_counts_figure,
    confidence_against_ap,
    rank_pentagon,
    sampling_over_epochs,
)
from benchmarks.paper.numbers import Entry, mean_and_error, ranks, read_paper_numbers
from hf_balancemix.core import BalanceMixSettings
from hf_balancemix.methods.registry import METHODS
from hf_balancemix.scripts.arguments import single_positive_settings

Noise = tuple[str, float]
Results = Mapping["Cell", Mapping[str, Any]]

CLEAN: Noise = ("clean", 0.0)
MISLABEL: tuple[Noise, ...] = (("mislabel", 0.2), ("mislabel", 0.4))
FLIP: tuple[Noise, ...] = (("flip", 0.2), ("flip", 0.4))
SINGLE: Noise = ("single-positive", 0.0)
REAL: Noise = ("real-world", 0.0)  # the labels as published
GROUPS = ("all", "many", "medium", "few")
_QUALITY = {
    "clean precision": "clean_precision",
    "clean recall": "clean_recall",
    "re-labelled": "relabel_proportion",
    "re-labelling right": "relabel_accuracy",
}


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    dataset: str
    noise: str
    rate: float
    method: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    """Training arguments that a search table varies."""
    model: tuple[tuple[str, Any], ...] = ()
    """`model_name_or_path`, `image_size` and `head` of Table 6, in place of the grid's own."""

    @property
    def noise_name(self) -> str:
        """Such as `mislabel-0.4`."""
        return f"{self.noise}-{self.rate:g}" if self.rate else self.noise

    @property
    def name(self) -> str:
        """A file name, unique among the cells of a data set."""
        extra = [f"{k}-{str(v).rpartition('/')[2]}" for k, v in (*self.settings, *self.model)]
        parts = (self.noise_name, self.method, *extra, f"seed{self.seed}")
        return "_".join(re.sub(r"[^\w.+-]", "-", part) for part in parts)


def settings_by_noise(noise: str, preset: str) -> dict[str, Any]:
    """Training arguments of BalanceMix for a kind of noise, with a preset."""
    if noise == "single-positive":
        return single_positive_settings(preset)
    return {"trust_positives": True} if noise == "clean" and preset == "paper" else {}


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    method: str | None = None
    """A name in `METHODS`; None for a number that is only quoted."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    noises: tuple[Noise, ...] | None = None
    """Where other than the table's."""
    paper_method: str | None = None
    """Name in the paper's numbers, where other than `name`."""
    paper_setting: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments where the grid's own settings do not say otherwise."""


@dataclass(frozen=True)
class Table:
    """A table of the paper, or what a figure of it is drawn from."""

    title: str
    datasets: tuple[str, ...]
    """Those of the paper; the first is the default, and the one whose numbers are quoted beside other data."""
    noises: tuple[Noise, ...]
    rows: tuple[Row, ...]
    groups: tuple[str, ...] = GROUPS
    paper_tables: tuple[int, ...] = ()
    """Whose numbers are quoted."""
    label_quality: bool = False
    mean_column: bool = False
    note: str = ""


# As published, with the epochs and the batch in place of the data set's.
_ML_DECODER_RECIPE = {"preset": "ml-decoder", "num_train_epochs": 40, "global_batch_size": 56}


def _methods(*names: str) -> tuple[Row, ...]:
    return tuple(Row(name, name) for name in names)


def _eps(value: float, noises: tuple[Noise, ...]) -> Row:
    name = f"eps={value}"
    return Row(name, "balancemix", {"relabel_threshold": value}, {}, noises, "balancemix", name)


def _alphas(*values: int) -> tuple[Row, ...]:
    settings = {f"alpha={a}": {"mixup_alpha": float(a)} for a in values}
    return tuple(Row(name, "balancemix", given, {}, None, "balancemix", name) for name, given in settings.items())


def _sota(
    name: str, network: str, weights: str, size: int, head: str = "ml_decoder", method: str = "", **recipe: Any
) -> Row:
    model = {"model_name_or_path": f"timm/{weights}", "image_size": size, "head": head}
    setting = f"{network}@{size}"
    return Row(f"{name}, {setting}", method or name, {}, model, None, name, setting, _ML_DECODER_RECIPE | recipe)


_COMPARED = _methods("bce", "co-teaching", "asl", "t-estimator", "ll-r", "ll-ct", "balancemix")
_R101, _TRESNET = ("resnet101", "resnet101.tv_in1k"), ("tresnet_l", "tresnet_v2_l.miil_in21k_ft_in1k")

TABLES: dict[int, Table] = {
    1: Table("mislabelled labels (COCO)", ("coco",), (CLEAN, *MISLABEL), _COMPARED, paper_tables=(1,)),
    2: Table("randomly flipped labels (COCO)", ("coco",), (CLEAN, *FLIP), _COMPARED, paper_tables=(2,)),
    3: Table("single positive labels (COCO, VOC)", ("coco", "voc"), (SINGLE,), _COMPARED, paper_tables=(3,)),
    4: Table("real-world labels (DeepFashion)", ("deepfashion",), (REAL,), _COMPARED, paper_tables=(4,)),
    5: Table(
        "what each part adds (COCO)",
        ("coco",),
        (CLEAN, ("mislabel", 0.4), ("flip", 0.4), SINGLE),
        (
            *_methods("bce", "mixup", "+minority"),
            # What its Figure 6 shows is not Eq. 3 (docs/choices.md).
            Row("+minority by positives", "+minority", {"minority_score": "positive"}),
            *_methods("+clean", "+relabel"),
            Row("+ambiguous", "balancemix"),
        ),
        groups=("all",),
        paper_tables=(5,),
        mean_column=True,
        note="Each row adds to the one above; +ambiguous is the whole method. The paper's own BCE row differs here "
        "from its Tables 1 to 3.",
    ),
    6: Table(
        "state of the art without noise (COCO 2014)",
        ("coco2014",),
        (CLEAN,),
        (
            _sota("ms-cma", *_R101, 448, head="ms_cma", method="bce", pos_weight="balanced"),
            _sota("asl", *_R101, 448, head="linear"),
            _sota("ml-decoder", *_R101, 448, method="asl"),
            _sota("balancemix", *_R101, 448),
            _sota("asl", "tresnet_l", "tresnet_l.miil_in1k_448", 448, head="linear"),
            _sota("q2l", *_TRESNET, 448, head="q2l", method="asl"),
            _sota("ml-decoder", *_TRESNET, 448, method="asl"),
            _sota("balancemix", *_TRESNET, 448),
            _sota("ml-decoder", *_TRESNET, 640, method="asl"),
            _sota("ml-decoder", "tresnet_xl", "tresnet_xl.miil_in1k_448", 640, method="asl"),
            _sota("balancemix", *_TRESNET, 640),
        ),
        groups=("all",),
        paper_tables=(6,),
        note="MS-CMA has no public code: its head is built from its description (docs/choices.md) and trained with "
        "BCE that balances positive and negative labels (--pos_weight balanced). ML-Decoder and Q2L are their heads "
        "trained with ASL. All rows are trained with the recipe that ASL and ML-Decoder were published with (--preset "
        "ml-decoder), in batches of 56 for 40 epochs. The paper's 87.1 of ML-Decoder on ResNet-101 used Open Images "
        "weights.",
    ),
    7: Table(
        "search of the re-labelling threshold eps (COCO)",
        ("coco",),
        MISLABEL,
        (
            *(_eps(e, MISLABEL) for e in (1.0, 0.975, 0.95)),
            _eps(0.9, (*MISLABEL, SINGLE)),
            *(_eps(e, (SINGLE,)) for e in (0.7, 0.6, 0.55)),
        ),
        groups=("all",),
        paper_tables=(7,),
    ),
    8: Table("search of Mixup's alpha (COCO)", ("coco",), MISLABEL[1:], _alphas(1, 2, 4, 8), paper_tables=(8,)),
    9: Table(
        "all noise at a glance (VOC)",
        ("voc",),
        (CLEAN, *MISLABEL, *FLIP, SINGLE),
        _COMPARED,
        groups=("all",),
        paper_tables=(3, 10, 11),
        note="The paper's numbers are those of its Tables 3, 10 and 11. Its Table 9 prints two of them differently: "
        "co-teaching with single positive labels 81.9, and with 40 % flipped labels 70.0.",
    ),
    10: Table("mislabelled labels (VOC)", ("voc",), (CLEAN, *MISLABEL), _COMPARED, paper_tables=(10,)),
    11: Table("randomly flipped labels (VOC)", ("voc",), (CLEAN, *FLIP), _COMPARED, paper_tables=(11,)),
    12: Table(
        "alpha for many- and few-shot classes (COCO)",
        ("coco",),
        (("mislabel", 0.4),),
        _alphas(0, 1, 2, 4, 8),
        groups=("many", "few"),
        paper_tables=(12,),
    ),
    13: Table(
        "without minority sampler (COCO)",
        ("coco",),
        (CLEAN, ("mislabel", 0.4), ("flip", 0.4), SINGLE),
        _methods("co-teaching", "t-estimator", "ll-r", "ll-ct", "balancemix-without-minority"),
        groups=("all",),
        paper_tables=(13,),
    ),
    14: Table(
        "label quality during training (COCO)", ("coco",), MISLABEL, _methods("balancemix"),
        paper_tables=(14,), label_quality=True,
    ),
    15: Table(
        "label quality during training (VOC)", ("voc",), MISLABEL, _methods("balancemix"),
        paper_tables=(15,), label_quality=True,
    ),
}  # fmt: skip

FIGURES: dict[int, Table] = {
    3: Table("confidence against average precision", ("coco",), (CLEAN, MISLABEL[1]), _methods("bce", "balancemix")),
    4: Table(
        "rank of each method in each set-up",
        ("coco", "deepfashion", "voc"),
        (CLEAN, *MISLABEL, *FLIP, SINGLE),
        _COMPARED,
        paper_tables=(1, 2, 3, 4),
        note="The corner for real-world labels takes Table 4's cells (--dataset deepfashion) in the same jobs_dir.",
    ),
    6: Table("sampling probability over epochs", ("coco",), (CLEAN, *MISLABEL), _methods("balancemix")),
    7: Table("class counts", ("coco", "voc", "deepfashion"), (), ()),
}


def noise_name(noise: Noise) -> str:
    """`mislabel 0.4`, or the kind alone where it has no rate."""
    return f"{noise[0]} {noise[1]:g}" if noise[1] else noise[0]


def rows_of(table: Table, methods: Sequence[str] | None = None) -> tuple[Row, ...]:
    """A table's rows: all, or those of the named methods and a further row for each that the table lacks.

    Raises:
        ValueError: A name is neither in `METHODS` nor a row of the table.
    """
    if not methods:
        return table.rows
    known = {row.name for row in table.rows} | {row.method for row in table.rows}
    bad = sorted(set(methods) - known - set(METHODS))
    if bad:
        raise ValueError(f"method {', '.join(bad)} is not known; choose from {', '.join(METHODS)}.")
    kept = tuple(row for row in table.rows if row.name in methods or row.method in methods)
    return kept + tuple(Row(name, name) for name in methods if name not in known)


def cells_of(
    tables: Iterable[Table],
    dataset: str,
    seeds: Sequence[int],
    methods: Sequence[str] | None = None,
    grid_settings: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """The training runs that the tables are made of, each once, the first seed's first.

    Args:
        tables: Of `TABLES` and `FIGURES`.
        dataset: The data set's name.
        seeds: One run each; the seed is that of the noise, too.
        methods: As for :func:`rows_of`.
        grid_settings: Training arguments of the whole grid, to which a search table's are compared: a search's cell
            with the usual value is the usual cell.
    """
    cells: dict[Cell, None] = {}
    for seed in seeds:
        for table in tables:
            for row in rows_of(table, methods):
                for noise in row.noises or table.noises:
                    if row.method is not None:
                        cells[cell_of(row, noise, dataset, seed, grid_settings)] = None
    return list(cells)


def cell_of(row: Row, noise: Noise, dataset: str, seed: int, grid_settings: Mapping[str, Any] | None = None) -> Cell:
    """The run of a row with a noise and a seed."""
    chosen = dict(grid_settings or {})
    usual = asdict(BalanceMixSettings()) | settings_by_noise(noise[0], chosen.get("preset", "default")) | chosen
    settings = {name: value for name, value in row.recipe.items() if name not in chosen}
    settings |= {name: value for name, value in row.settings.items() if usual.get(name) != value}
    return Cell(dataset, *noise, row.method or "", seed, tuple(settings.items()), tuple(row.model.items()))


# ---- what the tables show ----


def entries_of(
    table: Table,
    dataset: str,
    results: Results,
    methods: Sequence[str] | None = None,
    grid_settings: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """The numbers of a table in per cent: the paper's, and those of the finished cells.

    Args:
        table: Of `TABLES`.
        dataset: Whose cells are shown.
        results: What the finished cells say.
        methods: As for :func:`rows_of`.
        grid_settings: As for :func:`cells_of`.

    Returns:
        Parts without any number are left out.
    """
    runs = _by_condition(results)
    quoted = dataset if dataset in table.datasets else table.datasets[0]
    build = _quality_entries if table.label_quality else _map_entries
    entries = build(table, dataset, quoted, runs, rows_of(table, methods), grid_settings)
    filled = {entry.part for entry in entries if entry.paper is not None or entry.ours}
    return [entry for entry in entries if entry.part in filled]


def _map_entries(
    table: Table,
    dataset: str,
    quoted: str,
    runs: Mapping[Cell, Sequence[Mapping[str, Any]]],
    rows: Sequence[Row],
    grid_settings: Mapping[str, Any] | None,
) -> list[Entry]:
    paper = {
        (*_where(line), line["method"], line["class_group"], line["setting"]): float(line["mAP_percent"])
        for line in read_paper_numbers()
        if int(line["table"]) in table.paper_tables
    }
    quoted = {"coco2014": "coco"}.get(quoted, quoted)
    entries = []
    for group in table.groups:
        for row in rows:
            by_seed: dict[int, list[float]] = defaultdict(list)
            for noise in row.noises or table.noises:
                key = (quoted, *noise, row.paper_method or row.name, group, row.paper_setting)
                entry = Entry(_group_name(group), row.name, noise_name(noise), paper.get(key))
                for result in runs.get(cell_of(row, noise, dataset, -1, grid_settings), ()) if row.method else ():
                    if (value := result["mAP"].get(group)) is not None:
                        entry.ours.append(100 * value)
                        by_seed[result["cell"]["seed"]].append(100 * value)
                entries.append(entry)
            if table.mean_column:
                key = (quoted, "mean", 0.0, row.paper_method or row.name, group, row.paper_setting)
                whole = [sum(v) / len(v) for v in by_seed.values() if len(v) == len(row.noises or table.noises)]
                entries.append(Entry(_group_name(group), row.name, "mean", paper.get(key), whole))
    return entries


def _quality_entries(
    table: Table,
    dataset: str,
    quoted: str,
    runs: Mapping[Cell, Sequence[Mapping[str, Any]]],
    rows: Sequence[Row],
    grid_settings: Mapping[str, Any] | None,
) -> list[Entry]:
    paper = {
        (*_where(line), line["training_progress"]): line
        for line in read_paper_numbers(label_quality=True)
        if int(line["table"]) in table.paper_tables
    }
    entries = []
    for row in rows:
        for noise in row.noises or table.noises:
            part = noise_name(noise) if len(rows) == 1 else f"{row.name}, {noise_name(noise)}"
            found = runs.get(cell_of(row, noise, dataset, -1, grid_settings), ())
            for progress in (25, 50, 75, 100):
                line = paper.get((quoted, *noise, f"{progress}%"), {}) if row.name == "balancemix" else {}
                for heading, figure in _QUALITY.items():
                    printed = line.get(f"{figure}_percent")
                    values = [quality_at(result, figure, progress / 100) for result in found]
                    ours = [100 * v for v in values if v is not None]
                    entries.append(Entry(part, f"{progress} %", heading, float(printed) if printed else None, ours))
    return entries


def quality_at(result: Mapping[str, Any], figure: str, progress: float) -> float | None:
    """A figure of label quality over the epoch that ends at `progress` (0 to 1) of the training.

    Where label-wise management begins only then, it is that of its first epoch, if this ends within a tenth of the
    training; None where there is none.
    """
    total = result["num_epochs"]
    due = math.ceil(progress * total - 1e-9)
    by_epoch = {line["epoch"]: line.get(f"label_{figure}") for line in result["epochs"]}
    for epoch in range(due, min(total, due + math.ceil(total / 10)) + 1):
        if by_epoch.get(epoch) is not None:
            return by_epoch[epoch]
    return None


# ---- figures ----


def figure_of(
    number: int, dataset: str, results: Results, class_counts: Sequence[int] | None, many: int, few: int
) -> Figure | None:
    """A figure of the paper from finished cells; None where there is nothing to draw.

    Args:
        number: 3, 4, 6 or 7.
        dataset: Whose cells are shown.
        results: What the finished cells say.
        class_counts: Positive training labels of each class, for Figure 7.
        many: Classes with more positive labels are many-shot.
        few: Classes with fewer are few-shot.
    """
    runs = _by_condition(results)
    table = FIGURES[number]
    if number == 3:
        panels, names = _confidence_panels(table, dataset, runs)
        return confidence_against_ap(panels, names) if panels else None
    if number == 4:
        panels = _rank_panels(table, dataset, runs)
        return rank_pentagon(panels) if panels else None
    if number == 6:
        panels = _sampling_panels(table, dataset, runs)
        return sampling_over_epochs(panels) if panels else None
    return None if class_counts is None else class_counts_figure({dataset: class_counts}, many, few)


def _confidence_panels(table: Table, dataset: str, runs: Mapping[Cell, Sequence[Mapping[str, Any]]]) -> Any:
    panels, names = {}, {}
    for row in table.rows:
        for noise in table.noises:
            found = runs.get(cell_of(row, noise, dataset, -1), ())
            if not found:
                continue
            first, title = found[0], f"{row.name}, {noise_name(noise)}"
            classes = [k for k, name in enumerate(first["class_names"]) if name in first["eval_classes"]]
            panels[title] = [
                (
                    first["class_groups"][k],
                    mean_and_error([r["positive_confidence"][k] for r in found])[0],
                    mean_and_error([r["per_class_ap"][k] for r in found])[0],
                )
                for k in classes
            ]
            names[title] = [first["class_names"][k] for k in classes] if len(classes) <= 30 else []
    return panels, names


def _rank_panels(table: Table, dataset: str, runs: Mapping[Cell, Sequence[Mapping[str, Any]]]) -> Any:
    def corner_ranks(value: Any) -> dict[str, dict[str, float]]:
        corners = {
            "clean": (CLEAN,),
            "mislabel": MISLABEL,
            "flip": FLIP,
            "single positive": (SINGLE,),
            "real": (REAL,),
        }
        ranked: dict[str, dict[str, float]] = defaultdict(dict)
        for corner, noises in corners.items():
            means = {}
            for row in table.rows:
                values = [v for noise in noises if (v := value(row, noise)) is not None]
                if len(values) == len(noises):
                    means[row.name] = sum(values) / len(values)
            if len(means) > 1:
                for name, rank in ranks(means).items():
                    ranked[name][corner] = rank
        return dict(ranked)

    def ours(row: Row, noise: Noise) -> float | None:
        where = "deepfashion" if noise == REAL else dataset
        found = runs.get(cell_of(row, noise, where, -1), ())
        return mean_and_error([r["mAP"]["all"] for r in found])[0] if found else None

    numbers = [line for line in read_paper_numbers() if int(line["table"]) in table.paper_tables]

    def printed(row: Row, noise: Noise) -> float | None:
        where = "deepfashion" if noise == REAL else "coco"
        for line in numbers:
            if _where(line) == (where, *noise) and line["method"] == row.name and line["class_group"] == "all":
                return float(line["mAP_percent"])
        return None

    our_ranks = corner_ranks(ours)
    return {"paper": corner_ranks(printed)} | ({f"ours ({dataset})": our_ranks} if our_ranks else {})


def _sampling_panels(table: Table, dataset: str, runs: Mapping[Cell, Sequence[Mapping[str, Any]]]) -> Any:
    panels = {}
    for noise in table.noises:
        groups: dict[str, dict[int, list[float]]] = {}
        for result in runs.get(cell_of(table.rows[0], noise, dataset, -1), ()):
            for line in result["epochs"]:
                for group in ("many", "medium", "few"):
                    if (lift := line.get(f"sampler_lift_{group}")) is not None:
                        groups.setdefault(group, {}).setdefault(line["epoch"], []).append(lift)
        if groups:
            panels[noise_name(noise)] = groups
    return panels


def _by_condition(results: Results) -> dict[Cell, list[Mapping[str, Any]]]:
    """Results of the same cell but for the seed, in the order of the seeds; the key's seed is -1."""
    grouped: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    for cell in sorted(results, key=lambda cell: cell.seed):
        grouped[replace(cell, seed=-1)].append(results[cell])
    return grouped


def _group_name(group: str) -> str:
    return "all classes" if group == "all" else f"{group}-shot classes"


def _where(line: Mapping[str, str]) -> tuple[str, str, float]:
    """Data set and noise of a line of the paper's numbers."""
    return line["dataset"], line["noise"], float(line["rate"] or 0)
