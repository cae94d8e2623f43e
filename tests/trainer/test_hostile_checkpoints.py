"""Checkpoints of strangers: a link out, a damaged file under a manifest that fits, a pickle."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import arguments, make_dataset, tiny_vit

from hf_balancemix import BalanceMixTrainer, squash_processor
from hf_balancemix.trainer import checkpoints


def trainer(folder: Path, data) -> BalanceMixTrainer:
    args = arguments(folder, save_strategy="epoch")
    return BalanceMixTrainer(tiny_vit(), args, train_dataset=data, processing_class=squash_processor(image_size=16))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = make_dataset(root / "images", 8)
    trainer(root / "out", data).train()
    return data, root / "out" / "checkpoint-2"


def copied(run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run[1], tmp_path / "out" / "checkpoint-2"))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json", "run.json",
         "balancemix_state.safetensors", "training_args.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["garbage", "deep", "pickle", "list"])
def test_a_damaged_file_under_a_manifest_that_fits_is_one_sentence_and_runs_nothing(
    name, content, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    checkpoint = copied(run, tmp_path)
    file = checkpoint / name
    assert file.is_file()
    contents = {"garbage": b"garbage" * 99, "pickle": pickle.dumps(Bomb()), "list": b"[1]"}
    contents["deep"] = b"[" * 100_000 + b"]" * 100_000
    file.write_bytes(contents[content])
    checkpoints.write_manifest(checkpoint)
    with pytest.raises(ValueError, match="cannot resume from") as error:
        trainer(tmp_path / "out", run[0]).train(resume_from_checkpoint=str(checkpoint))
    assert str(checkpoint) in str(error.value)
    assert len(str(error.value)) < 400, str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_state_of_other_objects_is_one_sentence(run, tmp_path):
    checkpoint = copied(run, tmp_path)
    torch.save({"state": [1], "param_groups": 3}, checkpoint / "optimizer.pt")
    checkpoints.write_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"cannot resume from .*; it must be as it was written; pass another"):
        trainer(tmp_path / "out", run[0]).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["optimizer.pt", "unlisted.bin"])
def test_a_link_out_of_a_checkpoint_is_not_followed(name, run, tmp_path):
    checkpoint = copied(run, tmp_path)
    shutil.move(checkpoint / "optimizer.pt", tmp_path / "elsewhere.pt")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere.pt")
    if name == "unlisted.bin":
        shutil.copy(tmp_path / "elsewhere.pt", checkpoint / "optimizer.pt")
    assert checkpoints.check(checkpoint) == "It has a link that leads out of the folder, which is not followed."
    with pytest.raises(ValueError, match=r"cannot resume from .*a link that leads out"):
        trainer(tmp_path / "out", run[0]).train(resume_from_checkpoint=str(checkpoint))
    assert checkpoints.last_whole_checkpoint(tmp_path / "out") is None
    # One inside, and a link to the whole folder, are no danger.
    (checkpoint / name).unlink()
    shutil.copy(tmp_path / "elsewhere.pt", checkpoint / "inside.pt")
    if name == "optimizer.pt":
        (checkpoint / name).symlink_to("inside.pt")
    (tmp_path / "linked").symlink_to(checkpoint)
    assert checkpoints.check(tmp_path / "linked") is None


def test_parts_of_the_weights_that_lie_elsewhere_are_not_read(run, tmp_path):
    checkpoint = copied(run, tmp_path)
    shutil.move(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"vit.layernorm.weight": "../../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoints.write_manifest(checkpoint)
    with pytest.raises(ValueError, match="lies outside the folder"):
        trainer(tmp_path / "out", run[0]).train(resume_from_checkpoint=str(checkpoint))
