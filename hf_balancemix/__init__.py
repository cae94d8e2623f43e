"""BalanceMix: train the right multi-label image model from unbalanced, wrong or missing labels.

Three doors: :class:`BalanceMixTrainer` (a Hugging Face Trainer), the scripts in `examples/`, and
`hf_balancemix.core` (the method as plain PyTorch). Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "BalanceMixTrainer": "trainer",
    "BalanceMixTrainingArguments": "training_args",
    "ClassConditional": "data",
    "Compose": "data",
    "Mislabel": "data",
    "MultiLabelTrainer": "trainer",
    "MultiLabelTrainingArguments": "training_args",
    "NoiseMap": "data",
    "RandomFlip": "data",
    "SinglePositive": "data",
    "describe": "data",
    "drop_bad_images": "data",
    "from_csv": "data",
    "from_detection": "data",
    "from_tags": "data",
    "iterative_split": "data",
    "load_coco": "data",
    "load_deepfashion": "data",
    "load_model": "models",
    "load_noise_map": "data",
    "load_voc": "data",
    "make_scenes": "data",
    "mean_average_precision": "metrics",
    "squash_processor": "models",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
