"""BalanceMix: train the right multi-label image model from unbalanced, wrong or missing labels.

Three doors: :class:`BalanceMixTrainer` (a Hugging Face Trainer), the command `balancemix` (and the scripts in
`examples/`), and `hf_balancemix.core` (the method as plain PyTorch). Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# Public names by the room that they live in.
_ROOMS = {
    "audit": "Corrections LabelAudit apply_corrections audit_labels",
    "core.losses": "AsymmetricLoss DBLoss FocalLoss HillLoss LargeLoss MultiLabelLoss SPLCLoss",
    "data": "ClassConditional Compose Mislabel NoiseMap RandomFlip SinglePositive drop_bad_images from_csv "
    "from_detection from_tags iterative_split load_coco load_deepfashion load_noise_map load_voc "
    "make_scenes",
    "methods": "LossTrainer METHODS trainer_for",
    "metrics": "evaluate_path mean_average_precision",
    "models": "BalanceMixConfig BalanceMixForImageClassification MLDecoderHead MSCMAHead Query2LabelHead "
    "export_onnx label_graph_embeddings load_model load_trained model_from_backbone pipeline_labels predict_labels "
    "squash_processor tune_thresholds",
    "report.description": "describe",
    "trainer": "BalanceMixTrainer BalanceMixTrainingArguments MultiLabelTrainer MultiLabelTrainingArguments "
    "TrainingInterrupted",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
