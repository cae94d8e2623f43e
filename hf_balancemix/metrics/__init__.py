"""Figures of an evaluation and of the label management."""

from hf_balancemix.metrics.average_precision import (
    RunningFigures,
    class_groups,
    evaluation_figures,
    mean_average_precision,
    precision_recall_f1,
    shot_bounds,
)
from hf_balancemix.metrics.evaluate_path import evaluate_path
from hf_balancemix.metrics.label_quality import LabelQuality, count_label_quality, label_quality

__all__ = [
    "LabelQuality",
    "RunningFigures",
    "class_groups",
    "count_label_quality",
    "evaluate_path",
    "evaluation_figures",
    "label_quality",
    "mean_average_precision",
    "precision_recall_f1",
    "shot_bounds",
]
