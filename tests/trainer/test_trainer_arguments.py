"""Arguments of Trainer and settings that are changed later: each works, or is refused before training."""

from __future__ import annotations

import copy
import json
import logging
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import NAMES, arguments, flat, tiny_resnet, tiny_vit
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_balancemix import BalanceMixTrainer, Mislabel, MultiLabelTrainer, tune_thresholds
from hf_balancemix.core import BalanceMix
from hf_balancemix.core.losses import binary_cross_entropy
from hf_balancemix.data.views import ViewMaker
from hf_balancemix.methods import trainer_for
from hf_balancemix.trainer import MixupTrainer
from hf_balancemix.trainer.checks import check_engine


@pytest.fixture
def noisy(dataset):
    noise = Mislabel(rate=0.4, seed=0).fit(dataset)
    return dataset.map(noise, batched=True, features=noise.features)


def multi_hot(dataset) -> datasets.Dataset:
    """The same data without class names."""
    rows = [[float(k in row) for k in range(len(NAMES))] for row in dataset["labels"]]
    data = dataset.remove_columns("labels").add_column("labels", rows)
    return data.cast_column("labels", datasets.List(datasets.Value("float32")))


# ---- compute_loss_func ----


def by_number(outputs, labels, num_items_in_batch):
    return (outputs.logits - labels).square().sum() / num_items_in_batch


def by_mean(outputs, labels, num_items_in_batch=None):
    return (outputs.logits - labels).square().mean()


@pytest.mark.parametrize("method", ["bce", "mixup", "balancemix"])
def test_a_loss_of_the_users_gets_the_methods_targets(method, noisy, tmp_path, monkeypatch):
    seen = []

    def bce(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        assert num_items_in_batch == labels.numel() == outputs.logits.numel()
        return binary_cross_entropy(outputs.logits, labels)

    # The very same function, so the same run; but for BalanceMix's weights, which a function does not get.
    loss = BalanceMix.loss
    monkeypatch.setattr(BalanceMix, "loss", lambda self, logits, targets, *weights: loss(self, logits, targets))
    ends = []
    for function in (None, bce):
        args = arguments(tmp_path, num_train_epochs=3)
        trainer = trainer_for(method, args, model=tiny_vit(), train_dataset=noisy, compute_loss_func=function)
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)
    assert len(seen) == 3 * 6
    mixed = any(((labels > 0) & (labels < 1)).any() for labels in seen)
    assert mixed == (method != "bce")


@pytest.mark.parametrize("function", [by_number, by_mean])
def test_its_gradient_does_not_depend_on_accumulation_steps(function, dataset, tmp_path):
    ends = []
    for steps in (1, 2):
        args = arguments(tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)
        trainer = MixupTrainer(
            model=tiny_vit(), args=args, train_dataset=dataset, eval_dataset=dataset, compute_loss_func=function
        )
        trainer.train()
        ends.append(flat(trainer.model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    output = trainer.predict(dataset)  # evaluations have it, too
    expected = (output.predictions - output.label_ids) ** 2
    assert output.metrics["test_loss"] == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.parametrize("method", ["asl", "ll-cp", "t-estimator", "co-teaching", "elr"])
def test_it_is_refused_where_the_loss_is_the_method(method, dataset, tmp_path):
    args = arguments(tmp_path, num_train_epochs=3)
    with pytest.raises(ValueError, match="compute_loss_func is given; it must be left out"):
        trainer_for(method, args, model=tiny_vit(), train_dataset=dataset, compute_loss_func=by_mean)


# ---- other arguments ----


def test_what_would_have_no_effect_is_refused(dataset, tmp_path):
    def make(train=dataset, **options):
        return BalanceMixTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=train, **options)

    with pytest.raises(TypeError, match="data_collator is given; it must be left out"):
        make(data_collator=torch.stack)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics is given without compute_metrics"):
        make(preprocess_logits_for_metrics=lambda logits, labels: logits.sigmoid())
    lazy = dataset.with_transform(lambda rows: rows)
    for options in ({"train": lazy}, {"eval_dataset": lazy}, {"eval_dataset": {"a": dataset, "b": lazy}}):
        with pytest.raises(ValueError, match=r"has a transform .* train_transform="):
            make(**options)
    trainer = make()
    with pytest.raises(ValueError, match="has a transform"):
        trainer.predict(lazy)
    trainer.train_dataset = dataset.shuffle(seed=0)  # whose labels the trainer has not read
    with pytest.raises(ValueError, match="train_dataset was replaced"):
        trainer.train()


def test_processes_that_would_not_be_one_run_are_refused(dataset, tmp_path, monkeypatch):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_engine(trainer)
    monkeypatch.setenv("LOCAL_RANK", "0")  # by torchrun; without use_cpu Accelerate looks for GPUs only
    with pytest.raises(ValueError, match=r"2 processes were started.*; pass --use_cpu --ddp_backend gloo\.$"):
        check_engine(trainer)


def test_fsdp_that_accelerate_would_leave_out_or_is_of_version_1_is_refused(dataset, tmp_path, monkeypatch):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    check_engine(trainer)
    trainer.args.fsdp = True
    with pytest.raises(ValueError, match="Accelerate runs DDP instead on CPU"):
        check_engine(trainer)
    trainer.args.fsdp = None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # by `accelerate launch`
    with pytest.raises(ValueError, match="Accelerate runs DDP instead on CPU"):
        check_engine(trainer)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=r"version is 1; it must be 2|they must be 1\.15 and 2\.14 or newer"):
        check_engine(trainer)
    with pytest.raises(ValueError, match="save_model"):
        trainer.export_onnx(tmp_path / "model.onnx")


def test_deepspeed_that_would_skip_no_step_or_save_no_model_is_refused(dataset, tmp_path, monkeypatch):
    trainer = MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    zero = {"stage": 3}
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save is false; it must be true"):
        check_engine(trainer)
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    check_engine(trainer)
    trainer.args.on_nan = "skip"
    with pytest.raises(ValueError, match="on_nan is 'skip'; it must be 'stop' with DeepSpeed"):
        check_engine(trainer)


def test_what_trainer_takes_besides_works(dataset, tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    count, args = Count(), arguments(tmp_path)
    model, optimizer = tiny_vit(), (torch.optim.Adadelta, {"lr": 0.25})
    trainer = BalanceMixTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, callbacks=[count],
        optimizer_cls_and_kwargs=optimizer, compute_metrics=lambda p: {"least": float(p.predictions.min())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.sigmoid(),
    )  # fmt: skip
    trainer.train()
    assert count.steps == trainer.state.global_step == 12
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adadelta)
    assert 0 < trainer.evaluate()["eval_least"] < 1
    own = torch.optim.Adagrad(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(own, factor=0.5, total_iters=100)
    trainer = MultiLabelTrainer(model=model, args=args, train_dataset=dataset, optimizers=(own, schedule))
    trainer.train()
    assert trainer.optimizer.optimizer is own
    assert own.param_groups[0]["lr"] == 0.005


# ---- train_transform ----


def draw_from_all(image):
    pixels = np.asarray(image).copy()
    pixels[:8] = [int(torch.randint(256, ())), np.random.randint(256), random.randrange(256)]
    return pixels


def test_a_run_with_a_transform_goes_on_bit_for_bit(noisy, tmp_path):
    ends = []
    for workers, resume in ((0, None), (2, None), (0, "checkpoint-4")):
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=4, num_train_epochs=3, dataloader_num_workers=workers,
            hflip=True, random_resized_crop=0.5,
        )  # fmt: skip
        trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=noisy, train_transform=draw_from_all)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        ends.append(flat(trainer.model))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    # Not at the evaluation, and in place of RandAugment.
    batch = trainer.get_train_dataloader().dataset.views
    assert torch.equal(batch.plain(Image.new("RGB", (9, 9))), torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert not batch.augmented(Image.new("RGB", (9, 9)), 0, num_views=1)[0][:, 8:].any()


def test_a_transform_is_tried_before_training(dataset, tmp_path, caplog):
    def make(train_transform, **options):
        args = arguments(tmp_path)
        BalanceMixTrainer(
            model=tiny_vit(), args=args, train_dataset=dataset, train_transform=train_transform, **options
        )

    make(v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4), v2.RandomErasing()]))
    assert "train_transform" not in caplog.text
    with pytest.raises(ValueError, match=r"train_transform returned a Tensor of shape \(3, 8, 8\)"):
        make(lambda image: v2.functional.pil_to_tensor(image.resize((8, 8))))
    with pytest.raises(TypeError, match="train_transform is 3; it must be a function of a PIL image"):
        make(3)
    with pytest.raises(ValueError, match="train_transform is given together with views"):
        make(draw_from_all, views=ViewMaker(16, 0))
    own = np.random.default_rng(0)
    make(lambda image: own.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert "it has a generator of its own" in caplog.text


# ---- settings that are changed after the trainer was made ----

CHANGES = {
    "relabel_threshold": 0.9, "mixup_alpha": 1.0, "randaugment_magnitude": 2, "prediction_source": "views",
    "image_size": 24, "normalise": False, "seed": 5, "hflip": True, "loss_reduction": "mean", "ema_decay": 0.5,
    "cutout": 0.5, "global_batch_size": 6, "num_train_epochs": 4, "label_warmup_epochs": 2,
}  # fmt: skip


def test_a_changed_setting_counts_from_the_next_training_on(noisy, tmp_path):
    model = tiny_resnet()

    def make(args):
        return BalanceMixTrainer(model=copy.deepcopy(model), args=args, train_dataset=noisy)

    changed = make(arguments(tmp_path / "changed", save_strategy="epoch", save_total_limit=None))
    for name, value in CHANGES.items():
        setattr(changed.args, name, value)
    changed.train()
    batch = {"per_device_train_batch_size": None}
    given = make(arguments(tmp_path / "given", save_strategy="epoch", **batch | CHANGES))
    given.train()
    assert changed.state.global_step == given.state.global_step == 16
    assert torch.equal(flat(changed.model), flat(given.model))
    for trainer in (changed, given):
        assert (trainer.processing_class.size["height"], trainer.processing_class.image_mean[0]) == (24, 0)
        assert trainer.args.per_device_train_batch_size == 6
    # And such a run goes on as it was, in a trainer that was made with other settings.
    resumed = make(arguments(tmp_path / "changed", save_strategy="epoch"))
    for name, value in CHANGES.items():
        setattr(resumed.args, name, value)
    resumed.train(resume_from_checkpoint=str(tmp_path / "changed" / "checkpoint-8"))
    assert torch.equal(flat(resumed.model), flat(changed.model))
    for name, value in changed._run_state().items():
        assert torch.equal(value, resumed._run_state()[name]), name


def test_a_change_in_mid_training_waits_for_the_next(noisy, tmp_path):
    class Change(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch == 2:
                args.prediction_source, args.relabel_threshold, args.label_warmup_epochs = "views", 0.9, 3

    ends = []
    for callbacks in ([], [Change()]):
        args = arguments(tmp_path, num_train_epochs=4)
        trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=noisy, callbacks=callbacks)
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)
    assert trainer.balance_mix.settings.prediction_source == "scan"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("relabel_threshold", 0.3, "relabel_threshold is 0.3"),
        ("randaugment_magnitude", 40, "magnitude 40"),
        ("label_warmup_epochs", 2, "label_warmup_epochs is 2; it must be less than the 2 epochs"),
        ("preset", "paper", "preset was 'default' and is now 'paper'"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor"),
        ("global_batch_size", 48, "fewer than one global batch of 48"),
    ],
)
def test_a_changed_setting_is_checked(name, value, message, dataset, tmp_path):
    trainer = BalanceMixTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_hyperparameter_search_trains_with_each_trials_values(noisy, tmp_path):
    optuna = pytest.importorskip("optuna")
    grid = {"relabel_threshold": [0.6, 0.9], "mixup_alpha": [4.0, 0.5], "randaugment_magnitude": [9, 20]}

    def objective(trainer):
        return trainer.predict(noisy).metrics["test_loss"]

    def search(values):
        trainer = BalanceMixTrainer(
            model_init=lambda: tiny_resnet(), args=arguments(tmp_path / "search", judge="network"),
            train_dataset=noisy, eval_dataset=noisy,
        )  # fmt: skip
        space = {name: [values[name]] for name in values}
        trainer.hyperparameter_search(
            hp_space=lambda trial: {name: trial.suggest_categorical(name, space[name]) for name in space},
            compute_objective=lambda metrics: found.append(metrics["eval_loss"]) or metrics["eval_loss"],
            n_trials=2, backend="optuna", sampler=optuna.samplers.GridSampler(space, seed=0),
        )  # fmt: skip
        return trainer

    first = {name: values[0] for name, values in grid.items()}
    trials = [first, *({**first, name: values[1]} for name, values in grid.items())]
    losses = []
    for values in trials:
        found: list[float] = []
        trainer = search(values)
        args = arguments(tmp_path / "alone", judge="network", **values)
        alone = BalanceMixTrainer(model_init=lambda: tiny_resnet(), args=args, train_dataset=noisy)
        alone.train()
        assert found[0] == objective(alone)
        losses.append(found[0])
    assert len(set(losses)) == len(trials)
    trainer.args.relabel_threshold = 0.6  # the model is gone after a search, and drawn by the next training
    trainer.train()
    with pytest.raises(ValueError, match=r"relabel_threshold is 0\.3"):
        search(first | {"relabel_threshold": 0.3})


# ---- names ----


def saved_config(trainer) -> dict:
    trainer.save_model()
    return json.loads((trainer._output_dir / "config.json").read_text())


def test_a_redrawn_model_is_checked_and_named(dataset, tmp_path):
    def draw():
        model = tiny_resnet()
        model.config.problem_type = None
        return model

    args = arguments(tmp_path, channels_last=True)
    trainer = BalanceMixTrainer(model_init=draw, args=args, train_dataset=dataset)
    for _ in range(2):
        first = trainer.model
        trainer.train()
        assert trainer.model is not first
        config = saved_config(trainer)
        assert [*config["id2label"].values()] == NAMES
        assert config["problem_type"] == "multi_label_classification"
        weight = trainer.model.resnet.encoder.stages[1].layers[0].layer[0].convolution.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    trainer.model_init = lambda: tiny_resnet(3)
    with pytest.raises(ValueError, match="the model has 3 outputs and train_dataset 5 classes"):
        trainer.train()


def test_multi_hot_labels_keep_the_models_names_or_get_given_ones(dataset, tmp_path, caplog):
    hot, args = multi_hot(dataset), arguments(tmp_path)
    own = [f"own {k}" for k in range(len(NAMES))]

    def named():
        model = tiny_vit()
        model.config.id2label, model.config.label2id = dict(enumerate(own)), {name: k for k, name in enumerate(own)}
        return model

    for draw in ({"model": named()}, {"model_init": named}):
        with caplog.at_level(logging.WARNING):
            trainer = MultiLabelTrainer(args=args, train_dataset=hot, eval_dataset=hot, **draw)
        assert "classes" not in caplog.text
        trainer.train()
        assert trainer.class_names == own
        assert [*saved_config(trainer)["id2label"].values()] == own
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    tune_thresholds(loaded, hot, processor=trainer.processing_class)  # which has no other names
    trainer = MultiLabelTrainer(
        model=tiny_vit(), args=args, train_dataset=hot, eval_dataset=dataset, class_names=NAMES
    )
    assert [*saved_config(trainer)["id2label"].values()] == trainer.class_names == NAMES
    assert MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=hot).class_names[1] == "LABEL_1"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[:3], "class_names holds 3 names and train_dataset has 5 classes"),
        (NAMES[::-1], "class_names .* differ in name or order"),
        (["a"] * 5, "all different"),
    ],
)
def test_class_names_that_contradict_the_data_are_refused(names, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        MultiLabelTrainer(model=tiny_vit(), args=arguments(tmp_path), train_dataset=dataset, class_names=names)


# ---- the warm-up ----


@pytest.mark.parametrize("method", ["balancemix", "+clean", "co-teaching", "t-estimator", "nar"])
def test_a_warm_up_that_never_ends_is_refused(method, dataset, tmp_path):
    def make(method=method, **changes):
        return trainer_for(method, arguments(tmp_path, **changes), model=tiny_vit(), train_dataset=dataset)

    with pytest.raises(
        ValueError, match=r"label_warmup_epochs is 5; .* less than the 3 epochs .*; set it to 2 or less"
    ):
        make(num_train_epochs=3, label_warmup_epochs=5)
    with pytest.raises(ValueError, match="train for 2 epochs or more"):
        make(num_train_epochs=1, label_warmup_epochs=0)
    with pytest.raises(ValueError, match=r"less than the 2 epochs of this training.* set it to 1 or less"):
        make(num_train_epochs=20, max_steps=12, label_warmup_epochs=2)  # 6 steps an epoch
    make(num_train_epochs=2.5, label_warmup_epochs=2)
    make("+minority", num_train_epochs=1)  # these have no labels to manage
    make("mixup", num_train_epochs=1)
    make("elr", num_train_epochs=1)


def test_the_default_warm_up_is_a_quarter_of_the_epochs(dataset, tmp_path):
    def warmup(**given):
        args = arguments(tmp_path, **{"label_warmup_epochs": None} | given)
        trainer = BalanceMixTrainer(model=tiny_vit(), args=args, train_dataset=dataset)
        assert trainer.balance_mix.settings.label_warmup_epochs == trainer.warmup_epochs
        return trainer

    for epochs, expected in ((2, 1), (3, 1), (8, 2), (7.5, 1), (100, 25), (None, 5)):
        assert warmup(num_train_epochs=epochs).warmup_epochs == expected
    assert warmup(num_train_epochs=None, preset="ml-decoder").warmup_epochs == 10
    assert warmup(max_steps=48).warmup_epochs == 2  # 8 epochs of 6 steps
    assert warmup(max_steps=48, gradient_accumulation_steps=4).warmup_epochs == 6  # of 2
    trainer = warmup(num_train_epochs=8)
    trainer.args.num_train_epochs = 3
    trainer.train()
    assert trainer.args.label_warmup_epochs == 1
