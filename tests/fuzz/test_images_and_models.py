"""Ten thousand damaged and hostile images, models and checkpoints: right results or one sentence, and nothing else.

The ordinary suite tries a hundred of each; `make test-slow` all. `HF_BALANCEMIX_FUZZ` is the seed, 0 by default.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import arguments, make_dataset, tiny_vit
from mutate import as_json, mutated_bytes, mutated_tree, outcome, watch
from PIL import Image
from safetensors.torch import load_file
from transformers import ResNetConfig
from transformers.utils import logging

from hf_balancemix import BalanceMixTrainer, load_model, load_trained, model_from_backbone, squash_processor
from hf_balancemix.data import decode
from hf_balancemix.trainer import checkpoints

SEED = os.environ.get("HF_BALANCEMIX_FUZZ", "0")
IN_FULL = pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])
CLASSES = ["zebra", "ant", "cat"]


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def tried(
    name: str, number: int, outside: Path, one: Callable[[random.Random], tuple[Callable[[], Any], Any]]
) -> None:
    """`one` makes a hostile input, and gives the call that reads it and a function of a right result."""
    outside.mkdir(exist_ok=True)
    (outside / "secret.jpg").write_bytes(b"secret")
    counts: Counter[str] = Counter()
    for i in range(number):
        call, check = one(random.Random(f"{SEED}/{name}/{i}"))
        try:
            with watch(outside) as seen:
                kind, result = outcome(call)
            assert not seen
            if kind == "right":
                check(result)
        except BaseException as error:
            error.add_note(f"input {i} of {name}, seed {SEED}")
            raise
        counts[kind if kind == "right" else type(result).__name__] += 1
    print(f"\n{name}: {number} inputs, {dict(counts)}")
    assert counts["right"]
    assert counts["ValueError"]


# ---- images ----


def good_images() -> list[bytes]:
    """Of each format, in several modes and compressions; and some that are refused."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    made = []
    for kind, mode, options in (
        ("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True}), ("PNG", "RGBA", {}),
        ("PNG", "P", {}), ("PNG", "I;16", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "F", {}), ("TIFF", "L", {"compression": "jpeg"}),
        ("TIFF", "1", {"compression": "group4"}), ("BMP", "RGB", {}), ("GIF", "P", {}), ("AVIF", "RGB", {}),
        ("JPEG2000", "RGB", {}), ("MPO", "RGB", {}), ("PPM", "RGB", {}), ("ICO", "RGB", {}), ("TGA", "RGB", {}),
        ("EPS", "RGB", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image = Image.fromarray(pixels)
        image = Image.fromarray(np.asarray(image.convert("I"), np.uint16)) if mode == "I;16" else image.convert(mode)
        image.save(buffer, kind, **options)
        made.append(buffer.getvalue())
    return made


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is odd in a file
@pytest.mark.parametrize("number", [100, IN_FULL])
def test_mutated_images(number, tmp_path):
    good, file, limit = good_images(), tmp_path / "image.jpg", 1_000_000

    def one(rng):
        content = mutated_bytes(rng.choice(good), rng)
        file.write_bytes(content)
        given = rng.choice(
            (str(file), content, {"path": "a.jpg", "bytes": content}, {"path": str(file), "bytes": None})
        )
        return lambda: decode(given, max_image_pixels=limit), right

    def right(image):
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= limit
        assert np.asarray(image).shape == (image.height, image.width, 3)
        with Image.open(file) as opened:
            assert opened.format in ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000")
            assert sorted(opened.size) == sorted(image.size)

    tried("image", number, tmp_path / "outside", one)


# ---- models ----


def changed_file(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_bytes(as_json(mutated_tree(json.loads(content), rng)))
    else:
        file.write_bytes(mutated_bytes(content, rng))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [100, IN_FULL])
def test_mutated_models(number, tmp_path):
    """config.json mostly, else the image processor or the weights, read by `load_trained` or `load_model`."""
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    models = {
        "vit": tiny_vit(3),
        "ours": model_from_backbone(backbone, CLASSES, head="mlp", head_args={"hidden_size": 8}),
        "timm": load_model("test_resnet", CLASSES, pretrained=False)[0],
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / "good" / name)
        squash_processor(image_size=16).save_pretrained(tmp_path / "good" / name)
    folder = tmp_path / "model"

    def one(rng):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good" / rng.choice(sorted(models)), folder)
        names = ["config.json"] * 6 + ["preprocessor_config.json", "model.safetensors"]
        changed_file(folder / rng.choice(names), rng)
        if rng.random() < 0.5:
            return lambda: load_trained(str(folder)), all_weights
        return lambda: load_model(str(folder), CLASSES), some_weights

    def all_weights(result):
        assert some_weights(result) == set(result[0].state_dict())

    def some_weights(result):
        """Those of the file, if they are as large, are in the model; the names of what is there."""
        model, processor = result
        own, stored = model.state_dict(), load_file(folder / "model.safetensors")
        stored = {name.replace("vit.encoder.layer.0", "vit.layers.0"): value for name, value in stored.items()}
        for name in own.keys() & stored.keys():
            if own[name].shape == stored[name].shape:
                torch.testing.assert_close(own[name], stored[name].to(own[name].dtype), rtol=0, atol=0, equal_nan=True)
        assert processor.size["height"] <= 4096
        return set(own)

    tried("model", number, tmp_path / "outside", one)


# ---- checkpoints ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [100, IN_FULL])
def test_mutated_checkpoints(number, tmp_path):
    """A manifest notices every change; one input in 30 gets a manifest that fits, and a run is resumed from it."""
    data = make_dataset(tmp_path / "images", 8)

    def trainer():
        args = arguments(tmp_path / "out", save_strategy="epoch")
        return BalanceMixTrainer(
            tiny_vit(), args, train_dataset=data, processing_class=squash_processor(image_size=16)
        )

    trainer().train()
    good, checkpoint = tmp_path / "good", checkpoints.last_whole_checkpoint(tmp_path / "out")
    shutil.copytree(checkpoint, good)
    files = sorted(path.name for path in good.iterdir() if path.is_file() and path.name != "README.md")

    def one(rng):
        shutil.rmtree(checkpoint)
        shutil.copytree(good, checkpoint)
        name = rng.choice(files)
        changed_file(checkpoint / name, rng)
        changed = (checkpoint / name).read_bytes() != (good / name).read_bytes()
        if rng.random() < 1 / 30 and name != checkpoints.MANIFEST:
            checkpoints.write_manifest(checkpoint)
            return lambda: trainer().train(resume_from_checkpoint=str(checkpoint)), lambda _: None
        return lambda: whole(checkpoint), lambda _: unchanged(name, changed)

    def whole(checkpoint):
        if (fault := checkpoints.check(checkpoint)) is not None:
            raise ValueError(fault)

    def unchanged(name, changed):
        if name == checkpoints.MANIFEST:  # of which other words may say the same, or less
            listed = json.loads((checkpoint / name).read_text())["files"]
            own = json.loads((good / name).read_text())["files"]
            assert all(own[file] == {key: entry[key] for key in ("size", "sha256")} for file, entry in listed.items())
        else:
            assert not changed

    tried("checkpoint", number, tmp_path / "outside", one)
