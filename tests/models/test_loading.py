"""Backbones from every source: names and order of the classes, weights that really arrive, sizes, and bad input."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import tiny_resnet, tiny_vit
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    SwinConfig,
    SwinForImageClassification,
    ViTImageProcessor,
)

from hf_balancemix import load_model, squash_processor
from hf_balancemix.data.views import BICUBIC, BILINEAR

CLASSES = ["zebra", "ant", "cat"]  # not in alphabetical order
WEIGHTS = Path(os.environ.get("BALANCEMIX_WEIGHTS", Path(__file__).parents[2] / "../shared/weights"))


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(model, size: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images(size)).logits


def assert_ready(model, names=CLASSES) -> None:
    config = model.config
    assert config.num_labels == len(names)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: k for k, name in enumerate(names)}
    assert config.problem_type == "multi_label_classification"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def saved(model, folder: Path, size: int | None = 32) -> Path:
    model.save_pretrained(folder)
    if size is not None:
        squash_processor(image_size=size).save_pretrained(folder)
    return folder


# ---- timm, from scratch ----


@pytest.mark.parametrize("name", ["timm/resnet10t", "mobilenetv3_small_050.lamb_in1k", "test_vit", "convnext_atto"])
def test_a_timm_architecture_from_scratch_survives_saving(name, tmp_path):
    model, processor = load_model(name, CLASSES, pretrained=False, image_size=64)
    assert_ready(model)
    assert processor.size["height"] == processor.size["width"] == 64
    before = logits(model, 64)
    assert before.shape == (2, 3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_model(str(tmp_path), CLASSES)
    assert_ready(loaded)
    assert torch.equal(logits(loaded, 64), before)
    assert again.to_dict() == processor.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == CLASSES


def test_scratch_weights_follow_the_seed():
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(load_model("test_resnet", CLASSES, pretrained=False)[0].parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_size_and_normalisation_default_to_what_timm_says():
    cfg = timm.get_pretrained_cfg("test_resnet")
    _, processor = load_model("test_resnet", CLASSES, pretrained=False)
    assert processor.size["height"] == cfg.input_size[-1]
    assert list(processor.image_mean) == list(cfg.mean)
    assert list(processor.image_std) == list(cfg.std)
    assert processor.resample == {"bilinear": BILINEAR, "bicubic": BICUBIC}[cfg.interpolation]


def test_a_tag_brings_its_own_normalisation():
    tags = ["vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224", "test_resnet.r160_in1k"]
    processors = [load_model(f"timm/{tag}", CLASSES, pretrained=False, image_size=32)[1] for tag in tags]
    assert [list(p.image_mean) for p in processors] == [list(timm.get_pretrained_cfg(tag).mean) for tag in tags]
    assert timm.get_pretrained_cfg("resnet50.tv_in1k").interpolation == "bilinear"
    assert load_model("resnet50.tv_in1k", CLASSES, pretrained=False, image_size=32)[1].resample == BILINEAR
    with pytest.raises(ValueError, match=r"Invalid pretrained tag \(nothing\)"):
        load_model("resnet50.nothing", CLASSES, pretrained=False)


def test_model_kwargs_reach_timm_or_are_refused(tmp_path):
    model, _ = load_model("test_resnet", CLASSES, pretrained=False, model_kwargs={"drop_rate": 0.25})
    assert model.timm_model.drop_rate == 0.25
    assert load_model(str(saved(model, tmp_path)), CLASSES)[0].timm_model.drop_rate == 0.25
    with pytest.raises(ValueError, match=r"timm cannot build test_resnet with {'rate': 1}"):
        load_model("test_resnet", CLASSES, pretrained=False, model_kwargs={"rate": 1})
    with pytest.raises(ValueError, match=r"model_kwargs is {'drop_rate': 0.25}; .* brings its own config"):
        load_model(str(tmp_path), CLASSES, model_kwargs={"drop_rate": 0.25})


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos", "test_maxvit"])
def test_architectures_of_a_fixed_size_are_built_for_ours(name, tmp_path):
    model, _ = load_model(name, CLASSES, pretrained=False, image_size=64)
    before = logits(model, 64)
    loaded, _ = load_model(str(saved(model, tmp_path, 64)), CLASSES)
    assert torch.equal(logits(loaded, 64), before)


# ---- timm, with a file ----


def trained(name: str, num_classes: int) -> torch.nn.Module:
    """An architecture whose every tensor differs from its initial value, batch-norm statistics too."""
    generator = torch.Generator().manual_seed(5)
    model = timm.create_model(name, num_classes=num_classes)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.05 * torch.rand(tensor.shape, generator=generator) + ("running_var" in key))
    return model


def test_a_new_head_on_backbone_weights_starts_small(tmp_path):
    """MobileNet's own initialisation would draw it up to 1 / sqrt(5) = 0.45, whatever the number of features."""
    backbone = timm.create_model("mobilenetv2_035", num_classes=0)
    torch.save(backbone.state_dict(), tmp_path / "w.pt")
    head = load_model("mobilenetv2_035", CLASSES, backbone_weights=tmp_path / "w.pt")[0].timm_model.classifier
    assert head.weight.abs().max() <= head.in_features**-0.5
    assert head.weight.std().item() == pytest.approx((3 * head.in_features) ** -0.5, rel=0.1)


def test_both_heads_of_a_distilled_model_are_new(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "w.pt")
    model = load_model(name, CLASSES, backbone_weights=tmp_path / "w.pt")[0].timm_model
    assert all(head.weight.abs().max() > 0.06 for head in model.get_classifier())  # timm's are drawn with 0.02


@pytest.mark.parametrize("form", ["safetensors", "pth", "pth under state_dict", "headless", "without counters"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_backbone_weights_arrive_down_to_the_batch_norm_statistics(name, form, tmp_path):
    source = trained(name, 0 if form == "headless" else 7)
    state = source.state_dict()
    if form == "without counters":
        state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"epoch": 3, "state_dict": state} if "under" in form else state, file)
    model, _ = load_model(name, CLASSES, backbone_weights=file, image_size=32)
    assert_ready(model)
    classifier = timm.get_pretrained_cfg(name).classifier + "."
    own = model.timm_model.state_dict()
    compared = [key for key in own if not key.startswith(classifier) and key in state]
    assert len(compared) >= len(own) - 2 - sum("num_batches" in key for key in own)
    if name != "test_convnext":
        assert any("running_mean" in key for key in compared)
        assert any("running_var" in key for key in compared)
    for key in compared:
        assert torch.equal(own[key], state[key]), key
    assert own[f"{classifier}weight"].shape[0] == 3
    # Same features from the loaded backbone as from the source.
    with torch.no_grad():
        expected = source.eval().forward_features(images(32))
        assert torch.allclose(model.timm_model.eval().forward_features(images(32)), expected, atol=1e-5, rtol=1e-5)


def test_a_head_of_the_same_number_of_classes_arrives_too(tmp_path):
    source = trained("test_resnet", 3)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model, _ = load_model("test_resnet", CLASSES, backbone_weights=tmp_path / "w.pt")
    assert torch.equal(model.timm_model.fc.weight, source.fc.weight)


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos"])
def test_weights_of_another_image_size_are_resized_and_saved_so(name, tmp_path):
    source = trained(name, 0)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, processor = load_model(name, CLASSES, backbone_weights=tmp_path / "w.pth", image_size=96)
    assert processor.size["height"] == 96
    key = "blocks.0.mlp.fc1.weight"
    assert torch.equal(model.timm_model.state_dict()[key], source.state_dict()[key])
    before = logits(model, 96)
    loaded, _ = load_model(str(saved(model, tmp_path / "m", 96)), CLASSES)
    assert torch.equal(logits(loaded, 96), before)
    # And from a folder to another size again.
    smaller, _ = load_model(str(tmp_path / "m"), CLASSES, image_size=64)
    before = logits(smaller, 64)
    assert torch.equal(logits(load_model(str(saved(smaller, tmp_path / "s", 64)), CLASSES)[0], 64), before)


def test_what_is_no_matching_weights_file_is_refused_by_name(tmp_path):
    def refused(content, match: str, name: str = "w.pth") -> None:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=match) as error:
            load_model("test_resnet", CLASSES, backbone_weights=tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "weights_only" not in str(error.value)

    refused(
        trained("test_efficientnet", 0).state_dict(), "does not hold the weights of test_resnet: .*tensors are absent"
    )
    good = trained("test_resnet", 0).state_dict()
    refused(good | {"stray.weight": torch.zeros(2)}, r"1 do not fit \(stray.weight\)")
    refused(
        {k: v for k, v in good.items() if k != "bn1.running_mean"}, r"1 of its tensors are absent \(bn1.running_mean"
    )
    refused(b"", "cannot be read")
    refused(b"garbage" * 100, "cannot be read")
    refused(b"garbage" * 100, "cannot be read", name="w.safetensors")
    torch.save(good, tmp_path / "cut.pth")
    refused((tmp_path / "cut.pth").read_bytes()[:5000], "cannot be read")
    refused([torch.zeros(1)], "hold no state dict")
    refused({"epoch": 3}, "hold no state dict")
    with pytest.raises(FileNotFoundError, match=r"gone\.pth do not exist"):
        load_model("test_resnet", CLASSES, backbone_weights=tmp_path / "gone.pth")


def test_real_weights_arrive():
    file = WEIGHTS / "mobilenetv2_100_keras_int8_dequant_nohead.pth"
    if not file.is_file():
        pytest.skip(f"{file} is absent; set BALANCEMIX_WEIGHTS to the folder that holds it")
    model, _ = load_model("mobilenetv2_100", CLASSES, backbone_weights=file, image_size=96)
    own, state = model.timm_model.state_dict(), torch.load(file, weights_only=True)
    for key in own:
        if not key.startswith("classifier.") and "num_batches_tracked" not in key:
            assert torch.equal(own[key], state[key].to(own[key].dtype)), key
    assert own["bn2.running_var"].std() > 0
    assert_ready(model)


# ---- folders of transformers ----


def swin(num_labels: int = 7):
    torch.manual_seed(1)
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4,
                   num_labels=num_labels)
    )  # fmt: skip


def convnext(num_labels: int = 7):
    torch.manual_seed(1)
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=num_labels)
    )


def wrapper(num_labels: int = 7):
    torch.manual_seed(1)
    return load_model("test_resnet", [f"old {k}" for k in range(num_labels)], pretrained=False, image_size=32)[0]


MODELS = {
    "resnet": (tiny_resnet, 32), "vit": (tiny_vit, 16), "swin": (swin, 32), "convnext": (convnext, 32),
    "timm": (wrapper, 32),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_with_another_number_of_labels_gets_a_new_head_and_keeps_the_rest(kind, tmp_path):
    make, size = MODELS[kind]
    source = make(num_labels=7)
    model, processor = load_model(str(saved(source, tmp_path, size)), CLASSES)
    assert_ready(model)
    assert processor.size["height"] == size
    assert logits(model, size).shape == (2, 3)
    own, old = model.state_dict(), source.state_dict()
    replaced = [key for key in own if own[key].shape != old[key].shape]
    assert 1 <= len(replaced) <= 2
    assert all(own[key].shape[0] == 3 and old[key].shape[0] == 7 for key in replaced)
    for key in own.keys() - set(replaced):
        assert torch.equal(own[key], old[key]), key
    # What is saved now has the new names.
    again = AutoModelForImageClassification.from_pretrained(saved(model, tmp_path / "new", None))
    assert_ready(again)


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_with_the_same_number_of_labels_keeps_its_head_and_warns_of_other_names(kind, tmp_path, caplog):
    make, size = MODELS[kind]
    source = make(num_labels=3)
    folder = str(saved(source, tmp_path, size))
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(folder, CLASSES)
    assert "other names" in caplog.text
    assert_ready(model)
    assert torch.equal(logits(model, size), logits(source, size))
    model.save_pretrained(folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert_ready(load_model(folder, CLASSES)[0])
        assert "other names" not in caplog.text
        load_model(folder, CLASSES[::-1])
        assert "other names or in another order" in caplog.text


def test_a_new_process_gets_the_same_logits(tmp_path):
    sizes = {"timm": 64, "vit": 16, "mobile": 64}
    models = {
        "timm": load_model("resnet10t", CLASSES, pretrained=False, image_size=64)[0],
        "vit": tiny_vit(num_labels=3),
        "mobile": load_model("mobilenetv3_small_050", CLASSES, pretrained=False, image_size=64)[0],
    }
    for name, model in models.items():
        saved(model, tmp_path / name, sizes[name])
        torch.save((images(sizes[name]), logits(model, sizes[name])), tmp_path / f"{name}.pt")
    script = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForImageClassification
from hf_balancemix import load_model
torch.set_num_threads(1)
for file in Path(sys.argv[1]).glob("*.pt"):
    pixels, expected = torch.load(file, weights_only=True)
    folder = file.with_suffix("")
    model, _ = load_model(str(folder), ["zebra", "ant", "cat"])
    with torch.no_grad():
        ours = model.eval()(pixel_values=pixels).logits
        plain = AutoModelForImageClassification.from_pretrained(folder).eval()(pixel_values=pixels).logits
    print(file.stem, torch.equal(ours, expected), torch.allclose(plain, expected, atol=1e-6))
"""
    threads = torch.get_num_threads()
    assert threads == 1, "conftest sets one thread; the sums of several may differ in the last bit"
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert sorted(out.stdout.split("\n")[:-1]) == [f"{name} True True" for name in sorted(models)]


def test_a_loaded_model_may_be_saved_over_its_own_folder(tmp_path):
    folder = saved(wrapper(), tmp_path)
    model, _ = load_model(str(folder), [f"old {k}" for k in range(7)])
    before = logits(model, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)
    again, _ = load_model(str(folder), [f"old {k}" for k in range(7)])
    assert torch.equal(logits(again, 32), logits(model, 32))
    assert not torch.equal(logits(again, 32), before)


def test_weights_that_do_not_fit_their_own_config_are_refused(tmp_path):
    folder = saved(tiny_vit(), tmp_path, 16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(ValueError, match=r"tensors of its weights do not fit its config"):
        load_model(str(folder), CLASSES)


def test_a_folder_without_a_processor(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, processor = load_model(str(saved(wrapper(), tmp_path / "timm", None)), CLASSES, image_size=32)
        assert list(processor.image_mean) == list(timm.get_pretrained_cfg("test_resnet").mean)
        assert processor.size["height"] == 32
        _, processor = load_model(str(saved(tiny_vit(), tmp_path / "vit", None)), CLASSES)
        assert processor.size["height"] == 16  # what the model's config says
    assert caplog.text.count("has no image processor") == 2


# ---- bad input ----


def test_bad_names_sizes_and_classes_are_one_sentence_each(tmp_path):
    for name in ("nowhere/nothing", "/no/such/folder", "timm/resnet50.tv_in1k"):  # conftest: offline
        with pytest.raises(FileNotFoundError, match=r"cannot load the model .*--backbone_weights FILE") as error:
            load_model(name, CLASSES)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot load the model .*Unrecognized model"):
        load_model(str(tmp_path), CLASSES)
    with pytest.raises(ValueError, match=r"no architecture 'resnet5'.*did you mean .*resnet50"):
        load_model("resnet5", CLASSES, pretrained=False)
    with pytest.raises(ValueError, match="no architecture 'microsoft/resnet-50'"):
        load_model("microsoft/resnet-50", CLASSES, pretrained=False)
    for wrong in ([], ["a", "b", "a"]):
        with pytest.raises(ValueError, match=f"class_names holds {len(wrong)} names"):
            load_model("test_resnet", wrong, pretrained=False)
    folder = saved(tiny_vit(), tmp_path / "vit", 16)
    with pytest.raises(ValueError, match=r"no images of 24 x 24 pixels.*set image_size to 16, its own"):
        load_model(str(folder), CLASSES, image_size=24)


# ---- processors ----


def test_the_squash_processor_keeps_normalisation_and_drops_crops(tmp_path):
    given = ConvNextImageProcessor(size={"shortest_edge": 40}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    for processor, size in ((squash_processor(given), 40), (squash_processor(given, 24), 24)):
        processor.save_pretrained(tmp_path)
        loaded = AutoImageProcessor.from_pretrained(tmp_path)
        assert isinstance(loaded, ViTImageProcessor)
        assert (loaded.size["height"], loaded.size["width"]) == (size, size)
        assert list(loaded.image_mean) == [0.1, 0.2, 0.3]
        assert list(loaded.image_std) == [0.5, 0.6, 0.7]
        assert loaded.resample == given.resample
    # Squashing what squashes already changes nothing.
    assert squash_processor(processor).to_dict() == processor.to_dict()


@pytest.mark.parametrize("given", [ViTImageProcessor(do_normalize=False), MobileViTImageProcessor()])
def test_a_processor_that_does_not_normalise_stays_so(given):
    processor = squash_processor(given, 16)
    assert list(processor.image_mean) == [0, 0, 0]
    assert list(processor.image_std) == [1, 1, 1]


def test_no_size_is_an_error():
    with pytest.raises(ValueError, match=r"image_size is None, .*; pass image_size"):
        squash_processor()


def test_from_pretrained_needs_no_package_of_ours(tmp_path):
    folder = saved(wrapper(3), tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(folder)
    assert plain.config.id2label == {0: "old 0", 1: "old 1", 2: "old 2"}
    assert plain.config.problem_type == "multi_label_classification"


def test_weights_from_scratch_are_drawn_as_timm_draws_them():
    # TimmWrapper would give every convolution the standard deviation 0.02 and undo the zeros of the last batch norms.
    torch.manual_seed(0)
    model, _ = load_model("resnet10t", ["a", "b"], image_size=32, pretrained=False)
    torch.manual_seed(1)
    drawn = timm.create_model("resnet10t", num_classes=2)
    for name, value in drawn.named_parameters():
        if value.ndim == 4:
            own = model.timm_model.get_parameter(name).std().item()
            assert own == pytest.approx(value.std().item(), rel=0.2), name
    assert model.timm_model.layer1[0].bn2.weight.eq(0).all()
