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
    "Mislabel": "data.noise",
    "MultiLabelTrainer": "trainer",
    "MultiLabelTrainingArguments": "training_args",
    "RandomFlip": "data.noise",
    "SinglePositive": "data.noise",
    "drop_bad_images": "data.training_data",
    "load_coco": "data.coco",
    "load_model": "models",
    "make_scenes": "data.scenes",
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
