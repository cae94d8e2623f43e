"""The body of `balancemix train`, and the steps that the examples share with it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from conftest import arguments, make_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_balancemix import MultiLabelTrainer
from hf_balancemix.data import NoiseMap, label_matrix
from hf_balancemix.models import load_trained
from hf_balancemix.models.label_graph import embedding_loss, label_graph
from hf_balancemix.report import results_table
from hf_balancemix.scripts.arguments import ModelArguments, NoiseArguments, parse_script
from hf_balancemix.scripts.data import DataArguments
from hf_balancemix.scripts.parser import parse_arguments
from hf_balancemix.scripts.train import add_noise, main, usable


def flags(folder: Path, *more: str, spoilt: str | None = None) -> list[str]:
    """A short run on 24 training and 12 evaluation images, which are saved in `folder`."""
    if not (folder / "data").exists():
        parts = {"train": make_dataset(folder / "t", 24), "val": make_dataset(folder / "v", 12, seed=1)}
        if spoilt is not None:
            (folder / spoilt).write_bytes(b"cut off")
        datasets.DatasetDict(parts).save_to_disk(folder / "data")
    return [
        "--dataset_name", str(folder / "data"), "--eval_split", "val", "--model_name_or_path", "test_resnet",
        "--from_scratch", "--use_cpu", "--save_strategy", "no", "--disable_tqdm", "true", "--logging_strategy", "no",
        "--eval_strategy", "no", "--num_train_epochs", "2", "--global_batch_size", "4", "--image_size", "32",
        "--label_warmup_epochs", "1", "--seed", "3", "--learning_rate", "0.05", "--relabel_threshold", "0.6",
        "--mixture_preset", "sklearn", "--output_dir", str(folder / "out"), *more,
    ]  # fmt: skip


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_methods_run_side_by_side_and_leave_a_table(tmp_path, capsys):
    main(flags(tmp_path, "--noise", "mislabel", "--noise_rate", "0.5", "--method", "bce", "mixup", "balancemix",
               "--many_shot", "12", "--few_shot", "8"))  # fmt: skip
    results = results_in(tmp_path / "out")
    assert list(results) == ["bce", "mixup", "balancemix"]
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
    first, again, other = (usable(data, data, DataArguments(max_train_samples=7), seed)[0] for seed in (0, 0, 1))
    assert len(first) == 7
    assert first["image_id"] == again["image_id"] != other["image_id"]
    whole, whole_too, skipped = usable(data, data, DataArguments(max_train_samples=1000), 0)
    assert (len(whole), len(whole_too), skipped) == (24, 24, (0, 0))


def test_the_head_ms_cma_is_made_of_the_labels_that_are_trained_on(tmp_path):
    head = ["--head", "ms_cma", "--head_args", '{"embed_dim": 8}', "--image_size", "64"]
    noise = NoiseArguments(noise="mislabel", noise_rate=0.5)
    main(flags(tmp_path, *head, "--method", "bce", "co-teaching", "--noise", "mislabel", "--noise_rate", "0.5"))
    clean = make_dataset(tmp_path / "t", 24)
    noisy, clean = (label_graph(label_matrix(data)) for data in (add_noise(clean, noise), clean))
    seen = []
    for method in ("bce", "co-teaching"):
        embeddings = load_trained(str(tmp_path / "out" / method))[0].head.label_embeddings.double()
        seen.append(embeddings)
        assert embedding_loss(embeddings, noisy) < 1e-3
        assert embedding_loss(embeddings, clean) > 0.02
    assert torch.equal(*seen)  # by the run's seed
    # What was saved goes on, here with other labels, which it does not need.
    main(flags(tmp_path, "--model_name_or_path", str(tmp_path / "out" / "bce"), "--image_size", "64",
               "--output_dir", str(tmp_path / "more"), "--from_scratch", "false"))  # fmt: skip
    again = load_trained(str(tmp_path / "more" / "balancemix"))[0]
    assert torch.equal(again.head.label_embeddings.double(), seen[0])


def test_a_backbone_without_stages_is_refused_for_ms_cma_before_the_training(tmp_path):
    argv = flags(tmp_path, "--head", "ms_cma", "--model_name_or_path", "test_vit", "--method", "bce")
    with pytest.raises(ValueError, match=r"test_vit has maps of one size only; the head ms_cma needs .*; name a back"):
        main(argv)
    assert not (tmp_path / "out").exists()


def test_unknown_methods_and_bad_json_are_refused():
    with pytest.raises(ValueError, match="method is 'asl2'; it must be one of bce, mixup"):
        ModelArguments(method=["bce", "asl2"])
    for name in ("model_kwargs", "method_args"):
        with pytest.raises(ValueError, match=f"{name} is 'x'; it must be a JSON mapping"):
            ModelArguments(**{name: "x"})


def test_a_methods_own_arguments_reach_it_and_its_card(tmp_path):
    own = '{"asl": {"gamma_neg": 2, "margin": 0.05}, "co-teaching": {"scored": "second"}}'
    main(flags(tmp_path, "--method", "asl", "co-teaching", "--method_args", own, "--num_train_epochs", "2"))
    cards = {method: (tmp_path / "out" / method / "README.md").read_text() for method in ("asl", "co-teaching")}
    assert "| gamma_neg (asl) | 2 |" in cards["asl"]
    assert "margin" not in cards["asl"]  # that is its default
    assert "Ridnik, Tal" in cards["asl"]
    assert "| scored (co-teaching) | second |" in cards["co-teaching"]


def test_method_args_on_the_command_line_and_in_a_config_file(tmp_path):
    def parse(*argv: str) -> dict:
        (model,) = parse_arguments((ModelArguments,), argv)
        return model.args_by_method

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
        (["--method", "asl", "--method_args", "[1]"], r"method_args is '\[1\]'; it must be a JSON mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(*argv)


def test_table_marks_what_a_method_does_not_have():
    table = results_table({"a": {"x": 0.5}, "bb": {"x": 1.0, "y": 0.25}}, {"x": "X", "y": "Y", "z": "Z"}, percent=True)
    assert table.splitlines()[2:] == ["| a      |  50.0 |    - |", "| bb     | 100.0 | 25.0 |"]


def test_single_positive_labels_bring_settings_of_their_own_unless_the_user_has_chosen():
    def settings(noise: str, *given: str, preset: str = "paper"):
        argv = ["--data_dir", "coco", "--use_cpu", "--save_strategy", "no", "--noise", noise, "--preset", preset]
        args = parse_script("coco", [*argv, *given], "")[3]
        return args.trust_positives, args.relabel_threshold

    assert settings("single_positive") == (True, 0.55)
    assert settings("single_positive", "--relabel_threshold", "0.8") == (True, 0.8)
    assert settings("single_positive", "--trust_positives", "false") == (False, 0.55)
    assert settings("single_positive", preset="default") == (True, 0.9)
    assert settings("mislabel") == (False, 0.975)


def test_images_that_cannot_be_read_are_counted_at_the_end(tmp_path, capsys):
    skip = ("--on_bad_image", "skip", "--method", "bce", "--num_train_epochs", "1")
    main(flags(tmp_path, *skip, spoilt="t/003.png"))
    assert "Left out because they cannot be read: 1 training and 0 evaluation images.\n" in capsys.readouterr().out


def test_co_teaching_and_an_average_are_refused_before_anything_is_loaded(tmp_path):
    argv = flags(tmp_path, "--preset", "ml-decoder", "--method", "bce", "co-teaching", "--eval_split", "absent")
    with pytest.raises(ValueError, match=r"ema_decay is 0\.9997; it must be 0 for co-teaching, .* set ema_decay to 0"):
        main(argv)


def test_a_frozen_backbone_keeps_its_normalisation_under_the_ml_decoder_recipe(tmp_path):
    scores = []
    for decay in (0.5, 0.0):
        folder = tmp_path / str(decay) / "asl"
        main(flags(
            tmp_path, "--method", "asl", "--frozen_backbone", "--num_views", "2", "--hidden_size", "0", "--cache_dir",
            str(tmp_path / "cache"), "--preset", "ml-decoder", "--ema_decay", str(decay), "--learning_rate", "0.01",
            "--num_train_epochs", "1", "--output_dir", str(folder.parent),
        ))  # fmt: skip
        scores.append(results_in(folder.parent)["asl"]["eval_loss"])
        assert AutoImageProcessor.from_pretrained(folder).image_mean[0] > 0
        saved = AutoModelForImageClassification.from_pretrained(folder)
        trainer = MultiLabelTrainer(
            model=saved, args=arguments(tmp_path / "e", image_size=32),
            eval_dataset=datasets.load_from_disk(tmp_path / "data")["val"],
            processing_class=AutoImageProcessor.from_pretrained(folder),
        )  # fmt: skip
        assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[-1], rel=1e-4)
    assert scores[0] != scores[1]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
