"""What the example scripts share."""

from __future__ import annotations

import json

import pytest
from conftest import arguments, make_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_balancemix import BalanceMixTrainingArguments, MultiLabelTrainer
from hf_balancemix.data import NoiseMap
from hf_balancemix.report import results_table
from hf_balancemix.scripts.parser import parse_arguments
from hf_balancemix.scripts.train import (
    ModelArguments,
    NoiseArguments,
    add_noise,
    prepare,
    run_methods,
    with_settings_for,
)


def test_methods_run_side_by_side_and_leave_a_table(tmp_path, capsys):
    train, val = make_dataset(tmp_path / "t", 24), make_dataset(tmp_path / "v", 12, seed=1)
    args = arguments(tmp_path / "out", num_train_epochs=2, image_size=32, many_shot=12, few_shot=8)
    model = ModelArguments(model_name_or_path="test_resnet", from_scratch=True, method=["bce", "mixup", "balancemix"])
    results = run_methods(lambda: [train, val], NoiseArguments(noise="mislabel", noise_rate=0.5), model, args)
    assert list(results) == ["bce", "mixup", "balancemix"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    for method, figures in results.items():
        assert 0 < figures["eval_mAP"] <= 1
        assert (tmp_path / "out" / method / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert "24 training and 12 evaluation images, 5 classes, noise: mislabel 0.5." in printed
    assert "more than 12 clean positive training labels, few-shot: fewer than 8" in printed
    assert "re-labelling right" in printed
    assert printed.count("| balancemix") == 3  # mAP, label quality, label quality of positives


def test_a_saved_noise_map_gives_the_very_same_labels(tmp_path):
    train = make_dataset(tmp_path / "t", 24)
    noisy = add_noise(train, NoiseArguments(noise="flip", noise_rate=0.3, noise_seed=5))
    assert noisy["labels"] != train["labels"]
    NoiseMap.from_datasets(train, noisy).save(tmp_path / "noise.parquet")
    again = add_noise(train.shuffle(seed=1), NoiseArguments(noise_map=str(tmp_path / "noise.parquet")))
    by_id = dict(zip(again["image_id"], again["labels"], strict=True))
    assert [sorted(by_id[i]) for i in noisy["image_id"]] == [sorted(row) for row in noisy["labels"]]


def test_limits_take_a_seeded_part(tmp_path):
    data = make_dataset(tmp_path / "t", 24)
    first, again, other = (prepare(data, NoiseArguments(), 7, seed)[0] for seed in (0, 0, 1))
    assert len(first) == 7
    assert first["image_id"] == again["image_id"] != other["image_id"]
    whole, skipped = prepare(data, NoiseArguments(), 1000, 0)
    assert (len(whole), skipped) == (24, 0)


def test_unknown_methods_and_bad_json_are_refused():
    with pytest.raises(ValueError, match="method asl2 is not known"):
        ModelArguments(method=["bce", "asl2"])
    for name in ("model_kwargs", "method_args"):
        with pytest.raises(ValueError, match=f"{name} is 'x'"):
            ModelArguments(**{name: "x"})


def test_a_methods_own_arguments_reach_it_and_its_card(tmp_path):
    train, val = make_dataset(tmp_path / "t", 24), make_dataset(tmp_path / "v", 12, seed=1)
    args = arguments(tmp_path / "out", num_train_epochs=1, image_size=32)
    (model,) = parse_arguments(
        (ModelArguments,),
        ["--model_name_or_path", "test_resnet", "--from_scratch", "--method", "asl", "co-teaching", "--method_args",
         '{"asl": {"gamma_neg": 2, "margin": 0.05}, "co-teaching": {"scored": "second"}}'],
    )  # fmt: skip
    run_methods(lambda: [train, val], NoiseArguments(), model, args)
    cards = {method: (tmp_path / "out" / method / "README.md").read_text() for method in model.method}
    assert "| gamma_neg (asl) | 2 |" in cards["asl"]
    assert "margin" not in cards["asl"]  # that is its default
    assert "Ridnik, Tal" in cards["asl"]
    assert "| scored (co-teaching) | second |" in cards["co-teaching"]


def test_method_args_on_the_command_line_and_in_a_config_file(tmp_path):
    def parse(*argv: str) -> dict:
        (model,) = parse_arguments((ModelArguments,), argv)
        return model.arguments_by_method(model.method)

    assert parse("--method", "asl", "--method_args", '{"gamma_neg": 4}') == {"asl": {"gamma_neg": 4}}
    file = tmp_path / "config.yaml"
    file.write_text("method: asl\nmethod_args:\n  gamma_neg: 2\n  detach_weight: false\n")
    assert parse("--config", str(file)) == {"asl": {"gamma_neg": 2, "detach_weight": False}}
    file.write_text("method: [asl, focal]\nmethod_args:\n  focal: {gamma: 1.5}\n")
    assert parse("--config", str(file)) == {"focal": {"gamma": 1.5}}
    for argv, message in (
        (["--method", "asl", "--method_args", '{"gama_neg": 4}'], "did you mean gamma_neg"),
        (
            ["--method", "asl", "focal", "--method_args", '{"gamma": 4}'],
            "it must map a method's name to its arguments",
        ),
        (["--method_args", '{"gamma": 4}'], "gamma is not an argument of balancemix; it takes none"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(*argv)


def test_table_marks_what_a_method_does_not_have():
    table = results_table({"a": {"x": 0.5}, "bb": {"x": 1.0, "y": 0.25}}, {"x": "X", "y": "Y", "z": "Z"}, percent=True)
    assert table.splitlines()[2:] == ["| a      |  50.0 |    - |", "| bb     | 100.0 | 25.0 |"]


def test_single_positive_labels_bring_settings_of_their_own_unless_the_user_has_chosen(tmp_path):
    def settings(noise: str, **given):
        given = {"use_cpu": True, "preset": "paper", "save_strategy": "no"} | given
        args = with_settings_for(NoiseArguments(noise=noise), BalanceMixTrainingArguments(str(tmp_path), **given))
        return args.trust_positives, args.relabel_threshold

    assert settings("single_positive") == (True, 0.55)
    assert settings("single_positive", relabel_threshold=0.8) == (True, 0.8)
    assert settings("single_positive", trust_positives=False) == (False, 0.55)
    assert settings("single_positive", preset="default") == (True, 0.9)
    assert settings("mislabel") == (False, 0.975)


def test_images_that_cannot_be_read_are_counted_at_the_end(tmp_path, capsys):
    train, val = make_dataset(tmp_path / "t", 24), make_dataset(tmp_path / "v", 12, seed=1)
    (tmp_path / "t" / "003.png").write_bytes(b"cut off")
    args = arguments(tmp_path / "out", num_train_epochs=1, image_size=32)
    model = ModelArguments(model_name_or_path="test_resnet", from_scratch=True, method=["bce"])
    run_methods(lambda: [train, val], NoiseArguments(on_bad_image="skip"), model, args)
    assert "Left out because they cannot be read: 1 training and 0 evaluation images.\n" in capsys.readouterr().out


def test_co_teaching_and_an_average_are_refused_before_anything_is_trained(tmp_path):
    args = arguments(tmp_path, preset="ml-decoder")
    model = ModelArguments(model_name_or_path="test_resnet", from_scratch=True, method=["bce", "co-teaching"])
    with pytest.raises(ValueError, match=r"ema_decay is 0\.9997, but co-teaching .* set ema_decay to 0"):
        run_methods(lambda: pytest.fail("was loaded"), NoiseArguments(), model, args)


def test_a_frozen_backbone_keeps_its_normalisation_under_the_ml_decoder_recipe(tmp_path):
    train, val = make_dataset(tmp_path / "t", 24), make_dataset(tmp_path / "v", 12, seed=1)
    model = ModelArguments(
        model_name_or_path="test_resnet", from_scratch=True, method=["asl"], frozen_backbone=True, num_views=2,
        hidden_size=0, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    scores = []
    for decay in (0.5, 0.0):
        recipe = {"preset": "ml-decoder", "ema_decay": decay, "learning_rate": 0.01}
        args = arguments(tmp_path / str(decay), image_size=32, num_train_epochs=1, **recipe)
        results = run_methods(lambda: [train, val], NoiseArguments(), model, args)
        scores.append(results["asl"]["eval_loss"])
        folder = tmp_path / str(decay) / "asl"
        assert AutoImageProcessor.from_pretrained(folder).image_mean[0] > 0
        saved = AutoModelForImageClassification.from_pretrained(folder)
        trainer = MultiLabelTrainer(
            model=saved, args=arguments(tmp_path / "e", image_size=32), eval_dataset=val,
            processing_class=AutoImageProcessor.from_pretrained(folder),
        )  # fmt: skip
        assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[-1], rel=1e-4)
    assert scores[0] != scores[1]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
