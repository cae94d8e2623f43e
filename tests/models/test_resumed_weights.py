"""Weights that come back into a trainer: all of them or an error; and thresholds go when weights change."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import NAMES, arguments, flat, make_dataset, tiny_resnet, tiny_vit
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_balancemix import MultiLabelTrainer
from hf_balancemix.methods import trainer_for
from hf_balancemix.models import load_model

_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    "num_labels": 5, "name_or_path": "someone/weights",
}  # fmt: skip
MODELS = {
    "resnet": lambda: tiny_resnet(seed=torch.initial_seed()),
    "vit": lambda: ViTForImageClassification(ViTConfig(intermediate_size=16, **_SIZES)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(intermediate_size=16, **_SIZES)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**_SIZES)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4,
                   num_labels=5)
    ),
    "timm": lambda: load_model("test_resnet", NAMES, image_size=16, pretrained=False)[0],
    "ml_decoder": lambda: load_model("test_resnet", NAMES, image_size=16, pretrained=False, head="ml_decoder")[0],
}  # fmt: skip


def fresh(kind: str, seed: int) -> torch.nn.Module:
    """Every weight and statistic off its initial value, by seed."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape))
    return model


def trainer_of(model: torch.nn.Module, tmp_path) -> MultiLabelTrainer:
    return MultiLabelTrainer(model=model, args=arguments(tmp_path / "out"))


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_of_a_checkpoint_comes_back(kind, tmp_path):
    saved, own = fresh(kind, 1), fresh(kind, 2)
    source = own.config.name_or_path
    saved.save_pretrained(tmp_path / "checkpoint-1")
    assert not torch.equal(flat(own), flat(saved))
    trainer_of(own, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(flat(own), flat(saved))
    assert own.config.name_or_path == source


@pytest.mark.parametrize(("stored", "own"), [("vit", "deit"), ("deit", "vit"), ("vit", "dinov2"), ("timm", "vit")])
def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(stored, own, tmp_path):
    fresh(stored, 1).save_pretrained(tmp_path / "checkpoint-1")
    model = fresh(own, 2)
    before = flat(model)
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint-1 holds other weights .* {type(model).__name__}: .*missing"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(flat(model), before)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="Needed is a checkpoint of the same architecture and sizes"):
        trainer._load_best_model()


@pytest.mark.parametrize("deeper", ["stored", "own"])
def test_a_checkpoint_of_another_depth_is_refused(deeper, tmp_path):
    models = {
        who: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2 if who == deeper else 1],
                         layer_type="basic", num_labels=5)
        )
        for who in ("stored", "own")
    }  # fmt: skip
    models["stored"].save_pretrained(tmp_path / "checkpoint-1")
    count = r"0 missing, [1-9]\d* unexpected" if deeper == "stored" else r"[1-9]\d* missing, 0 unexpected"
    with pytest.raises(ValueError, match=count):
        trainer_of(models["own"], tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("method", ["bce", "co-teaching"])
def test_training_removes_thresholds_with_a_warning(method, tmp_path, caplog):
    model = tiny_vit()
    model.config.thresholds = [0.3] * 5
    args = arguments(tmp_path / "out", num_train_epochs=2)
    trainer = trainer_for(method, args, model=model, train_dataset=make_dataset(tmp_path / "images", 8))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="cannot resume"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert model.config.thresholds == [0.3] * 5  # nothing was trained
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("thresholds were tuned on the weights before") == 1
    trainer.save_model()
    for config in [module.config for module in trainer.model.modules() if hasattr(module, "config")]:
        assert getattr(config, "thresholds", None) is None
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "thresholds" not in caplog.text


def test_an_export_that_fails_does_not_leave_other_ranks_waiting(tmp_path, monkeypatch):
    args = arguments(tmp_path / "out")
    trainer = trainer_for(
        "co-teaching", args, {"scored": "second"}, model=tiny_vit(), train_dataset=make_dataset(tmp_path / "images", 8)
    )
    exported, waits = [], []

    def fails(model, *_):
        exported.append(model)
        raise OSError("disk full")

    monkeypatch.setattr("hf_balancemix.trainer.multilabel.export_onnx", fails)
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: waits.append(1))
    with pytest.raises(OSError, match="disk full"):
        trainer.export_onnx(tmp_path / "model.onnx")
    assert exported == [trainer.model.second]
    assert waits == [1]
