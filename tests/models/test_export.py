"""ONNX files that agree with torch, and torch.compile in training."""

from __future__ import annotations

import copy
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import arguments, flat, tiny_resnet, tiny_vit
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextForImageClassification

from hf_balancemix import BalanceMixTrainer, load_model
from hf_balancemix.models.export import export_onnx

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")


def tiny_convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    return ConvNextForImageClassification(config)


def onnx_logits(path, pixels):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixels.numpy()})[0]


def trained_statistics(model):
    """Batch-norm statistics unlike those that are drawn."""
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return model


def with_head(head):
    model, _ = load_model(
        "test_resnet", ["a", "b", "c"], pretrained=False, image_size=32, head=head, head_args={"embed_dim": 32},
        train_labels=torch.eye(3),
    )  # fmt: skip
    return model


def ml_decoder():
    return with_head("ml_decoder")


def query2label():
    return with_head("q2l")


def ms_cma():
    return with_head("ms_cma")


@needs_onnx
@pytest.mark.parametrize("make", [tiny_resnet, tiny_convnext, ml_decoder, query2label, ms_cma])
def test_a_convolutional_network_takes_any_batch_and_any_size(make, tmp_path):
    model = trained_statistics(make()).train()
    before = flat(model)
    path = export_onnx(model, tmp_path / "deep" / "model.onnx", image_size=64)
    assert model.training
    assert torch.equal(flat(model), before)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    model.eval()
    for batch, height, width in ((1, 64, 64), (7, 64, 64), (3, 72, 121)):
        pixels = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits.numpy()
        np.testing.assert_allclose(onnx_logits(path, pixels), expected, atol=1e-4)


@needs_onnx
def test_a_transformer_takes_any_batch_of_its_size(tmp_path):
    model = tiny_vit(dropout=0.5)
    path = export_onnx(model, tmp_path / "model.onnx", image_size=16)
    model.eval()
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits.numpy()
        np.testing.assert_allclose(onnx_logits(path, pixels), expected, atol=1e-4)
    with pytest.raises(Exception, match="invalid dimensions"):
        onnx_logits(path, torch.randn(1, 3, 24, 24))


@needs_onnx
def test_a_model_under_mixed_precision_is_exported_in_float32(dataset, tmp_path):
    trainer = BalanceMixTrainer(
        model=tiny_resnet(), args=arguments(tmp_path, bf16=True, num_train_epochs=2), train_dataset=dataset
    )
    trainer.train()
    path = export_onnx(trainer.model, tmp_path / "model.onnx", image_size=16)
    plain = tiny_resnet()
    plain.load_state_dict(trainer.model.state_dict())
    pixels = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = plain.eval()(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(onnx_logits(path, pixels), expected, atol=1e-5)


class ByValue(torch.nn.Module):
    """Its way depends on the images' values, which no ONNX graph of one trace can follow."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, pixel_values):
        x = pixel_values.mean((2, 3))
        return torch.nn.Module() if x.sum() > 0 else self.linear(x)


@needs_onnx
def test_what_cannot_be_exported_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="ByValue cannot be exported to ONNX"):
        export_onnx(ByValue(), tmp_path / "model.onnx", image_size=16)
    assert not list(tmp_path.iterdir())


class Plain(torch.nn.Module):
    """The smallest classifier."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.linear(pixel_values.mean((2, 3))))


@needs_onnx
def test_a_file_that_is_not_right_never_appears(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"the one before")
    export = torch.onnx.export

    def wrong(module, *args, **kwargs):
        other = copy.deepcopy(module)
        for parameter in other.parameters():
            parameter.data += 1
        return export(other, *args, **kwargs)

    monkeypatch.setattr("torch.onnx.export", wrong)
    with pytest.raises(ValueError, match="differ from those of torch"):
        export_onnx(Plain(), tmp_path / "model.onnx", image_size=16)
    assert (tmp_path / "model.onnx").read_bytes() == b"the one before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_balancemix.models.export._NEEDED", ("onnx_of_another_world",))
    with pytest.raises(ImportError, match=r"onnx_of_another_world: pip install 'hf_balancemix\[onnx\]'"):
        export_onnx(tiny_resnet(), tmp_path / "model.onnx", image_size=16)


@pytest.mark.slow
def test_compiled_training_saves_what_loads(dataset, tmp_path):
    runs = []
    for compiled in (False, True):
        args = arguments(
            tmp_path / str(compiled), torch_compile=compiled, num_train_epochs=2, learning_rate=0.01,
            save_strategy="epoch", eval_strategy="epoch",
        )  # fmt: skip
        trainer = BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=dataset, eval_dataset=dataset)
        trainer.train()
        trainer.save_model()
        loaded = AutoModelForImageClassification.from_pretrained(args.output_dir)
        own = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        assert torch.equal(flat(loaded), flat(own))
        runs.append(flat(own))
    assert torch.allclose(*runs, atol=1e-4)
    # Resumed after the first epoch, it ends where it ended.
    args = arguments(
        tmp_path / "True", torch_compile=True, num_train_epochs=2, learning_rate=0.01, save_strategy="epoch",
        eval_strategy="epoch",
    )  # fmt: skip
    again = BalanceMixTrainer(model=tiny_resnet(seed=9), args=args, train_dataset=dataset, eval_dataset=dataset)
    again.train(resume_from_checkpoint=str(tmp_path / "True" / "checkpoint-6"))
    own = again.accelerator.unwrap_model(again.model, keep_torch_compile=False)
    assert torch.allclose(flat(own), runs[1], atol=1e-6)
