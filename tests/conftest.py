"""Tiny data sets and models, made here: no file of this repository and no network is needed."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_array

NAMES = ["ant", "bee", "cat", "dog", "elk"]


def make_dataset(
    folder: Path, num_instances: int = 24, seed: int = 0, size: int = 20, names: list[str] | None = None
) -> datasets.Dataset:
    """Random images on disk, with random class lists in which each class occurs."""
    names = names or NAMES
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths, labels = [], []
    for i in range(num_instances):
        paths.append(str(folder / f"{i:03}.png"))
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(paths[-1])
        present = np.flatnonzero(rng.random(len(names)) < 0.3).tolist()
        labels.append(sorted({*present, i % len(names)}))
    features = datasets.Features(
        image=datasets.Image(),
        labels=datasets.List(datasets.ClassLabel(names=names)),
        image_id=datasets.Value("int64"),
    )
    return datasets.Dataset.from_dict(
        {"image": paths, "labels": labels, "image_id": list(range(100, 100 + num_instances))}, features=features
    )


@pytest.fixture
def dataset(tmp_path: Path) -> datasets.Dataset:
    return make_dataset(tmp_path / "images")


def label_dataset(labels, names=None, ids=None, **others) -> datasets.Dataset:
    """A data set without images from (N, K) matrices of 0 and 1."""
    names = names or [f"class {k}" for k in range(np.shape(labels)[1])]
    feature = datasets.List(datasets.ClassLabel(names=list(names)))
    columns = {
        name: [np.flatnonzero(row).tolist() for row in matrix] for name, matrix in {"labels": labels, **others}.items()
    }
    features = dict.fromkeys(columns, feature)
    columns["image_id"] = list(range(len(labels))) if ids is None else list(ids)
    features["image_id"] = datasets.Value("string" if isinstance(columns["image_id"][0], str) else "int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def long_tailed_labels(seed: int, rows: int, classes: int) -> np.ndarray:
    """`(rows, classes)` uint8, the commonest class first."""
    rng = np.random.default_rng(seed)
    return (rng.random((rows, classes)) < np.geomspace(0.5, 0.005, classes)).astype(np.uint8)


def tiny_resnet(num_labels: int = len(NAMES), seed: int = 0) -> torch.nn.Module:
    """With batch norm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        num_labels=num_labels, problem_type="multi_label_classification",
    )  # fmt: skip
    return ResNetForImageClassification(config)


def tiny_vit(num_labels: int = len(NAMES), dropout: float = 0.0, seed: int = 0) -> torch.nn.Module:
    """Without batch norm; its keys are renamed on save."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=num_labels, problem_type="multi_label_classification", hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def arguments(folder: Path, **changes):
    """Arguments of a short run on the CPU."""
    from hf_balancemix import BalanceMixTrainingArguments

    values = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "num_train_epochs": 2, "per_device_train_batch_size": 4, "image_size": 16,
        "label_warmup_epochs": 1, "seed": 3, "learning_rate": 0.05, "relabel_threshold": 0.6,
        "mixture_preset": "sklearn",  # of so few labels it calls some unclean
    }  # fmt: skip
    return BalanceMixTrainingArguments(**values | changes)


def stop_after(epoch: int):
    """A callback that ends training with this epoch, counted from 1."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.epoch >= epoch

    return Stop()


def load_example(name: str) -> ModuleType:
    """The script `examples/NAME.py` as a module that was not run."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All parameters and buffers in one vector."""
    tensors = (getattr(t, "full_tensor", lambda t=t: t)() for t in (*model.parameters(), *model.buffers()))  # FSDP's
    return torch.cat([t.detach().float().flatten() for t in tensors])


def remember_all(state, p_clean, judged=None) -> None:
    """Make a `BalanceMix` remember p_G of all labels, and what its judge said; f(x) is 0.5."""
    instance, label_class = torch.ones(state.labels.shape).nonzero(as_tuple=True)
    p_clean = p_clean.half().flatten()
    state._remember(instance, label_class, p_clean, torch.full_like(p_clean, 0.5), judged)


def with_unknown_class(labels, k):
    """Compressed labels of which nobody knows those of class k."""
    dense = labels.toarray()
    dense[:, k] = -1
    return csr_array(dense)
