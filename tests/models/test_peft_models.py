"""LoRA: adapters train, resume bit for bit, are saved without peft's card, and merge into an ordinary model."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import NAMES, arguments, flat, make_dataset, tiny_resnet, tiny_vit
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback, ViTConfig

from hf_balancemix import BalanceMixTrainer, MultiLabelTrainer, load_model
from hf_balancemix.models import class_thresholds, model_from_backbone, tune_thresholds
from hf_balancemix.trainer import checkpoints

VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0,
)  # fmt: skip
MODELS = {  # and what LoraConfig is told of each
    "transformers": (lambda: tiny_vit(dropout=0.1, seed=torch.initial_seed()), ["q_proj", "v_proj"], ["classifier"]),
    "batch norm": (tiny_resnet, ["convolution"], ["classifier.1", "normalization"]),
    "timm": (lambda: load_model("test_vit", NAMES, image_size=16, pretrained=False)[0], ["qkv"], ["head"]),
    "ours": (lambda: model_from_backbone(VIT, NAMES, head="ml_decoder"), ["q_proj", "v_proj"], ["head"]),
}


def adapted(kind: str = "transformers", seed: int = 0, **changes):
    torch.manual_seed(seed)
    make, targets, saved = MODELS[kind]
    config = {"r": 2, "target_modules": targets, "modules_to_save": saved, "lora_dropout": 0.1} | changes
    return peft.get_peft_model(make(), peft.LoraConfig(**config))


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 9  # inside the second epoch


def predictions(model, data, tmp_path):
    return MultiLabelTrainer(model=model, args=arguments(tmp_path / "unused")).predict(data).predictions


@pytest.mark.parametrize("kind", MODELS)
def test_a_stopped_run_resumes_bit_for_bit_and_merges(kind, tmp_path):
    trainer_class = BalanceMixTrainer if kind in ("transformers", "ours") else MultiLabelTrainer
    data = make_dataset(tmp_path / "images")

    def trainer(folder: str, **changes):
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=4, **changes)
        return trainer_class(model=adapted(kind), args=args, train_dataset=data, eval_dataset=data)

    whole = trainer("whole")
    before = flat(whole.model)
    whole.train()
    assert not torch.equal(flat(whole.model), before)
    stopped = trainer("stopped")
    stopped.add_callback(_Stop())
    stopped.train()
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert torch.equal(flat(resumed.model), flat(whole.model))

    sealed = json.loads((tmp_path / "whole/checkpoint-8" / checkpoints.MANIFEST).read_text())["files"]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= sealed.keys()
    whole.save_model()
    whole.create_model_card()
    assert "hf_balancemix" in (tmp_path / "whole/README.md").read_text()
    assert not any((tmp_path / "whole").glob("*/README.md"))
    # peft's own way back, on the same base
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "whole")
    expected = whole.predict(data).predictions
    assert np.array_equal(predictions(again, data, tmp_path), expected)

    with pytest.raises(ValueError, match="adapters of peft, not a whole model; save the merged model"):
        load_model(str(tmp_path / "whole"), NAMES)
    merged = whole.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole.processing_class.save_pretrained(tmp_path / "merged")
    plain, processor = load_model(str(tmp_path / "merged"), NAMES)
    assert processor.to_dict() == whole.processing_class.to_dict()
    np.testing.assert_allclose(predictions(plain, data, tmp_path), expected, atol=1e-4)
    assert plain.config.id2label == dict(enumerate(NAMES))
    assert plain.config.problem_type == "multi_label_classification"


def test_the_best_adapters_come_back(tmp_path):
    data = make_dataset(tmp_path / "images")
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    scores = iter([2.0, 1.0])
    trainer = MultiLabelTrainer(
        model=adapted(),
        args=arguments(tmp_path / "out", metric_for_best_model="score", **settings),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-6")
    own, stored = (
        peft.get_peft_model_state_dict(trainer.model),
        load_file(tmp_path / "out/checkpoint-6/adapter_model.safetensors"),
    )
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in own)


def half_trained():
    model = adapted()
    model.base_model.model.vit.layernorm.requires_grad_(True)
    return model


def injected():
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tiny_vit())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: adapted("batch norm", modules_to_save=["classifier.1"]),
            r"running_mean.* not saved with the adapters; .*modules_to_save=\['normalization'\]",
        ),
        (half_trained, r"2 tensors .*modules_to_save=\['layernorm'\]"),
        (injected, "ViTForImageClassification with adapters; it must be a peft.PeftModel"),
        (lambda: peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["q_proj"]), "mine"), "adapters mine"),
    ],
)
def test_adapters_that_would_not_come_back_are_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MultiLabelTrainer(model=make(), args=arguments(tmp_path / "out"))


def test_averages_of_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a PeftModel, and only .* Set ema_decay to 0"):
        MultiLabelTrainer(model=adapted(), args=arguments(tmp_path / "out", ema_decay=0.9))


@pytest.mark.parametrize(("kind", "head"), [("transformers", "classifier"), ("timm", "head"), ("ours", "head")])
def test_a_head_outside_the_adapters_is_said(kind, head, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        MultiLabelTrainer(model=adapted(kind), args=arguments(tmp_path / "out"))
    assert "modules_to_save" not in caplog.text
    with caplog.at_level(logging.WARNING):
        MultiLabelTrainer(model=adapted(kind, modules_to_save=None), args=arguments(tmp_path / "out"))
    assert f"modules_to_save=['{head}']" in caplog.text


def test_a_checkpoint_of_other_adapters_or_on_another_base_is_refused(tmp_path):
    data = make_dataset(tmp_path / "images")
    args = arguments(tmp_path / "out", save_strategy="epoch")
    MultiLabelTrainer(model=adapted(), args=args, train_dataset=data).train()
    for model, message in [
        (adapted(seed=1), "base_weights"),
        (adapted(r=3), "checkpoint-12 holds other weights .*4 mismatched"),
        (tiny_vit(dropout=0.1), "adapters of peft, .* ViTForImageClassification; it must be a PeftModel"),
    ]:
        before = flat(model)
        with pytest.raises(ValueError, match=message):
            MultiLabelTrainer(model=model, args=args, train_dataset=data).train(resume_from_checkpoint=True)
        assert torch.equal(flat(model), before)


def test_thresholds_and_onnx_of_adapters(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    data = make_dataset(tmp_path / "images")
    trainer = MultiLabelTrainer(model=adapted(), args=arguments(tmp_path / "out"), train_dataset=data)
    trainer.train()
    thresholds = tune_thresholds(trainer.model, data, processor=trainer.processing_class)
    trainer.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(session.run(["logits"], {"pixel_values": pixels.numpy()})[0], expected, atol=1e-4)
    assert peft.get_peft_model_state_dict(trainer.model)  # the export merged a copy
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert list(class_thresholds(merged.config).values()) == thresholds


def test_peft_is_not_imported_unless_it_is_used():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from conftest import tiny_vit; "
        "from hf_balancemix.models.peft_models import *; check_adapters(tiny_vit()); merged_copy(tiny_vit()); "
        "assert not is_peft_model(tiny_vit()); assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[1])], check=True)
