"""What each preset is, and that every flag wins over it; the recipe of ML-Decoder from the flag to the saved model."""

from __future__ import annotations

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import arguments, make_dataset, tiny_resnet
from PIL import Image
from safetensors.torch import load_file
from test_examples import FLAGS, make_coco, run_script
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_balancemix import (
    BalanceMixTrainer,
    BalanceMixTrainingArguments,
    MultiLabelTrainer,
    MultiLabelTrainingArguments,
)
from hf_balancemix.models import squash_processor
from hf_balancemix.scripts.arguments import parse_script

SGD = {
    "learning_rate": 0.01, "lr_scheduler_type": "cosine", "optim": "sgd", "optim_args": "momentum=0.9",
    "weight_decay": 1e-4, "max_grad_norm": 0.0, "loss_reduction": "sum", "num_train_epochs": 20, "warmup_steps": 0,
    "global_batch_size": 64, "decay_vectors": True, "ema_decay": 0.0, "normalise": True, "cutout": 0.0,
}  # fmt: skip
METHOD = {
    "label_warmup_epochs": 5, "minority_score": "paper", "trust_positives": False, "relabel_threshold": 0.975,
    "mixup_alpha": 4.0,
}  # fmt: skip
OURS = {
    "mixture_preset": "dividemix", "monotone": True, "partner_reliability": True, "prediction_source": "scan",
    "judge": "cross_fit",
}  # fmt: skip
PRINTED = {
    "mixture_preset": "sklearn", "monotone": False, "partner_reliability": False, "prediction_source": "views",
    "judge": "network", "max_missing": 0.0,
}  # fmt: skip
# Ridnik et al., WACV 2023, and its published training code.
RECIPE = {
    "learning_rate": 1e-4, "lr_scheduler_type": "one_cycle", "warmup_steps": 0.2, "optim": "adam", "optim_args": None,
    "weight_decay": 1e-4, "decay_vectors": False, "max_grad_norm": 0.0, "loss_reduction": "sum", "ema_decay": 0.9997,
    "normalise": False, "cutout": 0.5, "num_train_epochs": 40, "global_batch_size": 56,
}  # fmt: skip
EXPECTED = {
    "default": SGD | METHOD | OURS,
    "paper": SGD | METHOD | PRINTED,
    "ml-decoder": RECIPE | METHOD | OURS | {"label_warmup_epochs": 10},
}


def made(tmp_path, kind=BalanceMixTrainingArguments, **given):
    return kind(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)


def values(args, names) -> dict:
    return {name: getattr(args, name) for name in names}


@pytest.mark.parametrize("preset", EXPECTED)
def test_a_preset_is_these_values(preset, tmp_path):
    expected = EXPECTED[preset]
    args = made(tmp_path, preset=preset)
    assert values(args, expected) == expected
    assert args.per_device_train_batch_size == expected["global_batch_size"]
    assert set(expected) - {"per_device_train_batch_size"} <= args.unset
    common = {name: value for name, value in expected.items() if name in SGD | RECIPE}
    assert values(made(tmp_path, MultiLabelTrainingArguments, preset=preset), common) == common
    # A copy with a change, as scripts make it, keeps the rest.
    copy = dataclasses.replace(args, per_device_train_batch_size=None, trust_positives=True)
    assert values(copy, expected) == expected | {"trust_positives": True}
    json.dumps(args.to_dict())


OTHER = {
    "learning_rate": 0.3, "lr_scheduler_type": "linear", "warmup_steps": 7, "optim": "adamw_torch",
    "optim_args": "nesterov=true", "weight_decay": 0.5, "decay_vectors": None, "max_grad_norm": 1.0,
    "loss_reduction": "mean", "ema_decay": 0.5, "normalise": None, "cutout": 0.25, "num_train_epochs": 3,
    "global_batch_size": 8, "label_warmup_epochs": 2, "minority_score": "uniform", "trust_positives": True,
    "relabel_threshold": 0.6, "mixup_alpha": 1.0, "mixture_preset": None, "monotone": None,
    "partner_reliability": None, "prediction_source": None, "judge": None, "max_missing": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("preset", EXPECTED)
def test_every_flag_wins_over_every_preset(preset, tmp_path):
    flipped = {
        "mixture_preset": {"sklearn": "dividemix", "dividemix": "sklearn"},
        "prediction_source": {"scan": "views", "views": "scan"},
        "judge": {"cross_fit": "network", "network": "cross_fit"},
    }
    for name, expected in EXPECTED[preset].items():
        value = OTHER[name]
        if value is None:
            value = flipped[name][expected] if name in flipped else not expected
        assert value != expected
        args = made(tmp_path, preset=preset, **{name: value})
        assert getattr(args, name) == value, name
        assert name not in args.unset
    # A value that is also "nothing" is a value.
    for name in ("ema_decay", "cutout", "weight_decay", "warmup_steps", "mixup_alpha", "max_missing"):
        assert getattr(made(tmp_path, preset=preset, **{name: 0}), name) == 0


def test_what_belongs_to_the_presets_optimiser_or_schedule_goes_with_it(tmp_path):
    assert made(tmp_path, optim="adam").optim_args is None  # SGD's momentum
    assert made(tmp_path, optim="sgd").optim_args == "momentum=0.9"
    recipe = {"preset": "ml-decoder"}
    assert made(tmp_path, **recipe, optim="sgd").optim_args is None
    assert made(tmp_path, **recipe, lr_scheduler_type="cosine").warmup_steps == 0  # a share of one cycle
    assert made(tmp_path, **recipe, lr_scheduler_type="cosine", warmup_steps=0.1).warmup_steps == 0.1
    assert made(tmp_path, **recipe, lr_scheduler_type="one_cycle").warmup_steps == 0.2
    assert made(tmp_path, **recipe, warmup_steps=100).warmup_steps == 100
    assert made(tmp_path, lr_scheduler_type="one_cycle").warmup_steps == 0
    assert made(tmp_path, warmup_steps=0.25).get_warmup_steps(12) == 3
    assert made(tmp_path, warmup_steps=5).get_warmup_steps(12) == 5


@pytest.mark.parametrize("name", ["optim", "lr_scheduler_type"])
def test_the_names_of_transformers_are_still_checked(name, tmp_path):
    with pytest.raises(ValueError, match="adamm"):
        made(tmp_path, **{name: "adamm"})


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match=r"ema_decay is .*; it must be in \[0, 1\)"):
        made(tmp_path, ema_decay=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, 16, float("nan")])
def test_a_cutout_out_of_range_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match=r"cutout is .*; it must be a share of the image's side, in \[0, 1\]"):
        made(tmp_path, cutout=value)


def test_preset_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match="it must be one of default, paper, ml-decoder"):
        made(tmp_path, preset="mldecoder")


# ---- pixels in [0, 1] ----


def test_without_normalisation_the_saved_processor_says_so(tmp_path):
    given = squash_processor(image_size=32)
    given.image_mean, given.image_std, given.resample = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 2
    plain = squash_processor(given, normalise=False)
    assert (list(plain.image_mean), list(plain.image_std), int(plain.resample)) == ([0.0] * 3, [1.0] * 3, 2)
    assert list(squash_processor(given).image_mean) == [0.1, 0.2, 0.3]
    plain.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    got = loaded(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(got, torch.from_numpy(pixels).permute(2, 0, 1) / 255.0, rtol=0, atol=1e-6)
    # Again through the trainer, with its own normalisation: a model that was trained so is evaluated so.
    assert list(squash_processor(loaded).image_mean) == [0.0] * 3


@pytest.mark.parametrize("normalise", [True, False])
def test_the_model_is_trained_scanned_and_evaluated_on_such_pixels(normalise, tmp_path):
    # Black and white images: pixels 0 and 255, in plain views and in RandAugment's with magnitude 0.
    (tmp_path / "i").mkdir()
    paths = []
    for i in range(16):
        paths.append(str(tmp_path / "i" / f"{i}.png"))
        Image.new("RGB", (20, 20), (255 * (i % 2),) * 3).save(paths[-1])
    data = datasets.Dataset.from_dict(
        {"image": paths, "labels": [[i % 2] for i in range(16)]},
        features=datasets.Features(
            image=datasets.Image(), labels=datasets.List(datasets.ClassLabel(names=["black", "white"]))
        ),
    )
    given = squash_processor(image_size=16)
    given.image_mean, given.image_std = [0.5] * 3, [0.25] * 3
    args = arguments(tmp_path / "o", normalise=normalise, num_train_epochs=2, randaugment_num_ops=0, mixup_alpha=0.0)
    model, seen = tiny_resnet(2), {True: set(), False: set()}

    def record(module, inputs, named):
        seen[module.training] |= set(named["pixel_values"].unique().tolist())

    trainer = BalanceMixTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=given)
    model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    black, white = (-2.0, 2.0) if normalise else (0.0, 1.0)
    assert seen == {True: {black, white}, False: {black, white}}
    seen[False].clear()
    trainer.evaluate()
    assert seen[False] == {black, white}
    trainer.save_model()
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "o", backend="pil")
    pixels = loaded([row["image"] for row in data], return_tensors="pt")["pixel_values"]
    assert set(pixels.unique().tolist()) == {black, white}


# ---- from the flag to the saved model ----


@pytest.fixture(scope="module")
def with_recipe(tmp_path_factory):
    """One run of run_coco.py with the recipe, shortened, and the trainer's arguments as it saved them."""
    folder = tmp_path_factory.mktemp("recipe")
    root = make_coco(folder / "coco")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["--data_dir", str(root), *FLAGS, "--preset", "ml-decoder", "--num_train_epochs", "2"]
        argv += ["--output_dir", "out", "--learning_rate", "0.01"]
        run_script("run_coco", *argv, monkeypatch=patch)
    return folder / "out" / "balancemix"


def test_run_coco_trains_with_the_recipe(with_recipe):
    saved = json.loads((with_recipe / "training_args.json").read_text())
    given = {"num_train_epochs": 2, "global_batch_size": 8, "learning_rate": 0.01, "label_warmup_epochs": 1}
    given["judge"] = "network"  # from scratch
    for name, expected in (RECIPE | METHOD | OURS | given).items():
        assert saved[name] == expected, name
    start, end = (with_recipe / f"checkpoint-{step}" for step in (3, 6))
    # What is saved is the average, which after six steps of 0.9997 is all but the start.
    model, raw = (AutoModelForImageClassification.from_pretrained(path) for path in (with_recipe, end))
    average = load_file(end / "ema.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    earlier, before = load_file(start / "ema.safetensors"), AutoModelForImageClassification.from_pretrained(start)
    near = max((value - earlier[name]).abs().max() for name, value in average.items())
    far = max((value - before.state_dict()[name]).abs().max() for name, value in raw.state_dict().items())
    assert 0 < 100 * near < far
    processor = AutoImageProcessor.from_pretrained(with_recipe)
    assert list(processor.image_mean) == [0.0] * 3
    optimiser = torch.load(end / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in optimiser] == [1e-4, 0.0]
    assert all({"betas", "max_momentum", "min_lr"} <= set(group) for group in optimiser)
    assert not any("momentum" in group for group in optimiser)
    assert "ml-decoder" in (with_recipe / "README.md").read_text()


def test_run_coco_has_the_recipes_epochs_and_the_papers_for_the_other_presets(tmp_path):
    def args(*flags: str):
        return parse_script("coco", ["--use_cpu", "--output_dir", str(tmp_path), *flags], "")[3]

    coco = ("--data_dir", "somewhere")
    expected = EXPECTED["ml-decoder"]
    assert values(args(*coco, "--preset", "ml-decoder"), expected) == expected
    for preset in ("paper", "default"):
        expected = EXPECTED[preset] | {"num_train_epochs": 50, "label_warmup_epochs": 10, "global_batch_size": 64}
        assert values(args(*coco, "--preset", preset), expected) == expected
    one = args(*coco, "--preset", "ml-decoder", "--ema_decay", "0", "--normalise", "true", "--optim", "sgd")
    assert (one.ema_decay, one.normalise, one.optim, one.cutout, one.optim_args) == (0.0, True, "sgd", 0.5, None)
    sample = args("--preset", "ml-decoder")  # the built-in sample's schedule, all the same
    expected = EXPECTED["ml-decoder"] | {"num_train_epochs": 32, "label_warmup_epochs": 22, "global_batch_size": 32}
    expected["judge"] = "network"  # from scratch
    assert values(sample, expected) == expected


def test_a_trainer_makes_views_by_the_preset(tmp_path):
    data = make_dataset(tmp_path / "i")
    batches = {}
    for preset in ("default", "ml-decoder"):
        args = arguments(tmp_path / preset, preset=preset)
        trainer = MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=data)
        assert trainer.views.cutout == EXPECTED[preset]["cutout"]
        batches[preset] = next(iter(trainer.get_train_dataloader()))
    one, two = batches.values()
    assert torch.equal(one["index"], two["index"])
    assert not torch.equal(one["pixel_values"], two["pixel_values"])


def test_p_clean_of_the_views_brings_predictions_of_the_views(tmp_path):
    assert made(tmp_path, clean_probability_source="views").prediction_source == "views"
    with pytest.raises(ValueError, match="nothing is predicted in a step"):
        made(tmp_path, clean_probability_source="views", prediction_source="scan")
