"""BalanceMix: train the right multi-label image model from unbalanced, wrong or missing labels.

Three doors: :class:`BalanceMixTrainer` (a Hugging Face Trainer), the command `balancemix` (and the scripts in
`examples/`), and `hf_balancemix.core` (the method as plain PyTorch). Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "AsymmetricLoss": "core.losses",
    "BalanceMixConfig": "models",
    "BalanceMixForImageClassification": "models",
    "BalanceMixTrainer": "trainer",
    "BalanceMixTrainingArguments": "trainer",
    "ClassConditional": "data",
    "Compose": "data",
    "DBLoss": "core.losses",
    "FocalLoss": "core.losses",
    "HillLoss": "core.losses",
    "LargeLoss": "core.losses",
    "LossTrainer": "methods",
    "METHODS": "methods",
    "MLDecoderHead": "models",
    "Mislabel": "data",
    "MultiLabelLoss": "core.losses",
    "MultiLabelTrainer": "trainer",
    "MultiLabelTrainingArguments": "trainer",
    "NoiseMap": "data",
    "Query2LabelHead": "models",
    "RandomFlip": "data",
    "SPLCLoss": "core.losses",
    "SinglePositive": "data",
    "describe": "report.description",
    "drop_bad_images": "data",
    "evaluate_path": "metrics",
    "export_onnx": "models",
    "from_csv": "data",
    "from_detection": "data",
    "from_tags": "data",
    "iterative_split": "data",
    "load_coco": "data",
    "load_deepfashion": "data",
    "load_model": "models",
    "load_noise_map": "data",
    "load_trained": "models",
    "load_voc": "data",
    "make_scenes": "data",
    "mean_average_precision": "metrics",
    "model_from_backbone": "models",
    "pipeline_labels": "models",
    "predict_labels": "models",
    "squash_processor": "models",
    "trainer_for": "methods",
    "tune_thresholds": "models",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
