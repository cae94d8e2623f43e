"""The labels are judged by the features of the backbone before the training, once, and where there are none by the
network."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from conftest import NAMES, arguments, make_dataset, tiny_resnet, tiny_vit
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_balancemix import BalanceMixTrainer, MultiLabelTrainer, load_model
from hf_balancemix.core import judge_labels
from hf_balancemix.data.labels import label_matrix
from hf_balancemix.frozen import FeatureClassifier, FeatureClassifierConfig
from hf_balancemix.models.features import pooled_features_of
from hf_balancemix.trainer.checkpoints import write_manifest

MODELS = {
    "transformers": tiny_vit,
    "batch norm": tiny_resnet,
    "timm": lambda: load_model("test_vit", NAMES, image_size=16, pretrained=False)[0],
    "ours": lambda: load_model("test_resnet", NAMES, image_size=32, pretrained=False, head="ml_decoder")[0],
}


def before_the_head(kind: str, model, images):
    """By hand: what the classifier of each of the models above stands on."""
    if kind == "transformers":
        return model.vit(images).last_hidden_state[:, 0]
    if kind == "batch norm":
        return model.resnet(images).pooler_output.flatten(1)
    if kind == "timm":
        return model.timm_model.forward_head(model.timm_model.forward_features(images), pre_logits=True)
    return model.backbone(pixel_values=images).last_hidden_state.mean((2, 3))


@pytest.mark.parametrize("kind", MODELS)
def test_labels_are_judged_by_the_features_of_the_untrained_backbone(kind, tmp_path):
    data, model = make_dataset(tmp_path / "images", 30), MODELS[kind]()
    args = arguments(tmp_path / "o", image_size=32 if kind == "ours" else 16)
    trainer = BalanceMixTrainer(model=model, args=args, train_dataset=data)
    images = torch.stack([trainer.views.plain(image) for image in trainer.views.images(data)[range(30)]["image"]])
    model.eval()
    with torch.no_grad():
        features = before_the_head(kind, model, trainer._normalise(images))
    expected = judge_labels(features, trainer.train_labels, mixtures="sklearn", seed=args.seed)
    trainer.train()
    state = trainer.balance_mix
    assert torch.allclose(state.clean_probability(torch.arange(30)), expected.p_clean, atol=0.02)
    assert torch.allclose(state.noise_rates.wrong, expected.rates.wrong)
    line = next(line for line in trainer.state.log_history if "noise_rate_wrong" in line)
    assert line["step"] == 0
    positives = label_matrix(data).sum(0)
    wrong = (expected.rates.wrong[0] * positives).sum() / positives.sum()
    assert line["noise_rate_wrong"] == pytest.approx(wrong.item())
    assert line["noise_rate_missing"] >= 0


def test_each_training_judges_once_by_the_model_that_it_begins_with(dataset, tmp_path):
    trainer = BalanceMixTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    judge, seen = trainer.balance_mix.judge, []
    trainer.balance_mix.judge = lambda features, **options: (seen.append(features), judge(features, **options))
    trainer.train()
    trainer.train()
    assert len(seen) == 2
    assert seen[0].shape == (len(dataset), 16)
    assert not torch.equal(seen[0], seen[1])


def test_cached_features_are_judged_as_they_are():
    model = FeatureClassifier(FeatureClassifierConfig(7, 5, num_labels=3))
    x = torch.randn(4, 7)
    assert torch.equal(pooled_features_of(model)(x), x)


class Convolutional(nn.Module):
    """No linear layer anywhere."""

    def __init__(self):
        super().__init__()
        self.config = tiny_resnet().config
        self.layer = nn.Conv2d(3, len(NAMES), 3)

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.layer(pixel_values).mean((2, 3)))


def test_without_a_linear_classifier_the_network_judges_and_says_so(dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = BalanceMixTrainer(model=Convolutional(), args=arguments(tmp_path), train_dataset=dataset)
    assert "Convolutional has no linear layer with 5 outputs: its own losses judge" in caplog.text
    trainer.train()
    assert trainer.balance_mix.settings.judge == "network"
    assert trainer.balance_mix.noise_rates is None
    assert trainer.balance_mix.mixtures is not None


def test_a_judge_that_was_asked_for_and_cannot_be_had_is_an_error(dataset, tmp_path):
    args = arguments(tmp_path, judge="cross_fit")
    with pytest.raises(ValueError, match="judge is 'cross_fit', and Convolutional has no linear layer with 5 outputs"):
        BalanceMixTrainer(model=Convolutional(), args=args, train_dataset=dataset)


def test_where_labels_are_not_managed_nothing_is_judged(dataset, tmp_path):
    args = arguments(tmp_path, select_clean=False)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    trainer.train()
    assert trainer.balance_mix.noise_rates is None
    assert not any("noise_rate_wrong" in line for line in trainer.state.log_history)


def test_the_card_says_how_much_is_wrong(dataset, tmp_path):
    args = arguments(tmp_path / "o")
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "o" / "README.md").read_text()
    best, low, high = (100 * trainer.balance_mix.noise_rates.wrong[:, 2]).tolist()
    row = next(line for line in text.splitlines() if line.startswith("| cat |"))
    assert f"{best:.0f} ({low:.0f} to {high:.0f})" in row
    assert "How many are wrong was estimated from the given labels alone" in text
    assert "none of which saw the label" in text
    heading = next(line for line in text.splitlines() if line.startswith("| class |"))
    assert heading.count("|") == row.count("|")


def test_a_compiled_model_is_judged_by_its_features(dataset, tmp_path):
    compiled = torch.compile(tiny_vit(), backend="eager")
    trainer = BalanceMixTrainer(model=compiled, args=arguments(tmp_path / "a"), train_dataset=dataset)
    trainer.train()
    assert trainer.balance_mix.noise_rates is not None


def test_features_that_are_infinite_are_left_out_with_a_warning(dataset, tmp_path, caplog):
    args = arguments(tmp_path / "o", on_nan="skip")
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    judge, seen = trainer.balance_mix.judge, []
    trainer.balance_mix.judge = lambda features, **options: (seen.append(features), judge(features, **options))
    hook = trainer.model.classifier.register_forward_pre_hook(
        lambda module, inputs: None if module.training else (inputs[0].index_fill(0, torch.tensor([0]), torch.inf),)
    )
    trainer.train()
    hook.remove()
    bad = ~seen[0].isfinite().all(1)
    assert bad.sum() == 3  # the first of each batch
    assert (trainer.balance_mix.clean_probability(bad.nonzero().squeeze(1)) == 0).all()


def test_a_trainer_for_evaluation_alone_needs_no_judge(dataset, tmp_path):
    args = arguments(tmp_path, judge="cross_fit")
    BalanceMixTrainer(model=Convolutional(), args=args, eval_dataset=dataset)


@pytest.mark.parametrize("then", ["network", "cross_fit"])
def test_a_run_that_another_judge_began_is_not_taken_for_its_own(then, tmp_path):
    data = make_dataset(tmp_path / "images", 12)
    now = {"network": "cross_fit", "cross_fit": "network"}[then]

    def trainer(judge):
        args = arguments(tmp_path / "o", judge=judge, save_strategy="epoch", num_train_epochs=3)
        return BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=data)

    trainer(then).train()
    other = trainer(now)
    if now == "cross_fit":
        with pytest.raises(ValueError, match="the network judged its labels"):
            other.train(resume_from_checkpoint=str(tmp_path / "o" / "checkpoint-3"))
    else:
        other.train(resume_from_checkpoint=str(tmp_path / "o" / "checkpoint-3"))
        assert other.balance_mix.noise_rates is None


def test_fewer_instances_than_folds_are_judged(tmp_path):
    data = make_dataset(tmp_path / "images", 3)
    args = arguments(tmp_path / "o", per_device_train_batch_size=3)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=data)
    trainer.train()
    assert trainer.balance_mix.clean_probability(torch.arange(3)).shape == (3, 5)


def test_a_checkpoint_of_an_older_version_is_refused_in_one_sentence(dataset, tmp_path):
    def trainer():
        args = arguments(tmp_path / "o", save_strategy="epoch", num_train_epochs=1)
        return MultiLabelTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)

    trainer().train()
    checkpoint = tmp_path / "o" / "checkpoint-6"
    facts = json.loads((checkpoint / "run.json").read_text())
    del facts["format"]
    (checkpoint / "run.json").write_text(json.dumps(facts | {"data": "as it was told apart then"}))
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match="another version of hf_balancemix wrote it, in format 1; it must be in"):
        trainer().train(resume_from_checkpoint=str(checkpoint))


def test_a_run_that_remembers_all_labels_says_what_it_needs_before_it_begins(dataset, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    args = arguments(tmp_path, judge="network", max_missing=0.0)
    BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
    assert "all 24 x 5 labels are remembered, which needs 0.0 GB of memory; max_missing=0.5 needs" in caplog.text
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 1000))
    with pytest.raises(ValueError, match=r"must be at most the 0\.0 GB that there are; set max_missing=0\.5, or"):
        BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
    BalanceMixTrainer(model=tiny_resnet(), args=arguments(tmp_path, judge="network"), train_dataset=dataset)
