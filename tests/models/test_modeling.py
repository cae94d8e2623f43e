"""Backbones with a head: weights that arrive, loading with and without the package, training, bad repositories."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import NAMES, arguments, make_dataset, tiny_resnet, tiny_vit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    ImageClassificationPipeline,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    ViTConfig,
)

import hf_balancemix.models
from hf_balancemix import BalanceMixTrainer
from hf_balancemix.models import (
    BalanceMixConfig,
    BalanceMixForImageClassification,
    load_model,
    load_trained,
    model_from_backbone,
    squash_processor,
)
from hf_balancemix.models.label_graph import embedding_loss, label_graph

CLASSES = ["zebra", "ant", "cat"]
HOME = Path(hf_balancemix.models.__file__).parent
CODE = ["configuration_balancemix.py", "heads.py", "modeling_balancemix.py"]
HEAD_ARGS = {
    "linear": {},
    "ml_decoder": {"num_groups": 2, "embed_dim": 16, "inner_dim": 16},
    "q2l": {"embed_dim": 16, "inner_dim": 16},
    "ms_cma": {"embed_dim": 8},
}
ONE_SIZE = ("vit", "deit", "beit", "dinov2", "registers", "test_vit", "test_vit2")  # backbones without stages
_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
CONFIGS = {
    "resnet": lambda **k: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **k),
    "convnext": lambda **k: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **k),
    "swin": lambda **k: SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, **k
    ),
    "vit": lambda **k: ViTConfig(intermediate_size=16, **_VIT, **k),
    "deit": lambda **k: DeiTConfig(intermediate_size=16, **_VIT, **k),
    "beit": lambda **k: BeitConfig(intermediate_size=16, **_VIT, **k),
    "dinov2": lambda **k: Dinov2Config(**_VIT, **k),
    "registers": lambda **k: Dinov2WithRegistersConfig(**_VIT, **k),
}  # fmt: skip


def ours(backbone="resnet", head: str = "ml_decoder", *, names=CLASSES, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    config = CONFIGS[backbone]() if isinstance(backbone, str) and backbone in CONFIGS else backbone
    if head == "ms_cma":
        kwargs.setdefault("train_labels", some_labels(len(names)))
    return model_from_backbone(config, names, head=head, head_args=HEAD_ARGS[head], **kwargs)


def some_labels(num_classes: int) -> torch.Tensor:
    draws = torch.rand(40, num_classes, generator=torch.Generator().manual_seed(1))
    return (draws < 0.4).to(torch.int8) - (draws > 0.9).to(torch.int8)


def heads_of(backbones) -> list[tuple[str, str]]:
    """All pairs of a backbone and a head but those that ms_cma refuses."""
    return [(b, h) for b in backbones for h in HEAD_ARGS if h != "ms_cma" or b not in ONE_SIZE]


def images(size: int, num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(model, size: int = 16) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images(size)).logits


def shaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter and statistic off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


# ---- backbones and heads ----


@pytest.mark.parametrize(("backbone", "head"), heads_of(CONFIGS))
def test_every_backbone_takes_every_head_and_trains_it(backbone, head):
    model = ours(backbone, head)
    output = model(pixel_values=images(16), labels=torch.tensor([[1.0, 0, 1], [0, 0, -1]]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    assert all(p.grad is not None for p in model.head.parameters() if p.requires_grad)
    assert sum(p.grad is not None for p in model.backbone.parameters()) > 0
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("name", "head"), heads_of(["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_vit2"])
)
def test_timm_backbones_take_every_head(name, head):
    kwargs = {"model_kwargs": {"img_size": 32}} if "vit" in name else {}
    model = ours(name, head, pretrained=False, **kwargs)
    assert logits(model, 32).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet50", "tresnet_l", "tresnet_v2_l", "tresnet_xl", "swin_tiny"])
def test_the_papers_backbones_are_built_with_their_channels(name):
    channels = {"tresnet_l": 2432, "tresnet_xl": 2656, "swin_tiny": 768}
    with torch.device("meta"):
        config = BalanceMixConfig(
            TimmWrapperConfig(architecture=name.replace("swin_tiny", "swin_tiny_patch4_window7_224")),
            channels.get(name, 2048),
            "ml_decoder",
            id2label=dict(enumerate(NAMES)),
        )
        model = BalanceMixForImageClassification(config)
        assert model(pixel_values=torch.zeros(1, 3, 224, 224)).logits.shape == (1, 5)


def test_the_linear_head_is_the_plain_classifier():
    for plain in (tiny_vit(), tiny_resnet(), SwinForImageClassification(CONFIGS["swin"](num_labels=5)),
                  ConvNextForImageClassification(CONFIGS["convnext"](num_labels=5)),
                  BeitForImageClassification(CONFIGS["beit"](num_labels=5))):  # fmt: skip
        model = model_from_backbone(plain.config, NAMES)
        inner = plain.base_model.state_dict()
        model.backbone.load_state_dict(inner)
        classifier = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)][-1]
        model.head.load_state_dict(classifier.state_dict())
        assert torch.equal(logits(model), logits(plain)), type(plain)


@pytest.mark.parametrize("backbone", ["vit", "deit", "dinov2", "registers", "beit", "swin"])
def test_query2label_sees_the_patches_in_their_places(backbone):
    from hf_balancemix.models.modeling_balancemix import backbone_features

    model = ours(backbone, "q2l").eval()
    with torch.no_grad():
        tokens = model.backbone(pixel_values=images(16)).last_hidden_state
        feature_map = backbone_features(model.backbone, "q2l", images(16))
    side = feature_map.shape[-1]
    assert feature_map.shape == (2, 16, side, side)
    assert side == {"swin": 4}.get(backbone, 2)
    for row in range(side):
        for column in range(side):
            place = tokens.shape[1] - side * side + row * side + column
            assert torch.equal(feature_map[:, :, row, column], tokens[:, place])


@pytest.mark.parametrize("backbone", [*(b for b in CONFIGS if b not in ONE_SIZE), "test_resnet", "test_convnext",
                                      "test_efficientnet", "swin_tiny_patch4_window7_224"])  # fmt: skip
def test_ms_cma_sees_the_last_map_of_the_last_stages(backbone):
    from hf_balancemix.models.modeling_balancemix import backbone_features

    kwargs = {} if backbone in CONFIGS else {"pretrained": False}
    model, size = ours(backbone, "ms_cma", **kwargs).eval(), {"swin_tiny_patch4_window7_224": 224}.get(backbone, 16)
    size = 128 if backbone.startswith("test_") else size
    # What each stage puts out, by hooks on the modules that the architectures are made of.
    inner = getattr(model.backbone, "timm_model", model.backbone)
    stages = getattr(inner, "stages", None) or getattr(inner, "layers", None) or getattr(inner, "blocks", None)
    if backbone == "test_resnet":
        stages = [inner.layer1, inner.layer2, inner.layer3, inner.layer4]
    elif backbone in CONFIGS:
        stages = getattr(inner.encoder, "stages", None) or inner.encoder.layers
    seen = []
    hooks = [s.register_forward_hook(lambda module, inputs, output: seen.append(output)) for s in stages]
    with torch.no_grad():
        maps = backbone_features(model.backbone, "ms_cma", images(size), model.config.stages)
        last = backbone_features(model.backbone, "q2l", images(size))
    for hook in hooks:
        hook.remove()
    assert [m.shape[1] for m in maps] == model.config.in_channels
    sides = [m.shape[-1] for m in maps]
    assert sides == sorted(set(sides), reverse=True)
    assert len(maps) == (2 if backbone in CONFIGS else 3)
    assert torch.equal(maps[-1], last)
    if backbone == "swin":  # the maps of transformers' Swin come after the merging of patches, the first before all
        with torch.no_grad():
            first = model.backbone.embeddings(images(size))[0]
        assert torch.equal(maps[0].flatten(2).transpose(1, 2), first)
    else:
        for found in maps[:-1]:
            outputs = [s if s.ndim == 4 else None for s in seen if isinstance(s, torch.Tensor)]
            outputs += [s.permute(0, 3, 1, 2) for s in outputs if "swin" in backbone]
            assert any(s.shape == found.shape and torch.equal(s, found) for s in outputs)


@pytest.mark.parametrize("backbone", ONE_SIZE)
def test_a_backbone_without_stages_is_refused_for_ms_cma(backbone):
    kwargs = {"pretrained": False, "model_kwargs": {"img_size": 32}} if "test" in backbone else {}
    with pytest.raises(ValueError, match=r"has maps of one size only; the head ms_cma needs .*; name a backbone"):
        ours(backbone, "ms_cma", **kwargs)


def test_ms_cmas_label_embeddings_are_those_of_the_training_labels():
    labels = some_labels(3)
    first, second, other = (ours("resnet", "ms_cma", train_labels=y) for y in (labels, labels, labels.flip(0, 1)))
    embeddings = first.head.label_embeddings
    assert embeddings.shape == (3, 8)
    assert embedding_loss(embeddings.double(), label_graph(labels)) < 1e-3
    assert embedding_loss(embeddings.double(), label_graph(labels.flip(1))) > 0.02
    assert torch.equal(second.head.label_embeddings, embeddings)  # by the seed that draws the model
    assert not torch.equal(other.head.label_embeddings, embeddings)
    assert not torch.equal(ours("resnet", "ms_cma", seed=1).head.label_embeddings, embeddings)
    for bad in (None, labels[:, :2], labels[0]):
        with pytest.raises(ValueError, match=r"train_labels is .*; for a new head ms_cma it must be \(N, 3\).*; pass"):
            ours("resnet", "ms_cma", train_labels=bad)


def test_heads_on_backbones_are_drawn_as_heads_alone():
    # transformers would give every linear layer the standard deviation 0.02.
    head = ours("resnet", "ml_decoder").head
    assert head.decoder.query_embed.weight.std().item() == pytest.approx(1, rel=0.4)
    assert head.decoder.embed_standart.weight.std().item() == pytest.approx(16**-0.5 / 3**0.5, rel=0.2)
    assert head.decoder.duplicate_pooling.std().item() > 0.1
    head = ours("resnet", "q2l").head
    assert head.fc.W.std().item() == pytest.approx(16**-0.5 / 3**0.5, rel=0.3)


def test_convolutional_backbones_take_any_size():
    for head in HEAD_ARGS:
        model = ours("resnet", head).eval()
        for height, width in ((16, 16), (24, 40), (33, 17)):
            assert model(pixel_values=torch.zeros(1, 3, height, width)).logits.shape == (1, 3)


def test_the_loss_leaves_unknown_labels_out():
    model = ours().eval()
    labels = torch.tensor([[1.0, -1, 0.3], [-1, 0, 1]])
    output = model(pixel_values=images(16), labels=labels)
    x = output.logits.double()
    terms = [
        -y * torch.sigmoid(z).log() - (1 - y) * torch.sigmoid(-z).log()
        for z, y in zip(x.flatten(), labels.double().flatten(), strict=True)
        if y >= 0
    ]
    assert output.loss.item() == pytest.approx(sum(terms).item() / 6, rel=1e-5)


# ---- pretrained weights ----


@pytest.mark.parametrize("head", HEAD_ARGS)
def test_timm_weights_and_batch_norm_statistics_arrive_and_stay(head, tmp_path):
    source = shaken(timm.create_model("test_resnet", num_classes=7))
    for name, tensor in source.state_dict().items():
        if "running_" in name:
            tensor.fill_(3.0 if "mean" in name else 2.0)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = ours("test_resnet", head, backbone_weights=tmp_path / "w.safetensors")
    model.save_pretrained(tmp_path / "m")
    for loaded in (model, AutoModelForImageClassification.from_pretrained(tmp_path / "m")):
        own = loaded.backbone.timm_model.state_dict()
        assert own.keys() == {name for name in source.state_dict() if not name.startswith("fc.")}
        assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in own.items())
        assert all((own[name] == 3).all() for name in own if "running_mean" in name)
        assert all((own[name] == 2).all() for name in own if "running_var" in name)


@pytest.mark.parametrize("kind", ["resnet", "vit", "swin", "dinov2", "beit", "timm"])
def test_a_classifiers_folder_is_a_backbone(kind, tmp_path):
    plain = {
        "resnet": tiny_resnet,
        "vit": tiny_vit,
        "swin": lambda: SwinForImageClassification(CONFIGS["swin"]()),
        "dinov2": lambda: Dinov2ForImageClassification(CONFIGS["dinov2"]()),
        "beit": lambda: BeitForImageClassification(CONFIGS["beit"]()),
        "timm": lambda: load_model("test_resnet", NAMES, pretrained=False, image_size=16)[0],
    }[kind]()
    shaken(plain).save_pretrained(tmp_path)
    model = ours(str(tmp_path), "ml_decoder")
    inner = plain.base_model.state_dict()
    own = (model.backbone.timm_model if kind == "timm" else model.backbone).state_dict()
    assert len(own) >= len(inner) - 2
    assert all(torch.equal(own[name], inner[name]) for name in own)


def test_heads_of_published_checkpoints_arrive_with_their_backbone(tmp_path, caplog):
    body = shaken(timm.create_model("test_resnet", num_classes=0)).state_dict()
    for head, prefixes in {"ml_decoder": ("", "head."), "q2l": ("module.backbone.0.body.", "module.")}.items():
        published = shaken(ours("test_resnet", head, pretrained=False).head, seed=1).state_dict()
        state = {prefixes[0] + k: v for k, v in body.items()} | {prefixes[1] + k: v for k, v in published.items()}
        if head == "q2l":
            state |= {"module.backbone.1.pe": torch.zeros(1)}
        torch.save({"model": state}, tmp_path / "w.pth")
        model = ours("test_resnet", head, backbone_weights=tmp_path / "w.pth")
        assert all(torch.equal(model.head.state_dict()[k], v) for k, v in published.items())
        assert all(torch.equal(model.backbone.timm_model.state_dict()[k], v) for k, v in body.items())
        assert not caplog.records
        other = ours("test_resnet", head, backbone_weights=tmp_path / "w.pth", names=NAMES)
        assert torch.equal(other.backbone.timm_model.state_dict()["conv1.0.weight"], body["conv1.0.weight"])
        assert "the head is drawn anew" in caplog.text
        caplog.clear()


def test_old_names_of_tresnet_are_converted(tmp_path):
    source = shaken(timm.create_model("tresnet_m", num_classes=0)).state_dict()
    # As the authors' files have it: conv1.0, conv1.1 for what timm calls conv1.conv, conv1.bn, under "model".
    old = {name.replace(".conv.", ".0.").replace(".bn.", ".1."): value for name, value in source.items()}
    assert old.keys() != source.keys()
    torch.save({"model": old}, tmp_path / "w.pth")
    model = ours("tresnet_m", "linear", backbone_weights=tmp_path / "w.pth")
    own = model.backbone.timm_model.state_dict()
    for name, value in source.items():
        # Their batch norm takes the absolute value of its weights.
        assert torch.allclose(own[name], value.abs() + 1e-5 if name.endswith("bn.weight") else value), name


def test_hf_weights_from_a_file_arrive_and_wrong_ones_are_refused(tmp_path):
    plain = shaken(tiny_vit())
    plain.save_pretrained(tmp_path)
    config = plain.config
    model = ours(config, "q2l", backbone_weights=tmp_path / "model.safetensors")
    assert all(torch.equal(v, plain.base_model.state_dict()[k]) for k, v in model.backbone.state_dict().items())
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layernorm" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less.safetensors lacks \d+ tensors of the backbone vit"):
        ours(config, "q2l", backbone_weights=tmp_path / "less.safetensors")


def test_the_given_config_stays_as_it_was():
    config = CONFIGS["resnet"](num_labels=7)
    before = config.to_dict()
    first, second = ours(config), ours(config, seed=1)
    assert config.to_dict() == before
    assert not torch.equal(logits(first), logits(second))
    assert torch.equal(logits(ours(config)), logits(first))  # the seed decides


# ---- saving and loading ----


def plain_models() -> dict[str, tuple]:
    torch.manual_seed(3)
    k = {"num_labels": 3, "problem_type": "multi_label_classification"}
    return {
        "resnet": (tiny_resnet(3), 16),
        "vit": (tiny_vit(3), 16),
        "swin": (SwinForImageClassification(CONFIGS["swin"](**k)), 16),
        "convnext": (ConvNextForImageClassification(CONFIGS["convnext"](**k)), 16),
        "timm": (load_model("test_resnet", CLASSES, pretrained=False, image_size=32)[0], 32),
    }


def our_models() -> dict[str, tuple]:
    found = {}
    for head in HEAD_ARGS:
        found[f"{head} on timm"] = (ours("test_resnet", head, pretrained=False), 32)
        found[f"{head} on resnet"] = (ours("resnet", head), 16)
        if head != "ms_cma":
            found[f"{head} on vit"] = (ours("vit", head), 16)  # keys renamed on save
    return found


LOAD = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
with_package = sys.argv[2] == "package"
if with_package:
    from hf_balancemix.models import load_trained
else:
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_balancemix":
                raise ImportError("this process has no such package")
    sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForImageClassification, pipeline
report = {}
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    pixels, expected = torch.load(file, weights_only=True)
    folder = str(file.with_suffix(""))
    if with_package:
        model, _ = load_trained(folder)
    else:
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
        pipe = pipeline("image-classification", model=folder, trust_remote_code=True)
        assert type(pipe.model).__name__ == type(model).__name__
    with torch.no_grad():
        same = torch.equal(model(pixel_values=pixels).logits, expected)
    config, home = model.config, type(model).__module__.split(".")[0]
    report[file.stem] = [same, home, list(config.id2label.values()), config.problem_type, config.thresholds]
assert with_package or not any(name.split(".")[0] == "hf_balancemix" for name in sys.modules)
print(json.dumps(report))
"""


def loaded_elsewhere(tmp_path: Path, models: dict[str, tuple], how: str, **save) -> dict[str, list]:
    """Save all, load all in one new process, and what it reports of each."""
    for name, (model, size) in models.items():
        shaken(model)
        model.config.id2label = dict(enumerate(CLASSES))
        model.config.label2id = {name: k for k, name in enumerate(CLASSES)}
        if hasattr(model.config, "label_names"):
            model.config.label_names = CLASSES
        model.config.thresholds = [0.1, 1 / 3, 0.5]
        model.save_pretrained(tmp_path / name, **save)
        squash_processor(image_size=size).save_pretrained(tmp_path / name)
        torch.save((images(size), logits(model, size)), tmp_path / f"{name}.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), how],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_models_have_the_same_logits_in_a_new_process(tmp_path):
    assert torch.get_num_threads() == 1, "conftest sets one thread; the sums of several may differ in the last bit"
    models = plain_models() | our_models()
    report = loaded_elsewhere(tmp_path, models, "package")
    assert report.keys() == models.keys()
    for name, (same, home, labels, problem_type, thresholds) in report.items():
        assert same, name
        assert home == ("hf_balancemix" if " on " in name else "transformers")
        assert (labels, problem_type) == (CLASSES, "multi_label_classification")
        assert thresholds == [0.1, 1 / 3, 0.5]


def test_with_its_code_a_model_needs_no_package(tmp_path):
    models = our_models()
    report = loaded_elsewhere(tmp_path, models, "no package", include_code=True)
    assert report.keys() == models.keys()
    for name, (same, home, labels, problem_type, thresholds) in report.items():
        assert same, name
        assert home == "transformers_modules"
        assert (labels, problem_type) == (CLASSES, "multi_label_classification")
        assert thresholds == [0.1, 1 / 3, 0.5]
        for file in CODE:
            assert (tmp_path / name / file).read_bytes() == (HOME / file).read_bytes()


def test_code_is_saved_when_asked_for_and_only_then(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "with", include_code=True)
    model.save_pretrained(tmp_path / "without")
    model.include_code = True
    model.save_pretrained(tmp_path / "set")
    ours(seed=1).save_pretrained(tmp_path / "other")
    for name in ("with", "set", "without", "other"):
        found = {file.name for file in (tmp_path / name).iterdir()}
        assert found == {"config.json", "model.safetensors"} | (set(CODE) if name in ("with", "set") else set())
        assert ("auto_map" in json.loads((tmp_path / name / "config.json").read_text())) == (name in ("with", "set"))
    # With the package imported its own class is taken, also where the repository brings one.
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "with", trust_remote_code=True)
    assert type(loaded) is BalanceMixForImageClassification


@pytest.mark.parametrize("head", HEAD_ARGS)
def test_the_pipeline_gives_sigmoid_scores_by_name(head, tmp_path):
    from PIL import Image

    model = shaken(ours("resnet", head)).eval()
    image = Image.new("RGB", (20, 12), (200, 30, 90))
    processor = squash_processor(image_size=16)
    scores = ImageClassificationPipeline(model=model, image_processor=processor)(image, top_k=3)
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits[0].sigmoid()
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(
        dict(zip(CLASSES, expected.tolist(), strict=True))
    )


# ---- load_model ----


def test_load_model_puts_a_head_on_and_goes_on_with_a_saved_one(tmp_path):
    model, processor = load_model(
        "test_vit", CLASSES, pretrained=False, image_size=32, head="ml_decoder", head_args=HEAD_ARGS["ml_decoder"]
    )
    assert isinstance(model, BalanceMixForImageClassification)
    assert list(processor.image_mean) == list(timm.get_pretrained_cfg("test_vit").mean)
    folder = str(tmp_path / "m")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for head in (None, "ml_decoder"):
        again, _ = load_model(folder, CLASSES, head=head)
        assert torch.equal(logits(again, 32), logits(model, 32))
    # Another size: the position embedding is interpolated, and saved so.
    larger, _ = load_model(folder, CLASSES, image_size=64)
    larger.save_pretrained(tmp_path / "larger")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "larger")
    assert torch.equal(logits(again, 64), logits(larger, 64))
    # Another K: a new head on the same backbone.
    other, _ = load_model(folder, NAMES)
    assert logits(other, 32).shape == (2, 5)
    key = "backbone.timm_model.blocks.0.mlp.fc1.weight"
    assert torch.equal(other.state_dict()[key], model.state_dict()[key])
    assert other.head.decoder.query_embed.weight.std().item() == pytest.approx(1, rel=0.4)
    assert torch.isfinite(logits(other, 32)).all()
    for head in ("linear", "q2l"):
        with pytest.raises(ValueError, match=rf"saved with the head ml_decoder, .*; asked for is {head}, "):
            load_model(folder, CLASSES, head=head)
    with pytest.raises(ValueError, match=r"saved with the head ml_decoder, .*; asked for is ml_decoder, {'num_gro"):
        load_model(folder, CLASSES, head="ml_decoder", head_args={"num_groups": 3})
    with pytest.raises(ValueError, match="a BalanceMix model with the head ml_decoder, not a backbone"):
        ours(folder)


def test_a_saved_ms_cma_needs_no_labels_but_for_other_classes(tmp_path):
    labels = {k: some_labels(k) for k in (3, 5)}
    options = {"head": "ms_cma", "head_args": {"embed_dim": 8}}
    model, processor = load_model(
        "test_resnet", CLASSES, pretrained=False, image_size=64, train_labels=labels[3], **options
    )
    folder = str(tmp_path / "m")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert model.head.label_embeddings.any()
    for given in ({}, {"head": "ms_cma"}, {"train_labels": labels[3].flip(1)}):
        again, _ = load_model(folder, CLASSES, **given)
        assert torch.equal(again.head.label_embeddings, model.head.label_embeddings)
        assert torch.equal(logits(again, 64), logits(model, 64))
    other, _ = load_model(folder, NAMES, train_labels=labels[5])
    assert other.head.label_embeddings.shape == (5, 8)
    assert embedding_loss(other.head.label_embeddings.double(), label_graph(labels[5])) < 1e-3
    assert torch.isfinite(logits(other, 64)).all()
    with pytest.raises(ValueError, match=r"train_labels is None; for a new head ms_cma it must be \(N, 5\)"):
        load_model(folder, NAMES)


def test_load_model_without_a_head_or_with_a_linear_one_is_the_plain_model():
    for head in (None, "linear"):
        model, _ = load_model("test_resnet", CLASSES, pretrained=False, image_size=32, head=head)
        assert type(model).__name__ == "TimmWrapperForImageClassification"


def test_a_backbone_of_weights_of_another_size_is_resized(tmp_path):
    source = shaken(timm.create_model("test_vit", num_classes=0))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, processor = load_model("test_vit", CLASSES, backbone_weights=tmp_path / "w.pth", image_size=64, head="q2l",
                                  head_args=HEAD_ARGS["q2l"])  # fmt: skip
    assert processor.size["height"] == 64
    key = "blocks.0.mlp.fc1.weight"
    assert torch.equal(model.backbone.timm_model.state_dict()[key], source.state_dict()[key])
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "m"), 64), logits(model, 64))


def test_bad_arguments_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="head is 'conv'; it must be one of linear, mlp, ml_decoder, q2l, ms_cma"):
        load_model("test_resnet", CLASSES, pretrained=False, head="conv")
    with pytest.raises(ValueError, match=r"head ml_decoder cannot be built with {'width': 3}: .*'width'"):
        load_model("test_resnet", CLASSES, pretrained=False, head="ml_decoder", head_args={"width": 3})
    with pytest.raises(ValueError, match="must be left out for the plain linear head"):
        load_model("test_resnet", CLASSES, pretrained=False, head_args={"num_groups": 3})
    with pytest.raises(ValueError, match="class_names holds 0 names"):
        ours(names=[])
    with pytest.raises(ValueError, match="backbone_config is None"):
        BalanceMixForImageClassification(BalanceMixConfig())
    with pytest.raises(FileNotFoundError, match="cannot load the model 'no/where'"):
        ours("no/where")
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no images of 24 x 24 pixels.*image_size to 16, its own"):
        load_model(str(tmp_path), CLASSES, image_size=24, head="ml_decoder", head_args=HEAD_ARGS["ml_decoder"])


# ---- training ----


@pytest.mark.parametrize("head", HEAD_ARGS)
def test_training_then_the_saved_model_is_the_trained_one(head, tmp_path):
    dataset = make_dataset(tmp_path / "images", 8)
    model = ours("resnet", head, names=NAMES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = arguments(tmp_path / "out", learning_rate=0.1)
    trainer = BalanceMixTrainer(model, args, train_dataset=dataset, processing_class=squash_processor(image_size=16))
    trainer.train()
    trained = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("head.") for name in trained)
    assert any(name.startswith("backbone.") for name in trained)
    trainer.save_model()
    loaded, processor = load_trained(str(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))
    assert processor.size["height"] == 16


@pytest.mark.parametrize(
    "model_class", [SwinForImageClassification, DeiTForImageClassification, Dinov2ForImageClassification,
                    BeitForImageClassification, "vit", "linear", "ml_decoder", "q2l", "ml_decoder on resnet",
                    "ms_cma on resnet"], ids=str
)  # fmt: skip
def test_checkpoints_load_back_where_keys_are_renamed(model_class, tmp_path):
    def make(seed: int):
        torch.manual_seed(seed)
        if model_class == "vit":
            return tiny_vit(seed=seed)
        if isinstance(model_class, str):
            head, _, backbone = model_class.partition(" on ")
            return ours(backbone or "dinov2", head, names=NAMES, seed=seed)
        kind = model_class.__name__.removesuffix("ForImageClassification").lower()
        return model_class(CONFIGS[kind](num_labels=5))

    dataset = make_dataset(tmp_path / "images", 8)
    processor = squash_processor(image_size=16)
    args = arguments(tmp_path / "out")
    source = shaken(make(0))
    source.save_pretrained(tmp_path / "checkpoint")
    trainer = BalanceMixTrainer(make(1), args, train_dataset=dataset, processing_class=processor)
    assert not torch.equal(logits(trainer.model), logits(source))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert torch.equal(logits(trainer.model), logits(source))
    trainer = BalanceMixTrainer(make(2), args, train_dataset=dataset, processing_class=processor)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint")
    trainer._load_best_model()
    assert torch.equal(logits(trainer.model), logits(source))


def test_a_model_that_does_not_fit_the_images_is_refused_before_training(tmp_path):
    dataset = make_dataset(tmp_path / "images", 8)
    state = torch.get_rng_state()
    model = tiny_vit()
    model.vit.embeddings.eval()
    with pytest.raises(ValueError, match=r"takes no images of 24 x 24 pixels.*set image_size to 16, its own"):
        BalanceMixTrainer(model, arguments(tmp_path / "out", image_size=24), train_dataset=dataset)
    assert model.training
    assert not model.vit.embeddings.training
    torch.set_rng_state(state)


# ---- malicious repositories ----


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_pickled_weights_are_not_even_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    for name, model in {"ours": ours(), "plain": tiny_resnet(3)}.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        squash_processor(image_size=16).save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        doors = [
            lambda path: load_model(path, CLASSES),
            load_trained,
            AutoModelForImageClassification.from_pretrained if name == "ours" else ours,
        ]
        for door in doors:
            with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
                door(str(folder))
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"w\.pth cannot be read"):
        ours("test_resnet", backbone_weights=tmp_path / "w.pth")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((tmp_path / "w.pth").read_bytes())  # the bomb is a real one
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("ours", {"head_args": {"embed_dim": 10**9}}),
        ("ours", {"head_args": {"embed_dim": 200_000}}),
        ("ours", {"backbone_config": {"hidden_sizes": [8, 10**9]}}),
        ("ours", {"backbone_config": {"depths": [1, 10**7]}}),
        ("ours", {"in_channels": 10**12}),
        ("ours", {"num_labels": 10**9, "id2label": None, "label2id": None}),
        ("ours", {"backbone_config": {"model_type": "balancemix"}}),
        ("plain", {"hidden_size": 10**9}),
        ("plain", {"hidden_size": 200_000}),
        ("plain", {"num_hidden_layers": 10**7}),
        ("plain", {"intermediate_size": float("inf")}),
        ("plain", {"image_size": [[16, 10**9]]}),
        ("ours", {"backbone_config": {"depths": [[1, 10**7]]}}),
        ("plain", {"image_size": 900_000}),
        ("plain", {"num_labels": 10**9, "id2label": None, "label2id": None}),
        ("timm", {"model_args": {"checkpoint_path": "/etc/hostname"}}),
        ("timm", {"model_args": {"stem_width": 10**9}}),
        ("timm", {"architecture": "hf-hub:some/one"}),
    ],
    ids=str,
)
def test_absurd_configs_end_in_a_sentence_and_allocate_nothing(where, changes, tmp_path):
    make = {
        "ours": ours,
        "plain": lambda: tiny_vit(3),
        "timm": lambda: ours("test_resnet", "linear", pretrained=False),
    }
    model = make[where]()
    model.save_pretrained(tmp_path)
    squash_processor(image_size=16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    target = config["backbone_config"] if where == "timm" else config
    for key, value in changes.items():
        target[key] = target.get(key, {}) | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    largest, empty = [0], torch.empty

    def watch(*size, **kwargs):
        tensor = empty(*size, **kwargs)
        if tensor.device.type != "meta":
            largest[0] = max(largest[0], tensor.numel())
        return tensor

    for door in (load_trained, lambda path: load_model(path, CLASSES)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", watch)
            with pytest.raises((ValueError, FileNotFoundError), match=r"cannot load .* \(.*config") as error:
                door(str(tmp_path))
        assert "\n" not in str(error.value)
    assert largest[0] < 10**6


def watched(monkeypatch) -> list[int]:
    """The largest tensor that `torch.empty` makes from now on."""
    largest, empty = [0], torch.empty

    def watch(*size, **kwargs):
        tensor = empty(*size, **kwargs)
        if tensor.device.type != "meta":
            largest[0] = max(largest[0], tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", watch)
    return largest


def test_an_absurd_backbone_under_a_new_head_is_refused_before_it_is_built(tmp_path, monkeypatch):
    tiny_vit(3).save_pretrained(tmp_path)
    squash_processor(image_size=16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 20_000}))
    largest = watched(monkeypatch)
    with pytest.raises(ValueError, match=r"describes a model of [\d,]+ parameters, and its weights hold [\d,]+ bytes"):
        load_model(str(tmp_path), CLASSES, head="ml_decoder")
    assert largest[0] < 10**6


def test_a_hub_names_config_is_compared_with_its_weights(tmp_path, monkeypatch):
    repository, commit = tmp_path / "models--some--one", "a" * 40
    folder = repository / "snapshots" / commit
    tiny_vit(3).save_pretrained(folder)
    squash_processor(image_size=16).save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_trained("some/one")[0].config.hidden_size == 16
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 20_000}))
    stored = (folder / "model.safetensors").stat().st_size
    with pytest.raises(ValueError, match=f"its weights hold {stored:,} bytes"):
        load_trained("some/one")
