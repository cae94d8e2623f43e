"""A head trained on cached features, put back on its backbone; and the head mlp of our models."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import NAMES, tiny_resnet, tiny_vit
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    pipeline,
)

from hf_balancemix import load_model, load_trained, model_from_backbone, squash_processor
from hf_balancemix.frozen.head import (
    FeatureClassifier,
    FeatureClassifierConfig,
    backbone_digest,
    pooled_features,
    with_head,
)
from hf_balancemix.models.heads import MLPHead

MLP = {"head": "mlp", "head_args": {"hidden_size": 6}}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def tiny_dinov2():
    """Whose classifier sees the class token beside the mean of the others."""
    sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, num_labels=len(NAMES)))


def trained(feature_size: int, hidden_size: int) -> FeatureClassifier:
    config = FeatureClassifierConfig(feature_size=feature_size, hidden_size=hidden_size, num_labels=len(NAMES))
    return FeatureClassifier(config)


def images(number: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(number, 3, size, size)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_dinov2])
def test_a_linear_head_on_its_backbone_is_a_model_of_the_backbones_own_class(make, tmp_path):
    model, x = make(), images()
    before = copy.deepcopy(model.state_dict())
    features = pooled_features(model)(x)
    head = trained(features.shape[1], 0)
    composed = with_head(model, head)
    composed.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(composed(pixel_values=x).logits, head(pixel_values=features).logits)
        torch.testing.assert_close(loaded(pixel_values=x).logits, features @ head.head[0].weight.T + head.head[0].bias)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # it is a copy


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_a_hidden_layer_on_its_backbone_is_a_model_of_ours(architecture, tmp_path):
    size = 96 if architecture == "test_convnext" else 32
    model, processor = load_model(architecture, NAMES, image_size=size, pretrained=False, **MLP)
    x = images(size=size)
    digest = backbone_digest(model)
    features = pooled_features(model)(x)
    with torch.no_grad():
        expected = model.backbone(pixel_values=x).pooler_output.flatten(1)
    torch.testing.assert_close(features, expected)
    head = trained(features.shape[1], 6)
    composed = with_head(model, head)
    assert backbone_digest(composed) == backbone_digest(model) == digest
    composed.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_trained(str(tmp_path))
    first, _, last = head.head
    with torch.no_grad():
        by_hand = (features @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
        assert torch.equal(composed(pixel_values=x).logits, head(pixel_values=features).logits)
        torch.testing.assert_close(loaded(pixel_values=x).logits, by_hand)
    # It can be trained on as a whole, with its head.
    again, _ = load_model(str(tmp_path), NAMES, image_size=size)
    assert torch.equal(again.head[2].weight, last.weight)


def test_settings_without_weights_are_other_features():
    def digest(**kwargs):
        torch.manual_seed(0)
        return backbone_digest(load_model("test_resnet", NAMES, pretrained=False, **kwargs)[0])

    assert digest() == digest() != digest(model_kwargs={"global_pool": "max"})
    one, other = tiny_resnet(), tiny_resnet()
    assert backbone_digest(one) == backbone_digest(other)
    other.config.hidden_act = "gelu"
    assert backbone_digest(one) != backbone_digest(other)
    other = tiny_resnet()
    other.config.id2label = {k: name.upper() for k, name in other.config.id2label.items()}
    assert backbone_digest(one) == backbone_digest(other)


def test_a_head_of_another_kind_is_refused():
    model = tiny_resnet()
    with pytest.raises(ValueError, match="load the model with head='mlp'"):
        with_head(model, trained(16, 16))  # as many hidden units as features: the last layer alone would fit
    ours = model_from_backbone(tiny_resnet().config, NAMES, **MLP)
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"a head of {size} hidden units"):
            with_head(ours, trained(16, size))
    decoder = model_from_backbone(
        tiny_resnet().config, NAMES, head="ml_decoder", head_args={"embed_dim": 8, "inner_dim": len(NAMES)}
    )
    with pytest.raises(ValueError, match="no linear layer with 5 outputs on pooled features"):
        pooled_features(decoder)


def test_a_backbone_with_two_classifiers_is_refused():
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL, num_labels=len(NAMES)))
    with pytest.raises(ValueError, match="not those of its last linear layer alone"):
        pooled_features(model)(images())


def test_a_head_on_features_takes_no_images_and_says_so(tmp_path):
    head = trained(16, 6)
    with pytest.raises(ValueError, match=r"takes feature vectors \(B, 16\), no images"):
        head(pixel_values=images())
    head.config.problem_type = "multi_label_classification"
    head.save_pretrained(tmp_path)
    squash_processor(None, 16).save_pretrained(tmp_path)
    for load in (load_trained, lambda name: load_model(name, NAMES)):
        with pytest.raises(ValueError, match=r"it is a head on cached features.*takes no images"):
            load(str(tmp_path))
    with pytest.raises(ValueError, match="no images"):
        pipeline("image-classification", model=str(tmp_path))(Image.new("RGB", (16, 16)))


def test_the_mlp_head_is_drawn_as_torch_draws():
    torch.manual_seed(0)
    head = MLPHead(400, 300, hidden_size=100)
    for layer, inputs in ((head[0], 400), (head[2], 100)):
        for parameter in (layer.weight.detach(), layer.bias.detach()):
            assert parameter.abs().max() <= inputs**-0.5
            assert parameter.std() == pytest.approx((inputs * 3) ** -0.5, rel=0.15)
    model = model_from_backbone(tiny_resnet().config, NAMES, **MLP)
    assert model.head[0].weight.std().item() == pytest.approx((16 * 3) ** -0.5, rel=0.3)  # not transformers' 0.02
    with pytest.raises(ValueError, match="hidden_size is 0"):
        model_from_backbone(tiny_resnet().config, NAMES, head="mlp", head_args={"hidden_size": 0})
