"""What a user of the trainers relies on, in one process."""

from __future__ import annotations

import dataclasses
import json
import logging

import datasets
import numpy as np
import pytest
import torch
from conftest import NAMES, arguments, flat, make_dataset, remember_all, tiny_resnet, tiny_vit
from sklearn.metrics import average_precision_score
from transformers import AutoImageProcessor, AutoModelForImageClassification, ConvNextImageProcessor, TrainingArguments

from hf_balancemix import BalanceMixTrainer, BalanceMixTrainingArguments, Mislabel, MultiLabelTrainer, RandomFlip
from hf_balancemix.core import BalanceMixSettings, PairKey, Reliability
from hf_balancemix.methods import METHODS, trainer_for
from hf_balancemix.trainer import MixupTrainer, multilabel


def noisy_version(dataset, rate=0.4):
    noise = Mislabel(rate=rate, seed=0).fit(dataset)
    return dataset.map(noise, batched=True, features=noise.features)


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_train_evaluate_save_and_load_again(dataset, tmp_path):
    args = arguments(tmp_path / "out", num_train_epochs=3)
    trainer = BalanceMixTrainer(
        model=tiny_vit(), args=args, train_dataset=noisy_version(dataset), eval_dataset=dataset
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    logs = {name for line in trainer.state.log_history for name in line}
    assert {"label_clean_precision", "label_relabel_proportion", "sampler_effective_size", "p_clean_mean"} <= logs
    # The figures of the last epoch (2) and of the one before (1); epoch 0 is the warm-up and manages no labels.
    managed = [line["epoch"] for line in trainer.state.log_history if "label_clean_precision" in line]
    assert managed == [2, 3]

    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert loaded.config.problem_type == "multi_label_classification"
    inputs = processor([row["image"].convert("RGB") for row in dataset], return_tensors="pt")
    with torch.no_grad():
        scores = loaded(**inputs).logits.numpy()
    labels = np.array([[k in row["labels"] for k in range(len(NAMES))] for row in dataset])
    expected = np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in range(len(NAMES))])
    assert metrics["eval_mAP"] == pytest.approx(expected, abs=0.02)  # two resize backends
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["relabel_threshold"] == 0.6


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_the_same_views_in_the_same_order(method, dataset, tmp_path):
    args = arguments(tmp_path / method, label_warmup_epochs=1)
    trainer = trainer_for(method, args, model=tiny_resnet(), train_dataset=dataset, eval_dataset=dataset)
    rows = next(iter(trainer.get_train_dataloader()))
    reference = MultiLabelTrainer(model=tiny_resnet(), args=arguments(tmp_path / "r"), train_dataset=dataset)
    expected = next(iter(reference.get_train_dataloader()))
    assert torch.equal(rows["index"], expected["index"])
    assert torch.equal(rows["pixel_values"], expected["pixel_values"])
    before = flat(trainer.model).clone()
    trainer.train()
    assert not torch.equal(before, flat(trainer.model))


def test_accumulation_gives_the_same_loss_curve(tmp_path):
    data = noisy_version(make_dataset(tmp_path / "i", 64))
    curves, weights = [], []
    for batch, accumulation in ((32, 1), (8, 4)):
        args = arguments(
            tmp_path / str(batch), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            num_train_epochs=4, logging_strategy="steps", logging_steps=1, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=data)
        trainer.train()
        curves.append(losses(trainer))
        weights.append(flat(trainer.model))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert torch.allclose(*weights, atol=1e-5)


def test_the_scan_and_the_extra_passes_leave_no_trace(dataset, tmp_path):
    # Same seed, dropout in the model: with label management that never decides anything (everything clean) a run must
    # equal plain Mixup, although it scans and refines in between.
    runs = []
    for changes in (
        {"minority_score": "uniform", "select_clean": False},
        {"minority_score": "uniform", "select_clean": True, "relabel_threshold": 1.0},
    ):
        args = arguments(tmp_path / "o", num_train_epochs=3, **changes)
        trainer = BalanceMixTrainer(model=tiny_vit(dropout=0.3), args=args, train_dataset=dataset)
        trainer.balance_mix._p_clean = lambda index, labels, probabilities: torch.ones_like(probabilities)
        trainer.train()
        runs.append(flat(trainer.model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("alpha", [4.0, 0.0])
def test_plain_mixup_is_balancemix_with_its_two_parts_off(alpha, dataset, tmp_path):
    runs = []
    for trainer_class in (MixupTrainer, BalanceMixTrainer):
        args = arguments(tmp_path, mixup_alpha=alpha, minority_score="uniform", select_clean=False)
        trainer = trainer_class(model=tiny_vit(dropout=0.3), args=args, train_dataset=noisy_version(dataset))
        trainer.train()
        runs.append(flat(trainer.model))
    assert torch.equal(*runs)


def test_without_mixing_labels_are_refined_and_no_partner_is_decoded(dataset, tmp_path):
    # As with partners that have no share: lambda 1.
    runs = []
    for alpha in (0.0, 4.0):
        args = arguments(tmp_path, num_train_epochs=3, mixup_alpha=alpha, minority_score="uniform")
        trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=noisy_version(dataset))
        trainer._lam = lambda inputs: torch.ones_like(inputs["lam"])
        assert ("minority_pixel_values" in next(iter(trainer.get_train_dataloader()))) == (alpha > 0)
        trainer.train()
        runs.append(flat(trainer.model))
    assert torch.equal(*runs)


def test_evaluation_before_and_during_training_does_not_change_it(dataset, tmp_path):
    runs = []
    for strategy in ("no", "epoch"):
        args = arguments(tmp_path / strategy, eval_strategy=strategy)
        trainer = BalanceMixTrainer(
            model=tiny_vit(dropout=0.3), args=args, train_dataset=dataset, eval_dataset=dataset
        )
        trainer.train()
        runs.append(flat(trainer.model))
    assert torch.equal(*runs)


def test_bf16_trains_and_keeps_statistics_in_float32(dataset, tmp_path):
    trainer = BalanceMixTrainer(
        model=tiny_vit(),
        args=arguments(tmp_path, bf16=True),
        train_dataset=noisy_version(dataset),
        eval_dataset=dataset,
    )
    seen = []
    observe = trainer.balance_mix.observe
    trainer.balance_mix.observe = lambda index, logits: (seen.append(logits.float()), observe(index, logits))
    trainer.train()
    assert trainer.balance_mix.weights.dtype == torch.float64
    assert torch.isfinite(flat(trainer.model)).all()
    assert len(seen) > 0
    assert trainer.predict(dataset).predictions.dtype == np.float32


def test_lambda_per_batch_uses_one_lambda(dataset, tmp_path):
    trainer = BalanceMixTrainer(
        model=tiny_vit(), args=arguments(tmp_path, lambda_per_batch=True), train_dataset=dataset
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    targets = []
    loss = trainer.balance_mix.loss
    trainer.balance_mix.loss = lambda logits, target, *weights: (
        targets.append(target),
        loss(logits, target, *weights),
    )[1]
    trainer.compute_loss(trainer.model, batch)
    lam = batch["lam"][0]
    assert batch["lam"].unique().numel() == len(batch["lam"])
    assert torch.allclose(targets[0], lam * batch["labels"] + (1 - lam) * batch["minority_labels"])


def test_with_the_scans_predictions_a_step_is_one_pass_through_the_network(dataset, tmp_path):
    args = arguments(tmp_path, judge="network", prediction_source="scan", num_train_epochs=3)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=noisy_version(dataset))
    passes = {True: 0, False: 0}  # in training mode, in evaluation mode

    def count(module, inputs):
        passes[module.training] += 1

    trainer.model.register_forward_pre_hook(count)
    codes = []
    refine = trainer.balance_mix.refine
    trainer.balance_mix.refine = lambda *given: (codes.append(refine(*given)), codes[-1])[1]
    assert "second_view" not in trainer.get_train_dataloader().dataset[PairKey(2, 0, 1)]
    trainer.train()
    # 24 instances in batches of 4; scans in batches of 8 before the epochs 1 and 2 and after the last.
    assert passes == {True: 3 * 6, False: 3 * 3}
    assert len(codes) == 2 * 2 * 6  # both batches of a step, from the second epoch on
    assert any((refined.reliability == Reliability.RELABELED).any() for refined in codes)


def test_with_preset_paper_a_step_is_eq_5_9_and_10_written_out(dataset, tmp_path):
    args = arguments(tmp_path, preset="paper", mixture_preset=None, num_train_epochs=3)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=noisy_version(dataset))
    state, compute_loss, seen = trainer.balance_mix, trainer.compute_loss, []
    end_epoch, g = state.end_epoch, torch.Generator().manual_seed(0)

    def end_epoch_with_p_of_every_kind(epoch):
        end_epoch(epoch)
        remember_all(state, torch.rand(state.labels.shape, generator=g))

    def compared(model, inputs, *more, **named):
        loss = compute_loss(model, inputs, *more, **named)
        if state.epoch == 0:  # warm-up
            return loss

        def f(images):
            with torch.no_grad():
                return 1 / (1 + np.exp(-model(pixel_values=images).logits.double().numpy()))

        def refined(prefix):
            p = state.clean_probability(inputs[f"{prefix}index"]).double().numpy()
            given = inputs[f"{prefix}labels"].numpy()
            q = (f(inputs[f"{prefix}pixel_values"]) + f(inputs[f"{prefix}second_view"])) / 2
            clean, one, zero = p > 0.5, q > 0.6, q < 0.4
            labels = np.where(clean, given, np.where(one, 1, np.where(zero, 0, given)))
            return labels, np.where(clean | one | zero, 1, p), clean, ~clean & (one | zero)

        (labels, weight, clean, relabeled), (other, *_) = refined(""), refined("minority_")
        lam = inputs["lam"].double().numpy()[:, None]
        by_image = inputs["lam"].view(-1, 1, 1, 1)
        mixed = f(by_image * inputs["pixel_values"] + (1 - by_image) * inputs["minority_pixel_values"])
        t = lam * labels + (1 - lam) * other
        bce = -(t * np.log(mixed) + (1 - t) * np.log(1 - mixed))
        assert loss.item() == pytest.approx((weight * bce).sum(1).mean(), rel=1e-4)
        seen.append((clean.sum(), relabeled.sum(), (~clean & ~relabeled).sum()))
        return loss

    state.end_epoch, trainer.compute_loss = end_epoch_with_p_of_every_kind, compared
    trainer.train()
    assert len(seen) == 2 * 6
    assert all(sum(kind) > 0 for kind in zip(*seen, strict=True))  # clean, re-labelled and ambiguous ones


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("method", ["balancemix", "t-estimator", "co-teaching", "ll-cp", "nar"])
def test_a_second_training_is_like_the_first(method, preset, dataset, tmp_path):
    # Without momentum: Trainer keeps its optimiser.
    args = arguments(tmp_path, preset=preset, optim="sgd", optim_args="momentum=0.0", num_train_epochs=3)
    own = {"delta": 10.0} if method == "ll-cp" else {}
    trainer = trainer_for(method, args, own, model=tiny_vit(), train_dataset=noisy_version(dataset))
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    ends = []
    for _ in range(2):
        trainer.model.load_state_dict(start)
        trainer.train()
        ends.append((flat(trainer.model), trainer._run_state()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1].keys() == ends[1][1].keys()
    for name, value in ends[0][1].items():
        assert torch.equal(value, ends[1][1][name]), name


def test_predict_needs_no_labels(dataset, tmp_path):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    output = trainer.predict(dataset.remove_columns("labels"))
    assert output.predictions.shape == (len(dataset), len(NAMES))
    assert output.label_ids is None


def test_only_training_drops_a_last_batch(dataset, tmp_path):
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=7)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    assert len(trainer.predict(dataset).predictions) == len(dataset) == 24
    assert args.dataloader_drop_last
    assert len(trainer.get_train_dataloader()) == 6


def test_the_processors_normalisation_is_kept_and_its_crop_is_not(dataset, tmp_path):
    given = ConvNextImageProcessor(size={"shortest_edge": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset, processing_class=given
    )
    batch = next(iter(trainer.get_eval_dataloader(dataset)))
    assert batch["pixel_values"].shape[1:] == (3, 16, 16)
    assert batch["pixel_values"].dtype == torch.uint8
    image = trainer._prepare_inputs(batch)["pixel_values"][0]
    expected = trainer.processing_class(dataset[0]["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(image, expected, atol=0.05)
    assert list(trainer.processing_class.image_mean) == [0.1, 0.2, 0.3]


def test_the_best_model_is_loaded_where_keys_are_renamed_on_save(dataset, tmp_path):
    args = arguments(
        tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="mAP", greater_is_better=True, save_total_limit=1,
    )  # fmt: skip
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    best = max(line["eval_mAP"] for line in trainer.state.log_history if "eval_mAP" in line)
    assert trainer.evaluate()["eval_mAP"] == best


def test_of_many_classes_the_best_and_the_newest_evaluation_keep_their_average_precisions(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(multilabel, "_ALL_RECORDED", 4)  # of five classes
    args = arguments(
        tmp_path, num_train_epochs=4, eval_strategy="epoch", save_strategy="epoch", metric_for_best_model="mAP",
    )  # fmt: skip
    trainer = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    evaluations = [line for line in trainer.state.log_history if "eval_mAP" in line]
    kept = [line["step"] for line in evaluations if "eval_per_class_ap" in line]
    best_before = max(evaluations[:3], key=lambda line: line["eval_mAP"])["step"]
    assert kept == [best_before, evaluations[3]["step"]]
    assert trainer.state.best_global_step in kept


def test_resuming_where_nothing_was_saved_starts_from_the_beginning(dataset, tmp_path):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    assert trainer.train(resume_from_checkpoint=True).global_step == 12


# ---- what is refused, with one sentence, before training ----


def trained(dataset, folder, **changes):
    args = arguments(folder, save_strategy="epoch", **changes)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    trainer.train()
    return args


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("instances", "its num_instances is 24, this run's is 20"),
        ("labels", "its data is"),
        ("seed", "its seed is 3, this run's is 4"),
        ("classes", "its num_classes is 5, this run's is 4"),
    ],
)
def test_resuming_with_other_data_or_seed_is_refused(change, message, dataset, tmp_path):
    args = trained(dataset, tmp_path / "run")
    model = tiny_vit()
    if change == "instances":
        dataset = dataset.select(range(20))
    elif change == "labels":
        noise = RandomFlip(rate=0.3, seed=1).fit(dataset)
        dataset = dataset.map(noise, batched=True, features=noise.features)
    elif change == "seed":
        args = dataclasses.replace(args, seed=4)
    else:
        dataset, model = make_dataset(tmp_path / "four", names=NAMES[:4]), tiny_vit(4)
    trainer = BalanceMixTrainer(model=model, args=args, train_dataset=dataset)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_not_whole_is_refused_by_name(dataset, tmp_path):
    args = trained(dataset, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-12"
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
    with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-12: .*optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"per_device_train_batch_size": 64}, "24 instances, fewer than one global batch of 64"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        BalanceMixTrainer(model=tiny_vit(), args=arguments(tmp_path, **changes), train_dataset=dataset)


def test_data_sets_that_cannot_work_are_refused(dataset, tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match="IterableDataset"):
        BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="image"):
        BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset.rename_column("image", "img"))
    with pytest.raises(ValueError, match="labels"):
        BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset.remove_columns("labels"))
    with pytest.raises(ValueError, match="the model has 7 outputs and train_dataset 5 classes"):
        BalanceMixTrainer(model=tiny_vit(7), args=args, train_dataset=dataset)
    other = make_dataset(tmp_path / "o", names=["x", *NAMES[1:]])
    with pytest.raises(ValueError, match="differ in name or order"):
        BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=other)
    with pytest.raises(TypeError, match="BalanceMixTrainingArguments"):
        BalanceMixTrainer(model=tiny_vit(), args=TrainingArguments(str(tmp_path)), train_dataset=dataset)


def test_multi_hot_columns_are_accepted_and_checked(dataset, tmp_path):
    hot = [[float(k in row) for k in range(len(NAMES))] for row in dataset["labels"]]
    features = datasets.Features(image=datasets.Image(), labels=datasets.List(datasets.Value("float32")))
    paths = [row["path"] for row in dataset.cast_column("image", datasets.Image(decode=False))["image"]]
    data = datasets.Dataset.from_dict({"image": paths, "labels": hot}, features=features)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=data)
    assert trainer.train_labels.toarray().tolist() == [[int(v) for v in row] for row in hot]
    hot[3][1] = 0.5
    bad = datasets.Dataset.from_dict({"image": paths, "labels": hot}, features=features)
    with pytest.raises(ValueError, match=r"row 3.*0\.5"):
        MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=bad)


def test_a_truncated_image_stops_training_with_its_name(dataset, tmp_path):
    path = dataset.cast_column("image", datasets.Image(decode=False))[5]["image"]["path"]
    with open(path, "r+b") as file:
        file.truncate(100)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    with pytest.raises(ValueError, match=r"cannot decode image .*005\.png"):
        trainer.train()


def test_noisy_validation_labels_are_warned_of(dataset, tmp_path, caplog):
    noisy = noisy_version(dataset, rate=0.8)
    with caplog.at_level(logging.WARNING):
        MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset, eval_dataset=noisy)
    assert "eval_dataset carries noisy labels" in caplog.text


def test_a_class_without_positives_is_skipped_in_map_and_named(dataset, tmp_path, caplog):
    without = dataset.map(lambda row: {"labels": [k for k in row["labels"] if k != 2]}, features=dataset.features)
    trainer = BalanceMixTrainer(
        model=tiny_vit(), args=arguments(tmp_path, num_train_epochs=3), train_dataset=without, eval_dataset=without
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
        metrics = trainer.evaluate()
    assert 0 < metrics["eval_mAP"] <= 1
    assert "cat" in caplog.text


def test_unknown_labels_are_learned_from_nowhere_and_evaluated_nowhere(dataset, tmp_path):
    # Whatever stands at an unknown label, the run is the same.
    features = datasets.Features(**dataset.features, unknown_labels=dataset.features["labels"])
    unknown = [sorted({i % 5, (i + 2) % 5}) for i in range(len(dataset))]
    marked = dataset.add_column("unknown_labels", unknown).cast(features)
    marked = marked.map(
        lambda row: {"labels": [k for k in row["labels"] if k not in row["unknown_labels"]]}, features=features
    )
    args = arguments(tmp_path, num_train_epochs=2)
    trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=marked, eval_dataset=marked)
    assert (trainer.train_labels == -1).sum() == 2 * len(dataset)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    logits = torch.zeros(4, 5, requires_grad=True)
    trainer.balance_mix.loss(logits, batch["labels"]).backward()
    assert torch.equal(logits.grad == 0, batch["labels"] < 0)
    trainer.train()
    assert trainer.predict(marked).label_ids.min() == -1
    assert 0 <= trainer.evaluate()["eval_mAP"] <= 1


def test_the_data_sets_class_names_are_saved_with_the_model(dataset, tmp_path, caplog):
    model = tiny_vit()
    assert model.config.id2label[0] == "LABEL_0"
    MultiLabelTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset).save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert [loaded.config.id2label[k] for k in range(5)] == NAMES
    other = make_dataset(tmp_path / "o", names=["ape", *NAMES[1:]])
    with caplog.at_level(logging.WARNING):
        MultiLabelTrainer(model=model, args=arguments(tmp_path), train_dataset=other)
    assert "differ from the data set's (ape, ...)" in caplog.text


def test_channels_last_is_the_same_training(dataset, tmp_path):
    runs = []
    for channels_last in (False, True):
        args = arguments(tmp_path, channels_last=channels_last, learning_rate=0.01)
        trainer = BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)
        trainer.train()
        runs.append(flat(trainer.model))
    weight = trainer.model.resnet.encoder.stages[1].layers[0].layer[0].convolution.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(*runs, atol=1e-4)


def test_mean_clean_probability_counts_known_labels_only(dataset, tmp_path):
    features = datasets.Features(**dataset.features, unknown_labels=dataset.features["labels"])
    unknown = [[k for k in range(5) if k not in row][:2] for row in dataset["labels"]]
    marked = dataset.add_column("unknown_labels", unknown).cast(features)
    trainer = BalanceMixTrainer(model=tiny_resnet(), args=arguments(tmp_path), train_dataset=marked)
    labels = torch.from_numpy(trainer.balance_mix.labels.toarray())
    remember_all(trainer.balance_mix, torch.where(labels == 1, 0.75, torch.where(labels == 0, 0.25, 0.0)))
    assert (labels == -1).any()
    positives, negatives = (labels == 1).sum().item(), (labels == 0).sum().item()
    logs = trainer._sampler_logs()
    assert logs["p_clean_mean_positives"] == 0.75
    assert logs["p_clean_mean"] == pytest.approx((0.75 * positives + 0.25 * negatives) / (positives + negatives))


def test_data_parallel_is_refused(dataset, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible to one process"):
        BalanceMixTrainer(model=tiny_resnet(), args=args, train_dataset=dataset)


def test_the_trainers_defaults_are_those_of_core(tmp_path):
    assert BalanceMixTrainingArguments(str(tmp_path)).balance_mix_settings() == BalanceMixSettings()


def test_another_setting_is_warned_of_when_a_run_goes_on(dataset, tmp_path, caplog):
    train = {"model": tiny_resnet(), "train_dataset": dataset}
    args = arguments(tmp_path, num_train_epochs=2, save_strategy="epoch")
    BalanceMixTrainer(args=args, **train).train()
    BalanceMixTrainer(args=dataclasses.replace(args, num_train_epochs=3, mixup_alpha=1.0), **train).train(True)
    assert "mixup_alpha was 4.0 at the checkpoint and is 1.0 now" in caplog.text


def test_a_run_prints_nothing_that_worries_without_cause(dataset, tmp_path, caplog, monkeypatch, recwarn):
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *args, **kwargs: said.append(text))
    args = arguments(
        tmp_path / "o", save_strategy="epoch", eval_strategy="epoch", save_total_limit=1, num_train_epochs=3,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        for resume in (False, str(tmp_path / "o" / "checkpoint-18")):
            trainer = MultiLabelTrainer(
                model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=dataset
            )  # its keys are renamed on save
            trainer.train(resume_from_checkpoint=resume)
    lines = [*said, *caplog.messages, *(str(warning.message) for warning in recwarn)]
    assert not [line for line in lines if any(word in line for word in ("missing", "pin_memory", "Deleted"))]
