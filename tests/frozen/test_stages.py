"""A classifier cut behind a stage: which can be, what the parts give, and what of them is frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import NAMES, tiny_resnet, tiny_vit
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from hf_balancemix import load_model
from hf_balancemix.frozen.stages import activations_of, cut_behind, stages_of
from hf_balancemix.methods.co_teaching import second_network


def drawn(architecture: str, size: int = 32, **head):
    torch.manual_seed(0)
    return load_model(architecture, NAMES, image_size=size, pretrained=False, **head)[0].eval()


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=len(NAMES))).eval()


DECODER = {"head": "ml_decoder", "head_args": {"embed_dim": 8, "inner_dim": 8}}
MODELS = {
    "resnet": (lambda: drawn("test_resnet"), 4),
    "efficientnet": (lambda: drawn("test_efficientnet"), 5),
    "timm vit": (lambda: drawn("test_vit"), 6),
    "timm convnext": (lambda: drawn("test_convnext", 96), 4),
    "regnet": (lambda: drawn("regnety_002"), 4),
    "ours": (lambda: drawn("test_efficientnet", **DECODER), 5),
    "transformers resnet": (lambda: tiny_resnet().eval(), 2),
    "transformers vit": (vit, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_give_what_the_whole_does(name):
    make, count = MODELS[name]
    model, size = make(), 96 if "convnext" in name else 32
    assert len(stages_of(model)) == count
    images = torch.randn(3, 3, size, size)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        whole = model(pixel_values=images).logits
    for n in sorted({1, count - 1, count}):
        cut = cut_behind(model, n, size)
        assert cut.stage == stages_of(model)[n - 1]
        assert [p.requires_grad for p in model.parameters()] == trainable
        activations = activations_of(model, cut.stage)(images)
        assert activations.dtype == torch.float16
        cut.open(model)
        with torch.no_grad():
            halves = model(pixel_values=activations.float()).logits
        cut.close(model)
        torch.testing.assert_close(halves, whole, rtol=2e-2, atol=5e-3 * whole.abs().max().item())
        with torch.no_grad():
            assert torch.equal(model(pixel_values=images).logits, whole)  # taking images again
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["efficientnet", "timm vit", "transformers vit", "ours"])
def test_a_step_on_the_tail_changes_the_tail_alone_and_the_parts_still_fit(name):
    model = MODELS[name][0]()
    images, n = torch.randn(4, 3, 32, 32), 2
    cut = cut_behind(model, n, 32)
    activations = activations_of(model, cut.stage)(images).float()
    before, trainable = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    cut.open(model)
    model.train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(pixel_values=activations).logits.square().sum().backward()
        optimizer.step()
    assert all((p.grad is None) == (name in frozen) for name, p in model.named_parameters())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not changed & cut.frozen
    later = [f"{stage}." for stage in stages_of(model)[n:]]
    assert all(any(key.startswith(stage) for key in changed) for stage in later)
    earlier = tuple(f"{stage}." for stage in stages_of(model)[:n])
    assert not [key for key in changed if key.startswith(earlier)]
    model.eval()
    with torch.no_grad():
        tail = model(pixel_values=activations).logits
        cut.close(model)
        whole = model(pixel_values=images).logits
    torch.testing.assert_close(whole, tail, rtol=2e-2, atol=5e-3 * whole.abs().max().item())
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_copy_and_a_second_network_are_cut_as_their_model_is():
    model = drawn("test_efficientnet")
    cut = cut_behind(model, 3, 32)
    activations = activations_of(model, cut.stage)(torch.randn(2, 3, 32, 32)).float()
    cut.open(model)
    second = second_network(model, 0)
    assert not torch.equal(model(pixel_values=activations).logits, second(pixel_values=activations).logits)
    cut.close(model)
    frozen = {name for name, p in second.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in second.named_parameters()} & cut.frozen != set()
    with pytest.raises(RuntimeError):
        second(pixel_values=torch.randn(2, 3, 32, 32))
    cut.close(second)
    assert second(pixel_values=torch.randn(2, 3, 32, 32)).logits.shape == (2, len(NAMES))


def test_what_cannot_be_cut_is_refused_in_a_sentence():
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    cases = [
        (drawn("densenet121", 64), 1, r"densenet121 has no list of stages, .*; timm's EfficientNets, ResNets"),
        (SwinForImageClassification(swin), 1, r"cannot be cut behind its stage 1 \(.*\); timm's EfficientNets"),
        (tiny_vit().eval(), 1, "ViTForImageClassification has no list of stages"),  # of one layer
        (drawn("test_efficientnet"), 6, "frozen_stages is 6; it must be 1 to 5, the number of stages of test_eff"),
        (drawn("test_efficientnet"), 0, "frozen_stages is 0; it must be 1 to 5"),
    ]
    for model, n, message in cases:
        keys = [dict(vars(module)) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            cut_behind(model, n, 64 if "densenet" in message else 32)
        assert [dict(vars(module)) for module in model.modules()] == keys
        assert all(p.requires_grad for p in model.parameters())


def test_a_weight_on_both_sides_of_the_cut_is_refused():
    model = vit()
    model.vit.layers[2].layernorm_before.weight = model.vit.layers[0].layernorm_before.weight
    assert cut_behind(model, 3, 32)
    with pytest.raises(ValueError, match=r"stage 1 \(vit.layers.0.layernorm_before.weight is used on both sides"):
        cut_behind(model, 1, 32)


def test_activations_beyond_half_precision_are_refused():
    model = drawn("test_efficientnet")
    stage = stages_of(model)[-1]
    norm = [m for m in model.get_submodule(stage).modules() if hasattr(m, "running_mean")][-1]
    with torch.no_grad():
        norm.weight.fill_(1e7)
        norm.bias.fill_(1e7)
    with pytest.raises(ValueError, match=r"reaches \S+; it must be less than 65,504"):
        activations_of(model, stage)(torch.randn(2, 3, 32, 32))
