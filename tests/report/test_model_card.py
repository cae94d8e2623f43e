"""The card says what the trainer recorded, and nothing that a class name says instead."""

from __future__ import annotations

import csv
import json
import re
from html import unescape

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES, arguments, make_dataset, stop_after, tiny_resnet, tiny_vit
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from PIL import Image
from sklearn.metrics import average_precision_score
from transformers import ViTForImageClassification

from hf_balancemix import BalanceMixTrainer, Mislabel, MultiLabelTrainer, load_coco
from hf_balancemix.core import LossHistogram
from hf_balancemix.data import coco, make_scenes
from hf_balancemix.data.labels import label_matrix
from hf_balancemix.data.noise import record_noise, recorded_noise
from hf_balancemix.methods import trainer_for
from hf_balancemix.models import load_model
from hf_balancemix.report import model_card
from hf_balancemix.report.model_card import (
    MARK,
    changed_arguments,
    chosen_mixtures,
    escape_markdown,
    good_and_bad_class,
    render_model_card,
    write_model_card,
)
from hf_balancemix.scripts.arguments import SampleArguments

EVIL = ["<script>alert(1)</script>", "| a |", "[x](http://evil) `b`", "dog\n---\n# h", "www.evil.com\u202e*b*"]


def with_noise(dataset):
    dataset.info.description = "twenty-four random images"
    noisy = Mislabel(rate=0.4, seed=7).add_to(dataset)
    noisy.info.dataset_name = "random"
    return noisy


def checked_per_class_ap(trainer, dataset):
    """The per-class AP of the newest evaluation, by scikit-learn."""
    prediction = trainer.predict(dataset)
    scores, labels = prediction.predictions, prediction.label_ids
    ap = [average_precision_score(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]
    line = [line for line in trainer.state.log_history if "eval_runtime" in line][-1]
    assert line["eval_per_class_ap"] == pytest.approx(ap)
    return ap


def rows(text, heading):
    """Cells by the first cell, of the table under a heading line or after a given text."""
    lines = text.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i, line in enumerate(lines) if i > start and not line.startswith("|")), len(lines))
    cells = [[unescape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    dataset = make_dataset(folder / "images")
    args = arguments(
        folder / "out", num_train_epochs=3, eval_strategy="epoch", logging_strategy="epoch", few_shot=6, many_shot=12
    )
    trainer = BalanceMixTrainer(
        model=tiny_resnet(), args=args, train_dataset=with_noise(dataset), eval_dataset=dataset
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return trainer, dataset, metrics, checked_per_class_ap(trainer, dataset)


@pytest.fixture(scope="module")
def card(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    return write_model_card(trained[0], folder)


def test_the_metadata_are_valid_and_hold_the_recorded_figures(trained, card):
    _, _, metrics, _ = trained
    data = metadata_load(card)
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert "label-noise" in data["tags"]
    loaded = ModelCard.load(card)
    values = {result.metric_name: result.metric_value for result in loaded.data.eval_results}
    assert values["mAP, all classes"] == metrics["eval_mAP"]
    assert values["CF1 at 0.5"] == metrics["eval_CF1"]
    assert len(values) == sum(name.startswith(("eval_mAP", "eval_CF1", "eval_OF1")) for name in metrics)
    again = ModelCardData(**yaml.safe_load(loaded.data.to_yaml()))
    assert again.eval_results == loaded.data.eval_results
    assert {result.task_type for result in again.eval_results} == {"image-classification"}


def test_the_text_holds_the_recorded_figures(trained, card):
    trainer, _, metrics, ap = trained
    text = card.read_text()
    assert f"**{100 * metrics['eval_mAP']:.1f} %**" in text
    assert rows(text, "## Evaluation\n")["mAP, all classes"] == [f"{100 * metrics['eval_mAP']:.1f} %"]
    assert "The weights are the **last** ones, after epoch 3 (step 18)" in text
    classes = rows(text, "Each class")
    given, clean = trainer.train_labels.sum(0).tolist(), trainer.clean_labels.sum(0).tolist()
    p_clean, labels = trainer.balance_mix.clean_probability(torch.arange(24)), label_matrix(trainer.train_dataset)
    for k, name in enumerate(NAMES):
        group = "many" if clean[k] > 12 else "few" if clean[k] < 6 else "medium"
        distrusted = int(((p_clean[:, k] <= 0.5) & (labels[:, k] == 1)).sum())
        rates = [100 * rate[:, k] for rate in trainer.balance_mix.noise_rates]
        estimates = [f"{best:.0f} ({low:.0f} to {high:.0f})" for best, low, high in rates]
        expected = [f"{100 * ap[k]:.1f}", group, str(given[k]), str(clean[k]), str(distrusted), *estimates]
        assert classes[name] == expected
    last = [line for line in trainer.state.log_history if "label_clean_precision" in line][-1]
    figures = rows(text, "## What it believes")
    shown = next(row for name, row in figures.items() if name.startswith("clean-label precision"))
    assert shown == [f"{100 * last[f'label_clean_precision{end}']:.1f}" for end in ("", "_positives")]
    data = rows(text, "Training:")
    assert data["Noise map"] == ["Mislabel"]
    assert data["Noise map: rate"] == ["0.4"]
    assert data["Noise map: seed"] == ["7"]
    changed = int((trainer.train_labels != trainer.clean_labels).sum())
    numbers = [int(n) for n in re.findall(r"\d+", data["Labels other than the clean ones"][0])]
    assert sum(numbers) == changed > 0
    assert rows(text, "differ from the default")["relabel_threshold"] == ["0.6"]
    runtime = next(line["train_runtime"] for line in trainer.state.log_history if "train_runtime" in line)
    assert f"{runtime:.4g} seconds" in text
    assert f"| torch | {torch.__version__} |" in text
    assert str(card.parent) not in text
    assert trainer.args.output_dir not in text
    assert "Song, Hwanjun" in text
    assert "mixup: Beyond" in text


def test_figures_are_there_and_whole(card):
    text = card.read_text()
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", text))
    assert shown == {"per_class_ap.png", "training_curves.png", "mixtures.png"}
    assert {file.name for file in card.parent.iterdir()} == shown | {"README.md"}
    for name in shown:
        Image.open(card.parent / name).load()


def test_the_mixtures_of_the_best_and_the_worst_class_come_with_their_losses(trained, monkeypatch):
    trainer, _, _, ap = trained
    state = trainer.balance_mix
    best, worst = int(np.argmax(ap)), int(np.argmin(ap))
    assert good_and_bad_class(state, ap) == {"highest AP": best, "lowest AP": worst}
    histogram = LossHistogram(5)
    histogram.update(torch.rand(24, 5), label_matrix(trainer.train_dataset))
    monkeypatch.setattr(state, "loss_histogram", histogram, raising=False)
    shown = chosen_mixtures(state, NAMES, {"best": best})
    assert shown[0].name == f"{NAMES[best]} (best)"
    positives = int(trainer.train_labels[:, best].sum())
    assert shown[0].counts.sum(1).tolist() == [24 - positives, positives]
    assert shown[0].means.tolist() == state.mixtures.means[:, best].tolist()
    monkeypatch.setattr(state, "loss_histogram", None)
    assert chosen_mixtures(state, NAMES, {"best": best})[0].counts is None
    confidence = state.positive_confidence
    assert good_and_bad_class(state, None)["highest confidence P(k)"] == int(confidence.argmax())


def run_snippets(text, model_folder, folder, monkeypatch):
    """The variables after all blocks of Python of a card, run beside image.jpg."""
    monkeypatch.chdir(folder)
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block.replace("PATH/TO/THIS/FOLDER", str(model_folder)), scope)
    return scope


def upside_down(path):
    """A photograph whose EXIF tag says that it is to be turned by 180 degrees."""
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).resize((70, 50)).save(path, "JPEG", exif=exif, quality=95)


def twelve_bits_in_16(path):
    Image.fromarray(np.random.default_rng(2).integers(0, 4096, (20, 30), dtype=np.uint16)).save(path, "PNG")


@pytest.mark.parametrize("write", [upside_down, twelve_bits_in_16])
def test_the_code_of_the_card_gives_what_the_trainer_predicts(trained, card, write, tmp_path, monkeypatch):
    trainer, dataset, *_ = trained
    write(tmp_path / "image.jpg")
    one = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "image.jpg")], "labels": [[0]]},
        features=datasets.Features({name: dataset.features[name] for name in ("image", "labels")}),
    )
    expected = dict(zip(NAMES, torch.tensor(trainer.predict(one).predictions[0]).sigmoid().tolist(), strict=True))
    scope = run_snippets(card.read_text(), trainer.args.output_dir, tmp_path, monkeypatch)
    # The image processor's resizing rounds a pixel otherwise now and then.
    assert scope["probabilities"].tolist() == pytest.approx(list(expected.values()), abs=1e-4)
    scores = scope["classifier"](scope["decode"]("image.jpg"), top_k=5)
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(expected, abs=1e-4)
    assert scope["present"] == [name for name in NAMES if expected[name] > 0.5]


def test_thresholds_of_the_config_are_shown_and_used(trained, tmp_path, monkeypatch):
    trainer = trained[0]
    monkeypatch.setattr(trainer.model.config, "thresholds", [0.1, 0.2, 0.3, 0.4, 0.55], raising=False)
    text = write_model_card(trainer, tmp_path).read_text()
    assert rows(text, "Each class")["elk"][-1] == "0.55"
    assert "thresholds = torch.tensor(model.config.thresholds)" in text
    assert "0.5 is a convention" not in text


def test_of_many_classes_the_card_shows_the_ends_and_a_file_has_all(trained, tmp_path, monkeypatch):
    trainer, _, _, ap = trained
    monkeypatch.setattr(model_card, "_ALL_SHOWN", 2)
    monkeypatch.setattr(model_card, "_SHOWN", 1)
    text = write_model_card(trainer, tmp_path).read_text()
    by_ap = sorted(range(len(ap)), key=lambda k: ap[k])
    given = trainer.train_labels.sum(0).tolist()
    for title, k in (("lowest", by_ap[0]), ("highest", by_ap[-1]), ("rarest", given.index(min(given)))):
        shown = rows(text, f"The {title}")
        assert list(shown) == ["class", "---", NAMES[k]]
        assert shown[NAMES[k]][0] == f"{100 * ap[k]:.1f}"
    with open(tmp_path / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == NAMES
    assert [float(row["average_precision"]) for row in table] == pytest.approx(ap)
    assert [int(row["given_positives"]) for row in table] == given
    rates = trainer.balance_mix.noise_rates
    assert [float(row["estimated_missing_high"]) for row in table] == pytest.approx(rates.missing[2].tolist())
    monkeypatch.undo()
    assert "classes.csv" not in write_model_card(trainer, tmp_path).read_text()
    assert not (tmp_path / "classes.csv").exists()


def test_a_card_of_ten_thousand_classes_can_be_read(trained):
    facts = model_card.card_facts(trained[0])
    times = 2001

    def repeated(values):
        return [*values] * times

    facts |= {name: repeated(facts[name]) for name in ("class_names", "per_class_ap", "given", "clean")}
    facts["judged"] = list(map(repeated, facts["judged"]))
    facts["noise"] = {name: repeated(rates) for name, rates in facts["noise"].items()}
    facts["groups"] = {name: np.tile(mask, times) for name, mask in facts["groups"].items()}
    facts["classes"] |= {
        "tables": model_card._class_tables(len(facts["class_names"]), facts["per_class_ap"], facts["given"])
    }
    text = render_model_card(facts)
    assert "10,005 classes" in text
    assert len(text) < 30_000


def test_the_same_state_gives_the_same_files(trained, card, tmp_path):
    again = write_model_card(trained[0], tmp_path)
    for file in card.parent.iterdir():
        assert (again.parent / file.name).read_bytes() == file.read_bytes()


def test_names_are_names_and_nothing_else(tmp_path):
    dataset = make_dataset(tmp_path / "images", names=EVIL)
    dataset.info.description = "<img src=x onerror=alert(1)>\n| b |"
    dataset.info.dataset_name = "evil: [1]\n---\nlicense: mit"
    args = arguments(tmp_path / "out", num_train_epochs=2)
    trainer = BalanceMixTrainer(
        model=tiny_vit(), args=args, train_dataset=with_noise_of(dataset), eval_dataset=dataset
    )
    trainer.train()
    trainer.evaluate()
    checked_per_class_ap(trainer, dataset)
    path = write_model_card(trainer, tmp_path / "card")
    text = path.read_text()
    body = text.replace(MARK, "").replace("<details>", "").replace("<details open>", "").replace("</details>", "")
    body = body.replace("<summary>", "").replace("</summary>", "")
    outside_code = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert "<" not in outside_code.split("---\n", 2)[2]
    assert "](http" not in text
    assert "www.evil" not in text
    assert "\u202e" not in text
    classes = rows(text, "Each class")
    assert len(classes) == 2 + 5
    assert {len(cells) for cells in classes.values()} == {7}
    shown = [" ".join(name.split()).replace("\u202e", "\ufffd") for name in EVIL]
    assert list(classes)[2:] == shown
    data = metadata_load(path)
    assert "license" not in data
    result = ModelCard.load(path).data.eval_results[0]
    assert result.dataset_name == "evil: [1] --- license: mit"
    assert not [line for line in text.split("---\n", 2)[2].splitlines() if line.startswith(("# h", "---", "license"))]


def with_noise_of(dataset):
    noise = Mislabel(rate=0.3).fit(dataset)
    noisy = dataset.map(noise, batched=True, features=noise.features)
    noisy.info.description = 'x\nNoise: {"name": "<b>", "| k |": "</td>\\n# h"}'
    return noisy


def test_escaping_is_read_back_as_it_was():
    text = "a_b *c* <d> &amp; `e` | f # $g$ \\h ~~i~~ ![j](k) 狗 é"
    escaped = escape_markdown(text)
    assert unescape(escaped) == text
    assert not set("_*<>`|#$\\~![](){}\"'") & set(re.sub(r"&#\d+;", "", escaped))
    assert escape_markdown(3) == 3


def test_a_plain_trainer_before_any_training_or_evaluation(dataset, tmp_path):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=dataset)
    path = write_model_card(trainer, tmp_path / "card")
    text = path.read_text()
    assert "It was not evaluated" in text
    assert "How good it is was not measured" in text
    assert "not recorded: how many of the given labels are wrong" in text
    assert "takes the labels as they are given" in text
    assert "| Split | not recorded |" in text
    assert "model-index" not in metadata_load(path)
    assert [file.name for file in path.parent.iterdir()] == ["README.md"]
    assert rows(text, "Each class")["ant"][0] == "not recorded"


def test_a_model_without_data_sets_has_a_card(tmp_path):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "out"))
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert "No training data was given" in text
    assert "5 classes" in text


def test_the_best_weights_are_called_so_with_their_own_figures(dataset, tmp_path):
    args = arguments(
        tmp_path / "out", num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.2,
    )  # fmt: skip
    trainer = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    evaluations = [line for line in trainer.state.log_history if "eval_mAP" in line]
    best = max(evaluations, key=lambda line: line["eval_loss"])
    assert best is not evaluations[-1]
    text = write_model_card(trainer, tmp_path / "card").read_text()
    when = f"after epoch {best['epoch']:.4g} (step {best['step']})"
    assert f"**best** evaluation of the run (by eval&#95;loss), {when}" in text
    assert f"**{100 * best['eval_mAP']:.1f} %**" in text
    assert rows(text, "## Evaluation\n")["mAP, all classes"] == [f"{100 * best['eval_mAP']:.1f} %"]
    assert trainer.evaluate()["eval_mAP"] == pytest.approx(best["eval_mAP"])
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert "**best** evaluation" in text
    assert when in text


def test_weights_that_were_trained_on_after_the_evaluation_are_said_to_be_later(dataset, tmp_path):
    args = arguments(tmp_path / "out", num_train_epochs=2)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=dataset)
    trainer.evaluate()
    assert "not trained by this trainer" in write_model_card(trainer, tmp_path / "card").read_text()
    trainer.state.log_history[-1]["step"] = 1
    trainer.state.global_step, trainer.state.max_steps, trainer.is_in_train = 3, 12, True
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert "the weights are **later** ones, of step 3, and were not evaluated" in text
    assert "Training is not over:** these are the weights of step 3 of 12" in text


def test_a_text_of_ones_own_stays(trained, tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    write_model_card(trained[0], tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("README.md", "# mine\n")]


def test_a_figure_that_is_out_of_date_is_removed(trained, dataset, tmp_path):
    write_model_card(trained[0], tmp_path)
    plain = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=dataset)
    write_model_card(plain, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_a_card_that_cannot_be_written_leaves_the_old_one(trained, tmp_path, monkeypatch):
    path = write_model_card(trained[0], tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("hf_balancemix.report.model_card.render_model_card", lambda facts: "new")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_model_card(trained[0], tmp_path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_defaults_are_no_changes_and_secrets_are_nobodys_business(tmp_path):
    from hf_balancemix import BalanceMixTrainingArguments

    quiet = {"output_dir": str(tmp_path), "use_cpu": True, "hub_token": "hf_secret", "report_to": "none"}
    assert changed_arguments(BalanceMixTrainingArguments(**quiet), BalanceMixTrainingArguments) == {}
    args = BalanceMixTrainingArguments(**quiet, learning_rate=0.1, mixup_alpha=1.0, bf16=True)
    changed = changed_arguments(args, BalanceMixTrainingArguments)
    assert changed == {"learning_rate": 0.1, "mixup_alpha": 1.0, "bf16": True}
    paper = changed_arguments(BalanceMixTrainingArguments(**quiet, preset="paper"), BalanceMixTrainingArguments)
    assert paper["preset"] == "paper"
    assert paper["monotone"] is False


def test_the_source_of_a_data_set_of_the_hub_is_recorded(dataset, tmp_path):
    commit = "a" * 40
    dataset.info.download_checksums = {f"hf://datasets/me/birds@{commit}/data/train.parquet": {"num_bytes": 1}}
    dataset.info.config_name = "small"
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=dataset, eval_dataset=dataset
    )
    trainer.evaluate()
    path = write_model_card(trainer, tmp_path / "card")
    assert metadata_load(path)["datasets"] == "me/birds"
    result = ModelCard.load(path).data.eval_results[0]
    assert (result.dataset_type, result.dataset_revision, result.dataset_config) == ("me/birds", commit, "small")


def test_only_a_whole_record_of_noise_counts(dataset):
    for text in ("", "Noise: {broken", "Noise: [1]", "no Noise: {}"):
        dataset.info.description = text
        assert recorded_noise(dataset) is None
    dataset.info.description = 'what it is\nNoise: {"name": "Mislabel"}'
    assert recorded_noise(dataset) == {"name": "Mislabel"}
    record_noise(dataset, {"name": "RandomFlip", "rate": 0.1})  # the newest counts, the rest stays
    assert dataset.info.description == 'what it is\nNoise: {"name": "RandomFlip", "rate": 0.1}'


def test_a_dictionary_of_evaluation_sets_has_a_section_each(dataset, tmp_path):
    dataset.info.dataset_name = "birds"
    sets = {"near": dataset, "far": dataset.shuffle(seed=1).select(range(12))}
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=dataset, eval_dataset=sets
    )
    metrics = trainer.evaluate()
    path = write_model_card(trainer, tmp_path / "card")
    text, results = path.read_text(), ModelCard.load(path).data.eval_results
    for name in sets:
        assert rows(text, f"### {name}")["mAP, all classes"] == [f"{100 * metrics[f'eval_{name}_mAP']:.1f} %"]
        assert rows(text, f"Evaluation ({name})")["Images"] == [str(len(sets[name]))]
        assert f"{100 * metrics[f'eval_{name}_mAP']:.1f} %** on birds ({name})" in text
        found = [r.metric_value for r in results if r.dataset_name == f"birds ({name})" and r.metric_type == "f1"]
        assert found == [metrics[f"eval_{name}_CF1"], metrics[f"eval_{name}_OF1"]]
    assert "Each class (average precision on near)" in text


def coco_like(root, names, images, split="train"):
    """A data set in COCO's official layout, with one annotation an image."""
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(images):
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(root / f"{split}2017" / f"{i}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(images)],
        "annotations": [{"id": i, "image_id": i, "category_id": i % len(names)} for i in range(images)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def test_data_are_called_by_their_folder_or_title_and_are_coco_only_where_it_is_all_there(tmp_path, monkeypatch):
    coco_like(tmp_path / "birds", NAMES, 10)
    birds = load_coco(tmp_path / "birds")
    values = {"eval_dataset": birds.select(range(7)), "train_dataset": birds, "model": tiny_vit()}
    for title, name in ((None, "birds"), ("Birds of Iceland", "Birds of Iceland")):
        args = arguments(tmp_path / "run of june", dataset_title=title)
        trainer = MultiLabelTrainer(args=args, **values)
        trainer.evaluate()
        path = write_model_card(trainer, tmp_path / "card")
        result, text = ModelCard.load(path).data.eval_results[0], path.read_text()
        assert (result.dataset_name, result.dataset_split) == (name, "train")
        assert result.dataset_type == name.lower().replace(" ", "-")
        assert "\n# run of june\n" in text
        assert metadata_load(path)["model-index"][0]["name"] == "run of june"
        data = rows(text, "Evaluation:")
        assert (data["Data set"], data["Split"], data["Images"]) == ([name], ["train"], ["7"])
        assert "10 images" not in text
    coco_like(tmp_path / "coco", [f"class {k}" for k in range(80)], 12)
    assert load_coco(tmp_path / "coco").info.dataset_name == "coco (not the official set)"
    monkeypatch.setitem(coco._OFFICIAL_IMAGES, ("train", 2017), 12)
    assert load_coco(tmp_path / "coco").info.dataset_name == "coco"
    sample = load_coco(make_scenes(tmp_path / "scenes", num_train=24, num_val=12), split="val")
    assert sample.info.dataset_name == "drawn sample of hf_balancemix"


def test_the_settings_of_the_method_are_there_whatever_a_scripts_defaults_are(dataset, tmp_path):
    args = SampleArguments(output_dir=str(tmp_path / "out"), use_cpu=True, image_size=16, global_batch_size=8)
    trainer = BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=dataset, eval_dataset=dataset)
    text = write_model_card(trainer, tmp_path / "card").read_text()
    shown = rows(text, "Hyperparameters that differ from the default")
    assert [shown[name] for name in ("mixup_alpha", "label_warmup_epochs", "learning_rate")] == [
        ["0.2"], ["22"], ["0.004"],
    ]  # fmt: skip
    assert shown["relabel_threshold"] == ["0.975"]  # its default


def test_a_run_that_judged_no_label_and_was_evaluated_once_does_not_say_or_draw_otherwise(dataset, tmp_path):
    args = arguments(tmp_path / "out", num_train_epochs=4, label_warmup_epochs=2)
    trainer = BalanceMixTrainer(
        model=tiny_resnet(), args=args, train_dataset=dataset, eval_dataset=dataset, callbacks=[stop_after(2)]
    )
    trainer.train()
    trainer.evaluate()
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert "No label was judged: all training so far was the warm-up (the first 2 epochs)" in text
    assert "judged by their losses" not in text
    assert "only its warm-up so far" in text
    assert "training_curves.png" not in text


def test_bounds_of_the_groups_go_by_the_data(trained, dataset, tmp_path):
    counts = [40, 3, 17, 90, 8]
    labels = [[k for k in range(5) if i < counts[k]] for i in range(90)]
    images = [dataset[0]["image"]] * 90
    features = datasets.Features({name: dataset.features[name] for name in ("image", "labels")})
    long_tailed = datasets.Dataset.from_dict({"image": images, "labels": labels}, features=features)
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=long_tailed, eval_dataset=dataset
    )
    assert trainer.evaluate().keys() > {"eval_mAP_many", "eval_mAP_medium", "eval_mAP_few"}
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert "Many-shot classes have more than 40 positive training labels, few-shot classes fewer than 8." in text
    assert [cells[1] for cells in list(rows(text, "Each class").values())[2:]] == [
        "medium", "few", "medium", "many", "medium",
    ]  # fmt: skip
    two = datasets.Dataset.from_dict({"image": images[:8], "labels": [[0, 1, 2, 3, 4]] * 8}, features=features)
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=two, eval_dataset=dataset
    )
    assert not [name for name in trainer.evaluate() if "many" in name]
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert rows(text, "Each class")["class"] == [
        "average precision, %", "given positives", "clean positives", "given positives judged not clean",
    ]  # fmt: skip


def test_an_adapter_has_our_card_and_its_code_runs(dataset, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    tiny_vit().save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    trainer = MultiLabelTrainer(
        model=peft.get_peft_model(base, config),
        args=arguments(tmp_path / "out"),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.model.save_pretrained(tmp_path / "out")
    trainer.processing_class.save_pretrained(tmp_path / "out")
    assert "# Model Card for Model ID" in (tmp_path / "out" / "README.md").read_text()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert MARK in text
    assert metadata_load(tmp_path / "out" / "README.md")["library_name"] == "peft"
    table = rows(text, "\n# out")
    assert table["Architecture"] == ["ViTForImageClassification"]
    assert table["Adapter"][0].startswith("LORA of peft, rank 3, alpha 8, targets q_proj, v_proj; ")
    upside_down(tmp_path / "image.jpg")
    text = text.replace("PATH/TO/THE/BASE/MODEL", str(tmp_path / "base"))
    one = dataset.select([0]).map(lambda row: {"image": str(tmp_path / "image.jpg")}, features=dataset.features)
    expected = torch.tensor(trainer.predict(one).predictions[0]).sigmoid().tolist()
    scope = run_snippets(text, tmp_path / "out", tmp_path, monkeypatch)
    assert scope["probabilities"].tolist() == pytest.approx(expected, abs=1e-4)
    assert scope["names"] == NAMES


def test_unknown_labels_are_counted(dataset, tmp_path):
    features = datasets.Features(**dataset.features, unknown_labels=dataset.features["labels"])
    unknown = [[k for k in range(5) if k not in row][:1] for row in dataset["labels"]]
    marked = dataset.add_column("unknown_labels", unknown).cast(features)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path / "out"), train_dataset=marked)
    text = write_model_card(trainer, tmp_path / "card").read_text()
    assert rows(text, "Training:")["Unknown labels"][0].startswith(str(int(np.sum([len(row) for row in unknown]))))


@pytest.mark.parametrize("scored", ["first", "second", "mean"])
def test_the_card_of_co_teaching_is_that_of_the_saved_network(scored, dataset, tmp_path):
    model = tiny_vit()
    args = arguments(tmp_path / "out")
    trainer = trainer_for(
        "co-teaching", args, {"scored": scored}, model=model, train_dataset=dataset, eval_dataset=dataset
    )
    assert trainer.saved_model is (trainer.model.second if scored == "second" else model)
    trainer.evaluate()
    text = write_model_card(trainer, tmp_path / "card").read_text()
    table = rows(text, "# out")
    assert table["Architecture"] == ["ViTForImageClassification"]
    assert table["Parameters"] == [f"{sum(p.numel() for p in model.parameters()):,}"]
    assert "TwoNetworks" not in text
    assert ("the mean of the logits of two networks" in text) == (scored == "mean")
    assert "\nThe package implements:\n" in text
    assert "The method:" not in text
    assert "Han, Bo" in text
    changed = rows(text, "Hyperparameters that differ from the default")
    assert changed.get("scored (co-teaching)") == (None if scored == "first" else [scored])


def with_head(head, **changes):
    labels = torch.eye(len(NAMES)) if head == "ms_cma" else None
    model = load_model("test_resnet", NAMES, image_size=32, pretrained=False, head=head, train_labels=labels)[0]
    model.config.backbone_config.name_or_path = "someone/backbone"
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def test_a_model_that_brings_its_code_is_loaded_with_trust_remote_code(tmp_path):
    for included in (False, True):
        trainer = MultiLabelTrainer(
            model=with_head("ml_decoder", include_code=included), args=arguments(tmp_path / "out")
        )
        text = write_model_card(trainer, tmp_path / "card").read_text()
        code = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
        assert code.count(", trust_remote_code=True)") == (2 if included else 0)
        assert ("import hf_balancemix.models" in code) != included
        compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("head", "author"), [("ml_decoder", "Ridnik, Tal"), ("q2l", "Liu, Shilong"), ("ms_cma", "You, Renchun")]
)
def test_a_decoder_head_is_cited_and_its_backbone_named(head, author, dataset, tmp_path):
    trainer = BalanceMixTrainer(model=with_head(head), args=arguments(tmp_path / "out"), train_dataset=dataset)
    path = write_model_card(trainer, tmp_path / "card")
    text = path.read_text()
    assert "| Started from | someone&#47;backbone |" in text
    assert metadata_load(path)["base_model"] == "someone/backbone"
    assert "\nThe method:\n" in text
    authors = {"Ridnik, Tal", "Liu, Shilong", "You, Renchun"}
    assert [name for name in authors if name in text] == [author]
    trainer.model.config.name_or_path = "someone/finetuned"
    assert metadata_load(write_model_card(trainer, tmp_path / "card"))["base_model"] == "someone/finetuned"
