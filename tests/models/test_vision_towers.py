"""The vision towers of CLIP, SigLIP and others that see images and text, and DINOv3, under every head of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers as tf
from conftest import NAMES, arguments, make_dataset

from hf_balancemix import MultiLabelTrainer, load_model, squash_processor
from hf_balancemix.models import load_trained, model_from_backbone
from hf_balancemix.models.configuration_balancemix import HEADS
from hf_balancemix.models.modeling_balancemix import naflex_inputs

_SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = _SIZES | {"image_size": 16, "patch_size": 4}
TEXT = _SIZES | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PATCHES = _SIZES | {"patch_size": 4, "num_patches": 16}


def whole(kind: str):
    return getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(text_config=TEXT, vision_config=VISION))


MODELS = {
    "clip": lambda: whole("CLIP"),
    "clip tower": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)),
    "clip projection": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**VISION)),
    "clip classifier": lambda: tf.CLIPForImageClassification(tf.CLIPConfig(text_config=TEXT, vision_config=VISION)),
    "siglip": lambda: whole("Siglip"),
    "siglip tower": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)),
    "siglip2": lambda: tf.Siglip2Model(tf.Siglip2Config(text_config=TEXT, vision_config=PATCHES)),
    "siglip2 tower": lambda: tf.Siglip2VisionModel(tf.Siglip2VisionConfig(**PATCHES)),
    "metaclip": lambda: whole("MetaClip2"),  # AutoModel does not know the tower
    "blip": lambda: whole("Blip"),  # nor the tower its name in the whole
    "two of any kind": lambda: tf.VisionTextDualEncoderModel(
        tf.VisionTextDualEncoderConfig.from_vision_text_configs(tf.ViTConfig(**VISION), tf.BertConfig(**TEXT))
    ),
    "dinov3": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**VISION)),
    "dinov3 convnext": lambda: tf.DINOv3ConvNextModel(
        tf.DINOv3ConvNextConfig(hidden_sizes=[4, 4, 8, 16], depths=[1, 1, 1, 1], image_size=64)
    ),
}


def saved(kind: str, folder):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_every_head_stands_on_the_tower_of_a_folder(kind, tmp_path):
    source = saved(kind, tmp_path)
    size = 64 if "convnext" in kind else 16
    squash_processor(image_size=size).save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, size, size)
    inputs = naflex_inputs(pixels, 4) if "siglip2" in kind else {"pixel_values": pixels}
    with torch.no_grad():
        expected = getattr(source, "vision_model", source)(**inputs).last_hidden_state
    for head in HEADS[1:]:
        labels = torch.eye(len(NAMES)) if head == "ms_cma" else None
        if head == "ms_cma" and kind != "dinov3 convnext":
            with pytest.raises(ValueError, match="has maps of one size only; the head ms_cma needs"):
                load_model(str(tmp_path), NAMES, head=head, train_labels=labels)
            continue
        model, _ = load_model(str(tmp_path), NAMES, head=head, train_labels=labels)
        assert model.config.head == head
        with torch.no_grad():
            assert torch.equal(model.eval().backbone(**inputs).last_hidden_state, expected)
            assert model(pixel_values=pixels).logits.shape == (2, len(NAMES))
    for head in (None, "linear"):
        plain, processor = load_model(str(tmp_path), NAMES, head=head)
        assert processor.size["height"] == size
        assert plain(pixel_values=pixels).logits.shape == (2, len(NAMES))
    assert model_from_backbone(str(tmp_path), NAMES).config.head == "linear"


def test_they_train_and_the_auto_class_loads_them_in_a_new_process(tmp_path):
    data, pixels, expected = make_dataset(tmp_path / "images"), torch.randn(2, 3, 16, 16), {}
    for kind in ("clip", "siglip2", "blip", "dinov3"):
        saved(kind, tmp_path / kind / "source")
        model, processor = load_model(str(tmp_path / kind / "source"), NAMES, head="mlp", image_size=16)
        args = arguments(tmp_path / kind / "out", num_train_epochs=1)
        trainer = MultiLabelTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
        before = next(model.backbone.parameters()).clone()
        trainer.train()
        assert not torch.equal(next(model.backbone.parameters()), before)
        trainer.save_model()
        with torch.no_grad():
            expected[args.output_dir] = model.eval()(pixel_values=pixels).logits
    torch.save((pixels, expected), tmp_path / "expected.pt")
    code = (
        "import sys, torch, hf_balancemix.models; from transformers import AutoModelForImageClassification as A\n"
        "x, expected = torch.load(sys.argv[1])\n"
        "for folder, y in expected.items():\n"
        "    assert torch.equal(A.from_pretrained(folder).eval()(pixel_values=x).logits, y)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "expected.pt")], check=True)


def test_siglip2_sees_the_patches_that_its_own_processor_makes(tmp_path):
    own = tf.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = own(image, return_tensors="pt")
    ours = squash_processor(own)
    assert ours.size["height"] == ours.size["width"] == 16
    found = naflex_inputs(ours(image, return_tensors="pt")["pixel_values"], 4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, check_dtype=name != "pixel_attention_mask")
    saved("siglip2", tmp_path)
    own.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), NAMES)[1].size["height"] == 16


PYRAMID = {"hidden_sizes": [4, 4, 8, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 2]}
UNPOOLED = {  # backbones without a pooler, and how the classifiers of transformers pool them
    "siglip": (tf.SiglipVisionConfig(vision_use_head=False, **VISION), lambda x: x.mean(1)),
    "aimv2": (tf.Aimv2VisionConfig(use_head=False, **VISION), lambda x: x.mean(1)),
    "ijepa": (tf.IJepaConfig(**VISION), lambda x: x.mean(1)),
    "pvt_v2": (tf.PvtV2Config(image_size=64, **PYRAMID), lambda x: x.mean((2, 3))),
    "segformer": (tf.SegformerConfig(image_size=64, **PYRAMID), lambda x: x.mean((2, 3))),
    "vit": (tf.ViTConfig(**VISION), lambda x: x[:, 0]),
    "git": (tf.GitVisionConfig(**VISION), lambda x: x[:, 0]),
}


@pytest.mark.parametrize("kind", UNPOOLED)
def test_what_has_no_pooler_is_pooled_as_its_own_classifier_does(kind):
    config, pool = UNPOOLED[kind]
    model = model_from_backbone(config, NAMES).eval()
    pixels = torch.randn(2, 3, *(2 * [64 if "depths" in config.to_dict() else 16]))
    with torch.no_grad():
        features = model.backbone(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(model(pixel_values=pixels).logits, model.head(pool(features)))


@pytest.mark.parametrize("kind", ["clip", "siglip2", "dinov3"])
def test_what_has_no_classifier_names_the_heads(kind, tmp_path):
    model = saved(kind, tmp_path)
    with pytest.raises(ValueError, match=r"does not classify plain images .*linear, mlp, ml_decoder, q2l"):
        MultiLabelTrainer(model=model, args=arguments(tmp_path / "out", image_size=16))
    if kind != "clip":
        with pytest.raises(ValueError, match=r"has no classifier; .*linear, mlp, ml_decoder, q2l"):
            load_trained(str(tmp_path))


def test_a_model_of_text_is_refused(tmp_path):
    tf.BertModel(tf.BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"bert is no backbone for the head linear .*name another backbone"):
        load_model(str(tmp_path), NAMES)
