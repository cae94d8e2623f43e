"""Models of strangers: nothing in a config or a folder fetches, imports or runs code, or reads what lies elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_vit
from transformers import ResNetConfig

from hf_balancemix import load_model, load_trained, model_from_backbone, squash_processor

CLASSES = ["zebra", "ant", "cat"]
KERNELS = [
    "kernels-community/flash-attn2", "some/one", "some/one@main", "some/one:function", "some/one@v1:function",
    "paged|some/one", "flash_attention_2", "flash_attention_3", "paged|flash_attention_2", "new_one", 7, ["sdpa"],
]  # fmt: skip


@pytest.fixture(autouse=True)
def sentinels(monkeypatch):
    """Code of the Hub and of quantizers is never asked for, though what fetches it were installed."""
    for place in (
        "transformers.modeling_utils.lazy_import_flash_attention",
        "transformers.models.auto.configuration_auto.get_class_from_dynamic_module",
    ):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("code was asked for"))
    monkeypatch.setattr("transformers.modeling_utils.get_hf_quantizer", _no_quantizer)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))


def _no_quantizer(config, *_, **__):
    assert getattr(config, "quantization_config", None) is None
    return None, config, None


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    squash_processor(image_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return {
        "plain": saved(tiny_vit(3), root / "plain"),
        "ours": saved(model_from_backbone(backbone, CLASSES, head="mlp"), root / "ours"),
        "timm": saved(load_model("test_resnet", CLASSES, pretrained=False)[0], root / "timm"),
    }


def changed(folder: Path, tmp_path: Path, where: str, changes: dict) -> str:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    node = config
    for key in filter(None, where.split(".")):
        node = node.setdefault(key, {})
    node.update(changes)
    file.write_text(json.dumps(config))
    return str(tmp_path / "model")


DOORS = [
    load_trained,
    lambda path, **o: load_model(path, CLASSES, **o),
    lambda path, **o: load_model(path, CLASSES, head="mlp", **o),
]


def refused(path: str, match: str) -> None:
    for door in DOORS:
        with pytest.raises(ValueError, match=match) as error:
            door(path)
        assert len(str(error.value)) < 400, str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [*KERNELS, {"": "some/one"}, {"vision_config": "some/one"}], ids=str)
@pytest.mark.parametrize(
    ("kind", "where"), [("plain", ""), ("ours", ""), ("ours", "backbone_config"), ("plain", "text_config.deeper")]
)
def test_kernels_of_the_hub_are_refused_wherever_the_config_names_them(kind, where, value, stored, tmp_path):
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        path = changed(stored[kind], tmp_path, where, {key: value})
        refused(
            path, rf"cannot load .*its config's '{key}' is .*, which transformers fetches or imports.*trust_remote"
        )
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("kind", "where", "changes"),
    [
        ("plain", "", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("ours", "backbone_config", {"quantization_config": {"quant_method": "fp8"}}),
        ("plain", "text_config", {"quantization_config": {"load_in_4bit": True}}),
        ("plain", "", {"compression_config": {"format": "x"}}),
        ("plain", "", {"_experts_implementation": "sonicmoe"}),
        ("plain", "", {"fusion_config": {"patch_embeddings": True}}),
        ("plain", "", {"attribute_map": {"_attn_implementation_internal": "x"}, "x": "some/one"}),
        ("plain", "", {"to_dict": 3}),
        ("plain", "", {"get_text_config": {}}),
        ("plain", "", {"transformers_weights": "../elsewhere/model.safetensors"}),
        ("plain", "", {"transformers_weights": "pytorch_model.bin"}),
        ("plain", "", {"model_type": "theirs", "auto_map": {"AutoConfig": "some/one--config.Config"}}),
        ("ours", "backbone_config", {"model_type": "theirs", "auto_map": {"AutoConfig": "config.Config"}}),
        ("plain", "", {"backbone": "some/one", "backbone_config": None}),
        ("timm", "", {"architecture": "hf-hub:some/one"}),
        ("timm", "model_args", {"pretrained": True}),
        ("timm", "model_args", {"pretrained_cfg": {"hf_hub_id": "some/one"}}),
    ],
    ids=str,
)  # fmt: skip
def test_whatever_else_brings_code_or_reads_elsewhere_is_refused(kind, where, changes, stored, tmp_path):
    refused(changed(stored[kind], tmp_path, where, changes), r"cannot load .*config's .*(;|must)")


@pytest.mark.parametrize("value", [None, "eager", "sdpa", {"": "eager"}], ids=str)
def test_what_transformers_computes_by_itself_is_loaded(value, stored, tmp_path):
    changes = {"_attn_implementation": value, "_attn_implementation_autoset": True, "quantization_config": None}
    path = changed(stored["plain"], tmp_path, "", changes | {"auto_map": {"AutoModel": "some/one--m.Model"}})
    for door in DOORS:
        door(path)


def test_classes_may_be_called_like_what_is_refused(tmp_path):
    names = ["quantization_config", "to_dict", "_attn_implementation"]
    path = str(saved(load_model("test_resnet", names, pretrained=False)[0], tmp_path / "m"))
    assert list(load_trained(path)[0].config.label2id) == names


@pytest.mark.parametrize("door", DOORS)
def test_a_trusted_repository_may_name_a_kernel(door, stored, tmp_path, monkeypatch):
    def fetch(name, **_):
        raise ImportError(f"{name} was asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    path = changed(stored["plain"], tmp_path, "", {"_attn_implementation": "some/one"})
    with pytest.raises(ValueError, match="some/one was asked for"):
        door(path, trust_remote_code=True)


def test_a_config_of_unknown_code_runs_it_where_it_is_trusted_only(stored, tmp_path):
    path = changed(stored["plain"], tmp_path, "", {"model_type": "theirs", "auto_map": {"AutoConfig": "c.Config"}})
    (Path(path) / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(path, "whose code is the repository's own")
    assert not (tmp_path / "ran").exists()


def test_links_and_lists_of_weights_that_lead_out_of_the_folder_are_refused(stored, tmp_path):
    path = Path(changed(stored["plain"], tmp_path, "", {}))
    shutil.move(path / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(str(path), r"its file 'model\.safetensors' lies outside the folder; copy it there")
    (path / "model.safetensors").unlink()
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"metadata": {}, "weight_map": {"vit.layernorm.weight": name}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(str(path), r"lies outside the folder; copy it there")


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(stored, tmp_path):
    snapshot = tmp_path / "models--some--one" / "snapshots" / ("a" * 40)
    (tmp_path / "models--some--one" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in stored["plain"].iterdir():
        shutil.copy(file, tmp_path / "models--some--one" / "blobs" / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}.blob")
    for door in DOORS:
        door(str(snapshot))


def test_adapters_of_a_hub_name_which_bring_the_model_of_another_are_refused(stored, tmp_path, monkeypatch):
    repository, commit = tmp_path / "models--some--one", "a" * 40
    shutil.copytree(stored["plain"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for door in DOORS:
        door("some/one")
    adapter = {"base_model_name_or_path": "else/where", "peft_type": "LORA"}
    (repository / "snapshots" / commit / "adapter_config.json").write_text(json.dumps(adapter))
    refused("some/one", "adapters of peft, not a whole model")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", DEEP.encode()),
        ("config.json", b'{"model_type": "vit", "x": ' + DEEP.encode() + b"}"),
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe{}"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "vit", "hidden_size": ' + b"9" * 5000 + b"}"),
        ("preprocessor_config.json", DEEP.encode()),
        ("preprocessor_config.json", b"{"),
        ("preprocessor_config.json", b"\xff\xfe{}"),
        ("model.safetensors", b"garbage" * 100),
        ("model.safetensors", b""),
        ("model.safetensors.index.json", DEEP.encode()),
        ("model.safetensors.index.json", b'{"weight_map": 3}'),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[:30]),
)
def test_damaged_files_are_one_sentence(name, content, stored, tmp_path):
    path = Path(changed(stored["plain"], tmp_path, "", {}))
    if "index" in name:
        (path / "model.safetensors").unlink()
    (path / name).write_bytes(content)
    refused_as(str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nothing"}, {"hidden_act": {}}, {"id2label": {}}, {"id2label": {"5": "a"}},
        {"id2label": {"0": None}}, {"num_attention_heads": 0}, {"patch_size": 0}, {"dtype": "x"}, {"hidden_size": "x"},
        {"num_hidden_layers": 2}, {"num_hidden_layers": 0}, {"model_type": []}, {"model_type": "bert"},
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_make_transformers_raise_what_it_likes_are_one_sentence(changes, stored, tmp_path):
    refused_as(changed(stored["plain"], tmp_path, "", changes), DOORS[:1])


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 10**6, "width": 10**6}}, {"size": {"height": -1, "width": 16}}, {"size": "x"},
        {"image_mean": [None, 1, 2]}, {"image_std": [0, 0, 0]}, {"resample": 99},
        {"image_processor_type": "Nothing"}, {"image_mean": [1, 2]},
    ],
    ids=str,
)  # fmt: skip
def test_image_processors_that_make_no_pixels_are_one_sentence(changes, stored, tmp_path):
    path = Path(changed(stored["plain"], tmp_path, "", {}))
    values = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(values | changes))
    refused_as(str(path))


@pytest.mark.parametrize("kind", [[], {}, 3, None, "theirs"], ids=str)
def test_a_model_type_that_is_none_is_one_sentence_at_every_door(kind, stored, tmp_path):
    refused_as(changed(stored["plain"], tmp_path, "", {"model_type": kind}))


def refused_as(path: str, doors=DOORS) -> None:
    for door in doors:
        with pytest.raises((ValueError, OSError)) as error:
            door(path)
        assert str(error.value).startswith(("cannot load", "the model")), str(error.value)
        assert path in str(error.value) or str(error.value).startswith("the model")
        assert len(str(error.value)) < 400, str(error.value)
        assert "\n" not in str(error.value)


def test_tiny_models_load_at_every_door(stored):
    for path in stored.values():
        for door in DOORS[:2]:
            door(str(path))
